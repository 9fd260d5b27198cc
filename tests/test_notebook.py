"""The notebook runs from top to bottom, where nothing has been run before and no network answers.
Its own cells assert what they say."""

import json
import shutil

import nbformat
from conftest import ROOT, write_shards
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


# Words in the cells that read the files of a run. These cells need nothing from the others.
OF_A_RUN = ("runs = [", "= find_checkpoints(run)[-1]", "def open_text", "x[:, 1:]", "edges = [")
OF_A_RUN += ("def draw_all", "def print_row")


def test_an_unusual_run_is_shown_or_what_it_lacks_is_said(saved, tmp_path, monkeypatch):
    """A folder with colons and a blank in its name, a checkpoint without a log, a text of 200
    tokens, and a shell with a value of MPLBACKEND that means nothing here."""
    run = tmp_path / "runs" / "2026-11-26_14:17:03 second try"
    shutil.copytree(saved[1], run / "step_00001")
    shards = write_shards(tmp_path / "shards", train=(160,), val=40)
    (run / "run.json").write_text(json.dumps([{"args": {"data_dir": str(shards)}}]))
    monkeypatch.setenv("GPT2_RUN", str(run))
    monkeypatch.setenv("MPLBACKEND", "none_that_exists")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GPT2_WEIGHTS", raising=False)
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells = [cell for cell in code if any(words in cell.source for words in OF_A_RUN)]
    assert len(notebook.cells) == len(OF_A_RUN)
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=600, resources=where).execute()
    outputs = [o for cell in notebook.cells for o in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert f"{run}/step_00001: {saved[0].num_params() - 47 * 128:,} parameters" in text
    assert f"the training text in {shards} has only 160 tokens" in text
    assert f"There is no log.txt in {run}, so there is nothing to plot" in text
    assert "There is no log, so there is nothing to compare" in text
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    assert not [o for o in outputs if o.get("name") == "stderr"]


def test_what_is_stored_is_small_whole_and_names_no_machine():
    assert (ROOT / "play.ipynb").stat().st_size < 1_000_000
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [o for cell in cells for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = "".join(o.get("text", "") for o in outputs)
    assert str(ROOT) not in text and "/tmp" not in text
