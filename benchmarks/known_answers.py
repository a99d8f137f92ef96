"""Does each method find the best policy of a task whose best return is known, and what is token-level credit worth?

    python benchmarks/known_answers.py presets --seeds 0 1 2 3 4
    python benchmarks/known_answers.py credit --seeds 0 1 2 3 4
    python benchmarks/known_answers.py credit --right key --lure coin --length 24 --tune
    python benchmarks/known_answers.py presets --seeds 0 --only ppo grpo

The model is a random two-layer one over bytes (`pertoken.testing`), everything on the CPU. `presets`: each token that
is a small letter earns 1, each other costs 0.25, so the best return of 8 tokens is 8. `credit`: `--length` tokens, each
right one earns 1, and the first token 8 more or 8 less, in which the later tokens have no part. Paid where it is
earned (token), or all of it at the end (terminal), where it misleads them: same returns, same optimum, same update.
Which tokens are right is said by `--right`:

* `letters`: small letters, everywhere (a Llama). One thing is learnt from all tokens, so with the length of a text its
  signal grows as well as the noise that tokens are to each other.
* `key`: at each place the even ids or the odd ones, as a fixed random key has it (a GPT-2, whose places have weights of
  their own). Each place learns from its own tokens alone, and all others are noise to it: see below.

Which of the two the first token earns is said by `--lure`:

* `token`: by whether its id is even. A policy learns that in a few steps, and is misled no longer; solved is 95% of
  the best return, lure and all.
* `coin`: by a coin that is tossed for it anew in each step and prompt. That cannot be learnt, so the end misleads as
  long as there is anything to learn; solved is 95% of what the right tokens earn, which is all that can be earned.

With a key and a coin theory says what to expect. The gradient of a place has the variance of what its tokens are
credited with. With p the share of right tokens and L tokens that is 8^2 + L p (1 - p) for a text that is paid at its
end, L p (1 - p) / 2 on average for rewards to go, and p (1 - p) where a right critic takes off all that follows. So the
less is left to learn, the further terminal credit is behind; and without a lure rewards to go would have half of its
variance.

With `--tune` each kind of arm (what is before the colon) has the learning rate with which its first arm needs the
fewest samples on a seed of its own, found by doubling or halving from the one that is otherwise taken by all. Prints
Markdown tables for RESULTS.md.
"""

import argparse
import json
import math
import platform
import random
import statistics
import string
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pertoken.assembly import build_run
from pertoken.config import RunConfig
from pertoken.config.presets import PRESETS
from pertoken.jobs.run import train
from pertoken.rewards import episode_reward, token_reward
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.tracking.runlog import RunLog
from pertoken.training.trainer import loop

LENGTH = 8
LETTERS, OTHERS = string.ascii_lowercase, string.digits + string.punctuation
LURE = 8.0
KEY = random.Random(0).choices((0, 1), k=96)
ENOUGH = 0.95
"""Share of the best return that counts as solved."""
TUNING_SEED, RATE = 100, 1e-2


def _letter(token: int) -> bool:
    return ord("a") <= token <= ord("z")


@token_reward
def letters(sample):  # type: ignore[no-untyped-def]
    """1 for each small letter, -0.25 for each other token; 8 of them at best earn 8."""
    return [1.0 if _byte(piece) else -0.25 for piece in _pieces(sample)]


def _right(sample: Any, right: str) -> list[bool]:
    if right == "letters":
        return [_byte(piece) for piece in _pieces(sample)]
    return [token % 2 == bit for token, bit in zip(sample.tokens, KEY[: len(sample.tokens)], strict=True)]


@token_reward
def lured(sample, *, right, lure):  # type: ignore[no-untyped-def]
    """1 for each right token; the first one earns 8 more if its id is even, or a coin of step, prompt and token."""
    values = [float(one) for one in _right(sample, right)]
    if not values:
        return values
    coin = zlib.crc32(f"{sample.step} {sample.item.id} {sample.tokens[:1]}".encode())
    drawn = sample.tokens[0] if lure == "token" else coin
    return [values[0] + (LURE if drawn % 2 == 0 else -LURE), *values[1:]]


@episode_reward
def lured_at_the_end(sample, *, right, lure):  # type: ignore[no-untyped-def]
    """What `lured` pays, with the last token."""
    return sum(lured.fn(sample, right=right, lure=lure))


@episode_reward
def number_right(sample, *, right):  # type: ignore[no-untyped-def]
    """How many tokens are right."""
    return float(sum(_right(sample, right)))


@episode_reward
def letters_at_the_end(sample):  # type: ignore[no-untyped-def]
    """What `letters` pays, with the last token."""
    return sum(letters.fn(sample))


def _pieces(sample: Any) -> list[str]:
    return [sample.text[start:stop] for start, stop in sample.aligned.char_spans]


def _byte(piece: str) -> bool:
    return len(piece) == 1 and _letter(ord(piece))


def settings(folder: Path, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The run that all arms share, with an arm's changes."""
    shared: dict[str, Any] = {
        "seed": seed,
        "folder": str(folder / "run"),
        "policy": {"model": str(folder / "model"), "precision": "float32", "device": "cpu", "compile": False},
        "task": {"type": "file", "path": str(folder / "data.jsonl"), "prompt": "{prompt}:", "answer": None},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 8, "sampling": {"max_new_tokens": LENGTH}},
        "rewards": [{"fn": f"{__name__}:letters", "name": "task"}],
        "update": {"learning_rate": 1e-2, "tokens_per_micro_batch": 4096},
        "kl": {"measure": False},
        "stop": {"steps": 80},
        "evaluation": {"items": 0},
        "log": {"episodes_per_step": 0},
    }
    return merged(shared, changes)


def prefer_letters(folder: Path, seed: int) -> dict[str, Any]:
    """Train a model by DPO to prefer small letters; the token reward that its log-ratios are."""
    draw = random.Random(seed)

    def text(alphabet: str) -> str:
        return "".join(draw.choice(alphabet) for _ in range(LENGTH))

    rows = [{"prompt": f"say {k}", "good": text(LETTERS), "bad": text(OTHERS)} for k in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"path": str(folder / "pairs.jsonl"), "answer": "good", "rejected": "bad"}
    changes = {
        "folder": str(folder / "dpo"),
        "task": task,
        "method": {"type": "dpo", "batch": 16},
        "stop": {"steps": 20},
    }
    config = RunConfig.model_validate(merged(settings(folder, seed, {}), changes | {"update": {"learning_rate": 1e-3}}))
    train(config)
    models = {"model": str(folder / "dpo" / "model"), "reference": str(folder / "model")}
    return {"name": "implicit", **models, "beta": 0.05, "clip": [-0.05, 0.05]}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def returns(
    seed: int,
    changes: Mapping[str, Any],
    bound: float,
    metric: str = "reward/task",
    kind: Literal["llama", "gpt2"] = "llama",
) -> tuple[list[float], float]:
    """Mean return of the samples of each step, until it is at least `bound`, and the seconds that the loop took."""
    curve: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(kind, seed=seed).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        rows = [{"prompt": f"say {k}"} for k in range(60)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = settings(folder, seed, changes)
        if changes.get("algorithm") == "rto":
            values["rewards"] = [*values["rewards"], prefer_letters(folder, seed)]
        if changes.get("algorithm") == "prime":  # right: at least 4 letters of 8
            learner = {"name": "prime", "model": str(folder / "model"), "outcome": "task", "threshold": 3.0}
            values["rewards"] = [*values["rewards"], learner | {"learning_rate": 1e-3}]
        config = RunConfig.model_validate(values)
        made = build_run(config)
        with RunLog.create(folder / "run", config_text=config.to_yaml(), seed=seed, about={}, command=sys.argv) as log:
            begun = time.monotonic()
            loop(
                made,
                log,
                on_step=lambda report: curve.append(report.metrics[metric]),
                interrupted=lambda: steps_until(curve, bound) is not None,
            )
            return curve, time.monotonic() - begun


def steps_until(curve: list[float], bound: float, window: int = 5) -> int | None:
    """The first step at which the mean of `window` steps is at least `bound`; None if there is none."""
    means = (statistics.fmean(curve[k - window : k]) for k in range(window, len(curve) + 1))
    return next((k + window for k, mean in enumerate(means) if mean >= bound), None)


TUNED: dict[str, dict[str, Any]] = {
    "vc_ppo": {"policy": {"value_head": {"pretrain_steps": 3}}},
    "vapo": {"policy": {"value_head": {"pretrain_steps": 3}}, "credit": {"length_adaptive": 0.5}},
    "rto": {"rewards": [{"fn": f"{__name__}:letters_at_the_end", "name": "task"}], "update": {"minibatches": 2}},
    "prime": {"rewards": [{"fn": f"{__name__}:letters_at_the_end", "name": "task"}]},
    "online_dpo": {"kl": {"measure": True}},  # it compares with the reference, which the others leave out here
    "trpo": {"update": {"trust_region": {"kl": 0.1}}},  # its step size, as the learning rate is that of the others
    "vineppo": {"credit": {"every": 2, "rollouts": 4}},
    "dapo": {"credit": {"truncated": "keep"}},
    "high_entropy": {"credit": {"truncated": "keep"}},
}
"""What texts of 8 tokens want otherwise; and here the best answer is one that is cut off."""


def preset_arm(name: str) -> dict[str, Any]:
    """The preset with the critic's learning rate of a tiny model; nothing of its method is changed but `TUNED`."""
    arm: dict[str, Any] = {"algorithm": name}
    if PRESETS[name].settings["policy"]["value_head"] is not None:
        arm["policy"] = {"value_head": {"learning_rate": 1e-2}}
    return merged(arm, TUNED.get(name, {}))


def presets(seeds: list[int], only: Iterable[str]) -> None:
    """One row for each preset: on how many seeds 5 steps in a row reach 95% of the best return, and when."""
    print("| preset | solved | steps: median, most | share of the best return at the end, least | s per seed |")
    print("|---|---|---|---|---|")
    for name in only or PRESETS:
        shares, steps, seconds = [], [], []
        for seed in seeds:
            curve, took = returns(seed, preset_arm(name), ENOUGH * LENGTH)
            shares.append(statistics.fmean(curve[-5:]) / LENGTH)
            steps.append(steps_until(curve, ENOUGH * LENGTH))
            seconds.append(took)
        solved = [step for step in steps if step is not None]
        reached = f"{statistics.median(solved):g}, {max(solved)}" if solved else ""
        print(
            f"| `{name}` | {len(solved)} of {len(steps)} | {reached} | {min(shares):.3f} | "
            f"{statistics.fmean(seconds):.1f} |",
            flush=True,
        )


ARMS: dict[str, dict[str, Any]] = {
    "terminal: leave_one_out": {"type": "leave_one_out"},
    "terminal: group_relative": {"type": "group_relative"},
    "terminal: self_critical": {"type": "self_critical"},
    "terminal: reward_to_go": {"type": "reward_to_go"},
    "terminal: gae, lambda 1": {"type": "gae", "lam": 1.0},
    "placed: differences": {"type": "differences"},
    "placed: leave_one_token_out": {"type": "leave_one_token_out"},
    "placed: shapley": {"type": "shapley"},
    "placed: attention": {"type": "attention"},
    "token: leave_one_out_process": {"type": "leave_one_out_process"},
    "token: reward_to_go": {"type": "reward_to_go"},
    "token: optimal_token_baseline": {"type": "optimal_token_baseline"},
    "token: group_process": {"type": "group_process"},
    "token: per_part": {"type": "per_part"},
    "token: gae, lambda 0.95": {"type": "gae", "lam": 0.95},
    "token: gae, lambda 0": {"type": "gae", "lam": 0.0},
}
"""Estimators that see the sum alone, that place it on the tokens by themselves, or that are told where it was earned;
the first is what the others are compared with."""

SAMPLES_PER_PROMPT = 8


class CreditTask:
    """The task of `credit`: how long, what is right, lured by what, prompts and steps, and how an arm is measured."""

    def __init__(self, length: int, right: str, lure: str, prompts: int, most: int) -> None:
        self.length, self.right, self.lure, self.prompts, self.most = length, right, lure, prompts, most
        best = {"token": length + LURE, "coin": length}[lure]
        self.bound, self.metric = ENOUGH * best, {"token": "reward/task", "coin": "beside/right"}[lure]
        self.kind: Literal["llama", "gpt2"] = "llama" if right == "letters" else "gpt2"

    def steps(self, name: str, seed: int, rate: float, most: int | None = None) -> int | None:
        """Steps until an arm has solved it, with a learning rate; None if it has not after `most`."""
        paid = "lured" if name.startswith("token:") else "lured_at_the_end"
        arm = {
            "policy": {"value_head": {"learning_rate": rate} if ARMS[name]["type"] == "gae" else None},
            "credit": {"normalize": "whiten", **ARMS[name]},
            "rewards": [{"fn": f"{__name__}:{paid}", "name": "task", "right": self.right, "lure": self.lure}],
            "guards": {"beside": [{"fn": f"{__name__}:number_right", "name": "right", "right": self.right}]},
            "rollout": {
                "prompts_per_step": self.prompts,
                "samples_per_prompt": SAMPLES_PER_PROMPT,
                "sampling": {"max_new_tokens": self.length, "min_new_tokens": self.length},
            },
            "objective": {"surrogate": "policy_gradient"},
            "update": {"learning_rate": rate},
            "kl": {"place": "none"},
            "stop": {"steps": most or self.most},
        }
        return steps_until(returns(seed, arm, self.bound, self.metric, self.kind)[0], self.bound)

    def best_rate(self, name: str) -> float:
        """By doubling, else by halving, as long as fewer steps are needed on a seed of its own."""
        rate, fewest = RATE, self.steps(name, TUNING_SEED, RATE) or self.most
        for factor in (2.0, 0.5):
            while (steps := self.steps(name, TUNING_SEED, rate * factor, fewest - 1)) is not None:
                rate, fewest = rate * factor, steps
            if rate != RATE:
                break
        return rate


def credit(seeds: list[int], only: Iterable[str], task: CreditTask, *, tune: bool) -> None:
    """One row for each estimator: samples to 95% of the best return, and their share of what the first arm needs."""
    print("| credit | learning rate | solved | samples to 95%: median, least, most | share of terminal leave_one_out |")
    print("|---|---|---|---|---|")
    yardstick: float | None = None
    rates: dict[str, float] = {}
    rows_per_step = task.prompts * SAMPLES_PER_PROMPT
    for name in only or ARMS:
        kind = name.partition(":")[0]
        if kind not in rates:
            rates[kind] = task.best_rate(name) if tune else RATE
        steps = [task.steps(name, seed, rates[kind]) for seed in seeds]
        solved = [step * rows_per_step for step in steps if step is not None]
        # one that is not solved counts as more than any: with a majority of them there is no median
        middle = statistics.median([math.inf if step is None else step * rows_per_step for step in steps])
        yardstick = middle if yardstick is None else yardstick
        reached = f"{middle:,.0f}, {min(solved):,}, {max(solved):,}" if middle < math.inf else "not reached"
        share = f"{middle / yardstick:.2f}" if max(middle, yardstick) < math.inf else ""
        print(f"| {name} | {rates[kind]:g} | {len(solved)} of {len(steps)} | {reached} | {share} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["presets", "credit"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="*", default=[], help="Rows of the table; all unless given.")
    parser.add_argument("--length", type=int, default=12, help="Of credit: tokens of a completion.")
    parser.add_argument("--right", choices=["letters", "key"], default="letters", help="Of credit: which tokens.")
    parser.add_argument("--lure", choices=["token", "coin"], default="token", help="Of credit: what misleads.")
    parser.add_argument("--prompts", type=int, default=4, help="Of credit: in a step, with 8 samples each.")
    parser.add_argument("--most", type=int, default=150, help="Of credit: steps after which an arm is given up.")
    parser.add_argument("--tune", action="store_true", help="Of credit: a learning rate for each kind of arm.")
    options = parser.parse_args()
    print(f"{date.today()}, {platform.platform()}: {' '.join(sys.argv)}\n")
    if options.what == "presets":
        presets(options.seeds, options.only)
    else:
        task = CreditTask(options.length, options.right, options.lure, options.prompts, options.most)
        credit(options.seeds, options.only, task, tune=options.tune)


if __name__ == "__main__":
    main()
