"""
The lecture's ladder: what each optimization gives to one step of train_gpt2.py's own model and code, on this device.

    python tests/bench_ladder.py                                    # CUDA: 124M, B=16, T=1024; CPU: a small model
    python tests/bench_ladder.py --model gpt2 --batch 4 --seq_len 512 --rungs shipped eager auto   # 124M on a CPU
    python tests/bench_ladder.py --batch auto                       # the largest B that fits (CUDA)
    python tests/bench_ladder.py --accum 4 --rungs none late adamw casts       # what train_gpt2.py does not do
    python tests/bench_ladder.py --rungs ddp view static                       # all GPUs; two processes on a CPU
    python tests/bench_ladder.py --data edu_fineweb10B --steps 47 --rounds 1 --rungs shipped auto  # loss curves over 50 steps

Prints a Markdown table. Every rung is a process of its own, so that its peak memory is its own, and all rungs take turns, `rounds` times,
because machines are noisy. "Shipped" is the form of the lecture's repository: bfloat16, eager, flash attention, vocabulary 50304, fused
AdamW, logits of all positions in float32, memory as the system manages it, and a synchronisation in each step.
"""

import json
import os
import platform
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
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt2  # noqa: E402
from bench_hellaswag import hardware  # noqa: E402
from train_gpt2 import (
    GPT,
    SIZES,
    DataLoaderLite,
    GPTConfig,
    get_lr,
    peak_flops,
    pick_device,
    synchronize,
    training_step,
)  # noqa: E402


@dataclass(frozen=True)
class Rung:
    name: str
    tf32: bool = False
    dtype: str = "float32"  # or "auto": what train_gpt2.py takes
    compile: bool = False
    mode: str = "default"  # of torch.compile
    flash: bool = False
    vocab_size: int = 50257
    fused: bool = False
    logits: bool = True  # of all positions, returned, as float32 in the loss
    keep: bool = False  # keep_freed_memory, CPU only
    plain: bool = False  # plain attention where train_gpt2.causal_attention prefers it, CPU only
    late: bool = False  # loss and norm of a step are read when the next one has been launched
    adamw: bool = False  # AdamW and clipping compiled
    casts: bool = False  # one autocast around all micro-steps, so that weights are cast once a step (eager mode)
    ddp: dict | None = (
        None  # two processes or as many as there are GPUs; arguments of DistributedDataParallel
    )


def ladder(cuda):
    """[(key, Rung)], each with one change more than the one before, then those that stand beside it."""
    rung = Rung("float32")
    rungs = [("float32", rung)]
    elsewhere = ("keep", "plain", "auto") if cuda else ("tf32",)
    for key, name, change in [
        ("tf32", "TF32", dict(tf32=True)), ("bfloat16", "bfloat16", dict(dtype="bfloat16")), ("compile", "torch.compile", dict(compile=True)),
        ("flash", "flash attention", dict(flash=True)), ("vocab", "vocabulary 50304", dict(vocab_size=50304)),
        ("fused", "fused AdamW", dict(fused=True)), ("loss", "no logits returned", dict(logits=False)),
        ("keep", "freed memory kept (CPU)", dict(keep=True)), ("plain", "plain attention (CPU)", dict(plain=True)),
        ("auto", "float32 where it is faster than bfloat16 (CPU)", dict(dtype="auto")),
    ]:  # fmt: skip
        if key not in elsewhere:
            rung = replace(rung, name="+ " + name, **change)
            rungs.append((key, rung))
    if cuda:
        rungs.append(
            (
                "autotune",
                replace(
                    rung,
                    name="the same, max-autotune-no-cudagraphs",
                    mode="max-autotune-no-cudagraphs",
                ),
            )
        )
    eager = replace(rung, name="the last rung of ours without compile", compile=False)
    shipped = replace(
        eager,
        name="as the lecture's repository ships it",
        logits=True,
        keep=False,
        plain=False,
        dtype="bfloat16",
    )
    return rungs + [("eager", eager), ("shipped", shipped)]


def candidates(cuda):
    """[(key, Rung)] of what train_gpt2.py does not do, measured only if asked for: the last rung of ours, and one change each."""
    rung = replace(dict(ladder(cuda))["auto" if not cuda else "loss"], compile=cuda)
    pairs = [("none", "without any candidate", {}), ("late", "loss and norm read a step late", dict(late=True)),
             ("adamw", "AdamW and clipping compiled", dict(adamw=True)), ("casts", "without compile, weights cast once a step", dict(casts=True, compile=False)),
             ("ddp", "DDP", dict(ddp={})), ("view", "DDP, gradients in its buckets", dict(ddp=dict(gradient_as_bucket_view=True))),
             ("static", "DDP, static graph", dict(ddp=dict(static_graph=True)))]  # fmt: skip
    if not cuda:
        pairs.append(("flash_cpu", "flash attention", dict(plain=False, dtype="bfloat16")))
    return [(key, replace(rung, name=name, **change)) for key, name, change in pairs]


@dataclass
class Options:
    model: Literal["small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = (
        "gpt2" if torch.cuda.is_available() else "small"
    )
    batch: int | Literal["auto"] = 16 if torch.cuda.is_available() else 4  # sequences
    seq_len: int = 1024 if torch.cuda.is_available() else 256  # tokens
    steps: int = 20 if torch.cuda.is_available() else 5  # measured, after three that are not
    rounds: int = 2  # times that every rung runs, in turns; medians are over all
    accum: int = 1  # micro-steps of a step
    data: Path | None = (
        None  # train on these shards, and compare the losses with the first row's; made tokens unless given
    )
    rungs: tuple[
        str, ...
    ] = ()  # keys of ladder() and candidates(), in the table's order; all of the ladder unless given
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    json: Path | None = None  # write all figures to this file
    child: str = ""  # internal: measure this rung and print JSON


def build(rung, options, device):
    if rung.tf32:
        torch.set_float32_matmul_precision("high")
    if rung.keep:
        train_gpt2.keep_freed_memory()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(
        True
    )  # else bfloat16's attention without flash is done in float32
    if not rung.plain:
        train_gpt2.causal_attention = partial(F.scaled_dot_product_attention, is_causal=True)
    torch.manual_seed(0)
    shape = SIZES.get(options.model, dict(n_layer=4, n_head=4, n_embd=256))
    raw = GPT(GPTConfig(max(1024, options.seq_len), rung.vocab_size, **shape)).to(device)
    optimizer = raw.configure_optimizers(0.1, 6e-4)
    if not rung.fused:
        optimizer = torch.optim.AdamW(
            optimizer.param_groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False
        )
        for group in optimizer.param_groups:
            group.update(fused=False)
    if rung.adamw:  # a compiled step wants the form that it can see through
        for group in optimizer.param_groups:
            group.update(
                fused=False, foreach=True, capturable=True, lr=torch.tensor(0.0, device=device)
            )  # a number would be compiled in
        optimizer.step = torch.compile(optimizer.step)
        train_gpt2.nn.utils.clip_grad_norm_ = torch.compile(train_gpt2.nn.utils.clip_grad_norm_)
    model = torch.compile(raw, dynamic=False, mode=rung.mode) if rung.compile else raw
    if rung.ddp is not None:
        model = DistributedDataParallel(model, **rung.ddp)

    def with_logits(x, y, return_logits):
        return model(x, y)

    return raw, optimizer, with_logits if rung.logits else model


def measure(rung, options):
    """One JSON line: seconds of each step, losses, peak bytes, floating point operations a token."""
    device = pick_device(options.device, int(os.environ.get("LOCAL_RANK", 0)))
    if rung.ddp is not None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    raw, optimizer, model = build(rung, options, device)
    dtype = train_gpt2.pick_dtype(rung.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    B, attention = (
        options.batch,
        nullcontext if rung.flash else partial(sdpa_kernel, SDPBackend.MATH),
    )
    if B == "auto":
        config = train_gpt2.Config(seq_len=options.seq_len, total_batch_size=2**19)
        with attention():
            B = train_gpt2.pick_micro_batch_size(model, raw, optimizer, config, 1, autocast, device)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    recipe = train_gpt2.Config()
    if options.data:
        loader = DataLoaderLite(options.data, "train", B, options.seq_len, B * options.seq_len * options.accum, shuffle=True,
                                seed=recipe.seed, pin_memory=device.type == "cuda")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randint(50257, (B, options.seq_len + 1), generator=generator).to(device)
        for _ in range(4 * options.accum)
    ]
    made = [(tokens[:, :-1], tokens[:, 1:]) for tokens in made]
    inner, outer = (nullcontext(), autocast) if rung.casts else (autocast, nullcontext())
    seconds, losses, unread = [], [], []
    synchronize(device)
    start = time.perf_counter()
    with attention():
        for step in range(3 + options.steps):
            first = step * options.accum % len(made)
            now = (
                loader.batches(step, device)
                if options.data
                else made[first : first + options.accum]
            )
            for group in optimizer.param_groups:
                lr = get_lr(step, recipe)
                group["lr"] = group["lr"].fill_(lr) if rung.adamw else lr
            with outer:
                unread.append(
                    training_step(model, now, options.accum, optimizer, scaler, inner, 1.0)
                )
            while len(unread) > (rung.late and step < options.steps + 2):
                loss, norm = unread.pop(0)
                losses.append(loss.item())  # as in the loop: a synchronisation
                norm.item()
            end = time.perf_counter()
            seconds.append(end - start)
            start = end
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    if rung.ddp is not None:
        dist.destroy_process_group()
        if int(os.environ["RANK"]):
            return
    print(json.dumps(dict(seconds=seconds[3:], first=seconds[0], losses=losses, memory=memory, B=B,
                          flops=raw.flops_per_token(options.seq_len))))  # fmt: skip


def main():
    options = tyro.cli(Options, description=__doc__)
    device = pick_device(options.device)
    rungs = dict(ladder(device.type == "cuda") + candidates(device.type == "cuda"))
    if unknown := set(options.rungs) - set(rungs):
        sys.exit(f"--rungs {' '.join(sorted(unknown))}: choose from {' '.join(rungs)}")
    if any(rungs[key].ddp is not None for key in options.rungs) and (
        options.batch == "auto" or options.accum > 1 or options.data
    ):
        sys.exit(
            "the rungs of DDP take one micro-step, --accum 1, of a --batch that is a number, without --data"
        )
    if options.child:
        return measure(rungs[options.child], options)
    keys = options.rungs or tuple(key for key, _ in ladder(device.type == "cuda"))
    processes = torch.cuda.device_count() if device.type == "cuda" else 2
    found = {key: [] for key in keys}
    for round in range(options.rounds):
        for key in keys:
            print(
                f"\rround {round + 1}/{options.rounds}: {key}          ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            torchrun = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
            ]
            launcher = [] if rungs[key].ddp is None else torchrun
            done = subprocess.run([sys.executable, *launcher, *sys.argv, "--child", key], stdout=subprocess.PIPE, text=True,
                                  env=os.environ | {"PYTHONWARNINGS": "ignore"})  # fmt: skip
            if done.returncode == 0:
                found[key].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                print(f"\n{key} failed: its message stands above", file=sys.stderr)
    print(file=sys.stderr)
    peak = peak_flops(device)
    print(f"{date.today()}; {hardware(device)}; torch {torch.__version__}, Python {platform.python_version()}. Model {options.model}, "
          f"T={options.seq_len}; {options.steps} steps after three, {options.rounds} rounds in turns.\n")  # fmt: skip
    if device.type != "cuda":
        print("TF32 does not exist here.\n")
    print("| rung | B | ms a step: median (min–max) | first step, s | tokens/s | MFU | peak memory, GB | × the rung before | × the first |"
          + (" last loss | largest difference of a loss from the first row's |" if options.data else ""))  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|" + ("---:|---:|" if options.data else ""))
    rates, reference = [], None
    for key in keys:
        runs = found[key]
        if not runs:
            print(f"| {rungs[key].name} | failed |" + " |" * (9 if options.data else 7))
            continue
        ms = [1e3 * s for run in runs for s in run["seconds"]]
        devices = 1 if rungs[key].ddp is None else processes
        tokens = runs[0]["B"] * options.seq_len * options.accum * devices
        rates.append(1e3 * tokens / statistics.median(ms))
        mfu = f"{rates[-1] * runs[0]['flops'] / (peak * devices):.1%}" if peak else "–"
        before = f"{rates[-1] / rates[-2]:.2f}" if len(rates) > 1 else ""
        print(f"| {rungs[key].name} | {runs[0]['B']} | {statistics.median(ms):.1f} ({min(ms):.1f}–{max(ms):.1f}) | "
              f"{runs[0]['first']:.1f} | {rates[-1]:,.0f} | {mfu} | {max(r['memory'] for r in runs) / 1e9:.2f} | {before} | "
              f"{rates[-1] / rates[0]:.2f} |", end="")  # fmt: skip
        if options.data:
            losses, reference = runs[0]["losses"], reference or (key, runs[0]["losses"])
            same = (
                rungs[key].vocab_size == rungs[reference[0]].vocab_size
            )  # else the weights begin differently
            difference = max(abs(a - b) for a, b in zip(losses, reference[1]))
            print(f" {losses[-1]:.4f} | {f'{difference:.1e}' if same else '–'} |", end="")
        print()
    if options.json:
        options.json.write_text(json.dumps(dict(
            date=str(date.today()), hardware=hardware(device), torch=torch.__version__, model=options.model, seq_len=options.seq_len,
            rungs={key: dict(asdict(rungs[key]), runs=found[key]) for key in keys}), indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
