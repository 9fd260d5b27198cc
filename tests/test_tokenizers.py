"""A model knows its tokenizer: the files that lie with weights, or beside shards, travel through
checkpoints to samples, HellaSwag, hellaswag.py, and other programs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import STEPS, TINY, refused, run, run_here, write_shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import fineweb
import hellaswag
import train_gpt2
from fineweb import EOT, VOCAB_SIZE, read_tokenizer, tokenizer, tokenizer_of
from train_gpt2 import GPT, GPTConfig, check_batch, check_folders

TEXT = "Hello, I'm a language model, <|endoftext|> and naïve 東京 🙂\n"


def gpt2_file(folder, name):
    path = folder / f"gpt2_{name}"
    path.write_bytes(fineweb.gpt2_files(64)[name])
    return path


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
    flags = "--sample_only --prompt Hello --sample_tokens 8 --device cpu --dtype float32".split()
    found = run_here(*flags, "--init_from", out / "step_00002")
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
    assert "the shards were made with another tokenizer" in done.stdout
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


def test_a_tokenizer_in_a_form_that_is_not_read_is_kept_and_not_replaced_by_gpt2s(tmp_path):
    folder = weights(tmp_path / "other", files={"spiece.model": "…", "tokenizer_config.json": "{}"})
    flags = [*TRAIN, "--data_dir", write_shards(tmp_path / "shards"), "--out_dir", tmp_path / "out"]
    done = run_here(*flags, "--init_from", folder, "--max_steps", 2)
    assert not samples(done) and "samples and HellaSwag are off" in done.stdout
    saved = {path.name for path in (tmp_path / "out" / "step_00002").iterdir()}
    assert "spiece.model" in saved and "tokenizer.json" not in saved
    refused(run_here("--sample_only", "--init_from", folder, check=False), "no tokenizer.json")
    for name in ("spiece.model", "vocab.txt"):  # beside shards it does not set --vocab_size
        (tmp_path / "shards" / name).write_text("…")
    args, _ = train_gpt2.parse(["--data_dir", str(tmp_path / "shards")])
    assert args.vocab_size == 50304


def test_gpt2s_tokenizer_with_a_chat_template_is_kept(tmp_path):
    files = {name: content.decode() for name, content in fineweb.gpt2_files(64).items()}
    folder = weights(tmp_path / "chat", files=files | {"chat_template.jinja": "{{ messages }}"})
    assert read_tokenizer(folder) is not tokenizer()
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_pad_token_without_a_row_does_not_matter(tmp_path):
    """A token that was added to the tokenizer, but not to the weights, occurs in no text."""
    folder = weights(tmp_path / "padded")
    theirs = GPT2Tokenizer(
        *[str(gpt2_file(tmp_path, name)) for name in ("vocab.json", "merges.txt")]
    )
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(folder)
    model = GPT.from_pretrained(folder)
    assert model.config.vocab_size == VOCAB_SIZE < read_tokenizer(folder).n_vocab
    enc = tokenizer_of(model)
    assert enc.encode_ordinary("[PAD]") == tokenizer().encode_ordinary("[PAD]")
    assert fineweb.vocab_size_of(model) == VOCAB_SIZE
    model.save_pretrained(tmp_path / "saved")
    same_tokenizer(tmp_path / "saved", folder)


def test_openais_weights_on_shards_of_characters_are_a_warning(tmp_path):
    """The weights decide: without a file, 50,257 rows are of GPT-2's tokens."""
    folder, shards = weights(tmp_path / "gpt2"), write_shards(tmp_path / "shards", vocab=280)
    small_tokenizer(shards)
    flags = [*TRAIN, "--data_dir", shards, "--out_dir", tmp_path / "out", "--init_from", folder]
    done = run_here(*flags, "--max_steps", 2)
    assert "the shards were made with another tokenizer" in done.stdout
    assert read_tokenizer(tmp_path / "out" / "step_00002") is tokenizer()


def test_the_end_of_text_is_what_the_tokenizers_settings_say(tmp_path):
    small_tokenizer(tmp_path)
    assert read_tokenizer(tmp_path).eot_token == 0  # </s>
    for end in ("a", {"content": "a"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        enc = read_tokenizer(tmp_path)
        assert enc.eot_token == enc.encode_ordinary("a")[0] != 0


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


# -- shards of another tokenizer: fineweb.py --tokenizer


def build(source, out, *flags):
    """fineweb.py in this process. Returns its exit status."""
    try:
        fineweb.main(["--source", str(source), "--out", str(out), "--workers", "0", *flags])
    except SystemExit as error:
        return error.code
    return 0


def ids_of(folder):
    paths = sorted(fineweb.list_shards(folder), key=lambda path: path.stem[-6:])
    return np.concatenate([np.load(path) for path in paths]).tolist()


DOCUMENTS = ["Hello, a language\n", "naïve 🙂 <|endoftext|>\n", "another"]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def test_characters_have_ids_in_the_order_of_unicode(jsonl, tmp_path, capsys):
    assert build(jsonl, tmp_path / "out", "--tokenizer", "char") == 0
    characters = sorted(set("".join(DOCUMENTS)))
    end = len(characters)
    expected = []
    for text in DOCUMENTS:
        expected += [end, *map(characters.index, text)]
    assert ids_of(tmp_path / "out") == expected
    enc = read_tokenizer(tmp_path / "out")
    assert enc.n_vocab == end + 1 and enc.eot_token == end
    assert enc.decode(enc.encode_ordinary(DOCUMENTS[1])) == DOCUMENTS[1]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(DOCUMENTS[0])["input_ids"] == enc.encode_ordinary(DOCUMENTS[0])
    assert theirs.eos_token_id == end
    fineweb.verify(tmp_path / "out")
    assert "3 documents" in capsys.readouterr().out


def test_half_of_a_surrogate_pair_is_a_character_too(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert build(tmp_path / "text.jsonl", tmp_path / "out", "--tokenizer", "char") == 0
    assert ids_of(tmp_path / "out") == [3, 0, 2, 1]  # <|endoftext|>, a, U+FFFD, b


def test_any_tokenizer_json_makes_shards(jsonl, tmp_path):
    made = small_tokenizer(tmp_path / "given")
    flags = ["--tokenizer", str(tmp_path / "given"), "--shard_size", "10"]
    assert build(jsonl, tmp_path / "out", *flags) == 0
    end = made.token_to_id("</s>")
    expected = []
    for text in DOCUMENTS:
        expected += [end, *made.encode(text).ids]
    assert ids_of(tmp_path / "out") == expected and len(expected) > 30
    fineweb.verify(tmp_path / "out")
    # The same command by worker processes makes the same bytes.
    done = run("fineweb.py", "--source", jsonl, "--out", tmp_path / "two", "--workers", 1, *flags)
    assert ids_of(tmp_path / "two") == expected, done.stderr


def test_an_end_of_text_is_added_to_a_tokenizer_that_has_none(jsonl, tmp_path):
    made = Tokenizer(models.WordLevel({"Hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    assert build(jsonl, tmp_path / "out", "--tokenizer", str(tmp_path / "words.json")) == 0
    ids = ids_of(tmp_path / "out")
    assert ids[:2] == [2, 0] and ids.count(2) == len(DOCUMENTS)
    assert read_tokenizer(tmp_path / "out").eot_token == 2


def test_a_build_with_another_tokenizer_is_stopped_and_continued(jsonl, tmp_path, monkeypatch):
    flags = ["--tokenizer", "char", "--shard_size", "20"]
    assert build(jsonl, tmp_path / "whole", *flags) == 0
    written = []
    original = fineweb.ShardWriter.write

    def write(self, ids):
        original(self, ids)
        written.append(ids)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fineweb.ShardWriter, "write", write)
        assert build(jsonl, tmp_path / "out", *flags) == 130
    (tmp_path / "out" / "tokenizer.json").unlink()  # it is written again
    assert build(jsonl, tmp_path / "out", *flags) == 0
    assert ids_of(tmp_path / "out") == ids_of(tmp_path / "whole")


def test_the_settings_beside_a_given_tokenizer_count(jsonl, tmp_path):
    made = small_tokenizer(tmp_path / "given")
    (tmp_path / "given" / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    assert build(jsonl, tmp_path / "out", "--tokenizer", str(tmp_path / "given")) == 0
    enc = read_tokenizer(tmp_path / "out")
    assert enc.eot_token == made.token_to_id("a") == ids_of(tmp_path / "out")[0]
    assert enc.n_vocab == made.get_vocab_size()  # nothing was added
    old = tmp_path / "old"
    old.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (old / name).write_bytes(fineweb.gpt2_files(64)[name])
    assert build(jsonl, tmp_path / "out2", "--tokenizer", str(old)) == 0
    assert ids_of(tmp_path / "out2")[:2] == [EOT, tokenizer().encode_ordinary("Hello")[0]]


def test_what_a_stopped_build_left_is_not_taken_for_another_ones(jsonl, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "tokenize_all", stop)
        assert build(jsonl, tmp_path / "out", "--tokenizer", "char") == 130
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert build(jsonl, tmp_path / "out") == 0
    assert read_tokenizer(tmp_path / "out") is tokenizer()
    assert ids_of(tmp_path / "out")[0] == EOT


def test_a_build_that_cannot_write_its_tokenizer_continues_later(jsonl, tmp_path, monkeypatch):
    def fail(*_):
        raise fineweb.UserError("full")

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "hash_of_tokenizer", fail)
        assert build(jsonl, tmp_path / "out", "--tokenizer", "char") == 2
    assert build(jsonl, tmp_path / "out", "--tokenizer", "char") == 0
    fineweb.verify(tmp_path / "out")


def test_shards_and_their_tokenizer_must_fit(jsonl, tmp_path, capsys):
    out = tmp_path / "out"
    assert build(jsonl, out, "--tokenizer", "char") == 0
    small_tokenizer(tmp_path / "given")
    other = str(tmp_path / "given" / "tokenizer.json")
    for flags in ((), ("--tokenizer", other)):
        assert build(jsonl, out, *flags) == 2
        assert "was begun with" in capsys.readouterr().err
    assert build(jsonl, tmp_path / "new", "--tokenizer", "nowhere.json") == 2
    assert "--tokenizer nowhere.json cannot be read" in capsys.readouterr().err
    for text in ("{}", "no JSON", ""):
        (tmp_path / "wrong.json").write_text(text)
        assert build(jsonl, tmp_path / "new", "--tokenizer", str(tmp_path / "wrong.json")) == 2
        assert "cannot be used" in capsys.readouterr().err
    flags = ["--tokenizer", "char", "--rank", "0", "--world_size", "2"]
    assert build(jsonl, tmp_path / "new", *flags) == 2
    assert "reads all of the text" in capsys.readouterr().err
    shutil.copy(other, out / "tokenizer.json")
    with pytest.raises(fineweb.UserError, match="its tokenizer.json is missing or another one"):
        fineweb.open_tokens(out, "train")
    for path in [*fineweb.list_shards(out), out / "manifest.json"]:
        path.unlink()
    assert build(jsonl, out) == 2  # the file that was left would be taken for that of the shards
    assert "has a tokenizer.json but no manifest" in capsys.readouterr().err


def test_a_tokenizer_of_more_than_16_bits_is_refused(jsonl, tmp_path, capsys):
    words = {str(i): i for i in range(2**16)}  # <|endoftext|> would be one too many
    Tokenizer(models.WordLevel(words, unk_token="0")).save(str(tmp_path / "many.json"))
    assert build(jsonl, tmp_path / "out", "--tokenizer", str(tmp_path / "many.json")) == 2
    assert "it has 65,537 ids" in capsys.readouterr().err
    assert fineweb.list_shards(tmp_path / "out") == []


# -- what follows from the text


@pytest.mark.parametrize(
    "n_tokens, given, batch, seq_len",
    (
        (304_222, [], 32768, 1024),  # Shakespeare: nanoGPT's batch, 9.3 steps per epoch
        (7_939, [], 512, 512),
        (100, [], 16, 16),
        (10_245, [], 1024, 1024),  # the validation text, a ninth of it, holds a whole sequence
        (7_939, ["--micro_batch_size", "3"], 1536, 512),
        (7_939, ["--total_batch_size", "2048"], 2048, 512),
        (7_939, ["--seq_len=256"], 512, 256),
        (7_939, ["--seq-len", "1024"], 1024, 1024),
    ),
)
def test_finetunes_batch_follows_from_the_text(tmp_path, n_tokens, given, batch, seq_len):
    np.save(tmp_path / "x_train_1.npy", np.zeros(n_tokens, np.uint16))
    args, _ = train_gpt2.parse(["--finetune", "--data_dir", str(tmp_path), *given])
    assert (args.total_batch_size, args.seq_len) == (batch, seq_len)
    assert args.max_steps == -(-2 * n_tokens // batch)  # two epochs
    np.save(tmp_path / "x_val_0.npy", np.zeros(-(-n_tokens // 9), np.uint16))
    check_batch(args, 1)
    if n_tokens > 200 and seq_len < n_tokens // 9:
        check_folders(replace(args, out_dir=str(tmp_path / "out")))


def test_finetunes_batch_is_divided_among_processes(tmp_path, monkeypatch):
    np.save(tmp_path / "x_train_1.npy", np.zeros(7_939, np.uint16))
    monkeypatch.setenv("WORLD_SIZE", "4")
    args, _ = train_gpt2.parse(["--finetune", "--data_dir", str(tmp_path)])
    assert (args.total_batch_size, args.seq_len) == (2048, 512)  # the same sequences


def test_special_tokens_may_have_the_id_0(tmp_path):
    """Hugging Face's trainers begin with <s> or <pad>."""
    whole = json.loads(small_tokenizer(tmp_path).to_str())
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2}
    rest = (token for token in whole["model"]["vocab"] if token not in vocab)
    vocab |= {token: id for id, token in enumerate(rest, start=3)}
    whole["model"]["vocab"] = vocab
    whole["added_tokens"] = [fineweb.added_token(vocab[token], token) for token in list(vocab)[:3]]
    settings = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    files = {"tokenizer.json": whole, "tokenizer_config.json": settings}
    enc = fineweb.OtherTokenizer({name: json.dumps(x).encode() for name, x in files.items()})
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    assert fineweb.special_ids(enc) == ids


def test_another_text_in_the_same_folder_gets_its_own_characters(tmp_path):
    """In one process, as in a notebook."""
    for text in ("aaaa" * 200, "bcde" * 200):
        (tmp_path / "text.txt").write_text(text)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        source, out = str(tmp_path / "text.txt"), str(tmp_path / "out")
        fineweb.build(fineweb.Config(source, out=out, tokenizer="char", workers=0))
        enc, ids = read_tokenizer(out), fineweb.open_tokens(out, "train")[:20]
        assert enc.decode(ids.tolist()) in text


def test_a_rank_that_starts_again_leaves_the_tokenizer_to_the_others(tmp_path, monkeypatch):
    """Rank 1 was killed before its first shard. Its new start must not damage rank 0's part."""
    small_tokenizer(tmp_path / "given")
    for name in ("0.txt", "1.txt"):
        (tmp_path / name).write_text("Hello, a language model " * 200)
    parts = [
        fineweb.Config(
            str(tmp_path / "*.txt"),
            out=str(tmp_path / "out"),
            tokenizer=str(tmp_path / "given/tokenizer.json"),
            workers=0,
            rank=rank,
            world_size=2,
        )
        for rank in (0, 1)
    ]
    fineweb.build(parts[0])
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "tokenize_all", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fineweb.build(parts[1])
    fineweb.open_manifest(parts[1])
    assert read_tokenizer(tmp_path / "out").n_vocab == 280
    fineweb.build(parts[1])
    fineweb.verify(tmp_path / "out")


def test_the_other_form_of_a_tokenizer_is_saved_too(tmp_path):
    """Readers of both forms get the same ids, whichever form was given."""
    made = small_tokenizer(tmp_path / "new")
    (tmp_path / "old").mkdir()
    made.model.save(str(tmp_path / "old"))
    text = "Hello, a language model"
    expected = made.encode(text).ids
    for form in ("new", "old"):
        enc, out = read_tokenizer(tmp_path / form), tmp_path / f"{form}_saved"
        out.mkdir()
        fineweb.save_tokenizer(out, 64, enc)
        assert Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).ids == expected
        older = models.BPE.from_file(str(out / "vocab.json"), str(out / "merges.txt"))
        older = Tokenizer(older)
        older.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert older.encode(text).ids == expected


def test_characters_that_the_tokenizer_does_not_know_are_named(tmp_path):
    (tmp_path / "text.txt").write_text("ROMEO and Juliet. " * 400)
    source, out = str(tmp_path / "text.txt"), str(tmp_path / "out")
    fineweb.build(fineweb.Config(source, out=out, tokenizer="char", workers=0))
    folder = weights(tmp_path / "model", rows=len(set("ROMEO and Juliet. ")) + 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "out" / name, folder)
    flags = ["--sample_only", "--init_from", folder, "--device", "cpu", "--sample_tokens", 2]
    done = run_here(*flags, "--prompt", "ROM\u00c9O 日本")
    assert "warning: the model's tokenizer does not know \u00e9 日 本\n" in done.stdout
    assert "does not know" not in run_here(*flags, "--prompt", "ROMEO\t").stdout
