"""How good a learned reward is on held-out examples: right, calibrated, and free of length bias, or not."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pertoken.config import validate
from pertoken.errors import ConfigError, ModelError, TaskError
from pertoken.reward_models.examples import Labelled, Pair, Preference, read_examples
from pertoken.reward_models.settings import DataSection, ObjectiveSection, RewardTraining
from pertoken.rewards.align import CharSpan
from pertoken.rewards.semantics import SequenceClassifier
from pertoken.rewards.token_model import ABOUT, TokenScorer, read_about
from pertoken.tasks.base import SPLITS
from pertoken.text_metrics import Interval, bootstrap_mean
from pertoken.tracking.files import write_whole

Scored = Sequence[tuple[CharSpan, float]]
"""Characters and score of each token of a text."""
Figures = dict[str, Any]
Numbers = np.ndarray[Any, np.dtype[Any]]

BINS = 10
PAIR_ABOUT = "pertoken.json"
"""Beside an ordinary classifier: what it was trained on."""


# --- pure figures -----------------------------------------------------------------------------------------


def calibration_error(confidence: Numbers, correct: Numbers) -> float:
    """Expected calibration error: |accuracy - confidence| of the examples in each of 10 bins of confidence, weighted by
    their number. Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3.

    >>> round(calibration_error(np.array([0.95, 0.95, 0.65, 0.65]), np.array([1, 1, 1, 0])), 3)
    0.1
    """
    sure, right = confidence.astype(float), correct.astype(float)
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [abs((right - sure)[bins == each].sum()) for each in range(BINS)]
    return float(sum(gaps) / max(len(sure), 1))


def temperature(loss: Callable[[float], float]) -> float:
    """The T in [0.01, 100] with the least `loss(1 / T)`, convex in 1/T; by golden-section search over log T."""
    low, high = math.log(0.01), math.log(100.0)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        if loss(math.exp(-first)) <= loss(math.exp(-second)):
            high = second
        else:
            low = first
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class SpanFigures:
    """Tokens against labelled ranges."""

    precision: float
    recall: float
    threshold: float
    """Tokens with a score at or below it count as found."""
    negative_share: Interval
    """Of the mass below the baseline, the share on labelled tokens; resampled by text."""
    baseline: float


def span_figures(
    texts: Sequence[Scored],
    labelled: Sequence[Sequence[CharSpan]],
    *,
    baseline: float | None = None,
    threshold: float | None = None,
) -> SpanFigures:
    """Precision, recall and share of the negative mass of token scores on labelled ranges.

    The negative mass of a token is max(0, baseline - score). baseline: None takes the mean score of all tokens out of
    the ranges. threshold: None takes the one with the largest F1 on these very texts, which flatters.
    """
    values = [np.array([value for _, value in scored]) for scored in texts]
    inside = [
        np.array([any(a < stop and start < b for start, stop in ranges) for (a, b), _ in scored], dtype=bool)
        for scored, ranges in zip(texts, labelled, strict=True)
    ]
    scores, bad = np.concatenate(values), np.concatenate(inside)
    if not bad.any():
        raise TaskError("no labelled range has a token: there is nothing to find")
    outside = scores[~bad]
    baseline = float(outside.mean()) if baseline is None and len(outside) else baseline or 0.0
    threshold = _best_threshold(scores, bad) if threshold is None else threshold
    found = scores <= threshold
    hits = int((found & bad).sum())
    masses = [np.maximum(baseline - each, 0.0) for each in values]
    on = np.array([mass[mask].sum() for mass, mask in zip(masses, inside, strict=True)])
    return SpanFigures(
        precision=hits / max(int(found.sum()), 1),
        recall=hits / int(bad.sum()),
        threshold=threshold,
        negative_share=_bootstrap_ratio(on, np.array([mass.sum() for mass in masses])),
        baseline=baseline,
    )


def _best_threshold(scores: Numbers, bad: Numbers) -> float:
    """The score at and below which tokens count as found, for the largest F1."""
    order = np.argsort(scores, kind="stable")
    hits = np.cumsum(bad[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + bad.sum())
    last_of_a_tie = np.append(np.diff(scores[order]) > 0, True)
    return float(scores[order][int(np.argmax(np.where(last_of_a_tie, f1, -1.0)))])


def _bootstrap_ratio(above: Numbers, below: Numbers, seed: int = 0) -> Interval:
    """Sum over sum, with its 95% percentile interval over texts drawn with replacement."""
    count = len(above)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=2000)
    ratios = (draws @ above) / np.maximum(draws @ below, 1e-12)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(above.sum() / max(below.sum(), 1e-12)), float(low), float(high))


def preference_figures(
    chosen: Sequence[float], rejected: Sequence[float], lengths: Sequence[tuple[int, int]]
) -> Figures:
    """Pairwise accuracy (a tie is half), calibration of sigmoid(difference), and what length has to do with it.

    lengths: of the chosen and the rejected text of each pair, in tokens of the model.
    """
    margin = np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float)
    right = (margin > 0) + 0.5 * (margin == 0)
    longer = np.array([c - r for c, r in lengths])
    scores, sizes = np.array([*chosen, *rejected]), np.array([*(c for c, _ in lengths), *(r for _, r in lengths)])
    figures: Figures = {
        "pairs": len(margin),
        "accuracy": _interval(right.tolist()),
        "calibration_error": calibration_error(_sigmoid(np.abs(margin)), right),
        "temperature": temperature(lambda beta: float(np.logaddexp(0, -beta * margin).mean())),
        "length_correlation": _correlation(scores, sizes),
        "chosen_is_longer": float((longer > 0).mean()),
        "mean_token_score_of_chosen": float(np.sum(chosen) / max(sum(c for c, _ in lengths), 1)),
    }
    for name, mask in (("accuracy_where_longer_is_worse", longer < 0), ("accuracy_where_longer_is_better", longer > 0)):
        if mask.any():
            figures[name] = _interval(right[mask].tolist()) | {"pairs": int(mask.sum())}
    return figures


def binary_figures(log_odds: Sequence[float], labels: Sequence[float]) -> Figures:
    """Accuracy and calibration of log-odds against labels in [0, 1]; a label above a half counts as yes."""
    odds, wanted = np.asarray(log_odds, dtype=float), np.asarray(labels, dtype=float)
    right = (odds > 0) == (wanted > 0.5)
    return {
        "steps": len(odds),
        "accuracy": _interval(right.astype(float).tolist()),
        "most_frequent": float(max((wanted > 0.5).mean(), (wanted <= 0.5).mean())),
        "calibration_error": calibration_error(_sigmoid(np.abs(odds)), right),
        "temperature": temperature(lambda beta: float((np.logaddexp(0, beta * odds) - wanted * beta * odds).mean())),
    }


def label_figures(outputs: Numbers, labels: Sequence[int], names: Sequence[str]) -> Figures:
    """Accuracy, recall by label and calibration of raw outputs [N, labels]."""
    wanted = np.asarray(labels)
    right = outputs.argmax(1) == wanted
    logs = _log_softmax(outputs)

    def loss(beta: float) -> float:
        return float(-_log_softmax(beta * outputs)[np.arange(len(wanted)), wanted].mean())

    return {
        "texts": len(wanted),
        "accuracy": _interval(right.astype(float).tolist()),
        "most_frequent": float(max((wanted == each).mean() for each in range(len(names)))),
        "recall": {name: float(right[wanted == k].mean()) for k, name in enumerate(names) if (wanted == k).any()},
        "calibration_error": calibration_error(np.exp(logs.max(1)), right),
        "temperature": temperature(loss),
    }


def _interval(values: Sequence[float]) -> dict[str, float]:
    return dict(vars(bootstrap_mean(values)))


def _sigmoid(values: Numbers) -> Numbers:
    probabilities: Numbers = np.exp(-np.logaddexp(0, -values))
    return probabilities


def _log_softmax(outputs: Numbers) -> Numbers:
    shifted = outputs - outputs.max(1, keepdims=True)
    logs: Numbers = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logs


def _correlation(one: Numbers, other: Numbers) -> float:
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(one, other)[0, 1]) if one.std() > 0 and other.std() > 0 else 0.0


# --- figures of a model -----------------------------------------------------------------------------------


def figures_of_scorer(scorer: TokenScorer, examples: Sequence[Any], *, threshold: float | None = None) -> Figures:
    """Of preferences or labelled spans, by the kind of the examples; one text at a time, as in a run."""
    if isinstance(examples[0], Preference):
        pairs = [(scorer.values(e.chosen, e.prompt), scorer.values(e.rejected, e.prompt)) for e in examples]
        sums = [[sum(value for _, value in scored) for scored in pair] for pair in pairs]
        sizes = [(len(chosen), len(rejected)) for chosen, rejected in pairs]
        return preference_figures([c for c, _ in sums], [r for _, r in sums], sizes)
    texts = [scorer.values(e.text, e.prompt) for e in examples]
    ranges = [[span for span, value in e.spans if value < 0] for e in examples]
    found = span_figures(texts, ranges, threshold=threshold)
    return {
        "texts": len(texts),
        "negative_share": dict(vars(found.negative_share)),
        "baseline": found.baseline,
        "precision": found.precision,
        "recall": found.recall,
        "threshold": found.threshold,
        "threshold_was_given": threshold is not None,
        "labelled_share": _labelled_share(texts, ranges),
    }


def figures_of_steps(scorer: TokenScorer, examples: Sequence[Labelled]) -> Figures:
    """Of steps with labels: the log-odds of a step is the sum over its tokens."""
    odds, labels, firsts = [], [], []
    for example in examples:
        scored = scorer.values(example.text, example.prompt)
        found = [sum(v for (a, b), v in scored if a < stop and start < b) for (start, stop), _ in example.spans]
        wanted = [label for _, label in example.spans]
        odds += found
        labels += wanted
        firsts.append(float(_first_wrong([o > 0 for o in found]) == _first_wrong([w > 0.5 for w in wanted])))
    return binary_figures(odds, labels) | {"solutions": len(firsts), "first_error_found": _interval(firsts)}


def figures_of_classifier(model: SequenceClassifier, examples: Sequence[Pair]) -> Figures:
    """Of labelled texts or pairs."""
    columns = {name: k for k, name in enumerate(model.labels)}
    for example in examples:
        if example.label not in columns:
            raise TaskError(f"the data has the label {example.label!r}, the model {', '.join(columns)}")
    outputs = np.array([model.outputs(example.first, example.second) for example in examples])
    return label_figures(outputs, [columns[example.label] for example in examples], model.labels)


def _first_wrong(right: Sequence[bool]) -> int:
    return list(right).index(False) if False in right else -1


def _labelled_share(texts: Sequence[Scored], ranges: Sequence[Sequence[CharSpan]]) -> float:
    """The share of tokens that lie in a range: the negative share that chance would have."""
    inside = [
        any(a < stop and start < b for start, stop in within)
        for scored, within in zip(texts, ranges, strict=True)
        for (a, b), _ in scored
    ]
    return sum(inside) / max(len(inside), 1)


@dataclass(frozen=True)
class Evaluation:
    """Figures, and what they are of."""

    folder: str
    data: str
    split: str
    objective: str
    figures: Figures
    bad_rows: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """The figures as a table: name, value."""
        return table(self.figures)

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_whole(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode(), "the figures")


def evaluate(
    folder: Path, data: str, overrides: Mapping[str, Any] | None = None, *, split: str | None = None
) -> Evaluation:
    """Measure the learned reward in `folder` on `data`: its test split, else the validation split, else all of a file.

    The columns are those that it was trained with; `overrides` changes fields of the objective, its type included, so a
    model of preferences can be measured on labelled spans.
    """
    about = read_about(folder) if (folder / ABOUT).is_file() else _about_pairs(folder)
    objective = _objective(about, overrides or {})
    whole = {"path": data, "held_out": 10**9, "fractions": (0.0, 0.0, 1.0), "max_bad_rows": 10**9}
    examples = read_examples(objective, DataSection.model_validate(whole), 0)
    filled = [name for name in reversed(SPLITS) if examples.splits[name]]
    chosen = next((name for name in filled if split in (None, name)), None)
    if chosen is None:
        raise TaskError(
            f"{data}: no examples in the split {split or 'test'!r}; there are {', '.join(filled) or 'none'}"
        )
    pool = examples.splits[chosen]
    figures = measure(folder, objective, pool, about)
    bad = tuple(map(str, examples.bad_rows))
    return Evaluation(str(folder), data, chosen, objective.type, figures, bad)


def measure(folder: Path, objective: ObjectiveSection, pool: Sequence[Any], about: Mapping[str, Any]) -> Figures:
    """The figures of the model in `folder` on examples of `objective`."""
    if objective.type == "pairs":
        return figures_of_classifier(SequenceClassifier.load(str(folder), "folder"), pool)
    scorer = TokenScorer.load(folder)
    if objective.type == "steps":
        return figures_of_steps(scorer, pool)
    known = about.get("figures", {}).get("threshold") if objective.type == "spans" else None
    return figures_of_scorer(scorer, pool, threshold=known)


def _objective(about: Mapping[str, Any], overrides: Mapping[str, Any]) -> ObjectiveSection:
    """The objective of the training with `overrides`; another type begins with its own defaults."""
    trained = about["training"]
    own = (
        trained["objective"]
        if overrides.get("type", trained["objective"]["type"]) == trained["objective"]["type"]
        else {}
    )
    training = validate({**trained, "objective": {**own, **overrides}}, RewardTraining)
    kinds = {"pairs"} if trained["objective"]["type"] == "pairs" else {"preferences", "spans", "steps"}
    if training.objective.type not in kinds:
        raise ConfigError(f"type {training.objective.type}: this model can be measured on {', '.join(sorted(kinds))}")
    return training.objective


def _about_pairs(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / PAIR_ABOUT).read_text(encoding="utf-8"))
        _ = about["training"]["objective"]["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} is no folder of `pertoken reward train`: it has neither {ABOUT} nor a sound {PAIR_ABOUT}"
        ) from error
    return dict(about)


def table(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Name and value of each figure, intervals in brackets."""
    rows = []
    for name, value in figures.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and "low" in value:
            of = f" ({value['pairs']} pairs)" if "pairs" in value else ""
            rows.append((label, f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]{of}"))
        elif isinstance(value, Mapping):
            rows += table(value, f"{label}: ")
        else:
            rows.append((label, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows
