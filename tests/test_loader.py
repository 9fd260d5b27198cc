"""The loader: shards of every name and format, and the thread that reads ahead. (test_1 of
test_invariants.py has the order of the data.)"""

import threading
from queue import Queue

import numpy as np
import pytest
import torch
from conftest import log_of, train

from fineweb import list_shards
from train_gpt2 import Args, DataLoaderLite, prefetch


def numbered(folder, *lengths, form="npy", name="numbered_train_{:06d}"):
    """Shards whose tokens count up across them: a token is its index in all of them."""
    folder.mkdir(exist_ok=True)
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    for i, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1])):
        path = folder / f"{name.format(i + 1)}.{form}"
        if form == "npy":
            np.save(path, part)
        else:
            header = np.zeros(256, dtype="<i4")
            header[:3] = 20240520, 1, len(part)
            path.write_bytes(header.tobytes() + part.astype("<u2").tobytes())
    return folder


@pytest.mark.parametrize("form", ["npy", "bin"])
def test_the_order_on_disk_runs_across_shards(tmp_path, form):
    """14 sequences of 8 + 1 tokens; a fifteenth would lack its last target."""
    folder = numbered(tmp_path / "d", 37, 5, 70, 8, form=form)
    args = Args(data_dir=str(folder), seq_len=8, total_batch_size=32, shuffle=False)
    loader = DataLoaderLite(args, "train", B=2)
    for step in range(9):
        indices = torch.tensor([[(step * 4 + i) % 14 for i in pair] for pair in ((0, 1), (2, 3))])
        inputs = 8 * indices[..., None] + torch.arange(8)  # (micro-steps, B, T)
        for (x, y), expected in zip(loader.micro_batches(step), inputs, strict=True):
            assert x.dtype == y.dtype == torch.int64
            assert torch.equal(x, expected) and torch.equal(y, expected + 1)


def test_the_batch_of_a_run_grows(shards, tmp_path):
    """An eighth, a quarter and half of the batch, for two steps each, then all of it."""
    flags = ["--batch_ramp_steps", 6, "--total_batch_size", 1024]
    done = train(shards, tmp_path / "out", *flags)
    assert log_of(tmp_path / "out")["batch"] == {0: 128, 2: 256, 4: 512, 6: 1024}
    assert "8 steps are 0.64 epochs" in done.stdout  # 3,840 of 6,000 tokens


NAMES = {  # whose names they are: files with tokens of validation, and of training
    "build-nanogpt": (["edufineweb_val_000000.npy"], ["edufineweb_train_000001.npy"]),
    "llm.c": (["tiny_shakespeare_val.bin"], ["tiny_shakespeare_train.bin"]),
    "modded-nanogpt": (["fineweb_val_000000.bin"], ["fineweb_train_000001.bin"]),
    "the last split in a name counts": (["my_train_set_val_0.npy"], ["my_val_set_train_0.npy"]),
    "numbers sort as numbers": ([], ["x_train_2.npy", "x_train_10.npy"]),
}


@pytest.mark.parametrize("whose", NAMES)
def test_names_of_shards(tmp_path, whose):
    for name, form in (file.split(".") for split in NAMES[whose] for file in split):
        numbered(tmp_path, 9, form=form, name=name)
    for other in (".x_train_3", "training_1", "made"):  # a hidden file, and two without a split
        numbered(tmp_path, 9, name=other)
    for split, expected in zip(("val", "train"), NAMES[whose]):
        assert [path.name for path in list_shards(tmp_path, split)] == expected


class Recorder:
    """A loader that records which steps are read, and in which thread. Reading a step waits until
    its number is in `allowed`."""

    def __init__(self):
        self.began = Queue()  # steps whose reading has begun
        self.allowed = {step: threading.Event() for step in range(20)}
        self.threads = set()

    def micro_batches(self, step):
        self.began.put(step)
        self.threads.add(threading.get_ident())
        assert self.allowed[step].wait(60)
        return [f"batch {step}"]


def test_the_next_step_is_read_while_a_step_trains():
    loader = Recorder()
    get_micro_batches = prefetch(loader)
    for step in (3, 9):
        loader.allowed[step].set()
    assert get_micro_batches(3) == ["batch 3"]
    assert [loader.began.get(timeout=60) for _ in range(2)] == [3, 4]  # 4 is asked for later
    loader.allowed[4].set()
    assert get_micro_batches(4) == ["batch 4"]
    assert loader.began.get(timeout=60) == 5  # so 4 was read once
    loader.allowed[5].set()
    assert get_micro_batches(9) == ["batch 9"]  # a step that was not expected
    assert [loader.began.get(timeout=60) for _ in range(2)] == [9, 10]
    loader.allowed[10].set()
    assert len(loader.threads) == 1 and threading.get_ident() not in loader.threads


def test_an_error_while_reading_reaches_the_training_loop():
    loader = Recorder()
    loader.micro_batches = lambda step: {}["missing"]
    with pytest.raises(KeyError, match="missing"):
        prefetch(loader)(0)
