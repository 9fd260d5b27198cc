"""A user's mistake ends with status 2 and one line on stderr, which begins with the script's name,
says what is wrong, and comes before anything is written."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUIET, STEPS, TINY, refused, run, run_here, train, write_shards

import fineweb
import hellaswag
import train_gpt2

NEW = " ".join([*TINY, *QUIET, *STEPS, "--micro_batch_size 4 --out_dir {new} "])
RUN = NEW + "--data_dir {shards} "
WEIGHTS = "--init_from {weights} --seq_len 32 --total_batch_size 256 --device cpu "
WEIGHTS += "--data_dir {shards} --out_dir {new} "
RESUME = "--resume --out_dir {run} "

TRAIN = [  # flags, words of the sentence; the folders in braces are made below
    (RUN + "--total_batch_size 200", "--total_batch_size 200 is not a multiple of"),
    (RUN + "--total_batch_size 512 --batch_ramp_steps 4", "x 8 (--batch_ramp_steps) = 1024"),
    (RUN + "--seq_len 128 --total_batch_size 512", "--seq_len 128: the model's context has 64"),
    (RUN + "--seq_len 2048 --block_size 2048 --total_batch_size 8192", "val shards hold 1500"),
    (
        RUN + "--seq_len 8192 --block_size 8192 --total_batch_size 32768 --val_every 0",
        "train shards hold 6000 tokens, too few for --seq_len 8192",
    ),
    (RUN + "--max_lr 1e-4", "--min_lr 0.001 is above --max_lr 0.0001; lower it, too"),
    (RUN + "--vocab_size 100", "the model embeds 100 tokens, its tokenizer has 257"),
    (NEW + "--data_dir {nowhere}", "nowhere: there are no train shards"),
    (NEW + "--data_dir {nowhere} --epochs 1", "nowhere: there are no train shards"),
    (NEW + "--data_dir {unfinished}", "is unfinished; the same fineweb.py command continues"),
    (NEW + "--data_dir {foreign}", "token id 50276, but the model has only 50257 tokens"),
    (RUN + "--out_dir {run}", "holds a run; add --resume, or choose another --out_dir"),
    (RUN + "--out_dir {no_log}", "holds a run; add --resume, or choose another --out_dir"),
    (RUN + "--out_dir {file}/out", "file/out cannot be written (Not a directory)"),
    (WEIGHTS + "--n_layer 24", "--n_layer: the weights of --init_from have their own; omit it"),
    (WEIGHTS + "--model gpt2-xl", "--model: the weights of --init_from have their own; omit it"),
    (WEIGHTS + "--block_size 32", "--block_size: the weights of --init_from have their own"),
    (WEIGHTS + "--seq_len 128", "--seq_len 128: the model's context has 64 tokens"),
    (WEIGHTS + "--init_from {nowhere}", "nowhere: no such directory"),
    (WEIGHTS + "--init_from gpt3", "gpt3: no such directory; give one that exists, or gpt2"),
    ("--sample_only", "--sample_only needs weights"),
    (
        "--sample_only --device cpu --init_from {misfit}",
        "the model embeds 257 tokens, its tokenizer has 50257",
    ),
    (
        "--sample_only --device cpu --init_from {bare}",
        "the model embeds 257 tokens, its tokenizer has 50257",
    ),
    (RESUME + "--seed 2", "was trained with --seed 1337, not 2"),
    (RESUME + "--n_embd 64", "was trained with --n_embd 32, not 64"),
    (RESUME + "--model gpt2-xl", "was trained with --model gpt2, not gpt2-xl"),
    (RESUME + "--init_from gpt2", "was trained with --init_from scratch, not gpt2"),
    (RESUME + "--vocab_size 300", "was trained with --vocab_size"),
    (RESUME + "--seq_len 16", "was trained with --seq_len 32, not 16"),
    (RESUME + "--no-shuffle", "was trained with --shuffle True, not False"),
    (RESUME + "--total_batch_size 512", "start another run with --init_from"),
    (RESUME + "--batch_ramp_steps 3", "was trained with --batch_ramp_steps 0, not 3"),
]
FINEWEB = [
    ("--source {nowhere}", "nowhere is not a local path"),
    ("--source {file}", "has no files of text"),
    ("--source {mixed}", "has files of several types, json, parquet, txt"),
    ("--source {mixed}/c.parquet --text_column words", "c.parquet has no column words"),
    ("--source {mixed}/a.jsonl", "a.jsonl, line 2 is not a JSON object"),
    ("--source {mixed}/b.txt --tokenizer {nowhere}", "--tokenizer"),
    ("--source {mixed}/b.txt --rank 2 --world_size 2", "--rank 2"),
    ("--source {mixed}/b.txt --shard_size 0", "--shard_size 0"),
    ("--verify {shards}", "has no manifest to compare with"),
]
HELLASWAG = [
    ("--model {nowhere}", "nowhere: no such directory"),
    ("--model {weights} --data {nowhere}", "nowhere cannot be read (No such file or directory)"),
    ("--model {weights} --data {file} --limit 0", "nothing to score"),
    ("--model {weights} --data {file}", "file, line 1 is not an "),
    ("--model {misfit} --data {file}", "misfit has 257 rows, too few for its tokenizer"),
    ("--compare {file} {file}", "file is not a file that --json wrote"),
]
TABLE = [(train_gpt2.main, *row) for row in TRAIN]
TABLE += [(fineweb.main, f"{flags} --out {{new}} --workers 0", words) for flags, words in FINEWEB]
TABLE += [(hellaswag.main, f"{flags} --device cpu", words) for flags, words in HELLASWAG]


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """{name: path} of the folders and files that the table names."""
    shards, out, _ = base
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(out, folder / "no_log")
    (folder / "no_log/log.txt").unlink()
    (folder / "file").write_text("this is no JSON\n")
    (folder / "mixed").mkdir()
    (folder / "mixed/a.jsonl").write_text('{"text": "one"}\n["two"]\n')
    (folder / "mixed/b.txt").write_text("three")
    pq.write_table(pa.table({"text": ["four"]}), folder / "mixed/c.parquet")
    source, unfinished = folder / "mixed/b.txt", folder / "unfinished"
    fineweb.build(fineweb.Config(str(source), out=str(unfinished), workers=0))
    manifest = json.loads((unfinished / "manifest.json").read_text()) | {"complete": False}
    (unfinished / "manifest.json").write_text(json.dumps(manifest))
    (folder / "foreign").mkdir()  # shards of GPT-NeoX, whose tokenizer is missing
    for name in ("a_val_0.npy", "a_train_1.npy"):
        np.save(folder / "foreign" / name, np.full(3000, 50276, np.uint16))
    for name in ("misfit", "bare"):
        shutil.copytree(out / "step_00008", folder / name)
        for path in (folder / name).glob("*token*"):
            path.unlink()
    fineweb.gpt2_tokenizer().save(folder / "misfit")
    names = "no_log file mixed unfinished foreign misfit bare nowhere".split()
    paths = {name: folder / name for name in names}
    return paths | dict(shards=shards, run=out, weights=out / "step_00008")


@pytest.mark.parametrize("main, flags, words", TABLE)
def test_a_mistake_is_one_sentence(folders, tmp_path, capsys, main, flags, words):
    new = tmp_path / "new"
    before = (folders["run"] / "log.txt").read_bytes()
    with pytest.raises(SystemExit) as end:
        main(flags.format(**folders, new=new).split())
    lines = capsys.readouterr().err.splitlines()
    # Transformers and tqdm may draw bars, each of which ends with a carriage return or a newline.
    script = f"{main.__module__}.py: "
    assert end.value.code == 2 and lines[-1].startswith(script) and words in lines[-1], lines
    assert sum(line.startswith(script) for line in lines) == 1, lines
    assert not new.exists() or not list(new.glob("*_*")), "something was written"
    assert (folders["run"] / "log.txt").read_bytes() == before


def test_a_mistake_of_the_real_command_is_one_line_and_status_2(tmp_path):
    done = run("train_gpt2.py", "--data_dir", tmp_path / "nowhere", "--device", "cpu", check=False)
    refused(done, "there are no train shards; give another --data_dir")
    assert done.stdout == ""


def test_out_of_memory_names_the_flag_to_change(base, tmp_path, monkeypatch):
    def step(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt2, "training_step", step)
    done = train(base[0], tmp_path / "out", check=False)
    refused(done, "out of memory; choose a smaller --micro_batch_size")


def test_weights_and_shards_with_different_tokenizers_are_warned_about(base, folders, tmp_path):
    """The same ids stand for other characters there."""
    other = write_shards(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    ids = json.loads(text)["model"]["vocab"]
    text = text.replace(f'"e": {ids["e"]},', f'"e": {ids["t"]},', 1)
    (other / "tokenizer.json").write_text(text.replace(f'"t": {ids["t"]},', f'"t": {ids["e"]},', 1))
    flags = (WEIGHTS + "--max_steps 0 --val_every 0").format(**folders, new=tmp_path / "new")
    for shards, warnings in ((base[0], 0), (other, 1)):
        done = run_here(*flags.split(), *QUIET, "--data_dir", shards, "--out_dir", tmp_path / "a")
        assert done.stdout.count("warning: ") == warnings
        assert done.stdout.count("has another tokenizer than") == warnings
