"""Long texts by segments: in a context that holds all of them nothing changes; in a smaller one every token is what it
was drawn as, credit flows over the ends of segments, and no row grows with the text."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from pertoken import assembly, credit
from pertoken.batching import optimizer_steps, to_batch
from pertoken.config import Gae, LeaveOneOut, RewardToGo, RunConfig
from pertoken.doctor import examine
from pertoken.errors import ConfigError, ModelError, TaskError
from pertoken.jobs import run
from pertoken.policy.model import Policy, ValueHead
from pertoken.policy.scoring import head_logits
from pertoken.rollout.by_generate import TransformersEngine
from pertoken.rollout.collect import to_episode
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling, Segment
from pertoken.segments import cut
from pertoken.testing import byte_tokenizer, episode, tiny_encoder_decoder, tiny_model
from pertoken.training import trainer, updating
from pertoken.training.assignment import assign
from pertoken.types import Credit, Item, PolicyOutput, TokenRewards
from tests.rollout.test_ratio import CONTROLS
from tests.test_trainer import data, importable, metrics_of, settings  # noqa: F401

PROMPTS = [[5, 9, 12, 9, 12, 7], [1, 2, 3], [5, 9, 12, 9, 12, 7]]
SHORT = Segment(tokens=4, context=5)


def controls(segment, eos=(256,), **sampling):
    made = Sampling(**{"max_new_tokens": 18, **sampling}, segment=segment)
    return Controls.resolve(made, byte_tokenizer(), eos)


def engine_of(kind, model, **settings):
    if kind == "native":
        return NativeEngine(model, byte_tokenizer(), head_logits=head_logits, **settings)
    return TransformersEngine(model, byte_tokenizer(), context_length=128, **settings)


def policy_of(model, **settings):
    head = ValueHead(32, detach_trunk=False)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(5))
    return Policy(model, byte_tokenizer(), precision="float32", value_head=head, compile=False, **settings)


def sampled(engine, asked, *, prompts=PROMPTS):
    """Episodes of one sample for each prompt; equal prompts are a group."""
    completions = engine.generate(prompts, asked, seeds=range(len(prompts)))
    return [
        to_episode(str(k), Item(str(k), "p"), prompts.index(prompts[k]), prompts[k], completion, version=0)
        for k, completion in enumerate(completions)
    ]


def unsegmented(batch):
    """The same batch, as if each text had been written in one piece."""
    plain = batch.controls.sampling.model_copy(update={"segment": None})
    return replace(batch, controls=replace(batch.controls, sampling=plain))


@torch.no_grad()
def by_definition(policy, ids, prompt, segment):
    """Log-prob and value of each token of a text, and the value behind it, each from a pass of its own over what it
    sees."""
    source, text, logprobs, values = ids[:prompt], ids[prompt:], [], []
    for t in range(len(text) + 1):
        last_of = t if t < len(text) else t - 1  # what is behind the text is seen by its last segment
        seen = source + text[segment.seen_from(last_of) : t]
        states = policy.hf_model.base_model(torch.tensor([seen])).last_hidden_state[:, -1]
        values.append(policy.value_head(states).item())
        if t < len(text):
            logprobs.append(head_logits(policy.hf_model, states).log_softmax(1)[0, text[t]].item())
    return logprobs, values[:-1], values[-1]


# --- what is cut, and put back -----------------------------------------------------------------------------


def batch_by_hand():
    """Texts of 5, 0 and 2 tokens behind prompts of 2, 3 and 2; the first was cut off."""
    episodes = [
        episode([1, 2], [11, 12, 13, 14, 15], id="a", stop="length"),
        episode([1, 2, 3], [], id="b", group=1),
        episode([1, 2], [21, 22], id="c"),
    ]
    return to_batch(episodes, Controls(Sampling(temperature=0.7, segment=Segment(tokens=2, context=1))), pad_id=99)


def test_segments_by_hand():
    pieces = cut(batch_by_hand())
    rows = pieces.batch
    assert rows.tokens.tolist() == [
        [1, 2, 11, 12, 0],
        [1, 2, 12, 13, 14],
        [1, 2, 14, 15, 0],
        [1, 2, 3, 0, 0],
        [1, 2, 21, 22, 0],
    ]
    assert rows.attention_mask.sum(1).tolist() == [4, 5, 4, 3, 4]
    assert [[k for k, acts in enumerate(row) if acts] for row in rows.action_mask.tolist()] == [
        [2, 3], [3, 4], [3], [], [2, 3]
    ]  # fmt: skip
    assert rows.whole.text.tolist() == [0, 0, 0, 1, 2]
    assert rows.whole.before.tolist() == [0, 2, 4, 0, 0]
    assert rows.whole.actions.tolist() == [5, 5, 5, 0, 2]
    assert rows.terminated.tolist() == [False, False, False, True, True]
    assert rows.group.tolist() == [0, 0, 0, 1, 0]
    assert rows.controls == Controls(Sampling(temperature=0.7)), "the segments are gone, and all else is as it was"
    assert cut(rows) is None
    assert rows.episode_ids[1] == "a, its part from token 4"


def test_all_that_is_known_of_a_token_goes_with_it():
    batch = batch_by_hand()
    numbers = torch.arange(1.0, 22.0).view(3, 7)
    acting = numbers * batch.action_mask
    known = replace(
        batch, sample_logprobs=-acting, env_rewards=acting / 2, sample_entropy=acting * 2,
        turn=(numbers * batch.attention_mask).long(), support=torch.arange(14, dtype=torch.uint8).view(7, 2),
    )  # fmt: skip
    pieces = cut(known)
    rows = pieces.batch
    wanted = torch.tensor([
        [0, 0, 3, 4, 0],
        [0, 0, 0, 5, 6],
        [0, 0, 0, 7, 0],
        [0] * 5,
        [0, 0, 17, 18, 0],
    ])  # fmt: skip
    assert torch.equal(rows.sample_logprobs, -wanted.float())
    assert torch.equal(rows.env_rewards, wanted / 2)
    assert torch.equal(rows.sample_entropy, wanted * 2.0)
    assert rows.turn.tolist() == [
        [1, 2, 3, 4, 0], [1, 2, 4, 5, 6], [1, 2, 6, 7, 0], [8, 9, 10, 0, 0], [15, 16, 17, 18, 0]
    ]  # fmt: skip
    assert torch.equal(rows.support, known.support)
    assert pieces.shape == (3, 7)
    assert cut(batch).batch.sample_entropy is cut(batch).batch.support is None
    assert [name.partition(", ")[2] for name in rows.episode_ids] == [
        f"its part from token {k}" for k in (2, 4, 6, 3, 2)
    ]


def test_what_is_taken_and_put_back_is_the_same_and_each_action_once():
    batch = batch_by_hand()
    pieces = cut(batch)
    assert pieces.batch.num_actions == batch.num_actions == 7
    cells = torch.arange(21.0).view(3, 7) * batch.action_mask
    for found in (cells, torch.stack([cells, -cells], 2)):
        assert torch.equal(pieces.put(pieces.take(found)), found)
    garbage = torch.full_like(pieces.batch.sample_logprobs, torch.nan)
    noisy = torch.where(pieces.batch.action_mask, pieces.take(cells), garbage)
    assert torch.equal(pieces.put(noisy), cells)


def test_the_value_behind_a_text_is_that_behind_its_last_segment():
    pieces = cut(batch_by_hand())
    zeros = torch.zeros(5, 5)
    found = pieces.joined(PolicyOutput(zeros, zeros, zeros, bootstrap=torch.arange(5.0)))
    assert found.bootstrap.tolist() == [2.0, 3.0, 4.0]
    assert pieces.taken(found).bootstrap is None
    assert pieces.joined(PolicyOutput(zeros, zeros)).bootstrap is None


def test_credit_of_the_texts_at_the_segments():
    pieces = cut(batch_by_hand())
    cells = torch.arange(1.0, 22.0).view(3, 7)
    wanted = torch.tensor([[0, 0, 3, 4, 0], [0, 0, 0, 5, 6], [0, 0, 0, 7, 0], [0] * 5, [0, 0, 17, 18, 0]]).float()
    given = pieces.credit(Credit(cells, -cells))
    assert torch.equal(given.advantages, wanted)
    assert torch.equal(given.returns, -wanted)
    assert pieces.credit(Credit(cells)).returns is None


def test_a_text_without_actions_is_one_segment_however_short_those_are():
    empty = to_batch([episode([1, 2], [], id="a")], Controls(Sampling(segment=Segment(tokens=1, context=1))), pad_id=0)
    assert cut(empty).batch.tokens.tolist() == [[1, 2]]


# --- in a context that holds everything, nothing changes -----------------------------------------------------


@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("sampling", [{}, CONTROLS["all"]], ids=["plain", "all controls"])
def test_the_same_tokens_are_drawn(kind, sampling):
    model = tiny_model()
    whole = engine_of(kind, model).generate(PROMPTS, controls(None, **sampling), seeds=[1, 2, 3])
    segment = Segment(tokens=5, context=100)
    pieces = engine_of(kind, model, max_rows=2).generate(PROMPTS, controls(segment, **sampling), seeds=[1, 2, 3])
    for a, b in zip(whole, pieces, strict=True):
        assert (a.tokens, a.stop) == (b.tokens, b.stop)
        assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)
    assert max(len(a.tokens) for a in whole) > 10


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("sampling", [{}, CONTROLS["all"]], ids=["plain", "all controls"])
def test_scores_and_credit_are_those_of_the_text_in_one_piece(layout, sampling):
    asked, model = controls(Segment(tokens=5, context=100), **sampling), tiny_model()
    policy = policy_of(model, layout=layout, tokens_per_pass=20)
    batch = to_batch(sampled(engine_of("native", model), asked), asked)
    cells = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0)) * batch.action_mask
    rewards = TokenRewards(cells, {"a": cells})
    whole, pieces = policy.score(unsegmented(batch)), policy.score(batch)
    for name in ("logprobs", "entropy", "values", "bootstrap"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-5, atol=1e-5, msg=name)
    for config in (Gae(lam=0.9, gamma=0.99), RewardToGo(gamma=0.9)):
        a, b = (assign(config, rewards, batch, old) for old in (whole, pieces))
        torch.testing.assert_close(b.advantages, a.advantages, rtol=1e-5, atol=1e-5)


CHANGES = {
    "critic": {"credit": {"type": "gae"}, "policy__value_head": {}, "policy__compile": False},
    "sequence": {"objective": {"over": "sequence"}},
    "constant": {"objective": {"over": "constant"}, "kl": {"place": "loss", "coefficient": 0.3, "estimator": "exact"}},
    "entropy": {"objective": {"entropy_coefficient": 0.1}, "rollout__sampling": {"max_new_tokens": 8, "top_p": 0.9}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_gradient_is_that_of_the_text_in_one_piece(model_folder, data, tmp_path, monkeypatch, name):  # noqa: F811
    made = assembly.build_run(settings(model_folder, data, tmp_path, evaluation__items=0, **CHANGES[name]))
    if made.reference is not None:  # one that differs
        with torch.no_grad():
            for cell in made.reference.tensors().values():
                cell.mul_(1.1)
    found = []

    def keep_gradient(run, bad, step, head_only=False):
        found.append({k: p.grad.clone() for k, p in run.policy.trainable().items()})
        run.optimizer.zero_grad(set_to_none=False)
        return 1.0

    monkeypatch.setattr(updating, "step_optimizer", keep_gradient)
    episodes, streams = trainer.generate(made, 1), []
    for segment in (None, Segment(tokens=3, context=100)):
        sampling = made.controls.sampling.model_copy(update={"segment": segment})
        batch = to_batch(episodes, replace(made.controls, sampling=sampling))
        old, ref = made.policy.score(batch), trainer.score_reference(made, batch)
        advantages = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(1)) * batch.action_mask
        given = Credit(advantages, None if old.values is None else old.values + advantages)
        streams.append(updating.update(made, batch, old, ref, given, 1).streams)
    whole, pieces = found
    assert whole.keys() == pieces.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close(pieces[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=key)
    assert any(gradient.any() for gradient in whole.values())
    assert streams[0].keys() == streams[1].keys()
    for key, cells in streams[0].items():
        torch.testing.assert_close(streams[1][key], cells, rtol=1e-5, atol=1e-5, msg=key)


# --- in a smaller one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["native", "transformers"])
@pytest.mark.parametrize("name", CONTROLS)
def test_every_token_is_scored_as_it_was_drawn(kind, name):
    model, asked = tiny_model(), controls(SHORT, **CONTROLS[name])
    episodes = sampled(engine_of(kind, model, max_rows=2), asked)
    batch = to_batch(episodes, asked)
    gap = (policy_of(model).score(batch).logprobs - batch.sample_logprobs)[batch.action_mask].abs()
    assert gap.max() < 1e-4
    far = (policy_of(model).score(unsegmented(batch)).logprobs - batch.sample_logprobs)[batch.action_mask].abs()
    assert far.max() > 1e-2, "and not as the whole text would be"


def test_scores_are_those_of_what_a_segment_sees():
    """Also where rollouts go on from the middle of a text, whatever segment that is in."""
    asked, model = controls(SHORT, min_new_tokens=18), tiny_model()
    engine, policy = engine_of("native", model), policy_of(model)
    (row,) = sampled(engine, asked, prompts=[PROMPTS[0]])
    logprobs, values, behind = by_definition(policy, row.tokens, 6, SHORT)
    plain = replace(to_batch([row], asked), controls=Controls(Sampling(segment=SHORT)))
    scored = policy.score(plain)
    assert scored.logprobs[0, 6:].tolist() == pytest.approx(logprobs, abs=1e-4)
    assert scored.values[0, 6:].tolist() == pytest.approx(values, abs=1e-4)
    assert scored.bootstrap.item() == pytest.approx(behind, abs=1e-4)
    free = controls(SHORT, eos=())
    for taken in (1, 4, 7, 12):
        (rest,) = engine.generate([row.tokens[: 6 + taken]], free, seeds=[9], taken=[taken])
        wanted = by_definition(policy, row.tokens[: 6 + taken] + rest.tokens, 6, SHORT)[0]
        assert len(rest.tokens) == 18 - taken
        assert rest.logprobs == pytest.approx(wanted[taken:], abs=1e-4)


def test_a_text_may_be_longer_than_the_context_and_no_row_is():
    model, asked = tiny_model(), controls(Segment(tokens=20, context=10), eos=(), max_new_tokens=300)
    widths = []
    engine, policy = engine_of("native", model), policy_of(model)
    own = engine.decoder.reserve
    engine.decoder.reserve = lambda slots, prompt, behind: (widths.append(prompt + behind), own(slots, prompt, behind))
    episodes = sampled(engine, asked)
    assert [len(e.tokens) - e.prompt_length for e in episodes] == [300] * 3
    assert {e.stop for e in episodes} == {"length"}
    assert widths == [6 + 10 + 20]
    batch = to_batch(episodes, asked)
    assert cut(batch).batch.tokens.shape == (45, 36)
    gap = (policy.score(batch).logprobs - batch.sample_logprobs)[batch.action_mask].abs()
    assert gap.max() < 1e-4
    with pytest.raises(ModelError, match="this model takes 1 to 98"):
        engine.generate([[1] * 99], asked, seeds=[0])


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_a_segment_may_fill_the_context_to_the_last_token(kind):
    model, asked = tiny_model(), controls(Segment(tokens=100, context=22), eos=(), max_new_tokens=210)
    episodes = sampled(engine_of(kind, model), asked)
    assert [(e.stop, len(e.tokens) - e.prompt_length) for e in episodes] == [("length", 210)] * 3
    assert cut(to_batch(episodes, asked)).batch.attention_mask.sum(1).max() == 128


def test_an_end_in_a_middle_segment_ends_the_text():
    asked = controls(SHORT, eos=tuple(range(200, 257)), max_new_tokens=60)
    model = tiny_model(seed=2)
    prompts = [[k + 1, 7] for k in range(12)]
    episodes = sampled(engine_of("native", model, max_rows=5), asked, prompts=prompts)
    lengths = [len(e.tokens) - 2 for e in episodes]
    assert {e.stop for e in episodes} == {"eos"}
    assert any(n > 4 and n % 4 for n in lengths), "in the middle of a later segment"
    for e in episodes:
        assert e.tokens[-1] >= 200
        assert all(token < 200 for token in e.tokens[2:-1])
    batch = to_batch(episodes, asked)
    rows = cut(batch).batch
    assert len(rows.group) == sum(-(-n // 4) for n in lengths)
    old = policy_of(model).score(batch)
    cells = torch.zeros_like(old.logprobs)
    given = assign(Gae(lam=1.0, normalize="none"), TokenRewards(cells, {}), batch, old)
    for b, n in enumerate(lengths):
        assert given.returns[b, n + 1] == 0.0, "nothing comes after the end"


# --- credit --------------------------------------------------------------------------------------------------


def test_the_last_token_of_a_segment_is_followed_by_the_value_of_the_next_ones_first_state():
    """A = r + gamma V(next state) - V: the next segment sees the next state; behind what was cut off there is one."""
    asked, model = controls(SHORT, eos=(), max_new_tokens=10), tiny_model()
    policy = policy_of(model)
    (row,) = sampled(engine_of("native", model), asked, prompts=[PROMPTS[0]])
    batch = to_batch([row], asked)
    old = policy.score(batch)
    paid = torch.arange(16.0)[None] / 10 * batch.action_mask
    given = assign(Gae(lam=0.0, gamma=0.5, normalize="none"), TokenRewards(paid, {}), batch, old)
    _, values, behind = by_definition(policy, row.tokens, 6, SHORT)
    following = [*values[1:], behind]
    wanted = [paid[0, 6 + t].item() + 0.5 * following[t] - values[t] for t in range(10)]
    assert given.advantages[0, 6:].tolist() == pytest.approx(wanted, abs=1e-4)
    # as the second segment sees it, the state at its end is worth something else than to the third
    itself = policy.hf_model.base_model(torch.tensor([row.tokens[: 6 + 8]])).last_hidden_state[:, -1]
    assert abs(policy.value_head(itself).item() - values[8]) > 1e-3


def test_without_a_critic_later_segments_pay_earlier_ones_and_nothing_is_lost():
    batch = batch_by_hand()
    paid = torch.zeros(3, 7)
    paid[0, 6], paid[2, 3], paid[2, 2] = 4.0, 1.0, 0.5
    old = PolicyOutput(batch.sample_logprobs, batch.sample_logprobs)
    given = assign(RewardToGo(normalize="none", gamma=0.5), TokenRewards(paid, {}), batch, old)
    pieces = cut(batch)
    assert pieces.take(paid).sum() == paid.sum()
    assert pieces.credit(given).advantages.tolist() == [
        [0.0, 0.0, 0.25, 0.5, 0.0],
        [0.0, 0.0, 0.0, 1.0, 2.0],
        [0.0, 0.0, 0.0, 4.0, 0.0],
        [0.0] * 5,
        [0.0, 0.0, 1.0, 1.0, 0.0],
    ]


def test_baselines_are_of_texts_however_many_segments_they_have():
    batch = batch_by_hand().rows(torch.tensor([0, 2]))  # a group of texts of 3 segments and of 1
    paid = torch.zeros(2, 7)
    paid[0, 6], paid[1, 3] = 4.0, 1.0
    old = PolicyOutput(batch.sample_logprobs, batch.sample_logprobs)
    given = assign(LeaveOneOut(), TokenRewards(paid, {}), batch, old)
    torch.testing.assert_close(given.advantages, credit.leave_one_out(paid, batch.action_mask, batch.group))
    assert cut(batch).credit(given).advantages[:, 3].tolist() == [3.0, 3.0, 3.0, -3.0]


# --- the update ----------------------------------------------------------------------------------------------


def steps_of(batch, count):
    """The rows that are learnt from, and the parts of each optimiser step."""
    pieces = cut(batch)
    rows = pieces.batch if pieces else batch
    zeros = torch.zeros_like(rows.sample_logprobs)
    old, given = PolicyOutput(zeros, zeros), Credit(zeros)
    steps = optimizer_steps(rows, old, None, given, epochs=1, num_minibatches=count, seed=3)
    return rows, [list(step(9)) for step in steps]


def test_the_segments_of_a_text_are_learnt_in_one_optimiser_step():
    many = [episode([1, 2], list(range(3, 4 + n)), id=str(n), group=n // 3) for n in range(1, 8)]
    batch = to_batch(many, Controls(Sampling(segment=Segment(tokens=2, context=1))))
    rows, made = steps_of(batch, 3)
    steps = [[text for part in parts for text in part.batch.whole.text.tolist()] for parts in made]
    assert len(steps) == 3
    for step in steps:
        for text in set(step):
            assert step.count(text) == rows.whole.text.tolist().count(text)
    assert sorted(text for step in steps for text in step) == rows.whole.text.tolist()
    assert {part.num_rows for parts in made for part in parts} == {2, 3}, "texts are counted, not segments"
    plain = unsegmented(batch)
    names = [name for parts in steps_of(plain, 3)[1] for part in parts for name in part.batch.episode_ids]
    assert sorted(names) == [str(n) for n in range(1, 8)]


@pytest.mark.parametrize(
    "changes",
    [
        {"credit": {"type": "gae"}, "policy__value_head": {"learning_rate": 1e-2}, "update__minibatches": 2},
        {"credit": {"type": "monte_carlo", "every": 6, "rollouts": 2}, "objective": {"over": "sequence"}},
    ],
    ids=lambda changes: changes["credit"]["type"],
)
def test_a_run_by_segments_learns_a_letter(model_folder, data, tmp_path, changes):  # noqa: F811
    sampling = {"max_new_tokens": 12, "segment": {"tokens": 4, "context": 3}}
    config = settings(
        model_folder, data, tmp_path, stop__steps=14, evaluation__items=2, update__learning_rate=2e-2,
        rollout__samples_per_prompt=8, rollout__sampling=sampling, update__tokens_per_micro_batch=400,
        evaluation__sampling={**sampling, "temperature": 0.0}, **changes,
    )  # fmt: skip
    run.train(config)
    rewards = [row["reward/letters"] for row in metrics_of(tmp_path / "run")]
    assert sum(rewards[-3:]) / 3 > 0.4 > 0.1 > rewards[0]


def test_the_doctor_finds_nothing_wrong_with_segments(model_folder, data, tmp_path):  # noqa: F811
    sampling = {"max_new_tokens": 200, "segment": {"tokens": 50, "context": 20}}
    config = settings(
        model_folder, data, tmp_path, credit={"type": "gae"}, policy__value_head={}, rollout__sampling=sampling
    )
    assert {line.name: line.words for line in examine(config).lines if line.outcome == "fail"} == {}


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"level": "sequence"}}, "objective.level sequence is about the ratio of a whole text"),
        ({"objective": {"importance_level": "sequence"}}, "set objective.importance_level=token"),
        ({"credit": {"type": "attention"}}, "does not see the whole text"),
        ({"rollout": {"sampling": {"segment": {"tokens": 0, "context": 1}}}}, "segment.tokens"),
    ],
)
def test_what_has_no_segments_is_refused(changes, words):
    values = {"rollout": {"sampling": {"segment": {"tokens": 8, "context": 8}}}, **changes}
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate(values)


def test_no_room_and_encoder_decoders_are_refused_before_the_first_token(model_folder, data, tmp_path):  # noqa: F811
    def built(tokens, folder=model_folder, **changes):
        sampling = {"max_new_tokens": 500, "segment": {"tokens": tokens, "context": 20}}
        return assembly.build_run(settings(folder, data, tmp_path, rollout__sampling=sampling, **changes))

    with pytest.raises(ConfigError, match="are 128 together, and the context of this model is 128: nothing is left"):
        built(108)
    with pytest.raises(TaskError, match="of which a segment and what it sees take 122"):
        built(102)
    with pytest.raises(TaskError, match="of at most 3 tokens; this model's context is 128: shorten the prompt"):
        built(105, rollout__max_prompt_tokens=50)
    tiny_encoder_decoder().save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"rollout.sampling.segment: encoder-decoder models \(T5ForCond"):
        built(8, tmp_path / "t5")
