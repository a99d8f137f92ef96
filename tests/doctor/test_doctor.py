"""The doctor on a tiny model: everything holds as it is; each fault that is put in on purpose fails the check of it."""

import dataclasses
import json
import random
import time
from functools import partial

import pytest
import torch

from pertoken import assembly, batching, config
from pertoken.credit import bootstrap_values
from pertoken.doctor import CHECKS, examination, examine, quick_certificate
from pertoken.doctor.base import Probe
from pertoken.doctor.scoring import EACH_CONTROL
from pertoken.errors import ConfigError
from pertoken.policy import checkpoint, scoring
from pertoken.rewards import Weighted, episode_reward, parts
from pertoken.rollout import collect, rows
from pertoken.sampling import Sampling
from pertoken.training import trainer, updating
from pertoken.training.assignment import assign
from pertoken.types import Credit

QUICK = [one.name for one in CHECKS if one.quick]


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder):
    path = tmp_path_factory.mktemp("doctor") / "data.jsonl"
    items = [{"id": str(k), "prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(20)]
    path.write_text("\n".join(map(json.dumps, items)))
    return path, model_folder


def settings(place, **sections):
    path, model = place
    values = {
        "policy": {"model": str(model), "precision": "float32", "device": "cpu", "compile": False},
        "task": {"type": "file", "path": str(path), "prompt": "{prompt}:", "id": "id"},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 8}},
        "rewards": [{"name": "rouge_l"}, {"name": "length", "min_words": 4, "cost": 0.1, "unfinished_cost": 0.1}],
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return config.RunConfig.model_validate(values)


def probe(place, **sections):
    run = assembly.build_run(examination.small(settings(place, **sections)))
    return Probe.of_run(run)


@pytest.fixture(scope="module")
def sound(place):
    """A probe that nothing is wrong with; checks leave it as it is, the one that trains apart."""
    return probe(place)


@pytest.fixture(scope="module")
def with_critic(place):
    return probe(place, credit={"type": "gae"}, policy={"value_head": {}})


def ask(name, of):
    (line,) = examination._ask(examination._chosen([name]), of)
    return line


def failing(of, names):
    return {name: line for name in names if (line := ask(name, of)).outcome == "fail"}


VARIANTS = {
    "a critic": {"credit": {"type": "gae"}, "policy": {"value_head": {}}},
    "adapters": {
        "policy": {"lora": {"rank": 2}}, "kl": {"place": "loss", "estimator": "exact"},
        "credit": {"type": "group_relative"},
        "objective": {"level": "sequence", "entropy_coefficient": 0.01, "dual_clip": 3.0, "over": "sequence"},
    },
    "per part, minibatches, dropout, all controls": {
        "credit": {"type": "per_part"}, "kl": {"place": "loss", "estimator": "k3"},
        "policy": {"dropout": True}, "update": {"minibatches": 2, "epochs": 2},
        "rollout": {"sampling": {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2,
                                 "stop": ("zz",)}},
    },
}  # fmt: skip


@pytest.mark.parametrize("sections", VARIANTS.values(), ids=VARIANTS)
def test_all_checks_pass_on_a_sound_run(place, sections):
    heard = []
    names = [one.name for one in CHECKS if one.name != "controls" or "rollout" in sections]  # a slow one: once
    found = examine(settings(place, **sections), only=names, on_line=heard.append)
    assert found.passed, [(line.name, line.words) for line in found.failed]
    assert [line.name for line in found.lines] == names
    assert tuple(heard) == found.lines
    assert not [line for line in found.lines if line.outcome == "skipped"]
    assert len(found.model["sha256"]) == 64


def test_a_method_without_samples_is_refused_in_words(place):
    with pytest.raises(ConfigError, match=r"method\.type sft learns from answers in the data.*method\.type=rl"):
        examine(settings(place, method={"type": "sft"}))


def test_a_check_can_be_asked_alone_and_by_its_name_only(place):
    found = examine(settings(place), only=["kl_gradient"])
    assert [line.name for line in found.lines] == ["kl_gradient"]
    with pytest.raises(ConfigError, match="did you mean 'padding'"):
        examine(settings(place), only=["paddin"])


def test_what_does_not_apply_is_skipped_and_says_why(place):
    of = probe(place, kl={"place": "none", "measure": False})
    line = ask("kl_gradient", of)
    assert (line.outcome, line.words) == ("skipped", "no KL penalty is configured")


def test_every_sampling_control_is_tried():
    assert set(EACH_CONTROL) == set(Sampling.model_fields) - {"max_new_tokens"}


# --- faults ----------------------------------------------------------------------------------------------


def patched(monkeypatch, owner, name, made):
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, made(own))


FORWARD = ["ratio", "padding", "order", "greedy", "seeds"]
"""Checks that pass prompts through the model, the slow one apart."""


def test_a_shift_by_one_fails_what_compares_log_probs(place, monkeypatch):
    def shifted(own):
        def lay_out(*arguments):
            found = own(*arguments)
            return dataclasses.replace(found, predictors=(found.predictors + 1).clamp_max(found.input_ids.numel() - 1))

        return lay_out

    of = probe(place)
    patched(monkeypatch, scoring, "_lay_out", shifted)
    found = failing(of, ["padding", "greedy", "seeds", *QUICK])
    assert found.keys() == {"padding"}
    assert "off the model's own logits" in found["padding"].words
    assert "a shift" in found["padding"].remedy
    assert ask("ratio", Probe.of_run(of.run)).outcome == "fail"


def test_attended_padding_fails_padding_alone(sound, monkeypatch):
    """Rows of the padded layout that see what lies behind them, as with left padding or a wrong mask."""

    def off(own):
        def score(trunk, batch, **named):
            found = own(trunk, batch, **named)
            wide = not bool(batch.attention_mask[:, -1].any())
            return dataclasses.replace(found, logprobs=found.logprobs - 0.1) if wide else found

        return score

    from pertoken.doctor import scoring as checks

    patched(monkeypatch, checks, "score_batch", off)
    found = failing(sound, [*FORWARD, *QUICK])
    assert found.keys() == {"padding"}
    assert "with more padding is off" in found["padding"].words


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "segment"])
def test_a_control_that_scoring_ignores_is_named(sound, monkeypatch, name):
    def ignoring(own):
        def score(batch, **named):
            neutral = {field: Sampling.model_fields[field].default for field in (name,)}
            controls = dataclasses.replace(batch.controls, sampling=batch.controls.sampling.model_copy(update=neutral))
            support = None if name == "top_p" and batch.controls.sampling.top_p < 1.0 else batch.support
            return own(dataclasses.replace(batch, controls=controls, support=support), **named)

        return score

    patched(monkeypatch, sound.run.policy, "score", ignoring)
    line = ask("controls", sound)
    assert line.outcome == "fail"
    assert f"{name} (" in line.words
    assert "Leave the control that is named out" in line.remedy
    assert not [other for other in set(EACH_CONTROL) - {name} if f"{other} (" in line.words]


def test_rows_told_by_their_place_fail_order(sound, monkeypatch):
    from pertoken.doctor import scoring as checks

    def by_place(own):
        def wrong(settings, rewards, batch, old):
            credit = own(settings, rewards, batch, old)
            return Credit(credit.advantages + torch.arange(len(batch.group))[:, None] * batch.action_mask)

        return wrong

    patched(monkeypatch, checks, "credited", by_place)
    found = failing(sound, [*FORWARD, *QUICK])
    assert found.keys() == {"order"}
    assert "an advantage by" in found["order"].words


def test_a_seed_that_is_ignored_fails_seeds(sound, monkeypatch):
    monkeypatch.setattr(rows, "_uniforms", lambda seed, count: torch.rand(count, dtype=torch.float64))
    found = failing(sound, FORWARD)
    assert found.keys() == {"seeds"}
    assert "differ when they are drawn again with the same seeds" in found["seeds"].words
    assert "`seeds`" in found["seeds"].remedy


def test_one_seed_for_all_fails_seeds_too(place, monkeypatch):
    monkeypatch.setattr(collect, "sample_seed", lambda *place: 5)
    line = ask("seeds", probe(place))
    assert line.outcome == "fail"
    assert "seed 1 gives the very samples of seed 0" in line.words


def test_an_engine_that_decodes_otherwise_fails_greedy(sound, monkeypatch):
    patched(monkeypatch, sound.run.engine.decoder, "step", lambda own: lambda tokens: own(tokens).roll(1, 1))
    line = ask("greedy", sound)
    assert line.outcome == "fail"
    assert "the engine takes" in line.words
    assert "rollout.engine=transformers" in line.remedy


def test_means_of_micro_batches_fail_micro_batches(sound, monkeypatch):
    def own_means(own):
        def parts(cut, tokens):
            for part in cut(tokens):
                yield dataclasses.replace(part, num_actions=part.batch.num_actions, num_rows=len(part.rows))

        return lambda *arguments, **named: (partial(parts, cut) for cut in own(*arguments, **named))

    patched(monkeypatch, updating, "optimizer_steps", own_means)
    found = failing(sound, ["micro_batches", "gradient_reach", *QUICK])
    assert found.keys() == {"micro_batches"}
    assert "of its norm" in found["micro_batches"].words
    assert "a count of the whole optimiser step" in found["micro_batches"].remedy


def test_a_dead_parameter_and_a_frozen_one_that_learns_are_named(place):
    of = probe(place)
    of.run.policy.hf_model.model.norm.weight.requires_grad_(False)
    assert ask("gradient_reach", of).outcome == "pass"
    extra = torch.nn.Parameter(torch.ones(3))
    of.run.policy.hf_model.model.register_parameter("unused", extra)
    line = ask("gradient_reach", of)
    assert "1 of 21 trained parameters get none: model.unused" in line.words
    extra.requires_grad_(False)
    extra.grad = torch.ones(3)
    line = ask("gradient_reach", of)
    assert "1 frozen parameters get one: model.unused" in line.words


def test_an_end_token_that_is_masked_out_fails_eos(sound, monkeypatch):
    def masking(own):
        def to_episode(*arguments, **named):
            episode = own(*arguments, **named)
            acts = [a and t != 256 for a, t in zip(episode.action_mask, episode.tokens, strict=True)]
            return dataclasses.replace(episode, action_mask=acts)

        return to_episode

    from pertoken.doctor import base as made_up

    patched(monkeypatch, made_up, "to_episode", masking)
    found = failing(sound, QUICK)
    assert found.keys() == {"eos", "pad_is_eos"}
    assert "the end token is not an action" in found["eos"].words
    assert "masks must come from lengths" in found["eos"].remedy


def test_a_reward_on_the_end_that_is_lost_fails_eos(sound, monkeypatch):
    from pertoken.doctor import crediting

    def before_the_end(own):
        def score(*arguments):
            found = own(*arguments)
            return dataclasses.replace(found, total=found.total.roll(-1, 1) * (found.total.roll(-1, 1) != 0))

        return score

    patched(monkeypatch, crediting, "score", before_the_end)
    found = failing(sound, QUICK)
    assert found.keys() == {"eos"}
    assert "its reward is off by 1" in found["eos"].words


def test_padding_that_is_searched_for_by_its_id_fails_pad_is_eos(sound, monkeypatch):
    def searching(own):
        def to_batch(*arguments, pad_id=0, **named):
            batch = own(*arguments, pad_id=pad_id, **named)
            real = batch.tokens != pad_id
            return dataclasses.replace(
                batch, attention_mask=batch.attention_mask & real, action_mask=batch.action_mask & real
            )

        return to_batch

    patched(monkeypatch, batching, "to_batch", searching)
    found = failing(sound, QUICK)
    assert "pad_is_eos" in found
    assert "3 actions are missing" in found["pad_is_eos"].words


def test_a_lost_reward_fails_conservation(sound, monkeypatch):
    monkeypatch.setattr(parts, "move_to_actions", lambda values, action_mask: values * action_mask)
    found = failing(sound, QUICK)
    assert found.keys() == {"conservation"}
    assert "the sum changed on its way" in found["conservation"].words


def test_parts_that_do_not_add_up_fail_conservation(sound):
    total = sound.rewards.total + 0.5 * sound.batch.action_mask
    of = dataclasses.replace(sound, rewards=dataclasses.replace(sound.rewards, total=total))
    found = failing(of, QUICK)
    assert found.keys() == {"conservation"}
    assert "the parts of the rewards: what was paid and what was credited differ" in found["conservation"].words


def test_truncation_treated_as_an_end_fails_truncation(with_critic, monkeypatch):
    from pertoken.training.assignment import estimators

    monkeypatch.setattr(estimators, "bootstrap_values", lambda done, after: torch.zeros_like(after))
    found = failing(with_critic, QUICK)
    assert found.keys() == {"truncation"}
    assert "lacks the critic's value" in found["truncation"].words
    assert "`bootstrap_values`" in found["truncation"].remedy
    monkeypatch.setattr(estimators, "bootstrap_values", bootstrap_values)
    assert ask("truncation", with_critic).outcome == "pass"


IGNORED = {
    "objective.clip_low": ("clip_low", 0.2),
    "objective.clip_high": ("clip_high", 0.2),
    "objective.importance_cap": ("importance_cap", 2.0),
    "objective.entropy_coefficient": ("entropy_coefficient", 0.0),
    "objective.dual_clip": ("dual_clip", None),
}


@pytest.mark.parametrize("path", IGNORED)
def test_a_coefficient_of_the_loss_that_is_ignored_is_named(place, sound, monkeypatch, path):
    keyword, value = IGNORED[path]
    patched(monkeypatch, updating, "policy_loss", lambda own: lambda *a, **named: own(*a, **{**named, keyword: value}))
    acting = settings(place, objective={"entropy_coefficient": 0.01, "dual_clip": 3.0})
    run = dataclasses.replace(sound.run, config=sound.config.model_copy(update={"objective": acting.objective}))
    found = failing(dataclasses.replace(sound, run=run), QUICK)
    assert found.keys() == {"coefficients"}
    assert found["coefficients"].words == f"no effect: {path}"
    assert "read nowhere" in found["coefficients"].remedy


def test_a_weight_a_penalty_and_a_discount_that_are_ignored_are_named(sound, monkeypatch):
    from pertoken.doctor import crediting

    with monkeypatch.context() as patch:
        patch.setattr(Weighted, "weight_at", lambda part, step: 1.0)
        assert ask("coefficients", sound).words == "no effect: weight of length, kl.coefficient"
    with monkeypatch.context() as patch:
        undiscounted = lambda own: lambda settings, *rest: own(settings.model_copy(update={"gamma": 1.0}), *rest)  # noqa: E731
        patched(patch, crediting, "credited", undiscounted)
        assert ask("coefficients", sound).words == "no effect: credit.gamma"


@pytest.mark.parametrize("name", ["coefficient", "clip"])
def test_a_coefficient_of_the_critic_that_is_ignored_is_named(with_critic, monkeypatch, name):
    def unclipped(own):
        return lambda *stages, clip: own(*stages, clip=None)

    def silent(own):
        return lambda *stages, clip: dataclasses.replace(own(*stages, clip=clip), per_token=torch.zeros(8, 7))

    patched(monkeypatch, updating, "critic_loss", unclipped if name == "clip" else silent)
    assert f"policy.value_head.{name}" in ask("coefficients", with_critic).words
    assert ask("coefficients", with_critic).outcome == "fail"


@pytest.mark.parametrize(
    ("kl", "fault"),
    [
        ({"place": "loss", "estimator": "ratio_k3"}, "k3"),
        ({"place": "loss", "estimator": "k3"}, "k2"),
        ({"place": "loss", "estimator": "k2"}, "k3"),
    ],
)
def test_another_kl_than_configured_fails_its_gradient(place, sound, monkeypatch, kl, fault):
    changed = sound.config.model_copy(update={"kl": settings(place, kl=kl).kl})
    of = dataclasses.replace(sound, run=dataclasses.replace(sound.run, config=changed))
    assert ask("kl_gradient", of).outcome == "pass"
    patched(
        monkeypatch,
        updating,
        "policy_loss",
        lambda own: lambda *a, **named: own(*a, **{**named, "kl_estimator": fault}),
    )
    line = ask("kl_gradient", of)
    assert line.outcome == "fail"
    assert f"loss: {kl['estimator']}: the gradient is off" in line.words


def test_a_kl_reward_of_the_wrong_sign_fails_its_gradient(sound, monkeypatch):
    own = trainer.KLToReference.__call__
    monkeypatch.setattr(trainer.KLToReference, "__call__", lambda reward, scene: -own(reward, scene))
    found = failing(sound, QUICK)
    assert found.keys() == {"kl_gradient"}
    assert "reward: k1: the gradient is off that of KL(policy || reference)" in found["kl_gradient"].words


# --- resuming --------------------------------------------------------------------------------------------


def test_an_optimiser_that_is_not_saved_fails_resume(place, monkeypatch):
    def without(own):
        return lambda *given: {n: t for n, t in own(*given).items() if "optimizer/" not in n}

    patched(monkeypatch, checkpoint, "_tensors", without)
    line = ask("resume", probe(place))
    assert line.outcome == "fail"
    assert "tensors differ after the second step" in line.words
    assert "is not in the checkpoint" in line.remedy


def test_a_reward_with_a_memory_of_its_own_fails_resume(place):
    calls = []

    @episode_reward
    def forgetful(sample):
        calls.append(sample)
        return 0.01 * len(calls)

    of = probe(place)
    of.run.rewards.append(Weighted(forgetful, 1.0, "forgetful"))
    line = ask("resume", of)
    assert line.outcome == "fail"
    assert "`get_state`" in line.remedy


# --- data and rewards ------------------------------------------------------------------------------------

order_of_calls = [0]


@episode_reward
def by_order(sample):
    order_of_calls[0] += 1
    return float(order_of_calls[0])


@episode_reward
def divides(sample):
    return 1.0 / len(sample.text)


@episode_reward
def not_a_number(sample):
    return float("nan") if len(sample.tokens) == 1 else 1.0


@pytest.mark.parametrize(
    ("reward", "words"),
    [(by_order, "alone"), (divides, "ZeroDivisionError"), (not_a_number, "expected finite numbers")],
    ids=["order", "empty", "one token"],
)
def test_a_reward_that_breaks_its_contract_is_named(sound, reward, words):
    of = dataclasses.replace(sound, run=dataclasses.replace(sound.run, rewards=[Weighted(reward, 1.0, "mine")]))
    found = failing(of, ["rewards", *QUICK])
    assert found.keys() == {"rewards"}
    assert "mine: " in found["rewards"].words
    assert words in found["rewards"].words
    assert "pertoken reward check" in found["rewards"].remedy


def test_a_reward_that_fails_on_the_samples_themselves_is_a_finding_and_no_crash(sound):
    def raises(scene):
        raise ZeroDivisionError("by nothing")

    of = Probe.of_run(dataclasses.replace(sound.run, rewards=[Weighted(raises, 1.0, "mine")]))
    found = failing(of, ["rewards", "conservation"])
    assert found.keys() == {"rewards", "conservation"}
    assert all("by nothing" in line.words for line in found.values())


def test_prompts_without_room_and_templates_that_open_no_turn_fail_data(place, sound, monkeypatch):
    tight = sound.config.model_copy(deep=True, update={"rollout": settings(
        place, rollout={"sampling": {"max_new_tokens": 125}}).rollout})  # fmt: skip
    line = ask("data", dataclasses.replace(sound, run=dataclasses.replace(sound.run, config=tight)))
    assert "leave less than 125 tokens" in line.words
    assert "rollout.max_prompt_tokens" in line.remedy
    tokenizer = sound.run.policy.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    chat = dataclasses.replace(sound.run.items[0], prompt=({"role": "user", "content": "hi"},))
    line = ask("data", dataclasses.replace(sound, run=dataclasses.replace(sound.run, items=[chat])))
    assert line.words == "the chat template does not open the assistant's turn"


# --- the quick part --------------------------------------------------------------------------------------


def test_the_quick_part_asks_no_reward_and_passes_nothing_through_the_model(place, monkeypatch):
    run = assembly.build_run(settings(place))
    reports = []
    monkeypatch.setattr(trainer, "evaluate", lambda run, log: None)
    with trainer.RunLog.create(place[0].parent / f"run-{random.random()}", config_text="", seed=0) as log:
        trainer.loop(run, log, on_step=reports.append, interrupted=lambda: bool(reports))

    def refuse(*_, **__):
        raise AssertionError("the quick part is for nothing")

    monkeypatch.setattr(run.policy.hf_model, "forward", refuse)
    run.rewards = [dataclasses.replace(part, reward=refuse) for part in run.rewards]
    begun = time.process_time()
    found = quick_certificate(run, reports[0])
    assert time.process_time() - begun < 2
    assert found.passed, [(line.name, line.words) for line in found.failed]
    assert [line.name for line in found.lines] == QUICK
    assert found.kind == "quick"
    assert found.lines[QUICK.index("coefficients")].words.startswith("changed one by one: weight of")


def test_nothing_of_a_run_is_left_changed_by_the_checks_that_do_not_train(sound):
    before = {name: parameter.detach().clone() for name, parameter in sound.run.policy.trainable().items()}
    assert CHECKS[-1].name == "resume"
    for one in CHECKS[:-1]:
        if one.name == "controls":
            continue  # slow, and only samples and scores, as others do
        examination._ask([one], sound)
    for name, parameter in sound.run.policy.trainable().items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert assign(sound.config.credit, sound.rewards, sound.batch, sound.scene.old) is not None
