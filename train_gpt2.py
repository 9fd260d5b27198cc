"""Reproduce GPT-2 (124M): load OpenAI's weights or train from scratch, validate, score HellaSwag, sample.

    python train_gpt2.py --demo                                   # any laptop: a small GPT-2 in a few minutes
    python fineweb.py                                             # 10B tokens of FineWeb-Edu -> edu_fineweb10B/
    python train_gpt2.py                                          # one GPU; the defaults are the recipe
    torchrun --standalone --nproc_per_node=8 train_gpt2.py        # eight GPUs share the same batches
    torchrun --nnodes=2 --node_rank=R --nproc_per_node=8 \\
        --master_addr=HOST --master_port=29500 train_gpt2.py      # two nodes, R = 0 on HOST and 1 on the other
    python train_gpt2.py --init_from gpt2 --sample_only           # sample OpenAI's weights
    python train_gpt2.py --resume                                 # go on from the newest checkpoint in log/

A run writes, and never overwrites, three things under --out_dir: `log.txt` (one `step stream value` a line; streams
train, val, hella, lr, norm), `step_00250/` directories (config.json and model.safetensors, which
`transformers.GPT2LMHeadModel.from_pretrained` loads as they are, and training_state.pt for --resume), nothing else.

Letters in shapes: B sequences of T tokens, C channels (n_embd), V vocabulary rows, H heads of D channels each,
S slots of the key-value cache. "GPT-2" and "GPT-3" cite Radford et al. 2019 and Brown et al. 2020 (arXiv 2005.14165).
"""

import ctypes
import dataclasses
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fineweb import CORES, EOT, VOCAB_SIZE, UserError, check_manifest, list_shards, open_shard, stop, tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one knob a line; tyro makes the command line, and its help, from this class.

SIZES = {  # GPT-2 table 2; 124,439,808 · 354,823,168 · 774,030,080 · 1,557,611,200 parameters with 50257 tokens
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


@dataclass(frozen=True)
class Config:
    # where from, where to
    demo: bool = False  # a short run on text that ships with Python; other flags still count
    data_dir: str = "edu_fineweb10B"  # shards that fineweb.py wrote
    out_dir: str = "log"  # log.txt and checkpoints
    init_from: str = "scratch"  # scratch, gpt2 ... gpt2-xl, or a directory that save_pretrained wrote
    resume: bool = False  # continue the run in out_dir from its newest checkpoint, if there is one
    # model (--init_from other than scratch brings its own)
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"  # sets the three that follow
    n_layer: int | None = None  # blocks
    n_head: int | None = None  # attention heads a block
    n_embd: int | None = None  # channels, a multiple of n_head
    block_size: int | None = None  # longest context in tokens; unless given, 1024 or seq_len if that is longer
    vocab_size: int = 50304  # 50257 padded to a multiple of 128, which GPU matrix products like
    # batch
    total_batch_size: int = 524288  # tokens an update, 2**19: GPT-3 table 2.1 has 0.5M for this size
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences on one device at a time; auto: all that fit a GPU, else 4
    seq_len: int = 1024  # tokens a sequence
    shuffle: bool = True  # visit the windows of the training set in a new order each epoch
    seed: int = 1337  # of the weights and the data order
    overfit_one_batch: bool = False  # train on the first batch only: the loss must go to nearly 0
    # optimization (GPT-3 appendix B, but for the length of the run)
    max_steps: int = 19073  # updates; 10e9 tokens / 2**19
    warmup_steps: int = 715  # linear warm-up over 375M tokens / 2**19
    max_lr: float = 6e-4  # GPT-3 table 2.1 for 125M parameters
    min_lr: float = 6e-5  # the cosine ends at 10% of max_lr
    weight_decay: float = 0.1  # on tensors of two or more dimensions only
    grad_clip: float = 1.0  # global norm (0 = no clipping)
    # once in a while (in steps; 0 = never; otherwise at the last step too)
    val_every: int = 250  # validation loss
    val_tokens: int = 10485760  # tokens it is averaged over, the same ones every time
    hellaswag_every: int = 250  # HellaSwag acc_norm
    hellaswag_data: str = "hellaswag/hellaswag_val.jsonl"  # downloaded to here if it is not there
    hellaswag_limit: int | None = None  # items to score; all 10,042 unless given
    sample_every: int = 250  # print samples
    save_every: int = 5000  # write a checkpoint
    keep_checkpoints: int = 3  # newest ones kept (0 = all)
    # sampling
    prompt: str = "Hello, I'm a language model,"  # samples begin with it
    num_samples: int = 4  # rows
    sample_tokens: int = 32  # new tokens a row
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int = 50  # draw from the k likeliest tokens (0 = all)
    sample_only: bool = False  # load --init_from, print samples, stop
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of matrix products; weights stay float32
    matmul_precision: Literal["highest", "high", "medium"] = "high"  # float32 products on CUDA; high is TF32
    compile: bool = field(default_factory=torch.cuda.is_available)  # torch.compile; on where CUDA is


# A real tokenizer and a real loss curve, sized for two laptop cores.
DEMO = Config(
    demo=True, data_dir="demo/data", out_dir="demo/log", n_layer=4, n_head=4, n_embd=128, block_size=128,
    total_batch_size=1024, micro_batch_size=8, seq_len=128, max_steps=450, warmup_steps=20, max_lr=2e-3, min_lr=2e-4,
    val_every=90, val_tokens=13824, hellaswag_every=0, sample_every=225, save_every=225, compile=False,
    prompt="The for statement is used to",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Model: GPT-2 with Hugging Face's parameter names. No dropout: one pass over fresh text does not overfit.


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50257  # 50,000 merges + 256 bytes + <|endoftext|>; more rows are padding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


def causal_attention(q, k, v, rows=256):
    """
    Each token attends to itself and to those before it. q, k, v: (B, H, T, D), returns the same. Flash attention, but for
    bfloat16 on a CPU, where the plain form is faster. There, `rows` queries at a time look at the keys up to their own, which
    spares half of a long context; the attention weights are computed once more in the backward pass rather than kept.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    shape, (q, k, v) = q.shape, (t.flatten(0, 1) for t in (q, k, v))  # (B·H, T, D)
    parts = [(q[:, i : i + rows], k[:, : i + rows], v[:, : i + rows]) for i in range(0, q.size(1), rows)]
    done = [checkpoint(plain_attention, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(done, dim=1).view(shape)


def plain_attention(q, k, v):
    """softmax(q kᵀ / sqrt(D)) v (Vaswani et al. 2017, equation 1) for the last t of T tokens: q (heads, t, D), k and v (heads, T, D).
    Scores are -inf where a token would look ahead."""
    t, T, D = q.size(1), k.size(1), q.size(2)
    ahead = torch.full((t, T), -math.inf, dtype=q.dtype).triu(T - t + 1)
    weights = torch.baddbmm(ahead, q, k.transpose(1, 2), alpha=D**-0.5).softmax(-1)  # (heads, t, T)
    return weights @ v


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None, position_ids=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))  # (B, H, T, D)
        if cache is not None:  # (2, B, H, S, D): keep these keys and values, attend to all that were kept
            slots = position_ids[:, None, :, None].expand_as(k)
            k, v = cache[0].scatter_(2, slots, k.to(cache.dtype)), cache[1].scatter_(2, slots, v.to(cache.dtype))
        y = causal_attention(q, k, v) if mask is None else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # tanh: what OpenAI's weights were trained with


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None, position_ids=None):
        x = x + self.attn(self.ln_1(x), mask, cache, position_ids)  # tokens exchange information
        return x + self.mlp(self.ln_2(x))  # each token thinks it over


class Transformer(nn.Module):
    """Token ids to hidden states; Hugging Face's GPT2Model."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx, position_ids=None, attention_mask=None, cache=None):
        """
        idx: (B, T) int64, T at most block_size. position_ids: (B, T) int64, or None for 0 ... T-1. attention_mask:
        (B, 1, T, T) bool, True where a token may look, or None for causal. cache: (n_layer, 2, B, H, S, D), written at
        position_ids and then attended to up to each token's own position. Returns (B, T, C) after the last LayerNorm.
        """
        if idx.size(1) > self.wpe.num_embeddings:
            raise ValueError(f"{idx.size(1)} tokens are more than the model's context of {self.wpe.num_embeddings}")
        if position_ids is None:
            position_ids = torch.arange(idx.size(1), device=idx.device)[None]
        if cache is not None:
            slots = torch.arange(cache.size(4), device=idx.device)
            attention_mask = (slots <= position_ids[..., None])[:, None]  # (B, 1, T, S)
        x = self.wte(idx) + self.wpe(position_ids)  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, attention_mask, None if cache is None else cache[i], position_ids)
        return self.ln_f(x)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    F.cross_entropy(F.linear(x, weight), targets), with the gradients taken on the way forward, from the logits of a chunk of
    tokens while they are at hand: the (N, V) logits and their gradient, gigabytes, never exist as a whole. For the CPU in
    eager mode; torch.compile fuses the plain form, and was faster with it. x: (N, C), weight: (V, C), targets: (N,) int64.
    """

    CHUNK = 256  # tokens

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        dtype = autocast_dtype(x)
        d_x, d_weight = torch.zeros_like(x), torch.zeros_like(weight) if with_gradients else None
        x, weight, loss = x.to(dtype), weight.to(dtype), torch.zeros((), device=x.device)
        counted = (targets != -100).nonzero()[:, 0]
        for chunk in counted.split(ChunkedCrossEntropy.CHUNK):
            rows, wanted = x[chunk], targets[chunk]
            log_p = F.linear(rows, weight).float().log_softmax(-1)  # (CHUNK, V)
            loss += F.nll_loss(log_p, wanted, reduction="sum")
            if with_gradients:
                d_logits = log_p.exp_()  # the derivative: the probabilities, less 1 for the target
                d_logits[torch.arange(len(chunk)), wanted] -= 1
                del log_p  # so that the next line frees its 50 MB
                d_logits = d_logits.to(dtype)
                d_x[chunk] = (d_logits @ weight).to(d_x.dtype)
                d_weight += d_logits.t() @ rows
        ctx.n = len(counted)
        ctx.save_for_backward(d_x, d_weight)
        return loss / ctx.n

    @staticmethod
    def backward(ctx, d_loss):
        return *(t.mul_(d_loss / ctx.n) for t in ctx.saved_tensors), None, None


def autocast_dtype(tensor):
    """What matrix products of this tensor are computed in: the caller's autocast dtype, or without one the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one tensor reads tokens and predicts them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) (Radford et al. 2018, section 4.1); residual projections are scaled by 1/sqrt(number of residual
        layers), two a block, so that the residual stream does not grow with depth (GPT-2 section 2.3)."""
        for name, p in self.named_parameters():  # lists the tied tensor once, so it is drawn once
            if p.dim() >= 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)  # the rest, LayerNorm weights, are ones already

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len):
        """Forward and backward: 6 a weight that multiplies, 12·L·C·T for attention (Chowdhery et al. 2022, appendix B).
        Position embeddings only add, so they do not count."""
        multiplying = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * multiplying + 12 * self.config.n_layer * self.config.n_embd * seq_len

    def forward(self, idx, targets=None, return_logits=True):
        """
        idx: (B, T) int64. targets: (B, T) int64, the next token of each, -100 where none counts.
        Returns (logits, loss): (B, T, V), or None if not return_logits, and the mean cross entropy in nats, or None
        without targets. Training asks for no logits, so that B·T·V of them need not outlive the loss.
        """
        x = self.transformer(idx)
        if not return_logits and x.device.type == "cpu" and not torch.compiler.is_compiling():
            loss = ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled())
            return None, loss
        logits = self.lm_head(x)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits if return_logits else None, loss

    # -- weights in and out

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """OpenAI's weights by hub name, or a directory that save_pretrained wrote (ours or Hugging Face's), with its own
        vocabulary, context and depth. Raises UserError if it cannot be had or is no plain GPT-2."""
        from transformers import GPT2Config, GPT2LMHeadModel  # half a second, so only where it is needed

        path, name = Path(name_or_dir), str(name_or_dir)
        local = name[:1] in "./~" or name.count("/") > 1 or ("/" in name and path.parent.is_dir())  # else a name on the hub
        if local and not path.is_dir():
            raise UserError(f"{name_or_dir}: no such directory; name one that holds config.json and model.safetensors")
        try:
            hf_config = GPT2Config.from_pretrained(name_or_dir)
            hf, info = GPT2LMHeadModel.from_pretrained(
                name_or_dir, config=hf_config, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as e:
            raise UserError(f"{name_or_dir}: cannot be loaded ({str(e).splitlines()[0]}); check the name and the "
                            "connection, or give a directory that save_pretrained wrote") from e  # fmt: skip
        expected = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                        scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)  # fmt: skip
        found = {key: getattr(hf_config, key) for key in expected}
        if found != expected or hf_config.n_inner not in (None, 4 * hf_config.n_embd):
            odd = {k: v for k, v in found.items() if v != expected[k]} or {"n_inner": hf_config.n_inner}
            raise UserError(f"{name_or_dir}: not a plain GPT-2: its config.json has {odd}")
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            raise UserError(f"{name_or_dir}: its weights do not fit its config.json: {info}")
        config = GPTConfig(hf_config.n_positions, hf_config.vocab_size, hf_config.n_layer, hf_config.n_head, hf_config.n_embd)
        with torch.device("meta"):  # shapes only: no memory, no random numbers
            model = cls(config)
        state = {name: transpose_conv1d(name, t) for name, t in hf.state_dict().items()}
        expected = {name: t.shape for name, t in model.state_dict().items()}
        if {name: t.shape for name, t in state.items()} != expected:
            raise UserError(f"{name_or_dir}: its tensors are not those of GPT-2")
        model.load_state_dict(state, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors as Hugging Face's GPT-2 classes read them; padding rows are cut off."""
        from safetensors.torch import save_file
        from transformers import GPT2Config

        c = self.config
        state = {name: transpose_conv1d(name, t) for name, t in self.state_dict().items() if name != "lm_head.weight"}
        state["transformer.wte.weight"] = state["transformer.wte.weight"][:VOCAB_SIZE]
        end = EOT if c.vocab_size > EOT else None
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(state, Path(directory) / "model.safetensors", {"format": "pt"})
        GPT2Config(
            vocab_size=min(c.vocab_size, VOCAB_SIZE), n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
            architectures=["GPT2LMHeadModel"], dtype="float32",
        ).save_pretrained(directory)  # fmt: skip

    @torch.no_grad()
    def append_vocab_rows(self, rows):
        """Grow the tied embedding by rows (n, C): the padding that save_pretrained cut off."""
        weight = nn.Parameter(torch.cat([self.lm_head.weight, rows.to(self.lm_head.weight)]))
        self.lm_head.weight = self.transformer.wte.weight = weight
        self.lm_head.out_features = self.transformer.wte.num_embeddings = len(weight)
        self.config = replace(self.config, vocab_size=len(weight))

    # -- optimizer groups

    def configure_optimizers(self, weight_decay, learning_rate):
        """AdamW with betas, eps and decay of GPT-3 appendix B. Matrices and embeddings decay; biases and LayerNorm
        weights, which have one dimension, do not. Fused: one kernel for all tensors (CUDA, MPS and CPU have it)."""
        params = list(self.parameters())
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
        for p in params:  # made now, as AdamW would in its first step, where they would cut that step's memory to pieces
            moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            optimizer.state[p] = dict(step=torch.zeros((), device=p.device), **moments)
        return optimizer

    # -- generation

    def next_logits(self, idx, last, position_ids=None, cache=None):
        """float32 logits (B, V) of the token that follows column `last` (B,) of each row; V without padding rows, so that
        no id of 50257 or more can be drawn. This is what is compiled for sampling: see Transformer.forward."""
        x = self.transformer(idx, position_ids, cache=cache)  # (B, T, C)
        x = x.gather(1, last[:, None, None].expand(-1, 1, x.size(2)))[:, 0]  # (B, C)
        return self.lm_head(x)[:, :VOCAB_SIZE].float()

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=50, seed=42, stop_at_eot=False, use_cache=True,
                 next_logits=None):  # fmt: skip
        """
        Continue each prompt (a list of token ids; lengths may differ) by max_new_tokens ids and return the lists, prompt
        included. Draws from the softmax over the top_k (0 = all) logits / temperature (0 = the likeliest) with its own
        generator, so no other random stream moves. stop_at_eot cuts a row at <|endoftext|>. An empty prompt starts from
        <|endoftext|>, as documents do. next_logits: a compiled self.next_logits.
        """
        prompts = [list(p) or [EOT] for p in prompts]
        vocab = min(VOCAB_SIZE, self.config.vocab_size)
        if not all(0 <= i < vocab for p in prompts for i in p):
            raise ValueError(f"prompts must be token ids from 0 to {vocab - 1}")
        next_logits = next_logits or self.next_logits
        weight, c = self.lm_head.weight, self.config
        B, longest, device = len(prompts), max(map(len, prompts)), weight.device
        ids = torch.full((B, longest + max_new_tokens), min(EOT, vocab - 1), device=device)
        for row, p in zip(ids, prompts):
            row[: len(p)] = torch.tensor(p)
        lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,): rows are filled up to here
        done = torch.zeros(B, dtype=torch.bool, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        S = min(c.block_size, ids.size(1))
        shape = c.n_layer, 2, B, c.n_head, S, c.n_embd // c.n_head
        cache = torch.zeros(shape, dtype=autocast_dtype(weight), device=device) if use_cache else None
        for n in range(max_new_tokens):
            if cache is not None and longest + n <= c.block_size:
                if n == 0:  # read the prompts; what stands right of a short one is overwritten before it is looked at
                    idx, last = ids[:, :longest], lengths - 1
                    position_ids = torch.arange(longest, device=device).expand(B, -1)
                else:  # read only the token just drawn
                    position_ids, last = (lengths - 1)[:, None], torch.zeros_like(lengths)
                    idx = ids.gather(1, position_ids)
                logits = next_logits(idx, last, position_ids, cache)
            else:  # no cache, or past the context: read the last S tokens anew, S constant for torch.compile's sake
                start = (lengths - S).clamp(min=0)
                window = start[:, None] + torch.arange(S, device=device)
                logits = next_logits(ids.gather(1, window), lengths - 1 - start)
            if temperature == 0:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                top, top_ids = logits.topk(min(top_k or vocab, vocab))  # (B, k)
                choice = torch.multinomial(F.softmax(top / temperature, dim=-1), 1, generator=generator)  # (B, 1)
                drawn = top_ids.gather(1, choice)
            ids.scatter_(1, lengths[:, None], drawn)
            lengths += 1
            if stop_at_eot:
                done |= drawn[:, 0] == EOT
                if done.all():
                    break
        rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())]
        if stop_at_eot:
            rows = [p + r[len(p):][: r[len(p):].index(EOT)] if EOT in r[len(p):] else r for p, r in zip(prompts, rows)]
        return rows


def transpose_conv1d(name, tensor):
    """OpenAI's TensorFlow code stored these weights as (in, out); nn.Linear wants (out, in). Its own inverse."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return tensor.t().contiguous() if name.endswith(conv1d) else tensor  # fused AdamW takes every layout for contiguous


# ---------------------------------------------------------------------------------------------------------------------
# Loader: a pure function of (seed, step). No position to save, and any number of processes sees the same batches.


def permute(index, n, seed):
    """
    Where a keyed permutation of range(n) sends each element of index (int64 array): the shuffle without a table, which for
    1.3T tokens would take 10 GB. Four Feistel rounds permute the smallest even power of two that holds n; what falls
    outside range(n) goes round again (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
    out = index.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & low
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as hashes do
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        out[todo] = left << half | right
        todo = out >= n
    return out.astype(np.int64)


class DataLoaderLite:
    """
    The shards of one split, seen as one stream and cut into windows of seq_len + 1 tokens that overlap by one. Global batch
    `step` is the next total_batch_size / seq_len windows of the endless sequence of epochs, each in its own order.
    """

    def __init__(self, data_dir, split, micro_batch_size, seq_len, total_batch_size=None, rank=0, world_size=1,
                 shuffle=False, seed=0, vocab_size=VOCAB_SIZE, pin_memory=False):  # fmt: skip
        self.paths = list_shards(data_dir, split)
        check_manifest(data_dir)  # finished, and all there? A folder that other scripts made has none to check
        # Memory maps, so that only what is read takes memory; as plain arrays, whose slices are made faster.
        self.shards = [open_shard(path).view(np.ndarray) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.B, self.T, self.rank, self.world_size = micro_batch_size, seq_len, rank, world_size
        self.G = (total_batch_size or micro_batch_size * seq_len * world_size) // seq_len  # windows in a global batch
        self.shuffle, self.seed, self.vocab_size, self.pin_memory = shuffle, seed, vocab_size, pin_memory
        self.n_tokens = int(self.ends[-1])
        self.n_windows = (self.n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise UserError(f"{data_dir}: its {split} shards hold {self.n_tokens} tokens, too few for --seq_len {seq_len}")
        self.reader = ThreadPoolExecutor(1)  # reads the next batch while the device computes this one
        self.ahead = None  # (step, future)

    def order(self, step):
        """Windows of global batch `step`, (G,) int64."""
        positions = np.arange(step * self.G, (step + 1) * self.G)
        epochs, windows = positions // self.n_windows, positions % self.n_windows
        if self.shuffle:
            for epoch in np.unique(epochs):
                now = epochs == epoch
                windows[now] = permute(windows[now], self.n_windows, (self.seed, int(epoch)))
        return windows

    def read(self, windows):
        """Tokens of the given windows, (n, T + 1) int64 on the CPU; pinned memory can be copied to CUDA in the background."""
        out = np.empty((len(windows), self.T + 1), dtype=np.uint16)
        starts = windows * self.T
        shards = np.searchsorted(self.ends, starts, side="right")
        offsets = starts - np.concatenate([[0], self.ends])[shards]
        for row, shard, offset in zip(out, shards.tolist(), offsets.tolist()):
            done = 0
            while done < len(row):  # a window may run over the end of a shard
                part = self.shards[shard][offset : offset + len(row) - done]
                row[done : done + len(part)] = part
                done, shard, offset = done + len(part), shard + 1, 0
        if out.size and out.max() >= self.vocab_size:
            raise UserError(f"{self.paths[0].parent}: its shards hold token id {out.max()}, but the model knows {self.vocab_size} ids")
        tokens = torch.from_numpy(out.astype(np.int64))
        return tokens.pin_memory() if self.pin_memory else tokens

    def read_step(self, step):
        """This rank's part of a global batch, (micro-steps, B, T + 1): the ranks take turns, micro-batch by micro-batch."""
        share = self.order(step).reshape(-1, self.world_size, self.B)[:, self.rank]
        return self.read(share.reshape(-1)).view(-1, self.B, self.T + 1)

    def batches(self, step, device):
        """Yield the (inputs, targets) of each micro-step, (B, T) int64 each, and have the next step read meanwhile."""
        ready = self.ahead[1].result() if self.ahead and self.ahead[0] == step else self.read_step(step)
        self.ahead = step + 1, self.reader.submit(self.read_step, step + 1)
        for tokens in ready:
            tokens = tokens.to(device, non_blocking=True)
            yield tokens[:, :-1], tokens[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# One step, its schedule, evaluation


def training_step(model, batches, accum, optimizer, scaler, autocast, grad_clip):
    """
    One update from `accum` micro-batches (inputs, targets). Returns the loss and the gradient's norm before clipping, of the
    global batch, as tensors on the device: nothing here waits for it.
    """
    ddp = dist.is_initialized()
    optimizer.zero_grad(set_to_none=True)
    loss_sum = 0.0
    for micro_step, (x, y) in enumerate(batches):
        more = ddp and micro_step < accum - 1
        with model.no_sync() if more else nullcontext():  # gradients travel once, in the last micro-step
            with autocast:
                _, loss = model(x, y, return_logits=False)
                loss = loss / accum  # so that the sum over micro-steps is the mean over the global batch
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)  # clip true gradients, not scaled ones
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    if ddp:
        dist.all_reduce(loss_sum)
        loss_sum /= dist.get_world_size()
    return loss_sum, norm


def free_memory(optimizer):
    """Give all memory that PyTorch can spare back to the GPU."""
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()


def find_micro_batch_size(fits, most):
    """The largest power of two up to `most` that fits, at least 1; fits(B) raises torch.OutOfMemoryError if B does not."""
    B = 1 << (most.bit_length() - 1)
    while B > 1:
        try:
            fits(B)
            break
        except torch.OutOfMemoryError:
            B //= 2
    return B


def pick_micro_batch_size(model, raw_model, optimizer, config, world_size, autocast, device):
    """
    Sequences on one device at a time for --micro_batch_size auto: 4 unless on CUDA; there the largest power of two that
    divides the work and fits, found by forward and backward passes of the model as it will be trained. All processes take
    the smallest that one of them found.
    """
    most = config.total_batch_size // (config.seq_len * world_size)
    most &= -most  # the largest power of two that divides it
    if device.type != "cuda":
        return min(4, most)

    def peak(model, B):  # bytes of a forward and backward pass, beyond what was allocated before
        free_memory(optimizer)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        # Unlike the loader's slices in strides, so that DDP compiles its own graph, cut into its buckets, and not this one again.
        idx = torch.zeros(B, config.seq_len, dtype=torch.int64, device=device)
        with autocast:
            loss = model(idx, idx, return_logits=False)[1]
        loss.backward()
        return torch.cuda.max_memory_allocated(device) - before

    copies = 1 + dist.is_initialized() + 2 * (not optimizer.state)  # of the weights: summed gradients, DDP's buckets, moments
    reserve = torch.empty(copies * raw_model.num_params(), device=device)
    # A trial of the compiled model takes a compilation, so where to begin is reckoned from small passes without it, which
    # take more memory a sequence than compiled ones, by less than a factor of two.
    each = max(1, peak(raw_model, 2) - peak(raw_model, 1))
    free_memory(optimizer)
    fit = max(1, 2 * torch.cuda.mem_get_info(device)[0] // each)
    B = torch.tensor(find_micro_batch_size(lambda B: peak(model, B), min(most, fit)), device=device)
    if dist.is_initialized():
        dist.all_reduce(B, dist.ReduceOp.MIN)
    del reserve
    free_memory(optimizer)
    return int(B)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def get_lr(step, config):
    """Learning rate of update `step` (from 0): linear warm-up, then a cosine to min_lr at max_steps (GPT-3 appendix B)."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.max_lr - config.min_lr)


@torch.no_grad()
def evaluate(model, loader, val_tokens, device):
    """Mean loss (nats a token) over the first val_tokens of the loader's split, or all of them if there are fewer. Ranks take
    turns, so the same tokens are covered by any number of processes; every rank returns the same value."""
    windows = np.arange(min(max(1, val_tokens // loader.T), loader.n_windows))
    total = torch.zeros(2, device=device)  # summed loss, windows
    for start in range(loader.rank * loader.B, len(windows), loader.world_size * loader.B):
        chosen = windows[start : start + loader.B]
        tokens = loader.read(np.resize(chosen, loader.B)).to(device, non_blocking=True)  # one shape: no recompilation
        x, y = tokens[:, :-1], tokens[:, 1:].clone()
        y[len(chosen) :] = -100  # the rows that only fill the last batch do not count
        loss = model(x, y, return_logits=False)[1]
        total[0] += loss * len(chosen)
        total[1] += len(chosen)
    if dist.is_initialized():
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and the log


def find_checkpoints(out_dir):
    """Whole checkpoints, oldest first, as (step, path): one that is being written has another name."""
    found = [(int(m[1]), p) for p in Path(out_dir).glob("step_*") if (m := re.fullmatch(r"step_(\d{5,})", p.name))]
    return sorted(found)


def save_checkpoint(out_dir, step, model, optimizer, scaler, config):
    """Write out_dir/step_NNNNN whole or not at all, then drop the oldest beyond config.keep_checkpoints. No random state
    is needed to resume: training draws none, the data order is a function of (seed, step), sampling has its own seed."""
    final, temporary = Path(out_dir) / f"step_{step:05d}", Path(out_dir) / f"tmp_step_{step:05d}"
    shutil.rmtree(temporary, ignore_errors=True)
    state = dict(step=step, padding_rows=model.lm_head.weight.detach()[VOCAB_SIZE:].clone(), optimizer=optimizer.state_dict(),
                 scaler=scaler.state_dict(), config=asdict(config), model=asdict(model.config))  # fmt: skip
    try:
        model.save_pretrained(temporary)
        torch.save(state, temporary / "training_state.pt")
        for path in [*temporary.iterdir(), temporary]:  # on the disk before the name says so
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    except Exception as e:  # each library has its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{final} cannot be written ({str(e).splitlines()[0]}); the checkpoints before it are whole: "
                        "make room, and go on with --resume") from e  # fmt: skip
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for _, path in find_checkpoints(out_dir)[: -config.keep_checkpoints if config.keep_checkpoints else 0]:
        shutil.rmtree(path)
    return final


def load_checkpoint(path, config):
    """Model and training state (a dict) of a checkpoint; UserError if the flags would make another run of it."""
    try:
        state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
    except Exception as e:  # a missing file, a damaged archive, a damaged pickle: each has its own
        raise UserError(f"{path / 'training_state.pt'} cannot be read ({str(e).splitlines()[0]}); remove {path} to resume from the "
                        "checkpoint before it") from e  # fmt: skip
    fixed = ["init_from", "seed", "shuffle", "total_batch_size", "seq_len", "overfit_one_batch"]
    if config.init_from == "scratch":
        fixed += ["model", "n_layer", "n_head", "n_embd", "block_size", "vocab_size"]
    for name in fixed:
        old, new = state["config"][name], getattr(config, name)
        if old != new:
            raise UserError(f"--resume: {path} was trained with --{name} {old}, not {new}; give the same, or start another "
                            f"run from its weights with --init_from {path} --out_dir ...")  # fmt: skip
    model = GPT.from_pretrained(path)
    model.append_vocab_rows(state["padding_rows"])
    return model, state


class Log:
    """out_dir/log.txt, one `step stream value` a line. Only rank 0 writes; when resuming, lines past `step` are dropped."""

    def __init__(self, out_dir, step, write):
        self.path = Path(out_dir) / "log.txt"
        self.file = None
        if not write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = read_log(self.path) if self.path.exists() else []
        # train, lr and norm of step s belong to update s, which comes after the checkpoint of s updates
        kept = [r for r in old if r[0] < step or (r[0] == step and r[1] in ("val", "hella"))]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{s} {stream} {value}\n" for s, stream, value in kept))
        temporary.replace(self.path)
        self.file = self.path.open("a", buffering=1)

    def write(self, step, **values):
        if self.file:
            self.file.write("".join(f"{step} {stream} {value:.12f}\n" for stream, value in values.items()))


def read_log(path):
    """Records [(step, stream, value as text)] of a log.txt; a last line that a crash cut short is passed over."""
    rows = [line.split() for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [(int(r[0]), r[1], r[2]) for r in rows if len(r) == 3]


# ---------------------------------------------------------------------------------------------------------------------
# Device and processes

PEAK_TFLOPS = {  # dense bfloat16 (float16 where there is none) by NVIDIA's data sheets; the first name that fits counts
    "A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989, "B200": 2250,
    "L40S": 362, "L4": 121, "A40": 150, "A10G": 70, "A10": 125, "V100": 125, "T4": 65, "RTX A6000": 155, "RTX 3090": 71,
    "RTX 4090": 165, "RTX 5090": 209,
}  # fmt: skip


def peak_flops(device):
    """Peak FLOP/s of one device, or None where the table does not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def pick_device(name="auto", local_rank=0):
    """torch.device by name; auto takes cuda, else mps, else cpu. UserError if it is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in have if have[d]) if name == "auto" else name
    if not have[name]:
        raise UserError(f"--device {name}: this machine, or this build of PyTorch, has none; leave --device away to use what it has")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_dtype(name, device):
    """torch.dtype of the matrix products. auto takes bfloat16 where the hardware multiplies it well, else float16 on CUDA,
    else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and bfloat16_pays() else torch.float32


def bfloat16_pays():
    """Whether this CPU multiplies bfloat16 faster than float32, by the clock, in less than 0.1 s: to have instructions for it says
    little, they may be slower. Rank 0 decides for all."""
    full, half = torch.ones(1024, 1024), torch.ones(1024, 1024, dtype=torch.bfloat16)
    seconds = [[timeit.timeit(lambda: F.linear(w[:256], w), number=1) for w in (full, half)] for _ in range(5)]
    float32, bfloat16 = map(min, zip(*seconds))
    pays = torch.tensor(bfloat16 < float32)
    if dist.is_initialized():
        dist.broadcast(pays, 0)
    return bool(pays)


def keep_freed_memory():
    """Have glibc keep what is freed, rather than return every large tensor to the system and fault its pages in again at
    the next step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def init_processes(device_name="auto"):
    """(rank, world_size, device), which mean the same with and without torchrun: nothing after this has a special case. Under
    torchrun the processes find each other, and share a CPU's cores, of which torchrun allows each process one."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(device_name, local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" not in os.environ:
        return rank, world_size, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        torch.set_num_threads(max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        dist.init_process_group("gloo")
    return rank, world_size, device


def make_demo_shards(config):
    """Tokenize the documentation that ships with every CPython into config.data_dir; nothing to do the second time, or if it
    holds the user's own shards."""
    from pydoc_data.topics import topics

    import fineweb

    source = Path(config.data_dir) / "python_docs.jsonl"
    if not source.exists() and any(source.parent.glob("*")):
        return
    texts = list(topics.values())
    random.Random(0).shuffle(texts)  # they are in alphabetical order, and the first tenth will be for validation
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fineweb.build(fineweb.Config(source=str(source), out=config.data_dir, workers=0))


def check(config, world_size):
    """Refuse, in one sentence, what cannot work."""
    for name in ("total_batch_size", "micro_batch_size", "seq_len", "val_tokens", "num_samples", "block_size", *SIZES["gpt2"]):
        if getattr(config, name) not in ("auto", None) and getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 1")
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if type(value) in (int, float) and not value >= 0:
            raise UserError(f"--{f.name} {value}: must not be negative or nan")
    if config.seed >= 2**63:
        raise UserError(f"--seed {config.seed}: must be less than 2**63")
    if Path(config.out_dir).exists() and not Path(config.out_dir).is_dir():
        raise UserError(f"--out_dir {config.out_dir}: is a file; name a directory")
    B = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    if config.total_batch_size % (B * config.seq_len * world_size):
        raise UserError(
            f"--total_batch_size {config.total_batch_size} is not a multiple of micro_batch_size x seq_len x processes = "
            f"{B} x {config.seq_len} x {world_size} = {B * config.seq_len * world_size}; change one of them"
        )


def new_model(config):
    """A GPT from scratch, or with the weights that --init_from names."""
    if config.init_from != "scratch":
        return GPT.from_pretrained(config.init_from)
    shape = SIZES[config.model] | {k: getattr(config, k) for k in SIZES["gpt2"] if getattr(config, k) is not None}
    if shape["n_head"] < 1 or shape["n_embd"] % shape["n_head"]:
        raise UserError(f"--n_embd {shape['n_embd']} is not a multiple of --n_head {shape['n_head']}")
    torch.manual_seed(config.seed)  # drawn on the CPU: the same weights on every device and in every process
    return GPT(GPTConfig(config.block_size or max(1024, config.seq_len), config.vocab_size, **shape))


def sample(model, config, next_logits=None):
    """Print config.num_samples continuations of config.prompt."""
    enc = tokenizer()
    prompts = [enc.encode_ordinary(config.prompt)] * config.num_samples
    rows = model.generate(prompts, config.sample_tokens, config.temperature, config.top_k, next_logits=next_logits)
    for row in rows:
        print(">", enc.decode(row))


def duration(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------------------------------------------------------------
# main


def train(config):
    rank, world_size, device = init_processes(config.device)
    ddp, master = dist.is_initialized(), rank == 0
    check(config, world_size)

    def print0(*args):
        if master:
            print(*args, flush=True)

    def rank0_first(work):
        if master:
            work()
        if ddp:
            dist.barrier()

    if device.type == "cuda":
        torch.set_float32_matmul_precision(config.matmul_precision)
    dtype = pick_dtype(config.dtype, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))  # checkpoints remember it
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    T = config.seq_len

    # Model: the raw one serves weights, optimizer and sampling; `model` is compiled; `ddp_model` averages gradients.
    checkpoint = find_checkpoints(config.out_dir)[-1:] if config.resume else []
    log_file = Path(config.out_dir) / "log.txt"
    if not config.resume and not config.sample_only and log_file.exists() and log_file.stat().st_size:
        raise UserError(f"{config.out_dir} holds a run already: add --resume to continue it, or choose another --out_dir")
    if config.sample_only and config.init_from == "scratch" and not checkpoint:
        raise UserError("--sample_only needs weights: add --init_from gpt2, or --init_from and a checkpoint such as log/step_19073")
    raw_model, state = load_checkpoint(checkpoint[0][1], config) if checkpoint else (new_model(config), None)
    V = raw_model.config.vocab_size
    if V < VOCAB_SIZE and (config.sample_every or config.hellaswag_every):
        print0(f"warning: samples and HellaSwag are off: they need GPT-2's {VOCAB_SIZE} tokens, and this model has {V}")
        config = replace(config, sample_every=0, hellaswag_every=0)
    raw_model.to(device)
    if T > raw_model.config.block_size and not config.sample_only:
        raise UserError(f"--seq_len {T} is longer than the model's context of {raw_model.config.block_size} tokens")
    model = torch.compile(raw_model, dynamic=False) if config.compile else raw_model
    next_logits = torch.compile(raw_model.next_logits, dynamic=False) if config.compile else raw_model.next_logits
    if config.sample_only:
        with autocast:
            return sample(raw_model, config, next_logits) if master else None
    optimizer = raw_model.configure_optimizers(config.weight_decay, config.max_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start_step = 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty unless it was float16
            scaler.load_state_dict(state["scaler"])
        start_step = state["step"]
        if (before := state["config"]["dtype"]) not in ("auto", config.dtype):
            print0(f"warning: trained in {before} up to here; from now on in {config.dtype}, unless you give --dtype {before}")
    B = config.micro_batch_size
    if B == "auto":
        B = pick_micro_batch_size(model, raw_model, optimizer, config, world_size, autocast, device)
    accum = config.total_batch_size // (B * T * world_size)
    ddp_model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) if ddp else model

    # Data
    if config.demo:
        rank0_first(lambda: make_demo_shards(config))
    share = dict(rank=rank, world_size=world_size, vocab_size=V, pin_memory=device.type == "cuda")
    loader = DataLoaderLite(config.data_dir, "train", B, T, config.total_batch_size, shuffle=config.shuffle, seed=config.seed, **share)
    val_loader = None
    if config.val_every:
        val_loader = DataLoaderLite(config.data_dir, "val", B, T, **share)

    # What stands on the screen before the first step
    peak = peak_flops(device)
    flops = raw_model.flops_per_token(T)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print0(f"device: {world_size} x {name}, {dtype}, {'compiled' if config.compile else 'not compiled'}; torch {torch.__version__}")
    print0(f"model: {raw_model.num_params():,} parameters, {flops / 1e9:.3f} GFLOP a token; {raw_model.config}")
    print0(f"batch: {config.total_batch_size:,} tokens = {B} sequences x {T} tokens x {world_size} processes x {accum} micro-steps")
    print0(f"data: {loader.n_tokens:,} tokens in {len(loader.paths)} train shards of {config.data_dir}; {config.max_steps} steps are "
           f"{config.max_steps * config.total_batch_size / loader.n_tokens:.2f} epochs")  # fmt: skip
    if val_loader and val_loader.n_windows * T < config.val_tokens:
        print0(f"validation: all {val_loader.n_windows * T:,} tokens there are, fewer than --val_tokens {config.val_tokens:,}")
    if not peak:
        print0("MFU: unknown, because the peak of this device is not in PEAK_TFLOPS")
    if config.init_from == "scratch" and start_step == 0:
        print0(f"the first loss should be near ln {V} = {math.log(V):.4f}, that of a uniform guess over the vocabulary")
    if config.resume:
        print0(f"resuming {checkpoint[0][1]}" if checkpoint else f"no checkpoint in {config.out_dir}: starting at step 0")
        if start_step >= config.max_steps:
            print0(f"nothing is left to do: --max_steps is {config.max_steps}")

    items = None
    if config.hellaswag_every:
        import hellaswag

        try:
            items = hellaswag.load_items(config.hellaswag_data, config.hellaswag_limit)
            for item in items:  # said now rather than at the first evaluation
                hellaswag.context_room(item, raw_model.config.block_size)
        except UserError as e:
            items = None
            print0(f"warning: HellaSwag is off: {e}")
    log = Log(config.out_dir, start_step, master)
    typical_ms = None  # of a step, for the time left
    begun = time.time()

    for step in range(start_step, config.max_steps + 1):
        last_step = step == config.max_steps
        fresh = step > start_step or state is None  # else a resumed run would repeat what stands in the log

        def due(every):
            return every > 0 and fresh and (step % every == 0 or last_step)

        # Once in a while: validate, score, sample, save. None of it draws from a generator that training uses.
        if due(config.val_every):
            with autocast:
                val_loss = evaluate(model, val_loader, config.val_tokens, device)
            print0(f"step {step}: validation loss {val_loss:.4f}")
            log.write(step, val=val_loss)
        if items and due(config.hellaswag_every):
            with autocast:
                result = hellaswag.evaluate(raw_model, items, device, rank, world_size, compile=config.compile)
            print0(f"step {step}: HellaSwag acc_norm {result.acc_norm:.4f} of {result.n} items")
            log.write(step, hella=result.acc_norm)
        if due(config.sample_every) and master:
            with autocast:
                sample(raw_model, config, next_logits)
        if due(config.save_every) and (step > 0 or last_step) and master:
            print0(f"step {step}: saved {save_checkpoint(config.out_dir, step, raw_model, optimizer, scaler, config)}")
        if last_step:
            break

        # --------------- one training step ---------------
        synchronize(device)
        t0 = time.perf_counter()
        lr = get_lr(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scale = scaler.get_scale()
        while True:
            batches = loader.batches(0 if config.overfit_one_batch else step, device)
            try:
                loss, norm = training_step(ddp_model, batches, accum, optimizer, scaler, autocast, config.grad_clip)
                break
            except torch.OutOfMemoryError:
                if config.micro_batch_size != "auto" or B == 1 or ddp:  # other processes would wait for this one
                    raise
            B, accum = B // 2, accum * 2  # out of the except clause, which holds on to the memory
            loader.B = B
            print0(f"step {step}: out of memory, so from now on {B} sequences x {accum} micro-steps")
            free_memory(optimizer)
        loss, norm = loss.item(), norm.item()  # the one place where the host waits for the device
        seconds = time.perf_counter() - t0
        # -------------------------------------------------

        if not math.isfinite(loss):
            newest = find_checkpoints(config.out_dir)[-1:]
            raise UserError(f"the loss of step {step} is {loss}: stopped; lower --max_lr or look at the data, and go on with --resume "
                            f"from {newest[0][1] if newest else 'the start, since no checkpoint was written yet'}")  # fmt: skip
        log.write(step, train=loss, lr=lr, norm=norm)
        if step > start_step:  # the first step warms up, and compiles
            typical_ms = seconds * 1e3 if typical_ms is None else 0.9 * typical_ms + 0.1 * seconds * 1e3
        rate = config.total_batch_size / seconds
        left = duration((config.max_steps - step - 1) * (typical_ms or seconds * 1e3) / 1e3)
        mfu = f" | MFU {flops * rate / (peak * world_size):.1%}" if peak else ""
        skipped = f" | update skipped: float16 overflow, scale now {scaler.get_scale():g}" if scaler.get_scale() < scale else ""
        print0(f"step {step:5d}/{config.max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | {seconds * 1e3:.1f} ms | "
               f"{rate:,.0f} tokens/s{mfu} | left {left}{skipped}")  # fmt: skip

    if device.type == "cuda":
        print0(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB a device")
    print0(f"done in {duration(time.time() - begun)}: log in {log.path}")
    saved = find_checkpoints(config.out_dir)
    if saved:
        print0(f"""checkpoint: {saved[-1][1]} (Hugging Face's GPT2LMHeadModel.from_pretrained loads it too). Next:
  python train_gpt2.py --init_from {shlex.quote(str(saved[-1][1]))} --sample_only --prompt {shlex.quote(config.prompt)}
  python hellaswag.py --model {shlex.quote(str(saved[-1][1]))}
  jupyter notebook play.ipynb  # plots {log.path}""")
    if ddp:
        dist.destroy_process_group()


def main(argv=None):
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    config = tyro.cli(Config, args=argv, default=DEMO if "--demo" in argv else Config(), description=__doc__)
    try:
        train(config)
    except UserError as e:
        stop(f"train_gpt2.py: {e}")
    except torch.OutOfMemoryError:
        now = "the line that begins with batch: names it" if config.micro_batch_size == "auto" else config.micro_batch_size
        stop(f"train_gpt2.py: out of memory: give --micro_batch_size a smaller number than now ({now}); "
             "the global batch stays the same")  # fmt: skip
    except RuntimeError as e:
        if not re.search(r"C(\+\+)? compiler", str(e)):
            raise
        stop("train_gpt2.py: torch.compile finds no C++ compiler on this machine: install gcc or clang, or add --no-compile")
    except KeyboardInterrupt:
        sys.exit(f"train_gpt2.py: interrupted; --resume goes on from the newest checkpoint in {config.out_dir}")


if __name__ == "__main__":
    main()
