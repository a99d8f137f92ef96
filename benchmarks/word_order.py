"""How well does Link Grammar tell good sentences from broken ones, and how long does it take?

    python benchmarks/word_order.py data/stories/validation.jsonl

The sentences are those of the column `reference` that the reward `link_grammar` would judge, and copies of them with
two words swapped, a word said twice, a word left out, and all words shuffled. Figures: the share of sentences in which
the parser leaves out a word, and the mean share of words that it leaves out, which is what the reward pays.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from pertoken.rewards import LinkGrammar, NoOpinion, Sample
from pertoken.rewards.align import AlignedText, word_spans
from pertoken.rewards.grammar.link_grammar import prose_sentences
from pertoken.types import Item


def swapped(words: list[str], rng: random.Random) -> list[str]:
    one, other = rng.sample(range(len(words)), 2)
    words[one], words[other] = words[other], words[one]
    return words


def doubled(words: list[str], rng: random.Random) -> list[str]:
    at = rng.randrange(len(words))
    return [*words[: at + 1], *words[at:]]


def missing(words: list[str], rng: random.Random) -> list[str]:
    at = rng.randrange(len(words))
    return [*words[:at], *words[at + 1 :]]


def shuffled(words: list[str], rng: random.Random) -> list[str]:
    return rng.sample(words, len(words))


CLOSING = ".!?\"'”’)]"

CHANGES: dict[str, Callable[[list[str], random.Random], list[str]]] = {
    "as they are": lambda words, _: words, "two words swapped": swapped, "a word said twice": doubled,
    "a word left out": missing, "all words shuffled": shuffled,
}  # fmt: skip


def _apart(sentence: str, change: Callable[[list[str], random.Random], list[str]], rng: random.Random) -> str:
    """The sentence with its words changed; what closes it stays where it is."""
    words = sentence.rstrip(CLOSING)
    return " ".join(change(words.split(), rng)) + sentence[len(words) :]


def cost(reward: LinkGrammar, sentence: str) -> float | None:
    """What the sentence pays; None if it is not judged."""
    spans = tuple((k, k + 1) for k in range(len(sentence)))
    sample = Sample(Item("1", "?"), [0] * len(spans), [True] * len(spans), AlignedText(sentence, spans), "eos")
    said = reward.token_values(sample)
    return None if isinstance(said, NoOpinion) else -sum(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="JSON lines with a column `reference`")
    parser.add_argument("--sentences", type=int, default=400)
    arguments = parser.parse_args()
    texts = [json.loads(line)["reference"] for line in arguments.path.read_text(encoding="utf-8").splitlines()]
    sentences = [text[start:stop] for text in texts for start, stop in prose_sentences(text)]
    sentences = [each for each in sentences if 4 <= len(word_spans(each)) <= LinkGrammar().max_words]
    rng, reward = random.Random(0), LinkGrammar()
    sentences = rng.sample(sentences, min(arguments.sentences, len(sentences)))
    print("| sentences | judged | a word left out | mean share of words | ms a sentence |\n|---|---|---|---|---|")
    for name, change in CHANGES.items():
        changed = [_apart(each, change, rng) for each in sentences]
        begun = time.process_time()
        costs = [paid for each in changed if (paid := cost(reward, each)) is not None]
        spent = 1000 * (time.process_time() - begun) / len(changed)
        found, mean = sum(paid > 0 for paid in costs) / len(costs), sum(costs) / len(costs)
        print(f"| {name} | {len(costs)} of {len(changed)} | {found:.3f} | {mean:.3f} | {spent:.2f} |")


if __name__ == "__main__":
    main()
