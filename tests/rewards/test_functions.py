"""Reward functions as TRL takes them: the same lists in, the same numbers out, on the last action."""

import pytest
import torch

from pertoken.batching import to_batch
from pertoken.errors import RewardError
from pertoken.rewards import CompletionsReward, Scene, Weighted, resolve, score
from pertoken.rewards.functions import takes_completions
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, episode
from pertoken.types import Item

TOKENIZER = byte_tokenizer()


def scene(messages=False, info=None):
    rows = []
    for k, text in enumerate(("one", "", "three")):
        prompt = ({"role": "user", "content": f"say {k}"},) if messages else f"say {k}"
        item = Item(str(k), prompt, f"answer {k}", {} if info is None else {"column": info[k]})
        rows.append(episode(TOKENIZER.encode("p"), [*TOKENIZER.encode(text), 256], id=str(k), item=item))
    return Scene(to_batch(rows, Controls()), rows, TOKENIZER)


def asks(prompts, completions, answer, column=None, **kwargs):
    """Remembers what it was given."""
    asks.given = {"prompts": prompts, "completions": completions, "answer": answer, "column": column, **kwargs}
    return [1.0, None, torch.tensor(2.5).item()]


async def later(completions, **kwargs):
    return [len(text) for text in completions]


def few(completions, factor=1):
    return [factor * len(text) for text in completions]


def test_it_is_given_lists_by_name_and_its_numbers_go_to_the_last_action():
    opinions = CompletionsReward(asks)(scene(info=["a", "b", "c"]))
    assert asks.given["prompts"] == ["say 0", "say 1", "say 2"]
    assert asks.given["completions"] == ["one", "", "three"]
    assert asks.given["answer"] == ["answer 0", "answer 1", "answer 2"]
    assert asks.given["column"] == ["a", "b", "c"]
    assert asks.given["completion_ids"][1] == [256]
    assert opinions.values.sum(1).tolist() == [1.0, 0.0, 2.5]
    assert opinions.abstained.tolist() == [False, True, False]
    assert opinions.values[0].nonzero().tolist() == [[4]]  # prompt, o, n, e, end
    assert opinions.values[2].nonzero().tolist() == [[6]]


def test_messages_come_as_messages():
    CompletionsReward(asks)(scene(messages=True))
    assert asks.given["prompts"][1] == [{"role": "user", "content": "say 1"}]
    assert asks.given["completions"][2] == [{"role": "assistant", "content": "three"}]


def test_it_is_found_by_name_takes_parameters_and_may_be_a_coroutine():
    assert takes_completions(few)
    assert not takes_completions(lambda sample: 0.0)
    reward = resolve(f"{__name__}:few")(factor=3)
    assert score([Weighted(reward, 1.0, "few")], scene()).total.sum(1).tolist() == [9, 0, 15]
    assert CompletionsReward(later)(scene()).sum(1).tolist() == [3, 0, 5]


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda completions: 1.0, "returned float, expected a list of 3 numbers"),
        (lambda completions: [1.0], "returned 1 numbers, expected 3"),
        (lambda completions: ["a", "b", "c"], r"returned 'a' \(str\), expected a number"),
        (lambda completions, solution: [0, 0, 0], "asks for 'solution'.*task.info"),
        (lambda completions: [0, 0, float("nan")], "nan at token"),
    ],
)
def test_what_is_wrong_is_said(fn, words):
    with pytest.raises(RewardError, match=words):
        score([Weighted(CompletionsReward(fn), 1.0, "mine")], scene())
