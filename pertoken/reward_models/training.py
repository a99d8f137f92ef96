"""From examples to a folder with a learned reward, its figures and its card."""

import copy
import difflib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pertoken.errors import ConfigError, ModelError, NumericsError, RunFolderError, TaskError
from pertoken.hub import NO_CODE, SAFE
from pertoken.machine.portions import nothing_to_cut
from pertoken.preferences import bradley_terry
from pertoken.reward_models.evaluation import (
    PAIR_ABOUT,
    Figures,
    figures_of_classifier,
    figures_of_scorer,
    figures_of_steps,
    table,
)
from pertoken.reward_models.examples import Example, Labelled, Pair, Preference, read_examples
from pertoken.reward_models.losses import (
    centring,
    length_correlation,
    segment_sums,
    squared_error,
)
from pertoken.reward_models.settings import ModelSection, OptimiserSection, Pairs, Preferences, RewardTraining
from pertoken.rewards.semantics import EMBEDDED, SequenceClassifier, minilm_folder, window_of, without_bars
from pertoken.rewards.token_model import Piece, TokenScorer, load_trunk, scored
from pertoken.rows import READERS
from pertoken.tasks.base import Split
from pertoken.tracking.files import sync_folder, sync_whole

Note = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What a training made."""

    folder: Path
    figures: Figures
    """Of the held-out examples, by the weights that were kept."""
    split: str
    """Which split these are of."""
    steps: int


@runtime_checkable
class Learner(Protocol):
    """A model that learns from examples of one kind."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, examples: Sequence[Any]) -> Tensor:
        """Mean over the examples, to be minimised."""
        ...

    def save(self, folder: Path, about: dict[str, Any]) -> None: ...

    def figures(self, examples: Sequence[Any]) -> Figures: ...


def train(config: RewardTraining, *, on_note: Note = lambda text: None) -> Trained:
    """Train a reward as `config` says, and write it to `config.folder`, whole or not at all."""
    folder = Path(config.folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder: {folder} exists already; give another one, or remove it")
    examples = read_examples(config.objective, config.data, config.seed)
    for bad in examples.bad_rows:
        on_note(f"skipped {bad}")
    pool, held_out = examples.splits["train"], examples.splits["validation"]
    if len(pool) < 2 or len(held_out) < 2:
        raise TaskError(
            f"{config.data.path}: {len(pool)} training and {len(held_out)} validation examples, expected at least two "
            "of each: name a validation split, or set data.fractions"
        )
    torch.manual_seed(config.seed)
    learner = _learner(config, pool)
    begun = time.monotonic()
    with nothing_to_cut("Lower optimiser.batch or model.max_tokens, or train fewer layers (model.trained)."):
        steps = _fit(learner, pool, held_out, config.optimiser, config.seed, on_note)
    seconds = time.monotonic() - begun
    split: Split = "test" if len(examples.splits["test"]) > 1 else "validation"
    on_note(f"{steps} steps in {seconds:.0f} s; measuring on {len(examples.splits[split])} {split} examples")
    figures = learner.figures(examples.splits[split])
    about = {
        "training": config.model_dump(mode="json"),
        "examples": {name: len(found) for name, found in examples.splits.items()} | {"skipped": len(examples.bad_rows)},
        "data": _digests(config.data.path),
        "steps": steps,
        "seconds": round(seconds, 1),
        "measured_on": split,
        "figures": figures,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    _write(folder, learner, about)
    return Trained(folder, figures, split, steps)


# --- the loop ---------------------------------------------------------------------------------------------


def _fit(
    learner: Learner,
    pool: Sequence[Example],
    held_out: Sequence[Example],
    settings: OptimiserSection,
    seed: int,
    on_note: Note,
) -> int:
    """Train until the epochs or the time are over, or the held-out loss no longer falls; keep the best weights."""
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    an_epoch = math.ceil(len(pool) / settings.batch)
    total = an_epoch * settings.epochs
    look_every = settings.evaluate_every or max(1, an_epoch // 4)
    best, kept, without = math.inf, _weights(learner.model), 0
    begun, step = time.monotonic(), 0
    for epoch in range(settings.epochs):
        for batch in batches(pool, settings.batch, seed, epoch):
            time_used = (time.monotonic() - begun) / settings.seconds if settings.seconds else 0.0
            rate = _rate(settings, max((step + 0.5) / total, min(time_used, 1.0)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            learner.model.train(settings.dropout)
            loss = learner.loss(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise NumericsError(
                    f"step {step + 1}: the loss is {loss.item()}, its gradient {norm.item()}; lower "
                    "optimiser.learning_rate or raise optimiser.warmup"
                )
            optimiser.step()
            optimiser.zero_grad()
            step += 1
            out_of_time = settings.seconds is not None and time.monotonic() - begun >= settings.seconds
            if step % look_every and step != total and not out_of_time:
                continue
            now = held_out_loss(learner, held_out, settings.batch)
            on_note(f"step {step}/{total}  loss {loss.item():.4f}  held-out loss {now:.4f}")
            if now < best:
                best, kept, without = now, _weights(learner.model), 0
            else:
                without += 1
            if without >= settings.patience or out_of_time:
                learner.model.load_state_dict(kept)
                return step
    learner.model.load_state_dict(kept)
    return step


def batches(pool: Sequence[Example], size: int, seed: int, epoch: int) -> list[list[Example]]:
    """All examples in a seeded order, those of about one length together: of each 32 batches' worth, sorted and cut."""
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = random.permutation(len(pool)).tolist()
    cut: list[list[Example]] = []
    for start in range(0, len(order), 32 * size):
        near = sorted(order[start : start + 32 * size], key=lambda k: pool[k].length)
        cut += [[pool[k] for k in near[i : i + size]] for i in range(0, len(near), size)]
    return [cut[k] for k in random.permutation(len(cut))]


def _rate(settings: OptimiserSection, gone: float) -> float:
    """The learning rate when a share of the training is gone: linear up, then linear down to 0."""
    if gone < settings.warmup:
        return settings.learning_rate * gone / settings.warmup
    return settings.learning_rate * (1 - gone) / (1 - settings.warmup)


@torch.no_grad()
def held_out_loss(learner: Learner, examples: Sequence[Example], size: int) -> float:
    """The mean loss, without dropout, over batches in a fixed order."""
    learner.model.eval()
    ordered = sorted(examples, key=lambda example: example.length)
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return sum(learner.loss(part).item() * len(part) for part in parts) / len(ordered)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


# --- what learns ------------------------------------------------------------------------------------------


def _learner(config: RewardTraining, pool: Sequence[Any]) -> Learner:
    if isinstance(config.objective, Pairs):
        labels = config.objective.labels or tuple(sorted({example.label for example in pool}))
        return PairLearner(config.model, labels)
    objective = config.objective
    model, tokenizer = load_trunk(config.model.trunk, "model.trunk", config.model.layers)
    scorer = TokenScorer(
        model,
        tokenizer,
        sign=config.model.sign,
        total=objective.total if isinstance(objective, Preferences) else "sum",
        context=objective.prompt is not None,
        max_tokens=config.model.max_tokens,
    )
    scorer.to("cuda" if torch.cuda.is_available() else "cpu")
    _freeze(scorer.trunk, config.model.trained)
    if isinstance(objective, Preferences):
        return PreferenceLearner(scorer, objective)
    return StepLearner(scorer) if objective.type == "steps" else SpanLearner(scorer)


def _freeze(trunk: Any, trained: str) -> None:
    if trained == "head":
        trunk.requires_grad_(False)
    elif trained == "layers":
        trunk.get_input_embeddings().requires_grad_(False)


class TokenLearner:
    """What the learners of token scores share."""

    def __init__(self, scorer: TokenScorer) -> None:
        self.model = scorer
        self._known: dict[tuple[str, str], list[Piece]] = {}

    def scores(self, texts: Sequence[tuple[str, str]]) -> tuple[Float[Tensor, "B T"], list[Piece], list[int]]:
        """The scores of (text, context) pairs, the pieces that are their rows, and which text each piece is of."""
        pieces, owner = [], []
        for k, key in enumerate(texts):
            if key not in self._known:
                self._known[key] = self.model.encode(*key)
            pieces += self._known[key]
            owner += [k] * len(self._known[key])
        return self.model(pieces), pieces, owner

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        self.model.save(folder, about)

    def figures(self, examples: Sequence[Any]) -> Figures:
        self.model.eval()
        return figures_of_scorer(self.model, examples)


class PreferenceLearner(TokenLearner):
    """Learns from pairs of texts."""

    def __init__(self, scorer: TokenScorer, objective: Preferences) -> None:
        super().__init__(scorer)
        self._objective = objective

    def loss(self, examples: Sequence[Preference]) -> Tensor:
        """Bradley-Terry over the scores of the texts, and the penalties that are asked for."""
        wanted, count = self._objective, len(examples)
        texts = [(e.chosen, e.prompt) for e in examples] + [(e.rejected, e.prompt) for e in examples]
        scores, pieces, owner = self.scores(texts)
        rows = torch.tensor(owner, device=scores.device)
        totals = scores.new_zeros(2 * count).index_add(0, rows, scores.sum(1))
        lengths = scores.new_zeros(2 * count).index_add(
            0, rows, scores.new_tensor([len(piece.columns) for piece in pieces])
        )
        if wanted.total == "mean":
            totals = totals / lengths.clamp_min(1)
        chosen, rejected = totals[:count], totals[count:]
        loss = bradley_terry(chosen, rejected).mean()
        if wanted.centre:
            loss = loss + wanted.centre * centring(chosen, rejected)
        if wanted.length and count > 1:
            loss = loss + wanted.length * length_correlation(totals, lengths)
        if wanted.sparsity:
            loss = loss + wanted.sparsity * scores.abs().sum() / (2 * count)
        if wanted.shared:
            loss = loss + wanted.shared * self._shared(scores, pieces, owner, count)
        return loss

    def _shared(
        self, scores: Float[Tensor, "B T"], pieces: Sequence[Piece], owner: Sequence[int], count: int
    ) -> Tensor:
        """Per pair, the sum over the tokens that both texts have of |difference of their scores|."""
        cells: list[list[tuple[int, int]]] = [[] for _ in range(2 * count)]
        for row, (piece, text) in enumerate(zip(pieces, owner, strict=True)):
            cells[text] += [(row, column) for column in piece.columns]
        left, right = [], []
        for k in range(count):
            one, other = ([pieces[row].ids[column] for row, column in cells[text]] for text in (k, count + k))
            for i, j in shared_tokens(one, other):
                left.append(cells[k][i])
                right.append(cells[count + k][j])
        if not left:
            return scores.new_zeros(())
        (rows, columns), (other_rows, other_columns) = zip(*left, strict=True), zip(*right, strict=True)
        gap = scores[list(rows), list(columns)] - scores[list(other_rows), list(other_columns)]
        return gap.abs().sum() / count


class SpanLearner(TokenLearner):
    """Learns from ranges with a value."""

    def loss(self, examples: Sequence[Labelled]) -> Tensor:
        """Squared error of each token's score, per text; the value of a range is shared by its tokens."""
        scores, pieces, owner = self.scores([(e.text, e.prompt) for e in examples])
        tokens = [0] * sum(len(e.spans) for e in examples)
        hits: list[tuple[int, int, int]] = []  # row, column, range
        first = np.cumsum([0, *(len(e.spans) for e in examples)])
        for row, (piece, text) in enumerate(zip(pieces, owner, strict=True)):
            for column, (a, b) in zip(piece.columns, piece.spans, strict=True):
                for k, ((start, stop), _) in enumerate(examples[text].spans):
                    if a < stop and start < b:
                        hits.append((row, column, int(first[text]) + k))
                        tokens[int(first[text]) + k] += 1
        values = [value for e in examples for _, value in e.spans]
        targets = torch.zeros(scores.shape)
        for row, column, k in hits:
            targets[row, column] += values[k] / tokens[k]
        mask = scored(pieces, scores.shape[1])
        return squared_error(scores, targets.to(scores), mask.to(scores.device), len(examples))


class StepLearner(TokenLearner):
    """Learns from steps with a label."""

    def loss(self, examples: Sequence[Labelled]) -> Tensor:
        """Cross-entropy of each step's label against the sum over its tokens as log-odds, mean over the steps.

        Lightman et al. 2023, https://arxiv.org/abs/2305.20050; labels between 0 and 1 as Wang et al. 2023
        (Math-Shepherd), https://arxiv.org/abs/2312.08935.
        """
        scores, pieces, owner = self.scores([(e.text, e.prompt) for e in examples])
        first = np.cumsum([0, *(len(e.spans) for e in examples)])
        segments = torch.full(scores.shape, -1)
        for row, (piece, text) in enumerate(zip(pieces, owner, strict=True)):
            for column, (a, b) in zip(piece.columns, piece.spans, strict=True):
                for k, ((start, stop), _) in enumerate(examples[text].spans):
                    if a < stop and start < b:
                        segments[row, column] = int(first[text]) + k
        labels = scores.new_tensor([label for e in examples for _, label in e.spans])
        odds = segment_sums(scores, segments.to(scores.device), len(labels))
        return functional.binary_cross_entropy_with_logits(odds, labels)

    def figures(self, examples: Sequence[Any]) -> Figures:
        self.model.eval()
        return figures_of_steps(self.model, examples)


class PairLearner:
    """Learns labels of texts or pairs: an ordinary classifier of Hugging Face."""

    def __init__(self, settings: ModelSection, labels: Sequence[str]) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if len(labels) < 2:
            raise TaskError(f"a classifier needs at least two labels, the training data has {list(labels)}")
        source = str(minilm_folder()) if settings.trunk == EMBEDDED else str(Path(settings.trunk).expanduser())
        self._columns = {label: k for k, label in enumerate(labels)}
        try:
            with without_bars():
                self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                    source, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=self._columns,
                    dtype=torch.float32, **SAFE, problem_type="single_label_classification",
                    ignore_mismatched_sizes=True,
                )  # fmt: skip
                self._tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.trunk: {settings.trunk!r} is no model in safetensors that can be reached from here "
                f"({str(error)[:200]}); embedded: {EMBEDDED}"
            ) from error
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.model.config.pad_token_id = self._tokenizer.pad_token_id
        window = window_of(self._tokenizer, self.model.config)
        self._window = min(window, settings.max_tokens or window)
        _freeze(self.model.base_model, settings.trained)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _inputs(self, examples: Sequence[Pair]) -> Any:
        second = None if examples[0].second is None else [example.second for example in examples]
        return self._tokenizer(
            [example.first for example in examples], second, truncation="longest_first", max_length=self._window,
            padding=True, padding_side="right", return_tensors="pt",
        ).to(self.model.device)  # fmt: skip

    def loss(self, examples: Sequence[Pair]) -> Tensor:
        """Cross-entropy of the labels."""
        outputs = self.model(**self._inputs(examples)).logits
        wanted = torch.tensor([self._columns[example.label] for example in examples], device=outputs.device)
        return functional.cross_entropy(outputs, wanted)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        with without_bars():
            self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        (folder / PAIR_ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def figures(self, examples: Sequence[Any]) -> Figures:
        return figures_of_classifier(SequenceClassifier(self.model.eval(), self._tokenizer), examples)


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> list[tuple[int, int]]:
    """Places (in one, in other) of the tokens that two texts share, in order: their common beginning, their common end,
    and what difflib matches between. So of a word that is said twice in one of them, the second is the addition.

    >>> shared_tokens([7, 8, 9], [7, 8, 8, 9])
    [(0, 0), (1, 1), (2, 3)]
    """
    least = min(len(one), len(other))
    begin = next((k for k in range(least) if one[k] != other[k]), least)
    most = least - begin
    end = next((k for k in range(most) if one[-1 - k] != other[-1 - k]), most)
    middle = difflib.SequenceMatcher(None, one[begin : len(one) - end], other[begin : len(other) - end], autojunk=False)
    return [
        *((k, k) for k in range(begin)),
        *((begin + m.a + k, begin + m.b + k) for m in middle.get_matching_blocks() for k in range(m.size)),
        *((len(one) - k, len(other) - k) for k in range(end, 0, -1)),
    ]


# --- the folder -------------------------------------------------------------------------------------------


def _write(folder: Path, learner: Learner, about: dict[str, Any]) -> None:
    """Write under another name, bring it to the disk, and rename: no half of a model is ever found under `folder`."""
    draft = folder.with_name(f".partial-{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        learner.save(draft, about)
        (draft / "README.md").write_text(_card(folder.name, about), encoding="utf-8")
        sync_whole(draft)
        if folder.exists():
            folder.rmdir()  # an empty one
        draft.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise RunFolderError(
            f"cannot write the model to {folder}: {error.strerror or error}; free some space or give another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _card(name: str, about: dict[str, Any]) -> str:
    """The model card: what it is, what it learned from, how good it is."""
    training = about["training"]
    objective, counts = training["objective"], about["examples"]
    if objective["type"] == "pairs":
        use = f"{{name: classifier, model: {name}, label: ...}}"
    else:
        use = f"{{name: token_model, path: {name}}}"
    rows = "\n".join(f"| {label} | {value} |" for label, value in table(about["figures"]))
    return (
        f"# {name}\n\nA learned reward, made by `pertoken reward train` from {objective['type']} on the trunk "
        f"`{training['model']['trunk']}`. In a recipe: `rewards: [{use}]`.\n\n"
        f"Trained on {counts['train']} examples of `{json.dumps(training['data']['path'])}` in {about['steps']} steps, "
        f"stopped by {counts['validation']} held-out ones; {counts['skipped']} rows could not be used.\n\n"
        f"| on {counts[about['measured_on']]} {about['measured_on']} examples | |\n|---|---|\n{rows}\n"
    )


def _digests(path: Any) -> dict[str, str]:
    """SHA-256 of the data files, so that a model can be told from one of other data; nothing for a hub's."""
    places = [Path(each).expanduser() for each in (path.values() if isinstance(path, dict) else [path])]
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
    found = {}
    for file in files:
        if file.is_file() and file.suffix in READERS:
            with open(file, "rb") as content:
                found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found
