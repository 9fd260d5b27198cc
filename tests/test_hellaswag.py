"""HellaSwag's scores are those of its definition, of transformers and of lm-evaluation-harness,
however examples are batched and shared; bad examples, models and files are one sentence."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import log_of, run, train
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hellaswag
from fineweb import UserError, gpt2_tokenizer
from hellaswag import Item, Result, compare, evaluate, load_gpt2, load_items, pack, picks, score
from train_gpt2 import GPT, GPTConfig, save_hugging_face

ASCII = SimpleNamespace(encode=lambda text: np.frombuffer(text.encode("ascii", "ignore"), np.uint8))
GOOD = {"activity_label": "A", "ctx": "A cat", "endings": ["a", "b", "c", "d"], "label": 2}


def made_records(n):
    """Examples of random words, with all that lm-evaluation-harness changes."""
    words = "a cat the dog [x] under. [title] runs then  quickly Paris jumps, and over 7 café"
    words, rng = words.split(" "), np.random.default_rng(0)
    records = []
    for i in range(n):
        a, b, *endings = ["the " + " ".join(rng.choice(words, 3 + i % 7)) for _ in range(6)]
        record = {"ctx": f"{a} {b}", "ctx_a": a, "ctx_b": b, "endings": endings, "label": i % 4}
        records.append({"ind": 3 * i, "activity_label": "Sports"} | record)
    return records


def made_items(n):
    return [hellaswag.encode(i, r, "completion", ASCII) for i, r in enumerate(made_records(n))]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sharp(block_size=256):
    """A random model whose losses depend strongly on each token and its position."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size=128, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


@torch.no_grad()
def definition(model, items, room=10**9):
    """The losses of each ending alone, after the last `room` tokens of its context, in float64."""
    model.double()
    table = []
    for item in items:
        for ending in item.endings:
            ids = torch.tensor([item.context[-room:] + ending])
            log_probs = F.log_softmax(model(ids[:, :-1])[0, -len(ending) :], dim=-1)
            table.append(-sum(log_probs[i, token] for i, token in enumerate(ending)))
    model.float()
    return torch.stack(table).view(-1, 4)


def agree(items, losses, expected):
    assert (losses - expected).abs().max() < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(picks(items, losses), picks(items, expected)))


def test_losses_and_accuracies_are_those_worked_out_by_hand(monkeypatch):
    def one_hot(model, idx, positions, mask):
        assert not model.training  # dropout would change a score
        return F.one_hot(idx, 3).float()

    monkeypatch.setattr(hellaswag, "hidden_states", one_hot)
    # After each of three tokens, the probabilities of the next one.
    bigrams = [[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 4, 1 / 4, 1 / 2]]
    model = torch.nn.Module()
    model.transformer = SimpleNamespace(wpe=SimpleNamespace(num_embeddings=16))
    model.lm_head = SimpleNamespace(weight=torch.tensor(bigrams).log().t())
    items = [
        Item(0, 3, [0], [[0], [1, 1], [2, 2, 2], [1, 1, 1, 1]], [1, 2, 3, 4]),
        Item(1, 1, [0, 2, 1], [[2, 0], [0, 0], [2, 2], [0, 1]], [2, 2, 2, 2]),
    ]
    by_hand = [
        # After 0. Ending 0 is the most likely, but its token has a loss of ln 2 = 0.69, and those
        # of ending 3 have a mean of ln(256/27) / 4 = 0.56.
        [1 / 2, 1 / 4 * 3 / 4, 1 / 4 * 1 / 2 * 1 / 2, 1 / 4 * 3 / 4 * 3 / 4 * 3 / 4],
        # After 1. Endings 1 and 2 are equally likely, so the first of them is the answer.
        [1 / 8 * 1 / 4, 1 / 8 * 1 / 2, 1 / 8 * 1 / 2, 1 / 8 * 1 / 4],
    ]
    result = evaluate(model, items, "cpu")
    expected = -torch.tensor(by_hand, dtype=torch.float64).log()
    torch.testing.assert_close(result.losses, expected, rtol=1e-6, atol=0)
    assert [pick.tolist() for pick in picks(items, result.losses)] == [[0, 1], [3, 1]]
    assert (result.acc, result.acc_norm, result.n) == (0.5, 1.0, 2)
    assert model.training  # again
    result = Result(0.2859, 0.2955, 10042, result.losses)  # sqrt(0.2955 * 0.7045 / 10042) = 0.00455
    assert str(result) == "10042 acc: 0.2859 acc_norm: 0.2955 ± 0.0046"


@pytest.mark.parametrize("token_budget", [1, 700, 10**6])
def test_packed_losses_equal_the_definition_at_any_budget(tmp_path, token_budget):
    model, items = sharp(), made_items(24)
    expected = definition(model, items)
    agree(items, score(model, items, "cpu", token_budget), expected)
    save_hugging_face(model, gpt2_tokenizer(), tmp_path)
    theirs = load_gpt2(tmp_path)
    theirs.set_attn_implementation("eager")  # which would add True to the scores as 1.0
    agree(items, score(theirs, items, "cpu", token_budget), expected)
    # The definition would notice a context that is read in another order.
    turned = [replace(item, context=item.context[::-1]) for item in items]
    assert (definition(model, turned) - expected).abs().max() > 0.5
    plan = hellaswag.batches(items, token_budget)
    shapes = [pack([items[i] for i in numbers])[0].shape[1:] for numbers in plan]
    assert all(B == 1 or B * T <= token_budget for B, T in shapes)
    assert shapes[0][1] == max(map(hellaswag.row_length, items))  # memory runs out at once or never


def test_the_docstrings_example_its_loop_and_the_picture_of_a_row_are_true():
    text = hellaswag.__doc__
    record = json.loads(re.search(r"^    (\{.*?\})$", text, re.M | re.S)[1])
    item = hellaswag.encode(0, record, "completion", ASCII)
    code = re.search(r"^    mean_losses = .*?\n\n", text, re.M | re.S)[0].replace("\n    ", "\n")
    names = {"item": item, "model": sharp(), "torch": torch, "F": F}
    exec(code.strip(), names)
    means = score(sharp(), [item], "cpu")[0] / torch.tensor(item.lengths)
    torch.testing.assert_close(torch.tensor(names["mean_losses"]).double(), means)
    assert item.label == 3 and names["answer"] == means.argmin()
    C, D, a, b, e, f, g = range(7)
    grid, scored = pack([Item(0, 0, [C, D], [[a, b], [e, f, g], [0], [0]], [1] * 4)])
    assert grid[:, 0, :5].tolist() == [[C, D, a, e, f], [0, 1, 2, 2, 3], [0, 0, 1, 2, 2]]
    assert scored[:, :5].tolist() == [[1, 2, 1, 3, 4], [a, b, e, f, g]]
    mask = hellaswag.attention_mask(grid[2, :, :5])[0, 0]
    drawn = re.findall(r"^ +[CDaef]    ([x.](?:  [x.])*)$", pack.__doc__, re.M)
    assert [[c == "x" for c in line.split()] for line in drawn] == mask.tolist()


def test_logits_as_large_as_openais_lose_little_in_half_precision(monkeypatch):
    """bfloat16 rounds logits near -100 by up to 0.25. Their mean is subtracted first."""
    torch.manual_seed(0)
    head, hidden, targets = 0.3 * torch.randn(5003, 64), torch.randn(300, 64), torch.arange(300)
    hidden[::2] = 4 * head[targets[::2]]  # every second target is almost certain
    head[:, 0] = -10.0
    hidden[:, 0] = 10.0 + 0.3 * torch.randn(300)
    logits = hidden.double() @ head.double().t()
    exact = F.cross_entropy(logits, targets, reduction="none")
    assert -110 < logits.median() < -90 and (exact < 1e-3).sum() > 100 and (exact > 1).sum() > 100
    model = SimpleNamespace(lm_head=SimpleNamespace(weight=head))
    monkeypatch.setattr(hellaswag, "hidden_states", lambda *args: hidden[None])
    grid, scored = torch.zeros(3, 1, 300, dtype=torch.int64), torch.stack([targets, targets])
    for dtype, most in ((torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.08)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses = hellaswag.token_losses(model, grid, scored)
        assert losses.dtype == torch.float32 and losses.min() >= 0
        assert (losses - exact).abs().max() < most, dtype


def test_a_short_context_keeps_the_last_tokens_before_the_longest_ending():
    model, items = sharp(block_size=64), made_items(21)
    assert pack([hellaswag.fit(item, 64) for item in items])[0].size(2) > 64  # a row may be longer
    for item, losses in zip(items, score(model, items, "cpu")):
        room = 64 - (max(map(len, item.endings)) - 1)  # an ending's last token is not read
        agree([item], losses[None], definition(model, [item], room))


@pytest.mark.parametrize("n, world_size", [(11, 2), (3, 5)])
def test_processes_share_the_examples_even_if_there_are_fewer(monkeypatch, n, world_size):
    def all_gather(result, share):
        assert torch.equal(share, shares[rank])
        result[:] = shares

    model, items = sharp(), made_items(n)
    expected = definition(model, items)
    shares = [score(model, items[rank::world_size], "cpu") for rank in range(world_size)]
    monkeypatch.setattr(dist, "all_gather_object", all_gather)
    for rank in range(world_size):
        agree(items, evaluate(model, items, "cpu", rank, world_size).losses, expected)


def test_a_loss_of_nan_is_refused_because_it_would_count_as_an_answer():
    model = sharp()
    model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"^HellaSwag example 0: its losses are \[nan, nan, nan, "):
        evaluate(model, made_items(3), "cpu")


BAD = [  # the second line of a file, or a change of a good one; words of the reason
    ("{", "JSONDecodeError"),
    ("{}", "KeyError: 'ctx'"),
    ({"label": 4}, "it has 4 endings and the label 4"),
    ({"endings": ["a"] * 3}, "it has 3 endings and the label 2"),
    ({"endings": ["a", "b", "c", " \n"]}, "ctx or an ending is empty"),
    ({"ctx": "é"}, "the tokenizer does not know its characters"),
]


@pytest.mark.parametrize("line, reason", BAD)
def test_a_bad_example_is_refused_with_its_line_and_the_reason(tmp_path, line, reason):
    line = json.dumps(GOOD | line) if isinstance(line, dict) else line
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    what = rf"bad.jsonl, line 2 is not an example \(.*{reason}.*\); correct or delete the line$"
    with pytest.raises(UserError, match=what):
        load_items(path, enc=ASCII)


def test_both_styles_clean_the_text_and_make_tokens_and_lengths_in_their_ways(tmp_path):
    ids, path = gpt2_tokenizer().tiktoken.encode_ordinary, tmp_path / "one.jsonl"
    endings = ["on  it.", "<|endoftext|>", "é", "far away"]
    record = GOOD | {"ctx": "The cat [title] sat ", "endings": endings, "ind": "17", "label": "2"}
    (item,) = load_items(write(path, [record]))
    assert (item.index, item.label, item.context) == (17, 2, ids("The cat [title] sat "))
    assert item.endings == [ids(" on  it."), ids(" <|endoftext|>"), ids(" é"), ids(" far away")]
    assert item.lengths == [len(ending) for ending in item.endings]
    record = GOOD | {"activity_label": "Baking", "ctx_a": "[header] How to bake [title] Mix it."}
    record |= {"ctx": "not used", "ctx_b": "the DOUGH  rises [step]"}
    record |= {"endings": [" Stir [substeps] it. ", "[step] Wait", "a  b   c", "café"]}
    (item,) = load_items(write(path, [record]), style="harness")
    # "[header] " and "[step]" go, " [title]" becomes ". ", double spaces become one, and the rest
    # of ctx_b becomes lower case.
    assert item.context == ids("Baking: How to bake. Mix it. The dough rises")
    # The first of the two spaces was the context's last.
    assert item.endings == [ids("  Stir it."), ids("   Wait"), ids("  a b  c"), ids("  café")]
    assert item.lengths == [len("Stir it."), len(" Wait"), len("a b  c"), len("café")]


def test_limit_is_spread_over_the_file(tmp_path):
    path = write(tmp_path / "ten.jsonl", [GOOD] * 10)
    assert [item.index for item in load_items(path, 4)] == [0, 2, 5, 7]  # the number of the line


def test_parquet_and_json_lines_give_the_same_items_whatever_their_names(tmp_path):
    records = made_records(6)
    as_on_the_hub = [record | {"label": str(record["label"]), "split": "val"} for record in records]
    table, lines = tmp_path / "table.jsonl", write(tmp_path / "lines.parquet", records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_on_the_hub), table)
    for style in ("completion", "harness"):
        assert load_items(table, style=style) == load_items(lines, style=style)


def test_only_the_default_file_is_downloaded_and_at_the_pinned_commit(tmp_path, monkeypatch):
    def download(repo, file, repo_type, revision, local_dir):
        assert (repo, repo_type, local_dir) == ("Rowan/hellaswag", "dataset", "hellaswag")
        assert re.fullmatch("[0-9a-f]{40}", revision)
        (tmp_path / local_dir / file).parent.mkdir(parents=True)
        write(tmp_path / local_dir / file, [GOOD] * 3)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=r"^other.jsonl cannot be read \(No such file"):
        load_items("other.jsonl")
    assert len(load_items()) == len(load_items()) == 3  # the second time, mkdir would fail


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_have_rank_0s_examples_or_none(tmp_path, monkeypatch, capsys, rank):
    def broadcast(result):
        sent.append(result[0])
        result[0] = result[0] if rank == 0 else "what rank 0 sent"

    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    good, missing = write(tmp_path / "good.jsonl", [GOOD]), tmp_path / "missing.jsonl"
    pairs = [(good, 64), (good, 1), (missing, 64)]
    found = [hellaswag.items_or_none(*pair, ASCII) for pair in pairs]
    if rank == 0:
        assert found == sent == [load_items(good, enc=ASCII), None, None]
        too_long, unreadable = capsys.readouterr().out.splitlines()
        assert "warning: HellaSwag is off: example 0 has an ending of 2 tokens, but" in too_long
        assert f"warning: HellaSwag is off: {missing} cannot be read (" in unreadable
    else:
        assert found == ["what rank 0 sent"] * 3 and capsys.readouterr().out == ""


def command_line(*args):
    hellaswag.main([*map(str, args), "--device", "cpu"])


def test_the_command_line_is_an_independent_witness(saved, tmp_path):
    """transformers' model in another process, and ours here: the same losses and answers."""
    data, path = write(tmp_path / "data", made_records(15)), tmp_path / "new/one.json"
    args = ["--model", saved[1], "--data", data, "--limit", 9, "--device", "cpu", "--json", path]
    done = run("hellaswag.py", *args, env={"PYTHONIOENCODING": "ascii"})  # which has no ±
    items = load_items(data, 9)
    result = evaluate(GPT.from_pretrained(saved[1]), items, "cpu")
    assert done.stdout.splitlines()[-1] == str(result).replace("±", "?")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    agree(items, torch.tensor([r.pop("losses") for r in records]).double(), result.losses)
    answers = zip(items, *[pick.tolist() for pick in picks(items, result.losses)])
    names = ["index", "label", "style", "lengths", "pick", "pick_norm"]
    expected = [[i.index, i.label, "completion", i.lengths, *pair] for i, *pair in answers]
    assert records == [dict(zip(names, values)) for values in expected]


def test_lm_evaluation_harness_gives_the_same_accuracies(saved, tmp_path, monkeypatch):
    models = pytest.importorskip("lm_eval.models.huggingface")
    import datasets
    from lm_eval import simple_evaluate

    records = made_records(24)
    items = load_items(write(tmp_path / "items.jsonl", records), style="harness")
    ours = evaluate(load_gpt2(saved[1]), items, "cpu")
    data = datasets.Dataset.from_list([r | {"label": str(r["label"])} for r in records])
    splits = datasets.DatasetDict(train=data, validation=data)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **flags: splits)
    model = models.HFLM(str(saved[1]), device="cpu", batch_size=4)
    found = simple_evaluate(model, tasks=["hellaswag"], bootstrap_iters=0)
    theirs = [found["results"]["hellaswag"][name] for name in ("acc,none", "acc_norm,none")]
    assert theirs == pytest.approx([ours.acc, ours.acc_norm])


def test_a_run_logs_the_accuracy_that_the_command_line_finds(shards, tmp_path, capsys):
    flags = ["--hellaswag_every", 4, "--hellaswag_data"]
    train(shards, tmp_path / "out", *flags, shards / "examples.jsonl")
    args = ["--model", tmp_path / "out/step_00008", "--data", shards / "examples.jsonl"]
    command_line(*args, "--json", tmp_path / "json")
    hella = log_of(tmp_path / "out")["hella"]
    assert list(hella) == [0, 4, 8]
    assert f" acc_norm: {hella[8]:.4f} ±" in capsys.readouterr().out.splitlines()[-1]
    record = json.loads((tmp_path / "json").read_text().splitlines()[0])
    assert record["lengths"] == [12, 9, 8, 2]  # bytes, by the tokenizer beside the weights
    done = train(shards, tmp_path / "without", *flags, tmp_path / "missing")
    assert done.stdout.count("warning: HellaSwag is off: ") == 1
    assert "hella" not in log_of(tmp_path / "without")


def test_the_result_is_printed_before_a_file_that_cannot_be_written(saved, tmp_path, capsys):
    data = write(tmp_path / "data", made_records(3))
    args = ["--model", saved[1], "--data", data, "--json"]
    with pytest.raises(SystemExit, match="2"):
        command_line(*args, data / "x.json")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("3 acc: ")
    assert err.splitlines()[-1].startswith(f"hellaswag.py: {data}/x.json cannot be written (")
    with pytest.raises(SystemExit, match="2"):
        command_line(*args, tmp_path)  # a mistake that is found before the work
    sentence = f"--json {tmp_path} is a directory; name a file"
    assert capsys.readouterr() == ("", f"hellaswag.py: {sentence}\n")


def test_what_is_no_gpt2_is_refused(tmp_path):
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "llama")
    GPT2LMHeadModel(GPT2Config(**shape)).bfloat16().save_pretrained(tmp_path / "gpt2")
    assert load_gpt2(tmp_path / "gpt2").dtype == torch.float32
    path = tmp_path / "gpt2/config.json"
    settings = json.loads(path.read_text())
    for folder, changes, words in (
        ("gpt2", {"n_layer": 3}, "12 tensors are missing, .*, such as transformer.h.2.attn.c_attn"),
        ("gpt2", {"n_layer": 1}, "11 tensors are .*unknown .*, such as transformer.h.1.attn."),
        ("gpt2", {"n_embd": 48}, "28 tensors .* another shape, such as .'transformer.h.0.attn."),
        ("llama", {}, "tensors are missing, .*; give the directory of a GPT-2"),
    ):
        path.write_text(json.dumps(settings | changes))
        with pytest.raises(UserError, match=words):
            load_gpt2(str(tmp_path / folder))


def answers(path, right, style="completion"):
    return write(path, [{"index": 0, "label": 1, "pick_norm": r, "style": style} for r in right])


def test_compare_prints_the_paired_interval_worked_out_by_hand(tmp_path, capsys):
    a = answers(tmp_path / "a", [1] * 20 + [0] * 80)
    b = answers(tmp_path / "b", [1] * 10 + [0] * 10 + [1] * 30 + [0] * 50)
    command_line("--compare", a, b)
    # 100 values, of which 10 are -1 and 30 are +1: their mean is 0.2, their variance 0.4 - 0.2**2,
    # and 1.96 * sqrt(0.36 / 100) is 0.1176.
    assert capsys.readouterr().out.splitlines() == [
        f"A {a} acc_norm: 0.2000 (style completion)",
        f"B {b} acc_norm: 0.4000 (style completion)",
        "100 examples: only A is right on 10, only B on 30",
        "B - A: +0.2000, 95% interval +0.0824 to +0.3176 (paired, normal approximation)",
    ]


def test_compare_refuses_other_styles_examples_and_files_and_says_that_a_style_is_unknown(tmp_path):
    a, b = answers(tmp_path / "a", [1, 0]), answers(tmp_path / "b", [1, 0], "harness")
    for records, words in (
        (b, "a has style completion, and .*/b has style harness; score both models in the same"),
        (answers(tmp_path / "short", [1]), "do not hold the same examples; use the same --data"),
        (write(tmp_path / "other", [{"x": 1}]), "other is not a file that --json wrote"),
    ):
        with pytest.raises(UserError, match=words):
            compare(a, records)
    old = write(tmp_path / "old", [{"index": 0, "label": 1, "pick_norm": 1}] * 2)
    for pair in ((a, old), (old, b), (old, old)):
        warning, *lines = compare(*pair).splitlines()
        assert warning.startswith("warning: ") and "unknown style" in warning
        assert f"{old} acc_norm: 1.0000 (style unknown)" in "\n".join(lines)
