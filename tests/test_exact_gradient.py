"""Estimators against the exact policy gradient, in worlds small enough to enumerate every sequence.

The policy is a table of logits, one row per prefix; token 0 ends the sequence. A sequence that reaches the
length limit without it is cut off (truncated). Each row of the batch looks like

    prompt  action  tool  action  action  padding

so that every check also holds across a hole. The mean of an estimator over all sequences (pairs, triples),
weighted by their probabilities, must equal the gradient of the expected return that autograd finds.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pertoken import credit
from pertoken.objectives import importance_weights, policy_gradient

EOS = 0
EXACT = 1e-6


@dataclass(frozen=True)
class World:
    logits: Tensor
    """[prefixes, V], the parameters."""
    logprobs: Tensor
    """[S, T] of every sequence's actions, with gradient."""
    action_mask: Tensor
    rewards: Tensor
    """[S, T] random reward of each (prefix, token)."""
    values: Tensor
    """[S, T] a critic that is simply wrong."""
    true_values: Tensor
    """[S, T] the value function of this policy (gamma 0.9, cut-off states worth `cut_off_value`)."""
    terminated: Tensor
    cut_off_value: Tensor
    """[S] of the state after the last token."""
    entropy: Tensor
    """[S, T] of the policy where it chose."""
    sample_logprobs: Tensor
    """[S, T] of another policy."""

    @property
    def probability(self) -> Tensor:
        """[S] of each sequence, with gradient."""
        return self.logprobs.sum(1).exp()

    def objective_gradient(self, gamma: float, *, bootstrapped: bool) -> Tensor:
        """Exact gradient of E[sum_k gamma^k r_k (+ gamma^K V(cut-off state) where truncated)]."""
        weights = credit.discount_weights(self.action_mask, gamma, dtype=torch.float64)
        returns = (weights * self.rewards).sum(1)
        if bootstrapped:
            returns = returns + gamma ** self.action_mask.sum(1) * self.bootstrap
        return torch.autograd.grad((self.probability * returns).sum(), self.logits, retain_graph=True)[0]

    @property
    def bootstrap(self) -> Tensor:
        return credit.bootstrap_values(self.terminated, self.cut_off_value)

    def estimator_gradient(self, advantages: Tensor, gamma: float = 1.0) -> Tensor:
        """Mean over all sequences of -grad sum_t policy_gradient loss, with the gamma^k factor."""
        weights = credit.discount_weights(self.action_mask, gamma, dtype=torch.float64)
        loss = (policy_gradient(self.logprobs, advantages, self.action_mask) * weights).sum(1)
        return torch.autograd.grad(-(self.probability.detach() * loss).sum(), self.logits, retain_graph=True)[0]

    def group_gradient(self, assign: Callable[..., Tensor], size: int, gamma: float = 1.0) -> Tensor:
        """The same for an estimator that compares `size` independent samples: mean over all tuples of sequences."""
        members = torch.tensor(list(itertools.product(range(len(self.rewards)), repeat=size)))
        rows, group = members.flatten(), torch.arange(len(members)).repeat_interleave(size)
        mask = self.action_mask[rows]
        advantages = assign(self.rewards[rows], mask, group)
        weights = credit.discount_weights(mask, gamma, dtype=torch.float64)
        loss = (policy_gradient(self.logprobs[rows], advantages, mask) * weights).sum(1)
        probability = self.probability.detach()[members].prod(1)[group]
        return torch.autograd.grad(-(probability * loss).sum() / size, self.logits, retain_graph=True)[0]


@functools.cache
def world(vocabulary: int = 5, length: int = 3, seed: int = 0) -> World:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    others = range(1, vocabulary)
    prefixes = [p for n in range(length) for p in itertools.product(others, repeat=n)]
    sequences = [(*p, EOS) for p in prefixes] + list(itertools.product(others, repeat=length))
    number = {p: i for i, p in enumerate(prefixes)}
    logits = random(len(prefixes), vocabulary).requires_grad_()
    reward_table, value_table = random(len(prefixes), vocabulary), random(len(prefixes))
    cut_off_value = random(len(sequences))

    columns = [1, *range(3, length + 2)]  # column 0 is the prompt, 2 a tool reply, the last one padding
    shape = (len(sequences), length + 3)
    prefix_of, token_of = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for s, tokens in enumerate(sequences):
        for k, token in enumerate(tokens):
            cell = s, columns[k]
            prefix_of[cell], token_of[cell], mask[cell] = number[tokens[:k]], token, True

    terminated = torch.tensor([tokens[-1] == EOS for tokens in sequences])
    ends = {tokens: float(cut_off_value[i]) for i, tokens in enumerate(sequences) if tokens[-1] != EOS}
    true_value = dict(ends)
    for p in reversed(prefixes):
        probs = logits[number[p]].detach().softmax(0)
        later = torch.tensor([true_value.get((*p, v), 0.0) for v in range(vocabulary)], dtype=torch.float64)
        true_value[p] = float((probs * (reward_table[number[p]] + 0.9 * later)).sum())
    true_table = torch.tensor([true_value[p] for p in prefixes], dtype=torch.float64)

    def at_actions(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0)

    probabilities = logits.detach().softmax(1)
    entropies = -(probabilities * probabilities.log()).sum(1)
    other_logits = logits.detach() + 0.5 * random(len(prefixes), vocabulary)

    return World(
        logits=logits,
        logprobs=at_actions(logits.log_softmax(1)[prefix_of, token_of]),
        action_mask=mask,
        rewards=at_actions(reward_table[prefix_of, token_of]),
        values=at_actions(value_table[prefix_of]),
        true_values=at_actions(true_table[prefix_of]),
        terminated=terminated,
        cut_off_value=cut_off_value,
        entropy=at_actions(entropies[prefix_of]),
        sample_logprobs=at_actions(other_logits.log_softmax(1)[prefix_of, token_of]),
    )


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_the_world_is_complete() -> None:
    w = world()
    assert len(w.rewards) == 85  # 1 + 4 + 16 that end, 64 that are cut off
    assert int(w.terminated.sum()) == 21
    assert float(w.probability.detach().sum()) == pytest.approx(1.0, abs=1e-12)
    assert w.objective_gradient(1.0, bootstrapped=False).abs().max() > 0.05


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_reward_to_go_is_exact(gamma: float, bootstrapped: bool) -> None:
    w = world()
    bootstrap = w.bootstrap if bootstrapped else None
    returns = credit.reward_to_go(w.rewards, w.action_mask, gamma=gamma, bootstrap=bootstrap)
    assert (
        distance(w.estimator_gradient(returns, gamma), w.objective_gradient(gamma, bootstrapped=bootstrapped)) < EXACT
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_with_lambda_1_is_exact_for_any_critic(gamma: float) -> None:
    w = world()
    advantages, _ = credit.gae(w.rewards, w.values, w.action_mask, w.bootstrap, gamma=gamma, lam=1.0)
    assert distance(w.estimator_gradient(advantages, gamma), w.objective_gradient(gamma, bootstrapped=True)) < EXACT


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_gae_with_the_true_critic_is_exact_for_any_lambda(lam: float) -> None:
    w = world()
    advantages, _ = credit.gae(w.rewards, w.true_values, w.action_mask, w.bootstrap, gamma=0.9, lam=lam)
    assert distance(w.estimator_gradient(advantages, 0.9), w.objective_gradient(0.9, bootstrapped=True)) < EXACT


def test_self_critical_is_exact_whatever_the_greedy_answer_earns() -> None:
    w = world()
    got = credit.self_critical(w.rewards, w.action_mask, torch.full((len(w.rewards),), 0.7, dtype=torch.float64))
    assert distance(w.estimator_gradient(got), w.objective_gradient(1.0, bootstrapped=False)) < EXACT


def expected_totals(w: World) -> Tensor:
    """[S, T] mean total reward over all sequences that begin as this one does before each action."""
    totals, probability = w.rewards.sum(1), w.probability.detach()
    number = torch.where(w.action_mask, w.logprobs.detach(), 0.0)  # tells prefixes apart
    means = torch.zeros_like(w.rewards)
    for s, t in w.action_mask.nonzero().tolist():
        same = (number[:, :t] == number[s, :t]).all(1) & w.action_mask[:, t]
        means[s, t] = (probability[same] * totals[same]).sum() / probability[same].sum()
    return means


@pytest.mark.parametrize("steps", ["every", "two", "behind a token", "first alone"])
def test_monte_carlo_is_exact_wherever_steps_end_by_what_was_said(steps: str) -> None:
    w = world()
    order = w.action_mask.cumsum(1)
    first = w.action_mask & (order == 1)
    likely = w.action_mask & (w.logprobs.detach() > -1.5)  # a property of the tokens so far
    behind = torch.zeros_like(first)
    behind[:, 3:] = likely[:, [1, *range(3, first.shape[1] - 1)]]
    starts = {
        "every": w.action_mask,
        "two": w.action_mask & (order % 2 == 1),
        "behind a token": first | (behind & w.action_mask),
        "first alone": first,
    }[steps]
    got = credit.monte_carlo(w.rewards, expected_totals(w), starts, w.action_mask)
    assert distance(w.estimator_gradient(got), w.objective_gradient(1.0, bootstrapped=False)) < EXACT


def test_monte_carlo_is_biased_where_a_step_ends_by_what_comes_later() -> None:
    w = world()
    first = w.action_mask & (w.action_mask.cumsum(1) == 1)
    starts = first | (w.action_mask & (w.logprobs.detach() > -1.5))  # a step begins with such a token
    got = credit.monte_carlo(w.rewards, expected_totals(w), starts, w.action_mask)
    assert distance(w.estimator_gradient(got), w.objective_gradient(1.0, bootstrapped=False)) > 1e-3


def test_length_adaptive_lambda_is_biased_even_with_the_true_critic() -> None:
    w = world()
    lam = credit.length_adaptive_lambda(w.action_mask, alpha=1.0, dtype=torch.float64)
    assert len(lam.unique()) == 3
    advantages, _ = credit.gae(w.rewards, w.true_values, w.action_mask, w.bootstrap, gamma=0.9, lam=lam)
    # any fixed lambda would be right here; one that is chosen by how long the row became is not
    assert distance(w.estimator_gradient(advantages, 0.9), w.objective_gradient(0.9, bootstrapped=True)) > 1e-3


def test_macro_actions_are_biased_even_with_lambda_1() -> None:
    """The mean of values in a macro action knows its later tokens, so it is no baseline of the earlier ones."""
    w = world()
    arguments = w.rewards, w.values, w.action_mask, w.bootstrap
    merged, _ = credit.macro_gae(*arguments, size=2, gamma=1.0, lam=1.0)
    exact = w.objective_gradient(1.0, bootstrapped=True)
    assert distance(w.estimator_gradient(merged), exact) > 1e-3
    single, _ = credit.macro_gae(*arguments, size=1, gamma=1.0, lam=1.0)
    assert distance(w.estimator_gradient(single), exact) < EXACT


def test_gae_with_a_wrong_critic_is_biased_below_lambda_1() -> None:
    w = world()
    advantages, _ = credit.gae(w.rewards, w.values, w.action_mask, w.bootstrap, gamma=0.9, lam=0.5)
    assert distance(w.estimator_gradient(advantages, 0.9), w.objective_gradient(0.9, bootstrapped=True)) > 1e-2


def test_treating_truncated_as_terminated_is_the_gradient_of_something_else() -> None:
    w = world()
    advantages, _ = credit.gae(w.rewards, w.values, w.action_mask, torch.zeros_like(w.bootstrap), gamma=1.0, lam=1.0)
    got = w.estimator_gradient(advantages)
    assert distance(got, w.objective_gradient(1.0, bootstrapped=True)) > 1e-2
    assert distance(got, w.objective_gradient(1.0, bootstrapped=False)) < EXACT


def test_without_the_discount_factor_the_discounted_gradient_is_missed() -> None:
    w = world()
    returns = credit.reward_to_go(w.rewards, w.action_mask, gamma=0.9)
    exact = w.objective_gradient(0.9, bootstrapped=False)
    assert distance(w.estimator_gradient(returns, gamma=0.9), exact) < EXACT
    without = w.estimator_gradient(returns, gamma=1.0)
    assert distance(without, exact) > 1e-3
    # nor is it a longer step in the same direction
    assert torch.cosine_similarity(without.flatten(), exact.flatten(), dim=0) < 0.9999


def test_discount_over_tool_tokens_would_be_wrong() -> None:
    """The trap of counting columns: the tool reply would discount the first action's return once more."""
    w = world()
    columns_as_time = credit.reward_to_go(w.rewards, torch.ones_like(w.action_mask), gamma=0.9)
    got = w.estimator_gradient(torch.where(w.action_mask, columns_as_time, 0.0), 0.9)
    assert distance(got, w.objective_gradient(0.9, bootstrapped=False)) > 1e-3


@pytest.mark.parametrize("small", [False, True], ids=["85 sequences, pairs", "15 sequences, triples"])
class TestGroups:
    """Pairs in the large world, triples in a small one."""

    @staticmethod
    def setting(small: bool) -> tuple[World, int]:
        return (world(vocabulary=3, seed=1), 3) if small else (world(), 2)

    def test_leave_one_out_is_exact(self, small: bool) -> None:
        w, size = self.setting(small)
        got = w.group_gradient(credit.leave_one_out, size)
        assert distance(got, w.objective_gradient(1.0, bootstrapped=False)) < EXACT

    @pytest.mark.parametrize("gamma", [1.0, 0.9])
    def test_leave_one_out_process_is_exact(self, small: bool, gamma: float) -> None:
        w, size = self.setting(small)
        got = w.group_gradient(functools.partial(credit.leave_one_out_process, gamma=gamma), size, gamma)
        assert distance(got, w.objective_gradient(gamma, bootstrapped=False)) < EXACT

    def test_group_relative_without_std_is_exact_times_g_minus_1_over_g(self, small: bool) -> None:
        w, size = self.setting(small)
        got = w.group_gradient(functools.partial(credit.group_relative, scale_by_std=False), size)
        assert distance(got, w.objective_gradient(1.0, bootstrapped=False) * (size - 1) / size) < EXACT

    def test_the_optimal_token_baseline_is_biased(self, small: bool) -> None:
        """The row is part of its own baseline; a baseline of the others alone would not be."""
        w, size = self.setting(small)

        def assign(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
            return credit.optimal_token_baseline(rewards, mask.double(), mask, group, gamma=1.0)

        got = w.group_gradient(assign, size)
        exact = w.objective_gradient(1.0, bootstrapped=False)
        assert distance(got, exact) > 1e-3
        assert torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0) > 0.8

    @pytest.mark.parametrize(
        "biased",
        [
            functools.partial(credit.group_relative, scale_by_std=True),
            functools.partial(credit.group_process, gamma=1.0, scale_by_std=False),
        ],
        ids=["group_relative with std", "group_process"],
    )
    def test_what_the_docs_call_biased_is_not_even_the_direction(
        self, small: bool, biased: Callable[..., Tensor]
    ) -> None:
        w, size = self.setting(small)
        got, exact = w.group_gradient(biased, size), w.objective_gradient(1.0, bootstrapped=False)
        assert torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0) < 0.999


def test_leave_one_out_process_has_less_variance_than_leave_one_out() -> None:
    """Why it is the default: both are exact, but it drops the rewards that came before the action."""
    w = world(vocabulary=3, seed=1)
    pairs = torch.tensor(list(itertools.product(range(len(w.rewards)), repeat=2)))
    rows, group = pairs.flatten(), torch.arange(len(pairs)).repeat_interleave(2)
    mask, probability = w.action_mask[rows], w.probability.detach()[pairs].prod(1)
    each_cell = torch.eye(w.logprobs.numel(), dtype=torch.float64).view(-1, *w.logprobs.shape)
    scores = torch.autograd.grad(w.logprobs, w.logits, each_cell, retain_graph=True, is_grads_batched=True)[0]
    scores = scores.view(*w.logprobs.shape, -1)  # [S, T, parameters]

    def variance(advantages: Tensor) -> float:
        per_pair = (advantages[:, :, None] * scores[rows]).sum(1).view(len(pairs), 2, -1).mean(1)
        mean = (probability[:, None] * per_pair).sum(0)
        return float((probability[:, None] * (per_pair - mean).square()).sum())

    process = credit.leave_one_out_process(w.rewards[rows], mask, group, gamma=1.0)
    assert variance(process) < variance(credit.leave_one_out(w.rewards[rows], mask, group))


# --- the table of docs/algorithms.md ------------------------------------------------------------------------


def small_world() -> World:
    """15 sequences, so that each pair of them can be a batch of its own."""
    return world(vocabulary=3, seed=1)


Transform = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(advantages, action mask, group, entropy) of a batch of two rows -> advantages."""


def returns_then(change: Transform) -> Tensor:
    """Mean gradient of reward-to-go changed by what looks at a whole batch: over all batches of two rows."""
    w = small_world()
    returns = credit.reward_to_go(w.rewards, w.action_mask, gamma=1.0)
    together = torch.tensor([0, 0])
    pairs = torch.tensor(list(itertools.product(range(len(w.rewards)), repeat=2)))
    changed = torch.cat([change(returns[p], w.action_mask[p], together, w.entropy[p]) for p in pairs])
    return w.group_gradient(lambda rewards, mask, group: changed, 2)


def by_rows(advantages: Callable[[World], Tensor], gamma: float = 1.0) -> Tensor:
    w = small_world()
    return w.estimator_gradient(advantages(w), gamma)


def in_pairs(assign: Callable[..., Tensor], **choices: object) -> Tensor:
    return small_world().group_gradient(functools.partial(assign, **choices), 2)


def critic(function: Callable[..., tuple[Tensor, Tensor]], *, true: bool = False, **choices: object) -> Tensor:
    gamma = 0.9 if true else 1.0

    def advantages(w: World) -> Tensor:
        values = w.true_values if true else w.values
        return function(w.rewards, values, w.action_mask, w.bootstrap, gamma=gamma, **choices)[0]

    return by_rows(advantages, gamma)


def parts(scale: str) -> Tensor:
    def assign(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
        late = torch.where(mask.cumsum(1) > 1, rewards, 0.0)
        both = (rewards - late, 1.0), (late, 0.5)
        streams = [credit.Stream(2.0 * part, 0.5 * k, scale=scale) for part, k in both]
        last = credit.Stream(late, 0.5, scale=scale)
        return credit.per_part([*streams, last], mask, group)

    return small_world().group_gradient(assign, 2)


def from_other_samples(**choices: object) -> Tensor:
    """Rows of another policy, weighted: the mean over what that one samples."""
    w = small_world()
    new, mask = w.logprobs.detach(), w.action_mask
    weights = importance_weights(new, w.sample_logprobs, mask, **choices)
    loss = policy_gradient(w.logprobs, credit.reward_to_go(w.rewards, mask, gamma=1.0), mask) * weights
    likely = w.sample_logprobs.sum(1).exp()
    return torch.autograd.grad(-(likely * loss.sum(1)).sum(), w.logits, retain_graph=True)[0]


def unweighted() -> Tensor:
    w = small_world()
    loss = policy_gradient(w.logprobs, credit.reward_to_go(w.rewards, w.action_mask, gamma=1.0), w.action_mask)
    return torch.autograd.grad(-(w.sample_logprobs.sum(1).exp() * loss.sum(1)).sum(), w.logits, retain_graph=True)[0]


def redistributed(w: World) -> Tensor:
    spread = credit.redistribute(w.rewards.sum(1), w.values.abs(), w.action_mask, share=1.0)
    return credit.reward_to_go(spread, w.action_mask, gamma=1.0)


def adaptive(w: World) -> Tensor:
    lam = credit.length_adaptive_lambda(w.action_mask, alpha=1.0, dtype=torch.float64)
    return credit.gae(w.rewards, w.values, w.action_mask, w.bootstrap, gamma=1.0, lam=lam)[0]


def otb(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    return credit.optimal_token_baseline(rewards, mask.double(), mask, group, gamma=1.0)


PLAIN = {"gamma": 1.0, "bootstrapped": False}
CUT_OFF = {"gamma": 1.0, "bootstrapped": True}
DISCOUNTED = {"gamma": 0.9, "bootstrapped": True}

TABLE: dict[str, tuple[Callable[[], Tensor], dict[str, object]]] = {
    "`reward_to_go`": (lambda: by_rows(lambda w: credit.reward_to_go(w.rewards, w.action_mask, gamma=1.0)), PLAIN),
    "`gae`, lambda 1, any critic": (lambda: critic(credit.gae, lam=1.0), CUT_OFF),
    "`gae`, lambda 0.95, the true critic": (lambda: critic(credit.gae, true=True, lam=0.95), DISCOUNTED),
    "`gae`, lambda 0.95, a wrong critic": (lambda: critic(credit.gae, lam=0.95), CUT_OFF),
    "`gae`, lambda 0, a wrong critic": (lambda: critic(credit.gae, lam=0.0), CUT_OFF),
    "`gae` with `length_adaptive_lambda`, a wrong critic": (lambda: by_rows(adaptive), CUT_OFF),
    "`macro_gae`, size 1, lambda 1": (lambda: critic(credit.macro_gae, lam=1.0, size=1), CUT_OFF),
    "`macro_gae`, size 2, lambda 1": (lambda: critic(credit.macro_gae, lam=1.0, size=2), CUT_OFF),
    "`self_critical`": (
        lambda: by_rows(
            lambda w: credit.self_critical(w.rewards, w.action_mask, torch.full_like(w.cut_off_value, 0.7))
        ),
        PLAIN,
    ),
    "`leave_one_out`": (lambda: in_pairs(credit.leave_one_out), PLAIN),
    "`leave_one_out_process`": (lambda: in_pairs(credit.leave_one_out_process, gamma=1.0), PLAIN),
    "`per_part`, by token, scale none": (lambda: parts("none"), PLAIN),
    "`per_part`, by token, scale group": (lambda: parts("group"), PLAIN),
    "`group_relative`, without std, times G / (G - 1)": (
        lambda: 2 * in_pairs(credit.group_relative, scale_by_std=False),
        PLAIN,
    ),
    "`group_relative`, with std": (lambda: in_pairs(credit.group_relative, scale_by_std=True), PLAIN),
    "`group_process`, without std": (lambda: in_pairs(credit.group_process, gamma=1.0, scale_by_std=False), PLAIN),
    "`optimal_token_baseline`": (lambda: in_pairs(otb), PLAIN),
    "reward-to-go, then `whiten`": (lambda: returns_then(lambda a, m, g, h: credit.whiten(a, m, g)), PLAIN),
    "reward-to-go, then `scale_only`": (lambda: returns_then(lambda a, m, g, h: credit.scale_only(a, m, g)), PLAIN),
    "reward-to-go, then `center_by_group`": (
        lambda: returns_then(lambda a, m, g, h: credit.center_by_group(a, m, g)),
        PLAIN,
    ),
    "reward-to-go, then `clip` at 1": (lambda: returns_then(lambda a, m, g, h: credit.clip(a, m, g, limit=1.0)), PLAIN),
    "reward-to-go, then `keep_high_entropy`, half": (
        lambda: returns_then(lambda a, m, g, h: credit.keep_high_entropy(a, m, h, share=0.5)),
        PLAIN,
    ),
    "reward-to-go, then `entropy_shaped`": (
        lambda: returns_then(lambda a, m, g, h: credit.entropy_shaped(a, m, h)),
        PLAIN,
    ),
    "reward-to-go of `redistribute`, weights that know the end": (lambda: by_rows(redistributed), PLAIN),
    "`importance_weights` by sequence, unbounded": (lambda: from_other_samples(high=1e9, level="sequence"), PLAIN),
    "`importance_weights` by sequence, cap 2": (lambda: from_other_samples(high=2.0, level="sequence"), PLAIN),
    "`importance_weights` by token, unbounded": (lambda: from_other_samples(high=1e9), PLAIN),
    "`importance_weights` by token, cap 2": (lambda: from_other_samples(high=2.0), PLAIN),
    "other samples without weights": (unweighted, PLAIN),
}


@functools.cache
def row(name: str) -> str:
    """As it stands on the page: exact, or how far the mean is from the gradient, and at which angle."""
    make, objective = TABLE[name]
    got, exact = make(), small_world().objective_gradient(**objective)  # type: ignore[arg-type]
    if distance(got, exact) < EXACT:
        return f"| {name} | exact | |"
    bias = float((got - exact).norm() / exact.norm())
    cosine = float(torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0))
    return f"| {name} | {bias:.2f} | {cosine:.3f} |"


@pytest.mark.parametrize("name", TABLE)
def test_the_page_states_each_estimators_bias(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert row(name) in page.splitlines()
