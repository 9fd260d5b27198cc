"""What several tests share: tiny shards, tiny models, and a way to run the scripts as a user does."""

import contextlib
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from train_gpt2 import GPT, GPTConfig, main, read_log

torch.set_num_threads(1)  # these models are too small to share between cores

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "../shared/data"  # real text and HellaSwag, where a developer has them

TINY = "--n_layer 2 --n_head 2 --n_embd 32 --seq_len 32 --block_size 64 --dtype float32 --device cpu --no-compile".split()
QUIET = "--hellaswag_every 0 --sample_every 0".split()


def write_shards(folder, train=(3000, 3000), val=1500, vocab=50257, seed=0):
    """Shards of made tokens with structure to learn: all documents repeat one short cycle of ids."""
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


def run(script, *args, processes=1, check=True, timeout=240, cwd=ROOT, env=None):
    """Run a script as a user does, under torchrun if processes > 1; returns the finished process."""
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as s:  # a port that is free now
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    done = subprocess.run([*launch, str(ROOT / script), *map(str, args)], capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(*args, check=True):
    """train_gpt2.py's main in this process, which saves the seconds that a start takes; returns what run returns."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(map(str, args)))
        except SystemExit as e:
            code = e.code
    done = subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())
    assert not check or code == 0, done.stdout + done.stderr
    return done


def log_of(out_dir):
    """{stream: {step: value}} of a run."""
    streams = {}
    for step, stream, value in read_log(Path(out_dir) / "log.txt"):
        streams.setdefault(stream, {})[step] = float(value)
    return streams
