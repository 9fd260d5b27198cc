"""What only a GPU can show. These tests run on any machine with CUDA; on_gpu.sh starts them.
DEVICE=cpu runs those that need no function of CUDA on a CPU, to find mistakes in the tests."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import QUIET, ROOT, log_of, run, write_shards

import hellaswag
from train_gpt2 import (
    GPT,
    Args,
    CausalSelfAttention,
    GPTConfig,
    KVCache,
    pick_micro_batch_size,
    training_step,
)

DEVICE = os.environ.get("DEVICE", "cuda")
CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not CUDA, reason="needs a CUDA GPU")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")

SMALL = "--n_layer 4 --n_head 4 --n_embd 256 --seq_len 128 --block_size 128".split()
SMALL += "--total_batch_size 2048 --micro_batch_size 8 --max_steps 20 --warmup_steps 4".split()
SMALL += "--max_lr 2e-3 --min_lr 2e-4 --val_every 10 --val_tokens 2048".split()


def train(shards, out, *args):
    folders = ["--data_dir", shards, "--out_dir", out]
    return run("train_gpt2.py", *SMALL, *QUIET, *folders, *args)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(shards, log) of a run in float32 on the CPU with the same weights and the same batches."""
    folder = tmp_path_factory.mktemp("reference")
    shards = write_shards(folder / "shards")
    train(shards, folder / "out", "--device", "cpu", "--dtype", "float32")
    return shards, log_of(folder / "out")


def small(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=256, vocab_size=50304, n_layer=3, n_head=2, n_embd=128)
    return GPT(GPTConfig(**shape | changes)).to(DEVICE)


@needs_cuda
@pytest.mark.parametrize("flag", ["--compile", "--no-compile"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.02), ("bfloat16", 0.1)])
def test_every_precision_follows_float32(reference, tmp_path, flag, dtype, tolerance):
    """On CUDA, float32 is TF32."""
    shards, log = reference
    done = train(shards, tmp_path / "out", "--device", "cuda", "--dtype", dtype, flag)
    for stream in ("train", "val"):
        assert log_of(tmp_path / "out")[stream] == pytest.approx(log[stream], abs=tolerance)
    assert "peak memory" in done.stdout


@needs_cuda
def test_float16_scales_the_loss_and_learns(reference, tmp_path):
    train(reference[0], tmp_path / "out", "--device", "cuda", "--dtype", "float16", "--no-compile")
    losses = list(log_of(tmp_path / "out")["train"].values())
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 1


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_waits_for_the_device_once_for_its_norm(dtype, monkeypatch):
    """fake_cuda.py shows it with tensors that have no values. Here CUDA itself raises."""
    model, waits = small(), []
    optimizer = model.configure_optimizers(0.1, 1e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    autocast = torch.autocast("cuda", getattr(torch, dtype), enabled=dtype != "float32")
    tokens = torch.randint(50257, (4, 65), device="cuda")
    batches = [(tokens[:2, :-1], tokens[:2, 1:]), (tokens[2:, :-1], tokens[2:, 1:])]
    step = [model, batches, optimizer, scaler, autocast, 1.0]
    training_step(*step)  # the first one makes AdamW's running means
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda norm: waits.append(norm) or True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, norm = training_step(*step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1 and waits[0] is norm


@needs_cuda
def test_memory_grows_in_expandable_segments():
    """The setting is made before CUDA is used, so PyTorch takes it."""
    code = """
import torch, train_gpt2
try:
    train_gpt2.main(["--data_dir", "nowhere"])
except SystemExit as error:
    assert error.code == 2
x = torch.zeros(10, device="cuda")
assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
"""
    env = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_compiled_gradients_equal_eager_ones(dtype, tolerance):
    """For each parameter. Inductor's LayerNorm was silently wrong once (pytorch issue 193061)."""
    generator = torch.Generator().manual_seed(1)
    tokens, grads = torch.randint(50257, (8, 257), generator=generator).to(DEVICE), []
    for compiled in (False, True):
        model = small()
        call = torch.compile(model, dynamic=False) if compiled else model
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            call(tokens[:, :-1], tokens[:, 1:]).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= tolerance * grad.norm() + 1e-7, name


@pytest.mark.parametrize("T", [1024, 1000, 72])
def test_the_attention_that_training_uses_equals_plain_attention(T):
    """Whichever kernel PyTorch picks here: flash attention, cuDNN's, or another one."""
    B, H, D = 2, 3, 64
    qkv = torch.randn(B, T, 3 * H * D, device=DEVICE).bfloat16().requires_grad_()
    attn = CausalSelfAttention(GPTConfig(n_head=H, n_embd=H * D))
    attn.c_attn.forward, attn.c_proj.forward = lambda x: qkv, lambda x: x
    y = attn(torch.empty(B, T, H * D, device=DEVICE))
    w = torch.randn_like(y)
    found = y, *torch.autograd.grad((y * w).sum(), qkv)
    qkv = qkv.detach().float().requires_grad_()
    q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
    future = torch.ones(T, T, device=DEVICE).triu(1).bool()
    y = (q @ k.transpose(2, 3) / 8).masked_fill(future, -torch.inf).softmax(-1) @ v
    y = y.transpose(1, 2).reshape(B, T, H * D)
    expected = y, *torch.autograd.grad((y * w.float()).sum(), qkv)
    for a, b in zip(found, expected):
        assert torch.isfinite(a).all() and (a.float() - b).norm() < 0.02 * b.norm()


@torch.no_grad()
def test_cached_logits_equal_recomputed_ones_in_bfloat16():
    model, ids = small(), torch.randint(50257, (3, 18)).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        cache = KVCache(model)
        for T in range(5, 19):
            found = cache.next_logits(ids[:, :T]).float()
            expected = model(ids[:, :T])[:, -1].float()
            assert (found - expected).norm() < 0.03 * expected.norm()


def test_hellaswag_losses_do_not_depend_on_precision_or_batch():
    rng, items = np.random.default_rng(0), []

    def ids(least, most):
        return rng.integers(0, 50257, size=rng.integers(least, most)).tolist()

    for i in range(64):
        items.append(hellaswag.Item(i, 0, ids(5, 60), [ids(2, 30) for _ in range(4)], [1] * 4))
    model, found = small(), []
    for dtype, budget in ((torch.float32, 512), (torch.bfloat16, 512), (torch.bfloat16, 4096)):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            found.append(hellaswag.score(model, items, DEVICE, token_budget=budget))
    for losses in found[1:]:
        torch.testing.assert_close(losses, found[0], rtol=0.02, atol=0.05)


def test_fused_adamw_equals_the_plain_loop():
    weights, ids = [], torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(1))
    ids = ids.to(DEVICE)
    for fused in (True, False):
        model = small(vocab_size=512, n_layer=2)
        optimizer = model.configure_optimizers(0.1, 1e-3)
        assert all(group["fused"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group.update(fused=fused, foreach=False)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@needs_cuda
def test_the_micro_batch_that_auto_takes_fits_and_is_not_far_too_small(monkeypatch):
    """With 4 GB of memory: that many sequences fit, and four times as many do not. It divides the
    batch of 3600 sequences."""
    limit, total = 4_000_000_000, torch.cuda.get_device_properties(0).total_memory
    args = Args(seq_len=256, total_batch_size=256 * 3600)
    model, autocast = small(n_layer=2), torch.autocast("cuda", torch.bfloat16)

    def mem_get_info(device):  # CUDA's own ignores the limit
        return limit - torch.cuda.memory_reserved(device), total

    def forward_and_backward(B):
        idx = torch.zeros(B, 256, dtype=torch.int64, device="cuda")
        with autocast:
            loss = model(idx, idx)
        loss.backward()

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        B = pick_micro_batch_size(args, model, 1, autocast, None)
        assert 3600 % B == 0 and 1 <= B < 256
        forward_and_backward(B)
        with pytest.raises(torch.OutOfMemoryError):
            forward_and_backward(4 * B)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
