"""hellaswag.py: losses against hand-worked and float64 references, every shape of batch, every bad
input, the command line."""

import http.server
import json
import math
import os
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_hellaswag import plain_loop
from conftest import SHARED, run
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from fineweb import UserError, tokenizer
from hellaswag import Item, batches, evaluate, load_items, pack, picks, score
from train_gpt2 import GPT, GPTConfig

REAL = SHARED / "hellaswag/hellaswag_val.jsonl"
N = 201  # items; odd, so that two processes cannot share them evenly
V = 5003  # ids are folded to so many, for speed, where the tokenizer is not tested; > VOCAB_SLICE


def made_records(n, seed=0):
    """Records like HellaSwag's, of made words, of very different lengths."""
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
    """The definition, in float64: every ending by itself behind its context's last tokens."""
    model, table = model.double(), []
    for item in items:
        for ending in item.endings:
            ids = item.context[-context:] + ending
            hidden = model.transformer(torch.tensor([ids[:-1]]))[0, -len(ending) :]
            logp = F.log_softmax(model.lm_head(hidden), dim=-1)
            table.append(-sum(logp[i, token] for i, token in enumerate(ending)))
    model.float()
    return torch.stack(table).view(-1, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of N items, the real ones where they are at hand."""
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
    """A model that one can work out by hand: the next token depends on the last one only. probs:
    (V, V), one row per token."""

    def __init__(self, probs):
        self.config, self.training = SimpleNamespace(block_size=16), True
        self.lm_head = SimpleNamespace(weight=torch.tensor(probs).log().t())
        self.transformer = lambda idx, **_: F.one_hot(idx, len(probs)).float()

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode


def test_hand_worked_table():
    model = Bigram([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 4, 1 / 4, 1 / 2]])
    items = [
        Item(0, 3, [2, 0], [[0], [1, 1], [2, 2, 2], [1, 1, 1, 1]], [1, 2, 3, 4]),
        Item(1, 1, [0, 2, 1], [[2, 0], [0, 0], [2, 2], [0, 1]], [2, 2, 2, 2]),
    ]
    by_hand = [
        # From 0. Ending 0 is likeliest, but its token costs ln 2 = 0.69, and those of ending 3
        # ln(256/27) / 4 = 0.56.
        [1 / 2, 1 / 4 * 3 / 4, 1 / 4 * 1 / 2 * 1 / 2, 1 / 4 * 3 / 4 * 3 / 4 * 3 / 4],
        # From 1. Endings 1 and 2 are equally likely, so the first of them is picked.
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
    """Else the tests below would prove nothing: drop or swap something, and the losses change by
    far more than 1e-3."""
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
        rows = [row for i, item in enumerate(items) for row in pack(i, item, 1024)]
        for budget in (1, 2048, 32768):
            plan = list(batches(rows, 1024, budget))
            first = sorted(row.slots[0] for part, _ in plan for row in part)
            assert first == [4 * i for i in range(n)]
            for part, T in plan:
                assert max(len(row.grid[0]) for row in part) <= T
                assert len(part) == 1 or len(part) * T <= budget


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
    theirs.set_attn_implementation("eager")  # would add True to the scores as 1.0
    with pytest.raises(ValueError, match="sdpa"):
        score(theirs, some, "cpu")


def test_padding_rows_of_the_vocabulary_count_as_the_model_has_them(items):
    model = sharp(vocab_size=V + 45)
    agree(items[:10], score(model, items[:10], "cpu"), reference(model, items[:10]))


def test_autocast_stays_close(model, items, expected):
    with torch.autocast("cpu", torch.bfloat16):
        losses = score(model, items, "cpu")
    assert 0 < (losses - expected).abs().max() < 0.05 * expected.max()
    assert losses.dtype == torch.float64


@pytest.mark.parametrize("block_size", [16, 60, 150])
def test_small_context_splits_rows_and_cuts_contexts_on_the_left(block_size, items):
    model = sharp(block_size)
    items = [item for item in items if max(map(len, item.endings)) <= block_size][:30]
    result = evaluate(model, items, "cpu")
    for row in (row for item in items for row in pack(0, item, block_size)):
        assert len(row.grid[0]) <= block_size and max(row.grid[1]) < block_size
    truncated = 0
    for item, losses in zip(items, result.losses):
        # The last token of an ending is not read.
        room = block_size - (max(map(len, item.endings)) - 1)
        agree([item], losses[None], reference(model, [item], room))
        truncated += len(item.context) > room
    assert result.truncated == truncated
    assert (result.truncated > 0) == (block_size < 150)


def test_ending_longer_than_the_context():
    with pytest.raises(UserError, match=r"^item 7 .* 9 tokens.* 8; leave it out$"):
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


def test_no_items_is_an_empty_table(model):
    assert score(model, [], "cpu").shape == (0, 4)  # a process may have no share


# -- data


GOOD = dict(ind=5, activity_label="A", ctx="The cat", endings=["a", "b", "c", "d"], label=2)


def bad_lines():
    yield "{", "is not JSON"
    yield b"\xff\xfe", "is not JSON"
    yield "[1]", "is not a JSON object"
    for key in ("ctx", "endings", "label"):
        yield {k: v for k, v in GOOD.items() if k != key}, f": {key} is missing"
    for label in (-1, 4, 1.0, "4", "-1", "two", "", True, None):
        yield GOOD | dict(label=label), ": label is missing or not one of 0, 1, 2 and 3"
    for endings in (["a"] * 3, ["a"] * 5, "abcd", None):
        yield GOOD | dict(endings=endings), ": endings is missing or does not hold four"
    for ending in ("", " \n", None, 4):
        yield GOOD | dict(endings=["a", "b", "c", ending]), ": an ending is no text, or empty"
    for ctx in ("", "  ", 3):
        yield GOOD | dict(ctx=ctx), ": ctx is missing, or no text, or empty"
    for ind in (None, "five", 1.5, [1]):
        yield GOOD | dict(ind=ind), ": ind is no whole number"
    yield {}, ": ctx .*, endings .*, label "  # all at once


@pytest.mark.parametrize("line, complaint", bad_lines())
def test_bad_line(tmp_path, line, complaint):
    path = tmp_path / "bad.jsonl"
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        load_items(path)
    sentence = rf"{re.escape(str(path))}, line 2 ?{complaint}[^\n]*; mend or drop the line"
    assert re.fullmatch(sentence, str(caught.value))


def test_bad_file(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for path, limit, complaint in (
        (empty, None, "nothing to score"),
        (tmp_path, None, "cannot be read"),
        (tmp_path / "misspelt.jsonl", None, "no such file"),
        (write(tmp_path / "good.jsonl", [GOOD]), 0, "nothing to score"),
    ):
        with pytest.raises(UserError, match=complaint):
            load_items(path, limit)


def test_harness_needs_and_checks_what_it_uses(tmp_path):
    for change, complaint in (
        (dict(activity_label=3), "activity_label"),
        (dict(endings=["a", "b", "c", "[step] "]), "an ending"),
        (dict(ctx_a="x", ctx_b=None), "ctx_b is missing, or no text"),
        (dict(ctx_a=["x"], ctx_b=""), "ctx_a is missing, or no text"),
    ):
        load_items(write(tmp_path / "bad.jsonl", [GOOD | change]))  # fine for the other style
        with pytest.raises(UserError, match=complaint):
            load_items(tmp_path / "bad.jsonl", style="harness")


def test_s13_numbers_may_be_text_as_in_the_hubs_export(tmp_path):
    (item,) = load_items(write(tmp_path / "one.jsonl", [GOOD | dict(ind="17", label="2")]))
    assert (item.index, item.label) == (17, 2)


def test_s5_what_only_one_encoder_can_encode_is_encoded(tmp_path):
    spaces = " " * 1_100_000  # of which tiktoken dies
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
    with pytest.warns(UserWarning, match="lacks ctx_a and ctx_b"):
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
    rows = [row for i, item in enumerate(items) for row in pack(i, item, 1024)]
    assert len(rows) == len(items)  # one row per item, nothing cut
    tokens = sum(len(ending) for item in items for ending in item.endings)
    assert sum(len(row.targets) for row in rows) == tokens


# -- download


@pytest.fixture
def server(monkeypatch):
    """A local stand-in for the official address: .body and .length are its answer, .hits counts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.hits += 1
            self.send_response(200 if server.body else 404)
            self.send_header("Content-Length", str(server.length or len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body = (json.dumps(GOOD) + "\n").encode() * hellaswag.N_ITEMS
    server.length, server.hits = None, 0
    server.url = f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl"
    monkeypatch.setattr(hellaswag, "URL", server.url)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_download_once_and_whole(server, tmp_path):
    path = tmp_path / "new/hellaswag_val.jsonl"
    assert len(load_items(path, 3)) == 3 and path.read_bytes() == server.body
    load_items(path, 3)
    assert server.hits == 1 and list(path.parent.iterdir()) == [path]


def test_download_that_went_wrong_leaves_nothing(server, tmp_path):
    whole = server.body
    for server.body, server.length in (
        (whole, len(whole) + 1),
        (whole[: len(whole) // 2], None),
        (b"<html>", None),
        (b"", None),
    ):
        with pytest.raises(UserError, match="cannot be downloaded"):
            load_items(tmp_path / "new/hellaswag_val.jsonl")
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_two_processes_download_once_and_fail_together(server, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(f"""
import os, pathlib, sys
import torch.distributed as dist
import hellaswag
dist.init_process_group("gloo")
hellaswag.URL = "{server.url}"
folder = pathlib.Path("{tmp_path}")
found = len(hellaswag.load_items(folder / "hellaswag_val.jsonl", 5))
hellaswag.URL += "x"
try:
    hellaswag.load_items(folder / "other/hellaswag_val.jsonlx")
except hellaswag.UserError as error:
    (folder / f"rank{{os.environ['RANK']}}").write_text(f"{{found}} {{error}}")
dist.destroy_process_group()
""")
    answer = server.RequestHandlerClass.do_GET

    def do_GET(handler):
        return handler.send_error(404) if handler.path.endswith("x") else answer(handler)

    server.RequestHandlerClass.do_GET = do_GET
    run(script, processes=2, env={"PYTHONPATH": str(hellaswag.Path(hellaswag.__file__).parent)})
    one, two = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert server.hits == 1 and one == two and one.startswith("5 ") and "404" in one


# -- command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory as save_pretrained and checkpoints leave it."""
    directory = tmp_path_factory.mktemp("saved") / "step_00250"
    sharp(vocab_size=50257).save_pretrained(directory)
    return directory


def last_line(done):
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def one(saved, data, tmp_path_factory):
    """What one run printed, and the file that it wrote."""
    path = tmp_path_factory.mktemp("out") / "new/one.json"
    args = "--model", saved, "--data", data, "--limit", 41, "--device", "cpu", "--json", path
    return run("hellaswag.py", *args), path


def test_the_command_line_is_an_independent_witness(one, saved, data):
    """transformers' model there, ours here: the same picks and accuracy, losses to 1e-4."""
    done, path = one
    items, ours = load_items(data, 41), GPT.from_pretrained(saved)
    result = evaluate(ours, items, "cpu")
    assert last_line(done) == str(result)
    assert "acc_norm=" in done.stderr  # the bar has the running accuracy
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


def test_s6_a_target_that_cannot_be_is_refused_before_the_work(saved, data, tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "load_items", lambda *args: pytest.fail("it began"))
    (tmp_path / "file").write_text("mine")
    for path, why in ((tmp_path, "it is a folder"), (tmp_path / "file/x.json", "File exists")):
        with pytest.raises(SystemExit, match=rf"cannot be written \({why}\); give another --json"):
            scored(saved, data, "--json", path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_s6_the_result_is_printed_before_it_is_written(saved, data, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "x.json").write_text("of an earlier run")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        SystemExit, match="x.json cannot be written .No space left on device.; give"
    ):
        scored(saved, data, "--device", "cpu", "--json", tmp_path / "x.json")
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 acc: ")
    assert (tmp_path / "x.json").read_text() == "of an earlier run"


def test_s6_what_is_no_regular_file_is_written_in_place(saved, data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("real/file.json")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    for name in ("pipe", "link.json", "link.json"):
        scored(saved, data, "--device", "cpu", "--json", tmp_path / name)
    reader.join(10)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link.json").is_symlink()
    assert read == [(tmp_path / "real/file.json").read_text()] and read[0].count("\n") == 3
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file.json", "link.json", "pipe", "real"]


def test_compare_finds_no_difference_between_equal_models(one):
    done = run("hellaswag.py", "--compare", one[1], one[1])
    expected = "B - A: +0.0000, 95% interval +0.0000 to +0.0000 (paired bootstrap)"
    assert last_line(done) == expected


def test_compare_by_hand(tmp_path):
    def records(right):
        return [dict(index=i, label=1, pick_norm=int(r)) for i, r in enumerate(right)]

    a = write(tmp_path / "a.json", records([1] * 20 + [0] * 80))
    b = write(tmp_path / "b.json", records([1] * 10 + [0] * 10 + [1] * 30 + [0] * 50))
    text = hellaswag.compare(a, b)
    parts = ["a.json acc_norm: 0.2000", "b.json acc_norm: 0.4000"]
    for part in (*parts, "only A is right on 10, only B on 30"):
        assert part in text
    pattern = r"B - A: \+0\.2000, 95% interval (\S+) to (\S+) \(paired bootstrap\)"
    low, high = map(float, re.search(pattern, text).groups())
    stderr = math.sqrt((10 + 30) / 100 - 0.2**2) / math.sqrt(100)  # of 100 values in -1, 0, 1
    assert abs(low - (0.2 - 1.96 * stderr)) < 0.011 and abs(high - (0.2 + 1.96 * stderr)) < 0.011

    for broken in (records([1] * 99), [{"x": 1}], []):
        with pytest.raises(UserError):
            hellaswag.compare(a, write(tmp_path / "c.json", broken))
    with pytest.raises(UserError, match="no.json"):
        hellaswag.compare(a, tmp_path / "no.json")


def test_mistakes_are_one_sentence(saved, data, tmp_path, capsys):
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    official = tmp_path / "hellaswag_val.jsonl"
    args = ["--model", saved, "--data", official]
    done = run("hellaswag.py", *args, check=False, env=offline | {"no_proxy": ""})
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("hellaswag.py: ") and "cannot be downloaded" in done.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text("{}")  # and no weights
    absurd = tmp_path / "absurd"
    absurd.mkdir()
    (absurd / "config.json").write_text(json.dumps(dict(n_layer=10**9)))
    for model, sentence in (
        (tmp_path / "none", "none: no such directory"),
        (tmp_path, "cannot be loaded"),
        (absurd, "choose a smaller model"),
    ):
        with pytest.raises(SystemExit) as caught:
            hellaswag.main(["--model", str(model), "--data", str(data), "--device", "cpu"])
        said = caught.value.code
        assert said.startswith("hellaswag.py: ") and sentence in said and "\n" not in said


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
