"""What is token-level credit worth where places share nothing? A policy that is a table, trained with every method.

    python benchmarks/credit_table.py                        # 24 and 48 tokens, seeds 0 to 4
    python benchmarks/credit_table.py --lengths 24 --rate 0.3

The task: a text has `--length` tokens out of 32. At each place half of them are right, the even ids or the odd ones, as
a key has it that is drawn for the seed; a right token earns 1. Beside that the first token earns 8 or loses 8
(`--lure`), by a coin that is tossed anew for each step, prompt and token: nothing that a policy could learn. All of a
text's reward is paid with its last token (terminal), paid there and placed on the tokens by a method (placed), or paid
where it is earned (token): the returns, the best policy and the update are the same.

The policy is a table of logits, one row for each place. In a language model one lesson serves many places, so that its
signal grows with the length of a text as fast as the noise does; a table learns each place from that place alone, and
what a method makes of the others' tokens is all that tells it from another. What to expect, said before it was run:
the gradient of a place has the variance of what its token is credited with. With p the share of right tokens, that is
8^2 + L p (1 - p) for a text of L tokens that is paid at its end, L p (1 - p) / 2 on average for rewards to go without
the first token's luck, p (1 - p) where a right critic takes off what follows. So token credit should need far less than
half of the samples, and without a lure (--lure 0) about half of them; the longer the text, the less the share.

Everything but the table is the library's: credit by `assign`, placing by `redistribution.place`, the loss by
`policy_gradient` and `aggregate`. Every method whitens its advantages; 32 samples a step, 8 of each of 4 prompts; Adam
with betas as in the library, its rate found for each method by itself (for those that shorten texts, which are slow,
with `differences`), by doubling or halving from 0.1 while the median over five further seeds needs fewer samples. The
critic of `gae` is a table too, a running mean of its targets. Solved is a policy whose expected share of right tokens,
which a table tells exactly, is 95%. Rollouts of `monte_carlo` count as samples, by the share of the text that they
write. `attention` needs a model and is left out.
"""

import argparse
import math
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date

import known_answers
import torch
from jaxtyping import Bool, Float, Int
from pydantic import TypeAdapter
from torch import Tensor

from pertoken.config import ByWorth, CreditConfig, Differences, Shapley
from pertoken.objectives import aggregate, policy_gradient
from pertoken.training.assignment import assign
from pertoken.training.redistribution import place
from pertoken.types import PolicyOutput, StateValues, TokenBatch, TokenRewards

ARMS = {name: credit for name, credit in known_answers.ARMS.items() if name != "placed: attention"}
ARMS["placed: monte_carlo"] = {"type": "monte_carlo", "rollouts": 4}
"""The first is what the others are compared with; a table has no attention to ask."""

VOCABULARY, PROMPTS, EACH, STEPS = 32, 4, 8, 400
ENOUGH, CRITIC_SHARE, BETAS = 0.95, 0.1, (0.9, 0.99)
RATE, TUNING_SEEDS = 0.1, range(100, 105)
MONTE_CARLO_STEPS = 4
"""Steps that a text has for `monte_carlo`."""


@dataclass
class World:
    """The task of a seed, and the coins of the step."""

    length: int
    lure: float
    seed: int
    right: Bool[Tensor, "L V"] = field(init=False)
    luck: Float[Tensor, "P V"] = field(init=False)

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed)
        key = torch.arange(self.length)[torch.randperm(self.length, generator=self.draw)] % 2
        self.right = (torch.arange(VOCABULARY) % 2)[None] == key[:, None]
        self.prompt = torch.arange(PROMPTS).repeat_interleave(EACH)

    def toss(self) -> None:
        """The coins of the next step."""
        self.luck = self.lure * (2.0 * torch.randint(2, (PROMPTS, VOCABULARY), generator=self.draw) - 1.0)

    def sample(self, table: Float[Tensor, "L V"], texts: int) -> Int[Tensor, "L S"]:
        """Tokens of so many texts, place by place."""
        return torch.multinomial(table.softmax(1), texts, replacement=True, generator=self.draw)

    def earned(self, tokens: Int[Tensor, "S L"], prompt: Int[Tensor, " S"]) -> Float[Tensor, "S L"]:
        """What each token earns."""
        earned = self.right[torch.arange(tokens.shape[1]), tokens].double()
        earned[:, 0] += self.luck[prompt, tokens[:, 0]]
        return earned

    def worth(self, text: Int[Tensor, " L"], prompt: int, blocks: list[list[int]]) -> Callable[[Tensor], Tensor]:
        """What a text is worth with some of its blocks left: those that are left close up, as in a text."""

        def worth(kept: Bool[Tensor, "S N"]) -> Float[Tensor, " S"]:
            stays = kept.repeat_interleave(torch.tensor([len(block) for block in blocks]), 1)
            order = (~stays).int().argsort(dim=1, stable=True)
            inside = torch.arange(len(text)) < stays.sum(1)[:, None]
            tokens = text[order]
            total = (self.right[torch.arange(len(text)), tokens] & inside).sum(1).double()
            return total + torch.where(inside[:, 0], self.luck[prompt][tokens[:, 0]].double(), 0.0)

        return worth


def samples_needed(arm: str, world: World, rate: float, most: float = math.inf) -> float:
    """Samples until the policy is solved; infinity if it is not within `most`, or `STEPS` steps."""
    config: CreditConfig = TypeAdapter(CreditConfig).validate_python({**ARMS[arm], "normalize": "whiten"})
    table = torch.randn(world.length, VOCABULARY, generator=world.draw).requires_grad_(True)
    optimizer = torch.optim.Adam([table], lr=rate, betas=BETAS)
    critic = torch.zeros(world.length)
    spent, rows, width = 0.0, PROMPTS * EACH, world.length + 1
    mask = torch.arange(width).expand(rows, width) > 0
    zeros = torch.zeros(rows, width)
    for step in range(STEPS):
        logprobs = table.log_softmax(1)
        if (logprobs.detach().exp() * world.right).sum(1).mean() >= ENOUGH:
            return spent
        if spent >= most:
            break
        world.toss()
        tokens = world.sample(table.detach(), rows).T
        spent += rows
        chosen = torch.nn.functional.pad(logprobs[torch.arange(world.length), tokens], (1, 0))
        earned = world.earned(tokens, world.prompt)
        paid = earned if arm.startswith("token:") else torch.zeros_like(earned)
        if arm.startswith("terminal:") or config.type == "monte_carlo":
            paid[:, -1] = earned.sum(1)
        elif arm.startswith("placed:"):
            paid = placed(config, world, tokens, step)
        paid = torch.nn.functional.pad(paid, (1, 0)).float()
        batch = TokenBatch(
            torch.nn.functional.pad(tokens, (1, 0)), mask | True, mask, chosen.detach(), zeros, zeros.long(),
            world.prompt, torch.ones(rows, dtype=torch.bool), tuple(map(str, range(rows))),
        )  # fmt: skip
        values = torch.nn.functional.pad(critic.expand(rows, -1), (1, 0))
        old = PolicyOutput(chosen.detach(), zeros, values, torch.zeros(rows))
        greedy, states = None, None
        if config.type == "self_critical":
            best = table.detach().argmax(1).expand(rows, -1)
            greedy = world.earned(best, world.prompt).sum(1).float()
        if config.type == "monte_carlo":
            states, further = rollouts(world, table.detach(), tokens, config.rollouts)
            spent += further
        credit = assign(config, TokenRewards(paid, {"task": paid}), batch, old, greedy, states)
        if credit.returns is not None:
            targets = credit.returns[:, 1:].mean(0)
            critic = targets if step == 0 else critic + CRITIC_SHARE * (targets - critic)
        optimizer.zero_grad()
        aggregate(policy_gradient(chosen, credit.advantages, mask), mask).backward()
        optimizer.step()
    return math.inf


def placed(config: ByWorth, world: World, tokens: Int[Tensor, "B L"], step: int) -> Float[Tensor, "B L"]:
    """The reward of each text on its tokens, by what it is worth with some of them left."""
    most = config.samples if isinstance(config, Differences) else world.length
    most = (config.samples + 1) // 2 if isinstance(config, Shapley) else most
    size = math.ceil(world.length / most)
    blocks = [list(range(at, min(at + size, world.length))) for at in range(0, world.length, size)]
    paid = torch.zeros(tokens.shape, dtype=torch.float64)
    for row, text in enumerate(tokens):
        worth = world.worth(text, row // EACH, blocks)
        paid[row] = place(config, worth, blocks, world.length, seed=step * len(tokens) + row)
    return paid


def rollouts(
    world: World, table: Float[Tensor, "L V"], tokens: Int[Tensor, "B L"], count: int
) -> tuple[StateValues, float]:
    """What the states in which a step begins are worth, and what it cost, in texts."""
    rows, length = tokens.shape
    values, starts, cost = torch.zeros(rows, length + 1), torch.zeros(rows, length + 1, dtype=torch.bool), 0.0
    for at in range(0, length, math.ceil(length / MONTE_CARLO_STEPS)):
        going_on = world.sample(table, rows * count).T.clone()
        going_on[:, :at] = tokens.repeat_interleave(count, 0)[:, :at]
        totals = world.earned(going_on, world.prompt.repeat_interleave(count)).sum(1)
        values[:, at + 1], starts[:, at + 1] = totals.view(rows, count).mean(1).float(), True
        cost += rows * count * (length - at) / length
    return StateValues(values, starts), cost


def best_rate(arm: str, length: int, lure: float) -> float:
    """The learning rate with which further seeds need the fewest samples: found by doubling, else by halving."""

    def needed(rate: float, most: float) -> float:
        return statistics.median(samples_needed(arm, World(length, lure, seed), rate, most) for seed in TUNING_SEEDS)

    rate, fewest = RATE, needed(RATE, math.inf)
    for factor in (2.0, 0.5):
        while (now := needed(rate * factor, fewest)) < fewest:
            rate, fewest = rate * factor, now
        if rate != RATE:
            break
    return rate


def main() -> None:
    """Print a table for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[24, 48])
    parser.add_argument("--lure", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="*", default=[], help="Methods; all unless given.")
    parser.add_argument("--rate", type=float, help="One learning rate for all; else each has its own.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{date.today()}, {platform.platform()}: {' '.join(sys.argv)}")
    for length in options.lengths:
        print(f"\n{length} tokens, lure {options.lure:g}\n")
        print("| credit | rate | solved | samples: median | least | most | share of terminal leave_one_out |")
        print("|---|---|---|---|---|---|---|")
        yardstick, rates = None, dict[str, float]()
        for arm in options.only or ARMS:
            tuned = "placed: differences" if ARMS[arm]["type"] in ("shapley", "leave_one_token_out") else arm
            if tuned not in rates:
                rates[tuned] = options.rate or best_rate(tuned, length, options.lure)
            rate = rates[tuned]
            found = sorted(samples_needed(arm, World(length, options.lure, seed), rate) for seed in options.seeds)
            middle, solved = statistics.median(found), sum(samples < math.inf for samples in found)
            yardstick = middle if yardstick is None else yardstick
            shown = " | ".join("not reached" if s == math.inf else f"{s:,.0f}" for s in (middle, found[0], found[-1]))
            share = f"{middle / yardstick:.2f}" if max(middle, yardstick) < math.inf else ""
            print(f"| {arm} | {rate:g} | {solved} of {len(found)} | {shown} | {share} |", flush=True)


if __name__ == "__main__":
    main()
