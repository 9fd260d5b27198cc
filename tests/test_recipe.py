"""The recipe and its form: sizes and presets, the command line, what importing does, and the length
of the lecture."""

import ast
import re
import subprocess
import sys
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
from conftest import ROOT, log_of, run_here, train

import train_gpt2
from train_gpt2 import SIZES, Args, parse, read_log


def settings(*flags):
    return asdict(parse(["--device", "cpu", *map(str, flags)])[0])


TABLE = {  # GPT-3 table 2.1: learning rate, batch in tokens (rounded to powers of two), context
    "gpt2": (6e-4, 2**19, 1024),
    "gpt2-medium": (3e-4, 2**19, 1024),
    "gpt2-large": (2.5e-4, 2**19, 1024),
    "gpt2-xl": (2e-4, 2**20, 1024),
    "gpt3-125M": (6e-4, 2**19, 2048),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_sets_its_learning_rate_batch_and_context(name):
    max_lr, batch, context = TABLE[name]
    found = settings("--model", name)
    assert (found["max_lr"], found["total_batch_size"], found["seq_len"]) == TABLE[name]
    assert found["min_lr"] == pytest.approx(0.1 * max_lr)
    assert found["max_steps"] * batch == pytest.approx(10e9, rel=1e-3)
    assert found["warmup_steps"] * batch == pytest.approx(375e6, rel=1e-2)
    small = Args(**found | dict(n_layer=1, n_head=1, n_embd=4))
    model = train_gpt2.build_model(small, train_gpt2.fineweb.gpt2_tokenizer())
    assert (model.config.block_size, model.config.vocab_size) == (context, 50304)


def test_presets_combine(monkeypatch):
    """A flag counts more than --demo, --demo more than --finetune, and that more than --model. A
    run is resumed in the folder that the preset trains in."""
    found = settings("--finetune", "--model", "gpt2-xl", "--sample_only")
    assert (found["max_lr"], found["min_lr"], found["max_steps"]) == (3e-5, 3e-5, 9537)
    found = settings("--demo", "--finetune", "--max_lr", 1e-3, "--sample_only")
    assert (found["max_lr"], found["n_layer"], found["init_from"]) == (1e-3, 4, "gpt2")
    asked = []
    monkeypatch.setattr(train_gpt2, "newest_checkpoint", asked.append)
    for flags in ("--finetune", "--demo", "--demo --out-dir mine"):
        settings("--resume", "--sample_only", *flags.split())
    assert asked == ["tuned", "demo/log", "mine"]


def test_epochs_give_the_number_of_steps(base, tmp_path):
    """--finetune trains for two epochs, here of 6,000 tokens. --epochs counts beside every preset,
    but not beside --max_steps."""
    flags = ["--data_dir", base[0], "--total_batch_size", 1024, "--seq_len", 32]
    for preset in (["--finetune"], ["--demo"], ["--model", "gpt2-xl"], []):
        assert settings(*preset, *flags, "--epochs", 3)["max_steps"] == 18
        assert settings(*preset, *flags, "--epochs", 3, "--max_steps", 7)["max_steps"] == 7
    flags += ["--init_from", base[1] / "step_00008", "--out_dir", tmp_path / "out"]
    done = run_here("--finetune", *flags, "--device", "cpu", "--dtype", "float32")
    assert "12 steps are 2.05 epochs" in done.stdout
    assert list(log_of(tmp_path / "out")["val"]) == [0, 10, 12]
    changed = next(x for x in done.stdout.splitlines() if x.startswith("changed settings: "))
    assert "max_steps 12," in changed and "warmup_steps 3," in changed and "seed" not in changed


def test_a_warm_up_that_does_not_end_is_warned_about(base, tmp_path):
    warning = "warning: --warmup_steps is not shorter than the run"
    assert warning in train(base[0], tmp_path / "out", "--warmup_steps", 8).stdout
    assert warning not in base[2]


def test_dashboards_get_what_the_log_gets(base, tmp_path, monkeypatch):
    """Each start is a run of Weights & Biases, in a group of their folder, and TensorBoard drops
    what will be repeated. What fails is turned off."""
    starts, boards, out = [], [{}, {}], tmp_path / "out"

    class Dashboard:  # the parts of both libraries that are used
        def __init__(self, folder=None, purge_step=None, group=None, **settings):
            starts.append((folder or group, purge_step))

        def add_scalar(self, stream, value, step):
            boards[0][step, stream] = value

        def log(self, values, step):
            boards[1].update({(step, stream): value for stream, value in values.items()})
            assert step < 9, "no connection"

    tensorboard, wandb = SimpleNamespace(SummaryWriter=Dashboard), SimpleNamespace(init=Dashboard)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(base[0], out, "--tensorboard", "--wandb", "mine")
    done = run_here("--resume", "--out_dir", out, "--max_steps", 9)
    folder, group = out / "tensorboard", (str(out), None)
    assert starts == [(folder, 0), group, (folder, 8), group]
    log = {(int(n), stream): float(value) for n, stream, value in read_log(out / "log.txt")}
    assert boards[0] == boards[1] == pytest.approx(log, abs=1e-9)
    assert "warning: a dashboard is turned off: no connection" in done.stdout


def test_help_describes_each_flag_with_the_comment_beside_it():
    text = re.sub(r"[│\s]+", " ", run_here("--help").stdout)
    for field in fields(Args):
        assert re.search(rf"--(no-)?{field.name.replace('_', '-')}\b", text), field.name
    assert "tokens per sequence" in text


def test_importing_is_light_and_has_no_side_effect(tmp_path):
    """No output, no file, no signal handler, no changed setting, and no library that is slow."""
    code = """
import os, signal, sys, torch
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return dict(os.environ), handlers, torch.get_num_threads(), torch.get_rng_state().tolist()
before = state()
import fineweb, hellaswag, train_gpt2
assert state() == before and not torch.distributed.is_initialized()
assert sys.modules.keys().isdisjoint({"transformers", "datasets", "torch._inductor.config"})
"""
    env = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


def test_the_lecture_is_short_and_names_what_it_borrows():
    """It ends by line 690 with train(), of at most 112 lines. It uses at most eleven names from
    below the double line, and the docstring lists exactly those."""
    text = (ROOT / "train_gpt2.py").read_text()
    tree = ast.parse(text)
    double_line = text.splitlines().index("# " + 94 * "=") + 1
    lecture = [node for node in tree.body if node.lineno < double_line]
    below = {getattr(node, "name", "") for node in tree.body if node.lineno > double_line} - {""}
    train = lecture[-1]
    assert train.name == "train" and train.end_lineno <= 690
    assert train.end_lineno - train.lineno < 112
    used = {n.id for top in lecture for n in ast.walk(top) if isinstance(n, ast.Name)} & below
    listed = re.findall(r"^    (\w+) \.{2,} ", ast.get_docstring(tree), re.MULTILINE)
    assert used == set(listed) & below and len(used) <= 11
