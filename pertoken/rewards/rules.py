"""Costs of form: repeating oneself, too long, too short, not finished."""

from dataclasses import dataclass

from pertoken.errors import ConfigError
from pertoken.rewards.align import word_spans
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans
from pertoken.types import CUT_OFF


@dataclass(frozen=True)
class Repetition(SampleReward):
    """A cost on each word that closes an n-gram of words already seen in the completion (case ignored).

    Punctuation marks count as words here, so a loop of marks costs like a loop of words.
    """

    n: int = 3
    """Length of the n-grams in words."""
    cost: float = 1.0
    """Paid per repeated n-gram, shared by the tokens of the word that closes it."""
    normalised: bool = False
    """Divide by the number of n-grams: the whole completion then costs `cost * (1 - distinct / all)`."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"repetition.n: expected at least 1 word, got {self.n}")

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One span per repeated n-gram: its last word."""
        spans = word_spans(sample.text, marks=True)
        words = [sample.text[start:stop].casefold() for start, stop in spans]
        ngrams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        price = self.cost / len(ngrams) if self.normalised and ngrams else self.cost
        seen: set[tuple[str, ...]] = set()
        found: list[ScoredSpan] = []
        for (start, stop), ngram in zip(spans[self.n - 1 :], ngrams, strict=True):
            if ngram in seen:
                found.append(ScoredSpan(start, stop, -price, f"repeats {' '.join(ngram)!r}"))
            seen.add(ngram)
        return found

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample), sample)


@dataclass(frozen=True)
class Length(SampleReward):
    """A cost per word beyond `max_words` or missing to `min_words`, and a cost of being cut off.

    Linear in the number of words, so there is no cliff at the bounds. A word too many costs its own tokens; missing
    words and a cut-off cost the last action, the one that ended the text or did not.
    """

    min_words: int = 0
    """Shorter completions cost `cost` per missing word, on the last action."""
    max_words: int | None = None
    """Each word after this many costs `cost`, on its tokens; None sets no bound."""
    cost: float = 0.05
    """Per word too many or missing."""
    unfinished_cost: float = 0.0
    """Paid on the last action if the completion was cut off (stop is "length" or "context")."""

    def __post_init__(self) -> None:
        if self.min_words < 0 or (self.max_words is not None and self.max_words < self.min_words):
            raise ConfigError(
                f"length: expected 0 <= min_words <= max_words, got {self.min_words} and {self.max_words}"
            )
        if not self.min_words and self.max_words is None and not self.unfinished_cost:
            raise ConfigError("length: nothing to reward; set min_words, max_words or unfinished_cost")

    def token_values(self, sample: Sample) -> list[float]:
        words = word_spans(sample.text)
        beyond = words[self.max_words :] if self.max_words is not None else []
        values = place_spans([ScoredSpan(start, stop, -self.cost) for start, stop in beyond], sample)
        if True in sample.action_mask:
            last_action = len(sample.tokens) - 1 - sample.action_mask[::-1].index(True)
            values[last_action] -= self.cost * max(self.min_words - len(words), 0)
            values[last_action] -= self.unfinished_cost * (sample.stop in CUT_OFF)
        return values


@dataclass(frozen=True)
class Overlong(SampleReward):
    """DAPO's soft cost of long completions, in tokens: nothing, then falling to -1, and -1 beyond `max_tokens`.

        0 if L <= max_tokens - buffer          ((max_tokens - buffer) - L) / buffer up to max_tokens          then -1

    L counts what the policy wrote, the token that ends it included. Each token of the buffer pays its own share (1 /
    buffer), so the sum over the completion is the formula and the blame stays where the text grew too long.
    Yu et al. 2025, https://arxiv.org/abs/2503.14476, eq. 13.
    """

    max_tokens: int
    """Length at which the whole cost is paid; `rollout.sampling.max_new_tokens` or somewhat less."""
    buffer: int
    """Tokens below `max_tokens` over which the cost grows."""

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.max_tokens:
            raise ConfigError(f"overlong: expected 1 <= buffer <= max_tokens, got {self.buffer} and {self.max_tokens}")

    def token_values(self, sample: Sample) -> list[float]:
        values, written = [0.0] * len(sample.tokens), 0
        for k, acts in enumerate(sample.action_mask):
            written += acts
            if acts and self.max_tokens - self.buffer < written <= self.max_tokens:
                values[k] = -1.0 / self.buffer
        return values
