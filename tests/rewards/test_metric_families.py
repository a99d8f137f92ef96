"""Every metric against its official library: prefix by prefix, and summed; and each family by hand."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from pertoken.errors import ConfigError
from pertoken.rewards import Bleu, ChrF, Meteor, Rouge1, Rouge2, RougeL, RougeLsum, Ter
from pertoken.rewards.align import word_spans

GRANULARITIES = ["word", "token", "text"]


class NoSynonyms:
    """In place of nltk's WordNet reader, which needs data that no package brings."""

    def synsets(self, word):
        return []


def words(text):
    return [text[start:stop] for start, stop in word_spans(text, marks=True)]


def rouge(kind, *, stemmer=False):
    scorer = RougeScorer([kind], use_stemmer=stemmer)
    return lambda text, references: scorer.score_multi(references, text)[kind].fmeasure


def meteor(**options):
    return lambda text, references: meteor_score(
        [words(reference) for reference in references], words(text), wordnet=NoSynonyms(), **options
    )


def sacrebleu(metric):
    return lambda text, references: metric.sentence_score(text, references).score / 100


def ter(**options):
    official = sacrebleu(TER(**options))
    return lambda text, references: 1 - official(text, references)


def options(**choices):
    return st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in choices.items()})


YES_NO = [False, True]
METRICS = {
    "rouge_1": (Rouge1, lambda **kw: rouge("rouge1", **kw), options(stemmer=YES_NO)),
    "rouge_2": (Rouge2, lambda **kw: rouge("rouge2", **kw), options(stemmer=YES_NO)),
    "rouge_l": (RougeL, lambda **kw: rouge("rougeL", **kw), options(stemmer=YES_NO)),
    "rouge_lsum": (RougeLsum, lambda **kw: rouge("rougeLsum", **kw), options(stemmer=YES_NO)),
    "meteor": (Meteor, meteor, options(alpha=[0.5, 0.9], beta=[1.0, 3.0], gamma=[0.3, 0.5])),
    "bleu": (
        Bleu,
        lambda **kw: sacrebleu(BLEU(effective_order=True, **kw)),
        options(
            tokenize=["13a", "intl", "zh", "char", "none"],
            smooth_method=["exp", "floor", "add-k", "none"],
            lowercase=YES_NO,
        ),
    ),
    "chrf": (
        ChrF,
        lambda **kw: sacrebleu(CHRF(**kw)),
        options(
            **{"char_order": [1, 3, 6], "word_order": [0, 2], "beta": [1, 2]},
            **dict.fromkeys(("lowercase", "whitespace", "eps_smoothing"), YES_NO),
        ),
    ),
    "ter": (
        Ter,
        ter,
        options(**dict.fromkeys(("normalized", "no_punct", "asian_support", "case_sensitive"), YES_NO)),
    ),
}

# What the tokenisers do something special with.
WORDS = """the a cat sat running, runs mat. 3.5 .5 5. ,5 well-made İx K & &quot; ... (hi) <skipped> it's ’s 猫坐 。 “ΑΣ”
ΑΣ’Α ＡΣ ＇ \u2019 € , . ! ; ١٢٣ १. x\u0301"""
SPACES = ["\n", "-\n", "\n-", "-<skipped>\n", "\u3000", "\u2028", " ", "  "]


@st.composite
def pairs(draw):
    """A text and references that have something in common with it."""
    rng = draw(st.randoms(use_true_random=False))

    def text():
        return rng.choice(["", " "]).join(rng.choices(WORDS.split() + SPACES * 2, k=rng.randrange(12)))

    hypothesis, references = text(), [text() for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.6:
        shuffled = hypothesis.split(" ")
        rng.shuffle(shuffled)
        references[0] = rng.choice([hypothesis[: rng.randrange(30)], " ".join(shuffled)])
    return hypothesis, references


@settings(max_examples=30, deadline=None)
@given(pair=pairs(), data=st.data())
@pytest.mark.parametrize("name", METRICS)
def test_deltas_sum_to_the_official_score(name, pair, data, make_episode, make_scene):
    text, references = pair
    metric, official, choices = METRICS[name]
    chosen = data.draw(choices)
    scene = make_scene(make_episode(text, info={"references": references}))
    score = official(**chosen)
    expected = score(scene.samples[0].text, references) - score("", references)
    for granularity in GRANULARITIES:
        total = metric(granularity=granularity, **chosen)(scene).sum().item()
        assert total == pytest.approx(expected, abs=1e-9), granularity


@settings(max_examples=15, deadline=None)
@given(pair=pairs(), data=st.data())
@pytest.mark.parametrize("name", METRICS)
def test_each_prefix_has_its_official_score(name, pair, data, make_episode, make_scene):
    text, references = pair
    metric, official, choices = METRICS[name]
    chosen = data.draw(choices)
    (sample,) = make_scene(make_episode(text, info={"references": references})).samples
    ends = sample.aligned.completed()
    values = metric("token", **({"shifts": "every"} if metric is Ter else {}), **chosen).prefix_values(sample, ends)
    score = official(**chosen)
    expected = [score(sample.text[:end], references) for end in [0, *ends]]
    assert values == pytest.approx(expected, abs=1e-9)


CORNERS = [
    ("ter", {"normalized": True}, "5", ".,5"),  # sacrebleu tokenises references twice
    ("ter", {"normalized": True}, "it's\u3000the", "it 's the"),  # "'s" is a word before a plain space only
    ("ter", {"normalized": True}, "a\n-b", "ab"),
    ("bleu", {"tokenize": "13a"}, "a-<skipped>\nb c", "ab c"),  # a hyphen at the end of a line joins it with the next
    ("bleu", {"tokenize": "intl"}, " ,1", ", 1"),  # a text that begins with a space is not tokenised as one without
    ("bleu", {"tokenize": "intl"}, "1, 2,", "1 , 2,"),
    ("bleu", {"tokenize": "zh"}, "5.猫 .5", "5. 猫 . 5"),  # the first and the last word have no space around them
    ("bleu", {"tokenize": "zh", "lowercase": True}, "ΑΣ’Α", "ασ’α"),  # a sigma is not final before an apostrophe
    ("chrf", {"whitespace": True}, " ", " "),
    ("chrf", {"word_order": 2}, "(hi).", "(hi) ."),
    ("rouge_lsum", {}, "b a\nb\na c", "a b\nc b a"),
    ("meteor", {}, "runs run running", "running run"),
]


@pytest.mark.parametrize(("name", "chosen", "text", "reference"), CORNERS)
def test_corners_of_the_official_tokenisers(name, chosen, text, reference, make_episode, make_scene):
    metric, official, _ = METRICS[name]
    scene = make_scene(make_episode(text, reference))
    expected = official(**chosen)(text, [reference]) - official(**chosen)("", [reference])
    assert metric(**chosen)(scene).sum().item() == pytest.approx(expected, abs=1e-9)


TEXTS = {
    "english": "He let the big old dog, which had slept all day, out. It's well-made: 3.5 kg! He ran.",
    "german": "Ein Vögelchen saß auf dem Dach; zwei Männer saßen darunter. Wie schön, sagte er, wie schön!",
    "chinese": "猫坐在垫子上。你好，世界！他在2023年买了iPhone，花了3.5千元。天气很好。",
}


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("name", METRICS)
def test_words_and_tokens_agree_on_text_that_was_moved_about(name, language, make_episode, make_scene):
    rng, text = random.Random(7), TEXTS[language]
    for _ in range(4):
        cut = sorted(rng.sample(range(len(text)), 3))
        reference = text[cut[0] : cut[1]] + text[: cut[0]] + text[cut[2] :]
        scene = make_scene(make_episode(text, reference))
        metric, official, _ = METRICS[name]
        expected = official()(text, [reference]) - official()("", [reference])
        for granularity in GRANULARITIES:
            assert metric(granularity)(scene).sum().item() == pytest.approx(expected, abs=1e-9)


# ---- by hand ----------------------------------------------------------------------------------------------------

HAND = {
    # matched 1/1 of 2, 1/2 of 2, 2/3 of 2
    "rouge_1": (Rouge1(), "the the cat", "the cat", [2 / 3, 1 / 2, 4 / 5]),
    # pairs: none yet, 1/1 of 3, 1/2 of 3
    "rouge_2": (Rouge2(), "a b c", "a b d c", [0, 1 / 2, 2 / 5]),
    # both lines are found, whatever their order; as one sequence it would be 1/2
    "rouge_lsum": (RougeLsum(), "c d\na b", "a b\nc d", [2 / 5, 2 / 3, 6 / 7, 1]),
    # recall counts nine times as much as precision; one stretch of 1 and of 2 matches: penalties 1/2 and 1/16
    "meteor": (Meteor(), "the cat", "the cat sat", [(1 / 3) / (28 / 30) / 2, (2 / 3) / (29 / 30) * 15 / 16]),
    # "runs" is matched by its stem, in a stretch of its own
    "meteor_stem": (Meteor(), "running", "he runs", [(1 / 2) / (19 / 20) / 2]),
    # of 3 characters 1, then of 3 characters 2 and of 2 pairs 1
    "chrf": (ChrF(char_order=2), "a b", "abc", [5 * (1 / 3) / (4 + 1 / 3), 5 * (7 / 12) / (4 + 7 / 12)]),
    # edits without moves: 3, 2, 3; the whole is one move away
    "ter": (Ter(), "c d a b", "a b c d", [1 / 4, 1 / 2, 1 / 4, 3 / 4]),
    # with moves: 3, 2, 2, 1
    "ter_every": (Ter(shifts="every"), "c d a b", "a b c d", [1 / 4, 1 / 2, 1 / 2, 3 / 4]),
    # three wrong words for one
    "ter_negative": (Ter(), "x y z", "a", [0, -1, -2]),
}


@pytest.mark.parametrize("case", HAND)
def test_each_word_earns_its_change(case, make_episode, make_scene, letters):
    metric, text, reference, scores = HAND[case]
    ids = make_episode(text).tokens[2:] if "\n" in text else letters(text)
    scene = make_scene(make_episode(ids, reference))
    sample = scene.samples[0]
    ends = [stop for _, stop in metric.word_spans(sample.text)]
    earned = metric(scene)[0, 2:].cumsum(0).tolist()
    after = [max(k for k, (start, stop) in enumerate(sample.aligned.char_spans) if start < end) for end in ends]
    assert [earned[k] for k in after] == pytest.approx(scores)


def test_the_last_action_earns_the_whole_text(make_episode, make_scene, letters):
    scene = make_scene(make_episode([*letters("a b"), *letters(" c")], "a b c", mask=[1, 1, 1, 0, 0]), padding=1)
    assert Rouge1("text")(scene)[0].tolist() == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0])


def test_the_fewest_edits_are_divided_by_the_mean_length_of_the_references(make_episode, make_scene):
    """As sacrebleu has it: 2 edits away from nothing, references of 2 and 4 words."""
    scene = make_scene(make_episode("a b", info={"references": ["a b", "a b c d"]}))
    assert Ter()(scene).sum().item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rouge2("line"), "rouge_2.granularity: unknown value 'line'"),
        (lambda: Ter(shifts="each"), "ter.shifts: unknown value 'each'"),
        (lambda: ChrF(char_order=0), "chrf: expected char_order >= 1"),
        (lambda: Meteor(alpha=2.0), "meteor: expected alpha and gamma from 0 to 1, got 2.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_tokeniser_without_its_package_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    with pytest.raises(ConfigError, match=r"bleu.tokenize: 'ja-mecab'.*pip install sacrebleu\[ja\]"):
        Bleu(tokenize="ja-mecab")
