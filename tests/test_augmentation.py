"""From settings to changed copies; back-translation by two models, asked once for each text."""

import json

import pytest

from pertoken import augmentation
from pertoken.assembly import build_task
from pertoken.augmentation import back_translation, build_augmentation, translate
from pertoken.config import AugmentConfig, BackTranslationConfig, FileTask, RunConfig, validate
from pertoken.errors import ConfigError
from pertoken.testing import byte_tokenizer, tiny_encoder_decoder

MODELS = BackTranslationConfig(there="to-german", back="to-english")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def asked(monkeypatch):
    """What models were asked; they answer with what they are called and what they were told."""
    calls = []

    def answer(model, prompt, sentences):
        calls.append((model, list(sentences)))
        return [f"{sentence[:-1]} {model[3]}." for sentence in sentences]

    monkeypatch.setattr(augmentation, "translate", answer)
    return calls


def test_texts_go_there_and_back_sentence_by_sentence_and_are_asked_for_once(asked):
    rewrite = back_translation(MODELS)
    assert rewrite(["It rains. It pours.", "Stop."], [0, 1]) == ["It rains g e. It pours g e.", "Stop g e."]
    assert asked == [
        ("to-german", ["It rains.", "It pours.", "Stop."]),
        ("to-english", ["It rains g.", "It pours g.", "Stop g."]),
    ]
    assert rewrite(["Stop.", "Go.", "Stop."], [5, 6, 7]) == ["Stop g e.", "Go g e.", "Stop g e."]
    assert asked[2:] == [("to-german", ["Go."]), ("to-english", ["Go g."])]
    assert back_translation(MODELS)(["Go."], [0]) == ["Go g e."]
    assert len(asked) == 4, "what is known is kept"


def test_what_a_kill_left_half_written_is_asked_for_again(asked, killed_at):
    """Before each file operation of keeping a text; and a file that was cut at any byte, as older versions left it."""
    operation = 1
    while killed_at(operation, lambda: back_translation(MODELS)(["Stop."], [0])):
        assert back_translation(MODELS)(["Stop."], [0]) == ["Stop g e."]
        augmentation._place(MODELS, "Stop.").unlink()
        operation += 1
    assert operation > 2
    place = augmentation._place(MODELS, "Stop.")
    whole = place.read_bytes()
    for content in (*(whole[:cut] for cut in range(len(whole))), b"3", b"[" * 2000, b"\xff"):
        place.write_bytes(content)
        assert back_translation(MODELS)(["Stop."], [0]) == ["Stop g e."]
        assert place.read_bytes() == whole


def test_a_model_translates_and_batches_change_nothing(tmp_path):
    tiny_encoder_decoder("marian").save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    both = translate(str(tmp_path / "m"), "{text}", ["ab", "wxyz"])
    assert both == [translate(str(tmp_path / "m"), "{text}", [text])[0] for text in ("ab", "wxyz")]


def test_settings_become_ways_and_templates():
    made = build_augmentation(AugmentConfig(word_dropout=0.1, prompts=("{a}?",), back_translation=MODELS, share=0.5))
    assert list(made.rewrites) == ["word_dropout", "back_translation"]
    assert (made.share, made.prompts[0].render({"a": "b"})) == (0.5, "b?")
    assert not build_augmentation(AugmentConfig()).rewrites


def test_a_task_has_copies_where_it_learns_and_none_where_it_is_measured(tmp_path, asked):
    rows = [{"prompt": f"Day {k}.", "reference": "r"} for k in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = FileTask(path=str(tmp_path / "rows.jsonl"), augment=AugmentConfig(back_translation=MODELS))
    task, plain = build_task(config), build_task(config, augment=False)
    train = plain.items("train")
    assert len(task.items("train")) == 2 * len(train)
    assert task.items("test") == plain.items("test")
    assert task.items("train")[len(train)].prompt[0]["content"] == f"{train[0].prompt[0]['content'][:-1]} g e."


def test_folds_go_without():
    with pytest.raises(ConfigError, match="copies of one that is held out would be learnt from"):
        validate({"task": {"path": "x.jsonl", "fold": {"count": 3}, "augment": {"word_dropout": 0.1}}}, RunConfig)
