"""How fast the parts of a run are besides the training step: the data loader and its order of the
sequences, sampling, validation and HellaSwag, checkpoints.

    python tests/bench_parts.py        # GPT-2 (124M) with random weights; minutes on two CPU cores
    python tests/bench_parts.py --parts loader permutation checkpoint

Prints a Markdown table; asserts nothing. On CUDA the model is compiled where train_gpt2.py compiles
it: in training and validation.
"""

import io
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench_hellaswag import FILES, heading, timed  # noqa: E402

import hellaswag  # noqa: E402
import train_gpt2  # noqa: E402
from fineweb import VOCAB_SIZE  # noqa: E402
from train_gpt2 import (  # noqa: E402
    GPT,
    Args,
    DataLoaderLite,
    GPTConfig,
    Run,
    evaluate,
    pick_device,
    pick_dtype,
    prepare_process,
    training_step,
    use_cpu_kernels,
)

Part = Literal["loader", "permutation", "sampling", "evaluation", "checkpoint"]


@dataclass
class Options:
    parts: tuple[Part, ...] = get_args(Part)
    new_tokens: int = 256  # sampling: per row
    items: int = 10042 if torch.cuda.is_available() else 192  # evaluation: of HellaSwag


@dataclass
class Setup:
    """What the parts share."""

    device: torch.device
    dtype: str
    autocast: torch.autocast
    folder: Path  # for temporary files

    def model(self):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=50304)).to(self.device)
        if self.device.type == "cpu":
            use_cpu_kernels(model, Args(dtype=self.dtype, compile=False))
        return model

    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")

    def shards(self, name, split, count, tokens):
        """The path of a new folder with `count` shards of random ids."""
        folder = self.folder / name
        folder.mkdir()
        for i in range(count):
            ids = np.random.default_rng(i).integers(0, VOCAB_SIZE, tokens, dtype=np.uint16)
            np.save(folder / f"made_{split}_{i:06d}.npy", ids)
        return str(folder)


def row(part, what, figure):
    print(f"| {part} | {what} | {figure} |", flush=True)


def spread(seconds):
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}–{max(seconds):.2f})"


def private_memory():
    """MB of this process's memory, without memory-mapped files. Only on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(status.read_text().split("RssAnon:")[1].split()[0]) / 1024


def bench_loader(setup, options):
    """A batch of 2**19 tokens in shuffled sequences, from memory-mapped shards of two sizes."""
    for tokens in (10_000_000, 100_000_000):
        args = Args(data_dir=setup.shards(f"train{tokens}", "train", 2, tokens))
        loader = DataLoaderLite(args, "train", 64)
        before = private_memory()
        seconds = [timed(lambda: loader.micro_batches(step))[0] for step in range(30)]
        grown = private_memory() - before
        what = f"{args.total_batch_size:,} tokens from shards of {tokens:,}"
        ms = 1e3 * statistics.median(seconds)
        row("loader", what, f"{ms:.2f} ms; {grown:+.0f} MB after 30 batches")


def bench_permutation(setup, options):
    """The order of an epoch's sequences, as DataLoaderLite.shuffled_index makes it."""
    for name, n in (("sample-10BT", 9_850_000_000 // 1024), ("100B tokens", 97_600_000)):
        seconds = []
        for epoch in range(3):
            random = np.random.RandomState([Args.seed, epoch])
            elapsed, order = timed(lambda: random.permutation(n))
            seconds.append(elapsed)
        figure = f"{spread(seconds)}, {order.nbytes / 1e6:,.0f} MB"
        row("permutation", f"{n:,} sequences: {name}", figure)


def bench_sampling(setup, options, rows=4):
    model, synchronize = setup.model(), torch.get_device_module(setup.device).synchronize
    prompt = torch.arange(100, 108, device=setup.device).repeat(rows, 1)  # (rows, 8)
    seconds = {}
    with setup.autocast:
        for use_cache in (True, False):
            model.generate(prompt, 8, use_cache=use_cache)
            synchronize()
            start = time.perf_counter()
            model.generate(prompt, options.new_tokens, use_cache=use_cache)
            synchronize()
            seconds[use_cache] = time.perf_counter() - start
    what = f"{rows} rows of {options.new_tokens} new tokens"
    factor = seconds[False] / seconds[True]
    row("sampling", f"{what}, the whole prefix computed again for each", f"{seconds[False]:.1f} s")
    row("sampling", f"{what}, keys and values kept", f"{seconds[True]:.1f} s: {factor:.1f}×")


def bench_evaluation(setup, options):
    """Seconds per token of training and of validation, and per item of HellaSwag, in turns."""
    path = next((path for path in FILES if path.exists()), None)
    if path is None:
        return row("evaluation", "skipped: there is no hellaswag_val.jsonl", "")
    device, autocast, raw = setup.device, setup.autocast, setup.model()
    items = hellaswag.load_items(path, options.items)
    B, T, accum = 64 if device.type == "cuda" else 4, 1024, 2
    model = torch.compile(raw, dynamic=False) if device.type == "cuda" else raw
    optimizer = raw.configure_optimizers(0.1, 6e-4)
    scaler = setup.scaler()
    val_tokens = 4 * B * T
    args = Args(data_dir=setup.shards("val", "val", 1, val_tokens + 1), seq_len=T)
    loader = DataLoaderLite(args, "val", B, device=device)
    tokens = torch.randint(VOCAB_SIZE, (B, T + 1), device=device)
    batches = [(tokens[:, :-1], tokens[:, 1:])] * accum

    def train():
        training_step(model, batches, optimizer, scaler, autocast, 1.0)[0].item()

    def validate():
        evaluate(model, raw, loader, val_tokens, autocast)

    def score():
        with autocast:
            hellaswag.score(raw, items, device)

    seconds = {train: [], validate: [], score: []}
    for repeat in range(4):
        for work, times in seconds.items():
            times.append(timed(work)[0])
    train_s, val_s, item_s = (statistics.median(times[1:]) for times in seconds.values())
    train_s, val_s, item_s = train_s / (accum * B * T), val_s / val_tokens, item_s / len(items)
    row("evaluation", "training", f"{1 / train_s:,.0f} tokens/s")
    row("evaluation", "validation", f"{1 / val_s:,.0f} tokens/s")
    row("evaluation", "HellaSwag", f"{1 / item_s:.2f} items/s")
    evaluation = args.val_tokens * val_s + hellaswag.N_ITEMS * item_s
    share = evaluation / (args.val_every * args.total_batch_size * train_s)
    what = f"{args.val_tokens:,} tokens and {hellaswag.N_ITEMS:,} items"
    row("evaluation", f"{what}, against {args.val_every} steps", f"{share:.1%} of their time")


def bench_checkpoint(setup, options):
    """Run.save, after a step that gives AdamW its means. The first call is not counted."""
    model = setup.model()
    data, out = setup.shards("train", "train", 1, 10_000), setup.folder / "log"
    args = Args(data_dir=data, out_dir=str(out), total_batch_size=1024, keep_checkpoints=1)
    loader = DataLoaderLite(args, "train", 1, device=setup.device)
    optimizer, scaler = model.configure_optimizers(0.1, 6e-4), setup.scaler()
    training_step(model, loader.micro_batches(0), optimizer, scaler, setup.autocast, 1.0)
    state = {
        "args": asdict(args),
        "gpt_config": asdict(model.config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    seconds = {"all": [], "training_state.pt": [], "the other files": []}

    def noted(name, work):
        def wrapper(*args):
            seconds[name].append(timed(lambda: work(*args))[0])

        return wrapper

    others = noted("the other files", train_gpt2.save_hugging_face)
    weights = patch.object(train_gpt2, "save_hugging_face", others)
    training_state = patch.object(torch, "save", noted("training_state.pt", torch.save))
    signals = patch.object(train_gpt2, "catch_stop_signals")  # Ctrl-C ends this program at once
    with weights, training_state, signals, redirect_stdout(io.StringIO()):
        run = Run(args, model, loader, None, setup.autocast, None)
        for step in range(1, 5):
            noted("all", run.save)(state | {"step": step})
        run.finish()
    seconds = {name: times[1:] for name, times in seconds.items()}
    sizes = {path.name: path.stat().st_size for path in (out / "step_00004").iterdir()}
    figure = f"{spread(seconds['all'])}, {sum(sizes.values()) / 1e6:,.1f} MB"
    row("checkpoint", "Run.save: a forward pass, the files, fsync", figure)
    for name in ("training_state.pt", "the other files"):
        row("checkpoint", f"of that, {name} before fsync", spread(seconds[name]))
    for name, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        row("checkpoint", name, f"{size / 1e6:,.3f} MB")


def main():
    options = tyro.cli(Options, description=__doc__)
    prepare_process()
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    autocast = torch.autocast(device.type, getattr(torch, dtype), dtype != "float32")
    print(f"{heading(device)}. GPT-2 (124M), random weights, {dtype}.\n")
    print("| part | what | figure |")
    print("|---|---|---|")
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            globals()[f"bench_{part}"](Setup(device, dtype, autocast, Path(folder)), options)


if __name__ == "__main__":
    main()
