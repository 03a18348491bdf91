"""Every example runs as it stands, with no warning, and writes into ``logs`` only, which git ignores."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.py"))
NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "Warning" not in run.stderr
    assert {written.name for written in tmp_path.iterdir()} <= {"logs"}


def test_there_are_examples():
    assert len(EXAMPLES) >= 13


@pytest.mark.slow
def test_the_notebook_runs_from_a_clean_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "identical: True" in text
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 3
    assert "Warning" not in "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_notebook_is_committed_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.outputs or cell.execution_count for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_token_level_example_needs_no_sb3(tmp_path):
    path = next(path for path in EXAMPLES if path.stem == "token_level")
    code = f"import runpy, sys; runpy.run_path({str(path)!r}); sys.exit('stable_baselines3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False).returncode == 0
