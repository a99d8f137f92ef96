"""Does each method find the best policy of a task whose best return is known, and what is token-level credit worth?

    python benchmarks/known_answers.py presets --seeds 0 1 2 3 4
    python benchmarks/known_answers.py credit --seeds 0 1 2 3 4
    python benchmarks/known_answers.py presets --seeds 0 --only ppo grpo

The model is a random two-layer Llama over bytes (`pertoken.testing`), everything on the CPU. `presets`: each token that
is a small letter earns 1, each other costs 0.25, so the best return of 8 tokens is 8. `credit`: 12 tokens, each small
letter earns 1, and the first token 8 more or 8 less by whether its id is even: best return 20, most of whose variance
the later tokens have no part in. Paid where it is earned (token), or all of it at the end (terminal), where it misleads
them: same returns, same optimum, same update. Prints Markdown tables for RESULTS.md.
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
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from pertoken.build import build_run
from pertoken.config import RunConfig
from pertoken.presets import PRESETS
from pertoken.rewards import episode_reward, token_reward
from pertoken.run import train
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.tracking.runlog import RunLog
from pertoken.trainer import loop

LENGTH, LONG = 8, 12
LETTERS, OTHERS = string.ascii_lowercase, string.digits + string.punctuation
LURE = 8.0
ENOUGH = 0.95
"""Share of the best return that counts as solved."""


def _letter(token: int) -> bool:
    return ord("a") <= token <= ord("z")


@token_reward
def letters(sample):  # type: ignore[no-untyped-def]
    """1 for each small letter, -0.25 for each other token; 8 of them at best earn 8."""
    return [1.0 if _byte(piece) else -0.25 for piece in _pieces(sample)]


@token_reward
def lured(sample):  # type: ignore[no-untyped-def]
    """1 for each small letter; the first token earns 8 more if its id is even, 8 less if it is odd."""
    values = [1.0 if _byte(piece) else 0.0 for piece in _pieces(sample)]
    return [values[0] + (LURE if sample.tokens[0] % 2 == 0 else -LURE), *values[1:]] if values else []


@episode_reward
def lured_at_the_end(sample):  # type: ignore[no-untyped-def]
    """The same sum, paid with the last token."""
    return sum(lured.fn(sample))


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


def returns(seed: int, changes: Mapping[str, Any], bound: float) -> tuple[list[float], float]:
    """Mean return of the samples of each step, until it is at least `bound`, and the seconds that the loop took."""
    curve: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(seed=seed).save_pretrained(folder / "model")
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
                on_step=lambda report: curve.append(report.metrics["reward/task"]),
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


def _arm(estimator: str, reward: str, **settings: Any) -> dict[str, Any]:
    """A run that credits by `estimator` what `reward` pays."""
    critic = {"learning_rate": 1e-2} if estimator == "gae" else None
    return {
        "policy": {"value_head": critic},
        "credit": {"type": estimator, "normalize": "whiten", **settings},
        "rewards": [{"fn": f"{__name__}:{reward}", "name": "task"}],
        "rollout": {"sampling": {"max_new_tokens": LONG, "min_new_tokens": LONG}},
        "objective": {"surrogate": "policy_gradient"},
        "kl": {"place": "none"},
        "stop": {"steps": 150},
    }


AT_THE_END, BY_TOKEN = "lured_at_the_end", "lured"
ARMS: dict[str, dict[str, Any]] = {
    "terminal: leave_one_out": _arm("leave_one_out", AT_THE_END),
    "terminal: group_relative": _arm("group_relative", AT_THE_END),
    "terminal: self_critical": _arm("self_critical", AT_THE_END),
    "terminal: reward_to_go": _arm("reward_to_go", AT_THE_END),
    "terminal: gae, lambda 1": _arm("gae", AT_THE_END, lam=1.0),
    "terminal: shapley": _arm("shapley", AT_THE_END),
    "terminal: leave_one_token_out": _arm("leave_one_token_out", AT_THE_END),
    "terminal: differences": _arm("differences", AT_THE_END),
    "terminal: attention": _arm("attention", AT_THE_END),
    "token: reward_to_go": _arm("reward_to_go", BY_TOKEN),
    "token: leave_one_out_process": _arm("leave_one_out_process", BY_TOKEN),
    "token: optimal_token_baseline": _arm("optimal_token_baseline", BY_TOKEN),
    "token: group_process": _arm("group_process", BY_TOKEN),
    "token: per_part": _arm("per_part", BY_TOKEN),
    "token: gae, lambda 0.95": _arm("gae", BY_TOKEN, lam=0.95),
    "token: gae, lambda 0": _arm("gae", BY_TOKEN, lam=0.0),
}
"""Estimators that see the sum alone, or where it was earned; the first is what the others are compared with."""


def credit(seeds: list[int], only: Iterable[str]) -> None:
    """One row for each estimator: samples to 95% of the best return, and their share of what the first arm needs."""
    rows_per_step, bound = 4 * 8, ENOUGH * (LONG + LURE)
    print("| credit | solved | samples to 95%: median, most | share of terminal leave_one_out |")
    print("|---|---|---|---|")
    yardstick: float | None = None
    for name in only or ARMS:
        steps = [steps_until(returns(seed, ARMS[name], bound)[0], bound) for seed in seeds]
        solved = [step * rows_per_step for step in steps if step is not None]
        # one that is not solved counts as more than any: with a majority of them there is no median
        middle = statistics.median([math.inf if step is None else step * rows_per_step for step in steps])
        yardstick = middle if yardstick is None else yardstick
        reached = f"{middle:,.0f}, {max(solved):,}" if middle < math.inf else "not reached"
        share = f"{middle / yardstick:.2f}" if max(middle, yardstick) < math.inf else ""
        print(f"| {name} | {len(solved)} of {len(steps)} | {reached} | {share} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["presets", "credit"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="*", default=[], help="Rows of the table; all unless given.")
    options = parser.parse_args()
    print(f"{date.today()}, {platform.platform()}: {' '.join(sys.argv)}\n")
    (presets if options.what == "presets" else credit)(options.seeds, options.only)


if __name__ == "__main__":
    main()
