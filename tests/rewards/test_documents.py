"""Sentences against documents: which passages are found, and what they say; by hand."""

import json
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from pertoken.errors import ConfigError
from pertoken.rewards import Documents
from pertoken.rewards.knowledge import documents
from pertoken.rewards.knowledge.documents import Collection

TEXTS = [
    "The owl is a bird. It hunts at night. It eats mice.",
    "The whale is a mammal. It lives in the sea. It breathes air.",
    "Bread is made of flour and water. It is baked. It is eaten. It is old. Rye makes it dark.",
]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(tmp_path / "texts.jsonl")


@pytest.fixture
def found(make_episode, make_scene):
    def of(reward, text):
        (sample,) = make_scene(make_episode(text)).samples
        return [(sample.text[s.start : s.stop], pytest.approx(s.value), s.message) for s in reward.findings(sample)]

    return of


def test_a_sentence_with_the_words_of_a_passage_is_supported(place, found):
    assert found(Documents(place), "The owl hunts at night. The owl bakes cakes.") == [
        ("The owl hunts at night.", 0.5, f"supported: 100% of its words are in '{TEXTS[0]}'"),
        ("The owl bakes cakes.", 0.0, f"unknown: 29% of its words are in '{TEXTS[0]}'"),
    ]
    assert found(Documents(place), "Zebras gallop.") == [
        ("Zebras gallop.", 0.0, "unknown: no passage has a word of it")
    ]


def test_rare_words_count_more():
    collection = Collection(TEXTS)
    common, rare = collection.share("is owl", "is"), collection.share("is owl", "owl")
    assert common + rare == pytest.approx(1.0)
    assert rare > 5 * abs(common)


def test_passages_have_four_sentences(place):
    passages = documents._load(place, "text")._passages
    assert [len(documents.sentence_spans(passage)) for passage in passages] == [3, 3, 4, 1]


def test_a_sentence_earns_once(place, found):
    values = [
        value for _, value, _ in found(Documents(place, supported=3.0), "It eats mice. It eats mice. It breathes air.")
    ]
    assert values == [1.0, 0.0, 1.0]


def test_entailment_decides_where_it_is_asked(place, found, monkeypatch):
    table = {"Owls sleep by day.": (0.9, 0.0), "Owls are fish.": (0.1, 0.8), "Owls are old.": (0.4, 0.3)}
    monkeypatch.setattr(documents, "judge_of", lambda name: lambda premise, said: table[said])
    reward = Documents(place, model="nli", supported=3.0, contradicted=-6.0, passages=1)
    verdicts = found(reward, "Owls sleep by day. Owls are fish. Owls are old.")
    assert verdicts == [] or [v for _, v, _ in verdicts] == [0.0, 0.0, 0.0]  # "owls" is in no passage
    table = {said.replace("Owls", "The owl"): value for said, value in table.items()}
    monkeypatch.setattr(documents, "judge_of", lambda name: lambda premise, said: table[said])
    verdicts = found(reward, "The owl sleep by day. The owl are fish. The owl are old.")
    assert [value for _, value, _ in verdicts] == [1.0, -2.0, 0.0]
    assert verdicts[0][2] == f"supported (0.90) by '{TEXTS[0]}'"
    assert verdicts[1][2] == f"contradicted (0.80) by '{TEXTS[0]}'"


def test_search_by_meaning_finds_other_words_and_remembers_the_vectors(place, found, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path / "cache"))
    seen = []

    def embed(text):  # the sea, or anything else
        seen.append(text)
        sea = float(any(word in text for word in ("whale", "ocean")))
        return np.array([sea, 1.0 - sea], dtype=np.float32)

    monkeypatch.setattr(documents, "encoder", lambda name: embed)
    near = Collection(TEXTS).near("Far in the ocean.", 1, "meaning", "model")
    assert near == [TEXTS[1]]
    assert len(seen) == 4
    Collection(TEXTS).near("ocean", 1, "meaning", "model")
    assert len(seen) == 5  # the passages came from the file
    both = Collection(TEXTS).near("Owl ocean.", 2, "both", "model")
    assert both == [TEXTS[0], TEXTS[1]]


def test_other_files(tmp_path, found):
    (tmp_path / "a.txt").write_text("The owl is a bird.\n\nBread is baked.")
    (tmp_path / "b.csv").write_text('n,words\n1,"The owl, a bird."\n')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "c.md").write_text("The owl is a bird.")
    for path, column in ((tmp_path / "a.txt", "text"), (tmp_path / "b.csv", "words"), (folder, "text")):
        ((_, value, _),) = found(Documents(str(path), column), "A bird, the owl.")
        assert value == 1.0


def test_neither_order_nor_size_of_the_batch_matters(place, make_episode, make_scene):
    rows = [
        make_episode(text, id=text) for text in ("It eats mice.", "", "It breathes air. It is a fish.", "It is old.")
    ]
    together = Documents(place)(make_scene(*rows))
    for k, row in enumerate(rows):
        alone = Documents(place)(make_scene(row))[0]
        assert torch.equal(alone, together[k, : len(alone)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passages": 0}, "expected passages >= 1"),
        ({"sure": 0.0}, "0 < sure <= 1"),
        ({"contradicted": 1.0}, "contradicted <= 0"),
        ({"search": "magic"}, r"documents\.search: unknown value 'magic'"),
        ({"column": "words"}, r"texts\.jsonl:1: expected a text in the column 'words'"),
        ({"path": "none.jsonl"}, r"documents\.path: cannot read 'none.jsonl'"),
        ({"path": "none.doc"}, r"expected a folder, \.txt, or \.jsonl"),
    ],
)
def test_settings_that_cannot_be(settings, message, place, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a run: the checker would refuse some first
    with pytest.raises(ConfigError, match=message):
        Documents(**{"path": place, **settings})


def test_an_empty_collection(tmp_path):
    Path(tmp_path / "a.txt").write_text(" \n\n ")
    with pytest.raises(ConfigError, match="has no text"):
        Documents(str(tmp_path / "a.txt"))
