"""What others made, models, checkpoints, data, is opened without running anything that is in it."""

import ast
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from pertoken import assembly
from pertoken.config import RunConfig, load_config
from pertoken.errors import ConfigError, ModelError, PertokenError, RunFolderError, TaskError
from pertoken.hub import code_arguments, code_digest
from pertoken.jobs import run
from pertoken.policy.checkpoint import load_state
from pertoken.policy.model import load_model
from pertoken.tasks.files import load_file_task
from pertoken.tracking.checkpoints import MANIFEST, _digest

PACKAGE = Path(__file__).parents[1] / "pertoken"
OWN_PICKLES = {"workers.py", "isolation.py"}
"""They speak to processes that they started themselves, over pipes."""


# --- the source -----------------------------------------------------------------------------------------------


def calls(path):
    """Each call in a file: dotted name, node."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def loads_freely(path):
    """Calls in a file that open pickles, or run code that comes with what they open."""
    found = []
    for name, node in calls(path):
        given = {keyword.arg for keyword in node.keywords}
        spread = {ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None}
        last = name.rpartition(".")[2]
        if name in ("torch.load", "joblib.load", "dill.load", "dill.loads", "eval", "exec", "yaml.unsafe_load"):
            found.append(name)
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler") and path.name not in OWN_PICKLES:
            found.append(name)
        if name == "np.load" and "allow_pickle" in given:
            found.append(name)
        if name == "yaml.load" and "Loader" not in given:
            found.append(name)
        if last == "from_pretrained" and not spread & {"SAFE", "NO_CODE", "code", "file"}:
            found.append(name)
        if last == "from_config" and "trust_remote_code" not in given:
            found.append(name)
        weights = last == "from_pretrained" and "Tokenizer" not in name and "Config" not in name
        if weights and not ({"SAFE", "file"} & spread or "use_safetensors" in given):
            found.append(f"{name} without use_safetensors")
        if last == "SentenceTransformer" and not {"trust_remote_code", "model_kwargs"} <= given:
            found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_loaded_that_can_run(path):
    assert loads_freely(path) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "pickle.loads(raw)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "AutoTokenizer.from_pretrained(name)",
        "AutoModel.from_pretrained(name, **NO_CODE)",
        "auto.from_config(config)",
        "SentenceTransformer(name)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(tmp_path, source):
    (tmp_path / "module.py").write_text(source)
    assert loads_freely(tmp_path / "module.py")


# --- pickles --------------------------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self._canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self._canary,)


@pytest.fixture
def canary(tmp_path):
    """Where the trap makes its folder; at the end there must be none."""
    place = tmp_path / "canary"
    yield place
    assert not place.exists(), "something was unpickled, or ran"


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    torch.save({"a": Trap(tmp_path / "sprung too")}, tmp_path / "w.bin")
    torch.load(tmp_path / "w.bin", weights_only=False)
    assert (tmp_path / "sprung").is_dir()
    assert (tmp_path / "sprung too").is_dir()


def plant(folder, canary, names):
    for name in names:
        torch.save({"weight": Trap(canary)}, folder / name)


PICKLES = ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt", "vocab.pkl")


def test_a_model_of_pickles_is_refused(model_folder, tmp_path, canary):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    plant(folder, canary, ["pytorch_model.bin"])
    with pytest.raises(ModelError, match=r"no weights in safetensors, and pickles \(pytorch_model.bin\) are not"):
        load_model(str(folder))


def test_pickles_beside_a_sound_model_stay_closed(model_folder, tmp_path, canary):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    plant(folder, canary, PICKLES)
    model, _ = load_model(str(folder))
    expected, _ = load_model(str(model_folder))
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in model.named_parameters())


def test_a_pickle_with_the_name_of_safetensors_is_one_sentence(model_folder, tmp_path, canary):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    plant(folder, canary, ["model.safetensors"])
    with pytest.raises(ModelError, match=r"policy.model: cannot load"):
        load_model(str(folder))


# --- code -----------------------------------------------------------------------------------------------------

CODE = {
    "configuration_stranger.py": "from transformers import LlamaConfig\n\n\n"
    "class StrangerConfig(LlamaConfig):\n    model_type = 'stranger'\n",
    "modeling_stranger.py": "import os\nfrom transformers import LlamaForCausalLM\n"
    "from .configuration_stranger import StrangerConfig\n\n"
    "os.makedirs({canary!r}, exist_ok=True)\n\n\n"
    "class StrangerForCausalLM(LlamaForCausalLM):\n    config_class = StrangerConfig\n",
}


@pytest.fixture
def stranger(model_folder, tmp_path, monkeypatch):
    """A model folder with code of its own, which makes a folder `ran` when it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked on the terminal"))
    folder = shutil.copytree(model_folder, tmp_path / "stranger")
    for name, text in CODE.items():
        (folder / name).write_text(text.replace("{canary!r}", repr(str(tmp_path / "ran"))))
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "stranger",
        "architectures": ["StrangerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_stranger.StrangerConfig",
            "AutoModelForCausalLM": "modeling_stranger.StrangerForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_model_runs_only_if_it_was_named(stranger, tmp_path):
    digest = code_digest(stranger)
    with pytest.raises(ModelError, match=f"brings Python code of its own.*policy.trust_remote_code to {digest}"):
        load_model(str(stranger))
    for other in ("0" * 64, "0" * 40):
        with pytest.raises(ModelError, match=f"is not the one that was named.*its digest is {digest} now"):
            load_model(str(stranger), trusted=other)
    assert not (tmp_path / "ran").exists()
    model, _ = load_model(str(stranger), trusted=digest)
    assert type(model).__name__ == "StrangerForCausalLM"
    assert (tmp_path / "ran").is_dir()


def test_code_that_has_changed_is_not_what_was_named(stranger, tmp_path):
    digest = code_digest(stranger)
    with (stranger / "modeling_stranger.py").open("a") as file:
        file.write("\n")
    with pytest.raises(ModelError, match="is not the one that was named"):
        load_model(str(stranger), trusted=digest)
    assert not (tmp_path / "ran").exists()


def test_of_a_repository_code_and_weights_are_those_of_the_commit(monkeypatch):
    commit = "0123456789abcdef" * 2 + "01234567"
    assert code_arguments("owner/name", None) == {"trust_remote_code": False}
    assert code_arguments("owner/name", commit) == {
        "trust_remote_code": True, "revision": commit, "code_revision": commit,
    }  # fmt: skip
    with pytest.raises(ModelError, match="expected the commit of its repository, 40 hex digits"):
        code_arguments("owner/name", "0" * 64)
    asked = []

    def from_pretrained(name, **arguments):
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr("pertoken.policy.model.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="no network here"):
        load_model("owner/name", trusted=commit)
    assert asked == [{"trust_remote_code": True, "revision": commit, "code_revision": commit}]


@pytest.mark.parametrize("value", ["true", "main", "0123456", "v1.0", "G" * 40])
def test_the_flag_names_a_commit_and_nothing_that_moves(value):
    with pytest.raises(ConfigError, match=r"policy.trust_remote_code"):
        load_config([], [f"policy.trust_remote_code='{value}'"])


# --- checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder):
    """A run of two steps, with its checkpoints; treat it as read-only."""
    place = tmp_path_factory.mktemp("run")
    rows = [{"id": str(k), "prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(20)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig.model_validate(
        {
            "folder": str(place / "run"),
            "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu"},
            "task": {"type": "file", "path": str(place / "data.jsonl"), "prompt": "{prompt}:", "id": "id"},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 3}},
            "evaluation": {"items": 0},
            "checkpoint": {"every": 1},
            "stop": {"steps": 2},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_write_report", lambda folder, on_note: None)
        run.train(config)
    return config


@pytest.fixture
def copied(made, tmp_path):
    """The configuration of a copy of that run, and the folder of its newest checkpoint."""
    folder = shutil.copytree(made.run_folder, tmp_path / "run")
    return made.model_copy(update={"folder": str(folder)}), folder / "checkpoints" / "step-000002"


def vouch(checkpoint):
    """Write the manifest anew, as a forger would."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["sha256"]
    for path in checkpoint.iterdir():
        if path.name != MANIFEST:
            content = path.read_bytes()
            manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_forged_checkpoint_with_a_pickle_in_it_stays_closed(copied, canary, name):
    config, checkpoint = copied
    plant(checkpoint, canary, [name, "state.pt", "optimizer.pkl"])
    vouch(checkpoint)
    with pytest.raises(RunFolderError, match="not a readable checkpoint"):
        run.train(config, resume=config.run_folder)


STATES = {
    "no progress": lambda state: state.pop("progress"),
    "progress that is none": lambda state: state.update(progress=[1, 2]),
    "a step that is a text": lambda state: state["progress"].update(step="../../x"),
    "a step that is a list": lambda state: state["progress"].update(step=[[]]),
    "a KL of text": lambda state: state.update(kl="high"),
    "portions of text": lambda state: state.update(portions={"micro_batch": "all"}),
    "samples drawn ahead of nothing": lambda state: state.update(ahead={"completions": 3}),
    "no random states": lambda state: state.pop("random"),
    "random states of text": lambda state: state.update(random={"python": "x", "numpy": "y"}),
    "NumPy's of another kind": lambda state: state["random"]["numpy"].update(kind="os.system"),
    "guards of text": lambda state: state.update(guards="none"),
}


@pytest.mark.parametrize("fault", STATES)
def test_a_forged_state_is_one_sentence(copied, fault):
    config, checkpoint = copied
    state = json.loads((checkpoint / "state.json").read_text())
    STATES[fault](state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    vouch(checkpoint)
    with pytest.raises(RunFolderError, match=r"not a (readable )?checkpoint"):
        assembly.build_run(config, checkpoint=checkpoint)


def test_averages_of_another_shape_are_refused_before_the_optimiser_reads_beyond_them(copied):
    from safetensors.torch import load_file, save_file

    config, checkpoint = copied
    tensors = load_file(checkpoint / "state.safetensors")
    name = next(name for name in tensors if name.endswith("/exp_avg"))
    for changed in (torch.zeros(1), tensors[name].double()):
        save_file(tensors | {name: changed}, checkpoint / "state.safetensors")
        built = assembly.build_run(config)
        with pytest.raises(RunFolderError, match=r"exp_avg: expected \[.*\] in float32, got \["):
            load_state(checkpoint, built.policy, built.optimizer)


# --- rows that are endless --------------------------------------------------------------------------------------


class Endless:
    """A text file of one line that never ends, and how much of it was asked for at once."""

    def __init__(self, limit):
        self.limit, self.most, self.given = limit, 0, 0

    def readline(self, size=-1):
        assert size >= 0, "a line is read to its end, however long it is"
        self.most = max(self.most, size)
        count = min(size, self.limit - self.given)
        self.given += count
        return "x" * count


def test_a_line_without_end_is_read_in_pieces(monkeypatch):
    from pertoken import rows

    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    file = Endless(10**6)
    found = list(rows._records(rows._Lines(file), ","))
    assert found == [(1, "larger than 0 MB; is a quote left open?")]
    assert file.most <= 1001
    assert file.given == 10**6


def write(path, content):
    path.write_bytes(content)
    return path


def test_csv_rows_beyond_the_size_limit_are_named_and_the_next_is_read(tmp_path, monkeypatch):
    from pertoken import rows

    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1000)
    many, quoted = b"x," * 3000, b'"' + b"y\n" * 3000 + b'",t'
    path = write(tmp_path / "a.csv", b"body,title\na,t\n" + many + b"\nb,t\n" + b'c,"' + b"z" * 5000 + b'"\nd,t\n')
    task = load_file_task(path, prompt="{body}", answer="title", max_bad_rows=9, fractions=(1.0, 0.0, 0.0))
    assert [item.prompt for item in task.items("train")] == ["a", "b", "d"]
    assert [(bad.line, bad.reason[:11]) for bad in task.bad_rows] == [(3, "larger than"), (5, "larger than")]
    path = write(tmp_path / "b.csv", b"body,title\n" + quoted + b"\nb,t\n")
    with pytest.raises(TaskError, match=r"b.csv:2: (larger than|field larger)"):
        load_file_task(path, prompt="{body}", answer="title")


def test_a_large_array_is_asked_for_as_lines_and_large_lines_are_read(tmp_path, monkeypatch):
    from pertoken import rows

    monkeypatch.setattr(rows, "MAX_ARRAY_BYTES", 50)
    content = [{"body": f"b{k}", "title": "t"} for k in range(9)]
    array = write(tmp_path / "a.json", b" \n" + json.dumps(content).encode())
    with pytest.raises(TaskError, match="write it as JSON lines"):
        load_file_task(array, prompt="{body}", answer="title")
    lines = write(tmp_path / "b.json", "\n".join(map(json.dumps, content)).encode())
    assert sum(len(items) for items in load_file_task(lines, prompt="{body}", answer="title").splits.values()) == 9


def test_a_header_that_is_no_text_is_one_sentence(tmp_path):
    path = write(tmp_path / "a.csv", b"body,t\xffitle\na,b\n")
    with pytest.raises(TaskError, match=r"names a column that is no UTF-8 text: 't\\udcffitle'"):
        load_file_task(path, prompt="{body}", answer=None)


@pytest.mark.parametrize("value", ["9" * 4000, "9" * 100_000, "-" + "9" * 30, "1e400", "[" * 5000 + "]" * 5000])
def test_numbers_without_end_and_nests_in_cells_are_rows_or_reasons(tmp_path, value):
    line = f'{{"body": "b", "title": "t", "n": {value}}}'
    path = write(tmp_path / "a.jsonl", (line + '\n{"body": "c", "title": "t", "n": 1}\n').encode())
    try:
        task = load_file_task(path, prompt="{body}", answer="title", id="n", info=["n"], max_bad_rows=1)
    except PertokenError as error:
        pytest.fail(f"one bad row is allowed: {error}")
    assert len(task.bad_rows) + sum(map(len, task.splits.values())) == 2


def test_a_parquet_file_with_text_that_is_none_is_one_sentence(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    text = arrow.array([b"b\xff\xfe", b"c"]).cast(arrow.binary())
    raw = arrow.StringArray.from_buffers(2, text.buffers()[1], text.buffers()[2])
    pq.write_table(arrow.table({"body": raw, "title": ["t", "t"]}), tmp_path / "a.parquet")
    with pytest.raises(TaskError, match="not a readable Parquet file"):
        load_file_task(tmp_path / "a.parquet", prompt="{body}", answer="title")
