"""How fast hellaswag.py scores, compared with the plain loop that it replaces. Prints a Markdown
table and asserts nothing.

    python tests/bench_hellaswag.py    # 124M with random weights; on CUDA also all items
    python tests/bench_hellaswag.py --items 96 --repeats 5 --threads 1
    python tests/bench_hellaswag.py --other ../old --cpu_time  # and another checkout's hellaswag.py
"""

import argparse
import importlib
import os
import platform
import statistics
import subprocess
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
    ROOT / "hellaswag/data/validation-00000-of-00001.parquet",
    ROOT / "hellaswag/hellaswag_val.jsonl",
]


@torch.no_grad()
def plain_loop(model, items, device="cpu"):
    """The baseline: one item at a time, four padded rows, logits of the whole vocabulary at every
    position. Returns (n, 4) float32."""
    table = []
    for item in items:
        rows = [item.context + ending for ending in item.endings]
        tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros(tokens.shape)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, len(item.context) : len(row)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        table.append((losses.view(4, -1) * mask[:, 1:]).sum(1).cpu())
    return torch.stack(table)


def timed(work, clock=time.perf_counter):
    start = clock()
    result = work()  # it ends with the losses on the CPU, so a GPU has finished by then
    return clock() - start, result


def load_checkout(folder):
    """hellaswag.py and train_gpt2.py of another checkout, as modules of their own."""
    names = ("hellaswag", "train_gpt2", "fineweb")
    ours = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("hellaswag"), importlib.import_module("train_gpt2")
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(ours)


# What all benchmarks say first ----------------------------------------------------------------


def heading(device):
    """The line above a table: date, hardware, versions, and the commit of this repository if there
    is git."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    facts = [str(date.today()), hardware(device), versions]
    if found := commit(ROOT):
        facts.append(f"commit {found}")
    return "; ".join(facts)


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    name = next(names, platform.machine())
    return f"{name}, {threads}, {torch.backends.cpu.get_cpu_capability()}"


def commit(folder):
    """The short hash of a checkout, with '+' if its files differ from it; '' without git."""
    command = ["git", "-C", folder, "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--items", type=int, default=48, help="how many items, evenly spaced over the file")
    add("--repeats", type=int, default=3, help="of each form, interleaved; medians are printed")
    add("--threads", type=int, default=0, help="CPU threads; 0 = PyTorch's choice")
    add("--device", default="auto")
    add("--other", type=Path, help="another checkout, whose hellaswag.py is timed as well")
    add("--cpu_time", action="store_true", help="CPU seconds, for a machine that others use, too")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="precisions")
    args = parser.parse_args()
    from hellaswag import load_items, picks, score
    from train_gpt2 import GPT, GPTConfig, pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    path = next((path for path in FILES if path.exists()), None)
    if path is None:
        sys.exit("HellaSwag's data is missing; python hellaswag.py downloads it")
    items = load_items(path, args.items)
    torch.manual_seed(0)
    model = GPT(GPTConfig()).to(device).eval()
    forms = {
        "plain loop": lambda: plain_loop(model, items, device),
        "hellaswag.py": lambda: score(model, items, device),
    }
    if args.other:
        other, other_train = load_checkout(args.other.resolve())
        other_model = other_train.GPT(other_train.GPTConfig()).to(device).eval()
        other_model.load_state_dict(model.state_dict())
        name = f"hellaswag.py of {commit(args.other) or args.other}"
        forms[name] = lambda: other.score(other_model, items, device)
    clock = time.process_time if args.cpu_time else time.perf_counter

    print(
        f"{heading(device)}. GPT-2 (124M), random weights; {len(items)} items; medians of "
        f"{args.repeats} interleaved repeats, after one that is not counted"
        f"{'; CPU time' if args.cpu_time else ''}.\n"
    )
    print(
        "| precision | form | items/s | against the plain loop | same picks (acc, acc_norm) "
        "| largest difference of a loss |"
    )
    print("|---|---|---:|---:|---:|---:|")
    for dtype in (getattr(torch, name) for name in args.dtypes):
        seconds, losses = {name: [] for name in forms}, {}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for repeat in range(args.repeats + 1):
                for name, work in forms.items():
                    elapsed, result = timed(work, clock)
                    losses[name] = result.double()
                    if repeat:
                        seconds[name].append(elapsed)
        plain, reference = statistics.median(seconds["plain loop"]), losses["plain loop"]
        for name in forms:
            median = statistics.median(seconds[name])
            pairs = zip(picks(items, reference), picks(items, losses[name]))
            acc, acc_norm = (int((a == b).sum()) for a, b in pairs)
            difference = (losses[name] - reference).abs().max()
            print(
                f"| {str(dtype)[6:]} | {name} | {len(items) / median:.2f} | {plain / median:.2f}x "
                f"| {acc}, {acc_norm} of {len(items)} | {difference:.1e} |",
                flush=True,
            )
    if device.type == "cuda":
        items = load_items(path)
        with torch.autocast(device.type, torch.bfloat16):
            seconds = [timed(forms["hellaswag.py"])[0] for _ in range(args.repeats + 1)]
        median = statistics.median(seconds[1:])
        print(f"\nAll {len(items):,} items, bfloat16: {median:.2f} s.")


if __name__ == "__main__":
    main()
