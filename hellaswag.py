"""Score GPT-2 on HellaSwag: which of four endings continues a text?

    python hellaswag.py                                          # OpenAI's GPT-2 (124M)
    python hellaswag.py --model log/step_19073 --json ours.json  # a checkpoint; one line per item
    python hellaswag.py --model gpt2 --style harness             # as lm-evaluation-harness scores
    python hellaswag.py --compare gpt2.json ours.json            # the difference, 95% interval

The validation set has 10,042 items (Zellers et al. 2019, arXiv 1905.07830). This is one of them:

    {"ind": 24,
     "activity_label": "Roof shingle removal",
     "ctx_a": "A man is sitting on a roof.",
     "ctx_b": "he",
     "ctx": "A man is sitting on a roof. he",
     "endings": ["is using wrap to wrap a pair of skis.",
                 "is ripping level tiles off.",
                 "is holding a rubik's cube.",
                 "starts pulling up roofing on a roof."],
     "label": 3,
     "source_id": "activitynet~v_-JhWjGDPHMY", "split": "val", "split_type": "indomain"}

GPT-2 cannot answer a question, but it gives every text a loss. The ending with the lowest mean loss
per token counts as its answer, and the answer is right if it equals the label:

    mean_losses = []
    for ending in item.endings:
        tokens = torch.tensor([item.context + ending])
        logits = model(tokens)[0, len(item.context) - 1 : -1]  # they predict the ending's tokens
        mean_losses.append(F.cross_entropy(logits, torch.tensor(ending)).item())
    answer = mean_losses.index(min(mean_losses))

This file computes the same losses about twice as fast. train_gpt2.py calls `evaluate` with
its own network. The command line scores transformers' GPT-2 instead, so it is an independent check
of the number in a run's log. Its last line reads

    10042 acc: 0.2859 acc_norm: 0.2955 ± 0.0046

for the number of items, the accuracy if the lowest sum of losses decides, the accuracy if the
lowest mean decides, and the standard error of the latter, sqrt(p (1 - p) / n). If losses are equal,
the first ending counts.

Published numbers come in two styles:

                 completion (build-nanogpt, llm.c)     harness (lm-evaluation-harness)
    context      `ctx`                                 `activity_label: ctx_a Ctx_b`, cleaned,
                                                       without a space at its end
    ending       " " + ending                          " " + ending, cleaned
    token ids    context and ending separately         both together, then cut after the context
    acc_norm     loss / tokens of the ending           loss / characters of the cleaned ending
    GPT-2 124M   acc 0.2859, acc_norm 0.2955           acc 0.2892, acc_norm 0.3114

Cleaning strips white space, replaces WikiHow's " [title]" by ". ", deletes all other [brackets],
and replaces double spaces by single ones. Ctx_b is ctx_b.capitalize(). The harness says that it
divides by bytes, but it divides by characters (its issue 3278); they differ in 181 items. Without
ctx_a and ctx_b this style uses `ctx` and prints a warning, because that capitalization is missing.
The last row is from the docstring of build-nanogpt's hellaswag.py.
"""

import hashlib
import json
import math
import os
import re
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fineweb import UserError, as_user_error, token_ids

REPO = "Rowan/hellaswag"  # a dataset on huggingface.co
REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"  # of REPO
FILE = "data/validation-00000-of-00001.parquet"  # in REPO
SHA256 = "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"  # of FILE
N_ITEMS = 10042  # in FILE
DATA = f"hellaswag/{FILE}"  # where FILE is downloaded to
OLD_DATA = "hellaswag/hellaswag_val.jsonl"  # the same items, which GitHub had until 2026
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names on huggingface.co
VOCAB_SLICE = 4096  # tokens whose logits are computed at once, because all of them take gigabytes

# Items -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    index: int  # `ind` in the file; the line number, counted from 0, if there is none
    label: int  # the right ending, 0 to 3
    context: list[int]  # token ids
    endings: list[list[int]]  # token ids of the four endings
    lengths: list[int]  # what acc_norm divides by: tokens, or characters in style harness


def load_items(path=DATA, limit=None, style="completion"):
    """Read items from a file of JSON lines or Parquet. Returns a list of Item.

    limit: return this many items, evenly spaced over the file, because the official file has all
    items from ActivityNet before all items from WikiHow.

    If `path` is the default and the file is missing, it is downloaded. If torch.distributed is
    initialised, all processes must call this function, and a failed download raises UserError in
    all of them."""
    path = find_file(Path(path))
    records = []
    for number, record in read_records(path):
        check_record(f"{path}, line {number + 1}", number, record, style)
        records.append((number, record))
    if not records:
        raise UserError(f"nothing to score: {path} has no items; choose another --data")
    if limit is not None and limit < 1:
        raise UserError(f"nothing to score: --limit is {limit}; it must be at least 1")
    if style == "harness" and not all(has_parts(record) for _, record in records):
        text = f"{path} has no ctx_a and ctx_b: scores differ slightly from the harness's own"
        warnings.warn(text, stacklevel=2)
    n = min(limit or len(records), len(records))
    chosen = [records[i * len(records) // n] for i in range(n)]
    return [encode(number, record, style) for number, record in chosen]


def items_or_none(path, block_size):
    """All items, for evaluation during training. Returns None in all processes, and rank 0 prints a
    warning, if a process cannot read the items, if an ending does not fit into the model's context,
    or if the processes do not read the same items."""
    items = []
    problem = None
    try:
        items = load_items(path)
        for item in items:
            context_room(item, block_size)  # raises UserError now rather than in an evaluation
    except UserError as error:
        problem = str(error)
    fingerprint = hashlib.sha256(repr(items).encode()).hexdigest()
    problems, fingerprints = zip(*gather((problem, fingerprint)))
    reason = next((text for text in problems if text), None)
    if reason and not all(problems):
        reason += f" (in process {problems.index(reason)})"
    if len(set(fingerprints)) > 1 and not reason:
        reason = f"{path} differs between the processes; copy the same file to all machines"
    if not reason:
        return items
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"warning: HellaSwag is off: {reason}", flush=True)
    return None


def gather(value):
    """A list of the values that all processes pass, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def find_file(path):
    """The file to read: `path`, or OLD_DATA in place of a missing DATA. If DATA has to be
    downloaded, one process per machine does so, and the others wait. If that fails on one machine,
    all processes raise UserError."""
    if path == Path(DATA) and not path.exists() and Path(OLD_DATA).exists():
        path = Path(OLD_DATA)
    local_rank = int(os.environ.get("LOCAL_RANK") or 0) if dist.is_initialized() else 0
    problem = None
    if local_rank == 0 and not path.exists():
        try:
            download(path)
        except UserError as error:
            problem = str(error)
    problems = [problem for problem in gather(problem) if problem]
    if problems:
        raise UserError(problems[0])
    return path


def download(path):
    """Download the official file, and delete it if it is not the one with SHA256."""
    if path != Path(DATA):  # a misspelt --data must not start a download
        raise UserError(f"{path}: no such file; correct --data, or omit it to use the official one")
    remedy = f"download {FILE} of the dataset {REPO} on huggingface.co and put it at {path}"
    with as_user_error(f"{path} is missing and cannot be downloaded", remedy):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        folder = path.parents[1]
        hf_hub_download(REPO, FILE, repo_type="dataset", revision=REVISION, local_dir=folder)
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
            path.unlink()
            raise ValueError("the server sent a file with a different SHA-256")


def read_records(path):
    """A list of (number, record) pairs. A record is a line of JSON or a row of Parquet, and its
    number is that of the line or row, from 0."""
    with as_user_error(f"{path} cannot be read", "check the file"):
        content = path.read_bytes()
        if content.startswith(b"PAR1"):  # as all Parquet files do
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
            return list(enumerate(table.to_pylist()))
    records = []
    for number, line in enumerate(content.splitlines()):
        if line.strip():
            where = f"{path}, line {number + 1}"
            with as_user_error(f"{where} is not JSON", "correct or delete the line"):
                records.append((number, json.loads(line)))
    return records


def check_record(where, number, record, style):
    """Raise UserError with a list of everything that is wrong with a record, if anything is."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; correct or delete the line")
    wrong = []
    if not is_text(record.get("ctx")):
        wrong.append("ctx is missing, empty or not text")
    if style == "harness" and not is_text(record.get("activity_label")):
        wrong.append("activity_label is missing, empty or not text")
    for key in ("ctx_a", "ctx_b"):  # either may be empty, and both may be missing
        if style == "harness" and not isinstance(record.get(key, ""), str):
            wrong.append(f"{key} is not text")
    endings = record.get("endings")
    if not isinstance(endings, list) or len(endings) != 4:
        wrong.append("endings is missing or is not a list of four")
    elif not all(is_text(ending) and clean(ending, style).strip() for ending in endings):
        wrong.append("an ending is empty or not text")
    if str(record.get("label")) not in ("0", "1", "2", "3"):  # int, or text as on the hub
        wrong.append("label is missing or is not 0, 1, 2 or 3")
    if not re.fullmatch("[0-9]{1,9}", str(record.get("ind", number))):
        wrong.append("ind is not a whole number")
    if wrong:
        raise UserError(f"{where}: {', '.join(wrong)}; correct or delete the line")


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def has_parts(record):
    return "ctx_a" in record and "ctx_b" in record


def clean(text, style):
    """In style harness, the text after the harness's substitutions, in its order."""
    if style == "completion":
        return text
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


def encode(number, record, style):
    """Tokenize a record as the table at the top of this file says. Returns an Item."""
    if style == "completion":
        context = token_ids(record["ctx"])
        endings = [token_ids(" " + ending) for ending in record["endings"]]
        lengths = [len(ending) for ending in endings]
    else:
        ctx = record["ctx"]
        if has_parts(record):
            ctx = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
        query = clean(f"{record['activity_label']}: {ctx}", style)
        texts = [clean(ending, style) for ending in record["endings"]]
        # A token of GPT-2 begins with its space, so a space after the query belongs to the ending.
        context = token_ids(query.rstrip())
        endings = [token_ids(f"{query} {text}")[len(context) :] for text in texts]
        lengths = [len(text) for text in texts]
    return Item(
        index=int(record.get("ind", number)),
        label=int(record["label"]),
        context=context.tolist(),
        endings=[ending.tolist() for ending in endings],
        lengths=lengths,
    )


# Rows and batches -----------------------------------------------------------------------------


@dataclass
class Row:
    """An item as a row of a batch: the context, and then all four endings side by side, so that the
    model reads the context once and not four times. If the context is C D, and the first endings
    are `a b` and `e f g`, the row begins

        columns      0  1  2  3  4
        tokens       C  D  a  e  f    the last token of an ending is predicted, but not read
        predicted       a  b  f  g
                        e
        positions    0  1  2  2  3    each ending starts right after the context
        segments     0  0  1  2  2    0 is the context, 1 to 4 are the endings

    An ending sees the context and itself, but not the other endings. This is the mask, with an x
    where the token on the left sees the token above:

                     C  D  a  e  f
                C    x  .  .  .  .
                D    x  x  .  .  .
                a    x  x  x  .  .
                e    x  x  .  x  .
                f    x  x  .  x  x

    So the losses are those of four separate rows."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    scored: list[int]  # columns that predict tokens of endings, here 1 2 1 3 4
    targets: list[int]  # the predicted tokens, here a b e f g
    slots: list[int]  # the ending of each target, here 0 0 1 1 1, plus 4 * number of the item


def pack(number, item, block_size):
    """A list with the item's Row. It has several rows, with fewer endings each, if the model's
    context is too short for one. A context that is too long for the longest ending loses its
    beginning."""
    context = item.context[-context_room(item, block_size) :]
    rows = [context_row(context)]
    for i, ending in enumerate(item.endings):
        read = ending[:-1]
        if len(rows[-1].tokens) + len(read) > block_size:
            rows.append(context_row(context))
        row = rows[-1]
        start = len(row.tokens)
        row.tokens += read
        row.positions += range(len(context), len(context) + len(read))
        row.segments += [1 + i] * len(read)
        row.scored += [len(context) - 1, *range(start, start + len(read))]
        row.targets += ending
        row.slots += [4 * number + i] * len(ending)
    return rows


def context_row(context):
    """A Row with the context only."""
    n = len(context)
    return Row(list(context), list(range(n)), [0] * n, scored=[], targets=[], slots=[])


def context_room(item, block_size):
    """How many tokens of context fit before the longest ending, whose last token is not read."""
    longest = max(len(ending) for ending in item.endings)
    if longest > block_size:
        what = f"item {item.index} has an ending of {longest} tokens"
        raise UserError(f"{what}, but the model's context has {block_size}; remove the item")
    return block_size + 1 - longest


def batches(rows, block_size, token_budget):
    """Yield (rows, T) for batches of rows of similar length, which are padded to T tokens. The
    longest come first, so that memory runs out in the first batch or never.

    token_budget: the number of tokens in a batch, including padding."""
    rows = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
    while rows:
        T = 8 * math.ceil(len(rows[0].tokens) / 8)  # a multiple of 8, which CUDA's kernels prefer
        T = min(T, block_size)
        B = max(1, token_budget // T)
        yield rows[:B], T
        rows = rows[B:]


def to_tensors(rows, T):
    """The tensors of a batch of B rows, which predict S tokens:

    grid    (3, B, T) int64: tokens, positions and segments; padding is 0
    scored  (2, S) int64: where in the flattened B * T a token is predicted, and which token
    slots   (S,) int64"""
    grid = np.zeros((3, len(rows), T), np.int64)
    where = []
    for i, row in enumerate(rows):
        grid[:, i, : len(row.tokens)] = [row.tokens, row.positions, row.segments]
        where += [i * T + column for column in row.scored]
    targets = [target for row in rows for target in row.targets]
    slots = [slot for row in rows for slot in row.slots]
    return torch.from_numpy(grid), torch.tensor([where, targets]), torch.tensor(slots)


# Scoring ---------------------------------------------------------------------------------------


def attention_mask(segments):
    """The mask that Row describes, (B, 1, T, T) bool. segments: (B, T) int64."""
    column = torch.arange(segments.size(1), device=segments.device)
    causal = column[:, None] >= column
    query = segments[:, :, None]
    key = segments[:, None, :]
    # Padding has segment 0, like the context, but no ending sees it, because it comes last.
    return (causal & ((key == 0) | (key == query)))[:, None]


def hidden_states(model, idx, positions, mask):
    """The input of lm_head, (B, T, C). idx, positions: (B, T) int64; mask: (B, 1, T, T) bool.

    The forward pass of train_gpt2.py's network takes neither positions nor a mask, because training
    needs neither. So this function calls the layers of that network one by one."""
    transformer = model.transformer
    if is_transformers_model(model):
        return transformer(idx, position_ids=positions, attention_mask=mask)[0]
    x = transformer.wte(idx) + transformer.wpe(positions)  # (B, T, C)
    B, T, C = x.shape
    for block in transformer.h:
        attn = block.attn
        heads = (B, T, attn.n_head, C // attn.n_head)
        q, k, v = attn.c_attn(block.ln_1(x)).split(C, dim=2)  # (B, T, C) each
        q = q.view(heads).transpose(1, 2)  # (B, H, T, D)
        k = k.view(heads).transpose(1, 2)
        v = v.view(heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        x = x + block.mlp(block.ln_2(x))
    return transformer.ln_f(x)


def is_transformers_model(model):
    return hasattr(model.config, "model_type")  # train_gpt2.py's GPTConfig has none


def centred_head(model, device):
    """lm_head's weight minus the mean of its rows, (V, C), in the precision of matrix products.

    The mean changes all logits of a position equally, so the probabilities stay the same. But
    bfloat16 rounds logits near -100, which OpenAI's models have, by up to 0.25. Without their mean
    the logits are closer to 0, and below 16 it rounds by at most 0.03."""
    weight = model.lm_head.weight
    weight = weight - weight.mean(0)
    if torch.is_autocast_enabled(device.type):
        weight = weight.to(torch.get_autocast_dtype(device.type))
    return weight


def token_losses(model, grid, scored, head=None):
    """The model's loss for each scored token, (S,) float32, in nats. grid and scored are those of
    to_tensors, head is that of centred_head."""
    idx, positions, segments = grid
    where, targets = scored
    if head is None:
        head = centred_head(model, idx.device)
    # Not cuDNN, PyTorch's first choice on Hopper: with masks it has silently been wrong.
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels) if idx.is_cuda else nullcontext():
        hidden = hidden_states(model, idx, positions, attention_mask(segments))
    hidden = hidden.flatten(0, 1)[where].to(head.dtype)  # (S, C)
    # Cross entropy is log(sum(exp(logits))) - logits[target].
    logits = (F.linear(hidden, part).float() for part in head.split(VOCAB_SLICE))
    log_sums = torch.stack([part.logsumexp(1) for part in logits])
    target_logits = (hidden.float() * head[targets].float()).sum(1)
    losses = log_sums.logsumexp(0) - target_logits  # (S,)
    return losses.clamp(min=0)  # rounding can make the loss of an almost certain token negative


@torch.no_grad()
def score(model, items, device, token_budget=None, progress=False):
    """The summed loss of each ending in nats, (len(items), 4) float64 on the CPU, in the order of
    `items`. If a loss is not finite, scoring stops, and the remaining sums are incomplete.

    model: train_gpt2.py's GPT or transformers' GPT2LMHeadModel, on `device`. It is in eval mode
    during the call. The caller's autocast applies. No random numbers are drawn.
    token_budget: the number of tokens in a batch, including padding."""
    if is_transformers_model(model) and model.config._attn_implementation != "sdpa":
        raise ValueError("load the model with attn_implementation='sdpa'")  # others misread masks
    device = torch.device(device)
    token_budget = token_budget or (32768 if device.type == "cuda" else 1024)
    block_size = context_size(model)
    rows = [row for i, item in enumerate(items) for row in pack(i, item, block_size)]
    sums = torch.zeros(4 * len(items), dtype=torch.float64)
    finished = torch.zeros(4 * len(items), dtype=torch.bool)
    was_training = model.training
    model.eval()
    head = centred_head(model, device)
    with tqdm(total=len(items), unit="item", disable=not progress or sys.stderr is None) as bar:
        for batch, T in batches(rows, block_size, token_budget):
            grid, scored, slots = to_tensors(batch, T)
            losses = token_losses(model, grid.to(device), scored.to(device), head)
            losses = losses.cpu().double()
            sums.index_add_(0, slots, losses)  # on the CPU: CUDA would add in any order
            finished[slots] = True
            if not losses.isfinite().all():
                break
            if not bar.disable:
                show_progress(bar, items, sums.view(-1, 4), finished.view(-1, 4).all(1))
    model.train(was_training)
    return sums.view(-1, 4)


def show_progress(bar, items, losses, finished):
    """Update the progress bar with the accuracy so far. finished: (len(items),) bool."""
    if finished.any():
        labels = torch.tensor([item.label for item in items])
        right = picks(items, losses)[1] == labels
        try:
            bar.set_postfix(acc_norm=f"{right[finished].double().mean():.4f}", refresh=False)
            bar.update(int(finished.sum()) - bar.n)
        except OSError:  # the terminal or the pipe that shows it was closed
            bar.disable = True


def picks(items, losses):
    """The endings with the lowest loss, and those with the lowest loss per unit of length: two
    tensors, (len(items),) int64. losses: (len(items), 4)."""
    lengths = torch.tensor([item.lengths for item in items])
    return losses.argmin(1), (losses / lengths).argmin(1)


def context_size(model):
    """The model's longest context in tokens."""
    return model.config.n_positions if is_transformers_model(model) else model.config.block_size


@dataclass(frozen=True)
class Result:
    acc: float
    acc_norm: float
    n: int  # number of items
    truncated: int  # number of items whose context was too long and lost its beginning
    losses: torch.Tensor  # (n, 4) float64, summed losses in nats, in the order of the items

    def __str__(self):
        stderr = math.sqrt(self.acc_norm * (1 - self.acc_norm) / self.n)
        return f"{self.n} acc: {self.acc:.4f} acc_norm: {self.acc_norm:.4f} ± {stderr:.4f}"


def evaluate(model, items, device, rank=0, world_size=1, token_budget=None, progress=False):
    """Score all items. All processes call this with the same items; each scores every
    world_size-th item, and all return the same Result. The other arguments are those of `score`.
    Raises UserError, in all processes alike, if a loss is not finite."""
    rooms = [context_room(item, context_size(model)) for item in items]
    truncated = sum(len(item.context) > room for item, room in zip(items, rooms))
    losses = torch.zeros(len(items), 4, dtype=torch.float64)
    mine = items[rank::world_size]
    losses[rank::world_size] = score(model, mine, device, token_budget, progress and rank == 0)
    if world_size > 1:  # each row is zero in all processes except one, so the sum is exact
        if torch.device(device).type == "cuda":
            losses = losses.to(device)  # NCCL needs tensors on the GPU
        dist.all_reduce(losses)
        losses = losses.cpu()
    for item, values in zip(items, losses.tolist()):
        if not all(math.isfinite(value) for value in values):
            what = f"HellaSwag item {item.index}: its losses are {values}"
            raise UserError(f"{what}; check the model's weights, and --dtype")
    labels = torch.tensor([item.label for item in items])
    acc, acc_norm = [(pick == labels).double().mean().item() for pick in picks(items, losses)]
    return Result(acc, acc_norm, len(items), truncated, losses)


# One line per item: write, read, compare -------------------------------------------------------


def temporary_path(path):
    """Where to write a file that is then renamed to `path`. For a pipe or a device this is `path`
    itself. Raises UserError if no file can be created there."""
    with as_user_error(f"{path} cannot be written", "choose another --json"):
        if path.is_dir():
            raise ValueError("it is a directory")
        if Path("/dev") in path.parents or (path.exists() and not path.is_file()):
            return path
        temporary = Path(f"{path.resolve()}.partial")  # if path is a link, next to its target
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
        return temporary


def save_records(path, items, losses):
    """Write one JSON object per item: index, label, losses (four, in nats), lengths (four), pick
    and pick_norm, which are the model's answers. The file appears when it is complete."""
    answers = [pick.tolist() for pick in picks(items, losses)]
    temporary = temporary_path(path)
    with as_user_error(f"{path} cannot be written", "choose another --json"):
        with temporary.open("a") as file:
            for item, summed, pick, pick_norm in zip(items, losses.tolist(), *answers):
                record = {
                    "index": item.index,
                    "label": item.label,
                    "losses": summed,
                    "lengths": item.lengths,
                    "pick": pick,
                    "pick_norm": pick_norm,
                }
                file.write(json.dumps(record) + "\n")
        if temporary != path:
            os.replace(temporary, path.resolve())


def read_answers(path):
    """Read a file that save_records wrote. Returns the (index, label) pairs of its n items, and for
    each whether pick_norm is right, (n,) int64."""

    def refuse(constant):
        raise ValueError(f"it has the number {constant}")

    with as_user_error(f"{path} is not a file that --json wrote", "choose another file"):
        lines = Path(path).read_text().splitlines()
        records = [json.loads(line, parse_constant=refuse) for line in lines]
        keys = [(record["index"], record["label"]) for record in records]
        right = [record["pick_norm"] == record["label"] for record in records]
        return keys, np.array(right, np.int64)


def compare(a, b):
    """The text that --compare prints: the difference of acc_norm between two files of save_records,
    B minus A, and its 95% interval. The difference is taken item by item. That makes the interval
    narrow, because the same items are hard for both models."""
    keys_a, right_a = read_answers(a)
    keys_b, right_b = read_answers(b)
    if keys_a != keys_b or not keys_a:
        remedy = "use the same --data and --limit for both"
        raise UserError(f"{a} and {b} do not hold the same items; {remedy}")
    n = len(keys_a)
    difference = right_b - right_a  # -1, 0 or 1 for each item
    mean = difference.mean()
    margin = 1.96 * difference.std() / math.sqrt(n)
    interval = f"95% interval {mean - margin:+.4f} to {mean + margin:+.4f}"
    return (
        f"A {a} acc_norm: {right_a.mean():.4f}\n"
        f"B {b} acc_norm: {right_b.mean():.4f}\n"
        f"{n} items: only A is right on {(difference == -1).sum()}, "
        f"only B on {(difference == 1).sum()}\n"
        f"B - A: {mean:+.4f}, {interval} (paired, normal approximation)"
    )


# transformers' GPT-2 --------------------------------------------------------------------------


def load_gpt2(name_or_dir):
    """transformers' GPT2LMHeadModel in float32, with OpenAI's weights or those of a directory.
    Raises UserError if there is no GPT-2, or if its weights do not fit its config.json."""
    from transformers import GPT2Config, GPT2LMHeadModel  # importing transformers takes a second
    from transformers.utils import logging

    check_name(name_or_dir)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the problems that it would warn of are errors here
    remedy = "check its files"
    if not Path(name_or_dir).is_dir():
        remedy = "check the network connection, or give a directory"
    with as_user_error(f"{name_or_dir} cannot be loaded", remedy):
        settings, _ = GPT2Config.get_config_dict(name_or_dir)
        check_settings(name_or_dir, settings)
        config = GPT2Config.from_dict(settings)
        weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
        objects = 20_000 * config.n_layer  # Python's own, in bytes
        check_memory(4 * weights + objects, name_or_dir)
        model, info = GPT2LMHeadModel.from_pretrained(
            name_or_dir,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_weights refuses them
        )
    check_weights(name_or_dir, info)
    return model


def check_name(name_or_dir):
    """Raise UserError if this is neither OpenAI's model nor a directory that can hold one."""
    folder = Path(name_or_dir)
    if not folder.is_dir():
        if str(name_or_dir).removeprefix("openai-community/") in OPENAI:
            return
        names = ", ".join(OPENAI)
        raise UserError(f"{name_or_dir}: no such directory; give one that exists, or {names}")
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} is an adapter, not a model; merge it and save it first")
    steps = {p.name.removeprefix("step_"): p for p in folder.glob("step_*") if p.is_dir()}
    numbers = [step for step in steps if step.isdecimal()]
    if numbers:
        newest = steps[max(numbers, key=int)]
        raise UserError(f"{folder} is a run, not a checkpoint; give its newest one, {newest}")


def check_settings(name, settings):
    """Raise UserError if a config.json, given as a dict, describes another kind of model."""
    model_type = settings.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise UserError(f"{name} is a {model_type}, not a GPT-2; give the directory of a GPT-2")
    if settings.get("add_cross_attention"):
        raise UserError(f"{name} is a GPT-2 with cross-attention; give one without it")


def check_weights(name, info):
    """Raise UserError if tensors are missing, unknown or of another shape. info: the lists of them
    that from_pretrained returns."""
    names = {
        "missing": info["missing_keys"],
        "unknown": info["unexpected_keys"],
        "of another shape": [found[0] for found in info["mismatched_keys"]],
    }
    for problem, found in names.items():
        # Old files also hold masks, under these names.
        found = sorted(x for x in found if not x.endswith((".attn.bias", ".attn.masked_bias")))
        if found:
            some = ", ".join(found[:2]) + (", ..." if len(found) > 2 else "")
            what = f"{name}: its weights do not fit its config.json"
            raise UserError(f"{what}: {len(found)} tensors are {problem} ({some}); check its files")


def check_memory(needed, what):
    """Raise UserError if this machine's memory is smaller than `needed` bytes."""
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            sizes = f"{needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}"
            raise UserError(f"{what}: weights of {sizes}; choose a smaller model")


# Command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    model: str = "gpt2"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a directory: log/step_19073
    data: Path = Path(DATA)  # JSON lines or Parquet; the default is downloaded if it is missing
    limit: int | None = None  # score only this many items, evenly spaced over the file
    style: Literal["completion", "harness"] = "completion"  # see the table above
    json: Path | None = None  # write one line per item to this file
    compare: tuple[Path, Path] | None = None  # compare two such files, A and B; loads no model
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the model's matrix products


def pick_device(name):
    """The torch.device of --device. Raises UserError if it cannot be used."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with as_user_error(f"--device {name} cannot be used", "choose --device auto"):
        torch.zeros(1, device=name)
    return torch.device(name)


def run(config):
    """Score a model and print the result."""
    device = pick_device(config.device)
    dtype = getattr(torch, config.dtype)
    if config.json:
        temporary_path(config.json)  # refuses an impossible path before the work begins
    items = load_items(config.data, config.limit, config.style)
    model = load_gpt2(config.model).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        result = evaluate(model, items, device, progress=True)
    try:
        if config.json:
            save_records(config.json, items, result.losses)
    finally:  # if the file cannot be written, the screen still shows the result
        if result.truncated:
            print(f"{result.truncated} items were too long and lost the beginning of their context")
        print(f"{config.model}, style {config.style}, {dtype} on {device}:\n{result}", flush=True)


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not if it is closed, or in a notebook
            stream.reconfigure(errors="replace")  # not every encoding has "±"
    config = tyro.cli(Config, args=argv, description=__doc__)
    try:
        if config.compare:
            print(compare(*config.compare))
        else:
            run(config)
    except UserError as error:
        print(f"hellaswag.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
