"""What a machine without a GPU can show of the GPU paths: compiled DDP, the collectives of 8 ranks,
and a training step on fake CUDA tensors. test_8 counts the graphs; test_cuda.py needs a GPU."""

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
from conftest import ROOT, write_shards

import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, Config, GPTConfig, make_scaler, newest_checkpoint, training_step

CPU = torch.device("cpu")
OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


# -- two processes: the compiled model in DDP is cut into buckets, compiled once, and equals eager


def ddp_worker(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    graphs, found = [], []

    def backend(gm, inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    for compiled in (False, True):
        torch.manual_seed(0)
        raw = GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=4, n_head=2, n_embd=192))
        model = torch.compile(raw, backend=backend, dynamic=False, fullgraph=True)
        model = model if compiled else raw
        optimizer, scaler = raw.configure_optimizers(0.1, 1e-3), make_scaler("float32", CPU)
        ddp = train_gpt2.DDP(model, bucket_cap_mb=2)
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + rank)
            tokens = [torch.randint(50257, (2, 33), generator=generator) for _ in range(2)]
            batches, before = [(t[:, :-1], t[:, 1:]) for t in tokens], len(graphs)
            with torch.no_grad():  # as evaluate does, through the inner model
                model(*batches[0])
            middle = len(graphs)
            loss, norm = training_step(ddp, batches, optimizer, scaler, OFF, 1.0)
            made = middle - before, len(graphs) - middle
            found.append((loss.item(), norm.item(), *made))
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


@pytest.mark.faults
def test_compiled_ddp_equals_eager_and_is_cut_into_buckets_once():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=ddp_worker, args=(r, port, queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = queue.get(timeout=120)
    for worker in workers:
        worker.join(30)
    for eager, compiled in zip(found[:3], found[3:]):
        assert compiled[:2] == pytest.approx(eager[:2], abs=2e-4)
    validation, training = found[3][2:]
    assert validation == 1 and training > 1  # cut, so that buckets travel while it computes
    assert [made for step in found[4:] for made in step[2:]] == [0] * 4


# -- every rank issues the same collectives in the same order: what else would hang NCCL


def collectives(rank, out_dir, shards, monkeypatch, mine=None, theirs=None, **flags):
    """What rank `rank` of 8 asks of the others in a run, by a process group that only pretends;
    from the checkpoint `mine`, where the other ranks found `theirs`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    seen, real_init = [], dist.init_process_group

    def recorded(name, function):
        def call(*args, **kw):
            shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            seen.append((name, *shapes))
            return function(*args, **kw)

        return call

    def hook(state, bucket):  # the pretended group gives DDP's own all-reduce no result
        seen.append(("bucket", bucket.buffer().numel()))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    class Recorded(train_gpt2.DDP):
        def __init__(self, model):
            super().__init__(model)
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
            for name in ("all_reduce", "broadcast", "barrier"):
                patch.setattr(dist, name, recorded(name, getattr(dist, name)))
            patch.setattr(dist, "all_gather_object", gather)
            patch.setattr(train_gpt2, "DDP", Recorded)
            train_gpt2.train(config, mine)
    finally:
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


def test_a_node_without_the_checkpoint_is_refused_before_the_first_step(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards")
    runs = [(rank, tmp_path / str(rank), shards, monkeypatch) for rank in (0, 3)]
    collectives(*runs[0], max_steps=2)
    checkpoint = newest_checkpoint(tmp_path / "0")
    for run, mine, theirs in zip(runs, (checkpoint, None), (None, checkpoint)):
        with pytest.raises(UserError, match="one folder for all"):
            collectives(*run, mine, theirs, max_steps=4, resume=True)


# -- on fake CUDA tensors: devices and dtypes agree, and a step never waits for the device

FAKE = """
import ctypes, sys; ctypes.CDLL(sys.argv[1]); sys.path.insert(0, sys.argv[2])
import torch, torch.cuda.amp.common as common
common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
import train_gpt2 as T
from torch._subclasses.fake_tensor import FakeTensorMode
device = torch.device("cuda", 0)
with FakeTensorMode(allow_non_fake_inputs=True):
    with torch.device("cuda"):
        model = T.GPT(T.GPTConfig(vocab_size=50304, n_layer=2))
    optimizer = model.configure_optimizers(0.1, 6e-4)
    for name in ("float32", "bfloat16", "float16"):
        scaler, dtype = T.make_scaler(name, device), getattr(torch, name)
        autocast = torch.autocast("cuda", dtype, enabled=name != "float32")
        t = torch.zeros(8, 1025, dtype=torch.int64, device="cuda")
        batches = [(t[:, :-1], t[:, 1:])] * 2
        loss, norm = T.training_step(model, batches, optimizer, scaler, autocast, 1.0)
        loss, stop = T.mean_over_processes(loss, 1)
        for tensor in (loss, norm, stop):  # .item(), a wait, would have raised before this
            assert tensor.device.type == "cuda" and tensor.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
print("fine")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a CPU build of PyTorch")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_step_on_fake_cuda_tensors_never_waits(tmp_path):
    root, library = Path(torch.__file__).parent, tmp_path / "fake_cuda.so"
    build = ["g++", "-std=c++20", "-shared", "-fPIC", ROOT / "tests/fake_cuda.cpp", "-o", library]
    flags = [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*build, *flags], check=True)
    command = [sys.executable, "-W", "ignore", "-c", FAKE, library, ROOT]
    env = os.environ | {"LD_LIBRARY_PATH": f"{root}/lib"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout == "fine\n", done.stderr[-1500:]
