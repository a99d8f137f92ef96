"""Inputs and numbers at the edge, through the whole loop: each is harmless, or ends in a named error."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pertoken import assembly
from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.errors import ModelError, NumericsError, RewardError, TaskError
from pertoken.jobs import run
from pertoken.observe import observe
from pertoken.prompts import prompt_ids
from pertoken.rewards import Scene, token_reward
from pertoken.testing import byte_tokenizer, episode, tiny_model
from pertoken.training import trainer, updating
from pertoken.training.assignment import assign
from pertoken.types import Item

GROUP_CREDITS = ("group_relative", "group_process", "leave_one_out", "leave_one_out_process", "per_part")
VARIED = """
from pertoken.rewards import token_reward

@token_reward
def varied(sample):
    return [token % 7 / 7 for token in sample.tokens]
"""
CREDITS = (*GROUP_CREDITS, "reward_to_go", "gae")


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)


@pytest.fixture
def settle(tmp_path, model_folder, monkeypatch):
    """The configuration of a short run; sections are laid over it."""

    def configuration(model=model_folder, prompts=None, folder="run", **sections):
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / "varied.py").write_text(VARIED)
        monkeypatch.syspath_prepend(tmp_path / "modules")
        rows = [{"id": f"../{k}", "prompt": p, "reference": "x"} for k, p in enumerate(prompts or map(str, range(40)))]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        values = {
            "folder": str(tmp_path / folder),
            "policy": {"model": str(model), "precision": "float32", "device": "cpu"},
            "task": {"type": "file", "path": str(tmp_path / "data.jsonl"), "prompt": "{prompt}", "id": "id"},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 3, "sampling": {"max_new_tokens": 4}},
            "rewards": ({"fn": "varied:varied", "name": "varied"},),
            "kl": {"coefficient": 0.0},
            "update": {"learning_rate": 1e-2},
            "evaluation": {"items": 0},
            "stop": {"steps": 2},
        }
        for name, fields in sections.items():
            values[name] = {**values.get(name, {}), **fields}
        if values.get("credit", {}).get("type") == "gae":
            values["policy"]["value_head"] = {}
        return RunConfig.model_validate(values)

    return configuration


def metrics(config):
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


def weights(built):
    return {name: parameter.detach().clone() for name, parameter in built.policy.trainable().items()}


def a_step(built, episodes):
    """What the loop does with these episodes; returns the report of the step."""
    batch = to_batch(episodes, built.controls)
    old = built.policy.score(batch)
    batch = replace(batch, sample_logprobs=old.logprobs)  # as a sampler of these weights reports it
    ref = built.reference.score(batch)
    rewards = trainer.reward(built, Scene(batch, episodes, built.policy.tokenizer, old, ref, 1))
    credit = assign(built.config.credit, rewards, batch, old)
    updated = updating.update(built, batch, old, ref, credit, 1)
    return observe(1, episodes, batch, old, ref, rewards, credit, updated, {})


def unmoved(built, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in built.policy.trainable().items())


def finite(values):
    """All figures but the gradient norm of a step that made no update."""
    return {name: value for name, value in values.items() if name != "grad/norm" and not math.isfinite(value)} == {}


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_that_says_nan_for_one_prompt_is_a_named_error(settle, precision):
    config = settle(policy={"precision": precision}, prompts=["7", *"abcdefghijklmnopqrstuvw"])
    built = assembly.build_run(config)
    seven = prompt_ids(Item("7", "7"), built.policy.tokenizer)
    with torch.no_grad():
        built.policy.hf_model.get_input_embeddings().weight[seven] = torch.nan
    built.engine = assembly.build_engine(built.policy, built.config.rollout)
    built.items = [Item("../0", "7"), Item("a", "a")]
    log = run.RunLog.create(config.run_folder, config_text="", seed=0)
    with pytest.raises(NumericsError, match=r"row \d of 6 in this rollout: the model gives no distribution"):
        trainer.loop(built, log, on_step=lambda report: None)


def test_one_bad_row_in_an_update_skips_the_update_and_names_the_row(settle, monkeypatch):
    built = assembly.build_run(settle())
    before = weights(built)
    whole = updating.policy_loss

    def one_nan(*arguments, **named):
        loss = whole(*arguments, **named)
        loss.per_token[1] = torch.nan
        return loss

    monkeypatch.setattr(updating, "policy_loss", one_nan)
    report = a_step(built, trainer.generate(built, 1))
    assert report.metrics["skipped/updates"] == 1
    assert unmoved(built, before)
    assert "update skipped, loss nan in episodes 1/" in built.notes[-1]


@pytest.mark.parametrize("credit", CREDITS)
def test_rewards_whose_sum_is_beyond_a_float_move_nothing(settle, credit):
    """Each of them is finite, so no reward is to blame; what they add up to is not."""
    built = assembly.build_run(settle(credit={"type": credit}))
    huge = torch.finfo(torch.float32).max * 0.9
    built.rewards = [trainer.Weighted(lambda scene: scene.batch.action_mask * huge, 1.0, "huge")]
    before = weights(built)
    episodes = [episode([1, 2], [3, 4, 5][: 1 + k % 3], id=f"e{k}", group=k // 3) for k in range(6)]
    report = a_step(built, episodes)
    assert unmoved(built, before)
    if credit in ("leave_one_out", "leave_one_out_process", "gae"):  # the others take an infinite spread for none
        assert report.metrics["skipped/updates"] == 1
        assert "update skipped, loss " in built.notes[-1]
        assert not built.optimizer.state_dict()["state"], "the optimiser's averages saw it"


def test_a_critic_that_says_nan_skips_the_update_and_names_the_rows(settle):
    built = assembly.build_run(settle(credit={"type": "gae"}))
    forward = built.policy.value_head.forward
    built.policy.value_head.forward = lambda hidden: forward(hidden) * torch.nan
    before = weights(built)
    report = a_step(built, [episode([1, 2], [3, 4, 5], id=f"e{k}", group=k // 3) for k in range(6)])
    assert report.metrics["skipped/updates"] == 1
    assert unmoved(built, before)
    assert "update skipped, loss nan in episodes e" in built.notes[-1]


@pytest.mark.parametrize("surrogate", ["clipped", "policy_gradient"])
def test_a_policy_that_has_moved_beyond_what_a_ratio_can_say(settle, surrogate):
    """Ratios of e^200: clipped ones are harmless, others skip the update, and nothing becomes NaN."""
    built = assembly.build_run(settle(objective={"surrogate": surrogate}))
    built.staleness = 1  # importance weights correct for the samplers
    before = weights(built)
    episodes = [episode([1, 2], [3, 4, 5 + k], id=f"e{k}", group=k // 3) for k in range(6)]
    batch = to_batch(episodes, built.controls)
    old = built.policy.score(batch)
    far = replace(batch, sample_logprobs=old.logprobs - 200.0 * batch.action_mask)
    rewards = trainer.reward(built, Scene(far, episodes, built.policy.tokenizer, old, None, 1))
    updated = updating.update(built, far, old, None, assign(built.config.credit, rewards, far, old), 1)
    assert all(torch.isfinite(p).all() for p in built.policy.trainable().values())
    assert updated.metrics["skipped/updates"] == 0 or unmoved(built, before)


def test_a_reference_that_says_nan_for_one_row_is_named(settle):
    built = assembly.build_run(settle(kl={"coefficient": 0.1}))
    score = built.reference.score

    def with_nan(batch, **named):
        out = score(batch, **named)
        out.logprobs[1][batch.action_mask[1]] = torch.nan
        return out

    built.reference.score = with_nan
    before = weights(built)
    episodes = [episode([1, 2], [3, 4, 5 + k], id=f"e{k}", group=k // 3) for k in range(6)]
    with pytest.raises(RewardError, match=r"'kl'.*'e1'"):
        a_step(built, episodes)
    assert unmoved(built, before)


@pytest.mark.parametrize("credit", CREDITS)
def test_trap_33_groups_without_variance_move_nothing(settle, credit):
    """Every completion is worth the same: no group says anything, and no 0/0 becomes a step."""
    built = assembly.build_run(settle(credit={"type": credit}, kl={"coefficient": 0.0}))
    built.rewards = [trainer.Weighted(lambda scene: scene.batch.action_mask * 0.25, 1.0, "same")]
    before = weights(built)
    episodes = [episode([1, 2], [3, 4, 5], id=str(k), group=k // 3) for k in range(6)]
    report = a_step(built, episodes)
    assert finite(report.metrics)
    if credit in GROUP_CREDITS:
        assert not report.streams["advantage"].any()
        assert report.metrics["grad/norm"] == 0
        assert unmoved(built, before)


@pytest.mark.parametrize("credit", CREDITS)
def test_a_batch_without_actions_changes_nothing(settle, credit):
    built = assembly.build_run(settle(credit={"type": credit}, objective={"entropy_coefficient": 0.1}))
    before = weights(built)
    report = a_step(built, [episode([1, 2, 3], [], id=str(k), group=k // 3, stop="context") for k in range(6)])
    assert finite(report.metrics)
    assert report.metrics["tokens/generated"] == 0
    assert unmoved(built, before)


@pytest.mark.parametrize("credit", CREDITS)
def test_empty_and_one_token_completions_among_others(settle, credit):
    built = assembly.build_run(settle(credit={"type": credit}))
    before = weights(built)
    answers = [[], [5], [5, 6, 7], [], [], [8]]
    report = a_step(built, [episode([1, 2], a, id=str(k), group=k // 3) for k, a in enumerate(answers)])
    assert finite(report.metrics)
    assert report.metrics["tokens/generated"] == 5
    for row in (0, 3, 4):
        assert not any(cells[row].any() for name, cells in report.streams.items() if name != "ratio")
    assert not unmoved(built, before)


def test_a_run_of_one_token_completions(settle):
    config = settle(rollout={"sampling": {"max_new_tokens": 1}})
    run.train(config)
    assert [row["completion/length"] for row in metrics(config)] == [1.0, 1.0]


def test_a_prompt_that_leaves_room_for_one_token(settle):
    prompts = [f"{k:03d}" + "x" * 124 for k in range(40)]  # 127 bytes, and the context is 128
    config = settle(prompts=prompts, log={"episodes_every": 1})
    run.train(config)
    records = [json.loads(line) for line in (config.run_folder / "episodes" / "000001.jsonl").read_text().splitlines()]
    assert {record["stop"] for record in records} <= {"context", "eos"}
    assert all(sum(record["tokens"]["action"]) == 1 for record in records)
    with pytest.raises(TaskError, match="its prompt has 128 tokens, and this model's context is 128"):
        run.train(settle(prompts=[prompt + "y" for prompt in prompts], folder="other"))


def test_a_held_out_prompt_that_fills_the_context_is_not_left_out_by_itself_and_the_error_says_what_to_do(settle):
    prompts = [f"{k:03d}" + "x" * (4 if k % 2 else 125) for k in range(40)]
    rollout = {"prompts_per_step": 2, "samples_per_prompt": 3, "max_prompt_tokens": 60}
    with pytest.raises(TaskError, match="or take such items out of the validation split: what is held out is never"):
        run.train(settle(prompts=prompts, rollout=rollout, evaluation={"items": 10}))
    run.train(settle(prompts=prompts, rollout=rollout))  # training items are
    with pytest.raises(TaskError, match=r"or set rollout\.max_prompt_tokens to leave such items out"):
        run.train(settle(prompts=prompts, folder="other"))


# --- models and tokenizers ----------------------------------------------------------------------------------


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_and_resumed(config):
    """A run with an interruption in it; the state of the trained model."""
    made = []
    run.train(config, on_step=lambda report, _: made.append(1), interrupted=lambda: len(made) >= 1)
    run.train(config, resume=config.run_folder)
    assert all(math.isfinite(row["grad/norm"]) for row in metrics(config))
    return AutoModelForCausalLM.from_pretrained(config.run_folder / "model", dtype="auto")


def test_tokens_that_the_model_does_not_know_are_refused_where_they_occur(settle, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    folder = saved(tmp_path / "model", tiny_model(), tokenizer)
    config = settle(folder, prompts=[f"say <new> {k}" for k in range(40)])
    with pytest.raises(ModelError, match=r"item \.\./\d+: .*'<new>' \(id 258\), .* 258 ids: .*resize_token_embeddings"):
        run.train(config)
    run.train(settle(folder))  # nobody says it: no harm


def test_a_vocabulary_that_was_resized_trains_and_resumes(settle, tmp_path):
    tokenizer, model = byte_tokenizer(), tiny_model()
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(320)  # padded beyond what the tokenizer knows, as many models are
    folder = saved(tmp_path / "model", model, tokenizer)
    trained = trained_and_resumed(settle(folder, prompts=[f"say <new> {k}" for k in range(40)]))
    assert trained.get_input_embeddings().weight.shape[0] == 320


@pytest.mark.parametrize("pad", ["<eos>", None])
@pytest.mark.parametrize("eos", [256, None])
def test_trap_8_no_pad_token_or_one_that_ends_texts(settle, tmp_path, pad, eos):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad
    if eos is None:
        tokenizer.eos_token = None
    trained_and_resumed(settle(saved(tmp_path / "model", tiny_model(eos=eos), tokenizer)))


def test_no_chat_template_takes_one_message_as_text_and_refuses_a_conversation(settle):
    message = {"role": "user", "content": "{prompt}"}
    run.train(settle(task={"prompt": [message]}))
    with pytest.raises(ModelError, match=r"item \.\./\d+: its prompt is a conversation of 2 messages"):
        run.train(settle(task={"prompt": [message, message]}, folder="other"))


def tied(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=256, bos_token_id=None, pad_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tied, lambda dtype: tiny_model().to(dtype)], ids=["tied", "untied"])
def test_tied_weights_and_models_stored_in_half_precision(settle, tmp_path, make, dtype):
    folder = saved(tmp_path / "model", make(dtype), byte_tokenizer())
    config = settle(folder)
    trained = trained_and_resumed(config)
    assert trained.dtype == torch.float32, "the trained weights are float32, and are not rounded when they are saved"
    shared = trained.get_input_embeddings().weight is trained.get_output_embeddings().weight
    assert shared == (make is tied)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    moved = [name for name, p in trained.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert len(moved) == len(list(trained.named_parameters()))
    whole = settle(folder, folder="other")
    run.train(whole)
    again = AutoModelForCausalLM.from_pretrained(whole.run_folder / "model", dtype="auto")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in trained.named_parameters())


def test_ids_of_items_name_no_files(settle, tmp_path):
    config = settle(log={"episodes_every": 1}, evaluation={"items": 2, "sampling": {"max_new_tokens": 2}})
    run.train(config)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "modules", "run"}
    assert sorted(path.name for path in (config.run_folder / "episodes").iterdir()) == ["000001.jsonl", "000002.jsonl"]


# --- rewards that fail on some completions --------------------------------------------------------------------


@token_reward
def picky(sample):
    """A number for each token; raises on completions that begin with token 9, and says NaN on those with token 8."""
    if sample.tokens[:1] == [9]:
        raise KeyError("colour")
    return [math.nan if sample.tokens[0] == 8 else token % 7 / 7 for token in sample.tokens]


def whole(scene):
    """The same of all at once: what raises is that of nobody."""
    values = scene.batch.tokens % 7 / 7 * scene.batch.action_mask
    return torch.where((scene.batch.tokens == 8).any(1, keepdim=True), torch.nan, values)


ROWS = [[1, 2, 3], [9, 2], [4, 5, 6], [3], [8, 1], [2, 2]]


def rows(answers=ROWS):
    return [episode([1, 2], a, id=str(k), group=k // 3) for k, a in enumerate(answers)]


@pytest.mark.parametrize("credit", GROUP_CREDITS)
def test_trap_29_a_tolerated_failure_counts_nothing_and_is_compared_with_nothing(settle, credit):
    """The others get the advantages that they get without the rows that failed, which get none."""
    settings = {"type": credit, "normalize": "none"} | ({"scale_by_std": False} if credit == "group_relative" else {})
    built = assembly.build_run(settle(credit=settings))
    built.rewards = [trainer.Weighted(picky, 1.0, "picky", max_failed_share=0.34)]
    report = a_step(built, rows())
    assert report.metrics["errors/picky"] == 2
    assert "abstained/picky" not in report.metrics
    advantages = report.streams["advantage"]
    assert not advantages[[1, 4]].any()
    assert not report.streams["reward/picky"][[1, 4]].any()
    if credit != "group_process":  # takes 0 for "not scored" in any case, and divides by the spread of all that is
        kept = [e for e in rows() if e.id not in "14"]
        built = assembly.build_run(settle(credit=settings))
        built.rewards = [trainer.Weighted(picky, 1.0, "picky")]
        alone = a_step(built, kept).streams["advantage"]
        assert alone.any()
        torch.testing.assert_close(advantages[[0, 2, 3, 5]], alone)


def test_one_failure_more_than_the_share_ends_the_run(settle):
    built = assembly.build_run(settle())
    for share, words in (
        (0.0, "reward 'picky': picky, episode '1'"),
        (0.3, "'picky' failed on more than 1 of 6 compl"),
    ):
        built.rewards = [trainer.Weighted(picky, 1.0, "picky", max_failed_share=share)]
        with pytest.raises(RewardError, match=words):
            a_step(built, rows())


def test_a_reward_of_the_whole_scene_fails_by_rows_or_as_a_whole(settle):
    built = assembly.build_run(settle())
    built.rewards = [trainer.Weighted(whole, 1.0, "whole", max_failed_share=0.2)]
    report = a_step(built, rows())
    assert report.metrics["errors/whole"] == 1
    assert not report.streams["reward/whole"][4].any()
    assert report.streams["reward/whole"][1].any()
    for share in (0.9, 1.0):
        built.rewards = [trainer.Weighted(lambda scene: 1 / 0, 1.0, "none", max_failed_share=share)]
        if share < 1:
            with pytest.raises(RewardError, match="'none' failed on more than 5 of 6 completions: raised ZeroDivision"):
                a_step(built, rows())
        else:
            report = a_step(built, rows())
            assert report.metrics["errors/none"] == 6
            assert not report.streams["advantage"].any()


@pytest.mark.parametrize("attempts", [1, 2, 3])
@pytest.mark.parametrize("of_samples", [True, False])
def test_what_fails_is_tried_again_as_often_as_asked(settle, attempts, of_samples):
    built, tried = assembly.build_run(settle()), []

    def twice(what):
        name = getattr(what, "text", "all")
        tried.append(name)
        if tried.count(name) < 3:
            raise OSError("no connection")
        return [1.0] * len(what.tokens) if of_samples else whole(what)

    reward = token_reward(twice) if of_samples else twice
    built.rewards = [trainer.Weighted(reward, 1.0, "twice", attempts=attempts)]
    episodes = rows([[1], [2], [3], [4], [5], [6]])
    if attempts < 3:
        with pytest.raises(RewardError, match="no connection"):
            a_step(built, episodes)
        assert len(tried) == attempts
    else:
        assert "errors/twice" not in a_step(built, episodes).metrics
        assert len(tried) == (18 if of_samples else 3)


def test_a_run_tells_what_failed_and_goes_on(settle, monkeypatch):
    monkeypatch.setattr(assembly.rewards, "make", lambda *order: often)

    @token_reward
    def often(sample):
        if sample.tokens[0] % 3 == 0:
            raise KeyError("colour")
        return [token % 7 / 7 for token in sample.tokens]

    config = settle(stop={"steps": 4}, log={"episodes_every": 1})
    config = config.model_copy(update={"rewards": (config.rewards[0].model_copy(update={"max_failed_share": 1.0}),)})
    notes = []
    run.train(config, on_note=notes.append)
    failed = sum(row.get("errors/varied", 0) for row in metrics(config))
    assert failed > 0
    told = [note for note in notes if "reward 'varied' failed on" in note]
    assert sum(int(note.split(" failed on ")[1].split()[0]) for note in told) == failed
    assert "of 6 completions: often, episode '" in told[0]
    assert "raised KeyError: 'colour'" in told[0]
