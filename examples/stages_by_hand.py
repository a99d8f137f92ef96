"""The loop of `pertoken/training/trainer.py` by hand, a call per stage, on a tiny random model: seconds on any CPU.

    python examples/stages_by_hand.py

The cells (`# %%`) open as a notebook in most editors. The model learns to write the letter e, and the reward of each
letter goes to the very token that wrote it.
"""

# %% a policy, what it was before training, and an engine that samples from it
import torch

from pertoken.batching import to_batch
from pertoken.credit import leave_one_out_process
from pertoken.objectives import aggregate, policy_loss
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rewards import KLToReference, Sample, Scene, Weighted, score, token_reward
from pertoken.rollout.collect import collect
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.types import Credit, Item

tokenizer = byte_tokenizer()
policy = Policy(tiny_model(), tokenizer, precision="float32")
reference = policy.reference()
engine = NativeEngine(policy.model, tokenizer, head_logits=head_logits)
optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)

# %% what is asked, how tokens are drawn, and what is good
items = [Item(str(k), f"Write an e, please ({k}):") for k in range(4)]
controls = Controls.resolve(Sampling(max_new_tokens=8), tokenizer, policy.eos_ids)


@token_reward
def letter_e(sample: Sample) -> list[float]:
    """An eighth for each e."""
    return [0.125 * (sample.text[start:stop] == "e") for start, stop in sample.aligned.char_spans]


rewards = [Weighted(letter_e, 1.0, "letter_e"), Weighted(KLToReference(), 0.001, "kl")]

# %% generate -> score -> reward -> credit -> update, twenty times
for step in range(1, 21):
    episodes = collect(engine, items, tokenizer, controls, samples_per_prompt=16, step=step)
    batch = to_batch(episodes, controls)
    old, ref = policy.score(batch), reference.score(batch)
    token_rewards = score(rewards, Scene(batch, episodes, tokenizer, old, ref, step))
    credit = Credit(leave_one_out_process(token_rewards.total, batch.action_mask, batch.group, gamma=1.0))
    loss = policy_loss(policy.score(batch, grad=True), old, ref, credit, batch)
    aggregate(loss.per_token, batch.action_mask, over="token").backward()
    optimizer.step()
    optimizer.zero_grad()
    engine.load_weights(policy.trainable(), version=step)
    if step in (1, 5, 10, 15, 20):
        shown = {name: part.sum(1).mean().item() for name, part in token_rewards.parts.items()}
        print(f"step {step:2}  " + "  ".join(f"{name} {value:+.3f}" for name, value in shown.items()))

# %% what it writes now
print(repr(tokenizer.decode(episodes[0].tokens[episodes[0].prompt_length :])))
