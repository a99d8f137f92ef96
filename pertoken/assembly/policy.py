"""The policy, and what speaks with its weights: engines, the mask policy, controls, the optimiser; whether they fit."""

from dataclasses import replace
from typing import Any

import torch

from pertoken.config import AttentionCredit, RolloutConfig, RunConfig
from pertoken.errors import ConfigError
from pertoken.forward import decoder_start
from pertoken.machine.memory import GIGABYTE, installed_memory, used_memory
from pertoken.policy.footprint import footprint
from pertoken.policy.model import Lora, Policy, ValueHead, copy_of, load_model, set_languages
from pertoken.policy.scoring import head_logits
from pertoken.rewards.attention import reader_of
from pertoken.rollout.by_generate import TransformersEngine
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Mask
from pertoken.training.state import Run
from pertoken.training.weights import Anchor, Average


def build_policy(config: RunConfig) -> Policy:
    """The policy with its value head and adapters; the seed makes their initial weights the same each time."""
    settings = config.policy
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(settings.model, device=device, trusted=settings.trust_remote_code)
    if settings.languages is not None:
        set_languages(model, tokenizer, **settings.languages.model_dump())
    head = None
    if settings.value_head is not None:
        head = ValueHead(model.config.get_text_config().hidden_size, detach_trunk=settings.value_head.detach_trunk)
    return Policy(
        model,
        tokenizer,
        precision=settings.precision,
        lora=Lora(**settings.lora.model_dump()) if settings.lora else None,
        value_head=head,
        dropout=settings.dropout,
        compile=settings.compile,
        recompute_activations=config.update.recompute_activations,
    )


def build_controls(config: RolloutConfig, policy: Policy) -> Controls:
    """What the samples of training are drawn by."""
    controls, mask = Controls.resolve(config.sampling, policy.tokenizer, policy.eos_ids), config.mask
    return controls if mask is None else replace(controls, mask=Mask(mask.top_p, mask.least))


def build_mask(config: RunConfig, policy: Policy) -> NativeEngine | None:
    """The engine of the mask policy, on a copy of the policy as it is now that shares what is not trained; or None."""
    if config.rollout.mask is None or config.offline is not None:
        return None
    return _native_engine(policy, copy_of(policy.model), config.rollout.max_rows)


def build_engine(
    policy: Policy, config: RolloutConfig, mask: NativeEngine | None = None
) -> NativeEngine | TransformersEngine:
    """The rollout engine on the policy's own model, or on a bfloat16 copy of it where bfloat16 is in use."""
    if config.engine == "transformers":
        return TransformersEngine(
            policy.model,
            policy.tokenizer,
            dtype=policy.autocast_dtype,
            max_rows=config.max_rows,
            context_length=policy.context_length,
        )
    return _native_engine(policy, policy.model, config.max_rows, mask)


def _native_engine(policy: Policy, model: Any, max_rows: int, mask: NativeEngine | None = None) -> NativeEngine:
    """The native engine on `model`, which is the policy's or a copy of it."""
    return NativeEngine(
        model,
        policy.tokenizer,
        head_logits=head_logits,
        dtype=policy.autocast_dtype,
        max_rows=max_rows,
        context_length=policy.context_length,
        mask=mask,
    )


def build_optimizer(config: RunConfig, policy: Policy) -> torch.optim.Optimizer:
    """AdamW: weight decay on matrices only, the value head at its own learning rate."""
    update, head = config.update, config.policy.value_head
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in policy.trainable().items():
        own = name.startswith("value_head.") and head is not None
        rate = head.learning_rate if own and head is not None else update.learning_rate
        decay = update.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "peak_lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        betas=update.betas,
        fused=True,
    )


def copies_of(config: RunConfig, policy: Policy) -> tuple[Average | None, Anchor | None]:
    """What the run keeps of the weights before training: made before a checkpoint is loaded."""
    update, named = config.update, policy.trainable()
    pulls = update.l2_to_initial or update.l1_to_initial
    return (
        None if update.ema_decay is None else Average(named, update.ema_decay),
        Anchor(named, l2=update.l2_to_initial, l1=update.l1_to_initial) if pulls else None,
    )


def refuse_of_model(config: RunConfig, policy: Policy) -> None:
    """What the configuration asks of a model and this one cannot give."""
    _refuse_credit(config, policy)
    refuse_segments(config, policy)


def _refuse_credit(config: RunConfig, policy: Policy) -> None:
    """What a way to credit asks of a model and this one cannot give; a reader of texts is loaded and asked once."""
    name = type(policy.hf_model).__name__
    if isinstance(config.credit, AttentionCredit) and config.credit.model is not None:
        reader_of(config.credit.model)
    elif config.credit.type == "attention" and policy.layout != "packed":
        raise ConfigError(
            f"credit.type attention: {name} attends in a way of its own, which cannot be looked into here. Let another "
            "model read the texts (credit.model: this one before training, say), or use credit.type shapley."
        )


def refuse_segments(config: RunConfig, policy: Policy) -> None:
    """Segments that the model cannot write, or that its context has no room for."""
    rollout, evaluation = config.rollout.sampling, config.evaluation.sampling
    for where, sampling in (("rollout.sampling", rollout), ("evaluation.sampling", evaluation)):
        if sampling.segment is None:
            continue
        if decoder_start(policy.hf_model):
            raise ConfigError(
                f"{where}.segment: encoder-decoder models ({type(policy.hf_model).__name__}) read a prompt and write "
                "from the beginning; they cannot go on from the middle of a text: leave it out."
            )
        if sampling.least_room >= policy.context_length:
            raise ConfigError(
                f"{where}.segment: tokens and context are {sampling.least_room} together, and the context of this "
                f"model is {policy.context_length}: nothing is left for a prompt. Lower one of them."
            )


LEAST_PLANNED = 128
"""Tokens of a micro-batch below which no run is planned: if those do not fit, it is something else that does not."""


def plan_memory(run: Run) -> None:
    """Estimate what `run` will take, and let it begin with micro-batches that fit into nine tenths of what there is.

    Of what is installed and allowed here, not of what is free now: two runs of one configuration are cut alike.
    """
    policy, rollout, portion = run.policy, run.config.rollout, run.micro_batch
    kept = footprint(policy, natural=run.before_update is not None)
    base = used_memory(policy.device)
    trained = sum(p.numel() * p.element_size() for p in policy.trainable().values())
    if run.config.update.balance != "none":  # a gradient of each task
        base += len({item.task for item in run.items}) * trained / GIGABYTE
    if run.config.checkpoint.background:  # a copy of the weights and of the two averages of AdamW
        base += 3 * trained / GIGABYTE
    most = rollout.prompts_per_step * rollout.samples_per_prompt * policy.context_length

    def estimate(tokens: int) -> float:
        return base + kept.update(min(tokens, most)) / GIGABYTE

    installed, size = installed_memory(policy.device), portion.size
    while estimate(size) > 0.9 * installed and size > LEAST_PLANNED:
        size //= 2
    wanted, run.memory_estimate = estimate(portion.whole), estimate(portion.size)
    about = f"this run will take about {wanted:.1f} GB of memory at its height, and {installed:.1f} GB are installed: "
    if estimate(size) > 0.9 * installed:
        run.notes.append(about + "lower update.tokens_per_micro_batch, or train with policy.lora")
    elif size < portion.size:
        portion.size, run.memory_estimate = size, estimate(size)
        run.notes.append(about + f"it begins with {size} tokens per micro-batch, which changes no gradient")
