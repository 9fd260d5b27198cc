"""Items per second of hellaswag.py and of the plain loop: GPT-2 (124M) with random weights.

python tests/bench_hellaswag.py --data FILE      # what hellaswag.py --data takes
python tests/bench_hellaswag.py --other ../old   # and another checkout's hellaswag.py
"""

import importlib
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parents[1]


def commit(folder):
    """The short hash of a checkout, with "+" if its files differ from it."""
    command = ["git", "-C", folder, "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def heading(device):
    return f"{date.today()}; {hardware(device)}; torch {torch.__version__}; commit {commit(ROOT)}"


@torch.no_grad()
def plain_loop(model, items, device):
    """One item at a time: four padded rows, and all logits. Returns (n, 4) float32."""
    table = []
    for item in items:
        rows = [torch.tensor(item.context + ending) for ending in item.endings]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        logits, targets = model(tokens)[:, :-1], tokens[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        for row, ending in zip(losses.view(4, -1), item.endings):
            table.append(row[len(item.context) - 1 :][: len(ending)].sum())
    return torch.stack(table).view(-1, 4).cpu()


def load_checkout(folder, device):
    """hellaswag.py of a checkout, and a model of its train_gpt2.py."""
    for name in ("hellaswag", "train_gpt2", "fineweb"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder.resolve()))
    hellaswag, train_gpt2 = map(importlib.import_module, ("hellaswag", "train_gpt2"))
    sys.path.pop(0)
    torch.manual_seed(0)
    return hellaswag, train_gpt2.GPT(train_gpt2.GPTConfig()).to(device).eval()


def main(data: Path | None = None, items: int = 48, repeats: int = 3, other: Path | None = None):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, model = load_checkout(ROOT, device)
    examples = ours.load_items(data or ours.DATA, items)
    forms = {"plain loop": (plain_loop, model), "hellaswag.py": (ours.score, model)}
    if other:
        theirs, its_model = load_checkout(other, device)
        forms[f"of {commit(other)}"] = (theirs.score, its_model)
    print(f"{heading(device)}; {items} items, medians of {repeats} runs\n")
    print("| precision | form | items/s | speed / plain loop's | largest difference of a loss |")
    print("|---|---|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        seconds, losses = {name: [] for name in forms}, {}
        for _ in range(repeats + 1):  # the first time is not counted
            for name, (score, its_model) in forms.items():
                start = time.perf_counter()
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    losses[name] = score(its_model, examples, device).double()
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        for name, t in median.items():
            difference = (losses[name] - losses["plain loop"]).abs().max()
            speed = f"{items / t:.2f} | {median['plain loop'] / t:.2f}"
            print(f"| {dtype} | {name} | {speed} | {difference:.1e} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
