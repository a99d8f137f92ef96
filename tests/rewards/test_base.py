"""The contract: lowering, placing, weighing, conserving; and every fault in one clear sentence."""

import math
import sys
from importlib.metadata import EntryPoint
from importlib.util import find_spec

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pertoken.rewards as public
from pertoken.errors import ConfigError, MissingExtraError, RewardError
from pertoken.rewards import (
    AnswerF1,
    Banned,
    Bleu,
    ChrF,
    Distinct,
    EachTurn,
    FinalAnswer,
    Format,
    Harper,
    KLToReference,
    LanguageTool,
    Length,
    Meteor,
    Overlong,
    PersonalData,
    Readability,
    Repetition,
    Rouge1,
    Rouge2,
    RougeL,
    RougeLsum,
    RulePack,
    Sample,
    SampleReward,
    Scene,
    ScoredSpan,
    SelfBleu,
    Shaping,
    Steps,
    Ter,
    Weighted,
    episode_reward,
    findings,
    move_to_actions,
    names,
    resolve,
    score,
    span_reward,
    token_reward,
)
from pertoken.rewards.names import BUILT_IN, make
from pertoken.types import PolicyOutput

# ---- what an author sees ---------------------------------------------------------------------------------------


def test_a_sample_is_the_row_from_its_first_action_on(make_episode, make_scene, letters):
    episode = make_episode(letters("a cat"), "the cat", mask=[1, 0, 1, 1, 1], stop="length")
    (sample,) = make_scene(episode, padding=3, step=7).samples
    assert (sample.text, sample.reference, sample.stop, sample.step) == ("a cat", "the cat", "length", 7)
    assert sample.tokens == episode.tokens[2:]
    assert sample.action_mask == [True, False, True, True, True]
    assert len(sample.aligned.char_spans) == len(sample.tokens)


def test_texts_are_aligned_once_for_all_rewards(make_episode, make_scene):
    scene = make_scene(make_episode("a cat", "a cat"))
    assert scene.samples is scene.samples


def test_a_scene_refuses_episodes_in_another_order(make_episode, make_scene):
    one, two = make_episode("a", id="1"), make_episode("b", id="2")
    with pytest.raises(ValueError, match="same order"):
        Scene(make_scene(one, two).batch, [two, one], None)


# ---- the three decorators ---------------------------------------------------------------------------------------


def test_an_episode_reward_lands_on_the_last_action(make_episode, make_scene, letters):
    @episode_reward
    def fixed(sample: Sample) -> float:
        """Always one."""
        return 1.0

    scene = make_scene(make_episode(letters("a cat"), mask=[1, 1, 1, 1, 0]), padding=2)
    assert fixed(scene).tolist() == [[0, 0, 0, 0, 0, 1, 0, 0, 0]]
    assert fixed.fn(scene.samples[0]) == 1.0
    assert (fixed.__name__, fixed.__doc__) == ("fixed", "Always one.")


def test_an_episode_reward_can_be_spread_over_the_actions(make_episode, make_scene, letters):
    fixed = episode_reward(place="spread")(lambda sample: True)
    scene = make_scene(make_episode(letters("a cats"), mask=[1, 0, 1, 1, 1, 0]))
    assert fixed(scene).tolist() == [[0, 0, 0.25, 0, 0.25, 0.25, 0.25, 0]]


def test_a_span_reward_is_split_over_the_tokens_of_its_characters(make_episode, make_scene, letters):
    @span_reward
    def no_cats(sample: Sample) -> list[ScoredSpan]:
        at = sample.text.index("cat")
        return [
            ScoredSpan(at, at + 3, -3.0, "a cat"),
            ScoredSpan(len(sample.text), len(sample.text), -0.5, "no full stop"),
        ]

    scene = make_scene(make_episode(letters("a cat")))
    assert no_cats(scene)[0, 2:].tolist() == [0, 0, -1, -1, -1.5]


def test_a_span_without_tokens_before_it_falls_on_the_first(make_episode, make_scene):
    missing = span_reward(lambda sample: [ScoredSpan(0, 0, 1.0)])
    assert missing(make_scene(make_episode("a cat")))[0, 2].item() == 1.0
    assert missing(make_scene(make_episode("")))[0, 2].item() == 1.0  # nothing but the end of the sequence


def test_findings_are_the_tokens_that_a_span_reward_spoke_of(make_episode, make_scene):
    @span_reward
    def no_that(sample):
        at = sample.text.find("that")
        return [ScoredSpan(at, at + 4, -0.5, "do not say 'that'")] if at >= 0 else []

    scene = make_scene(make_episode("oh, that"), make_episode("nothing"), make_episode(""))
    rewards = [Weighted(no_that, 2.0, "no_that"), Weighted(episode_reward(lambda sample: 1.0), 1.0, "one")]
    (found,), *nothing = findings(rewards, scene)
    assert nothing == [[], []]
    assert (found.part, found.value, found.message) == ("no_that", -1.0, "do not say 'that'")
    paid = score(rewards, scene).parts["no_that"][0]
    assert [t for t, value in enumerate(paid.tolist()) if value] == list(range(found.start, found.stop))


def test_a_reward_that_may_fail_says_where_it_has_no_findings(make_episode, make_scene):
    @span_reward
    def picky(sample):
        return [ScoredSpan(0, 1, 1 / (len(sample.text) - 3), "long")]

    scene = make_scene(make_episode("cat", id="1"), make_episode("cats", id="2"))
    with pytest.raises(RewardError, match=r"reward 'picky', findings in episode '1'.*ZeroDivisionError"):
        findings([Weighted(picky, 1.0, "picky")], scene)
    (failed,), (found,) = findings([Weighted(picky, 1.0, "picky", max_failed_share=0.5)], scene)
    assert (failed.value, failed.message) == (0, "no findings: raised ZeroDivisionError: division by zero")
    assert (found.value, found.message) == (1, "long")


def test_a_token_reward_speaks_of_each_token(make_episode, make_scene):
    ramp = token_reward(lambda sample: list(range(len(sample.tokens))))
    assert ramp(make_scene(make_episode([7, 8, 9]), padding=1)).tolist() == [[0, 0, 0, 1, 2, 0]]
    as_tensor = token_reward(lambda sample: torch.arange(len(sample.tokens)))
    assert as_tensor(make_scene(make_episode([7, 8, 9]))).tolist() == [[0, 0, 0, 1, 2]]


# ---- score: names, weights, conservation ------------------------------------------------------------------------


def constant(value):
    return lambda scene: torch.full(scene.batch.tokens.shape, value)


def test_parts_are_weighted_named_and_sum_to_the_total(make_episode, make_scene):
    scene = make_scene(make_episode([7, 8], env=[0.0, 2.0]), dtype=torch.float32)
    last = episode_reward(lambda sample: 1.0)
    rewards = score([Weighted(last, 0.5, "half"), Weighted(last, -3.0, "minus three")], scene)
    assert {name: values[0].tolist() for name, values in rewards.parts.items()} == {
        "env": [0, 0, 0, 2],
        "half": [0, 0, 0, 0.5],
        "minus three": [0, 0, 0, -3],
    }
    assert rewards.total.tolist() == [[0, 0, 0, -0.5]]
    assert rewards.total.dtype == torch.float32


def test_an_environment_that_paid_nothing_is_no_part(make_episode, make_scene):
    rewards = score([], make_scene(make_episode([7, 8])))
    assert rewards.parts == {}
    assert rewards.total.tolist() == [[0, 0, 0, 0]]


def test_trap_r1_reward_on_masked_tail(make_episode, make_scene):
    """A terminal reward on a trailing token that was not an action is not lost: the last action has it."""
    at_the_end = token_reward(lambda sample: [0.0] * (len(sample.tokens) - 1) + [1.0])
    scene = make_scene(make_episode([5, 6, 7, 8, 9], mask=[1, 1, 1, 0, 0], env=[0.0, 0.0, 0.0, 0.0, 4.0]), padding=3)
    rewards = score([Weighted(at_the_end, 1.0, "end")], scene)
    assert rewards.parts["end"][0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert rewards.parts["env"][0].tolist() == [0, 0, 0, 0, 4, 0, 0, 0, 0, 0]


def test_what_falls_between_actions_moves_back_and_what_falls_before_moves_on():
    mask = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    values = torch.tensor([[1.0, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32], [0, 0, 0, 0, 0, 0]])
    assert move_to_actions(values, mask).tolist() == [[0, 0, 15, 0, 48, 0], [0, 63, 0, 0, 0, 0], [0] * 6]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_sum_credited_is_the_sum_given_under_any_mask(data, make_episode, make_scene):
    """Holes, truncated tails, observation gaps, values on prompt and padding: nothing is dropped or added."""
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=8).filter(any), min_size=1, max_size=3))
    episodes = [make_episode([9] * len(mask), mask=mask, id=str(k)) for k, mask in enumerate(rows)]
    scene = make_scene(*episodes, padding=data.draw(st.integers(0, 3)))
    shape = scene.batch.tokens.shape
    numbers = st.floats(-1e3, 1e3, width=32)
    given_values = torch.tensor(data.draw(st.lists(numbers, min_size=shape.numel(), max_size=shape.numel())))
    rewards = score([Weighted(lambda scene: given_values.view(shape), 2.0, "any")], scene)
    assert not rewards.total[~scene.batch.action_mask].any()
    torch.testing.assert_close(rewards.total.sum(1), 2.0 * given_values.view(shape).double().sum(1))
    torch.testing.assert_close(rewards.total, rewards.parts["any"], rtol=0, atol=0)


def test_trap_8_an_end_token_that_is_the_padding_token_is_an_action(make_episode, make_scene):
    """Regions come from lengths: the batch is padded with the very id that ends the row."""
    scene = make_scene(make_episode([7, 2]), make_episode([7, 8, 9, 2], id="1"))
    total = score([Weighted(episode_reward(lambda sample: 1.0), 1.0, "end")], scene).total
    assert total.tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]]


def test_trap_18_sampled_ids_are_never_tokenised_again(make_episode, make_scene, letters, tokenizer):
    """A spelling that the tokenizer would not choose keeps its own tokens."""
    ids = letters("the cat")
    assert tokenizer.encode("the cat", add_special_tokens=False) != ids
    scene = make_scene(make_episode(ids, "the cat"))
    assert scene.samples[0].tokens == ids
    assert RougeL()(scene)[0, 2:].tolist() == pytest.approx([2 / 9] * 3 + [0] + [1 / 9] * 3)


def test_trap_31_a_foreign_tokenizer_is_mapped_by_characters(make_episode, make_scene, letters):
    """A reward model scores its own pieces of the text ("a c", "at"); the policy's tokens get their shares."""
    foreign = span_reward(lambda sample: [ScoredSpan(0, 3, 3.0), ScoredSpan(3, 5, 1.0)])
    scene = make_scene(make_episode(letters("a cat")))
    assert foreign(scene)[0, 2:].tolist() == [1, 1, 1, 0.5, 0.5]


class Canned(LanguageTool):
    """Answers without a server."""

    def check(self, text):
        return RulePack().check(text)


BUILT_INS = {
    "rouge_l": RougeL(),
    "rouge_l_token": RougeL("token"),
    "bleu": Bleu(),
    "bleu_token": Bleu("token"),
    "rouge_1": Rouge1(),
    "rouge_2": Rouge2("text"),
    "rouge_lsum": RougeLsum(),
    "chrf": ChrF(word_order=2),
    "ter": Ter(),
    "answer_f1": AnswerF1(wrong=0.5),
    "final_answer": FinalAnswer(wrong=0.5),
    "steps": Steps(),
    "meteor": Meteor(),
    "repetition": Repetition(n=2),
    "length": Length(min_words=4, max_words=5, unfinished_cost=1.0),
    "overlong": Overlong(max_tokens=6, buffer=4),
    "format": Format(pattern="the [a-z ]+", parts=["cat"], json=True),
    "banned": Banned(words=["mat", "猫"]),
    "personal_data": PersonalData(patterns={"seat": "mat|猫"}),
    "distinct": Distinct(),
    "self_bleu": SelfBleu(),
    "readability": Readability(most=-3.0),
    "language_tool": Canned(),
    "rule_pack": RulePack(normalised=True),
    "shaping": Shaping("bleu", gamma=0.9),
    "each_turn": EachTurn({"name": "length", "min_words": 4}),
    "kl": KLToReference(),
}
OF_GROUPS = {"self_bleu"}
"""Rewards that compare the samples of a prompt: a batch may be cut between groups only."""
if find_spec("harper"):
    BUILT_INS["harper"] = Harper()


def test_every_built_in_reward_is_among_them():
    # In test_evaluate_metric.py, test_knowledge.py, test_semantics.py, test_judge.py, ...: they need files or models.
    elsewhere = {"evaluate", "facts", "similarity", "bertscore", "entailment", "ensemble", "judge", "documents"}
    elsewhere |= {"classifier", "token_model", "implicit", "prime", "link_grammar", "perplexity", "comet"}
    for name in BUILT_IN.keys() - elsewhere - ({"harper"} if not find_spec("harper") else set()):
        assert any(isinstance(reward, resolve(name)) for reward in BUILT_INS.values()), name


@pytest.mark.parametrize("name", BUILT_INS)
def test_trap_r6_order_and_size_of_the_batch_do_not_matter(name, make_episode, make_scene):
    completions = [
        "the cat sat on the the cat on the cat , teh",
        "a cat",
        "猫坐在 the mat. 猫坐在",
        "",
        "the cat 2+2=4",
    ]
    stops = ["eos", "length", "eos", "eos", "context"]
    episodes = [
        make_episode(text, "the cat sat on the mat", id=str(k), stop=stop, group=k // 3)
        for k, (text, stop) in enumerate(zip(completions, stops, strict=True))
    ]
    logprobs = {e.id: torch.randn(len(e.tokens), generator=torch.Generator().manual_seed(int(e.id))) for e in episodes}

    def values(*chosen):
        scene = make_scene(*chosen)
        cells = torch.zeros_like(scene.batch.sample_logprobs)
        for row, episode in enumerate(chosen):
            cells[row, : len(episode.tokens)] = logprobs[episode.id]
        scene = make_scene(*chosen, old=PolicyOutput(cells, cells), ref=PolicyOutput(2 * cells, cells))
        rewards = score([Weighted(BUILT_INS[name], 1.0, name)], scene)
        return {e.id: rewards.total[row, : len(e.tokens)].tolist() for row, e in enumerate(chosen)}

    together = values(*episodes)
    assert any(any(row) for row in together.values())
    assert values(*episodes[::-1]) == together
    alone = [episodes[:3], episodes[3:]] if name in OF_GROUPS else [[episode] for episode in episodes]
    assert {k: row for chosen in alone for k, row in values(*chosen).items()} == together


# ---- faults -----------------------------------------------------------------------------------------------------


def raises(sample):
    raise KeyError("colour")


FAULTS = {
    "raises": (episode_reward(raises), ["raised KeyError: 'colour'"]),
    "nan": (episode_reward(lambda s: math.nan), ["nan at token 3 of", "return 0.0 where"]),
    "infinite": (token_reward(lambda s: [0.0, -math.inf]), ["-inf at token 3", "expected finite"]),
    "no number": (episode_reward(lambda s: None), ["returned None (NoneType)", "expected a number", "NO_OPINION"]),
    "text": (episode_reward(lambda s: "1.0"), ["'1.0' (str)"]),
    "zero-dimensional tensor": (episode_reward(lambda s: torch.tensor(1.0)), ["a tensor needs .item()"]),
    "too short": (token_reward(lambda s: [1.0]), ["returned 1 values, expected 2", "one per token"]),
    "no list": (token_reward(lambda s: 1.0), ["returned float, expected a list of 2 numbers"]),
    "a hole in the list": (token_reward(lambda s: [0.0, None]), ["None"]),
    "no span": (span_reward(lambda s: [(0, 1, 1.0)]), ["(0, 1, 1.0)", "ScoredSpan(start, stop, value)"]),
    "no spans": (span_reward(lambda s: None), ["returned NoneType, expected a list of ScoredSpan"]),
    "span outside": (span_reward(lambda s: [ScoredSpan(0, 99, 1.0)]), ["outside the text of", "characters"]),
    "span backwards": (span_reward(lambda s: [ScoredSpan(1, 0, 1.0)]), ["start <= stop"]),
    "span without value": (span_reward(lambda s: [ScoredSpan(0, 1, "x")]), ["'x' (str)"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_sample_names_reward_episode_item_and_remedy(fault, make_episode, make_scene, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a run: the checker sees some of them first
    reward, fragments = FAULTS[fault]
    with pytest.raises(RewardError) as caught:
        score([Weighted(reward, 1.0, "mine")], make_scene(make_episode([7, 8], id="e7")))
    message = str(caught.value)
    for fragment in ["reward 'mine'", "episode 'e7'", "item 'item-e7'", *fragments]:
        assert fragment in message


def test_a_reward_class_is_held_to_the_same_contract(make_episode, make_scene):
    class Short(SampleReward):
        def token_values(self, sample):
            return [1.0]

    with pytest.raises(RewardError, match=r"^Short, episode '0' .*returned 1 values, expected 2"):
        Short()(make_scene(make_episode([7, 8]), padding=1))


def test_trap_29_no_opinion_is_said_and_not_guessed(make_episode, make_scene):
    """None is neither 0 nor NaN that a sum swallows: it is refused."""
    with pytest.raises(RewardError, match=r"0\.0 pays nothing.*NO_OPINION"):
        token_reward(lambda sample: [None] * len(sample.tokens))(make_scene(make_episode("a")))


def test_the_cause_of_a_fault_is_chained(make_episode, make_scene):
    with pytest.raises(RewardError) as caught:
        episode_reward(raises)(make_scene(make_episode("a")))
    assert str(caught.value).startswith("raises, episode '0' (item 'item-0'): raised KeyError")
    assert isinstance(caught.value.__cause__, KeyError)


def test_trap_r7_a_short_list_never_reaches_the_wrong_rows(make_episode, make_scene):
    """A raw reward that returns finished rows only is refused, not lined up with other rows."""
    scene = make_scene(make_episode([7], id="0"), make_episode([8], id="1"))
    with pytest.raises(RewardError, match=r"reward 'short': returned torch.float32 of shape \[1, 3\].*shape \[2, 3\]"):
        score([Weighted(lambda scene: torch.zeros(1, 3), 1.0, "short")], scene)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (lambda scene: [[0.0] * 3], "returned list, expected a floating-point tensor"),
        (lambda scene: torch.zeros(1, 3, dtype=torch.long), "torch.int64 of shape"),
        (lambda scene: 1 / 0, "reward 'raw': raised ZeroDivisionError"),
    ],
)
def test_a_raw_reward_is_checked(raw, message, make_episode, make_scene):
    with pytest.raises(RewardError, match=message):
        score([Weighted(raw, 1.0, "raw")], make_scene(make_episode([7])))


def test_a_row_without_actions_takes_no_reward(make_episode, make_scene):
    episode = make_episode([7, 8], mask=[0, 0], id="idle")
    scene = make_scene(episode)
    assert scene.samples[0].tokens == []
    assert not score([Weighted(episode_reward(lambda s: 0.0), 1.0, "none")], scene).total.any()
    for reward in (constant(1.0), episode_reward(lambda s: 1.0), span_reward(lambda s: [ScoredSpan(0, 0, 1.0)])):
        with pytest.raises(RewardError, match=r"'idle'.*no action"):
            score([Weighted(reward, 1.0, "some")], scene)


def test_a_faulty_environment_reward_is_named(make_episode, make_scene):
    with pytest.raises(RewardError, match="reward 'env': nan at token 2 of episode 'e'"):
        score([], make_scene(make_episode([7], env=[math.nan], id="e")))


@pytest.mark.parametrize("names", [["a", "a"], ["env"]])
def test_names_of_parts_are_unique(names, make_episode, make_scene):
    with pytest.raises(ConfigError, match="different names"):
        score([Weighted(constant(0.0), 1.0, name) for name in names], make_scene(make_episode([7])))


def test_weights_and_places_are_checked_before_any_scene(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match="place is 'last' or 'spread', got 'first'"):
        episode_reward(place="first")
    with pytest.raises(ConfigError, match="reward 'r': weight must be a finite number, got nan"):
        Weighted(constant(0.0), math.nan, "r")


# ---- names ------------------------------------------------------------------------------------------------------


@token_reward
def per_token(sample: Sample, *, value: float = 1.0) -> list[float]:
    return [value] * len(sample.tokens)


def raw_with_parameter(scene: Scene, *, value: float = 1.0) -> torch.Tensor:
    return torch.full(scene.batch.tokens.shape, value)


NOT_CALLABLE = 3


class WithoutItsFile:
    def __init__(self, *, missing=False) -> None:
        raise MissingExtraError("words", "words", "this reward") if missing else FileNotFoundError("no words.txt")


@pytest.fixture
def here(monkeypatch):
    """This file as an importable module."""
    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[__name__])
    return "my_rewards"


def test_built_in_rewards_have_names():
    assert resolve("rouge_l")(granularity="token") == RougeL("token")
    assert {type(resolve(name)()).__name__ for name in ("rouge_l", "bleu", "repetition", "kl")} == {
        "RougeL",
        "Bleu",
        "Repetition",
        "KLToReference",
    }
    assert resolve("length")(max_words=9) == Length(max_words=9)


@pytest.mark.parametrize("name", ["per_token", "raw_with_parameter"])
def test_a_function_is_named_by_its_path_and_takes_parameters(name, here, make_episode, make_scene):
    scene = make_scene(make_episode([7, 8]))
    assert resolve(f"{here}:{name}")()(scene)[0, 2:].tolist() == [1, 1]
    assert resolve(f"{here}:{name}")(value=0.5)(scene)[0, 2:].tolist() == [0.5, 0.5]
    with pytest.raises(ConfigError, match=f"{name}.*'valve'.*value: float"):
        resolve(f"{here}:{name}")(valve=0.5)


def test_what_raises_when_it_is_made_is_named(here):
    with pytest.raises(
        ConfigError, match=r"rewards\.1 \(my_rewards:WithoutItsFile\): raised FileNotFoundError: no words"
    ):
        make(f"{here}:WithoutItsFile", {}, "rewards.1")
    with pytest.raises(MissingExtraError, match="pip install"):
        make(f"{here}:WithoutItsFile", {"missing": True}, "rewards.1")


def test_installed_packages_offer_rewards(here, monkeypatch):
    point = EntryPoint("theirs", f"{here}:per_token", "pertoken.rewards")
    monkeypatch.setattr(names, "entry_points", lambda group: [point] if group == "pertoken.rewards" else [])
    assert resolve("theirs")().fn is per_token.fn


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rouge", "unknown reward 'rouge': did you mean 'rouge_"),
        ("no_such_module:fn", "cannot import the module 'no_such_module' .*PYTHONPATH"),
        ("my_rewards:per_tokens", "has no 'per_tokens'; did you mean 'per_token'"),
        ("my_rewards:NOT_CALLABLE", "is int, expected a decorated function or a class"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name, message, here):
    with pytest.raises(ConfigError, match=message):
        resolve(name)


def test_all_public_names_exist():
    assert all(hasattr(public, name) for name in public.__all__)
