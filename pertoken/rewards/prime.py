"""A process reward that learns while the policy does, from outcomes alone: PRIME.

A language model is trained to tell right answers from wrong ones by its log-ratio to the model that it began as; the
log-ratio of each token is then what the token pays. It learns from the samples of each step after they were paid.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from pertoken.errors import ConfigError, ModelError, RewardError
from pertoken.rewards.base import Scene
from pertoken.rewards.implicit import causal_model, tokenizer_of
from pertoken.types import Episode


def outcome_loss(sums: Float[Tensor, " B"], right: Bool[Tensor, " B"], *, beta: float) -> Float[Tensor, " B"]:
    """Cross-entropy of each answer being right, by the sum of its tokens' log-ratios.

        -log sigmoid(beta * sum_t q_t) if right, else -log sigmoid(-beta * sum_t q_t)

    Cui et al. 2025, https://arxiv.org/abs/2502.01456, sec. 3.

    >>> outcome_loss(torch.tensor([0.4, -0.6]), torch.tensor([True, False]), beta=0.05).mean()
    tensor(0.6807)
    """
    return softplus(torch.where(right, -beta * sums, beta * sums))


@dataclass(eq=False)
class Prime:
    """beta * (log pi_model - log pi_reference) of each token, by a model that goes on learning what is right.

        r_t = beta * q_t          q_t = log pi_model(y_t) - log pi_reference(y_t)

    Both begin as `model`, so nothing is paid in the first step. PRIME: Cui et al. 2025,
    https://arxiv.org/abs/2502.01456. Needs the tokenizer of the policy, and the room of two models, gradients and two
    averages of the optimiser.
    """

    model: str
    """What it begins as, and is compared with: a folder, a hub name, or an embedded one; as a rule the policy's."""
    outcome: str
    """Name of the part of the reward that says whether an answer is right."""
    threshold: float = 0.5
    """Right is an answer that the outcome, without its weight, pays at least this."""
    beta: float = 0.05
    """Reward per nat."""
    learning_rate: float = 1e-6
    """Of its own AdamW; one step for each step of the policy."""
    max_grad_norm: float = 10.0
    """What the norm of its gradient is clipped to."""

    def __post_init__(self) -> None:
        for name in ("beta", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"prime.{name}: expected a number > 0, got {getattr(self, name)}")

    @functools.cached_property
    def _models(self) -> tuple[Any, Any]:
        """The one that learns and the one that stays, without dropout."""
        return causal_model(self.model, "prime.model"), causal_model(self.model, "prime.model").requires_grad_(False)

    @functools.cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """With averages that are there from the beginning, so that a checkpoint can be put in their place."""
        parameters = list(self._models[0].parameters())
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def tensors(self) -> dict[str, Tensor]:
        """All that learning changes, by name."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._models[0].named_parameters():
            found[name] = parameter.detach()
            found |= {f"{name}/{key}": cell for key, cell in self._optimizer.state[parameter].items()}
        return found

    @torch.no_grad()
    def __call__(self, scene: Scene) -> Float[Tensor, "B T"]:
        """The reward at every action, 0 elsewhere."""
        self._refuse_other_ids(scene.tokenizer)
        values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
        for row, episode in enumerate(scene.episodes):
            if any(episode.action_mask):
                start = episode.prompt_length
                values[row, start : len(episode.tokens)] = self.beta * self._log_ratios(episode).double().cpu()
        return torch.where(scene.batch.action_mask.cpu(), values, 0.0)

    def learn(self, scene: Scene, outcomes: Mapping[str, Float[Tensor, " B"]]) -> dict[str, float]:
        """One update by which of the answers of `scene` were right; what is logged of it.

        outcomes: what each part of the reward paid each answer, without its weight; NaN where it has no opinion.
        """
        paid = outcomes[self.outcome]
        rows = [k for k, e in enumerate(scene.episodes) if any(e.action_mask) and not bool(paid[k].isnan())]
        right, sums = paid >= self.threshold, torch.zeros(len(paid))
        total = 0.0
        self._optimizer.zero_grad()
        for row in rows:
            episode = scene.episodes[row]
            acts = torch.tensor(episode.action_mask[episode.prompt_length :], device=self._models[0].device)
            with torch.enable_grad():
                score = torch.where(acts, self._log_ratios(episode), 0.0).sum()
                loss = outcome_loss(score[None], right[row : row + 1].to(score.device), beta=self.beta)[0] / len(rows)
                loss.backward()
            total += loss.item()
            sums[row] = score.item()
        if not rows:
            return {}
        parameters = list(self._models[0].parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if bool(norm.isfinite()):
            self._optimizer.step()
        self._optimizer.zero_grad()
        guessed = torch.where(sums == 0, 0.5, ((sums > 0) == right).float())[rows]
        return {"prime/loss": total, "prime/accuracy": guessed.mean().item()}

    def _log_ratios(self, episode: Episode) -> Float[Tensor, " A"]:
        """q of the tokens from the first action on."""
        trained, reference = self._models
        context = int(getattr(trained.config, "max_position_embeddings", None) or 1 << 30)
        if len(episode.tokens) > context:
            raise RewardError(
                f"prime, episode {episode.id!r}, item {episode.item.id!r}: {len(episode.tokens)} tokens, and the "
                f"context of the model is {context}; shorten prompts (rollout.max_prompt_tokens) or completions"
            )
        row, start = torch.tensor([episode.tokens], device=trained.device), episode.prompt_length
        new, old = (
            model(input_ids=row).logits[0, start - 1 : -1].float().log_softmax(1) for model in (trained, reference)
        )
        ratios: Tensor = (new - old).gather(1, row[0, start:, None]).squeeze(1)
        return ratios

    def _refuse_other_ids(self, tokenizer: Any) -> None:
        if self._known is not tokenizer and self._known.get_vocab() != tokenizer.get_vocab():
            raise ModelError(f"prime: {self.model!r} has another tokenizer than the policy; take one of the same ids")

    @functools.cached_property
    def _known(self) -> Any:
        return tokenizer_of(self.model)
