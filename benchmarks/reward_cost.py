"""What does each reward cost per 1,000 tokens, on one core? Prints the table of docs/rewards.md; --write puts it there.

    python benchmarks/reward_cost.py
    python benchmarks/reward_cost.py --write
    python benchmarks/reward_cost.py --only rouge_l bleu --write    # the other rows of the table stay

The completions are 64 texts of 128 tokens with references of 20 words, and 16 of 1,024 tokens with references of 100
words, in groups of 8, out of the pages of docs/, which have code and tables in them. Alignment is a row of its own: it
is done once for all rewards.
"""

import argparse
import dataclasses
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pertoken.errors import MissingExtraError
from pertoken.policy.model import load_model
from pertoken.rewards import Scene, resolve
from pertoken.rewards.names import BUILT_IN
from pertoken.types import Episode, Item, PolicyOutput, TokenBatch

DOCS = Path(__file__).parents[1] / "docs"
PART = re.compile(r"(<!-- cost -->\n).*?(<!-- end -->)", re.DOTALL)
SIZES = {128: (64, 20), 1024: (16, 100)}
"""Tokens per completion: number of completions, words per reference."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "length": {"max_words": 50},
    "overlong": {"max_tokens": 128, "buffer": 32},
    "format": {"parts": ["[0-9]+"], "json": True},
    "banned": {"words": ["delve", "as an AI model"]},
    "readability": {"most": 8.0},
}
"""Settings without which a reward has nothing to do."""
ELSEWHERE = {
    "language_tool": "the work is done by a server",
    "evaluate": "as its metric",
    "bertscore": "an embedding of the text so far for each word",
    "similarity": "an embedding for each sentence",
    "entailment": "as its model",
    "implicit": "a pass of each of its two models",
    "prime": "a pass of each of its two models, and an update of one",
    "classifier": "as its model",
    "token_model": "as its model",
    "facts": "as its graph",
    "ensemble": "as its members",
    "judge": "as its model",
    "documents": "as its collection and model",
}
"""Rewards that are not measured here, and why."""
SLOW = [("ter", "shifts", "every")]
"""Settings that are measured at the smaller size only."""


def settings(name: str) -> Iterator[dict[str, Any]]:
    """The ways in which a reward is measured: as it comes, per token, and where a setting changes its cost."""
    fields = {field.name for field in dataclasses.fields(resolve(name))}
    base = PARAMETERS.get(name, {})
    yield base
    if "granularity" in fields:
        yield base | {"granularity": "token"}
    if "word_order" in fields:
        yield base | {"word_order": 2}
    if "shifts" in fields:
        yield base | {"shifts": "every"}


def scene(num_tokens: int, tokenizer: Any) -> Scene:
    """Completions cut out of the pages, with references cut out of them elsewhere."""
    num_rows, num_words = SIZES[num_tokens]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    ids, words = tokenizer.encode(text, add_special_tokens=False), text.split()
    episodes = []
    for row in range(num_rows):
        start, word = row * 997 % (len(ids) - num_tokens), row * 499 % (len(words) - num_words)
        tokens = [ids[0], *ids[start : start + num_tokens]]
        item = Item(id=str(row // 8), prompt="?", answer=" ".join(words[word : word + num_words]))
        acts, zeros = [False] + [True] * num_tokens, [0.0] * (num_tokens + 1)
        episodes.append(Episode(str(row), item, row // 8, tokens, acts, zeros, zeros, [], "length", (0, 0)))
    shape = (num_rows, num_tokens + 1)
    mask = torch.tensor([episode.action_mask for episode in episodes])
    batch = TokenBatch(
        tokens=torch.tensor([episode.tokens for episode in episodes]),
        attention_mask=torch.ones(shape, dtype=torch.bool),
        action_mask=mask,
        sample_logprobs=torch.zeros(shape),
        env_rewards=torch.zeros(shape),
        turn=torch.zeros(shape, dtype=torch.int),
        group=torch.tensor([episode.group for episode in episodes]),
        terminated=torch.zeros(num_rows, dtype=torch.bool),
        episode_ids=tuple(episode.id for episode in episodes),
    )
    policy = PolicyOutput(torch.zeros(shape), torch.zeros(shape))
    return Scene(batch, episodes, tokenizer, old=policy, ref=policy)


def seconds(run: Any) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def measure(only: list[str]) -> list[str]:
    """The rows of the table."""
    torch.set_num_threads(1)
    tokenizer = load_model("smollm2-135m-instruct")[1]
    scenes = {size: scene(size, tokenizer) for size in SIZES}
    thousands = {size: each.batch.num_actions / 1000 for size, each in scenes.items()}
    align = [1000 * seconds(lambda each=each: each.samples) / thousands[size] for size, each in scenes.items()]
    rows = [_row("alignment", "", align)]
    for name in only or BUILT_IN:
        if name in ELSEWHERE:
            rows.append(_row(f"`{name}`", ELSEWHERE[name], []))
            continue
        for parameters in settings(name):
            try:
                reward = resolve(name)(**parameters)
            except MissingExtraError as error:
                rows.append(_row(f"`{name}`", str(error), []))
                print(rows[-1], flush=True)
                continue
            slow = any((name, key, value) in SLOW for key, value in parameters.items())
            warm = seconds(lambda reward=reward: reward(scenes[128]))
            times = [min(warm, seconds(lambda reward=reward: reward(scenes[128])))]
            times += [] if slow else [seconds(lambda reward=reward: reward(scenes[1024]))]
            costs = [1000 * each / thousands[size] for each, size in zip(times, SIZES, strict=False)]
            rows.append(_row(f"`{name}`", ", ".join(f"`{key}: {value}`" for key, value in parameters.items()), costs))
            print(rows[-1], flush=True)
    return rows


def _row(name: str, parameters: str, costs: list[float]) -> str:
    cells = [f"{cost:.3g}" if cost < 1000 else f"{cost:.0f}" for cost in costs] + ["not measured"] * (
        len(SIZES) - len(costs)
    )
    return f"| {name} | {parameters} | {' | '.join(cells)} |"


def _kept(rows: list[str], page: str) -> list[str]:
    """`rows`, and those of the page for the rewards that were not measured now, in the order of the built-in names."""
    found = PART.search(page)
    old = [line for line in found[0].splitlines() if line.startswith(("| `", "| alignment"))] if found else []
    measured = {_name(row) for row in rows}
    rows = rows + [row for row in old if _name(row) not in measured]
    order = {name: k for k, name in enumerate(["alignment", *(f"`{name}`" for name in BUILT_IN)])}
    return sorted((row for row in rows if _name(row) in order), key=lambda row: order[_name(row)])


def _name(row: str) -> str:
    return row.split("|")[1].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of rewards")
    parser.add_argument("--write", action="store_true", help="put the table into docs/rewards.md")
    arguments = parser.parse_args()
    page = DOCS / "rewards.md"
    old = page.read_text(encoding="utf-8")
    rows = measure(arguments.only)
    if arguments.only and arguments.write:
        rows = _kept(rows, old)
    head = "| reward | settings | 128 tokens each | 1,024 tokens each |\n|---|---|---|---|\n"
    table = head + "\n".join(rows) + "\n"
    table = (
        f"Milliseconds per 1,000 tokens, one core of {platform.machine()}, Python {platform.python_version()}:\n\n"
        + table
    )
    print("\n" + table)
    if arguments.write:
        page.write_text(PART.sub(lambda part: f"{part[1]}\n{table}\n{part[2]}", old), encoding="utf-8")


if __name__ == "__main__":
    main()
