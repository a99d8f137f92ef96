"""What is written of a step, and what a notebook shows of stages driven by hand."""

from dataclasses import replace

import pytest
import torch

from pertoken.batching import to_batch
from pertoken.observe import alternative_columns, coloured_texts, episode_records, finding_columns
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rewards import Finding
from pertoken.rollout.collect import to_episode
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling, Segment
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.types import Episode, Item

TOKENIZER = byte_tokenizer()
TOKENS = [*TOKENIZER.encode("ask"), *TOKENIZER.encode("ab")]
START = len(TOKENS) - 2
ZEROS, ACTS = [0.0] * len(TOKENS), [False] * START + [True, True]
EPISODE = Episode("e", Item("i", "ask"), 0, TOKENS, ACTS, ZEROS, ZEROS, [], "eos", (0, 0))
ADVANTAGES = torch.tensor([[0.0] * START + [0.5, -1.0]])
FINDING = Finding("repetition", START, START + 1, -0.05, "repeats 'so it is'")


def test_what_rewards_found_is_written_where_there_is_something():
    entry = {"part": "repetition", "start": START, "stop": START + 1, "value": -0.05, "message": "repeats 'so it is'"}
    assert finding_columns([FINDING]) == {"findings": [entry]}
    assert finding_columns([]) == {}


def test_a_record_has_the_findings_of_its_episode():
    streams = {"advantage": ADVANTAGES.expand(2, -1)}
    records = episode_records([EPISODE, EPISODE], streams, TOKENIZER, step=1, findings=[[], [FINDING]])
    assert ["findings" in record for record in records] == [False, True]
    assert records[1]["streams"]["advantage"][START:] == [0.5, -1.0]
    assert "findings" not in episode_records([EPISODE], {"advantage": ADVANTAGES}, TOKENIZER, step=1)[0]


def test_stages_by_hand_are_shown_in_colour():
    (text,) = coloured_texts([EPISODE], {"advantage": ADVANTAGES}, TOKENIZER, by="advantage")
    assert (text.pieces, text.values) == (["a", "b"], [0.5, -1.0])


# --- what else could have stood there -----------------------------------------------------------------------


def drawn(policy, **sampling):
    """A batch of texts of several lengths, two of the same prompt, as the engine drew them."""
    controls = Controls.resolve(Sampling(**{"max_new_tokens": 12} | sampling), TOKENIZER, policy.eos_ids)
    prompts = [TOKENIZER.encode(text) for text in ("ask", "a longer request", "ask")]
    engine = NativeEngine(policy.model, TOKENIZER, head_logits=head_logits)
    texts = engine.generate(prompts, controls, seeds=range(3))
    rows = zip(prompts, texts, strict=True)
    episodes = [to_episode(str(k), Item(str(k), "p"), k % 2, *row, 0) for k, row in enumerate(rows)]
    return episodes, to_batch(episodes, controls)


def columns_of(policy, batch, count):
    return alternative_columns(policy.score_with_alternatives(batch, batch.controls, count)[1], batch, TOKENIZER)


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(seed=3), TOKENIZER, precision="float32", compile=False)


@pytest.mark.parametrize("tokens", [8192, 1], ids=["one pass", "many passes"])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_k": 5}, {"min_new_tokens": 4, "segment": Segment(tokens=4, context=2)}],
    ids=["plain", "cut", "segments"],
)
def test_alternatives_are_of_the_distribution_that_the_tokens_were_drawn_from(policy, monkeypatch, sampling, tokens):
    monkeypatch.setattr(policy.portion, "size", tokens)
    episodes, batch = drawn(policy, **sampling)
    rows = columns_of(policy, batch, 300)
    for one, found in zip(episodes, (row["alternatives"] for row in rows), strict=True):
        assert len(found["id"]) == len(found["rank"]) == len(found["logprob"]) == len(one.tokens)
        for at, (token, acts) in enumerate(zip(one.tokens, one.action_mask, strict=True)):
            if not acts:
                assert (found["rank"][at], found["id"][at], found["logprob"][at]) == (0, [], [])
                continue
            assert found["id"][at][found["rank"][at] - 1] == token
            assert found["logprob"][at][found["rank"][at] - 1] == pytest.approx(one.logprobs[at], abs=1e-3)
            assert found["logprob"][at] == sorted(found["logprob"][at], reverse=True)
            if "top_k" in sampling:
                assert len(found["id"][at]) == 5
        letter = str(TOKENIZER.encode("e")[0])
        assert found["piece"].get(letter, "e") == "e"
        assert found["piece"].keys() == {str(token) for ids in found["id"] for token in ids}


def test_few_alternatives_are_the_first_of_many(policy):
    _, batch = drawn(policy)
    many, few = (columns_of(policy, batch, count) for count in (300, 2))
    for all_of_them, first in zip(many, few, strict=True):
        assert first["alternatives"]["id"] == [ids[:2] for ids in all_of_them["alternatives"]["id"]]
        assert set(first["alternatives"]["piece"]) == {str(t) for ids in first["alternatives"]["id"] for t in ids}


@pytest.mark.parametrize("segment", [None, Segment(tokens=4, context=2)], ids=["whole", "segments"])
@pytest.mark.parametrize("tokens", [8192, 1], ids=["one pass", "many passes"])
def test_scores_beside_alternatives_are_those_alone_whatever_the_controls_of_these(
    policy, monkeypatch, segment, tokens
):
    monkeypatch.setattr(policy.portion, "size", tokens)
    _, batch = drawn(policy, segment=segment)
    controls = replace(batch.controls, sampling=batch.controls.sampling.model_copy(update={"temperature": 0.5}))
    output, found = policy.score_with_alternatives(batch, controls, 5)
    scored = policy.score(batch)
    assert output.hidden is None
    torch.testing.assert_close(output.logprobs, scored.logprobs)
    torch.testing.assert_close(output.entropy, scored.entropy)
    plain = policy.score_with_alternatives(batch, batch.controls, 5)[1]
    assert torch.equal(found.ids[:, 0], plain.ids[:, 0])
    assert (found.logprobs[:, 0] > plain.logprobs[:, 0]).all(), "colder"
