"""Reproduce GPT-2 (124M): the network, OpenAI's weights, training, HellaSwag, samples.

    python train_gpt2.py --demo                             # any laptop: a small GPT-2 in minutes
    python fineweb.py                                       # 10B tokens into edu_fineweb10B/
    python train_gpt2.py                                    # one GPU; the defaults are the recipe
    torchrun --standalone --nproc_per_node=8 train_gpt2.py  # eight GPUs split the same batches
    python train_gpt2.py --resume                           # go on from the newest checkpoint
    python train_gpt2.py --init_from gpt2 --sample_only     # sample OpenAI's weights

The lecture is the upper part of this file, down to the end of train(), in this order:

    the network, flash attention ............... CausalSelfAttention, attention, MLP, Block, ...
    logits, cross entropy, ln V at the start ... GPT.forward, cross_entropy
    tied embeddings, initialisation ............ GPT.__init__, GPT.init_weights
    weights in and out ......................... GPT.from_pretrained, GPT.save_pretrained
    AdamW, weight-decay groups, fused .......... GPT.configure_optimizers
    padded vocabulary, the sampling loop ....... GPT.n_ids, GPT.generate, print_samples
    warm-up, cosine, batch-size schedule ....... get_lr, get_batch_size
    batches, shards, epochs .................... DataLoaderLite
    the validation split ....................... evaluate
    devices, processes, precisions ............. init_processes, pick_device, pick_dtype
    accumulation, autocast, DDP, clipping ...... training_step
    TF32, compile, checkpoints, HellaSwag, the
    loop, overfitting one batch ................ train

The lower part, behind a rule, keeps a run safe and its screen readable. It can be skipped.

Letters in shapes: B sequences of T tokens, C channels (n_embd), V rows of the vocabulary, H heads
of D channels each. GPT-1, 2 and 3 are Radford et al. 2018 and 2019 and Brown et al. 2020.
"""

import math
import os
import time
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import fineweb
import hellaswag
from fineweb import VOCAB_SIZE, UserError, tokenizer  # UserError: shown without a traceback

# Configuration --------------------------------------------------------------------------------

PADDED_VOCAB_SIZE = 50304  # 50257 and padding to a multiple of 128, which GPUs multiply faster


@dataclass(frozen=True)
class Config:
    """A run: one knob per line, from which tyro makes the command line. Skim it at first."""

    # where from, where to
    demo: bool = False  # settings for a short run on text that ships with Python
    finetune: bool = False  # settings for --init_from on a small text: two epochs at a low rate
    data_dir: str = "edu_fineweb10B"  # shards that fineweb.py wrote
    out_dir: str = "log"  # log.txt and checkpoints
    tensorboard: bool = False  # also writes the log's records there for TensorBoard
    wandb: str = ""  # also sends them to this project of Weights & Biases
    init_from: str = "scratch"  # or gpt2 ... gpt2-xl, or a directory: weights to start from
    resume: bool = False  # go on from out_dir's newest checkpoint, with the settings of its run
    # the network, unless --init_from brings its own
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3-125M"] = "gpt2"  # SIZES
    n_layer: int | None = None  # blocks; these three, if given, replace those of that size
    n_head: int | None = None  # attention heads per block
    n_embd: int | None = None  # channels, a multiple of n_head
    block_size: int | None = None  # longest context; None: 1024 tokens, or seq_len if longer
    vocab_size: int = PADDED_VOCAB_SIZE  # rows of the vocabulary
    # batch and data order
    total_batch_size: int = 524288  # tokens per update, 2**19: 0.5M in GPT-3 table 2.1
    batch_ramp_steps: int = 0  # updates with 1/8, then 1/4, then 1/2 of total_batch_size
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences on one device at a time
    seq_len: int = 1024  # tokens per sequence
    shuffle: bool = True  # visit the training windows in a new order each epoch
    seed: int = 1337  # of the weights and of the data order
    overfit_one_batch: bool = False  # train on the first batch only: the loss must go to nearly 0
    # optimization: GPT-3 appendix B, but for the length of the run
    max_steps: int = 19073  # updates: 10e9 tokens / 2**19
    epochs: float = 0  # if given, sets max_steps to so many passes over the training tokens
    warmup_steps: int = 715  # 375M tokens / 2**19
    max_lr: float = 6e-4  # GPT-3 table 2.1; for a larger --model the command line lowers it
    min_lr: float = 6e-5  # where the cosine ends: 10% of max_lr
    weight_decay: float = 0.1  # of matrices and embeddings
    grad_clip: float = 1.0  # largest norm of the whole gradient (0 = no limit)
    # every so many steps, and after the last update (0 = never)
    val_every: int = 250  # validation loss
    hellaswag_every: int = 250  # HellaSwag acc_norm
    sample_every: int = 250  # print samples
    save_every: int = 5000  # write a checkpoint
    save_minutes: float = 30  # also after so many minutes without one (0 = never)
    keep_checkpoints: int = 3  # older ones that stay beside the newest (0 = all)
    val_tokens: int = 10485760  # of the validation split, 20 * 2**19; the same ones every time
    hellaswag_data: str = "hellaswag/hellaswag_val.jsonl"  # downloaded to here if nothing is there
    # sampling
    prompt: str = "Hello, I'm a language model,"  # samples begin with it; "-": from stdin
    sample_tokens: int = 32  # new tokens per sample
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int = 50  # draw from the k likeliest tokens (0 = all)
    top_p: float = 1.0  # of those, only the likeliest that together have this probability
    sample_only: bool = False  # no training: print samples of the weights that --init_from names
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of matrix products
    compile: bool = False  # torch.compile; the command line turns it on for CUDA (--no-compile)


@dataclass(frozen=True)
class GPTConfig:
    """A network: what Config asks for, or what loaded weights bring. Defaults: OpenAI's 124M."""

    block_size: int = 1024  # longest context in tokens
    vocab_size: int = VOCAB_SIZE  # rows of the vocabulary, padding included
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


# The network ----------------------------------------------------------------------------------
# GPT-2, with Hugging Face's parameter names; no dropout, as one pass over fresh text needs none


class CausalSelfAttention(nn.Module):
    def __init__(self, config):  # a GPTConfig, here and below
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None):  # training gives no mask: causal
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        y = attention(q, k, v, mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


def attention(q, k, v, mask=None):
    """Each token looks at itself and at those before it. q, k, v: (B, H, T, D); returns the same.

    Written out (Vaswani et al. 2017, equation 1):
        mask = torch.ones(T, T, dtype=torch.bool).tril()  # True: may look
        weights = q @ k.transpose(2, 3) / math.sqrt(D)
        weights = weights.masked_fill(~mask, -math.inf)
        weights = F.softmax(weights, dim=-1)
        return weights @ v
    PyTorch's function gives the same; on a GPU as flash attention, whose (B, H, T, T) weights come
    and go in tiles on the chip and are never written to memory."""
    if mask is None and q.is_cpu and q.dtype == torch.bfloat16:
        return cpu_attention(q, k, v)  # bfloat16 on a CPU: written out is faster
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=(mask is None))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")  # the form that OpenAI's weights were trained with
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None):
        x = x + self.attn(self.ln_1(x), mask)  # tokens exchange what they know
        x = x + self.mlp(self.ln_2(x))  # each token thinks it over
        return x


class Transformer(nn.Module):
    """From token ids to hidden states: Hugging Face's GPT2Model."""

    def __init__(self, config):
        super().__init__()
        self.block_size = config.block_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # token embeddings
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embeddings
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx, position_ids=None, attention_mask=None):
        """idx: (B, T) int64; returns (B, T, C). Training gives idx alone; skip the others at first.
        hellaswag.py packs a context and its four endings into one row: position_ids (B, T) let each
        ending start right after the context, attention_mask (B, 1, T, T) hides them from each
        other."""
        T = idx.size(1)
        if T > self.block_size:
            raise ValueError(f"{T} tokens are more than the model's context of {self.block_size}")
        if position_ids is None:
            position_ids = torch.arange(T, device=idx.device)
        x = self.wte(idx) + self.wpe(position_ids)  # (B, T, C)
        for block in self.h:
            x = block(x, attention_mask)
        return self.ln_f(x)


def cross_entropy(lm_head, x, targets):
    """Mean of -ln p(target), in nats per token. x: (B, T, C), targets: (B, T) int64. At first all
    tokens are about equally likely, so the loss starts near ln V = 10.83 (V = 50304).
    It takes lm_head and x instead of logits, because (B, T, V) logits take gigabytes: on a CPU,
    unless torch.compile has fused it all, they are made for a few tokens at a time."""
    if x.is_cpu and not torch.compiler.is_compiling():
        return CPUCrossEntropy.apply(x, lm_head.weight, targets)  # the same loss in less memory
    logits = lm_head(x)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def transpose_conv1d(name, tensor):
    """Hugging Face's Conv1D stores these weights as (in, out), nn.Linear as (out, in). Transposing
    is its own inverse, so this serves both ways."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return tensor.t().contiguous() if name.endswith(conv1d) else tensor


SIZES = {  # GPT-2 table 2: 124M, 355M, 774M and 1,558M parameters
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "gpt3-125M": dict(n_layer=12, n_head=12, n_embd=768),  # as gpt2; with seq_len 2048
}


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Tied: one tensor reads tokens and predicts them (Press and Wolf 2017). It saves 39M
        # parameters of what would be 163M.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) for matrices and embeddings (GPT-1, section 4.1). Each block adds to the
        residual stream twice, through a c_proj: those get 0.02 / sqrt(2 n_layer), so that the sum
        of all 2 n_layer terms does not grow with depth (GPT-2, section 2.3)."""
        for name, p in self.named_parameters():  # the tied tensor comes once
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)  # what is left, the weights of LayerNorm, are ones already

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64, each target being the token after. Without targets the logits
        (B, T, V); with them the mean loss."""
        x = self.transformer(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)
        return cross_entropy(self.lm_head, x, targets)

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """OpenAI's weights by name, gpt2 ... gpt2-xl, or a directory that save_pretrained wrote,
        ours or Hugging Face's. UserError if it is not there or is no plain GPT-2."""
        hf = load_hugging_face(name_or_dir)  # transformers' GPT2LMHeadModel, checked
        c = hf.config
        shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        model = cls(GPTConfig(block_size=c.n_positions, vocab_size=c.vocab_size, **shape))
        state = {name: transpose_conv1d(name, t) for name, t in hf.state_dict().items()}
        model.load_state_dict(state)  # refuses any name or shape that differs
        return model

    def save_pretrained(self, directory):
        """Write a directory that from_pretrained and transformers open."""
        save_hugging_face(self, directory)

    def configure_optimizers(self, weight_decay, learning_rate):
        """AdamW with the betas, eps and weight decay of GPT-3 appendix B. Matrices and embeddings
        decay; biases and LayerNorm's weights, which have one dimension, do not."""
        params = list(self.parameters())
        decay = [p for p in params if p.dim() >= 2]
        no_decay = [p for p in params if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        # fused: one kernel updates all 148 tensors, instead of several for each; on CPUs, too
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def n_ids(self):
        """How many rows of the vocabulary are real tokens: of the padded 50304 the first 50257. The
        other 47 never occur in data, so training only makes them unlikely. Any other vocabulary has
        no padding. Used to check data, and to leave the padding out of saved weights."""
        padded = self.config.vocab_size == PADDED_VOCAB_SIZE
        return VOCAB_SIZE if padded else self.config.vocab_size

    def next_logits(self, idx):
        """Logits (B, V) of the token that follows idx (B, T)."""
        return self(idx)[:, -1]

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=50, top_p=1.0, seed=42, use_cache=True
    ):
        """Continue idx, (B, T) int64, to (B, T + max_new_tokens). Each token is drawn from the
        top_k likeliest (0 = all; temperature 0 = always the likeliest), by a generator of its own:
        sampling does not change training's random numbers."""
        # CachedDecoder gives the same logits, and remembers until the context is full
        next_logits = CachedDecoder(self) if use_cache else self.next_logits
        generator = torch.Generator(idx.device).manual_seed(seed)
        if temperature == 0:
            temperature, top_k = 1.0, 1  # the only candidate is the likeliest
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]  # the model can see no more
            logits = next_logits(context)[:, :VOCAB_SIZE]  # GPT-2's tokens, no padding
            k = min(top_k or VOCAB_SIZE, logits.size(1))
            logits, ids = logits.float().topk(k)  # (B, k), the likeliest first
            probs = F.softmax(logits / temperature, dim=-1)
            before = probs.cumsum(-1) - probs  # probability of those that are likelier
            probs = probs * (before < top_p)
            drawn = torch.multinomial(probs, 1, generator=generator)  # (B, 1): which of the k
            idx = torch.cat([idx, ids.gather(1, drawn)], dim=1)
        return idx


def print_samples(model, config, autocast, rows=4):
    """Continuations of --prompt, each up to its <|endoftext|>."""
    enc = tokenizer()
    prompt = enc.encode_ordinary(config.prompt) or [enc.eot_token]
    idx = torch.tensor([prompt] * rows, device=model.lm_head.weight.device)  # (rows, T)
    with autocast:
        how = config.temperature, config.top_k, config.top_p
        idx = model.generate(idx, config.sample_tokens, *how)
    for new in idx[:, len(prompt) :].tolist():
        end = new.index(enc.eot_token) if enc.eot_token in new else len(new)
        print0(">", config.prompt + enc.decode(new[:end]))


# Schedules ------------------------------------------------------------------------------------


def get_lr(step, config):
    """Learning rate of update `step`, counted from 0: linear warm-up, then a cosine that reaches
    min_lr at max_steps (GPT-3 appendix B)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # from 1 to 0
    return config.min_lr + cosine * (config.max_lr - config.min_lr)


def get_batch_size(step, config):
    """Tokens in update `step`: total_batch_size. With a ramp, the first third of batch_ramp_steps
    has an eighth of it, the second a quarter, the last half. (GPT-3 appendix B grows it from 32k
    tokens, in a straight line, over the first 4 to 12 billion tokens.)"""
    if step >= config.batch_ramp_steps:
        return config.total_batch_size
    third = 3 * step // config.batch_ramp_steps  # 0, 1, 2
    return config.total_batch_size // (8, 4, 2)[third]


def tokens_before(step, config):
    """Tokens of all updates before `step`: those in the ramp, and those of full size."""
    ramp = sum(get_batch_size(s, config) for s in range(min(step, config.batch_ramp_steps)))
    return ramp + max(0, step - config.batch_ramp_steps) * config.total_batch_size


# Data -----------------------------------------------------------------------------------------
# A batch is a function of (seed, step). So there is no position to save, and one process and eight
# see the same batches.


class DataLoaderLite:
    """The shards of one split as one stream of tokens, cut into windows of T + 1 that overlap by
    one: the last target of a window is the first input of the next."""

    def __init__(self, config, split, B, rank=0, world_size=1, device="cpu", n_ids=VOCAB_SIZE):
        self.config, self.B, self.T = config, B, config.seq_len  # B windows in a micro-batch
        self.n_ids = n_ids  # read() refuses token ids >= n_ids
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.shards = fineweb.open_shards(config.data_dir, split)  # [(n,) uint16], memory maps
        sizes = [len(shard) for shard in self.shards]
        self.starts = [0, *np.cumsum(sizes[:-1]).tolist()]  # where in the stream each one begins
        self.n_tokens = sum(sizes)
        self.n_windows = count_windows(config, split, self.n_tokens)
        self.epoch = None  # the one whose permutation self.windows holds

    def read_step(self, step):
        """This process's micro-batches of update `step`, a list of (B, T + 1): order() lists the
        update's windows, share() takes this process's, read() fetches their tokens. Their number,
        get_batch_size(step) / (B T world_size), is the lecture's grad_accum_steps; check() has made
        sure that it is whole."""
        return [self.read(windows) for windows in self.share(self.order(step))]

    def order(self, step):
        """The windows of update `step`, a list of int. Write down a permutation of all windows for
        each epoch, one after another: each update takes the next ones. With 5 and 3 per update:
            epoch 0: 4 0 2 1 3   epoch 1: 2 0 1 4 3
            update 0: 4 0 2   update 1: 1 3 2   update 2: 0 1 4"""
        first = tokens_before(step, self.config) // self.T
        end = tokens_before(step + 1, self.config) // self.T
        windows = []
        for position in range(first, end):
            epoch, i = divmod(position, self.n_windows)  # a batch may reach into the next epoch
            windows.append(self.permutation(epoch)[i] if self.config.shuffle else i)
        return windows

    def permutation(self, epoch):
        """An order of all windows, kept for the whole epoch. RandomState, because NumPy promises
        that its numbers never change; it takes two seeds as a list."""
        if epoch != self.epoch:
            random = np.random.RandomState([self.config.seed, epoch])
            self.epoch, self.windows = epoch, random.permutation(self.n_windows)
        return self.windows

    def share(self, windows):
        """This process's part, B windows at a time: the processes take turns. With B = 2 and two
        processes, windows 0 1 go to rank 0, 2 3 to rank 1, 4 5 to rank 0, ..."""
        starts = range(self.rank * self.B, len(windows), self.world_size * self.B)
        return [windows[i : i + self.B] for i in starts]

    def read(self, windows):
        """The tokens of some windows, (len(windows), T + 1) int64, in the CPU's memory."""
        rows = np.empty((len(windows), self.T + 1), dtype=np.uint16)
        for row, window in zip(rows, windows):
            n = bisect_right(self.starts, window * self.T) - 1  # the shard in which it begins
            offset = window * self.T - self.starts[n]
            part = self.shards[n][offset : offset + len(row)]
            while len(part) < len(row):  # it runs over the end of that shard
                n += 1
                part = np.concatenate([part, self.shards[n][: len(row) - len(part)]])
            row[:] = part
        refuse_unknown_ids(rows, self.n_ids, self.config)
        return torch.from_numpy(rows.astype(np.int64))

    def inputs_and_targets(self, tokens):
        """(B, T) and (B, T) on the device: each token's target is the one after it."""
        tokens = tokens.to(self.device, non_blocking=True)  # (B, T + 1)
        return tokens[:, :-1], tokens[:, 1:]


# Validation -----------------------------------------------------------------------------------


def mean_over_processes(first, *others):
    """Each argument averaged over the processes, by one all_reduce for all. The first is a tensor
    on the device, the others are numbers or tensors; returns them as one tensor (n,)."""
    values = torch.stack([first, *(torch.full_like(first, float(other)) for other in others)])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


@torch.no_grad()
def evaluate(model, loader, val_tokens, autocast):
    """Mean loss in nats per token over the first val_tokens tokens of the loader's split, or all
    that there are. Any number of processes covers the same tokens and gets the same result. (No
    model.eval(): there is no dropout to switch off.)"""
    n_windows = min(val_tokens // loader.T, loader.n_windows)
    loss_sum = torch.zeros((), device=loader.device)
    n = 0  # windows so far
    for windows in loader.share(range(n_windows)):
        x, y = loader.inputs_and_targets(loader.read(windows))
        with autocast:
            loss_sum += model(x, y) * len(x)
        n += len(x)
    # Means will do for sums: both are divided by world_size, which changes no quotient
    loss_sum, n = mean_over_processes(loss_sum, n)
    return (loss_sum / n).item()


# Processes, devices, precisions ---------------------------------------------------------------


@fineweb.as_user_error("the processes cannot find each other", "start them with torchrun")
def init_processes(device_name="auto"):
    """(rank, world_size, device). torchrun starts one process per GPU and tells each its rank; what
    follows is the same without it, with rank 0 of 1."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name, local_rank)
    use_well(device)  # its memory, and the processor's cores
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    elif "RANK" in os.environ:
        dist.init_process_group("gloo")
    return rank, world_size, device


def pick_device(name="auto", local_rank=0):
    """A torch.device by name; auto: cuda, else mps, else cpu. UserError if it is not there."""
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(device for device in have if have[device])
    if not have[name]:
        raise UserError(f"--device {name}: there is none here; --device auto takes what there is")
    if torch.cuda.device_count() == 1 and not dist.is_torchelastic_launched():
        local_rank = 0  # Slurm may show each process only the GPU that is its own
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node: this machine has {torch.cuda.device_count()} GPUs")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_dtype(name, device):
    """The precision of matrix products, by name. auto: bfloat16 where the hardware multiplies it
    well, else float16 on CUDA, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        can = torch.cuda.is_bf16_supported(including_emulation=False)  # from the A100 on
        return "bfloat16" if can else "float16"
    return "bfloat16" if device.type == "cpu" and bfloat16_pays() else "float32"


# One update, and the run ----------------------------------------------------------------------


def training_step(model, batches, optimizer, scaler, autocast, grad_clip):
    """One update from micro-batches of one size, a list of (inputs, targets). Returns the mean loss
    of this process's micro-batches and the norm that the gradient, averaged over all processes, had
    before it was clipped; both as tensors, as nothing in here waits for the device."""
    optimizer.zero_grad(set_to_none=True)
    loss_sum = 0.0
    # len(batches) is grad_accum_steps; all have B rows, so the mean of their means is the mean
    for micro_step, (x, y) in enumerate(batches):
        if isinstance(model, DDP):  # average the gradients over processes once, at the end
            model.require_backward_grad_sync = micro_step == len(batches) - 1
        with autocast:  # matrix products in bfloat16; weights, LayerNorm, softmax, loss in float32
            loss = model(x, y)
        loss = loss / len(batches)  # backward() adds gradients up; the batch's loss is a mean
        scaler.scale(loss).backward()  # float16: times a large number, so that none rounds to 0
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)  # the true gradients again, before they are measured
    # A rare bad batch must not throw the weights far: scale its gradient down to this norm.
    limit = grad_clip or torch.finfo(torch.float32).max  # 0: no limit, only measured
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    # AdamW, unless a gradient is inf or NaN: then the update is left out. Fused AdamW makes that
    # test on the device, so Python does not wait for the answer.
    scaler.step(optimizer)
    scaler.update()
    return loss_sum, norm


def train(config, checkpoint=None):
    """A whole run, or the rest of one, from a checkpoint that newest_checkpoint returned."""
    rank, world_size, device = init_processes(config.device)
    check(config, world_size)  # refuses what cannot work
    master = rank == 0  # the process that speaks and writes

    # The lecture's ladder, in ms per step of B=16, T=1024 on its A100: 1000 in float32, 333 with
    # TF32, 300 bfloat16, 130 compiled, 96 flash attention, 93 vocabulary 50304, 90 fused AdamW.
    torch.set_float32_matmul_precision("high")  # TF32: keeps 10 of 23 mantissa bits
    config = replace(config, dtype=pick_dtype(config.dtype, device))
    mixed = config.dtype != "float32"
    autocast = torch.autocast(device.type, getattr(torch, config.dtype), enabled=mixed)
    raw_model = build_model(config, checkpoint).to(device)  # new (by --seed), loaded or resumed
    # torch.compile joins what is between matrix products: fewer trips to memory. It compiles anew
    # for each shape, so samples and HellaSwag take raw_model. DDP averages gradients, in place.
    model = torch.compile(raw_model, dynamic=False) if config.compile else raw_model
    ddp_model = DDP(model, gradient_as_bucket_view=True) if world_size > 1 else model
    optimizer = raw_model.configure_optimizers(config.weight_decay, config.max_lr)
    # float16 rounds small gradients to 0, so a scaler multiplies the loss by a large number, and
    # adapts it. For bfloat16 and float32 that number stays 1: all that the scaler still does is
    # leave out updates whose gradient has a NaN or an infinity.
    scaler = make_scaler(config.dtype, device)
    first_step = load_training_state(checkpoint, optimizer, scaler)  # 0 in a new run

    B = pick_micro_batch_size(config, raw_model, world_size, autocast)  # changes only the speed
    where = dict(rank=rank, world_size=world_size, device=device, n_ids=raw_model.n_ids())
    loader = DataLoaderLite(config, "train", B, **where)
    val_loader = DataLoaderLite(config, "val", B, **where) if config.val_every else None
    # get_batches(step): loader.read_step(step) as (inputs, targets); a thread reads the next ones.
    get_batches = read_ahead(loader)
    speaks_gpt2 = raw_model.config.vocab_size >= VOCAB_SIZE  # else no samples, no HellaSwag
    items = hellaswag_items(config, raw_model.config) if speaks_gpt2 else None

    # What watches the run, all below the rule: the log, checkpoints, speed and time left, Ctrl-C
    log = Log(config, first_step, write=master)
    save = Saver(config, raw_model, optimizer, scaler, autocast, loader, log)
    progress = Progress(config, raw_model, device, world_size)
    announce(config, raw_model, loader, val_loader, checkpoint)
    catch_signals()  # from now on Ctrl-C, SIGTERM, ... only append to the list received
    stop = False  # set after a step if any process received one: the next round saves and leaves

    def due(every):
        return every > 0 and (step % every == 0 or last)

    for step in range(first_step, config.max_steps + 1):  # step = updates made so far
        last = step == config.max_steps  # one round more than updates: it only saves and evaluates
        # Once in a while; none of it changes what is learned
        if master and save.wanted(step, stop):  # --save_every, --save_minutes, before a stop
            save(step)  # first, so that no evaluation can lose it: all that --resume needs
        if stop:
            break
        if due(config.val_every):
            val_loss = evaluate(model, val_loader, config.val_tokens, autocast)
            print0(f"step {step}: validation loss {val_loss:.4f}")
            log.write(step, val=val_loss)
        if items and due(config.hellaswag_every):
            with autocast:  # how often the right one of four endings has the least mean loss
                score = hellaswag.evaluate(raw_model, items, device, rank, world_size)
            print0(f"step {step}: HellaSwag acc_norm {score.acc_norm:.4f} of {score.n} items")
            log.write(step, hella=score.acc_norm)
        if master and speaks_gpt2 and due(config.sample_every):
            print_samples(raw_model, config, autocast)
        if last:
            break

        # -------------------------------- one training step --------------------------------
        t0 = time.perf_counter()
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # a group may have its own share
        # Overfitting one batch, the first, over and over: a sound model takes the loss to nearly 0.
        batches = get_batches(0 if config.overfit_one_batch else step)
        loss, norm = training_step(
            ddp_model, batches, optimizer, scaler, autocast, config.grad_clip
        )
        # The mean loss and, beside it, whether any process was told to stop: all have to leave in
        # the same step, or the others would wait for it. (.tolist() waits for the device.)
        loss, signals = mean_over_processes(loss, len(received)).tolist()
        stop, norm = signals > 0, norm.item()
        seconds = time.perf_counter() - t0
        # -----------------------------------------------------------------------------------

        log.write(step, train=loss, lr=lr, norm=norm, seconds=seconds)
        speed = progress(step, norm, seconds)  # a text: tokens per second, MFU, time left
        print0(
            f"step {step:5d}/{config.max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} "
            f"| {seconds * 1e3:.1f} ms | {speed}"
        )

    farewell(config, raw_model, log, stop)


# ==============================================================================================
# From here on nothing is needed to understand GPT-2's training: processes, files, the screen, what
# makes a CPU and sampling faster, the command line.
# ==============================================================================================

import ctypes
import json
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import timeit
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import tyro
from filelock import FileLock, Timeout

# Processes ------------------------------------------------------------------------------------


def make_scaler(dtype, device):
    """For float16 a scale that adapts; otherwise one that stays 1. In every precision it leaves
    an update out whose gradient has a NaN or an infinity, without waiting for the device."""
    stays = dict(init_scale=1.0, growth_factor=1 + 1e-12, backoff_factor=1 - 1e-12)  # 1 in float32
    return torch.amp.GradScaler(device.type, **{} if dtype == "float16" else stays)


def pick_micro_batch_size(config, model, world_size, autocast):
    """Sequences on one device at a time. auto: 4,096 tokens; on CUDA the largest power of two, up
    to 65,536 tokens, that divides the batch and fits, as two small passes without torch.compile
    tell."""
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    most = get_batch_size(0, config) // (config.seq_len * world_size)
    most, device = most & -most, model.lm_head.weight.device  # its largest power of two
    if device.type != "cuda":
        return min(most, 1 << (max(1, 4096 // config.seq_len).bit_length() - 1))

    def peak(B):  # bytes that a forward and backward pass takes for a while
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        idx = torch.zeros(B, config.seq_len, dtype=torch.int64, device=device)
        with autocast:
            loss = model(idx, idx)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated(device) - before

    each = max(1, peak(2) - peak(1))  # bytes per sequence; compiled, it will take less
    torch.cuda.empty_cache()
    later = 4 * 4 * model.num_params()  # bytes: gradients, DDP's copy of them, AdamW's moments
    fit = int(0.85 * (torch.cuda.mem_get_info(device)[0] - later) / each)
    B = 1 << (max(1, min(most, fit, 65536 // config.seq_len)).bit_length() - 1)
    B = torch.tensor(B, device=device)
    if dist.is_initialized():  # what fits all of them
        dist.all_reduce(B, dist.ReduceOp.MIN)
    return int(B)


received = []  # the signals that ask this process to stop, as they come


def catch_signals():
    """From now on a signal only notes itself in `received`, where the loop looks after each step.
    A second Ctrl-C ends at once."""

    def note(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):  # Windows lacks the last two
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, note)


# Data -----------------------------------------------------------------------------------------


def read_ahead(loader):
    """A function of the step that gives its (inputs, targets), a list; meanwhile a thread reads
    those of the next one."""
    thread, reading = ThreadPoolExecutor(1), {}

    def read(step):
        tokens = loader.read_step(step)  # pinned, they travel while the device computes
        return [t.pin_memory() for t in tokens] if loader.device.type == "cuda" else tokens

    def get_batches(step):
        now = reading.pop(step, None) or thread.submit(read, step)
        reading.clear()
        reading[step + 1] = thread.submit(read, step + 1)
        return [loader.inputs_and_targets(tokens) for tokens in now.result()]

    return get_batches


def count_windows(config, split, n_tokens):
    """How many windows of seq_len + 1 tokens there are. UserError if there is none."""
    if n_tokens <= config.seq_len:
        what = f"{config.data_dir}: its {split} shards hold {n_tokens} tokens, too few for"
        raise UserError(f"{what} --seq_len {config.seq_len}; give a smaller one, or more text")
    return (n_tokens - 1) // config.seq_len


def refuse_unknown_ids(rows, n_ids, config):
    if rows.max() >= n_ids:
        what = f"its shards hold token id {rows.max()}, but the model knows {n_ids} ids"
        raise UserError(f"{config.data_dir}: {what}; give another --data_dir or --vocab_size")


def hellaswag_items(config, gpt_config):
    """What to score while training; None if that is off, or, said aloud, if it cannot be."""
    if config.hellaswag_every:
        return hellaswag.items_or_none(config.hellaswag_data, gpt_config.block_size)


# Where a network comes from, and where it goes ------------------------------------------------


def build_model(config, checkpoint=None):
    """The GPT to begin with: a checkpoint's, that of --init_from, or a new one."""
    if checkpoint:
        model = GPT(GPTConfig(**checkpoint["gpt_config"]))
        model.load_state_dict(checkpoint["model"])
    elif config.init_from != "scratch":
        model = GPT.from_pretrained(config.init_from)
    elif config.sample_only:
        raise UserError(
            "--sample_only needs weights; add --init_from gpt2, or a checkpoint's folder"
        )
    else:
        given = {name: getattr(config, name) for name in SIZES["gpt2"] if getattr(config, name)}
        shape = SIZES[config.model] | given
        if shape["n_embd"] % shape["n_head"]:
            text = "--n_embd {n_embd} is not a multiple of --n_head {n_head}; change one of them"
            raise UserError(text.format(**shape))
        context = config.block_size or max(1024, config.seq_len)
        c = GPTConfig(context, config.vocab_size, **shape)
        size = 4 * c.n_embd * (12 * c.n_embd * c.n_layer + c.vocab_size)
        fineweb.check_memory(size + 20_000 * c.n_layer, "--n_layer, --n_embd")  # and Python's part
        torch.manual_seed(config.seed)  # drawn on the CPU: the same weights on every device
        model = GPT(c)
    context = model.config.block_size
    if config.seq_len > context and not config.sample_only:
        what = f"--seq_len {config.seq_len}: the model's context has {context} tokens"
        raise UserError(f"{what}; give a smaller one")
    return model


def load_hugging_face(name_or_dir):
    """transformers' GPT2LMHeadModel in float32. UserError if it is no GPT-2 as GPT computes it."""
    hf = hellaswag.load_gpt2(name_or_dir)
    c = hf.config
    plain = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True)
    plain |= dict(scale_attn_by_inverse_layer_idx=False, n_inner=c.n_inner and 4 * c.n_embd)
    odd = {name: getattr(c, name) for name in plain if getattr(c, name) != plain[name]}
    if not torch.equal(hf.lm_head.weight, hf.transformer.wte.weight):
        odd["tie_word_embeddings"] = False
    if odd:
        raise UserError(f"{name_or_dir}: not a plain GPT-2, it has {odd}; give another directory")
    return hf


def save_hugging_face(model, directory):
    """config.json, model.safetensors without the vocabulary's padding, the tokenizer's files."""
    from safetensors.torch import save_file
    from transformers import GPT2Config  # half a second, so only where it is needed

    c, n_ids, directory = model.config, model.n_ids(), Path(directory)
    end = VOCAB_SIZE - 1 if n_ids >= VOCAB_SIZE else None  # <|endoftext|>
    config = GPT2Config(
        **dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=n_ids),
        **dict(n_positions=c.block_size, n_ctx=c.block_size),  # n_ctx is for llama.cpp
        **dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        **dict(bos_token_id=end, eos_token_id=end, pad_token_id=end),
        **dict(architectures=["GPT2LMHeadModel"], dtype="float32"),
    )
    state = {name: transpose_conv1d(name, t.cpu()) for name, t in model.state_dict().items()}
    del state["lm_head.weight"]  # tied
    state["transformer.wte.weight"] = model.transformer.wte.weight[:n_ids]
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors", {"format": "pt"})  # readable to us alone
    shutil.copymode(directory / "config.json", directory / "model.safetensors")
    if n_ids == VOCAB_SIZE:
        fineweb.save_tokenizer(directory, c.block_size)


# Checkpoints and the log ----------------------------------------------------------------------


def find_checkpoints(out_dir):
    """[(step, path)] of a run's checkpoints, oldest first."""
    found = [(p.name.removeprefix("step_"), p) for p in Path(out_dir).glob("step_*")]
    return sorted((int(step), p) for step, p in found if step.isdecimal())


class Saver:
    """Writes checkpoints, whole or not at all, of weights that are known to be good. No random
    state is in them: training draws none, the data order is a function of (seed, step)."""

    def __init__(self, config, model, optimizer, scaler, autocast, loader, log):
        self.config, self.model, self.optimizer, self.scaler = config, model, optimizer, scaler
        self.autocast, self.loader, self.log = autocast, loader, log
        self.step, self.time = log.first_step, time.monotonic()  # of the last checkpoint

    def wanted(self, step, stop):
        """Before a stop, every --save_every steps and --save_minutes, and after the last update;
        but not while updates are left out. By this process's clock: only it saves."""
        every, minutes = self.config.save_every, self.config.save_minutes
        last = step == self.config.max_steps
        now = every and (step % every == 0 or last)
        now = now or 0 < 60 * minutes < time.monotonic() - self.time
        return step > self.step and (stop or now and (last or not self.log.left_out))

    def __call__(self, step):
        """Write step_NNNNN, the state after `step` updates. The oldest others go first, so that
        there is room."""
        self.try_weights(step)
        out_dir, keep = Path(self.config.out_dir), self.config.keep_checkpoints
        final, temporary = out_dir / f"step_{step:05d}", out_dir / f"tmp_step_{step:05d}"
        others = [path for _, path in find_checkpoints(out_dir) if path != final]
        for path in others[:-keep] if keep else []:
            try:
                shutil.rmtree(path)
            except OSError as error:
                print0(f"warning: {path} cannot be removed: {error.strerror}")
        state = dict(
            **dict(step=step, config=asdict(self.config)),
            **dict(gpt_config=asdict(self.model.config), model=self.model.state_dict()),
            **dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict()),
            **dict(shards=fineweb.describe_shards(self.config.data_dir), versions=versions()),
            world_size=self.loader.world_size,
        )
        remedy = "make room and go on with --resume; older checkpoints are whole"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with fineweb.as_user_error(f"{final} cannot be written", remedy):
                self.model.save_pretrained(temporary)
                torch.save(state, temporary / "training_state.pt")
                for path in temporary.iterdir():  # on the disk before the name says so
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.step, self.time = step, time.monotonic()
        print0(f"step {step}: saved {final}")

    @torch.no_grad()
    def try_weights(self, step):
        x, y = self.loader.inputs_and_targets(self.loader.read([0]))
        with self.autocast:
            loss = self.model(x, y).item()
        if not math.isfinite(loss):
            give_up(self.config, f"the loss after {step} updates is {loss}")


def give_up(config, why):
    saved = find_checkpoints(config.out_dir)
    where = f"--resume goes on from {saved[-1][1]}" if saved else "nothing was saved before that"
    raise UserError(f"{why}; lower --max_lr or look at the data: {where}")


def newest_checkpoint(out_dir):
    """What Saver wrote last into training_state.pt, a dict, or None if there is no checkpoint. A
    damaged one is named and the one before it taken; UserError if none is whole."""
    found = find_checkpoints(out_dir)
    for step, path in reversed(found):
        try:
            with fineweb.as_user_error(f"{path} is damaged", "the one before it is taken"):
                with zipfile.ZipFile(path / "training_state.pt") as archive:
                    if member := archive.testzip():
                        raise ValueError(f"wrong checksum of {member}")
                    checksums = [member.CRC for member in archive.infolist()]
                state = torch.load(archive.filename, map_location="cpu", weights_only=True)
                if state["step"] != step or not Config(**state["config"]):
                    raise ValueError(f"it holds step {state['step']}")
                return state | dict(path=str(path), checksums=checksums)
        except UserError as error:
            print0(f"warning: {error}")
    if found:
        raise UserError(f"{out_dir}: none of its checkpoints is whole; choose another --out_dir")


def load_training_state(checkpoint, optimizer, scaler):
    """Give optimizer and scaler theirs. Returns the number of updates that were made, 0 without a
    checkpoint. UserError, in all processes, if they do not have the same one."""
    if dist.is_initialized():
        mine = checkpoint and (Path(checkpoint["path"]).name, checkpoint["checksums"])
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        if any(other != mine for other in found):
            names = ", ".join(str(other and other[0]) for other in found)
            raise UserError(f"--resume: --out_dir is not one folder for all; they found {names}")
    if not checkpoint:
        return 0
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["config"]["dtype"] == "float16":
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"]


class Log:
    """out_dir/log.txt, one `step stream value` per line, and the lock on that folder. A resumed
    run first drops the records that it will write again. Without `write` it only counts."""

    def __init__(self, config, first_step, write=True):
        self.config, self.first_step, self.begun = config, first_step, time.monotonic()
        self.left_out = 0  # updates in a row
        self.path, self.file = Path(config.out_dir) / "log.txt", None
        if not write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path.with_name(".lock"))
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            what = f"{config.out_dir}: another process trains there"
            raise UserError(f"{what}; wait for its end, or give another --out_dir") from None
        lines = self.path.read_text(errors="replace").splitlines(True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n")]  # the last one may be cut short
        kept = [line for line in kept if (parse_record(line) or [-1])[0] < first_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
        note_run(config, first_step)
        self.watchers = watchers(config, first_step)
        self.file = self.path.open("a", buffering=1)

    def write(self, step, **values):
        """A record for each stream=value. With a step's norm and seconds also its speed in tokens
        per second, its batch if that has grown, and a note if the update was left out because the
        norm is not finite. UserError after twenty of those."""
        if "norm" in values:
            self.left_out = 0 if math.isfinite(values["norm"]) else self.left_out + 1
            before, batch = (get_batch_size(s, self.config) for s in (max(0, step - 1), step))
            values["speed"] = batch / values.pop("seconds")
            if batch != before or (step == 0 and batch != self.config.total_batch_size):
                values["batch"] = batch
            if self.left_out:
                values["skip"] = self.left_out
        if self.file:
            remedy = "make room, and go on with --resume"
            with fineweb.as_user_error(f"{self.path} cannot be written", remedy):
                for stream, value in values.items():
                    self.file.write(f"{step} {stream} {value:.12f}\n")
            for watch in self.watchers:
                watch(values, step)
        if self.left_out == 20:
            give_up(self.config, f"20 updates in a row were left out, the last one in step {step}")

    def close(self):
        if self.file:
            self.file.close()
            self.lock.release()


def note_run(config, first_step):
    """Add to run.json, a list, what this start depends on."""
    path = Path(config.out_dir) / "run.json"
    with fineweb.as_user_error(f"{path} cannot be read", "remove it"):
        starts = json.loads(path.read_text()) if path.exists() else []
        starts = starts if first_step else []  # a new run
    start = dict(first_step=first_step, started=f"{datetime.now():%F %T}", versions=versions())
    start |= dict(config=asdict(config), shards=fineweb.describe_shards(config.data_dir))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([*starts, start], indent=1))
    temporary.replace(path)


def watchers(config, first_step):
    """A function of ({stream: value}, step) for each of --tensorboard and --wandb. In Weights &
    Biases every start is a run of its own; those of one folder are a group."""
    found, run = [], f"{config.out_dir} from step {first_step}"
    if config.tensorboard:
        with fineweb.as_user_error("--tensorboard cannot work here", "pip install tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(Path(config.out_dir) / "tensorboard", purge_step=first_step)

        def to_tensorboard(values, step):
            for stream, value in values.items():
                board.add_scalar(stream, value, step)
            board.flush()

        found.append(to_tensorboard)
    if config.wandb:
        with fineweb.as_user_error("--wandb cannot work here", "pip install wandb; wandb login"):
            import wandb

            names = dict(project=config.wandb, name=run, group=config.out_dir)
            found.append(wandb.init(**names, config=asdict(config), dir=config.out_dir).log)
    return found


def parse_record(line):
    """(step, stream, value as text), or None if the line is something else."""
    words = line.split()
    return (int(words[0]), *words[1:]) if len(words) == 3 and words[0].isdecimal() else None


def read_log(path):
    """The records of a log.txt, [(step, stream, value as text)]; other lines are passed over."""
    lines = Path(path).read_text(errors="replace").splitlines(keepends=True)
    records = [parse_record(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record]


# The screen -----------------------------------------------------------------------------------

PEAK_TFLOPS = (  # bfloat16, or float16, without sparsity, by NVIDIA's data sheets (GB200, GB300: of
    # NVL72; RTX: white papers). The first that fits counts
    {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989}
    | {"H800 PCIe": 756, "H800": 989, "H20": 148, "B200": 2250, "GB200": 2500, "B300": 2250}
    | {"GB300": 2500, "A100": 312, "A800": 312, "V100": 125, "T4": 65, "A40": 150, "A10G": 70}
    | {"A10": 125, "L40S": 362, "L40": 181, "L4": 121, "A6000": 155, "RTX 6000 Ada": 364}
    | {"RTX PRO 6000 Blackwell Workstation": 504, "3090": 71, "4090": 165, "5090": 209}
)


def peak_flops(device):
    """Peak FLOP/s of one device, or None where the table does not know it."""
    words = torch.cuda.get_device_name(device).replace("-", " ") if device.type == "cuda" else ""
    fits = (tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if f" {name} " in f" {words} ")
    return next(fits, None)


def print0(*args):
    """Print, in the first process only. A pipe that its reader has closed stops the run as a
    signal does: quietly, after the step at hand and a checkpoint."""
    try:
        if int(os.environ.get("RANK", 0)) == 0:
            print(*args, flush=True)
    except BrokenPipeError:
        received.append(signal.SIGPIPE)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """The rest of the line after a step: tokens per second, time left and, where the GPU is known,
    MFU: the share of its peak FLOP/s that the model's own arithmetic takes."""

    def __init__(self, config, model, device, world_size):
        self.config, self.typical, self.steps = config, None, 0  # typical: seconds per token
        self.flops = flops_per_token(model, config.seq_len)
        known = peak_flops(device) if config.dtype != "float32" else None  # float32 has another
        self.peak = (known or math.inf) * world_size

    def __call__(self, step, norm, seconds):
        config, tokens = self.config, get_batch_size(step, self.config)
        self.steps += 1
        if self.steps <= 2:  # the first step compiles and warms up
            self.typical = seconds / tokens
        self.typical = 0.9 * self.typical + 0.1 * seconds / tokens
        left = tokens_before(config.max_steps, config) - tokens_before(step + 1, config)
        mfu = self.flops * tokens / seconds / self.peak
        text = f"{tokens / seconds:,.0f} tokens/s" + (f" | MFU {mfu:.1%}" if mfu else "")
        left_out = "" if math.isfinite(norm) else " | update left out: its gradient is not finite"
        return f"{text} | left {timedelta(seconds=int(left * self.typical))}{left_out}"


def flops_per_token(model, seq_len):
    """Forward and backward: 6 for each weight that multiplies, and 12·L·C·T for attention
    (Chowdhery et al. 2022, appendix B). Position embeddings only add."""
    multiply = model.num_params() - model.transformer.wpe.weight.numel()
    return 6 * multiply + 12 * model.config.n_layer * model.config.n_embd * seq_len


def versions():
    """What a run depends on besides its configuration: {name: version}, and the device."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    libraries = dict(torch=str(torch.__version__), numpy=np.__version__)
    return dict(commit=commit, python=platform.python_version(), **libraries, device=device)


def announce(config, model, loader, val_loader, checkpoint):
    """What stands on the screen before the first step."""
    device, processes, B, T = loader.device, loader.world_size, loader.B, loader.T
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    compiled, V = "compiled" if config.compile else "not compiled", model.config.vocab_size
    total, tokens = config.total_batch_size, loader.n_tokens
    accum, epochs = total // (B * T * processes), tokens_before(config.max_steps, config) / tokens
    usual = asdict(DEMO if config.demo else Config())
    given = {name: value for name, value in asdict(config).items() if value != usual[name]}
    lines = [
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        "settings: " + ", ".join(f"{name} {value}" for name, value in given.items()),
        f"device: {processes} x {name}, {config.dtype}, {compiled}",
        f"model: {model.num_params():,} parameters; {model.config}",
        f"batch: {total:,} tokens = {B} sequences x {T} tokens x {processes} processes x {accum} "
        "micro-steps",
        f"data: {tokens:,} tokens in {len(loader.shards)} train shards of {config.data_dir}; "
        f"{config.max_steps} steps are {epochs:.2f} epochs",
    ]
    if config.batch_ramp_steps:
        lines += [f"batch: an eighth at first, whole from step {config.batch_ramp_steps}"]
    if val_loader and val_loader.n_windows * T < config.val_tokens:
        lines += [f"validation: all {val_loader.n_windows * T:,} tokens that there are"]
    if V < VOCAB_SIZE and (config.sample_every or config.hellaswag_every):
        lines += [f"warning: samples and HellaSwag are off: they need GPT-2's {VOCAB_SIZE} tokens"]
    if epochs > 50 and not config.overfit_one_batch:
        lines += [f"warning: {epochs:.0f} epochs are many; --epochs 3, or --finetune, takes fewer"]
    if config.warmup_steps > config.max_steps:
        lines += ["warning: --warmup_steps is longer than the run"]
    if config.min_lr > config.max_lr:
        lines += ["warning: --min_lr is more than --max_lr, so the rate will rise"]
    if checkpoint:
        lines += [f"resuming {checkpoint['path']}"]
        if fineweb.describe_shards(config.data_dir) != checkpoint["shards"]:
            lines += [f"warning: {config.data_dir} holds other shards than before"]
        if checkpoint["step"] >= config.max_steps:
            lines += [f"nothing is left to do: --max_steps is {config.max_steps}"]
    elif config.init_from == "scratch":
        lines += [
            f"the first loss should be near ln {V} = {math.log(V):.4f}, that of a blind guess"
        ]
    print0("\n".join(lines))


def farewell(config, model, log, stop):
    """Leave the folder to others, and say how to go on."""
    log.close()
    if torch.cuda.is_initialized():
        print0(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB per device")
    how = "stopped by a signal" if stop else "done"
    print0(f"{how} after {timedelta(seconds=int(time.monotonic() - log.begun))}; log: {log.path}")
    saved, out_dir = find_checkpoints(config.out_dir), shlex.quote(config.out_dir)
    if stop:
        print0(f"  python train_gpt2.py --resume --out_dir {out_dir}  # goes on")
    elif saved:
        newest = shlex.quote(str(saved[-1][1]))
        print0(f"checkpoint: {newest}, which transformers opens too. Next:")
        if model.config.vocab_size >= VOCAB_SIZE:
            print0(f"  python train_gpt2.py --sample_only --init_from {newest}")
        print0(f"  GPT2_RUN={out_dir} jupyter execute --inplace play.ipynb  # plots the log")
    if dist.is_initialized():
        dist.barrier()  # torchrun ends all when one has ended: the first may still be saving
        dist.destroy_process_group()
    received[:] = (received or [signal.SIGTERM]) if stop else []  # it may be another process's


# What makes a CPU and sampling faster ---------------------------------------------------------


def cpu_attention(q, k, v, rows=256):
    """attention() for bfloat16 on a CPU, causal: whole products are faster there than flash
    attention's tiles. `rows` queries at a time look at the keys up to their own, which spares half
    of a long context."""
    shape, T, D = q.shape, q.size(2), q.size(3)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B·H, T, D)
    ahead = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)  # may not be looked at
    done = []
    for start in range(0, T, rows):
        end = start + rows
        keys = k[:, :end].transpose(1, 2)
        weights = torch.baddbmm(ahead[start:end, :end], q[:, start:end], keys, alpha=D**-0.5)
        done.append(weights.softmax(-1) @ v[:, :end])  # (B·H, rows, D)
    return torch.cat(done, dim=1).view(shape)


class CPUCrossEntropy(torch.autograd.Function):
    """cross_entropy() of some tokens at a time, each with its gradient at once, so that all
    (B, T, V) logits, gigabytes, never exist."""

    ROWS = 512

    @staticmethod
    def forward(ctx, x, weight, targets):
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        w = weight.detach().to(half).requires_grad_(ctx.needs_input_grad[1])
        d_x, d_weight, total = torch.zeros_like(x), torch.zeros_like(weight), 0.0
        flat = x.flatten(0, 1), d_x.view(-1, x.size(-1)), targets.flatten()
        for part, d_part, wanted in zip(*(t.split(CPUCrossEntropy.ROWS) for t in flat)):
            part = part.detach().to(half).requires_grad_(w.requires_grad)
            with torch.set_grad_enabled(w.requires_grad):
                log_p = F.linear(part, w).log_softmax(-1, dtype=torch.float32)  # (ROWS, V)
                loss = F.nll_loss(log_p, wanted, reduction="sum")
            total += loss.detach()
            if w.requires_grad:
                d, d_w = torch.autograd.grad(loss, (part, w))
                d_part.copy_(d)
                d_weight += d_w
        ctx.n = (targets != -100).sum()  # -100 does not count, as in F.cross_entropy
        ctx.save_for_backward(d_x, d_weight)
        return total / ctx.n

    @staticmethod
    def backward(ctx, d_loss):
        d_x, d_weight = ctx.saved_tensors
        return d_x.mul_(d_loss / ctx.n), d_weight.mul_(d_loss / ctx.n), None


def use_well(device):
    """On a CPU, have glibc keep what is freed, instead of returning each large tensor to the system
    and fetching its pages anew in the next step. On a GPU, let PyTorch's pieces of memory grow, so
    that less is lost between them (WSL cannot: pytorch issue 192330). And share all cores between
    torchrun's processes: it allows each one thread, and PyTorch each a compiler on every core."""
    linux, told = sys.platform == "linux", any("ALLOC_CONF" in name for name in os.environ)
    if device.type == "cuda" and linux and not told and "microsoft" not in platform.release():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    elif device.type == "cpu" and linux and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if local := int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
        cores = max(1, os.cpu_count() // local)
        torch.set_num_threads(cores)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, cores)))


def bfloat16_pays():
    """Does this CPU multiply bfloat16 faster than float32? By the clock, in less than 0.1 s: that
    it has instructions for it says little. Rank 0 decides for all."""
    pair = torch.ones(1024, 1024), torch.ones(1024, 1024, dtype=torch.bfloat16)
    tries = [
        [timeit.timeit(lambda: F.linear(w[:256], w), number=1) for w in pair] for _ in range(5)
    ]
    float32, bfloat16 = map(min, zip(*tries))
    pays = torch.tensor(bfloat16 < float32)
    if dist.is_initialized():
        dist.broadcast(pays, 0)
    return bool(pays)


class CachedDecoder:
    """model.next_logits for ids (B, T) that grow by a token per call: keeps the keys and values of
    each block, so that only what is new is computed."""

    def __init__(self, model):
        self.model, self.read = model, 0  # tokens read so far
        self.kept = [None] * model.config.n_layer  # keys and values, (B, H, read, D) each

    def __call__(self, idx):
        if idx.size(1) <= self.read:  # the context is full and slides: every position changes
            return self.model.next_logits(idx)
        t = self.model.transformer
        positions = torch.arange(self.read, idx.size(1), device=idx.device)
        x = t.wte(idx[:, self.read :]) + t.wpe(positions)  # (B, new, C)
        for i, block in enumerate(t.h):
            x = x + self.attend(i, block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        self.read = idx.size(1)
        return self.model.lm_head(t.ln_f(x[:, -1]))

    def attend(self, i, attn, x):
        B, new, C = x.shape
        q, k, v = attn.c_attn(x).view(B, new, 3, attn.n_head, -1).permute(2, 0, 3, 1, 4)
        if self.read:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.kept[i], (k, v)))
        self.kept[i] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=new > 1)  # prompt; then one by one
        return attn.c_proj(y.transpose(1, 2).reshape(B, new, C))


# The command line -----------------------------------------------------------------------------

PRESETS = {  # what flags of these names, and --model, set; any other flag overrides it
    "demo": dict(  # a real tokenizer and a real loss curve, sized for two laptop cores
        **dict(demo=True, data_dir="demo/data", out_dir="demo/log"),
        **dict(n_layer=4, n_head=4, n_embd=128, block_size=128, seq_len=128),
        **dict(total_batch_size=1024, micro_batch_size=8, max_steps=450, warmup_steps=20),
        **dict(max_lr=2e-3, min_lr=2e-4, val_every=90, val_tokens=13824, hellaswag_every=0),
        **dict(sample_every=225, save_every=225, prompt="The for statement is used to"),
    ),
    "finetune": dict(  # batch and rate of nanoGPT's fine-tuning on Shakespeare
        **dict(finetune=True, out_dir="tuned", epochs=2, total_batch_size=32768, warmup_steps=3),
        **dict(max_lr=3e-5, min_lr=3e-5, val_every=10, sample_every=0, hellaswag_every=0),
    ),
    # GPT-3 table 2.1, for the sizes nearest to GPT-2's; the same 10e9 tokens
    "gpt2-medium": dict(max_lr=3e-4, min_lr=3e-5),
    "gpt2-large": dict(max_lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": dict(
        **dict(max_lr=2e-4, min_lr=2e-5),
        **dict(total_batch_size=2**20, max_steps=9537, warmup_steps=358),
    ),
    "gpt3-125M": dict(seq_len=2048),
}
DEMO = Config(**PRESETS["demo"])
SHAPE = ["model", "n_layer", "n_head", "n_embd", "block_size", "vocab_size"]
BATCHES = ["total_batch_size", "batch_ramp_steps", "seq_len"]
BATCHES += ["shuffle", "seed", "overfit_one_batch"]


def parse(argv):
    """(config, checkpoint): the flags over the defaults, the demo's, or those of the run that
    --resume goes on with; and what newest_checkpoint found of that run."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    usual = usual_config(config)
    config = tyro.cli(Config, args=argv, default=usual)
    if config.demo and not config.sample_only:
        fineweb.build_demo(config.data_dir)
    checkpoint = newest_checkpoint(config.out_dir) if config.resume else None
    if not checkpoint:
        return count_steps(config, usual), None
    before = replace(Config(**checkpoint["config"]), out_dir=config.out_dir, resume=True)
    config = count_steps(tyro.cli(Config, args=argv, default=before), before)
    for name, old in asdict(before).items():
        new = getattr(config, name)
        if new != old and name in ["init_from", *SHAPE, *BATCHES]:
            why = f"--resume: {checkpoint['path']} was trained with --{name} {old}, not {new}"
            raise UserError(f"{why}; start another run with --init_from {checkpoint['path']}")
        if new != old and not config.sample_only:
            print0(f"--resume: {name} {old} → {new}")
    return config, checkpoint


def usual_config(config):
    """The defaults that --demo, --finetune, --model and the device ask for."""
    usual = dict(compile=pick_device(config.device).type == "cuda" and not config.demo)
    for name in (config.model, *(n for n in ("demo", "finetune") if getattr(config, n))):
        usual |= PRESETS.get(name, {})
    return Config(**usual)


def count_steps(config, usual):
    """With --epochs turned into --max_steps, unless that was given too."""
    if 0 < config.epochs < math.inf and not config.sample_only:
        if config.max_steps == usual.max_steps:
            shards = fineweb.open_shards(config.data_dir, "train")
            wanted = config.epochs * sum(len(shard) for shard in shards)
            steps = bisect_left(range(10**9), wanted, key=lambda s: tokens_before(s, config))
            config = replace(config, max_steps=steps)
        config = replace(config, epochs=0)
    return config


def check(config, world_size):
    """Refuse, in one sentence, what cannot work."""
    sizes = [*SHAPE, "total_batch_size", "micro_batch_size", "seq_len", "val_tokens"]
    for name, value in asdict(config).items():
        least = 1 if name in sizes else 0
        if type(value) in (int, float) and not least <= value < math.inf:
            raise UserError(f"--{name} {value}: must be at least {least}, and finite")
    if config.seed >= 2**32:
        raise UserError(f"--seed {config.seed}: must be less than 2**32")
    if 0 < config.temperature < 0.01:
        raise UserError(f"--temperature {config.temperature}: must be 0, or at least 0.01")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top_p {config.top_p}: must be more than 0, and at most 1")
    if config.prompt == "-" and not config.sample_only:
        raise UserError("--prompt -: reads standard input, which only --sample_only does")
    for name in SHAPE if config.init_from != "scratch" and not config.resume else []:
        if getattr(config, name) != getattr(usual_config(config), name):
            raise UserError(f"--{name}: the weights of --init_from bring their own; leave it away")
    if config.sample_only:
        return
    if Path(config.out_dir).exists() and not Path(config.out_dir).is_dir():
        raise UserError(f"--out_dir {config.out_dir}: is a file; name a directory")
    log = Path(config.out_dir) / "log.txt"
    if not config.resume and log.exists() and log.stat().st_size:
        raise UserError(f"{config.out_dir} holds a run; add --resume, or choose another --out_dir")
    if config.overfit_one_batch and config.batch_ramp_steps:
        raise UserError("--overfit_one_batch: one batch does not grow; give no --batch_ramp_steps")
    B = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    factors = [*[8] * (config.batch_ramp_steps > 0), B, config.seq_len, world_size]
    if config.total_batch_size % math.prod(factors):
        names = "8 (--batch_ramp_steps) x " if len(factors) == 4 else ""
        names += "micro_batch_size x seq_len x processes = " + " x ".join(map(str, factors))
        why = f"is not a multiple of {names} = {math.prod(factors)}; change one of them"
        raise UserError(f"--total_batch_size {config.total_batch_size} {why}")


def sample(config, checkpoint):
    """--sample_only."""
    check(config, 1)
    device = pick_device(config.device)
    dtype = getattr(torch, pick_dtype(config.dtype, device))
    model = build_model(config, checkpoint).to(device)
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError("--sample_only: the model has not GPT-2's tokens; give another --init_from")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    lines = sys.stdin if config.prompt == "-" else [config.prompt]
    for line in lines:
        print_samples(model, replace(config, prompt=line.rstrip("\n")), autocast)


def explain(error):
    """What the user can do about an error that their files, memory or machine caused, in one
    sentence; None for a fault of this program, which deserves a traceback."""
    from torch._dynamo.exc import BackendCompilerFailed  # slow to import
    from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

    chain = [error]
    while cause := getattr(chain[-1], "inner_exception", None) or chain[-1].__cause__:
        chain.append(cause)
    text = " ".join(str(chain[-1]).split())[:200]
    if isinstance(error, UserError):
        return str(error)
    no_room = ("out of memory", "can't allocate", "ALLOC_FAILED")  # CUDA and MPS, CPU, cuBLAS
    if isinstance(chain[-1], MemoryError) or any(words in text for words in no_room):
        return "out of memory; give a smaller --micro_batch_size, the batch stays the same"
    if isinstance(error, (BackendCompilerFailed, GPUTooOldForTriton, TritonMissing)):
        return f"torch.compile cannot work here ({text}); add --no-compile"
    if isinstance(chain[-1], OSError):
        return f"{chain[-1].filename}: {chain[-1].strerror}; look at that folder and its disk"


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show is replaced
            stream.reconfigure(errors="replace")
    received.clear()
    try:
        config, checkpoint = parse(sys.argv[1:] if argv is None else argv)
        if config.sample_only:
            sample(config, checkpoint)
        else:
            train(config, checkpoint)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        if int(os.environ.get("RANK", 0)):  # the first process speaks, and torchrun then sends
            time.sleep(3)  # a signal here; what only this process knows, it says
        sys.exit(1 if received else f"train_gpt2.py: {sentence}")
    if received:  # as shells have it
        sys.exit(128 + received[0])


if __name__ == "__main__":
    main()
