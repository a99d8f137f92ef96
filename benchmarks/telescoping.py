"""Do the deltas of every metric sum to the official score of real texts, by word, token and text?

    python benchmarks/telescoping.py PATH/data
    python benchmarks/telescoping.py PATH/data --pairs 1000 --tokenizer PATH/model

PATH/data has the folders summarization (English), translation (German) and translation_en_zh (Chinese), each with a
test.jsonl of rows with a "reference". A pair is a reference and a text made out of stretches of it and of another
reference, moved about. Prints the largest |sum - official| per metric, and the seconds it took.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from pertoken.rewards import Bleu, ChrF, Meteor, Rouge1, Rouge2, RougeL, RougeLsum, Sample, Ter
from pertoken.rewards.align import align, word_spans
from pertoken.testing import byte_tokenizer
from pertoken.types import Item

LANGUAGES = {"english": "summarization", "german": "translation", "chinese": "translation_en_zh"}
GRANULARITIES = ("word", "token", "text")
TOLERANCE = 1e-9

Official = Callable[[str, str], float]


class NoSynonyms:
    def synsets(self, word: str) -> list[Any]:
        return []


def rouge(kind: str, stemmer: bool = False) -> Official:
    scorer = RougeScorer([kind], use_stemmer=stemmer)
    return lambda text, reference: scorer.score(reference, text)[kind].fmeasure


def sacrebleu(metric: Any) -> Official:
    return lambda text, reference: metric.sentence_score(text, [reference]).score / 100


def meteor(text: str, reference: str) -> float:
    words = [[part[start:stop] for start, stop in word_spans(part, marks=True)] for part in (text, reference)]
    return meteor_score(words[1:], words[0], wordnet=NoSynonyms())


def metrics() -> dict[str, tuple[Callable[..., Any], Official]]:
    """Each metric and its settings: how to make the reward, and the official score."""
    found: dict[str, tuple[Callable[..., Any], Official]] = {
        "rouge_1": (Rouge1, rouge("rouge1")),
        "rouge_2": (Rouge2, rouge("rouge2")),
        "rouge_l": (RougeL, rouge("rougeL")),
        "rouge_l, stemmed": (lambda **kw: RougeL(stemmer=True, **kw), rouge("rougeL", True)),
        "rouge_lsum": (RougeLsum, rouge("rougeLsum")),
        "meteor": (Meteor, meteor),
        "chrf": (ChrF, sacrebleu(CHRF())),
        "chrf++": (lambda **kw: ChrF(word_order=2, **kw), sacrebleu(CHRF(word_order=2))),
    }
    for smooth in ("exp", "floor", "add-k", "none"):
        found[f"bleu, {smooth}"] = _bleu(smooth_method=smooth)
    for tokenize in ("intl", "zh", "char", "none", "ja-mecab", "ko-mecab"):
        try:
            found[f"bleu, {tokenize}"] = _bleu(tokenize=tokenize)
        except (RuntimeError, ImportError):
            print(f"bleu, {tokenize}: left out, its package is not installed")
    for options in ({}, {"normalized": True, "asian_support": True, "no_punct": True}):
        name = "ter" + ", normalised" * bool(options)
        found[name] = (lambda options=options, **kw: Ter(**options, **kw), _one_minus(sacrebleu(TER(**options))))
    return found


def _bleu(**options: Any) -> tuple[Callable[..., Any], Official]:
    official = sacrebleu(BLEU(effective_order=True, **options))
    return (lambda **kw: Bleu(**options, **kw)), official


def _one_minus(official: Official) -> Official:
    return lambda text, reference: 1 - official(text, reference)


def texts(path: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Pairs of a text and a reference that share stretches, in another order as often as not."""
    rng = random.Random(seed)
    with path.open(encoding="utf-8") as file:
        references = [json.loads(line)["reference"] for line in file]
    for _ in range(count):
        reference, other = rng.choice(references), rng.choice(references)
        parts = [part[a:b] for part in (reference, reference, other) for a, b in [_stretch(part, rng)]]
        rng.shuffle(parts)
        yield rng.choice(["", " ", "\n"]).join(parts), reference


def _stretch(text: str, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(text))
    return start, rng.randrange(start, len(text) + 1)


def sample(text: str, reference: str, tokenizer: Any) -> Sample:
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    item = Item(id="pair", prompt="", answer=reference)
    return Sample(item, ids, [True] * len(ids), align(ids, tokenizer), "eos")


def deviations(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> dict[str, float]:
    """The largest |sum of rewards - (official score - official score of nothing)| per metric."""
    samples = [(sample(text, reference, tokenizer), reference) for text, reference in pairs]
    worst: dict[str, float] = {}
    for name, (make, official) in metrics().items():
        begun = time.perf_counter()
        rewards = [make(granularity=granularity) for granularity in GRANULARITIES]
        worst[name] = 0.0
        for each, reference in samples:
            expected = official(each.text, reference) - official("", reference)
            for reward in rewards:
                worst[name] = max(worst[name], abs(sum(reward.token_values(each)) - expected))
        print(f"| {name} | {worst[name]:.1e} | {time.perf_counter() - begun:.1f} s |", flush=True)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=1000, help="per language")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; bytes by default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = byte_tokenizer()
    if arguments.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    failed = False
    for language, folder in LANGUAGES.items():
        print(f"\n{language}: {arguments.pairs} pairs\n\n| metric | largest deviation | time |\n|---|---|---|")
        pairs = list(texts(arguments.data / folder / "test.jsonl", arguments.pairs, arguments.seed))
        failed |= any(value > TOLERANCE for value in deviations(pairs, tokenizer).values())
    raise SystemExit(f"a sum differs by more than {TOLERANCE}" if failed else 0)


if __name__ == "__main__":
    main()
