"""Shaping: its guarantee over a whole decision process, and what it pays by hand."""

import itertools
import random

import pytest

from pertoken.errors import ConfigError, RewardError
from pertoken.rewards import Shaping, Ter, names

GAMMA = 0.8
LONGEST = 3
RNG = random.Random(3)
STATES = ["".join(letters) for n in range(LONGEST + 1) for letters in itertools.product("ab", repeat=n)]
CHOICES = ["a", "b", "."]  # "." ends the episode
REWARD = {(state, choice): RNG.uniform(-1, 1) for state in STATES for choice in CHOICES}
PHI = {state: RNG.uniform(-2, 2) for state in STATES}
BEYOND = {state: RNG.uniform(-1, 1) for state in STATES}
"""What a cut-off state is worth to whoever goes on from there."""


def phi(text, item):
    return PHI[text]


def walk(policy):
    """The choices of an episode; without an end if the time was up."""
    state, chosen = "", []
    while len(state) < LONGEST and chosen[-1:] != ["."]:
        chosen.append(policy[state])
        state += chosen[-1].strip(".")
    return chosen


POLICIES = [
    dict(zip((s for s in STATES if len(s) < LONGEST), choices, strict=True))
    for choices in itertools.product(CHOICES, repeat=sum(len(s) < LONGEST for s in STATES))
]


@pytest.fixture(scope="module")
def hints(make_episode, make_scene, letters, tokenizer):
    """The rewards that a shaping pays for each episode of the process."""

    def of(shaping):
        def pay(chosen):
            text, ended = "".join(chosen).strip("."), chosen[-1] == "."
            ids = letters(text) + [tokenizer.eos_token_id] * ended
            scene = make_scene(make_episode(ids, stop="eos" if ended else "length"))
            return shaping(scene)[0, 2:].tolist()

        episodes = {tuple(walk(policy)) for policy in POLICIES}
        return {chosen: pay(chosen) for chosen in episodes}

    return of


def value(policy, extra=None, *, beyond=0.0):
    """Discounted return of a deterministic policy; beyond: the worth of a cut-off state (a function of the text)."""
    chosen = walk(policy)
    states = ["".join(chosen[:k]) for k in range(len(chosen) + 1)]
    paid = [REWARD[s, c] for s, c in zip(states, chosen, strict=False)]
    if extra is not None:
        paid = [r + f for r, f in zip(paid, extra[tuple(chosen)], strict=True)]
    total = sum(GAMMA**k * r for k, r in enumerate(paid))
    return total if chosen[-1] == "." or not beyond else total + GAMMA ** len(chosen) * beyond(states[-1])


def ranking(values):
    return sorted(range(len(values)), key=lambda k: (round(values[k], 9), k))


def test_shaping_keeps_the_order_of_all_policies(hints):
    """2,187 policies; a time limit that is the end of the episode."""
    assert len(POLICIES) == 3**7
    extra = hints(Shaping(phi, gamma=GAMMA, truncated="end"))
    plain, shaped = ([value(policy, with_hints) for policy in POLICIES] for with_hints in (None, extra))
    assert [s - p for s, p in zip(shaped, plain, strict=True)] == pytest.approx([-PHI[""]] * len(plain))
    assert ranking(shaped) == ranking(plain)


def test_shaping_keeps_the_order_where_a_critic_continues_cut_off_episodes(hints):
    """The critic of the shaped process says V - Phi of the last state, as it learns from shaped rewards."""
    extra = hints(Shaping(phi, gamma=GAMMA, truncated="bootstrap"))
    plain = [value(policy, beyond=BEYOND.get) for policy in POLICIES]
    shaped = [value(policy, extra, beyond=lambda state: BEYOND[state] - PHI[state]) for policy in POLICIES]
    assert [s - p for s, p in zip(shaped, plain, strict=True)] == pytest.approx([-PHI[""]] * len(plain))
    assert ranking(shaped) == ranking(plain)


def test_what_is_no_shaping_changes_the_order(hints):
    """Differences without the discount, and a cut-off state that keeps its potential though nothing follows."""
    plain = ranking([value(policy) for policy in POLICIES])
    for other in (Shaping(phi, gamma=1.0), Shaping(phi, gamma=GAMMA, truncated="bootstrap")):
        extra = hints(other)
        assert ranking([value(policy, extra) for policy in POLICIES]) != plain


def test_each_action_pays_for_the_state_that_it_left(make_episode, make_scene, letters):
    """Phi is the number of letters: 0.5 * 1 - 0, 0.5 * 2 - 1, and what was announced is taken back at the end."""
    shaping = Shaping(lambda text, item: float(len(text)), gamma=0.5)
    ended = make_scene(make_episode([*letters("ab"), 2], "ab"))
    assert shaping(ended)[0, 2:].tolist() == [0.5, 0.0, -2.0]
    cut_off = make_scene(make_episode(letters("ab"), stop="length"), padding=1)
    assert shaping(cut_off)[0, 2:].tolist() == [0.5, -1.0, 0.0]
    goes_on = Shaping(shaping.potential, gamma=0.5, truncated="bootstrap")
    assert goes_on(cut_off)[0, 2:].tolist() == [0.5, 0.0, 0.0]
    assert goes_on(ended)[0, 2:].tolist() == [0.5, 0.0, -2.0]


def test_what_a_tool_wrote_belongs_to_the_next_state_and_takes_no_time(make_episode, make_scene, letters):
    shaping = Shaping(lambda text, item: float(len(text)), gamma=0.5)
    scene = make_scene(make_episode([*letters("abcd"), 2], mask=[1, 0, 0, 1, 1]))
    assert shaping(scene)[0, 2:].tolist() == [0.5 * 3, 0, 0, 0.5 * 4 - 3, -4]


def test_a_metric_is_a_potential_with_its_settings(make_episode, make_scene, letters):
    """ROUGE-1 F1 after each letter of "a b" against "a b": 2/3 from the first on, then 1."""
    scene = make_scene(make_episode([*letters("a b"), 2], "a b"))
    shaping = Shaping("rouge_1", {"stemmer": True}, gamma=0.5)
    assert shaping(scene)[0, 2:].tolist() == pytest.approx([1 / 3, 1 / 3 - 2 / 3, 0.5 - 2 / 3, -1])


def test_a_metric_that_settles_at_the_end_is_not_settled_as_a_potential(make_episode, make_scene, letters):
    """Phi of a text must not depend on whether more will follow."""
    long, short = (make_scene(make_episode(letters(text), "a b c d")).samples[0] for text in ("c d a b", "c d a"))
    values = [Ter().prefix_values(sample, sample.aligned.completed()) for sample in (long, short)]
    assert values[0][:6] == values[1]


def per_prefix(text, item, *, weight=1.0):
    return weight * len(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shaping("rouge"), "unknown reward 'rouge'"),
        (lambda: Shaping("length", {"max_words": 3}), "'length' is no function of the text so far"),
        (lambda: Shaping("bleu", {"tokenise": "zh"}), "shaping.parameters: .*tokenise"),
        (lambda: Shaping(per_prefix, {"wait": 1}), r"shaping.potential: .*'wait'; expected fn\(text, item"),
        (lambda: Shaping("no_such_module:fn"), "cannot import the module 'no_such_module'"),
        (lambda: Shaping(gamma=1.5), "shaping.gamma: expected a number above 0 and up to 1, got 1.5"),
        (lambda: Shaping(truncated="stop"), "shaping.truncated: unknown value 'stop'"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_potential_is_named_by_its_path(monkeypatch, make_episode, make_scene, letters):
    monkeypatch.setattr(names.importlib, "import_module", lambda name: type("module", (), {"fn": per_prefix}))
    scene = make_scene(make_episode(letters("ab"), "ab"))
    assert Shaping("mine:fn", {"weight": 2.0})(scene)[0, 2:].tolist() == [2.0, -2.0]


def test_a_potential_that_is_no_number_is_named(make_episode, make_scene):
    with pytest.raises(RewardError, match=r"Shaping, episode '0'.*is nan for a prefix of 'a'"):
        Shaping(lambda text, item: float("nan"))(make_scene(make_episode("a")))
