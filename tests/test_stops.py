"""What stops a run, or is in its way: signals, terminals and pipes that close, a full disk, another
trainer. (test_10 of test_invariants.py: each signal finishes the step and saves.)"""

import contextlib
import itertools
import os
import pty
import resource
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
from conftest import (
    ENVIRONMENT,
    FAULTS,
    TINY_RUN,
    command,
    records,
    refused,
    run_here,
    start,
    train,
    wait_for,
)

import train_gpt2
from train_gpt2 import find_checkpoints

EVALUATIONS = {  # flag: (where its evaluation is, what it returns)
    "--val_every": (train_gpt2, "evaluate", 1.0),
    "--hellaswag_every": (train_gpt2.hellaswag, "evaluate", SimpleNamespace(acc_norm=0.5, n=1)),
    "--sample_every": (train_gpt2, "print_samples", None),
}


def steps(out):
    return [step for step, _ in find_checkpoints(out)]


def before_each_step(monkeypatch, act):
    """Call act(number of the step in this process) before each training step."""
    original, numbers = train_gpt2.training_step, itertools.count()

    def step(*args):
        act(next(numbers))
        return original(*args)

    monkeypatch.setattr(train_gpt2, "training_step", step)


def terminate_if(condition):
    if condition:
        os.kill(os.getpid(), signal.SIGTERM)


def replace_evaluations(monkeypatch, calls, act):
    """An evaluation only adds its flag to `calls`, and then calls act(flag)."""
    for flag, (owner, name, result) in EVALUATIONS.items():

        def evaluation(*args, flag=flag, result=result):
            calls.append(flag)
            act(flag)
            return result

        monkeypatch.setattr(owner, name, evaluation)
    monkeypatch.setattr(train_gpt2.hellaswag, "items_or_none", lambda *args, **flags: ["an item"])


ALL = [word for flag in EVALUATIONS for word in (flag, 4)]  # all are due in steps 0, 4 and 8

# Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["a step", *EVALUATIONS])
def test_after_a_signal_no_evaluation_begins(base, tmp_path, monkeypatch, moment):
    """The signal comes in training step 3, or in one of the evaluations of step 4. The resumed run
    makes those that are missing."""
    calls, out, order = [], tmp_path / "out", ["a step", *EVALUATIONS]
    until = order[1:] + order[1 : order.index(moment) + 1]  # what is called before the signal
    before_each_step(monkeypatch, lambda n: terminate_if(moment == "a step" and n == 3))
    replace_evaluations(
        monkeypatch, calls, lambda flag: terminate_if(moment == flag and calls == until)
    )
    done = train(base[0], out, *ALL, check=False)
    assert done.returncode == 128 + signal.SIGTERM and "stopped after" in done.stdout
    assert steps(out) == [4] and calls == until
    calls.clear()
    replace_evaluations(monkeypatch, calls, lambda flag: None)
    run_here("--resume", "--out_dir", out)
    assert calls == order[1:] * 2


def test_a_checkpoint_is_written_before_an_evaluation_that_fails(base, tmp_path, monkeypatch):
    calls = []
    replace_evaluations(monkeypatch, calls, lambda flag: 1 // (4 - len(calls)))
    with pytest.raises(ZeroDivisionError):
        train(base[0], tmp_path / "out", *ALL, "--save_every", 4)
    assert steps(tmp_path / "out") == [4] and calls[-1] == "--val_every"


def test_a_second_ctrl_c_ends_at_once_and_nohup_is_respected():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        train_gpt2.catch_stop_signals()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert train_gpt2.stop_signals == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)  # the handler runs at the latest here
    finally:
        train_gpt2.stop_signals.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_save_minutes_go_by_the_clock(base, tmp_path, monkeypatch):
    """On this clock a step takes a minute. The last step is saved if either flag is on."""
    now = [0]
    monkeypatch.setattr(train_gpt2.time, "monotonic", lambda: 60.0 * now[0])
    before_each_step(monkeypatch, lambda n: now.append(now.pop() + 1))
    expected = {(0, 2.5): [3, 6, 8], (4, 2.5): [3, 4, 7, 8], (0, 30): [8], (0, 0): []}
    for (every, minutes), saved in expected.items():
        out = tmp_path / f"{every} {minutes}"
        train(base[0], out, "--save_every", every, "--save_minutes", minutes)
        assert steps(out) == saved


# Outputs --------------------------------------------------------------------------------------


@FAULTS
def test_a_terminal_that_closes_ends_the_run_by_its_signal(base, tmp_path):
    """The process gets SIGHUP, and printing to the terminal fails. The step is still saved."""
    out = tmp_path / "out"
    args = [*TINY_RUN, "--max_steps", 100000, "--data_dir", base[0], "--out_dir", out]
    ours, theirs = pty.openpty()
    options = dict(stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | ENVIRONMENT)
    options["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(command("train_gpt2.py", *args), **options)
    os.close(theirs)
    wait_for(lambda: (out / "log.txt").exists() and len((out / "log.txt").read_text()) > 400)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert len(find_checkpoints(out)) == 1


def test_a_closed_pipe_does_not_end_a_run_and_a_signal_still_saves(base, tmp_path):
    out = tmp_path / "out"
    flags = [*TINY_RUN, "--data_dir", base[0], "--out_dir", out, "--max_steps", 100000]
    process = start(*flags, stderr=subprocess.DEVNULL)
    while "| loss" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    size = (out / "log.txt").stat().st_size
    wait_for(lambda: (out / "log.txt").stat().st_size > size + 4096)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert len(find_checkpoints(out)) == 1


# Disks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def room_for(size):
    """Files cannot grow beyond this size, which also root has to respect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file, step", [("model.safetensors", 8), ("training_state.pt", 6)])
def test_a_full_disk_loses_no_older_checkpoint(base, tmp_path, monkeypatch, file, step):
    """A run continues from step 4 and saves in step 8, its last, or in step 6, because it was
    stopped. Once there is room, another --resume ends with the log of the run `base`."""
    out, whole = tmp_path / "out", base[1]
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("step_00008"))
    before = {path: path.read_bytes() for path in (out / "step_00004").iterdir()}
    with room_for((whole / "step_00008" / file).stat().st_size - 1), monkeypatch.context() as patch:
        before_each_step(patch, lambda n: terminate_if(step == 6 and n == 1))
        done = run_here("--resume", "--out_dir", out, check=False)
    refused(done, f"step_0000{step} cannot be written (")
    assert "make room, then continue with --resume" in done.stderr
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["step_00004"]
    assert {path: path.read_bytes() for path in (out / "step_00004").iterdir()} == before
    run_here("--resume", "--out_dir", out)
    assert list(dict.fromkeys(records(out))) == records(whole)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(base, tmp_path, monkeypatch):
    out, synced = tmp_path / "out", {}

    def sync(path):
        synced.setdefault(path.name, (out / "step_00008").exists())

    monkeypatch.setattr(train_gpt2, "sync", sync)
    train(base[0], out, "--save_every", 8)
    for name in ("training_state.pt", "model.safetensors", "config.json", "tmp_checkpoint"):
        assert synced[name] is False, name


def test_a_file_system_without_locks_is_a_warning(base, tmp_path, monkeypatch):
    def acquire(*args, **options):
        raise OSError("no locks available")

    monkeypatch.setattr(train_gpt2.FileLock, "acquire", acquire)
    done = train(base[0], tmp_path / "out", "--max_steps", 1)
    assert "has no locks; do not train there twice" in done.stdout
