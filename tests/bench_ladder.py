"""The lecture's ladder: what each optimization gives to one step of train_gpt2.py's own model and
code, on this device.

    python tests/bench_ladder.py                # CUDA: 124M, B=16, T=1024; CPU: a small model
    python tests/bench_ladder.py --batch auto   # the largest B that fits (CUDA)
    python tests/bench_ladder.py --model gpt2 --batch 4 --seq_len 512 --rungs shipped eager auto
    python tests/bench_ladder.py --accum 4 --rungs none late adamw casts  # what is not done
    python tests/bench_ladder.py --rungs ddp view static  # all GPUs; two processes on a CPU
    python tests/bench_ladder.py --rungs shipped compiled none  # the lecture's own form, and ours
    python tests/bench_ladder.py --data edu_fineweb10B --steps 47 --rounds 1 --rungs shipped auto
    python tests/bench_ladder.py --batch 64 --rungs none fa2 cudnn residual coordinate combo  # CUDA
    python tests/bench_ladder.py --rungs none --profile profile.md  # where the time goes
    python tests/bench_ladder.py --base DIR --rungs base eager  # DIR: a checkout of another commit

Prints a Markdown table; asserts nothing. Every rung is a process of its own, so that its peak
memory is its own, and the rungs take turns, `rounds` times, because machines are noisy. MFU is
relative to the peak in bfloat16 on each rung. "Shipped" is the form of the lecture's repository:
bfloat16, no compile, flash attention, vocabulary 50304, fused AdamW, logits of all positions in
float32, memory as the system manages it, and a synchronization in each step.
"""

import inspect
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from bench_hellaswag import commit, hardware, heading
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

ROOT = os.environ.get("LADDER_ROOT") or Path(__file__).resolve().parents[1]  # set for rung base
sys.path.insert(0, str(ROOT))  # in front of bench_hellaswag's
import train_gpt2  # noqa: E402
from train_gpt2 import (  # noqa: E402
    GPT,
    SIZES,
    DataLoaderLite,
    GPTConfig,
    get_lr,
    peak_flops,
    pick_device,
    training_step,
)


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
    logits: bool = True  # of all positions, returned beside the loss, which takes them as float32
    keep: bool = False  # train_gpt2.use_cpu_kernels: freed memory is kept, the loss unless compiled
    attention: bool = False  # and the attention for bfloat16
    late: bool = False  # a step never waits; its loss and norm are read after the next one began
    adamw: bool = False  # AdamW and clipping compiled
    casts: bool = False  # one autocast around all micro-steps: weights are cast once per step
    ddp: dict | None = None  # arguments of DDP, with one process per GPU; two on a CPU
    kernel: str = ""  # of attention, an SDPBackend, instead of PyTorch's choice
    option: str = ""  # one of torch.compile's options, which is turned on
    residual: bool = False  # the residual stream in bfloat16


def ladder(cuda):
    """{key: Rung}. Each has one change more than the one before; the last ones are variants."""
    changes = {
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
    for key in ("keep", "attention", "auto") if cuda else ("tf32",):
        del changes[key]
    rung = Rung("float32")
    rungs = {"float32": rung}
    for key, (name, change) in changes.items():
        rungs[key] = rung = replace(rung, name=f"+ {name}", **change)
    if cuda:
        mode = "max-autotune-no-cudagraphs"
        rungs["autotune"] = replace(rung, name=f"the same, {mode}", mode=mode)
    eager = replace(rung, name="the last rung of ours without compile", compile=False)
    shipped = replace(eager, name="as the lecture's repository ships it", dtype="bfloat16")
    shipped = replace(shipped, logits=True, keep=False, attention=False)
    return rungs | dict(eager=eager, shipped=shipped)


def candidates(cuda, base):
    """{key: Rung} of what train_gpt2.py does not do, measured only on request: the last rung of the
    ladder, with one change each."""
    rung = replace(ladder(cuda)["loss" if cuda else "auto"], compile=cuda)
    lecture = dict(dtype="bfloat16", logits=True, keep=False, attention=False, compile=True)
    changes = {
        "none": ("without any candidate", {}),
        "compiled": ("as the lecture's repository ships it, compiled", lecture),
        "late": ("no wait within a step, loss and norm read a step late", dict(late=True)),
        "adamw": ("AdamW and clipping compiled", dict(adamw=True)),
        "casts": ("weights cast once per step, no compile", dict(casts=True, compile=False)),
        "ddp": ("DDP", dict(ddp={})),
        "view": ("DDP, gradients in its buckets", dict(ddp=dict(gradient_as_bucket_view=True))),
        "static": ("DDP, static graph", dict(ddp=dict(static_graph=True))),
        "fa2": ("FlashAttention-2", dict(kernel="FLASH_ATTENTION")),
        "residual": ("residual stream in bfloat16", dict(residual=True, dtype="bfloat16")),
        "coordinate": ("coordinate descent", dict(option="coordinate_descent_tuning")),
        "combo": ("combo kernels", dict(option="combo_kernels")),
    }
    if cuda:
        changes["cudnn"] = ("cuDNN's attention", dict(kernel="CUDNN_ATTENTION"))
    else:
        changes["flash_cpu"] = ("flash attention", dict(attention=False, dtype="bfloat16"))
    if base:
        name = f"the step of {commit(base) or base}, no compile"
        changes["base"] = (name, dict(compile=False))
    return {key: replace(rung, name=name, **change) for key, (name, change) in changes.items()}


CUDA = torch.cuda.is_available()


@dataclass
class Options:
    model: Literal["small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = (
        "gpt2" if CUDA else "small"
    )
    batch: int | Literal["auto"] = 16 if CUDA else 4  # sequences
    seq_len: int = 1024 if CUDA else 256  # tokens
    steps: int = 20 if CUDA else 5  # measured, after three that are not
    rounds: int = 2  # how often every rung runs, in turns; medians are over all
    accum: int = 1  # micro-steps per step
    data: Path | None = None  # shards to train on, to compare losses with the first row's
    rungs: tuple[str, ...] = ()  # keys of ladder() and candidates(); default: all of the ladder
    base: Path | None = None  # a checkout of another commit: its default step is the rung `base`
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    json: Path | None = None  # write all figures to this file
    profile: Path | None = None  # write a table of where three more steps spend their time
    child: str = ""  # internal: measure this rung and print JSON


# One rung, in a process of its own ------------------------------------------------------------


returned = None  # the last logits


def forward_with_logits(model, idx, targets):
    """GPT.forward of the lecture, which returns the logits beside the loss. Here a global variable
    keeps them: torch.compile has to write them to memory, and they live until the next step."""
    global returned
    logits = GPT.forward(model, idx)  # (B, T, V)
    returned = logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def use_cpu_kernels(rung, model, dtype):
    """train_gpt2.use_cpu_kernels, or only its part that keeps freed memory."""
    if not hasattr(train_gpt2, "use_cpu_kernels"):  # an older commit, which has them built in
        names = ("use_cpu_well", "keep_freed_memory", "use_well")
        name = next(name for name in names if hasattr(train_gpt2, name))
        arguments = [torch.device("cpu")] if name == "use_well" else []
        return getattr(train_gpt2, name)(*arguments)
    # It replaces the attention if dtype is bfloat16, and the loss if the model is not compiled.
    dtype = dtype if rung.attention else "float32"
    compiled = rung.compile or rung.logits
    train_gpt2.use_cpu_kernels(model, train_gpt2.Args(dtype=dtype, compile=compiled))


def never_wait(optimizer):
    """training_step waits for the norm, to skip a step whose gradient is not finite. With this it
    does not: fused AdamW looks at found_inf on the device."""
    clip = torch.nn.utils.clip_grad_norm_

    def clip_without_waiting(params, most):
        norm = clip(params, most)
        optimizer.grad_scale = None
        optimizer.found_inf = (~norm.isfinite()).float()
        norm.isfinite = lambda: True
        return norm

    torch.nn.utils.clip_grad_norm_ = clip_without_waiting


def build(rung, options, device, dtype):
    if hasattr(train_gpt2, "prepare_process"):
        train_gpt2.prepare_process()
    elif device.type == "cuda":  # an older commit
        train_gpt2.use_well(device)
    if rung.tf32:
        torch.set_float32_matmul_precision("high")
    # Otherwise bfloat16's attention without flash attention is computed in float32.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    torch.manual_seed(0)
    shape = SIZES.get(options.model, dict(n_layer=4, n_head=4, n_embd=256))
    raw = GPT(GPTConfig(max(1024, options.seq_len), rung.vocab_size, **shape)).to(device)
    if rung.keep and device.type == "cpu":
        use_cpu_kernels(rung, raw, dtype)
    if rung.logits:
        raw.forward = partial(forward_with_logits, raw)
    optimizer = raw.configure_optimizers(0.1, 6e-4)
    if rung.adamw or not rung.fused:
        form = dict(fused=False, foreach=rung.adamw, capturable=rung.adamw)
        groups = [group | form for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, **form)
    if rung.adamw:
        for group in optimizer.param_groups:  # a number would be compiled in
            group["lr"] = torch.tensor(0.0, device=device)
        optimizer.step = torch.compile(optimizer.step)
        clip = torch.compile(torch.nn.utils.clip_grad_norm_)
        torch.nn.utils.clip_grad_norm_ = lambda params, most: clip(list(params), most)
    if rung.late:
        never_wait(optimizer)
    if rung.residual:
        raw.transformer.h[0].register_forward_pre_hook(lambda h, args: (args[0].bfloat16(),))
    # torch.compile takes a mode or options.
    how = dict(options={rung.option: True}) if rung.option else dict(mode=rung.mode)
    model = torch.compile(raw, dynamic=False, **how) if rung.compile else raw
    if rung.ddp is not None:
        model = DistributedDataParallel(model, **rung.ddp)
    return raw, optimizer, model


def make_scaler(dtype, device):
    if hasattr(train_gpt2, "make_scaler"):  # some older commits
        return train_gpt2.make_scaler(dtype, device)
    return torch.amp.GradScaler(device.type, enabled=dtype == "float16")


def busiest(profiler, device):
    """Markdown: the twenty kernels, on a CPU operations, that take most of the device's time."""
    name = device.type.upper()
    events = [e for e in profiler.key_averages() if e.device_type.name == name]
    times = {
        e: e.self_device_time_total if name == "CUDA" else e.self_cpu_time_total
        for e in events
        if not e.is_user_annotation
    }
    lines = ["| what | calls | ms | share |", "|---|---:|---:|---:|"]
    for e in sorted(times, key=times.get, reverse=True)[:20]:
        share = times[e] / sum(times.values())
        lines.append(f"| `{e.key[:90]}` | {e.count} | {times[e] / 1e3:.1f} | {share:.1%} |")
    return "\n".join(lines)


def measure(rung, options):
    """One JSON line: seconds of each step, losses, peak bytes, floating point operations per
    token."""
    device = pick_device(options.device, int(os.environ.get("LOCAL_RANK", 0)))
    if rung.ddp is not None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = str(train_gpt2.pick_dtype(rung.dtype, device)).removeprefix("torch.")  # was no str once
    raw, optimizer, model = build(rung, options, device, dtype)
    autocast = torch.autocast(device.type, getattr(torch, dtype), dtype != "float32")
    scaler = make_scaler(dtype, device)
    # In older commits, the number of micro-batches was an argument of training_step.
    older = len(inspect.signature(training_step).parameters) == 7
    count = [options.accum] if older else []
    kernel = getattr(SDPBackend, rung.kernel if rung.flash else "MATH", None)
    kernels = nullcontext if kernel is None else partial(sdpa_kernel, kernel)
    B, T, accum = options.batch, options.seq_len, options.accum
    recipe = train_gpt2.Args() if hasattr(train_gpt2, "Args") else train_gpt2.Config()
    if B == "auto":
        with kernels():
            B = train_gpt2.pick_micro_batch_size(replace(recipe, seq_len=T), raw, 1, autocast)
    if options.data:
        args = replace(recipe, data_dir=str(options.data), seq_len=T)
        args = replace(args, total_batch_size=B * T * accum)
        get_batches = train_gpt2.prefetch(DataLoaderLite(args, "train", B, device=device))
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(50257, (B, T + 1), generator=generator) for _ in range(4 * accum)]
    made = [(tokens[:, :-1], tokens[:, 1:]) for tokens in (t.to(device) for t in made)]
    inner, outer = (nullcontext(), autocast) if rung.casts else (autocast, nullcontext())
    seconds, losses, unread = [], [], []
    torch.get_device_module(device).synchronize()
    start = time.perf_counter()
    with kernels():
        for step in range(3 + options.steps):
            first = step * accum % len(made)
            batches = get_batches(step) if options.data else made[first : first + accum]
            lr = get_lr(step, recipe)
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].fill_(lr) if rung.adamw else lr
            with outer:
                result = training_step(model, batches, *count, optimizer, scaler, inner, 1.0)
            unread.append(result)
            while len(unread) > (rung.late and step < options.steps + 2):
                loss, norm = unread.pop(0)
                losses.append(loss.item())  # as in the training loop, this waits for the device
                norm.item()
            end = time.perf_counter()
            seconds.append(end - start)
            start = end
    if options.profile:
        with kernels(), torch.profiler.profile() as profiler:
            for _ in range(3):
                training_step(model, made[:accum], *count, optimizer, scaler, inner, 1.0)
            torch.get_device_module(device).synchronize()
        options.profile.write_text(busiest(profiler, device) + "\n")
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if rung.ddp is not None:
        dist.destroy_process_group()
        if int(os.environ["RANK"]):
            return
    found = dict(seconds=seconds[3:], first=seconds[0], losses=losses, memory=memory, B=B)
    if hasattr(train_gpt2, "flops_per_token"):  # it was a method once
        found["flops"] = train_gpt2.flops_per_token(raw, T)
    else:
        found["flops"] = raw.flops_per_token(T)
    print(json.dumps(found))


# All rungs, in turns, and the table -----------------------------------------------------------


def run_child(key, rung, options, processes, caches):
    """What measure() found, or None if it failed. Each rung keeps its compiled graphs in a folder
    of its own in `caches`: to PyTorch's cache, rungs that differ in the attention's kernel alone
    are the same, and the second would get the first one's graph."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(command if rung.ddp is not None else []), *sys.argv]
    env = os.environ | {"PYTHONWARNINGS": "ignore"}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(Path(caches) / key)
    if key == "base":
        env["LADDER_ROOT"] = str(options.base.resolve())
    done = subprocess.run([*command, "--child", key], stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"\n{key} failed; see its message above", file=sys.stderr)


def print_table(rungs, found, options, device, processes):
    """rungs: {key: Rung}. found: {key: [what measure() found]}."""
    columns = ["rung", "B", "ms per step: median (min–max)", "first step, s", "tokens/s", "MFU"]
    columns += ["peak memory, GB", "× the rung before", "× the first"]
    if options.data:
        columns += ["last loss", "largest difference of a loss from the first row's"]
    no_tf32 = "" if device.type == "cuda" else " TF32 does not exist here."
    print(
        f"{heading(device)}. Model {options.model}, T={options.seq_len}; micro-steps per step: "
        f"{options.accum}; steps: {options.steps} after three; rounds in turns: {options.rounds}."
        f"{no_tf32}\n"
    )
    print("|", " | ".join(columns), "|")
    print("|---|" + "---:|" * (len(columns) - 1))
    peak, rates, reference = peak_flops(device), [], None
    for key, rung in rungs.items():
        runs = found[key]
        if not runs:
            print("|", " | ".join([rung.name, "no result"] + [""] * (len(columns) - 2)), "|")
            continue
        ms = [1e3 * s for run in runs for s in run["seconds"]]
        devices = 1 if rung.ddp is None else processes
        tokens = runs[0]["B"] * options.seq_len * options.accum * devices
        rates.append(1e3 * tokens / statistics.median(ms))
        cells = [
            rung.name,
            f"{runs[0]['B']}",
            f"{statistics.median(ms):.1f} ({min(ms):.1f}–{max(ms):.1f})",
            f"{runs[0]['first']:.1f}",
            f"{rates[-1]:,.0f}",
            f"{rates[-1] * runs[0]['flops'] / (peak * devices):.1%}" if peak else "–",
            f"{max(run['memory'] for run in runs) / 1e9:.2f}",
            f"{rates[-1] / rates[-2]:.2f}" if len(rates) > 1 else "",
            f"{rates[-1] / rates[0]:.2f}",
        ]
        if options.data:
            losses = runs[0]["losses"]
            reference = reference or (rung, losses)
            difference = max(abs(a - b) for a, b in zip(losses, reference[1]))
            same = rung.vocab_size == reference[0].vocab_size  # else other weights to begin with
            cells += [f"{losses[-1]:.4f}", f"{difference:.1e}" if same else "–"]
        print("|", " | ".join(cells), "|")


def main():
    options = tyro.cli(Options, description=__doc__)
    device = pick_device(options.device)
    usual = ladder(device.type == "cuda")
    rungs = usual | candidates(device.type == "cuda", options.base)
    if unknown := set(options.rungs) - set(rungs):
        sys.exit(f"--rungs {' '.join(sorted(unknown))}: choose from {' '.join(rungs)}")
    keys = options.rungs or (*usual, *["base"] * bool(options.base))
    special = options.batch == "auto" or options.data
    if any(rungs[key].ddp is not None for key in keys) and (special or options.accum > 1):
        sys.exit("the rungs of DDP need a number for --batch, --accum 1, and no --data")
    if "base" in keys and special:
        sys.exit("the rung base needs a number for --batch, and no --data")
    if options.child:
        return measure(rungs[options.child], options)
    processes = torch.cuda.device_count() if device.type == "cuda" else 2
    found = {key: [] for key in keys}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    # After an interrupt, the table shows what was measured before.
    with suppress(KeyboardInterrupt), TemporaryDirectory() as caches:
        for round in range(1, options.rounds + 1):
            for key in keys:
                line = f"\rround {round}/{options.rounds}: {key}          "
                print(line, end="", file=sys.stderr, flush=True)
                if result := run_child(key, rungs[key], options, processes, caches):
                    found[key].append(result)
    print(file=sys.stderr)
    rungs = {key: rungs[key] for key in keys}
    print_table(rungs, found, options, device, processes)
    if options.json:
        facts = dict(date=str(date.today()), hardware=hardware(device), torch=torch.__version__)
        facts |= dict(commit=commit(ROOT), model=options.model, seq_len=options.seq_len)
        facts["rungs"] = {key: asdict(rungs[key]) | dict(runs=found[key]) for key in keys}
        options.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
