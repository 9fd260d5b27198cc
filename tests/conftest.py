"""What several tests share: tiny shards and models, and ways to run the scripts as a user does."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fineweb
from train_gpt2 import GPT, GPTConfig, main, read_log, save_hugging_face

torch.set_num_threads(1)  # these models are too small to share between cores

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "../shared/data"  # real text and HellaSwag, where a developer has them

TINY = "--n_layer 2 --n_head 2 --n_embd 32 --seq_len 32 --block_size 64".split()
TINY += "--dtype float32 --device cpu --no-compile".split()
QUIET = "--hellaswag_every 0 --sample_every 0".split()
STEPS = "--max_steps 8 --warmup_steps 2 --max_lr 1e-2 --min_lr 1e-3 --total_batch_size 256".split()
STEPS += "--val_every 4 --val_tokens 500".split()
TINY_RUN = [*TINY, *QUIET, *STEPS, "--micro_batch_size", 4]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PROMPTS = ["Hello, I'm a language model,", "Once", "def f(x):\n    return", "In 2026 the café 🚀"]
FAULTS = pytest.mark.faults  # slow: not part of a run of all tests


def write_shards(folder, train=(3000, 3000), val=1500, seed=0):
    """Shards of documents that repeat the same seven ids. Beside them are seven HellaSwag examples
    and a tokenizer of 257 ids, the bytes and <|endoftext|>, so that runs take less time."""
    folder.mkdir(parents=True, exist_ok=True)
    cycle = np.random.default_rng(seed).integers(0, 256, size=7)
    for i, (split, n) in enumerate([("val", val), *(("train", n) for n in train)]):
        tokens = np.resize(cycle, n)
        tokens[::50] = 256
        np.save(folder / f"made_{split}_{i:06d}.npy", tokens.astype(np.uint16))
    # The first 256 of GPT-2's tokens are the bytes.
    ids = {token: i for token, i in fineweb.gpt2_tokenizer().vocab.items() if i < 256}
    text = fineweb.tokenizer_json(ids | {"<|endoftext|>": 256}, merges=[])
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    record = {"endings": ["on the mat.", "far away", "and ate", "."]}
    examples = [record | {"ctx": "A cat sat" + i * " up", "label": i % 4} for i in range(7)]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=3, n_head=2, n_embd=32))


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
    save_hugging_face(model, fineweb.gpt2_tokenizer(), directory)
    return model, directory


def command(script, *args, processes=1):
    """The command line that runs a script, under torchrun if processes > 1."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        # Port 0: torchrun itself picks a free port and keeps it open.
        launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"]
    return [*launch, str(ROOT / script), *map(str, args)]


def run(script, *args, processes=1, check=True, cwd=ROOT, env=None):
    """Run a script as a user does; returns the finished process."""
    args = command(script, *args, processes=processes)
    env = os.environ | ENVIRONMENT | (env or {})
    done = subprocess.run(args, capture_output=True, text=True, timeout=240, cwd=cwd, env=env)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(*args, check=True):
    """As run, but train_gpt2.py's main in this process, which saves the start-up time."""
    out, err = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as end:
                main(list(map(str, args)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    done = subprocess.CompletedProcess(args, end.value.code or 0, *texts)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def train(shards, out, *args, batch=4, processes=1, check=True, env=None):
    """A tiny training run: in this process, unless it needs several or other variables."""
    args = [*TINY_RUN, "--micro_batch_size", batch, *args, "--data_dir", shards, "--out_dir", out]
    if processes > 1 or env:
        return run("train_gpt2.py", *args, processes=processes, check=check, env=env)
    return run_here(*args, check=check)


def refused(done, sentence):
    """Assert that a run ended with status 2 and one line on stderr, which contains `sentence`."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stdout + done.stderr
    assert sentence in lines[0] and lines[0].startswith("train_gpt2.py: "), lines[0]


def log_of(out_dir):
    """{stream: {step: value}} of a run."""
    streams = {}
    for step, stream, value in read_log(Path(out_dir) / "log.txt"):
        streams.setdefault(stream, {})[int(step)] = float(value)
    return streams


def records(out_dir):
    """The lines of a run's log.txt, except those of its speed. (A resumed run may repeat some.)"""
    lines = (Path(out_dir) / "log.txt").read_text().splitlines()
    return list(dict.fromkeys(line for line in lines if " speed " not in line))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """(shards, out_dir, screen) of the run that others are compared with, of 8 steps."""
    folder = tmp_path_factory.mktemp("base")
    shards = write_shards(folder / "shards")
    done = train(shards, folder / "out", "--save_every", 4)
    return shards, folder / "out", done.stdout


@pytest.fixture(scope="session")
def base_of_two(base, tmp_path_factory):
    """The out_dir of the same run by two processes, which also score the examples of the shards."""
    out = tmp_path_factory.mktemp("base_of_two") / "out"
    examples = ["--hellaswag_every", 4, "--hellaswag_data", base[0] / "examples.jsonl"]
    train(base[0], out, "--save_every", 4, *examples, processes=2)
    return out


def start(*args, processes=1, stderr=subprocess.STDOUT):
    """Start a run that reacts to signals, even if the tests ignore them under nohup."""

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
