"""Held-out evaluation: the right numbers beside the right texts."""

import dataclasses
import math

import pytest
import torch

from pertoken.assembly import build_run
from pertoken.errors import ConfigError
from pertoken.evaluation import MAUVE, Evaluator
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rewards import Weighted, episode_reward
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.text_metrics import FURTHER_CORPUS_METRICS, FURTHER_ITEM_METRICS, compression, item_metrics
from pertoken.tracking.glossary import HELD_OUT, find
from pertoken.types import Item
from tests.test_trainer import data, importable, settings  # noqa: F401

ITEMS = [
    Item("a", "one two", "a short answer"),
    Item(
        "b",
        "three",
        "another",
        info={"source": "Three is odd. Four is not.", "references": ["another", "Three is odd."]},
    ),
]


@episode_reward
def length(sample):
    """Characters."""
    return float(len(sample.text))


@pytest.fixture
def result():
    tokenizer = byte_tokenizer()
    policy = Policy(tiny_model(seed=1), tokenizer, precision="float32")
    engine = NativeEngine(policy.model, tokenizer, head_logits=head_logits)
    controls = Controls.resolve(Sampling(temperature=0.0, max_new_tokens=10, repetition_penalty=1.2), tokenizer, (256,))
    other = Policy(tiny_model(seed=2), tokenizer, precision="float32").reference()
    return (
        policy,
        other,
        Evaluator(ITEMS, controls, "rouge_l")(engine, policy, other, [Weighted(length, 0.5, "length")]),
    )


def test_metrics_are_those_of_the_texts(result):
    _, _, evaluation = result
    outputs = [row["output"] for row in evaluation.rows]
    wanted = item_metrics(outputs, [["a short answer"], ["another", "Three is odd."]])
    for name, values in wanted.items():
        assert [row["metrics"][name] for row in evaluation.rows] == pytest.approx(values)
        assert evaluation.summary["metrics"][name] == pytest.approx(sum(values) / 2)
        low, high = evaluation.summary["intervals"][name]
        assert low <= evaluation.summary["metrics"][name] + 1e-9
        assert high >= evaluation.summary["metrics"][name] - 1e-9
    assert evaluation.summary["main"] == "rouge_l"


def test_a_metric_of_all_texts_has_an_interval_by_what_each_makes_of_it(result):
    _, _, evaluation = result
    for name in ("distinct_1", "distinct_2", "corpus_bleu", "corpus_chrf"):
        shares = evaluation.logged(0, "test")["items"][name]
        assert sum(shares) / 2 == pytest.approx(evaluation.summary["metrics"][name])
        low, high = evaluation.summary["intervals"][name]
        assert low - 1e-9 <= evaluation.summary["metrics"][name] <= high + 1e-9
        assert all(name not in row["metrics"] for row in evaluation.rows)


def test_a_metric_of_all_texts_of_a_task_has_an_interval_too(result):
    policy, _, whole = result
    items = [dataclasses.replace(item, task=task) for item, task in zip([*ITEMS, ITEMS[0]], "xyx", strict=True)]
    controls = Controls.resolve(Sampling(temperature=0.0, max_new_tokens=10), policy.tokenizer, (256,))
    evaluator = Evaluator(items, controls, "rouge_l", by_task={"x": "corpus_chrf"})
    found = evaluator(NativeEngine(policy.model, policy.tokenizer, head_logits=head_logits), policy, None)
    shares = found.logged(0, "test")["items"]["corpus_chrf/x"]
    assert shares[1] is None
    assert (shares[0] + shares[2]) / 2 == pytest.approx(found.summary["metrics"]["corpus_chrf/x"])
    assert found.summary["intervals"]["corpus_chrf/x"] == pytest.approx([shares[0]] * 2)  # the two items are alike
    assert "corpus_chrf/x" not in whole.summary["shares"]


def test_trap_36_how_training_samples_and_measures_is_not_how_held_out_texts_are(
    model_folder,
    data,  # noqa: F811
    tmp_path,
):
    """Held-out answers and their rewards are the same whatever the controls and the normalisation of training."""

    def measured(sampling, **part):
        rewards = [{"fn": "tests.test_trainer:token_numbers", "name": "numbers", **part}]
        made = build_run(settings(model_folder, data, tmp_path, rollout__sampling=sampling, rewards=rewards))
        found = made.evaluator(made.engine, made.policy, made.reference, made.rewards)
        return found.summary, [(row["output"], row["streams"]["reward/numbers"]) for row in found.rows]

    plain = measured({"max_new_tokens": 8})
    odd = {"max_new_tokens": 3, "temperature": 1.7, "top_k": 3, "repetition_penalty": 2.0, "banned_words": ["e"]}
    assert measured(odd, normalise="batch") == plain
    assert any(len(output) > 3 for output, _ in plain[1])


def test_trivial_baselines_speak_of_the_source(result):
    baselines = result[2].summary["baselines"]
    assert set(baselines) == {"first sentence", "copy", "empty"}
    assert baselines["first sentence"]["rouge_l"] == pytest.approx(0.5)  # nothing of item a, all of item b
    assert baselines["empty"]["rouge_l"] == 0


def test_trivial_baselines_are_measured_once(monkeypatch):
    measured = []

    def counted(texts, *args, **kwargs):
        measured.append(list(texts))
        return item_metrics(texts, *args, **kwargs)

    monkeypatch.setattr("pertoken.evaluation.item_metrics", counted)
    tokenizer = byte_tokenizer()
    policy = Policy(tiny_model(seed=1), tokenizer, precision="float32")
    engine = NativeEngine(policy.model, tokenizer, head_logits=head_logits)
    evaluator = Evaluator(ITEMS, Controls(Sampling(temperature=0.0, max_new_tokens=4)), "rouge_l")
    summaries = [evaluator(engine, policy, None).summary for _ in range(2)]
    assert summaries[0]["baselines"] == summaries[1]["baselines"]
    assert sum(texts == ["", ""] for texts in measured) == 1


def test_a_judge_stands_in_for_the_reference(result):
    """The policy judges itself, and the reference is another model."""
    policy, other, evaluation = result
    tokenizer = policy.tokenizer
    engine = NativeEngine(policy.model, tokenizer, head_logits=head_logits)
    controls = Controls.resolve(Sampling(temperature=0.0, max_new_tokens=10, repetition_penalty=1.2), tokenizer, (256,))
    evaluator = Evaluator(ITEMS, controls, "rouge_l", judge=policy.reference())
    judged, alone = evaluator(engine, policy, other), Evaluator(ITEMS, controls, "rouge_l")(engine, policy, None)
    for name in ("perplexity", "rouge_l"):
        assert judged.summary["metrics"][name] == pytest.approx(alone.summary["metrics"][name], abs=1e-5)
    assert judged.summary["metrics"]["perplexity"] < evaluation.summary["metrics"]["perplexity"] - 1
    assert judged.rows[0]["streams"]["ref_logprob"] == evaluation.rows[0]["streams"]["ref_logprob"]


def test_perplexity_is_that_of_the_reference_on_the_plain_distribution(result):
    _, other, evaluation = result
    total = count = 0
    for row in evaluation.rows:
        ids = torch.tensor([row["tokens"]["id"]])
        actions = [k for k, acts in enumerate(row["tokens"]["action"]) if acts]
        with torch.no_grad():
            logprobs = other._copy(ids).logits.log_softmax(-1)
        total -= sum(logprobs[0, k - 1, ids[0, k]].item() for k in actions)
        count += len(actions)
    assert evaluation.summary["metrics"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_each_token_of_each_answer_has_its_streams(result):
    for row in result[2].rows:
        width = len(row["tokens"]["id"])
        assert {"reward/length", "reward/total", "logprob", "ref_logprob", "kl", "entropy"} <= set(row["streams"])
        assert {len(column) for column in row["streams"].values()} == {width}
        assert sum(row["streams"]["reward/length"]) == pytest.approx(0.5 * len(row["output"]))
        assert "".join(row["tokens"]["piece"]).removesuffix("<eos>").endswith(row["output"])


def test_an_unknown_metric_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'rouge_l'"):
        Evaluator(ITEMS, Controls(), "rougel")


@pytest.fixture
def evaluated():
    """`evaluated(**settings)`: the evaluation of a tiny model by an evaluator with these settings."""

    def evaluate(metric="rouge_l", **settings):
        tokenizer = byte_tokenizer()
        policy = Policy(tiny_model(seed=1), tokenizer, precision="float32")
        engine = NativeEngine(policy.model, tokenizer, head_logits=head_logits)
        controls = Controls.resolve(Sampling(temperature=0.0, max_new_tokens=10), tokenizer, (256,))
        return Evaluator(ITEMS, controls, metric, **settings)(engine, policy, None)

    return evaluate


def test_further_metrics_are_measured_where_asked_for_or_followed(evaluated):
    plain = evaluated()
    assert not {"coverage", "self_bleu", "ter"} & set(plain.summary["metrics"])
    found = evaluated("compression", further=("coverage", "self_bleu", "ter"))
    assert {"coverage", "self_bleu", "ter", "compression"} <= set(found.summary["metrics"])
    for row, source in zip(found.rows, ("one two", "Three is odd. Four is not."), strict=True):
        assert row["metrics"]["compression"] == compression(row["output"], source)
    copied = found.summary["baselines"]["copy"]
    assert copied["coverage"] == copied["compression"] == 1
    assert "ter" not in copied


def test_rewards_beside_measure_what_is_held_out_and_may_be_followed(evaluated):
    found = evaluated("beside/length", beside=[Weighted(length, 2.0, "length").fixed()])
    assert found.summary["main"] == "beside/length"
    sums = [2.0 * len(row["output"]) for row in found.rows]
    assert [row["metrics"]["beside/length"] for row in found.rows] == pytest.approx(sums)
    assert found.summary["metrics"]["beside/length"] == pytest.approx(sum(sums) / 2)
    assert "beside/length" in found.summary["intervals"]
    assert "reward/length" not in found.rows[0]["streams"]
    assert find("beside/length", HELD_OUT).better == "higher"


def test_an_unknown_further_metric_is_refused():
    with pytest.raises(ConfigError, match=r"evaluation.further: unknown 'converage'; did you mean 'coverage'"):
        Evaluator(ITEMS, Controls(), "rouge_l", further=("converage",))


@pytest.mark.parametrize("name", [*FURTHER_ITEM_METRICS, *FURTHER_CORPUS_METRICS, MAUVE])
def test_every_further_metric_is_in_the_glossary(name):
    assert name in HELD_OUT
