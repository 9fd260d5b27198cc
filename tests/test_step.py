"""A training step: the papers' formulas, precisions, schedules, and what a run's steps work with.
(test_2, test_3 and test_9 of test_invariants.py have the rest.)"""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import log_of, train

import train_gpt2
from train_gpt2 import GPT, Args, GPTConfig, get_batch_size, get_lr, tokens_before, training_step

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def random_batch(B, T=16):
    """(inputs, targets), (B, T) each."""
    ids = torch.randint(50257, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


# The papers' formulas -------------------------------------------------------------------------


def by_the_paper(model, lr, clip, batches_of_steps):
    """Algorithm 2 of Loshchilov and Hutter, applied to the mean gradient of each step's batches
    after clipping it to the norm `clip`, in float64. Returns the weights and the norms."""
    params = list(model.parameters())
    weights = [p.detach().double() for p in params]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    norms = []
    for t, batches in enumerate(batches_of_steps, 1):
        for p, w in zip(params, weights):
            p.data = w.float()
        losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in batches]
        grads = torch.autograd.grad(sum(losses) / len(losses), params)
        norms.append(math.sqrt(sum((g.double() ** 2).sum().item() for g in grads)))
        for g, w, (m, v), p in zip(grads, weights, moments, params):
            g = g.double() * min(1, clip / norms[-1])
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            w.mul_(1 - lr * (0.1 if p.dim() >= 2 else 0))
            w.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
    return weights, norms


@pytest.mark.parametrize("clip", [0.5, 1e9, 0])
def test_a_training_step_equals_the_papers_formulas(tiny, clip):
    """Accumulation, clipping and AdamW: three steps, each with three micro-batches."""
    x, y = random_batch(18)
    micro_batches = list(zip(x.split(2), y.split(2)))
    batches = [micro_batches[:3], micro_batches[3:6], micro_batches[6:]]
    weights, norms = by_the_paper(copy.deepcopy(tiny), 1e-3, clip or math.inf, batches)
    assert min(norms) > 0.6  # so that a limit of 0.5 matters
    optimizer = tiny.configure_optimizers(0.1, 1e-3)
    for step, expected in zip(batches, norms):
        with torch.no_grad():
            mean_loss = sum(tiny(x, y).item() for x, y in step) / 3
        loss, norm = training_step(tiny, step, optimizer, NO_SCALER, OFF, clip)
        assert loss.item() == pytest.approx(mean_loss, rel=1e-5)
        assert norm.item() == pytest.approx(expected, rel=1e-4)
    for p, w in zip(tiny.parameters(), weights):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-5)


def test_float16_gradients_are_scaled_and_unscaled(tiny):
    """The loss is multiplied by 65536 before backward(), but the norm is that of the gradient."""
    optimizer, batch = tiny.configure_optimizers(0.1, 1e-3), random_batch(2)
    scaler, autocast = torch.amp.GradScaler("cpu"), torch.autocast("cpu", torch.float16)
    tiny(*batch).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in tiny.parameters()]).item()
    true = tiny.transformer.ln_f.bias.grad.norm().item()
    seen = []
    tiny.transformer.ln_f.bias.register_hook(lambda grad: seen.append(grad.norm().item()))
    _, norm = training_step(tiny, [batch], optimizer, scaler, autocast, 1.0)
    assert norm.item() == pytest.approx(expected, rel=0.01)
    assert seen == pytest.approx([65536 * true], rel=0.01)


# Schedules by hand ----------------------------------------------------------------------------

LR = [(0, 6e-4 / 715), (356, 6e-4 * 357 / 715), (714, 6e-4), (715, 6e-4)]
LR += [(715 + 9179, 3.3e-4), (19073, 6e-5), (30000, 6e-5)]


@pytest.mark.parametrize("step, lr", LR)
def test_the_learning_rate_of_a_step(step, lr):
    assert get_lr(step, Args()) == pytest.approx(lr, rel=1e-9)


def test_the_batch_size_of_a_step():
    args = Args(total_batch_size=800, batch_ramp_steps=7)
    expected = [100, 100, 100, 200, 200, 400, 400, 800, 800]
    assert [get_batch_size(step, args) for step in range(9)] == expected
    assert [tokens_before(n, args) for n in range(10)] == [sum(expected[:n]) for n in range(10)]
    assert get_batch_size(0, Args()) == get_batch_size(10**6, Args()) == 524288
    assert tokens_before(19073, Args()) == 19073 * 524288


# Runs -----------------------------------------------------------------------------------------


def test_the_log_and_the_console_output_say_the_same(base):
    _, out, screen = base
    log = log_of(out)
    assert set(log) == {"train", "val", "lr", "norm", "speed"}
    assert list(log["train"]) == list(log["norm"]) == list(range(8))
    assert list(log["val"]) == [0, 4, 8]
    assert abs(log["train"][0] - math.log(257)) < 0.1 and log["val"][8] < log["val"][0] - 0.3
    lines = [line for line in screen.splitlines() if re.match(r"step +\d+/8 ", line)]
    for step, line in enumerate(lines):
        for text in (
            f"{step}/8 | loss {log['train'][step]:.6f} | lr {log['lr'][step]:.4e} ",
            f"| norm {log['norm'][step]:.4f} | {256e3 / log['speed'][step]:.1f} ms",
            f"{log['speed'][step]:,.0f} tokens/s",
        ):
            assert text in line
    assert len(lines) == 8
    assert "256 tokens = 4 sequences x 32 tokens x 1 processes x 2 micro-steps" in screen


@pytest.mark.parametrize("dtype, scale", [("float16", 65536), ("bfloat16", 1), ("float32", 1)])
def test_what_the_steps_of_a_run_work_with(shards, tmp_path, monkeypatch, dtype, scale):
    """The scheduled learning rate in both groups, weight decay in that of the matrices, clipping,
    TF32, one shape for torch.compile, the precision, and a scaler for float16 only."""
    seen, compiled, original = [], [], train_gpt2.training_step

    def step(model, micro_batches, optimizer, scaler, autocast, grad_clip):
        groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        with autocast:
            product = torch.ones(1, 1) @ torch.ones(1, 1)
        seen.append((groups, product.dtype, scaler.get_scale(), scaler.is_enabled(), grad_clip))
        return original(model, micro_batches, optimizer, scaler, autocast, grad_clip)

    monkeypatch.setattr(train_gpt2, "training_step", step)
    monkeypatch.setattr(torch, "compile", lambda model, **flags: compiled.append(flags) or model)
    torch.set_float32_matmul_precision("highest")
    flags = ["--weight_decay", 0.3, "--grad_clip", 0.7, "--compile", "--dtype", dtype]
    train(shards, tmp_path / "out", *flags)
    assert torch.get_float32_matmul_precision() == "high" and compiled == [dict(dynamic=False)]
    args = Args(max_steps=8, warmup_steps=2, max_lr=1e-2, min_lr=1e-3)
    rates = [get_lr(step, args) for step in range(8)]
    assert list(log_of(tmp_path / "out")["lr"].values()) == pytest.approx(rates)
    rest = (getattr(torch, dtype), scale, scale > 1, 0.7)
    assert seen == [([(lr, 0.3), (lr, 0.0)], *rest) for lr in rates]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_float32(base, tmp_path, dtype):
    shards, out, _ = base
    done = train(shards, tmp_path / "out", "--dtype", dtype)
    ours, theirs = log_of(tmp_path / "out")["train"], log_of(out)["train"]
    assert "step skipped" not in done.stdout
    assert ours == pytest.approx(theirs, abs=0.05) and ours != theirs


def test_one_batch_is_overfitted(shards, tmp_path):
    flags = ["--overfit_one_batch", "--max_steps", 80, "--val_every", 0]
    train(shards, tmp_path / "out", *flags, "--total_batch_size", 128)
    losses = log_of(tmp_path / "out")["train"]
    assert losses[0] > 5 and losses[79] < 0.1


# What suits a CPU -----------------------------------------------------------------------------


def test_bfloat16_is_used_only_where_its_matrix_products_are_faster(monkeypatch):
    timed = []

    def timeit(product, number):
        timed.append(product().dtype)
        return next(clock)

    monkeypatch.setattr(train_gpt2.timeit, "timeit", timeit)
    cpu = torch.device("cpu")
    clock = iter([5.0, 9.0, 2.0, 1.0, 3.0, 9.0, 3.0, 9.0, 3.0, 9.0])  # the minimum of each counts
    assert train_gpt2.pick_dtype("auto", cpu) == "bfloat16"
    clock = iter([1.0, 2.0] * 5)
    assert train_gpt2.pick_dtype("auto", cpu) == "float32"
    assert timed == [torch.float32, torch.bfloat16] * 10
    assert train_gpt2.pick_dtype("float16", cpu) == "float16"  # as asked


PICKS = [  # settings, number of processes, sequences of a micro-batch
    (dict(seq_len=1024, total_batch_size=2**19), 1, 4),  # 4,096 tokens
    (dict(seq_len=128, total_batch_size=128 * 96), 1, 32),
    (dict(seq_len=128, total_batch_size=128 * 75), 1, 25),  # the largest divisor of 75 up to 32
    (dict(seq_len=5000, total_batch_size=320000), 1, 1),  # no fewer than one
    (dict(seq_len=32, total_batch_size=2048, batch_ramp_steps=3), 4, 2),  # an eighth of it, shared
    (dict(micro_batch_size=3), 1, 3),
]


@pytest.mark.parametrize("settings, world_size, expected", PICKS)
def test_the_automatic_micro_batch_of_a_cpu(settings, world_size, expected):
    model = GPT(GPTConfig(block_size=8192, vocab_size=2, n_layer=1, n_head=1, n_embd=2))
    found = train_gpt2.pick_micro_batch_size(Args(**settings), model, world_size, OFF, None)
    assert found == expected
