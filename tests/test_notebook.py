"""The notebook runs from top to bottom, on a run and weights made here."""

import nbformat
from conftest import QUIET, ROOT, TINY, run_here, write_shards
from nbclient import NotebookClient


def test_the_notebook_runs(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards")
    folders = ["--data_dir", shards, "--out_dir", tmp_path / "run"]
    steps = "--max_steps 2 --total_batch_size 64 --micro_batch_size 2 --val_every 1 --val_tokens 64"
    run_here(*TINY, *QUIET, *folders, *steps.split())
    monkeypatch.setenv("GPT2_RUN", str(tmp_path / "run"))
    monkeypatch.delenv("GPT2_WEIGHTS", raising=False)
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    text = "".join(o.get("text", "") for o in outputs)
    assert "step_00002" in text and "val: first 10.8" in text
    assert text.count("> The for statement is used to") == 4
    first, last = map(float, text.split(": KL ")[1].split(" -> "))
    assert 0 < last < first  # the student learns
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 5
