"""What --resume continues with: the settings, the log, the newest checkpoint that is not damaged,
and which checkpoints stay. (test_5 of test_invariants.py: a resumed run is exact.)"""

import re
import shutil
import zipfile

import pytest
import torch
from conftest import log_of, records, refused, run_here, train, write_shards

import train_gpt2
from train_gpt2 import find_checkpoints, newest_checkpoint


@pytest.fixture
def stopped(base, tmp_path):
    """A copy of the run `base` that ended after step 4 of 8."""
    out = tmp_path / "stopped"
    shutil.copytree(base[1], out)
    shutil.rmtree(out / "step_00008")
    return out


def steps(out):
    return [step for step, _ in find_checkpoints(out)]


def weights(out):
    _, newest = find_checkpoints(out)[-1]
    return (newest / "model.safetensors").read_bytes()


def once(lines):
    """Lines in their order, without those that stood before."""
    return list(dict.fromkeys(lines))


def change_state(out, change):
    """Let a function change the newest checkpoint's training state, a dict, in its place."""
    _, newest = find_checkpoints(out)[-1]
    state = torch.load(newest / "training_state.pt", weights_only=True)
    change(state)
    torch.save(state, newest / "training_state.pt")


# Settings -------------------------------------------------------------------------------------


def test_a_resumed_run_has_its_settings_and_prints_those_that_change(stopped):
    done = run_here("--resume", "--out_dir", stopped, "--max_steps", 6, "--val_every", 2)
    changes = [line for line in done.stdout.splitlines() if "→" in line]
    assert changes == ["--resume: max_steps 8 → 6", "--resume: val_every 4 → 2"]
    assert list(log_of(stopped)["train"])[-1] == 5 and list(log_of(stopped)["val"]) == [0, 4, 6]
    done = run_here("--resume", "--out_dir", stopped, "--max_steps", 8)
    assert done.stdout.count("→") == 1 and list(log_of(stopped)["val"]) == [0, 4, 6, 8]


def other_weights(out, base, screen):
    return weights(out) != weights(base[1])


CHANGES = {  # flags: the effect that the change must have on the run that continues from step 4
    "--data_dir {other}": other_weights,
    "--max_lr 2e-2": other_weights,
    "--grad_clip 0.01": other_weights,
    "--dtype bfloat16": other_weights,
    "--epochs 0.4": lambda out, base, screen: steps(out)[-1] == 10,  # of 6,000 tokens
    "--max_steps 6 --epochs 0.4": lambda out, base, screen: steps(out)[-1] == 6,
    "--micro_batch_size 2": lambda out, base, screen: "= 2 sequences x 32 tokens" in screen,
    "--val_tokens 64": lambda out, base, screen: log_of(out)["val"] != log_of(base[1])["val"],
    "--save_every 3": lambda out, base, screen: steps(out) == [4, 6, 8],
    "--save_minutes 1e-9": lambda out, base, screen: steps(out) == [4, 5, 6, 7, 8],
    "--sample_every 8 --prompt Once": lambda out, base, screen: screen.count("> Once") == 4,
}


@pytest.mark.parametrize("flags", CHANGES)
def test_a_setting_that_is_changed_at_a_resume_has_an_effect(base, stopped, tmp_path, flags):
    other = write_shards(tmp_path / "other", seed=1)
    done = run_here("--resume", "--out_dir", stopped, *flags.format(other=other).split())
    assert CHANGES[flags](stopped, base, done.stdout), done.stdout


def test_a_new_weight_decay_reaches_the_optimizer(base, tmp_path):
    """Its saved state holds the old one. With a learning rate near 0 only decay moves weights."""
    out = tmp_path / "out"
    shutil.copytree(base[1], out)
    flags = ["--max_steps", 9, "--max_lr", 1e-9, "--min_lr", 1e-9, "--weight_decay", 1e8]
    run_here("--resume", "--out_dir", out, *flags)
    files = [out / f"step_0000{step}/training_state.pt" for step in (8, 9)]
    before, after = (torch.load(file, weights_only=True)["model"] for file in files)
    for name, weight in before.items():
        expected = weight * (1 - 1e-9 * 1e8) if weight.dim() >= 2 else weight
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-7, msg=name)


def test_a_resumed_float16_run_keeps_its_scale_and_bfloat16_has_none(base, tmp_path):
    out = tmp_path / "out"
    train(base[0], out, "--dtype", "float16", "--max_steps", 2)
    assert newest_checkpoint(out)["scaler"]["scale"] == 65536
    change_state(out, lambda state: state["scaler"].update(scale=1024.0))
    run_here("--resume", "--out_dir", out, "--max_steps", 3)
    assert newest_checkpoint(out)["scaler"]["scale"] == 1024
    run_here("--resume", "--out_dir", out, "--max_steps", 4, "--dtype", "bfloat16")
    assert newest_checkpoint(out)["scaler"] == {}


def test_what_was_chosen_automatically_is_not_chosen_again(base, tmp_path, monkeypatch):
    """The precision is timed once. Another micro-batch would change the rounding, so the one of the
    checkpoint is kept, although this machine would choose 8 sequences."""
    timed, out = [], tmp_path / "out"
    monkeypatch.setattr(train_gpt2, "bfloat16_is_faster", lambda: not timed.append(1))
    done = train(base[0], out, "--dtype", "auto", "--max_steps", 1, batch="auto")
    assert "1 x cpu, bfloat16" in done.stdout and "= 8 sequences x 32 tokens" in done.stdout
    change_state(out, lambda state: state.update(micro_batch_size=2))
    done = run_here("--resume", "--out_dir", out, "--max_steps", 2)
    assert "1 x cpu, bfloat16" in done.stdout and "= 2 sequences x 32 tokens" in done.stdout
    assert len(timed) == 1


def test_a_checkpoint_of_an_earlier_version_is_continued_to_the_bit(base, stopped):
    """It says nothing of n_tokens, and it has settings and facts that no longer exist."""

    def change(state):
        del state["gpt_config"]["n_tokens"]
        state["args"] |= dict(vocab_size=50304, a_setting_of_then=3)
        del state["args"]["top_p"]
        state |= dict(machine=[1, "cpu", "float32"], versions=dict(torch="2.13.0"))
        state["shards"] = {"made_val_000000.npy": [3128, None]}

    change_state(stopped, change)
    run_here("--resume", "--out_dir", stopped)
    assert once(records(stopped)) == records(base[1]) and weights(stopped) == weights(base[1])
    ours, theirs = newest_checkpoint(stopped), newest_checkpoint(base[1])
    assert ours["args"]["top_p"] == 1.0 and ours["scaler"] == theirs["scaler"]
    for i, moments in theirs["optimizer"]["state"].items():
        assert all(torch.equal(m, ours["optimizer"]["state"][i][k]) for k, m in moments.items())


# The log --------------------------------------------------------------------------------------


def test_a_finished_run_can_be_extended_and_keeps_its_last_evaluation(base, tmp_path, monkeypatch):
    """Step 8 was evaluated because it was the last, so nothing writes that record again. Each start
    gives the folder back, even where its objects live on, as in a notebook."""
    runs, Run = [], train_gpt2.Run
    monkeypatch.setattr(train_gpt2, "Run", lambda *args: runs.append(Run(*args)) or runs[-1])
    out = tmp_path / "out"
    train(base[0], out, "--val_every", 3)
    before = log_of(out)["val"]
    done = run_here("--resume", "--out_dir", out)  # there is nothing left to do
    assert "| loss" not in done.stdout and log_of(out)["val"] == before
    run_here("--resume", "--out_dir", out, "--max_steps", 10)
    after = log_of(out)["val"]
    assert list(after) == [0, 3, 6, 8, 9, 10] and after[8] == before[8] and len(runs) == 3


def test_a_resumed_log_drops_what_will_be_written_again(base, stopped):
    """Records of training from step 4 on, of evaluations after it, and a line that is cut."""
    with open(stopped / "log.txt", "a") as log:
        log.write("4 skip 1.0\n12 train 2.5\n12 hella 0.3\n12 no")
    run_here("--resume", "--out_dir", stopped)
    assert once(records(stopped)) == records(base[1])


def test_resume_without_a_checkpoint_is_a_new_run_and_says_so(base, tmp_path):
    """The records of an attempt that was not saved are dropped."""
    out = tmp_path / "out"
    train(base[0], out, "--max_steps", 3, "--save_every", 0, "--save_minutes", 0, "--max_lr", 1)
    done = train(base[0], out, "--resume", "--save_every", 4)
    assert f"{out} has no checkpoint: " in done.stdout
    assert once(records(out)) == records(base[1])


def test_a_run_that_failed_before_its_first_record_may_start_again(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(train_gpt2, "evaluate", lambda *args: {}["failed"])
        train(base[0], tmp_path / "out")
    assert (tmp_path / "out/log.txt").exists()
    train(base[0], tmp_path / "out", "--max_steps", 1)


# Damaged checkpoints --------------------------------------------------------------------------


def flip_bytes(path):
    """Four bytes of the largest tensor, which torch.load does not notice."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    data = bytearray(path.read_bytes())
    at = member.header_offset + len(member.filename) + 100 + member.file_size // 2
    data[at : at + 4] = bytes(byte ^ 0xFF for byte in data[at : at + 4])
    path.write_bytes(data)


DAMAGE = {  # what happened to training_state.pt
    "flipped bytes": flip_bytes,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:9000]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(base, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(base[1], out)
    DAMAGE[damage](out / "step_00008/training_state.pt")
    screen = run_here("--resume", "--out_dir", out).stdout
    assert re.search(f"warning: {out}/step_00008 cannot be read .*; trying the one before", screen)
    assert f"resuming {out}/step_00004" in screen
    assert once(records(out)) == records(base[1]) and weights(out) == weights(base[1])
    assert newest_checkpoint(out)["step"] == 8  # written again


def test_if_all_checkpoints_are_damaged_nothing_is_touched(base, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(base[1], out)
    for _, path in find_checkpoints(out):
        flip_bytes(path / "training_state.pt")
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused(run_here("--resume", "--out_dir", out, check=False), "none of its checkpoints can be")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("damaged", [8, 100])
def test_the_last_good_checkpoint_stays_until_the_next_is_written(stopped, monkeypatch, damaged):
    """Even with --keep_checkpoints 1, where a damaged one has the name of the next, or a later."""
    (stopped / f"step_{damaged:05d}").mkdir()
    before, write = [], train_gpt2.write_checkpoint
    monkeypatch.setattr(
        train_gpt2, "write_checkpoint", lambda *args: before.append(steps(stopped)) or write(*args)
    )
    run_here("--resume", "--out_dir", stopped, "--keep_checkpoints", 1)
    assert before == [[4, damaged]] and (stopped / "step_00008/training_state.pt").exists()


# Which checkpoints stay -----------------------------------------------------------------------


def test_the_newest_checkpoints_stay(base, tmp_path):
    """--keep_checkpoints counts those beside the newest; 0 keeps all."""
    for keep, expected in ((2, [4, 6, 8]), (0, [2, 4, 6, 8])):
        out = tmp_path / str(keep)
        train(base[0], out, "--save_every", 2, "--keep_checkpoints", keep, "--val_every", 0)
        assert steps(out) == expected and not list(out.glob("tmp_*"))


def test_the_checkpoint_with_the_lowest_validation_loss_stays(base, stopped):
    """Here the loss after 4 steps was the lowest, and one that is not a number came before."""
    lines = (stopped / "log.txt").read_text().splitlines()
    changed = {"0 val": "0 val nan", "4 val": "4 val 0.5"}
    lines = [changed.get(line[:5], line) for line in lines]
    (stopped / "log.txt").write_text("\n".join(lines) + "\n")
    flags = ["--keep_checkpoints", 1, "--save_every", 1, "--val_every", 8]
    screen = run_here("--resume", "--out_dir", stopped, *flags).stdout
    assert steps(stopped) == [4, 7, 8]
    line = f"lowest validation loss 0.5000 after 4 steps: {stopped}/step_00004"
    assert line in screen.splitlines() and "lowest" not in base[2]
    run_here("--resume", "--out_dir", stopped, "--max_steps", 10)
    assert steps(stopped) == [4, 9, 10]


def test_checkpoints_are_found_by_their_number(tmp_path):
    """Not in the order of the text of their names, and without what only looks like one of them."""
    for name in ("step_99998", "step_100000", "step_00002", "step_00002_copy", "step_", "steps"):
        (tmp_path / name).mkdir()
    names = {2: "step_00002", 99998: "step_99998", 100000: "step_100000"}
    assert find_checkpoints(tmp_path) == [(n, tmp_path / name) for n, name in names.items()]
    assert find_checkpoints(tmp_path / "nowhere") == []
