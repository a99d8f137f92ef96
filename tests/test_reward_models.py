"""Learned rewards: losses by hand, rows checked, training that learns, folders that load, figures that are right."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from pertoken.errors import ConfigError, ModelError, NumericsError, TaskError
from pertoken.preferences import bradley_terry
from pertoken.reward_models import evaluate, load_training, train
from pertoken.reward_models.evaluation import (
    binary_figures,
    calibration_error,
    label_figures,
    preference_figures,
    span_figures,
    temperature,
)
from pertoken.reward_models.examples import Pair, read_examples
from pertoken.reward_models.losses import centring, length_correlation, segment_sums
from pertoken.reward_models.settings import (
    DataSection,
    OptimiserSection,
    Pairs,
    Preferences,
    RewardTraining,
    Spans,
    Steps,
)
from pertoken.reward_models.training import _fit, _rate, batches, shared_tokens
from pertoken.rewards import Classifier, Entailment, Sample
from pertoken.rewards.align import align
from pertoken.rewards.token_model import TokenScorer
from pertoken.testing import byte_tokenizer
from pertoken.types import Item

WORDS = ["red", "blue", "dog", "cat", "ran", "sat", "the", "bad"]


@pytest.fixture(scope="session")
def trunk(tmp_path_factory):
    """A small random encoder whose words are tokens, saved as a folder."""
    folder = tmp_path_factory.mktemp("trunk")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", "##s"]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence(dice, length=6):
    return " ".join(dice.choices(WORDS[:-1], k=length))


def with_bad(text, dice):
    """The text with one word made bad, and where that is."""
    words = text.split()
    at = dice.randrange(len(words))
    start = sum(len(word) + 1 for word in words[:at])
    return " ".join([*words[:at], "bad", *words[at + 1 :]]), [start, start + 3]


@pytest.fixture
def make_sample():
    """A completion of `text`, one token a byte, for a prompt."""
    tokenizer = byte_tokenizer()

    def sample(text, prompt="?"):
        tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
        return Sample(Item("item-0", prompt, None), tokens, [True] * len(tokens), align(tokens, tokenizer), "eos")

    return sample


@pytest.fixture
def settings(trunk, tmp_path):
    def of(objective, rows, **changes):
        return RewardTraining.model_validate(
            {
                "folder": str(tmp_path / "model"),
                "objective": objective,
                "data": {"path": write(tmp_path / "data.jsonl", rows), **changes.pop("data", {})},
                "model": {"trunk": str(trunk), "trained": "all", **changes.pop("model", {})},
                "optimiser": {
                    "learning_rate": 5e-3,
                    "epochs": 3,
                    "batch": 16,
                    "patience": 99,
                    "evaluate_every": 30,
                    **changes,
                },
            }
        )

    return of


# --- losses -----------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    scores = torch.tensor(
        [[0.5, 1.0], [0.1, -0.4]], requires_grad=True
    )  # tokens of the chosen and of the rejected text
    totals = scores.sum(1)
    loss = bradley_terry(totals[:1], totals[1:]).mean()
    assert loss.item() == pytest.approx(0.1529777, abs=1e-6)  # log(1 + exp(-1.8))
    loss.backward()
    assert scores.grad.flatten().tolist() == pytest.approx(
        [-0.1418511] * 2 + [0.1418511] * 2, abs=1e-6
    )  # sigmoid(-1.8)


def test_penalties_by_hand():
    assert centring(torch.tensor([1.0, 0.5]), torch.tensor([2.0, -0.5])).item() == pytest.approx(4.5)
    scores = torch.tensor([1.0, 2.0, 6.0])
    assert length_correlation(scores, torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(25 / 28)
    assert length_correlation(scores, torch.tensor([2.0, 2.0, 2.0])).item() == 0.0
    sums = segment_sums(torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[0, 1], [1, -1]]), 3)
    assert sums.tolist() == [1.0, 6.0, 0.0]


def test_the_tokens_that_two_texts_share():
    assert shared_tokens([1, 2, 3], [1, 9, 3]) == [(0, 0), (2, 2)]
    assert shared_tokens([7, 8, 9], [7, 8, 8, 9]) == [(0, 0), (1, 1), (2, 3)]  # the second 8 is the addition
    assert shared_tokens([1, 2, 3, 4, 5], [9, 2, 8, 4, 7]) == [(1, 1), (3, 3)]
    assert shared_tokens([1], [1]) == [(0, 0)]
    assert shared_tokens([1], [2]) == []


# --- figures ----------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    assert calibration_error(np.array([0.9, 0.9, 0.6, 0.6, 0.6]), np.array([1, 1, 1, 0, 0])) == pytest.approx(
        (2 * 0.1 + 3 * (0.6 - 1 / 3)) / 5
    )
    margin = np.array([1.0, 1.0, 1.0, -1.0])  # right in three of four: sigmoid(1 / T) = 3/4
    assert temperature(lambda beta: float(np.logaddexp(0, -beta * margin).mean())) == pytest.approx(
        1 / np.log(3), rel=1e-4
    )


def test_preference_figures_by_hand():
    figures = preference_figures([2.0, 1.0, 0.0, 3.0], [1.0, 2.0, 0.0, 1.0], [(2, 4), (4, 2), (3, 3), (5, 6)])
    assert figures["accuracy"]["mean"] == pytest.approx(0.625)  # a tie is half
    assert figures["accuracy_where_longer_is_worse"] | {"low": 0, "high": 0} == {
        "mean": 1.0,
        "low": 0,
        "high": 0,
        "pairs": 2,
    }
    assert figures["accuracy_where_longer_is_better"]["mean"] == 0.0
    assert figures["mean_token_score_of_chosen"] == pytest.approx(6 / 14)
    assert figures["length_correlation"] == pytest.approx(
        np.corrcoef([2, 1, 0, 3, 1, 2, 0, 1], [2, 4, 3, 5, 4, 2, 3, 6])[0, 1]
    )


def test_span_figures_by_hand():
    texts = [[((0, 1), -2.0), ((2, 3), 0.0), ((4, 5), -1.0)], [((0, 1), 1.0), ((2, 3), -3.0)]]
    found = span_figures(texts, [[(0, 1)], [(2, 3)]], threshold=-1.0)
    assert (found.precision, found.recall, found.baseline) == (2 / 3, 1.0, 0.0)
    assert found.negative_share.mean == pytest.approx(5 / 6)
    assert span_figures(texts, [[(0, 1)], [(2, 3)]]).threshold == -2.0  # F1 is 1 there
    assert span_figures(texts, [[(0, 1)], [(2, 3)]], baseline=-1.0).negative_share.mean == pytest.approx(1.0)
    with pytest.raises(TaskError, match="no labelled range has a token"):
        span_figures(texts, [[], []])


def test_figures_of_labels_by_hand():
    figures = binary_figures([2.0, -1.0, 1.0, -3.0], [1.0, 0.0, 0.0, 0.9])
    assert (figures["accuracy"]["mean"], figures["most_frequent"]) == (0.5, 0.5)
    outputs = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    figures = label_figures(outputs, [0, 1, 1], ["no", "yes"])
    assert figures["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert figures["recall"] == {"no": 1.0, "yes": 0.5}


# --- rows -------------------------------------------------------------------------------------------------


def reasons(objective, rows, tmp_path):
    data = DataSection(path=write(tmp_path / "rows.jsonl", rows), max_bad_rows=99)
    return [bad.reason for bad in read_examples(objective, data).bad_rows]


def test_bad_rows_are_named(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert reasons(Preferences(), [good, good | {"rejected": "a"}, good | {"chosen": ""}], tmp_path) == [
        "columns 'chosen' and 'rejected' are the same text",
        "column 'chosen' is empty",
    ]
    good = {"text": "a cat", "spans": [[2, 5, -1]]}
    found = reasons(
        Spans(values={"odd": -1}),
        [good, good | {"spans": [[2, 9, -1]]}, good | {"spans": [[0, 1, "od"]]}, good | {"spans": [[0, 1]]}],
        tmp_path,
    )
    assert found == [
        "column 'spans': [2, 9] is no range of the text's 5 characters",
        "column 'spans': label 'od' has no value; did you mean 'odd'?",
        "column 'spans': expected [start, stop, value], got list '[0, 1]'",
    ]
    good = {"prompt": "p", "steps": ["a", "b"], "labels": [1, 0]}
    found = reasons(Steps(), [good, good | {"labels": [1]}, good | {"labels": [1, 2]}], tmp_path)
    assert found == [
        "2 steps in 'steps' and 1 in 'labels'",
        "column 'labels': expected labels from 0 to 1, got int '2'",
    ]
    good = {"premise": "a", "hypothesis": "b", "label": "yes"}
    assert reasons(Pairs(labels=("yes", "no")), [good, good | {"label": "ye"}], tmp_path) == [
        "column 'label': 'ye' is no label; did you mean 'yes'?"
    ]


def test_too_many_bad_rows_end_it_with_file_and_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    with pytest.raises(TaskError, match=r"1 unusable rows, data\.max_bad_rows allows 0.*\n.*rows\.jsonl:1: columns"):
        read_examples(Preferences(), DataSection(path=path))
    with pytest.raises(TaskError, match=r"no column 'choice': did you mean 'chosen'\?"):
        read_examples(Preferences(chosen="choice"), DataSection(path=path))


def test_spans_and_steps_are_characters_of_the_text(tmp_path):
    rows = [
        {"text": ["the", "bad", "dog"], "spans": [None, "odd", 0.5]},
        {"text": "a bad cat", "spans": json.dumps([[2, 5, "odd"]])},  # as a table has it
    ]
    data = DataSection(path=write(tmp_path / "rows.jsonl", rows), fractions=(1.0, 0.0, 0.0))
    found = {e.text: e.spans for e in read_examples(Spans(values={"odd": -2.0}), data).splits["train"]}
    assert found == {"the bad dog": (((4, 7), -2.0), ((8, 11), 0.5)), "a bad cat": (((2, 5), -2.0),)}
    rows = [{"meta": {"steps": ["a b", "c"]}, "labels": [True, 0.25]}]
    data = DataSection(path=write(tmp_path / "steps.jsonl", rows), fractions=(1.0, 0.0, 0.0))
    (found,) = read_examples(Steps(prompt=None, steps="meta.steps"), data).splits["train"]
    assert (found.text, found.spans) == ("a b\nc", (((0, 3), 1.0), ((4, 5), 0.25)))


def test_no_prompt_is_in_two_splits_and_no_example_is_held_out_and_trained_on(tmp_path):
    rows = [{"prompt": f"p{k % 20}", "chosen": f"a{k}", "rejected": "b"} for k in range(200)]
    splits = read_examples(Preferences(), DataSection(path=write(tmp_path / "rows.jsonl", rows))).splits
    prompts = [{e.prompt for e in splits[name]} for name in ("train", "validation", "test")]
    assert not (prompts[0] & prompts[1])
    assert not (prompts[0] & prompts[2])
    assert not (prompts[1] & prompts[2])
    paths = {name: write(tmp_path / f"{name}.jsonl", rows[:1]) for name in ("train", "validation")}
    with pytest.raises(TaskError, match=r"it is also in train .*train\.jsonl:1\), so it cannot be in validation"):
        read_examples(Preferences(), DataSection(path=paths))


def test_batches_have_every_example_once_and_follow_the_seed(tmp_path):
    rows = [{"prompt": f"p{k}", "chosen": "a" * (1 + k % 7), "rejected": "b"} for k in range(50)]
    data = DataSection(path=write(tmp_path / "rows.jsonl", rows), fractions=(1.0, 0.0, 0.0))
    pool = read_examples(Preferences(), data).splits["train"]
    cut = batches(pool, 8, 0, 0)
    assert sorted(e.prompt for batch in cut for e in batch) == sorted(e.prompt for e in pool)
    assert cut == batches(pool, 8, 0, 0)
    assert cut != batches(pool, 8, 0, 1)


# --- training ---------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls():
    settings = OptimiserSection(learning_rate=1.0, warmup=0.2)
    assert [_rate(settings, gone) for gone in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])


class Climber:
    """Each training step moves its weight up by about the learning rate; held out, 0.5 is best."""

    def __init__(self):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)

    def loss(self, examples):
        weight = self.model.weight.sum()
        return -weight if examples[0].second == "train" else (weight - 0.5).square()

    def save(self, folder, about): ...

    def figures(self, examples):
        return {}


def test_it_ends_when_held_out_examples_get_no_better_and_keeps_the_best_weights():
    learner = Climber()
    pool, held_out = ([Pair(str(k), split, "x") for k in range(100)] for split in ("train", "held out"))
    settings = OptimiserSection(batch=1, learning_rate=0.1, warmup=0.0, weight_decay=0.0, evaluate_every=1, patience=3)
    steps = _fit(learner, pool, held_out, settings, 0, lambda text: None)
    assert steps == 8  # 0.1, 0.2, ... and three looks past 0.5
    assert learner.model.weight.item() == pytest.approx(0.5, abs=0.05)
    settings = settings.model_copy(update={"seconds": 1e-9})
    assert _fit(Climber(), pool, held_out, settings, 0, lambda text: None) == 1  # the time is up


def test_a_loss_that_is_no_number_ends_it_with_a_sentence():
    learner = Climber()
    torch.nn.init.constant_(learner.model.weight, float("nan"))
    with pytest.raises(NumericsError, match=r"step 1: the loss is nan.*lower optimiser\.learning_rate"):
        _fit(learner, [Pair("a", "train", "x")], [Pair("a", "held out", "x")], OptimiserSection(), 0, lambda text: None)


def test_preferences_alone_find_the_planted_word(settings, tmp_path):
    dice = random.Random(0)
    texts = [sentence(dice) for _ in range(200)]
    planted = [with_bad(text, dice) for text in texts]
    rows = [{"chosen": text, "rejected": bad} for text, (bad, _) in zip(texts, planted, strict=True)]
    trained = train(
        settings(
            {"type": "preferences", "prompt": None, "shared": 1.0, "sparsity": 0.02},
            rows,
            epochs=6,
            model={"sign": "cost"},
        )
    )
    assert trained.figures["accuracy"]["low"] > 0.9
    found = [with_bad(sentence(dice), dice) for _ in range(100)]
    spans = write(tmp_path / "spans.jsonl", [{"text": text, "spans": [[*span, -1]]} for text, span in found])
    measured = evaluate(trained.folder, spans, {"type": "spans"})
    assert measured.figures["negative_share"]["low"] > 0.9
    assert measured.figures["recall"] > 0.95
    again = TokenScorer.load(trained.folder)
    assert all(value <= 0 for _, value in again.values(found[0][0]))


def test_spans_are_learned_with_their_value(settings):
    dice = random.Random(1)
    rows = []
    for _ in range(240):
        text, span = with_bad(sentence(dice), dice)
        rows.append({"text": text, "spans": [[*span, "wrong"]]})
    trained = train(settings({"type": "spans", "values": {"wrong": -2.0}}, rows, epochs=8))
    assert trained.figures["negative_share"]["mean"] > 0.8
    scorer = TokenScorer.load(trained.folder)
    assert dict(scorer.values("the bad dog sat"))[(4, 7)] == pytest.approx(-2.0, abs=0.4)


def test_steps_are_learned_as_log_odds(settings, tmp_path):
    dice = random.Random(2)
    rows = []
    for k in range(240):
        steps = [sentence(dice, 3) for _ in range(3)]
        wrong = dice.randrange(3)
        steps[wrong] = with_bad(steps[wrong], dice)[0]
        rows.append({"prompt": f"the cat {k}", "steps": steps, "labels": [int(k != wrong) for k in range(3)]})
    trained = train(settings({"type": "steps"}, rows, epochs=6))
    assert trained.figures["accuracy"]["low"] > 0.9
    assert trained.figures["first_error_found"]["mean"] > 0.8
    assert evaluate(trained.folder, str(tmp_path / "data.jsonl")).figures["accuracy"]["mean"] > 0.9


def test_pairs_make_a_folder_for_entailment_and_classifier(settings, tmp_path, make_sample):
    dice = random.Random(3)
    rows = []
    for _ in range(400):
        label = dice.choice(["entailment", "contradiction"])
        second = sentence(dice, 3) if label == "entailment" else with_bad(sentence(dice, 3), dice)[0]
        rows.append({"premise": sentence(dice, 3), "hypothesis": second, "label": label})
    trained = train(settings({"type": "pairs"}, rows, epochs=6))
    assert trained.figures["accuracy"]["low"] > 0.9
    folder = str(trained.folder)
    assert evaluate(trained.folder, str(tmp_path / "data.jsonl")).figures["accuracy"]["low"] > 0.9
    for reward in (Entailment(folder), Classifier(folder, label="entailment", output="log_odds", against="prompt")):
        good, bad = (
            sum(reward.token_values(make_sample(text, "the cat sat"))) for text in ("the dog ran", "the bad dog")
        )
        assert good > 0 > bad


def test_the_same_seed_gives_the_same_model(settings, tmp_path):
    dice = random.Random(4)
    rows = [{"chosen": text, "rejected": with_bad(text, dice)[0]} for text in (sentence(dice) for _ in range(100))]
    config = settings({"type": "preferences", "prompt": None}, rows, epochs=1)
    one = TokenScorer.load(train(config).folder)
    two = TokenScorer.load(train(config.model_copy(update={"folder": str(tmp_path / "other")})).folder)
    assert one.values("the bad cat") == two.values("the bad cat")


@pytest.mark.parametrize("trained", ["layers", "head"])
def test_what_is_frozen_stays(trained, settings, trunk):
    dice = random.Random(5)
    rows = [{"chosen": text, "rejected": with_bad(text, dice)[0]} for text in (sentence(dice) for _ in range(100))]
    config = settings({"type": "preferences", "prompt": None}, rows, epochs=1, model={"trained": trained})
    after = TokenScorer.load(train(config).folder).trunk.state_dict()
    before = BertModel.from_pretrained(trunk).state_dict()
    moved = {name for name in before if "pooler" not in name and not torch.equal(before[name], after[name])}
    assert not any("word_embeddings" in name for name in moved)
    assert bool(moved) == (trained == "layers")


def test_a_length_penalty_takes_length_out_of_the_score(settings):
    dice = random.Random(6)
    rows = []
    for k in range(200):
        better, worse = sentence(dice, 8), sentence(dice, 4)
        rows.append({"prompt": f"the {k}", "chosen": better, "rejected": worse})
    plain = {"type": "preferences", "prompt": None}
    biased = train(settings(plain, rows, epochs=2)).figures
    config = settings(plain | {"length": 30.0}, rows, epochs=2)
    mended = train(config.model_copy(update={"folder": config.folder + "2"})).figures
    assert biased["length_correlation"] > 0.9
    assert abs(mended["length_correlation"]) < 0.6


# --- folders, faults, command line ------------------------------------------------------------------------


def test_a_folder_that_is_there_is_never_overwritten(settings, tmp_path):
    rows = [{"chosen": "a", "rejected": "b"}]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x").write_text("mine")
    with pytest.raises(ConfigError, match=r"folder: .* exists already"):
        train(settings({"type": "preferences", "prompt": None}, rows))


def test_settings_that_cannot_work():
    base = {"folder": "x", "data.path": "y"}

    def load(**values):
        return load_training([], [f"{key}={value}" for key, value in (base | values).items()])

    with pytest.raises(ConfigError, match=r"steps learns log-odds"):
        load(**{"objective.type": "steps", "model.sign": "cost"})
    with pytest.raises(ConfigError, match=r"objective\.type: unknown type 'preference'; did you mean 'preferences'\?"):
        load(**{"objective.type": "preference"})
    with pytest.raises(ConfigError, match=r"optimiser\.epoch: unknown key in optimiser; did you mean 'epochs'\?"):
        load(**{"objective.type": "spans", "optimiser.epoch": 3})
    assert load(**{"objective.type": "pairs"}).objective == Pairs()


def test_a_trunk_that_is_none(settings):
    rows = [{"chosen": f"a {k}", "rejected": "b"} for k in range(40)]
    with pytest.raises(ModelError, match=r"model\.trunk: '/no/such' is no model in safetensors"):
        train(settings({"type": "preferences", "prompt": None}, rows, model={"trunk": "/no/such"}))


def test_the_commands(pertoken, trunk, tmp_path):
    dice = random.Random(7)
    rows = [{"chosen": text, "rejected": with_bad(text, dice)[0]} for text in (sentence(dice) for _ in range(80))]
    data = write(tmp_path / "data.jsonl", [*rows, {"chosen": "a"}])
    recipe = tmp_path / "reward.yaml"
    recipe.write_text(
        f"folder: {tmp_path / 'model'}\nobjective: {{type: preferences, prompt: null}}\n"
        f"data: {{path: {data}, max_bad_rows: 1}}\nmodel: {{trunk: {trunk}, trained: all}}\n"
    )
    code, out, _ = pertoken("reward", "train", recipe, "--dry-run")
    assert (code, "shared: 0.0" in out) == (0, True)
    code, out, _ = pertoken("reward", "train", recipe, "optimiser.learning_rate=0.003")
    assert code == 0
    assert f"skipped {data}:81: no column 'rejected'" in out
    assert "accuracy" in out
    about = json.loads((tmp_path / "model" / "reward.json").read_text())
    assert (about["version"], about["examples"]["skipped"]) == (1, 1)
    assert "| accuracy |" in (tmp_path / "model" / "README.md").read_text()
    code, out, _ = pertoken("reward", "evaluate", tmp_path / "model", data)
    assert code == 0
    assert "length correlation" in out
    saved = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert saved["figures"]["pairs"] == 80
    code, _, err = pertoken("reward", "evaluate", tmp_path, data)
    assert (code, "is no folder of `pertoken reward train`" in err) == (1, True)
    code, _, err = pertoken("reward", "evaluate", tmp_path / "model", data, "chosen=choice")
    assert (code, "no column 'choice'" in err) == (1, True)
