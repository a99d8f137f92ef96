"""Staying close to the reference policy, as a reward of every token."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from pertoken.errors import RewardError
from pertoken.rewards.base import Scene


@dataclass(frozen=True)
class KLToReference:
    """Minus the log-ratio of policy to reference at each action; its weight is the usual beta.

        r_t = -(log pi_old(y_t | s_t) - log pi_ref(y_t | s_t))

    This is the estimator k1: unbiased for -KL(pi_old || pi_ref), of either sign at a single token. As a reward
    (a constant to the gradient) with reward-to-go, its expected policy gradient is *exactly* that of the reverse KL
    of whole sequences, effects on later states included; that of k3 as a reward is not, nor is that of any KL in the
    loss (Tang & Munos 2025, https://arxiv.org/abs/2506.09477). Both log-probs are of the processed distribution.
    """

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"]:
        """The reward at every action, 0 elsewhere."""
        if scene.old is None or scene.ref is None:
            missing = "old (the policy's own scoring pass)" if scene.old is None else "ref (a reference policy)"
            raise RewardError(
                f"the KL to the reference needs Scene.{missing}: score the batch with it, or drop this reward"
            )
        return (scene.ref.logprobs - scene.old.logprobs).masked_fill(~scene.batch.action_mask, 0.0)
