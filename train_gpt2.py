"""Reproduce GPT-2 (124M): the network, OpenAI's weights, training, HellaSwag, samples.

    python train_gpt2.py --demo                             # any laptop: a small GPT-2 in minutes
    python fineweb.py                                       # 10B tokens into edu_fineweb10B/
    python train_gpt2.py                                    # one GPU; the defaults are the recipe
    torchrun --standalone --nproc_per_node=8 train_gpt2.py  # eight GPUs share the same batches
    python train_gpt2.py --resume                           # go on from the newest checkpoint
    python train_gpt2.py --init_from gpt2 --sample_only     # sample OpenAI's weights

The lecture, in its order, is the upper part of this file and ends with train():

    the network, flash attention ............... CausalSelfAttention, attention, MLP, Block, GPT
    tied embeddings, initialisation ............ GPT.__init__, GPT.init_weights
    logits, cross entropy, ln V at the start ... GPT.forward, cross_entropy
    weights in and out ......................... GPT.from_pretrained, GPT.save_pretrained
    AdamW, weight-decay groups, fused .......... GPT.configure_optimizers
    the sampling loop .......................... GPT.generate
    batches, shards, epochs .................... DataLoaderLite
    warm-up, cosine, batch-size schedule ....... get_lr, get_batch_size
    the validation split ....................... evaluate
    accumulation, autocast, DDP, clipping ...... training_step
    devices, TF32, bfloat16, compile, the loop . train; overfitting one batch is one line in it

The lower part, behind a rule, would be the same for another model: processes, files, the screen,
what makes a CPU and sampling faster, the command line. It can be skipped.

Letters in shapes: B sequences of T tokens, C channels (n_embd), V rows of the vocabulary, H heads
of D channels each. "GPT-2" cites Radford et al. 2019, "GPT-3" Brown et al. 2020 (arXiv 2005.14165).
"""

import ctypes
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import timeit
import zipfile
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute

import fineweb
import hellaswag
from fineweb import VOCAB_SIZE, UserError, open_shards, tokenizer

# ----------------------------------------------------------------------------------------------
# Configuration: one knob per line, from which tyro makes the command line and its help


@dataclass(frozen=True)
class Config:
    # where from, where to
    demo: bool = False  # a short run on text that ships with Python; other flags still count
    data_dir: str = "edu_fineweb10B"  # shards that fineweb.py wrote
    out_dir: str = "log"  # log.txt and checkpoints
    init_from: str = "scratch"  # or gpt2 ... gpt2-xl, or a directory: weights to start from
    resume: bool = False  # go on from out_dir's newest checkpoint, with the settings of its run
    # the network, unless --init_from brings its own
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # sets the next three
    n_layer: int | None = None  # blocks
    n_head: int | None = None  # attention heads per block
    n_embd: int | None = None  # channels, a multiple of n_head
    block_size: int | None = None  # longest context in tokens; 1024, or seq_len if that is longer
    vocab_size: int = 50304  # 50257 and padding to a multiple of 128, which GPUs multiply faster
    # batch and data order
    total_batch_size: int = 524288  # tokens per update, 2**19: 0.5M in GPT-3 table 2.1
    batch_ramp_steps: int = 0  # updates during which the batch grows from an eighth (0 = none)
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences on one device at a time
    seq_len: int = 1024  # tokens per sequence
    shuffle: bool = True  # visit the training windows in a new order each epoch
    seed: int = 1337  # of the weights and of the data order
    overfit_one_batch: bool = False  # train on the first batch only: the loss must go to nearly 0
    # optimization: GPT-3 appendix B, but for the length of the run
    max_steps: int = 19073  # updates: 10e9 tokens / 2**19
    warmup_steps: int = 715  # 375M tokens / 2**19
    max_lr: float = 6e-4  # GPT-3 table 2.1; 3e-4 for medium, 2.5e-4 for large, 2e-4 for xl
    min_lr: float = 6e-5  # where the cosine ends: 10% of max_lr
    weight_decay: float = 0.1  # of matrices and embeddings
    grad_clip: float = 1.0  # largest norm of the whole gradient (0 = no limit)
    # once in a while (in steps; 0 = never; otherwise after the last update too)
    val_every: int = 250  # validation loss
    val_tokens: int = 10485760  # tokens that it is averaged over, the same ones every time
    hellaswag_every: int = 250  # HellaSwag acc_norm
    hellaswag_data: str = hellaswag.DATA  # its items; downloaded to here if nothing is there
    sample_every: int = 250  # print samples
    save_every: int = 5000  # write a checkpoint
    save_minutes: float = 30  # and also when so many have passed since the last one
    keep_checkpoints: int = 3  # older ones that stay beside the newest (0 = all)
    # sampling
    prompt: str = "Hello, I'm a language model,"  # samples begin with it
    sample_tokens: int = 32  # new tokens per sample
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int = 50  # draw from the k likeliest tokens (0 = all)
    sample_only: bool = False  # no training: print samples of the weights that --init_from names
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of matrix products
    compile: bool = False  # torch.compile; on by itself on CUDA


SIZES = {  # GPT-2 table 2; 124M, 355M, 774M and 1,558M parameters
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

# ----------------------------------------------------------------------------------------------
# The network: GPT-2 with Hugging Face's parameter names. No dropout: in one pass over fresh text
# there is nothing to overfit.


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None):
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
    """softmax(q kᵀ / sqrt(D)) v (Vaswani et al. 2017, equation 1), for q, k, v of shape
    (B, H, T, D). Without a mask (bool, True: may look) it is causal: each token looks at itself
    and at those before it. This is flash attention: the (T, T) weights never exist as a whole."""
    if mask is None and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return cpu_attention(q, k, v)  # the same, faster there: see below the rule
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


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
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # of the token
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # of its position
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx, position_ids=None, attention_mask=None):
        """idx: (B, T) int64; returns (B, T, C). HellaSwag packs rows in its own way and gives
        position_ids, (B, T) int64, and attention_mask, (B, 1, T, T) bool, True: may look."""
        T, context = idx.size(1), self.wpe.num_embeddings
        if T > context:
            raise ValueError(f"{T} tokens are more than the model's context of {context}")
        if position_ids is None:
            position_ids = torch.arange(T, device=idx.device)
        x = self.wte(idx) + self.wpe(position_ids)  # (B, T, C)
        for block in self.h:
            x = block(x, attention_mask)
        return self.ln_f(x)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of one network, as Config or a config.json that comes with weights has it."""

    block_size: int = 1024  # longest context in tokens
    vocab_size: int = VOCAB_SIZE  # 50257: 50,000 merges, 256 bytes, <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    @property
    def n_tokens(self):
        """Rows of the vocabulary that stand for a token: all, but 50304 is 50257 and padding."""
        return VOCAB_SIZE if self.vocab_size == 50304 else self.vocab_size


def cross_entropy(x, weight, targets):
    """Mean of -ln p(target) in nats. x: (N, C), weight: (V, C), targets: (N,) int64. At first
    every token is about as likely as any other, so it is near ln V: 10.83 for V = 50304."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return CPUCrossEntropy.apply(x, weight, targets)  # the same in less memory
    logits = F.linear(x, weight)  # (N, V)
    return F.cross_entropy(logits.float(), targets)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Tied: one tensor reads tokens and predicts them (Press and Wolf 2017), 38M of 124M.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) for matrices and embeddings (Radford et al. 2018, section 4.1). What each
        block adds to the residual stream, twice per block, is scaled by 1/sqrt(2 n_layer), so
        that the sum of 2 n_layer terms does not grow with depth (GPT-2 section 2.3)."""
        for name, p in self.named_parameters():  # the tied tensor comes once
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)  # what is left, the weights of LayerNorm, are ones already

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64, the targets being the next tokens. Without targets the
        logits (B, T, V); with them the mean loss in nats per token."""
        x = self.transformer(idx)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)
        return cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len):
        """Forward and backward: 6 for each weight that multiplies, and 12·L·C·T for attention
        (Chowdhery et al. 2022, appendix B). Position embeddings only add."""
        multiply = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * multiply + 12 * self.config.n_layer * self.config.n_embd * seq_len

    # weights in and out

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """OpenAI's weights by name, gpt2 ... gpt2-xl, or a directory that save_pretrained wrote,
        ours or Hugging Face's. UserError if it is not there or is no plain GPT-2."""
        hf = load_hugging_face(name_or_dir)
        c = hf.config
        model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
        state = {name: transpose_conv1d(name, t) for name, t in hf.state_dict().items()}
        model.load_state_dict(state)
        return model

    def save_pretrained(self, directory):
        """A directory that transformers opens: config.json, model.safetensors without the
        vocabulary's padding, and the tokenizer's files."""
        from safetensors.torch import save_file

        state = {name: transpose_conv1d(name, t) for name, t in self.state_dict().items()}
        del state["lm_head.weight"]  # tied
        state["transformer.wte.weight"] = self.transformer.wte.weight[: self.config.n_tokens]
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        hugging_face_config(self.config).save_pretrained(directory)
        save_file(state, directory / "model.safetensors", {"format": "pt"})
        shutil.copymode(directory / "config.json", directory / "model.safetensors")
        if self.config.n_tokens == VOCAB_SIZE:
            fineweb.save_tokenizer(directory, self.config.block_size)

    # sampling

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50, seed=42, use_cache=True):
        """Continue idx, (B, T) int64, to (B, T + max_new_tokens). Each token is drawn from the
        top_k likeliest (0 = all; temperature 0 = always the likeliest) by a generator of its
        own, so that no other random stream moves."""
        next_logits = CachedDecoder(self) if use_cache else lambda idx: self(idx)[:, -1]
        generator = torch.Generator(idx.device).manual_seed(seed)
        if temperature == 0:
            temperature, top_k = 1.0, 1  # one to draw from
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]  # the model can see no more
            logits = next_logits(context)[:, :VOCAB_SIZE]  # (B, V): padding is never drawn
            logits, ids = logits.float().topk(min(top_k or VOCAB_SIZE, logits.size(1)))  # (B, k)
            probs = F.softmax(logits / temperature, dim=-1)
            drawn = torch.multinomial(probs, 1, generator=generator)  # (B, 1), which of the k
            idx = torch.cat([idx, ids.gather(1, drawn)], dim=1)
        return idx

    # optimizer

    def configure_optimizers(self, weight_decay, learning_rate):
        """AdamW with the betas, eps and weight decay of GPT-3 appendix B. Matrices and embeddings
        decay; biases and LayerNorm's weights, which have one dimension, do not."""
        params = list(self.parameters())
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        for group in groups:
            group["lr_scale"] = 1.0  # train() sets lr to the schedule's times this
        # fused: one kernel updates all tensors, instead of several for each of 148
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def transpose_conv1d(name, tensor):
    """OpenAI's TensorFlow code stored these weights as (in, out), nn.Linear has (out, in). The
    same both ways."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return tensor.t().contiguous() if name.endswith(conv1d) else tensor


# ----------------------------------------------------------------------------------------------
# Data: each batch is a function of (seed, step), so there is no position to save, and any number
# of processes sees the same batches.


class DataLoaderLite:
    """The shards of one split as one stream of tokens, cut into windows of T + 1 that overlap by
    one: the last target of a window is the first input of the next."""

    def __init__(self, config, split, B, rank=0, world_size=1, device="cpu", n_tokens=VOCAB_SIZE):
        self.config, self.B, self.T = config, B, config.seq_len
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.shards = open_shards(config.data_dir, split)  # {name: (n,) uint16, a memory map}
        self.ends = np.cumsum([len(shard) for shard in self.shards.values()]).tolist()
        self.limit = n_tokens  # ids that the model knows
        self.n_windows = (self.ends[-1] - 1) // self.T
        if self.n_windows < 1:
            raise UserError(
                f"{config.data_dir}: its {split} shards hold {self.ends[-1]} tokens, too few for "
                f"--seq_len {self.T}; give a smaller one, or more text"
            )
        self.permutations = {}  # of the epoch at hand
        self.reader = ThreadPoolExecutor(1)  # reads the next batch while the device computes
        self.reading = {}  # step -> what it will have read

    def order(self, step):
        """The windows of update `step`, a list of int: the next ones of an endless sequence of
        epochs, in each of which every window comes once."""
        first, end = (tokens_before(s, self.config) // self.T for s in (step, step + 1))
        windows = []
        for position in range(first, end):
            epoch, i = divmod(position, self.n_windows)
            windows.append(int(self.permutation(epoch)[i]) if self.config.shuffle else i)
        return windows

    def permutation(self, epoch):
        """An order of all windows, (n_windows,) int64. RandomState, because NumPy promises that
        its stream never changes."""
        if epoch not in self.permutations:
            random = np.random.RandomState([self.config.seed, epoch])
            self.permutations = {epoch: random.permutation(self.n_windows)}
        return self.permutations[epoch]

    def share(self, windows):
        """This process's windows, B at a time: the processes take turns."""
        starts = range(self.rank * self.B, len(windows), self.world_size * self.B)
        return [windows[i : i + self.B] for i in starts]

    def read(self, windows):
        """The tokens of some windows, (len(windows), T + 1) int64, in the CPU's memory."""
        rows = np.empty((len(windows), self.T + 1), dtype=np.uint16)
        shards = list(self.shards.values())
        for row, window in zip(rows, windows):
            n = bisect_right(self.ends, window * self.T)  # the shard that it begins in
            start = window * self.T - self.ends[n] + len(shards[n])
            part = shards[n][start : start + len(row)]
            while len(part) < len(row):  # it runs over the end of that shard
                n += 1
                part = np.concatenate([part, shards[n][: len(row) - len(part)]])
            row[:] = part
        if rows.max() >= self.limit:
            raise UserError(
                f"{self.config.data_dir}: its shards hold token id {rows.max()}, but the model "
                f"knows {self.limit} ids; give another --data_dir or --vocab_size"
            )
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens.pin_memory() if self.device.type == "cuda" else tokens  # for fast copies

    def inputs_and_targets(self, tokens):
        """(B, T) and (B, T) on the device: each token's target is the one after it."""
        tokens = tokens.to(self.device, non_blocking=True)  # (B, T + 1)
        return tokens[:, :-1], tokens[:, 1:]

    def read_step(self, step):
        return [self.read(windows) for windows in self.share(self.order(step))]

    def batches(self, step):
        """This process's micro-batches of update `step`: a list of (inputs, targets). A thread
        reads those of the next update meanwhile."""
        now = self.reading.pop(step, None) or self.reader.submit(self.read_step, step)
        self.reading = {step + 1: self.reader.submit(self.read_step, step + 1)}
        return [self.inputs_and_targets(tokens) for tokens in now.result()]


# ----------------------------------------------------------------------------------------------
# Schedules and validation


def get_lr(step, config):
    """Learning rate of update `step`, counted from 0: linear warm-up, then a cosine that reaches
    min_lr at max_steps (GPT-3 appendix B)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # from 1 to 0
    return config.min_lr + cosine * (config.max_lr - config.min_lr)


def get_batch_size(step, config):
    """Tokens in update `step`. During the first batch_ramp_steps an eighth, a quarter, half of
    total_batch_size, for a third of them each; GPT-3 appendix B grows it linearly, from 32k."""
    if not 0 <= step < config.batch_ramp_steps:
        return config.total_batch_size
    return config.total_batch_size // (8, 4, 2)[3 * step // config.batch_ramp_steps]


def tokens_before(step, config):
    """Tokens of all updates before `step`."""
    ramp = sum(get_batch_size(s, config) for s in range(min(step, config.batch_ramp_steps)))
    return ramp + max(0, step - config.batch_ramp_steps) * config.total_batch_size


@torch.no_grad()
def evaluate(model, loader, val_tokens, autocast):
    """Mean loss in nats per token over the first val_tokens tokens of the loader's split, or all
    that there are. Any number of processes covers the same tokens and gets the same result."""
    windows = range(min(max(1, val_tokens // loader.T), loader.n_windows))
    total = torch.zeros(2, device=loader.device)  # summed loss of sequences, their number
    for share in loader.share(windows):
        x, y = loader.inputs_and_targets(loader.read(share))
        with autocast:
            total[0] += model(x, y) * len(x)
        total[1] += len(x)
    total = mean_over_processes(*total)
    return (total[0] / total[1]).item()


# ----------------------------------------------------------------------------------------------
# One update, and the run


def training_step(model, batches, optimizer, scaler, autocast, grad_clip):
    """One update from micro-batches, a list of (inputs, targets). Returns the loss of these
    micro-batches and the norm of the global batch's gradient before it is clipped, as tensors:
    nothing in here waits for the device."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for micro_step, (x, y) in enumerate(batches):
        if isinstance(model, DDP):  # average the gradients over processes once, at the end
            model.require_backward_grad_sync = micro_step == len(batches) - 1
        with autocast:  # matrix products in bfloat16; weights, LayerNorm, softmax, loss in float32
            loss = model(x, y)
        loss = loss / len(batches)  # backward() adds gradients up; the batch's loss is a mean
        scaler.scale(loss).backward()  # float16: lifts small gradients over its smallest number
        total += loss.detach()
    scaler.unscale_(optimizer)  # the true gradients again, before they are measured
    # A rare bad batch must not throw the weights far: scale its gradient down to this norm.
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or torch.finfo(torch.float32).max)
    scaler.step(optimizer)  # leaves the update out if a gradient has a NaN or an infinity
    scaler.update()
    return total, norm


def train(config, checkpoint=None):
    """A whole run, or the rest of one from `checkpoint`, which newest_checkpoint returned. Returns
    the number of the signal that stopped it, or 0."""
    rank, world_size, device = init_processes(config.device)  # by torchrun; else 0 and 1
    check(config, world_size)
    catch_signals()  # from now on they are heeded after a step
    master = rank == 0  # the process that speaks and writes

    # The lecture's ladder, a rung per line. In brackets: ms per step of B=16, T=1024 on its A100,
    # from 1000. Two rungs stand elsewhere: flash attention (96) and fused AdamW (90).
    torch.set_float32_matmul_precision("high")  # TF32: factors keep 10 of 23 bits (333)
    config = replace(config, dtype=pick_dtype(config.dtype, device))  # bfloat16 where it can (300)
    autocast = torch.autocast(device.type, getattr(torch, config.dtype), config.dtype != "float32")
    raw_model = build_model(config, checkpoint).to(device)  # vocabulary 50304, not 50257 (93)
    if config.sample_only:
        return print_samples(raw_model, config, autocast)
    model = torch.compile(raw_model, dynamic=False) if config.compile else raw_model  # (130)
    optimizer = raw_model.configure_optimizers(config.weight_decay, config.max_lr)
    scaler = make_scaler(config.dtype, device)  # for float16, which lacks bfloat16's range
    first_step, evaluated = load_training_state(checkpoint, optimizer, scaler)
    B = pick_micro_batch_size(config, raw_model, world_size, autocast)
    ddp_model = DDP(model) if world_size > 1 else model  # averages gradients over processes

    if config.demo:
        fineweb.build_demo(config.data_dir)
    share = dict(B=B, rank=rank, world_size=world_size, device=device)
    share |= dict(n_tokens=raw_model.config.n_tokens)
    loader = DataLoaderLite(config, "train", **share)
    val_loader = DataLoaderLite(config, "val", **share) if config.val_every else None
    items = None  # of HellaSwag
    if config.hellaswag_every and raw_model.config.vocab_size >= VOCAB_SIZE:
        items = hellaswag.items_or_none(config.hellaswag_data, raw_model.config.block_size)
    log = Log(config.out_dir, first_step, evaluated, write=master)
    save = Saver(config, raw_model, optimizer, scaler, autocast, loader, first_step)
    progress = Progress(config, raw_model, device, world_size)
    announce(config, raw_model, loader, val_loader, checkpoint)
    left_out, last = 0, True  # updates left out in a row; is there no update to make?

    def due(every):
        return every > 0 and (step % every == 0 or last) and step > evaluated

    for step in range(first_step, config.max_steps + 1):  # so many updates have been made
        last = step == config.max_steps
        # Once in a while, and after the last update. None of it moves what training draws from.
        if due(config.val_every):
            val_loss = evaluate(model, val_loader, config.val_tokens, autocast)
            print0(f"step {step}: validation loss {val_loss:.4f}")
            log.write(step, val=val_loss)
        if items and due(config.hellaswag_every):
            with autocast:
                score = hellaswag.evaluate(raw_model, items, device, rank, world_size)
            print0(f"step {step}: HellaSwag acc_norm {score.acc_norm:.4f} of {score.n} items")
            log.write(step, hella=score.acc_norm)
        if master and save.due(step, left_out):
            save(step, evaluated=step)
        if master and due(config.sample_every):
            print_samples(raw_model, config, autocast)
        if last:
            break

        # -------------------------------- one training step --------------------------------
        t0 = time.perf_counter()  # the device is idle: a number was read from it just before
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batches = loader.batches(0 if config.overfit_one_batch else step)
        loss, norm = training_step(
            ddp_model, batches, optimizer, scaler, autocast, config.grad_clip
        )
        loss, stop = mean_over_processes(loss, len(received)).tolist()  # stop: by a signal
        norm = norm.item()  # these two lines wait for the device, nothing before them does
        seconds = time.perf_counter() - t0
        # -----------------------------------------------------------------------------------

        left_out = 0 if math.isfinite(norm) else left_out + 1  # by scaler.step()
        tokens = get_batch_size(step, config)
        grown = tokens != get_batch_size(step - 1, config)
        log.write(step, batch=tokens if grown else None, skip=left_out or None)
        log.write(step, train=loss, lr=lr, norm=norm)
        print0(progress(step, loss, lr, norm, seconds))
        if left_out == 20:
            give_up(config, f"20 updates in a row were left out, the last one in step {step}")
        if stop:
            if master:
                save(step + 1, evaluated=step)
            break

    farewell(config, raw_model, log, stopped=not last)
    return 0 if last else (received or [signal.SIGTERM])[0]


# ==============================================================================================
# From here on nothing is about GPT-2: processes, files, the screen, what makes a CPU and sampling
# faster, the command line.
# ==============================================================================================

# Processes and devices ------------------------------------------------------------------------


def init_processes(device_name="auto"):
    """(rank, world_size, device), which mean the same with and without torchrun, so that nothing
    after this has a special case. Under torchrun the processes find each other here."""
    with fineweb.blame("the processes cannot find each other", "start them with torchrun"):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        found = [int(os.environ.get(name, "SIZE" in name)) for name in names]  # or 0, 1, 0, 1
        rank, world_size, local_rank, local_world_size = found
        device = pick_device(device_name, local_rank)
        if device.type == "cpu":
            keep_freed_memory()
        if "RANK" in os.environ and device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        elif "RANK" in os.environ:  # torchrun allows each process one core: share them all
            torch.set_num_threads(max(1, os.cpu_count() // local_world_size))
            dist.init_process_group("gloo")
    return rank, world_size, device


def pick_device(name="auto", local_rank=0):
    """A torch.device by name; auto: cuda, else mps, else cpu. UserError if it is not there."""
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(device for device in have if have[device]) if name == "auto" else name
    if not have[name]:
        raise UserError(f"--device {name}: there is none here; --device auto takes what there is")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node: this machine has {torch.cuda.device_count()} GPUs")
    return torch.device(name, local_rank)


def pick_dtype(name, device):
    """The precision of matrix products, by name. auto: bfloat16 where the hardware multiplies it
    well, else float16 on CUDA, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        can = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if can else "float16"
    return "bfloat16" if device.type == "cpu" and bfloat16_pays() else "float32"


def make_scaler(dtype, device):
    """For float16 a scale that adapts; otherwise one that stays 1. In every precision it leaves
    an update out whose gradient has a NaN or an infinity, without waiting for the device."""
    stays = dict(init_scale=1.0, growth_factor=1 + 1e-12, backoff_factor=1 - 1e-12)  # 1 in float32
    return torch.amp.GradScaler(device.type, **{} if dtype == "float16" else stays)


def pick_micro_batch_size(config, model, world_size, autocast):
    """Sequences on one device at a time. auto: 4; on CUDA the largest power of two, up to 65,536
    tokens, that divides the batch and fits, as two small passes without torch.compile tell."""
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    most = get_batch_size(0, config) // (config.seq_len * world_size)
    most, device = most & -most, model.lm_head.weight.device  # its largest power of two
    if device.type != "cuda":
        return min(4, most)

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


def mean_over_processes(first, *others):
    """The means over all processes of some numbers, (n,) float32 on the device of the first."""
    values = torch.stack([first, *(torch.full_like(first, float(other)) for other in others)])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


received = []  # the signals that ask this process to stop, as they come


def catch_signals():
    """From now on a signal only notes itself in `received`, where the loop looks after each step.
    A second Ctrl-C ends at once."""

    def note(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    received.clear()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):  # Windows lacks the last two
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, note)


# Where a network comes from -------------------------------------------------------------------


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
            raise UserError(
                "--n_embd {n_embd} is not a multiple of --n_head {n_head}".format(**shape)
            )
        context = config.block_size or max(1024, config.seq_len)
        shape = GPTConfig(context, config.vocab_size, **shape)
        blocks = 12 * shape.n_embd**2 * shape.n_layer
        fineweb.check_memory(
            4 * (blocks + shape.n_embd * shape.vocab_size), "--n_layer and --n_embd"
        )
        torch.manual_seed(config.seed)  # drawn on the CPU: the same weights on every device
        model = GPT(shape)
    context = model.config.block_size
    if config.seq_len > context and not config.sample_only:
        raise UserError(f"--seq_len {config.seq_len}: the model's context has {context} tokens")
    return model


def hugging_face_config(c):
    """transformers' form of a GPTConfig; n_ctx is for llama.cpp."""
    from transformers import GPT2Config  # half a second, so only where it is needed

    end = VOCAB_SIZE - 1 if c.n_tokens >= VOCAB_SIZE else None  # <|endoftext|>
    return GPT2Config(
        **dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.n_tokens),
        **dict(n_positions=c.block_size, n_ctx=c.block_size),
        **dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        **dict(bos_token_id=end, eos_token_id=end, pad_token_id=end),
        **dict(architectures=["GPT2LMHeadModel"], dtype="float32"),
    )


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


# Checkpoints and the log ----------------------------------------------------------------------


def find_checkpoints(out_dir):
    """[(step, path)] of a run's checkpoints, oldest first."""
    found = [(p.name.removeprefix("step_"), p) for p in Path(out_dir).glob("step_*")]
    return sorted((int(step), p) for step, p in found if step.isdecimal())


class Saver:
    """Writes checkpoints, whole or not at all, of weights that are known to be good. No random
    state is in them: training draws none, the data order is a function of (seed, step)."""

    def __init__(self, config, model, optimizer, scaler, autocast, loader, first_step):
        self.config, self.model, self.optimizer, self.scaler = config, model, optimizer, scaler
        self.autocast, self.loader = autocast, loader
        self.step, self.time = first_step, time.monotonic()  # of the last checkpoint

    def due(self, step, left_out):
        """Every --save_every steps, every --save_minutes, and after the last update; but not while
        updates are left out. It is one process's clock, and only that process saves."""
        every, minutes = self.config.save_every, self.config.save_minutes
        last = step == self.config.max_steps
        now = every and (step % every == 0 or last)
        now = now or 0 < 60 * minutes < time.monotonic() - self.time
        return now and step > self.step and (last or not left_out)

    def __call__(self, step, evaluated):
        """Write step_NNNNN, the state after `step` updates. evaluated: the last step whose
        validation and so on are done. Older checkpoints go first, to make room."""
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
            **dict(step=step, evaluated=evaluated, config=asdict(self.config)),
            **dict(gpt_config=asdict(self.model.config), model=self.model.state_dict()),
            **dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict()),
            **dict(shards=fineweb.describe_shards(self.config.data_dir), versions=versions()),
            world_size=self.loader.world_size,
        )
        remedy = "make room and go on with --resume; older checkpoints are whole"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with fineweb.blame(f"{final} cannot be written", remedy):
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
            with fineweb.blame(f"{path} is damaged", "the one before it is taken"):
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
    """Give optimizer and scaler theirs. Returns (updates made, last step whose validation and so
    on are done). UserError, in all processes, if they do not have the same checkpoint."""
    if dist.is_initialized():
        mine = checkpoint and (Path(checkpoint["path"]).name, checkpoint["checksums"])
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        if any(other != mine for other in found):
            names = ", ".join(str(other and other[0]) for other in found)
            raise UserError(f"--resume: --out_dir is not one folder for all; they found {names}")
    if not checkpoint:
        return 0, -1
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["config"]["dtype"] == "float16":
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"], checkpoint["evaluated"]


class Log:
    """out_dir/log.txt, one `step stream value` per line, and the lock on that folder. A resumed
    run first drops the records that it will write again. Without `write` it does nothing."""

    def __init__(self, out_dir, first_step, evaluated, write=True):
        self.path, self.file, self.begun = Path(out_dir) / "log.txt", None, time.monotonic()
        if not write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path.with_name(".lock"))
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{out_dir}: another process trains there; choose another") from None
        lines = self.path.read_text(errors="replace").splitlines(True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n")]  # the last one may be cut short
        kept = [line for line in kept if not is_repeated(line, first_step, evaluated)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
        self.file = self.path.open("a", buffering=1)

    def write(self, step, **values):
        """A record for each stream=value; None is no record."""
        with fineweb.blame(f"{self.path} cannot be written", "make room, and go on with --resume"):
            for stream, value in values.items():
                if self.file and value is not None:
                    self.file.write(f"{step} {stream} {value:.12f}\n")

    def close(self):
        if self.file:
            self.file.close()
            self.lock.release()


def parse_record(line):
    """(step, stream, value as text), or None if the line is something else."""
    words = line.split()
    return (int(words[0]), *words[1:]) if len(words) == 3 and words[0].isdecimal() else None


def is_repeated(line, first_step, evaluated):
    """Will a run that goes on at first_step, evaluations up to `evaluated` done, write it again?"""
    step, stream, _ = parse_record(line) or (-1, None, None)
    return step > evaluated if stream in ("val", "hella") else step >= first_step


def read_log(path):
    """The records of a log.txt, [(step, stream, value as text)]; other lines are passed over."""
    lines = Path(path).read_text(errors="replace").splitlines(keepends=True)
    records = [parse_record(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record]


# The screen -----------------------------------------------------------------------------------

PEAK_TFLOPS = (  # dense bfloat16, or float16, by NVIDIA's data sheets; the first that fits counts
    {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989}
    | {"B200": 2250, "A100": 312, "V100": 125, "T4": 65, "A40": 150, "A10G": 70, "A10": 125}
    | {"L40S": 362, "L4": 121, "A6000": 155, "3090": 71, "4090": 165, "5090": 209}
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
    """The line after each step, with the time left and, where the GPU is known, MFU: the share of
    its peak FLOP/s that the model's own arithmetic takes (Chowdhery et al. 2022, section 4.1)."""

    def __init__(self, config, model, device, world_size):
        self.config, self.typical, self.steps = config, None, 0  # typical: seconds per token
        self.flops = model.flops_per_token(config.seq_len)
        self.peak = (peak_flops(device) or math.inf) * world_size

    def __call__(self, step, loss, lr, norm, seconds):
        config, tokens = self.config, get_batch_size(step, self.config)
        self.steps += 1
        if self.steps <= 2:  # the first step compiles and warms up
            self.typical = seconds / tokens
        self.typical = 0.9 * self.typical + 0.1 * seconds / tokens
        left = tokens_before(config.max_steps, config) - tokens_before(step + 1, config)
        left, rate = timedelta(seconds=int(left * self.typical)), tokens / seconds
        line = (
            f"step {step:5d}/{config.max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f}"
        )
        line += f" | {seconds * 1e3:.1f} ms | {rate:,.0f} tokens/s"
        if self.peak < math.inf:
            line += f" | MFU {self.flops * rate / self.peak:.1%}"
        if not math.isfinite(norm):
            line += " | update left out: its gradient is not finite"
        return f"{line} | left {left}"


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
    total, tokens = config.total_batch_size, loader.ends[-1]
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


def print_samples(model, config, autocast, rows=4):
    """Continuations of --prompt, each up to its <|endoftext|>."""
    if model.config.vocab_size < VOCAB_SIZE:
        return print0(f"no samples: the model has {model.config.vocab_size} tokens, not GPT-2's")
    enc = tokenizer()
    prompt = enc.encode_ordinary(config.prompt) or [enc.eot_token]
    idx = torch.tensor([prompt] * rows, device=model.lm_head.weight.device)
    with autocast:
        idx = model.generate(idx, config.sample_tokens, config.temperature, config.top_k)
    for new in idx[:, len(prompt) :].tolist():
        end = new.index(enc.eot_token) if enc.eot_token in new else len(new)
        print0(">", config.prompt + enc.decode(new[:end]))


def farewell(config, model, log, stopped):
    """Leave the folder to others, and say how to go on."""
    log.close()
    if torch.cuda.is_initialized():
        print0(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB per device")
    how = "stopped by a signal" if stopped else "done"
    print0(f"{how} after {timedelta(seconds=int(time.monotonic() - log.begun))}; log: {log.path}")
    saved, out_dir = find_checkpoints(config.out_dir), shlex.quote(config.out_dir)
    if stopped:
        print0(f"  python train_gpt2.py --resume --out_dir {out_dir}  # goes on")
    elif saved:
        newest = shlex.quote(str(saved[-1][1]))
        print0(f"checkpoint: {newest}, which transformers opens too. Next:")
        if model.config.vocab_size >= VOCAB_SIZE:
            print0(f"  python train_gpt2.py --sample_only --init_from {newest}")
        print0(f"  GPT2_RUN={out_dir} jupyter execute --inplace play.ipynb  # plots the log")
    if dist.is_initialized():
        dist.destroy_process_group()


# What makes a CPU and sampling faster ---------------------------------------------------------


def cpu_attention(q, k, v, rows=256):
    """attention() for bfloat16 on a CPU, causal: whole products are faster there than flash
    attention's tiles. `rows` queries at a time look at the keys up to their own, which spares half
    of a long context; their weights are computed again in the backward pass."""
    shape, T = q.shape, q.size(2)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B·H, T, D)
    done = []
    for i in range(0, T, rows):
        part = q[:, i : i + rows], k[:, : i + rows], v[:, : i + rows]
        done.append(
            recompute(plain_attention, *part, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(done, dim=1).view(shape)


def plain_attention(q, k, v):
    """attention() of the last t of T tokens: q (n, t, D), k and v (n, T, D)."""
    t, T, D = q.size(1), k.size(1), q.size(2)
    ahead = torch.full((t, T), -math.inf, dtype=q.dtype).triu(T - t + 1)  # may not be looked at
    weights = torch.baddbmm(ahead, q, k.transpose(1, 2), alpha=D**-0.5).softmax(-1)  # (n, t, T)
    return weights @ v


class CPUCrossEntropy(torch.autograd.Function):
    """cross_entropy() of some rows at a time, each with its gradient at once, so that all (N, V)
    logits, gigabytes, never exist."""

    ROWS = 512

    @staticmethod
    def forward(ctx, x, weight, targets):
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        w = weight.detach().to(half).requires_grad_(ctx.needs_input_grad[1])
        d_x, d_weight, total = torch.zeros_like(x), torch.zeros_like(weight), 0.0
        split = (t.split(CPUCrossEntropy.ROWS) for t in (x, d_x, targets))
        for part, d_part, wanted in zip(*split):
            part = part.detach().to(half).requires_grad_(w.requires_grad)
            with torch.set_grad_enabled(w.requires_grad):
                logits = F.linear(part, w).float()  # (ROWS, V)
                loss = F.cross_entropy(logits, wanted, reduction="sum")
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


def keep_freed_memory():
    """Have glibc keep what is freed, instead of returning each large tensor to the system and
    fetching its pages anew in the next step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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
    """model(idx)[:, -1], the logits (B, V) of the next token, for ids (B, T) that grow by a token
    per call: keeps the keys and values of each block, so that only what is new is computed."""

    def __init__(self, model):
        self.model, self.read = model, 0  # tokens read so far
        self.kept = [None] * model.config.n_layer  # keys and values, (B, H, read, D) each

    def __call__(self, idx):
        if idx.size(1) <= self.read:  # the context is full and slides: every position changes
            return self.model(idx)[:, -1]
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

DEMO = Config(  # a real tokenizer and a real loss curve, sized for two laptop cores
    **dict(demo=True, data_dir="demo/data", out_dir="demo/log"),
    **dict(n_layer=4, n_head=4, n_embd=128, block_size=128, seq_len=128),
    **dict(total_batch_size=1024, micro_batch_size=8, max_steps=450, warmup_steps=20),
    **dict(max_lr=2e-3, min_lr=2e-4, val_every=90, val_tokens=13824, hellaswag_every=0),
    **dict(sample_every=225, save_every=225, prompt="The for statement is used to"),
)
SHAPE = ["model", "n_layer", "n_head", "n_embd", "block_size", "vocab_size"]
BATCHES = [
    "total_batch_size",
    "batch_ramp_steps",
    "seq_len",
    "shuffle",
    "seed",
    "overfit_one_batch",
]


def parse(argv):
    """(config, checkpoint): the flags over the defaults, the demo's, or those of the run that
    --resume goes on with; and what newest_checkpoint found of that run."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    usual = Config(compile=pick_device(config.device).type == "cuda")
    config = tyro.cli(Config, args=argv, default=DEMO if config.demo else usual)
    checkpoint = newest_checkpoint(config.out_dir) if config.resume else None
    if not checkpoint:
        return config, None
    before = replace(Config(**checkpoint["config"]), out_dir=config.out_dir, resume=True)
    config = tyro.cli(Config, args=argv, default=before)
    for name, old in asdict(before).items():
        new = getattr(config, name)
        if new != old and name in ["init_from", *SHAPE, *BATCHES]:
            why = f"--resume: {checkpoint['path']} was trained with --{name} {old}, not {new}"
            raise UserError(f"{why}; start another run with --init_from {checkpoint['path']}")
        if new != old and not config.sample_only:
            print0(f"--resume: {name} {old} → {new}")
    return config, checkpoint


def check(config, world_size):
    """Refuse, in one sentence, what cannot work."""
    sizes = [
        "total_batch_size",
        "micro_batch_size",
        "seq_len",
        "val_tokens",
        "block_size",
        "vocab_size",
    ]
    for name, value in asdict(config).items():
        least = 1 if name in [*sizes, *SIZES["gpt2"]] else 0
        if type(value) in (int, float) and not least <= value < math.inf:
            raise UserError(f"--{name} {value}: must be at least {least}, and finite")
    if config.seed >= 2**32:
        raise UserError(f"--seed {config.seed}: must be less than 2**32")
    if 0 < config.temperature < 0.01:
        raise UserError(f"--temperature {config.temperature}: must be 0, or at least 0.01")
    for name in SHAPE if config.init_from != "scratch" and not config.resume else []:
        if getattr(config, name) != getattr(DEMO if config.demo else Config, name):
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


def explain(error):
    """What the user can do about an error that their files, memory or machine caused, in one
    sentence; None for a fault of this program, which deserves a traceback."""
    from torch._dynamo.exc import BackendCompilerFailed  # slow to import

    chain = [error]
    while cause := getattr(chain[-1], "inner_exception", None) or chain[-1].__cause__:
        chain.append(cause)
    text = " ".join(str(chain[-1]).split())[:200]
    if isinstance(error, UserError):
        return str(error)
    if isinstance(chain[-1], (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in text:
        return "out of memory; give a smaller --micro_batch_size, the batch stays the same"
    if isinstance(error, BackendCompilerFailed):
        return f"torch.compile cannot work here ({text}); add --no-compile"
    if isinstance(chain[-1], OSError):
        return f"{chain[-1].filename}: {chain[-1].strerror}; look at that folder and its disk"


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show is replaced
            stream.reconfigure(errors="replace")
    stopped = 0
    try:
        config, checkpoint = parse(sys.argv[1:] if argv is None else argv)
        stopped = train(config, checkpoint)
    except KeyboardInterrupt:
        stopped = signal.SIGINT
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        if int(os.environ.get("RANK", 0)):  # the first process speaks, and torchrun then sends
            time.sleep(3)  # a signal here; what only this process knows, it says
        sys.exit(1 if received else f"train_gpt2.py: {sentence}")
    if stopped:  # as shells have it
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
