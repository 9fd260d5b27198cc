"""How fast is fineweb.py, compared with the fineweb.py of another checkout?

    python tests/bench_fineweb.py                         # a minute on two cores
    python tests/bench_fineweb.py --base ../old           # beside the fineweb.py in ../old
    python tests/bench_fineweb.py --tokenizer char --megabytes 8

It prints a Markdown table and asserts nothing. Each program makes shards of the same text, as JSON
lines and as Parquet. The programs take turns, and the table shows medians. The time that a program
needs for a text of one word is subtracted, so tokens/s are those of a long build. CPU seconds are
those of all its processes; they are the better measure on a machine that does other work as well.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "../shared/data/corpus"  # real text, where a developer has it


@dataclass
class Options:
    base: str = ""  # another checkout, whose fineweb.py takes part
    megabytes: int = 50  # of text
    repeats: int = 5  # runs of each program; the table shows medians
    workers: int = 2
    tokenizer: str = "gpt2"


def read_texts():
    """The texts of the corpus, or where there is none, of Python's documentation."""
    tables = [pq.read_table(path, columns=["text"]) for path in sorted(CORPUS.glob("*.parquet"))]
    if tables:
        return pa.concat_tables(tables)["text"].to_pylist()
    from pydoc_data.topics import topics

    return list(topics.values())


def write_sources(folder, megabytes):
    """{form: path} of the texts, repeated up to a size. "start" holds one word."""
    texts = read_texts()
    size = sum(len(text.encode()) for text in texts)
    texts *= max(1, round(megabytes * 1e6 / size))
    paths = {"start": folder / "start", "jsonl": folder / "x.jsonl"}
    paths["parquet"] = folder / "x.parquet"
    paths["start"].mkdir()
    for i in range(4):  # so that all workers start
        (paths["start"] / f"{i}.txt").write_text("word")
    with open(paths["jsonl"], "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    pq.write_table(pa.table({"text": texts}), paths["parquet"], row_group_size=1000)
    return paths


def measure(checkout, path, options):
    """(tokens, wall seconds, CPU seconds) of one build."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--source", path, "--out", folder, "--workers", options.workers]
        flags += ["--tokenizer", options.tokenizer, "--shard_size", 10_000_000]
        command = [sys.executable, checkout / "fineweb.py", *flags]
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        assert status == 0, command
        shards = json.loads(Path(folder, "manifest.json").read_text())["shards"]
    tokens = sum(shard["tokens"] for shard in shards)
    return tokens, seconds, usage.ru_utime + usage.ru_stime


def main():
    options = tyro.cli(Options, description=__doc__)
    checkouts = {"this": ROOT}
    if options.base:
        checkouts["base"] = Path(options.base).resolve()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_sources(Path(folder), options.megabytes)
        for _ in range(options.repeats):
            for form, path in paths.items():
                for name, checkout in checkouts.items():
                    result = measure(checkout, path, options)
                    runs.setdefault((form, name), []).append(result)

    def median(form, name):
        return [statistics.median(values) for values in zip(*runs[form, name])]

    print("| text | fineweb.py | tokens/s | CPU s per M tokens | start-up s |")
    print("|---|---|---:|---:|---:|")
    for form in ("jsonl", "parquet"):
        speed, cpu = {}, {}
        for name in checkouts:
            _, start, start_cpu = median("start", name)
            tokens, seconds, cpu_seconds = median(form, name)
            speed[name] = tokens / (seconds - start)
            cpu[name] = (cpu_seconds - start_cpu) / tokens * 1e6
            cells = [form, name, f"{speed[name]:,.0f}", f"{cpu[name]:.3f}", f"{start:.1f}"]
            print("|", " | ".join(cells), "|")
        if options.base:
            ratios = [f"{ratio['this'] / ratio['base']:.2f}" for ratio in (speed, cpu)]
            print("|", " | ".join([form, "this ÷ base", *ratios, ""]), "|")


if __name__ == "__main__":
    main()
