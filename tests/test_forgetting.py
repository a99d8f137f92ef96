"""The lm-evaluation-harness on models of here, with a task of one's own: nothing is fetched."""

import json
from statistics import fmean

import pytest
import torch

from pertoken.errors import ConfigError
from pertoken.policy.model import Policy
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.validation.forgetting import forgotten, harness
from pertoken.validation.suite import Harness

pytest.importorskip("lm_eval")

DOCS = [{"question": f"{k} or {k + 1}?", "choices": [f" {k}", f" {k + 1}", " none"], "label": k % 3} for k in range(12)]


@pytest.fixture
def check(tmp_path):
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    task = {
        "task": "toy_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.yaml").write_text(json.dumps(task))  # JSON is YAML
    return Harness(tasks=("toy_choice",), folder=str(tmp_path / "tasks"), max_drop=0.0)


def policy_of(seed):
    return Policy(tiny_model(seed=seed), byte_tokenizer(), precision="float32")


def by_hand(policy, doc):
    """1 if the most probable choice is the right one."""
    tokenizer, scores = byte_tokenizer(), []
    for choice in doc["choices"]:
        prompt, ids = tokenizer.encode(doc["question"]), tokenizer.encode(choice)
        with torch.no_grad():
            logprobs = policy.hf_model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        scores.append(sum(logprobs[len(prompt) + k - 1, token].item() for k, token in enumerate(ids)))
    return float(max(range(3), key=scores.__getitem__) == doc["label"])


def test_the_figures_are_those_of_the_documents(check):
    policy = policy_of(1)
    found = harness(check, policy)["toy_choice/acc"]
    wanted = [by_hand(policy, doc) for doc in DOCS]
    assert [found.documents[k][0] for k in range(12)] == wanted
    assert found.value == pytest.approx(fmean(wanted))
    assert found.documents[3][1] == DOCS[3]["question"]
    assert found.better == 1


def test_nothing_is_forgotten_by_the_same_model_and_something_by_another(check):
    before, after = harness(check, policy_of(1)), harness(check, policy_of(2))
    (same,) = forgotten(check, before, before)
    assert (same.passed, same.measured, same.low, same.high) == (True, 0.0, 0.0, 0.0)
    (other,) = forgotten(check, before, after)
    assert other.measured == pytest.approx(after["toy_choice/acc"].value - before["toy_choice/acc"].value)
    assert other.passed == (other.measured >= 0)
    lost = [by_hand(policy_of(2), doc) < by_hand(policy_of(1), doc) for doc in DOCS]
    assert sorted(failure.prompt for failure in other.failures) == sorted(
        doc["question"] for doc, worse in zip(DOCS, lost, strict=True) if worse
    )


def test_an_unknown_task_is_named(check):
    with pytest.raises(ConfigError, match="no task 'toy_chioce'"):
        harness(check.model_copy(update={"tasks": ("toy_chioce",)}), policy_of(1))
