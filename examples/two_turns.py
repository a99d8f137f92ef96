"""Two turns in one episode: the policy writes, a tool says what it found, the policy goes on.

    python examples/two_turns.py

A tiny random model learns to write the letter e in both turns. What the tool says stands in the episode, but it was
chosen by nobody: it has no log-prob, gets no credit and takes no time. The tool pays each e on its own token.
"""

# %% a policy and its engine, as in stages_by_hand.py
from collections.abc import Sequence

import torch

from pertoken.batching import to_batch
from pertoken.credit import leave_one_out_process
from pertoken.objectives import aggregate, policy_loss
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rewards import Scene, ScoredSpan, score
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.turns import Reply, converse
from pertoken.types import Credit, Item, Message

tokenizer = byte_tokenizer()
policy = Policy(tiny_model(), tokenizer, precision="float32")
engine = NativeEngine(policy.model, tokenizer, head_logits=head_logits)
optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
items = [Item(str(k), f"Write an e, please ({k}):") for k in range(4)]
controls = Controls.resolve(Sampling(max_new_tokens=6), tokenizer, ())


# %% who answers: it pays each e, and counts them before the second turn
class Counter:
    """Says how many e there were; a turn is over after six tokens."""

    def reply(self, item: Item, messages: Sequence[Message]) -> Reply:
        said = messages[-1]["content"]
        found = [ScoredSpan(k, k + 1, 1 / 12) for k, letter in enumerate(said) if letter == "e"]
        turns = sum(message["role"] == "assistant" for message in messages)
        return Reply(f"\n{len(found)} e. Again:" if turns == 1 else None, reward=found)


# %% generate -> score -> reward -> credit -> update; the same stages as for one turn
for step in range(1, 21):
    episodes = converse(
        engine, items, tokenizer, controls, environment=Counter(), max_turns=2, context_length=128,
        go_on_when_cut=True, samples_per_prompt=16, step=step,
    )  # fmt: skip
    batch = to_batch(episodes, controls)
    old = policy.score(batch)
    rewards = score([], Scene(batch, episodes, tokenizer, old))
    credit = Credit(leave_one_out_process(rewards.total, batch.action_mask, batch.group, gamma=1.0))
    loss = policy_loss(policy.score(batch, grad=True), old, None, credit, batch)
    aggregate(loss.per_token, batch.action_mask, over="token").backward()
    optimizer.step()
    optimizer.zero_grad()
    engine.load_weights(policy.trainable(), version=step)
    if step in (1, 10, 20):
        by_turn = [rewards.total[batch.turn == turn].sum().item() / len(episodes) for turn in (1, 2)]
        print(f"step {step:2}  " + "  ".join(f"turn {k} {value:.3f}" for k, value in enumerate(by_turn, 1)))

# %% one episode: what was chosen, and what was given
for span in episodes[0].spans:
    print(f"{span.role:12}{tokenizer.decode(episodes[0].tokens[span.start : span.stop])!r}")
