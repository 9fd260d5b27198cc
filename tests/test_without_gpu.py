"""The GPU paths as far as a machine without a GPU can show them: compiled DDP, a training step on
fake CUDA tensors, and the devices, precisions, threads and memory that a process takes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import FAULTS, ROOT, log_of, run_here, write_shards

import train_gpt2
from train_gpt2 import Args, init_distributed, parse, pick_device, pick_dtype

# The CPU's kernels, torch.compile and DDP all compute the same -----------------------------------


def small_run(folder, name, dtype, compiled, kernels=True, rank=0):
    """train() itself, in this process, with or without the CPU's kernels. Writes to the folder the
    gradients of the first step, and how many graphs each validation and each step compiled."""
    graphs, made, gradients = [], [], []
    real_compile, real_ddp, real_step = torch.compile, train_gpt2.DDP, train_gpt2.training_step

    class SmallBuckets(real_ddp):
        def __init__(self, model):
            super().__init__(model, bucket_cap_mb=1)

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

    shape = dict(n_layer=2, n_head=2, n_embd=128, seq_len=32)
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
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dist.init_process_group = lambda backend: None  # there is a group already
    small_run(folder, "ddp", dtype, compiled=True, rank=rank)
    os._exit(0)  # as main() ends: Gloo's threads can abort a process that Python is ending


@pytest.mark.parametrize(
    "dtype, tolerance",
    [("float32", 1e-4), pytest.param("bfloat16", 2e-2, marks=FAULTS)],
)
def test_compiled_ddp_and_cpu_kernels_equal_the_plain_form(tmp_path, dtype, tolerance):
    """Losses, norms and gradients. Validation and training are compiled once, in the first step;
    the last micro-batch of validation, which has fewer sequences, is not. Compiled DDP is cut into
    buckets, so that gradients travel while others are still being computed."""
    write_shards(tmp_path / "shards")
    small_run(tmp_path, "plain", dtype, compiled=False, kernels=False)
    small_run(tmp_path, "kernels", dtype, compiled=False)
    small_run(tmp_path, "compiled", dtype, compiled=True)
    mp.spawn(ddp_worker, (tmp_path, dtype), nprocs=2)
    plain, gradients = log_of(tmp_path / "plain"), torch.load(tmp_path / "plain.gradients")
    for name in ("kernels", "compiled", "ddp"):
        log = log_of(tmp_path / name)
        for stream in ("train", "val", "norm"):
            assert log[stream] == pytest.approx(plain[stream], rel=tolerance), (name, stream)
        found = torch.load(tmp_path / f"{name}.gradients")
        assert len(found) == len(gradients) == 2 * 12 + 4
        for i, (gradient, expected) in enumerate(zip(found, gradients)):
            difference = (gradient - expected).norm()
            assert difference <= tolerance * expected.norm(), (name, i)
    names = ("compiled.graphs0", "ddp.graphs0", "ddp.graphs1")
    compiled, ddp, ddp_of_rank_1 = (json.loads((tmp_path / name).read_text()) for name in names)
    assert compiled == [[1, 1], [0, 0], [0, 0]]
    assert ddp == ddp_of_rank_1 and ddp[1:] == [[0, 0], [0, 0]]
    assert ddp[0][0] == 1 and ddp[0][1] > 1


# Fake CUDA tensors: devices and dtypes agree, and nothing waits for the device in secret --------

CXX = shutil.which("c++") or shutil.which("g++")


@pytest.fixture
def fake_cuda(request):
    """The library made from fake_cuda.cpp. pytest's cache keeps it for later runs."""
    root, source = Path(torch.__file__).parent, ROOT / "tests/fake_cuda.cpp"
    version = f"{torch.__version__}-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}"
    library = request.config.cache.mkdir("fake_cuda") / f"{version}.so"
    if not library.exists():
        new = library.with_suffix(".new")
        build = [CXX, "-std=c++20", "-shared", "-fPIC", source, "-o", new]
        flags = [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run([*build, *flags], check=True)
        new.rename(library)  # so it is complete or absent
    return library


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.skipif(not CXX, reason="needs a C++ compiler")
def test_fake_cuda_tensors(fake_cuda):
    """A step waits for the device once; attention with a mask does not use cuDNN; from a batch of
    512 sequences of 1024 tokens, and of 240 of 256 tokens, `--micro_batch_size auto` takes the
    largest divisor that fits on GPUs of 16 to 80 GB. CPU and CUDA builds of PyTorch can run this."""
    command = [sys.executable, "-W", "ignore", ROOT / "tests/fake_cuda.py", fake_cuda]
    env = os.environ | {"LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-1500:]
    first, second = done.stdout.splitlines()
    assert first == "{16: 8, 24: 16, 48: 32, 80: 64}"
    assert second == "{16: 40, 24: 60, 48: 120, 80: 240}"


# What a process takes before it trains -----------------------------------------------------------


@pytest.mark.parametrize(
    "processes, threads, cores, expected",
    [(8, 1, 48, [6]), (8, 1, 4, [1]), (1, 16, 4, [4]), (1, 16, 64, [])],
)
def test_the_processes_of_a_machine_share_its_cores(
    tmp_path, monkeypatch, processes, threads, cores, expected
):
    """torchrun gives each one thread. Alone, a process takes fewer than the 16 that PyTorch counts
    only if the machine, such as a container, allows it fewer cores."""
    set_threads = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(train_gpt2.fineweb, "available_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    run_here("--data_dir", tmp_path, "--out_dir", tmp_path, check=False)
    assert set_threads == expected


@pytest.mark.parametrize(
    "release, given, expected",
    [
        ("6.8.0", None, "expandable_segments:True"),
        ("5.15-microsoft-WSL2", None, None),
        ("6.8.0", "backend:native", "backend:native"),
    ],
)
def test_blocks_of_gpu_memory_can_grow(tmp_path, monkeypatch, release, given, expected):
    """Except in WSL, and except if the user has set something else. (PyTorch reads the variable
    when CUDA is first used; test_cuda.py shows that it does.)"""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", given or "")  # restored after the test
    if given is None:
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(train_gpt2.platform, "release", lambda: release)
    run_here("--data_dir", tmp_path, "--out_dir", tmp_path, check=False)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


def test_the_gpu_of_a_process(monkeypatch):
    """torchrun's processes see all GPUs; Slurm's may see one each. torch.compile is on by default
    only if the device that was chosen is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert pick_device("auto", 5) == torch.device("cuda", 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda", 5) == torch.device("cuda", 0)
    compiled = {name: parse(["--device", name])[0].compile for name in ("auto", "cuda", "cpu")}
    assert compiled == {"auto": True, "cuda": True, "cpu": False}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_process_of_the_second_machine_connects_its_own_gpu(monkeypatch, device):
    """Four processes on each of two machines with 8 GPUs: process 5 is number 1 of the second
    machine, so it uses GPU 1 there, for its tensors and for NCCL."""
    calls = []
    for name, value in (("RANK", 5), ("LOCAL_RANK", 1), ("WORLD_SIZE", 8)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: calls.append(("set_device", gpu)))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **flags: calls.append((*a, flags)))
    gpu = torch.device("cuda", 1) if device == "cuda" else torch.device("cpu")
    assert init_distributed(device) == (5, 8, gpu)
    on_gpu = [("set_device", gpu), ("nccl", {"device_id": gpu})]
    assert calls == (on_gpu if device == "cuda" else [("gloo", {})])


@pytest.mark.parametrize("emulated, auto", [(True, "float16"), (False, "bfloat16")])
def test_the_dtype_of_a_gpu(monkeypatch, emulated, auto):
    """A GPU that only emulates bfloat16, such as a T4, uses float16."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    names = ("auto", "float32", "float16", "bfloat16")
    found = [pick_dtype(name, torch.device("cuda", 0)) for name in names]
    assert found == [auto, "float32", "float16", "bfloat16"]


@pytest.mark.parametrize(
    "name, dtype, tflops",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("Tesla T4", "float16", 65),
        ("NVIDIA H100 80GB HBM3", "float32", float("inf")),  # the table is of half precision
        ("NVIDIA A1000", "bfloat16", float("inf")),  # neither an A100 nor an A10
    ],
)
def test_mfu_is_relative_to_the_peak_of_the_gpus(tiny, monkeypatch, name, dtype, tflops):
    """From NVIDIA's data sheets; infinite, so that no MFU is printed, where it is not known."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    loader = SimpleNamespace(device=torch.device("cuda", 0), world_size=2)
    assert train_gpt2.Progress(Args(dtype=dtype), tiny, loader).peak == 2 * tflops * 1e12
