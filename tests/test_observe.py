"""What is written of a step, and what a notebook shows of stages driven by hand."""

import torch

from pertoken.observe import coloured_texts, episode_records, finding_columns
from pertoken.rewards import Finding
from pertoken.testing import byte_tokenizer
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
