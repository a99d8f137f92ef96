"""The shape checker is on in every test: each annotated tensor is checked at each call."""

import json
import os
import random
import shutil
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The checker draws which entries of a list it looks at, from a source of its own here: runs are compared to the last
# bit, and the rewards in them draw from the global one.
drawn_from = random.getrandbits
random.getrandbits = random.Random(0).getrandbits
import beartype._check.code.codemain  # noqa: E402, F401 - takes the function when it is imported

random.getrandbits = drawn_from

from jaxtyping import install_import_hook  # noqa: E402

_hook = install_import_hook("pertoken", "beartype.beartype")

import pytest  # noqa: E402 - after the hook
from hypothesis import settings  # noqa: E402

# A machine that does something else too is no fault; all else is as hypothesis chooses, in CI or out of it.
settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny random Llama with a byte tokenizer, saved as users save theirs."""
    from pertoken.testing import byte_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("model")
    tiny_model(seed=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def asked_run(tmp_path_factory, model_folder):
    """A finished run with checkpoints, evaluations and all its episodes; treat it as read-only."""
    from pertoken.config import RunConfig
    from pertoken.jobs import run

    place = tmp_path_factory.mktemp("asked")
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "folder": str(place / "runs" / "first"),
        "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu", "compile": False},
        "task": {"type": "file", "path": str(place / "data.jsonl"), "prompt": "{prompt}:"},
        "rollout": {
            "prompts_per_step": 2,
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 6, "min_new_tokens": 6},
        },
        "rewards": [{"name": "rouge_l"}, {"name": "repetition", "weight": 0.5}],
        "update": {"learning_rate": 0.01},
        "evaluation": {"items": 3, "every": 3, "sampling": {"temperature": 0.0, "max_new_tokens": 6}},
        "checkpoint": {"every": 1, "keep": 3},
        "log": {"episodes_every": 1},
        "stop": {"steps": 3},
    }
    run.train(RunConfig.model_validate(config))
    return place / "runs" / "first"


@pytest.fixture
def killed_at():
    """`killed_at(n, work)`: does `work()` in a process that is killed at its n-th file operation; whether it was."""
    return _killed_at


def _killed_at(operation, work):
    pid = os.fork()
    if not pid:
        _die_at(operation)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _die_at(operation):
    """SIGKILL for this process right before its n-th file operation: what Python reports to auditors, and fsync."""
    left = operation

    def count(event, _):
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.")):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda descriptor: (count("os.fsync", ()), fsync(descriptor))
    sys.addaudithook(count)


@pytest.fixture
def pertoken(capsys, monkeypatch):
    """`pertoken("runs", "list")`: (exit code, standard output, standard error) of a command, run in this process."""
    from pertoken import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pertoken", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture(scope="module")
def browser():
    """A Chromium that asks nothing of the network by itself; tests are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright", exc_type=ImportError)
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium on the path")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=path, args=[*flags, "--disable-component-update", "--disable-sync"]
        )
        yield found
        found.close()
