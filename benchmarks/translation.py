"""Does token-level RL make a supervised translation model better, and faster than one reward for the whole text?

    python benchmarks/translation.py DATA FOLDER --seeds 3

DATA holds `train`, `validation` and `test.jsonl` with a `prompt` ("Translate to German: ...") and a `reference`. A
Marian model of a few million parameters that knows nothing, with a BPE vocabulary of the training texts, is trained:

1. On the given answers, with every learning rate and number of epochs of the grid; BLEU on validation chooses.
2. From there by rewards, once for each way of credit and learning rate of its grid; BLEU on validation chooses.
3. `pertoken compare` on the test split with what was chosen: `sft`, `token` (BLEU and chrF word by word) and
   `sequence` (the same rewards, one credit for the whole text) from the `sft` model of the same seed, on as many
   samples.

All of it is ordinary runs under FOLDER. The same command goes on where it was interrupted, and leaves out what is done.
GRPO of TRL is no arm: it trains no encoder-decoder models.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast, set_seed

from pertoken.tracking.reader import RunReader

METRIC = "corpus_bleu"
CREDIT = {"token": {"type": "leave_one_out_process"}, "sequence": {"type": "leave_one_out"}}
"""Both unbiased, both against the other samples of the prompt: the rewards behind a token, or those of the text."""


# --- data and model ------------------------------------------------------------------------------------------


def rows_of(file: Path, longest: int | None) -> list[dict[str, str]]:
    """Source (of at most `longest` words) and target of each row, without the request in front of the source."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [{"source": row["prompt"].partition(": ")[2].strip(), "target": row["reference"].strip()} for row in rows]
    return [pair for pair in pairs if longest is None or len(pair["source"].split()) <= longest]


def trained_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A BPE vocabulary of both languages, as SentencePiece would cut words: the space belongs to the word behind it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def prepare(arguments: argparse.Namespace) -> None:
    """Data, tokenizer and random model, where they are not there yet."""
    folder: Path = arguments.folder
    if (folder / "model" / "config.json").is_file():
        return
    splits = {
        split: rows_of(arguments.data / f"{split}.jsonl", arguments.longest)
        for split in ("train", "validation", "test")
    }
    splits["train"] = splits["train"][: arguments.rows]
    print("rows:", {split: len(rows) for split, rows in splits.items()})
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = trained_tokenizer((text for row in splits["train"] for text in row.values()), arguments.vocabulary)
    set_seed(0)
    sides = {"layers": arguments.layers, "attention_heads": arguments.heads, "ffn_dim": arguments.inner}
    model = MarianMTModel(
        MarianConfig(
            vocab_size=len(tokenizer), d_model=arguments.width,
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None,
            max_position_embeddings=128, activation_function="relu", dropout=arguments.dropout,
            scale_embedding=True, init_std=arguments.width**-0.5,
        )
    )  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")


# --- configurations ------------------------------------------------------------------------------------------


def shared(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    folder: Path = arguments.folder
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {
        "policy": {"model": str(folder / "model"), "precision": "float32", "compile": False},
        "task": {
            "family": "translation", "style": "bare", "source_language": "en",
            "target_language": arguments.target, "path": files,
        },
        "rollout": {
            "prompts_per_step": arguments.prompts, "samples_per_prompt": arguments.samples, "max_rows": 1024,
            "sampling": {"max_new_tokens": 48},
        },
        "evaluation": {"metric": METRIC, "items": 600, "sampling": {"max_new_tokens": 48}},
        "log": {"episodes_every": 1000},
    }  # fmt: skip


def supervised(arguments: argparse.Namespace, rate: float, epochs: int) -> dict[str, Any]:
    """Supervised training; the learning rate falls to a hundredth, so that the last weights are the best."""
    rows = (arguments.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    steps = max(1, len(rows) * epochs // arguments.batch)
    return {
        "method": {"type": "sft", "batch": arguments.batch},
        "policy": {"dropout": True},
        "update": {
            "learning_rate": rate, "warmup_steps": min(200, steps // 5), "schedule": "linear", "final_share": 0.01,
            "betas": [0.9, 0.98], "tokens_per_micro_batch": 1024,
        },
        "stop": {"steps": steps},
        "evaluation": {"every": max(1, steps // 4)},
        "checkpoint": {"every": max(1, steps // 8)},
    }  # fmt: skip


def by_rewards(arguments: argparse.Namespace, credit: str, rate: float) -> dict[str, Any]:
    """RL with one kind of credit; each update takes all samples of its step."""
    steps = arguments.steps
    return {
        "credit": CREDIT[credit],
        "kl": {"coefficient": arguments.kl} if arguments.kl else {"place": "none", "measure": False},
        "update": {"learning_rate": rate, "warmup_steps": 2, "tokens_per_micro_batch": 2048},
        "stop": {"steps": steps},
        "evaluation": {"every": max(1, steps // 8)},
        "checkpoint": {"every": max(1, steps // 8)},
    }


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Sections merged key by key, later ones over earlier ones."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if both else value
    return found


# --- runs ----------------------------------------------------------------------------------------------------


def validated(arguments: argparse.Namespace, name: str, *settings: dict[str, Any]) -> float:
    """BLEU on validation at the end of a run, which is made, gone on with, or read if it has finished."""
    folder: Path = arguments.folder / "tuning"
    folder.mkdir(exist_ok=True)
    chain = {"name": name, "folder": str(folder / name), "stages": [{"name": "run"}]}  # a chain goes on by itself
    config = merged(shared(arguments), *settings, {"evaluation": {"split": "validation", "items": 500}})
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | chain), encoding="utf-8")
    pertoken("train", str(folder / f"{name}.yaml"))
    last = RunReader(folder / name / "run").evaluations()[-1]
    print(f"validation: {name}: {METRIC} {last['metrics'][METRIC]:.2f}", flush=True)
    return float(last["metrics"][METRIC])


def pertoken(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "pertoken.cli", *command], check=True)


def best_supervised(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """The settings that validation prefers, and the model that they made (none if there was nothing to choose)."""
    grid = list(product(arguments.rates, arguments.epochs))
    if len(grid) == len(arguments.rl_rates) == 1:
        return supervised(arguments, *grid[0]), None
    scores = {at: validated(arguments, f"sft-{at[0]:g}-{at[1]}", supervised(arguments, *at)) for at in grid}
    rate, epochs = max(scores, key=lambda at: scores[at])
    if epochs == max(arguments.epochs):
        print(f"note: validation prefers the most epochs tried, {epochs}; more may be better still (--epochs)")
    return supervised(arguments, rate, epochs), arguments.folder / "tuning" / f"sft-{rate:g}-{epochs}" / "run" / "model"


def best_rate(arguments: argparse.Namespace, credit: str, start: Path | None) -> float:
    """The learning rate of RL that validation prefers."""
    rates: Sequence[float] = arguments.rl_rates
    if len(rates) == 1:
        return rates[0]
    begin = {"policy": {"model": str(start)}}
    scores = {
        rate: validated(arguments, f"{credit}-{rate:g}", by_rewards(arguments, credit, rate), begin) for rate in rates
    }
    return max(scores, key=lambda rate: scores[rate])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="de", help="the language that is translated to")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--rows", type=int, default=None, help="first rows of the training split; all unless given")
    parser.add_argument("--longest", type=int, default=None, help="words of a source, in all splits; any unless given")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--inner", type=int, default=512, help="width of the feed-forward layers")
    parser.add_argument("--layers", type=int, default=3, help="of the encoder, and of the decoder")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=64, help="rows of a supervised step")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--rl-rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4])
    parser.add_argument("--steps", type=int, default=150, help="of RL")
    parser.add_argument("--kl", type=float, default=0.05, help="paid per nat from the supervised model; 0 is free")
    parser.add_argument("--prompts", type=int, default=16, help="of a step of RL")
    parser.add_argument("--samples", type=int, default=12, help="of each prompt")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.absolute()

    prepare(arguments)
    chosen, start = best_supervised(arguments)
    arms = {
        credit: by_rewards(arguments, credit, best_rate(arguments, credit, start)) for credit in ("sequence", "token")
    }
    recipe = merged(shared(arguments), {"name": "translation", "seed": 1, "evaluation": {"split": "test"}})
    recipe["compare"] = {
        "folder": str(arguments.folder / "comparison"), "seeds": arguments.seeds, "arms": {"sft": chosen} | arms,
        "metrics": [METRIC, "corpus_chrf", "ter"],
    }  # fmt: skip
    (arguments.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    pertoken("compare", str(arguments.folder / "recipe.yaml"))


if __name__ == "__main__":
    main()
