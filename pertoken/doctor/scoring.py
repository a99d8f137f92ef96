"""Checks of sampling and scoring: the log-probs of the user's own model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pertoken import batching
from pertoken.doctor.base import (
    LOGPROB_TOLERANCE,
    RATIO_TOLERANCE,
    Probe,
    Verdict,
    check,
    credited,
    largest,
    numbers,
    skipped,
    within,
)
from pertoken.forward import decoder_start, own_logits
from pertoken.policy.scoring import Layout, Trunk, by_own_logits, score_batch
from pertoken.prompts import prompt_ids
from pertoken.rollout.by_generate import begun, greedy_settings, own_settings_aside
from pertoken.rollout.collect import collect
from pertoken.sampling import Controls, Sampling
from pertoken.training import trainer
from pertoken.training.state import items_of
from pertoken.types import Credit, TokenBatch

EACH_CONTROL: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram": 2},
    "min_new_tokens": {"min_new_tokens": 6},
    "banned_words": {"banned_words": ("the", "a", "e")},
    "stop": {"stop": ("e", ".")},
    "segment": {"segment": {"tokens": 2, "context": 3}},
}
"""A setting of each sampling control, alone; the length of a completion is no control of its distribution."""

CONTROL_TOKENS = 6


@check(
    "before the first update the scored and the sampled probability of every token are the same (ratio 1)",
    remedy="The engine and the scoring pass compute other distributions: see which of `padding`, `controls` and "
    "`greedy` fail with it. Then try rollout.engine=transformers and policy.precision=float32; if it stays, report the "
    "model and its sampling controls.",
    quick=True,
)
def ratio(probe: Probe) -> Verdict:
    """|scored - sampled| log-prob, of the worst action; in bfloat16 the mean over all of them."""
    tolerance, count = RATIO_TOLERANCE[probe.dtype], probe.batch.num_actions
    which = "the worst" if probe.dtype is None else "the mean"
    if probe.run.staleness:
        return skipped("the samples are of older weights than the step (rollout.ahead)")
    return within(
        probe.drift, tolerance, "nats", seen=f"{count} sampled tokens",
        wrong=f"{which} of {count} sampled tokens has a ratio {_exp(probe.drift)} times off 1 before any update",
    )  # fmt: skip


@check(
    "packed rows, padded rows and the model's own forward pass give every token the same log-prob",
    remedy="If all three differ, a token is scored by the logits of another place (a shift) or padding is attended to; "
    "if the packed one does, build the policy with layout='padded' and report the model.",
)
def padding(probe: Probe) -> Verdict:
    """The plain distribution of the model in each layout, with garbage in the padding."""
    run, size = probe.run, probe.config.rollout.samples_per_prompt
    rows = torch.tensor(sorted({0, min(1, size - 1), min(size, len(probe.batch.group) - 1)}))  # a group, and another
    batch = dataclasses.replace(probe.batch.rows(rows), controls=Controls(), support=None)
    wide, model, dtype = _widened(batch, (run.policy.eos_ids or (0,))[0]), run.policy.hf_model, probe.dtype
    found: dict[str, Tensor] = {}
    own_way: Layout = run.policy.layout
    with torch.no_grad():
        for layout in [own_way] if own_way == "encoder_decoder" else sorted({"padded", own_way}):
            for columns, some in (("", batch), (" with more padding", wide)):
                scored = score_batch(Trunk(model, None, dtype, layout), some)
                found[f"the {layout} layout{columns}"] = scored.logprobs[some.action_mask]
        with torch.autocast(batch.tokens.device.type, dtype=dtype, enabled=dtype is not None):
            own = by_own_logits(model, batch)[batch.action_mask]
    gaps = {name: largest(logprobs - own) for name, logprobs in found.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    return within(
        gaps[worst], LOGPROB_TOLERANCE[dtype], "nats",
        seen=f"{len(own)} tokens in {len(found)} layouts against the model's own logits",
        wrong=f"{worst} is off the model's own logits; all: {', '.join(f'{n} {g:.2g}' for n, g in gaps.items())}",
    )  # fmt: skip


@check(
    "the order of the rows changes neither a log-prob nor an advantage",
    remedy="Something is kept by row number or leaks between rows. If advantages differ, look at credit.type and at "
    "the group ids; if log-probs differ, build the policy with layout='padded' and report the model.",
)
def order(probe: Probe) -> Verdict:
    """The batch forwards and with its rows shuffled across groups."""
    run, batch, rewards = probe.run, probe.batch, probe.rewards
    shuffled = torch.randperm(len(batch.group), generator=torch.Generator().manual_seed(1))
    again = batch.rows(shuffled)
    logprobs = largest((run.policy.score(again).logprobs - _old(probe).logprobs[shuffled])[again.action_mask])
    values = numbers(batch.sample_logprobs, 2).to(batch.sample_logprobs) * batch.action_mask
    old = dataclasses.replace(_old(probe), values=values, bootstrap=values.sum(1))
    parts = {name: cells[shuffled] for name, cells in rewards.parts.items()}
    silent = {name: rows[shuffled] for name, rows in rewards.abstained.items()}
    moved = dataclasses.replace(rewards, total=rewards.total[shuffled], parts=parts, abstained=silent)
    credit: Credit = credited(probe.config.credit, rewards, batch, old)
    other: Credit = credited(probe.config.credit, moved, again, old.rows(shuffled))
    advantages = largest(other.advantages - credit.advantages[shuffled])
    size, tolerance = 1 + largest(credit.advantages), LOGPROB_TOLERANCE[probe.dtype]
    return within(
        max(logprobs, advantages / size), tolerance, "nats",
        seen=f"{len(shuffled)} rows in two orders",
        wrong=f"shuffled, a log-prob differs by {logprobs:.2g} nats and an advantage by {advantages:.2g}",
    )  # fmt: skip


@check(
    "with every sampling control the scored distribution is the sampled one",
    remedy="Leave the control that is named out of rollout.sampling, or report it with the model: training with it "
    "moves the policy by probabilities that its tokens were not drawn with.",
)
def controls(probe: Probe) -> Verdict:
    """Each control of the library alone; `ratio` looks at those of the configuration together."""
    run = probe.run
    gaps: dict[str, float] = {}
    for name, settings in EACH_CONTROL.items():
        if name == "segment" and decoder_start(run.policy.hf_model):
            continue  # it is refused there
        sampling = Sampling(max_new_tokens=CONTROL_TOKENS, **settings)
        resolved = Controls.resolve(sampling, run.policy.tokenizer, run.policy.eos_ids)
        episodes = collect(run.engine, _items(probe, 1), run.policy.tokenizer, resolved, samples_per_prompt=2)
        batch = batching.to_batch(episodes, resolved, device=str(run.policy.device))
        gaps[name] = largest((run.policy.score(batch).logprobs - batch.sample_logprobs)[batch.action_mask])
    tolerance = RATIO_TOLERANCE[None] if probe.dtype is None else LOGPROB_TOLERANCE[probe.dtype]
    bad = [name for name, gap in gaps.items() if not gap <= tolerance]
    return within(
        max(gaps.values()), tolerance, "nats", seen=", ".join(gaps),
        wrong=f"sampler and scorer disagree on {', '.join(f'{name} ({gaps[name]:.2g})' for name in bad)}",
    )  # fmt: skip


@check(
    "the engine's greedy answers are those of transformers.generate",
    remedy="Set rollout.engine=transformers, which generates by transformers itself, and report the model.",
)
def greedy(probe: Probe) -> Verdict:
    """Token by token up to the first difference; a tie of the two best tokens, within rounding, is none."""
    run, tokens = probe.run, probe.config.rollout.sampling.max_new_tokens
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
    resolved = Controls.resolve(sampling, run.policy.tokenizer, run.policy.eos_ids)
    prompts = [prompt_ids(item, run.policy.tokenizer) for item in _items(probe, 2)]
    completions = run.engine.generate(prompts, resolved, seeds=range(len(prompts)))
    worst, compared, where = 0.0, 0, ""
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = _generate(probe, prompt, tokens)
        compared += len(wanted)
        gap, place = _first_difference(probe, prompt, completion.tokens, wanted)
        if gap > worst:
            worst, where = gap, place
    return within(
        worst, LOGPROB_TOLERANCE[probe.dtype], "nats", seen=f"{compared} tokens of {len(prompts)} prompts", wrong=where
    )


@check(
    "the same seed gives the same samples, another seed others",
    remedy="Something draws from a generator that is not seeded per sample: a custom engine must use the `seeds` that "
    "`generate` is given, and nothing else.",
)
def seeds(probe: Probe) -> Verdict:
    """Samples of the first step, drawn again, and with the next seed."""
    run, seed = probe.run, probe.config.seed
    first = [episode.tokens for episode in probe.scene.episodes]
    again = [episode.tokens for episode in trainer.generate(run, 1)]
    others = collect(
        run.engine, items_of(run, 1), run.policy.tokenizer, run.controls,
        samples_per_prompt=probe.config.rollout.samples_per_prompt, run_seed=seed + 1, step=1,
    )  # fmt: skip
    differing = sum(a != b for a, b in zip(first, again, strict=True))
    if [episode.tokens for episode in others] == first:
        return Verdict("fail", words=f"seed {seed + 1} gives the very samples of seed {seed}")
    return within(
        differing, 0, "samples", seen=f"{len(first)} samples drawn twice, and with another seed",
        wrong=f"{differing} of {len(first)} samples differ when they are drawn again with the same seeds",
    )  # fmt: skip


def _widened(batch: TokenBatch, token: int, columns: int = 5) -> TokenBatch:
    """`batch` with more columns of padding, filled with `token`."""
    fills = {"tokens": token}
    per_token = ("tokens", "attention_mask", "action_mask", "sample_logprobs", "env_rewards", "turn", "sample_entropy")
    wider: dict[str, Any] = {
        name: pad(cells, (0, columns), value=fills.get(name, 0))
        for name in per_token
        if (cells := getattr(batch, name)) is not None
    }
    return dataclasses.replace(batch, **wider)


def _items(probe: Probe, count: int) -> Sequence[Any]:
    return items_of(probe.run, 1)[:count]


def _old(probe: Probe) -> Any:
    assert probe.scene.old is not None
    return probe.scene.old


def _exp(nats: float) -> str:
    return f"{torch.tensor(nats).exp().item():.4g}"


@torch.no_grad()
def _generate(probe: Probe, prompt: Sequence[int], tokens: int) -> list[int]:
    """The greedy answer by transformers alone."""
    model: Any = probe.run.policy.hf_model
    ids = torch.tensor([list(prompt)], device=probe.run.policy.device)
    start = decoder_start(model)
    before = len(start or prompt)
    config = greedy_settings(
        start, max_new_tokens=min(tokens, probe.run.policy.context_length - before),
        eos_token_id=list(probe.run.policy.eos_ids) or None, pad_token_id=(probe.run.policy.eos_ids or (0,))[0],
    )  # fmt: skip
    with (
        own_settings_aside(model),
        torch.autocast(ids.device.type, dtype=probe.dtype, enabled=probe.dtype is not None),
    ):
        out: Any = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
            **begun(start, 1, ids.device),
        )  # fmt: skip
    return list(out[0, before:].tolist())


@torch.no_grad()
def _first_difference(
    probe: Probe, prompt: Sequence[int], got: Sequence[int], wanted: Sequence[int]
) -> tuple[float, str]:
    """How much more probable the right token is than the one that was taken instead (nats), and where; 0 if none."""
    at = next(
        (k for k, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), min(len(got), len(wanted))
    )
    if at == len(got) == len(wanted):
        return 0.0, ""
    place = f"token {at + 1} behind a prompt of {len(prompt)} tokens"
    if at in (len(got), len(wanted)):
        return float("inf"), f"{place}: one of them ends there, the other goes on"
    model = probe.run.policy.hf_model
    asked, said = (torch.tensor([list(ids)], dtype=torch.long, device=model.device) for ids in (prompt, wanted[:at]))
    logprobs = own_logits(model, asked, said)[0, -1].log_softmax(0)
    gap = float((logprobs[wanted[at]] - logprobs[got[at]]).abs())
    name = probe.run.policy.tokenizer.convert_ids_to_tokens
    return gap, f"{place}: the engine takes {name(got[at])!r}, transformers.generate {name(wanted[at])!r}"
