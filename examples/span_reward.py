"""Your own reward: findings in the text, each paid by the tokens that wrote it.

    python examples/span_reward.py

First the reward alone, on a sentence, as a test of it would look; then in a training run, where the configuration
names it by its import path, `span_reward:digits`, and sets its parameter.
"""

import re
import tempfile
from pathlib import Path

import torch

from pertoken import RunConfig, train
from pertoken.batching import to_batch
from pertoken.rewards import Sample, Scene, ScoredSpan, span_reward
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, episode, tiny_model


@span_reward
def digits(sample: Sample, *, cost: float = 0.1) -> list[ScoredSpan]:
    """Each number in digits costs, shared by its own tokens; a message says why."""
    return [ScoredSpan(*match.span(), -cost, f"spell out {match[0]}") for match in re.finditer(r"\d+", sample.text)]


def on_one_sentence(text: str) -> None:
    """Print what each token of `text` would pay."""
    tokenizer = byte_tokenizer()  # one token per byte; any tokenizer will do
    sample = episode(tokenizer.encode("?"), tokenizer.encode(text))
    scene = Scene(to_batch([sample], Controls()), [sample], tokenizer)
    for span in digits.fn(scene.samples[0]):  # the plain function
        print(span)
    paid = digits(scene)[0, 1:]  # one number per token
    print(
        " ".join(f"{letter}{value:.3f}" if value else letter for letter, value in zip(text, paid.tolist(), strict=True))
    )
    assert torch.isclose(paid.sum(), torch.tensor(-0.2, dtype=torch.float64))


def in_a_run(folder: Path) -> None:
    """Three steps with a random model, to see the parts of the reward in the log."""
    tiny_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(f'{{"prompt": "Say {k}.", "reference": "{k}"}}\n' for k in range(50)))
    config = RunConfig(
        folder=str(folder / "run"),
        policy={"model": str(folder / "model"), "precision": "float32", "device": "cpu"},
        task={"path": str(folder / "data.jsonl"), "prompt": "{prompt}"},
        rollout={"prompts_per_step": 2, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 8}},
        rewards=[{"name": "length", "unfinished_cost": 0.1}, {"fn": "span_reward:digits", "cost": 0.2}],
        evaluation={"items": 0},
        stop={"steps": 3},
    )
    result = train(config, on_step=lambda report, seconds: print(report.step, parts(report.metrics)))
    print(result.reason)


def parts(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in metrics.items() if name.startswith("reward/")}


if __name__ == "__main__":
    on_one_sentence("It took 12 days, not 7.")
    with tempfile.TemporaryDirectory() as place:
        in_a_run(Path(place))
