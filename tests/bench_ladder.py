"""The lecture's ladder: what each optimization gives to one step of train_gpt2.py's own model and
code, on this machine's GPU (124M, B=16, T=1024), else on its CPU (a small model).

    python tests/bench_ladder.py --json ladder.json  # for play.ipynb
    python tests/bench_ladder.py --base DIR --rungs base ours  # DIR: a checkout of another commit
    python tests/bench_ladder.py --data edu_fineweb10B --steps 597 --rounds 1 --rungs shipped ours

Prints a Markdown table; asserts nothing. Every rung is a process of its own, so that its peak
memory is its own, and the rungs take turns, `rounds` times, because machines are noisy. MFU is
relative to the peak in bfloat16 on each rung.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from bench_hellaswag import commit, hardware, heading
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = os.environ.get("LADDER_ROOT") or Path(__file__).resolve().parents[1]  # set for rung base
sys.path.insert(0, str(ROOT))
import train_gpt2  # noqa: E402
from train_gpt2 import GPT, DataLoaderLite, GPTConfig  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MODELS = {"small": dict(n_layer=4, n_head=4, n_embd=256)} | train_gpt2.SIZES


@dataclass(frozen=True)
class Rung:
    name: str
    tf32: bool = False
    dtype: str = "float32"  # or "auto": what train_gpt2.py takes
    compile: bool = False
    flash: bool = False
    vocab_size: int = 50257
    fused: bool = False
    logits: bool = True  # of all positions, returned beside the loss, which takes them as float32
    keep: bool = False  # train_gpt2.use_cpu_kernels: freed memory is kept, the loss unless compiled
    attention: bool = False  # and the attention for bfloat16
    residual: bool = False  # the residual stream in bfloat16


CHANGES = {  # the ladder: each rung has one change more than the one before
    "tf32": ("TF32", dict(tf32=True)),
    "bfloat16": ("bfloat16", dict(dtype="bfloat16")),
    "compile": ("torch.compile", dict(compile=True)),
    "flash": ("flash attention", dict(flash=True)),
    "vocab": ("vocabulary 50304", dict(vocab_size=50304)),
    "fused": ("fused AdamW", dict(fused=True)),
    "loss": ("no logits returned", dict(logits=False)),
    "keep": ("freed memory kept (CPU)", dict(keep=True)),
    "attention": ("attention by large products (CPU)", dict(attention=True)),
    "auto": ("float32 where it is faster than bfloat16 (CPU)", dict(dtype="auto")),
}
for key in ("keep", "attention", "auto") if CUDA else ("tf32",):
    del CHANGES[key]
rung = Rung("float32")
RUNGS = {"float32": rung}
for key, (name, change) in CHANGES.items():
    RUNGS[key] = rung = replace(rung, name=f"+ {name}", **change)
eager = replace(rung, name="the last rung of ours without compile", compile=False)
shipped = replace(eager, name="as the lecture's repository ships it", dtype="bfloat16")
shipped = replace(shipped, logits=True, keep=False, attention=False)
RUNGS |= dict(eager=eager, shipped=shipped)
DEFAULT = tuple(RUNGS)
ours = replace(rung, name="train_gpt2.py", compile=CUDA)  # its default
half = replace(ours, name="the same, residual stream in bfloat16", dtype="bfloat16", residual=True)
compiled = replace(shipped, name=f"{shipped.name}, compiled", compile=True)
other = replace(ours, name="train_gpt2.py of --base")
RUNGS |= dict(compiled=compiled, ours=ours, residual=half, base=other)


@dataclass
class Options:
    model: Literal[*MODELS] = "gpt2" if CUDA else "small"
    batch: int = 16 if CUDA else 4  # sequences
    seq_len: int = 1024 if CUDA else 256  # tokens
    steps: int = 20 if CUDA else 5  # measured, after three that are not
    rounds: int = 2  # how often every rung runs, in turns; medians are over all
    data: Path | None = None  # shards to train on, to compare losses with the first row's
    rungs: tuple[Literal[*RUNGS], ...] = DEFAULT
    base: Path | None = None  # a checkout of another commit, for the rung of this name
    json: Path | None = None  # write all figures to this file
    child: str = ""  # internal: measure this rung and print JSON


returned = None  # the last logits


def forward_with_logits(model, idx, targets):
    """GPT.forward of the lecture, which returns the logits beside the loss. Here a global variable
    keeps them: torch.compile has to write them to memory, and they live until the next step."""
    global returned
    logits = GPT.forward(model, idx)  # (B, T, V)
    returned = logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def forward_in_bfloat16(model, idx, targets):
    """GPT.forward, but additions to the residual stream read and write half the bytes."""
    t = model.transformer
    x = t.wte(idx) + t.wpe(torch.arange(idx.size(1), device=idx.device))  # (B, T, C)
    x = x.to(torch.bfloat16)
    for block in t.h:
        x = block(x)
    logits = model.lm_head(t.ln_f(x))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build(rung, options, dtype):
    if rung.tf32:
        torch.set_float32_matmul_precision("high")
    # Otherwise bfloat16's attention without flash attention is computed in float32.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    torch.manual_seed(0)
    sizes = dict(block_size=max(1024, options.seq_len), vocab_size=rung.vocab_size)
    raw = GPT(GPTConfig(**sizes, **MODELS[options.model])).to(DEVICE)
    if rung.keep:
        # It replaces the attention if dtype is bfloat16, and the loss if the model is not compiled.
        kernels = dict(dtype=dtype if rung.attention else "float32", compile=rung.compile)
        train_gpt2.use_cpu_kernels(raw, train_gpt2.Args(**kernels))
    if rung.logits:
        raw.forward = partial(forward_with_logits, raw)
    if rung.residual:
        raw.forward = partial(forward_in_bfloat16, raw)
    optimizer = raw.configure_optimizers(0.1, 6e-4)
    for group in optimizer.param_groups:
        group.update(fused=rung.fused, foreach=False)
    return raw, optimizer, torch.compile(raw, dynamic=False) if rung.compile else raw


def random_batches(B, T):
    """A function of the step that returns one of four batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(50257, (B, T + 1), generator=generator).to(DEVICE) for _ in range(4)]
    return lambda step: [(made[step % 4][:, :-1], made[step % 4][:, 1:])]


def measure(rung, options):
    """Print one JSON line. The schedule of the learning rate is as long as the run."""
    dtype = train_gpt2.pick_dtype(rung.dtype, DEVICE)
    raw, optimizer, model = build(rung, options, dtype)
    autocast = torch.autocast(DEVICE.type, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == "float16")
    B, T, steps = options.batch, options.seq_len, 3 + options.steps
    args = train_gpt2.Args(seq_len=T, total_batch_size=B * T, data_dir=str(options.data))
    args = replace(args, max_steps=steps, warmup_steps=max(1, steps // 10))
    get_batch = random_batches(B, T)
    if options.data:
        get_batch = train_gpt2.prefetch(DataLoaderLite(args, "train", B, device=DEVICE))
    seconds, losses, validation = [], [], None
    with nullcontext() if rung.flash else sdpa_kernel(SDPBackend.MATH):
        for step in range(steps):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = train_gpt2.get_lr(step, args)
            batch = get_batch(step)
            result = train_gpt2.training_step(model, batch, optimizer, scaler, autocast, 1.0)
            losses.append(result[0].item())  # as in the training loop, this waits for the device
            seconds.append(time.perf_counter() - start)
        of_process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = torch.cuda.max_memory_allocated() if CUDA else of_process
        if options.data:
            loader = DataLoaderLite(args, "val", B, device=DEVICE)
            validation = train_gpt2.evaluate(raw, raw, loader, 2**20 if CUDA else 2**13, autocast)
    found = dict(seconds=seconds[3:], first=seconds[0], memory=memory)
    print(json.dumps(found | dict(losses=losses, validation=validation)))


def run_child(key, options, caches):
    """What measure() found, or None if it failed. Each rung has its own cache of compiled graphs,
    because rungs that differ in the attention's kernel alone would share them."""
    env = dict(TORCHINDUCTOR_CACHE_DIR=f"{caches}/{key}", PYTHONWARNINGS="ignore")
    env |= dict(PYTORCH_ALLOC_CONF="expandable_segments:True")  # as in train_gpt2.main
    if key == "base":
        env["LADDER_ROOT"] = str(options.base.resolve())
    command = [sys.executable, *sys.argv, "--child", key]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | env)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def print_table(found, options):
    """found: {key: [what measure() found]}."""
    columns = ["rung", "ms per step: median (min–max)", "first step, s", "tokens/s", "MFU"]
    columns += ["peak memory, GB", "× the rung before", "× the first"]
    if options.data:
        columns += ["mean losses of 100 steps", "largest difference of a loss", "validation loss"]
    o = options
    settings = f"Model {o.model}, B={o.batch}, T={o.seq_len}; {o.steps} steps after three"
    print(f"{heading(DEVICE)}. {settings}; rounds in turns: {o.rounds}.\n")
    print("|", " | ".join(columns), "|")
    print("|---|" + "---:|" * (len(columns) - 1))
    with torch.device("meta"):
        model = GPT(GPTConfig(**MODELS[options.model]))
    args = train_gpt2.Args(seq_len=options.seq_len, dtype="bfloat16")
    progress = train_gpt2.Progress(args, model, SimpleNamespace(device=DEVICE, world_size=1))
    rates = []
    for key, runs in found.items():
        ms = [1e3 * s for run in runs for s in run["seconds"]]
        rates.append(1e3 * options.batch * options.seq_len / statistics.median(ms))
        mfu = rates[-1] * progress.flops_per_token / progress.peak
        cells = [
            RUNGS[key].name,
            f"{statistics.median(ms):.1f} ({min(ms):.1f}–{max(ms):.1f})",
            f"{runs[0]['first']:.1f}",
            f"{rates[-1]:,.0f}",
            f"{mfu:.1%}" if mfu else "–",
            f"{max(run['memory'] for run in runs) / 1e9:.2f}",
            f"{rates[-1] / rates[-2]:.2f}" if len(rates) > 1 else "",
            f"{rates[-1] / rates[0]:.2f}",
        ]
        if options.data:
            losses = runs[0]["losses"]
            means = [statistics.mean(losses[i : i + 100]) for i in range(0, len(losses), 100)]
            first_row = next(iter(found.values()))[0]["losses"]
            difference = max(abs(a - b) for a, b in zip(losses, first_row))
            cells += [", ".join(f"{mean:.4f}" for mean in means), f"{difference:.1e}"]
            cells += [f"{runs[0]['validation']:.4f}"]
        print("|", " | ".join(cells), "|")


def main():
    options = tyro.cli(Options, description=__doc__)
    if options.child:
        return measure(RUNGS[options.child], options)
    found = {}
    try:
        with TemporaryDirectory() as caches:
            for key in options.rungs * options.rounds:
                print(key, "...", file=sys.stderr)
                if result := run_child(key, options, caches):
                    found.setdefault(key, []).append(result)
    finally:  # after Ctrl-C, too
        print_table(found, options)
    if options.json:
        facts = dict(date=str(date.today()), hardware=hardware(DEVICE), commit=commit(ROOT))
        facts |= dict(model=options.model, seq_len=options.seq_len)
        facts["rungs"] = {key: asdict(RUNGS[key]) | dict(runs=found[key]) for key in found}
        options.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
