"""One set of samples, credited in several ways: how far the ways agree, and how exact and how noisy each of them is.

Samples are the episodes that a run folder keeps, with the streams that it keeps of them. Rewards are placed anew by the
rewards of the run, asked again, and by attention of the model that it trained. Agreement is correlation between
advantages of the same tokens. What no sample can tell, the bias and the noise of the gradient, is computed exactly in a
world that is small enough to list every text (`Toy`).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pertoken import credit
from pertoken.config import ByWorth, Differences, LeaveOneTokenOut, Shapley
from pertoken.errors import ConfigError, PertokenError, RunFolderError, closest
from pertoken.inquiry.kept import Kept, Records
from pertoken.tracking.reader import RunReader
from pertoken.tracking.show import Sheet
from pertoken.training.redistribution import place

BY_WORTH: Mapping[str, ByWorth] = {
    "shapley": Shapley(),
    "leave_one_token_out": LeaveOneTokenOut(),
    "differences": Differences(),
}
"""Ways that score shortened texts, as they are set unless told otherwise."""


@dataclass(frozen=True)
class Rows:
    """What credit is assigned from, in float64; padded on the right."""

    rewards: Float[Tensor, "B T"]
    action_mask: Bool[Tensor, "B T"]
    group: Int[Tensor, " B"]
    logprobs: Float[Tensor, "B T"]
    terminated: Bool[Tensor, " B"]
    values: Float[Tensor, "B T"] | None = None
    """Of a critic; None if the run had none."""
    expected: Float[Tensor, "B T"] | None = None
    """Expected total reward before each action; None if it is not known."""
    trained: Float[Tensor, "B T"] | None = None
    """Advantages that the run itself learnt from."""
    placed: Mapping[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    """Rewards placed anew, by the name of the way."""


def _gae(rows: Rows, lam: float) -> Float[Tensor, "B T"] | None:
    if rows.values is None:
        return None
    last = rows.action_mask & (rows.action_mask.flip(1).cumsum(1).flip(1) == 1)
    after = credit.bootstrap_values(rows.terminated, torch.where(last, rows.values, 0.0).sum(1))
    return credit.gae(rows.rewards, rows.values, rows.action_mask, after, gamma=1.0, lam=lam)[0]


def _monte_carlo(rows: Rows) -> Float[Tensor, "B T"] | None:
    if rows.expected is None:
        return None
    return credit.monte_carlo(rows.rewards, rows.expected, rows.action_mask, rows.action_mask)


def _redistributed(rows: Rows) -> Float[Tensor, "B T"]:
    """The total of a row on its tokens by how improbable they were, then against the other rows."""
    paid = credit.redistribute(rows.rewards.sum(1), -rows.logprobs, rows.action_mask, share=1.0)
    return credit.leave_one_out_process(paid, rows.action_mask, rows.group, gamma=1.0)


def _placed(rows: Rows, name: str) -> Float[Tensor, "B T"] | None:
    if name not in rows.placed:
        return None
    return credit.leave_one_out_process(rows.placed[name], rows.action_mask, rows.group, gamma=1.0)


Method = Callable[[Rows], Float[Tensor, "B T"] | None]
METHODS: Mapping[str, Method] = {
    "as trained": lambda r: r.trained,
    "leave_one_out": lambda r: credit.leave_one_out(r.rewards, r.action_mask, r.group),
    "group_relative": lambda r: credit.group_relative(r.rewards, r.action_mask, r.group, scale_by_std=True),
    "reward_to_go": lambda r: credit.reward_to_go(r.rewards, r.action_mask, gamma=1.0),
    "leave_one_out_process": lambda r: credit.leave_one_out_process(r.rewards, r.action_mask, r.group, gamma=1.0),
    "group_process": lambda r: credit.group_process(r.rewards, r.action_mask, r.group, gamma=1.0, scale_by_std=True),
    "optimal_token_baseline": lambda r: credit.optimal_token_baseline(
        r.rewards, 1.0 - r.logprobs.exp(), r.action_mask, r.group, gamma=1.0
    ),
    "gae, lambda 0.95": lambda r: _gae(r, 0.95),
    "gae, lambda 1": lambda r: _gae(r, 1.0),
    "redistributed": _redistributed,
    "attention": lambda r: _placed(r, "attention"),
    "shapley": lambda r: _placed(r, "shapley"),
    "leave_one_token_out": lambda r: _placed(r, "leave_one_token_out"),
    "differences": lambda r: _placed(r, "differences"),
    "monte_carlo": _monte_carlo,
}
"""Ways to credit by name; one that needs what the samples do not have gives None."""


@dataclass(frozen=True)
class OnSamples:
    """One way on the saved samples."""

    std: float
    """Standard deviation of its advantages over all tokens."""
    within: float
    """Share of their variance that lies between tokens of the same text: 0 where all of them get the same."""


@dataclass(frozen=True)
class OnToy:
    """One way in the small world, against the exact policy gradient."""

    bias: float
    """Length of (mean gradient - exact one), over that of the exact one."""
    cosine: float
    """Of the angle between the two: 1 is the same direction, whatever the step size."""
    noise: float
    """Standard deviation of the gradient of one pair of samples, over the length of the mean."""


@dataclass(frozen=True)
class CreditComparison:
    """What `pertoken credit compare` tells."""

    episodes: int
    tokens: int
    steps: Sequence[int]
    samples: Mapping[str, OnSamples]
    pearson: Mapping[str, Mapping[str, float | None]]
    """Correlation of the advantages of two ways over all tokens; None where one of them is constant."""
    rank: Mapping[str, Mapping[str, float | None]]
    """The same of their ranks (Spearman)."""
    toy: Mapping[str, OnToy]
    alone: int
    """Episodes whose group is themselves alone: nothing to be compared with."""
    skipped: Mapping[str, str]
    """Why a way that asks rewards or a model could not be tried on the samples, by its name."""

    def told(self) -> list[str | Sheet]:
        """All of it as sentences and tables, in their order."""
        alone = f"\n{self.alone} of them are alone in their group: log.episodes_per_step keeps too few"
        names = list(self.samples)
        numbers = [str(k + 1) for k in range(len(names))]
        return [
            f"{self.tokens} tokens of {self.episodes} episodes, steps {', '.join(map(str, self.steps))}"
            + (alone if self.alone else ""),
            Sheet(
                ("credit", "std of A", "within texts", "bias", "cosine", "noise"),
                [self._row(name) for name in dict.fromkeys([*names, *self.toy])],
            ),
            *(f"{name} on these episodes: {why}" for name, why in self.skipped.items()),
            "std and share of variance within texts: on these episodes; bias, cosine to the exact gradient and noise "
            "of a pair: in a\nsmall world where all texts can be listed. Rank correlation of the advantages of two "
            "methods:\n",
            Sheet(
                ("", "credit", *numbers),
                [
                    (number, name, *("" if (r := self.rank[name][other]) is None else f"{r:.2f}" for other in names))
                    for number, name in zip(numbers, names, strict=True)
                ],
            ),
        ]

    def _row(self, name: str) -> tuple[str, ...]:
        samples, toy = self.samples.get(name), self.toy.get(name)
        measured = ("", "") if samples is None else (f"{samples.std:.3g}", f"{samples.within:.0%}")
        exact = ("", "", "") if toy is None else (f"{toy.bias:.3f}", f"{toy.cosine:.3f}", f"{toy.noise:.2f}")
        return (name, *measured, *exact)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        found = dict(vars(self))
        for name in ("samples", "toy"):
            found[name] = {key: vars(row) for key, row in found[name].items()}
        return found


def compare_credit(
    folder: Path,
    *,
    step: int | None = None,
    only: Sequence[str] = (),
    model: str | None = None,
    budget: float = 60.0,
) -> CreditComparison:
    """The ways to credit on the episodes that `folder` keeps (of `step` alone, if given), and in the small world.

    model: whose attention is looked at; None is the one that the run trained. budget: seconds that each way which
    scores shortened texts may take. Raises RunFolderError if the folder keeps no episodes, ConfigError for a name in
    `only` that is no way to credit.
    """
    for name in only:
        if name not in METHODS:
            raise ConfigError(f"no credit method {name!r}; {closest(name, METHODS)}")
    records, steps = _records(folder, step)
    methods = {name: method for name, method in METHODS.items() if not only or name in only}
    rows, skipped = _asked(_rows(folder, records), Kept(folder, records), list(methods), model, budget)
    mask = rows.action_mask
    found = {name: cells for name, method in methods.items() if (cells := method(rows)) is not None}
    flat = {name: cells[mask] for name, cells in found.items()}
    ranks = {name: _ranks(cells) for name, cells in flat.items()}
    sizes = torch.unique(rows.group, return_counts=True)[1]
    toy = Toy.make()
    return CreditComparison(
        episodes=len(mask),
        tokens=int(mask.sum()),
        steps=steps,
        samples={name: OnSamples(float(flat[name].std()), _within(found[name], mask)) for name in found},
        pearson=_matrix(flat),
        rank=_matrix(ranks),
        toy={name: seen for name, method in methods.items() if (seen := toy.judge(method)) is not None},
        alone=int((sizes == 1).sum()),
        skipped=skipped,
    )


def _asked(
    rows: Rows, kept: Kept, names: Sequence[str], model: str | None, budget: float
) -> tuple[Rows, dict[str, str]]:
    """`rows` with what rewards and model say of them for the ways in `names`, and why those are missing that are."""
    found, skipped = {}, {}
    for name in names:
        try:
            if name in BY_WORTH:
                found[name] = kept.placed(BY_WORTH[name], budget)
            elif name == "attention":
                found[name] = credit.redistribute(
                    rows.rewards.sum(1), kept.attention(model), rows.action_mask, share=1.0
                )
        except PertokenError as error:
            skipped[name] = str(error)
    return replace(rows, placed=found), skipped


def read_rows(folder: Path, step: int | None = None) -> tuple[Rows, list[int]]:
    """The kept episodes of a run as one batch, and the steps that they are from. Groups are those of their step."""
    records, steps = _records(folder, step)
    return _rows(folder, records), steps


def _records(folder: Path, step: int | None) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of the kept episodes, in the order of their steps."""
    reader = RunReader(folder)
    steps = reader.episode_steps()
    if step is not None and step not in steps:
        raise RunFolderError(f"{folder} keeps no episodes of step {step}; it has those of {steps}")
    steps = steps if step is None else [step]
    records = [record | {"step": number} for number in steps for record in reader.episodes(number)]
    return [record for record in records if any(record["tokens"]["action"])], steps


def _rows(folder: Path, records: Records) -> Rows:
    if not records or any("reward/total" not in record["streams"] for record in records):
        raise RunFolderError(
            f"{folder} keeps no episodes with rewards (a run on given answers, or log.episodes_per_step 0)"
        )
    width = max(len(record["tokens"]["id"]) for record in records)
    numbers = {key: place for place, key in enumerate(dict.fromkeys(_group(record) for record in records))}

    def stream(name: str) -> Float[Tensor, "B T"] | None:
        if any(name not in record["streams"] for record in records):
            return None
        cells = [record["streams"][name] for record in records]
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in cells], dtype=torch.float64)

    acts = [record["tokens"]["action"] for record in records]
    mask = torch.tensor([[bool(cell) for cell in row] + [False] * (width - len(row)) for row in acts])
    rewards, logprobs = stream("reward/total"), stream("logprob")
    assert rewards is not None
    assert logprobs is not None
    return Rows(
        rewards=torch.where(mask, rewards, 0.0),
        action_mask=mask,
        group=torch.tensor([numbers[_group(record)] for record in records]),
        logprobs=logprobs,
        terminated=torch.tensor([record["stop"] in ("eos", "stop_string") for record in records]),
        values=stream("value"),
        trained=stream("advantage"),
    )


def _group(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["step"], record["group"]


def _within(cells: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    """Share of the variance over actions that is not between rows."""
    count = mask.sum(1, keepdim=True).clamp_min(1)
    own = torch.where(mask, cells, 0.0).sum(1, keepdim=True) / count
    inside = torch.where(mask, cells - own, 0.0).square().sum()
    whole = (cells[mask] - cells[mask].mean()).square().sum()
    return float(inside / whole) if whole > 0 else 0.0


def _ranks(values: Float[Tensor, " A"]) -> Float[Tensor, " A"]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    below = count.cumsum(0) - count
    middles: Tensor = below.double() + (count.double() - 1.0) / 2.0
    return middles[place]


def _matrix(flat: Mapping[str, Float[Tensor, " A"]]) -> dict[str, dict[str, float | None]]:
    return {one: {other: _correlation(flat[one], flat[other]) for other in flat} for one in flat}


def _correlation(x: Float[Tensor, " A"], y: Float[Tensor, " A"]) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    return float((x * y).sum() / size) if size > 1e-12 else None


# --- where all can be listed ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """Every pair of texts of a small world: three tokens, of which one ends the text, and at most three of them.

    A table of random logits is the policy, a random reward falls on each token, the critic is off by a third of the
    spread of the true values. What a way to credit makes of the pairs, weighted by their probability, is compared with
    the gradient of the expected reward.
    """

    rows: Rows
    """Both texts of each pair, one below the other."""
    scores: Float[Tensor, "B T P"]
    """Gradient of each token's log-prob in the logits."""
    probability: Float[Tensor, " N"]
    """Of each pair."""
    gradient: Float[Tensor, " P"]
    """Of the expected total reward."""

    @classmethod
    def make(cls, seed: int = 0, vocabulary: int = 3, length: int = 3) -> "Toy":
        """The world of a seed."""
        g = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(length) for p in itertools.product(range(1, vocabulary), repeat=n)]
        texts = [(*p, 0) for p in prefixes] + list(itertools.product(range(1, vocabulary), repeat=length))
        number = {p: place for place, p in enumerate(prefixes)}
        logits, paid = (torch.randn(len(prefixes), vocabulary, generator=g, dtype=torch.float64) for _ in range(2))
        logprob = logits.log_softmax(1)
        shape = len(texts), length + 1  # column 0 is the prompt
        mask, rewards, logprobs = torch.zeros(shape, dtype=torch.bool), *torch.zeros(2, *shape, dtype=torch.float64)
        scores = torch.zeros(*shape, len(prefixes), vocabulary, dtype=torch.float64)
        for row, text in enumerate(texts):
            for k, token in enumerate(text):
                at, state = (row, k + 1), number[text[:k]]
                mask[at], rewards[at], logprobs[at] = True, paid[state, token], logprob[state, token]
                scores[at][state] = -logprob[state].exp()
                scores[at][state, token] += 1.0
        placed = {
            name: torch.stack([
                place(config, cls._worth(text, lambda at, token: float(paid[number[at], token])),
                      [[k + 1] for k in range(len(text))], length + 1, seed=seed)
                for text in texts
            ])
            for name, config in BY_WORTH.items()
        }  # fmt: skip
        probability, totals = logprobs.sum(1).exp(), rewards.sum(1)
        values, expected = torch.zeros(2, *shape, dtype=torch.float64)
        error = torch.randn(len(prefixes), generator=g, dtype=torch.float64)
        for row, text in enumerate(texts):
            for k in range(len(text)):
                same = [other for other, each in enumerate(texts) if each[:k] == text[:k]]
                mean = (probability[same] * totals[same]).sum() / probability[same].sum()
                expected[row, k + 1] = mean
                values[row, k + 1] = mean - rewards[row, : k + 1].sum()  # of what is still to come
        spread = values[mask].std() / 3
        for row, text in enumerate(texts):
            for k in range(len(text)):
                values[row, k + 1] += spread * error[number[text[:k]]]
        scores = scores.flatten(2)
        gradient = (probability[:, None] * totals[:, None] * scores.sum(1)).sum(0)
        pairs = torch.tensor(list(itertools.product(range(len(texts)), repeat=2)))
        both = pairs.flatten()
        rows = Rows(
            rewards=rewards[both], action_mask=mask[both], group=torch.arange(len(pairs)).repeat_interleave(2),
            logprobs=logprobs[both], terminated=torch.ones(len(both), dtype=torch.bool), values=values[both],
            expected=expected[both], placed={name: cells[both] for name, cells in placed.items()},
        )  # fmt: skip
        return cls(rows, scores[both], probability[pairs].prod(1), gradient)

    @staticmethod
    def _worth(text: Sequence[int], paid: Callable[[tuple[int, ...], int], float]) -> credit.Worth:
        """What is left of a text earns, token by token, what these tokens earn in their new places."""

        def of(left: Sequence[int]) -> float:
            return sum((paid(tuple(left[:k]), token) for k, token in enumerate(left)), 0.0)

        def worth(kept: Bool[Tensor, "S N"]) -> Float[Tensor, " S"]:
            return torch.tensor([of(list(itertools.compress(text, row))) for row in kept.tolist()], dtype=torch.float64)

        return worth

    def judge(self, method: Method) -> OnToy | None:
        """Bias and noise of a way to credit; None if it needs what this world has not."""
        advantages = method(self.rows)
        if advantages is None:
            return None
        each = (advantages[:, :, None] * self.scores).sum(1).view(len(self.probability), 2, -1).mean(1)
        mean = (self.probability[:, None] * each).sum(0)
        variance = (self.probability[:, None] * (each - mean).square()).sum()
        return OnToy(
            bias=float((mean - self.gradient).norm() / self.gradient.norm()),
            cosine=float(torch.cosine_similarity(mean, self.gradient, dim=0)),
            noise=float(variance.sqrt() / mean.norm()),
        )
