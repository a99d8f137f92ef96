"""What there is to read under a path or a hub name, split by split."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken.errors import MissingExtraError, TaskError, closest
from pertoken.rows import READERS, Numbered, rows_of
from pertoken.tasks.base import SPLITS, Split

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""Names of files, or of splits of a Hugging Face dataset, that stand for each split."""


@dataclass(frozen=True)
class Source:
    """The rows of one file, or of one split of a Hugging Face dataset."""

    split: Split | None
    file: str
    rows: Iterable[Numbered]


def sources_of(path: str | Path | Mapping[str, str | Path]) -> list[Source]:
    """What there is to read, train first; `split` is None where the data does not say."""
    if isinstance(path, Mapping):
        if unknown := [name for name in path if name not in SPLITS]:
            raise TaskError(f"task.path: no split {unknown[0]!r}: {closest(unknown[0], SPLITS)}")
        return [_file_source(split, Path(path[split]).expanduser()) for split in SPLITS if split in path]
    place = Path(path).expanduser()
    if place.is_file():
        return [_file_source(None, place)]
    if not place.is_dir():
        return _hub_sources(str(path))
    if any((place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return _dataset_sources(_dataset("load_from_disk", str(place)), str(path))
    return _folder_sources(place)


def _folder_sources(folder: Path) -> list[Source]:
    """train.jsonl, validation.csv, test-00000-of-00002.parquet ...; or the one data file that there is."""
    inside = [*folder.iterdir(), *(folder / "data").glob("*")]  # `data` is where the hub keeps them
    files = sorted(file for file in inside if file.suffix in READERS and file.is_file())
    named = [(split, file) for split in SPLITS for file in files if _split_named(file.name) == split]
    if named:
        return [_file_source(split, file) for split, file in named]
    if len(files) == 1:
        return [_file_source(None, files[0])]
    found = f"found {', '.join(file.name for file in files)}" if files else f"known: {', '.join(READERS)}"
    raise TaskError(f"{folder}: expected data files named train, validation or test ({found})")


def _split_named(name: str) -> Split | None:
    stem = re.split(r"[-.]", name)[0].lower()
    return next((split for split, names in SPLIT_NAMES.items() if stem in names), None)


def _hub_sources(name: str) -> list[Source]:
    if Path(name).suffix in READERS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", name):
        raise TaskError(f"{name}: no such file or folder")
    hub_name, _, part = name.partition(":")
    return _dataset_sources(_dataset("load_dataset", hub_name, part or None), name)


def _dataset_sources(dataset: Any, name: str) -> list[Source]:
    """Of a `datasets.DatasetDict`, or of a single `Dataset`, whose split is not known."""
    if not isinstance(dataset, dict):
        return [Source(None, name, enumerate(dataset, 1))]
    parts = {split: part for part in dataset if (split := _split_named(part))}
    if not parts:
        raise TaskError(f"{name}: expected a split named train, validation or test, got {', '.join(dataset)}")
    return [Source(s, f"{name}[{parts[s]}]", enumerate(dataset[parts[s]], 1)) for s in SPLITS if s in parts]


def _dataset(loader: str, name: str, *arguments: Any) -> Any:
    """What `datasets` loads under a name: of the hub (`owner/name`), or a folder that it saved."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data", f"{name} is no file here; to read it as a dataset") from error
    try:
        return getattr(datasets, loader)(name, *arguments)
    except Exception as error:  # from a missing name to a broken Arrow file, the library raises about anything
        sentence = " ".join(str(error).split())[:300]
        raise TaskError(f"{name}: no file or folder of rows, and not readable as a dataset: {sentence}") from error


def _file_source(split: Split | None, file: Path) -> Source:
    if file.suffix not in READERS:
        raise TaskError(f"{file}: cannot read {file.suffix or 'a file without ending'!r}; known: {', '.join(READERS)}")
    return Source(split, str(file), rows_of(file))
