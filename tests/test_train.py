"""Runs of the real script: the log, console output, resuming, precision, compilation, the growing
batch, the command line, and the form of the source code."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAULTS, ROOT, log_of, records, run, run_here, train, write_shards
from transformers import GPT2LMHeadModel

import hellaswag
import train_gpt2
from fineweb import UserError
from train_gpt2 import (
    GPT,
    Args,
    DataLoaderLite,
    GPTConfig,
    Log,
    Progress,
    Run,
    TrainConfig,
    find_checkpoints,
    get_lr,
    parse,
    peak_flops,
    pick_device,
    pick_dtype,
    pick_micro_batch_size,
    print_samples,
    read_log,
)

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture
def spied(monkeypatch):
    """The settings that each training step of a run works with: a list that grows by a
    SimpleNamespace per step."""
    seen, original = [], train_gpt2.training_step

    def step(model, micro_batches, optimizer, scaler, autocast, grad_clip):
        groups = optimizer.param_groups
        with autocast:
            mixed = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if mixed else torch.float32
        seen.append(
            SimpleNamespace(
                lr=[group["lr"] for group in groups],
                weight_decay=[group["weight_decay"] for group in groups],
                dtype=dtype,
                scale=scaler.get_scale(),
                grad_clip=grad_clip,
                optimizer=optimizer,
                scaler=scaler,
            )
        )
        return original(model, micro_batches, optimizer, scaler, autocast, grad_clip)

    monkeypatch.setattr(train_gpt2, "training_step", step)
    return seen


def test_the_log_and_the_console_output(base):
    _, out, screen = base
    log = log_of(out)
    assert set(log) == {"train", "val", "lr", "norm", "speed"}
    assert list(log["train"]) == list(log["lr"]) == list(log["norm"]) == list(range(8))
    assert list(log["val"]) == [0, 4, 8]
    assert log["lr"][0] == pytest.approx(5e-3)
    assert log["lr"][1] == log["lr"][2] == pytest.approx(1e-2)
    assert abs(log["train"][0] - math.log(50304)) < 0.1 and log["val"][8] < log["val"][0] - 0.3
    assert all(len(value.split(".")[1]) >= 6 for _, _, value in read_log(out / "log.txt"))
    batch = "256 tokens = 4 sequences x 32 tokens x 1 processes x 2 micro-steps"
    assert "ln 50304 = 10.8258" in screen and batch in screen and "0.34 epochs" in screen
    lines = [line for line in screen.splitlines() if re.match(r"step +\d+/8 ", line)]
    assert len(lines) == 8
    for step, line in enumerate(lines):
        for text in (
            f"{step}/8",
            f"loss {log['train'][step]:.6f}",
            f"lr {log['lr'][step]:.4e}",
            f"norm {log['norm'][step]:.4f}",
            f"{log['speed'][step]:,.0f} tokens/s",
        ):
            assert text in line
        assert re.search(r"left \d+:\d\d:\d\d$", line)
        (dt,) = re.findall(r"([\d.]+) ms", line)
        assert log["speed"][step] == pytest.approx(256 / (float(dt) / 1e3), rel=0.01)


def test_the_schedule_reaches_the_optimizer(shards, tmp_path, spied):
    """Both groups of the optimizer step with the learning rate that is logged."""
    train(shards, tmp_path / "out")
    lrs = [lr for _, stream, lr in read_log(tmp_path / "out/log.txt") if stream == "lr"]
    args = Args(max_steps=8, warmup_steps=2, max_lr=1e-2, min_lr=1e-3)
    expected = [get_lr(step, args) for step in range(8)]
    assert [float(lr) for lr in lrs] == pytest.approx(expected)
    assert [step.lr for step in spied] == [[lr, lr] for lr in expected]


@pytest.mark.parametrize("value", [None, 0.3])
def test_weight_decay_and_clipping_reach_the_optimizer(shards, tmp_path, spied, value):
    flags = [] if value is None else ["--weight_decay", value, "--grad_clip", value]
    train(shards, tmp_path / "out", *flags, "--max_steps", 1, "--val_every", 0)
    assert spied[0].weight_decay == [0.1 if value is None else value, 0]
    assert spied[0].grad_clip == (1.0 if value is None else value)


def test_the_learning_rate_matters(base, tmp_path):
    shards, out, _ = base
    train(shards, tmp_path / "out", "--max_lr", 1e-9, "--min_lr", 1e-9, "--weight_decay", 0)
    losses = log_of(tmp_path / "out")["val"]
    assert losses[8] == pytest.approx(losses[0], abs=1e-4) != log_of(out)["val"][8]


def test_clipping_reaches_the_step(base, tmp_path):
    shards, out, _ = base
    train(shards, tmp_path / "free", "--grad_clip", 0)
    train(shards, tmp_path / "tight", "--grad_clip", 1e-7)  # so small that AdamW's eps matters
    clipped, free, tight = (log_of(d) for d in (out, tmp_path / "free", tmp_path / "tight"))
    assert clipped["norm"][0] == free["norm"][0] == tight["norm"][0]  # before clipping
    assert clipped["val"][8] != free["val"][8] and tight["val"][8] > clipped["val"][8] + 0.05


def test_the_settings_for_gpus(shards, tmp_path, monkeypatch, spied):
    """TF32, fixed shapes, the precision that was asked for, and a scaler for float16 only."""
    flags = []
    monkeypatch.setattr(torch, "compile", lambda m, **given: flags.append(given) or m)
    torch.set_float32_matmul_precision("highest")
    for dtype in ("float16", "bfloat16", "float32"):
        more = ["--dtype", dtype, "--max_steps", 1, "--compile"]
        train(shards, tmp_path / dtype, *more)
        assert torch.get_float32_matmul_precision() == "high"
    assert flags == [dict(dynamic=False)] * 3
    assert [step.dtype for step in spied] == [torch.float16, torch.bfloat16, torch.float32]
    assert [step.scale for step in spied] == [65536, 1, 1]
    assert [step.scaler.is_enabled() for step in spied] == [True, False, False]


def test_a_resumed_float16_run_keeps_its_scale(shards, tmp_path, monkeypatch):
    scales, original = [], train_gpt2.training_step

    def step(model, micro_batches, optimizer, scaler, *args):
        scales.append(scaler.get_scale())
        if len(scales) == 1:
            scaler.load_state_dict(scaler.state_dict() | dict(scale=1024.0))
        return original(model, micro_batches, optimizer, scaler, *args)

    monkeypatch.setattr(train_gpt2, "training_step", step)
    flags = ["--dtype", "float16", "--max_steps", 3, "--val_every", 0]
    train(shards, tmp_path / "out", *flags, "--save_every", 2)
    shutil.rmtree(tmp_path / "out/step_00003")
    run_here("--resume", "--out_dir", tmp_path / "out")
    assert scales == [65536, 1024, 1024, 1024]


@FAULTS
def test_the_batch_grows(base, tmp_path):
    """An eighth, a quarter and half of the batch, for two steps each, then all of it. A run that is
    resumed during that time, by two processes, has the same batches and losses."""
    shards, _, _ = base
    flags = ["--batch_ramp_steps", 6, "--total_batch_size", 1024, "--save_every", 3]
    done = train(shards, tmp_path / "whole", *flags, batch=2)
    log = log_of(tmp_path / "whole")
    assert log["batch"] == {0: 128, 2: 256, 4: 512, 6: 1024}
    assert "8 steps are 0.64 epochs" in done.stdout  # 3,840 of 6,000 tokens
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/step_00008")
    shutil.rmtree(tmp_path / "part/step_00006")
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "part", processes=2)
    again = log_of(tmp_path / "part")
    assert again["batch"] == log["batch"]
    for stream in ("train", "norm", "val"):
        assert again[stream] == pytest.approx(log[stream], abs=1e-4), stream


def test_time_left_counts_tokens(tiny):
    """Not steps, because steps have different numbers of tokens."""
    args = Args(total_batch_size=800, batch_ramp_steps=6, max_steps=8, seq_len=25)
    loader = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    progress = Progress(args, tiny, loader)
    # Step 5 has 400 tokens and takes 25 s; 1,600 tokens are left.
    assert progress.update(5, 25.0) == "16 tokens/s | left 0:01:40"
    progress.peak = 400 * progress.flops / 25 * 2
    assert progress.update(5, 25.0) == "16 tokens/s | MFU 50.0% | left 0:01:40"
    # A slow step counts 10%: 1,600 tokens * (0.9 * 25 s + 0.1 * 50 s) / 400 tokens
    assert progress.update(5, 50.0) == "8 tokens/s | MFU 25.0% | left 0:01:50"


# -- resuming


def test_resume_remembers_the_run(shards, tmp_path):
    """All settings come from the checkpoint, and a flag that changes one is printed."""
    flags = "--save_every 4 --max_lr 3e-3 --weight_decay 0.3 --grad_clip 0.7 --sample_tokens 5"
    train(shards, tmp_path / "whole", *flags.split(), "--max_steps", 10)
    train(shards, tmp_path / "part", *flags.split(), "--max_steps", 10)
    for step in (8, 10):
        shutil.rmtree(tmp_path / f"part/step_{step:05d}")
    done = run_here("--resume", "--out_dir", tmp_path / "part")
    assert records(tmp_path / "whole") == records(tmp_path / "part") and "→" not in done.stdout
    done = run_here("--resume", "--out_dir", tmp_path / "part", "--max_steps", 12, "--val_every", 2)
    assert "--resume: max_steps 10 → 12" in done.stdout
    assert "--resume: val_every 4 → 2" in done.stdout and done.stdout.count("→") == 2
    assert list(log_of(tmp_path / "part")["train"])[-1] == 11


def test_resume_keeps_the_precision(base, tmp_path, monkeypatch, spied):
    """Unless --dtype is given; then the new one is kept."""
    out = tmp_path / "out"
    shutil.copytree(base[1], out)
    monkeypatch.setattr(train_gpt2, "bfloat16_is_faster", lambda: 1 / 0)  # it is not timed again
    done = run_here("--resume", "--out_dir", out, "--max_steps", 9)
    assert "1 x cpu, float32" in done.stdout and "--resume: dtype" not in done.stdout
    done = run_here("--resume", "--out_dir", out, "--dtype", "float16", "--max_steps", 10)
    assert "--resume: dtype float32 → float16" in done.stdout
    assert "1 x cpu, float16" in done.stdout
    done = run_here("--resume", "--out_dir", out, "--max_steps", 11)
    assert "1 x cpu, float16" in done.stdout and "--resume: dtype" not in done.stdout
    done = run_here("--resume", "--out_dir", out, "--dtype", "bfloat16", "--max_steps", 12)
    assert "--resume: dtype float16 → bfloat16" in done.stdout
    half = [torch.float16, torch.float16, torch.bfloat16]
    assert [step.dtype for step in spied] == [torch.float32, *half]
    assert [step.scaler.is_enabled() for step in spied] == [False, True, True, False]
    assert [step.scale for step in spied][::3] == [1, 1]
    path = out / "step_00012/training_state.pt"
    assert torch.load(path, weights_only=True)["args"]["dtype"] == "bfloat16"
    assert all(math.isfinite(loss) for loss in log_of(out)["train"].values())


def test_a_finished_run_has_nothing_left_to_do(base, tmp_path, spied):
    shutil.copytree(base[1], tmp_path / "out")
    done = run_here("--resume", "--out_dir", tmp_path / "out")
    assert "there is nothing left to do: --max_steps is 8" in done.stdout and spied == []
    assert records(tmp_path / "out") == records(base[1])


def test_resume_uses_a_changed_weight_decay(base, tmp_path, spied):
    """The optimizer's state, which is loaded, holds the old one. With a learning rate near 0 only
    a large weight decay moves the weights."""
    out = tmp_path / "out"
    shutil.copytree(base[1], out)
    flags = ["--max_steps", 9, "--max_lr", 1e-9, "--min_lr", 1e-9, "--weight_decay", 1e8]
    done = run_here("--resume", "--out_dir", out, *flags)
    assert "--resume: weight_decay 0.1 → 100000000.0" in done.stdout
    assert spied[0].weight_decay == [1e8, 0]
    before, after = (
        torch.load(out / f"step_0000{step}/training_state.pt", weights_only=True)["model"]
        for step in (8, 9)
    )
    for name, weight in before.items():
        expected = weight * (1 - 1e-9 * 1e8) if weight.dim() >= 2 else weight
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-7, msg=name)


def test_auto_precision_is_timed_once_and_recorded(shards, tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(train_gpt2, "bfloat16_is_faster", lambda: timed.append(1) or True)
    train(shards, tmp_path / "out", "--dtype", "auto", "--max_steps", 2)
    path = tmp_path / "out/step_00002/training_state.pt"
    assert torch.load(path, weights_only=True)["args"]["dtype"] == "bfloat16"
    done = run_here("--resume", "--out_dir", tmp_path / "out", "--max_steps", 3)
    assert "1 x cpu, bfloat16" in done.stdout and timed == [1]


def test_resume_without_a_checkpoint_starts_at_step_0(base, tmp_path):
    """The log of what was trained before is kept under another name."""
    shards, out, _ = base
    (tmp_path / "out").mkdir()
    old = "0 val 10.0\n0 train 9.0\n# a note\n"
    (tmp_path / "out/log.txt").write_text(old)
    done = train(shards, tmp_path / "out", "--resume", "--save_every", 4)
    assert records(tmp_path / "out") == records(out)
    assert (tmp_path / "out/log.txt.1").read_text() == old
    assert "there is no checkpoint, so training starts again" in done.stdout


def test_a_log_with_notes_only_is_continued(base, tmp_path):
    shards, out, _ = base
    (tmp_path / "out").mkdir()
    note = "# a note, caf\xe9: \u2028 \x0c \x85 ".encode() + b"caf\xe9\n"  # not all of it is UTF-8
    (tmp_path / "out/log.txt").write_bytes(note)
    train(shards, tmp_path / "out", "--resume", "--save_every", 4)
    assert (tmp_path / "out/log.txt").read_bytes().startswith(note + b"0 val ")
    for stream, values in log_of(out).items():
        assert stream == "speed" or log_of(tmp_path / "out")[stream] == values


def test_resuming_with_other_shards_is_warned_about(base, tmp_path):
    shards, out, _ = base
    shutil.copytree(out, tmp_path / "out")
    other = write_shards(tmp_path / "other", train=(3000, 2000))
    flags = ["--resume", "--out_dir", tmp_path / "out", "--max_steps", 9]
    done = run_here(*flags, "--data_dir", other)
    assert "other shards than before" in done.stdout and "data_dir" in done.stdout


def test_the_newest_checkpoints_are_kept(shards, tmp_path):
    flags = ["--save_every", 2, "--keep_checkpoints", 2, "--val_every", 0]
    train(shards, tmp_path / "out", *flags)
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [4, 6, 8]
    assert not list((tmp_path / "out").glob("tmp_*"))


def test_checkpoints_are_found_by_their_number(tmp_path):
    """Not in the order of the text of their names, and without what only looks like one of them."""
    for name in ("step_99998", "step_100000", "step_00002", "step_00002_copy", "step_", "steps"):
        (tmp_path / name).mkdir()
    names = ["step_00002", "step_99998", "step_100000"]
    steps = [2, 99998, 100000]
    assert find_checkpoints(tmp_path) == [(s, tmp_path / name) for s, name in zip(steps, names)]
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_a_resumed_log_drops_what_is_written_again(tmp_path):
    """Training records from the first step on; evaluations in that step only if they are repeated.
    A skipped step has a record of its own."""
    text = "0 val 5.0\n0 train 4.0\nhello\n1 train 3.0\n2 val 2.5\n2 hella 0.25\n2 train 9.0\n"
    text += "3 val 2.0\n3 tra"
    (tmp_path / "log.txt").write_text(text)
    log = Log(Args(out_dir=str(tmp_path), data_dir=str(tmp_path)), 2)
    kept = "0 val 5.0\n0 train 4.0\nhello\n1 train 3.0\n2 val 2.5\n2 hella 0.25\n"
    assert (tmp_path / "log.txt").read_text() == kept
    log.write(2, {"val": 1 / 3})
    run = object.__new__(Run)
    run.args, run.log_file, run.skipped, run.saved_step = Args(max_steps=9), log, 0, 0
    run.progress = SimpleNamespace(update=lambda step, dt: "")
    run.log_step(2, loss=2.0, lr=0.5, norm=math.inf, dt=2.0)
    run.log_step(3, loss=2.0, lr=0.5, norm=1.0, dt=2.0)
    log.close()
    kept = "0 val 5.0\n0 train 4.0\nhello\n1 train 3.0\n2 hella 0.25\n2 val 0.333333333333\n"
    written = "2 train 2.000000000000\n2 lr 0.500000000000\n2 norm inf\n"
    written += "2 speed 262144.000000000000\n2 skip 1.000000000000\n"
    written += "3 train 2.000000000000\n3 lr 0.500000000000\n3 norm 1.000000000000\n"
    written += "3 speed 262144.000000000000\n"
    assert (tmp_path / "log.txt").read_text() == kept + written
    assert read_log(tmp_path / "log.txt")[4] == (2, "val", "0.333333333333")


def test_the_log_stays_one_file_during_a_run(tmp_path):
    """So `tail -f log.txt` shows all of it. Only evaluations that are repeated make a new file."""
    path = tmp_path / "log.txt"
    path.write_text("1 train 3.0\n2 val 2.5\n")
    log = Log(Args(out_dir=str(tmp_path), data_dir=str(tmp_path)), 2)
    log.write(2, {"val": 2.0})
    with path.open() as opened:
        for step, values in ((2, {"train": 1.5}), (3, {"train": 1.25}), (4, {"val": 1.0})):
            log.write(step, values)
        assert opened.read() == path.read_text()
    log.close()
    assert [record[:2] for record in read_log(path)][-3:] == [
        (2, "train"),
        (3, "train"),
        (4, "val"),
    ]


def test_a_run_that_failed_before_its_first_record_may_start_again(shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(train_gpt2, "evaluate", lambda *args: {}["failed"])
        train(shards, tmp_path / "out")
    assert (tmp_path / "out/log.txt").exists()
    train(shards, tmp_path / "out", "--max_steps", 1)


# -- checkpoints, samples, the demo


def test_checkpoints_load_in_hugging_face_and_start_another_run(base, tmp_path):
    shards, out, _ = base
    assert [step for step, _ in find_checkpoints(out)] == [4, 8]
    hf = GPT2LMHeadModel.from_pretrained(out / "step_00008")
    ids = np.load(shards / "made_val_000000.npy")[: 15 * 32 + 1].astype(np.int64)
    ids = torch.from_numpy(ids)
    with torch.no_grad():
        logits = hf(ids[:-1].view(15, 32)).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
    assert loss == pytest.approx(log_of(out)["val"][8], abs=2e-3)  # 50257 rows here, not 50304
    start = ["--init_from", out / "step_00008", "--max_steps", 1]
    args = "--seq_len 32 --device cpu --dtype float32 --total_batch_size 256 --val_tokens 500"
    quiet = "--hellaswag_every 0 --sample_every 0 --warmup_steps 1".split()
    folders = ["--data_dir", shards, "--out_dir", tmp_path / "out"]
    done = run_here(*start, *args.split(), *quiet, *folders)
    assert "vocab_size=50257" in done.stdout
    assert log_of(tmp_path / "out")["val"][0] == pytest.approx(loss, abs=1e-5)  # the original's


def test_samples_of_a_checkpoint(base):
    samples = ["--sample_only", "--prompt", "Once", "--sample_tokens", 5, "--device", "cpu"]
    samples += ["--dtype", "float32"]
    done = run_here("--init_from", base[1] / "step_00008", *samples)
    assert [line[:6] for line in done.stdout.splitlines() if line[:1] == ">"] == ["> Once"] * 4
    again = run_here("--resume", "--out_dir", base[1], *samples)
    assert again.stdout == done.stdout


def test_sampling_flags_reach_the_samples(base, tmp_path, monkeypatch):
    """Of a training run, and of --sample_only, whose random numbers also depend on --seed."""
    seen, original = [], GPT.generate

    def generate(self, idx, max_new_tokens, **options):
        seen.append(dict(n=max_new_tokens, **options))
        return original(self, idx, max_new_tokens, **options)

    monkeypatch.setattr(GPT, "generate", generate)
    flags = "--sample_tokens 3 --temperature 0.7 --top_k 9 --top_p 0.8".split()
    train(base[0], tmp_path / "out", *flags, "--max_steps", 1, "--sample_every", 1)
    given = dict(n=3, temperature=0.7, top_k=9, top_p=0.8)
    assert seen == [dict(given, seed=42)] * 2
    weights = ["--sample_only", "--init_from", base[1] / "step_00008", "--device", "cpu"]
    run_here(*weights, *flags, "--seed", 7)
    assert seen[2:] == [dict(given, seed=7)]
    run_here(*weights)
    assert seen[3:] == [dict(n=32, temperature=1.0, top_k=50, top_p=1.0, seed=1337)]


def test_samples_end_at_end_of_text(tiny, capsys):
    with torch.no_grad():
        tiny.transformer.wte.weight[:] = 0
        tiny.transformer.wte.weight[50256] = 1
        tiny.transformer.ln_f.weight[:] = 0
        tiny.transformer.ln_f.bias[:] = 1  # each position now predicts <|endoftext|>
    print_samples(tiny, Args(prompt="Once", temperature=0, sample_tokens=3), OFF, n_samples=2)
    assert capsys.readouterr().out == "> Once\n" * 2


def test_overfitting_one_batch(shards, tmp_path):
    flags = ["--overfit_one_batch", "--max_steps", 80, "--val_every", 0]
    train(shards, tmp_path / "out", *flags, "--total_batch_size", 128)
    losses = log_of(tmp_path / "out")["train"]
    assert losses[0] > 10 and losses[79] < 0.1


@pytest.mark.parametrize("flags, steps", [([], [0, 1, 2]), (["--overfit_one_batch"], [0])])
def test_batches_are_read_in_another_thread(shards, tmp_path, monkeypatch, flags, steps):
    """Each one once. (The thread may also begin to read a fourth batch.)"""
    read, original = [], DataLoaderLite.micro_batches

    def micro_batches(loader, step):
        read.append((step, threading.current_thread() is threading.main_thread()))
        return original(loader, step)

    monkeypatch.setattr(DataLoaderLite, "micro_batches", micro_batches)
    train(shards, tmp_path / "out", *flags, "--max_steps", 3, "--val_every", 0)
    assert read[:3] == [(step, False) for step in steps]


def test_demo_settings_train_on_the_users_own_shards_too(shards, tmp_path):
    before = sorted(shards.iterdir())
    done = train(shards, tmp_path / "out", "--demo", "--save_every", 0, "--max_steps", 1)
    assert "6,000 tokens in 2 train shards" in done.stdout and sorted(shards.iterdir()) == before


def test_a_small_vocabulary_trains_without_samples_and_hellaswag(tmp_path):
    shards = write_shards(tmp_path / "shards", vocab=100)
    flags = ["--vocab_size", 100, "--sample_every", 1, "--max_steps", 2, "--save_every", 1]
    done = train(shards, tmp_path / "out", *flags)
    assert "warning: samples and HellaSwag are off" in done.stdout and "> " not in done.stdout
    assert "--sample_only" not in done.stdout  # no advice that would fail


# -- HellaSwag


def hellaswag_file(path):
    endings = ["on it.", "far away", "and ate", "."]
    record = dict(activity_label="a", ctx="The cat sat", endings=endings)
    lines = [json.dumps(dict(record, ind=i, label=i % 4)) for i in range(7)]
    path.write_text("\n".join(lines))
    return path


def test_hellaswag_in_training_changes_nothing_else(base, tmp_path):
    shards, out, _ = base
    data = hellaswag_file(tmp_path / "items.jsonl")
    train(shards, tmp_path / "out", "--hellaswag_every", 4, "--hellaswag_data", data)
    ours = log_of(tmp_path / "out")
    assert ours["train"] == log_of(out)["train"]
    assert list(ours["hella"]) == [0, 4, 8]
    assert all(abs(v * 7 - round(v * 7)) < 1e-6 for v in ours["hella"].values())


def test_a_missing_hellaswag_file_is_one_warning(shards, tmp_path):
    flags = ["--max_steps", 1, "--hellaswag_every", 1]
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    data = ["--hellaswag_data", tmp_path / "no/such.jsonl"]
    done = train(shards, tmp_path / "out", *flags, *data, env=nowhere)
    assert done.stdout.count("warning: HellaSwag is off") == 1 and "done" in done.stdout


# -- precision, compilation, devices


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_float32(base, tmp_path, dtype):
    shards, out, _ = base
    steps = 8 if dtype == "bfloat16" else 3  # float16 is slow here
    done = train(shards, tmp_path / "out", "--dtype", dtype, "--max_steps", steps)
    ours, theirs = log_of(tmp_path / "out")["train"], log_of(out)["train"]
    theirs = {step: loss for step, loss in theirs.items() if step < steps}
    skipped = done.stdout.count("step skipped")
    assert skipped == 0 or dtype == "float16"  # its scale starts high and is lowered
    assert skipped == len(log_of(tmp_path / "out").get("skip", []))
    assert ours != theirs
    assert ours == pytest.approx(theirs, abs=0.05 if not skipped else 1.0)


@FAULTS
def test_compiled_training_and_validation_agree_with_eager(shards, tmp_path):
    """15 validation sequences: the last micro-batch has three instead of four."""
    args = ["--n_layer", 1, "--sample_every", 4, "--sample_tokens", 8]
    train(shards, tmp_path / "eager", *args)
    env = {"TORCH_LOGS": "recompiles"}
    done = train(shards, tmp_path / "out", *args, "--compile", env=env)
    ours, theirs = log_of(tmp_path / "out"), log_of(tmp_path / "eager")
    for stream in ("train", "val"):
        assert ours[stream] == pytest.approx(theirs[stream], abs=1e-4)
    # One graph is for validation and one for training; samples are not compiled.
    assert done.stderr.count("Recompiling function forward") <= 1, done.stderr
    assert done.stdout.count("> Hello, I'm a language model,") == 3 * 4


def test_device_precision_and_peak(tiny, monkeypatch):
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda", 1), torch.device("mps")
    assert pick_device("cpu") == cpu and pick_dtype("float16", cpu) == "float16"
    assert peak_flops(cpu) is None
    for faster, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(train_gpt2, "bfloat16_is_faster", lambda faster=faster: faster)
        assert pick_dtype("auto", cpu) == dtype and pick_dtype("auto", mps) == "float32"
    for fast, dtype in ((True, "bfloat16"), (False, "float16")):  # False: a V100 or a T4
        # They emulate bfloat16, which does not count.
        supported = lambda including_emulation=True: fast or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert pick_dtype("auto", cuda) == dtype
    names = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756}
    names |= {"NVIDIA H200": 989, "NVIDIA L4": 121, "NVIDIA L40S": 362, "Tesla T4": 65}
    names |= {"NVIDIA GeForce RTX 4090": 165, "NVIDIA A10G": 70, "Quadro P400": None}
    names |= {"NVIDIA GB200": 2500, "NVIDIA B200": 2250, "NVIDIA B300 SXM6 AC": 2250}
    names |= {"NVIDIA H20": 148, "NVIDIA H200 NVL": 835, "NVIDIA RTX 6000 Ada Generation": 364}
    names |= {"NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 504, "NVIDIA L40": 181}
    names |= {"NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GeForce RTX 4090 D": None}
    names |= {"NVIDIA A100-SXM4-40GB MIG 1g.5gb": None}
    for name, tflops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    loader = SimpleNamespace(device=torch.device("cuda"), world_size=8)
    for dtype, peak in (("bfloat16", 8 * 756e12), ("float32", math.inf)):  # inf: no MFU is shown
        assert Progress(Args(dtype=dtype), tiny, loader).peak == peak


def test_a_cpu_uses_bfloat16_if_its_matrix_products_are_faster(monkeypatch):
    timed = []

    def timeit(product, number):
        timed.append(product().dtype)
        return next(clock)

    monkeypatch.setattr(train_gpt2.timeit, "timeit", timeit)
    clock = iter([5.0, 9.0, 2.0, 1.0, 3.0, 9.0, 3.0, 9.0, 3.0, 9.0])  # the minimum of each counts
    assert train_gpt2.bfloat16_is_faster()
    clock = iter([1.0, 2.0] * 5)
    assert not train_gpt2.bfloat16_is_faster()
    assert timed == [torch.float32, torch.bfloat16] * 10


def test_the_micro_batch_size_on_a_cpu():
    """auto: 4,096 tokens, in a power of two of sequences that divides the batch."""
    model = GPT(GPTConfig(block_size=8192, vocab_size=2, n_layer=1, n_head=1, n_embd=2))

    def pick(world_size=1, **settings):
        return pick_micro_batch_size(Args(**settings), model, world_size, OFF)

    for seq_len, expected in ((1024, 4), (1000, 4), (128, 32), (5000, 1)):
        assert pick(seq_len=seq_len, total_batch_size=seq_len * 64) == expected
    assert pick(seq_len=32, total_batch_size=32 * 96) == 32
    assert pick(micro_batch_size=3) == 3
    assert pick(seq_len=32, total_batch_size=64) == 2
    ramp = dict(seq_len=32, total_batch_size=32 * 64, batch_ramp_steps=3)
    assert pick(4, **ramp) == 2  # an eighth of 64 sequences, divided among 4 processes
    with pytest.raises(UserError, match="--seq_len 9000: the model's context has 8192 tokens"):
        pick(seq_len=9000, micro_batch_size=1)


def test_the_micro_batch_size_on_a_gpu(monkeypatch):
    """auto, on a GPU that is only imitated: what fits into 85% of the memory that is left when 16
    bytes per parameter are reserved."""

    class OnGPU:
        """A model that claims to be on a GPU, where each sequence takes 100 bytes."""

        def __init__(self):
            self.config = GPTConfig()
            self.lm_head = type("Head", (), dict(weight=torch.empty(0)))
            self.lm_head.weight = type("Weight", (), dict(device=torch.device("cuda")))
            self.seen = []

        def num_params(self):
            return 1000

        def zero_grad(self, set_to_none):
            pass

        def __call__(self, idx, targets):
            self.seen.append(len(idx))
            return torch.zeros(1, requires_grad=True).sum()

    model, zeros, tensor = OnGPU(), torch.zeros, torch.tensor
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None, **kw: zeros(*args, **kw))
    monkeypatch.setattr(torch, "tensor", lambda value, device=None: tensor(value))
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
    peak = lambda device: 7 + 50 + 100 * model.seen[-1]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    for free, batch, world_size, expected in [
        (16000 + 100 * 40, 64, 1, 32),  # 34 would fit
        (16000 + 100 * 37, 64, 1, 16),  # 31
        (16000 + 100 * 10**6, 96, 1, 32),  # the largest power of two that divides 96
        (16000 + 100 * 10**6, 64, 4, 16),
        (16000 + 100 * 10**6, 2**20, 1, 2048),  # 65,536 tokens
        (0, 64, 1, 1),
    ]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        args = Args(seq_len=32, total_batch_size=32 * batch)
        assert pick_micro_batch_size(args, model, world_size, OFF) == expected
    assert model.seen == [32, 64, 32] * 6  # passes of 1024 and of 2048 tokens


# -- the command line

DEFAULTS = dict(  # of the recipe: GPT-2 (124M) on 10B tokens
    data_dir="edu_fineweb10B",
    out_dir="log",
    init_from="scratch",
    resume=False,
    model="gpt2",
    n_layer=None,
    n_head=None,
    n_embd=None,
    block_size=None,
    vocab_size=50304,
    total_batch_size=524288,
    batch_ramp_steps=0,
    micro_batch_size="auto",
    seq_len=1024,
    shuffle=True,
    seed=1337,
    overfit_one_batch=False,
    max_steps=19073,
    warmup_steps=715,
    max_lr=6e-4,
    min_lr=6e-5,
    weight_decay=0.1,
    grad_clip=1.0,
    val_every=250,
    hellaswag_every=250,
    sample_every=250,
    save_every=5000,
    save_minutes=30,
    val_tokens=10485760,
    prompt="Hello, I'm a language model,",
    sample_tokens=32,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
    device="auto",
    dtype="auto",
)
CONVENIENCES = dict(
    demo=False,
    finetune=False,
    epochs=0,
    keep_checkpoints=3,
    hellaswag_data=hellaswag.DATA,
    sample_only=False,
    tensorboard=False,
    wandb="",
)


def test_the_defaults_of_the_recipe():
    assert asdict(TrainConfig()) == DEFAULTS | {"compile": torch.cuda.is_available()}
    assert asdict(Args()) == asdict(TrainConfig()) | CONVENIENCES
    args, checkpoint = parse(["--device", "cpu"])
    assert asdict(args) == asdict(Args()) | {"device": "cpu", "compile": False}
    assert checkpoint is None


# A value for each flag, in the order of the fields, that is not its default.
FLAGS = """--data_dir d --out_dir no_run_is_here --init_from gpt2-xl --resume --model gpt2-medium
    --n_layer 3 --n_head 5 --n_embd 7 --block_size 9 --vocab_size 11 --total_batch_size 13
    --batch_ramp_steps 15 --micro_batch_size 17 --seq_len 19 --no-shuffle --seed 21
    --overfit_one_batch --max_steps 23 --warmup_steps 25 --max_lr 0.27 --min_lr 0.29
    --weight_decay 0.31 --grad_clip 0.33 --val_every 35 --hellaswag_every 37 --sample_every 39
    --save_every 41 --save_minutes 0.43 --val_tokens 45 --prompt p --sample_tokens 49
    --temperature 0.51 --top_k 53 --top_p 0.55 --device cpu --dtype float16 --compile --demo
    --finetune --epochs 0.57 --keep_checkpoints 59 --hellaswag_data h --sample_only --tensorboard
    --wandb w""".split()


@pytest.mark.parametrize("separator", ["_", "-"])
def test_each_flag_sets_its_field(separator):
    """Both --max_steps and --max-steps are accepted."""
    flags = [x.replace("_", separator) if x.startswith("--") else x for x in FLAGS]
    args, _ = parse(flags)
    values = iter(FLAGS)
    for flag in values:
        name = flag.removeprefix("--").removeprefix("no-")
        kind = type(getattr(args, name))
        expected = not flag.startswith("--no-") if kind is bool else kind(next(values))
        assert getattr(args, name) == expected != getattr(Args(), name), name
    assert sum(flag.startswith("--") for flag in FLAGS) == len(fields(Args))


def test_help_describes_each_flag():
    """With the comment beside its field."""
    done = run_here("--help")
    text = re.sub(r"[│\s]+", " ", done.stdout)
    for field in fields(Args):
        assert re.search(rf"--(no-)?{field.name.replace('_', '-')}\b", text), field.name
    for comment in ("tokens per sequence", "visit the sequences in a new random order"):
        assert comment in text


def test_importing_has_no_side_effect(tmp_path):
    """Importing a script only defines names: no output, no files, no settings."""
    code = """
import os, random, signal, threading
import numpy, torch, torch.distributed
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
    settings += torch.is_grad_enabled(), torch.get_default_dtype()
    draws = str((random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist()))
    return dict(os.environ), handlers, settings, draws, threading.active_count()
before = state()
import train_gpt2, hellaswag, fineweb, sys
assert state() == before
assert not torch.distributed.is_initialized() and not train_gpt2.stop_signals
assert 'torch._inductor.config' not in sys.modules  # it reads what prepare_process sets
assert 'transformers' not in sys.modules and 'datasets' not in sys.modules  # they are slow
"""
    env = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)] == []


# -- the form of the source code


def defined_names(statements):
    """The names that top-level statements define: functions, classes, variables and imports."""
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)


def test_lines_have_at_most_100_columns():
    """And formatting is never switched off."""
    mark, wrong = "fmt: " + "skip", []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if len(line) > 100 or mark in line:
                wrong.append(f"{path.name}:{number}")
    assert wrong == []


PRIVATE = {  # tests/README.md says where and why
    "_multiprocessing",
    "os._exit",
    "torch._dynamo",
    "torch._inductor",
    "torch._inductor.config",
    "torch._inductor.config.decide_compile_threads",
    "torch._inductor.exc",
    "torch._subclasses.fake_tensor",
    "torch.ops.aten._scaled_dot_product_flash_attention",
    "torch.testing._internal.distributed.fake_pg",
    "torch.utils._python_dispatch",
}


def test_no_other_private_name_of_a_library_is_used():
    """Private names change without notice. This also searches strings, and the notebook's code."""
    notebook = json.loads((ROOT / "play.ipynb").read_text())
    texts = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    texts += [p.read_text() for folder in (".", "tests") for p in ROOT.glob(f"{folder}/*.py")]
    text = "\n".join(texts + [(ROOT / "tests/on_gpu.sh").read_text()])
    text = re.sub(r"^PRIVATE = \{.*?^\}", "", text, flags=re.M | re.S)  # the list itself
    found = re.findall(r"[\w.]*[\w)\]]\._[a-zA-Z][\w.]*", text)
    found += re.findall(r"\b(?:import|from) (_[a-zA-Z]\w*)", text)
    assert set(found) == PRIVATE
    readme = (ROOT / "tests/README.md").read_text()
    assert [name for name in sorted(PRIVATE) if f"`{name}`" not in readme] == []


def test_the_form_of_the_source_code():
    """train() has at most 112 lines, other functions at most 60. The lecture ends by line 680. It
    uses at most 10 names from below the double line, and the docstring lists exactly those."""
    text = (ROOT / "train_gpt2.py").read_text()
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lengths.pop("train") <= 112 and max(lengths.values()) <= 60
    double_line = text.splitlines().index("# " + 94 * "=") + 1
    lecture = [node for node in tree.body if node.lineno < double_line]
    assert lecture[-1].end_lineno <= 680
    below = set(defined_names(node for node in tree.body if node.lineno > double_line))
    assert lecture[-1].name == "train" and below.isdisjoint(defined_names(lecture))
    used = {n.id for top in lecture for n in ast.walk(top) if isinstance(n, ast.Name)}
    listed = re.findall(r"^    (\w+) \.{2,} ", ast.get_docstring(tree), re.MULTILINE)
    assert sorted(used & below) == sorted(set(listed) & below) and len(used & below) <= 10


def test_imports_run_in_one_direction():
    """train_gpt2 → hellaswag → fineweb, and fineweb works without torch."""
    forbidden = {"hellaswag": {"train_gpt2"}, "fineweb": {"train_gpt2", "hellaswag", "torch"}}
    for name, others in forbidden.items():
        imported = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported.isdisjoint(others), name
