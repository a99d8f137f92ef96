"""The command line as a person meets it: jobs end well, mistakes end in one sentence and a non-zero code."""

import json
import os
import subprocess
import sys

import pytest

from pertoken import cli
from pertoken.tracking.glossary import METRICS, STREAMS, find


@pytest.fixture
def place(tmp_path, monkeypatch, model_folder):
    """A working folder with data, a reward module and a recipe in it."""
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_rewards.py").write_text(
        "import time\n"
        "from pertoken.rewards import episode_reward, token_reward\n"
        "@episode_reward\ndef vowels(sample):\n    return sum(map(sample.text.count, 'aeiou')) / 10\n"
        "@episode_reward\ndef raises(sample):\n    raise ZeroDivisionError('by nothing')\n"
        "@episode_reward\ndef nan(sample):\n    return float('nan')\n"
        "@token_reward\ndef short(sample):\n    return [1.0]\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        f"policy: {{model: {model_folder}, precision: float32, device: cpu}}\n"
        "task: {type: file, path: data.jsonl, prompt: '{prompt}:'}\n"
        "rollout: {prompts_per_step: 2, samples_per_prompt: 2, sampling: {max_new_tokens: 4}}\n"
        "rewards: [{fn: 'my_rewards:vowels'}]\n"
        "evaluation: {items: 3, sampling: {temperature: 0, max_new_tokens: 4}}\n"
        "stop: {steps: 2}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


def pertoken(capsys, monkeypatch, *arguments):
    """(exit code, standard output, standard error) of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["pertoken", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_train_evaluate_generate_report(place, capsys, monkeypatch):
    code, out, err = pertoken(capsys, monkeypatch, "train", "recipe.yaml", "folder=first")
    assert (code, err) == (0, "")
    assert "step 2/2  reward" in out
    assert "made all 2 steps; run folder: first" in out
    assert "rouge_l" in out
    assert (place / "first" / "report.html").stat().st_size > 10_000
    records = [json.loads(line) for line in (place / "first" / "episodes" / "000001.jsonl").read_text().splitlines()]
    assert len(records) == 4
    logged = json.loads((place / "first" / "metrics.jsonl").read_text().splitlines()[0])
    assert [name for name in logged if name not in ("step", "time") and find(name, METRICS) is None] == []
    for record in records:
        assert {"reward/vowels", "reward/kl", "reward/total", "advantage", "logprob", "kl", "entropy", "ratio"} <= set(
            record["streams"]
        )
        assert [name for name in record["streams"] if find(name, STREAMS) is None] == []
        total = sum(record["streams"]["reward/total"])
        parts = sum(map(sum, (record["streams"][name] for name in ("reward/vowels", "reward/kl"))))
        assert total == pytest.approx(parts, abs=1e-4)

    code, out, _ = pertoken(capsys, monkeypatch, "evaluate", "recipe.yaml", "--model", "first", "--split", "test")
    assert code == 0
    assert "first sentence" in out
    code, out, _ = pertoken(capsys, monkeypatch, "evaluate", "recipe.yaml", "--against", "first", "--items", "2")
    assert code == 0
    assert "difference [95% interval]" in out

    code, out, _ = pertoken(capsys, monkeypatch, "generate", "hi", "recipe.yaml", "--model", "first", "--by", "logprob")
    assert code == 0
    assert len(out.strip("\n")) > 0
    code, out, _ = pertoken(
        capsys, monkeypatch, "generate", "say 1:", "recipe.yaml", "--plain", "--by", "advantage", "--answer", "x"
    )
    assert code == 0
    assert out.count("reward") == 2

    code, out, _ = pertoken(capsys, monkeypatch, "report", "first")
    assert code == 0
    assert out.strip() == "first/report.html"

    code, out, _ = pertoken(capsys, monkeypatch, "show", "first")
    assert code == 0
    assert len([line for line in out.splitlines() if line.startswith(("1 ", "2 "))]) == 8
    assert "held-out items, for --item: row-" in out
    code, out, _ = pertoken(capsys, monkeypatch, "show", "first", "--step", 1, "--sample", 2, "--numbers")
    assert code == 0
    assert f"{records[2]['streams']['logprob'][records[2]['tokens']['action'].index(1)]:.4g}" in out
    item = json.loads((place / "first" / "evaluations.jsonl").read_text().splitlines()[0])["items"]["id"][0]
    code, out, _ = pertoken(capsys, monkeypatch, "show", "first", "--item", item, "--by", "logprob", "--difference")
    assert code == 0
    assert "After (step 2)" in out
    code, out, _ = pertoken(capsys, monkeypatch, "export", "first", "--step", 1, "--sample", 2)
    assert code == 0
    assert (place / out.splitlines()[0]).is_file()
    for arguments, words in (
        (["show", "first", "--sample", 1], "of which step?"),
        (["export", "first", "--step", 1], "which sample"),
    ):
        code, _, err = pertoken(capsys, monkeypatch, *arguments)
        assert code == 2
        assert words in err


def test_dry_run_prints_what_would_run_and_touches_nothing(place, capsys, monkeypatch):
    code, out, _ = pertoken(capsys, monkeypatch, "train", "recipe.yaml", "seed=7", "--dry-run")
    assert code == 0
    assert "seed: 7" in out
    assert not (place / "runs").exists()
    code, again, _ = pertoken(capsys, monkeypatch, "config", "recipe.yaml", "seed=7")
    assert again == out


def test_explain_documents_each_field(capsys, monkeypatch):
    code, out, _ = pertoken(capsys, monkeypatch, "config", "--explain")
    assert code == 0
    assert "rollout.sampling.top_p" in out
    assert "smallest set of most probable tokens" in out


BAD = {
    "unknown key": (["update.lerning_rate=1"], 2, "did you mean 'learning_rate'?"),
    "no such recipe": (["recipes.yaml"], 2, "did you mean 'recipe.yaml'?"),
    "empty file": (["task.path=empty.jsonl"], 1, "empty"),
    "no such file": (["task.path=nothing.jsonl"], 1, "nothing.jsonl"),
    "wrong column": (["task.prompt=Say {promt}"], 1, "did you mean 'prompt'?"),
    "broken row": (["task.path=broken.jsonl"], 1, "broken.jsonl:2: not valid JSON"),
    "long prompt": (["task.prompt={prompt} " + "very " * 30], 1, "this model's context is 128"),
    "reward raises": (["rewards.0.fn=my_rewards:raises"], 1, "ZeroDivisionError: by nothing"),
    "reward is NaN": (["rewards.0.fn=my_rewards:nan"], 1, "nan"),
    "reward too short": (["rewards.0.fn=my_rewards:short"], 1, "returned 1 values, expected"),
    "no such reward": (["rewards.0.fn=my_rewards:vowel"], 2, "vowel"),
    "no such built-in": (["rewards=[{name: rouge}]"], 2, "did you mean 'rouge_l'?"),
    "reward parameter": (["rewards=[{name: rouge_l, stemer: true}]"], 2, "did you mean 'stemmer'?"),
    "unknown model": (["policy.model=nobody/nothing-at-all"], 1, "cannot load 'nobody/nothing-at-all'"),
    "no model folder": (["policy.model=./nothing"], 1, "no folder './nothing'"),
    "unknown metric": (["evaluation.metric=rouge_x"], 2, "did you mean 'rouge_"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_end_in_one_sentence(place, capsys, monkeypatch, name):
    (place / "empty.jsonl").write_text("")
    (place / "broken.jsonl").write_text('{"prompt": "a", "reference": "b"}\n{"prompt": "a", \n')
    settings, expected, words = BAD[name]
    recipe = [] if name == "no such recipe" else ["recipe.yaml"]
    code, _, err = pertoken(capsys, monkeypatch, "train", *recipe, "folder=bad", *settings)
    assert code == expected
    assert err.startswith("error: ")
    assert words in err
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_written(place, capsys, monkeypatch):
    (place / "occupied").write_text("a file where the folder should be")
    code, _, err = pertoken(capsys, monkeypatch, "train", "recipe.yaml", "folder=occupied/run")
    assert code == 1
    assert "occupied" in err


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "pertoken", "--help"], capture_output=True, text=True, check=True)
    assert "train" in done.stdout


def test_no_network_is_one_sentence(place):
    """A hub name without a network, as a process of its own: transformers decides at import whether it is offline. The
    hub's client tries again and again, with pauses that are left out here."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_ETAG_TIMEOUT": "1"}
    command = "import time; time.sleep = lambda seconds: None; from pertoken.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "train", "recipe.yaml", "policy.model=nobody/nothing"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: policy.model: cannot load 'nobody/nothing'")
    assert "Traceback" not in done.stderr


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(place):
    import signal

    job = subprocess.Popen(
        [sys.executable, "-m", "pertoken.cli", "train", "recipe.yaml", "folder=long", "stop.steps=100000",
         "evaluation.items=0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in job.stdout:
        if line.startswith("step 3/"):
            job.send_signal(signal.SIGINT)
            break
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130, err
    assert "finishing this step" in err
    assert "resume with: pertoken train --resume long" in out
    assert list((place / "long" / "checkpoints").glob("step-*"))
    done = subprocess.run(
        [sys.executable, "-m", "pertoken.cli", "train", "--resume", "long", "stop.steps=12"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (place / "long" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_profile_says_where_time_and_memory_go(place, capsys, monkeypatch):
    code, out, err = pertoken(
        capsys,
        monkeypatch,
        "profile",
        "recipe.yaml",
        "--steps",
        "2",
        "--trace",
        "trace.json",
        "kl={place: none, measure: false}",
        "objective.entropy_coefficient=0.01",
    )
    assert (code, err) == (0, "")
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    parts = [float(lines[name][-2]) for name in ("prompts", "decoding", "forward", "backward", "optimiser", "all else")]
    assert all(part >= 0 for part in parts)
    assert abs(sum(parts) - float(lines["whole step"][-1])) < 0.5 * float(lines["whole step"][-1])
    assert "reference pass" not in lines
    assert "training: " in out
    assert "memory: expected " in out
    events = json.loads((place / "trace.json").read_text())["traceEvents"]
    assert any("linear" in event.get("name", "") for event in events)
    assert not list(place.glob("runs*"))  # nothing is kept


def test_profile_counts_the_matrix_products_of_a_step(place):
    from pertoken.assembly import build_run
    from pertoken.config import load_config
    from pertoken.jobs.profiling import matrix_parameters, work
    from pertoken.observe import StepReport
    from pertoken.training.trainer import generate

    run = build_run(
        load_config(["recipe.yaml"], ["rollout.prompts_per_step=1", "rewards=[{name: length, max_words: 3}]"])
    )
    body, head = matrix_parameters(run.policy)
    assert (body, head) == (2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64), 258 * 32)

    episodes = generate(run, 1)
    sampled, prompt = sum(sum(e.action_mask) for e in episodes), episodes[0].prompt_length
    done = work(run, StepReport(1, {"tokens/generated": float(sampled)}, episodes, {}))
    assert done.training == 6 * (body * (prompt + sampled) + head * sampled)
    assert done.reference * 3 == done.training  # a forward is a third of forward and backward
    assert done.decode == 2 * (body + head) * (sampled - 2)  # the first token of each sample comes with its prompt
