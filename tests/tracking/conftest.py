"""A made-up run folder that looks like a real one: 300 steps, 128 held-out items, per-token streams.

By hand: `python tests/tracking/conftest.py FOLDER` writes such a run and its report, to be looked at.
"""

import inspect
import math
import random
import re
import sys
import textwrap
from pathlib import Path

import pytest

from pertoken.tracking import RunLog, episode_record
from pertoken.types import Episode, Item, Span

NUM_STEPS = 300
SCRIPTS = [
    Item("scripts/arabic", "لخّص: تعيد الدالة مجموع القيم.", "تعيد الدالة sum مجموع القيم (int)."),
    Item("scripts/chinese", "总结：该函数返回一个列表。", "该函数返回按键排序后的列表，并保留重复项。"),
    Item("scripts/emoji", "Summarise: 🎉", "Party 🎉🎊 for the family 👩‍👩‍👧, naïve façade."),
]
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> \x1b[31mred\x1b[0m"


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def make_run(folder: Path) -> Path:
    draw = random.Random(7)
    log = RunLog.create(
        folder,
        config_text=textwrap.dedent(CONFIG),
        seed=7,
        about={
            "model": "HuggingFaceTB/SmolLM2-135M",
            "task": "documentation summaries",
            "algorithm": "ppo",
            "steps": 300,
        },
        command=["pertoken", "train", "recipes/quickstart.yaml", "seed=7"],
    )
    log._clock_zero -= 2.2  # time passes faster in a made-up run
    items = documented_items()
    for step in range(NUM_STEPS + 1):
        skill = 1 - math.exp(-step / 90)
        log._clock_zero -= 2.2
        if step:
            log.step(step, step_metrics(draw, step, skill))
        if step and (step == 1 or step % 50 == 0):
            prompts = list(enumerate([*items[:5], *SCRIPTS]))
            log.episodes(step, [an_episode(draw, step, g, item, skill) for g, item in prompts for _ in range(4)])
        if step % 50 == 0:
            log.evaluation(step, "validation", *an_evaluation(draw, step, items, skill))
    log.finish("finished", "all 300 steps are done")
    return folder


def documented_items() -> list[Item]:
    """Real text: the docstrings of a few modules; the first line is the answer."""
    items = []
    for module in (random, inspect, textwrap, math, re, sys):
        for name, thing in sorted(vars(module).items()):
            lines = (inspect.getdoc(thing) or "").strip().splitlines()
            if callable(thing) and len(lines) > 2:
                prompt = ({"role": "user", "content": "Summarise:\n\n" + "\n".join(lines[1:]).strip()},)
                items.append(Item(id=f"{module.__name__}.{name}", prompt=prompt, answer=lines[0]))
    items = (items * 8)[:128]
    return [Item(id=f"{item.id}#{i}", prompt=item.prompt, answer=item.answer) for i, item in enumerate(items)]


def step_metrics(draw: random.Random, step: int, skill: float) -> dict[str, float]:
    rouge, brevity = 0.10 + 0.16 * skill + draw.gauss(0, 0.03), -0.08 + 0.07 * skill + draw.gauss(0, 0.012)
    repetition = -0.05 * (1 - skill) + draw.gauss(0, 0.006)
    length = 62 - 38 * skill + draw.gauss(0, 4)
    return {
        "reward/rouge_l": rouge,
        "reward/brevity": brevity,
        "reward/repetition": repetition,
        "reward/total": rouge + brevity + repetition,
        "kl/reference": 0.09 * skill + abs(draw.gauss(0, 0.006)),
        "kl/sequence": 2.4 * skill + abs(draw.gauss(0, 0.2)),
        "entropy": 2.3 - 1.1 * skill + draw.gauss(0, 0.06),
        "drift/mean": abs(draw.gauss(0, 3e-6)),
        "drift/max": abs(draw.gauss(0, 3e-5)),
        "importance/clipped_share": 0.0,
        "clip/share": 0.04 + 0.05 * skill + draw.gauss(0, 0.01),
        "advantage/mean": draw.gauss(0, 1e-3),
        "advantage/std": 1.0,
        "value/error": 0.03 * (1 - 0.8 * skill) + abs(draw.gauss(0, 0.002)),
        "value/explained_variance": math.nan if step == 1 else 0.75 * skill + draw.gauss(0, 0.05),
        "loss/policy": draw.gauss(-0.01, 0.006),
        "loss/value": 0.015 * (1 - 0.8 * skill) + abs(draw.gauss(0, 0.001)),
        "completion/length": length,
        "completion/terminated_share": min(1.0, 0.55 + 0.44 * skill),
        "grad/norm": 0.9 + abs(draw.gauss(0, 0.35)),
        "grad/clipped_share": draw.choice([0.0, 0.0, 0.25, 0.5]),
        "learning_rate": 1e-5 * min(1.0, step / 15) * (0.5 + 0.5 * math.cos(math.pi * step / NUM_STEPS)),
        "tokens/generated": round(64 * length),
        "tokens/per_second": 1500 + draw.gauss(0, 80),
        "time/rollout": 1.1 + draw.gauss(0, 0.05),
        "time/score": 0.3 + abs(draw.gauss(0, 0.02)),
        "time/reward": 0.02,
        "time/update": 0.8 + abs(draw.gauss(0, 0.04)),
        "skipped/updates": 0,
    }


def completion_of(draw: random.Random, item: Item, skill: float) -> str:
    """Before training the text rambles on through the body; after it, it is close to the summary."""
    assert item.answer is not None
    if draw.random() < skill or isinstance(item.prompt, str):
        return item.answer
    body = item.prompt[0]["content"].split("\n\n", 1)[1]
    return f"This function is a function that does the following.\n{body[: draw.randint(80, 420)]}"


def an_episode(draw: random.Random, step: int, group: int, item: Item, skill: float) -> dict:
    text = HOSTILE if group == 3 else completion_of(draw, item, skill)
    asked = item.prompt if isinstance(item.prompt, str) else item.prompt[0]["content"]
    prompt = pieces_of(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n")
    written = [*pieces_of(text), "<|im_end|>"]
    pieces, first = prompt + written, len(prompt)
    num = len(pieces)
    episode = Episode(
        id=f"s{step}-{item.id}-0",
        item=item,
        group=group,
        tokens=[hash_id(piece) for piece in pieces],
        action_mask=[t >= first for t in range(num)],
        logprobs=[0.0] * first + [-draw.expovariate(1.2) for _ in written],
        env_rewards=[0.0] * num,
        spans=[Span(0, first, "prompt", 0), Span(first, num, "action", 0)],
        stop="eos",
        policy_version=(step - 1, step - 1),
    )
    streams = made_up_streams(draw, episode, pieces)
    costs = enumerate(streams["reward/repetition"])
    found = [
        {"part": "repetition", "start": t, "stop": t + 1, "value": cost, "message": f"said before: {pieces[t]!r}"}
        for t, cost in costs
        if cost
    ]
    record = episode_record(episode, pieces, streams, step=step) | ({"findings": found} if found else {})
    return record | {"alternatives": made_up_alternatives(draw, episode, pieces)}


def made_up_alternatives(draw: random.Random, episode: Episode, pieces: list[str]) -> dict:
    """Before what was written, which is second, comes another word of the same text; a third is far behind."""
    first = episode.prompt_length
    ranks, ids, logprobs = [0] * first, [[]] * first, [[]] * first
    for token, logprob in zip(episode.tokens[first:], episode.logprobs[first:], strict=True):
        ranks.append(2)
        others = [other for other in episode.tokens[first:] if other != token]
        ids.append([draw.choice(others), token, hash_id("<script>")])
        logprobs.append([round(logprob / 2, 4), round(logprob, 4), round(2 * logprob, 4)])
    names = dict(zip(map(str, episode.tokens), pieces, strict=True)) | {str(hash_id("<script>")): "<script>"}
    used = {str(token) for row in ids for token in row}
    return {"rank": ranks, "id": ids, "logprob": logprobs, "piece": {token: names[token] for token in used}}


def made_up_streams(draw: random.Random, episode: Episode, pieces: list[str]) -> dict[str, list[float]]:
    first, num = episode.prompt_length, len(pieces)
    answer_words = set((episode.item.answer or "").lower().split())
    rouge = [0.06 if p.strip().lower() in answer_words else draw.choice([0.0, 0.0, -0.008]) for p in pieces[first:]]
    repetition = [
        -0.02 if p in pieces[first : first + t] and p.isalpha() else 0.0 for t, p in enumerate(pieces[first:])
    ]
    parts = {"rouge_l": rouge, "repetition": repetition, "brevity": [-0.0015] * len(rouge)}
    total = [sum(cells) for cells in zip(*parts.values(), strict=True)]
    returns = [sum(total[t:]) for t in range(len(total))]
    values = [r * 0.7 + draw.gauss(0, 0.02) for r in returns]
    ratio = [math.exp(draw.gauss(0, 0.12)) for _ in total]
    columns = {f"reward/{name}": part for name, part in parts.items()} | {
        "reward/total": total,
        "return": returns,
        "value": values,
        "advantage": [4 * (r - v) for r, v in zip(returns, values, strict=True)],
        "logprob": episode.logprobs[first:],
        "ref_logprob": [lp + draw.gauss(-0.1, 0.2) for lp in episode.logprobs[first:]],
        "kl": [draw.gauss(0.08, 0.12) for _ in total],
        "entropy": [draw.expovariate(0.8) for _ in total],
        "ratio": ratio,
        "clipped": [float(abs(r - 1) > 0.2) for r in ratio],
    }
    return {name: [0.0] * (num - len(column)) + column for name, column in columns.items()}


def an_evaluation(draw: random.Random, step: int, items: list[Item], skill: float) -> tuple[dict, list[dict]]:
    rows = []
    for g, item in enumerate(items):
        record = an_episode(draw, step, g, item, skill)
        rouge = min(1.0, max(0.0, 0.13 + 0.07 * skill + draw.gauss(0, 0.09)))
        scores = {"rouge_1": rouge * 1.25, "rouge_2": rouge * 0.4, "rouge_l": rouge, "chrf": 90 * rouge}
        length = float(sum(record["tokens"]["action"]))
        scores |= {"words": length, "repetition": 0.2 * (1 - skill) + draw.random() * 0.05}
        text = {"prompt": record["prompt"], "answer": item.answer, "output": record["completion"]}
        kept = ("reward/rouge_l", "reward/repetition", "reward/brevity", "reward/total", "logprob", "entropy", "kl")
        streams = {name: record["streams"][name] for name in kept}
        rows.append({"id": item.id, **text, "metrics": scores, "tokens": record["tokens"], "streams": streams})
        rows[-1] |= {name: record[name] for name in ("findings", "alternatives") if name in record}
    names = list(rows[0]["metrics"])
    means = {name: sum(row["metrics"][name] for row in rows) / len(rows) for name in names}
    width = {name: abs(means[name]) * 0.1 for name in names}
    return {
        "main": "rouge_l",
        "metrics": means | {"bleu": 2 + 4 * skill},
        "intervals": {name: [means[name] - width[name], means[name] + width[name]] for name in names},
        "differences": {"bleu": [4 * skill, 4 * skill - 1.1, 4 * skill + 0.9]},
        "baselines": {
            "first sentence": {"rouge_1": 0.21, "rouge_2": 0.06, "rouge_l": 0.175, "chrf": 17.0, "bleu": 3.1},
            "copy": {"rouge_1": 0.16, "rouge_2": 0.05, "rouge_l": 0.12, "chrf": 18.2, "bleu": 1.9},
            "empty": {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0, "chrf": 0.0, "bleu": 0.0},
        },
    }, rows


def pieces_of(text: str) -> list[str]:
    """The text cut as a tokenizer would: words with the space before them, now and then a half word; a character
    beyond the basic plane is four tokens, and comes with the last of them."""
    found = re.findall(r"<\|\w+\|>| ?\w{1,7}| ?[^\w\s]|\s", text)
    return [part for piece in found for part in (["", "", "", piece] if max(piece) > "\uffff" else [piece])]


def hash_id(piece: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(piece)) % 49152


CONFIG = """\
    seed: 7
    model: {name: HuggingFaceTB/SmolLM2-135M}
    task: {type: documentation}
    algorithm: {type: ppo, clip: 0.2, gamma: 1.0, lam: 0.95}
    steps: 300
    """


if __name__ == "__main__":
    from pertoken.tracking.report import write_report

    print(write_report(make_run(Path(sys.argv[1]))))
