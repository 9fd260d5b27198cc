"""Processes that are killed while they train, and other numbers of them that continue. Nothing is
lost but the steps after the last checkpoint."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import (
    ENVIRONMENT,
    ROOT,
    TINY_RUN,
    log_of,
    records,
    run,
    run_here,
    start,
    train,
    wait_for,
    write_shards,
)

from train_gpt2 import find_checkpoints

pytestmark = pytest.mark.faults
WEIGHTS = "step_00040/model.safetensors"

KILLS = {  # when the process is killed: how many times, and whether it is time
    "during a save": (3, lambda out, log: (out / "tmp_checkpoint").exists()),
    "before the first checkpoint": (1, lambda out, log: "1 norm" in log),
    "in validation": (2, lambda out, log: f"\n{random.choice([4, 14, 24])} norm" in log),
    "at a random moment": (4, lambda out, log: "norm" in log and random.random() < 0.02),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(flags, out_dir) of a run of 40 steps that is not disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*TINY_RUN, "--data_dir", write_shards(folder / "shards"), "--max_steps", 40]
    flags += ["--save_every", 10, "--val_every", 5, "--val_tokens", 1500, "--keep_checkpoints", 1]
    run_here(*flags, "--out_dir", folder / "out")
    return flags, folder / "out"


def kill_when(is_time, flags, out):
    """Start a run and end it by SIGKILL. If it is so fast that it ends before that, try again."""
    log = out / "log.txt"
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        process = start(*flags, "--out_dir", out)

        def ended_or_time(process=process):
            return process.poll() is not None or log.exists() and is_time(out, log.read_text())

        wait_for(ended_or_time)
        process.kill()
        screen, _ = process.communicate()
        if process.returncode == -signal.SIGKILL:
            return
        assert process.returncode == 0, screen
    raise AssertionError("the run always ended too early")


@pytest.mark.parametrize("when", KILLS)
def test_after_kill_9_a_resumed_run_ends_with_the_same_log_and_weights(whole, tmp_path, when):
    """To the byte. Records of evaluations may stand twice, alike."""
    flags, undisturbed = whole
    tries, is_time = KILLS[when]
    random.seed(0)
    for i in range(tries):
        out = tmp_path / str(i)
        kill_when(is_time, flags, out)
        never_saved = not find_checkpoints(out)
        run_here(*(flags if never_saved else []), "--resume", "--out_dir", out)
        assert (out / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
        assert once(records(out)) == records(undisturbed)
        assert not list(out.glob("tmp_*"))


def once(lines):
    """Lines in their order, without those that stood before."""
    return list(dict.fromkeys(lines))


def test_one_then_two_then_one_process_with_other_micro_batches(base, tmp_path):
    """The run is stopped after steps 3 and 6 of 8. Its losses are those of the run `base`."""
    shards, undisturbed, _ = base
    out = tmp_path / "out"
    train(shards, out, "--save_every", 3)
    for step in (6, 8):
        shutil.rmtree(out / f"step_0000{step}")
    flags = ["--resume", "--out_dir", out, "--micro_batch_size"]
    run("train_gpt2.py", *flags, 2, processes=2)
    shutil.rmtree(out / "step_00008")
    run_here(*flags, 8)
    for stream in ("train", "norm", "val"):
        assert log_of(out)[stream] == pytest.approx(log_of(undisturbed)[stream], abs=1e-4)


def start_nodes(*args):
    """Start two torchruns, as on two machines. Returns their processes and the store where they
    meet, which has to live as long as they do."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # any free port
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launch += ["--rdzv_backend=c10d", "--rdzv_conf=is_host=0"]
    launch += [f"--rdzv_endpoint=127.0.0.1:{store.port}"]
    line = [*launch, str(ROOT / "train_gpt2.py"), *map(str, args)]
    options = dict(text=True, start_new_session=True, env=os.environ | ENVIRONMENT)
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return [subprocess.Popen(line, **options) for _ in range(2)], store


def finish(nodes):
    for node in nodes:
        screen, _ = node.communicate(timeout=120)
        assert node.returncode == 0, screen


def test_two_nodes_of_which_one_is_killed(base, tmp_path):
    """Two nodes with a shared folder have the losses of one process. Then one node is killed with
    all that runs on it. Both are started again with --resume, and end with the bits of the job that
    was not killed."""
    flags = [*TINY_RUN, "--data_dir", base[0], "--max_steps", 40, "--save_every", 4]
    flags += ["--keep_checkpoints", 0, "--out_dir"]
    run_here(*flags, tmp_path / "one")
    nodes, store = start_nodes(*flags, tmp_path / "two")
    finish(nodes)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for stream in ("train", "norm", "val"):
        assert two[stream] == pytest.approx(one[stream], abs=1e-4)

    out = tmp_path / "killed"
    (first, other), store = start_nodes(*flags, out)
    wait_for((out / "step_00004").exists)
    workers = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    for pid in [*map(int, workers), other.pid]:
        os.kill(pid, signal.SIGKILL)
    other.communicate()
    first.send_signal(signal.SIGTERM)  # torchrun would wait minutes for the lost node
    first.communicate(timeout=120)
    assert first.returncode and find_checkpoints(out)[-1][0] < 40
    nodes, store = start_nodes("--resume", "--out_dir", out)
    finish(nodes)
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert once(records(out)) == records(tmp_path / "two")
