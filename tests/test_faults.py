"""What may befall a run that takes a week, fault by fault; T1 to T20 are their kinds. Tests that
start many processes are marked `faults`: `python -m pytest -n 0 -m faults` runs them."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    FAULTS,
    ROOT,
    TINY_RUN,
    command,
    log_of,
    records,
    refused,
    run,
    run_here,
    start,
    survived,
    train,
    wait_for,
    write_shards,
)
from safetensors.torch import load_file, save_file
from test_invariants import random_hugging_face
from transformers import GPT2LMHeadModel

import train_gpt2
from fineweb import UserError
from train_gpt2 import GPT, find_checkpoints, make_scaler, newest_checkpoint, training_step

CPU = torch.device("cpu")

# -- T1: nothing non-finite is applied, nothing bad is saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scaler_that_is_always_on_changes_no_bit(tiny, dtype):
    import copy

    generator, found = torch.Generator().manual_seed(0), []
    steps = [torch.randint(50257, (2, 2, 17), generator=generator) for _ in range(5)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    off = torch.amp.GradScaler("cpu", enabled=False)
    for scaler in (off, make_scaler("bfloat16", CPU)):
        model, results = copy.deepcopy(tiny), []
        optimizer = model.configure_optimizers(0.1, 1e-2)
        for step in steps:
            batches = [(t[:, :-1], t[:, 1:]) for t in step]
            results += training_step(model, batches, optimizer, scaler, autocast, 1.0)
        found.append([*results, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_weights_that_have_gone_astray_are_not_saved(shards, tmp_path):
    """A learning rate of 1e30: finite weights that give NaN. Even if that was the last step."""
    for steps in (1, 3):
        out = tmp_path / str(steps)
        flags = ["--max_steps", steps, "--save_every", 1, "--val_every", 0]
        wild = ["--max_lr", 1e30, "--warmup_steps", 1, "--grad_clip", 0]
        done = train(shards, out, *flags, *wild, check=False)
        refused(done, "the loss after 1 updates is nan; lower --max_lr")
        assert find_checkpoints(out) == []
        train(shards, out, *flags, "--resume")
        assert [step for step, _ in find_checkpoints(out)] == list(range(1, steps + 1))


# -- T2, T3, T8: what is loaded is what was asked for, what was trained is saved


def test_an_untied_head_is_refused_whatever_the_config_says(tmp_path):
    random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2)
    state = load_file(tmp_path / "model.safetensors")
    wte = state["transformer.wte.weight"]
    for head, config in (
        (wte + 1, True),
        (wte + 1, None),
        (wte.clone(), True),
        (wte.clone(), None),
    ):
        save_file(
            state | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        settings = json.loads((tmp_path / "config.json").read_text())
        settings.pop("tie_word_embeddings", None)
        settings |= {} if config is None else {"tie_word_embeddings": config}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        if torch.equal(head, wte):
            assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, wte)
        else:
            with pytest.raises(UserError, match="tie_word_embeddings"):
                GPT.from_pretrained(tmp_path)


def test_rows_of_the_vocabulary_that_were_trained_are_saved(tmp_path):
    shards = write_shards(tmp_path / "shards", vocab=60000)
    train(shards, tmp_path / "out", "--vocab_size", 60000, "--max_steps", 2)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out/step_00002")
    assert theirs.transformer.wte.weight.shape == (60000, 32)
    done = train(shards, tmp_path / "other", check=False)  # 50304 is 50257 and padding
    refused(done, "but the model knows 50257 ids")


def test_masks_in_old_files_are_ignored(tmp_path):
    theirs = random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2)
    state = load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix("transformer."): t for name, t in state.items()}
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ours = GPT.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


# -- T5, T16: output and signals


def test_what_a_terminal_cannot_show_is_replaced(base, tmp_path):
    flags = ["--sample_every", 4, "--sample_tokens", 60, "--save_every", 4]
    done = train(base[0], tmp_path / "out", *flags, env={"PYTHONIOENCODING": "cp1252"})
    assert done.stdout.count("> Hello") == 12


def test_a_closed_pipe_ends_quietly_after_a_checkpoint(base, tmp_path):
    out = tmp_path / "out"
    flags = [*TINY_RUN, "--data_dir", base[0], "--out_dir", out, "--max_steps", 100000]
    process = start(*flags, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 128 + signal.SIGPIPE
    assert len(find_checkpoints(out)) == 1


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(train_gpt2, "received", [])
    handlers = {}
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: handlers.update({number: handler})
    )
    train_gpt2.catch_signals()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP} == handlers.keys()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert handlers[signal.SIGINT] != signal.default_int_handler
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert handlers[signal.SIGINT] == signal.default_int_handler
    assert train_gpt2.received == [signal.SIGTERM] * 2 + [signal.SIGINT]
    handlers.clear()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # as nohup has it
    train_gpt2.catch_signals()
    assert handlers == {}


def test_save_minutes_go_by_the_clock(base, tmp_path, monkeypatch):
    """A clock that moves on by a minute in each step."""
    now, plain = [0.0], train_gpt2.training_step

    def step(*args):
        now[0] += 60
        return plain(*args)

    monkeypatch.setattr(train_gpt2.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train_gpt2, "training_step", step)
    train(base[0], tmp_path / "out", "--save_every", 0, "--save_minutes", 2.5)
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [3, 6]
    train(base[0], tmp_path / "both", "--save_every", 4, "--save_minutes", 2.5)
    assert [step for step, _ in find_checkpoints(tmp_path / "both")] == [3, 4, 7, 8]
    train(base[0], tmp_path / "never", "--save_every", 0, "--save_minutes", 0)
    assert find_checkpoints(tmp_path / "never") == []


def test_a_clock_that_is_set_back_does_not_matter(base, tmp_path, monkeypatch):
    back = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(train_gpt2.time, "time", lambda: next(back))
    done = train(base[0], tmp_path / "out")
    assert "done after 0:00:" in done.stdout


# -- T6: one sentence, whatever class a library raised


def test_weights_that_are_a_pointer_to_git_lfs(base, tmp_path):
    shutil.copytree(base[1] / "step_00008", tmp_path / "dir")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "dir/model.safetensors").write_text(pointer)
    done = run_here("--sample_only", "--init_from", tmp_path / "dir", check=False)
    refused(done, "dir cannot be loaded (")


def test_rank_without_torchrun(base, tmp_path):
    done = train(base[0], tmp_path / "out", env={"RANK": "0"}, check=False)
    refused(done, "the processes cannot find each other (")
    assert "MASTER_ADDR" in done.stderr or "WORLD_SIZE" in done.stderr
    done = train(base[0], tmp_path / "out", env={"WORLD_SIZE": "two"}, check=False)
    refused(done, "the processes cannot find each other (invalid literal")


@FAULTS
def test_not_enough_memory(base, tmp_path):
    line = command("train_gpt2.py", *TINY_RUN, "--data_dir", base[0], "--out_dir", tmp_path / "out")
    line += "--seq_len 64 --total_batch_size 65536 --micro_batch_size 1024 --n_embd 256".split()
    limit = ["bash", "-c", 'ulimit -v 1900000; exec "$@"', "-", *line, "--vocab_size", "50257"]
    env = os.environ | ENVIRONMENT
    done = subprocess.run(limit, capture_output=True, text=True, env=env, timeout=120)
    refused(done, "out of memory; give a smaller --micro_batch_size")


def test_a_folder_that_cannot_be_written(base, tmp_path, monkeypatch):
    """T6: a read-only file system, also for root; a folder without permission, for all others."""
    closed = tmp_path / "closed"
    closed.mkdir()

    def only_to_read(function):
        def call(path, *args, **kwargs):
            if str(path).startswith(str(closed)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "open"):
            patch.setattr(os, name, only_to_read(getattr(os, name)))
        for out in (closed / "out", closed):
            refused(train(base[0], out, check=False), "Read-only file system")
    if os.geteuid():  # root may write there
        closed.chmod(0o555)
        for out in (closed / "out", closed):
            refused(train(base[0], out, check=False), "Permission denied")
    assert not any(closed.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_room_for_the_log(base, tmp_path, monkeypatch):
    """T18: the disk is full from step 3 on; or log.txt is cut within a line. All complete records
    before that stay."""
    shards, out, _ = base
    write = train_gpt2.Log.write

    def fills_up(log, step, *args, **kwargs):
        if step == 3:
            with open("/dev/full", "w") as full:
                os.dup2(full.fileno(), log.file.fileno())
        write(log, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.Log, "write", fills_up)
        done = train(shards, tmp_path / "full", check=False)
    refused(done, "log.txt cannot be written (No space left on device); make room")
    assert records(tmp_path / "full") == [line for line in records(out) if line[0] in "012"]

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        flags = ["--max_steps", 1000, "--save_every", 0, "--val_every", 0]
        done = train(shards, tmp_path / "cut", *flags, check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(done, "log.txt cannot be written (File too large); make room")
    assert (tmp_path / "cut/log.txt").stat().st_size == 5000
    steps = list(log_of(tmp_path / "cut")["train"])
    assert len(steps) > 30 and steps == list(range(len(steps)))


def test_notes_in_the_log_are_kept(base, tmp_path):
    shutil.copytree(base[1], tmp_path / "out")
    log = tmp_path / "out/log.txt"
    log.write_text("a note of mine\n" + log.read_text() + "8 words are no record of the run\n")
    run_here("--resume", "--out_dir", tmp_path / "out", "--max_steps", 9)
    lines = log.read_text().splitlines()
    assert lines[0] == "a note of mine" and "8 words are no record of the run" in lines
    assert list(log_of(tmp_path / "out")["train"]) == list(range(9))


# -- T7: printed advice works


def test_printed_commands_work(base):
    shards, out, screen = base
    lines = [line.strip() for line in screen.splitlines()]
    sample = next(line for line in lines if line.startswith("python train_gpt2.py --sample_only"))
    done = run_here(*sample.split()[2:])
    assert done.stdout.count("> Hello") == 4
    notebook = next(line for line in lines if "jupyter execute" in line)
    tools = os.path.dirname(sys.executable)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    words = notebook.split("  #")[0].split()
    assert words[1:] == ["jupyter", "execute", "--inplace", "play.ipynb"]  # test_notebook runs it
    subprocess.run([*words[1:3], "--help"], env=env, check=True, capture_output=True)


# -- T14, T15, T17, T19, T20: checkpoints


def flip_bytes(path):
    """Four bytes of the largest array in a training_state.pt."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    data = bytearray(path.read_bytes())
    at = member.header_offset + len(member.filename) + 100 + member.file_size // 2
    data[at : at + 4] = bytes(b ^ 0xFF for b in data[at : at + 4])
    path.write_bytes(data)


def other_step(path):
    shutil.copy(path.parents[1] / "step_00004" / path.name, path)


DAMAGE = [
    ("wrong checksum of", flip_bytes),
    ("it holds step 4", other_step),
    ("BadZipFile", lambda path: path.write_bytes(b"")),
    ("BadZipFile", lambda path: path.write_bytes(path.read_bytes()[:100_000])),
    ("No such file", lambda path: path.unlink()),
]


@pytest.mark.parametrize("text, damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(base, tmp_path, text, damage):
    out = tmp_path / "out"
    shutil.copytree(base[1], out)
    damage(out / "step_00008/training_state.pt")
    done = run_here("--resume", "--out_dir", out)
    assert f"warning: {out}/step_00008 is damaged ({text}" in done.stdout, done.stdout
    assert "resuming " + str(out / "step_00004") in done.stdout
    assert records(out) == records(base[1])
    assert newest_checkpoint(out)["step"] == 8  # mended


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(shards, tmp_path, monkeypatch):
    synced, plain = [], os.fsync

    def fsync(number):
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")))
        return plain(number)

    monkeypatch.setattr(os, "fsync", fsync)
    train(shards, tmp_path / "out", "--max_steps", 1)
    ((_, path),) = find_checkpoints(tmp_path / "out")
    assert {f.name for f in synced} >= {f.name for f in path.iterdir()}
    assert {f.parent.name for f in synced if f.name == "training_state.pt"} == {"tmp_step_00001"}


def test_none_is_whole(base, tmp_path):
    shutil.copytree(base[1], tmp_path / "out")
    for step in (4, 8):
        flip_bytes(tmp_path / f"out/step_0000{step}/training_state.pt")
    done = run_here("--resume", "--out_dir", tmp_path / "out", check=False)
    refused(done, "none of its checkpoints is whole")
    assert (tmp_path / "out/log.txt").read_bytes() == (base[1] / "log.txt").read_bytes()


def test_a_checkpoint_that_cannot_be_pruned_is_a_warning(base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/step_00001").symlink_to(tmp_path / "elsewhere")
    flags = ["--save_every", 2, "--keep_checkpoints", 1]
    done = train(base[0], tmp_path / "out", *flags)
    assert "warning: " in done.stdout and "step_00001 cannot be removed" in done.stdout
    assert [step for step, _ in find_checkpoints(tmp_path / "out")][1:] == [6, 8]


def test_absurd_sizes_are_refused_at_once(tmp_path):
    began = time.monotonic()
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2", n_layer=10**9)))
    done = run_here("--sample_only", "--init_from", tmp_path, check=False)
    refused(done, "choose a smaller model")
    for flag in ("--n_layer", "--n_embd", "--vocab_size"):
        flags = [flag, 12 * 10**9, "--device", "cpu", "--out_dir", tmp_path / "out"]
        refused(run_here(*flags, "--data_dir", tmp_path, check=False), "choose a smaller model")
    assert time.monotonic() - began < 20


def test_a_checkpoint_says_where_it_comes_from(base):
    state = torch.load(base[1] / "step_00008/training_state.pt", weights_only=True)
    assert state["versions"]["torch"] == torch.__version__ and state["world_size"] == 1
    assert {"commit", "python", "numpy", "device"} < state["versions"].keys()
    assert state["shards"]["made_val_000000.npy"] == [3128, None]
    assert state["config"]["max_lr"] == 1e-2
    assert "versions: commit" in base[2] and "max_lr 0.01" in base[2]


# -- processes that come and go


KILLS = {  # when, how often, and where the run is then
    "amid a save": (3, lambda out, log: any(out.glob("tmp_step_*"))),
    "before the first checkpoint": (2, lambda out, log: "1 norm" in log),
    "in validation": (2, lambda out, log: f"\n{random.choice([4, 14, 24])} norm" in log),
    "at a random moment": (5, lambda out, log: log and not time.sleep(random.uniform(0, 0.8))),
}


@FAULTS
@pytest.mark.parametrize("when", KILLS)
def test_kill_9(killed, tmp_path, when):
    """--resume ends with the log and weights of the undisturbed run, to the byte."""
    flags, whole = killed
    tries, is_there = KILLS[when]
    again = []  # updates that had to be made again
    for i in range(tries):
        out = tmp_path / str(i)
        log = out / "log.txt"
        process = start(*flags, "--out_dir", out)
        wait_for(lambda: log.exists() and is_there(out, log.read_text()))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended already"
        saved = [0, *(step for step, _ in find_checkpoints(out))]
        again.append(len(log_of(out).get("norm", [])) - saved[-1])
        run_here(*(flags if saved == [0] else []), "--resume", "--out_dir", out)
        weights = "step_00040/model.safetensors"
        assert (out / weights).read_bytes() == (whole / weights).read_bytes()
        assert records(out) == records(whole)
        assert not list(out.glob("tmp_*"))
    lost = f"nothing; {min(again)}–{max(again)} updates made again, --save_every 10"
    survived(f"kill -9 {when}", tries, lost)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(flags, out_dir) of the run that is to be killed, undisturbed."""
    folder = tmp_path_factory.mktemp("killed")
    flags = [*TINY_RUN, "--data_dir", write_shards(folder / "shards"), "--max_steps", 40]
    flags += ["--save_every", 10, "--val_every", 5, "--val_tokens", 1500, "--keep_checkpoints", 1]
    random.seed(0)
    run_here(*flags, "--out_dir", folder / "out")
    return flags, folder / "out"


@FAULTS
def test_world_1_2_1_with_other_micro_batches(base, tmp_path):
    shards, whole, _ = base
    out = tmp_path / "out"
    train(shards, out, "--max_steps", 8, "--save_every", 3, alone=True)
    for step in (6, 8):
        shutil.rmtree(out / f"step_0000{step}")
    flags = ["--resume", "--out_dir", out]
    run("train_gpt2.py", *flags, "--micro_batch_size", 2, processes=2)
    shutil.rmtree(out / "step_00008")
    run("train_gpt2.py", *flags, "--micro_batch_size", 8)
    for stream in ("train", "norm", "val"):
        assert log_of(out)[stream] == pytest.approx(log_of(whole)[stream], abs=1e-4)
    survived("1, then 2, then 1 process, other micro-batches", 1, "nothing (1e-4)")


def agents(*args, nodes=2):
    """One torchrun agent per node, as the README starts them, all on the loopback address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    launch += ["--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    line = [*launch, str(ROOT / "train_gpt2.py"), *map(str, args)]
    options = dict(text=True, start_new_session=True, env=os.environ | ENVIRONMENT)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return [subprocess.Popen(line, **options, **pipes) for _ in range(nodes)]


@FAULTS
def test_two_nodes_for_real(base, tmp_path):
    """Two agents, one shared folder: the losses of one process. One agent is killed with what it
    started; the job, started again by hand with --resume, ends with the bits of the other one."""
    flags = [*TINY_RUN, "--data_dir", base[0], "--max_steps", 40, "--save_every", 4]
    flags += ["--keep_checkpoints", 0, "--out_dir"]
    run_here(*flags, tmp_path / "one")
    for node in agents(*flags, tmp_path / "two"):
        screen, _ = node.communicate(timeout=120)
        assert node.returncode == 0, screen
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for stream in ("train", "norm", "val"):
        assert two[stream] == pytest.approx(one[stream], abs=1e-4)
    out = tmp_path / "killed"
    first, other = agents(*flags, out)
    wait_for(lambda: (out / "step_00004").exists())
    workers = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    for pid in [*map(int, workers), other.pid]:
        os.kill(pid, signal.SIGKILL)
    other.communicate()
    first.send_signal(signal.SIGTERM)  # torchrun would wait minutes for the lost one
    first.communicate(timeout=120)
    saved = [step for step, _ in find_checkpoints(out)]
    assert saved[-1] < 40 and first.returncode
    for node in agents("--resume", "--out_dir", out):
        screen, _ = node.communicate(timeout=120)
        assert node.returncode == 0, screen
    weights = "step_00040/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    assert records(out) == records(tmp_path / "two")
    survived(
        "two nodes, one killed, both started again", 1, f"nothing; it went on from step {saved[-1]}"
    )
