"""Runs of the real script: the log, the screen, resuming, precision, compilation, the ramp."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, log_of, records, run, run_here, train, write_shards
from transformers import GPT2LMHeadModel

import train_gpt2
from train_gpt2 import (
    Config,
    Log,
    Progress,
    find_checkpoints,
    get_lr,
    peak_flops,
    pick_device,
    pick_dtype,
    pick_micro_batch_size,
    print_samples,
    read_log,
)


def test_the_log_and_the_screen(base):
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
    steps = [line for line in screen.splitlines() if line.startswith("step ") and "loss" in line]
    for step, line in enumerate(line for line in steps if " lr " in line):
        for text in (
            f"{step}/8",
            f"loss {log['train'][step]:.6f}",
            f"norm {log['norm'][step]:.4f}",
        ):
            assert text in line
        assert "tokens/s" in line and "left 0:00:0" in line


def test_the_schedule_reaches_the_optimizer(shards, tmp_path, monkeypatch):
    """What is logged is what each group of the optimizer steps with, times its own scale."""
    seen, plain = [], train_gpt2.training_step

    def step(model, batches, optimizer, *args):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.param_groups[1]["lr_scale"] = 0.25
        return plain(model, batches, optimizer, *args)

    monkeypatch.setattr(train_gpt2, "training_step", step)
    train(shards, tmp_path / "out")
    lrs = [lr for _, stream, lr in read_log(tmp_path / "out/log.txt") if stream == "lr"]
    config = Config(max_steps=8, warmup_steps=2, max_lr=1e-2, min_lr=1e-3)
    assert [float(lr) for lr in lrs] == pytest.approx([get_lr(step, config) for step in range(8)])
    assert seen[0] == [get_lr(0, config)] * 2
    assert seen[1:] == [[get_lr(s, config), 0.25 * get_lr(s, config)] for s in range(1, 8)]


def test_the_learning_rate_matters(base, tmp_path):
    shards, out, _ = base
    train(shards, tmp_path / "out", "--max_lr", 1e-9, "--min_lr", 1e-9, "--weight_decay", 0)
    losses = log_of(tmp_path / "out")["val"]
    assert losses[8] == pytest.approx(losses[0], abs=1e-4) != log_of(out)["val"][8]


def test_clipping_reaches_the_step(base, tmp_path):
    shards, out, _ = base
    train(shards, tmp_path / "free", "--grad_clip", 0)
    train(shards, tmp_path / "tight", "--grad_clip", 1e-7)  # AdamW's eps is felt
    clipped, free, tight = (log_of(d) for d in (out, tmp_path / "free", tmp_path / "tight"))
    assert clipped["norm"][0] == free["norm"][0] == tight["norm"][0]  # logged as it was before
    assert clipped["val"][8] != free["val"][8] and tight["val"][8] > clipped["val"][8] + 0.05


def test_tf32_and_fixed_shapes_and_the_precision_asked_for(shards, tmp_path, monkeypatch):
    """What a CPU would not feel: settings of CUDA, as the run makes them."""
    seen, plain = [], train_gpt2.training_step

    def step(model, batches, optimizer, scaler, autocast, clip):
        seen.append((autocast.fast_dtype, autocast._enabled, scaler.get_scale()))
        return plain(model, batches, optimizer, scaler, autocast, clip)

    monkeypatch.setattr(train_gpt2, "training_step", step)
    monkeypatch.setattr(torch, "compile", lambda m, **flags: seen.append(flags) or m)
    torch.set_float32_matmul_precision("highest")
    for dtype in ("float16", "bfloat16", "float32"):
        train(shards, tmp_path / dtype, "--dtype", dtype, "--max_steps", 1, "--compile")
    assert torch.get_float32_matmul_precision() == "high"
    assert seen[0] == dict(dynamic=False) and seen[1] == (torch.float16, True, 65536)
    assert seen[3] == (torch.bfloat16, True, 1) and seen[5][1:] == (False, 1)


def test_a_resumed_float16_run_keeps_its_scale(shards, tmp_path, monkeypatch):
    scales, plain = [], train_gpt2.training_step

    def step(model, batches, optimizer, scaler, *args):
        scales.append(scaler.get_scale())
        if len(scales) == 1:
            scaler.load_state_dict(scaler.state_dict() | dict(scale=1024.0))
        return plain(model, batches, optimizer, scaler, *args)

    monkeypatch.setattr(train_gpt2, "training_step", step)
    flags = ["--dtype", "float16", "--max_steps", 3, "--val_every", 0]
    train(shards, tmp_path / "out", *flags, "--save_every", 2)
    shutil.rmtree(tmp_path / "out/step_00003")
    run_here("--resume", "--out_dir", tmp_path / "out")
    assert scales == [65536, 1024, 1024, 1024]


@pytest.mark.faults
def test_the_batch_grows(base, tmp_path):
    """An eighth, a quarter, half of the batch for two steps each, resumed amid it, by two processes
    in the end; losses, batch records and time left count tokens, not steps."""
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
    config = Config(total_batch_size=800, batch_ramp_steps=6, max_steps=8, seq_len=25)
    progress = Progress(config, tiny, torch.device("cpu"), 1)
    # 400 tokens in 40 s; 1,600 are left
    assert progress(5, 1.0, seconds=40) == "10 tokens/s | left 0:02:40"
    progress.peak = 400 * progress.flops / 40 * 2
    assert progress(5, 1.0, seconds=40) == "10 tokens/s | MFU 50.0% | left 0:02:40"
    assert "update left out" in progress(5, math.nan, seconds=40)


# -- resuming


def test_resume_remembers_the_run(shards, tmp_path):
    """Every setting comes from the checkpoint; a flag that is given too is said aloud."""
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


def test_resume_keeps_the_precision(base, tmp_path, monkeypatch):
    shutil.copytree(base[1], tmp_path / "out")
    monkeypatch.setattr(train_gpt2, "bfloat16_pays", lambda: 1 / 0)  # the race is not run again
    done = run_here("--resume", "--out_dir", tmp_path / "out", "--max_steps", 9)
    assert "float32" in done.stdout and "--resume: dtype" not in done.stdout
    flags = ["--dtype", "float16", "--max_steps", 10]
    done = run_here("--resume", "--out_dir", tmp_path / "out", *flags)
    assert "--resume: dtype float32 → float16" in done.stdout
    assert math.isfinite(log_of(tmp_path / "out")["train"][9])
    done = run_here("--resume", "--out_dir", tmp_path / "out", "--max_steps", 9)
    assert "nothing is left to do" in done.stdout and "float16" in done.stdout


def test_the_stopwatch_runs_once_and_is_recorded(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "bfloat16_pays", lambda: True)
    train(shards, tmp_path / "out", "--dtype", "auto", "--max_steps", 2)
    path = tmp_path / "out/step_00002/training_state.pt"
    assert torch.load(path, weights_only=True)["config"]["dtype"] == "bfloat16"


def test_resume_without_a_checkpoint_starts_at_step_0(base, tmp_path):
    shards, out, _ = base
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.txt").write_text("0 val 10.0\n0 train 9.0\n# a note\n")
    train(shards, tmp_path / "out", "--resume", "--save_every", 4)
    assert records(tmp_path / "out") == ["# a note", *records(out)]


def test_other_shards_after_a_stop_are_said(base, tmp_path):
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


def test_log_keeps_only_what_is_not_written_again(tmp_path):
    text = "0 val 5.0\n0 train 4.0\nhello\n1 train 3.0\n2 val 2.5\n2 hella 0.25\n2 train 9.0\n3 tra"
    (tmp_path / "log.txt").write_text(text)
    log = Log(Config(out_dir=str(tmp_path), data_dir=str(tmp_path)), 2)
    log.write(2, val=1 / 3)
    log.write(2, train=2.0, norm=math.inf, seconds=2.0)
    log.close()
    kept = "0 val 5.0\n0 train 4.0\nhello\n1 train 3.0\n2 val 0.333333333333\n"
    written = "2 train 2.000000000000\n2 norm inf\n2 speed 262144.000000000000\n"
    written += "2 skip 1.000000000000\n"
    assert (tmp_path / "log.txt").read_text() == kept + written
    assert read_log(tmp_path / "log.txt")[3] == (2, "val", "0.333333333333")


def test_a_run_that_failed_before_its_first_record_may_begin_again(shards, tmp_path, monkeypatch):
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


def test_samples_end_at_end_of_text(tiny, capsys):
    with torch.no_grad():
        tiny.transformer.wte.weight[:] = 0
        tiny.transformer.wte.weight[50256] = 1
        tiny.transformer.ln_f.weight[:] = 0
        tiny.transformer.ln_f.bias[:] = 1  # each position now predicts <|endoftext|>
    config = Config(prompt="Once", temperature=0, sample_tokens=3)
    off = torch.autocast("cpu", torch.bfloat16, enabled=False)
    print_samples(tiny, config, off, rows=2)
    assert capsys.readouterr().out == "> Once\n" * 2


def test_overfitting_one_batch(shards, tmp_path):
    flags = ["--overfit_one_batch", "--max_steps", 80, "--val_every", 0]
    train(shards, tmp_path / "out", *flags, "--total_batch_size", 128)
    losses = log_of(tmp_path / "out")["train"]
    assert losses[0] > 10 and losses[79] < 0.1


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
def test_half_precision_follows_float32(base, tmp_path, dtype):
    shards, out, _ = base
    steps = 8 if dtype == "bfloat16" else 3  # float16 is slow here
    done = train(shards, tmp_path / "out", "--dtype", dtype, "--max_steps", steps)
    ours, theirs = log_of(tmp_path / "out")["train"], log_of(out)["train"]
    theirs = {step: loss for step, loss in theirs.items() if step < steps}
    left_out = done.stdout.count("update left out")
    assert left_out == 0 or dtype == "float16"  # its scale starts high and backs off
    assert ours != theirs
    assert ours == pytest.approx(theirs, abs=0.05 if not left_out else 1.0)


@pytest.mark.faults
def test_compiled_training_and_validation_agree_with_eager(shards, tmp_path):
    args = ["--n_layer", 1, "--sample_every", 4, "--sample_tokens", 8]
    train(shards, tmp_path / "eager", *args)
    env = {"TORCH_LOGS": "recompiles"}
    done = train(shards, tmp_path / "out", *args, "--compile", "--val_tokens", 512, env=env)
    ours, theirs = log_of(tmp_path / "out"), log_of(tmp_path / "eager")
    for stream in ("train", "val"):
        assert ours[stream] == pytest.approx(theirs[stream], abs=1e-4 if stream == "train" else 0.1)
    # Of the model, one for training after one for validation; sampling is not compiled.
    assert done.stderr.count("Recompiling function forward") <= 1, done.stderr
    assert done.stdout.count("> Hello, I'm a language model,") == 3 * 4


def test_device_precision_and_peak(tiny, monkeypatch):
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda", 1), torch.device("mps")
    assert pick_device("cpu") == cpu and pick_dtype("float16", cpu) == "float16"
    assert peak_flops(cpu) is None
    for pays, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(train_gpt2, "bfloat16_pays", lambda pays=pays: pays)
        assert pick_dtype("auto", cpu) == dtype and pick_dtype("auto", mps) == "float32"
    for has, dtype in ((True, "bfloat16"), (False, "float16")):  # a V100 or T4 has not
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
        assert pick_dtype("auto", cuda) == dtype
    names = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756}
    names |= {"NVIDIA H200": 989, "NVIDIA L4": 121, "NVIDIA L40S": 362, "Tesla T4": 65}
    names |= {"NVIDIA GeForce RTX 4090": 165, "NVIDIA A10G": 70, "Quadro P400": None}
    names |= {"NVIDIA GB200": 2500, "NVIDIA B200": 2250, "NVIDIA B300 SXM6 AC": 2250}
    names |= {"NVIDIA H20": 148, "NVIDIA H200 NVL": 835, "NVIDIA RTX 6000 Ada Generation": 364}
    names |= {"NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 504, "NVIDIA L40": 181}
    for name, tflops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    for dtype, peak in (("bfloat16", 8 * 756e12), ("float32", math.inf)):  # inf: no MFU is shown
        assert Progress(Config(dtype=dtype), tiny, torch.device("cuda"), 8).peak == peak


def test_a_cpu_takes_bfloat16_if_its_products_are_faster(monkeypatch):
    timed = []

    def timeit(product, number):
        timed.append(product().dtype)
        return next(clock)

    monkeypatch.setattr(train_gpt2.timeit, "timeit", timeit)
    clock = iter([5.0, 9.0, 2.0, 1.0, 3.0, 9.0, 3.0, 9.0, 3.0, 9.0])  # the least of each counts
    assert train_gpt2.bfloat16_pays()
    clock = iter([1.0, 2.0] * 5)
    assert not train_gpt2.bfloat16_pays()
    assert timed == [torch.float32, torch.bfloat16] * 10


def test_the_micro_batch_that_auto_takes(tiny, monkeypatch):
    """On a pretended GPU: 4 copies of 4 bytes per parameter are kept free, and 15% of the rest."""
    off = torch.autocast("cpu", torch.bfloat16, enabled=False)
    config = Config(seq_len=32, total_batch_size=32 * 96)
    for seq_len, expected in ((1024, 4), (1000, 4), (128, 32), (5000, 1)):  # 4,096 tokens
        long = Config(seq_len=seq_len, total_batch_size=seq_len * 64)
        assert pick_micro_batch_size(long, tiny, 1, off) == expected
    assert pick_micro_batch_size(config, tiny, 1, off) == 32
    assert pick_micro_batch_size(Config(micro_batch_size=3), tiny, 1, off) == 3
    assert pick_micro_batch_size(Config(seq_len=32, total_batch_size=64), tiny, 1, off) == 2
    ramp = Config(seq_len=32, total_batch_size=32 * 64, batch_ramp_steps=3)
    assert pick_micro_batch_size(ramp, tiny, 4, off) == 2  # an eighth of 64, among 4

    class OnGPU:
        """A model that says it is on a GPU, where each sequence takes 100 bytes."""

        def __init__(self):
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
        config = Config(seq_len=32, total_batch_size=32 * batch)
        assert pick_micro_batch_size(config, model, world_size, off) == expected
    assert model.seen == [2, 1] * 6


# -- the command line


CONTRACT = """demo data_dir out_dir init_from model n_layer n_head n_embd block_size vocab_size
    total_batch_size micro_batch_size seq_len batch_ramp_steps max_steps warmup_steps max_lr min_lr
    weight_decay grad_clip val_every val_tokens hellaswag_every sample_every save_every save_minutes
    shuffle seed dtype compile device resume overfit_one_batch sample_only prompt"""


def test_help_names_the_contract():
    text = run_here("--help").stdout.replace("-", "_")
    for name in CONTRACT.split():
        assert f"__{name}" in text, name


def test_importing_has_no_side_effect(tmp_path):
    code = "import sys, train_gpt2, torch.distributed as d; assert not d.is_initialized();"
    code += "assert 'torch._inductor.config' not in sys.modules"  # it reads what use_well() sets
    env = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
    assert [p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)] == []


def test_the_form_of_the_text():
    """100 columns, no switched-off formatting; train() at most 90 lines, others 60; the lecture
    ends before line 760; imports run train_gpt2 → hellaswag → fineweb."""
    import ast

    mark = "fmt: " + "skip"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 100 and mark not in text, path
    tree = ast.parse((ROOT / "train_gpt2.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lengths.pop("train") <= 90 and max(lengths.values()) <= 60
    (train,) = (node for node in tree.body if getattr(node, "name", "") == "train")
    assert train.end_lineno < 760
    for name, others in (("hellaswag", ["train_gpt2"]), ("fineweb", ["train_gpt2", "hellaswag"])):
        text = (ROOT / f"{name}.py").read_text()
        assert not any(f"import {other}" in text or f"from {other}" in text for other in others)
