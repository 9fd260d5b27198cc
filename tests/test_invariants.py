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
    train,
    wait_for,
    write_shards,
)
from test_network import as_openai, change_file, random_hugging_face
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
import train_gpt2
from fineweb import VOCAB_SIZE, gpt2_tokenizer, load_tokenizer
from train_gpt2 import GPT, Args, DataLoaderLite, GPTConfig, find_checkpoints, newest_checkpoint
from train_gpt2 import training_step, transpose_conv1d

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


def run_with(processes, *args):
    """A run, in this process if it needs no other."""
    run_here(*args) if processes == 1 else run("train_gpt2.py", *args, processes=processes)


# 1


def global_batch(args, step, B, world_size):
    """The sequences of a whole batch in their order, collected from all ranks: (n, T + 1)."""
    ranks = range(world_size)
    loaders = [DataLoaderLite(args, "train", B, rank, world_size) for rank in ranks]
    sequences = []
    for parts in zip(*(train_gpt2.prefetch(loader)(step) for loader in loaders)):
        for x, y in parts:
            assert x.shape == (B, args.seq_len) and torch.equal(x[:, 1:], y[:, :-1])
            sequences.append(torch.cat([x, y[:, -1:]], dim=1))
    return torch.cat(sequences)


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
    shape = dict(vocab_size=257, n_layer=2, n_head=2, n_embd=32)
    ours = GPT(GPTConfig(block_size=64, **shape))
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=64, **shape)).eval()
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


@pytest.mark.parametrize("how", ["micro-batches of 2", "one large batch", "two processes"])
def test_3_accumulation_and_processes_and_one_large_batch_agree(base, request, tmp_path, how):
    shards, base_out, _ = base
    if how == "two processes":
        out = request.getfixturevalue("base_of_two")
    else:
        out = tmp_path / "out"
        train(shards, out, batch=2 if how == "micro-batches of 2" else 8)
    ours, theirs = log_of(out), log_of(base_out)
    for stream in ("train", "norm", "val"):
        assert ours[stream] == pytest.approx(theirs[stream], abs=1e-4), stream


# 4


def test_4_evaluation_does_not_affect_training(base, tmp_path):
    """A run that validates, scores HellaSwag, samples and saves in each step has the losses of one
    that does not."""
    often = "--val_every 1 --hellaswag_every 1 --sample_every 1 --save_every 1".split()
    often += ["--hellaswag_data", base[0] / "examples.jsonl", "--sample_tokens", 3]
    done = train(base[0], tmp_path / "out", *often)
    ours = log_of(tmp_path / "out")
    for stream in ("train", "norm", "lr"):
        assert ours[stream] == log_of(base[1])[stream]
    assert len(ours["hella"]) == 9 and done.stdout.count("> Hello, I'm a") == 9 * 4


def test_4_two_processes_score_hellaswag_as_one_does(base, base_of_two):
    items = hellaswag.load_items(base[0] / "examples.jsonl", enc=load_tokenizer(base[0]))
    scores = log_of(base_of_two)["hella"]
    for step, path in find_checkpoints(base_of_two):
        alone = hellaswag.evaluate(GPT.from_pretrained(path), items, torch.device("cpu"))
        assert scores.pop(step) == pytest.approx(alone.acc_norm)
    assert list(scores) == [0]


def test_4_validation_covers_the_same_tokens_for_any_micro_batch(tmp_path, tiny):
    """The loss equals the mean over single sequences. Only complete micro-batches go to the model
    that may be compiled."""
    folder = write_shards(tmp_path / "d", val=32 * 21 + 9)
    rows = np.load(folder / "made_val_000000.npy").astype(np.int64)
    rows = torch.from_numpy(np.stack([rows[i * 32 : i * 32 + 33] for i in range(21)]))
    with torch.no_grad():
        losses = [F.cross_entropy(tiny(row[None, :-1])[0], row[1:]).item() for row in rows]
    args = Args(data_dir=str(folder), seq_len=32)
    for B in (1, 5, 13, 16):
        sizes = []

        def compiled(x, y):
            sizes.append(len(x))
            return tiny(x, y)

        loader = DataLoaderLite(args, "val", B)
        for val_tokens, n in ((13 * 32 + 5, 13), (10**9, 21)):
            sizes.clear()
            loss = train_gpt2.evaluate(compiled, tiny, loader, val_tokens, OFF)
            assert loss == pytest.approx(np.mean(losses[:n]), abs=1e-5)
            assert sizes == [B] * (n // B)


# 5


@pytest.mark.parametrize("processes", [1, 2])
def test_5_resuming_is_exact(base, request, tmp_path, processes):
    """The folder is as after kill -9 in step 6 of 8: the newest checkpoint is that of step 4, the
    log has records after it and half a line, and another checkpoint was being written."""
    whole = base[1] if processes == 1 else request.getfixturevalue("base_of_two")
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "step_00008")
    text = (whole / "log.txt").read_text()
    (out / "log.txt").write_text(text[: text.index("6 lr")] + "6 no")
    (out / "tmp_checkpoint").mkdir()
    (out / "tmp_checkpoint/half_of_a_file").write_text("")
    run_with(processes, "--resume", "--out_dir", out)
    assert records(out) == records(whole)
    files, expected = ({path.name for path in d.rglob("*")} for d in (out, whole))
    assert files == expected
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = f"step_00008/{name}"
        assert (out / path).read_bytes() == (whole / path).read_bytes()
    ours, theirs = newest_checkpoint(out), newest_checkpoint(whole)
    changed = {name for name, value in ours["args"].items() if value != theirs["args"][name]}
    assert changed == {"out_dir", "resume"} and ours["step"] == theirs["step"] == 8
    for name, tensor in ours["model"].items():
        assert torch.equal(tensor, theirs["model"][name]), name
    for i, means in ours["optimizer"]["state"].items():
        assert all(torch.equal(means[k], theirs["optimizer"]["state"][i][k]) for k in means), i


# 6


@pytest.mark.parametrize("form", ["transformers'", "OpenAI's"])
def test_6_loaded_weights_have_the_logits_loss_and_gradients_of_hugging_face(tmp_path, form):
    theirs = random_hugging_face(tmp_path)
    if form == "OpenAI's":
        change_file(tmp_path, as_openai)
    ours = GPT.from_pretrained(tmp_path)
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


def test_6_saved_weights_have_the_same_logits_and_gradients_in_hugging_face(tmp_path, tiny):
    """All of the directory's tensors are used, and it has no padding rows."""
    train_gpt2.save_hugging_face(tiny, gpt2_tokenizer(), tmp_path)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(VOCAB_SIZE, (3, 32), generator=torch.Generator().manual_seed(2))
    ours, expected = tiny(ids)[..., :VOCAB_SIZE], theirs(ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for logits in (ours, expected):
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    reference = {name: transpose_conv1d(name, p.grad) for name, p in theirs.named_parameters()}
    for name, p in tiny.named_parameters():
        grad = p.grad[:VOCAB_SIZE] if "wte" in name else p.grad
        torch.testing.assert_close(grad, reference[name], rtol=1e-4, atol=1e-6, msg=name)


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
@pytest.mark.parametrize(
    "n, temperature, top_k",
    [(10, 0.8, 50), (34, 1.5, 3), (34, 1.0, 50257)],  # 34: more than the context of 32 tokens
)
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


def test_8_two_graphs_are_made_in_the_first_step_and_none_later(shards, tmp_path, monkeypatch):
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
    torch.compiler.reset()
    often = "--val_every 1 --val_tokens 576 --hellaswag_every 1 --sample_every 1 --save_every 2"
    often = [*often.split(), "--hellaswag_data", shards / "examples.jsonl", "--sample_tokens", 4]
    train(shards, tmp_path / "out", *often, "--max_steps", 3, "--compile", "--dtype", "bfloat16")
    assert made == [2, 2, 2] and len(graphs) == 2
    assert list(log_of(tmp_path / "out")["hella"]) == [0, 1, 2, 3]


@FAULTS
def test_8_compiled_training_and_validation_agree_with_eager(shards, tmp_path):
    """With the compiler that users have. 15 validation sequences: the last micro-batch has three
    instead of four."""
    args = ["--n_layer", 1, "--sample_every", 4, "--sample_tokens", 8]
    train(shards, tmp_path / "eager", *args)
    env = {"TORCH_LOGS": "recompiles"}
    done = train(shards, tmp_path / "out", *args, "--compile", env=env)
    ours, theirs = log_of(tmp_path / "out"), log_of(tmp_path / "eager")
    for stream in ("train", "val"):
        assert ours[stream] == pytest.approx(theirs[stream], abs=1e-4)
    # One graph is for validation and one for training; samples are not compiled.
    assert done.stderr.count("Recompiling function forward") <= 1, done.stderr
    assert done.stdout.count("> Hello, I'm a language model,") == 3 * 4


# 9


def multiply_gradient(model, factor):
    """A hook that multiplies one number of a gradient. Remove it to stop that."""
    scale = torch.ones(model.config.n_embd)
    scale[3] = factor
    return model.transformer.ln_f.bias.register_hook(lambda grad: grad * scale)


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
            hook = multiply_gradient(model, bad)
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
    for a, b in zip(*weights):
        assert (a - b).abs().max() <= (1e-5 if dtype == "float16" else 0)


def test_9_skipped_steps_are_recorded_and_twenty_end_the_run(base, tmp_path, monkeypatch):
    """From step 5 on every gradient is NaN, except in step 7. Nothing is saved while steps are
    skipped."""
    original, bad_steps = train_gpt2.training_step, [False] * 5 + [True, True, False] + [True] * 32

    def poisoned(model, *args):
        hook = multiply_gradient(model, torch.nan if bad_steps.pop(0) else 1.0)
        try:
            return original(model, *args)
        finally:
            hook.remove()

    monkeypatch.setattr(train_gpt2, "training_step", poisoned)
    flags = ["--max_steps", 40, "--save_every", 1, "--keep_checkpoints", 0]
    done = train(base[0], tmp_path / "out", *flags, check=False)
    refused(done, "20 steps in a row were skipped, the last one in step 27; lower --max_lr")
    log = log_of(tmp_path / "out")
    assert log["skip"] == {5: 1, 6: 2} | {8 + i: i + 1 for i in range(20)}
    assert list(log["train"]) == list(range(28)) and done.stdout.count("step skipped") == 22
    found = find_checkpoints(tmp_path / "out")
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 8]
    for _, path in found:
        state = torch.load(path / "training_state.pt", weights_only=True)
        means = [m for s in state["optimizer"]["state"].values() for m in s.values()]
        assert all(t.isfinite().all() for t in (*state["model"].values(), *means))


# 10

CASES = [("SIGTERM", 1), pytest.param("SIGTERM", 2, marks=FAULTS)]
CASES += [pytest.param(name, 1, marks=FAULTS) for name in ("SIGINT", "SIGUSR1", "SIGHUP")]


@pytest.mark.parametrize("name, processes", CASES)
def test_10_a_signal_finishes_the_step_and_saves(base, tmp_path, name, processes):
    """The exit status is 128 + the signal; torchrun, which passes the signal on, has its own. Then
    --resume for two more steps ends with the log of an undisturbed run."""
    out, number = tmp_path / "out", getattr(signal, name)
    flags = [*TINY_RUN, "--data_dir", base[0], "--save_every", 0, "--min_lr", 1e-2, "--out_dir"]
    process = start(*flags, out, "--max_steps", 100000, processes=processes)
    wait_for(lambda: (out / "log.txt").exists() and "\n3 norm" in (out / "log.txt").read_text())
    process.send_signal(number)
    screen, _ = process.communicate(timeout=60)
    assert process.returncode == (128 + number if processes == 1 else 1), screen
    ((step, path),) = find_checkpoints(out)
    assert f"step {step}: saved {path}" in screen and "--resume" in screen
    more = ["--max_steps", step + 2]
    for arguments in (["--resume", "--out_dir", out], [*flags, tmp_path / "whole"]):
        run_with(processes, *arguments, *more)
    assert records(out) == records(tmp_path / "whole")


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
    shards, out = base[0], tmp_path / "out"
    first = start(*TINY_RUN, "--data_dir", shards, "--out_dir", out, "--max_steps", 100000)
    try:
        wait_for(lambda: (out / "log.txt").exists() and (out / "log.txt").stat().st_size)
        before = (out / "log.txt").read_bytes()
        refused(train(shards, out, check=False), "holds a run")
        refused(train(shards, out, "--resume", check=False), "another process is training there")
        assert (out / "log.txt").read_bytes().startswith(before) and first.poll() is None
    finally:
        first.kill()
        first.communicate()
    train(shards, out, "--resume", "--max_steps", 1)  # the lock is free again
