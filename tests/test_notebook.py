"""The notebook runs in a fresh folder without a network, and again with an unusual model. Its own
cells assert what they say. What is stored in it is small and whole."""

import shutil

import nbformat
from conftest import ROOT, run, train
from nbclient import NotebookClient

LESS = {  # shorter versions of what takes long; the cells' own assertions still hold
    "--max_steps 80 --val_every 20": "--max_steps 10 --val_every 10",
    "--max_steps 200": "--max_steps 10",
    "for _ in range(50)": "for _ in range(30)",
    "for _ in range(25)": "for _ in range(3)",
    "min(loader.n_sequences, 128)": "min(loader.n_sequences, 8)",
}
# Words in the cells that have nothing to do with the model that is taken apart.
OTHERS = ("def residual_stds", "optimizer_class", "def round_to_tf32", "ladder", '"char"')
LIMITS = """draw_all()
low, high = plt.gcf().axes[0].get_ylim()
assert all(low < value < high for value in logs[runs[0]]["val"].values())"""


def read_outputs(cells):
    """The text that cells have printed, and the number of their pictures."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = "".join(output.get("text", "") for output in outputs)
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_shows_a_fresh_folder_and_then_a_context_of_8_digits(tmp_path, monkeypatch):
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("GPT2_RUN", "GPT2_WEIGHTS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more threads are slower on busy cores
    source, shards = tmp_path / "digits.txt", tmp_path / "digits"
    source.write_text("0110 2001\n" * 600)
    run("fineweb.py", "--source", source, "--out", shards, "--tokenizer", "char", "--workers", 0)
    train(shards, tmp_path / "unusual", "--seq_len", 8, "--block_size", 8)
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    text, n_pictures = read_outputs(notebook.cells)  # as stored
    assert n_pictures == 17 and str(ROOT) not in text and "/tmp" not in text
    assert (ROOT / "play.ipynb").stat().st_size < 400_000
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for much, less in LESS.items():
        assert sum(source.count(much) for source in sources) == 1, much
        sources = [source.replace(much, less) for source in sources]
    again = [source for source in sources if not any(word in source for word in OTHERS)]
    all_sources = [*sources, 'os.environ["GPT2_RUN"] = "unusual"', *again, LIMITS]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in all_sources]
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text, n_pictures = read_outputs(notebook.cells[: len(sources)])
    assert "training a small GPT-2" in text and "step_00010: 7,259,008 parameters" in text
    assert text.count("> The function returns") == 4 and n_pictures == 16  # no ladder.json
    text, n_pictures = read_outputs(notebook.cells[len(sources) :])
    assert "block_size=8, vocab_size=6" in text and n_pictures == 14
    assert text.count("cannot spell") == 2 and "no log of a run with GPT-2's tokenizer" in text
