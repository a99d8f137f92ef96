"""Several ways to credit the same samples: what is read, what is compared, and what is exact in the small world."""

import json

import pytest
import torch

from pertoken.credit_compare import METHODS, OnToy, Toy, _correlation, _ranks, _within, compare_credit, read_rows
from pertoken.errors import ConfigError, RunFolderError
from pertoken.testing import episode
from pertoken.tracking import RunLog, episode_record

EXACT = ("leave_one_out", "reward_to_go", "leave_one_out_process", "gae, lambda 1", "monte_carlo")


@pytest.fixture
def folder(tmp_path):
    """Two groups in step 1 and one of the same number in step 3: rewards at the end, but for one row."""
    folder = tmp_path / "run"
    rewards = {1: [[0, 0, 1.0], [0, 0, 0], [0.5, 0, 0], [0, 0]], 3: [[0, 2.0, 0], [1.0]]}
    with RunLog.create(folder, config_text="", seed=0, about={}, command=[]) as log:
        for step, rows in rewards.items():
            records = []
            for k, row in enumerate(rows):
                one = episode([1, 2], list(range(5, 5 + len(row))), id=f"{step}/{k}", group=k // 2)
                streams = {
                    "reward/total": [0, 0, *row], "logprob": [0, 0, *[-0.5 - 0.1 * t for t in range(len(row))]],
                    "advantage": [0, 0, *[float(k)] * len(row)],
                }  # fmt: skip
                records.append(episode_record(one, ["x"] * len(one.tokens), streams, step=step))
            log.episodes(step, records)
        log.finish("finished", "done")
    return folder


def test_episodes_become_one_batch_whose_groups_are_those_of_their_steps(folder):
    rows, steps = read_rows(folder)
    assert steps == [1, 3]
    assert rows.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.action_mask.sum(1).tolist() == [3, 3, 3, 2, 3, 1]
    assert rows.rewards.sum(1).tolist() == [1.0, 0, 0.5, 0, 2.0, 1.0]
    assert rows.values is None
    assert read_rows(folder, 3)[0].group.tolist() == [0, 0]


def test_figures_by_hand(folder):
    found = compare_credit(folder, step=3, only=["leave_one_out", "reward_to_go", "as trained", "gae, lambda 1"])
    assert set(found.samples) == {"leave_one_out", "reward_to_go", "as trained"}, "the run had no critic"
    # advantages: [1, 1, 1] and [-1]; returns: [2, 2, 0] and [1]
    assert found.samples["leave_one_out"].within == 0.0
    assert found.samples["leave_one_out"].std == pytest.approx(1.0)
    assert found.samples["reward_to_go"].within == pytest.approx((2 * (2 / 3) ** 2 + (4 / 3) ** 2) / 2.75)
    assert found.pearson["leave_one_out"]["as trained"] == pytest.approx(-1.0)
    assert found.pearson["reward_to_go"]["leave_one_out"] == pytest.approx(0.5 / (2.75 * 3) ** 0.5)
    assert found.rank["reward_to_go"]["reward_to_go"] == pytest.approx(1.0)


def test_ranks_share_ties_and_correlation_of_a_constant_is_unknown():
    assert _ranks(torch.tensor([3.0, 1.0, 3.0, 9.0]).double()).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert _correlation(torch.ones(3).double(), torch.arange(3).double()) is None
    assert _within(torch.tensor([[1.0, 3.0], [1.0, 3.0]]).double(), torch.ones(2, 2).bool()) == 1.0


def test_in_the_small_world_probabilities_sum_to_1_and_the_gradient_is_that_of_autograd():
    toy = Toy.make()
    assert float(toy.probability.sum()) == pytest.approx(1.0, abs=1e-12)
    assert len(toy.probability) == 225
    step = 1e-4  # log-probs move with the logits as the scores say: a difference instead of a derivative
    moved = toy.rows.logprobs.sum(1) + step * (toy.scores.sum(1) @ toy.gradient)
    firsts = range(0, 30, 2)  # the second texts of the first 15 pairs are all texts
    texts = [k + 1 for k in firsts]
    before, after = (x[texts].exp() @ toy.rows.rewards.sum(1)[texts] for x in (toy.rows.logprobs.sum(1), moved))
    assert float((after - before) / step) == pytest.approx(float(toy.gradient.square().sum()), rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_called_exact_is_and_what_is_not_is_not(name):
    seen = Toy.make().judge(METHODS[name])
    if name == "as trained":
        assert seen is None
        return
    assert isinstance(seen, OnToy)
    if name in EXACT:
        assert seen.bias < 1e-12
        assert seen.cosine == pytest.approx(1.0, abs=1e-12)
    else:
        assert seen.bias > 1e-3
    assert seen.noise > 0.5


def test_exact_values_are_the_least_noisy_and_terminal_credit_the_noisiest_of_the_exact():
    noise = {name: Toy.make().judge(METHODS[name]).noise for name in EXACT}
    assert min(noise, key=noise.get) == "monte_carlo"
    assert max(noise, key=noise.get) == "leave_one_out"


def test_the_command_prints_tables_or_json(folder, pertoken):
    code, out, _ = pertoken("credit", "compare", folder)
    assert code == 0
    for text in ("15 tokens of 6 episodes, steps 1, 3", "leave_one_out_process", "monte_carlo", "cosine"):
        assert text in out
    code, out, _ = pertoken("credit", "compare", folder, "--json", "--step", 1, "--only", "reward_to_go")
    assert code == 0
    found = json.loads(out)
    assert found["toy"]["reward_to_go"]["bias"] < 1e-12
    assert (found["episodes"], found["alone"]) == (4, 0)


def test_what_cannot_be_compared_is_refused_with_what_there_is(folder, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'reward_to_go'"):
        compare_credit(folder, only=["reward_to_do"])
    with pytest.raises(RunFolderError, match=r"no episodes of step 2; it has those of \[1, 3\]"):
        compare_credit(folder, step=2)
    RunLog.create(tmp_path / "empty", config_text="", seed=0, about={}, command=[]).finish("finished", "")
    with pytest.raises(RunFolderError, match="keeps no episodes with rewards"):
        compare_credit(tmp_path / "empty")
