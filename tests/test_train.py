"""Runs of the real script: equivalences, resumption, precision, compilation, the log, and what users get wrong."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import QUIET, ROOT, TINY, log_of, run, run_here, write_shards
from torch._inductor.exc import InvalidCxxCompiler
from transformers import GPT2LMHeadModel

import hellaswag
import train_gpt2
from train_gpt2 import Config, Log, find_checkpoints, load_checkpoint, peak_flops, pick_device, pick_dtype, read_log

STEPS = "--max_steps 8 --warmup_steps 2 --max_lr 1e-2 --min_lr 1e-3 --total_batch_size 256 --val_every 4 --val_tokens 500".split()


def train(shards, out, *args, batch=4, alone=False, processes=1, check=True, env=None):
    """A run in this process, or as a user starts it: alone, with its own environment, or with several processes."""
    args = [*TINY, *QUIET, *STEPS, "--data_dir", shards, "--out_dir", out, "--micro_batch_size", batch, *args]
    if alone or processes > 1 or env:
        return run("train_gpt2.py", *args, processes=processes, check=check, env=env)
    return run_here(*args, check=check)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One run that several tests compare with: 8 steps, one process, micro-batches of 4, a checkpoint at 4 and 8."""
    folder = tmp_path_factory.mktemp("base")
    shards = write_shards(folder / "shards")
    done = train(shards, folder / "out", "--save_every", 4, alone=True)
    return shards, folder / "out", done.stdout


@pytest.fixture(scope="module")
def base_of_two(base, tmp_path_factory):
    """The log and checkpoints of the same run by two processes."""
    out = tmp_path_factory.mktemp("base_of_two") / "out"
    train(base[0], out, "--save_every", 4, processes=2)
    return out


def test_the_log_and_the_screen(base):
    _, out, screen = base
    log = log_of(out)
    assert set(log) == {"train", "val", "lr", "norm"}
    assert list(log["train"]) == list(log["lr"]) == list(log["norm"]) == list(range(8))
    assert list(log["val"]) == [0, 4, 8]
    assert log["lr"][0] == pytest.approx(5e-3) and log["lr"][1] == log["lr"][2] == pytest.approx(1e-2)
    assert abs(log["train"][0] - math.log(50304)) < 0.1 and log["val"][8] < log["val"][0] - 0.3
    assert all(len(value.split(".")[1]) >= 6 for _, _, value in read_log(out / "log.txt"))
    assert "ln 50304 = 10.8258" in screen and "256 tokens = 4 sequences x 32 tokens x 1 processes x 2 micro-steps" in screen
    assert "tokens/s" in screen and "left 0:00:0" in screen and "0.34 epochs" in screen


@pytest.mark.parametrize("batch, processes", [(2, 1), (8, 1), (2, 2), (4, 2)])
def test_accumulation_and_processes_and_one_big_batch_agree(base, request, tmp_path, batch, processes):
    shards, base_out, _ = base
    if (batch, processes) == (4, 2):
        out = request.getfixturevalue("base_of_two")
    else:
        out = tmp_path / "out"
        train(shards, out, batch=batch, processes=processes)
    ours, theirs = log_of(out), log_of(base_out)
    for stream in ("train", "norm", "val"):
        assert list(ours[stream]) == list(theirs[stream])
        for step, value in theirs[stream].items():
            assert ours[stream][step] == pytest.approx(value, abs=1e-4), (stream, step)


@pytest.mark.parametrize("most, room, expected", [(64, 100, 64), (64, 40, 32), (48, 100, 32), (64, 1, 1), (1, 100, 1)])
def test_the_largest_micro_batch_that_fits(most, room, expected):
    def fits(B):
        if B > room:
            raise torch.OutOfMemoryError
    assert train_gpt2.find_micro_batch_size(fits, most) == expected


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_one(base, tmp_path, monkeypatch):
    shards, out, _ = base
    sizes, plain = [], train_gpt2.training_step

    def step(model, batches, *args):
        batches = list(batches)
        sizes.append(len(batches[0][0]))
        if sizes[-1] > (2 if len(sizes) < 4 else 1):
            raise torch.OutOfMemoryError
        return plain(model, batches, *args)
    monkeypatch.setattr(train_gpt2, "training_step", step)
    done = train(shards, tmp_path / "out", batch="auto")
    assert sizes[:5] == [4, 2, 2, 2, 1] and "from now on 1 sequences x 8 micro-steps" in done.stdout
    for stream in ("train", "norm", "val"):
        assert log_of(tmp_path / "out")[stream] == pytest.approx(log_of(out)[stream], abs=1e-4)
    sizes.clear()
    refused = train(shards, tmp_path / "fixed", batch=4, check=False)  # what the user fixed, stays
    assert "out of memory: give --micro_batch_size a smaller number than now (4)" in refused.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_gives_the_same_bits(base, request, tmp_path, processes):
    shards, whole, _ = base
    if processes == 2:
        whole = request.getfixturevalue("base_of_two")
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "step_00008")  # as if it had stopped in step 6: a longer log than the checkpoint
    lines = (whole / "log.txt").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if line.startswith("6 lr"))
    (out / "log.txt").write_text("".join(lines[:cut]) + "6 no")
    (out / "tmp_step_00008").mkdir()  # and in the middle of writing a checkpoint
    done = train(shards, out, "--save_every", 4, "--resume", processes=processes)
    assert "resuming" in done.stdout
    assert sorted(read_log(out / "log.txt")) == sorted(read_log(whole / "log.txt"))
    for name in ("model.safetensors", "config.json"):
        assert (out / "step_00008" / name).read_bytes() == (whole / "step_00008" / name).read_bytes()
    a, b = (torch.load(d / "step_00008/training_state.pt", weights_only=True) for d in (out, whole))
    assert torch.equal(a["padding_rows"], b["padding_rows"]) and a["padding_rows"].shape == (47, 32)
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], b["optimizer"]["state"][i][k]) for k in moments), i


def test_checkpoints_load_in_hugging_face_and_start_another_run(base, tmp_path):
    shards, out, _ = base
    assert [step for step, _ in find_checkpoints(out)] == [4, 8]
    hf = GPT2LMHeadModel.from_pretrained(out / "step_00008")
    ids = torch.from_numpy(np.load(shards / "made_val_000000.npy")[: 15 * 32 + 1].astype(np.int64))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(hf(ids[:-1].view(15, 32)).logits.flatten(0, 1), ids[1:]).item()
    assert loss == pytest.approx(log_of(out)["val"][8], abs=2e-3)  # 50257 rows here, 50304 in training
    done = train(shards, tmp_path / "out", "--init_from", out / "step_00008", "--max_steps", 1)
    assert "vocab_size=50257" in done.stdout
    assert log_of(tmp_path / "out")["val"][0] == pytest.approx(loss, abs=1e-5)  # exactly the original's


def test_the_newest_checkpoints_are_kept(shards, tmp_path):
    train(shards, tmp_path / "out", "--save_every", 2, "--keep_checkpoints", 2, "--val_every", 0)
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [6, 8]
    assert not list((tmp_path / "out").glob("tmp_*"))


def test_evaluation_never_perturbs_training(base, tmp_path):
    shards, out, _ = base
    train(shards, tmp_path / "out", "--val_every", 1, "--sample_every", 1, "--sample_tokens", 3, "--prompt", "")
    assert log_of(tmp_path / "out")["train"] == log_of(out)["train"]


def test_overfitting_one_batch(shards, tmp_path):
    train(shards, tmp_path / "out", "--overfit_one_batch", "--max_steps", 80, "--val_every", 0, "--total_batch_size", 128)
    losses = log_of(tmp_path / "out")["train"]
    assert losses[0] > 10 and losses[79] < 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(base, tmp_path, dtype):
    shards, out, _ = base
    done = train(shards, tmp_path / "out", "--dtype", dtype)
    ours, theirs = log_of(tmp_path / "out")["train"], log_of(out)["train"]
    skipped = done.stdout.count("update skipped")
    assert skipped == 0 or dtype == "float16"  # the scaler starts high and backs off; the step is lost and said so
    assert ours != theirs
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, abs=0.05 if not skipped else 1.0)


def test_compiled_training_validation_and_sampling_agree_with_eager(shards, tmp_path):
    args = ["--n_layer", 1, "--sample_every", 4, "--sample_tokens", 8]
    train(shards, tmp_path / "eager", *args)
    done = train(shards, tmp_path / "out", *args, "--compile", env={"TORCH_LOGS": "recompiles"})
    ours, theirs = log_of(tmp_path / "out"), log_of(tmp_path / "eager")
    for stream in ("train", "val"):
        assert ours[stream] == pytest.approx(theirs[stream], abs=1e-4)
    assert done.stderr.count("Recompiling function") <= 4, done.stderr  # validation's no_grad, and decoding after reading
    assert done.stdout.count("> Hello, I'm a language model,") == 3 * 4


def test_compiling_without_a_compiler_is_one_sentence(base, tmp_path, monkeypatch, capsys):
    def compile(*args, **kw):
        raise InvalidCxxCompiler()  # as the first compiled call does, with the words of torch

    monkeypatch.setattr(torch, "compile", compile)
    checkpoint, items = base[1] / "step_00008", tmp_path / "items.jsonl"
    items.write_text(json.dumps(dict(ind=0, activity_label="", ctx="A man", label=0, endings=["eats", "runs", "sings", "sleeps"])))
    hellaswag.compiled_token_losses.cache_clear()
    for main, args in ((train_gpt2.main, ["--init_from", checkpoint, "--sample_only"]), (hellaswag.main, ["--model", checkpoint, "--data", items])):
        with pytest.raises(SystemExit):
            main([*map(str, args), "--device", "cpu", "--compile"])
        assert capsys.readouterr().err.strip().endswith("install gcc or clang, or add --no-compile")


def test_samples_of_a_checkpoint(base):
    done = run_here("--init_from", base[1] / "step_00008", "--sample_only", "--prompt", "Once", "--num_samples", 2,
                    "--sample_tokens", 5, "--device", "cpu", "--no-compile")  # fmt: skip
    assert [line[:6] for line in done.stdout.splitlines() if line.startswith(">")] == ["> Once"] * 2


def test_wrong_use_is_one_sentence(base, tmp_path):
    shards, out, _ = base
    before = (out / "log.txt").read_bytes()

    def refused(*args, sentence, out_dir=tmp_path / "out", data=shards):
        done = train(data, out_dir, *args, check=False)
        assert done.returncode == 1 and sentence in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr

    assert train(tmp_path / "nowhere", tmp_path / "out", check=False, alone=True).stderr.startswith("train_gpt2.py: No train shards")
    refused(data=tmp_path / "nowhere", sentence="python fineweb.py --out")
    refused(out_dir=out, sentence="holds a run already: add --resume")
    refused("--resume", "--seed", 2, out_dir=out, sentence="trained with --seed 1337, not 2")
    refused("--resume", "--n_embd", 64, out_dir=out, sentence="--n_embd 32, not 64")
    refused("--total_batch_size", 200, sentence="--total_batch_size 200 is not a multiple of")
    refused("--micro_batch_size", 0, sentence="--micro_batch_size 0: must be at least 1")
    refused("--max_steps", -1, sentence="--max_steps -1: must not be negative")
    refused("--n_layer", 0, sentence="--n_layer 0: must be at least 1")
    refused("--max_lr", "nan", sentence="--max_lr nan: must not be negative or nan")
    refused("--seed", 2**64, sentence="must be less than 2**63")
    refused(out_dir=shards / "made_val_000000.npy", sentence="made_val_000000.npy: is a file")
    refused("--init_from", out / "step_00009", sentence="step_00009: no such directory")
    refused("--sample_only", sentence="--sample_only needs weights")
    refused("--n_head", 5, sentence="--n_embd 32 is not a multiple of --n_head 5")
    refused("--seq_len", 64, "--block_size", 32, sentence="--seq_len 64 is longer than the model's context of 32")
    refused("--init_from", "./nothing", sentence="./nothing: no such directory")
    if not torch.cuda.is_available():
        refused("--device", "cuda", sentence="--device cuda: this machine")
    assert (out / "log.txt").read_bytes() == before and not (tmp_path / "out").exists()


def test_a_mistake_under_torchrun_is_said_once(base, tmp_path):
    done = train(base[0], tmp_path / "out", "--n_head", 5, processes=2, check=False)
    assert done.returncode and done.stderr.count("train_gpt2.py: --n_embd 32 is not a multiple of --n_head 5") == 1, done.stderr


def test_resuming_in_another_precision_is_a_warning(base, tmp_path):
    shutil.copytree(base[1], tmp_path / "out")
    done = train(base[0], tmp_path / "out", "--resume", "--dtype", "float16", "--max_steps", 9)
    assert "warning: trained in float32 up to here; from now on in float16" in done.stdout
    assert math.isfinite(log_of(tmp_path / "out")["train"][8])
    done = train(base[0], tmp_path / "out", "--resume", "--dtype", "float16", "--max_steps", 9)
    assert "warning" not in done.stdout and "nothing is left to do" in done.stdout


def test_a_run_that_failed_before_its_first_record_may_begin_again(shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(train_gpt2, "evaluate", lambda *args: {}["failed"])
        train(shards, tmp_path / "out")
    assert (tmp_path / "out/log.txt").exists()
    train(shards, tmp_path / "out", "--max_steps", 1)


def test_demo_settings_train_on_the_users_own_shards_too(shards, tmp_path):
    before = sorted(shards.iterdir())
    done = train(shards, tmp_path / "out", "--demo", "--save_every", 0, "--max_steps", 1)
    assert "6,000 tokens in 2 train shards" in done.stdout and sorted(shards.iterdir()) == before


def test_resume_without_a_checkpoint_starts_at_step_0(shards, tmp_path):
    assert "starting at step 0" in train(shards, tmp_path / "out", "--resume", "--max_steps", 1).stdout


def test_a_missing_hellaswag_file_is_one_warning(shards, tmp_path):
    done = train(shards, tmp_path / "out", "--max_steps", 1, "--hellaswag_every", 1, "--hellaswag_data", tmp_path / "no/such.jsonl",
                 env={"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"})  # fmt: skip
    assert done.stdout.count("warning: HellaSwag is off") == 1 and "done" in done.stdout


def test_hellaswag_in_training_changes_nothing_else(base, tmp_path):
    shards, out, _ = base
    items = [dict(ind=i, activity_label="a", ctx="The cat sat", label=i % 4, endings=["on it.", "far away", "and ate", "."]) for i in range(7)]
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    train(shards, tmp_path / "out", "--hellaswag_every", 4, "--hellaswag_data", data)
    ours = log_of(tmp_path / "out")
    assert ours["train"] == log_of(out)["train"]
    assert list(ours["hella"]) == [0, 4, 8] and all(abs(v * 7 - round(v * 7)) < 1e-6 for v in ours["hella"].values())


def test_help_names_the_contract():
    text = run_here("--help").stdout.replace("-", "_")
    for name in """demo data_dir out_dir init_from model n_layer n_head n_embd block_size vocab_size total_batch_size micro_batch_size
        seq_len max_steps warmup_steps max_lr min_lr weight_decay grad_clip val_every val_tokens hellaswag_every sample_every save_every
        shuffle seed dtype compile device resume overfit_one_batch""".split():
        assert f"__{name}" in text, name


def test_importing_has_no_side_effect(tmp_path):
    code = "import train_gpt2, fineweb, hellaswag, torch.distributed as d; assert not d.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)})
    assert [p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)] == []


def test_log_keeps_only_what_the_resumed_step_has_seen(tmp_path):
    (tmp_path / "log.txt").write_text("0 val 5.0\n0 train 4.0\n1 train 3.0\n1 val 2.5\n2 hella 0.25\n2 train 9.0\n3 tra")
    Log(tmp_path, 2, write=True).write(2, train=1 / 3)
    assert (tmp_path / "log.txt").read_text() == (
        "0 val 5.0\n0 train 4.0\n1 train 3.0\n1 val 2.5\n2 hella 0.25\n2 train 0.333333333333\n"
    )


def test_device_precision_and_peak(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu and pick_dtype("float16", cpu) == torch.float16 and peak_flops(cpu) is None
    for pays, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(train_gpt2, "bfloat16_pays", lambda pays=pays: pays)
        assert pick_dtype("auto", cpu) == dtype and pick_dtype("auto", torch.device("mps")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert pick_dtype("auto", torch.device("cuda", 1)) == torch.float16  # a V100 or T4
    names = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "NVIDIA L4": 121,
             "NVIDIA L40S": 362, "NVIDIA GeForce RTX 4090": 165, "Tesla T4": 65, "NVIDIA A10G": 70, "Quadro P400": None}  # fmt: skip
    for name, tflops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)


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


def test_checkpoint_of_a_foreign_shape_is_refused(base):
    with pytest.raises(Exception, match="--model gpt2, not gpt2-xl"):
        load_checkpoint(base[1] / "step_00008", Config(model="gpt2-xl", total_batch_size=256, seq_len=32))


def test_a_full_disk_or_a_damaged_checkpoint_is_one_sentence(base, tmp_path):
    shards, out, _ = base
    shutil.copytree(out, tmp_path / "out")
    state = tmp_path / "out/step_00008/training_state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    done = train(shards, tmp_path / "out", "--resume", check=False)
    assert done.returncode == 1 and "remove" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "full").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", tmp_path / "full"], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = train(shards, tmp_path / "full", "--save_every", 2, check=False)  # the first one fits, the second does not
        assert done.returncode == 1 and "cannot be written" in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert [step for step, _ in find_checkpoints(tmp_path / "full")] == [] or list(log_of(tmp_path / "full")["train"])
    finally:
        subprocess.run(["umount", tmp_path / "full"], check=True)


def test_a_small_vocabulary_trains_without_samples_and_hellaswag(tmp_path):
    shards = write_shards(tmp_path / "shards", vocab=100)
    done = train(shards, tmp_path / "out", "--vocab_size", 100, "--sample_every", 1, "--max_steps", 2)
    assert "warning: samples and HellaSwag are off" in done.stdout
