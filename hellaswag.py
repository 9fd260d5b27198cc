"""Score GPT-2 on HellaSwag: which of four endings continues a text?

    python hellaswag.py                                          # OpenAI's GPT-2 (124M)
    python hellaswag.py --model log/step_19073 --json ours.json  # a checkpoint; a line per example
    python hellaswag.py --model gpt2 --style harness             # as lm-evaluation-harness scores
    python hellaswag.py --compare gpt2.json ours.json            # the difference, 95% interval

The validation set has 10,042 examples (Zellers et al. 2019, arXiv 1905.07830). This is one of them:

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

GPT-2 is not asked to choose. Its loss is computed on each ending, and the ending with the lowest
mean loss per token counts as its answer:

    mean_losses = []
    for ending in item.endings:
        tokens = torch.tensor([item.context + ending])
        logits = model(tokens)[0, len(item.context) - 1 : -1]  # they predict the ending's tokens
        mean_losses.append(F.cross_entropy(logits, torch.tensor(ending)).item())
    answer = mean_losses.index(min(mean_losses))

Here an item is an example as token ids. `score` computes the same losses, but reads each context
only once and many items at a time (on a CPU about twice as fast). train_gpt2.py calls `evaluate`
with its own network. The command line scores transformers' GPT-2, so it is an independent check of
the number in a run's log. The last line that it prints is

    10042 acc: 0.2859 acc_norm: 0.2955 ± 0.0046

It gives the number of examples; acc, the accuracy when the ending with the lowest total loss wins;
acc_norm, the accuracy when the lowest mean loss wins; and the standard error of acc_norm. Published
numbers come in two styles (Ctx_b is ctx_b.capitalize(); see `clean`):

                 completion (build-nanogpt, llm.c)     harness (lm-evaluation-harness)
    context      `ctx`                                 `activity_label: ctx_a Ctx_b`, cleaned,
                                                       without a space at its end
    ending       " " + ending                          " " + ending, cleaned
    token ids    context and ending separately         both together, less those of the context
    acc_norm     loss / tokens of the ending           loss / characters of the cleaned ending
    GPT-2 124M   acc 0.2859, acc_norm 0.2955           acc 0.2892, acc_norm 0.3114

The last row is from the docstring of build-nanogpt's hellaswag.py. The harness says that it divides
by bytes, but it divides by characters (its issue 3278). They differ in 181 examples.
"""

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from fineweb import UserError, as_user_error, gpt2_tokenizer, load_tokenizer, write_atomically

REPO = "Rowan/hellaswag"  # a dataset on huggingface.co
REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"  # a commit of REPO
FILE = "data/validation-00000-of-00001.parquet"  # in REPO
DATA = f"hellaswag/{FILE}"  # where FILE is downloaded to
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names on huggingface.co

# Items -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """An example as token ids."""

    index: int  # `ind` in the file; the line number, counted from 0, if there is none
    label: int  # the right ending, 0 to 3
    context: list[int]  # token ids
    endings: list[list[int]]  # token ids of the four endings
    lengths: list[int]  # what acc_norm divides by: tokens, or characters in style harness


def load_items(path=DATA, limit=None, style="completion", enc=None):
    """Read a list of Item from JSON lines or Parquet. If the default file is missing, download it.

    enc: the model's tokenizer, by default GPT-2's.
    limit: read only this many items, evenly spaced over the file, because the official file has all
    items from ActivityNet before all items from WikiHow."""
    path = Path(path)
    enc = enc or gpt2_tokenizer()
    if path == Path(DATA) and not path.exists():
        download()
    with as_user_error(f"{path} cannot be read", "check the file and its name"):
        content = path.read_bytes()
        if content.startswith(b"PAR1"):  # as all Parquet files do
            lines = pyarrow.parquet.read_table(path).to_pylist()  # dictionaries
        else:
            lines = content.splitlines()
    n = len(lines) if limit is None else min(limit, len(lines))
    if n < 1:
        what = f"nothing to score: {path} has {len(lines)} lines, and --limit is {limit}"
        raise UserError(f"{what}; choose another --data or --limit")
    items = []
    for i in range(n):
        number = i * len(lines) // n
        what = f"{path}, line {number + 1} is not an example"
        with as_user_error(what, "correct or delete the line"):
            line = lines[number]
            record = line if isinstance(line, dict) else json.loads(line)
            items.append(encode(number, record, style, enc))
    return items


def items_or_none(path, block_size, enc=None):
    """All items, for evaluation during training. Rank 0 reads them and sends them to the other
    processes, so all have the same. If it cannot read them, or if an ending does not fit into the
    model's context, it prints a warning, and all processes return None."""
    result = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            items = load_items(path, enc=enc)
            for item in items:
                fit(item, block_size)  # raises UserError now rather than in an evaluation
            result = [items]
        except UserError as error:
            print(f"warning: HellaSwag is off: {error}", flush=True)
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def download():
    """Download the official file to DATA."""
    remedy = f"download {FILE} of the dataset {REPO} on huggingface.co and put it at {DATA}"
    with as_user_error(f"{DATA} is missing and cannot be downloaded", remedy):
        from huggingface_hub import hf_hub_download, utils

        utils.disable_progress_bars()
        hf_hub_download(REPO, FILE, repo_type="dataset", revision=REVISION, local_dir="hellaswag")


def clean(text, style):
    """In style harness, the text after the harness's substitutions, in its order."""
    if style == "harness":
        text = text.strip()
        text = text.replace(" [title]", ". ")  # WikiHow's
        text = re.sub(r"\[.*?\]", "", text)
        text = text.replace("  ", " ")
    return text


def encode(number, record, style, enc):
    """The Item of record `number` of a file, tokenized as the table at the top of this file says. A
    malformed record raises some exception, of which the caller makes a UserError."""
    context = record["ctx"]
    endings = [clean(ending, style) for ending in record["endings"]]
    label = int(record["label"])  # a string in the hub's file
    if label not in range(4) or len(endings) != 4:
        raise ValueError(f"it has {len(endings)} endings and the label {label}")
    if not all(text.strip() for text in [context, *endings]):
        raise ValueError("ctx or an ending is empty")
    if style == "completion":
        context_ids = enc.encode(context).tolist()
        ending_ids = [enc.encode(" " + ending).tolist() for ending in endings]
        lengths = [len(ids) for ids in ending_ids]
    else:
        context = record["ctx_a"] + " " + record["ctx_b"].capitalize()
        context = clean(record["activity_label"] + ": " + context, style)
        # GPT-2's tokens begin with spaces, so a space after the context belongs to the ending.
        context_ids = enc.encode(context.rstrip()).tolist()
        whole_ids = [enc.encode(context + " " + ending).tolist() for ending in endings]
        ending_ids = [ids[len(context_ids) :] for ids in whole_ids]
        lengths = [len(ending) for ending in endings]
    if not all([context_ids, *ending_ids]):
        raise ValueError("the tokenizer does not know its characters")
    return Item(int(record.get("ind", number)), label, context_ids, ending_ids, lengths)


# Scoring ---------------------------------------------------------------------------------------


def fit(item, block_size):
    """The item, with its context cut from the left so that it and the longest ending fit into
    block_size tokens. UserError if an ending alone is too long."""
    longest = max(len(ending) for ending in item.endings)
    if longest > block_size:
        what = f"example {item.index} has an ending of {longest} tokens"
        raise UserError(f"{what}, but the model's context has {block_size}; remove the example")
    room = block_size + 1 - longest  # the last token of an ending is not read
    return replace(item, context=item.context[-room:])


def row_length(item):
    """The length of the item's row in `pack`: a multiple of 8, which CUDA's kernels prefer."""
    read = len(item.context) + sum(len(ending) - 1 for ending in item.endings)
    return 8 * math.ceil(read / 8)


def batches(items, token_budget):
    """Yield lists of indices into `items`, whose rows have similar lengths. The longest come first,
    so that memory runs out in the first batch or never."""
    order = sorted(range(len(items)), key=lambda i: row_length(items[i]), reverse=True)
    while order:
        B = max(1, token_budget // row_length(items[order[0]]))
        yield order[:B]
        order = order[B:]


def pack(items):
    """The tensors of a batch of B items. Each item is a row of T tokens: the context, and then all
    four endings side by side, so that the model reads the context once and not four times. If the
    context is C D, and the first endings are `a b` and `e f g`, the row begins

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

    So the losses are those of four separate rows, and it does not matter if a row is longer than
    the model's context, because its positions fit. If the endings have S tokens in all, returns

    grid    (3, B, T) int64: tokens, positions and segments; padding is 0
    scored  (2, S) int64: the index in the flattened (B * T) of each prediction, and its token"""
    T = max(row_length(item) for item in items)
    grid = torch.zeros(3, len(items), T, dtype=torch.int64)
    where = []
    targets = []
    for b, item in enumerate(items):
        n = len(item.context)
        tokens = list(item.context)
        positions = list(range(n))
        segments = [0] * n
        for i, ending in enumerate(item.endings):
            read = ending[:-1]
            start = b * T + len(tokens)
            # The context's last token predicts the first token of every ending.
            where += [b * T + n - 1, *range(start, start + len(read))]
            targets += ending
            tokens += read
            positions += range(n, n + len(read))
            segments += [1 + i] * len(read)
        grid[:, b, : len(tokens)] = torch.tensor([tokens, positions, segments])
    return grid, torch.tensor([where, targets])


def attention_mask(segments):
    """The mask that pack describes, (B, 1, T, T) bool. segments: (B, T) int64."""
    column = torch.arange(segments.size(1), device=segments.device)
    causal = column[:, None] >= column
    query = segments[:, :, None]
    key = segments[:, None, :]
    # Padding has segment 0, like the context, but no ending sees it, because it comes last.
    return (causal & ((key == 0) | (key == query)))[:, None]


def hidden_states(model, idx, positions, mask):
    """The input of lm_head, (B, T, C). idx, positions: (B, T) int64; mask: (B, 1, T, T) bool.

    The forward pass of train_gpt2.py's network takes neither positions nor a mask, so its layers
    are called one by one."""
    transformer = model.transformer
    if hasattr(model.config, "model_type"):  # transformers' GPT2LMHeadModel
        model.set_attn_implementation("sdpa")  # the others misread such masks
        return transformer(idx, position_ids=positions, attention_mask=mask)[0]
    x = transformer.wte(idx) + transformer.wpe(positions)  # (B, T, C)
    B, T, C = x.shape
    for block in transformer.h:
        attn = block.attn
        qkv = attn.c_attn(block.ln_1(x)).split(C, dim=2)  # three times (B, T, C)
        q, k, v = (t.view(B, T, attn.n_head, -1).transpose(1, 2) for t in qkv)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        x = x + block.mlp(block.ln_2(x))
    return transformer.ln_f(x)


def token_losses(model, grid, scored):
    """The loss of each scored token in nats, (S,) float32. grid and scored are those of `pack`."""
    idx, positions, segments = grid
    where, targets = scored
    # All but cuDNN, which PyTorch prefers on Hopper, and which has given wrong results with masks,
    # without an error. (Flash attention takes a mask only on a CPU.)
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels):
        hidden = hidden_states(model, idx, positions, attention_mask(segments))
    hidden = hidden.flatten(0, 1)[where]  # (S, C)
    # OpenAI's logits are near -100, where bfloat16 rounds by up to 0.25. Softmax ignores a
    # constant, so their mean is subtracted, as the mean row of the weights. The results are below
    # 16, where bfloat16 rounds by at most 0.03.
    weight = model.lm_head.weight
    mean = weight.mean(0)
    # Cross entropy is log(sum(exp(logits))) - logits[target]. All (S, V) logits would take
    # gigabytes, so they are made for 4,096 tokens of the vocabulary at a time.
    chunks = (F.linear(hidden, part - mean).float() for part in weight.split(4096))
    log_sums = torch.stack([chunk.logsumexp(1) for chunk in chunks]).logsumexp(0)
    target_logits = torch.einsum("sc,sc->s", hidden, weight[targets] - mean)  # rounded alike
    # Even so, rounding can make the loss of an almost certain token negative.
    return (log_sums - target_logits).clamp(min=0)


@torch.no_grad()
def score(model, items, device, token_budget=None, progress=False):
    """The summed loss of each ending in nats, (len(items), 4) float64 on the CPU.

    model: train_gpt2.py's GPT or transformers' GPT2LMHeadModel, on `device`. It is in eval mode
    during the call. The caller's autocast applies, and no random numbers are used.
    token_budget: the number of tokens in a batch, including padding."""
    device = torch.device(device)
    token_budget = token_budget or (32768 if device.type == "cuda" else 1024)
    block_size = model.transformer.wpe.num_embeddings
    items = [fit(item, block_size) for item in items]
    table = torch.zeros(len(items), 4, dtype=torch.float64)
    bar = tqdm(total=len(items), unit="example", disable=not progress)
    was_training = model.training
    model.eval()
    for numbers in batches(items, token_budget):
        batch = [items[i] for i in numbers]
        grid, scored = pack(batch)
        losses = token_losses(model, grid.to(device), scored.to(device)).cpu().double()
        token_counts = [len(ending) for item in batch for ending in item.endings]
        sums = torch.stack([part.sum() for part in losses.split(token_counts)])
        table[numbers] = sums.view(-1, 4)
        bar.update(len(batch))
    bar.close()
    model.train(was_training)
    return table


def picks(items, losses):
    """The endings with the lowest loss, and those with the lowest loss per unit of length: two
    tensors, (len(items),) int64. losses: (len(items), 4)."""
    lengths = torch.tensor([item.lengths for item in items])
    return losses.argmin(1), (losses / lengths).argmin(1)


@dataclass(frozen=True)
class Result:
    acc: float
    acc_norm: float
    n: int  # number of items
    losses: torch.Tensor  # (n, 4) float64, summed losses in nats, in the order of the items

    def __str__(self):
        stderr = math.sqrt(self.acc_norm * (1 - self.acc_norm) / self.n)
        return f"{self.n} acc: {self.acc:.4f} acc_norm: {self.acc_norm:.4f} ± {stderr:.4f}"


def evaluate(model, items, device, rank=0, world_size=1, token_budget=None, progress=False):
    """Score all items. All processes call this with the same items; each scores every
    world_size-th item, and all return the same Result. The other arguments are those of `score`.
    Raises UserError, in all processes alike, if a loss is not finite."""
    share = score(model, items[rank::world_size], device, token_budget, progress and rank == 0)
    shares = [share]
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, share)
    losses = torch.zeros(len(items), 4, dtype=torch.float64)
    for i, share in enumerate(shares):
        losses[i::world_size] = share
    for item, values in zip(items, losses.tolist()):
        if not all(math.isfinite(value) for value in values):
            what = f"HellaSwag example {item.index}: its losses are {values}"
            raise UserError(f"{what}; check the model's weights, and --dtype")
    labels = torch.tensor([item.label for item in items])
    acc, acc_norm = [(pick == labels).double().mean().item() for pick in picks(items, losses)]
    return Result(acc, acc_norm, len(items), losses)


# One line per item: write, compare -------------------------------------------------------------


def save_records(path, items, losses, style):
    """Write one JSON object per item: index, label, style, losses (four, in nats), lengths (four),
    pick and pick_norm, which are the model's answers."""
    lines = []
    answers = [pick.tolist() for pick in picks(items, losses)]
    for item, summed, pick, pick_norm in zip(items, losses.tolist(), *answers):
        record = {"index": item.index, "label": item.label, "style": style, "losses": summed}
        record |= {"lengths": item.lengths, "pick": pick, "pick_norm": pick_norm}
        lines.append(json.dumps(record) + "\n")
    write_atomically(path, lambda file: file.write("".join(lines).encode()))


def compare(a, b):
    """The text that --compare prints: the difference of acc_norm between two files of save_records
    and its 95% interval. Differences are taken item by item, which makes the interval narrow,
    because the same items are hard for both models."""
    keys = []
    right = []
    styles = []
    for path in (a, b):
        with as_user_error(f"{path} is not a file that --json wrote", "choose another file"):
            records = [json.loads(line) for line in Path(path).read_text().splitlines()]
            keys.append([(record["index"], record["label"]) for record in records])
            right.append([record["pick_norm"] == record["label"] for record in records])
            styles.append(records[0].get("style", "unknown"))  # old files do not hold it
    if keys[0] != keys[1]:
        what = f"{a} and {b} do not hold the same examples"
        raise UserError(f"{what}; use the same --data and --limit")
    if styles[0] != styles[1] and "unknown" not in styles:
        what = f"{a} has style {styles[0]}, and {b} has style {styles[1]}"
        raise UserError(f"{what}; score both models in the same --style")
    n = len(keys[0])
    only_a = sum(in_a and not in_b for in_a, in_b in zip(*right))
    only_b = sum(in_b and not in_a for in_a, in_b in zip(*right))
    mean = (only_b - only_a) / n  # of differences that are -1, 0 or 1
    variance = (only_a + only_b) / n - mean**2
    margin = 1.96 * math.sqrt(variance / n)
    interval = f"95% interval {mean - margin:+.4f} to {mean + margin:+.4f}"
    note = "warning: a file of unknown style must have the style of the other one\n"
    return (
        f"{note if 'unknown' in styles else ''}"
        f"A {a} acc_norm: {sum(right[0]) / n:.4f} (style {styles[0]})\n"
        f"B {b} acc_norm: {sum(right[1]) / n:.4f} (style {styles[1]})\n"
        f"{n} examples: only A is right on {only_a}, only B on {only_b}\n"
        f"B - A: {mean:+.4f}, {interval} (paired, normal approximation)"
    )


# transformers' GPT-2 --------------------------------------------------------------------------


def load_gpt2(name):
    """transformers' GPT2LMHeadModel in float32, with OpenAI's weights or those of a directory.
    UserError if there is no GPT-2, or if its weights do not fit its config.json."""
    from transformers import GPT2LMHeadModel  # importing transformers takes a second
    from transformers.utils import logging

    if not Path(name).is_dir() and name.removeprefix("openai-community/") not in OPENAI:
        raise UserError(f"{name}: no such directory; give one that exists, or {', '.join(OPENAI)}")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the problems that it would warn of are errors here
    with as_user_error(f"{name} cannot be loaded", "check the network, or give a checkpoint"):
        model, info = GPT2LMHeadModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    wrong = [str(key) for key in wrong if not str(key).endswith("masked_bias")]  # in old files
    if wrong:
        what = f"{name}: {len(wrong)} tensors are missing, unknown or of another shape"
        raise UserError(f"{what}, such as {min(wrong)}; give the directory of a GPT-2")
    return model


# Command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The flags. One that has no effect, such as --model beside --compare, is ignored."""

    model: str = "gpt2"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a directory: log/step_19073
    data: Path = Path(DATA)  # JSON lines or Parquet; the default is downloaded if it is missing
    limit: int | None = None  # score only this many examples, evenly spaced over the file
    style: Literal["completion", "harness"] = "completion"  # see the table above
    json: Path | None = None  # write one line per example to this file
    compare: tuple[Path, Path] | None = None  # compare two such files, A and B; loads no model
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the model's matrix products


def run(config):
    """Score a model and print the result."""
    if config.json and config.json.is_dir():
        raise UserError(f"--json {config.json} is a directory; name a file")
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    dtype = getattr(torch, config.dtype)
    model = load_gpt2(config.model).to(device)
    enc = load_tokenizer(config.model) or gpt2_tokenizer()
    if enc.n_vocab > model.config.vocab_size:
        what = f"{config.model} has {model.config.vocab_size} rows, too few for its tokenizer"
        raise UserError(f"{what}; put the right tokenizer.json beside the weights")
    items = load_items(config.data, config.limit, config.style, enc)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        result = evaluate(model, items, device, progress=True)
    print(f"{config.model}, style {config.style}, {dtype} on {device}:\n{result}", flush=True)
    if config.json:
        save_records(config.json, items, result.losses, config.style)


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # some consoles cannot show all characters
    config = tyro.cli(Config, args=argv, description=__doc__)
    try:
        if config.compare:
            print(compare(*config.compare))
        else:
            run(config)
    except UserError as error:
        print(f"hellaswag.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
