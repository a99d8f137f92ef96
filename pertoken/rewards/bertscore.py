"""BERTScore paid as differences between prefixes: how well the tokens of two texts match one another in meaning."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pertoken.errors import ConfigError, ModelError
from pertoken.hub import NO_CODE, SAFE
from pertoken.rewards.align import spread, word_spans
from pertoken.rewards.base import Sample, SampleReward
from pertoken.rewards.metrics.base import Granularity, check_choice
from pertoken.rewards.semantics import EMBEDDED, minilm_folder, other_texts

REMEMBERED = 20_000
"""References whose embeddings, and texts whose values, are kept."""
ROWS = 32
"""Prefixes that go through the encoder at a time."""


@dataclass(frozen=True)
class BertScore(SampleReward):
    """F1 of BERTScore against the references, paid as differences between prefixes of the text.

    Each token of one text is matched with the one of the other whose contextual embedding is closest by cosine;
    precision is the mean over the text, recall over the reference. Several references: the best of them. The encoder
    looks both ways, so each prefix is embedded anew; the sum is the score of the whole text, and an empty one has 0.
    Zhang et al. 2020, https://arxiv.org/abs/1904.09675; without idf weights and without rescaling.
    """

    granularity: Granularity = "word"
    """Share the change of a word over its tokens, or credit each token with its own, or the last with all."""
    model: str = EMBEDDED
    """A transformers encoder: the embedded one, a folder, or a hub name."""
    layer: int = -1
    """Which hidden states: 0 the embeddings, 1 the first layer, ..., -1 the last."""
    against: str = "reference"
    """The other text: `reference`, `prompt`, or the name of a column in `task.info`."""

    def __post_init__(self) -> None:
        check_choice("bertscore.granularity", self.granularity, ("word", "token", "text"))

    def token_values(self, sample: Sample) -> list[float]:
        values, text = [0.0] * len(sample.tokens), sample.text
        if not values or not text.strip():
            return values
        if self.granularity == "token":
            return self._changes(sample, sample.aligned.completed())
        words = word_spans(text, marks=True) if self.granularity == "word" else []
        words = words or [(len(text), len(text))]
        ends = [*(stop for _, stop in words[:-1]), len(text)]
        for (start, stop), change in zip(words, self._changes(sample, ends), strict=True):
            for token, share in spread(sample.aligned, start, stop, change):
                values[token] += share
        return values

    def _changes(self, sample: Sample, ends: Sequence[int]) -> list[float]:
        known = tuple(other_texts(sample, self.against, "bertscore"))
        prefixes = tuple(dict.fromkeys(sample.text[:end] for end in ends))
        scores = dict(zip(prefixes, matcher(self.model, self.layer)(prefixes, known), strict=True))
        return [after - before for before, after in pairwise([0.0, *(scores[sample.text[:end]] for end in ends)])]


def f1(
    text: Float[Tensor, "N H"],
    other: Float[Tensor, "M H"],
    counts: Bool[Tensor, " N"],
    other_counts: Bool[Tensor, " M"],
) -> float:
    """F1 of greedy matching of two lists of embeddings of length 1; only those that count are averaged.

    Marks of beginning and end may be matched and do not count themselves, as in the authors' code.

    >>> one = torch.eye(2, dtype=torch.float64)
    >>> f1(one[:1], one, torch.tensor([True]), torch.tensor([True, True]))  # precision 1, recall 1 / 2
    0.6666666666666666
    """
    cosines = text @ other.T
    if not bool(counts.any()) or not bool(other_counts.any()):
        return 0.0
    precision = cosines.max(1).values[counts].mean().item()
    recall = cosines.max(0).values[other_counts].mean().item()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class _Matcher:
    """Scores of texts against references by one layer of one encoder; the same texts are asked about once."""

    def __init__(self, name: str, layer: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        source = str(minilm_folder()) if name == EMBEDDED else str(Path(name).expanduser())
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
            self._model = AutoModel.from_pretrained(source, **SAFE).eval()
        except (OSError, ValueError) as error:
            raise ModelError(
                f"bertscore.model: {name!r} is no folder of an encoder and no hub model that can be reached from here "
                f"({str(error)[:200]}); embedded: {EMBEDDED}"
            ) from error
        layers = int(self._model.config.num_hidden_layers)
        if not -1 <= layer <= layers:
            raise ConfigError(f"bertscore.layer: {name!r} has the layers 0 to {layers} (or -1, the last), got {layer}")
        self._layer = layer
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        config = self._model.config
        self.limit = min(self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
        ends = (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id)
        self._marks = torch.tensor([mark for mark in ends if mark is not None], dtype=torch.long)
        self._ask: Callable[[tuple[str, ...], tuple[str, ...]], tuple[float, ...]] = functools.lru_cache(REMEMBERED)(
            self._scores
        )
        self._reference = functools.lru_cache(REMEMBERED)(lambda text: self._embed([text])[0])

    def __call__(self, texts: tuple[str, ...], known: tuple[str, ...]) -> tuple[float, ...]:
        return self._ask(texts, known)

    def _scores(self, texts: tuple[str, ...], known: tuple[str, ...]) -> tuple[float, ...]:
        """Texts of one sample go together, so that a score depends on nothing else in the batch."""
        others, scores = [self._reference(text) for text in known], []
        for first in range(0, len(texts), ROWS):
            for embedded, counts in self._embed(texts[first : first + ROWS]):
                scores.append(max(f1(embedded, other, counts, other_counts) for other, other_counts in others))
        return tuple(scores)

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Per text: embeddings of length 1 in float64, and which of its tokens count."""
        stripped = [text.strip() for text in texts]
        inputs: Any = self._tokenizer(
            stripped, padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(**inputs, output_hidden_states=True).hidden_states[self._layer].double().cpu()
        hidden = torch.nn.functional.normalize(hidden, dim=-1)
        ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].bool().cpu()
        counts = ~torch.isin(ids, self._marks)  # an unknown token counts, as in the authors' code
        return [(row[kept], speaks[kept]) for row, kept, speaks in zip(hidden, mask, counts, strict=True)]


matcher = functools.cache(_Matcher)
"""The matcher of a model's name and layer."""
