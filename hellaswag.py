"""
HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings follows a context? The one the model finds likeliest.

    python hellaswag.py                                    # OpenAI's GPT-2 (124M) on all 10,042 validation items
    python hellaswag.py --model log/step_19073 --limit 1000 --json ours.json    # a checkpoint, 1000 items, one line an item
    python hellaswag.py --model gpt2 --style harness       # as lm-evaluation-harness scores it
    python hellaswag.py --compare gpt2.json ours.json      # which of two models is better, with a 95% interval
    torchrun --standalone --nproc_per_node=8 hellaswag.py  # eight processes share the items

The official file is downloaded once, to hellaswag/hellaswag_val.jsonl. The last line reads
`10042 acc: 0.2859 acc_norm: 0.2955 ± 0.0046`: items; accuracy of the least summed loss; accuracy of the least loss per unit
of length; standard error of acc_norm, sqrt(p (1 - p) / n). Of equal losses the first one counts.

Two styles, because published numbers come in two kinds:

                 completion (the default; build-nanogpt, llm.c)    harness (lm-evaluation-harness's task `hellaswag`)
    context      `ctx`, as it is                                   `activity_label: ctx_a Ctx_b`, cleaned, no space at its end
    ending       " " + ending, as it is                            " " + ending, cleaned
    token ids    context and ending encoded each on its own        ending = encode(both together) past the context's ids
    acc_norm     loss / tokens of the ending                       loss / characters of the cleaned ending, without that space
    GPT-2 124M   acc 0.2859, acc_norm 0.2955                       acc 0.2892, acc_norm 0.3114

Cleaning strips white space, makes ". " of WikiHow's " [title]", drops all other [brackets] and halves double spaces; Ctx_b is
ctx_b.capitalize(). The harness calls its unit bytes but counts characters (its issue 3278), which differ in 181 items.
A file without ctx_a and ctx_b is scored on `ctx`, with a warning: it lacks that capitalization. The last row is as published
(docstring of build-nanogpt's hellaswag.py); to measure it takes OpenAI's weights, the official file and --dtype float32.

The four endings are scored in one row, context + ending 1 + ... + ending 4, where every ending sees the context and itself
and takes up the positions right after the context, so that the context is read once. The losses are those of four separate
rows, and only the positions that predict a token of an ending meet the vocabulary.
"""

import functools
import json
import math
import os
import re
import sys
import urllib.request
import warnings
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from fineweb import UserError, stop, tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
N_ITEMS = 10042  # lines of that file
DATA = "hellaswag/hellaswag_val.jsonl"
MAX_SHAPES = 8  # of compiled batches: torch.compile gives a function up after 8 (torch._dynamo.config.recompile_limit)
VOCAB_SLICE = 4096  # vocabulary rows a time: logits of all 50257 would take gigabytes, and leave the cache of a CPU

Style = Literal["completion", "harness"]

# ---------------------------------------------------------------------------------------------------------------------
# Items


@dataclass(frozen=True)
class Item:
    index: int  # `ind` of the file, or the line's number from 0
    label: int  # of the right ending, 0 to 3
    context: list[int]  # token ids
    endings: list[list[int]]  # token ids of the four
    lengths: list[int]  # what acc_norm divides their losses by: tokens, or characters in style harness


def load_items(path=DATA, limit: int | None = None, style: Style = "completion") -> list[Item]:
    """
    The items of a HellaSwag file (JSON lines with ctx, endings, label, and activity_label for style harness), or `limit` of
    them, evenly spaced, because the official file has all its ActivityNet items before all from WikiHow. If there is no file
    and path ends in hellaswag_val.jsonl, one process a machine downloads it while the others wait: with torch.distributed
    initialised, all processes must call this. UserError, on every process, if it cannot be had or read.
    """
    path, problem = Path(path), None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0 and not path.exists():
        try:
            download(path)
        except UserError as error:
            problem = str(error)
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)  # the others wait here, and learn how it went
        problem = next(filter(None, problems), None)
    if problem:
        raise UserError(problem)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    records = [check(f"{path}, line {n + 1}", n, line, style) for n, line in enumerate(lines) if line.strip()]
    if not records or (limit is not None and limit < 1):
        raise UserError(f"There is nothing to score: {path} has {len(records)} items, and the limit is {limit}.")
    if style == "harness" and not all({"ctx_a", "ctx_b"} <= record.keys() for record in records):
        warnings.warn(f"{path} lacks ctx_a and ctx_b: scores will differ a little from the harness's own.", stacklevel=2)
    n = min(limit or len(records), len(records))
    return [encode(records[i * len(records) // n], style) for i in range(n)]


def download(path: Path) -> None:
    """The official file to `path`, whole or not at all. UserError."""
    if path.name != Path(URL).name:  # a misspelt --data must not become a download
        raise UserError(f"{path}: no such file.")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            data, size = response.read(), response.headers["Content-Length"]
        if len(data) != int(size or len(data)) or len(data.splitlines()) != N_ITEMS:
            raise OSError(f"received {len(data):,} of {size} bytes and {len(data.splitlines()):,} of {N_ITEMS:,} lines")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except (OSError, HTTPException) as error:
        raise UserError(f"{path} is missing and {URL} cannot be downloaded ({error}): put the file there yourself.") from error
    finally:
        partial.unlink(missing_ok=True)


def check(where: str, number: int, line: bytes, style: Style) -> dict:
    """A line of the file as a dictionary, its index filled in. UserError, beginning with `where`, if it is not fit for use."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object.")
    endings, label = record.get("endings"), record.get("label")
    for key in ("ctx", "activity_label") if style == "harness" else ("ctx",):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise UserError(f"{where}: {key} is missing, or no text, or empty.")
    if not isinstance(endings, list) or len(endings) != 4:
        raise UserError(f"{where}: endings is missing or does not hold four.")
    if not all(isinstance(e, str) and (clean(e) if style == "harness" else e).strip() for e in endings):
        raise UserError(f"{where}: an ending is no text, or empty.")
    if type(label) is not int or not 0 <= label <= 3:  # type(): True is an int too
        raise UserError(f"{where}: label is missing or not one of 0, 1, 2 and 3.")
    return {"ind": number} | record


def clean(text: str) -> str:
    """What the harness makes of a text: its three substitutions, in its order."""
    text = text.strip()
    for pattern, replacement in ((r" \[title\]", ". "), (r"\[.*?\]", ""), (r"  ", " ")):
        text = re.sub(pattern, replacement, text)
    return text


def encode(record: dict, style: Style) -> Item:
    """Texts to token ids; the table at the top of this file is what this does."""
    ids = tokenizer().encode_ordinary  # ordinary: "<|endoftext|>" in a text is text
    if style == "completion":
        context = ids(record["ctx"])
        endings = [ids(" " + ending) for ending in record["endings"]]
        lengths = [len(ending) for ending in endings]
    else:
        choices = [clean(ending) for ending in record["endings"]]
        ctx = f"{record['ctx_a']} {record['ctx_b'].capitalize()}" if {"ctx_a", "ctx_b"} <= record.keys() else record["ctx"]
        query = clean(f"{record['activity_label']}: {ctx}")
        context = ids(query.rstrip())  # GPT-2's words begin with their space, so a trailing one belongs to the ending
        endings = [ids(f"{query} {choice}")[len(context) :] for choice in choices]
        lengths = [len(choice) for choice in choices]
    return Item(record["ind"], record["label"], context, endings, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and batches. L tokens in a row; B rows of T tokens in a batch, which predict S tokens of endings.


@dataclass(frozen=True)
class Row:
    grid: list[list[int]]  # (3, L): token ids, their positions, their segments (0 the context, 1 to 4 the endings)
    scored: list[int]  # (S,) columns whose hidden state predicts a token of an ending
    targets: list[int]  # (S,) that token
    slots: list[int]  # (S,) 4 * item + ending


def pack(number: int, item: Item, block_size: int):
    """
    Yield the item's row; or rows, of fewer endings each, where a model's context is too small for all of them side by side.
    A context that does not leave room for the longest ending loses its beginning.
    """
    context = item.context[-context_room(item, block_size) :]
    n, row = len(context), None
    for slot, ending in enumerate(item.endings, start=4 * number):
        new = len(ending) - 1  # the last token of an ending is predicted, but predicts nothing
        if row is None or len(row.grid[0]) + new > block_size:
            if row:
                yield row
            row = Row([list(context), list(range(n)), [0] * n], [], [], [])
        end = len(row.grid[0])
        for line, values in zip(row.grid, (ending[:new], range(n, n + new), [1 + slot % 4] * new)):
            line.extend(values)
        row.scored.extend([n - 1, *range(end, end + new)])  # the context's last token predicts the first one of every ending
        row.targets.extend(ending)
        row.slots.extend([slot] * len(ending))
    yield row


def context_room(item: Item, block_size: int) -> int:
    """How many tokens of context fit before the longest ending, whose last token is not read. UserError if none does."""
    longest = max(map(len, item.endings))
    if longest > block_size:
        raise UserError(f"Item {item.index} has an ending of {longest} tokens, more than the model's context of {block_size}.")
    return block_size + 1 - longest


def batches(rows: list[Row], block_size: int, token_budget: int, fixed: bool):
    """
    Yield (rows, B, T, S): neighbours by length, longest first, so that padding is small and memory runs out at once or never.
    `fixed` is for torch.compile: at most MAX_SHAPES different (B, T, S), the last batch of each filled with empty rows.
    """
    rows = sorted(rows, key=lambda row: len(row.grid[0]), reverse=True)
    smallest = math.ceil(len(rows) / MAX_SHAPES) if fixed else 1
    while rows:
        T = min(math.ceil(len(rows[0].grid[0]) / 8) * 8, block_size)  # CUDA's attention kernels want masks of aligned rows
        B = max(1, token_budget // T)
        size = math.ceil(smallest / B) * B  # rows that share this shape
        group, rows = rows[:size], rows[size:]
        parts = [group[i : i + B] for i in range(0, len(group), B)]
        S = max(sum(len(row.targets) for row in part) for part in parts)
        for part in parts:
            yield part, B if fixed else len(part), T, S


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def token_losses(model, grid, scored):
    """
    The model's losses of some tokens, in nats. grid: (3, B, T) int64, token ids, positions and segments. scored: (2, S) int64,
    where in the flattened B * T a token is predicted, and which. Returns (S,) float32. This is what is compiled.
    """
    idx, positions, segments = grid
    column = torch.arange(idx.size(1), device=idx.device)
    query, key = segments[:, :, None], segments[:, None, :]
    mask = (column[:, None] >= column) & ((key == 0) | (key == query))  # (B, T, T): back to itself and to the context
    hidden = model.transformer(idx, position_ids=positions, attention_mask=mask[:, None])
    hidden = hidden if torch.is_tensor(hidden) else hidden[0]  # Hugging Face's GPT2Model returns an output object
    hidden = hidden.flatten(0, 1)[scored[0]]  # (S, C)
    # Cross entropy is log(sum(exp(logits))) - logits[target], over all rows that lm_head has, padding included: those are the
    # model's probabilities. The target's logit is taken apart, so it escapes bfloat16's rounding (up to 0.25 at 100).
    weight = model.lm_head.weight
    slices = [F.linear(hidden, part).float().logsumexp(1) for part in weight.split(VOCAB_SLICE)]
    return torch.stack(slices).logsumexp(0) - (hidden.float() * weight[scored[1]].float()).sum(1)


@functools.cache  # one wrapper, so that one call finds what another compiled
def compiled_token_losses():
    return torch.compile(token_losses, dynamic=False)


@torch.no_grad()
def score(model, items: list[Item], device, compile=False, token_budget: int | None = None, progress=False) -> torch.Tensor:
    """
    The summed losses of every item's four endings in nats: (len(items), 4) float64 on the CPU, in the order of `items`.

    model: our GPT or Hugging Face's GPT2LMHeadModel (with its default attention, sdpa), on `device`. Runs in the caller's
    autocast; draws no random number; leaves train or eval mode as it was. token_budget: tokens a batch, padding included.
    """
    if getattr(model.config, "_attn_implementation", "sdpa") != "sdpa":  # the others add a boolean mask, or ignore it
        raise ValueError("load the model with attn_implementation='sdpa'")
    device = torch.device(device)
    block_size = context_size(model)
    rows = [row for i, item in enumerate(items) for row in pack(i, item, block_size)]
    token_budget = token_budget or (32768 if device.type == "cuda" else 1024)
    losses_of = compiled_token_losses() if compile else token_losses
    sums = torch.zeros(4 * len(items), dtype=torch.float64)
    finished = torch.zeros(4 * len(items), dtype=torch.bool)
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(items), unit="item", disable=not progress) as bar:
            for part, B, T, S in batches(rows, block_size, token_budget, fixed=compile):
                grid = np.zeros((3, B, T), np.int64)  # zeros are a context that nothing looks at, and see themselves: no NaN
                scored = np.zeros((2, S), np.int64)
                for i, row in enumerate(part):
                    grid[:, i, : len(row.grid[0])] = row.grid
                slots = torch.tensor([slot for row in part for slot in row.slots])
                scored[0, : len(slots)] = [i * T + column for i, row in enumerate(part) for column in row.scored]
                scored[1, : len(slots)] = [target for row in part for target in row.targets]
                losses = losses_of(model, torch.from_numpy(grid).to(device), torch.from_numpy(scored).to(device))
                # Summed here, in float64 and in order, because CUDA's sums by index are not reproducible.
                sums.index_add_(0, slots, losses[: len(slots)].cpu().double())
                finished[slots] = True
                done = finished.view(-1, 4).all(1)
                if progress and done.any():
                    right = picks(items, sums.view(-1, 4))[1] == torch.tensor([item.label for item in items])
                    bar.set_postfix(acc_norm=f"{right[done].double().mean():.4f}", refresh=False)
                    bar.update(int(done.sum()) - bar.n)
    finally:
        model.train(was_training)
    return sums.view(-1, 4)


def picks(items: list[Item], losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) int64 twice: the ending of the least loss, and of the least loss per unit of length. Losses: (n, 4)."""
    return losses.argmin(1), (losses / torch.tensor([item.lengths for item in items])).argmin(1)


def context_size(model) -> int:
    """The model's longest context in tokens; ours and Hugging Face's configurations name it differently."""
    return model.config.block_size if hasattr(model.config, "block_size") else model.config.n_positions


@dataclass(frozen=True)
class Result:
    acc: float
    acc_norm: float
    n: int  # items
    truncated: int  # items whose context was too long for the model and lost its beginning
    losses: torch.Tensor  # (n, 4) float64, summed losses in nats, in the order of the items

    def __str__(self):
        stderr = math.sqrt(self.acc_norm * (1 - self.acc_norm) / self.n)
        return f"{self.n} acc: {self.acc:.4f} acc_norm: {self.acc_norm:.4f} ± {stderr:.4f}"


def evaluate(model, items, device, rank=0, world_size=1, compile=False, token_budget=None, progress=False) -> Result:
    """
    Accuracy on all items, each process scoring every world_size-th one; every process gets the whole result. The arguments
    are those of `score`; all processes must call this with the same items. UserError if an ending alone exceeds the context.
    """
    truncated = sum(len(item.context) > context_room(item, context_size(model)) for item in items)  # all raise, or none
    losses = torch.zeros(len(items), 4, dtype=torch.float64)
    losses[rank::world_size] = score(model, items[rank::world_size], device, compile, token_budget, progress and rank == 0)
    if world_size > 1:  # the others' rows are zeros, so the sum is the whole table, exactly
        losses = losses.to(device if torch.device(device).type == "cuda" else "cpu")  # NCCL sums nowhere else
        dist.all_reduce(losses)
        losses = losses.cpu()
    labels = torch.tensor([item.label for item in items])
    acc, acc_norm = ((pick == labels).double().mean().item() for pick in picks(items, losses))
    return Result(acc, acc_norm, len(items), truncated, losses)


# ---------------------------------------------------------------------------------------------------------------------
# Item by item: written, read back, compared


def save_records(path: Path, items: list[Item], losses: torch.Tensor) -> None:
    """One JSON object a line: index, label, losses (4, nats), lengths (4), pick, pick_norm. The file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        for item, summed, pick, pick_norm in zip(items, losses.tolist(), *(p.tolist() for p in picks(items, losses))):
            record = dict(index=item.index, label=item.label, losses=summed, lengths=item.lengths)
            file.write(json.dumps(record | dict(pick=pick, pick_norm=pick_norm)) + "\n")
    partial.replace(path)


def compare(a, b) -> str:
    """
    What two files of save_records say about acc_norm, B minus A, with a paired 95% interval: the percentile bootstrap over
    items (Efron 1979), 100,000 resamples. Paired, because the two models find the same items hard. UserError.
    """
    records = []
    for path in (a, b):
        try:
            records.append([json.loads(line) for line in Path(path).read_text().splitlines()])
            keys = [[(r["index"], r["label"]) for r in side] for side in records]
            right = [np.array([r["pick_norm"] == r["label"] for r in side]) for side in records]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a file that --json wrote: {error!r}.") from error
    if keys[0] != keys[1] or not keys[0]:
        raise UserError(f"{a} and {b} do not hold the same items: use the same --data and --limit for both.")
    n, only_a, only_b = len(keys[0]), int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    # An item counts -1, 0 or +1, so n draws from the items are one draw of how often each of the three came up.
    drawn = np.random.default_rng(0).multinomial(n, [only_a / n, 1 - (only_a + only_b) / n, only_b / n], size=100_000)
    low, high = np.percentile((drawn[:, 2] - drawn[:, 0]) / n, [2.5, 97.5])
    return (
        f"A {a} acc_norm: {right[0].mean():.4f}\nB {b} acc_norm: {right[1].mean():.4f}\n"
        f"{n} items: only A is right on {only_a}, only B on {only_b}\n"
        f"B - A: {(only_b - only_a) / n:+.4f}, 95% interval {low:+.4f} to {high:+.4f} (paired bootstrap)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass(frozen=True)
class Config:
    model: str = "gpt2"  # hub name (gpt2 ... gpt2-xl), or a directory: a checkpoint such as log/step_19073
    data: Path = Path(DATA)  # JSON lines; hellaswag_val.jsonl is downloaded to here if it is not there
    limit: int | None = None  # score this many items, evenly spaced over the file; all unless given
    style: Style = "completion"  # see above
    json: Path | None = None  # write one line an item to this file
    compare: tuple[Path, Path] | None = None  # compare two such files, A and B; needs no model
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of matrix products; float32 for published numbers
    compile: bool = field(default_factory=torch.cuda.is_available)  # torch.compile; on by itself where CUDA is
    token_budget: int | None = None  # tokens a batch; 32768 on CUDA and 1024 elsewhere unless given


def run(config: Config) -> None:
    from train_gpt2 import GPT, init_processes, pick_dtype  # only here: nothing above knows what a GPT is

    rank, world_size, device = init_processes(config.device)
    try:
        dtype = pick_dtype(config.dtype, device)
        items = load_items(config.data, config.limit, config.style)
        model = GPT.from_pretrained(config.model).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            result = evaluate(model, items, device, rank, world_size, config.compile, config.token_budget, progress=True)
        if rank == 0:
            if config.json:
                save_records(config.json, items, result.losses)
            if result.truncated:
                print(f"{result.truncated} items were too long for the model and lost the beginning of their context")
            print(f"{config.model}, style {config.style}, {dtype} on {device}:\n{result}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    import tyro

    config = tyro.cli(Config, args=argv, description=__doc__)
    try:
        print(compare(*config.compare)) if config.compare else run(config)
    except UserError as error:
        stop(str(error))
    except RuntimeError as error:
        if not re.search(r"C(\+\+)? compiler", str(error)):
            raise
        stop("torch.compile finds no C++ compiler on this machine: install gcc or clang, or add --no-compile")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
