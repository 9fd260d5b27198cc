"""hellaswag.py: losses compared with values worked out by hand and with a float64 reference,
batches of all shapes, bad input, the download, and the command line."""

import hashlib
import http.server
import json
import math
import os
import re
import subprocess
import threading
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from bench_hellaswag import plain_loop
from conftest import ENVIRONMENT, ROOT, SHARED, command, run
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from fineweb import UserError, tokenizer
from hellaswag import Item, batches, check_memory, evaluate, load_items, pack, picks, score
from train_gpt2 import GPT, GPTConfig

REAL = SHARED / "hellaswag/hellaswag_val.jsonl"
N = 201  # items; two processes cannot share them evenly
V = 5003  # where the tokenizer is not tested, ids are taken modulo V, which is faster


def made_records(n, seed=0):
    """Records like HellaSwag's, with random words and very different lengths."""
    rng = np.random.default_rng(seed)
    words = "a cat the dog under runs then quickly Paris jumps, and over 7 boxes of café noodles it"
    words = [*words.split(), "is"]

    def text(longest):
        return " ".join(rng.choice(words, rng.integers(1, longest)))

    def record(i):
        endings, label = [text(30) + "." for _ in range(4)], int(rng.integers(4))
        return dict(ind=3 * i, activity_label=text(4), ctx=text(60), endings=endings, label=label)

    return [record(i) for i in range(n)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sharp(block_size=1024, vocab_size=V, n_layer=2):
    """A random model whose losses depend strongly on every token seen and on its position: a wrong
    mask cannot hide."""
    torch.manual_seed(0)
    shape = dict(n_layer=n_layer, n_head=2, n_embd=32)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


@torch.no_grad()
def reference(model, items, context=10**9):
    """The definition, in float64: each ending alone, after the last `context` tokens of context."""
    model, table = model.double(), []
    for item in items:
        for ending in item.endings:
            ids = item.context[-context:] + ending
            logits = model(torch.tensor([ids[:-1]]))[0, -len(ending) :]
            logp = F.log_softmax(logits, dim=-1)
            table.append(-sum(logp[i, token] for i, token in enumerate(ending)))
    model.float()
    return torch.stack(table).view(-1, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of N items, real ones if they are on this machine."""
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    if not REAL.exists():
        return write(path, made_records(N))
    lines = REAL.read_text().splitlines()
    return write(path, [json.loads(lines[i * len(lines) // N]) for i in range(N)])


@pytest.fixture(scope="module")
def items(data):
    def fold(ids):
        return [token % V for token in ids]

    def folded(item):
        return replace(item, context=fold(item.context), endings=[*map(fold, item.endings)])

    return [folded(item) for item in load_items(data)]


@pytest.fixture(scope="module")
def model():
    return sharp()


@pytest.fixture(scope="module")
def expected(model, items):
    return reference(model, items)


def agree(items, losses, expected):
    assert (losses - expected).abs().max() < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(picks(items, losses), picks(items, expected)))


# -- scores


class Bigram:
    """A model whose losses can be worked out by hand: the next token depends on the last one only.
    probs: (V, V), one row per token."""

    def __init__(self, probs):
        self.transformer = SimpleNamespace(wpe=SimpleNamespace(num_embeddings=16))
        self.training = True
        self.lm_head = SimpleNamespace(weight=torch.tensor(probs).log().t())

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode


def test_losses_and_answers_worked_out_by_hand(monkeypatch):
    one_hot = lambda model, idx, *_: F.one_hot(idx, 3).float()  # noqa: E731
    monkeypatch.setattr(hellaswag, "hidden_states", one_hot)
    model = Bigram([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 4, 1 / 4, 1 / 2]])
    items = [
        Item(0, 3, [2, 0], [[0], [1, 1], [2, 2, 2], [1, 1, 1, 1]], [1, 2, 3, 4]),
        Item(1, 1, [0, 2, 1], [[2, 0], [0, 0], [2, 2], [0, 1]], [2, 2, 2, 2]),
    ]
    by_hand = [
        # After 0. Ending 0 is the most likely, but its token has a loss of ln 2 = 0.69, and those
        # of ending 3 have a mean of ln(256/27) / 4 = 0.56.
        [1 / 2, 1 / 4 * 3 / 4, 1 / 4 * 1 / 2 * 1 / 2, 1 / 4 * 3 / 4 * 3 / 4 * 3 / 4],
        # After 1. Endings 1 and 2 are equally likely, so the first of them is picked.
        [1 / 8 * 1 / 4, 1 / 8 * 1 / 2, 1 / 8 * 1 / 2, 1 / 8 * 1 / 4],
    ]
    result = evaluate(model, items, "cpu")
    expected = -torch.tensor(by_hand, dtype=torch.float64).log()
    torch.testing.assert_close(result.losses, expected, rtol=1e-6, atol=0)
    assert [p.tolist() for p in picks(items, result.losses)] == [[0, 1], [3, 1]]
    assert (result.acc, result.acc_norm, result.n, result.truncated) == (0.5, 1.0, 2, 0)
    assert str(result) == "2 acc: 0.5000 acc_norm: 1.0000 ± 0.0000" and model.training


def test_standard_error_and_last_line():
    result = hellaswag.Result(0.2859, 0.2955, 10042, 0, torch.zeros(0, 4))
    assert str(result) == "10042 acc: 0.2859 acc_norm: 0.2955 ± 0.0046"


def test_reference_depends_on_context_and_order(model, items, expected):
    """Otherwise the tests below would prove nothing. If a token is dropped or the order changes,
    losses change by far more than 1e-3."""
    for change in (lambda ids: ids[1:] or [0], lambda ids: ids[::-1]):
        changed = [replace(item, context=change(item.context)) for item in items[:5]]
        assert (reference(model, changed) - expected[:5]).abs().max() > 0.5


@pytest.mark.parametrize("token_budget", [1, 500, 4096, 10**6])
def test_equals_float64_reference_at_any_budget(model, items, expected, token_budget):
    agree(items, score(model, items, "cpu", token_budget=token_budget), expected)


def test_equals_plain_loop(model, items):
    agree(items[:40], score(model, items[:40], "cpu"), plain_loop(model, items[:40]).double())


def test_batches_hold_every_row_once():
    rng = np.random.default_rng(0)

    def ids(token, most):
        return [token] * rng.integers(1, most)

    for n in (1, 7, 8, 9, 1000):
        items = [Item(i, 0, ids(1, 99), [ids(2, 60) for _ in range(4)], [1] * 4) for i in range(n)]
        for budget in (1, 2048, 32768):
            plan = list(batches(items, budget))
            assert sorted(i for numbers in plan for i in numbers) == list(range(n))
            lengths = [len(i.context) + sum(map(len, i.endings)) - 4 for i in items]
            assert lengths[plan[0][0]] == max(lengths)
            for numbers in plan:
                (_, B, T) = pack([items[i] for i in numbers])[0].shape
                assert max(lengths[i] for i in numbers) <= T and T % 8 == 0
                assert B == len(numbers) and (B == 1 or B * T <= budget)


def test_hugging_face_and_ours_score_the_same(items, tmp_path):
    shape = dict(vocab_size=V, n_layer=2, n_head=2, n_embd=32)
    dropout = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)  # must be off
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(**shape, **dropout)).train()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.15 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours, some = GPT.from_pretrained(tmp_path), items[::10]
    a, b = score(ours, some, "cpu"), score(theirs, some, "cpu")
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    agree(some, b, reference(ours, some))
    assert theirs.training and theirs.transformer.drop.training
    theirs.set_attn_implementation("eager")  # it would add True to the scores as 1.0
    assert torch.equal(score(theirs, some, "cpu"), b)


def test_padding_rows_of_the_vocabulary_count_as_the_model_has_them(items):
    model = sharp(vocab_size=V + 45)
    agree(items[:10], score(model, items[:10], "cpu"), reference(model, items[:10]))


def test_hidden_states_equal_the_networks_own(model):
    """hidden_states calls the network's layers one by one. With a causal mask it must give the
    network's own logits, and a packed row must give those of separate rows."""
    ids = torch.randint(V, (2, 30), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(30).expand(2, 30)
    causal = torch.ones(30, 30, dtype=torch.bool).tril().expand(2, 1, 30, 30)
    with torch.no_grad():
        hidden = hellaswag.hidden_states(model, ids, positions, causal)
        torch.testing.assert_close(model.lm_head(hidden), model(ids), rtol=1e-4, atol=1e-4)
        item = Item(0, 0, ids[0, :9].tolist(), ids[1, :28].view(4, 7).tolist(), [7] * 4)
        grid, _ = pack([item])
        mask = hellaswag.attention_mask(grid[2])
        hidden = hellaswag.hidden_states(model, grid[0], grid[1], mask)[0]
        for i, ending in enumerate(item.endings):
            alone = model(torch.tensor([item.context + ending[:-1]]))[0]
            packed = torch.cat([hidden[:9], hidden[9 + 6 * i : 15 + 6 * i]])
            torch.testing.assert_close(model.lm_head(packed), alone, rtol=1e-4, atol=1e-4)


def test_the_example_and_the_picture_in_the_text():
    """The docstrings show an item, how it is decided, and how it is packed. All three are true."""
    text = hellaswag.__doc__
    record = json.loads(re.search(r"^    (\{.*?\})$", text, re.M | re.S)[1])
    code = re.search(r"^    mean_losses = .*?\n\n", text, re.M | re.S)[0].replace("\n    ", "\n")
    for label, model in enumerate((sharp(vocab_size=50257), sharp(vocab_size=50257, n_layer=1))):
        item = hellaswag.encode(0, record, "completion")
        assert item.label == hellaswag.encode(0, record, "harness").label == 3
        names = dict(item=item, model=model, torch=torch, F=F)
        exec(code.strip(), names)
        assert names["answer"] == picks([item], score(model, [item], "cpu"))[1].item()
    C, D, a, b, e, f, g = range(7)
    grid, scored = pack([Item(0, 0, [C, D], [[a, b], [e, f, g], [0], [0]], [1] * 4)])
    tokens, positions, segments = grid[:, 0, :5]
    assert tokens.tolist() == [C, D, a, e, f] and positions.tolist() == [0, 1, 2, 2, 3]
    assert segments.tolist() == [0, 0, 1, 2, 2] and scored[0, :5].tolist() == [1, 2, 1, 3, 4]
    assert scored[1, :5].tolist() == [a, b, e, f, g]
    mask = hellaswag.attention_mask(segments[None])[0, 0]
    drawn = re.findall(r"^ +[CDaef]    ([x.](?:  [x.])*)$", pack.__doc__, re.M)
    assert [[c == "x" for c in line.split()] for line in drawn] == mask.tolist()


class Shifted:
    """Hidden states and a vocabulary whose logits are like those of OpenAI's models: near -100, and
    in every second position one token, mostly the target, dominates."""

    def __init__(self):
        torch.manual_seed(0)
        self.config = SimpleNamespace(block_size=64)
        self.lm_head = torch.nn.Linear(64, V, bias=False)
        self.hidden = torch.randn(300, 64)
        self.targets = torch.randint(V, (300,))
        with torch.no_grad():
            self.lm_head.weight.normal_(std=0.3)
            self.lm_head.weight[:, 0] = -10.0
            self.hidden[:, 0] = 10.0 + 0.3 * torch.randn(300)
            towards = self.lm_head.weight[self.targets, 1:]
            self.hidden[::2, 1:] = 4 * towards[::2]
        self.transformer = None

    def losses(self, dtype):
        with pytest.MonkeyPatch.context() as patch:
            hidden = self.hidden[None]
            patch.setattr(hellaswag, "hidden_states", lambda *args: hidden)
            grid = torch.zeros(3, 1, 300, dtype=torch.int64)
            scored = torch.stack([torch.arange(300), self.targets])
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return hellaswag.token_losses(self, grid, scored)


def test_large_logits_lose_little_in_bfloat16():
    """bfloat16 rounds logits near -100 by up to 0.25 each. hellaswag.py first subtracts their mean.
    No loss is negative in any precision."""
    model = Shifted()
    logits = model.hidden.double() @ model.lm_head.weight.double().t()
    assert -110 < logits.median() < -90
    exact = F.cross_entropy(logits, model.targets, reduction="none")
    assert (exact < 1e-3).sum() > 100 and (exact > 1).sum() > 100
    rounded = F.cross_entropy(logits.bfloat16().double(), model.targets, reduction="none")
    assert (rounded - exact).abs().max() > 0.2
    for dtype, most in ((torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.08)):
        losses = model.losses(dtype)
        assert losses.dtype == torch.float32 and losses.min() >= 0
        assert (losses - exact).abs().max() < most, dtype


def test_in_bfloat16_only_the_logits_are_rounded():
    """The logits of all tokens and those of the targets are rounded alike. The sums over the
    vocabulary have the precision of float32; bfloat16 would round a sum near 10 by up to 0.03."""
    model = Shifted()
    weight = model.lm_head.weight.detach()
    head, hidden = (weight - weight.mean(0)).bfloat16(), model.hidden.bfloat16()
    logits = F.linear(hidden, head).double()
    expected = F.cross_entropy(logits, model.targets, reduction="none")
    errors = (model.losses(torch.bfloat16) - expected).abs()
    # The logit of a target may be rounded the other way, as its sum is in another order.
    assert errors.median() < 1e-4 and errors.max() < 0.07


def test_autocast_stays_close(model, items, expected):
    with torch.autocast("cpu", torch.bfloat16):
        losses = score(model, items, "cpu")
    assert 0 < (losses - expected).abs().max() < 0.05 * expected.max()
    assert losses.dtype == torch.float64


@pytest.mark.parametrize("block_size", [16, 60, 150])
def test_small_context_cuts_contexts_on_the_left(block_size, items):
    model = sharp(block_size)
    items = [item for item in items if max(map(len, item.endings)) <= block_size][:30]
    result = evaluate(model, items, "cpu")
    fitted = [hellaswag.fit(item, block_size) for item in items]
    grid = pack(fitted)[0]
    assert grid[1].max() < block_size
    assert grid.size(2) > block_size or block_size == 150  # rows may be longer than the context
    truncated = 0
    for item, losses in zip(items, result.losses):
        # The last token of an ending is not read.
        room = block_size - (max(map(len, item.endings)) - 1)
        agree([item], losses[None], reference(model, [item], room))
        truncated += len(item.context) > room
    assert result.truncated == truncated
    assert (result.truncated > 0) == (block_size < 150)


def test_ending_longer_than_the_context():
    with pytest.raises(UserError, match=r"^item 7 .* 9 tokens.* 8; remove the item$"):
        score(sharp(8), [Item(7, 0, [1], [[1] * 9, [1], [1], [1]], [1] * 4)], "cpu")


def test_scoring_leaves_training_alone(items):
    def losses(scored):
        model = sharp().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(5)
        for step in range(3):
            if scored:
                state, grads = torch.get_rng_state(), [p.grad for p in model.parameters()]
                evaluate(model, items[:9], "cpu", token_budget=700)
                assert torch.equal(torch.get_rng_state(), state) and model.training
                assert all(a is b for a, b in zip(grads, (p.grad for p in model.parameters())))
            loss = model(torch.randint(V, (2, 20)), torch.randint(V, (2, 20)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    assert list(losses(True)) == list(losses(False))
    model = sharp().eval()
    score(model, items[:2], "cpu")
    assert not model.training


def test_scoring_stops_at_a_loss_that_is_not_finite(model, items, monkeypatch):
    """Here in the second of ten batches. The run is about to end, so the others do not matter."""
    calls, original = [], hellaswag.token_losses

    def token_losses(*args):
        calls.append(args)
        return original(*args) * (1 if len(calls) == 1 else math.nan)

    monkeypatch.setattr(hellaswag, "token_losses", token_losses)
    table = score(model, items[:10], "cpu", token_budget=1)
    assert len(calls) == 2
    assert sorted(table.isnan().all(1).tolist()) == [False] * 9 + [True]
    assert (table == 0).all(1).sum() == 8


def test_no_items_is_an_empty_table(model):
    assert score(model, [], "cpu").shape == (0, 4)  # a process may have no share


# -- data


GOOD = dict(ind=5, activity_label="A", ctx="The cat", endings=["a", "b", "c", "d"], label=2)


def bad_lines():
    yield from ("{", "", b"\xff\xfe", "[1]", "3")
    for key in ("ctx", "endings", "label"):
        yield {k: v for k, v in GOOD.items() if k != key}
    for label in (-1, 4, "4", "-1", "two", "", None):
        yield GOOD | dict(label=label)
    for endings in (["a"] * 3, ["a"] * 5, 4, None):
        yield GOOD | dict(endings=endings)
    for ending in ("", " \n", None, 4):
        yield GOOD | dict(endings=["a", "b", "c", ending])
    for ctx in ("", "  ", 3):
        yield GOOD | dict(ctx=ctx)
    for ind in (None, "five", [1], "9" * 5000):
        yield GOOD | dict(ind=ind)


@pytest.mark.parametrize("line", bad_lines())
def test_bad_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        load_items(path)
    what = rf"{re.escape(str(path))}, line 2 is not an item \([^\n]+\)"
    assert re.fullmatch(rf"{what}; correct or delete the line", str(caught.value))


def test_the_reason_of_a_bad_line(tmp_path):
    for change, reason in (
        (dict(label=4), "it has 4 endings and the label 4"),
        (dict(endings=["a"] * 3), "it has 3 endings and the label 2"),
        (dict(endings=["a", "b", "c", " "]), "ctx or an ending is empty"),
    ):
        with pytest.raises(UserError, match=rf"line 1 is not an item \({reason}\); correct"):
            load_items(write(tmp_path / "bad.jsonl", [GOOD | change]))
    with pytest.raises(UserError, match=r"line 1 is not an item \(KeyError: 'ctx'\); correct"):
        load_items(write(tmp_path / "bad.jsonl", [{}]))


def test_bad_file(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for path, limit, complaint in (
        (empty, None, "nothing to score"),
        (tmp_path, None, "cannot be read"),
        (tmp_path / "misspelt.jsonl", None, "No such file"),
        (write(tmp_path / "good.jsonl", [GOOD]), 0, "nothing to score"),
    ):
        with pytest.raises(UserError, match=complaint):
            load_items(path, limit)


def test_harness_needs_and_checks_what_it_uses(tmp_path):
    for change in (
        dict(activity_label=3),
        dict(endings=["a", "b", "c", "[step] "]),
        dict(ctx_a="x", ctx_b=None),
        dict(ctx_a=["x"], ctx_b=""),
    ):
        load_items(write(tmp_path / "bad.jsonl", [GOOD | change]))  # fine for the other style
        with pytest.raises(UserError, match="line 1 is not an item"):
            load_items(tmp_path / "bad.jsonl", style="harness")


def test_numbers_may_be_text_as_on_the_hub(tmp_path):
    (item,) = load_items(write(tmp_path / "one.jsonl", [GOOD | dict(ind="17", label="2")]))
    assert (item.index, item.label) == (17, 2)


def test_text_that_only_one_encoder_can_encode(tmp_path):
    spaces = " " * 1_100_000  # too many for tiktoken
    record = GOOD | dict(ctx=f"a{spaces}b", endings=["\ud800", "b", "c", "d"])
    (item,) = load_items(write(tmp_path / "one.jsonl", [record]))
    assert item.context == [64, *[220] * 1_099_999, 275]
    assert item.endings[0] == tokenizer().encode_ordinary(" \ufffd")


def test_completion_style(tmp_path):
    ids = tokenizer().encode_ordinary
    endings = ["on  it.", "<|endoftext|>", "é", "far away"]
    record = GOOD | dict(ctx="The cat [title] sat ", endings=endings)
    (item,) = load_items(write(tmp_path / "one.jsonl", [record]))
    assert (item.index, item.label, item.context) == (5, 2, ids("The cat [title] sat "))
    assert item.endings == [ids(" on  it."), ids(" <|endoftext|>"), ids(" é"), ids(" far away")]
    assert item.lengths == [len(ending) for ending in item.endings] and 50256 not in item.endings[1]


def test_harness_style(tmp_path):
    ids = tokenizer().encode_ordinary
    record = dict(ind=1, label=0, activity_label="Baking", ctx="not used")
    record["ctx_a"] = "[header] How to bake [title] Mix it."
    record["ctx_b"] = "the DOUGH  rises [step]"
    record["endings"] = [" Stir [substeps] it. ", "[step] Wait", "a  b   c", "café"]
    (item,) = load_items(write(tmp_path / "one.jsonl", [record]), style="harness")
    # "[header] " and "[step]" go, " [title]" becomes ". ", double spaces become one, and the rest
    # of ctx_b becomes lower case.
    assert tokenizer().decode(item.context) == "Baking: How to bake. Mix it. The dough rises"
    # The first of the two spaces was the context's last.
    assert item.endings == [ids("  Stir it."), ids("   Wait"), ids("  a b  c"), ids("  café")]
    assert item.lengths == [len("Stir it."), len(" Wait"), len("a b  c"), len("café")]

    plain = GOOD | dict(ctx="The cat", endings=["sat", "ran", "é", "[x] y"])
    with pytest.warns(UserWarning, match="without ctx_a and ctx_b"):
        (item,) = load_items(write(tmp_path / "two.jsonl", [plain]), style="harness")
    assert item.context == ids("A: The cat") and item.endings[0] == ids(" sat")
    assert item.lengths == [3, 3, 1, 2]


def test_limit_is_spread_over_the_file(tmp_path):
    path = write(tmp_path / "ten.jsonl", [GOOD | dict(ind=i) for i in range(10)])
    assert [item.index for item in load_items(path, 4)] == [0, 2, 5, 7]
    assert len(load_items(path, 10)) == len(load_items(path, 99)) == len(load_items(path)) == 10


def test_index_is_the_line_where_the_file_has_none(tmp_path):
    path = write(tmp_path / "two.jsonl", [{k: v for k, v in GOOD.items() if k != "ind"}] * 2)
    assert [item.index for item in load_items(path)] == [0, 1]


@pytest.mark.skipif(not REAL.exists(), reason="needs the real items in ../shared/data/hellaswag")
def test_real_file_loads_whole_and_fits_any_gpt2():
    items = load_items(REAL)
    assert len(items) == hellaswag.N_ITEMS
    assert all(hellaswag.fit(item, 1024) == item for item in items)  # nothing is cut
    assert max(pack([item])[0].size(2) for item in items) <= 1024


# -- Parquet, and the download from the hub


def write_parquet(path, records):
    """The records as the hub has them: the label is text, and there are more columns."""
    more = {"source_id": "wikihow~1", "split": "val", "split_type": "indomain"}
    rows = [record | more | {"label": str(record["label"])} for record in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_and_json_lines_give_the_same_scores(data, tmp_path):
    records = [json.loads(line) for line in data.read_text().splitlines()[:12]]
    parts = [record | {"ctx_a": record["ctx"], "ctx_b": "he"} for record in records]
    # The content decides, not the name.
    one = write(tmp_path / "items.parquet", parts)
    other = write_parquet(tmp_path / "items.jsonl", parts)
    for style in ("completion", "harness"):
        assert load_items(one, style=style) == load_items(other, style=style)
    model = sharp(vocab_size=50257)
    a, b = (score(model, load_items(path), "cpu") for path in (one, other))
    assert torch.equal(a, b) and a.shape == (12, 4)


def test_bad_parquet(tmp_path):
    path = write_parquet(tmp_path / "bad.parquet", [GOOD, GOOD | dict(ctx=None)])
    with pytest.raises(UserError, match="bad.parquet, line 2 is not an item"):
        load_items(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=r"bad.parquet cannot be read \(.*\); check the file and its name$"
    ):
        load_items(path)


def test_only_the_default_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("hellaswag_val.jsonl", hellaswag.DATA + "x", tmp_path / hellaswag.DATA):
        with pytest.raises(UserError, match="No such file or directory.; check the file"):
            load_items(path)
    (tmp_path / "hellaswag").mkdir()
    write(tmp_path / hellaswag.OLD_DATA, [GOOD] * 3)
    assert len(load_items()) == 3  # the file that earlier versions downloaded


@pytest.fixture
def hub(tmp_path):
    """A local stand-in for the hub, with one file, `.body`. `.requests` lists all requests. That
    the real hub answers in the same way is an assumption."""
    table = write_parquet(tmp_path / "served", made_records(9))
    body = table.read_bytes()
    table.unlink()
    pinned = f"/datasets/Rowan/hellaswag/resolve/{hellaswag.REVISION}/{hellaswag.FILE}"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            server.requests.append((self.command, path))
            if path != pinned:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.body)))
            self.send_header("X-Repo-Commit", hellaswag.REVISION)
            self.send_header("ETag", f'"{hashlib.sha1(server.body).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(server.body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body = body
        server.requests = []
        server.sha256 = hashlib.sha256(body).hexdigest()
        server.env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
            "no_proxy": "*",
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def downloads(hub):
    return [path for command, path in hub.requests if command == "GET" and "/resolve/" in path]


def test_download_once_and_only_what_is_pinned(hub, tmp_path):
    (tmp_path / "load.py").write_text(f"""
import hellaswag
for sha256 in ("0" * 64, "{hub.sha256}", "read again"):
    hellaswag.SHA256 = sha256
    try:
        print(len(hellaswag.load_items(limit=5)))
    except hellaswag.UserError as error:
        print(error)
""")
    done = run(tmp_path / "load.py", cwd=tmp_path, env=hub.env)
    first, second, third = done.stdout.splitlines()
    assert first.startswith(f"{hellaswag.DATA} is missing and cannot be downloaded (the server ")
    assert first.endswith(
        "; download data/validation-00000-of-00001.parquet of the dataset Rowan/hellaswag on "
        "huggingface.co and put it at hellaswag/data/validation-00000-of-00001.parquet"
    )
    assert (second, third) == ("5", "5") and len(downloads(hub)) == 2
    assert (tmp_path / hellaswag.DATA).read_bytes() == hub.body
    assert "%" not in done.stderr  # no progress bar


def test_processes_agree_whether_there_are_items(hub, tmp_path):
    """Rank 0 downloads and reads for both processes, so they have the same items or none, whatever
    file is on the other machine. A NaN in one of them is refused by both."""
    (tmp_path / "load.py").write_text(f"""
import hashlib
import os
from pathlib import Path
import torch
import torch.distributed as dist
import hellaswag
from hellaswag import items_or_none
from train_gpt2 import GPT, GPTConfig

dist.init_process_group("gloo")
rank = dist.get_rank()
said = []

def note(text):
    said.append(str(text))

hellaswag.say = note
hellaswag.SHA256 = "0" * 64
note(items_or_none(hellaswag.DATA, 1024))
hellaswag.SHA256 = "{hub.sha256}"
items = items_or_none(hellaswag.DATA, 1024)
note(len(items))

lines = Path("good.jsonl").read_text().splitlines()
damaged = list(lines)
damaged[3] = "{{"
for bad_rank in (0, 1):  # this process has a damaged file, the other one a good file
    Path(f"{{rank}}").mkdir(exist_ok=True)
    os.chdir(f"{{rank}}")
    Path("its.jsonl").write_text("\\n".join(damaged if rank == bad_rank else lines))
    found = items_or_none("its.jsonl", 1024)
    note(found and hashlib.sha256(repr(found).encode()).hexdigest())
    os.chdir("..")
note(items_or_none("good.jsonl", 8))

model = GPT(GPTConfig(vocab_size=50257, n_layer=1, n_head=2, n_embd=16))
if rank == 1:
    torch.nn.init.constant_(model.transformer.ln_f.bias, float("nan"))
try:
    hellaswag.evaluate(model, items, "cpu", rank, 2)
except hellaswag.UserError as error:
    note(error)
Path(f"said{{rank}}").write_text("\\n".join(said))
dist.destroy_process_group()
""")
    write(tmp_path / "good.jsonl", made_records(9))
    run(tmp_path / "load.py", processes=2, cwd=tmp_path, env=hub.env)
    one, two = ((tmp_path / f"said{rank}").read_text().splitlines() for rank in (0, 1))
    assert [line for line in one if "warning: " not in line] == two
    digest = hashlib.sha256(repr(load_items(tmp_path / "good.jsonl")).encode()).hexdigest()
    nan = "HellaSwag item 3: its losses are [nan, nan, nan, nan]; check the model's weights, and"
    assert two == ["None", "9", "None", digest, "None", f"{nan} --dtype"]
    assert len(downloads(hub)) == 2
    warnings = [line for line in one if "warning: " in line]
    off = "warning: HellaSwag is off: "
    assert warnings[0].startswith(f"{off}{hellaswag.DATA} is missing and cannot be downloaded (")
    assert re.fullmatch(f"{off}its.jsonl, line 4 is not an item .*", warnings[1])
    assert re.fullmatch(f"{off}item .* tokens, .* has 8; remove the item", warnings[2])
    assert len(warnings) == 3


# -- command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory that save_pretrained wrote, like a checkpoint."""
    directory = tmp_path_factory.mktemp("saved") / "step_00250"
    sharp(vocab_size=50257).save_pretrained(directory)
    return directory


def last_line(done):
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def one(saved, data, tmp_path_factory):
    """What one run printed, and the file that it wrote. The environment is hostile: an encoding
    without ±, and the variables of torchrun, some of them empty."""
    path = tmp_path_factory.mktemp("out") / "new/one.json"
    args = "--model", saved, "--data", data, "--limit", 41, "--device", "cpu", "--json", path
    env = {"PYTHONIOENCODING": "ascii", "LOCAL_RANK": "", "RANK": "", "WORLD_SIZE": "2"}
    return run("hellaswag.py", *args, env=env), path


def test_the_command_line_is_an_independent_witness(one, saved, data):
    """transformers' model there, ours here: the same picks and accuracy, losses to 1e-4."""
    done, path = one
    items, ours = load_items(data, 41), GPT.from_pretrained(saved)
    result = evaluate(ours, items, "cpu")
    assert last_line(done) == str(result).replace("±", "?")
    assert "acc_norm=" in done.stderr  # the progress bar shows the accuracy so far
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(records[0]) == ["index", "label", "losses", "lengths", "pick", "pick_norm"]
    losses = torch.tensor([record["losses"] for record in records], dtype=torch.float64)
    torch.testing.assert_close(losses, result.losses, rtol=0, atol=1e-4)
    agree(items, losses, plain_loop(ours, items).double())
    chosen = [[r["pick"] for r in records], [r["pick_norm"] for r in records]]
    assert chosen == [pick.tolist() for pick in picks(items, losses)]
    named = [(r["index"], r["label"], r["lengths"]) for r in records]
    assert named == [(i.index, i.label, i.lengths) for i in items]
    assert [p.name for p in path.parent.iterdir()] == ["one.json"]
    acc, acc_norm = result.acc, result.acc_norm
    stderr = math.sqrt(acc_norm * (1 - acc_norm) / 41)
    assert str(result) == f"41 acc: {acc:.4f} acc_norm: {acc_norm:.4f} ± {stderr:.4f}"


@pytest.mark.faults
def test_two_processes_share_the_items(saved, data, tmp_path):
    """evaluate(), as a run under torchrun calls it, in two processes: both get the whole table."""
    script = tmp_path / "two.py"
    script.write_text(f"""
import os, torch
import torch.distributed as dist
import hellaswag
from train_gpt2 import GPT
dist.init_process_group("gloo")
items, rank = hellaswag.load_items({str(data)!r}, 41), int(os.environ["RANK"])
result = hellaswag.evaluate(GPT.from_pretrained({str(saved)!r}), items, "cpu", rank, 2)
torch.save(result.losses, {str(tmp_path)!r} + f"/{{rank}}.pt")
dist.destroy_process_group()
""")
    run(script, processes=2, env={"PYTHONPATH": str(hellaswag.Path(hellaswag.__file__).parent)})
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = evaluate(GPT.from_pretrained(saved), load_items(data, 41), "cpu").losses
    assert torch.equal(one, two)
    torch.testing.assert_close(one, alone, rtol=0, atol=1e-4)


def scored(saved, data, *args):
    hellaswag.main([*map(str, ["--model", saved, "--data", data, "--limit", 3, *args])])


def sentence(capsys):
    """The sentence of an error, which is all that it printed to stderr."""
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line and "item/s" not in line]  # without the progress bar
    assert len(lines) == 1 and lines[0].startswith("hellaswag.py: "), lines
    return lines[0].removeprefix("hellaswag.py: ")


def refused(capsys, *args):
    """The sentence with which the command line refuses these arguments. The status is 2."""
    with pytest.raises(SystemExit) as caught:
        hellaswag.main([*map(str, args)])
    assert caught.value.code == 2
    return sentence(capsys)


def test_an_impossible_file_is_refused_before_the_work(saved, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hellaswag, "load_items", lambda *args: pytest.fail("the work began"))
    (tmp_path / "file").write_text("mine")
    for path, why in ((tmp_path, "it is not a file"), (tmp_path / "file/x.json", "File exists")):
        said = refused(capsys, "--model", saved, "--data", data, "--json", path)
        assert said == f"{path} cannot be written ({why}); choose another --json"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_loses_the_file_but_not_the_result(saved, data, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "x.json").write_text("of an earlier run")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as caught:
        scored(saved, data, "--device", "cpu", "--json", tmp_path / "x.json")
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out.splitlines()[-1].startswith("3 acc: ")
    assert err.endswith("cannot be written (No space left on device); choose another --json\n")
    assert (tmp_path / "x.json").read_text() == "of an earlier run"


def test_a_screen_that_fails_does_not_lose_the_file(saved, data, tmp_path, monkeypatch):
    """The file is written first. A progress bar that cannot be written is switched off."""

    class Closed:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            pass

    class ClosedLater(Closed):
        def write(self, text):
            if "acc_norm" in text:
                super().write(text)

    monkeypatch.setattr("sys.stderr", ClosedLater())
    scored(saved, data, "--device", "cpu", "--json", tmp_path / "one.json")
    monkeypatch.setattr("sys.stdout", Closed())
    scored(saved, data, "--device", "cpu", "--json", tmp_path / "two.json")
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text() != ""


def test_no_stderr_and_no_stdout(saved, data, tmp_path):
    args = ["--model", saved, "--data", data, "--limit", 3, "--device", "cpu"]
    args += ["--json", tmp_path / "a.json"]
    closed = ["bash", "-c", 'exec "$@" 2>&-', "bash", *command("hellaswag.py", *args)]
    done = subprocess.run(closed, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0 and last_line(done).startswith("3 acc: ")
    closed[2] = 'exec "$@" >&- 2>&-'
    (tmp_path / "a.json").unlink()
    assert subprocess.run(closed, env=os.environ | ENVIRONMENT).returncode == 0
    assert (tmp_path / "a.json").read_text().count("\n") == 3


def test_a_tilde_after_an_equals_sign_is_the_home_directory(saved, data, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name, path in (("step", saved), ("data", data)):
        (tmp_path / "home" / name).symlink_to(path)
    flags = ["--model=~/step", "--data=~/data", "--json=~/x.json", "--limit=3", "--device=cpu"]
    hellaswag.main(flags)
    assert (tmp_path / "home/x.json").read_text().count("\n") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("json_file, status", (("a.json", 0), (None, 2)))
def test_a_full_stdout_is_no_traceback(saved, data, tmp_path, json_file, status):
    """It is a fault if the result goes nowhere else."""
    args = ["--model", saved, "--data", data, "--limit", 3, "--device", "cpu"]
    args += ["--json", tmp_path / json_file] if json_file else []
    line = ["bash", "-c", 'exec "$@" >/dev/full', "-", *command("hellaswag.py", *args)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == status and "Traceback" not in done.stderr
    if json_file:
        assert (tmp_path / "a.json").read_text().count("\n") == 3
    else:
        assert "the result cannot be printed (No space left on device)" in done.stderr


def test_ctrl_c_exits_with_130(saved, data, monkeypatch):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(hellaswag, "evaluate", interrupted)
    with pytest.raises(SystemExit) as caught:
        scored(saved, data, "--device", "cpu")
    assert caught.value.code == 130


def test_a_link_stays_a_link_and_a_pipe_is_refused(saved, data, tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("real/file.json")
    for _ in range(2):
        scored(saved, data, "--device", "cpu", "--json", tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real/file.json").read_text().count("\n") == 3
    os.mkfifo(tmp_path / "pipe")
    capsys.readouterr()
    said = refused(capsys, "--model", saved, "--data", data, "--json", tmp_path / "pipe")
    assert said == f"{tmp_path}/pipe cannot be written (it is not a file); choose another --json"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file.json", "link.json", "pipe", "real"]


def test_compare_finds_no_difference_between_equal_models(one):
    done = run("hellaswag.py", "--compare", one[1], one[1])
    interval = "95% interval +0.0000 to +0.0000 (paired, normal approximation)"
    assert last_line(done) == f"B - A: +0.0000, {interval}"


def test_compare_by_hand(tmp_path):
    def records(right):
        return [
            dict(index=i, label=1, losses=[1.0, 2.0, 3.0, 4.0], pick_norm=int(r))
            for i, r in enumerate(right)
        ]

    a = write(tmp_path / "a.json", records([1] * 20 + [0] * 80))
    b = write(tmp_path / "b.json", records([1] * 10 + [0] * 10 + [1] * 30 + [0] * 50))
    text = hellaswag.compare(a, b)
    parts = ["a.json acc_norm: 0.2000", "b.json acc_norm: 0.4000"]
    for part in (*parts, "only A is right on 10, only B on 30"):
        assert part in text
    # 100 values, of which 10 are -1 and 30 are +1: their mean is 0.2, their variance 0.4 - 0.2^2.
    margin = 1.96 * math.sqrt(0.36 / 100)
    interval = f"95% interval {0.2 - margin:+.4f} to {0.2 + margin:+.4f}"
    assert text.endswith(f"B - A: +0.2000, {interval} (paired, normal approximation)")

    for broken in (records([1] * 99), [{"x": 1}], []):
        with pytest.raises(UserError):
            hellaswag.compare(a, write(tmp_path / "c.json", broken))
    with pytest.raises(UserError, match="no.json"):
        hellaswag.compare(a, tmp_path / "no.json")
    # as an earlier version wrote it
    not_finite = [dict(index=0, label=1, losses=[math.nan, 1, 2, 3], pick_norm=0)]
    with pytest.raises(UserError, match="item 0 has losses that are not finite"):
        hellaswag.compare(a, write(tmp_path / "nan.json", not_finite))


def test_the_interval_agrees_with_the_bootstrap(tmp_path):
    """The percentile bootstrap over items (Efron 1979) with 100,000 resamples."""
    rng = np.random.default_rng(1)
    hard = rng.random(10042)  # both models find the same items hard
    files, right = [], []
    for name, skill in (("a.json", 0.30), ("b.json", 0.315)):
        right.append(hard + 0.1 * rng.standard_normal(10042) < skill)
        answers = [
            dict(index=i, label=1, losses=[1.0], pick_norm=int(r)) for i, r in enumerate(right[-1])
        ]
        files.append(write(tmp_path / name, answers))
    interval = re.search(r"interval (\S+) to (\S+) ", hellaswag.compare(*files))
    values, counts = np.unique(right[1].astype(int) - right[0], return_counts=True)
    drawn = rng.multinomial(10042, counts / 10042, size=100_000) @ values / 10042
    assert np.abs(np.percentile(drawn, [2.5, 97.5]) - [*map(float, interval.groups())]).max() < 5e-4


def test_mistakes_are_one_sentence(saved, data, tmp_path, capsys):
    done = run("hellaswag.py", "--model", saved, check=False, cwd=tmp_path)  # conftest: offline
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("hellaswag.py: ") and "cannot be downloaded" in done.stderr
    assert not (tmp_path / hellaswag.DATA).exists()
    said = refused(capsys, "--model", saved, "--data", tmp_path / "none.jsonl", "--device", "cpu")
    assert said.startswith(f"{tmp_path}/none.jsonl cannot be read (No such file or directory);")


def write_config(folder, **settings):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_directories_that_are_no_gpt2_are_one_sentence(saved, tmp_path):
    run = tmp_path / "run"
    for name in ("step_00250", "step_01000", "step_00500", "step_old"):
        write_config(tmp_path / name, model_type="gpt2")
        (run / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(run / name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").touch()
    for model, expected in (
        (tmp_path / "none", "no such directory; give one that exists, or gpt2, gpt2-medium, "),
        ("openai-community/gpt3", "no such directory"),
        (write_config(tmp_path / "empty"), "cannot be loaded"),
        (write_config(tmp_path / "absurd", n_layer=10**9), "choose a smaller model"),
        (
            write_config(tmp_path / "llama", model_type="llama", num_hidden_layers=2),
            "llama is a llama, not a GPT-2; give the directory of a GPT-2",
        ),
        (
            write_config(tmp_path / "crossed", model_type="gpt2", add_cross_attention=True),
            "crossed is a GPT-2 with cross-attention; give one without it",
        ),
        (run, f"run is a run, not a checkpoint; give its newest one, {run}/step_01000"),
        (adapter, "adapter is an adapter, not a model; merge it and save it first"),
        (bare, "bare has no config.json; give the directory of a GPT-2"),
        (bare / "model.safetensors", f"; give the checkpoint that it belongs to, {bare}"),
        ("", "the name of the model is empty; give a directory, or gpt2"),
        (write_config(tmp_path / "null", model_type=None), "null cannot be loaded"),  # no weights
    ):
        with pytest.raises(UserError) as caught:
            hellaswag.load_gpt2(model)
        said = str(caught.value)
        assert expected in said and "\n" not in said
        assert len(said.replace(str(tmp_path), "")) <= 200


def test_weights_that_do_not_fit_are_named_but_not_all(saved, tmp_path):
    settings = json.loads((saved / "config.json").read_text())
    for name, change, problem in (
        ("deeper", dict(n_layer=4), "24 tensors are missing (transformer.h.2.attn.c_attn."),
        ("shallower", dict(n_layer=1), "11 tensors are unknown (transformer.h.1.attn.c_attn."),
        ("wider", dict(n_embd=48), "28 tensors are of another shape (transformer.h.0.attn.c_attn."),
    ):
        folder = write_config(tmp_path / name, **settings | change)
        (folder / "model.safetensors").symlink_to(saved / "model.safetensors")
        with pytest.raises(UserError) as caught:
            hellaswag.load_gpt2(folder)
        said = str(caught.value).replace(str(tmp_path), "")
        assert said.startswith(f"/{name}: its weights do not fit its config.json: {problem}")
        assert said.endswith(", ...); check its files") and len(said) <= 200


def test_openais_names_are_accepted_with_their_organisation(monkeypatch):
    import transformers

    monkeypatch.setattr(
        transformers.GPT2Config, "get_config_dict", lambda name: pytest.fail(f"{name} is loaded")
    )
    for name in hellaswag.OPENAI:
        for prefix in ("", "openai-community/"):
            with pytest.raises(pytest.fail.Exception, match=f"^{prefix}{name} is loaded"):
                hellaswag.load_gpt2(prefix + name)


def test_check_memory(monkeypatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**6}
    with monkeypatch.context() as patch:
        patch.setattr(os, "sysconf", sizes.get, raising=False)
        check_memory(4096 * 10**6, "gpt2-xl")
        with pytest.raises(UserError, match="4 GB, and this machine has 4"):
            check_memory(4096 * 10**6 + 1, "gpt2-xl")
        with pytest.raises(UserError) as caught:
            check_memory(10**13, "gpt2-xl")
        patch.delattr(os, "sysconf")  # as on Windows
        check_memory(10**13, "gpt2-xl")
    sizes = "weights of 10,000 GB, and this machine has 4"
    assert str(caught.value) == f"gpt2-xl: {sizes}; choose a smaller model"


def test_weights_of_nan_are_refused(data, tmp_path, capsys):
    """Otherwise NaN losses count as answers, and acc_norm is 0.25."""
    model = sharp(vocab_size=50257)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "nan")
    args = ["--model", tmp_path / "nan", "--data", data, "--limit", 3, "--device", "cpu"]
    said = refused(capsys, *args, "--json", tmp_path / "nan.json")
    index = load_items(data, 3)[0].index
    assert re.match(rf"HellaSwag item {index}: its losses are \[.*nan.*; check the model's", said)
    assert not (tmp_path / "nan.json").exists()


def test_truncation_is_reported(tmp_path, data, capsys):
    sharp(100, 50257).save_pretrained(tmp_path / "small")
    args = ["--model", tmp_path / "small", "--data", data, *"--limit 20 --device cpu".split()]
    hellaswag.main([*map(str, args)])
    items = load_items(data, 20)
    cut = sum(len(i.context) + max(map(len, i.endings)) - 1 > 100 for i in items)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("20 acc: ")
    assert (f"{cut} items were too long" in lines[0]) == (cut > 0)


def test_help_names_the_contract(capsys):
    with pytest.raises(SystemExit):
        hellaswag.main(["--help"])
    text = capsys.readouterr().out.replace("-", "_")
    for name in "model data limit device dtype json compare style".split():
        assert f"__{name}" in text, name
