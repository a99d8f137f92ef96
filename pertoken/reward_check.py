"""What a reward does to texts that training will bring: whether it keeps its contract, and what it gives each token.

`pertoken reward check NAME` prints it. Nothing is sampled: the completions are made of reference answers, whole, cut
off, repeated, scrambled, empty, of one token, and of characters that span several tokens.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pertoken.batching import to_batch
from pertoken.errors import RewardError
from pertoken.observe import token_pieces
from pertoken.rewards import Finding, Scene, Stateful, Weighted, findings, score
from pertoken.rollout.collect import to_episode
from pertoken.sampling import Controls
from pertoken.types import Completion, Item

ITEMS = (
    Item(
        "rain", "Where does rain come from?", "Rain comes from clouds: water rises as vapour and falls when it cools."
    ),
    Item("moon", "Why does the moon shine?", "The moon shines because it reflects the light of the sun."),
)
"""Asked where no data is given."""

ODD = "Naïve café,\t你好 🙂👩‍👩‍👧 — “x” ﷽ e\u0301\n\n3.14"
"""Text whose characters and tokens do not go one to one."""

TOLERANCE = 1e-9

OPINION = "has an opinion"
"""The one promise that depends on which texts are tried."""


@dataclass(frozen=True)
class Verdict:
    """One promise of a reward: whether it was kept, and how it was broken."""

    promise: str
    broken: str = ""


@dataclass(frozen=True)
class Example:
    """A completion with the reward of each of its tokens."""

    kind: str
    text: str
    pieces: list[str]
    values: list[float]
    findings: list[Finding]


@dataclass(frozen=True)
class RewardCheck:
    """All of it."""

    verdicts: list[Verdict]
    examples: list[Example]
    milliseconds: float | None
    """Per 1,000 tokens; None if the reward does not come to an end."""

    @property
    def sound(self) -> bool:
        return not any(verdict.broken for verdict in self.verdicts)


def check_reward(part: Weighted, tokenizer: Any, items: Sequence[Item] = ITEMS) -> RewardCheck:
    """Try `part` on completions of `items`; nothing that it does raises."""
    kinds, scenes = _completions(items, tokenizer)
    fresh = _forgetting(part)
    rows: list[torch.Tensor] = []
    for (kind, item), scene in zip(kinds, scenes, strict=True):
        try:
            fresh()
            rows.append(score([part], scene).total[0])
        except RewardError as error:  # the first is enough: one that hangs would hang on the others, too
            fault = f"{kind} completion of item {item.id!r}: {error}"
            return RewardCheck([Verdict("answers every completion", fault)], [], None)
    verdicts = [Verdict("answers every completion")]
    together = _joined(scenes)
    fresh()
    begun = time.perf_counter()
    score([part], together)
    seconds = time.perf_counter() - begun
    if isinstance(part.reward, Stateful):
        verdicts.append(_state(part))
    else:
        backwards = _joined(scenes[::-1])
        verdicts += [
            _same("gives a completion the same alone and among others", part, together, rows),
            _same("does not depend on the order of the batch", part, backwards, rows[::-1]),
        ]
    if not any(row.any() for row in rows):
        verdicts.append(Verdict(OPINION, "0 for every token of every completion"))
    examples = [
        Example(kind, scene.samples[0].text, _pieces(scene), _own(row, scene), findings([part], scene)[0])
        for (kind, _), scene, row in zip(kinds, scenes, rows, strict=True)
    ]
    tokens = sum(len(scene.samples[0].tokens) for scene in scenes)
    return RewardCheck(verdicts, examples, 1e6 * seconds / tokens)


def _completions(items: Sequence[Item], tokenizer: Any) -> tuple[list[tuple[str, Item]], list[Scene]]:
    """Of each item several kinds of completion, each as a scene of its own."""
    eos = tokenizer.eos_token_id
    kinds, scenes = [], []
    for item in items:
        answer = item.answer or "An answer."
        texts = {
            "good": answer, "repeated": f"{answer} {answer} {answer}", "scrambled": _scrambled(answer), "empty": "",
            "odd": ODD, "cut off": answer[: max(1, len(answer) // 2)], "one token": answer,
        }  # fmt: skip
        prompt = list(tokenizer.encode("?")) or [0]
        for kind, text in texts.items():
            ids = list(tokenizer.encode(text, add_special_tokens=False))
            ended = kind not in ("cut off", "one token") and eos is not None
            ids += [eos] if ended or not ids else []
            ids = ids[:1] if kind == "one token" else ids
            said = Completion(ids, [-1.0] * len(ids), "eos" if ended else "length")
            episode = to_episode(f"{item.id}/{kind}", item, 0, prompt, said, version=0)
            kinds.append((kind, item))
            scenes.append(Scene(to_batch([episode], Controls()), [episode], tokenizer))
    return kinds, scenes


def _scrambled(text: str) -> str:
    """The words in the opposite order, with the mark that closes the text at its end.

    >>> _scrambled("The moon shines.")
    'shines moon The.'
    """
    words = text.rstrip(".!?。！？")
    return " ".join(words.split()[::-1]) + text[len(words) :]


def _joined(scenes: Sequence[Scene]) -> Scene:
    episodes = [scene.episodes[0] for scene in scenes]
    return Scene(to_batch(episodes, Controls()), episodes, scenes[0].tokenizer)


def _same(promise: str, part: Weighted, scene: Scene, alone: Sequence[torch.Tensor]) -> Verdict:
    """Whether the rows of `scene` get what they got alone."""
    try:
        total = score([part], scene).total
    except RewardError as error:
        return Verdict(promise, f"alone each completion has a reward, together: {error}")
    for got, row, episode in zip(total, alone, scene.episodes, strict=True):
        gap = (got[: len(row)] - row).abs().max().item()
        if gap > TOLERANCE + 1e-6 * row.abs().max().item():
            return Verdict(
                promise, f"completion {episode.id!r} has {row.sum():.6g} alone, {got.sum():.6g} among others"
            )
    return Verdict(promise)


def _forgetting(part: Weighted) -> Callable[[], None]:
    """Brings a reward that remembers back to where it is now."""
    reward = part.reward
    if not isinstance(reward, Stateful):
        return lambda: None
    before = reward.get_state()
    return lambda: reward.set_state(before)


def _state(part: Weighted) -> Verdict:
    promise = "remembers what JSON can hold"
    try:
        state = part.state()
        part.reward.set_state(json.loads(json.dumps(state)))  # type: ignore[attr-defined]
        return Verdict(promise, "" if part.state() == state else "set_state(get_state()) changes the state")
    except Exception as error:
        return Verdict(promise, str(error))


def _pieces(scene: Scene) -> list[str]:
    episode = scene.episodes[0]
    return token_pieces(episode.tokens, scene.tokenizer)[episode.prompt_length :]


def _own(row: torch.Tensor, scene: Scene) -> list[float]:
    start = scene.episodes[0].prompt_length
    return [float(value) for value in row[start:]]
