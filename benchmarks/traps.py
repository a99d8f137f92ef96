"""Seven mistakes of earlier systems, shown in their own functions, beside what ours does with the same numbers.

    python benchmarks/oracles.py        # once: fetches the systems
    python benchmarks/traps.py          # prints the table of docs/correctness.md; exits with 1 if ours fails

Each trap is a world of a few numbers with a known answer. `theirs` is what the functions of verl 0.9.1, OpenRLHF
0.11.2, SkyRL 0.3, TRL 1.10 (1.16 has no PPO) and RL4LMs return; a system that is not at hand is left out. In RL4LMs
METEOR and the intent classifier are replaced by the scores that a text is written to have: they need downloads, and the
mistake is not in them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from oracles import at_hand, functions, statements
from torch import Tensor

from pertoken import credit
from pertoken.batching import to_batch
from pertoken.errors import RewardError
from pertoken.rewards import Scene, Weighted, resolve, score
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, episode
from pertoken.types import Item


@dataclass(frozen=True)
class Finding:
    """What came out for one trap in one system."""

    trap: str
    right: str
    theirs: str
    """The function, and what it returned."""
    ours: str
    fell: bool
    """Whether the other system is in the trap."""
    held: bool
    """Whether ours gives what is right."""


def numbers(row: Tensor | Sequence[float]) -> str:
    return " ".join(f"{x:.3f}".rstrip("0").rstrip(".") for x in torch.as_tensor(row).flatten().tolist())


def close(a: Tensor, b: Tensor | Sequence[float]) -> bool:
    return bool(torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), atol=1e-6))


def verl_advantages() -> Any:
    tensors = functions("verl tensors", "masked_sum", "masked_mean", "masked_var", "masked_whiten", torch=torch)
    names = ("compute_gae_advantage_return", "compute_reinforce_plus_plus_outcome_advantage")
    return functions("verl", *names, torch=torch, verl_F=tensors)


def skyrl_advantages() -> Any:
    mean = functions("skyrl tensors", "masked_mean", torch=torch).masked_mean
    whiten = functions("skyrl", "masked_whiten", "masked_var", torch=torch, masked_mean=mean).masked_whiten
    names = ("compute_gae_advantage_return", "compute_reinforce_plus_plus_outcome_advantage")
    return functions("skyrl", *names, torch=torch, masked_whiten=whiten)


def r1_reward_on_a_masked_tail() -> Iterator[Finding]:
    """Three actions and a cut-off tool reply, which the reward of 1 lies on."""
    rewards, mask, none = torch.tensor([[0.0, 0, 0, 1]]), torch.tensor([[1.0, 1, 1, 0]]), torch.zeros(1, 4)
    try:
        credit.reward_to_go(rewards, mask.bool(), gamma=1.0)
        said, held = "took it", False
    except ValueError as error:
        said, held = f"ValueError: {str(error).split(';')[0]}", True
    if at_hand("verl"):
        verl = verl_advantages()
        for name, (_, returns) in {
            "verl GAE": verl.compute_gae_advantage_return(rewards, none, mask, 1.0, 1.0),
            "verl REINFORCE++": verl.compute_reinforce_plus_plus_outcome_advantage(
                rewards, mask, SimpleNamespace(gamma=1.0)
            ),
        }.items():
            credited = returns * mask
            theirs = f"{name}: returns {numbers(credited[0, :3])}"
            yield Finding("R1", "1 credited, or refused", theirs, said, not credited.any(), held)


def r2_values_across_a_gap() -> Iterator[Finding]:
    """V is 0.8 everywhere and the reward 0.8: nothing is better or worse than expected."""
    mask = torch.tensor([[1.0, 1, 0, 0, 1, 1]])
    values, rewards = 0.8 * torch.ones(1, 6), torch.tensor([[0, 0, 0, 0, 0, 0.8]])
    ours, _ = credit.gae(rewards, values, mask.bool(), torch.zeros(1), gamma=1.0, lam=0.9)
    if at_hand("openrlhf"):
        gae = functions("openrlhf", "get_advantages_and_returns", torch=torch, Tuple=tuple).get_advantages_and_returns
        theirs, _ = gae(None, values, rewards, mask, 1.0, 0.9)
        bare, _ = gae(None, values[:, 2:], rewards[:, 2:], torch.ones(1, 4), 1.0, 0.9)
        acted = theirs[mask.bool()]
        text = f"OpenRLHF GAE: {numbers(acted)} (without the reply {numbers(bare)})"
        yield Finding(
            "R2",
            "0 0 0 0",
            text,
            numbers(ours[mask.bool()]),
            bool(acted.abs().max() > 0.01),
            close(ours, torch.zeros(1, 6)),
        )


def r3_values_of_padding() -> Iterator[Finding]:
    """Two rows, the first padded by one cell; what the critic says of padding is 0, then 5."""
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    rewards, values = torch.tensor([[0.0, 1, 0], [0, 0, 1]]), torch.tensor([[0.2, 0.4, 0], [0.1, 0.3, 0.5]])
    dirty = values + 5.0 * (1 - mask)

    def own(values: Tensor) -> Tensor:
        return credit.gae(rewards, values, mask.bool(), torch.zeros(2), gamma=1.0, lam=0.9)[0]

    if at_hand("skyrl"):
        theirs = [
            skyrl_advantages().compute_gae_advantage_return(rewards, v, mask, 1.0, 0.9)[0] for v in (values, dirty)
        ]
        text = f"SkyRL GAE, whitened: {numbers(theirs[0][0, :2])}, then {numbers(theirs[1][0, :2])}"
        fell = not close(theirs[0] * mask, theirs[1] * mask)
        said = f"{numbers(own(values)[0, :2])}, then {numbers(own(dirty)[0, :2])}"
        yield Finding("R3", "the same twice", text, said, fell, bool(own(values).equal(own(dirty))))


def r4_return_across_a_hole() -> Iterator[Finding]:
    """Two actions with a tool reply between them, gamma 0.5, a reward of 1 at the end."""
    mask, rewards = torch.tensor([[1.0, 0, 1]]), torch.tensor([[0.0, 0, 1]])
    ours = credit.reward_to_go(rewards, mask.bool(), gamma=0.5)
    if at_hand("skyrl"):
        _, theirs = skyrl_advantages().compute_reinforce_plus_plus_outcome_advantage(rewards, mask, 0.5)
        text = f"SkyRL REINFORCE++: returns {numbers(theirs)}"
        yield Finding(
            "R4", "0.5 - 1", text, numbers(ours), not close(theirs * mask, [[0.5, 0, 1]]), close(ours, [[0.5, 0, 1]])
        )


def r5_score_after_the_end() -> Iterator[Finding]:
    """Three actions, the last EOS, then two cells of padding; score 1, an untrained critic (V = 0), lambda 0.95."""
    mask = torch.tensor([[True, True, True, False, False]])
    rewards = torch.tensor([[0.0, 0, 1, 0, 0]])
    ours, _ = credit.gae(rewards, torch.zeros(1, 5), mask, torch.zeros(1), gamma=1.0, lam=0.95)
    if at_hand("trl"):
        none = torch.zeros(1, 5)
        settings = SimpleNamespace(kl_estimator="k1", kl_coef=0.0, whiten_rewards=False, gamma=1.0, lam=0.95)
        found = statements(
            "trl ppo", "train", "response_idxs =", "returns = advantages",
            torch=torch, args=settings, INVALID_LOGPROB=1.0, responses=none,
            sequence_lengths=torch.tensor([2]), logprobs=none, ref_logprobs=none, values=none,
            scores=torch.tensor([1.0]),
        )  # fmt: skip
        theirs = found["advantages"][0]
        text = f"TRL 1.10 PPO: {numbers(theirs[:3])}, and {numbers(theirs[3:4])} on the padding after EOS"
        fell, held = not close(theirs[2], 1.0), close(ours[0, :3], [0.9025, 0.95, 1.0])
        yield Finding("R5", "0.902 0.95 1", text, numbers(ours[0, :3]), fell, held)


def r6_rewards_by_order() -> Iterator[Finding]:
    """Four texts whose own scores are 1 0 0 1, forwards and backwards."""
    texts = ["the cat sat", "dog", "sun", "the cat sat"]

    def own(order: Sequence[int]) -> Tensor:
        rewards = score([Weighted(resolve("rouge_l")(), 1.0, "rouge_l")], scene([texts[k] for k in order])).total.sum(1)
        return rewards[torch.tensor(order).argsort()]

    forwards, backwards = own([0, 1, 2, 3]), own([3, 2, 1, 0])
    if at_hand("rl4lms"):
        theirs = []
        for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
            chosen = [texts[k] for k in order]
            rewards = intent_accuracy()([""] * 4, chosen, [["the cat sat"]] * 4, [True] * 4, [{}] * 4)
            theirs.append(torch.tensor(rewards)[torch.tensor(order).argsort()])
        text = f"RL4LMs IntentAccuracy: {numbers(theirs[0])}, backwards {numbers(theirs[1])}"
        said = f"{numbers(forwards)}, backwards {numbers(backwards)}"
        held = forwards.equal(backwards) and close(forwards, [1, 0, 0, 1])
        yield Finding("R6", "1 0 0 1 both times", text, said, not close(theirs[0], theirs[1]), held)


def intent_accuracy() -> Any:
    class Meteor:
        def compute(self, prompts: Any, texts: list[str], references: Any) -> dict[str, Any]:
            return {"lexical/meteor": (None, sum(text == "the cat sat" for text in texts) / len(texts))}

    class Intent:
        def compute(self, prompts: Any, texts: list[str], references: Any, infos: Any) -> dict[str, Any]:
            return {"intent/accuracy": ([0] * len(texts), 0.0)}

    given = {"np": np, "MeteorMetric": Meteor, "IntentAccuracyDailyDialog": Intent, "BatchedRewardFunction": object}
    return functions("rl4lms", "IntentAccuracy", **given).IntentAccuracy()


def r7_short_lists() -> Iterator[Finding]:
    """Three transitions of which the last alone is done, and earns a penalty of -1."""
    try:
        score(
            [Weighted(lambda scene: torch.full((1, scene.batch.tokens.shape[1]), -1.0), 1.0, "done")],
            scene(["a", "b", "c"]),
        )
        said, held = "took it", False
    except RewardError as error:
        said, held = f"RewardError: {str(error).split(': ', 1)[1].split(';')[0]}", True
    if at_hand("rl4lms"):
        name = "BatchedCommonGenPenaltyShapingFunction"
        penalty = vars(functions("rl4lms", name, BatchedRewardFunction=object))[name]()
        apply = functions("rl4lms batches", "compute_batched_rewards").compute_batched_rewards
        info = {
            "prompt_text": "generate a sentence with: dog.",
            "reference_text": "",
            "output": "a dog",
            "meta_info": {},
        }
        row = [SimpleNamespace(done=k == 2, info=info, kl_reward=0.0, task_reward=0.0) for k in range(3)]
        apply([row], penalty)
        theirs = [float(transition.task_reward) for transition in row]
        yield Finding(
            "R7", "0 0 -1, or refused", f"RL4LMs penalty: {numbers(theirs)}", said, theirs != [0, 0, -1], held
        )


def scene(texts: Sequence[str]) -> Scene:
    tokenizer = byte_tokenizer()
    episodes = [
        episode([1], tokenizer.encode(text, add_special_tokens=False), id=f"{k}", item=Item(f"{k}", "?", "the cat sat"))
        for k, text in enumerate(texts)
    ]
    return Scene(to_batch(episodes, Controls(Sampling())), episodes, tokenizer)


TRAPS: tuple[Callable[[], Iterator[Finding]], ...] = (
    r1_reward_on_a_masked_tail,
    r2_values_across_a_gap,
    r3_values_of_padding,
    r4_return_across_a_hole,
    r5_score_after_the_end,
    r6_rewards_by_order,
    r7_short_lists,
)


def main() -> None:
    """Print the table; exit with 1 if ours is in a trap."""
    print("| trap | right | theirs | ours |\n|---|---|---|---|")
    findings = [finding for trap in TRAPS for finding in trap()]
    for f in findings:
        ours = f.ours if f.held else f"**FAILS**: {f.ours}"
        theirs = f.theirs if f.fell else f"(no longer in the trap) {f.theirs}"
        print(f"| {f.trap} | {f.right} | {theirs} | {ours} |")
    sys.exit(int(not all(f.held for f in findings)))


if __name__ == "__main__":
    main()
