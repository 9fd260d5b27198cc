"""Invariant 1: the data order is a pure function of (seed, step), whatever the number of processes and micro-batches."""

import numpy as np
import pytest
import torch
from conftest import run, write_shards

from fineweb import UserError
from train_gpt2 import DataLoaderLite, evaluate, permute


def numbered(folder, *lengths, form="npy"):
    """Train shards whose tokens count up across shards, so that a token is its own address in the stream."""
    folder.mkdir()
    stream = np.arange(sum(lengths), dtype=np.uint16)
    for i, part in enumerate(np.split(stream, np.cumsum(lengths)[:-1])):
        path = folder / f"numbered_train_{i + 1:06d}.{form}"
        if form == "npy":
            np.save(path, part)
        else:
            header = np.zeros(256, dtype="<i4")
            header[:3] = 20240520, 1, len(part)
            path.write_bytes(header.tobytes() + part.astype("<u2").tobytes())
    return folder


def global_batch(folder, step, B, T, total, world_size=1, **kw):
    """The windows of one global batch in the order of their positions, put together from all ranks."""
    parts = []
    for rank in range(world_size):
        loader = DataLoaderLite(folder, "train", B, T, total, rank, world_size, **kw)
        parts.append(torch.stack([torch.cat([x, y[:, -1:]], 1) for x, y in loader.batches(step, torch.device("cpu"))]))
    return torch.stack(parts, 1).reshape(-1, T + 1)


@pytest.mark.parametrize("form", ["npy", "bin"])
def test_order_on_disk_across_shards(tmp_path, form):
    folder = numbered(tmp_path / "d", 37, 5, 70, 1, form=form)  # 113 tokens: 14 windows of 8 + 1, and one token over
    for step in range(9):
        batch = global_batch(folder, step, 2, 8, 32)
        first = [(step * 4 + i) % 14 for i in range(4)]  # the fifteenth window would lack its last target
        assert batch.tolist() == [list(range(8 * w, 8 * w + 9)) for w in first]


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_and_micro_batches_share_the_same_global_batches(tmp_path, shuffle):
    folder = numbered(tmp_path / "d", 700, 301)
    kw = dict(shuffle=shuffle, seed=5)
    for step in (0, 1, 30):
        whole = global_batch(folder, step, 8, 8, 64, **kw)
        for B, world_size in ((1, 1), (2, 1), (4, 2), (1, 8), (2, 4)):
            assert torch.equal(whole, global_batch(folder, step, B, 8, 64, world_size, **kw))


def test_an_epoch_uses_every_window_once_and_the_next_one_has_another_order(tmp_path):
    folder = numbered(tmp_path / "d", 1001)  # 125 windows: epochs do not end where batches do
    loader = DataLoaderLite(folder, "train", 4, 8, 32, shuffle=True, seed=1)
    order = np.concatenate([loader.order(step) for step in range(125)])  # 500 positions: four epochs
    epochs = order.reshape(4, 125)
    assert all(sorted(epoch) == list(range(125)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = DataLoaderLite(folder, "train", 4, 8, 32, shuffle=True, seed=1)
    assert np.array_equal(again.order(77), loader.order(77))  # no state: any step, in any order
    assert not np.array_equal(DataLoaderLite(folder, "train", 4, 8, 32, shuffle=True, seed=2).order(0), loader.order(0))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(n):
    assert sorted(permute(np.arange(n), n, (3, 4)).tolist()) == list(range(n))


def test_permute_looks_random():
    n, seeds = 97, 2000
    where = np.stack([permute(np.arange(n), n, (seed, 0)) for seed in range(seeds)])
    # element 0 lands everywhere equally often (chi-square of 96 degrees of freedom: mean 96, standard deviation 14)
    for element in (0, 50, 96):
        counts = np.bincount(where[:, element], minlength=n)
        assert ((counts - seeds / n) ** 2 / (seeds / n)).sum() < 96 + 5 * 14
    # neighbours part: their distance is that of two independent draws, (n + 1) / 3
    assert abs(np.abs(np.diff(where, axis=1)).mean() - (n + 1) / 3) < 0.5
    assert permute(np.arange(0, 10**12, 10**11), 10**12, 0).max() < 10**12  # a table of this size would not fit


def test_the_next_step_is_read_ahead(tmp_path):
    loader = DataLoaderLite(numbered(tmp_path / "d", 1000), "train", 2, 8, 32)
    list(loader.batches(3, torch.device("cpu")))
    step, future = loader.ahead
    assert step == 4 and torch.equal(future.result(timeout=5), loader.read_step(4))


def test_broken_input_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="python fineweb.py"):
        DataLoaderLite(tmp_path, "train", 1, 8)
    folder = numbered(tmp_path / "d", 5)
    with pytest.raises(UserError, match="too few"):
        DataLoaderLite(folder, "train", 1, 8)
    loader = DataLoaderLite(numbered(tmp_path / "e", 500), "train", 1, 8, vocab_size=100)
    with pytest.raises(UserError, match="knows 100 ids"):
        list(loader.batches(50, torch.device("cpu")))


def test_validation_covers_the_same_tokens_for_every_split_of_the_work(tmp_path, tiny):
    """The mean over the first val_tokens, by one forward pass a window, against every micro-batch size and number of ranks."""
    folder = write_shards(tmp_path / "d", val=32 * 21 + 9)
    windows = np.load(folder / "made_val_000000.npy").astype(np.int64)
    windows = torch.from_numpy(np.stack([windows[i * 32 : i * 32 + 33] for i in range(13)]))
    with torch.no_grad():
        expected = torch.stack([tiny(w[None, :-1], w[None, 1:])[1] for w in windows]).mean().item()
    cpu = torch.device("cpu")
    for B in (1, 2, 5, 13, 16):
        loader = DataLoaderLite(folder, "val", B, 32)
        assert evaluate(tiny, loader, 13 * 32, cpu) == pytest.approx(expected, abs=1e-5)
    everything = evaluate(tiny, DataLoaderLite(folder, "val", 4, 32), 10**9, cpu)
    assert everything == pytest.approx(evaluate(tiny, DataLoaderLite(folder, "val", 7, 32), 21 * 32, cpu), abs=1e-5)
