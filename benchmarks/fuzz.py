"""Random and broken input for what reads files of others; nothing may end in another error than a named one.

    python benchmarks/fuzz.py --minutes 5               # five minutes for each target
    python benchmarks/fuzz.py config align --minutes 30

Targets: `data` (rows of tasks), `config` (YAML files, overrides, chains), `align` (characters of any ids), `checkpoint`
(files of a checkpoint whose manifest was forged to fit), `report` (the page, the checks and the list of a run folder).
Inputs are made by hypothesis: sound files with parts exchanged, in their values or in their bytes, and made-up ones. A
case that is found is made small and kept in tests/cases/TARGET, where tests/test_fuzz.py tries it from then on.
Exits with 1 if any was found.
"""

import argparse
import base64
import copy
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pertoken import assembly
from pertoken.config import RunConfig, load_config, load_stages, validate
from pertoken.errors import PertokenError
from pertoken.jobs import run
from pertoken.rewards.align import align
from pertoken.tasks.base import SPLITS
from pertoken.tasks.files import load_file_task
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.tracking import RunReader
from pertoken.tracking.checkpoints import MANIFEST, CheckpointStore, _digest
from pertoken.tracking.report import render
from pertoken.tracking.runs import find_runs, verify_run

CASES = Path(__file__).parents[1] / "tests" / "cases"

Case = tuple[str, bytes]
"""What is tried: the name of a file, and its content."""

# --- inputs -------------------------------------------------------------------------------------------------

ODD = [
    None, True, 0, -1, 1.5, 10**30, float("inf"), float("nan"), "", " ", "\0", "\ud83d", "a\nb", "../../x", "C:\\x",
    "nul", "<script>", "9" * 30, [], {}, [[]], {"a": {}}, "!!python/name:os.system", "${x}", "x" * 5000,
]  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8), st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=6,
).map(copy.deepcopy)  # a list of ODD, once in a value, has parts exchanged like any other
PIECES = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"'", b"{", b"}", b"[" * 50, b"]", b":", b",", b"- ",
    b"&a ", b"*a", b"<<: *a", b"!!int ", b"%", b"@", b"\t", b"\\ud83d", b"1e999", b"NaN", b"null", b"9" * 5000,
    b"\xed\xa0\xbd",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


@st.composite
def exchanged(draw: st.DrawFn, values: list[Any]) -> Any:
    """One of `values` with one to three of its parts exchanged, left out, or called otherwise."""
    value = copy.deepcopy(draw(st.sampled_from(values)))
    for _ in range(draw(st.integers(1, 3))):
        inner = [path for path in places(value) if path]
        if not inner:
            return draw(VALUES)
        *above, last = draw(st.sampled_from(inner))
        parent = value
        for key in above:
            parent = parent[key]
        what = draw(st.sampled_from(["exchange", "exchange", "leave out", "rename"]))
        if what == "exchange" or isinstance(parent, list):
            parent[last] = draw(VALUES)
        elif what == "leave out":
            del parent[last]
        else:
            parent[draw(st.text(max_size=6))] = parent.pop(last)
    return value


@st.composite
def damaged(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """One of `contents` with some bytes cut out, doubled, or replaced."""
    content = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 12)))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4), st.just(content[begin:end] * 2)))
        content = content[:begin] + piece + content[end:]
    return content


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def lines_of(rows: Any) -> bytes:
    """JSON lines of a list, or of what came in its place."""
    return b"\n".join(map(as_json, rows if isinstance(rows, list) else [rows])) + b"\n"


# --- targets ------------------------------------------------------------------------------------------------


class Target(ABC):
    """Something that reads what others made."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @abstractmethod
    def cases(self) -> st.SearchStrategy[Case]:
        """What is tried."""

    @abstractmethod
    def check(self, name: str, content: bytes) -> None:
        """Raises what is wrong; named errors are not."""


ROWS = [
    {"body": "b", "title": "t", "key": 1},
    {"body": "c ü 猫", "title": ["t", "u"], "key": "k"},
    {"body": "d", "title": "", "key": None, "more": {"a": [1]}},
]


class Data(Target):
    """Rows of data: items, or reasons why not."""

    def cases(self) -> st.SearchStrategy[Case]:
        table = b"body,title,key\nb,t,1\n\"c\nc\",'t',2\n\nd;e,t\n"
        whole = {
            "jsonl": lines_of(ROWS), "ndjson": lines_of(ROWS), "json": as_json(ROWS), "csv": table,
            "tsv": table.replace(b",", b"\t"),
        }  # fmt: skip
        names = st.sampled_from(list(whole))
        of_bytes = names.flatmap(lambda name: st.tuples(st.just(name), damaged([whole[name]])))
        of_values = st.tuples(st.sampled_from(["jsonl", "json"]), exchanged([ROWS]))
        written = of_values.map(lambda pair: (pair[0], lines_of(pair[1]) if pair[0] == "jsonl" else as_json(pair[1])))
        return st.tuples(st.one_of(of_bytes, written), st.sampled_from(["", "id-"])).map(
            lambda pair: (f"{pair[1]}a.{pair[0][0]}", pair[0][1])
        )

    def check(self, name: str, content: bytes) -> None:
        path = self.place / name
        path.write_bytes(content)
        more: dict[str, Any] = {"id": "key", "info": ["key"]} if name.startswith("id-") else {}
        try:
            task = load_file_task(path, prompt="{body}", answer="title", max_bad_rows=10**6, **more)
        except PertokenError:
            return
        items = [item for split in SPLITS for item in task.items(split)]
        assert len({item.id for item in items}) == len(items)
        for item in items:
            (str(item.prompt) + str(item.answer) + item.id).encode()


class Config(Target):
    """A configuration that can be written and read again, or a sentence."""

    def cases(self) -> st.SearchStrategy[Case]:
        default = RunConfig().model_dump(mode="json")
        own = {"task": {"type": "file", "path": "d.jsonl", "prompt": "{p}"}, "stop": {"steps": 2}}
        chain = own | {"stages": [{"name": "a"}, {"name": "b", "kl": {"coefficient": 0.1}}]}
        values = exchanged([default, own, chain, {"algorithm": "ppo"}])
        texts = [RunConfig().to_yaml().encode(), yaml.safe_dump(chain).encode(), b"a: &a {x: 1}\nkl: {<<: *a}\n"]
        keys = st.sampled_from(
            ["seed", "kl.coefficient", "rewards.0.weight", "task.path", "algorithm", "name", "a.b.c"]
        )
        overrides = st.tuples(keys, st.one_of(VALUES.map(json.dumps), st.text(max_size=12))).map("=".join)
        return st.one_of(
            st.tuples(st.just("a.yaml"), values.map(as_json)),
            st.tuples(st.just("a.yaml"), damaged(texts)),
            st.tuples(st.just("override.txt"), overrides.map(lambda text: text.encode(errors="surrogateescape"))),
        ).filter(lambda case: b"\xed" not in case[1] or case[0] != "override.txt")

    def check(self, name: str, content: bytes) -> None:
        path = self.place / name
        path.write_bytes(content)
        try:
            if name == "override.txt":
                load_config([], [content.decode(errors="surrogateescape")])
                return
            stages = load_stages([path])
        except PertokenError:
            return
        for config in stages:
            assert validate(yaml.safe_load(config.to_yaml()), RunConfig) == config


class Align(Target):
    """Characters of ids that no text encodes to: none lost, each owned, in order."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._tokenizers = {"bytes": byte_tokenizer(), "fallback": with_fallback(), "pieces": of_pieces()}

    def cases(self) -> st.SearchStrategy[Case]:
        ids = st.lists(st.integers(0, 2**16 - 1), max_size=40).map(as_json)
        return st.tuples(st.sampled_from(sorted(self._tokenizers)).map("{}.json".format), ids)

    def check(self, name: str, content: bytes) -> None:
        tokenizer = self._tokenizers[Path(name).stem]
        ids = [number % len(tokenizer) for number in json.loads(content)]
        aligned = align(ids, tokenizer)
        assert aligned.text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert len(aligned.char_spans) == len(ids)
        owned = {place for span in aligned.char_spans for place in range(*span)}
        assert owned == set(range(len(aligned.text)))
        ends = [stop for _, stop in aligned.char_spans]
        assert ends == sorted(ends)


def with_fallback() -> Any:
    """As Llama-2 and T5: a metaspace, and bytes for what has no piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁the", "▁cat", "▁", "s", "at", "e", "猫", "▁▁", "\u0301"]
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *((w, -5.0) for w in words)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def of_pieces() -> Any:
    """As BERT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "the",
        "cat",
        "##s",
        "##at",
        ".",
        ",",
        "'",
        "do",
        "n",
        "t",
        "##'",
        "猫",
        "##猫",
        "##",
        "!",
        "##ed",
    ]
    backend = Tokenizer(models.WordPiece({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


class OfRun(Target):
    """Something that reads a run folder: that of a short run of a tiny model, with one file of it replaced."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        tiny_model(seed=1).save_pretrained(place / "model")
        byte_tokenizer().save_pretrained(place / "model")
        rows = [{"id": str(k), "prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(20)]
        (place / "data.jsonl").write_bytes(lines_of(rows))
        self.config = RunConfig.model_validate(
            {
                "folder": str(place / "run"),
                "policy": {"model": str(place / "model"), "precision": "float32", "device": "cpu"},
                "task": {"type": "file", "path": str(place / "data.jsonl"), "prompt": "{prompt}:", "id": "id"},
                "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 3}},
                "kl": {"coefficient": 0.1, "target": 0.05},
                "evaluation": {"items": 2, "sampling": {"max_new_tokens": 3}},
                "checkpoint": {"every": 1, "keep": 1},
                "stop": {"steps": 2},
            }
        )
        run.train(self.config)
        self.folder = self.config.run_folder

    @contextmanager
    def replaced(self, path: Path, content: bytes) -> Iterator[None]:
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            yield
        finally:
            path.write_bytes(before)


class Checkpoints(OfRun):
    """A checkpoint that is loaded, or a sentence."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.run = assembly.build_run(self.config)
        self.checkpoint = CheckpointStore(self.folder / "checkpoints").paths()[-1]

    def cases(self) -> st.SearchStrategy[Case]:
        state = json.loads((self.checkpoint / "state.json").read_bytes())
        manifest = (self.checkpoint / MANIFEST).read_bytes()
        raw = (self.checkpoint / "state.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])

        def safetensors(header: Any) -> bytes:
            text = as_json(header)
            return len(text).to_bytes(8, "little") + text + raw[8 + length :]

        return st.one_of(
            st.tuples(st.just("state.json"), exchanged([state]).map(as_json)),
            st.tuples(st.just("state.safetensors"), exchanged([header]).map(safetensors)),
            st.tuples(st.just("state.safetensors"), damaged([raw[:20_000]])),
            st.tuples(st.just(MANIFEST), exchanged([json.loads(manifest)]).map(as_json)),
            st.tuples(st.just(MANIFEST), damaged([manifest])),
        )

    def check(self, name: str, content: bytes) -> None:
        with self.replaced(self.checkpoint / name, content):
            manifest = content if name == MANIFEST else self._forged(name, content)
            with self.replaced(self.checkpoint / MANIFEST, manifest), suppress(PertokenError):
                found, _ = CheckpointStore(self.folder / "checkpoints").newest()
                if found is not None:
                    assembly.run._go_on(self.run, found.path)

    def _forged(self, name: str, content: bytes) -> bytes:
        """A manifest that says that this is what the file should hold."""
        manifest = json.loads((self.checkpoint / MANIFEST).read_bytes())
        del manifest["sha256"]
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return as_json(manifest | {"sha256": _digest(manifest)})


class Report(OfRun):
    """A page, a list and a verdict on a run folder, or a sentence."""

    FILES = (
        "run.json", "config.yaml", "certificate.json", "metrics.jsonl", "evaluations.jsonl", "episodes/000001.jsonl",
        "evaluations/000000-validation.jsonl",
    )  # fmt: skip

    def cases(self) -> st.SearchStrategy[Case]:
        whole = {name: (self.folder / name).read_bytes() for name in self.FILES}

        def of_file(name: str) -> st.SearchStrategy[Case]:
            by_bytes = damaged([whole[name]])
            if name.endswith(".yaml"):
                return st.tuples(st.just(name), by_bytes)
            lines = name.endswith(".jsonl")
            value = [json.loads(line) for line in whole[name].splitlines()] if lines else json.loads(whole[name])
            by_values = exchanged([value]).map(lines_of if lines else as_json)
            return st.tuples(st.just(name), st.one_of(by_values, by_bytes))

        return st.sampled_from(self.FILES).flatmap(of_file)

    def check(self, name: str, content: bytes) -> None:
        with self.replaced(self.folder / name, content):
            readings: list[Callable[[], object]] = [
                lambda: render(RunReader(self.folder)),
                lambda: verify_run(self.folder),
                lambda: find_runs(self.folder),
            ]
            for reading in readings:
                with suppress(PertokenError):
                    reading()


TARGETS: dict[str, type[Target]] = {
    "data": Data, "config": Config, "align": Align, "checkpoint": Checkpoints, "report": Report,
}  # fmt: skip


# --- trying -------------------------------------------------------------------------------------------------


def where(error: BaseException) -> str:
    """The kind of an error and the line of the package that it came through last: one fault, one name."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/pertoken/" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the check"
    return f"{type(error).__name__} at {place}"


Found = dict[str, tuple[Case, str]]
"""The smallest case of each fault, and what it raised."""


def search(target: Target, seconds: float, source: random.Random) -> tuple[int, Found]:
    """Cases until the time is up: how many, and what they found."""
    end, tried, found = time.monotonic() + seconds, 0, Found()
    while time.monotonic() < end:
        count, latest = _round(target, end, source.randrange(2**32), set(found))
        tried, found = tried + count, found | latest
    return tried, found


def _round(target: Target, end: float, number: int, known: set[str]) -> tuple[int, Found]:
    """Some hundred cases, or fewer if one of them finds a fault that is not `known`: that one is made small."""
    tried, latest = 0, Found()

    @seed(number)
    @settings(
        max_examples=500, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(target.cases())
    def once(case: Case) -> None:
        nonlocal tried
        if tried and time.monotonic() > end and not latest:
            return
        tried += 1
        try:
            target.check(*case)
        except Exception as error:
            if where(error) not in known:
                latest[where(error)] = (case, "".join(traceback.format_exception(error))[-1500:])
                raise

    try:
        once()
    except Exception:
        if not latest:  # it was no check that raised
            raise
    return tried, latest


def keep(name: str, case: Case) -> Path:
    """Write a case to where the tests find it."""
    file, content = case
    path = CASES / name / f"{hashlib.sha256(content).hexdigest()[:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        written = {"file": file, "text": content.decode()}
    except UnicodeDecodeError:
        written = {"file": file, "base64": base64.b64encode(content).decode()}
    path.write_text(json.dumps(written, ensure_ascii=True, indent=1) + "\n", encoding="utf-8")
    return path


def kept(path: Path) -> Case:
    """The inverse of `keep`."""
    written = json.loads(path.read_text(encoding="utf-8"))
    content = written["text"].encode() if "text" in written else base64.b64decode(written["base64"])
    return written["file"], content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all of them if none is named")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    names, faults = options.targets or list(TARGETS), 0
    for name in names:
        place = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        tried, found = search(TARGETS[name](place), 60 * options.minutes, random.Random(options.seed))
        print(f"{name}: {tried} inputs in {options.minutes:g} minutes, {len(found)} faults", flush=True)
        for fault, (case, words) in found.items():
            print(f"  {fault}: {keep(name, case)}\n{words}", flush=True)
        faults += len(found)
        shutil.rmtree(place)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
