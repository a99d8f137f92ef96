"""Your own data: a CSV file, a prompt over its columns, a run from Python.

    python examples/own_data.py                                       # a tiny random model: seconds, and no quality
    python examples/own_data.py --model smollm2-135m-instruct --steps 40

Any file will do (JSONL, CSV, TSV, Parquet, a folder of them, a Hugging Face dataset): see docs/tasks.md.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from pertoken import RunConfig, train
from pertoken.tasks.base import check_task
from pertoken.tasks.files import load_file_task
from pertoken.testing import byte_tokenizer, tiny_model

PROMPT = "Write the question that has this answer: {answer}"


def write_data(path: Path) -> None:
    """Two columns, ninety rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["answer", "question"])
        for number in range(10, 100):
            writer.writerow([f"It is {number * number}.", f"What is {number} times {number}?"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="embedded name, hub name or folder; a tiny random model if left out")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder / "squares.csv")

        task = load_file_task(folder / "squares.csv", prompt=PROMPT, answer="question")
        check_task(task)  # splits, ids, answers: everything that is wrong, in one sentence
        print({split: len(task.items(split)) for split in ("train", "validation", "test")})

        if arguments.model is None:
            tiny_model().save_pretrained(folder / "model")
            byte_tokenizer().save_pretrained(folder / "model")
        config = RunConfig(
            name="squares",
            folder=str(folder / "run"),
            policy={"model": arguments.model or str(folder / "model")},
            task={"path": str(folder / "squares.csv"), "prompt": PROMPT, "answer": "question"},
            rollout={"prompts_per_step": 4, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 16}},
            rewards=[{"name": "rouge_l"}, {"name": "length", "max_words": 8, "unfinished_cost": 0.1}],
            evaluation={"items": 4, "sampling": {"temperature": 0.0, "max_new_tokens": 16}},
            stop={"steps": arguments.steps},
        )
        result = train(config, on_note=print, on_step=lambda report, seconds: print(f"step {report.step}"))
        change = result.comparison.changes["rouge_l"]
        print(f"{result.reason}; held-out ROUGE-L {change.before:.3f} -> {change.after:.3f}")


if __name__ == "__main__":
    main()
