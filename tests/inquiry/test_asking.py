"""A run folder that questions are put to, from Python and from the command line."""

import json
import math
import re
import shutil

import pytest
import torch

from pertoken.batching import to_batch
from pertoken.errors import ConfigError, RunFolderError
from pertoken.inquiry import questions
from pertoken.inquiry.asking import Answers
from pertoken.sampling import Controls, Sampling
from pertoken.tracking import RunReader


@pytest.fixture(scope="module")
def run(asked_run):
    return Answers(asked_run)


@pytest.fixture(scope="module")
def record(asked_run):
    return RunReader(asked_run).episodes(2)[1]


def actions(record, name):
    return [value for value, acts in zip(record["streams"][name], record["tokens"]["action"], strict=True) if acts]


def test_models_are_those_before_on_the_way_and_after(run):
    assert run.models() == ["before", "step-1", "step-2", "step-3", "trained"]
    with pytest.raises(RunFolderError, match="no model 'step-4'; did you mean"):
        run.policy("step-4")


def test_a_checkpoint_gives_its_samples_the_log_probs_that_the_run_wrote_down(run, record):
    """Step 2 was sampled by the weights after step 1."""
    places = run.alternatives("2.1", model="step-1")
    assert [place.chosen.logprob for place in places] == pytest.approx(actions(record, "logprob"), abs=1e-4)
    assert [place.entropy for place in places] == pytest.approx(actions(record, "entropy"), abs=1e-4)
    assert [place.chosen.token for place in places] == record["tokens"]["id"][-6:]


def test_the_last_checkpoint_is_the_trained_model(run):
    assert run.difference("2.1", model="trained", against="step-3") == pytest.approx([0.0] * 6, abs=1e-5)
    moved = run.difference("2.1", model="trained", against="before")
    assert max(map(abs, moved)) > 1e-3


def test_the_difference_is_that_of_two_scorings(run, record):
    asked = run._asked("2.1", run.policy())
    batch = to_batch([asked.episode], run.controls())
    ours, theirs = (run.policy(name).score(batch).logprobs[batch.action_mask] for name in ("step-3", "before"))
    assert run.difference("2.1", model="step-3") == pytest.approx((ours - theirs).tolist(), abs=1e-5)


def test_no_more_models_are_kept_than_two(run):
    for name in run.models():
        run.policy(name)
    assert len(run._loaded) == 2


def test_what_if_the_token_had_been_itself(run, record):
    own = record["tokens"]["id"][-6 + 2]
    found = run.what_if("2.1", 2, ids=[own], samples=3)
    assert found.would_be.pieces == found.was.pieces
    assert found.onward_instead == found.onward
    assert (found.effect.mean, found.effect.low, found.effect.high) == (0.0, 0.0, 0.0)
    paid = sum(actions(record, "reward/rouge_l")) + sum(actions(record, "reward/repetition"))  # without the KL
    assert found.was.paid["total"] == pytest.approx(paid, abs=1e-4)
    assert found.notes == []


def test_a_swap_for_what_is_paid_is_worth_it(run):
    found = run.what_if("2.1", 1, text=" the answer ", samples=3)
    assert found.would_be.paid["rouge_l"] > found.was.paid["rouge_l"]
    assert found.effect.low > 0


def test_what_if_it_had_been_another_one(run, record):
    found = run.what_if("2.1", 1, text="XY", samples=4, seed=5)
    assert found.would_be.pieces[1:3] == ["X", "Y"]
    assert (len(found.was.pieces), len(found.would_be.pieces)) == (6, 7)
    assert len({tuple(text.pieces[:1]) for text in found.onward}) == 1
    assert [text.pieces[1:3] for text in found.onward_instead] == [["X", "Y"]] * 4
    assert {text.begun for text in found.onward} == {2}
    assert {text.begun for text in found.onward_instead} == {3}
    for text in (*found.onward, *found.onward_instead):
        assert len(text.logprobs) == len(text.pieces)
        assert text.paid["total"] == pytest.approx(text.paid["rouge_l"] + text.paid["repetition"], abs=1e-6)
    means = [sum(text.paid["total"] for text in texts) / 4 for texts in (found.onward, found.onward_instead)]
    assert found.effect.mean == pytest.approx(means[1] - means[0], abs=1e-6)


def test_causes_are_of_each_part_and_sum_to_the_total(run):
    found = run.causes("2.1")
    assert set(found.parts) == {"rouge_l", "repetition", "total"}
    sums = [a + b for a, b in zip(found.parts["rouge_l"], found.parts["repetition"], strict=True)]
    assert found.parts["total"] == pytest.approx(sums, abs=1e-6)


def test_a_held_out_sample_can_be_asked_about_by_the_name_that_the_report_gives_it(run, asked_run):
    rows = RunReader(asked_run).evaluation_items(3, "validation")
    places = run.alternatives("validation.3.1")
    assert [place.chosen.token for place in places] == rows[1]["tokens"]["id"][-len(places) :]
    assert run.what_if("validation.0.1", 0, text="a", samples=0).effect is None


@pytest.mark.parametrize(
    ("sample", "error", "words"),
    [
        ("2.99", RunFolderError, "no sample 2.99: there are 4"),
        ("77.0", RunFolderError, "there are 0 of this step"),
        ("other.3.0", RunFolderError, "there are 0"),
        ("../x", ConfigError, "expected STEP.SAMPLE"),
        ("", ConfigError, "expected STEP.SAMPLE"),
    ],
)
def test_samples_that_are_not_there(run, sample, error, words):
    with pytest.raises(error, match=re.escape(words)):
        run.alternatives(sample)


def test_a_token_that_is_not_there(run):
    with pytest.raises(ConfigError, match="token 7: this sample has 6"):
        run.what_if("2.1", 6, text="a")


def test_rewards_that_cannot_be_asked_leave_texts_unpaid_and_say_why(asked_run, tmp_path):
    folder = shutil.copytree(asked_run, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("normalise: none", "normalise: batch", 1))
    found = Answers(folder).what_if("2.1", 0, text="a", samples=2)
    assert found.effect is None
    assert found.onward[0].paid is None
    assert found.notes[0].startswith("not rewarded: reward 'rouge_l' has `normalise`")
    with pytest.raises(RunFolderError, match="normalise"):
        Answers(folder).causes("2.1")


def test_a_reward_that_pays_otherwise_now_is_noted(asked_run, tmp_path):
    folder = shutil.copytree(asked_run, tmp_path / "run")
    path = folder / "episodes" / "000002.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["streams"]["reward/rouge_l"][-1] += 1.0
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "rouge_l" in Answers(folder).what_if("2.1", 0, text="a", samples=0).notes[0]


def test_without_the_data_texts_are_paid_by_prompt_and_answer_alone(asked_run, tmp_path):
    folder = shutil.copytree(asked_run, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"path: .*data.jsonl", "path: gone.jsonl", text))
    found = Answers(folder).what_if("2.1", 1, text=" the answer ", samples=1)
    assert found.notes == []
    assert found.would_be.paid["rouge_l"] > 0


def test_a_model_can_be_talked_to(run):
    heard = []
    speaker = run.speaker(Sampling(max_new_tokens=5, temperature=0.5), model="before", chat=False)
    text = speaker.stream("say", seed=3, on_piece=lambda *token: heard.append(token))
    assert "".join(piece for piece, _, _ in heard) == text
    assert all(logprob <= 0 and entropy >= 0 for _, logprob, entropy in heard)


def test_asking_trains_nothing(run):
    before = {name: p.detach().clone() for name, p in run.policy().trainable().items()}
    run.what_if("2.1", 0, text="a", samples=2)
    for name, parameter in run.policy().trainable().items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


# --- in the terminal ----------------------------------------------------------------------------------------


def test_ask_lists_all_tokens_or_the_alternatives_of_one(asked_run, pertoken, record):
    code, out, _ = pertoken("ask", asked_run, "--sample", "2.1", "--model", "step-1")
    assert code == 0
    assert len(re.findall(r"^\d+ ", out, flags=re.MULTILINE)) == 6
    code, out, _ = pertoken("ask", asked_run, "--sample", "2.1", "--model", "step-1", "--token", 3)
    share = 100 * math.exp(actions(record, "logprob")[2])
    assert code == 0
    assert "(is there)" in out
    assert f"{share:.3g}%" in out


def test_ask_swaps_compares_and_finds_causes(asked_run, pertoken):
    code, out, _ = pertoken("ask", asked_run, "--sample", "2.1", "--token", 2, "--swap", "Q", "--samples", 2)
    assert code == 0
    assert "'Q' in the place of" in out
    assert "95% interval" in out
    code, out, _ = pertoken("ask", asked_run, "--sample", "2.1", "--against", "before", "--causes")
    assert code == 0
    assert "trained − before" in out
    assert "lost without the token: total" in out


def test_ask_refuses_in_words(asked_run, pertoken):
    assert "Add --token" in pertoken("ask", asked_run, "--sample", "2.1", "--swap", "x")[2]
    code, _, err = pertoken("ask", asked_run, "--sample", "2.1", "--token", 50)
    assert code == 2
    assert "this sample has 6" in err


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.fixture
def captum():
    pytest.importorskip("captum", reason="needs captum, of the extra 'attribution'", exc_type=ImportError)


def test_a_log_prob_is_attributed_to_the_prompt_and_the_text_before_the_token(run, captum):
    found = run.attributions("2.1", of="policy", token=2, model="trained")
    (one,) = found.scores.values()
    episode = run._asked("2.1", run.policy()).episode
    wanted = questions.logprobs_of(run.policy(), [episode], Controls())[0]
    assert one.score == pytest.approx(wanted[2], abs=1e-4)
    assert sum(one.values) + one.open == pytest.approx(one.score - one.neutral, abs=1e-6)
    assert (len(found.pieces), found.prompt) == (len(episode.tokens), episode.prompt_length)
    assert all(one.values[: episode.prompt_length + 2])
    assert not any(one.values[episode.prompt_length + 2 :])


def test_the_difference_of_two_models_is_attributed_by_the_difference(run, captum):
    (found,) = run.attributions("2.1", of="policy", model="trained", against="before").scores.values()
    episode = run._asked("2.1", run.policy()).episode
    ours, theirs = (
        sum(questions.logprobs_of(run.policy(name), [episode], Controls())[0]) for name in ("trained", "before")
    )
    assert found.score == pytest.approx(ours - theirs, abs=1e-3)
    assert sum(found.values) + found.open == pytest.approx(found.score - found.neutral, abs=1e-6)


def test_rewards_without_a_gradient_are_named_in_the_refusal(run, captum, asked_run, pertoken):
    with pytest.raises(ConfigError, match="no part of the reward is a learned model"):
        run.attributions("2.1", of="reward")
    with pytest.raises(ConfigError, match="rewards score whole texts"):
        run.attributions("2.1", of="reward", token=1)
    code, _, error = pertoken("ask", asked_run, "--sample", "2.1", "--gradients", "rewards")
    assert code
    assert "expected policy or reward" in " ".join(error.split())


def test_ask_shows_gradients(asked_run, pertoken, captum):
    code, out, _ = pertoken("ask", asked_run, "--sample", "2.1", "--token", 3, "--gradients", "policy")
    assert code == 0
    assert "log-prob of token 3: -" in out
    assert "with neutral tokens in the place of these: -" in out
    assert "say " in out  # the prompt is shown, too
    assert "largest: " in out
