"""Items whose answers are given, as rows to learn from: the prompt's ids, the answer's ids, the id that ends a text.

An answer is tokenised by itself, behind the ids that a rollout would be prompted with: what is trained is exactly
what sampling then continues. The answer and its end are the actions of the row; nothing of it is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pertoken.errors import ModelError, TaskError
from pertoken.prompts import prompt_ids
from pertoken.rollout.collect import to_episode
from pertoken.types import Completion, Episode, Item

Kind = Literal["answers", "pairs", "labels"]
"""What items hold: an answer to imitate; a better and a worse one; an answer and whether it is desirable."""


@dataclass(frozen=True)
class Examples:
    """How the items of a run become rows."""

    kind: Kind
    tokenizer: Any
    end: int
    """The id behind each answer."""
    context_length: int
    start: tuple[int, ...] = ()
    """What answers stand behind where prompts are read apart from them (`forward.decoder_start`)."""

    @classmethod
    def of(
        cls, kind: Kind, tokenizer: Any, end_ids: Sequence[int], context_length: int, start: tuple[int, ...] = ()
    ) -> "Examples":
        """With the id that this tokenizer ends a text with; ModelError if there is none."""
        own = tokenizer.eos_token_id
        if own is None and not end_ids:
            raise ModelError(
                "neither tokenizer nor model names an end-of-text token, so answers cannot be taught to end: set "
                "tokenizer.eos_token and save it with the model."
            )
        return cls(kind, tokenizer, end_ids[0] if own is None else own, context_length, start)

    def texts(self, item: Item) -> list[tuple[str, str, bool]]:
        """The answers of `item`: a name, the text, and whether it is one to learn."""
        if item.answer is None:
            raise TaskError(f"item {item.id} has no answer to learn from: name its column in task.answer")
        if self.kind == "answers":
            return [("answer", item.answer, True)]
        if self.kind == "labels":
            return [("answer", item.answer, bool(item.info["desirable"]))]
        return [("chosen", item.answer, True), ("rejected", str(item.info["rejected"]), False)]

    def episodes(self, items: Sequence[Item], *, step: int = 0) -> tuple[list[Episode], list[bool]]:
        """The rows of `items`, those of one item side by side in a group, and which are ones to learn."""
        rows, good = list[Episode](), list[bool]()
        for group, item in enumerate(items):
            prompt = prompt_ids(item, self.tokenizer)
            for name, text, desirable in self.texts(item):
                rows.append(self._row(f"{step}/{item.id}/{name}", item, group, prompt, self._ids(text), step))
                good.append(desirable)
        return rows, good

    def mismatched(self, items: Sequence[Item], *, step: int = 0) -> list[Episode]:
        """Each prompt with the answers of the next item, as far as the context has room for them."""
        rows = list[Episode]()
        for group, (item, other) in enumerate(zip(items, (*items[1:], *items[:1]), strict=True)):
            prompt = prompt_ids(item, self.tokenizer)
            for name, text, _ in self.texts(other):
                answer = self._ids(text)[: self.context_length - len(self.start or prompt)]
                rows.append(self._row(f"{step}/{item.id}+{other.id}/{name}", item, group, prompt, answer, step))
        return rows

    def fitting(self, items: Sequence[Item], max_tokens: int | None) -> tuple[list[Item], list[str]]:
        """The items of which no row is longer than `max_tokens` or the context, and a note on how many were left out.

        Raises TaskError if none is left, and without `max_tokens` for the first that the context cannot hold.
        """
        limit = min(max_tokens or self.context_length, self.context_length)
        found = list[Item]()
        for item in items:
            longest = self.longest(item)
            if longest <= limit:
                found.append(item)
            elif max_tokens is None:
                raise TaskError(
                    f"item {item.id}: prompt and answer have {longest} tokens, and this model's context is {limit}. "
                    "Shorten them, or set method.max_tokens to leave such items out."
                )
        if items and not found:
            raise TaskError(f"no item has rows of at most {limit} tokens; raise method.max_tokens")
        left_out = len(items) - len(found)
        return found, [f"left out {left_out} of {len(items)} items: over {limit} tokens"] if left_out else []

    def longest(self, item: Item) -> int:
        """Tokens of its longest row, of what the context holds at once."""
        return max(self._length(row) for row in self.episodes([item])[0])

    def _length(self, row: Episode) -> int:
        """Of what the context holds at once: all of it, or the longer of prompt and answer."""
        prompt = row.prompt_length
        return max(prompt, len(self.start) + len(row.tokens) - prompt) if self.start else len(row.tokens)

    def _ids(self, text: str) -> list[int]:
        """An answer as the model would write it; some tokenizers write otherwise than they read (Marian, NLLB)."""
        coded = self.tokenizer(text_target=text, add_special_tokens=False, verbose=False)  # `fitting` tells
        return [*coded["input_ids"], self.end]

    def _row(self, name: str, item: Item, group: int, prompt: list[int], answer: list[int], step: int) -> Episode:
        unknown = [0.0] * len(answer)  # nobody sampled it
        version = max(step - 1, 0)
        return to_episode(name, item, group, prompt, Completion(answer, unknown, "eos"), version)
