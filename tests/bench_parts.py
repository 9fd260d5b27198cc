"""
How fast the parts of a run are that are not the training step: the loader, sampling, validation and HellaSwag.

    python tests/bench_parts.py                     # GPT-2 (124M) with random weights; about seven minutes on two CPU cores

Prints a line for each figure; asserts nothing. On a CPU the model runs in eager mode, on CUDA compiled.
"""

import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import hellaswag  # noqa: E402
from bench_hellaswag import FILES  # noqa: E402
from fineweb import VOCAB_SIZE  # noqa: E402
from train_gpt2 import (  # noqa: E402
    GPT, DataLoaderLite, GPTConfig, evaluate, keep_freed_memory, pick_device, pick_dtype, synchronize, training_step,
)  # fmt: skip


def private_memory():
    """MB of this process that are not memory-mapped files, on Linux."""
    status = Path("/proc/self/status")
    return (
        int(status.read_text().split("RssAnon:")[1].split()[0]) / 1024
        if status.exists()
        else float("nan")
    )


def bench_loader(folder):
    """A global batch of the recipe, 2**19 tokens in shuffled windows, from memory-mapped shards of two sizes."""
    for tokens in (10_000_000, 100_000_000):
        data = Path(folder) / str(tokens)
        data.mkdir()
        for i in range(2):
            np.save(
                data / f"made_train_{i:06d}.npy",
                np.random.default_rng(i).integers(0, VOCAB_SIZE, tokens, dtype=np.uint16),
            )
        loader = DataLoaderLite(data, "train", 64, 1024, 2**19, shuffle=True)
        before, times = private_memory(), []
        for step in range(30):
            start = time.perf_counter()
            loader.read_step(step)
            times.append(time.perf_counter() - start)
        print(f"loader: {1e3 * statistics.median(times):.2f} ms for 524,288 tokens from shards of {tokens:,}; "
              f"{private_memory() - before:+.0f} MB after 30 batches", flush=True)  # fmt: skip


def bench_sampling(model, device, autocast, rows=4, new=256):
    prompts = [list(range(100, 108))] * rows

    @torch.no_grad()
    def recomputing():  # the lecture's loop: the whole prefix, and logits of all positions, for every token
        ids, generator = (
            torch.tensor(prompts, device=device),
            torch.Generator(device).manual_seed(42),
        )
        for _ in range(new):
            top, top_ids = model(ids)[0][:, -1].float().topk(50)
            choice = torch.multinomial(top.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, top_ids.gather(1, choice)], 1)
        return ids

    with autocast:
        times = {}
        for name, work in (
            ("cache", lambda: model.generate(prompts, new)),
            ("recomputing", recomputing),
        ):
            model.generate(prompts, 8)
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            times[name] = time.perf_counter() - start
    print(f"sampling: {rows} rows of {new} new tokens in {times['cache']:.1f} s with the key-value cache, {times['recomputing']:.1f} s "
          f"recomputing the prefix: {times['recomputing'] / times['cache']:.1f} times as fast", flush=True)  # fmt: skip


def bench_evaluation(raw, device, autocast, B, T, items, folder):
    """Seconds a token of training and of validation, and items of HellaSwag a second, in turns."""
    model = torch.compile(raw, dynamic=False) if device.type == "cuda" else raw
    optimizer = raw.configure_optimizers(0.1, 6e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    data = Path(folder) / "val"
    data.mkdir()
    np.save(
        data / "made_val_000000.npy",
        np.random.default_rng(0).integers(0, VOCAB_SIZE, 4 * B * T + 1, dtype=np.uint16),
    )
    loader = DataLoaderLite(data, "val", B, T)
    tokens, accum = torch.randint(VOCAB_SIZE, (B, T + 1), device=device), 2

    def train():
        training_step(
            model,
            [(tokens[:, :-1], tokens[:, 1:])] * accum,
            accum,
            optimizer,
            scaler,
            autocast,
            1.0,
        )[0].item()

    def validate():
        with autocast:
            evaluate(model, loader, 4 * B * T, device)

    def score():
        with autocast:
            hellaswag.score(raw, items, device, compile=device.type == "cuda")

    seconds = {train: [], validate: [], score: []}
    for repeat in range(4):
        for work, times in seconds.items():
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    step, val, hella = (statistics.median(times[1:]) for times in seconds.values())
    share = (10485760 * val / (4 * B * T) + 10042 * hella / len(items)) / (
        250 * 2**19 * step / (accum * B * T)
    )
    print(f"evaluation: {accum * B * T / step:,.0f} tokens/s trained, {4 * B * T / val:,.0f} validated, {len(items) / hella:.2f} items/s of HellaSwag: "
          f"10,485,760 tokens and 10,042 items take {share:.1%} of the time of 250 steps", flush=True)  # fmt: skip


def main():
    device = pick_device()
    if device.type == "cpu":
        keep_freed_memory()
    dtype = pick_dtype("auto", device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    print(f"{date.today()}; {device.type}, {torch.get_num_threads()} threads, {dtype}; torch {torch.__version__}, Python "
          f"{platform.python_version()}\n")  # fmt: skip
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50304)).to(device)
    path = next((path for path in FILES if path.exists()), None)
    B, T = 64 if device.type == "cuda" else 4, 1024
    with tempfile.TemporaryDirectory() as folder:
        bench_loader(folder)
        if path:
            bench_evaluation(
                model,
                device,
                autocast,
                B,
                T,
                hellaswag.load_items(path, 10042 if device.type == "cuda" else 192),
                folder,
            )
        bench_sampling(model, device, autocast)


if __name__ == "__main__":
    main()
