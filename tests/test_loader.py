"""The loader: shards of every name and form, what it refuses. test_1 and test_4 have the rest."""

import time

import numpy as np
import pytest
import torch

import fineweb
from fineweb import UserError
from train_gpt2 import Config, DataLoaderLite, read_ahead


def numbered(folder, *lengths, form="npy", name="numbered_train_{:06d}"):
    """Train shards whose tokens count up across shards: a token is its address in the stream."""
    folder.mkdir()
    stream = np.arange(sum(lengths), dtype=np.uint16)
    for i, part in enumerate(np.split(stream, np.cumsum(lengths)[:-1])):
        path = folder / f"{name.format(i + 1)}.{form}"
        if form == "npy":
            np.save(path, part)
        else:
            header = np.zeros(256, dtype="<i4")
            header[:3] = 20240520, 1, len(part)
            path.write_bytes(header.tobytes() + part.astype("<u2").tobytes())
    return folder


def loader(folder, B, T, total, **flags):
    shape = dict(seq_len=T, total_batch_size=total)
    return DataLoaderLite(Config(data_dir=str(folder), **shape, **flags), "train", B)


@pytest.mark.parametrize("form", ["npy", "bin"])
def test_order_on_disk_across_shards(tmp_path, form):
    folder = numbered(tmp_path / "d", 37, 5, 70, 1, form=form)  # 14 windows of 8 + 1, and a token
    unshuffled = loader(folder, 2, 8, 32, shuffle=False)
    for step in range(9):
        batch = [t for x, y in read_ahead(unshuffled)(step) for t in torch.cat([x, y[:, -1:]], 1)]
        windows = [(step * 4 + i) % 14 for i in range(4)]  # a fifteenth would lack its last target
        assert [t.tolist() for t in batch] == [list(range(8 * w, 8 * w + 9)) for w in windows]


def test_targets_are_the_next_tokens(tmp_path):
    for x, y in read_ahead(loader(numbered(tmp_path / "d", 1000), 2, 8, 32))(0):
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (2, 8)
        assert torch.equal(y, x + 1)


def test_another_seed_is_another_order(tmp_path):
    folder = numbered(tmp_path / "d", 1001)
    one, two, again = (loader(folder, 4, 8, 32, seed=seed) for seed in (1, 2, 1))
    assert one.order(3) == again.order(3) != two.order(3)
    assert one.order(77) == again.order(77)  # no state: any step, in any order


def test_the_next_step_is_read_meanwhile(tmp_path, monkeypatch):
    read, done = DataLoaderLite.read_step, []

    def slow(self, step):
        time.sleep(0.2)
        done.append(step)
        return read(self, step)

    monkeypatch.setattr(DataLoaderLite, "read_step", slow)
    get_batches = read_ahead(loader(numbered(tmp_path / "d", 1000), 2, 8, 32))
    get_batches(3)
    time.sleep(0.5)
    assert done == [3, 4]
    began = time.perf_counter()
    get_batches(4)
    assert time.perf_counter() - began < 0.1 and done == [3, 4]


def test_broken_input_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no train shards; python fineweb.py --source FILES --out"):
        loader(tmp_path / "empty", 1, 8, 8)
    with pytest.raises(UserError, match="hold 5 tokens, too few for --seq_len 8"):
        loader(numbered(tmp_path / "d", 5), 1, 8, 8)
    flags = dict(seq_len=8, total_batch_size=8, shuffle=False)
    config = Config(data_dir=str(numbered(tmp_path / "e", 500)), **flags)
    with pytest.raises(UserError, match="knows 100 ids"):
        DataLoaderLite(config, "train", 1, n_ids=100).read_step(50)
    (tmp_path / "e/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="manifest.json is no manifest"):
        loader(tmp_path / "e", 1, 8, 8)


def shard_names(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        numbered(folder / "x", 9, form=name.split(".")[-1], name="made")
        (folder / "x" / f"made.{name.split('.')[-1]}").rename(folder / name)
        (folder / "x").rmdir()
    return [[p.name for p in fineweb.list_shards(folder, s)] for s in ("val", "train")]


def test_names_of_shards(tmp_path):
    ours = shard_names(tmp_path / "a", "edufineweb_val_000000.npy", "edufineweb_train_000001.npy")
    assert ours == [["edufineweb_val_000000.npy"], ["edufineweb_train_000001.npy"]]
    llmc = shard_names(tmp_path / "b", "tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin")
    assert llmc == [["tiny_shakespeare_val.bin"], ["tiny_shakespeare_train.bin"]]
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]  # modded-nanogpt's
    assert shard_names(tmp_path / "d", *names) == [names[:1], names[1:]]
    # the last split word counts; numbers sort as numbers; what begins with a dot is no shard
    names = ["my_train_set_val_0.npy", "x_train_10.npy", "x_train_2.npy", ".x_train_3.npy"]
    odd = shard_names(tmp_path / "c", *names, "training_1.npy")
    assert odd == [["my_train_set_val_0.npy"], ["x_train_2.npy", "x_train_10.npy"]]
    with pytest.raises(UserError, match="x_train_2.bin.* stands beside it"):
        shard_names(tmp_path / "c", "x_train_2.bin")
