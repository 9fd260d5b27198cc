"""GPT-2's ids are those of tiktoken and transformers. Any other tokenizer keeps its ids, from the
folder of weights or shards to checkpoints and samples."""

import hashlib
import json
import random

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import fineweb
from conftest import QUIET, SHARED, STEPS, refused, run_here
from fineweb import EOT, VOCAB_SIZE, UserError, gpt2_tokenizer, load_tokenizer
from test_shards import TEXTS, make, refusal, tokens_of, write

END = "<|endoftext|>"
TEXT = f"Hello, I'm a language model, {END} and naïve 東京 🙂\n"


def trained(pre_tokenizer, decoder, end):
    """A small tokenizer that has learned some words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = dict(vocab_size=400, special_tokens=[end], show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator([TEXT, *TEXTS], trainer)
    return tokenizer


def byte_level(end=END):
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), end)


def numbers(n):
    """A tokenizer with n tokens: 0, 1, ..., n - 2 and <|endoftext|>."""
    vocab = {str(i): i for i in range(n - 1)} | {END: n - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def put(folder, tokenizer, **settings):
    """Write tokenizer.json and, if there are settings, tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def put_ids(folder, ids):
    folder.mkdir(exist_ok=True)
    for name in ("x_train_1.npy", "x_val_0.npy"):
        np.save(folder / name, np.array(ids, np.uint16))
    return folder


def weights(folder, rows):
    """A small random GPT-2 as transformers saves it."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=rows, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_ids_are_those_of_tiktoken_and_transformers(tmp_path):
    """For every character of Unicode, in several places, and for random strings. (transformers is
    slow, so it gets 4,000 texts, with the characters up to the emoji.)"""
    r = random.Random(0)
    often = [*" \n\t'\u3000Ⅷ中🙂", "  ", "'s", "'ll", "the", END]
    alphabet = [*map(chr, range(0x250)), *20 * often]
    code_points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    parts = [code_points[i : i + 64] for i in range(0, len(code_points), 64)]
    texts = ["".join(r.choices(alphabet, k=r.randint(1, 40))) for _ in range(20_000)]
    texts = ["".join(f"a{c}1 {c}!" for c in part) for part in parts] + texts + ["", "a" * 3000]
    enc = gpt2_tokenizer()
    ids = [enc.encode(text).tolist() for text in texts]
    assert ids == [enc.tiktoken.encode_ordinary(text) for text in texts]
    assert [enc.decode(row) for row in ids] == texts
    enc.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(texts[:2000] + texts[-2000:], split_special_tokens=True)["input_ids"]
    assert ids[:2000] + ids[-2000:] == expected
    assert theirs(END)["input_ids"] == [enc.eot] and enc.n_vocab == len(theirs)


@pytest.mark.skipif(not (SHARED / "tiktoken").exists(), reason="needs OpenAI's two files")
def test_tokens_are_those_that_tiktoken_downloads(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    both = tiktoken.get_encoding("gpt2"), gpt2_tokenizer().tiktoken
    theirs, ours = [[e.decode_single_token_bytes(i) for i in range(VOCAB_SIZE)] for e in both]
    assert theirs == ours and both[0].encode_ordinary(TEXT) == both[1].encode_ordinary(TEXT)


def test_a_wrong_fast_tokenizer_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb.GPT2Tokenizer, "encode", lambda self, text: np.array([1, 2]))
    done = make(write(tmp_path / "x.jsonl", ["one two"]), tmp_path / "out", check=False)
    assert "x.jsonl: gigatoken and tiktoken differ on 'one two'" in refusal(done)


@pytest.mark.parametrize("form", ["newer", "older", "[PAD]", "chat template"])
def test_gpt2s_tokenizer_is_recognized_and_what_was_added_is_kept(tmp_path, form):
    vocab, merges = fineweb.read_vocabulary()
    theirs = GPT2Tokenizer(vocab, [tuple(merge.split()) for merge in merges])
    theirs.chat_template = "{{ messages }}" if form == "chat template" else None
    theirs.add_tokens([form] if form == "[PAD]" else [])
    theirs.save_pretrained(weights(tmp_path, rows=len(theirs)))
    if form == "older":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    enc = load_tokenizer(tmp_path)
    assert (enc is gpt2_tokenizer()) == (form in ("newer", "older"))
    assert enc.encode(TEXT).tolist() == gpt2_tokenizer().encode(TEXT).tolist()
    assert enc.eot == EOT and enc.n_vocab == len(theirs)
    enc.save(weights(tmp_path / "saved", rows=len(theirs)))
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == theirs.get_vocab() and again.chat_template == theirs.chat_template


SENTENCEPIECE = trained(pre_tokenizers.Metaspace(), decoders.Metaspace(), "</s>")
CHARACTERS = Tokenizer.from_str(fineweb.character_tokenizer(TEXT.replace(END, "")))
OTHERS = {  # a tokenizer and its settings; the prompt
    "no settings": (byte_level(), {}, "Hello, a"),  # AutoTokenizer would drop its spaces
    "SentencePiece": (SENTENCEPIECE, {"eos_token": "</s>", "bos_token": "</s>"}, "Hello, a"),
    "characters": (CHARACTERS, {}, "Hello, a"),
    "as many ids as GPT-NeoX": (numbers(50277), {}, "5 50275 7"),
}
RUN = [*STEPS, *QUIET, *"--seq_len 32 --micro_batch_size 4 --dtype float32 --device cpu".split()]
SIZES = "--n_layer 1 --n_head 2 --n_embd 16".split()


@pytest.mark.parametrize("place", ["weights", "shards"])
@pytest.mark.parametrize("case", OTHERS)
def test_a_tokenizer_stays_with_its_ids(tmp_path, case, place):
    """In checkpoints, as transformers reads them, and in samples, before and after a resume."""
    tokenizer, settings, text = OTHERS[case]
    ids, n = tokenizer.encode(text).ids, tokenizer.get_vocab_size()
    put(tmp_path / place, tokenizer, **settings)
    model = ["--init_from", weights(tmp_path / place, n)] if place == "weights" else SIZES
    shards, out = put_ids(tmp_path / "shards", ids * 200), tmp_path / "out"
    run_here(*RUN, *model, "--data_dir", shards, "--out_dir", out, "--max_steps", 1)
    flags = ["--max_steps", 2, "--sample_every", 2, "--sample_tokens", 8, "--prompt", text]
    done = run_here("--resume", "--out_dir", out, *flags)
    assert done.stdout.count(f"\n> {text}") == 4
    for folder in (out / "step_00001", out / "step_00002"):
        enc, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        assert enc.encode(text).tolist() == ids and enc.decode(ids) == tokenizer.decode(ids) == text
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        config = json.loads((folder / "config.json").read_text())
        assert config["eos_token_id"] == enc.eot == theirs.eos_token_id
        assert config["vocab_size"] == enc.n_vocab == n


def test_shards_without_their_tokenizer_are_refused(tmp_path):
    shards = put_ids(tmp_path / "shards", range(50_100, 50_400))
    done = run_here(*RUN, *SIZES, "--data_dir", shards, "--out_dir", tmp_path / "x", check=False)
    refused(done, f"only {VOCAB_SIZE} tokens; put the tokenizer.json of the shards into {shards}")
    path = write(tmp_path / "x.jsonl", ["one"])
    make(path, tmp_path / "chars", tokenizer="char")
    (tmp_path / "chars/tokenizer.json").unlink()
    with pytest.raises(UserError, match="chars lacks the tokenizer.json of its shards"):
        fineweb.open_tokens(tmp_path / "chars", "train")
    done = make(path, put(tmp_path / "other", byte_level()), check=False)
    assert "has shards or a tokenizer, but no manifest" in refusal(done)


GIVEN = {  # a tokenizer.json, its settings; the token before a document, or what the sentence says
    "eos": (byte_level(), {"eos_token": {"content": "a"}, "bos_token": "b"}, "a"),
    "bos": (byte_level(), {"eos_token": None, "bos_token": "b"}, "b"),
    "unknown": (numbers(9), {"eos_token": "unknown"}, END),
    "no end": (byte_level("</s>"), {}, "tokenizer_config.json names no eos_token"),
    "too large": (numbers(70_000), {}, "has 70,000 ids, and only 65,536 fit into a shard"),
}


@pytest.mark.parametrize("case", GIVEN)
def test_shards_are_made_with_a_given_tokenizer_or_it_is_refused(tmp_path, case):
    tokenizer, settings, expected = GIVEN[case]
    given, out, path = tmp_path / "given", tmp_path / "out", write(tmp_path / "x.jsonl", ["a", "b"])
    put(given, tokenizer, **settings)
    done = make(path, out, check=False, tokenizer=given / "tokenizer.json")
    if end := tokenizer.token_to_id(expected):
        ids = [[end, *tokenizer.encode(text).ids] for text in ("a", "b")]
        assert sum(tokens_of(out), []) == sum(ids, [])
    else:
        assert expected in refusal(done)
        make(path, out)  # nothing was made, so the folder is used
    if case == "too large":
        assert load_tokenizer(given).encode("69998 1").tolist() == [69998, 1]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_characters_have_ids_in_the_order_of_unicode(tmp_path, suffix):
    texts = ["née 東\n", f"🙂 {END} ab\n"]
    path = tmp_path / f"x.{suffix}"
    if suffix == "txt":
        path.write_text(f"{END}\n".join(texts))
    else:
        write(path, [None, *texts, ""])
    make(path, tmp_path / "out", tokenizer="char", workers=1)
    tokens = sorted(set("".join(texts)))
    expected = [[len(tokens), *map(tokens.index, text)] for text in texts]
    assert sum(tokens_of(tmp_path / "out"), []) == sum(expected, [])
    enc, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert enc.n_vocab == len(theirs) == len(tokens) + 1 and enc.eot == theirs.eos_token_id
    for other in (enc, gpt2_tokenizer()):  # what is no token is dropped
        assert other.decode([*other.encode(texts[0]).tolist(), 60_000]) == texts[0]
    enc.backend = None  # the tokenizers library would take 120 bytes of memory for a character
    ids = theirs(texts[0] + "ß", split_special_tokens=True)["input_ids"]  # ß is unknown
    assert enc.encode(texts[0] + "ß").tolist() == ids and len(ids) == len(texts[0])


def test_shards_of_characters_that_an_older_version_made_are_used(tmp_path):
    path, out = tmp_path / "x.txt", tmp_path / "out"
    path.write_text("abba" * 5)
    make(path, out, tokenizer="char")
    written = b"".join(p.read_bytes() for p in sorted(out.iterdir()) if "manifest" not in p.name)
    assert hashlib.sha256(written).hexdigest().startswith("518a909849517e0c")  # what it wrote
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["chunks"]
    manifest |= {"times": [0], "chunk_size": 4194304, "large_row_group": 67108864}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "nothing to do" in make(path, out, tokenizer="char").stdout
    assert fineweb.verify(out) and len(fineweb.open_tokens(out, "train")) == 19
    (out / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    assert "settings (chunks)" in refusal(make(path, out, tokenizer="char", check=False))
