"""The GPU paths as far as a machine without a GPU can show them: compiled DDP, the collectives of 8
ranks, a training step on fake CUDA tensors, and what a run sets up before it begins. test_8 counts
the compiled graphs; test_cuda.py needs a GPU."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, log_of, train, write_shards

import train_gpt2
from fineweb import UserError
from train_gpt2 import (
    Args,
    bfloat16_is_faster,
    check_device,
    init_distributed,
    newest_checkpoint,
    parse,
    pick_device,
    pick_dtype,
    pick_micro_batch_size,
    prefetch,
    prepare_process,
    use_cpu_kernels,
    why_no_cuda,
)

# The CPU's kernels, torch.compile and DDP all compute the same -----------------------------------


def small_run(rank, world_size, folder, name, dtype, compiled, kernels):
    """train() itself, in this process, with or without the CPU's kernels. Writes to the folder the
    gradients of the first step, and how many graphs each validation and each step compiled."""
    if world_size > 1:
        store = dict(init_method=f"file://{folder}/{name}.store", rank=rank, world_size=world_size)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        dist.init_process_group("gloo", **store)
    graphs, made, gradients = [], [], []
    real_compile, real_ddp, real_step = torch.compile, train_gpt2.DDP, train_gpt2.training_step

    class SmallBuckets(real_ddp):
        def __init__(self, model, **flags):
            super().__init__(model, bucket_cap_mb=1, **flags)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(model, **flags):
        return real_compile(model, backend=backend, fullgraph=True, **flags)

    def step(model, *args):
        before = len(graphs)
        result = real_step(model, *args)
        made.append((before - sum(map(sum, made)), len(graphs) - before))
        if not gradients:
            gradients.extend(p.grad.clone() for p in model.parameters())
        return result

    shape = dict(n_layer=4, n_head=2, n_embd=128, seq_len=32, block_size=32)
    batch = dict(total_batch_size=256, micro_batch_size=2, max_steps=3, warmup_steps=1)
    often = dict(val_every=1, val_tokens=224, hellaswag_every=0, sample_every=0, save_every=0)
    where = dict(device="cpu", data_dir=f"{folder}/shards", out_dir=f"{folder}/{name}")
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile)
        patch.setattr(train_gpt2, "DDP", SmallBuckets)
        patch.setattr(train_gpt2, "training_step", step)
        patch.setattr(train_gpt2, "catch_stop_signals", lambda: None)
        # The kernels work in parts, which are smaller than this model's 32 queries and 64 tokens.
        patch.setattr(train_gpt2.cpu_attention, "__defaults__", (12,))
        patch.setattr(train_gpt2.CPUCrossEntropy, "ROWS", 24)
        if not kernels:
            patch.setattr(train_gpt2, "use_cpu_kernels", lambda model, args: None)
        train_gpt2.train(Args(**shape, **batch, **often, **where, dtype=dtype, compile=compiled))
    if rank == 0:
        torch.save(gradients, folder / f"{name}.gradients")
    (folder / f"{name}.graphs{rank}").write_text(json.dumps(made))


def ddp_worker(rank, folder, dtype):
    for compiled in (False, True):
        small_run(rank, 2, folder, f"ddp_{compiled}", dtype, compiled, kernels=True)


@pytest.mark.faults
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_compiled_ddp_and_cpu_kernels_equal_the_plain_form(tmp_path, dtype, tolerance):
    """Losses, norms and gradients. Compiled DDP is cut into buckets, and compiled only once; the
    last micro-batch of validation has fewer sequences."""
    write_shards(tmp_path / "shards")
    small_run(0, 1, tmp_path, "plain", dtype, compiled=False, kernels=False)
    small_run(0, 1, tmp_path, "kernels", dtype, compiled=False, kernels=True)
    small_run(0, 1, tmp_path, "compiled", dtype, compiled=True, kernels=True)
    mp.spawn(ddp_worker, (tmp_path, dtype), nprocs=2)
    plain, gradients = log_of(tmp_path / "plain"), torch.load(tmp_path / "plain.gradients")
    for name in ("kernels", "compiled", "ddp_False", "ddp_True"):
        log = log_of(tmp_path / name)
        for stream in ("train", "val", "norm"):
            assert log[stream] == pytest.approx(plain[stream], rel=tolerance), (name, stream)
        found = torch.load(tmp_path / f"{name}.gradients")
        assert len(found) == len(gradients) == 4 * 12 + 4
        for i, (gradient, expected) in enumerate(zip(found, gradients)):
            difference = (gradient - expected).norm()
            assert difference <= tolerance * expected.norm(), (name, i)
    made, other = (json.loads((tmp_path / f"ddp_True.graphs{i}").read_text()) for i in (0, 1))
    assert made == other and made[1:] == [[0, 0]] * 2
    validation, training = made[0]
    assert validation == 1 and training > 1  # cut, so that buckets travel while it computes


# All ranks issue the same collectives in the same order; otherwise NCCL would wait forever -------


class Rank:
    """What one rank of 8 does in a run. Its process group is a pretended one.

    calls: the collectives that it issues. buckets: for each step, the sizes of the buckets that DDP
    averages. evaluated: what it did besides training, with the step. signals: what the exit status
    is made of."""

    def __init__(self, rank, folder, shards):
        self.rank, self.out_dir, self.shards = rank, folder / str(rank), shards
        self.calls, self.buckets, self.evaluated, self.signals = [], [], [], []

    def train(self, others=None, signal_to=None, bad_step=None, checkpoint=None, **flags):
        """others: a function of what this rank says in all_gather_object, to what the others say.
        signal_to: the rank that receives SIGUSR1 in step 2. bad_step: where a gradient is NaN."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        asking = []  # not empty during stop_requested()
        real_init, real_step = dist.init_process_group, train_gpt2.training_step
        real_stop_requested = train_gpt2.Run.stop_requested

        def step(*args):
            self.buckets.append([])
            if signal_to == self.rank and len(self.buckets) == 3:
                train_gpt2.stop_signals.append(10)
            return real_step(*args)

        def stop_requested(run):
            asking.append(True)
            stop = real_stop_requested(run)
            asking.pop()
            return stop

        def all_reduce(x, op=dist.ReduceOp.SUM):  # the other ranks have zeros
            self.calls.append(("stop?" if asking else "all_reduce", tuple(x.shape), op))
            if asking and signal_to not in (None, self.rank) and len(self.buckets) == 3:
                x += 1

        def broadcast(x, source):
            self.calls.append(("broadcast", source))

        def gather(values, own):
            self.calls.append(("all_gather_object",))
            values[:] = [others(own) if others else own] * 8
            values[self.rank] = own

        def hook(state, bucket):  # instead of an all-reduce, which this group cannot do
            self.buckets[-1].append(bucket.buffer().numel())
            if len(self.buckets) - 1 == bad_step:
                bucket.buffer()[0] = torch.nan
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        class Recorded(train_gpt2.DDP):
            def __init__(self, model, **flags):
                super().__init__(model, **flags)
                self.register_comm_hook(None, hook)

        def noted(name, function):
            def call(*args):
                self.evaluated.append((name, len(self.buckets)))
                return function(*args)

            return call

        shape = dict(n_layer=1, n_head=1, n_embd=8, seq_len=32, block_size=64)
        batch = dict(total_batch_size=1024, micro_batch_size=2, warmup_steps=1)
        often = dict(val_every=2, val_tokens=640, hellaswag_every=0, sample_every=2, save_every=2)
        rest = dict(sample_tokens=2, device="cpu", dtype="float32", data_dir=str(self.shards))
        args = Args(**shape | batch | often | rest | flags, out_dir=str(self.out_dir))

        def fake_group(*args, **flags):
            real_init("fake", rank=self.rank, world_size=8, store=FakeStore())

        try:
            with pytest.MonkeyPatch.context() as patch:
                for key in ("RANK", "LOCAL_RANK"):
                    patch.setenv(key, str(self.rank))
                for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                    patch.setenv(key, "8")
                patch.setattr(dist, "init_process_group", fake_group)
                patch.setattr(dist, "all_reduce", all_reduce)
                patch.setattr(dist, "broadcast", broadcast)
                patch.setattr(dist, "all_gather_object", gather)
                patch.setattr(dist, "barrier", lambda: self.calls.append(("barrier",)))
                patch.setattr(train_gpt2, "DDP", Recorded)
                patch.setattr(train_gpt2, "training_step", step)
                patch.setattr(train_gpt2.Run, "stop_requested", stop_requested)
                patch.setattr(train_gpt2, "catch_stop_signals", train_gpt2.stop_signals.clear)
                for name in ("evaluate", "print_samples", "write_checkpoint"):
                    patch.setattr(train_gpt2, name, noted(name, getattr(train_gpt2, name)))
                train_gpt2.train(args, checkpoint)
                self.signals = list(train_gpt2.stop_signals)
        finally:
            train_gpt2.stop_signals.clear()
            if dist.is_initialized():
                dist.destroy_process_group()
        return self


@pytest.fixture
def two_ranks(tmp_path):
    """A function that makes ranks 0 and 3 of 8."""
    shards = write_shards(tmp_path / "shards")
    return lambda: [Rank(rank, tmp_path, shards) for rank in (0, 3)]


GATHER, BARRIER = ("all_gather_object",), ("barrier",)
STOP = ("stop?", (), dist.ReduceOp.SUM)
VALIDATION = ("all_reduce", (2,), dist.ReduceOp.SUM)
LOSS = ("all_reduce", (), dist.ReduceOp.SUM)
SMALLEST = ("all_reduce", (), dist.ReduceOp.MIN)  # micro-batch
EVALUATIONS = [STOP, STOP, VALIDATION, STOP]  # a checkpoint, validation and samples are due


def test_ranks_issue_the_same_collectives(two_ranks):
    """And exactly these. Gradients are averaged once per step, not in each of the two micro-steps.
    Only rank 0 samples and saves."""
    expected = [GATHER]
    expected += [*EVALUATIONS, STOP, LOSS]  # step 0
    expected += [STOP, LOSS]  # step 1
    expected += [*EVALUATIONS, STOP, LOSS]  # step 2
    expected += [*EVALUATIONS, STOP, BARRIER]  # after step 2, the last step
    first, fourth = (rank.train(max_steps=3) for rank in two_ranks())
    assert first.calls == fourth.calls == expected
    n_params = 8 * (50304 + 64) + 12 * 8 * 8 + 13 * 8 + 2 * 8
    assert first.buckets == fourth.buckets and len(first.buckets) == 3
    for buckets in first.buckets:
        assert len(buckets) == 1 and sum(buckets) == n_params
    validations = [("evaluate", step) for step in (0, 2, 3)]
    assert fourth.evaluated == validations
    assert first.evaluated == [
        ("evaluate", 0),
        ("print_samples", 0),
        *[(name, 2) for name in ("write_checkpoint", "evaluate", "print_samples")],
        *[(name, 3) for name in ("write_checkpoint", "evaluate", "print_samples")],
    ]
    assert first.out_dir.exists() and not fourth.out_dir.exists()


def test_resumed_ranks_issue_the_same_collectives(two_ranks):
    first, _ = two_ranks()
    first.train(max_steps=3)
    expected = [GATHER]
    expected += [*EVALUATIONS, STOP, LOSS]  # step 3, the first after the other run's end
    expected += [*EVALUATIONS, STOP, LOSS]
    expected += [*EVALUATIONS, STOP, BARRIER]
    runs, often = two_ranks(), dict(val_every=1, sample_every=1, save_every=1)
    checkpoints = [newest_checkpoint(first.out_dir) for _ in runs]  # train() empties its own
    for rank, checkpoint in zip(runs, checkpoints):
        rank.train(max_steps=5, checkpoint=checkpoint, resume=True, **often)
    assert runs[0].calls == runs[1].calls == expected
    assert runs[0].buckets == runs[1].buckets and len(runs[0].buckets) == 2


def test_ranks_agree_on_the_dtype_and_the_micro_batch(two_ranks, monkeypatch):
    """Rank 0 decides whether bfloat16 is faster, and the smallest micro-batch wins."""
    monkeypatch.setattr(train_gpt2.timeit, "timeit", lambda *args, **flags: 1.0)
    never = dict(val_every=0, sample_every=0, save_every=0)
    flags = never | dict(max_steps=0, dtype="auto", micro_batch_size="auto")
    first, fourth = (rank.train(**flags) for rank in two_ranks())
    measured = [("broadcast", 0), GATHER, SMALLEST]
    assert first.calls == fourth.calls == [GATHER, *measured, STOP, BARRIER]


@pytest.mark.parametrize("same", [True, False])
def test_ranks_keep_the_micro_batch_of_a_resumed_run_only_together(two_ranks, same):
    """If the GPU of one rank is another one than before, all measure again."""

    def others(own):
        return same if own is True else own

    never = dict(val_every=0, sample_every=0, save_every=0, micro_batch_size="auto")
    first, _ = two_ranks()
    first.train(max_steps=1, **never)
    runs = two_ranks()
    checkpoints = [newest_checkpoint(first.out_dir) for _ in runs]
    for rank, checkpoint in zip(runs, checkpoints):
        rank.train(others, checkpoint=checkpoint, max_steps=1, resume=True, **never)
        measured = [] if same else [SMALLEST]
        assert rank.calls == [GATHER, GATHER, *measured, STOP, BARRIER]


@pytest.mark.parametrize("signal_to", [0, 3])
def test_ranks_skip_a_step_and_stop_together(two_ranks, signal_to):
    """One of them receives SIGUSR1 in step 2; step 1 is skipped. The rank with the signal exits
    with its number, the others with that of SIGTERM."""
    first, fourth = (
        rank.train(signal_to=signal_to, bad_step=1, max_steps=9) for rank in two_ranks()
    )
    assert first.calls == fourth.calls and first.calls[-2:] == [STOP, BARRIER]
    assert len(first.buckets) == len(fourth.buckets) == 3
    assert newest_checkpoint(first.out_dir)["step"] == 3
    assert log_of(first.out_dir)["skip"] == {1: 1}
    assert first.evaluated[-1] == ("write_checkpoint", 3) and not fourth.out_dir.exists()
    assert (first.signals, fourth.signals) == (([10], [15]) if signal_to == 0 else ([15], [10]))


def test_ranks_with_different_checkpoints_are_refused(two_ranks):
    """Before the first step: a node may not see the checkpoint, or another one."""
    first, _ = two_ranks()
    first.train(max_steps=2)

    def without_it(own):
        return *own[:2], "no checkpoint"

    def with_another(own):
        assert re.fullmatch(r"step_00002 \(checksum [0-9a-f]{8}\)", own[2])
        return *own[:2], "step_00002 (checksum 00000000)"

    def with_it(own):
        assert own[2] == "no checkpoint"
        return *own[:2], "step_00002 (checksum 00000000)"

    for others in (without_it, with_another, with_it):
        for rank in two_ranks():
            checkpoint = None if others is with_it else newest_checkpoint(first.out_dir)
            with pytest.raises(UserError, match="not the same folder for all processes"):
                rank.train(others, checkpoint=checkpoint, max_steps=4, resume=True)
            assert rank.calls == [GATHER]


def test_ranks_with_different_data_are_refused(two_ranks):
    """A mistake that only one of them sees is reported by all, too."""

    def with_another_shard(own):
        return own[0], own[1] | {"made_train_000003.npy": [1000, None]}, own[2]

    def with_a_mistake(own):
        return "the shards of node 2 are damaged", None, None

    for others, text in (
        (with_another_shard, "the processes see different shards"),
        (with_a_mistake, "the shards of node 2 are damaged"),
    ):
        for rank in two_ranks():
            with pytest.raises(UserError, match=text):
                rank.train(others, max_steps=4)
            assert rank.calls == [GATHER]


def test_rank_0_decides_whether_bfloat16_is_faster(monkeypatch):
    """Here it is slower by this process's clock, and faster by that of rank 0."""
    durations = itertools.cycle([1.0, 2.0])  # of float32, of bfloat16
    monkeypatch.setattr(train_gpt2.timeit, "timeit", lambda *args, **flags: next(durations))
    assert not bfloat16_is_faster()

    def broadcast(x, source):
        assert source == 0
        x.fill_(True)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    assert bfloat16_is_faster()


@pytest.mark.parametrize("others", [1, 2, 8])
def test_the_smallest_micro_batch_wins(tiny, monkeypatch, others):
    """4096 tokens are 4 sequences here; another process has memory for 1, 2 or 8."""
    operations = {
        dist.ReduceOp.MIN: torch.minimum,
        dist.ReduceOp.MAX: torch.maximum,
        dist.ReduceOp.SUM: torch.add,
    }

    def all_reduce(x, op=dist.ReduceOp.SUM):
        x.copy_(operations[op](x, torch.tensor(others)))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(train_gpt2, "gather", lambda value: [value])
    tiny.config = replace(tiny.config, block_size=1024)
    assert pick_micro_batch_size(Args(), tiny, 2, nullcontext()) == min(4, others)


# Fake CUDA tensors: devices and dtypes agree, and nothing waits for the device in secret --------

CXX = shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.skipif(not CXX, reason="needs a C++ compiler")
def test_fake_cuda_tensors(tmp_path):
    """A step waits for the device once; attention with a mask does not use cuDNN; `auto` takes this
    many sequences of 1024 tokens, and of 256, on GPUs of 16 to 141 GB. Runs in CPU and CUDA builds.
    See fake_cuda.py."""
    root, library = Path(torch.__file__).parent, tmp_path / "fake_cuda.so"
    build = [CXX, "-std=c++20", "-shared", "-fPIC", ROOT / "tests/fake_cuda.cpp", "-o", library]
    flags = [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*build, *flags], check=True)
    command = [sys.executable, "-W", "ignore", ROOT / "tests/fake_cuda.py", library]
    env = os.environ | {"LD_LIBRARY_PATH": f"{root}/lib"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-1500:]
    first, second = done.stdout.splitlines()
    assert first == "{16: 8, 24: 16, 40: 32, 80: 64, 141: 64}"
    assert second == "{16: 32, 24: 64, 40: 128, 80: 256, 141: 256}"


# What a run sets up before it begins -------------------------------------------------------------


@pytest.mark.parametrize(
    "release, given, cores, threads, compilers",
    [
        ("6.8.0", "", 48, 6, 6),
        ("5.15-microsoft-WSL2", "", 48, 6, 6),
        ("6.8.0", "backend:native", 48, 6, 6),
        ("6.8.0", "", 512, 64, 32),
        ("6.8.0", "", 4, 1, 1),
    ],
)
def test_memory_and_cores_of_a_process(monkeypatch, release, given, cores, threads, compilers):
    """CUDA's memory grows in pieces, except if the user sets it, or in WSL. The 8 processes of a
    machine share its cores, for computing and for compiling."""
    set_threads = []
    for name in ("PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if given:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    monkeypatch.setattr(train_gpt2.platform, "release", lambda: release)
    monkeypatch.setattr(train_gpt2.fineweb, "available_cores", lambda: cores)
    prepare_process()
    grows = None if given or "WSL" in release else "expandable_segments:True"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == grows
    assert set_threads == [threads]
    assert torch._inductor.config.decide_compile_threads() == compilers


def test_freed_memory_is_kept_on_a_cpu(tiny, monkeypatch):
    """use_cpu_kernels tells glibc so: never M_MMAP (-4), never M_TRIM (-1)."""
    calls = []

    class Libc:
        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(train_gpt2.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(sys, "platform", "linux")
    use_cpu_kernels(tiny, Args(dtype="float32"))
    assert calls == [(-4, 0), (-1, 2**31 - 1)]


def test_torchrun_on_apples_gpu_is_refused(monkeypatch):
    """Gloo, which would connect the processes, cannot send tensors of an MPS device."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    check_device("auto")
    monkeypatch.setenv("RANK", "0")
    check_device("cpu")
    for name in ("auto", "mps"):
        with pytest.raises(UserError, match="--device mps: the processes of torchrun cannot"):
            check_device(name)


def test_the_gpu_of_a_process(monkeypatch):
    """torchrun's processes see all GPUs; Slurm's may see one each. torch.compile is on by default
    only if the device that was chosen is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert pick_device("auto", 5) == torch.device("cuda", 5)
    monkeypatch.setenv("LOCAL_RANK", "7")
    check_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "8")
    check_device("cpu")
    with pytest.raises(UserError, match="this machine has 8 GPU"):
        check_device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda", 5) == torch.device("cuda", 0)
    check_device("cuda")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="this machine has 1 GPU"):
        check_device("cuda")
    compiled = {name: parse(["--device", name])[0].compile for name in ("auto", "cuda", "cpu")}
    assert compiled == {"auto": True, "cuda": True, "cpu": False}


TOO_OLD = (  # torch's words
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/"
)
INSTALL = "https://download.pytorch.org/whl"


@pytest.mark.parametrize("sign", ["file", "program"])
@pytest.mark.parametrize(
    "version, cuda, error, words",
    [
        ("2.13.0+cpu", None, None, f"has no CUDA .*{INSTALL}/cu130 .cu126 below driver 580"),
        ("2.13.0+cu130", "13.0", TOO_OLD, f"12020.; CUDA 13.0 needs driver 580.*{INSTALL}/cu126"),
        ("2.13.0+cu126", "12.6", TOO_OLD, "CUDA 12.6 needs driver 525 or newer: update it$"),
        ("2.13.0+cu130", "13.0", "No CUDA GPUs are available", "^No CUDA GPUs are available$"),
    ],
)
def test_why_a_gpu_cannot_be_used(monkeypatch, sign, version, cuda, error, words):
    """The driver is too old, or this PyTorch was built without CUDA."""

    def init():
        raise RuntimeError(error)

    def which(name):
        return "/usr/bin/nvidia-smi" if name == "nvidia-smi" and sign == "program" else None

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(train_gpt2.shutil, "which", which)
    monkeypatch.setattr(train_gpt2, "NVIDIA_FILES", (__file__,) if sign == "file" else ())
    why = why_no_cuda()
    assert re.search(words, why) and "http://" not in why
    with pytest.raises(UserError, match=f"^--device cuda: {re.escape(why)}$"):
        check_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user hides it
    assert why_no_cuda() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert why_no_cuda() == why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_cuda() is None


@pytest.mark.parametrize("flag, expected", [("auto", 1), ("cpu", 0)])
def test_a_gpu_that_cannot_be_used_is_named_before_training(
    shards, tmp_path, monkeypatch, flag, expected
):
    """Only if the CPU was not asked for."""
    monkeypatch.setattr(train_gpt2, "why_no_cuda", lambda: "the driver is too old")
    done = train(shards, tmp_path / "out", "--device", flag, "--max_steps", 2)
    before_training = done.stdout[: done.stdout.index("\nstep ")]
    assert before_training.count("warning: the driver is too old") == expected


def test_a_machine_without_a_gpu_gets_no_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_gpt2.shutil, "which", lambda name: None)
    monkeypatch.setattr(train_gpt2, "NVIDIA_FILES", ("/dev/there_is_no_such_file",))
    assert why_no_cuda() is None
    with pytest.raises(UserError, match="--device cuda: this machine has none"):
        check_device("cuda")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_process_of_the_second_machine_connects_its_own_gpu(monkeypatch, device):
    """Four processes per machine, with 8 GPUs each: process 5 is number 1 of the second machine. It
    uses GPU 1 there for its tensors, for NCCL, and in the thread that reads ahead."""
    calls = []
    for name, value in (("RANK", 5), ("LOCAL_RANK", 1), ("WORLD_SIZE", 8)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: calls.append(("set_device", gpu)))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **flags: calls.append((*a, flags)))
    gpu = torch.device("cuda", 1) if device == "cuda" else torch.device("cpu")
    assert init_distributed(device) == (5, 8, gpu)
    if device == "cpu":
        assert calls == [("gloo", {})]
        return
    check_device("cpu")
    assert calls == [("set_device", gpu), ("nccl", {"device_id": gpu})]
    loader = SimpleNamespace(device=gpu, args=Args(), micro_batches=lambda step: list(calls))
    assert prefetch(loader)(0) == [*calls[:2], ("set_device", gpu)]
    calls.clear()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert init_distributed(device) == (0, 1, torch.device("cuda", 0)) and calls == []


def test_the_dtype_of_a_gpu(monkeypatch):
    """A GPU that only emulates bfloat16, such as a T4, uses float16."""
    gpu = torch.device("cuda", 0)
    emulates = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    assert pick_dtype("auto", gpu) == "float16" and pick_dtype("bfloat16", gpu) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert pick_dtype("auto", gpu) == "bfloat16" and pick_dtype("float32", gpu) == "float32"
