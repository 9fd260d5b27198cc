"""What only a GPU can show. These run on any machine with CUDA, and have not been run on one yet."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import QUIET, log_of, run
from torch.nn.attention import SDPBackend, sdpa_kernel

from train_gpt2 import GPT, Config, GPTConfig, free_memory, pick_device, pick_micro_batch_size

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SMALL = "--n_layer 4 --n_head 4 --n_embd 256 --seq_len 128 --block_size 128 --total_batch_size 2048 --micro_batch_size 8".split()
STEPS = "--max_steps 20 --warmup_steps 4 --max_lr 2e-3 --min_lr 2e-4 --val_every 10 --val_tokens 1280".split()


def train(shards, out, *args):
    return run(
        "train_gpt2.py",
        *SMALL,
        *QUIET,
        *STEPS,
        "--data_dir",
        shards,
        "--out_dir",
        out,
        "--device",
        "cuda",
        *args,
    )


@pytest.fixture
def reference(shards, tmp_path):
    train(
        shards,
        tmp_path / "float32",
        "--dtype",
        "float32",
        "--matmul_precision",
        "highest",
        "--no-compile",
    )
    return log_of(tmp_path / "float32")


@pytest.mark.parametrize(
    "args, tolerance",
    [
        (["--dtype", "float32", "--matmul_precision", "high", "--no-compile"], 0.02),  # TF32
        (["--dtype", "bfloat16", "--no-compile"], 0.1),
        (["--dtype", "bfloat16", "--compile"], 0.1),
        (["--dtype", "float32", "--matmul_precision", "highest", "--compile"], 1e-3),
    ],
)
def test_every_precision_follows_float32(reference, shards, tmp_path, args, tolerance):
    done = train(shards, tmp_path / "out", *args)
    for stream in ("train", "val"):
        assert log_of(tmp_path / "out")[stream] == pytest.approx(reference[stream], abs=tolerance)
    assert "peak memory" in done.stdout


def test_float16_scales_skips_and_goes_on(shards, tmp_path):
    train(shards, tmp_path / "out", "--dtype", "float16", "--no-compile")
    losses = list(log_of(tmp_path / "out")["train"].values())
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 1


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="needs compute capability 8.0",
)
def test_flash_attention_equals_plain_attention():
    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(flash.float(), plain, rtol=0.02, atol=0.02)


def test_fused_adamw_equals_the_plain_loop():
    torch.manual_seed(0)
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=32, vocab_size=512, n_layer=2, n_head=2, n_embd=64)).to(
            pick_device("cuda")
        )
        optimizer = model.configure_optimizers(0.1, 1e-3)
        if not fused:
            groups = [
                {"params": g["params"], "weight_decay": g["weight_decay"]}
                for g in optimizer.param_groups
            ]
            optimizer = torch.optim.AdamW(
                groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False
            )
        ids = torch.randint(
            512, (4, 33), device="cuda", generator=torch.Generator("cuda").manual_seed(1)
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(ids[:, :-1], ids[:, 1:])[1].backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_sampling_equals_eager():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=2, n_head=2, n_embd=64)).to(
        "cuda"
    )
    compiled = torch.compile(model.next_logits, dynamic=False)
    prompts = [[1, 2, 3], [4]]
    plain = model.generate(prompts, 20, temperature=0)
    assert (
        plain
        == model.generate(prompts, 20, temperature=0, next_logits=compiled)
        == model.generate(prompts, 20, temperature=0, use_cache=False)
    )


def test_auto_takes_the_largest_micro_batch_that_fits():
    device = torch.device("cuda", 0)
    config = Config(seq_len=256, total_batch_size=256 * 4096, compile=False)
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=2, n_head=2, n_embd=128)).to(
        device
    )
    optimizer = model.configure_optimizers(0.1, 1e-3)
    autocast = torch.autocast("cuda", torch.bfloat16)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(4e9 / total)
    try:
        B = pick_micro_batch_size(model, model, optimizer, config, 1, autocast, device)
        assert B & (B - 1) == 0 and 1 <= B < 4096
        for size, fits in ((B, True), (2 * B, False)):
            idx = torch.zeros(size, 256, dtype=torch.int64, device=device)
            try:
                with autocast:
                    loss = model(idx, idx, return_logits=False)[1]
                loss.backward()
                assert fits
            except torch.OutOfMemoryError:
                assert not fits
            free_memory(optimizer)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
