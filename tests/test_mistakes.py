"""A user's mistake ends in one sentence that says what to do. What was written before is kept."""

import errno
import os
import resource
import shutil
import subprocess

import pytest
import torch
from conftest import ENVIRONMENT, command, records, refused, run_here, train
from torch._inductor.exc import InductorError, InvalidCxxCompiler

import train_gpt2
from fineweb import UserError
from train_gpt2 import Args, check_batch, check_network, explain, fail, find_checkpoints

WRONG = [
    ("--total_batch_size 200", "--total_batch_size 200 is not a multiple of micro_batch_size"),
    (
        "--total_batch_size 512 --batch_ramp_steps 4",
        "is not a multiple of 8 (--batch_ramp_steps) x",
    ),
    ("--overfit_one_batch --batch_ramp_steps 4", "one batch cannot grow"),
    ("--micro_batch_size 0", "--micro_batch_size 0: it must be at least 1"),
    ("--max_steps -1", "--max_steps -1: it must be at least 0"),
    ("--n_layer 0", "--n_layer 0: it must be at least 1"),
    ("--max_lr nan", "--max_lr nan: it must be"),
    ("--max_lr inf", "--max_lr inf: it must be"),
    ("--weight_decay -0.1", "--weight_decay -0.1: it must be at least 0"),
    ("--seed 4294967296", "must be less than 2**32"),
    ("--temperature 1e-300", "--temperature 1e-300: it must be 0, or at least 0.01"),
    ("--top_p 0", "--top_p 0.0: it must be more than 0, and at most 1"),
    ("--top_p 1.5", "--top_p 1.5: it must be more than 0, and at most 1"),
    ("--sample_only", "--sample_only needs weights"),
    ("--prompt -", "--prompt -: only --sample_only reads prompts from standard input"),
    ("--micro_batch_size 0 --finetune", "--micro_batch_size 0: it must be at least 1"),
    ("--resume --n_head 5", "--n_embd 32 is not a multiple of --n_head 5"),  # a loop's first start
    ("--resume --init_from gpt2", "--n_layer: the weights of --init_from have a shape of their"),
    ("--finetune --init_from scratch", "--finetune trains existing weights; give --init_from"),
    ("--hellaswag_data=$HOME_/x", "--hellaswag_data $HOME_/x: the shell did not expand this name"),
    ("--n_head 5", "--n_embd 32 is not a multiple of --n_head 5"),
    ("--seq_len 64 --block_size 32", "--seq_len 64: the model's context has 32 tokens"),
    ("--n_layer 1000000000", "--n_layer, --n_embd: weights of"),
    ("--val_tokens 0", "--val_tokens 0: it must be at least 1"),
    ("--val_tokens 31", "--val_tokens 31 is less than one sequence"),
    (
        "--seq_len 2048 --block_size 2048 --total_batch_size 8192",
        "its val shards hold 1500 tokens, too few for --seq_len 2048",
    ),
    (
        "--seq_len 8192 --block_size 8192 --total_batch_size 32768",
        "its train shards hold 6000 tokens, too few for --seq_len 8192",
    ),
]


@pytest.mark.parametrize("flags, sentence", WRONG)
def test_wrong_flags(base, tmp_path, flags, sentence):
    flags = flags.split()
    batch = flags[1] if flags[0] == "--micro_batch_size" else 4
    done = train(base[0], tmp_path / "out", *flags, batch=batch, check=False)
    refused(done, sentence)
    assert not (tmp_path / "out").exists()


def test_what_is_never_used_is_not_checked(base, tmp_path):
    """Without validation neither its tokens nor its shards matter."""
    (tmp_path / "shards").mkdir()
    for path in base[0].glob("*train*"):
        (tmp_path / "shards" / path.name).symlink_to(path)
    flags = ["--val_every", 0, "--val_tokens", 31, "--max_steps", 1]
    train(tmp_path / "shards", tmp_path / "out", *flags)


def test_a_token_id_that_the_model_does_not_have_is_refused(base, tmp_path):
    done = train(base[0], tmp_path / "out", "--vocab_size", 100, "--val_every", 0, check=False)
    refused(done, "but the model has only 100 tokens")
    done = train(base[0], tmp_path / "two", "--vocab_size", 100, check=False)
    refused(done, "but the model has only 100 tokens")


def test_a_batch_must_be_divisible_among_the_processes():
    args = Args(total_batch_size=256, micro_batch_size=2, seq_len=32)
    for world_size in (1, 2, 4):
        check_batch(args, world_size)
    with pytest.raises(UserError, match="micro_batch_size x seq_len x processes = 2 x 32 x 8"):
        check_batch(args, 8)
    auto = Args(total_batch_size=256, seq_len=32)
    check_batch(auto, 8)
    for world_size in (3, 16):
        with pytest.raises(UserError, match=f"processes = 1 x 32 x {world_size} = "):
            check_batch(auto, world_size)


def test_a_sequence_may_be_as_long_as_the_context():
    check_network(Args(block_size=64, seq_len=64))
    with pytest.raises(UserError, match="--seq_len 65: the model's context has 64 tokens"):
        check_network(Args(block_size=64, seq_len=65))


def test_wrong_folders(base, tmp_path):
    shards, out, _ = base
    before = (out / "log.txt").read_bytes()
    nowhere = tmp_path / "nowhere"
    alone = train(nowhere, tmp_path / "out", check=False, alone=True)
    refused(alone, "nowhere: there are no train shards; give another --data_dir")
    done = train(nowhere, tmp_path / "out", "--epochs", 1, "--max_steps", 0, check=False)
    refused(done, "nowhere: there are no train shards; give another --data_dir")
    done = run_here("--finetune", "--data_dir", nowhere, "--out_dir", tmp_path / "o", check=False)
    refused(done, "nowhere: there are no train shards; give another --data_dir")
    refused(train(shards, out, check=False), "holds a run; add --resume")
    file = shards / "made_val_000000.npy"
    refused(train(shards, file, check=False), "made_val_000000.npy is a file")
    for name in (nowhere, "./nothing", "gpt3"):
        done = run_here("--sample_only", "--init_from", name, check=False)
        refused(done, f"{name}: no such directory; give one")
    if not torch.cuda.is_available():
        refused(train(shards, out, "--device", "cuda", check=False), "this machine has none")
    assert (out / "log.txt").read_bytes() == before


def test_weights_have_a_shape_of_their_own(base, tmp_path):
    shards, out, _ = base
    start = ["--init_from", out / "step_00008", "--out_dir", tmp_path / "out", "--device", "cpu"]
    for flag in ("--n_layer 24", "--model gpt2-medium", "--vocab_size 50257", "--block_size 8"):
        done = run_here(*start, "--data_dir", shards, *flag.split(), check=False)
        refused(done, f"{flag.split()[0]}: the weights of --init_from have a shape of their own")
        assert f"omit {flag.split()[0]}" in done.stderr
    demo = "--demo --max_steps 0 --seq_len 32 --val_every 0 --sample_every 0".split()
    run_here(*start, "--data_dir", shards, *demo)  # the shape that --demo sets is no mistake


OTHER_RUN = ["--seed 2", "--n_embd 64", "--model gpt2-xl", "--no-shuffle", "--seq_len 16"]
OTHER_RUN += ["--total_batch_size 512", "--batch_ramp_steps 3", "--overfit_one_batch"]


@pytest.mark.parametrize("flag", [*OTHER_RUN, "--init_from gpt2", "--vocab_size 50257"])
def test_resume_refuses_to_become_another_run(base, flag):
    before = (base[1] / "log.txt").read_bytes()
    done = run_here("--resume", "--out_dir", base[1], *flag.split(), check=False)
    name = flag.split()[0].removeprefix("--").removeprefix("no-")
    refused(done, f"step_00008 was trained with --{name}")
    assert "start another run with --init_from" in done.stderr
    assert (base[1] / "log.txt").read_bytes() == before


def test_a_mistake_under_torchrun_is_printed_once(base, tmp_path):
    """A batch that one process could train on, but two cannot divide."""
    done = train(base[0], tmp_path / "out", "--total_batch_size", 128, processes=2, check=False)
    sentence = "train_gpt2.py: --total_batch_size 128 is not a multiple of"
    assert done.returncode and done.stderr.count(sentence) == 1, done.stderr
    assert "Traceback (most recent call last)" not in done.stderr.split(sentence)[0]
    assert not (tmp_path / "out").exists()


def test_another_rank_waits_for_rank_0_before_it_prints(monkeypatch, capsys):
    """A mistake that all ranks see is printed by rank 0, and torchrun ends the others with a
    signal. If that does not come within 20 seconds, only this rank knows of the mistake."""
    now = [0.0]
    monkeypatch.setattr(train_gpt2, "stop_signals", [])
    monkeypatch.setattr(train_gpt2.time, "monotonic", lambda: now[0])
    for rank, signal_after, waited, printed in (
        ("0", None, 0, True),
        ("3", None, 20, True),
        ("3", 5, 5, False),
    ):

        def sleep(seconds, signal_after=signal_after):
            now[0] += seconds
            if signal_after and now[0] >= signal_after:
                train_gpt2.stop_signals.append(15)

        now[0] = 0.0
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(train_gpt2.time, "sleep", sleep)
        with pytest.raises(SystemExit, match="^2$"):
            fail("the disk of this node is full")
        assert now[0] == pytest.approx(waited, abs=0.2)
        expected = "train_gpt2.py: the disk of this node is full\n" if printed else ""
        assert capsys.readouterr().err == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_mistake_has_its_status_where_nothing_can_be_printed(base, tmp_path):
    """A shell loop sees 2 and does not try again."""
    args = ["--data_dir", base[0], "--out_dir", tmp_path / "out", "--seed", -1]
    line = ["bash", "-c", 'exec "$@" 2>/dev/full', "-", *command("train_gpt2.py", *args)]
    done = subprocess.run(line, capture_output=True, env=os.environ | ENVIRONMENT, timeout=120)
    assert done.returncode == 2


def test_settings_that_are_probably_mistakes_are_warned_about(shards, tmp_path):
    flags = ["--max_steps", 1, "--min_lr", 1, "--val_every", 0]
    done = train(shards, tmp_path / "out", *flags)
    assert "warning: --warmup_steps is longer than the run" in done.stdout
    assert "warning: --min_lr is more than --max_lr" in done.stdout


@pytest.mark.parametrize("room", [1_000_000, 12_000_000, None])
def test_a_full_disk(base, tmp_path, monkeypatch, room):
    """The checkpoint of step 8 cannot be written. A limit on the size of files, set without root,
    stops the weights (6 MB) after 1 MB, or the training state (20 MB) after 12. Or fsync finds no
    room for what was written, as on some file systems. The checkpoint of step 4 and the log stay
    complete. Once there is room, --resume ends with the same weights and log."""
    _, out, _ = base
    full, weights = tmp_path / "full", "step_00008/model.safetensors"
    shutil.copytree(out, full, ignore=shutil.ignore_patterns("step_00008"))
    before = {path: path.read_bytes() for path in (full / "step_00004").iterdir()}
    words = {1_000_000: "File too large", None: "No space left on device"}.get(room, "")

    real_fsync = os.fsync

    def no_space(file):
        if "tmp_step" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(file)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if room:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        else:
            patch.setattr(os, "fsync", no_space)
        try:
            done = run_here("--resume", "--out_dir", full, check=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(done, "step_00008 cannot be written (")
    assert words in done.stderr and "make room" in done.stderr, done.stderr
    assert [path.name for path in full.iterdir() if path.is_dir()] == ["step_00004"]
    assert {path: path.read_bytes() for path in (full / "step_00004").iterdir()} == before
    assert records(full) == records(out)[:-1]  # the validation after step 8 comes after saving
    run_here("--resume", "--out_dir", full)
    assert records(full) == records(out)
    assert (full / weights).read_bytes() == (out / weights).read_bytes()
    assert [step for step, _ in find_checkpoints(full)] == [4, 8]


def test_compiling_without_a_compiler_is_refused(base, tmp_path, monkeypatch):
    """torch raises this error, in this wrapping, if there is no C++ compiler."""

    def compile(*args, **kw):
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setattr(torch, "compile", compile)
    done = train(base[0], tmp_path / "out", "--compile", check=False)
    refused(done, "torch.compile does not work here")
    assert "C++ compiler" in done.stderr and "add --no-compile" in done.stderr


def test_out_of_memory(base, tmp_path, monkeypatch):
    errors = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]
    errors += [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")]
    errors += [InductorError(torch.OutOfMemoryError("CUDA out of memory"), None)]
    errors += [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")]
    errors += [RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")]
    for i, error in enumerate(errors):

        def step(*args, error=error):
            raise error

        monkeypatch.setattr(train_gpt2, "training_step", step)
        done = train(base[0], tmp_path / str(i), check=False)
        refused(done, "out of memory; choose a smaller --micro_batch_size")


def test_a_bug_in_the_program_is_a_traceback(base, tmp_path, monkeypatch):
    for error in (KeyError("x"), ValueError("x"), RuntimeError("shapes"), AssertionError()):

        def step(*args, error=error):
            raise error

        assert explain(error) is None
        monkeypatch.setattr(train_gpt2, "training_step", step)
        with pytest.raises(type(error)):
            train(base[0], tmp_path / type(error).__name__, check=False)


@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py", "hellaswag.py"])
def test_help_whose_reader_stops_early(script):
    shell = "set -o pipefail; " + " ".join(command(script, "--help")) + " | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
