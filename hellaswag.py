"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings follows a context? The
one that the model finds likeliest.

    python hellaswag.py                               # OpenAI's GPT-2 (124M) on all 10,042 items
    python hellaswag.py --model log/step_19073 --json ours.json  # a checkpoint; one line per item
    python hellaswag.py --model gpt2 --style harness  # as lm-evaluation-harness scores it
    python hellaswag.py --compare gpt2.json ours.json # which is better, with a 95% interval

The official file is downloaded once, to hellaswag/hellaswag_val.jsonl. The last line reads
`10042 acc: 0.2859 acc_norm: 0.2955 ± 0.0046`: items; accuracy of the least summed loss; accuracy
of the least loss per unit of length; standard error of acc_norm, sqrt(p (1 - p) / n). Of equal
losses the first one counts. This command runs transformers' GPT-2 and train_gpt2.py its own, and
both score with the same functions: so it checks the number in a run's log independently.

Two styles, because published numbers come in two kinds:

                 completion (build-nanogpt, llm.c)     harness (lm-evaluation-harness)
    context      `ctx`, as it is                       `activity_label: ctx_a Ctx_b`, cleaned, no
                                                       space at its end
    ending       " " + ending, as it is                " " + ending, cleaned
    token ids    context and ending each on its own    encode(both together) past the context's
    acc_norm     loss / tokens of the ending           loss / characters of the cleaned ending
    GPT-2 124M   acc 0.2859, acc_norm 0.2955           acc 0.2892, acc_norm 0.3114

Cleaning strips white space, makes ". " of WikiHow's " [title]", drops all other [brackets] and
halves double spaces; Ctx_b is ctx_b.capitalize(). The harness calls its unit bytes but counts
characters (its issue 3278), which differ in 181 items. A file without ctx_a and ctx_b is scored on
`ctx`, with a warning: it lacks that capitalization. The last row is as published (docstring of
build-nanogpt's hellaswag.py).

The four endings are scored in one row, context + ending 1 + ... + ending 4, where each ending sees
the context and itself and takes up the positions right after the context, so that the context is
read once. The losses are those of four separate rows, and only the positions that predict a token
of an ending meet the vocabulary.
"""

import json
import math
import os
import re
import sys
import urllib.request
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fineweb import UserError, as_user_error, check_memory, token_ids

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
N_ITEMS = 10042  # lines of that file
DATA = "hellaswag/hellaswag_val.jsonl"
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names on Hugging Face's hub
PARTS = ("ctx_a", "ctx_b")  # of the context, which the harness joins in its own way
VOCAB_SLICE = 4096  # rows of the vocabulary at a time: all take gigabytes, and leave a CPU's cache

# Items -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    index: int  # `ind` of the file, or the line's number from 0
    label: int  # of the right ending, 0 to 3
    context: list[int]  # token ids
    endings: list[list[int]]  # token ids of the four
    lengths: list[int]  # acc_norm divides their losses by it: tokens; in style harness characters


def load_items(path=DATA, limit=None, style="completion"):
    """The items of a HellaSwag file, a list of Item, or `limit` of them, evenly spaced, because the
    official file has all its ActivityNet items before all from WikiHow. If there is no file and its
    name is the official one, one process per machine downloads it while the others wait: with
    torch.distributed initialised, all must call this. UserError, in all, if it cannot be had."""
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
    with as_user_error(f"{path} cannot be read", "look at the file"):
        lines = [(n, x) for n, x in enumerate(path.read_bytes().splitlines()) if x.strip()]
    records = [check(f"{path}, line {n + 1}", n, line, style) for n, line in lines]
    if not records or (limit is not None and limit < 1):
        found = f"{path} has {len(records)} items, and the limit is {limit}"
        raise UserError(f"nothing to score: {found}; give another --data or --limit")
    if style == "harness" and not all({*PARTS} <= record.keys() for record in records):
        text = f"{path} lacks ctx_a and ctx_b: scores will differ a little from the harness's own"
        warnings.warn(text, stacklevel=2)
    n = min(limit or len(records), len(records))
    return [encode(records[i * len(records) // n], style) for i in range(n)]


def items_or_none(path, block_size):
    """All items, or None, said aloud, if they cannot be had or do not fit a model's context."""
    try:
        items = load_items(path)
        for item in items:  # said now rather than at the first evaluation
            context_room(item, block_size)
        return items
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"warning: HellaSwag is off: {error}", flush=True)


def download(path):
    """The official file to `path`, whole or not at all. UserError."""
    if path.name != Path(URL).name:  # a misspelt --data must not become a download
        raise UserError(f"{path}: no such file; give one, or a path that ends in {Path(URL).name}")
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with as_user_error(f"{path} is missing and {URL} cannot be downloaded", "put it there yourself"):
        try:
            with urllib.request.urlopen(URL, timeout=60) as response:
                data, size = response.read(), response.headers["Content-Length"]
            lines = len(data.splitlines())
            if len(data) != int(size or len(data)) or lines != N_ITEMS:
                raise OSError(f"{len(data):,} of {size} bytes, {lines:,} of {N_ITEMS:,} lines came")
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def check(where, number, line, style):
    """A line of the file, bytes, as a dict, with its index. UserError, beginning with `where`, if
    it is not fit for use."""
    with as_user_error(f"{where} is not JSON", "mend or drop the line"):
        if not isinstance(record := json.loads(line), dict):
            raise UserError(f"{where} is not a JSON object; mend or drop the line")
    record = {"ind": number} | record
    for key in ("ind", "label"):  # which the hub's export has as text
        if isinstance(record.get(key), str) and re.fullmatch("[0-9]{1,9}", record[key]):
            record[key] = int(record[key])
    texts, parts = (["ctx", "activity_label"], PARTS) if style == "harness" else (["ctx"], ())
    bad = [k for k in texts if not isinstance(record.get(k), str) or not record[k].strip()]
    bad += [key for key in parts if not isinstance(record.get(key, ""), str)]
    bad = [f"{key} is missing, or no text, or empty" for key in bad]
    if not isinstance(endings := record.get("endings"), list) or len(endings) != 4:
        bad += ["endings is missing or does not hold four"]
    elif not all(isinstance(e, str) and text_of(e, style).strip() for e in endings):
        bad += ["an ending is no text, or empty"]
    if type(record.get("label")) is not int or not 0 <= record["label"] <= 3:  # True is an int, too
        bad += ["label is missing or not one of 0, 1, 2 and 3"]
    if type(record["ind"]) is not int:
        bad += ["ind is no whole number"]
    if bad:
        raise UserError(f"{where}: {', '.join(bad)}; mend or drop the line")
    return record


def text_of(text, style):
    """The text as it is, or what the harness makes of it: its three substitutions, in its order."""
    if style == "completion":
        return text
    text = text.strip()
    for pattern, replacement in ((r" \[title\]", ". "), (r"\[.*?\]", ""), (r"  ", " ")):
        text = re.sub(pattern, replacement, text)
    return text


def encode(record, style):
    """A record's texts to an Item; the table at the top of this file is what this does."""
    if style == "completion":
        context = token_ids(record["ctx"])
        endings = [token_ids(" " + ending) for ending in record["endings"]]
        lengths = [len(ending) for ending in endings]
    else:
        choices, ctx = [text_of(ending, style) for ending in record["endings"]], record["ctx"]
        if {*PARTS} <= record.keys():
            ctx = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
        query = text_of(f"{record['activity_label']}: {ctx}", style)
        # GPT-2's words begin with their space, so a trailing one belongs to the ending.
        context = token_ids(query.rstrip())
        endings = [token_ids(f"{query} {choice}")[len(context) :] for choice in choices]
        lengths = [len(choice) for choice in choices]
    endings = [ending.tolist() for ending in endings]
    return Item(record["ind"], record["label"], context.tolist(), endings, lengths)


# Rows and batches -----------------------------------------------------------------------------
#
# L tokens in a row; B rows of T tokens in a batch, which predict S tokens of endings.


@dataclass(frozen=True)
class Row:
    grid: list[list[int]]  # (3, L): token ids, positions, segments (0: context, 1 to 4: endings)
    scored: list[int]  # (S,) columns whose hidden state predicts a token of an ending
    targets: list[int]  # (S,) that token
    slots: list[int]  # (S,) 4 * item + ending


def pack(number, item, block_size):
    """Yield the item's Row; or several, of fewer endings each, where a model's context is too small
    for all of them side by side. A context that does not leave room for the longest ending loses
    its beginning. UserError if an ending alone is too long."""
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
        # The context's last token predicts the first one of every ending.
        row.scored.extend([n - 1, *range(end, end + new)])
        row.targets.extend(ending)
        row.slots.extend([slot] * len(ending))
    yield row


def context_room(item, block_size):
    """How many tokens of context fit before the longest ending, whose last token is not read.
    UserError if none does."""
    longest = max(map(len, item.endings))
    if longest > block_size:
        why = f"an ending of {longest} tokens, more than the model's context of {block_size}"
        raise UserError(f"item {item.index} has {why}; leave it out")
    return block_size + 1 - longest


def batches(rows, block_size, token_budget):
    """Yield (rows, T): neighbours by length, longest first, so that padding is small and memory
    runs out at once or never. token_budget: tokens in a batch, padding included."""
    rows = sorted(rows, key=lambda row: len(row.grid[0]), reverse=True)
    while rows:
        T = min(-(-len(rows[0].grid[0]) // 8) * 8, block_size)  # CUDA's kernels want aligned rows
        B = max(1, token_budget // T)
        yield rows[:B], T
        rows = rows[B:]


# Scoring ---------------------------------------------------------------------------------------


def token_losses(model, grid, scored):
    """The model's losses of some tokens in nats, (S,) float32. grid: (3, B, T) int64, token ids,
    positions, segments. scored: (2, S) int64, where in the flattened B * T a token is predicted,
    and which."""
    idx, positions, segments = grid
    column = torch.arange(idx.size(1), device=idx.device)
    query, key = segments[:, :, None], segments[:, None, :]
    # (B, T, T): a token looks back to itself and to the context.
    mask = (column[:, None] >= column) & ((key == 0) | (key == query))
    # Not cuDNN, PyTorch's first choice on Hopper: with masks it has been wrong in silence.
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels) if idx.is_cuda else nullcontext():
        hidden = model.transformer(idx, position_ids=positions, attention_mask=mask[:, None])
    hidden = hidden if torch.is_tensor(hidden) else hidden[0]  # transformers' is an output object
    hidden = hidden.flatten(0, 1)[scored[0]]  # (S, C)
    # Cross entropy is log(sum(exp(logits))) - logits[target], over all rows of lm_head, padding
    # included: those are the model's probabilities. The target's logit is computed apart, so that
    # it escapes bfloat16's rounding (up to 0.25 at 100).
    weight = model.lm_head.weight
    slices = [F.linear(hidden, part).float().logsumexp(1) for part in weight.split(VOCAB_SLICE)]
    target = (hidden.float() * weight[scored[1]].float()).sum(1)
    return torch.stack(slices).logsumexp(0) - target


@torch.no_grad()
def score(model, items, device, token_budget=None, progress=False):
    """The summed losses of each item's four endings in nats: (len(items), 4) float64 on the CPU, in
    the order of `items`.

    model: a GPT of train_gpt2.py or transformers' GPT2LMHeadModel (with its default attention,
    sdpa), on `device`. Runs in the caller's autocast; draws no random number; leaves train or eval
    mode as it was. token_budget: tokens per batch, padding included."""
    if getattr(model.config, "_attn_implementation", "sdpa") != "sdpa":
        raise ValueError("load the model with attn_implementation='sdpa'")  # others misread masks
    device = torch.device(device)
    block_size = context_size(model)
    rows = [row for i, item in enumerate(items) for row in pack(i, item, block_size)]
    token_budget = token_budget or (32768 if device.type == "cuda" else 1024)
    sums = torch.zeros(4 * len(items), dtype=torch.float64)
    finished = torch.zeros(4 * len(items), dtype=torch.bool)
    labels = torch.tensor([item.label for item in items])
    was_training = model.training
    model.eval()
    with tqdm(total=len(items), unit="item", disable=not progress) as bar:
        for part, T in batches(rows, block_size, token_budget):
            # Padding is zeros: a context that nothing looks at, and that sees itself, so no NaN.
            grid = np.zeros((3, len(part), T), np.int64)
            for i, row in enumerate(part):
                grid[:, i, : len(row.grid[0])] = row.grid
            where = [i * T + column for i, row in enumerate(part) for column in row.scored]
            scored = np.array([where, [target for row in part for target in row.targets]])
            slots = torch.tensor([slot for row in part for slot in row.slots])
            tensors = (torch.from_numpy(array).to(device) for array in (grid, scored))
            losses = token_losses(model, *tensors).cpu().double()
            sums.index_add_(0, slots, losses)  # on the CPU, in order: CUDA's is not reproducible
            finished[slots] = True
            done = finished.view(-1, 4).all(1)
            if progress and done.any():
                right = picks(items, sums.view(-1, 4))[1] == labels
                bar.set_postfix(acc_norm=f"{right[done].double().mean():.4f}", refresh=False)
                bar.update(int(done.sum()) - bar.n)
    model.train(was_training)
    return sums.view(-1, 4)


def picks(items, losses):
    """From losses, (n, 4), two tensors (n,) int64: the ending of the least loss, and of the least
    loss per unit of length."""
    return losses.argmin(1), (losses / torch.tensor([item.lengths for item in items])).argmin(1)


def context_size(model):
    """The model's longest context in tokens; our configuration and transformers' name it apart."""
    return getattr(model.config, "block_size", None) or model.config.n_positions


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


def evaluate(model, items, device, rank=0, world_size=1, token_budget=None, progress=False):
    """A Result for all items, each process scoring every world_size-th one; all of them get the
    whole. The arguments are those of `score`; all processes must call this with the same items.
    UserError if an ending alone exceeds the context."""
    rooms = [context_room(item, context_size(model)) for item in items]  # all raise, or none
    truncated = sum(len(item.context) > room for item, room in zip(items, rooms))
    losses = torch.zeros(len(items), 4, dtype=torch.float64)
    mine = items[rank::world_size]
    losses[rank::world_size] = score(model, mine, device, token_budget, progress and rank == 0)
    if world_size > 1:  # the others' rows are zeros, so the sum is the whole table, exactly
        losses = losses.to(device if torch.device(device).type == "cuda" else "cpu")  # for NCCL
        dist.all_reduce(losses)
        losses = losses.cpu()
    labels = torch.tensor([item.label for item in items])
    acc, acc_norm = ((pick == labels).double().mean().item() for pick in picks(items, losses))
    return Result(acc, acc_norm, len(items), truncated, losses)


# Item by item: written, read back, compared ----------------------------------------------------


def partial(path):
    """Where to write what is to be the file `path`: beside it, or to itself if it is a pipe or
    device. Tries that. UserError."""
    with as_user_error(f"{path} cannot be written", "give another --json"):
        if path.is_dir():
            raise ValueError("it is a folder")
        if Path("/dev") in path.parents or (path.exists() and not path.is_file()):
            return path
        beside = Path(f"{path.resolve()}.partial")  # of a link, beside what it leads to
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
        return beside


def save_records(path, items, losses):
    """One JSON object per line: index, label, losses (4, nats), lengths (4), pick, pick_norm. The
    file appears whole. UserError."""
    chosen = [pick.tolist() for pick in picks(items, losses)]
    with as_user_error(f"{path} cannot be written", "give another --json"):
        with partial(path).open("a") as file:
            for item, summed, pick, pick_norm in zip(items, losses.tolist(), *chosen):
                record = dict(index=item.index, label=item.label, losses=summed)
                record |= dict(lengths=item.lengths, pick=pick, pick_norm=pick_norm)
                file.write(json.dumps(record) + "\n")
        if file.name != str(path):
            os.replace(file.name, path.resolve())


def compare(a, b):
    """What two files of save_records say about acc_norm, B minus A, with a paired 95% interval: the
    percentile bootstrap over items (Efron 1979), 100,000 resamples. Paired, because the two models
    find the same items hard. Returns text. UserError."""
    keys, right = [], []
    for path in (a, b):
        with as_user_error(f"{path} is not a file that --json wrote", "give one for each of the two"):
            side = [json.loads(line) for line in Path(path).read_text().splitlines()]
            keys.append([(r["index"], r["label"]) for r in side])
            right.append(np.array([r["pick_norm"] == r["label"] for r in side]))
    if keys[0] != keys[1] or not keys[0]:
        remedy = "use the same --data and --limit for both"
        raise UserError(f"{a} and {b} do not hold the same items; {remedy}")
    n = len(keys[0])
    only_a, only_b = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    # An item counts -1, 0 or +1: n draws from the items are one draw of how often each comes up.
    shares = [only_a / n, 1 - (only_a + only_b) / n, only_b / n]
    drawn = np.random.default_rng(0).multinomial(n, shares, size=100_000)
    low, high = np.percentile((drawn[:, 2] - drawn[:, 0]) / n, [2.5, 97.5])
    difference = f"{(only_b - only_a) / n:+.4f}, 95% interval {low:+.4f} to {high:+.4f}"
    return (
        f"A {a} acc_norm: {right[0].mean():.4f}\nB {b} acc_norm: {right[1].mean():.4f}\n"
        f"{n} items: only A is right on {only_a}, only B on {only_b}\n"
        f"B - A: {difference} (paired bootstrap)"
    )


# Command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    model: str = "gpt2"  # gpt2 ... gpt2-xl, or a directory: a checkpoint such as log/step_19073
    data: Path = Path(DATA)  # JSON lines; hellaswag_val.jsonl is downloaded to here if not there
    limit: int | None = None  # score so many items, evenly spaced over the file
    style: Literal["completion", "harness"] = "completion"  # see above
    json: Path | None = None  # write one line per item to this file
    compare: tuple[Path, Path] | None = None  # compare two such files, A and B; needs no model
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of matrix products


def load_gpt2(name_or_dir):
    """transformers' GPT2LMHeadModel in float32: OpenAI's by name, or that of a directory. UserError
    if there is none, or if its weights do not fit its config.json."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    if str(name_or_dir) not in OPENAI and not Path(name_or_dir).is_dir():
        raise UserError(f"{name_or_dir}: no such directory; give one, or {', '.join(OPENAI)}")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what matters of its warnings is refused here
    here = Path(name_or_dir).is_dir()
    remedy = "look at its files" if here else "look at the connection, or give a directory"
    with as_user_error(f"{name_or_dir} cannot be loaded", remedy):
        c = GPT2Config.from_pretrained(name_or_dir)
        weights = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
        check_memory(4 * weights + 20_000 * c.n_layer, name_or_dir)  # Python's objects, too
        load = dict(config=c, dtype=torch.float32, output_loading_info=True)
        model, info = GPT2LMHeadModel.from_pretrained(name_or_dir, **load)
    masks = (".attn.bias", ".attn.masked_bias")  # in old files, and no weights
    odd = {kind: [x for x in found if not str(x).endswith(masks)] for kind, found in info.items()}
    if odd := {kind: found for kind, found in odd.items() if found}:
        raise UserError(f"{name_or_dir}: its weights do not fit its config.json: {odd}; {remedy}")
    return model


def run(config):
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    dtype = getattr(torch, config.dtype)
    with as_user_error(f"--device {device} cannot be used here", "--device auto takes what can"):
        torch.zeros(1, device=device)
    if config.json:
        partial(config.json)  # a target that cannot be is known before the work
    items = load_items(config.data, config.limit, config.style)
    model = load_gpt2(config.model).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        result = evaluate(model, items, device, progress=True)
    if result.truncated:
        print(f"{result.truncated} items were too long and lost the beginning of their context")
    print(f"{config.model}, style {config.style}, {dtype} on {device}:\n{result}", flush=True)
    if config.json:
        save_records(config.json, items, result.losses)


def main(argv=None):
    config = tyro.cli(Config, args=argv, description=__doc__)
    try:
        print(compare(*config.compare)) if config.compare else run(config)
    except UserError as error:
        print(f"hellaswag.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
