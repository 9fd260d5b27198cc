"""What several tests share: tiny shards and models, and ways to run the scripts as a user does."""

import contextlib
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fineweb import UserError
from train_gpt2 import GPT, GPTConfig, main, read_log

torch.set_num_threads(1)  # these models are too small to share between cores

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "../shared/data"  # real text and HellaSwag, where a developer has them

TINY = "--n_layer 2 --n_head 2 --n_embd 32 --seq_len 32 --block_size 64".split()
TINY += "--dtype float32 --device cpu --no-compile".split()
QUIET = "--hellaswag_every 0 --sample_every 0".split()
STEPS = "--max_steps 8 --warmup_steps 2 --max_lr 1e-2 --min_lr 1e-3 --total_batch_size 256".split()
STEPS += "--val_every 4 --val_tokens 500".split()


def without_folders(line):
    """A line without the folders of the tests, which have longer names than those of users."""
    return re.sub(r"[^\s(]*/pytest-of-[^\s:;,)]*/", "", line)


@pytest.fixture(autouse=True)
def sentences_are_short(monkeypatch):
    """In each test, every UserError must be one line. With "train_gpt2.py: " before it, it may have
    200 characters, not counting the folders of the tests. (--verify prints a line per fault.)"""
    wrong = []

    def init(error, sentence):
        Exception.__init__(error, sentence)
        of_verify = inspect.currentframe().f_back.f_code.co_name == "verify"
        lines = sentence.split("\n") if of_verify else [sentence]
        lines = [f"train_gpt2.py: {without_folders(line)}" for line in lines]
        wrong.extend(line for line in lines if len(line) > 200 or "\n" in line)

    monkeypatch.setattr(UserError, "__init__", init, raising=False)
    yield
    assert wrong == []


def write_shards(folder, train=(3000, 3000), val=1500, vocab=50257, seed=0):
    """Shards with a simple pattern to learn: all documents repeat the same seven token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    cycle = rng.integers(0, vocab, size=7)
    for i, (split, n) in enumerate([("val", val), *(("train", n) for n in train)]):
        tokens = np.resize(cycle, n)
        tokens[::50] = min(50256, vocab - 1)
        np.save(folder / f"made_{split}_{i:06d}.npy", tokens.astype(np.uint16))
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=3, n_head=2, n_embd=32))


PROMPTS = ["Hello, I'm a language model,", "Once", "def f(x):\n    return", "In 2026 the café 🚀"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(model, directory) of a random GPT-2 whose most likely continuations vary. A model that
    repeats its last token would hide a wrong position or a wrong mask."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=4, n_head=4, n_embd=128))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(4 if "wte" in name else 8)
            else:
                p.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
    directory = tmp_path_factory.mktemp("saved") / "step_00001"
    model.save_pretrained(directory)
    return model, directory


def command(script, *args, processes=1):
    """The command line that runs a script, under torchrun if processes > 1."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        # Port 0: torchrun itself picks a free port and keeps it open.
        launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"]
    return [*launch, str(ROOT / script), *map(str, args)]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(script, *args, processes=1, check=True, cwd=ROOT, env=None):
    """Run a script as a user does; returns the finished process."""
    done = subprocess.run(
        command(script, *args, processes=processes),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env=os.environ | ENVIRONMENT | (env or {}),
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def run_here(*args, check=True):
    """Run train_gpt2.py's main in this process, which saves the start-up time; returns what run
    returns."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(map(str, args)))
        except SystemExit as error:
            code = error.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int), f"main exits with a number, not with {code!r}"
    done = subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())
    assert not check or code == 0, done.stdout + done.stderr
    return done


def train(shards, out, *args, batch=4, processes=1, alone=False, check=True, env=None):
    """A tiny training run: in this process, or (alone=True, processes > 1, or with environment
    variables) in processes of its own, as a user starts it."""
    args = [*TINY, *QUIET, *STEPS, *args, "--data_dir", shards, "--out_dir", out]
    args += ["--micro_batch_size", batch]
    if alone or processes > 1 or env:
        return run("train_gpt2.py", *args, processes=processes, check=check, env=env)
    return run_here(*args, check=check)


def refused(done, sentence):
    """Assert that a run ended with status 2 and one line on stderr, which contains `sentence`."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stdout + done.stderr
    assert sentence in lines[0] and lines[0].startswith("train_gpt2.py: "), lines[0]
    assert len(without_folders(lines[0])) <= 200, lines[0]


def log_of(out_dir):
    """{stream: {step: value}} of a run."""
    streams = {}
    for step, stream, value in read_log(Path(out_dir) / "log.txt"):
        streams.setdefault(stream, {})[step] = float(value)
    return streams


def records(out_dir):
    """The lines of a run's log.txt, except those of its speed."""
    lines = (Path(out_dir) / "log.txt").read_text().splitlines()
    return [line for line in lines if " speed " not in line]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """(shards, out_dir, screen) of the run that others are compared with: 8 steps, one process,
    micro-batches of 4, checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("base")
    shards = write_shards(folder / "shards")
    done = train(shards, folder / "out", "--save_every", 4, alone=True)
    return shards, folder / "out", done.stdout


@pytest.fixture(scope="session")
def base_of_two(base, tmp_path_factory):
    """The out_dir of the same run by two processes."""
    out = tmp_path_factory.mktemp("base_of_two") / "out"
    train(base[0], out, "--save_every", 4, processes=2)
    return out


# Runs that are disturbed

TINY_RUN = "--n_layer 2 --n_head 2 --n_embd 32 --seq_len 32 --block_size 64".split()
TINY_RUN += "--dtype float32 --device cpu --hellaswag_every 0 --sample_every 0".split()
TINY_RUN += [*STEPS, "--micro_batch_size", 4]
FAULTS = pytest.mark.faults


def start(*args, processes=1, stderr=subprocess.STDOUT):
    """Start a run and return its process, so that the test can disturb it. The run reacts to
    signals even if the tests themselves ignore them, because of nohup or in the background."""

    def restore_signals():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        command("train_gpt2.py", *args, processes=processes),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env=os.environ | ENVIRONMENT,
        preexec_fn=restore_signals,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"this did not happen within {seconds} seconds"
        time.sleep(0.01)


SURVIVED = []  # rows of a table that is printed at the end


def survived(fault, tries, lost):
    """Note that a fault was survived `tries` times. Call it after all assertions."""
    SURVIVED.append(f"| {fault} | {tries} | {tries} | {lost} |")


def pytest_terminal_summary(terminalreporter):
    if SURVIVED:
        rows = ["| fault | tries | survived | lost |", "|---|---|---|---|", *SURVIVED]
        terminalreporter.section("faults")
        terminalreporter.write("\n".join(rows) + "\n")
