"""The invariants of a run. Each has a number, and the names of its tests begin with that number:
`pytest -k test_5` runs the tests of invariant 5.

1. The order of the data is a function of (seed, step) only: the batch of step s is sequences
   [first(s), first(s + 1)) of an endless sequence of epochs. Each epoch has every sequence once.
   It does not matter how many processes and micro-batches share a batch.
2. The printed loss is the mean over the whole batch.
3. Gradient accumulation, data parallelism and one large batch agree up to rounding.
4. Evaluation does not affect training, and covers the same tokens for any number of processes.
5. Resuming is exact: N steps, and n steps, a stop and N - n more steps give the same bits, with no
   flag but --resume and the folder.
6. The weights match the reference: logits and gradients equal those of Hugging Face's GPT-2, for
   weights that are loaded and for weights that are saved.
7. Sampling never gives an id of 50257 or more, and gives the same tokens with and without a cache.
8. Compilation is bounded: training and validation are compiled, two graphs in the first step and
   none after it; samples and HellaSwag use the model that is not compiled.
9. Nothing that is not finite is applied or saved: a step whose gradient has a NaN or an infinity is
   skipped, in every precision, and no checkpoint holds one.
10. A stop costs at most the current step: after a signal the step is finished, a checkpoint is
    saved, and the exit status is 128 + the signal. Only one process at a time writes to the folder
    of a run. (test_faults.py shows what happens after kill -9.)
"""

import copy
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    ENVIRONMENT,
    FAULTS,
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
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
import train_gpt2
from fineweb import VOCAB_SIZE
from train_gpt2 import (
    GPT,
    Args,
    DataLoaderLite,
    GPTConfig,
    evaluate,
    find_checkpoints,
    prefetch,
    save_hugging_face,
    training_step,
    transpose_conv1d,
)

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


EXAMPLES = [
    hellaswag.Item(i, 0, [5] * (3 + i), [[7] * n for n in (1, 4, 2, 9)], [1] * 4) for i in range(9)
]


# 1


def global_batch(args, step, B, world_size=1):
    """The sequences of a whole batch in their order, collected from all ranks: (n, T + 1)."""
    ranks = range(world_size)
    loaders = [DataLoaderLite(args, "train", B, rank, world_size) for rank in ranks]
    micro_steps = zip(*(prefetch(loader)(step) for loader in loaders))
    parts = [torch.cat([x, y[:, -1:]], 1) for parts in micro_steps for x, y in parts]
    return torch.cat(parts)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("ramp", [0, 6])
def test_1_data_order_is_a_function_of_seed_and_step(tmp_path, shuffle, ramp):
    """The batches equal a plain list of all positions: the permutations of all epochs one after
    another, cut according to the batch sizes. So they do for every way to share a batch, and with
    new loaders in every step, as after a restart."""
    tokens = np.arange(1001, dtype=np.uint16)  # each token is its position; 125 sequences of 8 + 1
    for i, part in enumerate(np.split(tokens, [3, 700])):  # some sequences are in two shards
        np.save(tmp_path / f"made_train_{i}.npy", part)
    flags = dict(shuffle=shuffle, batch_ramp_steps=ramp, seed=5)
    args = Args(data_dir=str(tmp_path), seq_len=8, total_batch_size=512, **flags)
    epochs = [np.random.RandomState([5, epoch]).permutation(125) for epoch in range(4)]
    positions = np.concatenate(epochs if shuffle else [np.arange(125)] * 4)
    sizes = [8, 8, 16, 16, 32, 32, 64, 64] if ramp else [64] * 7
    for step, indices in enumerate(np.split(positions, np.cumsum(sizes))[: len(sizes)]):
        expected = [list(range(8 * i, 8 * i + 9)) for i in indices]
        for B, world_size in ((8, 1), (1, 1), (2, 1), (4, 2), (1, 8), (2, 4)):
            assert global_batch(args, step, B, world_size).tolist() == expected, (step, B)
    if not ramp and shuffle:  # every sequence once per epoch
        assert sorted(positions[:125]) == list(range(125)) != positions[:125].tolist()


# 2


def test_2_the_printed_loss_is_the_mean_over_the_global_batch(base, base_of_two):
    """In step 0 it equals the mean of the losses of single sequences, computed by transformers'
    GPT-2 with the weights that the seed gives."""
    shards, out, _ = base
    torch.manual_seed(1337)
    ours = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    shape = dict(n_positions=64, vocab_size=50304, n_layer=2, n_head=2, n_embd=32)
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    state = {name: transpose_conv1d(name, t) for name, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    tokens = np.concatenate([np.load(path) for path in sorted(shards.glob("*train*"))])
    order = np.random.RandomState([1337, 0]).permutation((len(tokens) - 1) // 32)
    losses = []
    for i in order[:8]:  # 256 tokens
        ids = torch.from_numpy(tokens[32 * i : 32 * i + 33].astype(np.int64))
        with torch.no_grad():
            losses.append(F.cross_entropy(theirs(ids[None, :-1]).logits[0], ids[1:]).item())
    assert max(losses) - min(losses) > 0.01  # otherwise the mean of a part would do
    for folder in (out, base_of_two):
        assert log_of(folder)["train"][0] == pytest.approx(np.mean(losses), abs=1e-5)


# 3


@pytest.mark.parametrize("batch, processes", [(2, 1), (8, 1), (2, 2), (4, 2)])
def test_3_accumulation_and_processes_and_one_big_batch_agree(
    base, request, tmp_path, batch, processes
):
    shards, base_out, _ = base
    if (batch, processes) == (4, 2):
        out = request.getfixturevalue("base_of_two")
    else:
        out = tmp_path / "out"
        train(shards, out, batch=batch, processes=processes)
    ours, theirs = log_of(out), log_of(base_out)
    for stream in ("train", "norm", "val"):
        assert ours[stream] == pytest.approx(theirs[stream], abs=1e-4), stream


# 4


def test_4_evaluation_does_not_affect_training(base, tmp_path):
    """A run that validates, samples and saves in every step has the losses of one that does not."""
    shards, out, _ = base
    often = "--val_every 1 --sample_every 1 --sample_tokens 3 --save_every 1 --prompt".split()
    train(shards, tmp_path / "out", *often, "")
    for stream in ("train", "norm", "lr"):
        assert log_of(tmp_path / "out")[stream] == log_of(out)[stream]


def test_4_validation_covers_the_same_tokens_for_any_micro_batch(tmp_path, tiny):
    """The loss equals the mean over single sequences. Only complete micro-batches go to the model
    that may be compiled."""
    folder = write_shards(tmp_path / "d", val=32 * 21 + 9)
    rows = np.load(folder / "made_val_000000.npy").astype(np.int64)
    rows = torch.from_numpy(np.stack([rows[i * 32 : i * 32 + 33] for i in range(21)]))
    with torch.no_grad():
        losses = [F.cross_entropy(tiny(row[None, :-1])[0], row[1:]).item() for row in rows]
    args = Args(data_dir=str(folder), seq_len=32)
    for B in (1, 2, 5, 13, 16):
        sizes = []

        def compiled(x, y):
            sizes.append(len(x))
            return tiny(x, y)

        loader = DataLoaderLite(args, "val", B)
        for val_tokens, n in ((13 * 32 + 5, 13), (10**9, 21)):
            sizes.clear()
            loss = evaluate(compiled, tiny, loader, val_tokens, OFF)
            assert loss == pytest.approx(np.mean(losses[:n]), abs=1e-5)
            assert sizes == [B] * (n // B)


def test_4_evaluations_use_the_precision_of_training_and_record_no_graph(
    shards, tmp_path, monkeypatch
):
    """Everything runs under autocast: validation, HellaSwag, samples and the check of the weights
    before they are saved. Only training needs gradients."""
    modes, found = ["nothing"], {}

    def named(mode, function):
        def call(*args, **flags):
            modes.append(mode)
            try:
                return function(*args, **flags)
            finally:
                modes.pop()

        return call

    def forward(mlp, x):
        dtype = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        found.setdefault(modes[-1], set()).add((dtype, torch.is_grad_enabled()))
        return real_forward(mlp, x)

    real_forward = train_gpt2.MLP.forward
    monkeypatch.setattr(train_gpt2.MLP, "forward", forward)
    for owner, name in (
        (train_gpt2, "training_step"),
        (train_gpt2, "evaluate"),
        (train_gpt2, "print_samples"),
        (hellaswag, "evaluate"),
        (train_gpt2.Run, "check_weights"),
    ):
        mode = f"{owner.__name__}.{name}"
        monkeypatch.setattr(owner, name, named(mode, getattr(owner, name)))
    monkeypatch.setattr(train_gpt2, "load_hellaswag", lambda *args: EXAMPLES)
    flags = ["--hellaswag_every", 1, "--sample_every", 1, "--sample_tokens", 2, "--max_steps", 1]
    train(shards, tmp_path / "out", *flags, "--dtype", "bfloat16")
    names = "train_gpt2.evaluate hellaswag.evaluate train_gpt2.print_samples Run.check_weights"
    expected = {name: {(torch.bfloat16, False)} for name in names.split()}
    assert found == expected | {"train_gpt2.training_step": {(torch.bfloat16, True)}}


# 5


@pytest.mark.parametrize("processes", [1, 2])
def test_5_resuming_is_exact(base, request, tmp_path, processes):
    """The folder is as after kill -9 in step 6 of 8: the newest checkpoint is that of step 4, the
    log has records after it and half a line, and another checkpoint was being written."""
    _, whole, _ = base
    if processes == 2:
        whole = request.getfixturevalue("base_of_two")
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "step_00008")
    lines = (whole / "log.txt").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if line.startswith("6 lr"))
    (out / "log.txt").write_text("".join(lines[:cut]) + "6 no")
    (out / "tmp_step_00008").mkdir()
    (out / "tmp_step_00008/half_of_a_file").write_text("")
    if processes == 1:
        run_here("--resume", "--out_dir", out)
    else:
        run("train_gpt2.py", "--resume", "--out_dir", out, processes=2)
    assert records(out) == records(whole)
    files, expected = ({p.name for p in (d / "step_00008").iterdir()} for d in (out, whole))
    assert files == expected
    for name in ("model.safetensors", "config.json"):
        assert (out / "step_00008" / name).read_bytes() == (
            whole / "step_00008" / name
        ).read_bytes()
    a, b = (torch.load(d / "step_00008/training_state.pt", weights_only=True) for d in (out, whole))
    assert a["args"] | dict(out_dir="", resume=False) == b["args"] | dict(out_dir="")
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], b["optimizer"]["state"][i][k]) for k in moments), i


# 6


def random_hugging_face(directory, **changes):
    """Save and return a random GPT-2 of Hugging Face's, with no tensor at its initial value."""
    torch.manual_seed(1)
    shape = dict(n_layer=3, n_head=4, n_embd=64, n_positions=48, vocab_size=50257)
    dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = GPT2LMHeadModel(GPT2Config(**shape | dropout | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(directory)
    return model.train()


def test_6_weights_match_hugging_face(tmp_path, tiny):
    theirs = random_hugging_face(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    shape = dict(block_size=48, vocab_size=50257, n_layer=3, n_head=4, n_embd=64)
    assert ours.config == GPTConfig(**shape)  # the sizes that they were saved with
    ids = torch.randint(VOCAB_SIZE, (3, 41), generator=torch.Generator().manual_seed(2))
    out, loss = theirs(ids, labels=ids), ours(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(ours(ids), out.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, out.loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    out.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    reference = {name: transpose_conv1d(name, p.grad) for name, p in theirs.named_parameters()}
    assert grads.keys() == reference.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], reference[name], rtol=1e-4, atol=1e-6, msg=name)
    # what is saved has no padding rows
    save_hugging_face(tiny, tmp_path / "ours")
    back, info = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = back(ids[:, :32]).logits
        torch.testing.assert_close(
            tiny(ids[:, :32])[..., :VOCAB_SIZE], logits, rtol=1e-5, atol=1e-5
        )


# 7


def plain_sampling(model, prompt, n, temperature, top_k, seed):
    """Sampling as in the lecture: no cache, softmax over all tokens, then top-k."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(prompt)
    for _ in range(n):
        logits = model(ids[:, -model.config.block_size :])[:, -1, :VOCAB_SIZE]
        probs, top = F.softmax(logits / temperature, -1).topk(top_k)
        drawn = torch.multinomial(probs, 1, generator=generator)
        ids = torch.cat([ids, top.gather(1, drawn)], dim=1)
    return ids


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("n", [10, 40])  # within the context of 32 tokens, and beyond it
@pytest.mark.parametrize("temperature, top_k", [(0.8, 50), (1.5, 3), (1.0, 50257)])
def test_7_sampling_equals_the_plain_loop_and_draws_no_padding(
    tiny, use_cache, n, temperature, top_k
):
    with torch.no_grad():
        tiny.transformer.wte.weight[:VOCAB_SIZE] *= 20  # no two logits are nearly equal
        tiny.lm_head.weight[VOCAB_SIZE:] = 1000 * tiny.lm_head.weight[:47]  # would always be drawn
        prompt = [[5, 50256, 77, 1000], [1, 2, 3, 4]]
        expected = plain_sampling(tiny, prompt, n, temperature, top_k, seed=7)
    idx = torch.tensor(prompt)
    found = tiny.generate(idx, n, temperature, top_k % 50257, seed=7, use_cache=use_cache)
    assert torch.equal(found, expected) and found.max() < VOCAB_SIZE
    greedy = tiny.generate(idx, n, temperature=0, use_cache=use_cache)
    with torch.no_grad():
        assert torch.equal(greedy, plain_sampling(tiny, prompt, n, 1.0, 1, seed=0))


# 8


def test_8_two_graphs_are_made_in_the_first_step_and_none_later(tmp_path, monkeypatch):
    """torch.compile's backend only counts here. The run evaluates four times, saves twice, and has
    two micro-steps per step; the last micro-batch of validation has fewer sequences."""
    graphs, made = [], []
    real_compile, real_step = torch.compile, train_gpt2.training_step

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(*args):
        result = real_step(*args)
        made.append(len(graphs))
        return result

    def compile(module, **flags):
        return real_compile(module, backend=backend, fullgraph=True, **flags)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(train_gpt2, "training_step", step)
    monkeypatch.setattr(train_gpt2, "catch_stop_signals", lambda: None)
    monkeypatch.setattr(train_gpt2, "load_hellaswag", lambda *args: EXAMPLES)
    torch.compiler.reset()
    shape = dict(n_layer=2, n_head=2, n_embd=32, seq_len=32, block_size=64)
    often = dict(val_every=1, val_tokens=18 * 32, hellaswag_every=1, sample_every=1, save_every=2)
    rest = dict(total_batch_size=256, micro_batch_size=4, max_steps=3, warmup_steps=1)
    folders = dict(data_dir=str(write_shards(tmp_path / "shards")), out_dir=str(tmp_path / "out"))
    machine = dict(device="cpu", dtype="bfloat16", compile=True, sample_tokens=4)
    train_gpt2.train(Args(**shape, **often, **rest, **folders, **machine))
    assert made == [2, 2, 2] and len(graphs) == 2
    assert set(log_of(tmp_path / "out")["hella"]) == {0, 1, 2, 3}


# 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_9_a_step_with_a_bad_gradient_is_skipped(tiny, dtype, bad):
    """The weights, AdamW's running means and its count of steps stay as they are, and the next step
    is as if the bad ones had never been. In float16 each bad step halves the scale of the loss."""
    t = torch.randint(50257, (2, 17), generator=torch.Generator().manual_seed(0))
    batches = [(t[:, :-1], t[:, 1:])]
    autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")
    weights = []
    for disturbed in (False, True):
        model = copy.deepcopy(tiny)
        optimizer = model.configure_optimizers(0.1, 1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled=dtype == "float16")
        scale = scaler.get_scale()
        training_step(model, batches, optimizer, scaler, autocast, 1.0)
        if disturbed:
            state = copy.deepcopy(optimizer.state_dict()["state"])
            before = [p.detach().clone() for p in model.parameters()]
            ln_f = model.transformer.ln_f.bias
            hook = ln_f.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), bad))
            for clip in (1.0, 0):
                loss, norm = training_step(model, batches, optimizer, scaler, autocast, clip)
                assert loss.isfinite() and not norm.isfinite()
            hook.remove()
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
            for i, means in optimizer.state_dict()["state"].items():
                assert all(torch.equal(means[k], state[i][k]) for k in means)
        assert scaler.get_scale() == (scale / 4 if disturbed and dtype == "float16" else scale)
        training_step(model, batches, optimizer, scaler, autocast, 1.0)
        weights.append([p.detach() for p in model.parameters()])
    assert not torch.equal(weights[0][0], next(tiny.parameters()))
    # Another scale rounds other bits of float16. The learning rate, 1e-3, limits a step's size.
    tolerance = 1e-5 if dtype == "float16" else 0
    assert all((a - b).abs().max() <= tolerance for a, b in zip(*weights))


def test_9_skipped_steps_are_recorded_and_twenty_end_the_run(base, tmp_path, monkeypatch):
    """From step 5 on every gradient is NaN, except in step 7. Nothing is saved while steps are
    skipped."""
    shards, _, _ = base
    plain, step = train_gpt2.training_step, iter(range(1000))

    def poisoned(model, batches, optimizer, *args):
        now = next(step)
        ln_f = model.transformer.ln_f.bias
        bad = now >= 5 and now != 7
        hook = ln_f.register_hook(lambda grad: grad * float("nan") if bad else grad)
        try:
            return plain(model, batches, optimizer, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(train_gpt2, "training_step", poisoned)
    flags = ["--max_steps", 40, "--save_every", 1, "--keep_checkpoints", 0]
    done = train(shards, tmp_path / "out", *flags, check=False)
    saved = [step for step, _ in find_checkpoints(tmp_path / "out")]
    assert saved == [1, 2, 3, 4, 5, 8]
    refused(done, "20 steps in a row were skipped, the last one in step 27")
    assert f"--resume continues from {tmp_path}/out/step_00008" in done.stderr
    log = log_of(tmp_path / "out")
    assert log["skip"] == {5: 1, 6: 2} | {8 + i: i + 1 for i in range(20)}
    assert list(log["train"]) == list(range(28))
    assert done.stdout.count("step skipped") == 22
    for _, path in find_checkpoints(tmp_path / "out"):
        state = torch.load(path / "training_state.pt", weights_only=True)
        moments = [m for s in state["optimizer"]["state"].values() for m in s.values()]
        assert all(t.isfinite().all() for t in (*state["model"].values(), *moments))


# 10


SIGNALS = [("SIGTERM", 1), pytest.param("SIGTERM", 2, marks=FAULTS)]
SIGNALS += [pytest.param(name, 1, marks=FAULTS) for name in ("SIGINT", "SIGUSR1", "SIGHUP")]


@pytest.mark.parametrize("name, processes", SIGNALS)
def test_10_a_signal_finishes_the_step_and_saves(base, tmp_path, name, processes):
    """The exit status is 128 + the signal; torchrun, which passes the signal on, has its own. Then
    --resume ends with the log of the undisturbed run."""
    shards, _, _ = base
    out, whole, number = tmp_path / "out", tmp_path / "whole", getattr(signal, name)
    flags = [*TINY_RUN, "--data_dir", shards, "--save_every", 0, "--max_steps", 30]
    flags += ["--val_every", 3, "--out_dir"]
    process = start(*flags, out, processes=processes)
    wait_for(lambda: (out / "log.txt").exists() and len((out / "log.txt").read_text()) > 400)
    process.send_signal(number)
    screen, _ = process.communicate(timeout=60)
    assert process.returncode == (128 + number if processes == 1 else 1), screen
    ((step, path),) = find_checkpoints(out)
    assert 0 < step < 30 and f"step {step}: saved {path}" in screen and "--resume" in screen
    again = ["--resume", "--out_dir", out]
    if processes == 1:
        run_here(*again)
        run_here(*flags, whole)
    else:
        run("train_gpt2.py", *again, processes=2)
        run("train_gpt2.py", *flags, whole, processes=2)
    assert records(out) == records(whole)
    survived(f"{name}, processes: {processes}", 1, "nothing")


@FAULTS
@pytest.mark.parametrize("rank", [0, 1])
def test_10_a_signal_to_one_process_stops_all(base, tmp_path, rank):
    """Only one of two processes receives SIGUSR1, and exits with 128 + its number. The other one
    stops in the same step, as if by SIGTERM."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = tmp_path / "out"
    flags = [*TINY_RUN, "--data_dir", base[0], "--max_steps", 100000, "--out_dir", out]
    processes = []
    for n in (0, 1):
        env = os.environ | ENVIRONMENT | dict(RANK=str(n), LOCAL_RANK=str(n), WORLD_SIZE="2")
        env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        # The processes connect to the store above, so its port cannot be taken by others.
        env |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        processes.append(subprocess.Popen(command("train_gpt2.py", *flags), text=True, env=env))
    wait_for(lambda: (out / "log.txt").exists() and "3 norm" in (out / "log.txt").read_text())
    processes[rank].send_signal(signal.SIGUSR1)
    expected = [128 + signal.SIGTERM] * 2
    expected[rank] = 128 + signal.SIGUSR1
    assert [process.wait(60) for process in processes] == expected
    ((step, _),) = find_checkpoints(out)
    assert list(log_of(out)["train"]) == list(range(step))


def test_10_a_second_trainer_in_the_folder_is_refused(base, tmp_path):
    shards, _, _ = base
    out = tmp_path / "out"
    flags = [*TINY_RUN, "--data_dir", shards, "--out_dir", out, "--max_steps", 100000]
    first = start(*flags)
    try:
        wait_for(lambda: (out / "log.txt").exists() and (out / "log.txt").stat().st_size)
        before = (out / "log.txt").read_bytes()
        for more in ([], ["--resume"]):
            done = train(shards, out, "--seed", 7, *more, check=False)
            refused(done, "another process is training there" if more else "holds a run")
        assert (out / "log.txt").read_bytes().startswith(before) and first.poll() is None
    finally:
        first.kill()
        first.communicate()
    train(shards, out, "--resume", "--max_steps", 1, "--seed", 7)  # the lock is free again
