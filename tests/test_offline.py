"""Training on given answers: what is learnt and what is not, exact resumption, invariances, faults that are named."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from pertoken import assembly
from pertoken.batching import to_batch
from pertoken.config import RunConfig, load_config
from pertoken.errors import ConfigError, TaskError
from pertoken.jobs import run
from pertoken.policy.model import Policy
from pertoken.rewards import Implicit, Scene
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.tracking import RunReader
from pertoken.training import offline
from pertoken.training.examples import Examples
from pertoken.training.state import items_of
from pertoken.types import Item

SPEC = importlib.util.spec_from_file_location("kills", Path(__file__).parents[1] / "benchmarks" / "kills.py")
kills = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kills)

METHODS = {
    "sft": {"type": "sft", "over": "sequence"},
    "dpo": {"type": "dpo", "label_smoothing": 0.1, "sft_coefficient": 0.1},
    "ipo": {"type": "ipo"},
    "tdpo": {"type": "tdpo"},
    "tdpo1": {"type": "tdpo", "alpha": None},
    "simpo": {"type": "simpo"},
    "kto": {"type": "kto", "undesirable_weight": 1.5},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder):
    """Pairs: the better answer says yes. Labels: the same answers one by one."""
    place = tmp_path_factory.mktemp("offline")
    pairs = [
        {"id": str(k), "prompt": f"say {k}", "good": f"yes {k}", "bad": "no no" + "!" * (k % 3)} for k in range(60)
    ]
    labels = [{"prompt": f"say {k}", "text": ("yes", "no")[k % 2], "fine": k % 2 == 0} for k in range(60)]
    for name, rows in (("pairs", pairs), ("labels", labels)):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)


def configuration(place, model_folder, folder, kind, **sections):
    values = {
        "folder": str(folder),
        "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu", "compile": False},
        "method": {"batch": 3, **METHODS[kind]},
        "task": {
            "path": str(place / "pairs.jsonl"),
            "prompt": "{prompt}:",
            "id": "id",
            "answer": "good",
            "rejected": "bad",
        },
        "update": {"learning_rate": 3e-3},
        "evaluation": {"items": 4, "every": 2, "metric": "answer_logprob", "sampling": {"max_new_tokens": 4}},
        "log": {"episodes_every": 2},
        "stop": {"steps": 3},
    }  # fmt: skip
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return RunConfig.model_validate(values)


def built(*arguments, **sections):
    return assembly.build_run(configuration(*arguments, **sections))


def gradients(it, rows):
    """Of every parameter, after the loss of the step and before the optimiser."""
    found = {}
    step = it.optimizer.step
    it.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in it.policy.trainable().items()})
    metrics, streams = offline.update(it, rows, 1)
    it.optimizer.step = step
    return metrics, streams, found


# --- rows ---------------------------------------------------------------------------------------------------


def test_a_row_is_the_prompt_as_sampling_has_it_the_answer_and_an_end():
    examples = Examples.of("pairs", byte_tokenizer(), (256,), 128)
    (chosen, rejected), good = examples.episodes([Item("a", "hi", "yes", {"rejected": "no"})], step=4)
    assert chosen.tokens == [*b"hi", *b"yes", 256] or byte_tokenizer().decode(chosen.tokens) == "hiyes<eos>"
    assert chosen.action_mask == [False, False, True, True, True, True]
    assert (chosen.group, chosen.id, rejected.id) == (rejected.group, "4/a/chosen", "4/a/rejected")
    assert good == [True, False]
    assert chosen.terminated


def test_only_answers_have_a_gradient(place, model_folder, tmp_path):
    """Through the whole pass: the loss is that of plain transformers with labels -100 on the prompt."""
    it = built(place, model_folder, tmp_path / "run", "sft", method={"over": "token"})
    rows = offline.rows_of(it, 1)
    metrics, _, found = gradients(it, rows)
    model = tiny_model(seed=1)
    batch = rows.batch
    labels = torch.where(batch.action_mask, batch.tokens, -100)
    output = model(batch.tokens, attention_mask=batch.attention_mask.long(), labels=labels)
    output.loss.backward()
    assert metrics["loss/policy"] == pytest.approx(output.loss.item(), abs=1e-5)
    assert metrics["loss/policy"] == pytest.approx(metrics["answer/nats"], abs=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    assert metrics["grad/norm"] == pytest.approx(norm, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("over", "tokens"), [("token", 4096), ("token", 30), ("sequence", 30)])
def test_smoothed_labels_are_those_of_cross_entropy(place, model_folder, tmp_path, over, tokens):
    """Loss and gradient are those of torch on logits of plain transformers, in parts or as a whole."""
    method = {"over": over, "label_smoothing": 0.3}
    it = built(
        place, model_folder, tmp_path / "run", "sft", method=method, update={"tokens_per_micro_batch": tokens}
    )  # fmt: skip
    rows = offline.rows_of(it, 1)
    assert (len(rows.parts(tokens)) > 1) == (tokens == 30)
    metrics, _, found = gradients(it, rows)
    model, batch = tiny_model(seed=1), rows.batch
    labels = torch.where(batch.action_mask, batch.tokens, -100)[:, 1:]
    logits = model(batch.tokens, attention_mask=batch.attention_mask.long()).logits[:, :-1].transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3, reduction="none")
    counts = batch.action_mask.sum(1)
    loss = losses.sum() / counts.sum() if over == "token" else (losses.sum(1) / counts).mean()
    loss.backward()
    assert metrics["loss/policy"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["answer/nats"] != pytest.approx(loss.item(), abs=1e-3), "which tells of the answer alone"
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_what_is_too_long_to_learn_from_is_answered_all_the_same(place, model_folder, tmp_path):
    """So that supervised tuning is measured on the items that every other method is measured on."""
    held_out = [
        {"id": f"held-{k}", "prompt": f"ask {k}", "good": "y" * length} for k, length in enumerate((90, 3, 200, 4))
    ]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    task = {"path": {"train": str(place / "pairs.jsonl"), "validation": str(tmp_path / "held.jsonl")}, "rejected": None}
    it = built(place, model_folder, tmp_path / "run", "sft", task=task, method={"max_tokens": 20})
    assert [item.id for item in it.evaluator.items] == ["held-0", "held-1", "held-2", "held-3"]
    note = "validation: 1 of 4 items have no answer_logprob: prompt and answer are over 128 tokens"
    assert note in it.notes, "the context has no room for its answer"
    found = it.evaluator(it.engine, it.policy, it.reference)
    logged = found.logged(0, "validation")["items"]
    given = logged["answer_logprob"]
    assert [value is None for value in given] == [False, False, True, False]
    assert None not in logged["rouge_l"]
    assert None not in logged["nats_per_token"]
    assert "answer_logprob" not in found.rows[2]["metrics"]
    assert found.summary["metrics"]["answer_logprob"] == pytest.approx((given[0] + given[1] + given[3]) / 3)
    assert [given[3]] == it.evaluator.given.__class__(it.config.offline, it.examples, it.evaluator.items[3:])(
        it.policy, None
    )["answer_logprob"], "each value is beside its own item"
    with pytest.raises(TaskError, match=r"only 60 training items: lower method\.batch"):
        built(place, model_folder, tmp_path / "run", "sft", task=task, method={"max_tokens": 20, "batch": 61})


def test_held_out_answers_that_never_fit_cannot_be_followed(place, model_folder, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"id": "long", "prompt": "ask", "good": "y" * 200}))
    task = {"path": {"train": str(place / "pairs.jsonl"), "validation": str(tmp_path / "held.jsonl")}, "rejected": None}
    with pytest.raises(TaskError, match=r"evaluation\.metric answer_logprob: of no held-out item .* the 128 tokens"):
        built(place, model_folder, tmp_path / "run", "sft", task=task)
    it = built(place, model_folder, tmp_path / "run", "sft", task=task, evaluation={"metric": "rouge_l"})
    assert "answer_logprob" not in it.evaluator(it.engine, it.policy, it.reference).summary["metrics"]


def test_a_window_makes_the_rows_of_a_step_alike(place, model_folder, tmp_path):
    rows = [{"id": f"row {k}", "prompt": f"tell {k}", "good": "y" * (7 * k % 60)} for k in range(1, 60)]
    (tmp_path / "lengths.jsonl").write_text("\n".join(map(json.dumps, rows)))
    held_out = str(place / "pairs.jsonl")
    spreads = []
    for window in (None, 6):
        task = {"path": {"train": str(tmp_path / "lengths.jsonl"), "validation": held_out}, "rejected": None}
        it = built(place, model_folder, tmp_path / "run", "sft", task=task | {"length_window": window})
        steps = [[len(row.tokens) for row in it.examples.episodes(items_of(it, step))[0]] for step in range(1, 13)]
        spreads.append(sum(max(step) - min(step) for step in steps) / len(steps))
        assert len({item.id for step in range(1, 20) for item in items_of(it, step)}) == 57, "each comes up once"
    assert spreads[1] < spreads[0] / 3


def test_a_long_item_is_named_or_left_out_and_counted(place, model_folder, tmp_path):
    long = {"id": "long", "prompt": "say it", "good": "y" * 200, "bad": "n"}
    (tmp_path / "pairs.jsonl").write_text((place / "pairs.jsonl").read_text() + "\n" + json.dumps(long))
    task = {"path": {"train": str(tmp_path / "pairs.jsonl"), "validation": str(tmp_path / "pairs.jsonl")}}
    with pytest.raises(TaskError, match=r"item long: prompt and answer have 208 tokens, .* context is 128"):
        built(place, model_folder, tmp_path / "run", "dpo", task=task | {"max_bad_rows": 99}, evaluation={"items": 0})
    it = built(
        place, model_folder, tmp_path / "run", "dpo", task=task | {"max_bad_rows": 99}, evaluation={"items": 0},
        method={"max_tokens": 100},
    )  # fmt: skip
    assert "left out 1 of 61 items: over 100 tokens" in it.notes
    with pytest.raises(TaskError, match="no item has rows of at most 3 tokens"):
        built(place, model_folder, tmp_path / "run", "dpo", method={"max_tokens": 3})


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "tdpo", "tdpo1", "kto"])
def test_at_the_start_policy_and_reference_are_the_same(place, model_folder, tmp_path, method):
    it = built(
        place, model_folder, tmp_path / "run", method, method={"sft_coefficient": 0.0} if method == "dpo" else {}
    )
    rows = offline.rows_of(it, 1)
    metrics, streams, _ = gradients(it, rows)
    expected = (1 + 1.5) / 4 if method == "kto" else math.log(2)
    assert metrics["loss/policy"] == pytest.approx(expected, abs=1e-5)
    assert metrics["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert streams["reward/implicit"].abs().max() < 1e-5
    assert (rows.baseline is None) == (method != "kto")


def unsettle(it):
    """Move the weights away from the reference."""
    with torch.no_grad():
        for parameter in it.policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("method", ["sft", "dpo", "tdpo", "kto"])
def test_the_step_does_not_depend_on_how_it_is_cut(place, model_folder, tmp_path, method):
    it = built(place, model_folder, tmp_path / "run", method)
    unsettle(it)
    rows, found = offline.rows_of(it, 1), []
    for tokens in (4096, 30, 1):
        update = it.config.update.model_copy(update={"tokens_per_micro_batch": tokens})
        it.config = it.config.model_copy(update={"update": update})
        assert (len(rows.parts(tokens)) > 1) == (tokens < 4096)
        found.append(gradients(it, rows))
    for metrics, streams, grads in found[1:]:
        for name in metrics:
            assert metrics[name] == pytest.approx(found[0][0][name], rel=1e-4, abs=1e-5), name
        for name in streams:
            torch.testing.assert_close(streams[name], found[0][1][name], rtol=1e-3, atol=1e-5)
        for name in grads:
            torch.testing.assert_close(grads[name], found[0][2][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["dpo", "ipo", "tdpo1", "simpo", "kto"])
def test_the_gradient_is_that_of_the_loss(place, model_folder, tmp_path, method):
    """Against finite differences of the loss along the gradient, through the KL over the vocabulary too.

    (In TDPO2 a part of the loss is held constant, so its value has another derivative: see test_preferences.py.)
    """
    it = built(place, model_folder, tmp_path / "run", method, update={"max_grad_norm": None})
    parameters = it.policy.trainable()
    unsettle(it)
    rows = offline.rows_of(it, 1)
    _, _, grads = gradients(it, rows)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    losses = []
    for side in (1, -2):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(side * 2e-3 * grads[name] / norm)
        losses.append(gradients(it, rows)[0]["loss/policy"])
    assert (losses[0] - losses[1]) / 4e-3 == pytest.approx(norm, rel=0.02)


def test_the_forward_kl_is_that_of_the_whole_vocabulary(place, model_folder, tmp_path):
    it = built(place, model_folder, tmp_path / "run", "tdpo")
    other = Policy(tiny_model(seed=2), it.policy.tokenizer, precision="float32").reference()
    batch = offline.rows_of(it, 1).batch
    kl = it.policy.score(batch, against=other.against(other.score(batch, hidden=True), forward=True)).kl
    with torch.no_grad():
        here, there = (m(batch.tokens).logits.log_softmax(-1) for m in (tiny_model(seed=1), tiny_model(seed=2)))
    exact = (there.exp() * (there - here)).sum(-1)[:, :-1]
    mask = batch.action_mask[:, 1:]
    torch.testing.assert_close(kl[:, 1:][mask], exact[mask], rtol=1e-4, atol=1e-5)
    assert not kl[~batch.action_mask].any()


def test_the_strangers_of_kto_are_prompts_with_the_answers_of_other_items():
    examples = Examples.of("labels", byte_tokenizer(), (256,), 8)
    items = [
        Item(str(k), f"p{k}", answer, {"desirable": True}) for k, answer in enumerate(("one", "two", "a long one"))
    ]
    texts = [byte_tokenizer().decode(row.tokens) for row in examples.mismatched(items)]
    assert texts == ["p0two<eos>", "p1a long", "p2one<eos>"]


# --- runs ---------------------------------------------------------------------------------------------------


def test_it_learns_what_the_answers_say(place, model_folder, tmp_path):
    """SFT makes held-out answers likelier; DPO from its model prefers the better one, and its report tells so."""
    stop, evaluation = {"steps": 20}, {"items": 6, "every": None}
    config = configuration(place, model_folder, tmp_path / "sft", "sft", stop=stop, evaluation=evaluation)
    change = run.train(config).comparison.changes["answer_logprob"]
    assert change.low > 0.5
    assert change.judgement == "better"
    config = configuration(
        place, tmp_path / "sft" / "model", tmp_path / "dpo", "dpo", stop=stop, evaluation=evaluation,
        update={"learning_rate": 1e-3},
    )  # fmt: skip
    changes = run.train(config).comparison.changes
    assert changes["preference_accuracy"].before == 0.5  # nothing but ties: it is the reference
    assert changes["preference_accuracy"].after == 1.0
    assert changes["preference_margin"].low > 0.5
    curve = RunReader(tmp_path / "dpo").metrics()["preference/margin"]
    assert curve[0] == pytest.approx(0, abs=1e-4)
    assert curve[-1] > 0.5
    # As a reward the trained model pays held-out answers what it was trained to.
    it = assembly.build_run(config)
    rows, good = it.evaluator.given.examples.episodes(it.evaluator.items)
    scene = Scene(to_batch(rows, Controls()), rows, it.policy.tokenizer)
    paid = Implicit(str(tmp_path / "dpo" / "model"), str(tmp_path / "sft" / "model"))(scene).sum(1)
    margins = paid[torch.tensor(good)] - paid[~torch.tensor(good)]
    assert margins.mean().item() == pytest.approx(changes["preference_margin"].after, abs=1e-3)
    episodes = RunReader(tmp_path / "dpo").episodes(20)
    assert episodes[0]["id"].endswith("/chosen")
    assert all(len(row["alternatives"]["id"][-1]) == 3 for row in episodes)
    assert sum(episodes[0]["streams"]["reward/implicit"]) > sum(episodes[1]["streams"]["reward/implicit"])


def test_labels_without_pairs_teach_too(place, model_folder, tmp_path):
    task = {"path": str(place / "labels.jsonl"), "id": None, "answer": "text", "rejected": None, "desirable": "fine"}
    config = configuration(
        place, model_folder, tmp_path / "kto", "kto", task=task, stop={"steps": 8},
        evaluation={"metric": "preference_score", "every": None}, method={"batch": 8},
    )  # fmt: skip
    assert run.train(config).comparison.changes["preference_score"].after > 0.05
    metrics = RunReader(tmp_path / "kto").metrics()
    assert metrics["preference/chosen"][-1] > metrics["preference/rejected"][-1]
    assert "preference/accuracy" not in metrics


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_interrupted_and_resumed_it_ends_as_if_it_never_was(place, model_folder, tmp_path, method):
    sections = {"policy": {"lora": {"rank": 2}, "dropout": True}} if method == "dpo" else {}
    sections["update"] = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 1}
    whole = configuration(place, model_folder, tmp_path / "whole", method, **sections)
    run.train(whole)
    parts = configuration(place, model_folder, tmp_path / "parts", method, **sections)
    for lives in itertools.count(1):
        torch.manual_seed(lives)
        made = []
        resume = parts.run_folder if parts.run_folder.exists() else None
        result = run.train(
            parts, resume=resume, on_step=lambda report, _, m=made: m.append(report.step),
            interrupted=lambda m=made: len(m) == 2,
        )  # fmt: skip
        if not result.interrupted:
            break
    assert lives == 2
    assert kills.outcome(tmp_path / "parts") == kills.outcome(tmp_path / "whole")


def test_a_loss_that_is_not_finite_skips_its_step(place, model_folder, tmp_path):
    it = built(place, model_folder, tmp_path / "run", "dpo")
    rows = offline.rows_of(it, 1)
    rows.ref.logprobs[0, -1] = math.inf
    before = {name: p.clone() for name, p in it.policy.trainable().items()}
    rows.ref.logprobs[rows.batch.action_mask] = -math.inf
    metrics, _ = offline.update(it, rows, 1)
    assert metrics["skipped/updates"] == 1
    assert all(torch.equal(before[name], p) for name, p in it.policy.trainable().items())
    assert "update skipped" in it.notes[-1]


# --- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.type=dpo"], "name the column of the worse one in task.rejected"),
        (["method.type=dpo", "task.path=x.jsonl"], "name the column of the worse one in task.rejected"),
        (["method.type=kto", "task.path=x.jsonl"], "name a column of true and false in task.desirable"),
        (["method.type=sft", "update.epochs=2"], "one update of each batch"),
        (["method.type=sft", "stop.kl=1"], "no KL to look at"),
        (["method.type=sft", "credit.type=gae", "policy.value_head={}"], "trains no critic"),
        (["method.type=kto", "method.batch=1"], "method.batch: Input should be greater than or equal to 2"),
        (["method.type=dop"], "unknown type 'dop'"),
        (["method.type=sft", "method.beta=1"], "unknown key in method"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config([], overrides)


def test_what_a_method_does_not_use_is_named(place, model_folder, tmp_path):
    it = built(
        place, model_folder, tmp_path / "run", "dpo", credit={"type": "group_relative"},
        rollout={"samples_per_prompt": 4}, kl={"coefficient": 0.3},
    )  # fmt: skip
    assert "method dpo does not use credit, kl.coefficient, rollout.samples_per_prompt" in it.notes
    plain = built(place, model_folder, tmp_path / "run", "dpo")
    assert not any("does not use" in note for note in plain.notes)


def test_rows_that_cannot_be_compared_are_named(tmp_path, model_folder):
    rows = [{"prompt": f"p{k}", "good": "same", "bad": "same" if k == 3 else "other"} for k in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match=r"pairs.jsonl:4: column 'bad' is the same text as the answer"):
        built(tmp_path, model_folder, tmp_path / "run", "dpo", task={"id": None})
    rows = [{"prompt": f"p{k}", "text": "same", "fine": "maybe" if k == 3 else "true"} for k in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"id": None, "answer": "text", "rejected": None, "desirable": "fine"}
    with pytest.raises(TaskError, match=r"pairs.jsonl:4: column 'fine': expected true or false, got 'maybe'"):
        built(tmp_path, model_folder, tmp_path / "run", "kto", task=task)


def test_an_item_without_an_answer_is_named():
    examples = Examples.of("answers", byte_tokenizer(), (256,), 128)
    with pytest.raises(TaskError, match="item a has no answer"):
        examples.fitting([Item("a", "hi")], None)


def test_held_out_figures_are_those_of_the_texts(place, model_folder, tmp_path):
    it = built(place, model_folder, tmp_path / "run", "simpo")
    measured = it.evaluator.given(it.policy, None)
    item = it.evaluator.items[0]
    ids = [it.policy.tokenizer.encode(t) for t in (f"{item.answer}", item.info["rejected"])]
    prompt = it.policy.tokenizer.encode(item.prompt)
    means = []
    for answer in ids:
        tokens = torch.tensor([[*prompt, *answer, 256]])
        with torch.no_grad():
            logp = tiny_model(seed=1)(tokens).logits.log_softmax(-1)[0, :-1]
        each = logp.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :, 0]
        means.append(each.mean().item())
    assert measured["answer_logprob"][0] == pytest.approx(means[0], abs=1e-5)
    assert measured["preference_margin"][0] == pytest.approx(2 * (means[0] - means[1]), abs=1e-4)
    assert measured["preference_accuracy"][0] == float(means[0] > means[1])
    assert to_batch(it.evaluator.given.examples.episodes(it.evaluator.items)[0], Controls()).num_actions > 0
