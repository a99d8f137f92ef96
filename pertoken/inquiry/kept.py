"""The episodes that a run folder keeps, made whole again: items, tokenizer and rewards as its configuration says.

So the rewards of a run can be asked further questions when it is over: what its texts are worth with some tokens taken
out. Whoever asks is told in one sentence what cannot be had again (`RunFolderError`).
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer

from pertoken.assembly import build_rewards, build_task
from pertoken.batching import to_batch
from pertoken.config import ByWorth, RunConfig, load_config
from pertoken.errors import RunFolderError
from pertoken.hub import NO_CODE
from pertoken.policy.model import Policy, load_model
from pertoken.rewards import Learns, Multiplier, Scene, Stateful, Weighted, score
from pertoken.sampling import Controls
from pertoken.training.redistribution import blocks_of, by_worth, most_texts
from pertoken.types import Episode, Item, Span, TokenRewards

Records = Sequence[Mapping[str, Any]]
"""Lines of `episodes/<step>.jsonl`, step by step."""


@dataclass(frozen=True)
class Kept:
    """Episodes of a run, and what they were paid."""

    folder: Path
    records: Records

    @cached_property
    def config(self) -> RunConfig:
        return load_config([self.folder / "config.yaml"])

    @cached_property
    def tokenizer(self) -> Any:
        """That of the trained model, or of the one that training began with."""
        trained = self.folder / "model"
        if trained.is_dir():
            return AutoTokenizer.from_pretrained(trained, **NO_CODE)
        return load_model(self.config.policy.model)[1]

    @cached_property
    def scenes(self) -> list[tuple[Scene, TokenRewards]]:
        """Step by step: the episodes with the items of the task, and the rewards that were saved with them."""
        items = {item.id: item for item in build_task(self.config.task).items("train")}
        sampling = self.config.rollout.sampling.untruncated()
        end, found = self.tokenizer.eos_token_id, []
        controls = Controls(sampling, () if end is None else (end,))
        for step, records in groupby(self.records, key=lambda record: record["step"]):
            rows = list(records)
            for record in rows:
                if record["item"] not in items:
                    raise RunFolderError(f"the task has no item {record['item']!r} any more")
            episodes = [episode_of(record, items[record["item"]]) for record in rows]
            batch = to_batch(episodes, controls)
            found.append((Scene(batch, episodes, self.tokenizer, step=step), _earned(rows, batch.tokens.shape[1])))
        return found

    @cached_property
    def rewards(self) -> list[Weighted]:
        """The rewards of the run, which pay the episodes what they were paid, and `seconds` that a text takes.

        Raises RunFolderError for one that remembers, learns, compares with the batch, or costs money.
        """
        rewards = steady_rewards(self.config)
        for scene, earned in self.scenes:
            now = score(rewards, scene)
            for part in rewards:
                if part.name not in earned.parts:
                    raise RunFolderError(f"the episodes were saved without reward {part.name!r}")
                was, anew = earned.parts[part.name].sum(1), now.parts[part.name].sum(1)
                for row in ((anew - was).abs() > 1e-3 * (1 + was.abs())).nonzero()[:1, 0].tolist():
                    raise RunFolderError(
                        f"reward {part.name!r} pays {scene.episodes[row].id} {anew[row]:.4g}, and paid {was[row]:.4g}"
                    )
        return rewards

    @cached_property
    def seconds(self) -> float:
        """That the rewards take for one text."""
        rewards, begun = self.rewards, time.perf_counter()
        for scene, _ in self.scenes:
            score(rewards, Scene(scene.batch, scene.episodes, scene.tokenizer, step=scene.step))
        return (time.perf_counter() - begun) / len(self.records)

    def placed(self, config: ByWorth, budget: float) -> Float[Tensor, "B T"]:
        """The rewards of the episodes, placed anew; RunFolderError if that would take more than `budget` seconds."""
        rewards, texts = self.rewards, 0
        for scene, _ in self.scenes:
            for episode, sample in zip(scene.episodes, scene.samples, strict=True):
                blocks = blocks_of(config, episode, sample.aligned, scene.batch.controls.sampling.max_new_tokens)
                texts += most_texts(config, len(blocks))
        if texts * self.seconds > budget:
            raise RunFolderError(
                f"{texts:,} texts to score take about {texts * self.seconds:,.0f} s, and the budget is {budget:g} s"
            )
        return self._joined([
            by_worth(config, earned, scene, rewards, seed=self.config.seed)[0].total for scene, earned in self.scenes
        ])  # fmt: skip

    def attention(self, model: str | None) -> Float[Tensor, "B T"]:
        """How the last token of each episode attends to the others, in `model` or else the one that was trained."""
        trained = self.folder / "model"
        if model is None and not trained.is_dir():
            raise RunFolderError("the run folder holds no trained model (yet); name one with --model")
        policy = Policy(*load_model(model or str(trained)), compile=False)
        if policy.layout != "packed":
            raise RunFolderError(f"{type(policy.hf_model).__name__} attends in a way that cannot be looked into here")
        if self.config.rollout.sampling.segment is not None:
            raise RunFolderError("the texts were written by segments: no token sees all of a text")
        return self._joined([policy.last_attention(scene.batch) for scene, _ in self.scenes])

    def _joined(self, cells: Sequence[Tensor]) -> Float[Tensor, "B T"]:
        """The rows of all steps, padded alike."""
        width = max(each.shape[1] for each in cells)
        return torch.cat([torch.nn.functional.pad(each.double(), (0, width - each.shape[1])) for each in cells])


def steady_rewards(config: RunConfig) -> list[Weighted]:
    """The rewards of a run, if they pay a text the same at any time and beside any others, and for nothing.

    Raises RunFolderError for one that remembers, learns, is measured by its batch, or costs money.
    """
    rewards = build_rewards(config.rewards)
    for part, settings in zip(rewards, config.rewards, strict=True):
        if isinstance(part.reward, Stateful | Learns):
            raise RunFolderError(f"reward {part.name!r} remembers or learns, and was another one at each step")
        if part.normaliser is not None or isinstance(part.weight, Multiplier):
            raise RunFolderError(f"reward {part.name!r} has `normalise` or a constraint: other units in each batch")
        if '"name": "judge"' in json.dumps(settings.model_dump(mode="json")):
            raise RunFolderError(f"reward {part.name!r} asks a judge, whose answers may cost money")
    return rewards


def episode_of(record: Mapping[str, Any], item: Item) -> Episode:
    """The episode that a line of `episodes/<step>.jsonl` tells of."""
    tokens, acts = record["tokens"]["id"], [bool(cell) for cell in record["tokens"]["action"]]
    start = acts.index(True)
    return Episode(
        id=record["id"], item=item, group=record["group"], tokens=tokens, action_mask=acts,
        logprobs=[float(number) for number in record["streams"]["logprob"]], env_rewards=[0.0] * len(tokens),
        spans=[Span(0, start, "prompt", 0), Span(start, len(tokens), "action", 1)], stop=record["stop"],
        policy_version=tuple(record["policy_version"]),
    )  # fmt: skip


def _earned(records: Records, width: int) -> TokenRewards:
    """The parts of the reward that were saved, and their sum."""
    names = [name for name in records[0]["streams"] if name.startswith("reward/")]

    def cells(name: str) -> Tensor:
        rows = [record["streams"][name] for record in records]
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)

    parts = {name.removeprefix("reward/"): cells(name) for name in names}
    return TokenRewards(parts.pop("total"), parts)
