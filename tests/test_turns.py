"""Several turns in one episode: what is given between them has no log-prob, gets no credit, and takes no time."""

import json
import math
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch

from pertoken.batching import to_batch
from pertoken.config import load_config
from pertoken.credit import gae, leave_one_out_process, reward_to_go
from pertoken.errors import ConfigError, ModelError, RewardError
from pertoken.jobs.run import train
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rewards import (
    NO_OPINION,
    EachTurn,
    Ensemble,
    Scene,
    ScoredSpan,
    Weighted,
    episode_reward,
    make,
    score,
    span_reward,
)
from pertoken.rewards.each_turn import apart
from pertoken.rollout.collect import collect
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_encoder_decoder, tiny_model
from pertoken.tracking import RunReader
from pertoken.tracking.certificate import read_certificate
from pertoken.turns import Reply, converse
from pertoken.types import Completion, Item

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ITEMS = [Item("a", "first"), Item("b", "the second")]


def tokenizer_with(template=None):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


class Says:
    """Answers with the texts of a list, one behind each turn, and then no more; remembers what it was told."""

    def __init__(self, *replies):
        self.replies, self.told = replies, []

    def reply(self, item, messages):
        self.told.append(messages)
        turn = sum(message["role"] == "assistant" for message in messages)
        return self.replies[turn - 1] if turn <= len(self.replies) else None


class Scripted:
    """An engine that says what it was given, turn by turn, and keeps its prompts."""

    version = 3

    def __init__(self, *turns):
        self.turns, self.prompts = list(turns), []

    def generate(self, prompts, controls, *, seeds, taken=None):
        self.prompts.append([list(prompt) for prompt in prompts])
        text, stop = self.turns.pop(0)
        ids = byte_tokenizer().encode(text) + [256] * (stop == "eos")
        return [Completion(ids, [-1.0] * len(ids), stop, None, [0.5] * len(ids)) for _ in prompts]

    def load_weights(self, weights, version):
        self.version = version

    def release(self):
        pass


def episode_of(turns, replies, *, item=ITEMS[0], template=None, max_turns=5, **settings):
    engine, settings = Scripted(*turns), {"context_length": 200} | settings
    (found,) = converse(
        engine,
        [item],
        tokenizer_with(template),
        Controls(),
        environment=Says(*replies),
        max_turns=max_turns,
        **settings,
    )
    return found, engine


def shown(episode):
    decode = byte_tokenizer().decode
    return [(span.role, span.turn, decode(episode.tokens[span.start : span.stop])) for span in episode.spans]


# --- what stands in an episode ------------------------------------------------------------------------------


def test_turns_and_replies_alternate_and_only_turns_are_actions():
    episode, engine = episode_of([("one", "eos"), ("two", "eos")], [" said "])
    assert shown(episode) == [
        ("prompt", 0, "first"),
        ("action", 1, "one<eos>"),
        ("observation", 1, " said "),
        ("action", 2, "two<eos>"),
    ]
    assert episode.action_mask == [False] * 5 + [True] * 4 + [False] * 6 + [True] * 4
    assert [value for value, acts in zip(episode.logprobs, episode.action_mask, strict=True) if not acts] == [0.0] * 11
    assert (episode.stop, episode.policy_version, episode.info["turns"]) == ("eos", (3, 3), 2)
    assert engine.prompts[1] == [episode.tokens[:15]]  # ids go on from ids: nothing is tokenised again


def test_the_environment_is_told_the_conversation():
    environment = Says(Reply("more", "tool"))
    engine = Scripted(("one", "eos"), ("two", "eos"))
    converse(engine, [ITEMS[0]], tokenizer_with(), Controls(), environment=environment, max_turns=5, context_length=99)
    assert environment.told[-1] == (
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "tool", "content": "more"},
        {"role": "assistant", "content": "two"},
    )


@pytest.mark.parametrize(
    ("turns", "replies", "settings", "stop", "actions"),
    [
        ([("one", "eos")], [], {}, "eos", 1),
        ([("one", "stop_string")], [], {}, "stop_string", 1),
        ([("one", "length")], ["more"], {}, "length", 1),  # cut off: it did not end
        ([("one", "length"), ("two", "eos")], ["more"], {"go_on_when_cut": True}, "eos", 2),
        ([("one", "context")], ["more"], {"go_on_when_cut": True}, "context", 1),
        ([("one", "eos"), ("two", "eos")], ["more", "more"], {"max_turns": 2}, "length", 2),  # it would have gone on
        ([("one", "eos")], ["more"], {"context_length": 13}, "context", 1),  # no room to answer
        ([("one", "eos"), ("two", "eos")], ["more"], {"context_length": 14}, "eos", 2),
    ],
)
def test_why_an_episode_ends(turns, replies, settings, stop, actions):
    episode, _ = episode_of(turns, replies, **settings)
    assert (episode.stop, episode.terminated) == (stop, stop in ("eos", "stop_string"))
    assert episode.info["turns"] == actions
    assert episode.action_mask[-1]  # no reply is left without an answer


def test_a_chat_goes_on_through_its_template_with_one_end_token():
    item = Item("c", ({"role": "user", "content": "hi"},))
    for ended, between in (
        ("eos", "\n<user>more<eos>\n<assistant>"),
        ("stop_string", "<eos>\n<user>more<eos>\n<assistant>"),
    ):
        episode, _ = episode_of([("one", ended), ("two", "eos")], ["more"], item=item, template=TEMPLATE)
        assert shown(episode)[2] == ("observation", 1, between)
        rendered = tokenizer_with(TEMPLATE).apply_chat_template(
            [*item.prompt, {"role": "assistant", "content": "one"}, {"role": "user", "content": "more"}],
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
        assert byte_tokenizer().decode(episode.tokens).removesuffix("two<eos>") == rendered


def test_a_role_that_the_template_refuses_is_named():
    item = Item("c", ({"role": "user", "content": "hi"},))
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + TEMPLATE
    with pytest.raises(ModelError, match="role 'tool'"):
        episode_of([("one", "eos")], [Reply("3", "tool")], item=item, template=template + "{% endfor %}")


# --- rewards ------------------------------------------------------------------------------------------------


def test_a_turn_is_paid_on_its_last_token_or_by_ranges():
    replies = [Reply("more", reward=2.0), Reply(None, reward=[ScoredSpan(0, 2, 1.0), ScoredSpan(2, 3, -0.5)])]
    episode, _ = episode_of([("one", "eos"), ("two", "eos")], replies)
    assert episode.env_rewards == [0.0] * 5 + [0, 0, 0, 2.0] + [0.0] * 4 + [0.5, 0.5, -0.5, 0.0]
    batch = to_batch([episode], Controls())
    rewards = score([], Scene(batch, [episode], byte_tokenizer()))
    assert rewards.parts["env"][0].tolist() == episode.env_rewards


def test_a_range_beyond_the_turn_is_refused():
    with pytest.raises(RewardError, match="turn 1"):
        episode_of([("one", "eos")], [Reply(None, reward=[ScoredSpan(0, 4, 1.0)])])


def paid(reward):
    """A reply as it comes from a person: nobody has looked at its types."""
    reply = Reply("b")
    object.__setattr__(reply, "reward", reward)
    return reply


FAULTS = {
    "raises": (lambda: {}["key"], r"raised KeyError: 'key'"),
    "exits": (lambda: sys.exit(3), "raised SystemExit"),
    "nan": (lambda: paid(math.nan), "it paid nan, expected a finite number"),
    "infinite": (lambda: paid([ScoredSpan(0, 1, math.inf)]), "it paid inf, expected a finite number"),
    "too large": (lambda: paid(10**400), "it paid 1000*, expected a finite number"),
    "no number": (lambda: paid("1"), "it paid '1', expected a finite number"),
    "no span": (lambda: paid([(0, 1, 2.0)]), "expected a ScoredSpan"),
    "no text": (lambda: 5, "it said 5 as 'user', expected texts"),
    "half a character": (lambda: "a\ud83d", r"it said 'a\\ud83d' as 'user', expected texts"),
    "hangs": (lambda: threading.Event().wait(60), r"no answer within 0\.3 s\. It is at .*threading\.py"),
}


@pytest.mark.parametrize(("answer", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_environment_names_item_and_turn(answer, words):
    class Faulty:
        def reply(self, item, messages):
            return "go on" if len(messages) < 4 else answer()

    engine = Scripted(("one", "eos"), ("two", "eos"))
    with pytest.raises(RewardError, match=r"the environment, item 'a', turn 2: .*" + words):
        converse(
            engine, [ITEMS[0]], tokenizer_with(), Controls(), environment=Faulty(), max_turns=5, context_length=200,
            time_limit=0.3,
        )  # fmt: skip


def test_rewards_of_texts_see_all_of_it_and_pay_actions_alone():
    episode, _ = episode_of([("one", "eos"), ("two", "eos")], [" said "])
    seen = []

    @episode_reward(place="spread")
    def all_of_it(sample):
        seen.append(sample.text)
        return 8.0

    batch = to_batch([episode], Controls())
    total = score([Weighted(all_of_it, 1.0, "all")], Scene(batch, [episode], byte_tokenizer())).total
    assert seen == ["one said two"]
    assert total[0].tolist() == [float(acts) for acts in episode.action_mask]


def test_a_reward_of_each_turn_is_paid_on_its_turn():
    """Five characters too many in the second of three turns; words are counted turn by turn, whatever was replied."""
    episode, _ = episode_of([("one", "eos"), ("a b c d", "eos"), ("two", "eos")], [" and five more words ", " so? "])
    reward = make("each_turn", {"reward": {"name": "length", "max_words": 2, "cost": 1.0, "weight": 0.5}}, "rewards.0")
    batch = to_batch([episode], Controls())
    total = score([Weighted(reward, 1.0, "turns")], Scene(batch, [episode], byte_tokenizer())).total[0]
    spans = [span for span in episode.spans if span.role == "action"]
    assert [total[span.start : span.stop].sum().item() for span in spans] == [0.0, -1.0, 0.0]
    assert total[~batch.action_mask[0]].abs().sum() == 0


def test_each_turn_is_a_completion_of_what_was_said_before():
    told = []

    @episode_reward
    def told_of(sample):
        told.append((sample.item.prompt, sample.text, sample.stop, len(sample.tokens)))
        return float(len(told))

    episode, _ = episode_of(
        [("one", "length"), ("two", "eos")], [" said "], item=Item("a", ({"role": "user", "content": "hi"},), "x"),
        max_turns=2, go_on_when_cut=True,
    )  # fmt: skip
    other, _ = episode_of([("no", "eos")], [None], item=Item("b", "hi", "x"))
    other = replace(other, group=1)
    batch = to_batch([episode, other], Controls())
    scene, rows = apart(Scene(batch, [episode, other], byte_tokenizer()))
    values = told_of(scene)
    first = ({"role": "user", "content": "hi"},)
    middle = (*first, {"role": "assistant", "content": "one"}, {"role": "user", "content": " said "})
    assert [each[0] if isinstance(each[0], str) else tuple(each[0]) for each in told] == [first, middle, "hi"]
    assert [each[1:] for each in told] == [("one", "length", 3), ("two", "eos", 4), ("no", "eos", 3)]
    assert scene.batch.group.tolist() == [0, 1, 2], "first turns are compared with first turns"
    assert (rows.tolist(), scene.batch.terminated.tolist()) == ([0, 0, 1], [False, True, True])
    assert values.sum(1).tolist() == [1.0, 2.0, 3.0]


def test_a_turn_without_an_opinion_leaves_those_of_the_others(monkeypatch):
    @span_reward
    def of_short_ones(sample):
        return NO_OPINION if len(sample.text) > 3 else [ScoredSpan(0, 1, 1.0)]

    monkeypatch.setitem(sys.modules, "of_turns", types.SimpleNamespace(of_short_ones=of_short_ones))
    both, _ = episode_of([("one", "eos"), ("three", "eos")], [" said "])
    neither, _ = episode_of([("three", "eos"), ("seven", "eos")], [" said "], item=Item("b", "hi", "x"))
    batch = to_batch([both, neither], Controls())
    said = EachTurn({"fn": "of_turns:of_short_ones"})(Scene(batch, [both, neither], byte_tokenizer()))
    assert (said.values.sum(1).tolist(), said.abstained.tolist()) == ([1.0, 0.0], [False, True])


def test_what_remembers_is_no_reward_within_another_one(monkeypatch):
    with pytest.raises(ConfigError, match=r"each_turn.reward: expected a mapping"):
        EachTurn({"max_words": 3})

    class Remembers:
        def __call__(self, scene):
            return torch.zeros(scene.batch.tokens.shape)

        def get_state(self):
            return None

        def set_state(self, state):
            pass

    monkeypatch.setitem(sys.modules, "of_turns", types.SimpleNamespace(Remembers=Remembers))
    for made in (EachTurn, lambda entry: Ensemble([entry, entry])):
        with pytest.raises(ConfigError, match="of_turns:Remembers remembers or learns"):
            made({"fn": "of_turns:Remembers"})


# --- the maths steps over what was given --------------------------------------------------------------------


@pytest.fixture
def sampled():
    """Real episodes of a tiny model, in two turns, with replies of different lengths."""
    tokenizer = byte_tokenizer()
    policy = Policy(tiny_model(seed=1), tokenizer, precision="float32")
    engine = NativeEngine(policy.model, tokenizer, head_logits=head_logits)

    class Counts:
        def reply(self, item, messages):
            return None if len(messages) > 2 else Reply("x" * (3 + len(item.prompt)), reward=1.0)

    def of(**sampling):
        controls = Controls.resolve(Sampling(max_new_tokens=5, **sampling), tokenizer, (256,))
        episodes = converse(
            engine, ITEMS, tokenizer, controls, environment=Counts(), max_turns=2, context_length=128,
            go_on_when_cut=True, samples_per_prompt=3, step=2,
        )  # fmt: skip
        return policy, episodes, to_batch(episodes, controls), controls

    return of


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7, "top_p": 0.8}, {"repetition_penalty": 1.5}, {"top_k": 5}]
)
def test_trap_13_the_ratio_is_1_behind_what_was_given(sampled, sampling):
    policy, episodes, batch, _ = sampled(**sampling)
    assert all(span.role == "observation" for e in episodes for span in e.spans[2:3])
    assert torch.allclose(policy.score(batch).logprobs, batch.sample_logprobs, atol=1e-4)


def test_the_first_turn_is_what_a_single_turn_would_be(sampled):
    policy, episodes, _, controls = sampled()
    engine = NativeEngine(policy.model, byte_tokenizer(), head_logits=head_logits)
    alone = collect(engine, ITEMS, byte_tokenizer(), controls, samples_per_prompt=3, step=2)
    for many, one in zip(episodes, alone, strict=True):
        assert many.tokens[: len(one.tokens)] == one.tokens
        assert (many.id, many.group) == (one.id, one.group)
    assert len({tuple(e.tokens[e.spans[3].start :]) for e in episodes}) > 1


def without_observations(cells, mask):
    return [row[acts].tolist() for row, acts in zip(cells, mask, strict=True)]


def test_returns_and_gae_are_those_of_the_actions_alone(sampled):
    """The rows without what was given have the same returns and advantages: it takes no time and no value."""
    _, episodes, batch, _ = sampled()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(batch.tokens.shape, generator=generator)
    rewards = torch.randn(batch.tokens.shape, generator=generator) * batch.action_mask
    bare = [
        replace(
            e,
            **{
                name: [cell for cell, acts in zip(getattr(e, name), e.action_mask, strict=True) if acts]
                for name in ("tokens", "logprobs", "env_rewards", "entropies")
            },
            action_mask=[True] * sum(e.action_mask),
            spans=[],
        )
        for e in episodes
    ]
    width = max(sum(e.action_mask) for e in episodes)
    mask = torch.tensor([[k < len(e.tokens) for k in range(width)] for e in bare])

    def packed(cells):
        rows = [row[acts] for row, acts in zip(cells, batch.action_mask, strict=True)]
        return torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])

    bootstrap = torch.randn(len(episodes), generator=generator)
    for estimate in (
        lambda r, v, m: reward_to_go(r, m, gamma=0.9),
        lambda r, v, m: gae(r, v, m, bootstrap, gamma=0.9, lam=0.8)[0],
        lambda r, v, m: leave_one_out_process(r, m, batch.group, gamma=1.0),
    ):
        holed = estimate(rewards, values, batch.action_mask)
        assert without_observations(holed, batch.action_mask) == [
            pytest.approx(row, abs=1e-5)
            for row in without_observations(estimate(packed(rewards), packed(values), mask), mask)
        ]
        assert not holed[~batch.action_mask].any()


def test_trap_r2_a_constant_value_gives_no_advantage_across_a_reply(sampled):
    _, _, batch, _ = sampled()
    mask = batch.action_mask
    rewards = torch.zeros(mask.shape)
    for row, acts in enumerate(mask):
        rewards[row, acts.nonzero()[-1]] = 0.8
    values = torch.full(mask.shape, 0.8)
    advantages, _ = gae(rewards, values, mask, torch.zeros(len(mask)), gamma=1.0, lam=0.95)
    assert advantages.abs().max() < 1e-6


# --- what cannot be -----------------------------------------------------------------------------------------


def test_what_has_no_meaning_in_turns_is_refused():
    tokenizer = byte_tokenizer()
    settings = {
        "items": ITEMS, "tokenizer": tokenizer, "environment": Says(), "max_turns": 2, "context_length": 99,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="min_new_tokens"):
        converse(Scripted(), controls=Controls(Sampling(min_new_tokens=1)), **settings)
    with pytest.raises(ConfigError, match="max_turns"):
        converse(Scripted(), controls=Controls(), **settings | {"max_turns": 0})
    engine = NativeEngine(tiny_encoder_decoder(), tokenizer, head_logits=head_logits)
    with pytest.raises(ModelError, match="causal"):
        converse(engine, controls=Controls(), **settings)


# --- in a run -----------------------------------------------------------------------------------------------

TOOLS = """
from pathlib import Path

from pertoken.turns import Reply

class Counter:
    def __init__(self, letter="e"):
        self.letter = letter

    def reply(self, item, messages):
        if item.prompt and Path("broken").exists():
            raise ValueError("no connection")
        found = messages[-1]["content"].count(self.letter)
        turns = sum(message["role"] == "assistant" for message in messages)
        return Reply(f" {found} more: " if turns < 2 else None, reward=float(found))
"""


@pytest.fixture
def run_of(tmp_path, monkeypatch, model_folder):
    (tmp_path / "my_tools.py").write_text(TOOLS)
    (tmp_path / "data.csv").write_text("prompt,reference\n" + "".join(f"say {k},it {k}\n" for k in range(30)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tools", raising=False)

    def of(*overrides):
        (tmp_path / "recipe.yaml").write_text(
            f"policy: {{model: {model_folder}, precision: float32, device: cpu, compile: false}}\n"
            "task: {path: data.csv, prompt: '{prompt}'}\n"
            "rollout:\n"
            "  turns: {fn: 'my_tools:Counter', parameters: {letter: a}, go_on_when_cut: true}\n"
            "  prompts_per_step: 2\n  samples_per_prompt: 3\n  sampling: {max_new_tokens: 5}\n"
            "rewards: [{name: repetition}]\n"
            "evaluation: {items: 3, sampling: {temperature: 0, max_new_tokens: 4}}\n"
            "stop: {steps: 2}\n"
        )
        return load_config(["recipe.yaml"], overrides)

    return of


@pytest.mark.parametrize("overrides", [[], ["credit.type=gae", "policy.value_head={}"], ["rollout.sampling.top_p=0.9"]])
def test_a_run_in_turns_trains_evaluates_and_keeps_its_episodes(run_of, overrides):
    result = train(run_of("folder=run", *overrides))
    assert result.reason == "made all 2 steps"
    reader = RunReader("run")
    for record in reader.episodes(1):
        acts = record["tokens"]["action"]
        first, last = acts.index(True), len(acts) - acts[::-1].index(True) - 1
        assert False in acts[first:last]  # a hole, where the tool spoke
        assert " more: " in "".join(record["tokens"]["piece"])
        for name in ("logprob", "advantage", "ratio", "kl"):
            assert not any(value for value, chosen in zip(record["streams"][name], acts, strict=True) if not chosen)
    for row in reader.evaluations():
        assert row["items"]["words"]
    certificate = read_certificate(result.folder)
    assert certificate.passed, [line for line in certificate.lines if line.outcome == "fail"]


def test_the_held_out_answer_is_the_last_turn(run_of):
    from pertoken import assembly

    config = run_of()
    policy = assembly.build_policy(config)
    evaluator, _ = assembly.build_evaluator(config, assembly.build_task(config.task), policy)
    rows = evaluator(assembly.build_engine(policy, config.rollout), policy, None).rows
    for row in rows:
        acts, pieces = row["tokens"]["action"], row["tokens"]["piece"]
        last = len(acts) - acts[::-1].index(False)
        assert row["output"] == "".join(pieces[last:]).removesuffix("<eos>")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.ahead=true", "objective.importance_cap=2"], "turn by turn"),
        (["rollout.redraws=1"], "turn by turn"),
        (["credit.type=self_critical"], "has several"),
    ],
)
def test_what_is_for_one_turn_is_refused(run_of, overrides, words):
    with pytest.raises(ConfigError, match=words):
        run_of(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.turns.fn=my_tools:Reply", "rollout.turns.parameters={text: x}"], "no method reply"),
        (["rollout.turns.fn=my_tools:Count"], "did you mean 'Counter'"),
        (["rollout.turns.parameters={word: e}"], "word"),
    ],
)
def test_an_environment_that_cannot_be_made_is_named(run_of, overrides, words):
    with pytest.raises(ConfigError, match=words):
        train(run_of("folder=run", *overrides))


def test_an_environment_that_fails_costs_the_step_that_it_fails_in(run_of, tmp_path):
    whole = train(run_of("folder=whole", "stop.steps=4"))

    def break_it(report, seconds):
        if report.step == 2:
            (tmp_path / "broken").touch()

    config = run_of("folder=run", "stop.steps=4")
    with pytest.raises(RewardError, match=r"turn 1: raised ValueError: no connection \(step 2 is saved: `--resume`"):
        train(config, on_step=break_it)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    (tmp_path / "broken").unlink()
    train(config, resume=tmp_path / "run")
    found, wanted = (
        (folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", whole.folder)
    )
    assert found == wanted
