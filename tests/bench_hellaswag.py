"""
How fast hellaswag.py scores, beside the plain loop that it replaces. Prints a Markdown table; asserts nothing.

    python tests/bench_hellaswag.py                # 124M with random weights; on CUDA also all items, compiled
    python tests/bench_hellaswag.py --items 96 --repeats 5 --threads 1
"""

import argparse
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FILES = [
    ROOT / "../shared/data/hellaswag/hellaswag_val.jsonl",
    ROOT / "hellaswag/hellaswag_val.jsonl",
]


@torch.no_grad()
def plain_loop(model, items, device="cpu"):
    """The baseline: one item at a time, four padded rows, logits of the whole vocabulary everywhere. (n, 4) float32."""
    table = []
    for item in items:
        rows = [item.context + ending for ending in item.endings]
        tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros(tokens.shape)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, len(item.context) : len(row)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        logits = model(tokens)[:, :-1]
        losses = F.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(4, -1)
        table.append((losses * mask[:, 1:]).sum(1).cpu())
    return torch.stack(table)


def timed(work):
    start = time.perf_counter()
    result = work()  # both sides end with the losses on the CPU, so a GPU is done by then
    return time.perf_counter() - start, result


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return f"{name}, {threads}, {torch.backends.cpu.get_cpu_capability()}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--items", type=int, default=48, help="for the comparison, evenly spaced over the file"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each, interleaved; medians are printed"
    )
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 = PyTorch's choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="on by itself on CUDA"
    )
    args = parser.parse_args()
    from hellaswag import load_items, picks, score
    from train_gpt2 import GPT, GPTConfig, pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    path = next((path for path in FILES if path.exists()), None)
    if path is None:
        sys.exit(
            "There is no hellaswag_val.jsonl: run `python hellaswag.py` once, it downloads it."
        )
    items = load_items(path, args.items)
    torch.manual_seed(0)
    model = GPT(GPTConfig()).to(device).eval()

    print(
        f"{date.today()}; {hardware(device)}; torch {torch.__version__}, Python {platform.python_version()}. GPT-2 (124M), random"
    )
    print(
        f"weights; {len(items)} items; medians of {args.repeats} interleaved repeats, after one that is not counted.\n"
    )
    print(
        "| precision | form | items/s | against the plain loop | same picks (acc, acc_norm) | largest difference of a loss |"
    )
    print("|---|---|---:|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()  # the number of graphs that may be compiled is limited
        forms = {
            "plain loop": lambda: plain_loop(model, items, device),
            "hellaswag.py": lambda: score(model, items, device),
        }
        if compiled:
            forms["hellaswag.py, compiled"] = lambda: score(model, items, device, compile=True)
        seconds, losses = {name: [] for name in forms}, {}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for repeat in range(args.repeats + 1):
                for name, work in forms.items():
                    elapsed, losses[name] = timed(work)
                    if repeat:
                        seconds[name].append(elapsed)
        plain, reference = statistics.median(seconds["plain loop"]), losses["plain loop"].double()
        for name in forms:
            median = statistics.median(seconds[name])
            same = [
                int((a == b).sum())
                for a, b in zip(picks(items, reference), picks(items, losses[name].double()))
            ]
            print(f"| {str(dtype)[6:]} | {name} | {len(items) / median:.2f} | {plain / median:.2f}x | {same[0]}, {same[1]} of {len(items)} "
                  f"| {(losses[name].double() - reference).abs().max():.1e} |", flush=True)  # fmt: skip
    if device.type == "cuda":
        torch._dynamo.reset()
        items = load_items(path)
        with torch.autocast(device.type, torch.bfloat16):
            first, rest = timed(lambda: score(model, items, device, compile=True))[0], []
            for _ in range(args.repeats):
                rest.append(timed(lambda: score(model, items, device, compile=True))[0])
        print(
            f"\nAll {len(items):,} items, bfloat16, compiled: {statistics.median(rest):.2f} s; {first:.0f} s the first time."
        )


if __name__ == "__main__":
    main()
