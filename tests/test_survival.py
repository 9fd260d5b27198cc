"""What a run survives: settings that change at a resume, outputs that close, parts that only
decorate it, environments and folders of other people's machines."""

import builtins
import errno
import io
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ENVIRONMENT,
    QUIET,
    STEPS,
    TINY,
    command,
    log_of,
    records,
    refused,
    run_here,
    train,
    wait_for,
    write_shards,
)
from safetensors.torch import load_file, save_file
from test_train import hellaswag_file

import fineweb
import hellaswag
import train_gpt2
from fineweb import UserError
from train_gpt2 import (
    FIXED,
    Args,
    find_checkpoints,
    newest_checkpoint,
    pick_micro_batch_size,
)

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture
def stopped(base, tmp_path):
    """A copy of the base run that ended after step 4 of 8."""
    out = tmp_path / "stopped"
    shutil.copytree(base[1], out)
    shutil.rmtree(out / "step_00008")
    return out


def weights(out):
    (*_, (_, newest)) = find_checkpoints(out)
    return (newest / "model.safetensors").read_bytes()


# -- every setting, changed at a resume, is refused or has an effect


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """(out_dir, screen) of a plain --resume of the stopped run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shutil.copytree(base[1], out)
    shutil.rmtree(out / "step_00008")
    return out, run_here("--resume", "--out_dir", out).stdout


def trained_differently(out, done, undisturbed):
    return weights(out) != weights(undisturbed[0])


def logged_differently(out, done, undisturbed):
    return records(out) != records(undisturbed[0])


def printed(text):
    return lambda out, done, undisturbed: text in done.stdout and text not in undisturbed[1]


def saved(*steps):
    return lambda out, done, undisturbed: [s for s, _ in find_checkpoints(out)] == list(steps)


SAMPLES = "--sample_every 8 --sample_tokens 6"
CHANGES = {  # field: (flags, the effect that the change must have)
    "data_dir": ("--data_dir {other}", trained_differently),
    "micro_batch_size": ("--micro_batch_size 2", printed("= 2 sequences")),
    "max_steps": ("--max_steps 9", trained_differently),
    "epochs": ("--epochs 0.4", printed("max_steps 8 → 10")),
    "warmup_steps": ("--warmup_steps 6", trained_differently),
    "max_lr": ("--max_lr 2e-2", trained_differently),
    "min_lr": ("--min_lr 2e-3", trained_differently),
    "weight_decay": ("--weight_decay 0.9", trained_differently),
    "grad_clip": ("--grad_clip 0.01", trained_differently),
    "val_every": ("--val_every 1", logged_differently),
    "hellaswag_every": ("--hellaswag_every 1 --hellaswag_data {items}", logged_differently),
    "hellaswag_data": ("--hellaswag_every 1 --hellaswag_data {items}", logged_differently),
    "sample_every": (SAMPLES, printed("> Hello")),
    "save_every": ("--save_every 3", saved(4, 6, 8)),
    "save_minutes": ("--save_minutes 1e-9", saved(5, 6, 7, 8)),
    "keep_checkpoints": ("--keep_checkpoints 1 --save_every 1", saved(7, 8)),
    "val_tokens": ("--val_tokens 64", logged_differently),
    "prompt": (f"{SAMPLES} --prompt Once", printed("> Once")),
    "sample_tokens": (SAMPLES, printed("sample_tokens 32 → 6")),
    "temperature": (f"{SAMPLES} --temperature 0", printed("temperature 1.0 → 0")),
    "top_k": (f"{SAMPLES} --top_k 1", printed("top_k 50 → 1")),
    "top_p": (f"{SAMPLES} --top_p 0.1", printed("top_p 1.0 → 0.1")),
    "dtype": ("--dtype bfloat16", trained_differently),
    "sample_only": ("--sample_only --sample_tokens 6", printed("> Hello")),
}
ELSEWHERE = {  # field: where its effect is tested
    "resume": "every test here",
    "out_dir": "it names the run that is resumed",
    "device": "there is only a CPU here; test_cuda.py",
    "compile": "test_compile_at_a_resume",
    "tensorboard": "test_doors.py",
    "wandb": "test_a_watcher_that_fails_is_turned_off",
}


def test_every_setting_is_in_a_list():
    """A new setting has to say here what it does at a resume."""
    listed = [*CHANGES, *FIXED, *ELSEWHERE]
    assert sorted(listed) == sorted(field.name for field in fields(Args))


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_is_changed_at_a_resume_has_an_effect(stopped, undisturbed, tmp_path, name):
    flags, effect = CHANGES[name]
    other = write_shards(tmp_path / "other", seed=1) if "{other}" in flags else ""
    items = hellaswag_file(tmp_path / "items.jsonl") if "{items}" in flags else ""
    flags = flags.format(other=other, items=items).split()
    done = run_here("--resume", "--out_dir", stopped, *flags)
    assert effect(stopped, done, undisturbed), done.stdout


def test_the_samples_follow_the_flags_of_sampling(stopped):
    """Greedy samples are all the same; top_k 1 and a tiny top_p give the same ones."""

    def samples(*flags):
        flags = ["--sample_only", "--sample_tokens", 8, *flags]
        done = run_here("--resume", "--out_dir", stopped, *flags)
        return [line for line in done.stdout.splitlines() if line.startswith("> ")]

    greedy = samples("--temperature", 0)
    assert len(set(greedy)) == 1 < len(set(samples()))
    assert samples("--top_k", 1) == samples("--top_p", 1e-6) == greedy
    assert samples("--seed", 1337) == samples() != samples("--top_k", 0)


def test_compile_at_a_resume(stopped, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **flags: calls.append(flags) or model)
    run_here("--resume", "--out_dir", stopped, "--compile")
    assert calls == [dict(dynamic=False)]


def test_a_scale_of_float16_is_not_loaded_into_bfloat16(shards, tmp_path, monkeypatch):
    train(shards, tmp_path / "out", "--dtype", "float16", "--max_steps", 2, "--save_every", 1)
    scalers, real_step = [], train_gpt2.training_step

    def step(model, batches, optimizer, scaler, *args):
        scalers.append(scaler)
        return real_step(model, batches, optimizer, scaler, *args)

    monkeypatch.setattr(train_gpt2, "training_step", step)
    flags = ["--resume", "--out_dir", tmp_path / "out", "--max_steps", 3]
    run_here(*flags, "--dtype", "bfloat16")
    assert not scalers[0].is_enabled()


def test_auto_keeps_the_micro_batch_of_a_resumed_run(tiny, shards, tmp_path):
    args = Args(seq_len=32, total_batch_size=32 * 96, dtype="float32")
    checkpoint = dict(machine=[1, "cpu", "float32"], micro_batch_size=3)
    assert pick_micro_batch_size(args, tiny, 1, OFF, checkpoint) == 3
    for machine in ([2, "cpu", "float32"], [1, "cuda", "float32"], [1, "cpu", "bfloat16"]):
        checkpoint = dict(machine=machine, micro_batch_size=3)
        assert pick_micro_batch_size(args, tiny, 1, OFF, checkpoint) == 32
    train(shards, tmp_path / "out", "--max_steps", 1, batch=2)
    state = newest_checkpoint(tmp_path / "out")
    assert (state["micro_batch_size"], state["machine"]) == (2, [1, "cpu", "float32"])


def test_the_micro_batch_changes_in_all_processes_or_in_none(tiny, monkeypatch):
    """Process 1 was moved to another kind of GPU, so process 0 does not keep its size, either."""
    args = Args(seq_len=32, total_batch_size=32 * 96, dtype="float32")
    checkpoint = dict(machine=[2, "cpu", "float32"], micro_batch_size=3)
    for other, expected in ((True, 3), (False, 16)):
        monkeypatch.setattr(train_gpt2, "gather", lambda mine, other=other: [mine, other])
        assert pick_micro_batch_size(args, tiny, 2, OFF, checkpoint) == expected


# -- the log and the checkpoints of a resumed run


def test_extending_a_finished_run_keeps_its_last_evaluations(base, tmp_path):
    """The last step is evaluated because it is the last. Nothing writes that record again."""
    shards, _, _ = base
    out, items = tmp_path / "out", hellaswag_file(tmp_path / "items.jsonl")
    scored = ["--hellaswag_every", 3, "--hellaswag_data", items, "--val_every", 3]
    train(shards, out, *scored)
    before = log_of(out)
    run_here("--resume", "--out_dir", out, "--max_steps", 10)
    after = log_of(out)
    assert list(after["val"]) == list(after["hella"]) == [0, 3, 6, 8, 9, 10]
    assert after["val"][8] == before["val"][8] and after["hella"][8] == before["hella"][8]
    lines = (out / "log.txt").read_text().splitlines()
    assert len({tuple(line.split()[:2]) for line in lines}) == len(lines)


def test_records_that_are_written_again_appear_once(stopped, undisturbed, base):
    assert records(undisturbed[0]) == records(base[1])


def test_a_run_that_saves_by_the_clock_saves_its_end(base, tmp_path):
    train(base[0], tmp_path / "clock", "--save_every", 0, "--save_minutes", 30)
    assert [step for step, _ in find_checkpoints(tmp_path / "clock")] == [8]
    train(base[0], tmp_path / "never", "--save_every", 0, "--save_minutes", 0)
    assert find_checkpoints(tmp_path / "never") == []


def test_validation_of_less_than_one_sequence_is_refused(base, tmp_path):
    done = train(base[0], tmp_path / "out", "--val_tokens", 31, check=False)
    refused(done, "--val_tokens 31 is less than one sequence")
    train(base[0], tmp_path / "out", "--val_tokens", 32, "--max_steps", 0)
    assert 10 < log_of(tmp_path / "out")["val"][0] < 12


def test_settings_of_another_version_are_ignored_and_new_ones_have_defaults(stopped):
    path = stopped / "step_00004/training_state.pt"
    state = torch.load(path, weights_only=True)
    state["config"] = state.pop("args") | {"a_new_setting": 3}  # the older name
    del state["config"]["top_p"]
    torch.save(state, path)
    done = run_here("--resume", "--out_dir", stopped)
    assert "these settings are ignored: a_new_setting" in done.stdout
    assert newest_checkpoint(stopped)["args"]["top_p"] == 1.0


def test_resume_without_a_checkpoint_says_so_and_keeps_the_log(shards, tmp_path):
    out = tmp_path / "out"
    train(shards, out, "--max_steps", 2, "--save_every", 0, "--save_minutes", 0)
    old = (out / "log.txt").read_text()
    for _ in range(2):
        done = train(shards, out, "--resume", "--max_steps", 1, "--save_every", 0)
        assert "there is no checkpoint, so training starts again" in done.stdout
        shutil.rmtree(out / "step_00001")
    assert (out / "log.txt.1").read_text() == old
    assert list(log_of(out)["train"]) == [0]


def test_the_folder_of_a_checkpoint_is_on_the_disk_after_its_renaming(
    shards, tmp_path, monkeypatch
):
    events, real_fsync, real_rename = [], os.fsync, Path.rename

    def fsync(number):
        events.append(os.readlink(f"/proc/self/fd/{number}"))
        return real_fsync(number)

    def rename(path, target):
        events.append("rename")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    train(shards, tmp_path / "out", "--max_steps", 1)
    assert events[-2:] == ["rename", str(tmp_path / "out")]


def test_a_checkpoint_is_mapped_checked_once_per_machine_and_let_go(stopped, monkeypatch):
    loads, tests, runs = [], [], []
    real_load, real_test = torch.load, train_gpt2.zipfile.ZipFile.testzip
    real_run = train_gpt2.Run

    def load(*args, **options):
        loads.append(options["mmap"])
        return real_load(*args, **options)

    class Run(real_run):
        def __init__(self, *args):
            super().__init__(*args)
            runs.append(args[-1])

    def testzip(archive):
        tests.append(archive)
        return real_test(archive)

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(train_gpt2.zipfile.ZipFile, "testzip", testzip)
    monkeypatch.setattr(train_gpt2, "Run", Run)
    run_here("--resume", "--out_dir", stopped)
    assert set(loads) == {True} and len(tests) == 1
    assert not {"model", "optimizer", "scaler"} & runs[0].keys() and runs[0]["step"] == 4
    monkeypatch.setenv("LOCAL_RANK", "1")
    newest_checkpoint(stopped)
    assert set(loads) == {True} and len(tests) == 1


def test_the_device_of_a_resumed_run_connects_its_processes(stopped, tmp_path, monkeypatch):
    """Unless --device is given. The processes are connected even if there is no checkpoint,
    because others may have one."""
    devices, checked = [], []
    monkeypatch.setattr(train_gpt2, "init_distributed", devices.append)
    monkeypatch.setattr(train_gpt2, "check_device", checked.append)
    assert newest_checkpoint(stopped)["args"]["device"] == "cpu"
    newest_checkpoint(stopped, "mps")
    assert newest_checkpoint(tmp_path / "empty") is None
    assert devices == checked == ["cpu", "mps", "auto"]  # what cannot be is refused before
    monkeypatch.setattr(train_gpt2, "gather", lambda mine: [mine, ("step_00004", None)])
    with pytest.raises(UserError, match="they found no checkpoint, step_00004"):
        newest_checkpoint(tmp_path / "empty")


def test_a_damaged_checkpoint_does_not_change_the_device(base, tmp_path, monkeypatch):
    """The processes of a run on CPUs must not connect as GPUs."""
    shutil.copytree(base[1], tmp_path / "out")
    (tmp_path / "out/step_00008/training_state.pt").write_bytes(b"")
    devices = []
    monkeypatch.setattr(train_gpt2, "init_distributed", devices.append)
    assert newest_checkpoint(tmp_path / "out")["step"] == 4
    assert devices == ["cpu"]


def test_samples_of_a_run_may_have_another_seed(stopped):
    flags = ["--resume", "--out_dir", stopped, "--sample_only", "--sample_tokens", 3]
    one, other = (run_here(*flags, "--seed", seed).stdout for seed in (1, 2))
    assert one.count("> ") == other.count("> ") == 4 and one != other


@pytest.mark.parametrize("damaged", [8, 100])
def test_the_last_good_checkpoint_stays_until_the_next_is_written(
    stopped, base, monkeypatch, damaged
):
    """Even with --keep_checkpoints 1, where a damaged one has the name of the next, or a later."""
    (stopped / f"step_{damaged:05d}").mkdir()
    before, real_write = [], train_gpt2.write_checkpoint

    def write(*args):
        before.append([step for step, _ in find_checkpoints(stopped)])
        real_write(*args)

    monkeypatch.setattr(train_gpt2, "write_checkpoint", write)
    run_here("--resume", "--out_dir", stopped, "--keep_checkpoints", 1)
    assert before == [[4, damaged]]
    shutil.rmtree(stopped / "step_00100", ignore_errors=True)
    assert weights(stopped) == weights(base[1])


def test_a_run_gives_its_folder_back(base, tmp_path, monkeypatch):
    """Even where its objects live on, as in a notebook."""
    runs, real_run = [], train_gpt2.Run
    monkeypatch.setattr(train_gpt2, "Run", lambda *args: runs.append(real_run(*args)) or runs[-1])
    train(base[0], tmp_path / "out", "--max_steps", 1)
    run_here("--resume", "--out_dir", tmp_path / "out", "--max_steps", 2)
    assert len(runs) == 2


# -- signals


def test_a_checkpoint_is_written_once(base, tmp_path, monkeypatch):
    """The one of step 4 is due. Then a signal comes, which is a reason to save step 4, too."""
    written, real_write, real_evaluate = [], train_gpt2.write_checkpoint, train_gpt2.evaluate

    def write(path, *args):
        written.append(path.name)
        real_write(path, *args)

    def evaluate(*args):
        if written:
            train_gpt2.stop_signals.append(signal.SIGTERM)
        return real_evaluate(*args)

    monkeypatch.setattr(train_gpt2, "write_checkpoint", write)
    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    done = train(base[0], tmp_path / "out", "--save_every", 4, check=False)
    assert done.returncode == 128 + signal.SIGTERM and written == ["step_00004"]


@pytest.mark.parametrize("end", ["a signal", "the last step"])
def test_a_run_that_ends_while_it_skips_steps_is_saved(base, tmp_path, monkeypatch, end):
    """Steps 2 and 3 are skipped, so their checkpoints are skipped, except the one at the end."""
    real_step, count = train_gpt2.training_step, iter(range(1000))

    def step(model, batches, optimizer, *args):
        now = next(count)
        if end == "a signal" and now == 3:
            train_gpt2.stop_signals.append(signal.SIGTERM)
        bias = model.transformer.ln_f.bias
        hook = bias.register_hook(lambda grad: grad * (float("nan") if now >= 2 else 1))
        try:
            return real_step(model, batches, optimizer, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(train_gpt2, "training_step", step)
    flags = ["--save_every", 1, "--max_steps", 8 if end == "a signal" else 4]
    done = train(base[0], tmp_path / "out", *flags, check=False)
    assert done.returncode == (128 + signal.SIGTERM if end == "a signal" else 0)
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [1, 2, 4]


def test_a_stop_whose_save_fails_says_why(base, tmp_path, monkeypatch):
    real_step = train_gpt2.training_step

    def step(*args):
        train_gpt2.stop_signals.append(signal.SIGTERM)
        return real_step(*args)

    def save(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_gpt2, "training_step", step)
    monkeypatch.setattr(torch, "save", save)
    done = train(base[0], tmp_path / "out", check=False)
    refused(done, "step_00001 cannot be written (No space left on device)")


def test_a_signal_during_validation_skips_what_follows_and_loses_nothing(
    base, tmp_path, monkeypatch
):
    """Neither HellaSwag nor samples nor another step comes after it. They come after the resume."""
    items, out = hellaswag_file(tmp_path / "items.jsonl"), tmp_path / "out"
    flags = ["--hellaswag_every", 4, "--hellaswag_data", items, "--sample_every", 4]
    train(base[0], tmp_path / "whole", *flags)
    real_evaluate, calls = train_gpt2.evaluate, []

    def evaluate(*args):
        calls.append(len(calls))
        if len(calls) == 2:
            train_gpt2.stop_signals.append(signal.SIGTERM)
        return real_evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "evaluate", evaluate)
        done = train(base[0], out, *flags, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert [step for step, _ in find_checkpoints(out)] == [4]
    log = log_of(out)
    assert list(log["val"]) == [0, 4] and list(log["hella"]) == [0]
    assert max(log["train"]) == 3 and done.stdout.count("> Hello") == 4
    run_here("--resume", "--out_dir", out)
    assert records(out) == records(tmp_path / "whole")


def test_a_signal_after_the_last_step_changes_nothing(base, tmp_path, monkeypatch):
    """The run is complete, so a shell loop must not think that it was stopped."""
    real_print = train_gpt2.Run.print_next_commands

    def print_next_commands(run):
        train_gpt2.stop_signals.append(signal.SIGTERM)
        real_print(run)

    monkeypatch.setattr(train_gpt2.Run, "print_next_commands", print_next_commands)
    done = train(base[0], tmp_path / "out", "--max_steps", 1)
    assert done.returncode == 0 and "done after" in done.stdout


# -- outputs that close


def test_a_terminal_that_closes_ends_the_run_as_its_signal_does(base, tmp_path):
    """The process gets SIGHUP, and printing to the terminal fails. The step is still saved."""
    out, number = tmp_path / "out", signal.SIGHUP
    args = [*TINY, *QUIET, *STEPS, "--micro_batch_size", 4, "--max_steps", 100000]
    args += ["--data_dir", base[0], "--out_dir", out]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("train_gpt2.py", *args),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | ENVIRONMENT,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    os.close(theirs)
    wait_for(lambda: (out / "log.txt").exists() and len((out / "log.txt").read_text()) > 400)
    os.close(ours)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert len(find_checkpoints(out)) == 1


@pytest.mark.parametrize("rank, steps, status", [(None, 2, -6), (0, 2, 0), (0, -1, 2)])
def test_an_abort_while_python_shuts_down_is_not_the_end_of_a_process(
    base, tmp_path, rank, steps, status
):
    """A thread of Gloo that frees a tensor meanwhile aborts the process: torchrun would say that a
    finished run failed, or that a mistake of the user (--max_steps -1) was a crash. Here an object
    aborts when Python deletes it at the end; the first case shows that it does."""
    code = "import os, sys\n\nclass Abort:\n    __del__ = lambda self, abort=os.abort: abort()\n\n"
    (tmp_path / "sitecustomize.py").write_text(code + "sys.at_the_end = Abort()\n")
    env = {"PYTHONPATH": str(tmp_path)}
    if rank is not None:
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    flags = ["--max_steps", steps, "--warmup_steps", 1]
    done = train(base[0], tmp_path / "out", *flags, check=False, env=env)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("done after" in done.stdout) == (steps > 0)


@pytest.mark.parametrize(
    "error, ignored, recorded",
    [
        (OSError(errno.EPIPE, "the reader of the pipe is gone"), False, [signal.SIGPIPE]),
        (OSError(errno.EIO, "the terminal is gone"), False, [signal.SIGHUP]),
        (OSError(errno.EIO, "the terminal is gone, under nohup"), True, []),
        (OSError(errno.ENOSPC, "the disk is full"), False, []),
        (ValueError("the file is closed"), False, []),
    ],
)
def test_only_a_reader_that_is_gone_stops_a_run(monkeypatch, error, ignored, recorded):
    """As the signal would that such a process normally receives."""

    class Screen:
        def write(self, text):
            raise error

        def flush(self):
            raise error

        def fileno(self):
            raise ValueError

    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    monkeypatch.setattr(train_gpt2, "stop_signals", [])
    monkeypatch.setattr(sys, "stdout", Screen())
    train_gpt2.print0("step 3")
    assert train_gpt2.stop_signals == recorded


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "1>/dev/full"])
def test_a_run_without_an_output_trains_to_its_end(base, tmp_path, closed):
    out = tmp_path / "out"
    args = [*TINY, *QUIET, *STEPS, "--micro_batch_size", 4, "--data_dir", base[0], "--out_dir", out]
    line = ["bash", "-c", f'exec "$@" {closed}', "-", *command("train_gpt2.py", *args)]
    done = subprocess.run(line, capture_output=True, timeout=120, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert records(out) == records(base[1])


# -- what only decorates a run


class FailingWatcher:
    """Stands in for the module wandb. Its fourth call of log raises."""

    def __init__(self):
        self.calls = 0

    def init(self, **options):
        return self

    def log(self, values, step):
        self.calls += 1
        if self.calls == 4:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_watcher_that_fails_is_turned_off(base, tmp_path, monkeypatch):
    watcher = FailingWatcher()
    monkeypatch.setitem(sys.modules, "wandb", watcher)
    done = train(base[0], tmp_path / "out", "--wandb", "mine")
    assert done.stdout.count("warning: --wandb: ") == 1 and watcher.calls == 4
    assert records(tmp_path / "out") == records(base[1])


def test_a_dashboard_that_does_not_answer_ends_no_run(base, tmp_path, monkeypatch):
    """A shell loop would not try again after status 2."""
    monkeypatch.setattr(FailingWatcher, "init", fail)
    monkeypatch.setitem(sys.modules, "wandb", FailingWatcher())
    board = SimpleNamespace(SummaryWriter=fail)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    done = train(base[0], tmp_path / "out", "--wandb", "mine", "--tensorboard")
    for name in ("--wandb", "--tensorboard"):
        assert done.stdout.count(f"warning: {name}: Operation not permitted") == 1
    assert records(tmp_path / "out") == records(base[1])


def fail(*args, **options):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def break_print(monkeypatch, out):
    monkeypatch.setattr(builtins, "print", fail)


def break_settings(monkeypatch, out):
    monkeypatch.setattr(train_gpt2, "find_likely_mistakes", fail)


def break_speed(monkeypatch, out):
    monkeypatch.setattr(train_gpt2.Progress, "update", fail)


def break_summary(monkeypatch, out):
    monkeypatch.setattr(train_gpt2.Run, "print_next_commands", fail)


def break_watcher(monkeypatch, out):
    monkeypatch.setattr(FailingWatcher, "log", fail)
    monkeypatch.setitem(sys.modules, "wandb", FailingWatcher())


def break_chmod(monkeypatch, out):
    monkeypatch.setattr(os, "chmod", fail)
    monkeypatch.setattr(shutil, "copymode", fail)


def break_git(monkeypatch, out):
    monkeypatch.setattr(train_gpt2.shutil, "which", lambda name: name)
    monkeypatch.setattr(train_gpt2.subprocess, "run", fail)


def break_run_json(monkeypatch, out):
    (out / "run.json").mkdir(parents=True)


def break_data_folder_later(monkeypatch, out):
    """The folder of the shards is not readable when the checkpoint is written."""
    real = train_gpt2.Run.save

    def save(run, state):
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt2.fineweb, "describe_shards", fail)
            patch.setattr(train_gpt2.subprocess, "run", fail)
            return real(run, state)

    monkeypatch.setattr(train_gpt2.Run, "save", save)


BREAK = {  # what raises: how it is named in a warning
    break_print: None,
    break_settings: "the settings cannot be shown",
    break_speed: None,
    break_summary: "the summary cannot be shown",
    break_watcher: "--wandb",
    break_chmod: "the permissions of model.safetensors",
    break_git: "git describe",
    break_run_json: "run.json cannot be written",
    break_data_folder_later: None,
}


@pytest.mark.parametrize("damage", BREAK)
def test_what_only_decorates_a_run_does_not_end_it(base, tmp_path, monkeypatch, damage):
    """HellaSwag is off, because its file is missing, which is printed, too."""
    out = tmp_path / "out"
    damage(monkeypatch, out)
    flags = ["--wandb", "mine"] if damage is break_watcher else []
    flags += ["--hellaswag_every", 4, "--hellaswag_data", tmp_path / "nowhere.jsonl"]
    done = train(base[0], out, "--save_every", 4, *flags)
    assert records(out) == records(base[1]) and weights(out) == weights(base[1])
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    expected = ["HellaSwag is off", BREAK[damage]] if damage is not break_print else []
    for words in filter(None, expected):
        assert any(words in line and len(line) < 200 for line in warnings), done.stdout
    assert all(any(words in line for words in filter(None, expected)) for line in warnings)


def test_a_run_for_ever_has_a_time_left(tiny):
    """Although timedelta has a largest value."""
    loader = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    progress = train_gpt2.Progress(Args(max_steps=10**17), tiny, loader)
    assert "left 11574074 days" in progress.update(0, 1.0)


def test_a_damaged_run_json_does_not_end_a_resumed_run(stopped, base):
    """Its text is no longer JSON, which is no OSError."""
    (stopped / "run.json").write_text("[{")
    done = run_here("--resume", "--out_dir", stopped)
    assert "run.json cannot be written: " in done.stdout
    assert records(stopped) == records(base[1])


# -- other machines


@pytest.mark.parametrize("env", [{"RANK": ""}, {"WORLD_SIZE": "8"}, {"LOCAL_RANK": ""}])
def test_a_part_of_torchruns_variables_is_one_process(base, tmp_path, monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    train(base[0], tmp_path / "out", "--max_steps", 1)


WRONG = [
    ({"RANK": "0"}, "RANK is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
    ({"RANK": "one", "WORLD_SIZE": "1"}, "RANK is set, but LOCAL_RANK"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not less than WORLD_SIZE=0"),
]


@pytest.mark.parametrize("env, sentence", WRONG)
def test_wrong_variables_are_refused_with_the_name_of_torchrun(
    base, tmp_path, monkeypatch, env, sentence
):
    if "RANK" not in env or "less" in sentence:
        env = dict.fromkeys(train_gpt2.TORCHRUN, "0") | env
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    done = train(base[0], tmp_path / "out", check=False)
    refused(done, sentence)
    assert "torchrun" in done.stderr


def test_a_rank_that_no_world_has_does_not_wait_for_the_others(monkeypatch):
    values = {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="^RANK=2 is not less than WORLD_SIZE=2; start"):
        train_gpt2.check_environment()
    monkeypatch.setenv("RANK", "1")
    train_gpt2.check_environment()


def test_the_flag_of_an_old_launcher_is_accepted(base, tmp_path):
    train(base[0], tmp_path / "out", "--local-rank=0", "--max_steps", 1)


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(train_gpt2.fineweb, "available_cores", lambda: 6)
    for processes in ("1", "2", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
        train_gpt2.prepare_process()
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(threads[-1])
    assert threads == [6, 3, 1]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()]
)
def test_a_file_system_without_locks_is_a_warning(base, tmp_path, monkeypatch, error):
    def acquire(*args, **options):
        raise error

    monkeypatch.setattr(train_gpt2.FileLock, "acquire", acquire)
    done = train(base[0], tmp_path / "out", "--max_steps", 1)
    assert "is not locked, because its file system has no locks" in done.stdout


def test_processes_that_see_other_shards_are_refused(base, tmp_path, monkeypatch):
    def gather(mine):
        problem, shards, checkpoint = mine
        other = dict(list(shards.items())[:-1])
        return [mine, (problem, other, checkpoint)]

    monkeypatch.setattr(train_gpt2, "gather", gather)
    done = train(base[0], tmp_path / "out", check=False)
    refused(done, "the processes see different shards there")
    assert not (tmp_path / "out").exists()


def test_a_problem_of_one_process_ends_all(base, tmp_path, monkeypatch):
    other = ("--n_head 5: this came from another process", None, None)
    monkeypatch.setattr(train_gpt2, "gather", lambda mine: [mine, other])
    refused(train(base[0], tmp_path / "out", check=False), "this came from another process")


def test_one_process_under_torchrun_runs_what_eight_run(base, tmp_path, monkeypatch):
    made = []

    class Recorded(train_gpt2.DDP):
        def __init__(self, model):
            made.append(model)
            super().__init__(model)

    monkeypatch.setattr(train_gpt2, "DDP", Recorded)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    monkeypatch.setenv("RANK", "0")
    try:
        flags = [*TINY, *QUIET, *STEPS, "--micro_batch_size", 4, "--data_dir", base[0]]
        args, _ = train_gpt2.parse([*map(str, flags), "--out_dir", str(tmp_path / "out")])
        train_gpt2.train(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert len(made) == 1
    assert log_of(tmp_path / "out")["train"] == pytest.approx(log_of(base[1])["train"], abs=1e-5)


def test_copies_to_a_device_wait(tmp_path, shards, monkeypatch):
    """Copying without waiting from memory that is freed at once corrupts data on Apple's GPUs
    (pytorch issues 139550 and 189690)."""
    options, real_to = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        options.append(kwargs)
        return real_to(tensor, *args, **kwargs)

    loader = train_gpt2.DataLoaderLite(Args(data_dir=str(shards), seq_len=32), "train", 2)
    monkeypatch.setattr(torch.Tensor, "to", to)
    loader.load([0, 1])
    assert options == [{}]


def test_standard_input_is_read_only_when_it_is_asked_for(base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    flags = ["--sample_only", "--init_from", base[1] / "step_00008", "--sample_tokens", 2]
    began = time.monotonic()
    assert run_here(*flags, "--device", "cpu").stdout.count("> Hello") == 4
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("prompts", [b"caf\xe9\n\xff\n", b"", None])
def test_standard_input_may_be_closed_or_of_another_encoding(base, monkeypatch, prompts):
    """Bytes that are not UTF-8 are replaced. Without prompts there are no samples."""
    stdin = prompts if prompts is None else io.TextIOWrapper(io.BytesIO(prompts), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    flags = ["--sample_only", "--init_from", base[1] / "step_00008", "--sample_tokens", 2]
    done = run_here(*flags, "--device", "cpu", "--prompt", "-")
    assert done.stdout.count("> caf\ufffd") == done.stdout.count("> \ufffd") == 4 * bool(prompts)


def test_a_moved_run_names_the_flag_of_its_data(tmp_path, monkeypatch):
    """Its --data_dir was relative to the folder where it was started."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(write_shards(Path("shards")), "run", "--max_steps", 1)
    Path("run").rename(tmp_path / "there/moved")
    monkeypatch.chdir(tmp_path / "there")
    flags = ["--resume", "--out_dir", "moved", "--max_steps", 2]
    refused(run_here(*flags, check=False), "the run's --data_dir, shards, is not here; give")
    done = run_here(*flags, "--data_dir", "../here/shards")
    assert "--resume: data_dir shards → ../here/shards" in done.stdout
    assert list(log_of("moved")["train"]) == [0, 1]


def test_a_tilde_after_an_equals_sign_is_the_home_directory(base, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/shards").symlink_to(base[0])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, *QUIET, "--micro_batch_size", 4, "--total_batch_size", 128, "--max_steps", 0]
    run_here(*flags, "--val_every", 0, "--data_dir=~/shards", "--out_dir=~/runs/a")
    assert (tmp_path / "home/runs/a/log.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_weights_of_nan_are_neither_sampled_nor_trained(base, tmp_path):
    shutil.copytree(base[1] / "step_00008", tmp_path / "nan")
    state = load_file(tmp_path / "nan/model.safetensors")
    state["transformer.h.0.mlp.c_fc.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan/model.safetensors", {"format": "pt"})
    flags = ["--init_from", tmp_path / "nan", "--device", "cpu"]
    done = run_here(*flags, "--sample_only", check=False)
    refused(done, "nan: its weights hold NaN or infinity; choose another model")
    flags += [*QUIET, *STEPS, "--seq_len", 32, "--micro_batch_size", 4, "--data_dir", base[0]]
    done = run_here(*flags, "--out_dir", tmp_path / "out", check=False)
    refused(done, "nan: its weights hold NaN or infinity; choose another model")


def test_predictions_that_overflow_are_one_sentence(tiny):
    """Finite weights, whose logits are too large for float16, say."""
    with torch.no_grad():
        tiny.transformer.ln_f.bias[:] = float("inf")
    with pytest.raises(RuntimeError) as caught:
        tiny.generate(torch.zeros(1, 1, dtype=torch.int64), 1)
    assert "predictions are not finite; choose" in train_gpt2.explain(caught.value)


def test_half_a_character_is_not_shown(tiny, monkeypatch, capsys):
    """她 is two tokens and the sample ends after the first of 说's."""
    tokens = fineweb.tokenizer().encode_ordinary("她说")

    def generate(idx, *args, **options):
        return torch.cat([idx, torch.tensor([tokens[:-1]] * len(idx))], dim=1)

    monkeypatch.setattr(tiny, "generate", generate)
    train_gpt2.print_samples(tiny, Args(prompt="x"), OFF)
    assert capsys.readouterr().out == "> x她\n" * 4


def test_settings_of_the_checkpoint_are_those_of_the_run(base):
    state = newest_checkpoint(base[1])
    assert state["args"].keys() == asdict(Args()).keys()


def test_a_checkpoint_that_another_process_lacks_is_refused(stopped, monkeypatch):
    monkeypatch.setattr(train_gpt2, "gather", lambda mine: [mine, ("no checkpoint", None)])
    with pytest.raises(UserError, match="they found no checkpoint, step_00004"):
        newest_checkpoint(stopped)


def test_a_checkpoint_that_is_damaged_for_another_process_is_passed_over(base, monkeypatch, capsys):
    def gather(mine):
        name, _ = mine
        return [mine, (name, "step_00008 is damaged" if name == "step_00008" else None)]

    monkeypatch.setattr(train_gpt2, "gather", gather)
    assert newest_checkpoint(base[1])["step"] == 4
    assert "warning: step_00008 is damaged" in capsys.readouterr().out


# File systems and machines that lack something ---------------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_is_used_all_the_same(base, tmp_path, monkeypatch, number):
    """fsync protects from power cuts only. (A full disk, ENOSPC, is not ignored.)"""

    def fsync(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    train(base[0], tmp_path / "out")
    assert weights(tmp_path / "out") == weights(base[1])
    fineweb.build_demo(tmp_path / "demo")
    fineweb.verify(tmp_path / "demo")


def test_a_file_system_that_cannot_map_files(base, stopped, tmp_path, monkeypatch):
    """Shards are not called damaged, and a checkpoint is read without a map."""

    def no_map(*args, **options):
        raise OSError(errno.ENODEV, "No such device")

    def from_file(*args, **options):
        raise RuntimeError("unable to mmap 100 bytes from file: No such device (19)")

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "from_file", from_file)
        run_here("--resume", "--out_dir", stopped)
    assert weights(stopped) == weights(base[1])
    monkeypatch.setattr("mmap.mmap", no_map)
    done = train(base[0], tmp_path / "out", check=False)
    refused(done, "this file system cannot map files into memory (No such device); copy the shards")


def test_a_machine_that_does_not_know_its_memory(monkeypatch):
    unknown = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": -1}
    for answer in (unknown.get, lambda name: int("unknown")):
        monkeypatch.setattr(os, "sysconf", answer)
        hellaswag.check_memory(10**15, "weights")


def test_a_machine_without_more_threads(base, tmp_path, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    done = train(base[0], tmp_path / "out", check=False)
    refused(done, "this machine allows no more threads; raise its limit")


@pytest.mark.parametrize("value", ["", "abc", "0"])
def test_the_number_of_compilers_may_be_set_to_nonsense(monkeypatch, value):
    """PyTorch reads it with a bare int()."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    train_gpt2.prepare_process()
    assert int(os.environ["TORCHINDUCTOR_COMPILE_THREADS"]) >= 1


def test_settings_that_are_probably_mistakes(base, tmp_path):
    flags = ["--save_every", 0, "--save_minutes", 0, "--resume", "--max_steps", 1]
    flags += ["--total_batch_size", 32 * 4 * 64, "--warmup_steps", 1]
    done = train(base[0], tmp_path / "out", *flags)
    for words in (
        "out has no checkpoint, so this is a new run",
        "the trained weights will not be saved",
        "a step has more tokens than the text",
    ):
        assert re.search(f"warning: .*{words}", done.stdout), done.stdout
