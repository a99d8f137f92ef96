"""Each notebook runs as a reader runs it, in a kernel of its own, and prints by hand what it printed when it was kept.

Why outputs are kept in the files: docs/notebooks.py.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
notebooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notebooks)

NAMES = sorted(path.name for path in notebooks.NOTEBOOKS.glob("*.ipynb"))
needs_a_kernel = pytest.mark.timeout(1800)


def kernel():
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra 'dev'")


def printed(notebook) -> list[str]:
    """What each cell prints."""
    return [
        "".join("".join(output["text"]) for output in cell.get("outputs", ()) if output["output_type"] == "stream")
        for cell in notebook["cells"]
    ]


def kept(name):
    return json.loads((notebooks.NOTEBOOKS / name).read_text(encoding="utf-8"))


@needs_a_kernel
def test_the_hand_numbers_of_the_notebook_on_credit_are_right(tmp_path, monkeypatch):
    """A cell that finds another number raises, and so does this test; what is printed is what stands in the file."""
    kernel()
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    made = notebooks.executed(notebooks.NOTEBOOKS / "how_credit_works.ipynb", tmp_path)
    assert printed(made) == printed(kept("how_credit_works.ipynb")), "stale; run: python docs/notebooks.py"


@needs_a_kernel
def test_the_first_run_trains_and_its_cells_agree(tmp_path, monkeypatch):
    kernel()
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    made = notebooks.executed(notebooks.NOTEBOOKS / "first_run.ipynb", tmp_path)
    lines = [line.split() for text in printed(made) for line in text.splitlines() if "vowels" in line]
    rewards = [float(line[3]) for line in lines]
    assert rewards[-1] > 0.4 > 0.1 > rewards[0]
    assert (tmp_path / "runs" / "first" / "run" / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name != "ipython"] == ["runs"]


@needs_a_kernel
def test_a_cell_that_raises_fails(tmp_path, monkeypatch):
    kernel()
    import nbformat
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2, 'by hand'")])
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    with pytest.raises(CellExecutionError, match="by hand"):
        notebooks.executed(tmp_path / "wrong.ipynb", tmp_path)


def test_every_notebook_is_tested():
    assert NAMES == ["first_run.ipynb", "how_credit_works.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_with_its_outputs_and_without_traces_of_the_machine(name):
    notebook, text = kept(name), (notebooks.NOTEBOOKS / name).read_text(encoding="utf-8")
    assert "/tmp/" not in text
    assert "/home/" not in text
    assert '"stderr"' not in text
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run it from top to bottom: python docs/notebooks.py"
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert not any(output["output_type"] == "error" for cell in notebook["cells"] for output in cell.get("outputs", ()))


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name):
    for cell in kept(name)["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)\s]+)\)", "".join(cell["source"])):
                assert (notebooks.NOTEBOOKS / target.partition("#")[0]).resolve().exists(), target
