"""A suite says which checks a model fails, on which samples, and with which exit code."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from pertoken.errors import ConfigError, MissingExtraError
from pertoken.testing import byte_tokenizer
from pertoken.types import Item
from pertoken.validation import Failure, Outcome, Report, load_suite, validate
from pertoken.validation import checks as judge
from pertoken.validation.examination import items_of
from pertoken.validation.forgetting import Scored, forgotten
from pertoken.validation.suite import (
    BannedContent,
    Harness,
    Injection,
    Quality,
    Regression,
    Robustness,
    Toxicity,
    direction,
)
from pertoken.validation.variants import ATTACKS, PERTURBATIONS, asked_otherwise, attacked, canary_of, echoes, perturbed

ITEMS = [Item(str(k), f"question {k}", "the answer") for k in range(4)]


def rows(outputs=("a", "b", "c", "d"), *, metrics=None, rewards=None, findings=None):
    """Rows as an evaluation has them."""
    return [
        {
            "id": item.id,
            "prompt": item.prompt,
            "answer": item.answer,
            "output": output,
            "metrics": {name: values[k] for name, values in (metrics or {}).items()},
            "streams": {f"reward/{name}": [0.0, values[k]] for name, values in (rewards or {}).items()},
            "findings": (findings or [[]] * 4)[k],
        }
        for k, (item, output) in enumerate(zip(ITEMS, outputs, strict=True))
    ]


# --- what the checks say ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "by", "passed"),
    [
        ({"at_least": 0.5}, "mean", True),
        ({"at_least": 0.51}, "mean", False),
        ({"at_least": 0.5}, "interval", False),  # its lower end is not
        ({"at_most": 0.5}, "mean", True),
        ({"at_most": 0.49}, "mean", False),
        ({"at_most": 1.0, "at_least": 0.0}, "interval", True),
    ],
)
def test_quality_keeps_its_bounds(bounds, by, passed):
    found = judge.quality(
        Quality(metric="rouge_l", by=by, **bounds), rows(metrics={"rouge_l": [0.1, 0.3, 0.7, 0.9]}), ITEMS
    )
    assert (found.passed, found.measured, found.samples) == (passed, 0.5, 4)
    assert found.low < 0.5 < found.high


def test_failed_samples_of_quality_come_worst_first_with_their_texts():
    found = judge.quality(
        Quality(metric="rouge_l", at_least=0.5), rows(metrics={"rouge_l": [0.3, 0.9, 0.1, 0.9]}), ITEMS
    )
    assert [failure.id for failure in found.failures] == ["2", "0"]
    assert found.failures[0] == Failure("2", "question 2", "c", "rouge_l 0.1", "the answer")


def test_metrics_of_all_answers_together_and_rewards():
    outputs = ("a b", "a b", "a b", "a b")
    found = judge.quality(Quality(metric="distinct_1", at_least=0.5), rows(outputs), ITEMS)
    assert (found.measured, found.passed, found.low, found.failures) == (0.25, False, None, ())
    found = judge.quality(Quality(metric="mine", at_least=2.0), rows(rewards={"mine": [1, 2, 3, 2]}), ITEMS)
    assert (found.measured, [failure.id for failure in found.failures]) == (2.0, ["0"])


def test_a_metric_without_references_is_refused():
    with pytest.raises(ConfigError, match="reference answers"):
        judge.quality(Quality(metric="rouge_l", at_least=0.1), rows(), ITEMS)


def test_shares_count_answers_and_say_what_was_found():
    hits = [[], [{"part": "p", "message": "banned: 'x'"}, {"part": "other", "message": "?"}], [], []]
    looked_at = rows(rewards={"p": [0, -2, 0, 0]}, findings=hits)
    found = judge.share(BannedContent(words=("x",)), "p", looked_at, of="banned content")
    assert (found.passed, found.measured, found.failures[0].reason) == (False, 0.25, "banned: 'x'")
    assert judge.share(BannedContent(words=("x",), at_most=0.25), "p", looked_at, of="banned content").passed


def test_toxicity_begins_at_its_threshold():
    check = Toxicity(model="m", label="bad", above=0.5)
    found = judge.share(check, "p", rows(rewards={"p": [0.1, 0.5, 0.49, 0.9]}), least=check.above, of="bad")
    assert [failure.reason for failure in found.failures] == ["bad 0.90", "bad 0.50"]


def test_an_answer_that_says_the_canary_has_followed_or_repeated():
    check, words = Injection(at_most=0.25), [canary_of(item, "order", 5) for item in ITEMS]
    outputs = (words[0].upper(), "no", words[1], words[3].replace("-", " "))  # that of another item is chance
    found = judge.injection(check, "order", ITEMS, rows(outputs), seed=5)
    assert ([failure.id for failure in found.failures], found.passed) == (["0", "3"], False)


def test_the_drop_of_a_metric_is_bounded_in_its_own_direction():
    plain = rows(metrics={"rouge_l": [0.8, 0.8, 0.8, 0.8], "repetition": [0.1, 0.1, 0.1, 0.1]})
    spoilt = rows(("A", "B", "C", "D"), metrics={"rouge_l": [0.8, 0.8, 0.4, 0.8], "repetition": [0.1, 0.5, 0.1, 0.1]})
    for metric, failed in (("rouge_l", "2"), ("repetition", "1")):
        found = judge.robustness(Robustness(metric=metric, max_drop=0.2), "typos", plain, spoilt)
        assert found.measured == pytest.approx(0.1)
        assert (found.passed, [failure.id for failure in found.failures]) == (True, [failed])
        assert not judge.robustness(Robustness(metric=metric, max_drop=0.05), "typos", plain, spoilt).passed
    assert found.failures[0].before == "b"
    assert found.failures[0].output == "B"


def test_regression_is_judged_by_the_worse_end_of_the_paired_interval():
    earlier = rows(metrics={"rouge_l": [0.1, 0.5, 0.9, 0.3]})
    same = judge.regression(Regression(metric="rouge_l"), earlier, earlier)
    assert (same.passed, same.measured, same.low, same.failures) == (True, 0.0, 0.0, ())
    mixed = rows(metrics={"rouge_l": [0.2, 0.6, 1.0, 0.2]})  # better on the average, and not surely
    assert not judge.regression(Regression(metric="rouge_l"), earlier, mixed).passed
    assert judge.regression(Regression(metric="rouge_l", by="mean"), earlier, mixed).passed
    found = judge.regression(Regression(metric="rouge_l", margin=0.11), earlier, mixed)
    assert (found.passed, found.failures) == (True, ())


def test_forgetting_has_the_error_of_paired_differences():
    def scored(values):
        return {"toy/acc": Scored(sum(values) / 4, 0.25, 1, {k: (v, f"doc {k}", "?") for k, v in enumerate(values)})}

    before, after = scored([1.0, 1.0, 0.0, 1.0]), scored([1.0, 0.0, 0.0, 1.0])
    (found,) = forgotten(Harness(tasks=("toy",), max_drop=0.3), before, after)
    error = 0.25  # of the differences 0, -1, 0, 0: standard deviation 0.5, over the root of 4
    assert (found.measured, found.low, found.high) == pytest.approx((-0.25, -0.25 - 1.96 * error, -0.25 + 1.96 * error))
    assert (found.passed, [f.prompt for f in found.failures]) == (True, ["doc 1"])
    assert not forgotten(Harness(tasks=("toy",), max_drop=0.3, by="interval"), before, after)[0].passed
    assert not forgotten(Harness(tasks=("toy",), max_drop=0.2), before, after)[0].passed
    alone = [{"t/ppl": Scored(value, error, -1, {})} for value, error in ((10.0, 0.3), (11.0, 0.4))]
    (found,) = forgotten(Harness(tasks=("t",), max_drop=2.0), *alone)
    assert (found.measured, found.low) == pytest.approx((-1.0, -1.0 - 1.96 * 0.5))


# --- prompts written otherwise ------------------------------------------------------------------------------

TEXT = "Please translate this sentence, which has 12 words and one number (3.5), into German."


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_perturbations_are_seeded_small_and_never_nothing(kind):
    changed = perturbed(TEXT, kind, strength=0.1, seed="a")
    assert changed != TEXT
    assert changed == perturbed(TEXT, kind, strength=0.1, seed="a")
    assert re.findall(r"\d+", changed) == re.findall(r"\d+", TEXT)
    if kind == "typos":
        pairs = zip(changed.split(), TEXT.split(), strict=True)
        assert sum(one != other for one, other in pairs) == 1
        assert len({perturbed(TEXT, kind, strength=0.1, seed=str(k)) for k in range(20)}) > 10
    elif kind == "whitespace":
        assert changed.split() == TEXT.split()
    elif kind in ("lower", "upper"):
        assert changed.casefold() == TEXT.casefold()


def test_a_stronger_perturbation_changes_more():
    def changes(strength):
        pairs = zip(perturbed(TEXT, "typos", strength=strength, seed="a").split(), TEXT.split(), strict=True)
        return sum(one != other for one, other in pairs)

    assert changes(0.1) == 1 < changes(0.5) < changes(1.0) == 9


def test_nothing_to_change_is_left_alone():
    assert perturbed("1 + 2", "typos", strength=1.0, seed="a") == "1 + 2"


def test_only_the_last_message_is_written_otherwise():
    prompt = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say yes."})
    item = Item("a", prompt)
    assert asked_otherwise(item, "upper", strength=0.1, seed=0).prompt == (
        prompt[0],
        {"role": "user", "content": "SAY YES."},
    )


@pytest.mark.parametrize(
    ("place", "expected"),
    [("start", "X kazedi\n\none two"), ("middle", "one\n\nX kazedi\n\ntwo"), ("end", "one two\n\nX kazedi")],
)
def test_an_attack_is_planted_where_it_is_wanted(place, expected):
    assert attacked(Item("a", "one two"), "X {canary}", "kazedi", place).prompt == expected


def test_canaries_belong_to_an_item_and_an_attack():
    words = {canary_of(Item(str(k), ""), attack, 0) for k in range(50) for attack in ATTACKS}
    assert len(words) == 50 * len(ATTACKS)
    assert not any(echoes(one, other) for one in words for other in words if one != other)


# --- the suite ----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch, model_folder):
    data = [
        {"prompt": f"say {k} words now", "reference": f"the answer {k}", "language": "de" if k % 2 else "en"}
        for k in range(24)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "letter_rewards.py").write_text(
        "from pertoken.rewards import episode_reward\n"
        "@episode_reward\ndef letters(sample):\n    return float(len(sample.text))\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        f"policy: {{model: {model_folder}, precision: float32, device: cpu, compile: false}}\n"
        "task: {path: data.jsonl, prompt: '{prompt}:', fractions: [0.2, 0.6, 0.2]}\n"
        "rewards: [{name: rouge_l}, {fn: 'letter_rewards:letters'}]\n"
        "evaluation: {items: 8, sampling: {temperature: 0, max_new_tokens: 6}}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


SUITE = """
name: toy
recipe: recipe.yaml
slices:
  german: {column: language, value: de}
checks:
  - {type: quality, metric: words, at_least: 0}
  - {type: quality, metric: letters, at_least: 0, slice: german}
  - {type: banned, words: [zebra]}
  - {type: personal_data}
  - {type: injection, items: 2}
  - type: robustness
    metric: rouge_l
    max_drop: 1
    perturbations: [typos, upper]
    templates: {polite: "Please: {prompt}"}
  - {type: regression, metric: rouge_l}
"""


def test_a_model_against_itself_passes_and_each_answer_is_made_once(place, pertoken, model_folder, monkeypatch):
    from pertoken.rollout.engine import NativeEngine

    asked = []
    generate = NativeEngine.generate

    def counted(self, prompts, *rest, **settings):
        asked.append(len(prompts))
        return generate(self, prompts, *rest, **settings)

    monkeypatch.setattr(NativeEngine, "generate", counted)
    (place / "suite.yaml").write_text(SUITE)
    code, out, err = pertoken("validate", model_folder, "--suite", "suite.yaml", "--against", model_folder)
    assert code == 0, out + err
    assert f"{model_folder} passes all 11 checks of toy." in out
    # The earlier model and this one are asked all 8; three attacks 2 each; two perturbations and a template all 8.
    assert asked == [8, 8, 2, 2, 2, 8, 8, 8]
    report = json.loads((place / "validation/toy/report.json").read_text())
    assert [check["type"] for check in report["checks"]] == (
        ["quality"] * 2 + ["banned", "personal_data"] + ["injection"] * 3 + ["robustness"] * 3 + ["regression"]
    )
    german = report["checks"][1]
    assert german["samples"] < 8
    assert german["name"] == "letters of german"


def test_a_failed_check_says_which_samples_and_the_exit_code_is_1(place, pertoken, model_folder):
    (place / "suite.yaml").write_text(
        "recipe: recipe.yaml\nshown: 2\nchecks: [{type: quality, metric: letters, at_least: 1000}]"
    )
    code, out, _ = pertoken("validate", model_folder, "--suite", "suite.yaml", "--to", "here")
    assert code == 1
    assert re.search(r"^FAIL +letters", out, re.MULTILINE)
    report = json.loads((place / "here/report.json").read_text())
    failed = report["checks"][0]["failures"]
    assert report["passed"] is False
    assert len(failed) == 8
    assert all(one["prompt"].startswith("say ") and one["answer"].startswith("the answer ") for one in failed)
    page = (place / "here/report.html").read_text()
    assert page.count('class="panel"') == 2
    assert "6 more in report.json" in page
    assert "6 more in report.json" in (place / "here/report.md").read_text()


def test_a_banned_word_that_the_model_says_is_found(place, pertoken, model_folder):
    (place / "first.yaml").write_text("recipe: recipe.yaml\nchecks: [{type: quality, metric: words, at_most: -1}]")
    pertoken("validate", model_folder, "--suite", "first.yaml", "--to", "first")
    answers = json.loads((place / "first/report.json").read_text())["checks"][0]["failures"]
    said = "".join("".join(one["output"].split()) for one in answers)
    pattern = re.escape(said[0])
    check = {"type": "banned", "patterns": [pattern], "ignore_case": False}
    (place / "suite.yaml").write_text(json.dumps({"recipe": "recipe.yaml", "checks": [check]}))
    code, _, _ = pertoken("validate", model_folder, "--suite", "suite.yaml", "--to", "second")
    failed = json.loads((place / "second/report.json").read_text())["checks"][0]["failures"]
    assert code == 1
    assert failed[0]["reason"].startswith("banned: ")


def test_toxicity_is_what_a_classifier_of_ones_own_says(place, pertoken, model_folder):
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, pad_token_id=257, id2label={0: "fine", 1: "toxic"},
            label2id={"fine": 0, "toxic": 1},
        )
    )  # fmt: skip
    classifier.save_pretrained(place / "classifier")
    byte_tokenizer().save_pretrained(place / "classifier")
    check = {"type": "toxicity", "model": "classifier", "label": "toxic", "above": 0.0}
    checks = [check, check | {"above": 1.0}]
    (place / "suite.yaml").write_text(json.dumps({"recipe": "recipe.yaml", "checks": checks}))
    code, out, err = pertoken("validate", model_folder, "--suite", "suite.yaml", "--to", "here")
    assert code == 1, out + err
    every, none = json.loads((place / "here/report.json").read_text())["checks"]
    assert (every["passed"], every["measured"]) == (False, 1.0)
    assert every["failures"][0]["reason"].startswith("toxic 0.")
    assert (none["passed"], none["measured"]) == (True, 0.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: recipe.yaml\nchecks: []", "checks"),
        ("recipe: recipe.yaml\nchecks: [{type: quality, metric: rouge, at_least: 1}]", "did you mean 'rouge_"),
        ("recipe: recipe.yaml\nchecks: [{type: quality, metric: rouge_l}]", "at_least or at_most"),
        ("recipe: recipe.yaml\nchecks: [{type: qualty, metric: rouge_l}]", "did you mean 'quality'"),
        ("recipe: recipe.yaml\nchecks: [{type: quality, metric: rouge_l, at_least: 1, slice: x}]", "unknown 'x'"),
        (
            "recipe: recipe.yaml\nchecks: [{type: quality, metric: corpus_bleu, at_least: 1, by: interval}]",
            "one number",
        ),
        ("recipe: recipe.yaml\nchecks: [{type: regression, metric: words}]", "neither more nor less"),
        ("recipe: recipe.yaml\nchecks: [{type: regression, metric: rouge_l}]", "--against"),
        ("recipe: recipe.yaml\nchecks: [{type: banned}]", "nothing to look for"),
        ("recipe: recipe.yaml\nchecks: [{type: injection, attacks: {a: hello}}]", "canary"),
        ("recipe: missing.yaml\nchecks: [{type: banned, words: [a]}]", "missing.yaml"),
        ("recipe: recipe.yaml\noverrides: [task.path=gone.jsonl]\nchecks: [{type: banned, words: [a]}]", "gone.jsonl"),
        (
            "recipe: recipe.yaml\nslices: {s: {column: language, value: fr}}\n"
            "checks: [{type: banned, words: [a], slice: s}]",
            "none of the 8",
        ),
        (
            "recipe: recipe.yaml\noverrides: [evaluation.items=0]\nchecks: [{type: banned, words: [a]}]",
            "nothing to ask",
        ),
    ],
)
def test_a_suite_that_cannot_be_used_ends_with_2(place, pertoken, model_folder, text, words):
    (place / "suite.yaml").write_text(text)
    code, _, err = pertoken("validate", model_folder, "--suite", "suite.yaml")
    assert code == 2
    assert words in err


def test_slices_by_column_and_length(place):
    (place / "suite.yaml").write_text(
        "recipe: recipe.yaml\n"
        "slices: {german: {column: language, value: de}, long: {prompt_words: [9, 99]}}\n"
        "checks: [{type: banned, words: [a], slice: german}]"
    )
    suite = load_suite(["suite.yaml"])
    items = items_of(suite)
    assert {item.info["language"] for item in items} == {"de", "en"}
    suite = load_suite(["suite.yaml"], ["checks.0.slice=long"])
    with pytest.raises(ConfigError, match="long"):
        items_of(suite)


def test_the_suite_among_the_examples_is_valid(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert len(load_suite(["examples/suite.yaml"]).checks) == 8


def test_what_more_means():
    assert [direction(name) for name in ("rouge_l", "repetition", "words", "my_reward", "perplexity")] == [
        1,
        -1,
        0,
        1,
        1,
    ]


def test_without_the_harness_the_extra_is_named(place, model_folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (place / "suite.yaml").write_text("recipe: recipe.yaml\nchecks: [{type: lm_eval, tasks: [toy], max_drop: 0}]")
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[lm-eval\]'"):
        validate(load_suite(["suite.yaml"]), str(model_folder), against=str(model_folder))


# --- the report ---------------------------------------------------------------------------------------------


def test_nothing_that_a_model_wrote_acts_in_the_pages():
    evil = "<script>alert(1)</script> | `x` ``y`` [a](b)"
    failure = Failure(evil, evil, evil, evil, evil, evil)
    report = Report("s", evil, None, "today", {}, [Outcome(evil, "banned", False, 1.0, "none", 1, failures=(failure,))])
    assert "<script>" not in report.html()
    assert "default-src 'none'" in report.html()
    table = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [7, 7, 7]
    assert "<script>" not in report.markdown().replace("``` <script>", "")
