"""What a machine without a GPU can show of the GPU paths: compiled DDP, the collectives of 8 ranks,
a training step on fake CUDA tensors, and what a run asks of CUDA before it begins. test_8 counts
the graphs; test_cuda.py needs a GPU."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, log_of, write_shards

import train_gpt2
from fineweb import UserError
from train_gpt2 import Config, newest_checkpoint, pick_device, usual_config, use_well

# -- two processes: the compiled model in DDP is cut into buckets, compiled once, and equals eager


def ddp_worker(rank, ports, folder):
    """train() itself, eager and then compiled. Writes down the graphs that were made in each step's
    validation and in its update."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    graphs, made = [], []
    real_compile, real_step = torch.compile, train_gpt2.training_step

    class SmallBuckets(train_gpt2.DDP):
        def __init__(self, model, **flags):
            super().__init__(model, bucket_cap_mb=1, **flags)

    def backend(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    def step(*args):
        before = len(graphs)
        result = real_step(*args)
        made.append((before - sum(map(sum, made)), len(graphs) - before))
        return result

    torch.compile = lambda model, **flags: real_compile(
        model, backend=backend, fullgraph=True, **flags
    )
    train_gpt2.DDP, train_gpt2.training_step = SmallBuckets, step
    shape = dict(n_layer=4, n_head=2, n_embd=128, seq_len=32, block_size=32)
    batch = dict(total_batch_size=256, micro_batch_size=2, max_steps=3, warmup_steps=1)
    often = dict(val_every=1, val_tokens=256, hellaswag_every=0, sample_every=0, save_every=0)
    where = dict(device="cpu", dtype="float32", data_dir=f"{folder}/shards")
    for compiled, port in zip((False, True), ports):  # or one could meet the other's last run
        os.environ["MASTER_PORT"] = str(port)
        out = dict(compile=compiled, out_dir=f"{folder}/{compiled}")
        train_gpt2.train(Config(**shape, **batch, **often, **where, **out))
    (folder / f"made{rank}.json").write_text(json.dumps(made))


@pytest.mark.faults
def test_compiled_ddp_equals_eager_and_is_cut_into_buckets_once(tmp_path):
    write_shards(tmp_path / "shards")
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    mp.spawn(ddp_worker, (ports, tmp_path), nprocs=2)
    made, other = (json.loads((tmp_path / f"made{rank}.json").read_text()) for rank in (0, 1))
    assert made == other
    eager, compiled = (log_of(tmp_path / str(compiled)) for compiled in (False, True))
    for stream in ("train", "val", "norm"):
        assert compiled[stream] == pytest.approx(eager[stream], abs=2e-4), stream
    assert made[:3] == [[0, 0]] * 3 and made[4:] == [[0, 0]] * 2
    validation, training = made[3]
    assert validation == 1 and training > 1  # cut, so that buckets travel while it computes


# -- every rank issues the same collectives in the same order: what else would hang NCCL


def collectives(
    rank, out_dir, shards, monkeypatch, mine=None, theirs=None, told=None, skip=None, **flags
):
    """What rank `rank` of 8 asks of the others in a run, by a process group that only pretends;
    from the checkpoint `mine`, where the other ranks found `theirs`. Rank `told` gets a signal in
    step 2; in step `skip` there is a NaN in the gradient."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    seen, steps, real_init, real_step = [], [], dist.init_process_group, train_gpt2.training_step
    real_reduce = dist.all_reduce

    def step(*args):
        steps.append(len(steps))
        if told == rank and steps[-1] == 2:
            train_gpt2.received.append(15)
        return real_step(*args)

    def all_reduce(values, *args):  # the pretended group adds nothing, the others' signal is news
        real_reduce(values, *args)
        if told not in (None, rank) and steps and steps[-1] == 2:
            values[-1] += 1

    def recorded(name, function):
        def call(*args, **kw):
            shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            seen.append((name, *shapes))
            return function(*args, **kw)

        return call

    def hook(state, bucket):  # the pretended group gives DDP's own all-reduce no result
        seen.append(("bucket", bucket.buffer().numel()))
        if steps[-1] == skip:
            bucket.buffer()[0] = torch.nan
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    class Recorded(train_gpt2.DDP):
        def __init__(self, model, **flags):
            super().__init__(model, **flags)
            self.register_comm_hook(None, hook)

    def gather(found, own):
        seen.append(("all_gather_object",))
        found[:] = [theirs and (Path(theirs["path"]).name, theirs["checksums"])] * 8
        found[rank] = own

    shape = dict(n_layer=1, n_head=1, n_embd=8, seq_len=32, block_size=64)
    batch = dict(total_batch_size=1024, micro_batch_size=2, warmup_steps=1)
    often = dict(val_every=2, val_tokens=640, hellaswag_every=0, sample_every=2, save_every=2)
    rest = dict(sample_tokens=2, device="cpu", dtype="float32", data_dir=str(shards))
    config = Config(**shape, **batch, **often, **rest, out_dir=str(out_dir), **flags)
    try:
        with monkeypatch.context() as patch:
            for key in ("RANK", "LOCAL_RANK"):
                patch.setenv(key, str(rank))
            for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                patch.setenv(key, "8")
            store = dict(rank=rank, world_size=8, store=FakeStore())
            patch.setattr(
                dist, "init_process_group", lambda *args, **kw: real_init("fake", **store)
            )
            patch.setattr(dist, "all_reduce", all_reduce)
            for name in ("all_reduce", "broadcast", "barrier"):
                patch.setattr(dist, name, recorded(name, getattr(dist, name)))
            patch.setattr(train_gpt2, "training_step", step)
            patch.setattr(train_gpt2, "catch_signals", train_gpt2.received.clear)
            patch.setattr(dist, "all_gather_object", gather)
            patch.setattr(train_gpt2, "DDP", Recorded)
            train_gpt2.train(config, mine)
    finally:
        train_gpt2.received.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
    return seen


def test_ranks_issue_the_same_collectives(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards")
    runs = [(rank, tmp_path / str(rank), shards, monkeypatch) for rank in (0, 3)]
    first, fourth = (collectives(*run, max_steps=3) for run in runs)
    assert first == fourth and len(first) > 8
    checkpoint = newest_checkpoint(tmp_path / "0")
    again = dict(mine=checkpoint, theirs=checkpoint, max_steps=5, resume=True)
    first, fourth = (collectives(*run, **again) for run in runs)
    assert first == fourth and len(first) > 5


@pytest.mark.parametrize("told", [0, 3])
def test_ranks_leave_out_and_stop_together(tmp_path, monkeypatch, told):
    """One of them gets a signal in step 2; before that an update was left out."""
    shards = write_shards(tmp_path / "shards")
    runs = [(rank, tmp_path / str(rank), shards, monkeypatch) for rank in (0, 3)]
    first, fourth = (collectives(*run, told=told, skip=1, max_steps=9) for run in runs)
    assert first == fourth and first[-1] == ("barrier",)
    assert newest_checkpoint(tmp_path / "0")["step"] == 3
    assert log_of(tmp_path / "0")["skip"] == {1: 1}


def test_a_node_without_the_checkpoint_is_refused_before_the_first_step(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards")
    runs = [(rank, tmp_path / str(rank), shards, monkeypatch) for rank in (0, 3)]
    collectives(*runs[0], max_steps=2)
    checkpoint = newest_checkpoint(tmp_path / "0")
    for run, mine, theirs in zip(runs, (checkpoint, None), (None, checkpoint)):
        with pytest.raises(UserError, match="one folder for all"):
            collectives(*run, mine, theirs, max_steps=4, resume=True)


# -- on fake CUDA tensors: devices and dtypes agree, and a step never waits for the device

CXX = shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.skipif(not CXX, reason="needs a C++ compiler")
def test_fake_cuda_tensors(tmp_path):
    """A step waits for the device once; attention with a mask does not use cuDNN; `auto` takes this
    many sequences on GPUs of 16 to 141 GB. Runs in CPU and CUDA builds. See fake_cuda.py."""
    root, library = Path(torch.__file__).parent, tmp_path / "fake_cuda.so"
    build = [CXX, "-std=c++20", "-shared", "-fPIC", ROOT / "tests/fake_cuda.cpp", "-o", library]
    flags = [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*build, *flags], check=True)
    command = [sys.executable, "-W", "ignore", ROOT / "tests/fake_cuda.py", library]
    env = os.environ | {"LD_LIBRARY_PATH": f"{root}/lib"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout == "{16: 8, 24: 16, 40: 32, 80: 64, 141: 64}\n"


# -- what a run asks of CUDA before it begins


@pytest.mark.parametrize(
    "release, told", [("6.8.0", ""), ("5.15-microsoft-WSL2", ""), ("6.8.0", "x")]
)
def test_memory_and_cores_of_a_process(monkeypatch, release, told):
    """Memory grows in pieces, unless the user or WSL has it otherwise; 8 processes share the cores
    for compiling."""
    asked = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if told:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", told)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(train_gpt2.platform, "release", lambda: release)
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    use_well(torch.device("cuda"))
    grows = [] if told or "WSL" in release else ["expandable_segments:True"]
    assert asked == [*grows, 6] and torch._inductor.config.decide_compile_threads() == 6


def test_the_gpu_of_a_process(monkeypatch):
    """torchrun's processes see all GPUs; Slurm's may see one each. Compiling waits for the device
    that was asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert pick_device("auto", 5) == torch.device("cuda", 5)
    with pytest.raises(UserError, match="this machine has 8 GPUs"):
        pick_device("auto", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda", 5) == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="this machine has 1 GPUs"):
        pick_device("cuda", 1)
    compiled = {device: usual_config(Config(device=device)).compile for device in ("auto", "cpu")}
    assert compiled == {"auto": True, "cpu": False}
