"""From items to episodes: ids untouched, groups and seeds where they belong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pertoken.errors import ModelError
from pertoken.policy.scoring import head_logits
from pertoken.prompts import prompt_ids
from pertoken.rollout.collect import Draws, collect, draw_completions, sample_seed, stem_from, to_episodes
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.types import Item

ITEMS = [Item("a", "first"), Item("b", "the second")]


def episodes(step=0, seed=0, items=ITEMS):
    tokenizer = byte_tokenizer()
    engine = NativeEngine(tiny_model(seed=1), tokenizer, head_logits=head_logits)
    engine.load_weights({}, version=7)
    controls = Controls.resolve(Sampling(max_new_tokens=12), tokenizer, (256,))
    return collect(engine, items, tokenizer, controls, samples_per_prompt=3, run_seed=seed, step=step)


def test_samples_of_an_item_form_a_group_behind_the_same_prompt():
    got = episodes(step=4)
    assert [e.group for e in got] == [0, 0, 0, 1, 1, 1]
    assert [e.id for e in got] == ["4/a/0", "4/a/1", "4/a/2", "4/b/0", "4/b/1", "4/b/2"]
    for e in got:
        prompt = byte_tokenizer().encode(e.item.prompt)
        assert e.tokens[: e.prompt_length] == prompt
        assert e.policy_version == (7, 7)
        assert [(s.start, s.stop, s.role) for s in e.spans] == [
            (0, len(prompt), "prompt"),
            (len(prompt), len(e.tokens), "action"),
        ]
        assert all((lp < 0) == acts for lp, acts in zip(e.logprobs, e.action_mask, strict=True))
    assert len({tuple(e.tokens) for e in got[:3]}) > 1


def test_trap_9_a_truncated_tail_is_not_overwritten_with_an_end():
    for e in episodes():
        assert (e.stop == "eos") == (e.tokens[-1] == 256)
        assert e.terminated == (e.stop == "eos")


def test_a_sample_is_a_function_of_its_place_in_the_run():
    assert [e.tokens for e in episodes(step=2)] == [e.tokens for e in episodes(step=2)]
    assert [e.tokens for e in episodes(step=2)] != [e.tokens for e in episodes(step=3)]
    assert [e.tokens for e in episodes(seed=1)] != [e.tokens for e in episodes(seed=0)]
    alone = episodes(step=2, items=ITEMS[1:])
    assert [e.tokens for e in alone] == [e.tokens for e in episodes(step=2)][3:]
    assert len({sample_seed(0, s, i, k) for s in range(20) for i in "abcde" for k in range(8)}) == 800


def test_messages_go_through_the_chat_template():
    tokenizer = byte_tokenizer()
    talk = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    with pytest.raises(ModelError, match="a conversation of 2 messages, but this tokenizer has no chat template"):
        prompt_ids(Item("x", talk), tokenizer)
    assert tokenizer.decode(prompt_ids(Item("x", talk[1:]), tokenizer)) == "Hi"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}>"
    assert tokenizer.decode(prompt_ids(Item("x", talk), tokenizer)) == "[system] Be brief.\n[user] Hi\n>"


@pytest.mark.parametrize("top_k", [0, 3])
def test_draws_survive_a_trip_through_json(top_k):
    tokenizer, items = byte_tokenizer(), ITEMS
    controls = Controls(Sampling(max_new_tokens=5, top_k=top_k), (256,))
    engine = NativeEngine(tiny_model(seed=1), tokenizer, head_logits=head_logits)
    draws = draw_completions(engine, items, tokenizer, controls, samples_per_prompt=2, run_seed=1, step=3)
    again = Draws.of_state(json.loads(json.dumps(draws.state())))
    for one, other in zip(
        to_episodes(draws, items, tokenizer, step=3), to_episodes(again, items, tokenizer, step=3), strict=True
    ):
        supports = one.support, other.support
        assert (supports[0] is None) == (not top_k)
        assert (supports[0] is None and supports[1] is None) or np.array_equal(*supports)
        assert replace(one, support=None) == replace(other, support=None)
    assert stem_from(again, items, tokenizer, controls, 2)
    assert not stem_from(again, items, tokenizer, controls, 3)
    assert not stem_from(again, items[::-1], tokenizer, controls, 2)
    assert not stem_from(again, items, tokenizer, Controls(Sampling(max_new_tokens=6, top_k=top_k), (256,)), 2)
