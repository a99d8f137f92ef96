"""Memory that runs out: work is cut into smaller portions and ends as if they had been so from the start."""

import errno
import importlib.util
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pertoken import assembly
from pertoken.config import RunConfig
from pertoken.errors import OutOfMemoryError, RewardError
from pertoken.jobs import run
from pertoken.machine import portions
from pertoken.machine.memory import ran_out
from pertoken.machine.portions import Portion
from pertoken.policy import model as policy_model
from pertoken.policy.footprint import Footprint
from pertoken.policy.scoring import head_logits
from pertoken.rollout import decoder as decoders
from pertoken.rollout.by_generate import TransformersEngine
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.training import offline, updating

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kills.py"
spec = importlib.util.spec_from_file_location("kills", SCRIPT)
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)


# --- what an error says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (GPU, True),
        (CPU, True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, is_memory):
    assert ran_out(error) == is_memory


def test_torch_says_so_itself():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert ran_out(caught.value)


def fitting(limit, error=MemoryError):
    """Work that fits up to `limit`, and the sizes that it was tried with."""
    tried = []

    def work(size):
        tried.append(size)
        if size > limit:
            raise error
        return size

    return work, tried


def test_a_portion_is_halved_until_it_fits_and_stays_so():
    portion, undone = Portion("p", 4096, "tokens"), []
    work, tried = fitting(300)
    assert portion.attempt(work, there=10_000, least=10, undo=lambda: undone.append(1)) == 256
    assert tried == [4096, 2048, 1024, 512, 256]
    assert len(undone) == 4
    assert portion.attempt(work, there=10_000, least=10) == 256
    assert portion.told()[0] == "memory ran out with 4096 tokens at once (MemoryError); from here on 2048"
    assert portion.told() == []


def test_what_there_is_bounds_what_is_tried_and_what_cannot_be_cut_ends_it():
    portion = Portion("p", 4096, "tokens")
    work, tried = fitting(50)
    with pytest.raises(OutOfMemoryError, match=r"with 90 tokens at once, and one row alone takes 90: MemoryError"):
        portion.attempt(work, there=700, least=90)
    assert tried == [4096, 350, 175, 90]  # 4096 tries all 700 that there are
    with pytest.raises(MemoryError):  # the named error is Python's own, too
        portion.attempt(work, there=700, least=90)


@pytest.mark.parametrize("error", [KeyError("x"), RewardError("a judge ran out of memory")])
def test_other_errors_pass_at_once(error):
    work, tried = fitting(1, error)
    with pytest.raises(type(error)):
        Portion("p", 64, "rows").attempt(work, there=64, least=1)
    assert tried == [64]


def test_what_did_not_fit_is_gone_before_it_is_tried_again():
    """Its tensors hang on the frames of the exception."""
    seen = []

    class Large:
        pass

    def work(size):
        assert all(ref() is None for ref in seen)
        mine = Large()
        seen.append(weakref.ref(mine))
        if size > 1:
            raise MemoryError
        return size

    assert Portion("p", 8, "rows").attempt(work, there=8, least=1) == 1
    assert len(seen) == 4


def test_a_size_that_was_set_anew_is_tried_anew():
    portion = Portion("p", 4096, "tokens")
    portions.set_states({"p": portion}, {"p": [2048, 64], "of another version": [1, 1]})
    assert portion.size == 4096
    portions.set_states({"p": portion}, {"p": [4096, 64]})
    assert portion.size == 64
    assert portions.states({"p": portion, "q": Portion("q", 3, "rows")}) == {"p": [4096, 64]}


# --- the update -----------------------------------------------------------------------------------------------

SETTINGS = {
    "full": {"update": {"epochs": 2, "minibatches": 2}},
    "critic": {"policy": {"value_head": {}}, "credit": {"type": "gae"}},
    "dropout": {"policy": {"lora": {"rank": 2, "dropout": 0.2}, "dropout": True}},
    "kl stops it": {"update": {"epochs": 3, "stop_kl": 1e-3}},
}


@pytest.fixture
def config(tmp_path_factory, model_folder):
    place = tmp_path_factory.mktemp("data")
    rows = [{"id": str(k), "prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def configuration(folder, tokens, **sections):
        values = {
            "folder": str(folder),
            "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu"},
            "task": {"type": "file", "path": str(place / "data.jsonl"), "prompt": "{prompt}:", "id": "id"},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 6}},
            "rewards": [{"name": "rouge_l", "granularity": "token"}, {"name": "length", "min_words": 3}],
            "update": {"learning_rate": 1e-2, "tokens_per_micro_batch": tokens},
            "evaluation": {"items": 3, "sampling": {"max_new_tokens": 4}},
            "checkpoint": {"every": 1},
            "stop": {"steps": 3},
        }
        for name, fields in sections.items():
            values[name] = {**values.get(name, {}), **fields}
        return RunConfig.model_validate(values)

    return configuration


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-5)


def takes_at_most(monkeypatch, tokens, *, grad=True, error=GPU):
    """A machine on which a pass with gradient (or without) over more than so many tokens does not fit."""
    whole = policy_model.score_batch

    def score_batch(trunk, batch, **named):
        found = whole(trunk, batch, **named)
        if torch.is_grad_enabled() == grad and int(batch.attention_mask.sum()) > tokens:
            raise error  # late, when dropout has drawn its numbers
        return found

    monkeypatch.setattr(policy_model, "score_batch", score_batch)
    # its probe is longer
    monkeypatch.setattr(assembly.policy, "footprint", lambda policy, natural: Footprint(0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_update_that_does_not_fit_ends_as_one_with_small_micro_batches(config, tmp_path, monkeypatch, setting):
    small = config(tmp_path / "small", 51, **SETTINGS[setting])
    run.train(small)
    notes = []
    large = config(tmp_path / "large", 512, **SETTINGS[setting])
    takes_at_most(monkeypatch, 64)
    run.train(large, on_note=notes.append)
    close(weights(tmp_path / "large"), weights(tmp_path / "small"))
    rows = metrics(tmp_path / "large")
    assert {row["portion/micro_batch"] for row in rows} == {51}  # a quarter of the 204 tokens of step 1
    assert all("portion/micro_batch" not in row for row in metrics(tmp_path / "small"))
    assert any("step 1: memory ran out with " in note and "CUDA out of memory" in note for note in notes)
    assert rows[0]["grad/norm"] == pytest.approx(metrics(tmp_path / "small")[0]["grad/norm"], rel=1e-3)


@pytest.mark.parametrize("part", [1, 2, 4])
def test_gradients_of_the_parts_before_it_are_dropped(config, tmp_path, monkeypatch, part):
    """Memory runs out at the k-th micro-batch, in the backward pass: what was added up before it counts once."""
    backward, calls, norms = updating._backward, [], []

    def failing(loss, of_part):
        found = backward(loss, of_part)
        calls.append(of_part)
        if len(calls) == part:
            raise CPU
        return found

    for name in ("whole", "cut"):
        built = assembly.build_run(config(tmp_path / name, 30))
        inputs = updating_inputs(built)
        norms.append(updating.update(built, *inputs, 1).metrics["grad/norm"])
        monkeypatch.setattr(updating, "_backward", failing)
    assert built.micro_batch.size == 15
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[0] > 0


def updating_inputs(built):
    from pertoken.batching import to_batch
    from pertoken.training import trainer
    from pertoken.types import Credit

    batch = to_batch(trainer.generate(built, 1), built.controls)
    old = built.policy.score(batch)
    advantages = torch.linspace(-1, 1, len(batch.episode_ids))[:, None] * batch.action_mask
    return batch, old, None, Credit(advantages)


def test_a_resumed_run_keeps_the_smaller_micro_batches(config, tmp_path, monkeypatch):
    """It ends with the same bits as one that was not interrupted, and tries the large ones no more."""
    takes_at_most(monkeypatch, 64)
    whole, parts = config(tmp_path / "whole", 512), config(tmp_path / "parts", 512)
    run.train(whole)
    made, notes = [], []
    run.train(parts, on_step=lambda report, _: made.append(1), interrupted=lambda: len(made) >= 1)
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state["portions"]["micro_batch"][0] == 512
    run.train(parts, resume=tmp_path / "parts", on_note=notes.append)
    assert not any("memory ran out" in note for note in notes)
    assert kills.outcome(tmp_path / "parts") == kills.outcome(tmp_path / "whole")


def test_a_run_that_will_not_fit_begins_with_smaller_micro_batches(config, tmp_path, monkeypatch):
    """By its estimate; and ends as it would have with them."""
    usual = assembly.build_run(config(tmp_path / "usual", 512))
    assert not usual.portions()["micro_batch"].size < 512
    assert not any("tokens per micro-batch" in note for note in usual.notes)
    kept = assembly.policy.footprint(usual.policy)
    fits = assembly.policy.used_memory(usual.policy.device) + kept.update(140) / 1e9
    monkeypatch.setattr(assembly.policy, "used_memory", lambda device: fits - kept.update(140) / 1e9)
    monkeypatch.setattr(assembly.policy, "installed_memory", lambda device: fits / 0.9)
    planned = assembly.build_run(config(tmp_path / "planned", 512))
    assert planned.micro_batch.size == 128
    assert planned.memory_estimate < fits < usual.memory_estimate
    assert any("begins with 128 tokens per micro-batch" in note for note in planned.notes)
    run.train(config(tmp_path / "large", 512))
    run.train(config(tmp_path / "small", 128))
    close(weights(tmp_path / "large"), weights(tmp_path / "small"))
    assert metrics(tmp_path / "large")[0]["portion/micro_batch"] == 128


def test_one_row_that_does_not_fit_alone_ends_the_run_by_name(config, tmp_path, monkeypatch):
    takes_at_most(monkeypatch, 5)
    settings = config(tmp_path / "run", 512)
    with pytest.raises(OutOfMemoryError, match=r"micro-batch at once, and one row alone takes \d+: CUDA out of memory"):
        run.train(settings)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)
    run.train(settings, resume=tmp_path / "run")  # on a larger machine
    assert len(metrics(tmp_path / "run")) == 3


def test_an_optimiser_that_does_not_fit_is_a_named_error(config, tmp_path, monkeypatch):
    settings = config(tmp_path / "run", 512)

    def step(*_, **__):
        raise GPU

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(OutOfMemoryError, match="memory ran out where nothing can be cut: CUDA out of memory"):
        run.train(settings)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_learning_from_answers_is_cut_too(config, tmp_path, monkeypatch):
    method = {"method": {"type": "sft", "batch": 8}}
    small, large = (config(tmp_path / str(n), n, **method) for n in (40, 512))
    run.train(small)
    whole = offline.part_loss
    calls = []

    def limited(method, new, part, rows, *, vocab):
        calls.append(int(part.batch.attention_mask.sum()))
        if calls[-1] > 40:
            raise CPU
        return whole(method, new, part, rows, vocab=vocab)

    monkeypatch.setattr(offline, "part_loss", limited)
    run.train(large)
    assert max(calls) > 40 >= calls[-1]
    close(weights(tmp_path / "512"), weights(tmp_path / "40"))
    assert metrics(tmp_path / "512")[-1]["portion/micro_batch"] < 45


# --- scoring and rollout --------------------------------------------------------------------------------------


def test_scoring_is_cut_where_it_does_not_fit(config, tmp_path, monkeypatch):
    built = assembly.build_run(config(tmp_path / "run", 512, policy={"value_head": {}}, credit={"type": "gae"}))
    batch = updating_inputs(built)[0]
    whole = built.policy.score(batch)
    takes_at_most(monkeypatch, 40, grad=False, error=CPU)
    cut = built.policy.score(batch)
    for name in ("logprobs", "entropy", "values", "bootstrap"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
    assert built.policy.portion.size <= 40
    assert built.portions().keys() == {"micro_batch", "scoring", "rollout"}


PROMPTS = [[72, 101 + k] for k in range(6)] + [[72, 101]] * 2


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_rollout_is_cut_and_draws_the_same(monkeypatch, kind):
    controls = Controls(Sampling(max_new_tokens=5))

    def engine():
        if kind == "native":
            return NativeEngine(tiny_model(), byte_tokenizer(), head_logits=head_logits, max_rows=8)
        return TransformersEngine(tiny_model(), byte_tokenizer(), max_rows=8, context_length=128)

    expected = engine().generate(PROMPTS, controls, seeds=range(8))
    limited = engine()
    if kind == "native":
        whole = decoders.HFDecoder.step

        def step(self, tokens):
            if len(tokens) > 3:
                raise CPU
            return whole(self, tokens)

        monkeypatch.setattr(decoders.HFDecoder, "step", step)
    else:
        generate = TransformersEngine._generate

        def few(self, rows, batch):
            if len(batch) > 3:
                raise CPU
            generate(self, rows, batch)

        monkeypatch.setattr(TransformersEngine, "_generate", few)
    found = limited.generate(PROMPTS, controls, seeds=range(8))
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert limited.portion.size == 2
    assert [c.tokens for c in limited.generate(PROMPTS, controls, seeds=range(8))] == [c.tokens for c in expected]
