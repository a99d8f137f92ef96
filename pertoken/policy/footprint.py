"""How much memory an update will take: what a probe of this very model keeps for its backward pass, scaled up."""

from dataclasses import dataclass

import torch

from pertoken.policy.model import Policy
from pertoken.policy.scoring import probe, recomputable

PROBE = 64
"""Tokens of the smaller probe; the larger one has twice as many."""

OPTIMISER_COPIES = 3
"""Beside each trained weight: its gradient and AdamW's two averages."""

NATURAL_COPIES = 7
"""With a trust region: its gradient, that of the loss, four vectors of conjugate gradients, and one on the way."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that the backward pass and the optimiser need beside the weights."""

    per_token: float
    """Kept by a pass with gradient, for each token of a micro-batch."""
    per_pass: float
    """Kept by each pass whatever its length: frozen weights in the type of the matrix products."""
    trained: float
    """Gradients and averages of the trained weights."""
    largest: float
    """The largest gradient, of which some exist at once while it is added up."""

    def update(self, tokens: int) -> float:
        """Bytes at the height of an update with micro-batches of `tokens` tokens."""
        return self.trained + self.per_pass + self.per_token * tokens + 2 * self.largest


def footprint(policy: Policy, *, natural: bool = False) -> Footprint:
    """Measured on two short probes, of one group of 4 samples each, half of it actions.

    natural: the policy is moved by `trust_region.py`, and not by AdamW.
    """
    size = min(PROBE, policy.context_length // 2)
    recompute, policy.recompute_activations = policy.recompute_activations, False
    try:
        small, large = _kept(policy, size), _kept(policy, 2 * size)
    finally:
        policy.recompute_activations = recompute
    per_token = kept_by_all = (large - small) / size
    if recompute:  # the inputs of all layers, and the inside of one
        layers, width = len(recomputable(policy.hf_model)), policy.hf_model.config.get_text_config().hidden_size
        per_token = kept_by_all / layers + 4 * width * layers
    sizes = [p.numel() * p.element_size() for p in policy.trainable().values()]
    copies = NATURAL_COPIES if natural else OPTIMISER_COPIES
    per_pass = float(small - kept_by_all * size)
    return Footprint(per_token, per_pass, float(copies * sum(sizes)), float(max(sizes)))


def _kept(policy: Policy, tokens: int) -> int:
    """Bytes of distinct tensors that a pass over `tokens` tokens keeps for its backward, parameters not counted."""
    kept: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        # With its history the tensor would hold the graph that holds it, and neither would ever be freed.
        bare = tensor.detach()
        if address not in own:
            kept[address] = bare
        return bare

    prompt, sample = tokens // 2, tokens // 8
    rows = probe(policy.hf_model, [prompt + sample] * 4, prompt=prompt, groups=[0] * 4)
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.score(rows, grad=True, into_grad=True)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
