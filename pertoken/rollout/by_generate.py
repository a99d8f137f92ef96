"""The engine on plain `transformers.generate`: slow, and right for whatever that can generate with.

`generate` runs the model and keeps its memory; what is drawn, and when a row ends, is decided by the same `Rows` as in
the native engine. So both engines give the same tokens for the same seeds, up to the noise of the arithmetic, and this
one is the other's oracle. It serves models that keep a state of their own kind, recurrent ones among them.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from pertoken.errors import ConfigError
from pertoken.forward import decoder_start
from pertoken.machine.portions import Portion
from pertoken.rollout.engine import copy_parameters
from pertoken.rollout.rows import OnToken, Row, Rows
from pertoken.sampling import Controls
from pertoken.types import Completion


class TransformersEngine:
    """See `RolloutEngine`. Prompts of one length are generated together, at most `max_rows`: nothing is padded."""

    def __init__(
        self, model: Any, tokenizer: Any, *, dtype: torch.dtype | None = None, max_rows: int = 64, context_length: int
    ) -> None:
        """Sample from `model` itself (dtype None), or from an own copy of it in `dtype`."""
        self.version = 0
        self._shares_weights = dtype is None
        self._model = model if dtype is None else copy.deepcopy(model).to(dtype).requires_grad_(False)
        self._model.eval()
        self._tokenizer, self._context = tokenizer, context_length
        self.portion = Portion("rollout", max_rows, "rows of a rollout")
        self._start = decoder_start(self._model)

    @property
    def reads_apart(self) -> bool:
        """See `NativeEngine.reads_apart`."""
        return bool(self._start)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy the trained parameters into the engine's model; nothing to copy if it is the policy's own."""
        if not self._shares_weights:
            copy_parameters(weights, self._model)
        self.version = version

    def release(self) -> None:
        """Nothing to give up: `generate` keeps nothing between calls."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        controls: Controls,
        *,
        seeds: Sequence[int],
        taken: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`. Raises ConfigError for controls with a mask: here one model is asked."""
        if controls.mask is not None:
            raise ConfigError(
                "rollout.mask asks a second model at each token, and transformers.generate asks one: set "
                "rollout.engine=native."
            )
        if not prompts:
            return []

        def sample(most: int) -> list[Completion]:
            rows = Rows(
                prompts, controls, seeds, device=self._model.device, context=self._context, tokenizer=self._tokenizer,
                start=self._start, taken=taken, on_token=on_token,
            )  # fmt: skip
            going = rows.rows
            while going:
                by_length = sorted(going, key=lambda row: len(rows.prompts[row.index]))
                for _, same in groupby(by_length, key=lambda row: len(rows.prompts[row.index])):
                    waiting = list(same)
                    for start in range(0, len(waiting), most):
                        self._generate(rows, waiting[start : start + most])
                going = [row for row in going if row.full]
                for row in going:
                    rows.turn(row)
            return [row.completion() for row in rows.rows]

        return self.portion.attempt(sample, there=len(prompts), least=1)

    def _generate(self, rows: Rows, batch: list[Row]) -> None:
        ids = torch.tensor([rows.prompts[row.index] for row in batch], device=self._model.device)
        with own_settings_aside(self._model):
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=greedy_settings(self._start, max_new_tokens=rows.budget),
                **begun(self._start, len(ids), ids.device),
                logits_processor=LogitsProcessorList([_Chosen(rows, batch)]),
                stopping_criteria=StoppingCriteriaList([_Ended(batch)]),
            )


def greedy_settings(start: Sequence[int], **settings: Any) -> GenerationConfig:
    """Settings of `generate` for a model whose decoder begins with `start` (`decoder_start`)."""
    return GenerationConfig(do_sample=False, decoder_start_token_id=start[0] if start else None, **settings)


def begun(start: Sequence[int], rows: int, device: torch.device) -> dict[str, Tensor]:
    """What `generate` is told to go on from beside the prompts; nothing for a causal model."""
    return {"decoder_input_ids": torch.tensor(start, device=device).expand(rows, -1)} if start else {}


@contextlib.contextmanager
def own_settings_aside(model: Any) -> Iterator[None]:
    """`generate` would fill in penalties and end tokens from the model's own `generation_config`: not meanwhile."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


class _Chosen(LogitsProcessor):
    """Leaves one possible token in each row: the one that was drawn. A row that has ended goes on with anything."""

    def __init__(self, rows: Rows, batch: list[Row]) -> None:
        self._rows, self._batch = rows, batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        live = [k for k, row in enumerate(self._batch) if not row.waits]
        only = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        only[live] = self._rows.choose(scores[live], [self._batch[k] for k in live])
        return torch.full_like(scores, -torch.inf).scatter_(1, only[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Stops a batch when all of its rows have ended, or their segments are full."""

    def __init__(self, batch: list[Row]) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        return torch.tensor([row.waits for row in self._batch], device=input_ids.device)
