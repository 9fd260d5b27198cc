"""How fast is fineweb.py, compared with tiktoken alone, with the usual Pool.imap and with the
fineweb.py of another checkout, and how much memory does it take?

    python tests/bench_fineweb.py                                   # about ten minutes on two cores
    python tests/bench_fineweb.py --tokens 13000000 --repeats 1     # a minute
    python tests/bench_fineweb.py --base ../old                     # with the fineweb.py in ../old

It prints a Markdown table and asserts nothing. The programs take turns, `repeats` times, and the
table shows medians. Each program reads the same text once and `copies` times. The difference of the
two runs contains no start-up, so tokens/s are those of a long run. CPU seconds are those of all
processes of a program; they are the better measure on a machine that does other work as well.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also for the spawned and forked children
from fineweb import EOT, tokenizer  # noqa: E402

CORPUS = ROOT / "../shared/data/corpus"
SHARD_SIZE = 3_000_000  # small, so that the short run fills a shard as well and memory compares


@dataclass
class Options:
    tokens: int = 60_000_000  # the least number of tokens in the long run
    repeats: int = 3  # runs of each program; the table shows medians
    workers: tuple[int, ...] = (1, 2)
    base: str = ""  # another checkout, whose fineweb.py takes part
    program: str = ""  # internal: tiktoken or baseline, run as a process of its own
    source: str = ""
    out: str = ""


# What is compared -----------------------------------------------------------------------------


def read_texts(folder):
    import pyarrow.parquet as pq

    files = sorted(Path(folder).glob("*.parquet"))
    columns = [pq.read_table(file, columns=["text"])["text"] for file in files]
    return [text for column in columns for text in column.to_pylist()]


def tiktoken_alone(folder):
    """encode_ordinary on one core, texts in memory, ids thrown away."""
    encode, texts = tokenizer().encode_ordinary, read_texts(folder)
    began, cpu = time.perf_counter(), time.process_time()
    for text in texts:
        encode(text)
    print(json.dumps({"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}))


def tokenize_document(document):
    ids = [EOT]
    ids.extend(tokenizer().encode_ordinary(document["text"]))
    ids = np.array(ids)
    assert (0 <= ids).all() and (ids < 2**16).all()
    return ids.astype(np.uint16)


def baseline(folder, out, workers, shard_size=SHARD_SIZE):
    """The pattern of most tutorials: each document pickled to a pool, an array back."""
    from datasets import load_dataset

    files = sorted(map(str, Path(folder).glob("*.parquet")))
    documents = load_dataset("parquet", data_files=files, split="train", streaming=True)
    Path(out).mkdir(parents=True, exist_ok=True)
    buffer, filled, number = np.empty(shard_size, np.uint16), 0, 0
    with multiprocessing.Pool(workers) as pool:
        for ids in pool.imap(tokenize_document, documents, chunksize=16):
            while len(ids):
                taken = min(len(ids), shard_size - filled)
                buffer[filled : filled + taken] = ids[:taken]
                filled, ids = filled + taken, ids[taken:]
                if filled == shard_size:
                    np.save(Path(out, f"{number:06d}"), buffer)
                    filled, number = 0, number + 1
    np.save(Path(out, f"{number:06d}"), buffer[:filled])


# Measuring ------------------------------------------------------------------------------------


def peak_memory(pid, peaks):
    """Adds {pid: peak resident MB} of the process and its children to `peaks`, where there is
    /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        peaks[pid] = int(status.split("VmHWM:")[1].split()[0]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    peak_memory(int(child), peaks)
    except (OSError, IndexError):
        pass


def measure(command):
    """Wall seconds, CPU seconds with children, and peak MB of the main process and of its largest
    worker."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    began, peaks = time.perf_counter(), {}
    process = subprocess.Popen(command, env=os.environ | {"USE_TORCH": "0"}, **pipes)
    done = threading.Event()

    def watch():
        while not done.wait(0.05):
            peak_memory(process.pid, peaks)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    assert status == 0, command
    unknown = float("nan")
    main = peaks.pop(process.pid, unknown)
    result = dict(seconds=seconds, cpu=usage.ru_utime + usage.ru_stime)
    result |= dict(main=main, worker=max(peaks.values(), default=unknown))
    return result | (json.loads(output) if output.startswith(b"{") else {})


def make_source(folder, copies):
    """`copies` times the corpus, or where there is none, CPython's documentation, in row groups as
    fine."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(CORPUS.glob("*.parquet"))
    if not files:
        from pydoc_data.topics import topics

        folder.parent.mkdir(parents=True, exist_ok=True)
        files = [folder.parent / "topics.parquet"]
        pq.write_table(pa.table({"text": [*topics.values()] * 20}), files[0], row_group_size=100)
    folder.mkdir(parents=True)
    for copy in range(copies):
        for file in files:
            shutil.copy(file, folder / f"{copy:03d}_{file.name}")
    return folder


def main():
    options = tyro.cli(Options)
    if options.program == "tiktoken":
        return tiktoken_alone(options.source)
    if options.program == "baseline":
        return baseline(options.source, options.out, options.workers[0])
    checkouts = {"fineweb.py": ROOT}
    if options.base:
        checkouts["base"] = Path(options.base).resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        texts = read_texts(make_source(folder / "once", 1))
        tokens = sum(1 + len(ids) for ids in tokenizer().encode_ordinary_batch(texts))
        copies = max(2, -(-options.tokens // tokens))
        sources = {1: folder / "once", copies: make_source(folder / "often", copies)}

        def command(name, workers, source):
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            if name in checkouts:
                start = [Path(checkouts[name], "fineweb.py"), "--shard_size", SHARD_SIZE]
            else:
                start = [__file__, "--program", "baseline" if name == "Pool.imap" else "tiktoken"]
            flags = ["--source", source, "--out", out, "--workers", workers]
            return [sys.executable, *map(str, [*start, *flags])]

        pairs = [(name, w) for w in options.workers for name in (*checkouts, "Pool.imap")]
        programs = [("tiktoken alone", 1), *pairs]
        runs = {(p, n): [] for p in programs for n in sources}
        for repeat in range(1, options.repeats + 1):
            for program in programs:
                for n, source in sources.items():
                    line = f"\r{repeat}/{options.repeats} {program} {n}x   "
                    print(line, end="", file=sys.stderr, flush=True)
                    runs[program, n].append(measure(command(*program, source)))
        print(file=sys.stderr)

    def median(program, n, key):
        return statistics.median(run[key] for run in runs[program, n])

    def slope(program, key):  # seconds per token, after start-up
        pairs = zip(runs[program, 1], runs[program, copies])
        more = [long[key] - short[key] for short, long in pairs]
        return statistics.median(more) / (copies - 1) / tokens

    import torch  # not above: the programs that are measured do without it
    from bench_hellaswag import heading

    names = ("tiktoken", "gigatoken", "numpy", "pyarrow", "datasets")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    print(
        f"{heading(torch.device('cpu'))}; {packages}; a load of {os.getloadavg()[2]:.1f}. "
        f"{tokens * copies:,} tokens in {len(texts) * copies:,} documents, medians of "
        f"{options.repeats}.\n"
    )
    if options.base:
        print(f"base: {checkouts['base']}.\n")
    columns = ["program", "workers", "tokens/s", "÷ (workers × tiktoken)", "÷ Pool.imap"]
    columns += ["÷ base"] if options.base else []
    columns += ["CPU s per M tokens", "÷ tiktoken", "start-up s"]
    columns += [f"main MB, 1× → {copies}×", f"worker MB, 1× → {copies}×"]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    tiktoken_s, tiktoken_cpu = (slope(programs[0], key) for key in ("seconds", "cpu"))
    for program in programs:
        name, workers = program
        seconds, cpu = slope(program, "seconds"), slope(program, "cpu")
        start_up = ""
        memory = ["", ""]
        against = [""]
        if name in checkouts:
            against = [f"{slope(('Pool.imap', workers), 'seconds') / seconds:.2f}"]
        if options.base:
            is_ours = name == "fineweb.py"
            ratio = slope(("base", workers), "seconds") / seconds if is_ours else None
            against.append(f"{ratio:.2f}" if is_ours else "")
        if program != programs[0]:
            start_up = f"{median(program, 1, 'seconds') - seconds * tokens:.1f}"
            pairs = [[median(program, n, key) for n in (1, copies)] for key in ("main", "worker")]
            memory = [f"{once:.0f} → {often:.0f}" for once, often in pairs]
        cells = [name, f"{workers}", f"{1 / seconds:,.0f}"]
        cells += [f"{tiktoken_s / seconds / workers:.2f}", *against]
        cells += [f"{cpu * 1e6:.3f}", f"{cpu / tiktoken_cpu:.2f}", start_up, *memory]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
