"""Several ways to credit the same samples: what is read, what is compared, and what is exact in the small world."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from pertoken import credit
from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.errors import ConfigError, RunFolderError
from pertoken.inquiry.credit_compare import (
    BY_WORTH,
    METHODS,
    OnToy,
    Toy,
    _correlation,
    _ranks,
    _within,
    compare_credit,
    read_rows,
)
from pertoken.policy.model import Policy, load_model
from pertoken.rewards import Scene, Weighted, make, score
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, episode
from pertoken.tracking import RunLog, episode_record
from pertoken.training.redistribution import by_worth
from pertoken.types import Item

toy_world = functools.cache(Toy.make)
EXACT = ("leave_one_out", "reward_to_go", "leave_one_out_process", "gae, lambda 1", "differences", "monte_carlo")


@pytest.fixture
def folder(tmp_path):
    """Two groups in step 1 and one of the same number in step 3: rewards at the end, but for one row."""
    folder = tmp_path / "run"
    rewards = {1: [[0, 0, 1.0], [0, 0, 0], [0.5, 0, 0], [0, 0]], 3: [[0, 2.0, 0], [1.0]]}
    config = RunConfig.model_validate({"task": {"path": str(tmp_path / "gone.jsonl")}})
    with RunLog.create(folder, config_text=config.to_yaml(), seed=0, about={}, command=[]) as log:
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
    toy = toy_world()
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
    seen = toy_world().judge(METHODS[name])
    if name in ("as trained", "attention"):
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
    noise = {name: toy_world().judge(METHODS[name]).noise for name in EXACT}
    assert min(noise, key=noise.get) == "monte_carlo"
    assert max(noise, key=noise.get) == "leave_one_out"


def test_the_command_prints_tables_or_json(folder, pertoken):
    code, out, _ = pertoken("credit", "compare", folder)
    assert code == 0
    for text in ("15 tokens of 6 episodes, steps 1, 3", "leave_one_out_process", "monte_carlo", "cosine"):
        assert text in out
    assert re.search(r"shapley on these episodes: \S+gone.jsonl: no such file", out)
    assert "attention on these episodes: the run folder holds no trained model" in out
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


# --- the rewards of the run, asked again ----------------------------------------------------------------------


ANSWERS = {"a": ("red cat", "cat"), "b": ("a red dog", "dog")}


@pytest.fixture
def made(tmp_path, model_folder):
    """`made(rewards, paid=...)`: a run on two items that paid its samples by rouge_l, with its model."""

    def make_run(rewards=({"name": "rouge_l"},), *, paid=1.0):
        (tmp_path / "data.jsonl").write_text(
            "".join(
                json.dumps({"id": name, "prompt": "p", "reference": good}) + "\n" for name, (good, _) in ANSWERS.items()
            )
        )
        folder, tokenizer = tmp_path / "run", byte_tokenizer()
        config = RunConfig.model_validate({
            "policy": {"model": str(model_folder)}, "rewards": list(rewards), "seed": 3,
            "task": {"path": str(tmp_path / "data.jsonl"), "id": "id", "fractions": (1.0, 0.0, 0.0)},
        })  # fmt: skip
        rows = [
            episode(
                tokenizer.encode("p"),
                [*tokenizer.encode(text), 256],
                id=f"1/{name}/{k}",
                group=g,
                item=Item(name, "p", good),
            )
            for g, (name, (good, other)) in enumerate(ANSWERS.items())
            for k, text in enumerate((good, other))
        ]
        scene = Scene(to_batch(rows, Controls(config.rollout.sampling, (256,))), rows, tokenizer, step=1)
        part = Weighted(make("rouge_l", {}, ""), paid, "rouge_l")
        earned = score([part], scene)
        with RunLog.create(folder, config_text=config.to_yaml(), seed=3, about={}, command=[]) as log:
            log.episodes(1, [
                episode_record(row, ["x"] * len(row.tokens), {
                    "reward/rouge_l": earned.total[k, : len(row.tokens)].tolist(),
                    "reward/total": earned.total[k, : len(row.tokens)].tolist(), "logprob": row.logprobs,
                }, step=1)
                for k, row in enumerate(rows)
            ])  # fmt: skip
            log.finish("finished", "done")
        shutil.copytree(model_folder, folder / "model")
        return folder, scene, part, earned

    return make_run


def test_rewards_rebuilt_from_the_folder_say_what_they_said_in_training(made):
    folder, scene, part, earned = made()
    found, mask = compare_credit(folder, only=[*BY_WORTH, "attention"]), scene.batch.action_mask
    assert not found.skipped
    policy = Policy(*load_model(str(folder / "model")), compile=False)
    attention = policy.last_attention(scene.batch)
    placed = {name: by_worth(config, earned, scene, [part], seed=3)[0].total for name, config in BY_WORTH.items()}
    placed["attention"] = credit.redistribute(earned.total.sum(1), attention, mask, share=1.0)
    assert set(found.samples) == set(placed)
    for name, cells in placed.items():
        wanted = credit.leave_one_out_process(cells, mask, scene.batch.group, gamma=1.0)
        assert found.samples[name].std == pytest.approx(float(wanted[mask].std()), rel=1e-4), name
        assert found.samples[name].within == pytest.approx(_within(wanted, mask), abs=1e-4), name


def test_what_cannot_be_asked_again_is_left_out_with_the_reason(made, tmp_path):
    folder, *_ = made()
    found = compare_credit(folder, only=["shapley", "attention", "reward_to_go"], budget=0.0)
    assert set(found.samples) == {"attention", "reward_to_go"}
    assert re.fullmatch(r"[\d,]+ texts to score take about \d+ s, and the budget is 0 s", found.skipped["shapley"])
    shutil.rmtree(folder / "model")
    assert "--model" in compare_credit(folder, only=["attention"]).skipped["attention"]
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "c", "prompt": "p", "reference": "x"}))
    assert "no item 'a' any more" in compare_credit(folder, only=["differences"]).skipped["differences"]


@pytest.mark.parametrize(
    ("rewards", "paid", "words"),
    [
        ([{"name": "rouge_l"}], 0.5, r"'rouge_l' pays 1/a/0 1, and paid 0\.5"),
        ([{"name": "rouge_l", "normalise": "batch"}], 1.0, "other units in each batch"),
        ([{"name": "rouge_l"}, {"name": "length", "min_words": 1}], 1.0, "saved without reward 'length'"),
        ([{"name": "judge", "url": "http://x", "model": "m", "rubric": "r"}], 1.0, "asks a judge"),
    ],
)
def test_a_reward_that_is_another_one_now_is_not_asked(made, rewards, paid, words):
    found = compare_credit(made(rewards, paid=paid)[0], only=["leave_one_token_out"])
    assert re.search(words, found.skipped["leave_one_token_out"])


def test_the_bias_of_each_way_on_the_page_is_that_of_the_small_world():
    page, toy = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8"), toy_world()
    for name in ("shapley", "leave_one_token_out"):
        seen = toy.judge(METHODS[name])
        assert re.search(rf"\| `{name}` \|.*\({seen.bias:.2f}, {seen.cosine:.3f}\)", page), name
