"""What can happen to a run that takes a week: bad weights, damaged files, full disks, signals,
nodes that vanish. Tests that start many processes are marked `faults`, and
`python -m pytest -n 0 -m faults` runs them."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ENVIRONMENT,
    FAULTS,
    ROOT,
    TINY_RUN,
    command,
    log_of,
    records,
    refused,
    run,
    run_here,
    start,
    survived,
    train,
    wait_for,
    write_shards,
)
from safetensors.torch import load_file, save_file
from test_invariants import random_hugging_face
from transformers import GPT2LMHeadModel

import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, find_checkpoints, newest_checkpoint

# Bad weights are not saved --------------------------------------------------------------------


def test_weights_whose_loss_is_nan_are_not_saved(shards, tmp_path):
    """A learning rate of 1e30 gives finite weights with a loss of NaN. They are not saved after the
    last step, either."""
    for steps in (1, 3):
        out = tmp_path / str(steps)
        flags = ["--max_steps", steps, "--save_every", 1, "--val_every", 0]
        wild = ["--max_lr", 1e30, "--warmup_steps", 1, "--grad_clip", 0]
        done = train(shards, out, *flags, *wild, check=False)
        refused(done, "the loss after 1 steps is nan; lower --max_lr")
        assert find_checkpoints(out) == []
        train(shards, out, *flags, "--resume")
        assert [step for step, _ in find_checkpoints(out)] == list(range(1, steps + 1))


# The weights that are loaded and saved are the right ones --------------------------------------


def test_an_untied_head_is_refused_whatever_the_config_says(tmp_path):
    random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2)
    state = load_file(tmp_path / "model.safetensors")
    wte = state["transformer.wte.weight"]
    for head, config in (
        (wte + 1, True),
        (wte + 1, None),
        (wte.clone(), True),
        (wte.clone(), None),
    ):
        save_file(
            state | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        settings = json.loads((tmp_path / "config.json").read_text())
        settings.pop("tie_word_embeddings", None)
        settings |= {} if config is None else {"tie_word_embeddings": config}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        if torch.equal(head, wte):
            assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, wte)
        else:
            with pytest.raises(UserError, match="tie_word_embeddings"):
                GPT.from_pretrained(tmp_path)


def test_rows_of_the_vocabulary_that_were_trained_are_saved(tmp_path):
    shards = write_shards(tmp_path / "shards", vocab=60000)
    train(shards, tmp_path / "out", "--vocab_size", 60000, "--max_steps", 2)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out/step_00002")
    assert theirs.transformer.wte.weight.shape == (60000, 32)
    done = train(shards, tmp_path / "other", check=False)  # 50304 is 50257 tokens and padding
    refused(done, "but the model has only 50257 tokens")


def test_masks_in_old_files_are_ignored(tmp_path):
    theirs = random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2)
    state = load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix("transformer."): t for name, t in state.items()}
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ours = GPT.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


# A failure in an evaluation loses nothing -------------------------------------------------------


@pytest.mark.parametrize("evaluation", ["evaluate", "hellaswag.evaluate", "print_samples"])
def test_the_checkpoint_is_written_before_the_evaluations(base, tmp_path, monkeypatch, evaluation):
    """In step 4 a checkpoint, validation, HellaSwag and samples are due, and one of them fails."""
    results = {
        "evaluate": (train_gpt2, 1.0),
        "hellaswag.evaluate": (train_gpt2.hellaswag, SimpleNamespace(acc_norm=0.25, n=1)),
        "print_samples": (train_gpt2, None),
    }
    calls = dict.fromkeys(results, 0)

    def replacement(name):
        def call(*args, **flags):
            calls[name] += 1
            if name == evaluation and calls[name] == 2:  # the first call is in step 0
                raise RuntimeError("the evaluation failed")
            return results[name][1]

        return call

    for name, (owner, _) in results.items():
        monkeypatch.setattr(owner, name.split(".")[-1], replacement(name))
    monkeypatch.setattr(train_gpt2, "load_hellaswag", lambda *args: ["an example"])
    flags = ["--save_every", 4, "--hellaswag_every", 4, "--sample_every", 4]
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        train(base[0], tmp_path / "out", *flags)
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [4]


# Output and signals -----------------------------------------------------------------------------


def test_what_a_terminal_cannot_show_is_replaced(base, tmp_path):
    flags = ["--sample_every", 4, "--sample_tokens", 60, "--save_every", 4]
    done = train(base[0], tmp_path / "out", *flags, env={"PYTHONIOENCODING": "cp1252"})
    assert done.stdout.count("> Hello") == 12


def test_a_closed_pipe_ends_quietly_after_a_checkpoint(base, tmp_path):
    out = tmp_path / "out"
    flags = [*TINY_RUN, "--data_dir", base[0], "--out_dir", out, "--max_steps", 100000]
    process = start(*flags, stderr=subprocess.PIPE)
    while "| loss" not in process.stdout.readline():  # before a step there is nothing to save
        assert process.poll() is None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 128 + signal.SIGPIPE
    assert len(find_checkpoints(out)) == 1


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(train_gpt2, "stop_signals", [])
    handlers = {}
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: handlers.update({number: handler})
    )
    train_gpt2.catch_stop_signals()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP} == handlers.keys()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert handlers[signal.SIGINT] != signal.default_int_handler
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert handlers[signal.SIGINT] == signal.default_int_handler
    assert train_gpt2.stop_signals == [signal.SIGTERM] * 2 + [signal.SIGINT]
    handlers.clear()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # as under nohup
    train_gpt2.catch_stop_signals()
    assert handlers == {}


def stop_in_step_3(monkeypatch):
    """In step 3 the process receives SIGTERM."""
    step, count = train_gpt2.training_step, iter(range(1000))

    def stopped_step(*args):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train_gpt2, "training_step", stopped_step)


def test_a_stop_whose_checkpoint_cannot_be_written_says_so(base, tmp_path, monkeypatch):
    """The exit status is 2 instead of 128 + the signal, and the reason is printed."""

    def no_room(*args):
        raise OSError(28, "No space left on device")

    stop_in_step_3(monkeypatch)
    monkeypatch.setattr(torch, "save", no_room)
    done = train(base[0], tmp_path / "out", check=False)
    refused(done, "step_00004 cannot be written (No space left on device)")


@pytest.mark.parametrize("flag", ["--val_every", "--hellaswag_every", "--sample_every"])
def test_a_stop_does_not_wait_for_an_evaluation(base, tmp_path, monkeypatch, flag):
    """The signal comes in step 3. In step 4 an evaluation is due, which would raise."""
    stop_in_step_3(monkeypatch)

    def in_step_0_only(*args):
        assert not find_checkpoints(tmp_path / "out") and not train_gpt2.stop_signals
        return SimpleNamespace(acc_norm=0.25, n=1)

    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: in_step_0_only() and 1.0)
    monkeypatch.setattr(train_gpt2, "print_samples", in_step_0_only)
    monkeypatch.setattr(train_gpt2.hellaswag, "evaluate", in_step_0_only)
    monkeypatch.setattr(train_gpt2, "load_hellaswag", lambda *args: ["an example"])
    done = train(base[0], tmp_path / "out", "--val_every", 0, flag, 4, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [4]


def test_save_minutes_go_by_the_clock(base, tmp_path, monkeypatch):
    """On this clock a step takes a minute. The last step is saved if either flag is on."""
    now, real_step = [0.0], train_gpt2.training_step

    def step(*args):
        now[0] += 60
        return real_step(*args)

    monkeypatch.setattr(train_gpt2.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train_gpt2, "training_step", step)
    train(base[0], tmp_path / "out", "--save_every", 0, "--save_minutes", 2.5)
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [3, 6, 8]
    train(base[0], tmp_path / "both", "--save_every", 4, "--save_minutes", 2.5)
    assert [step for step, _ in find_checkpoints(tmp_path / "both")] == [3, 4, 7, 8]
    train(base[0], tmp_path / "never", "--save_every", 0, "--save_minutes", 0)
    assert find_checkpoints(tmp_path / "never") == []


def test_a_clock_that_is_set_back_does_not_matter(base, tmp_path, monkeypatch):
    back = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(train_gpt2.time, "time", lambda: next(back))
    done = train(base[0], tmp_path / "out")
    assert re.search(r"done after 0:0\d:\d\d;", done.stdout), done.stdout


# An error of a library becomes one sentence -----------------------------------------------------


def test_weights_that_are_a_pointer_to_git_lfs(base, tmp_path):
    shutil.copytree(base[1] / "step_00008", tmp_path / "dir")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "dir/model.safetensors").write_text(pointer)
    done = run_here("--sample_only", "--init_from", tmp_path / "dir", check=False)
    refused(done, "dir cannot be loaded (")


def test_variables_of_torchrun_without_torchrun(base, tmp_path):
    """RANK alone is refused. WORLD_SIZE alone, which some clusters set, means nothing."""
    done = train(base[0], tmp_path / "out", env={"RANK": "0"}, check=False)
    refused(done, "RANK is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not")
    others = dict(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    done = train(base[0], tmp_path / "out", env=others | {"WORLD_SIZE": "two"}, check=False)
    refused(done, "WORLD_SIZE=two is not a number")
    others |= {"WORLD_SIZE": "1", "MASTER_PORT": "99999"}
    done = train(base[0], tmp_path / "out", env=others, check=False)
    refused(done, "MASTER_PORT=99999 must be below 65536; start several processes with torchrun")
    train(base[0], tmp_path / "out", "--max_steps", 1, env={"WORLD_SIZE": "2"})
    assert list(log_of(tmp_path / "out")["train"]) == [0]


def test_processes_that_do_not_find_each_other(base, tmp_path, monkeypatch):
    """torch.distributed's error is followed by what to do about it."""

    def nobody(*args, **flags):
        raise train_gpt2.dist.DistNetworkError("the others did not come")

    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(train_gpt2.dist, "init_process_group", nobody)
    done = train(base[0], tmp_path / "out", check=False)
    refused(done, "cannot reach each other (the others did not come); start all of them")


@FAULTS
def test_not_enough_memory(base, tmp_path):
    line = command("train_gpt2.py", *TINY_RUN, "--data_dir", base[0], "--out_dir", tmp_path / "out")
    line += "--seq_len 64 --total_batch_size 65536 --micro_batch_size 1024 --n_embd 256".split()
    limit = ["bash", "-c", 'ulimit -v 1900000; exec "$@"', "-", *line, "--vocab_size", "50257"]
    env = os.environ | ENVIRONMENT
    done = subprocess.run(limit, capture_output=True, text=True, env=env, timeout=120)
    refused(done, "out of memory; choose a smaller --micro_batch_size")


def test_a_folder_that_cannot_be_written(base, tmp_path, monkeypatch):
    """A read-only file system, also for root; a folder without permission, for all others."""
    closed = tmp_path / "closed"
    closed.mkdir()

    def only_to_read(function):
        def call(path, *args, **kwargs):
            if str(path).startswith(str(closed)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "open"):
            patch.setattr(os, name, only_to_read(getattr(os, name)))
        for out in (closed / "out", closed):
            refused(train(base[0], out, check=False), "Read-only file system")
    if os.geteuid():  # root may write there
        closed.chmod(0o555)
        for out in (closed / "out", closed):
            refused(train(base[0], out, check=False), "Permission denied")
    assert not any(closed.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_room_for_the_log(base, tmp_path, monkeypatch):
    """The disk is full from step 3 on; or log.txt is cut within a line. All complete records
    before that stay."""
    shards, out, _ = base
    write = train_gpt2.Log.write

    def fills_up(log, step, *args, **kwargs):
        if step == 3:
            with open("/dev/full", "w") as full:
                os.dup2(full.fileno(), log.file.fileno())
        write(log, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.Log, "write", fills_up)
        done = train(shards, tmp_path / "full", check=False)
    refused(done, "log.txt cannot be written (No space left on device); make room")
    assert records(tmp_path / "full") == [line for line in records(out) if line[0] in "012"]

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        flags = ["--max_steps", 1000, "--save_every", 0, "--val_every", 0]
        done = train(shards, tmp_path / "cut", *flags, check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(done, "log.txt cannot be written (File too large); make room")
    assert (tmp_path / "cut/log.txt").stat().st_size == 5000
    steps = list(log_of(tmp_path / "cut")["train"])
    assert len(steps) > 30 and steps == list(range(len(steps)))


def test_notes_in_the_log_are_kept(base, tmp_path):
    shutil.copytree(base[1], tmp_path / "out")
    log = tmp_path / "out/log.txt"
    notes = "8 words are no record of the run\n8 batch halved\n"  # step 8 is the first to come
    log.write_text("a note of mine\n" + log.read_text() + notes)
    run_here("--resume", "--out_dir", tmp_path / "out", "--max_steps", 9)
    lines = log.read_text().splitlines()
    assert lines[0] == "a note of mine" and set(notes.splitlines()) <= set(lines)
    assert list(log_of(tmp_path / "out")["train"]) == list(range(9))


# The printed commands work ----------------------------------------------------------------------


def test_printed_commands_work(base):
    shards, out, screen = base
    lines = [line.strip() for line in screen.splitlines()]
    sample = next(line for line in lines if line.startswith("python train_gpt2.py --sample_only"))
    done = run_here(*sample.split()[2:])
    assert done.stdout.count("> Hello") == 4
    notebook = next(line for line in lines if "jupyter execute" in line)
    tools = os.path.dirname(sys.executable)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    words = notebook.split("  #")[0].split()
    assert words[1:] == ["jupyter", "execute", "--inplace", "play.ipynb"]  # test_notebook runs it
    subprocess.run([*words[1:3], "--help"], env=env, check=True, capture_output=True)


# Checkpoints ------------------------------------------------------------------------------------


def flip_bytes(path):
    """Four bytes of the largest array in a training_state.pt."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    data = bytearray(path.read_bytes())
    at = member.header_offset + len(member.filename) + 100 + member.file_size // 2
    data[at : at + 4] = bytes(b ^ 0xFF for b in data[at : at + 4])
    path.write_bytes(data)


def other_step(path):
    shutil.copy(path.parents[1] / "step_00004" / path.name, path)


DAMAGE = [
    ("wrong checksum of", flip_bytes),
    ("it holds step 4", other_step),
    ("BadZipFile", lambda path: path.write_bytes(b"")),
    ("BadZipFile", lambda path: path.write_bytes(path.read_bytes()[:100_000])),
    ("No such file", lambda path: path.unlink()),
]


@pytest.mark.parametrize("text, damage", DAMAGE)
def test_a_damaged_checkpoint_is_not_used(base, tmp_path, text, damage):
    out = tmp_path / "out"
    shutil.copytree(base[1], out)
    damage(out / "step_00008/training_state.pt")
    done = run_here("--resume", "--out_dir", out)
    assert f"warning: {out}/step_00008 is damaged ({text}" in done.stdout, done.stdout
    assert "resuming " + str(out / "step_00004") in done.stdout
    assert records(out) == records(base[1])
    assert newest_checkpoint(out)["step"] == 8  # written again


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(shards, tmp_path, monkeypatch):
    """Each file is synchronized under the temporary name, then the new name in its folder. (The
    model card is written afterwards, and again after evaluations.)"""
    synced, real_fsync = [], os.fsync

    def fsync(number):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        synced.append((path.name, path.parent.name, (out / "step_00001").exists()))
        return real_fsync(number)

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", fsync)
    train(shards, out, "--max_steps", 1)
    names = {path.name for path in (out / "step_00001").iterdir()} - {"README.md"}
    files = {(name, "tmp_step_00001", False) for name in names}
    assert len(files) > 2 and files <= set(synced[:-1])
    assert synced[-1] == ("out", tmp_path.name, True)


def test_all_checkpoints_are_damaged(base, tmp_path):
    shutil.copytree(base[1], tmp_path / "out")
    for step in (4, 8):
        flip_bytes(tmp_path / f"out/step_0000{step}/training_state.pt")
    done = run_here("--resume", "--out_dir", tmp_path / "out", check=False)
    refused(done, "all of its checkpoints are damaged")
    assert (tmp_path / "out/log.txt").read_bytes() == (base[1] / "log.txt").read_bytes()


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/step_00001").symlink_to(tmp_path / "elsewhere")
    flags = ["--save_every", 2, "--keep_checkpoints", 1]
    done = train(base[0], tmp_path / "out", *flags)
    assert "warning: " in done.stdout and "step_00001 cannot be removed" in done.stdout
    assert [step for step, _ in find_checkpoints(tmp_path / "out")][1:] == [6, 8]


def test_absurd_sizes_are_refused_before_anything_of_that_size_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2", n_layer=10**9)))
    done = run_here("--sample_only", "--init_from", tmp_path, check=False)
    refused(done, "choose a smaller model")
    write_shards(tmp_path / "data")
    for flag in ("--n_layer", "--n_embd", "--vocab_size"):
        flags = [flag, 12 * 10**9, "--device", "cpu", "--out_dir", tmp_path / "out"]
        done = run_here(*flags, "--data_dir", tmp_path / "data", check=False)
        refused(done, "choose a smaller model")


def test_a_checkpoint_says_where_it_comes_from(base):
    state = torch.load(base[1] / "step_00008/training_state.pt", weights_only=True)
    assert state["machine"] == [1, "cpu", "float32"] and state["micro_batch_size"] == 4
    assert state["versions"]["torch"] == torch.__version__
    assert {"commit", "python", "numpy"} < state["versions"].keys()
    assert state["shards"]["made_val_000000.npy"] == [3128, None]
    assert state["args"]["max_lr"] == 1e-2
    assert "versions: commit" in base[2] and "max_lr 0.01" in base[2]


# Processes that end and start again -------------------------------------------------------------

KILLS = {  # when the process is killed: how many times, and whether the log shows that it is time
    "during a save": (3, lambda out, log: any(out.glob("tmp_step_*"))),
    "before the first checkpoint": (2, lambda out, log: "1 norm" in log),
    "in validation": (2, lambda out, log: f"\n{random.choice([4, 14, 24])} norm" in log),
    "at a random moment": (5, lambda out, log: "norm" in log and random.random() < 0.02),
}


def kill_when(is_time, flags, out):
    """Start a run and end it by SIGKILL. If it is so fast that it ends before that, try again."""
    log = out / "log.txt"
    for attempt in range(20):
        shutil.rmtree(out, ignore_errors=True)
        process = start(*flags, "--out_dir", out)
        wait_for(
            lambda: process.poll() is not None or log.exists() and is_time(out, log.read_text())
        )
        process.kill()
        screen, _ = process.communicate()
        if process.returncode == -signal.SIGKILL:
            return
        assert process.returncode == 0, screen
    raise AssertionError("the run always ended too early")


@FAULTS
@pytest.mark.parametrize("when", KILLS)
def test_kill_9(killed, tmp_path, when):
    """--resume ends with the log and weights of the undisturbed run, to the byte."""
    flags, whole = killed
    tries, is_time = KILLS[when]
    again = []  # steps that had to be repeated
    for i in range(tries):
        out = tmp_path / str(i)
        kill_when(is_time, flags, out)
        saved = [0, *(step for step, _ in find_checkpoints(out))]
        again.append(len(log_of(out).get("norm", [])) - saved[-1])
        run_here(*(flags if saved == [0] else []), "--resume", "--out_dir", out)
        weights = "step_00040/model.safetensors"
        assert (out / weights).read_bytes() == (whole / weights).read_bytes()
        assert records(out) == records(whole)
        assert not list(out.glob("tmp_*"))
    lost = f"nothing; {min(again)}–{max(again)} steps repeated, --save_every 10"
    survived(f"kill -9 {when}", tries, lost)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(flags, out_dir) of the undisturbed run."""
    folder = tmp_path_factory.mktemp("killed")
    flags = [*TINY_RUN, "--data_dir", write_shards(folder / "shards"), "--max_steps", 40]
    flags += ["--save_every", 10, "--val_every", 5, "--val_tokens", 1500, "--keep_checkpoints", 1]
    random.seed(0)
    run_here(*flags, "--out_dir", folder / "out")
    return flags, folder / "out"


@FAULTS
def test_world_1_2_1_with_other_micro_batches(base, tmp_path):
    shards, whole, _ = base
    out = tmp_path / "out"
    train(shards, out, "--max_steps", 8, "--save_every", 3, alone=True)
    for step in (6, 8):
        shutil.rmtree(out / f"step_0000{step}")
    flags = ["--resume", "--out_dir", out]
    run("train_gpt2.py", *flags, "--micro_batch_size", 2, processes=2)
    shutil.rmtree(out / "step_00008")
    run("train_gpt2.py", *flags, "--micro_batch_size", 8)
    for stream in ("train", "norm", "val"):
        assert log_of(out)[stream] == pytest.approx(log_of(whole)[stream], abs=1e-4)
    survived("1, then 2, then 1 process, other micro-batches", 1, "nothing (1e-4)")


def agents(*args, nodes=2):
    """Start one torchrun per node, all on this machine. Returns their processes and the store where
    they meet, which has to live as long as they do."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # any free port
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    launch += ["--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_conf=is_host=0"]
    launch += [f"--rdzv_endpoint=127.0.0.1:{store.port}"]
    line = [*launch, str(ROOT / "train_gpt2.py"), *map(str, args)]
    options = dict(text=True, start_new_session=True, env=os.environ | ENVIRONMENT)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return [subprocess.Popen(line, **options, **pipes) for _ in range(nodes)], store


@FAULTS
def test_two_nodes_for_real(base, tmp_path):
    """Two nodes with a shared folder have the losses of one process. Then one node is killed with
    all that runs on it. The job is started again by hand with --resume, and ends with the bits of
    the job that was not killed."""
    flags = [*TINY_RUN, "--data_dir", base[0], "--max_steps", 40, "--save_every", 4]
    flags += ["--keep_checkpoints", 0, "--out_dir"]
    run_here(*flags, tmp_path / "one")
    nodes, store = agents(*flags, tmp_path / "two")
    for node in nodes:
        screen, _ = node.communicate(timeout=120)
        assert node.returncode == 0, screen
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for stream in ("train", "norm", "val"):
        assert two[stream] == pytest.approx(one[stream], abs=1e-4)
    out = tmp_path / "killed"
    (first, other), store = agents(*flags, out)
    wait_for(lambda: (out / "step_00004").exists())
    workers = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    for pid in [*map(int, workers), other.pid]:
        os.kill(pid, signal.SIGKILL)
    other.communicate()
    first.send_signal(signal.SIGTERM)  # torchrun would wait minutes for the lost node
    first.communicate(timeout=120)
    saved = [step for step, _ in find_checkpoints(out)]
    assert saved[-1] < 40 and first.returncode
    nodes, store = agents("--resume", "--out_dir", out)
    for node in nodes:
        screen, _ = node.communicate(timeout=120)
        assert node.returncode == 0, screen
    weights = "step_00040/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    assert records(out) == records(tmp_path / "two")
    lost = f"nothing; it continued from step {saved[-1]}"
    survived("two nodes, one killed, both started again", 1, lost)
