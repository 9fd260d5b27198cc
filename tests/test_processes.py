"""What several processes do together: the same collectives in the same order, whatever happens to
one of them. (test_3 and test_5 of test_invariants.py: they compute what one process computes.)"""

import pytest
import torch
import torch.distributed as dist
from conftest import log_of, refused, run_here, train, write_shards
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_gpt2
from fineweb import UserError
from train_gpt2 import Args, bfloat16_is_faster, newest_checkpoint


class Rank:
    """What one rank of 8 does in a run, whose process group is a pretended one.

    calls: the collectives that it issues. buckets: for each step, the sizes of the buckets that DDP
    averages. evaluated: what it did besides training, with the step. status: its exit status."""

    def __init__(self, rank, folder, shards):
        self.rank, self.out_dir, self.shards = rank, folder / str(rank), shards
        self.calls, self.buckets, self.evaluated, self.status = [], [], [], None
        self.asking = False  # True during Run.stop_requested

    def train(self, others=None, signal_to=None, bad_step=None, checkpoint=None, **flags):
        """others: a function of what this rank says in all_gather_object, to what the others say.
        signal_to: the rank that receives SIGUSR1 in step 2. bad_step: where a gradient is NaN."""
        init, real_step = dist.init_process_group, train_gpt2.training_step
        real_stop_requested = train_gpt2.Run.stop_requested

        def step(*args):
            self.buckets.append([])
            if signal_to == self.rank and len(self.buckets) == 3:
                train_gpt2.stop_signals.append(10)
            return real_step(*args)

        def stop_requested(run):
            self.asking = True
            stop = real_stop_requested(run)
            self.asking = False
            return stop

        def all_reduce(x):  # the other ranks have zeros
            self.calls.append(("stop?" if self.asking else "all_reduce", tuple(x.shape)))
            if self.asking and signal_to not in (None, self.rank) and len(self.buckets) == 3:
                x += 1

        def gather(values, own):
            self.calls.append("gather")
            values[:] = [others(own) if others else own] * 8
            values[self.rank] = own

        def average(state, bucket):  # instead of an all-reduce, which this group cannot do
            self.buckets[-1].append(bucket.buffer().numel())
            if len(self.buckets) - 1 == bad_step:
                bucket.buffer()[0] = torch.nan
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        class Recorded(train_gpt2.DDP):
            def __init__(self, model):
                super().__init__(model)
                self.register_comm_hook(None, average)

        def noted(name, function):
            def call(*args):
                self.evaluated.append((name, len(self.buckets)))
                return function(*args)

            return call

        settings = dict(n_layer=1, n_head=1, n_embd=8, seq_len=32, total_batch_size=1024)
        settings |= dict(micro_batch_size=2, warmup_steps=1, val_every=2, val_tokens=640)
        settings |= dict(hellaswag_every=0, sample_every=2, save_every=2, sample_tokens=2)
        settings |= dict(device="cpu", dtype="float32", data_dir=str(self.shards)) | flags
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name in ("RANK", "LOCAL_RANK"):
                    patch.setenv(name, str(self.rank))
                group = dict(rank=self.rank, world_size=8, store=FakeStore())
                patch.setenv("WORLD_SIZE", "8")
                patch.setattr(dist, "init_process_group", lambda backend: init("fake", **group))
                patch.setattr(dist, "all_reduce", all_reduce)
                patch.setattr(dist, "all_gather_object", gather)
                patch.setattr(dist, "barrier", lambda: self.calls.append("barrier"))
                patch.setattr(train_gpt2, "DDP", Recorded)
                patch.setattr(train_gpt2, "training_step", step)
                patch.setattr(train_gpt2.Run, "stop_requested", stop_requested)
                patch.setattr(train_gpt2, "catch_stop_signals", train_gpt2.stop_signals.clear)
                for name in ("evaluate", "print_samples", "write_checkpoint"):
                    patch.setattr(train_gpt2, name, noted(name, getattr(train_gpt2, name)))
                args = Args(**settings, compile=False, out_dir=str(self.out_dir))
                self.status = train_gpt2.train(args, checkpoint)
        finally:
            train_gpt2.stop_signals.clear()
            if dist.is_initialized():
                dist.destroy_process_group()
        return self


@pytest.fixture
def two_ranks(tmp_path):
    """Ranks 0 and 3 of 8."""
    shards = write_shards(tmp_path / "shards")
    return [Rank(rank, tmp_path, shards) for rank in (0, 3)]


STOP, LOSS, VALIDATION = ("stop?", ()), ("all_reduce", ()), ("all_reduce", (2,))
EVALUATIONS = [STOP, VALIDATION, STOP]  # validation and samples are due


def test_ranks_issue_the_same_collectives(two_ranks):
    """And exactly these. Gradients are averaged once per step, not in each of the two micro-steps.
    Only rank 0 samples and writes."""
    expected = ["gather"]
    expected += [*EVALUATIONS, STOP, LOSS]  # step 0
    expected += [STOP, LOSS]  # step 1
    expected += [*EVALUATIONS, STOP, LOSS]  # step 2
    expected += [*EVALUATIONS, STOP, "barrier"]  # after step 2, the last step
    first, fourth = (rank.train(max_steps=3) for rank in two_ranks)
    assert first.calls == fourth.calls == expected
    n_params = 8 * (257 + 32) + 12 * 8 * 8 + 13 * 8 + 2 * 8
    assert first.buckets == fourth.buckets == [[n_params]] * 3
    assert fourth.evaluated == [("evaluate", step) for step in (0, 2, 3)]
    later = [
        (name, n) for n in (2, 3) for name in ("write_checkpoint", "evaluate", "print_samples")
    ]
    assert first.evaluated == [("evaluate", 0), ("print_samples", 0), *later]
    assert (first.out_dir / "log.txt").exists() and not fourth.out_dir.exists()


@pytest.mark.parametrize("signal_to", [0, 3])
def test_ranks_skip_a_step_and_stop_together(two_ranks, signal_to):
    """One of them receives SIGUSR1 in step 2; step 1 is skipped. The rank with the signal exits
    with its number, the others with that of SIGTERM."""
    for rank in two_ranks:
        rank.train(signal_to=signal_to, bad_step=1, max_steps=9)
        assert rank.status == 128 + (10 if rank.rank == signal_to else 15)
    first, fourth = two_ranks
    assert first.calls == fourth.calls and first.calls[-2:] == [STOP, "barrier"]
    assert len(first.buckets) == len(fourth.buckets) == 3
    assert newest_checkpoint(first.out_dir)["step"] == 3
    assert log_of(first.out_dir)["skip"] == {1: 1}
    assert first.evaluated[-1] == ("write_checkpoint", 3) and not fourth.out_dir.exists()


@pytest.mark.parametrize("others, expected", [(1, 1), (2, 2), (8, 4)])
def test_the_smallest_automatic_micro_batch_wins(two_ranks, capsys, others, expected):
    """Each of the 8 ranks has 4 sequences of the batch, which fit on this machine."""
    flags = dict(max_steps=0, val_every=0, sample_every=0, micro_batch_size="auto")
    two_ranks[0].train(lambda own: others if own == 4 else own, **flags)
    shares = f"{expected} sequences x 32 tokens x 8 processes x {4 // expected} micro-steps"
    assert shares in capsys.readouterr().out


def test_rank_0_decides_whether_bfloat16_is_faster(monkeypatch):
    """Whatever this process, which is another one, has measured."""

    def gather(values, own):
        values[:] = [rank_0_says, own]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for rank_0_says in (True, False):
        assert bfloat16_is_faster() is rank_0_says


OTHER_FILES = {
    "no checkpoint": lambda own: ["a step_00002", *own[1:]],
    "another checkpoint": lambda own: ["a step_00009", *own[1:]],
    "other shards for training": lambda own: [own[0], "7 train tokens", own[2]],
    "other shards for validation": lambda own: [*own[:2], "7 val tokens"],
}


@pytest.mark.parametrize("difference", OTHER_FILES)
def test_a_process_that_sees_other_files_than_rank_0_does_not_train(two_ranks, difference):
    first, fourth = two_ranks
    checkpoint = None
    if difference == "another checkpoint":
        checkpoint = newest_checkpoint(first.train(max_steps=2).out_dir)
    with pytest.raises(UserError, match="this process sees .*, but rank 0"):
        fourth.train(OTHER_FILES[difference], checkpoint=checkpoint, max_steps=4, resume=True)
    assert fourth.calls == ["gather"] and fourth.buckets == []


def test_a_resumed_run_connects_its_processes_by_its_own_device(base, monkeypatch):
    """A run on CPUs, which is resumed where there is a GPU, must not use NCCL."""
    backends = []

    def init_process_group(backend, **options):
        backends.append(backend)
        raise UserError("the processes are connected")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    refused(run_here("--resume", "--out_dir", base[1], check=False), "the processes are connected")
    assert backends == ["gloo"]


def test_a_mistake_under_torchrun_has_its_sentence(base, tmp_path):
    """A batch that one process could train on, but two cannot divide."""
    done = train(base[0], tmp_path / "out", "--total_batch_size", 128, processes=2, check=False)
    sentence = "train_gpt2.py: --total_batch_size 128 is not a multiple of micro_batch_size 4"
    assert done.returncode and sentence in done.stderr
    assert "Traceback (most recent call last)" not in done.stderr.split(sentence)[0]
    assert not (tmp_path / "out").exists()


def test_an_abort_while_python_shuts_down_is_not_the_end_of_a_process(base, tmp_path):
    """A thread of Gloo that frees a tensor meanwhile aborts the process, and torchrun would say
    that a finished run failed. Here an object aborts when Python deletes it at the end."""
    code = "import os, sys\n\nclass Abort:\n    __del__ = lambda self, abort=os.abort: abort()\n\n"
    (tmp_path / "sitecustomize.py").write_text(code + "sys.at_the_end = Abort()\n")
    env = {"PYTHONPATH": str(tmp_path)}
    alone = train(base[0], tmp_path / "alone", "--max_steps", 0, env=env, check=False)
    assert alone.returncode == -6
    env |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    done = train(base[0], tmp_path / "out", "--max_steps", 0, env=env)
    assert "done after" in done.stdout
