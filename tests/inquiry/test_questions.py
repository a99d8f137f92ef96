"""Questions to a model about one text: what it could have said, what if it had, which tokens caused the score."""

import math
from dataclasses import replace

import pytest
import torch

from pertoken.errors import ConfigError, ModelError
from pertoken.inquiry import questions
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rewards import Sample, ScoredSpan, Weighted, span_reward
from pertoken.rollout.collect import to_episode
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, episode, tiny_encoder_decoder, tiny_model
from pertoken.types import Item

EOS = 256
IDS = byte_tokenizer().encode
PROMPT = IDS("say")


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(seed=3), byte_tokenizer(), precision="float32", compile=False)


@pytest.fixture(scope="module")
def engine(policy):
    return NativeEngine(policy.model, policy.tokenizer, head_logits=head_logits)


def controls_of(policy, **sampling):
    return Controls.resolve(Sampling(**{"max_new_tokens": 8} | sampling), policy.tokenizer, policy.eos_ids)


def written(text: str, *, stop: str = "length"):
    ids = [*IDS(text), *([EOS] if stop == "eos" else [])]
    return episode(PROMPT, ids, stop=stop, item=Item("i", "say", "abc"))


# --- alternatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8, "repetition_penalty": 1.3},
        {"min_p": 0.02, "no_repeat_ngram": 2, "min_new_tokens": 4, "banned_words": ("e", "th")},
    ],
)
def test_probabilities_are_those_that_the_sampler_drew_with(policy, engine, sampling):
    controls = controls_of(policy, **sampling)
    for seed in range(4):
        (drawn,) = engine.generate([PROMPT], controls, seeds=[seed])
        one = to_episode("e", Item("i", "say"), 0, PROMPT, drawn, 0)
        places = questions.alternatives(policy, one, controls, count=10_000)
        assert [place.chosen.token for place in places] == drawn.tokens
        assert [place.chosen.logprob for place in places] == pytest.approx(drawn.logprobs, abs=1e-4)
        assert [place.entropy for place in places] == pytest.approx(drawn.entropies, abs=1e-4)
        for place in places:
            assert sum(math.exp(other.logprob) for other in place.others) == pytest.approx(1.0, abs=1e-5)
            if "top_k" in sampling:
                assert len(place.others) == sampling["top_k"]
            ids = [other.token for other in place.others]
            assert ids.index(place.chosen.token) == place.rank - 1


def test_the_first_alternative_is_the_most_probable_one_by_the_model_itself(policy):
    one = written("abcd")
    logits = policy.model(torch.tensor([one.tokens])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(1)
    places = questions.alternatives(policy, one, controls_of(policy), count=3)
    for row, place in zip(expected, places, strict=True):
        best = row.topk(3)
        assert [other.token for other in place.others] == best.indices.tolist()
        assert [other.logprob for other in place.others] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert place.rank == 1 + int((row > row[place.chosen.token]).sum())


def test_what_the_controls_forbid_has_no_probability(policy):
    place = questions.alternatives(policy, written("a"), controls_of(policy, banned_words=("a",)), count=300)[0]
    assert place.chosen.logprob == -math.inf
    assert IDS("a")[0] not in [other.token for other in place.others]


def test_pieces_keep_their_spaces_and_special_tokens_their_names(policy):
    assert questions.piece_of(*IDS(" "), policy.tokenizer) == " "
    assert questions.piece_of(*IDS("x"), policy.tokenizer) == "x"
    assert questions.piece_of(EOS, policy.tokenizer) == "<eos>"


def test_a_text_without_a_choice_cannot_be_asked_about(policy):
    with pytest.raises(ConfigError, match="no token that the model chose"):
        questions.alternatives(policy, episode(PROMPT, []), controls_of(policy))


# --- another token ------------------------------------------------------------------------------------------


def test_a_token_swapped_for_itself_changes_nothing(policy):
    one = written("abcd", stop="eos")
    for column in range(len(PROMPT), len(one.tokens)):
        same = questions.swapped(one, column, [one.tokens[column]], policy.eos_ids)
        assert (same.tokens, same.action_mask, same.stop) == (one.tokens, one.action_mask, one.stop)
    ours, theirs = questions.logprobs_of(policy, [one, same], controls_of(policy))
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_swap_may_be_longer_and_leaves_what_is_before_it_alone(policy):
    one = written("abcd")
    changed = questions.swapped(one, len(PROMPT) + 1, IDS("XY"), policy.eos_ids)
    assert changed.tokens == IDS("sayaXYcd")
    assert changed.action_mask == [False] * 3 + [True] * 5
    was, now = questions.logprobs_of(policy, [one, changed], controls_of(policy))
    assert now[0] == pytest.approx(was[0], abs=1e-5)
    assert now[-1] != pytest.approx(was[-1], abs=1e-3)


def test_an_end_cuts_the_text_and_a_lost_end_leaves_it_cut_off(policy):
    one = written("abcd", stop="eos")
    cut = questions.swapped(one, len(PROMPT) + 1, [EOS, 65], policy.eos_ids)
    assert (cut.tokens, cut.stop) == ([*IDS("saya"), EOS], "eos")
    assert questions.swapped(one, len(one.tokens) - 1, [65], policy.eos_ids).stop == "length"


@pytest.mark.parametrize("column", [0, 2, 7, -1])
def test_only_tokens_that_the_model_chose_can_be_swapped(policy, engine, column):
    with pytest.raises(ConfigError, match="none that the model chose"):
        questions.swapped(written("abcd"), column, [65], policy.eos_ids)
    with pytest.raises(ConfigError, match="none that the model chose"):
        questions.rolled(engine, written("abcd"), column, [65], controls_of(policy), samples=1)


def test_a_swap_for_nothing_is_refused(policy):
    with pytest.raises(ConfigError, match="there must be a token"):
        questions.swapped(written("abcd"), len(PROMPT), [], policy.eos_ids)


# --- sampling on --------------------------------------------------------------------------------------------


def test_texts_sampled_on_keep_what_is_before_and_have_the_length_of_any_text(policy, engine):
    one, controls = written("abcdef"), controls_of(policy, max_new_tokens=8)
    column = len(PROMPT) + 2
    texts = questions.rolled(engine, one, column, IDS("Z"), controls, samples=6, seed=1)
    assert len(texts) == 6
    for text in texts:
        assert text.tokens[: column + 1] == [*one.tokens[:column], *IDS("Z")]
        assert sum(text.action_mask) <= 8
        assert text.stop == ("eos" if text.tokens[-1] == EOS else "length")
        assert (sum(text.action_mask) == 8) == (text.stop == "length") or text.stop == "eos"
    assert len({tuple(text.tokens) for text in texts}) > 1
    assert [text.tokens for text in texts] == [
        text.tokens for text in questions.rolled(engine, one, column, IDS("Z"), controls, samples=6, seed=1)
    ]
    assert [text.tokens for text in texts] != [
        text.tokens for text in questions.rolled(engine, one, column, IDS("Z"), controls, samples=6, seed=2)
    ]


def test_the_same_token_gives_the_same_texts_so_that_only_the_swap_makes_a_difference(policy, engine):
    one, controls = written("abcd"), controls_of(policy)
    column = len(PROMPT) + 1
    ours = questions.rolled(engine, one, column, [one.tokens[column]], controls, samples=3)
    assert ours == questions.rolled(engine, one, column, IDS("b"), controls, samples=3)


def test_log_probs_of_what_was_sampled_are_those_of_scoring(policy, engine):
    one, controls = written("abcd"), controls_of(policy, temperature=0.8)
    texts = questions.rolled(engine, one, len(PROMPT) + 1, IDS("b"), controls, samples=3)
    for text, scored in zip(texts, questions.logprobs_of(policy, texts, controls), strict=True):
        assert scored[2:] == pytest.approx(text.logprobs[len(PROMPT) + 2 :], abs=1e-4)


@pytest.mark.parametrize(("ids", "most", "stop"), [([EOS], 8, "eos"), ([65], 2, "length"), ([65, 66, 67], 2, "length")])
def test_behind_an_end_and_without_room_there_is_nothing_to_sample(policy, engine, ids, most, stop):
    controls = controls_of(policy, max_new_tokens=most)
    texts = questions.rolled(engine, written("abcd"), len(PROMPT) + 1, ids, controls, samples=2)
    assert [text.tokens for text in texts] == [[*IDS("saya"), *ids]] * 2
    assert {text.stop for text in texts} == {stop}
    assert len({text.id for text in texts}) == 2


def test_an_encoder_decoder_model_is_refused_in_words():
    reader = Policy(tiny_encoder_decoder(), byte_tokenizer(), precision="float32", compile=False)
    with pytest.raises(ModelError, match="cannot be sampled on from the middle"):
        questions.refuse_encoder_decoder(reader)
    places = questions.alternatives(reader, written("ab"), controls_of(reader), count=3)
    expected = reader.score(questions._batch(reader, [written("ab")], controls_of(reader)))
    assert [place.chosen.logprob for place in places] == pytest.approx(
        expected.logprobs[0, len(PROMPT) :].tolist(), abs=1e-4
    )


# --- rewards ------------------------------------------------------------------------------------------------


@span_reward
def vowels(sample: Sample) -> list[ScoredSpan]:
    return [ScoredSpan(k, k + 1, 1.0) for k, letter in enumerate(sample.text) if letter in "aeiou"]


@span_reward
def stutter(sample: Sample) -> list[ScoredSpan]:
    text = sample.text
    return [ScoredSpan(k, k + 1, -1.0) for k in range(1, len(text)) if text[k] == text[k - 1]]


PARTS = [Weighted(vowels, 2.0, "vowels"), Weighted(stutter, 0.5, "stutter")]


def test_texts_are_paid_by_part_each_alone():
    texts = [written(text) for text in ["abba", "xyz"] * 20]
    found = questions.paid(PARTS, texts, byte_tokenizer(), step=1)
    assert found == [{"vowels": 4.0, "stutter": -0.5, "total": 3.5}, {"vowels": 0.0, "stutter": 0.0, "total": 0.0}] * 20


def test_a_token_caused_what_the_text_loses_without_it():
    # worth of "abba": 2 vowels x 2, one stutter x -0.5. Without a b the stutter is gone: -0.5 - 0. Without an a: 2.
    found = questions.causes(PARTS, written("abba"), byte_tokenizer(), step=1)
    assert found["vowels"] == [2.0, 0.0, 0.0, 2.0]
    assert found["stutter"] == [0.0, -0.5, -0.5, 0.0]
    assert found["total"] == [2.0, -0.5, -0.5, 2.0]


def test_tokens_that_share_a_character_share_what_it_adds():
    @span_reward
    def foreign(sample: Sample) -> list[ScoredSpan]:
        return [ScoredSpan(k, k + 1, 3.0) for k, letter in enumerate(sample.text) if letter == "列"]

    found = questions.causes([Weighted(foreign, 1.0, "foreign")], written("a列b"), byte_tokenizer(), step=1)
    assert found["foreign"] == pytest.approx([0.0, 1.0, 1.0, 1.0, 0.0])


def test_of_a_long_text_several_tokens_are_taken_out_as_one():
    found = questions.causes(PARTS, written("axxxxa"), byte_tokenizer(), step=1, most=3)
    assert found["vowels"] == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def test_the_effect_is_the_mean_of_the_differences_pair_by_pair():
    was = [{"total": 1.0}, {"total": 5.0}]
    found = questions.effect(was, [{"total": row["total"] + 2.0} for row in was])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_questions_leave_the_episode_as_it_is(policy, engine):
    one = written("abcd")
    before = replace(one, tokens=list(one.tokens), action_mask=list(one.action_mask))
    questions.swapped(one, len(PROMPT), [65], policy.eos_ids)
    questions.rolled(engine, one, len(PROMPT), [65], controls_of(policy), samples=2)
    questions.causes(PARTS, one, byte_tokenizer(), step=1)
    assert one == before
