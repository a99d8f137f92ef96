"""What a preference-trained model pays each token, by its own log-ratio to the model that it was trained from.

Rows are scored one by one: padded batches would give numbers that depend, in their last digits, on what else is in
the batch.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ConfigError, ModelError, RewardError
from pertoken.hub import NO_CODE, SAFE
from pertoken.machine.cache import cache_folder
from pertoken.prompts import prompt_ids
from pertoken.rewards.align import spread
from pertoken.rewards.base import Scene
from pertoken.types import Episode


@dataclass(frozen=True)
class Implicit:
    """The implicit reward of a model that was trained by DPO (or its like), token by token.

        r_t = beta (log pi_model(y_t | s_t) - log pi_reference(y_t | s_t))

    The sum over a completion is the implicit reward of DPO for the whole text (Rafailov et al. 2023,
    https://arxiv.org/abs/2305.18290), and each term, of an optimal model, the advantage of that token (Rafailov et al.
    2024, https://arxiv.org/abs/2404.12358); as a reward of tokens: RTO, Zhong et al. 2024,
    https://arxiv.org/abs/2404.18922. Both are the plain distributions of the models, without sampling controls. If
    their tokenizer is that of the policy, the policy's own ids are scored; else the text is tokenised anew, and the
    value of each piece goes to the tokens of its characters, that of the end to the last token.
    """

    model: str
    """The trained model: a folder (`runs/dpo-0/model`), a hub name, or an embedded one."""
    reference: str
    """The model that it was trained from, with the same tokenizer."""
    beta: float = 0.1
    """Reward per nat; that of the training gives the reward that it learnt."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"implicit.beta: expected a number > 0, got {self.beta}")

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"]:
        """The reward at every action, 0 elsewhere."""
        judge = _pair(self.model, self.reference)
        own = judge.speaks(scene.tokenizer)
        values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
        for row, (episode, sample) in enumerate(zip(scene.episodes, scene.samples, strict=True)):
            start = episode.prompt_length
            if not sample.tokens:
                continue
            if own:
                found = judge.log_ratios(episode.tokens, start, episode)
            else:
                found = torch.zeros(len(sample.tokens), dtype=torch.float64)
                ids, prompt, spans = judge.own_row(episode, sample.text)
                for (first, last), value in zip(spans, judge.log_ratios(ids, prompt, episode).tolist(), strict=True):
                    at = [(len(found) - 1, value)] if first is None else spread(sample.aligned, first, last, value)
                    for token, share in at:
                        found[token] += share
            values[row, start : start + len(found)] = self.beta * found
        return torch.where(scene.batch.action_mask.cpu(), values, 0.0) if own else values


class _Pair:
    """A trained model, the model that it was trained from, and their tokenizer."""

    def __init__(self, model: str, reference: str) -> None:
        self._models = [causal_model(model, "implicit.model"), causal_model(reference, "implicit.reference")]
        self._tokenizer, other = (tokenizer_of(name) for name in (model, reference))
        if self._tokenizer.get_vocab() != other.get_vocab():
            raise ModelError(
                f"implicit: {model!r} and {reference!r} have different tokenizers; the reference is the model that the "
                "training of the other began with"
            )

    def speaks(self, tokenizer: Any) -> bool:
        """Whether the ids of another tokenizer mean the same here."""
        return tokenizer is self._tokenizer or bool(tokenizer.get_vocab() == self._tokenizer.get_vocab())

    @torch.no_grad()
    def log_ratios(self, ids: Sequence[int], start: int, episode: Episode) -> Float[Tensor, " A"]:
        """log pi_model - log pi_reference of the ids from `start` on."""
        context = min(int(getattr(m.config, "max_position_embeddings", None) or 1 << 30) for m in self._models)
        if len(ids) > context:
            raise RewardError(
                f"implicit, episode {episode.id!r}, item {episode.item.id!r}: {len(ids)} tokens, and the context of "
                f"the models is {context}; shorten prompts (rollout.max_prompt_tokens) or completions"
            )
        row = torch.tensor([list(ids)], device=self._models[0].device)
        trained, reference = (
            model(input_ids=row).logits[0, start - 1 : -1].double().log_softmax(1) for model in self._models
        )
        ratios: Tensor = (trained - reference).gather(1, row[0, start:, None]).squeeze(1).cpu()
        return ratios

    def own_row(self, episode: Episode, text: str) -> tuple[list[int], int, list[tuple[Any, Any]]]:
        """The row in ids of this tokenizer, the length of its prompt, and the characters of each id behind it.

        The id of the end, where the text did end, has no characters: (None, None).
        """
        prompt = prompt_ids(episode.item, self._tokenizer)
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = list(coded["input_ids"]), [tuple(span) for span in coded["offset_mapping"]]
        if episode.terminated and self._tokenizer.eos_token_id is not None:
            ids, spans = [*ids, self._tokenizer.eos_token_id], [*spans, (None, None)]
        return [*prompt, *ids], len(prompt), spans


_pair = functools.lru_cache(maxsize=4)(_Pair)
"""The two models of two names."""


def causal_model(name: str, where: str) -> Any:
    """The frozen language model of a name, in float32; `where` is the setting that names it, for messages."""
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(_source(name), dtype=torch.float32, **SAFE)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where}: {name!r} is no folder of a causal language model and no hub model that can be reached from here "
            f"({str(error)[:200]})"
        ) from error
    return found.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def tokenizer_of(name: str) -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_source(name), **NO_CODE)


def _source(name: str) -> str:
    """Where a model is: an embedded one in the cache, once a policy was made of it."""
    embedded = cache_folder() / "models" / name.lower()
    return str(embedded if (embedded / "config.json").is_file() else Path(name).expanduser())
