"""The notebook runs from top to bottom, where nothing has been run before and no network answers.
Its own cells assert what they say."""

import shutil

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

LESS = {  # shorter versions of what takes long; the cells' own assertions still hold
    "--max_steps 80 --val_every 20": "--max_steps 20 --val_every 20",
    "--max_steps 200": "--max_steps 40",
    "for _ in range(25)": "for _ in range(5)",
    "min(loader.n_sequences, 128)": "min(loader.n_sequences, 16)",
}


def test_the_notebook_runs_in_a_fresh_folder_without_a_network(tmp_path, monkeypatch):
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py", "play.ipynb"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("GPT2_RUN", "GPT2_WEIGHTS", "HF_HUB_OFFLINE", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more threads are slower on busy cores
    notebook = nbformat.read(tmp_path / "play.ipynb", as_version=4)
    for much, less in LESS.items():
        assert sum(cell.source.count(much) for cell in notebook.cells) == 1, much
        for cell in notebook.cells:
            cell.source = cell.source.replace(much, less)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=where).execute()  # per cell
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    text = "".join(o.get("text", "") for o in outputs)
    assert "training a small GPT-2" in text and "step_00020: 7,259,008 parameters" in text
    assert text.count("> The function returns") == 4
    assert "HellaSwag was not scored in this run" in text  # instead of an empty panel
    assert "no ladder.json here" in text
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 16


def test_what_is_stored_is_small_whole_and_names_no_machine():
    assert (ROOT / "play.ipynb").stat().st_size < 1_000_000
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [o for cell in cells for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = "".join(o.get("text", "") for o in outputs)
    assert str(ROOT) not in text and "/tmp" not in text
