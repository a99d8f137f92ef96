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
            cell.outputs = [kept for output in cell.outputs if (kept := _kept(output)) is not None]
    return notebook


def _kept(output: Any) -> Any:
    if output.get("name") == "stderr":
        return None
    if "text/html" in output.get("data", {}):
        output.data.pop("text/plain", None)
    return output


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
