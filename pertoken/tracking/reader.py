"""The read-only view of a run folder: finished, live, copied or a stranger's."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pertoken.tracking.files import Number, Row, read_bytes
from pertoken.tracking.index import Index, read_index, read_texts
from pertoken.tracking.records import (
    read_episode,
    read_episodes,
    read_evaluations,
    read_item,
    read_items,
    read_metrics,
)
from pertoken.tracking.runlog import episodes_path, evaluation_path, read_run, step_of


class RunReader:
    """Reads a run folder. Each call looks at the disk again, so a live run is seen as it is now.

    A file that is not there yet reads as empty, and the last line that a live run is just writing is left out. What no
    run writes is refused by RunFolderError (`records.py`).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.run()  # a folder that is no run is refused at once

    def run(self) -> Row:
        """`run.json`: status, seed, versions, times."""
        return read_run(self.folder)

    def config_text(self) -> str:
        """`config.yaml` as it stands."""
        return read_bytes(self.folder / "config.yaml").decode(errors="replace")

    def metrics(self) -> dict[str, list[Number | None]]:
        """`metrics.jsonl` by column, all of one length; None where a row lacks the name or was not finite."""
        rows = read_metrics(self.folder / "metrics.jsonl")[0]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    def evaluations(self) -> list[Row]:
        """The rows of `evaluations.jsonl`, oldest first."""
        return read_evaluations(self.folder / "evaluations.jsonl")[0]

    def evaluation_items(self, step: int, split: str) -> list[Row]:
        """The held-out items of one evaluation, with the model's outputs."""
        return read_items(evaluation_path(self.folder, step, split))[0]

    def evaluation_index(self, step: int, split: str) -> Index:
        """What the items of one evaluation are sorted by, and where they lie."""
        return read_index(evaluation_path(self.folder, step, split))

    def some_evaluation_items(self, step: int, split: str, lines: Sequence[int]) -> list[Row]:
        """Some lines of `evaluation_items`, without the others being read."""
        path, index = evaluation_path(self.folder, step, split), self.evaluation_index(step, split)
        return [read_item(path, *index.span(line)) for line in lines]

    def evaluation_texts(self, step: int, split: str) -> Iterator[str]:
        """Id, prompt, answer and output of each item of an evaluation, to be searched."""
        return read_texts(evaluation_path(self.folder, step, split))

    def episode_steps(self) -> list[int]:
        """The steps whose episodes were kept, in order."""
        return sorted(step for path in (self.folder / "episodes").glob("*.jsonl") if (step := step_of(path)) >= 0)

    def episodes(self, step: int) -> list[Row]:
        """The episodes of one step."""
        return read_episodes(episodes_path(self.folder, step))[0]

    def episode_index(self, step: int) -> Index:
        """What the episodes of one step are sorted by, and where they lie."""
        return read_index(episodes_path(self.folder, step))

    def some_episodes(self, step: int, samples: Sequence[int]) -> list[Row]:
        """Some lines of `episodes`, without the others being read."""
        path, index = episodes_path(self.folder, step), self.episode_index(step)
        return [read_episode(path, *index.span(sample)) for sample in samples]

    def episode_texts(self, step: int) -> Iterator[str]:
        """Item, prompt, answer and completion of each episode of a step, to be searched."""
        return read_texts(episodes_path(self.folder, step))

    def _repr_html_(self) -> str:
        from pertoken.tracking import show  # which reads run folders itself

        return show.run(self.folder)._repr_html_()
