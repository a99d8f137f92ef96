"""How odd a frozen language model finds each token of a text.

Texts are scored one by one and remembered: padded batches would give numbers that depend, in their last digits, on what
else is in the batch.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pertoken.errors import ModelError
from pertoken.prompts import prompt_ids
from pertoken.rewards.align import CharSpan, spread
from pertoken.rewards.base import Sample, SampleReward
from pertoken.rewards.implicit import causal_model, tokenizer_of
from pertoken.rewards.semantics import REMEMBERED, other_texts


@dataclass(frozen=True)
class Perplexity(SampleReward):
    """Log-probability of each token under a frozen model; the sum is minus the log of the text's perplexity.

        r_t = log p(y_t | before, y_1 .. y_{t-1}) / n          sum_t r_t = -log perplexity

    n: the number of the model's tokens in the text. The text is tokenised as the frozen model does it, and the value of
    each of its tokens goes to the policy's tokens of the same characters. The end of the text is not judged. A text
    beyond the model's context is read in windows that overlap by half, each token with at least half a context before
    it. The lowest perplexity is that of a phrase said again and again: use it beside a cost on repetition.
    """

    model: str
    """A causal language model: a folder (`runs/warm-start/model`), a hub name, or an embedded one."""
    against: str = ""
    """What is read before the text: nothing, `prompt` (as the model is prompted), `reference`, or a column of
    `task.info`."""
    normalised: bool = True
    """Divide by n; else the sum is the log-probability of the text, and each further token costs."""

    def warm_up(self) -> None:
        _reader(self.model)

    def token_values(self, sample: Sample) -> list[float]:
        values = [0.0] * len(sample.tokens)
        if not values or not sample.text:
            return values
        reader = _reader(self.model)
        said = reader(sample.text, self._before(sample, reader.tokenizer))
        for (start, stop), logprob in said:
            value = logprob / len(said) if self.normalised else logprob
            for token, share in spread(sample.aligned, start, stop, value):
                values[token] += share
        return values

    def _before(self, sample: Sample, tokenizer: Any) -> tuple[int, ...]:
        if not self.against:
            return ()
        if self.against == "prompt":
            return tuple(prompt_ids(sample.item, tokenizer))
        return tuple(tokenizer.encode(other_texts(sample, self.against, "perplexity")[0], verbose=False))


class _Reader:
    """A frozen model that reads texts."""

    def __init__(self, name: str) -> None:
        self._model, self.tokenizer = causal_model(name, "perplexity.model"), tokenizer_of(name)
        self._context = int(getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
        marks = [mark for mark in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if mark is not None]
        if not marks:
            raise ModelError(f"perplexity.model: the tokenizer of {name!r} has no mark of beginning or end of a text")
        self._start = marks[:1]
        self._say = functools.lru_cache(maxsize=REMEMBERED)(self._read)

    def __call__(self, text: str, before: tuple[int, ...]) -> list[tuple[CharSpan, float]]:
        """Characters and log-probability of each token of `text` behind the ids `before`.

        Where nothing is before, the mark of the beginning is (of the end, for models that have no other).
        """
        return self._say(text, before)

    def _read(self, text: str, before: tuple[int, ...]) -> list[tuple[CharSpan, float]]:
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = [*(before or self._start), *coded["input_ids"]]
        first = len(ids) - len(coded["input_ids"])
        spans: list[CharSpan] = [(int(start), int(stop)) for start, stop in coded["offset_mapping"]]
        return list(zip(spans, self.logprobs(ids, first), strict=True))

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int], first: int) -> list[float]:
        """Of the ids from `first` on, each given those before it that its window holds."""
        found: list[float] = []
        while first < len(ids):
            last = min(len(ids), max(first + self._context // 2, self._context))
            begin = max(0, last - self._context)
            row = torch.tensor([ids[begin:last]], device=self._model.device)
            logits = self._model(input_ids=row).logits[0, first - begin - 1 : -1].double()
            chosen = logits.log_softmax(1).gather(1, row[0, first - begin :, None])
            found += chosen.squeeze(1).tolist()
            first = last
        return found


_reader = functools.lru_cache(maxsize=4)(_Reader)
"""The reader of a model's name."""
