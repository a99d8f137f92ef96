"""Do the intervals of distinct-2 hold what they promise? Asked of sets of real texts whose difference is known.

    python benchmarks/distinct_intervals.py PATH/data/stories/train.jsonl

The interval of a difference is bootstrapped over what each text makes of the metric (`distinct_shares`). Two things are
asked, of 400 pairs of sets of 64 texts of 45 words each: how often it leaves out 0 where both sets are drawn from the
same stories (5% is right), and how often it holds the true difference where a tenth of the words of the second set,
the same texts otherwise, has become `the` (95% is right); that is the mean of 300 other pairs.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

from pertoken.text_metrics import Interval, bootstrap_mean, distinct, distinct_shares

TEXTS, WORDS, PAIRS, N = 64, 45, 400, 2


def difference(before: list[str], after: list[str]) -> Interval:
    pairs = zip(distinct_shares(before, N), distinct_shares(after, N), strict=True)
    return bootstrap_mean([new - old for old, new in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path, help="JSONL with a column `reference`")
    path, draw = parser.parse_args().stories, random.Random(0)
    stories = [json.loads(line)["reference"].split() for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [" ".join(words[at : at + WORDS]) for words in stories for at in (0, WORDS) if len(words) >= at + WORDS]

    def worse(text: str) -> str:
        return " ".join("the" if draw.random() < 0.1 else word for word in text.split())

    false_alarms = 0
    for _ in range(PAIRS):
        both = draw.sample(texts, 2 * TEXTS)
        found = difference(both[:TEXTS], both[TEXTS:])
        false_alarms += not found.low <= 0 <= found.high
    print(f"no difference: 0 is left out in {false_alarms / PAIRS:.1%} of {PAIRS}")

    def true_difference() -> float:
        return distinct(list(map(worse, draw.sample(texts, TEXTS))), N) - distinct(draw.sample(texts, TEXTS), N)

    truth, held = statistics.fmean(true_difference() for _ in range(300)), 0
    for _ in range(PAIRS):
        before = draw.sample(texts, TEXTS)
        found = difference(before, list(map(worse, before)))
        held += found.low <= truth <= found.high
    print(f"a difference of {truth:.4f}: the interval holds it in {held / PAIRS:.1%} of {PAIRS}")


if __name__ == "__main__":
    main()
