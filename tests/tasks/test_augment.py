"""Changed copies of training items: what they say, how many, and that nothing held out is touched."""

import json
from pathlib import Path

import numpy as np
import pytest

from pertoken.errors import TaskError
from pertoken.tasks.augment import Augmentation, synonyms, word_dropout, wordnet
from pertoken.tasks.base import PromptTemplate, check_task
from pertoken.tasks.files import load_file_task
from pertoken.tasks.layouts import Layout

WORDS = "one two three four five six seven eight nine ten"


def write(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shout(texts, seeds):
    return [text.upper() for text in texts]


def load(folder: Path, augment: Augmentation | None, count: int = 60, **settings):
    path = write(folder, [{"prompt": f"ask {k} of it", "reference": f"answer {k}"} for k in range(count)])
    return load_file_task(path, prompt="Please {prompt}", augment=augment, **settings)


def test_each_training_item_has_a_copy_and_held_out_ones_stay_as_they_are(tmp_path):
    plain, more = load(tmp_path, None), load(tmp_path, Augmentation({"shout": shout}))
    train = plain.items("train")
    assert more.items("train")[: len(train)] == train
    copies = more.items("train")[len(train) :]
    assert [(c.id, c.prompt, c.answer) for c in copies] == [
        (f"{item.id}~shout", f"Please {item.prompt[7:].upper()}", item.answer) for item in train
    ]
    assert all(more.items(split) == plain.items(split) for split in ("validation", "test"))
    assert more.notes == (f"task.augment.shout: {len(train)} more train items from {len(train)}",)
    assert plain.notes == ()
    check_task(more)


def test_a_copy_that_asks_what_a_held_out_item_asks_is_left_out(tmp_path):
    held_out = load(tmp_path, None).items("test")[0]

    def leak(texts, seeds):
        return [held_out.prompt.removeprefix("Please ") for _ in texts]

    task = load(tmp_path, Augmentation({"leak": leak}))
    assert task.items("train") == load(tmp_path, None).items("train")
    assert task.notes[0].startswith("task.augment.leak: 0 more train items from ")
    assert "left out" in task.notes[0]


def test_a_share_is_drawn_by_item_and_seed_and_not_by_order(tmp_path):
    def chosen(seed, count=60):
        task = load(tmp_path, Augmentation({"shout": shout}, share=0.5, seed=seed), count, fractions=(1.0, 0.0, 0.0))
        return {item.id for item in task.items("train") if "~" in item.id}

    assert 15 < len(chosen(0)) < 45
    assert chosen(0) != chosen(1)
    assert chosen(0, 30) == {name for name in chosen(0) if int(name[4:].partition("~")[0]) <= 30}


def test_a_copy_that_lost_the_answer_in_its_text_is_left_out(tmp_path):
    rows = [{"context": "Ann lives in Rome.", "question": "Where?", "answer": "Rome"}]
    layout = Layout("{context}\n{question}", answer="answer", source="context")

    def without(word):
        return lambda texts, seeds: [text.replace(word, "") for text in texts]

    augment = Augmentation({"rome": without("Rome"), "ann": without("Ann ")})
    task = load_file_task(write(tmp_path, rows), layouts=[layout], augment=augment, fractions=(1.0, 0.0, 0.0))
    assert [item.prompt for item in task.items("train")] == ["Ann lives in Rome.\nWhere?", "lives in Rome.\nWhere?"]
    assert task.items("train")[1].info["source"] == "lives in Rome."
    assert task.notes[0] == "task.augment.rome: 0 more train items from 1, 1 left out"


def test_other_templates_make_copies_of_the_rows_that_have_their_columns(tmp_path):
    augment = Augmentation({}, (PromptTemplate("Would you {prompt}?"), PromptTemplate("{nothing}")))
    task = load(tmp_path, augment, 3, fractions=(1.0, 0.0, 0.0))
    assert [item.prompt for item in task.items("train")][3:] == [f"Would you ask {k} of it?" for k in range(3)]
    assert task.notes == (
        "task.augment.prompts.0: 3 more train items from 3",
        "task.augment.prompts.1: 0 more train items from 3, 3 left out",
    )


def test_dropped_words_are_drawn_alone_by_their_seed():
    drop = word_dropout(0.3)
    texts = drop([WORDS] * 400, list(range(400)))
    kept = [text.split() for text in texts]
    assert np.mean([len(words) for words in kept]) == pytest.approx(7, abs=0.3)
    order = WORDS.split()
    assert all(words == [word for word in order if word in words] for words in kept)
    assert drop([WORDS], [5]) == drop(["x", WORDS], [1, 5])[1:]


def test_one_word_stays_and_chinese_characters_are_words():
    assert word_dropout(0.999)(["alone"], [0]) == ["alone"]
    (text,) = word_dropout(0.5)(["猫坐在垫子上面"], [2])
    assert 0 < len(text) < 7


def test_synonyms_keep_capitals_and_leave_unknown_words():
    known = {"big": ["large"], "cat": ["tomcat"]}
    replace = synonyms(1.0, lambda word: known.get(word, ()))
    assert replace(["Big cats: a big cat."], [0]) == ["Large cats: a large tomcat."]
    assert synonyms(0.0, lambda word: ["x"])(["Big cat"], [0]) == ["Big cat"]


def test_without_wordnet_the_error_says_what_to_run(monkeypatch, tmp_path):
    import nltk
    from nltk.corpus import wordnet as reader

    if isinstance(reader, nltk.corpus.reader.WordNetCorpusReader):
        pytest.skip("WordNet is loaded in this process")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(TaskError, match=r"python -m nltk.downloader wordnet"):
        wordnet()
