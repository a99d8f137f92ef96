"""Where a model that has read a prompt and its answer looks at the end: weights of tokens by attention.

The policy's own attention comes out of its packed pass (`policy/scoring.py`); this is for any other model, with a
tokenizer of its own: a reward model, or a model as it was before training.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ModelError
from pertoken.rewards.align import spread
from pertoken.rewards.base import Sample, Scene
from pertoken.rewards.semantics import other_texts, window_of
from pertoken.rewards.token_model import ABOUT, load_trunk


@dataclass(frozen=True)
class Reader:
    """A model without its head, and its tokenizer. It computes attention the plain way (`eager`), one text at a time:
    memory for layers x heads x length x length numbers."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str) -> "Reader":
        """The reader of a folder or hub name; of a token reward that `pertoken reward train` made, its trunk.

        Raises ModelError if the model cannot be had, or cannot tell how it attends.
        """
        folder = Path(name).expanduser()
        model, tokenizer = load_trunk(str(folder / "trunk") if (folder / ABOUT).is_file() else name, "credit.model")
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"credit.model: {type(tokenizer).__name__} cannot say which characters a token is of")
        try:
            model.set_attn_implementation("eager")
            reader = cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
            reader.of_ids(tokenizer("a b c")["input_ids"])
        except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(
                f"credit.model: {name!r} ({type(model).__name__}) does not tell how its last layer attends "
                f"({str(error)[:120]}): take a transformer with attention in its last layer, or credit.type shapley"
            ) from error
        return reader

    @torch.no_grad()
    def of_ids(self, ids: list[int]) -> list[float]:
        """How much the last of `ids` attends to each of them in the last layer, mean over heads; sums to 1."""
        tokens = torch.tensor([ids], device=self.model.device)
        layers = self.model(input_ids=tokens, output_attentions=True, return_dict=True).attentions
        if not layers or layers[-1] is None:
            raise ValueError("no attentions in what it returns")
        found: list[float] = layers[-1][0, :, -1].double().mean(0).tolist()
        return found

    def of_sample(self, sample: Sample) -> list[float]:
        """The same for the tokens of the policy, by the characters that they share with tokens of this model. Of a text
        beyond the window the end is read."""
        weights = [0.0] * len(sample.tokens)
        if not sample.text:
            return weights
        prompt = "\n\n".join(other_texts(sample, "prompt", "credit"))
        inputs = self.tokenizer(prompt, sample.text, return_offsets_mapping=True, verbose=False)
        begin = max(len(inputs["input_ids"]) - window_of(self.tokenizer, self.model.config), 0)
        own, spans = inputs.sequence_ids(0)[begin:], inputs["offset_mapping"][begin:]
        attention = self.of_ids(inputs["input_ids"][begin:])
        for which, (start, stop), value in zip(own, spans, attention, strict=True):
            if which == 1 and start < stop:
                for token, share in spread(sample.aligned, start, stop, value):
                    weights[token] += share
        return weights

    def weights(self, scene: Scene) -> Float[Tensor, "B T"]:
        """`of_sample` for the rows of a scene, 0 off actions."""
        found = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
        for row, (episode, sample) in enumerate(zip(scene.episodes, scene.samples, strict=True)):
            found[row, episode.prompt_length : len(episode.tokens)] = torch.tensor(
                self.of_sample(sample), dtype=torch.float64
            )
        return torch.where(scene.batch.action_mask, found.to(scene.batch.tokens.device), 0.0)


reader_of = functools.cache(Reader.load)
"""The reader of a model's name."""
