"""The notebook of examples/ runs, and is kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.environment import QUICK_TO_COMPILE

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "personalise.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPLUG_NOTEBOOK", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", QUICK_TO_COMPILE)  # one device, as a reader has it
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for long, short in {'"train": 400': '"train": 32', '"dev": 40': '"dev": 4'}.items():
            cell.source = cell.source.replace(long, short)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    )
    client.execute()
    texts = [
        output.get("text", "") + str(output.get("data", ""))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert any("personal:" in text for text in texts)
    assert any("32 to train on (train), 4 held out (dev)" in text for text in texts)
    assert any("(17, 128)" in text for text in texts)  # I and 16 persona tokens, 128 wide
