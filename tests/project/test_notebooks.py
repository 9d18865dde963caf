"""Every notebook of the docs runs from its first cell to its last, and shows what it says."""

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
nbclient = pytest.importorskip("nbclient", reason="needs the extra notebook")
pytest.importorskip("ipykernel", reason="needs the extra notebook")

FOLDER = Path(__file__).parents[2] / "docs/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def shown(cell: Any) -> dict[str, str]:
    """What a cell shows by its result, by MIME type."""
    return {
        kind: "".join(text)
        for output in cell.outputs
        if output.output_type in ("execute_result", "display_data")
        for kind, text in output.data.items()
    }


def test_there_is_one() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# What the kernel's own packages warn of is not ours.
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count], "kept without"
    # In another folder: it is the same from a wheel.
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    pages = [shown(cell).get("text/html", "") for cell in code]
    for title in ("HookedALM bundled:", "ALMInput: ", "ActivationCache: ", "PatchResult: "):
        assert sum(f"<strong>{title}" in page for page in pages) == 1, title
    answers = [shown(cell).get("text/plain") for cell in code if "generate(" in cell.source]
    assert answers == ["['cheerful']", "['sad']"]
    assert any("image/png" in shown(cell) for cell in code)
    (kept,) = tmp_path.iterdir()
    assert kept.name == "heads.safetensors"
