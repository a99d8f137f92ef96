"""Runs the notebooks of examples/notebooks/ and keeps in them what they show.

    python docs/notebooks.py [NOTEBOOK ...]

Outputs are kept because most readers meet a notebook on GitHub, where nothing runs. What is shown as HTML has no
second form as plain text there, which would be the names of all its fields; progress bars and times are left out too.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
SECONDS = 900
"""That a kernel may take to start, and each cell to run, on a machine that has other things to do."""


def executed(path: Path, place: Path) -> Any:
    """The notebook with new outputs, run in a kernel of its own in the folder `place`; raises where a cell raises."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, kernel_name="python3", timeout=SECONDS, startup_timeout=SECONDS, record_timing=False,
        resources={"metadata": {"path": str(place)}},
    ).execute()  # fmt: skip
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs)
    return notebook


def _kept(outputs: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if "text/html" in output.get("data", {}):
            output.data.pop("text/plain", None)
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text  # how a text was cut on its way is chance
        else:
            kept.append(output)
    return kept


def main() -> None:
    """Run them and write them."""
    import nbformat

    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as place:
            notebook = executed(path, Path(place))
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
