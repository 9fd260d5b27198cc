"""The loader: shards of every name and format, and what it refuses. (test_1 and test_4 have the
rest.)"""

import threading
from contextlib import nullcontext
from queue import Queue

import numpy as np
import pytest
import torch

import fineweb
from fineweb import UserError
from train_gpt2 import Args, DataLoaderLite, check_folders, prefetch

CPU = torch.device("cpu")


def numbered(folder, *lengths, form="npy", name="numbered_train_{:06d}"):
    """Train shards whose tokens count up across shards: a token is its index in all of them."""
    folder.mkdir()
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


def loader(folder, B, T, total, **settings):
    args = Args(data_dir=str(folder), seq_len=T, total_batch_size=total, **settings)
    return DataLoaderLite(args, "train", B, device=CPU)


def sequences(loader, step):
    """The indices of the sequences in a step's batch, which start at multiples of T."""
    return [int(i) // loader.T for x, _ in loader.micro_batches(step) for i in x[:, 0]]


@pytest.mark.parametrize("form", ["npy", "bin"])
def test_the_order_on_disk_runs_across_shards(tmp_path, form):
    # 14 sequences of 8 + 1 tokens; a fifteenth would lack its last target
    folder = numbered(tmp_path / "d", 37, 5, 70, 1, form=form)
    unshuffled = loader(folder, 2, 8, 32, shuffle=False)
    assert unshuffled.n_sequences == 14
    for step in range(9):
        batch = unshuffled.micro_batches(step)
        rows = [row for x, y in batch for row in torch.cat([x, y[:, -1:]], 1).tolist()]
        indices = [(step * 4 + i) % 14 for i in range(4)]
        assert rows == [list(range(8 * i, 8 * i + 9)) for i in indices]
        for ours, expected in zip(prefetch(unshuffled)(step), batch, strict=True):
            assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_targets_are_the_next_tokens(tmp_path):
    micro_batches = prefetch(loader(numbered(tmp_path / "d", 1000), 2, 8, 32))(0)
    assert len(micro_batches) == 2
    for x, y in micro_batches:
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (2, 8)
        assert torch.equal(y, x + 1)


def test_another_seed_is_another_order(tmp_path):
    folder = numbered(tmp_path / "d", 1001)
    one, two, again = (loader(folder, 4, 8, 32, seed=seed) for seed in (1, 2, 1))
    assert sequences(one, 3) == sequences(again, 3) != sequences(two, 3)
    assert sequences(one, 77) == sequences(again, 77)  # no state: any step, in any order
    assert sequences(one, 3) == sequences(again, 3)


class Recorder:
    """A loader that notes which steps are read, and in which thread. Reading a step waits until its
    number is in `allowed`."""

    def __init__(self, overfit_one_batch=False):
        self.args = Args(overfit_one_batch=overfit_one_batch)
        self.device = CPU
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


def test_one_batch_is_read_once():
    loader = Recorder(overfit_one_batch=True)
    loader.allowed[0].set()
    get_micro_batches = prefetch(loader)
    first = get_micro_batches(0)
    assert get_micro_batches(0) is first and get_micro_batches(0) is first
    assert loader.began.qsize() == 1


def test_an_error_while_reading_reaches_the_training_loop():
    loader = Recorder()
    loader.micro_batches = lambda step: {}["missing"]
    with pytest.raises(KeyError, match="missing"):
        prefetch(loader)(0)


def test_unusable_shards_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    empty = Args(data_dir=str(tmp_path / "empty"), out_dir=str(tmp_path / "out"))
    with pytest.raises(
        UserError, match="no train shards; give another --data_dir, or python fineweb.py --source"
    ):
        check_folders(empty)
    without_val = Args(data_dir=str(numbered(tmp_path / "t", 2000)), out_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="no val shards; give another --data_dir"):
        check_folders(without_val)
    for n, sentence in ((8, "train shards hold 8 tokens, too few for --seq_len 8"), (9, None)):
        folders = dict(data_dir=str(numbered(tmp_path / str(n), n)), out_dir=str(tmp_path / "out"))
        args = Args(**folders, seq_len=8, val_every=0)
        with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
            check_folders(args)
    unshuffled = loader(numbered(tmp_path / "e", 500), 1, 8, 8, shuffle=False)
    unshuffled.micro_batches(50)
    unshuffled.tokens.vocab_size = 100
    unshuffled.micro_batches(11)  # ids 88 to 96
    with pytest.raises(UserError, match="id 104, but the model has only 100 tokens"):
        unshuffled.micro_batches(12)
    for vocab_size, sentence in ((104, "id 104, but the model has only 104 tokens"), (105, None)):
        unshuffled.tokens.vocab_size = vocab_size
        with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
            unshuffled.micro_batches(12)
    (tmp_path / "e/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="manifest.json is no manifest"):
        loader(tmp_path / "e", 1, 8, 8)


def list_names(folder, *names):
    """Make shards with these names, and list those of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        form = name.split(".")[-1]
        numbered(folder / "x", 9, form=form, name="made")
        (folder / "x" / f"made.{form}").rename(folder / name)
        (folder / "x").rmdir()
    return [[p.name for p in fineweb.list_shards(folder, s)] for s in ("val", "train")]


def test_names_of_shards(tmp_path):
    names = ["edufineweb_val_000000.npy", "edufineweb_train_000001.npy"]  # build-nanogpt's
    assert list_names(tmp_path / "a", *names) == [names[:1], names[1:]]
    names = ["tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin"]  # llm.c's
    assert list_names(tmp_path / "b", *names) == [names[:1], names[1:]]
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]  # modded-nanogpt's
    assert list_names(tmp_path / "d", *names) == [names[:1], names[1:]]
    # The last split in a name counts; numbers sort as numbers; a hidden file is no shard.
    names = ["my_train_set_val_0.npy", "x_train_10.npy", "x_train_2.npy", ".x_train_3.npy"]
    found = list_names(tmp_path / "c", *names, "training_1.npy")
    assert found == [["my_train_set_val_0.npy"], ["x_train_2.npy", "x_train_10.npy"]]
    with pytest.raises(UserError, match="x_train_2.bin.*remove one of the two"):
        list_names(tmp_path / "c", "x_train_2.bin")
