"""A model knows its tokenizer: the files that lie with weights, or beside shards, travel through
checkpoints to samples, HellaSwag, hellaswag.py, and other programs."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import QUIET, STEPS, TINY, refused, run, run_here, write_shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import fineweb
import hellaswag
from fineweb import EOT, VOCAB_SIZE, read_tokenizer, tokenizer, tokenizer_of
from train_gpt2 import GPT, GPTConfig

TEXT = "Hello, I'm a language model, <|endoftext|> and naïve 東京 🙂\n"


def small_tokenizer(folder, size=280):
    """A tokenizer.json of another tokenizer, with `size` tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["Hello, a language model learns another language " * 20], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return made


def shuffled_tokenizer():
    """{file: text} of a tokenizer with GPT-2's 50,257 tokens under other ids."""
    ids, merges = fineweb.read_vocabulary()
    ids = {token: id if id == EOT else id * 7919 % EOT for token, id in ids.items()}
    assert len(set(ids.values())) == VOCAB_SIZE
    whole = json.loads(fineweb.gpt2_files(64)["tokenizer.json"])
    whole["model"]["vocab"] = ids
    return {
        "tokenizer.json": json.dumps(whole),
        "vocab.json": json.dumps(ids),
        "merges.txt": "\n".join(["#version: 0.2", *merges]),
    }


def weights(folder, rows=VOCAB_SIZE, files={}):
    """A directory with a small random GPT-2, and with some files beside it."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=rows, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


TRAIN = [*STEPS, "--micro_batch_size", "4", "--hellaswag_every", "0", "--sample_every", "8"]
TRAIN += "--seq_len 32 --dtype float32 --device cpu --no-compile --sample_tokens 8".split()


def samples(done):
    return [line for line in done.stdout.splitlines() if line.startswith("> ")]


def same_tokenizer(folder, original):
    """Assert that transformers reads the same tokenizer from both folders."""
    theirs, expected = map(AutoTokenizer.from_pretrained, (folder, original))
    assert len(theirs) == len(expected) > 2
    assert theirs(TEXT)["input_ids"] == expected(TEXT)["input_ids"]


@pytest.mark.parametrize("form", (["tokenizer.json"], ["vocab.json", "merges.txt"]))
def test_samples_are_in_the_words_of_the_tokenizer_beside_the_weights(tmp_path, form):
    files = {name: text for name, text in shuffled_tokenizer().items() if name in form}
    folder = weights(tmp_path / "other", files=files)
    (tmp_path / "plain").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "plain")
    model = GPT.from_pretrained(folder)
    theirs = GPT2Tokenizer.from_pretrained(folder)
    prompt = theirs("Hello", return_tensors="pt")["input_ids"]
    ids = model.generate(prompt.repeat(4, 1), 8, seed=1337)[:, prompt.size(1) :]
    expected = [theirs.decode(row).replace("\ufffd", "") for row in ids.tolist()]
    flags = (
        "--sample_only --prompt Hello --sample_tokens 8 --device cpu --dtype float32 --init_from"
    )
    done = run_here(*flags.split(), folder)
    assert done.stdout == "".join(f"> Hello{text}\n" for text in expected)
    other = run_here(*flags.split(), tmp_path / "plain")  # GPT-2's own rows, and no tokenizer
    assert samples(other) and other.stdout != done.stdout


def test_a_tokenizer_travels_from_weights_through_checkpoints(tmp_path):
    folder = weights(
        tmp_path / "other", files={"tokenizer.json": shuffled_tokenizer()["tokenizer.json"]}
    )
    shards, out = write_shards(tmp_path / "shards"), tmp_path / "out"
    flags = [*TRAIN, "--data_dir", shards, "--out_dir", out]
    run_here(*flags, "--init_from", folder, "--max_steps", 4)
    same_tokenizer(out / "step_00004", folder)
    done = run_here("--resume", "--out_dir", out, "--max_steps", 8, "--sample_every", 4)
    same_tokenizer(out / "step_00008", folder)
    enc = tokenizer_of(GPT.from_pretrained(out / "step_00008"))
    assert enc.encode_ordinary("Hello") == read_tokenizer(folder).encode_ordinary("Hello")
    assert enc.encode_ordinary("Hello") != tokenizer().encode_ordinary("Hello")
    assert len(samples(done)) == 8
    GPT.from_pretrained(out / "step_00008").save_pretrained(tmp_path / "again")
    same_tokenizer(tmp_path / "again", folder)


def test_gpt2s_tokenizer_with_a_pad_token_is_kept(tmp_path):
    folder = weights(tmp_path / "padded", rows=VOCAB_SIZE + 1)
    ids, merges = fineweb.read_vocabulary()
    pairs = [tuple(merge.split()) for merge in merges]
    theirs = GPT2Tokenizer(ids, pairs)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(folder)
    shards, out = write_shards(tmp_path / "shards"), tmp_path / "out"
    flags = [*TRAIN, "--data_dir", shards, "--out_dir", out, "--init_from", folder]
    done = run_here(*flags, "--max_steps", 2)
    saved = AutoTokenizer.from_pretrained(out / "step_00002")
    assert saved.pad_token == "[PAD]" and saved.pad_token_id == VOCAB_SIZE
    assert saved("Hello")["input_ids"] == tokenizer().encode_ordinary("Hello")
    assert len(samples(done)) == 8
    assert GPT.from_pretrained(out / "step_00002").config.vocab_size == VOCAB_SIZE + 1


def test_a_tokenizer_beside_the_shards_is_the_models(tmp_path):
    shards, out = write_shards(tmp_path / "shards", vocab=280), tmp_path / "out"
    made = small_tokenizer(shards)
    done = run_here(*TINY, *TRAIN, "--data_dir", shards, "--out_dir", out, "--max_steps", 2)
    assert len(samples(done)) == 8 and "are off" not in done.stdout
    config = json.loads((out / "step_00002" / "config.json").read_text())
    assert config["vocab_size"] == made.get_vocab_size() == 280  # it follows from the tokenizer
    assert config["eos_token_id"] == made.token_to_id("</s>")
    theirs = AutoTokenizer.from_pretrained(out / "step_00002")
    assert theirs("Hello, a language")["input_ids"] == made.encode("Hello, a language").ids
    model = GPT.from_pretrained(out / "step_00002")
    ids = model.generate(torch.tensor([made.encode("Hello").ids] * 4), 8, seed=1337)
    expected = ["> " + made.decode(row).replace("\ufffd", "") + "\n" for row in ids.tolist()]
    found = run_here("--sample_only", "--init_from", out / "step_00002", "--prompt", "Hello",
                     "--sample_tokens", 8, "--device", "cpu", "--dtype", "float32")  # fmt: skip
    assert found.stdout == "".join(expected)


@pytest.mark.parametrize("rows", (280, 60000))
def test_without_a_tokenizer_there_are_ids_and_no_text_and_one_line_says_so(tmp_path, rows):
    shards, out = write_shards(tmp_path / "shards", vocab=280), tmp_path / "out"
    flags = [*TINY, *TRAIN, "--data_dir", shards, "--out_dir", out, "--vocab_size", rows]
    done = run_here(*flags, "--max_steps", 2, "--hellaswag_every", 1)
    assert not samples(done)
    warnings = [line for line in done.stdout.splitlines() if "HellaSwag" in line]
    assert len(warnings) == 1 and f"{rows} rows" in warnings[0]
    assert not (out / "step_00002" / "tokenizer.json").exists()
    assert json.loads((out / "step_00002" / "config.json").read_text())["vocab_size"] == rows
    refused(
        run_here("--sample_only", "--init_from", out / "step_00002", check=False), f"{rows} rows"
    )


def test_more_rows_than_gpt2s_are_allowed_if_the_manifest_names_its_tokenizer(tmp_path):
    fineweb.build_demo(tmp_path / "shards")
    flags = [*TINY, *TRAIN, "--data_dir", tmp_path / "shards", "--out_dir", tmp_path / "out"]
    done = run_here(*flags, "--vocab_size", 60000, "--max_steps", 2)
    assert len(samples(done)) == 8
    folder = tmp_path / "out" / "step_00002"
    assert read_tokenizer(folder) is tokenizer()
    model = GPT.from_pretrained(folder)
    assert model.config.vocab_size == 60000
    assert model.generate(torch.tensor([[EOT]]), 64, top_k=0).max() < VOCAB_SIZE


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_not_used(tmp_path):
    folder = weights(tmp_path / "few", rows=50)
    small_tokenizer(folder)
    done = run_here("--sample_only", "--init_from", folder, check=False)
    refused(done, "its tokenizer has 280 tokens, and the model has 50 rows")


def test_a_damaged_tokenizer_is_named(tmp_path):
    folder = weights(tmp_path / "damaged", files={"tokenizer.json": '{"model": '})
    refused(run_here("--sample_only", "--init_from", folder, check=False), "the tokenizer in")


def test_weights_have_another_tokenizer_than_the_shards(tmp_path):
    folder = weights(tmp_path / "other")
    (folder / "tokenizer.json").write_text(shuffled_tokenizer()["tokenizer.json"])
    fineweb.build_demo(tmp_path / "shards")
    flags = [*TRAIN, "--data_dir", tmp_path / "shards", "--out_dir", tmp_path / "out"]
    done = run_here(*flags, "--init_from", folder, "--max_steps", 2)
    assert "the shards have another tokenizer than the weights" in done.stdout
    same_tokenizer(tmp_path / "out" / "step_00002", folder)


ITEM = dict(ind=7, activity_label="Talk", ctx_a="Hello, a", ctx_b="model", ctx="Hello, a model")
ITEM |= dict(endings=["learns", "another language", "a", "Hello"], label=1)


@pytest.mark.parametrize("style", ("completion", "harness"))
def test_hellaswag_is_scored_in_the_models_own_tokens(tmp_path, style):
    made = small_tokenizer(tmp_path / "model")
    weights(tmp_path / "model", rows=280)
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM) + "\n")
    enc = tokenizer_of(hellaswag.load_gpt2(tmp_path / "model"))
    (item,) = hellaswag.load_items(tmp_path / "items.jsonl", style=style, enc=enc)
    context = ITEM["ctx"] if style == "completion" else "Talk: Hello, a Model"
    assert item.context == made.encode(context).ids
    assert item.endings == [made.encode(" " + ending).ids for ending in ITEM["endings"]]
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "items.jsonl", "--device", "cpu"]
    done = run("hellaswag.py", *flags, "--style", style, "--json", tmp_path / "r.json")
    assert done.stdout.splitlines()[-1].startswith("1 acc: ")
    model = GPT.from_pretrained(tmp_path / "model")
    ids = torch.tensor([item.context + item.endings[1]])
    loss = model(
        ids[:, :-1], ids[:, 1:].clone().index_fill(1, torch.arange(len(item.context) - 1), -100)
    )
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["losses"][1] == pytest.approx(loss.item() * len(item.endings[1]), rel=1e-4)


def test_hellaswag_refuses_a_model_without_a_tokenizer(tmp_path):
    weights(tmp_path / "model", rows=280)
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM) + "\n")
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "items.jsonl"]
    done = run("hellaswag.py", *flags, check=False)
    assert done.returncode == 2 and "no tokenizer.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_padded_vocabulary_of_another_tokenizer_is_never_sampled():
    model = GPT(GPTConfig(block_size=8, vocab_size=128, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = type("Enc", (), dict(n_vocab=65))()
    with torch.no_grad():
        model.lm_head.weight[65:] *= 1000
    assert model.generate(torch.zeros(4, 1, dtype=torch.int64), 32, top_k=0).max() < 65


def test_ids_above_gpt2s_are_sampled_where_the_tokenizer_has_them():
    model = GPT(GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = type("Enc", (), dict(n_vocab=50304))()
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE:] *= 1000
    ids = model.generate(torch.zeros(4, 1, dtype=torch.int64), 32, top_k=0)
    assert ids.max() >= VOCAB_SIZE
    np.testing.assert_array_less(ids, 50304)
