"""Builds that are stopped, killed, resumed, or made in parts: whole files, and nothing is mixed."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fineweb
from conftest import FAULTS, ROOT, run, wait_for
from fineweb import UserError, list_shards, load_tokenizer, open_shard, open_tokens
from test_shards import TEXTS, here, make, reference, refusal, shards_of, some_texts, tokens_of
from test_shards import two_files, write


class Crash(BaseException):
    """The process ends here, without any of its except clauses."""


def start(*flags):
    """Start fineweb.py as in a terminal, where Ctrl-C is not ignored."""
    return subprocess.Popen(
        [str(word) for word in [sys.executable, ROOT / "fineweb.py", *flags]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("form", ["parquet", "jsonl", "txt", "characters"])
def test_a_crash_at_any_step_of_writing_leaves_whole_files(tmp_path, monkeypatch, form):
    """Stop before the n-th fsync or rename, for every n. The files on the disk are right, and the
    same command ends with the same bytes, although the source is cut into small chunks."""
    texts = TEXTS
    settings = {"shard_size": 6000}
    if form == "characters":
        settings = {"shard_size": 15_000, "tokenizer": "char"}
    if form == "txt":
        source = tmp_path / "x.txt"
        texts = [f"{text}\n" for text in TEXTS]
        source.write_bytes("<|endoftext|>\n".join(texts).encode())
    else:
        name = "x.parquet" if form == "parquet" else "x.jsonl"
        source = write(tmp_path / name, [None, *TEXTS[:60], "", *TEXTS[60:]])
    monkeypatch.setattr(fineweb, "CHUNK_SIZE", 3000)
    monkeypatch.setattr(fineweb, "CHUNK_ROWS", 7)
    n_steps = 0
    crash = None
    synced, named = set(), set()
    real_replace = os.replace

    def step():
        nonlocal n_steps
        n_steps += 1
        if n_steps == crash:
            raise Crash

    def fsync(fd):
        step()
        synced.add(os.fstat(fd).st_ino)

    def replace(old, new):
        step()
        assert os.stat(old).st_ino in synced  # before it gets its name, its bytes are on the disk
        named.add(Path(new).name)
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    straight = tmp_path / "straight"
    make(source, straight, **settings)
    assert form == "characters" or tokens_of(straight) == reference(texts, 6000)
    expected = {path.name: path.read_bytes() for path in straight.iterdir()}
    assert named == set(expected)
    for crash in range(1, n_steps + 1):
        out = tmp_path / f"{crash}"
        n_steps = 0
        with pytest.raises(Crash):
            make(source, out, **settings)
        assert shards_of(out).items() <= expected.items()
        manifest = out / "manifest.json"
        if not manifest.exists() or manifest.read_bytes() != expected["manifest.json"]:
            with pytest.raises(UserError, match="unfinished|no train shards"):
                open_tokens(out, "train")
        make(source, out, **settings)
        assert {name: (out / name).read_bytes() for name in expected} == expected


@FAULTS
@pytest.mark.parametrize(("workers", "kills"), [(0, 14), (2, 6)])
def test_kill_9_at_random_moments_of_writing(tmp_path, workers, kills):
    """Twenty times, and the same command each time: the same bytes in the end."""
    write(tmp_path / "in/0.parquet", some_texts(2500, seed=5))
    write(tmp_path / "in/1.parquet", some_texts(2500, seed=6))
    make(tmp_path / "in", tmp_path / "straight", shard_size=3000)
    expected = shards_of(tmp_path / "straight")
    flags = ["--source", tmp_path / "in", "--shard_size", 3000, "--workers", workers, "--out"]
    rng = random.Random(workers)
    killed = finished = 0
    while killed < kills or finished == 0:
        out = tmp_path / f"{finished}"
        before = len(shards_of(out))
        process = start(*flags, out)
        wait_for(lambda: len(shards_of(out)) > before or process.poll() is not None)
        time.sleep(rng.uniform(0, 0.05))
        if killed < kills:
            process.kill()
        process.communicate()
        if process.returncode == 0:
            finished += 1
            assert shards_of(out) == expected
            manifest = (tmp_path / "straight/manifest.json").read_bytes()
            assert (out / "manifest.json").read_bytes() == manifest
        else:
            killed += 1
            assert shards_of(out).items() <= expected.items()


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_main_process(tmp_path, how):
    source = write(tmp_path / "busy.parquet", some_texts(1000) * 50)
    flags = ["--workers", 2, "--shard_size", 10000, "--out", tmp_path / "out"]
    process = start("--source", source, *flags)

    def group():  # the processes of its session that are alive
        stats = (p.read_text().rsplit(")", 1)[1].split() for p in Path("/proc").glob("[0-9]*/stat"))
        return [stat for stat in stats if int(stat[3]) == process.pid and stat[0] != "Z"]

    wait_for(lambda: list_shards(tmp_path / "out", "train"))
    assert len(group()) >= 3
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    _, err = process.communicate(timeout=30)
    wait_for(lambda: not group(), 10)
    if how == signal.SIGINT:  # it reaches the workers, too
        assert process.returncode == 130 and "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("fineweb.py: ")]
        assert len(lines) == 1 and "the same command continues" in lines[0]


def test_pending_chunks_are_bounded(tmp_path):
    drawn = 0

    def chunks():
        nonlocal drawn
        for drawn in range(1, 41):
            yield fineweb.Chunk("x.txt", 0, drawn, ["text"])

    results = fineweb.tokenize_all(chunks(), 1, str(tmp_path), "text")
    ahead = [drawn - received for received, _ in enumerate(results, 1)]
    assert len(ahead) == 40 and max(ahead) <= 3


class Bomb:
    """What ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_worker_is_a_sentence(tmp_path, monkeypatch):
    chunk = fineweb.Chunk("x.txt", 0, 0, Bomb())
    monkeypatch.setattr(fineweb, "read_chunks", lambda *args: iter([chunk]))
    done = make(two_files(tmp_path / "in"), tmp_path / "out", check=False, workers=1)
    assert "--workers: a worker was killed" in refusal(done)


def test_a_full_disk_leaves_what_was_written_and_the_same_command_continues(tmp_path, monkeypatch):
    write = fineweb.write_atomically

    def fill_the_disk(path, write_content):
        def content(file):
            write_content(file)
            if path.name == "text_train_000003.npy":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write(path, content)

    source, out = two_files(tmp_path / "in"), tmp_path / "out"
    expected = reference(TEXTS, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_atomically", fill_the_disk)
        sentence = refusal(make(source, out, check=False))
    assert "000003.npy cannot be written (No space left on device)" in sentence
    assert tokens_of(out) == expected[:3] and not list(out.glob("*.tmp"))
    make(source, out)
    assert tokens_of(out) == expected


@pytest.mark.parametrize("number, written", [(errno.EINVAL, True), (errno.ENOSPC, False)])
def test_a_disk_that_is_full_when_it_is_synced_is_an_error(tmp_path, monkeypatch, number, written):
    def fsync(fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "file"
    with pytest.raises(UserError) if not written else contextlib.nullcontext():
        fineweb.write_atomically(path, lambda file: file.write(b"bytes"))
    assert path.exists() == written


def test_a_complete_build_stays_and_other_settings_are_refused(tmp_path):
    source, out = two_files(tmp_path / "in"), tmp_path / "out"
    make(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "nothing to do" in make(source, out, workers=1).stdout
    changes = {"shard_size": 999, "format": "bin", "text_column": "id", "world_size": 2}
    changes |= {"tokenizer": "char", "source": source / "000.parquet"}
    for key, value in changes.items():
        done = make(**{"source": source, "out": out, "check": False} | {key: value})
        assert key in refusal(done) and "--out" in refusal(done)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_what_precedes_a_broken_file_stays_and_is_not_mixed_with_another_file(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    write(source / "0.parquet", TEXTS)
    (source / "1.parquet").write_bytes(b"PAR1")
    assert "1.parquet" in refusal(make(source, out, check=False))
    write(source / "1.parquet", TEXTS)
    assert "files" in refusal(make(source, out, check=False))
    assert tokens_of(out) == reference(TEXTS, 1000)[:-1]
    with pytest.raises(UserError, match="unfinished"):
        open_tokens(out, "train")


def test_what_lies_there_without_a_manifest_is_not_mixed_with_ours(tmp_path):
    source = write(tmp_path / "x.jsonl", ["one"])
    (tmp_path / "shards").mkdir()
    (tmp_path / "tokenizer").mkdir()
    np.save(tmp_path / "shards/edufineweb_train_000001.npy", np.zeros(5, np.uint16))
    fineweb.gpt2_tokenizer().save(tmp_path / "tokenizer")
    for name in ("shards", "tokenizer"):
        assert "no manifest" in refusal(make(source, tmp_path / name, check=False))


MISTAKES = {"text_column": "txt", "tokenizer": "fst", "format": "bin"}


@pytest.mark.parametrize("key", MISTAKES)
def test_after_a_mistake_is_corrected_the_folder_is_used(tmp_path, key):
    """Nothing was made yet, so nothing would be mixed."""
    path = tmp_path / "x.jsonl"
    path.write_text("no JSON" if key == "format" else '{"text": "one"}\n')
    refusal(make(path, tmp_path / "out", check=False, **{key: MISTAKES[key]}))
    make(write(path, ["one"]), tmp_path / "out")
    assert sum(tokens_of(tmp_path / "out"), []) == sum(reference(["one"]), [])


def test_the_tokenizer_of_a_build_without_shards_is_replaced(tmp_path, monkeypatch):
    def crash(*args):
        raise Crash

    source, out = write(tmp_path / "x.jsonl", ["xyz"]), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(fineweb, "tokenize", crash)
        make(source, out, tokenizer="char")
    assert load_tokenizer(out).n_vocab == 4
    make(source, out)
    assert sum(tokens_of(out), []) == sum(reference(["xyz"]), [])
    assert (load_tokenizer(out) or fineweb.gpt2_tokenizer()).n_vocab == fineweb.VOCAB_SIZE


def test_the_tasks_of_a_slurm_array_share_a_folder(tmp_path):
    parts = [TEXTS[i : i + 24] for i in range(0, 120, 24)]
    for i, texts in enumerate(parts):
        write(tmp_path / f"in/{i}.jsonl", texts)
    out = tmp_path / "out"
    slurm = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    flags = ["--source", tmp_path / "in", "--out", out, "--shard_size", 1000, "--workers", 0]
    run("fineweb.py", *flags, env=slurm | {"SLURM_ARRAY_TASK_ID": "2"})
    with pytest.raises(UserError, match="unfinished"):
        open_tokens(out, "train")
    assert here("--verify", out, check=False).returncode == 2  # one of two parts is missing
    run("fineweb.py", *flags, env=slurm | {"SLURM_ARRAY_TASK_ID": "1"})
    here("--verify", out)
    expected = {}
    for rank in (0, 1):
        shards = reference(sum(parts[rank::2], []), 1000)
        expected |= {rank + 2 * i: ids for i, ids in enumerate(shards)}
    paths = list_shards(out, "val") + list_shards(out, "train")
    assert {int(path.stem[-6:]): open_shard(path).tolist() for path in paths} == expected
    assert [path.name for path in list_shards(out, "val")] == ["text_val_000000.npy"]
    for change in ({"shard_size": 999}, {"world_size": 3}):
        done = make(tmp_path / "in", out, check=False, **{"rank": 1, "world_size": 2} | change)
        assert next(iter(change)) in refusal(done)


def test_a_part_without_text_is_complete(tmp_path):
    out = tmp_path / "out"
    write(tmp_path / "in/0.jsonl", TEXTS[:24])
    write(tmp_path / "in/1.jsonl", ["", None])
    for rank in (0, 1):
        make(tmp_path / "in", out, rank=rank, world_size=2)
    here("--verify", out)
    ids = [open_tokens(out, split)[:].tolist() for split in ("val", "train")]
    assert sum(ids, []) == sum(reference(TEXTS[:24]), [])
    assert json.loads((out / "manifest_00001.json").read_text())["shards"] == []
