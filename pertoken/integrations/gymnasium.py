"""Writing a text as a Gymnasium environment: one action is one token (extra `gymnasium`).

    env = gymnasium.make("pertoken.integrations.gymnasium:pertoken/Tokens-v0", items=items, tokenizer=tokenizer,
                         rewards=[Weighted(RougeL(), 1.0, "rouge_l")], sampling=Sampling(max_new_tokens=64))

It is for other libraries and for teaching; training here goes by whole batches.
"""

from collections.abc import Sequence
from typing import Any, Literal, SupportsFloat

import numpy as np

from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.errors import ConfigError, MissingExtraError, TaskError
from pertoken.prompts import prompt_ids
from pertoken.rewards import Scene, Weighted, score
from pertoken.rollout.collect import to_episode
from pertoken.sampling import Controls, Sampling
from pertoken.tasks.base import Split
from pertoken.types import CUT_OFF, Completion, Item, StopReason, TokenRewards

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as missing:
    raise MissingExtraError("gymnasium", "gymnasium", "pertoken.integrations.gymnasium") from missing

NO_TOKEN = -1
"""Stands in an observation behind the ids so far."""
ID = "pertoken/Tokens-v0"
"""Name by which `gymnasium.make` knows the environment."""


class TokenEnv(gymnasium.Env):  # type: ignore[misc]
    """One episode writes the completion of one item.

    Action: the id of the next token. Observation: the ids of prompt and completion so far, `NO_TOKEN` behind them, so
    that the shape stays the same. It terminates with an end token or a stop string, and is truncated where the budget
    of tokens or the context is spent. Whether an action is one that the sampling controls would allow is up to the
    policy that acts.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 10}  # noqa: RUF012 - as Gymnasium has it

    def __init__(
        self,
        items: Sequence[Item],
        tokenizer: Any,
        rewards: Sequence[Weighted],
        *,
        sampling: Sampling | None = None,
        eos_ids: Sequence[int] | None = None,
        vocabulary: int | None = None,
        context_length: int = 2048,
        pay: Literal["progress", "end"] = "progress",
        render_mode: str | None = None,
    ) -> None:
        """sampling: length, stop strings. eos_ids: what ends a text; None is the tokenizer's end token. vocabulary:
        number of actions; None is that of the tokenizer.

        pay "progress": each step earns by how much its token changed the reward of the text so far, cut off there. A
        reward of tokens that does not change its mind later is thus paid token by token as in training, and the sum is
        the reward of the whole text in any case. It asks the rewards at every step; "end" asks and pays once, with the
        last token. Either way `info["token_rewards"]` of the last step has the reward of each token, as training sees
        it, and `info["parts"]` the sums of its parts.
        """
        if not items:
            raise TaskError("a token environment needs items to ask")
        if pay not in ("progress", "end"):
            raise ConfigError(f"pay: expected 'progress' or 'end', got {pay!r}")
        ends = (tokenizer.eos_token_id,) if eos_ids is None else tuple(eos_ids)
        self.items, self.rewards, self.tokenizer = list(items), [part.fixed() for part in rewards], tokenizer
        self.controls = Controls.resolve(sampling or Sampling(), tokenizer, ends)
        self.render_mode, self._pay, self._context = render_mode, pay, context_length
        actions = vocabulary or len(tokenizer)
        self.action_space = spaces.Discrete(actions)
        self.observation_space = spaces.Box(NO_TOKEN, actions - 1, (context_length,), np.int64)
        self._prompt: list[int] = []
        self._tokens: list[int] = []
        self._earned, self._over = 0.0, True
        self._item = self.items[0]

    @classmethod
    def from_config(cls, config: RunConfig, split: Split = "train", **settings: Any) -> "TokenEnv":
        """The environment of a run: its task, rewards, tokenizer and sampling controls."""
        from pertoken import assembly

        policy = assembly.build_policy(config)
        embeddings: Any = policy.hf_model.get_input_embeddings()
        return cls(
            assembly.build_task(config.task).items(split),
            policy.tokenizer,
            assembly.build_rewards(config.rewards),
            sampling=config.rollout.sampling,
            eos_ids=policy.eos_ids,
            vocabulary=int(embeddings.weight.shape[0]),
            context_length=min(policy.context_length, 1 << 20),
            **settings,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], dict[str, Any]]:
        """Begin with an item: a random one, or that with the id `options["item"]`."""
        super().reset(seed=seed)
        wanted = (options or {}).get("item")
        if wanted is None:
            self._item = self.items[int(self.np_random.integers(len(self.items)))]
        else:
            known = {item.id: item for item in self.items}
            if wanted not in known:
                raise TaskError(f"options['item']: no item {wanted!r} among the {len(known)} of this environment")
            self._item = known[wanted]
        self._prompt, self._tokens = prompt_ids(self._item, self.tokenizer), []
        if not 0 < len(self._prompt) < self._context:
            raise TaskError(
                f"item {self._item.id}: its prompt has {len(self._prompt)} tokens; expected 1 to {self._context - 1}: "
                "raise context_length"
            )
        self._earned, self._over = 0.0, False
        return self._observation(), {"item": self._item.id, "prompt_length": len(self._prompt)}

    def step(
        self, action: Any
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], SupportsFloat, bool, bool, dict[str, Any]]:
        """Write a token: observation, reward, terminated, truncated, info."""
        if self._over:
            raise gymnasium.error.ResetNeeded("the text has ended: call reset()")
        self._tokens.append(int(action))
        stop = self._stop()
        self._over = stop is not None
        info: dict[str, Any] = {}
        reward = 0.0
        if self._over or self._pay == "progress":
            found = self._score(stop or "length")
            total = found.total.sum().item()
            reward, self._earned = total - self._earned, total
            if stop is not None:
                info = self._at_the_end(found, stop)
        return self._observation(), reward, stop in ("eos", "stop_string"), stop in CUT_OFF, info

    def render(self) -> str | None:
        """The text so far."""
        return self._text() if self.render_mode == "ansi" else None

    def _stop(self) -> StopReason | None:
        """Why the last token ends the text, if it does; as the rollout engine decides it."""
        sampling, count = self.controls.sampling, len(self._tokens)
        if self._tokens[-1] in self.controls.eos_ids:
            return "eos"
        if count >= sampling.min_new_tokens and any(stop in self._text() for stop in sampling.stop):
            return "stop_string"
        if len(self._prompt) + count >= self._context:
            return "context"
        return "length" if count >= sampling.max_new_tokens else None

    def _score(self, stop: StopReason) -> TokenRewards:
        """The rewards of the text so far, as a completion that ended so."""
        zeros = [0.0] * len(self._tokens)
        episode = to_episode("0", self._item, 0, self._prompt, Completion(self._tokens, zeros, stop), 0)
        batch = to_batch([episode], Controls(eos_ids=self.controls.eos_ids))
        return score(self.rewards, Scene(batch, [episode], self.tokenizer))

    def _at_the_end(self, found: TokenRewards, stop: StopReason) -> dict[str, Any]:
        start = len(self._prompt)
        return {
            "text": self._text(),
            "stop": stop,
            "token_rewards": found.total[0, start:].numpy(),
            "parts": {name: cells.sum().item() for name, cells in found.parts.items()},
        }

    def _text(self) -> str:
        return str(self.tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _observation(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        seen = np.full(self._context, NO_TOKEN, np.int64)
        ids = [*self._prompt, *self._tokens]
        seen[: len(ids)] = ids
        return seen


if ID not in gymnasium.registry:
    gymnasium.register(ID, entry_point=TokenEnv)
