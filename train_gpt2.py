"""Reproduce GPT-2 (124M): the network, OpenAI's weights, training, evaluation, sampling.

    python train_gpt2.py --demo                             # trains a small GPT-2 on any laptop
    python fineweb.py                                       # writes 10B tokens to edu_fineweb10B/
    python train_gpt2.py                                    # trains GPT-2 (124M) on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py  # the same training on eight GPUs
    python train_gpt2.py --resume                           # continues from the newest checkpoint
    python train_gpt2.py --init_from gpt2 --sample_only     # prints samples from OpenAI's GPT-2

To learn how GPT-2 is trained, read from here to the end of train(). The code follows Andrej
Karpathy's lecture "Let's reproduce GPT-2 (124M)". The parts of the code:

    GPTConfig, CausalSelfAttention, MLP, Block, GPT ... the network, its initial weights, the loss
    GPT.from_pretrained ............................... OpenAI's weights
    GPT.configure_optimizers .......................... AdamW, weight decay
    GPT.generate ...................................... sampling
    TrainConfig ....................................... all settings of a training run
    get_lr, get_batch_size ............................ warm-up, cosine decay, batch-size schedule
    DataLoaderLite .................................... batches of tokens, for any number of GPUs
    evaluate .......................................... validation loss
    init_distributed, pick_device, pick_dtype ......... processes, devices, precision
    training_step ..................................... gradient accumulation, DDP, clipping
    train ............................................. TF32, torch.compile, checkpoints, the loop

The code after train(), below a double line, handles checkpoint files, the log, console output, fast
paths for CPUs, and the command line. You can skip it. These names come from there:

    load_hugging_face ....... transformers' GPT2LMHeadModel, loaded by name or from a directory
    KVCache ................. keeps the keys and values of earlier tokens, for generate()
    print0 .................. print, in the first process (rank 0) only
    check_args .............. stops with a message if the settings cannot work
    use_cpu_kernels ......... on a CPU, swaps in faster code for attention and loss
    bfloat16_is_faster ...... times bfloat16 and float32 on this CPU
    pick_micro_batch_size ... the largest micro-batch (part of a batch) that fits in memory
    prefetch ................ reads the next batch in a thread while the current one trains
    load_hellaswag .......... the HellaSwag examples, or None
    Run ..................... log.txt, checkpoint files, console output, Ctrl-C

KVCache, use_cpu_kernels and hellaswag.py repeat parts of the network in faster forms. If you change
the network, change these as well; the tests check that they agree.

Shapes: B sequences of T tokens, C channels (n_embd), H attention heads of D channels each, V tokens
in the vocabulary. Papers: GPT-1 and GPT-2, Radford et al. 2018 and 2019; GPT-3, Brown et al. 2020.
"""

import math
import os
import time
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

# The network ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a network. The defaults are GPT-2 (124M)."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = fineweb.VOCAB_SIZE  # 50257: 50,000 BPE merges, 256 bytes, <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    """A token sees itself and earlier tokens, but no later ones, as it must predict the next."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head  # GPT-2 (124M): 12 heads of 64 channels
        # A token's query says what it is looking for, its key says what it offers, and its value is
        # what it passes on to the tokens whose queries match its key. Each head has its own three.
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        # Each query is compared with the keys of all tokens up to its own. Softmax turns the scores
        # into weights that average the values (Vaswani et al. 2017, equation 1, masked):
        #     att = q @ k.transpose(2, 3) / math.sqrt(D)  # (B, H, T, T)
        #     att = att.masked_fill(future, -math.inf)  # future: True where the key comes later
        #     y = F.softmax(att, dim=-1) @ v
        # If entries of q and k are independent, of mean 0 and variance 1, their dot product has
        # variance D, and dividing it by sqrt(D) restores variance 1. With larger scores, softmax
        # puts almost all weight on one token, and almost no gradient gets through.
        # On recent NVIDIA GPUs, in bfloat16 or float16, the call below is flash attention (Dao et
        # al. 2022). It computes att tile by tile in fast on-chip memory, keeping running sums of
        # exp(att) and exp(att) @ v. The (B, H, T, T) matrix is never stored, because moving it to
        # GPU memory and back would take longer than the arithmetic; backward() computes it again.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenates the heads
        return self.c_proj(y)  # mixes the heads


class MLP(nn.Module):
    """Processes each token on its own."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")  # a smooth ReLU; OpenAI used this approximation
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """Attention, then an MLP. Each reads a normalized copy of x, the residual stream, and adds its
    output to x. Only additions change x itself, so gradients reach early layers directly.
    LayerNorm brings a token's C channels to mean 0 and variance 1; scale and bias are learned."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2, with Hugging Face's names for its parameters. There is no dropout: in the default run
    each text is seen about once, so overfitting is no concern."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        layers = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # token embeddings
            "wpe": nn.Embedding(config.block_size, config.n_embd),  # position embeddings
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),  # hidden layers
            "ln_f": nn.LayerNorm(config.n_embd),  # final LayerNorm
        }
        self.transformer = nn.ModuleDict(layers)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Weight tying (Press and Wolf 2017): one (V, C) tensor is both the input embedding and the
        # output classifier, because similar tokens should have similar rows in both. It also saves
        # 39M of 163M parameters.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices and embeddings: normal with standard deviation 0.02 (GPT-1, section 4.1). A
        linear layer after a LayerNorm sums 768 channels of variance 1: its outputs, such as the
        logits, have standard deviation 0.02 * sqrt(768) = 0.55, neither tiny nor huge. Biases: 0.

        The residual stream sums the embeddings and the outputs of 2 * n_layer c_proj layers (one
        per attention, one per MLP). The outputs are independent at first, so the stream's standard
        deviation would grow with sqrt(2 * n_layer). The weights of c_proj are scaled by
        1 / sqrt(2 * n_layer), so that networks of any depth start alike (GPT-2, section 2.3)."""
        for name, p in self.named_parameters():  # lists the tied tensor once
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            # the scales of LayerNorm keep PyTorch's default, 1

    def forward(self, idx, targets=None):
        """idx: token ids, (B, T) int64. Returns the logits (B, T, V).

        targets: (B, T) int64, the token after each token of idx. If given, returns only the loss,
        the mean of -ln(probability of the target); returning the logits, too, would keep gigabytes
        in memory. Untrained logits are small, so all V tokens are about equally likely: the first
        loss should be near -ln(1 / V) = ln V = 10.83 for V = 50304 (a bit more: logits vary)."""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens > block_size {self.config.block_size}"
        pos = torch.arange(T, device=idx.device)  # apart from its mask, attention ignores order
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """A model with OpenAI's weights (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or with weights
        from a directory that this script or Hugging Face's save_pretrained wrote."""
        hf = load_hugging_face(name_or_dir)
        c = hf.config
        shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        model = cls(GPTConfig(block_size=c.n_positions, vocab_size=c.vocab_size, **shape))
        state_dict = {name: transpose_conv1d(name, p) for name, p in hf.state_dict().items()}
        model.load_state_dict(state_dict)  # raises if a name or a shape differs
        model.tokenizer = hf.tokenizer  # found in the directory; else None
        return model

    def configure_optimizers(self, weight_decay, learning_rate):
        """AdamW (Loshchilov and Hutter 2019) keeps two running means per weight: m of its gradient
        g, m = beta1 * m + (1 - beta1) * g, and v of g**2, with beta2; both are corrected for their
        start at 0. A step adds -lr * m / (sqrt(v) + eps) to the weight. Its size is about lr for
        gradients of any scale, and less if successive gradients disagree. m averages over about
        1 / (1 - 0.9) = 10 steps, v over 1 / (1 - 0.95) = 20: GPT-3's values (appendix B). With
        PyTorch's default beta2 of 0.999 (1000 steps), v lags behind while gradients grow: the
        divisor is too small, and the steps are too large.

        Weight decay bypasses m and v: it multiplies a weight by 1 - lr * weight_decay in each step.
        So no single weight grows very large, and many share the work. Biases and LayerNorm scales
        are exempt: biases do not multiply inputs, and a scale near 0 would silence its channel."""
        params = list(self.parameters())
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        # fused: a few GPU programs (kernels) do the whole update; one per operation is slower
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def next_logits(self, idx):
        """Logits (B, V) of the token that follows idx (B, T)."""
        return self(idx)[:, -1]

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=50, top_p=1.0, seed=42, use_cache=True
    ):
        """Continue idx, (B, T) int64, to (B, T + max_new_tokens).

        Each token is sampled from the top_k most likely ones (top_k = 0: from all), because the
        many unlikely ones together are drawn often enough to spoil the text. The logits are divided
        by temperature: 0.5 squares the ratio of any two probabilities (3 : 1 becomes 9 : 1), so the
        text is safer and more repetitive; above 1, it varies more; 0 takes the most likely one.
        top_p then keeps the smallest set of tokens with at least that total probability: few where
        the model is sure, many where it is not."""
        # The cache gives the same logits faster: it computes only new tokens, until idx is cropped.
        next_logits = KVCache(self).next_logits if use_cache else self.next_logits
        generator = torch.Generator(idx.device).manual_seed(seed)
        if temperature == 0:
            temperature, top_k = 1.0, 1
        n_tokens = fineweb.vocab_size_of(self)  # V without the ids that only pad the vocabulary
        k = min(top_k or n_tokens, n_tokens)  # top_k = 0: all
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]  # crop to the longest context
            logits, ids = next_logits(context)[:, :n_tokens].float().topk(k)  # (B, k), sorted
            probs = F.softmax(logits / temperature, dim=-1)  # (B, k)
            if top_p < 1:
                probs = keep_top_p(probs, top_p)
            choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1), index into the k
            next_token = ids.gather(1, choice)  # (B, 1)
            idx = torch.cat([idx, next_token], dim=1)
        return idx


def keep_top_p(probs, top_p):
    """Set the probabilities of unlikely tokens to 0. probs: (B, k), largest first. A token stays if
    the more likely ones add up to less than top_p: of 0.6, 0.3 and 0.1, top_p = 0.8 keeps two."""
    before = probs.cumsum(-1) - probs  # total probability of all more likely tokens
    return probs.masked_fill(before >= top_p, 0.0)  # multinomial divides by the sum


def transpose_conv1d(name, tensor):
    """Hugging Face's Conv1D, a linear layer, stores the matrices below as (in, out), like OpenAI;
    nn.Linear stores them as (out, in). Used for loading and for saving."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return tensor.t().contiguous() if name.endswith(conv1d) else tensor


# Settings -------------------------------------------------------------------------------------

# GPT-2's 50257 tokens, padded with 47 unused ids to a multiple of 128. GPU kernels cut matrices
# into tiles, and partly filled tiles need slower code. The unused ids are never targets, so
# training makes them unlikely; generate() drops them.
PADDED_VOCAB_SIZE = 50304

SIZES = {  # really 124M, 355M, 774M and 1558M parameters; the counts in GPT-2's table 2 are wrong
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "gpt3-125M": dict(n_layer=12, n_head=12, n_embd=768),  # PRESETS sets seq_len 2048
}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run (called args below). The defaults train GPT-2 (124M) on 10B tokens.
    Each field is also a command-line option, such as --max_lr 3e-4. (--demo, --finetune and other
    models have other defaults, in PRESETS below the double line.)"""

    # input and output
    data_dir: str = "edu_fineweb10B"  # fineweb.py's shards (files of tokens): educational web pages
    out_dir: str = "log"  # log.txt and checkpoints
    init_from: str = "scratch"  # random weights; or gpt2 ... gpt2-xl, or a directory
    resume: bool = False  # continue from out_dir's newest checkpoint; flags override its settings
    # network
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3-125M"] = "gpt2"
    n_layer: int | None = None  # overrides --model
    n_head: int | None = None  # overrides --model
    n_embd: int | None = None  # overrides --model; must be a multiple of n_head
    block_size: int | None = None  # longest context; None: 1024, or seq_len if that is longer
    vocab_size: int = PADDED_VOCAB_SIZE
    # batches
    total_batch_size: int = 524288  # tokens per step: 2**19, about GPT-3's 0.5M (table 2.1)
    batch_ramp_steps: int = 0  # first train this many steps on smaller batches (get_batch_size)
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences per device per forward pass
    seq_len: int = 1024  # tokens per sequence
    shuffle: bool = True  # visit the sequences in a new random order in each epoch
    seed: int = 1337  # for the initial weights and the shuffling
    overfit_one_batch: bool = False  # bug test: on one (small) batch, the loss must approach 0
    # optimizer: GPT-3, appendix B, except the length of the run
    max_steps: int = 19073  # 10e9 tokens / 2**19
    warmup_steps: int = 715  # 375M tokens / 2**19
    max_lr: float = 6e-4  # GPT-3's for 125M (table 2.1); a larger --model has a lower default
    min_lr: float = 6e-5  # 10% of max_lr; if you change one, change both
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # clip the global norm of the gradient to this; 0: no limit
    # each of these runs at step 0 (except saving), every N steps and after the last; 0: never
    val_every: int = 250  # validation loss (on FineWeb-Edu, OpenAI's 124M has 3.29)
    hellaswag_every: int = 250  # HellaSwag accuracy
    sample_every: int = 250  # samples
    save_every: int = 5000  # checkpoints
    save_minutes: float = 30  # also this many minutes after the last checkpoint; 0 turns it off
    val_tokens: int = 10485760  # how much of the validation split: 20 * 2**19 tokens
    # sampling
    prompt: str = "Hello, I'm a language model,"
    sample_tokens: int = 32  # new tokens per sample
    temperature: float = 1.0
    top_k: int = 50  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # of those, from the smallest set with this total probability
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of matrix products
    compile: bool = torch.cuda.is_available()  # torch.compile; False for --device cpu, --demo


def get_lr(step, args):
    """Learning rate of a step, counted from 0: linear warm-up, then cosine decay (GPT-3, appendix
    B). Warm-up: steps stay small while AdamW's means rest on few, quickly changing gradients.
    Decay: large steps get near the minimum, small ones settle in it; a cosine has more of both."""
    if step < args.warmup_steps:
        return args.max_lr * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # from 1 to 0
    return args.min_lr + cosine * (args.max_lr - args.min_lr)


def get_batch_size(step, args):
    """Tokens in a step. Early in training all examples give similar gradients, so a smaller and
    cheaper batch suffices. GPT-3 grew its batch linearly from 32k tokens in the first 4-12 billion
    (appendix B). Here it is 1/8, 1/4, 1/2 of the batch, each for a third of batch_ramp_steps."""
    if step >= args.batch_ramp_steps:
        return args.total_batch_size
    stage = 3 * step // args.batch_ramp_steps  # 0, 1, 2
    return args.total_batch_size // (8, 4, 2)[stage]


def tokens_before(step, args):
    """Tokens in all steps before this one."""
    ramp = sum(get_batch_size(s, args) for s in range(min(step, args.batch_ramp_steps)))
    return ramp + max(0, step - args.batch_ramp_steps) * args.total_batch_size


# Data and validation --------------------------------------------------------------------------


class DataLoaderLite:
    """The batches of one split. Its shards form one long array of tokens, which is cut into
    sequences of T + 1 tokens that overlap by one: the last target of a sequence is the first input
    of the next.

    For given settings, a step's batch depends only on its number. So a checkpoint need not store a
    position in the data, and 8 GPUs, which share each batch, see the same batches as one GPU."""

    def __init__(self, args, split, B, rank=0, world_size=1, device=torch.device("cpu")):
        self.args, self.B, self.T = args, B, args.seq_len
        self.rank, self.world_size, self.device = rank, world_size, device
        self.tokens = fineweb.open_tokens(args.data_dir, split)  # memory-mapped, uint16
        self.n_sequences = (len(self.tokens) - 1) // self.T
        self.epoch = self.permutation = None  # set by shuffled_index

    def micro_batches(self, step):
        """This process's part of the batch of a step: a list of (inputs, targets)."""
        start = tokens_before(step, self.args) // self.T  # sequences used before this step
        end = tokens_before(step + 1, self.args) // self.T
        indices = [self.shuffled_index(n) for n in range(start, end)]
        return [self.load(part) for part in self.split_by_rank(indices)]

    def shuffled_index(self, n):
        """Index of the n-th sequence to train on. Each epoch visits all of them in a new order."""
        epoch, i = divmod(n, self.n_sequences)
        if not self.args.shuffle:
            return i
        if epoch != self.epoch:
            rng = np.random.RandomState([self.args.seed, epoch])  # same in all versions of NumPy
            self.epoch, self.permutation = epoch, rng.permutation(self.n_sequences)
        return self.permutation[i]

    def split_by_rank(self, indices):
        """This process's share of a list, in parts of B. From 0, 1, 2, ... with B = 2 and two
        processes, rank 0 gets [0, 1], [4, 5], ... and rank 1 gets [2, 3], [6, 7], ..."""
        starts = range(self.rank * self.B, len(indices), self.world_size * self.B)
        return [indices[i : i + self.B] for i in starts]

    def load(self, indices):
        """(inputs, targets) of some sequences, each (B, T) int64: a target is the next token."""
        T = self.T
        rows = np.stack([self.tokens[i * T : i * T + T + 1] for i in indices])  # (B, T + 1)
        rows = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def evaluate(model, raw_model, loader, val_tokens, autocast):
    """Mean loss on text that training never sees, so memorizing does not lower it. It is always the
    same text, the split's first val_tokens tokens. All processes must call this. (If you add
    dropout, call model.eval() before evaluations and samples, and model.train() after them.)"""
    n_sequences = min(val_tokens // loader.T, loader.n_sequences)
    totals = torch.zeros(2, device=loader.device)  # sum of losses, number of sequences
    for indices in loader.split_by_rank(range(n_sequences)):
        x, y = loader.load(indices)
        # model is compiled; a shorter last batch would compile it again, so raw_model takes that.
        network = model if len(x) == loader.B else raw_model
        with autocast:
            loss = network(x, y)
        totals[0] += loss * len(x)
        totals[1] += len(x)
    if dist.is_initialized():
        dist.all_reduce(totals)  # afterwards every process has the sum over all processes
    return (totals[0] / totals[1]).item()


# Processes, devices, precision ----------------------------------------------------------------


def init_distributed(device_name):
    """Returns (rank, world_size, device). torchrun starts one process per GPU and tells each its
    number in environment variables. Without torchrun there is one process, of rank 0."""
    rank = int(os.environ.get("RANK", 0))  # number of this process, 0 to world_size - 1
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # its number on this machine
    world_size = int(os.environ.get("WORLD_SIZE", 1))  # number of processes on all machines
    device = pick_device(device_name, local_rank)
    if "RANK" in os.environ and not dist.is_initialized():  # --resume has already called this
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)  # connects NVIDIA GPUs
        else:
            dist.init_process_group("gloo")  # connects CPUs
    return rank, world_size, device


def pick_device(name, local_rank=0):
    """A torch.device. auto: an NVIDIA GPU (cuda), else an Apple GPU (mps), else the CPU."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        # modulo: a cluster may show each process only its own GPU, as number 0
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        return torch.device("mps")
    return torch.device("cpu")


def pick_dtype(name, device):
    """The dtype of matrix products, as a string. auto: bfloat16 where the hardware is fast at it
    (NVIDIA A100, RTX 30 and newer), else float16 on CUDA, else float32.

    Bits for      exponent (range)  mantissa (precision)
        float32          8                 23
        TF32             8                 10    float32 in memory; rounded for faster products
        bfloat16         8                  7    half the bytes, twice TF32's peak speed
        float16          5                 10    as fast, but so small a range needs a scaler"""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float16"
    return "bfloat16" if device.type == "cpu" and bfloat16_is_faster() else "float32"


# Training -------------------------------------------------------------------------------------


def training_step(model, micro_batches, optimizer, scaler, autocast, grad_clip):
    """One optimizer step on micro_batches, a list of (inputs, targets) of equal size. Returns two
    tensors: this process's mean loss, and the norm that the gradient, which DDP has averaged over
    all processes, had before it was clipped. scaler (see train) acts only in float16."""
    grad_accum_steps = len(micro_batches)  # the whole batch at once would not fit in memory
    mean_loss = 0.0
    optimizer.zero_grad()
    for micro_step, (x, y) in enumerate(micro_batches):
        if isinstance(model, DDP):
            # DDP averages the gradients of all processes during backward(). That is needed only in
            # the last micro-step; until then every process accumulates its own.
            model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        # Weights, gradients and AdamW's means stay in float32: in bfloat16, a weight plus a small
        # update would round back to the weight. Under autocast, matrix products and attention use
        # bfloat16 (or float16) copies; LayerNorm and the loss use float32.
        with autocast:
            loss = model(x, y)
        # backward() adds to .grad, and a sum of gradients is the gradient of a sum of losses. But
        # the loss of the whole batch is the mean over its micro-batches, hence the division.
        loss = loss / grad_accum_steps
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)  # divide the gradients by the scaler's factor, before clipping
    # If the norm of the whole gradient exceeds grad_clip, scale it down to that norm. Without
    # this, one unusual batch would dominate AdamW's running means for many steps.
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)  # 0: no limit
    if norm.isfinite():  # else (overflow) skip the step, on all ranks: their gradients are equal
        scaler.step(optimizer)  # AdamW
    scaler.update()
    return mean_loss, norm


def all_reduce_mean(x):
    """The tensor x averaged over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)  # x is now the sum over all processes
        x = x / dist.get_world_size()
    return x


def build_model(args, checkpoint=None):
    """The model to train: from the checkpoint, else from --init_from, else newly initialized."""
    if checkpoint:
        model = GPT(GPTConfig(**checkpoint["gpt_config"]))
        model.load_state_dict(checkpoint["model"])
    elif args.init_from != "scratch":
        model = GPT.from_pretrained(args.init_from)
    else:
        shape = {name: getattr(args, name) or n for name, n in SIZES[args.model].items()}
        block_size = args.block_size or max(1024, args.seq_len)
        torch.manual_seed(args.seed)  # drawn on the CPU, so every device gets identical weights
        model = GPT(GPTConfig(block_size=block_size, vocab_size=args.vocab_size, **shape))
    return model


def due(every, step, run):
    """True at step 0, at multiples of `every`, and after the last step; False once a signal such as
    Ctrl-C asks to stop. All ranks must call this together: stop_requested() asks all of them."""
    now = every > 0 and (step % every == 0 or step == run.args.max_steps)
    return now and not run.stop_requested()


def print_samples(model, args, autocast, n_samples=4, seed=42):
    """Print continuations of --prompt, each up to <|endoftext|>."""
    enc = fineweb.tokenizer_of(model)  # GPT-2's, unless the weights or the shards come with another
    if enc is None:
        return  # no tokenizer is known, or it does not fit
    prompt = enc.encode_ordinary(args.prompt) or [enc.eot_token or 0]
    idx = torch.tensor([prompt] * n_samples, device=model.lm_head.weight.device)  # (B, T)
    with autocast:
        options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=seed)
        idx = model.generate(idx, args.sample_tokens, **options)
    for tokens in idx[:, len(prompt) :].tolist():
        end = tokens.index(enc.eot_token) if enc.eot_token in tokens else len(tokens)
        print0(">", args.prompt + enc.decode(tokens[:end], errors="ignore"))  # no split characters


def train(args, checkpoint=None):
    """Train from the start, or continue from a checkpoint (a dict, see state below).

    The lecture measured these milliseconds per step of 16,384 tokens (here 32 times as many) on one
    A100, each change added to those before it: float32 1000; TF32 333; bfloat16 300 (memory
    traffic now limits it); torch.compile 130; flash attention 96; V = 50304: 93; fused AdamW 90."""
    rank, world_size, device = init_distributed(args.device)
    check_args(args, world_size, checkpoint)
    master_process = rank == 0  # prints, logs and saves

    torch.set_float32_matmul_precision("high")  # TF32: faster, and training tolerates the rounding
    args = replace(args, dtype=pick_dtype(args.dtype, device))
    use_amp = args.dtype != "float32"  # automatic mixed precision
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=use_amp)
    # In float16, activations' gradients below about 3e-8 become 0 before they reach .grad. So the
    # scaler multiplies the loss, hence all gradients, by a large factor, lowered after overflows.
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

    raw_model = build_model(args, checkpoint).to(device)
    optimizer = raw_model.configure_optimizers(args.weight_decay, args.max_lr)
    first_step = 0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # a flag may have changed it
        if checkpoint["scaler"]:  # empty if the run was not in float16
            scaler.load_state_dict(checkpoint["scaler"])
        first_step = checkpoint["step"]
    if device.type == "cpu":
        use_cpu_kernels(raw_model, args)
    # The micro-batch size B changes speed and memory, but not the result (up to rounding).
    B = pick_micro_batch_size(args, raw_model, world_size, autocast, checkpoint)
    model = raw_model  # raw_model, model, ddp_model share weights; only training needs ddp_model
    if args.compile:
        # torch.compile fuses the operations between matrix products (LayerNorm, GELU, additions)
        # into a few kernels, so that intermediate results need not go to GPU memory and back. It
        # compiles again for each new shape, so samples and HellaSwag, whose lengths vary, use
        # raw_model.
        model = torch.compile(raw_model, dynamic=False)
    ddp_model = model
    if dist.is_initialized():
        # DDP broadcasts rank 0's weights once, here, and in each step averages the gradients of all
        # processes, so that all take the same steps and their weights stay equal.
        ddp_model = DDP(model)

    train_loader = DataLoaderLite(args, "train", B, rank, world_size, device)
    val_loader = DataLoaderLite(args, "val", B, rank, world_size, device)
    get_micro_batches = prefetch(train_loader)  # a function: step -> micro-batches
    run = Run(args, raw_model, train_loader, val_loader, autocast, checkpoint)
    examples = load_hellaswag(args, raw_model)

    def state(step):
        """Everything needed to continue. (Learning rate, batch size and data follow from step.)"""
        return {
            "step": step,
            "args": asdict(args),
            "gpt_config": asdict(raw_model.config),
            "model": raw_model.state_dict(),
            "optimizer": optimizer.state_dict(),  # AdamW's m and v
            "scaler": scaler.state_dict(),
        }

    # step: the number of steps done so far. At max_steps only save and evaluate once more.
    for step in range(first_step, args.max_steps + 1):
        # The following happens only now and then, and does not affect training. The checkpoint
        # comes first, so that a failure in an evaluation loses nothing.
        save = due(args.save_every, step, run) or run.save_minutes_passed(step)
        if master_process and save and step > first_step:
            run.save(state(step))
        if due(args.val_every, step, run):
            val_loss = evaluate(model, raw_model, val_loader, args.val_tokens, autocast)
            print0(f"step {step}: validation loss {val_loss:.4f}")
            run.log(step, val=val_loss)
        if examples and due(args.hellaswag_every, step, run):
            # HellaSwag tests common sense: 10,042 contexts with four endings, one of them right.
            # The model's answer is the ending whose tokens have the lowest mean loss, given the
            # context (acc_norm; a sum favors short endings). Guessing scores 0.25, GPT-2 0.2955.
            with autocast:
                score = hellaswag.evaluate(raw_model, examples, device, rank, world_size)
            print0(f"step {step}: HellaSwag accuracy {score.acc_norm:.4f} on {score.n} examples")
            run.log(step, hella=score.acc_norm)
        if due(args.sample_every, step, run) and master_process:  # due() first: all ranks call it
            print_samples(raw_model, args, autocast)
        if run.stop_requested():  # by Ctrl-C or SIGTERM, in any process
            if master_process and step > first_step:
                run.save(state(step))
            break
        if step == args.max_steps:
            break

        # -------------------------------- one training step --------------------------------
        t0 = time.perf_counter()
        lr = get_lr(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = get_micro_batches(0 if args.overfit_one_batch else step)
        loss, norm = training_step(
            ddp_model, micro_batches, optimizer, scaler, autocast, args.grad_clip
        )
        loss = all_reduce_mean(loss).item()  # .item() waits for the GPU, so dt is the true time
        dt = time.perf_counter() - t0
        # -----------------------------------------------------------------------------------

        run.log_step(step, loss, lr, norm.item(), dt)

    run.finish()


# ==============================================================================================
# You do not need anything below this line to understand how GPT-2 is trained: faster code for CPUs
# and for samples, Hugging Face's files, checkpoints and the log, the command line.
# ==============================================================================================

import argparse
import atexit
import ctypes
import errno
import functools
import json
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import timeit
import zipfile
import zlib
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path

from filelock import FileLock, Timeout

from fineweb import VOCAB_SIZE, UserError, as_user_error, expand_path, flush_to_disk
from fineweb import never_fatal, read_flags, say, sync_folder, write_atomically

# The same network computed in other ways, and what suits this machine -------------------------


def use_cpu_kernels(model, args):
    """On a CPU, replace attention in bfloat16, and the loss unless torch.compile fuses it, by code
    that is faster there. The results are the same up to rounding."""
    keep_freed_memory()
    if args.dtype == "bfloat16":
        for block in model.transformer.h:
            block.attn.forward = functools.partial(cpu_attention, block.attn)
    if not args.compile:
        model.forward = functools.partial(cpu_forward, model)


def keep_freed_memory():
    """Let glibc keep memory that is freed. By default it returns every large tensor to the system,
    and the next step has to fetch all of its pages again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def cpu_attention(attn, x, rows=256):
    """CausalSelfAttention.forward for bfloat16 on a CPU, where large matrix products are faster
    than flash attention's small tiles. x: (B, T, C). It computes `rows` queries at a time against
    the keys up to theirs, which saves almost half of the work when T is large."""
    B, T, C = x.shape
    q, k, v = attn.c_attn(x).view(B, T, 3, attn.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * H, T, D)
    future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    scale = q.size(2) ** -0.5
    outputs = []
    for start in range(0, T, rows):
        end = start + rows
        keys = k[:, :end].transpose(1, 2)
        scores = torch.baddbmm(future[start:end, :end], q[:, start:end], keys, alpha=scale)
        outputs.append(scores.softmax(-1) @ v[:, :end])  # (B * H, rows, D)
    y = torch.cat(outputs, dim=1).view(B, -1, T, C // attn.n_head)  # (B, H, T, D)
    return attn.c_proj(y.transpose(1, 2).reshape(B, T, C))


def cpu_forward(model, idx, targets=None):
    """GPT.forward with a loss that never stores all (B, T, V) logits, which take gigabytes."""
    if targets is None:
        return GPT.forward(model, idx)
    t = model.transformer
    x = t.wte(idx) + t.wpe(torch.arange(idx.size(1)))
    for block in t.h:
        x = block(x)
    return CPUCrossEntropy.apply(t.ln_f(x), model.lm_head.weight, targets)


class CPUCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(F.linear(x, weight), targets), ROWS tokens at a time. The gradients are
    computed together with the loss, so the logits of only ROWS tokens exist at once."""

    ROWS = 512

    @staticmethod
    def forward(ctx, x, weight, targets):
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        w = weight.to(dtype)
        flat_x, flat_targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        d_x, d_weight, total = torch.zeros_like(flat_x), torch.zeros_like(weight), 0.0
        counted = (flat_targets != -100).nonzero()[:, 0]  # F.cross_entropy ignores -100, too
        for rows in counted.split(CPUCrossEntropy.ROWS):
            part, wanted = flat_x[rows].to(dtype), flat_targets[rows]
            log_p = F.linear(part, w).log_softmax(-1, dtype=torch.float32)  # (ROWS, V)
            total += F.nll_loss(log_p, wanted, reduction="sum")
            if ctx.needs_input_grad[1]:
                # The gradient for the logits is their probabilities, minus 1 at the target.
                d_logits = log_p.exp_()
                d_logits[torch.arange(len(rows)), wanted] -= 1
                del log_p  # so that the next line frees its memory
                d_logits = d_logits.to(dtype)
                d_x[rows] = (d_logits @ w).to(x.dtype)
                d_weight += d_logits.t() @ part
        ctx.n = len(counted)
        ctx.save_for_backward(d_x.view_as(x), d_weight)
        return total / ctx.n

    @staticmethod
    def backward(ctx, d_loss):
        d_x, d_weight = ctx.saved_tensors
        return d_x.mul_(d_loss / ctx.n), d_weight.mul_(d_loss / ctx.n), None


class KVCache:
    """Computes what GPT.next_logits computes, for ids (B, T) that grow by one token per call. It
    keeps the keys and values of all earlier tokens, so that only the new token is computed."""

    def __init__(self, model):
        self.model = model
        self.n_cached = 0  # tokens whose keys and values are kept
        self.keys_values = [None] * model.config.n_layer  # a pair of (B, H, n_cached, D) per block

    def next_logits(self, idx):
        """Logits (B, V) of the token that follows idx (B, T)."""
        if idx.size(1) <= self.n_cached:
            return self.model.next_logits(idx)  # the full context moved on: all positions changed
        t = self.model.transformer
        positions = torch.arange(self.n_cached, idx.size(1), device=idx.device)
        x = t.wte(idx[:, self.n_cached :]) + t.wpe(positions)  # (B, new, C)
        for i, block in enumerate(t.h):
            x = x + self.attend(i, block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        self.n_cached = idx.size(1)
        return self.model.lm_head(t.ln_f(x[:, -1]))

    def attend(self, i, attn, x):
        """Attention of block i for the new tokens, x: (B, new, C), to all tokens so far."""
        B, new, C = x.shape
        assert new == 1 or self.n_cached == 0, "after the prompt, tokens must come one by one"
        q, k, v = attn.c_attn(x).view(B, new, 3, attn.n_head, -1).permute(2, 0, 3, 1, 4)
        if self.n_cached:
            old_k, old_v = self.keys_values[i]
            k = torch.cat([old_k, k], dim=2)
            v = torch.cat([old_v, v], dim=2)
        self.keys_values[i] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=new > 1)  # (B, H, new, D)
        return attn.c_proj(y.transpose(1, 2).reshape(B, new, C))


def bfloat16_is_faster():
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32. It is timed, in less
    than 0.1 s, because some CPUs with bfloat16 instructions are slower. Rank 0 decides for all."""
    matrices = torch.ones(1024, 1024), torch.ones(1024, 1024, dtype=torch.bfloat16)
    times = [
        [timeit.timeit(lambda: F.linear(w[:256], w), number=1) for w in matrices] for _ in range(5)
    ]
    float32, bfloat16 = map(min, zip(*times))
    faster = torch.tensor(bfloat16 < float32)
    if dist.is_initialized():
        dist.broadcast(faster, 0)
    return bool(faster)


def pick_micro_batch_size(args, model, world_size, autocast, checkpoint=None):
    """Sequences per device per forward pass. auto: on CUDA the largest power of two, up to 65,536
    tokens, that divides the batch and fits in memory; elsewhere 4,096 tokens. A resumed run keeps
    its size on the same kind and number of devices, because another size changes the rounding."""
    if args.seq_len > model.config.block_size:
        what = f"--seq_len {args.seq_len}: the model's context has {model.config.block_size} tokens"
        raise UserError(f"{what}; choose a smaller --seq_len")
    if args.micro_batch_size != "auto":
        return args.micro_batch_size
    device = model.lm_head.weight.device
    machine = [world_size, describe_device(device), args.dtype]
    if all(gather(checkpoint is not None and checkpoint.get("machine") == machine)):
        return checkpoint["micro_batch_size"]
    most = get_batch_size(0, args) // (args.seq_len * world_size)
    most = most & -most  # the largest power of two that divides it
    if device.type == "cuda":
        fits = min(sequences_that_fit(args, model, autocast), max(1, 65536 // args.seq_len))
    else:
        fits = max(1, 4096 // args.seq_len)
    B = torch.tensor(min(most, 2 ** (fits.bit_length() - 1)), device=device)
    if dist.is_initialized():  # all processes take the smallest
        dist.all_reduce(B, dist.ReduceOp.MIN)
    return int(B)


def sequences_that_fit(args, model, autocast):
    """How many sequences of one micro-batch fit in the free memory of this GPU, at least 1. The
    difference of two forward and backward passes shows how much memory a sequence takes."""
    device = model.lm_head.weight.device

    def peak(B):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        idx = torch.zeros(B, args.seq_len, dtype=torch.int64, device=device)
        with autocast:
            loss = model(idx, idx)
        loss.backward()
        return torch.cuda.max_memory_allocated(device) - before

    n = max(1, 1024 // args.seq_len)  # with fewer tokens, other memory would hide the difference
    peak(n)  # makes the gradients, which stay, and the libraries' buffers
    bytes_per_sequence = max(1, (peak(2 * n) - peak(n)) // n)  # torch.compile will need less
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    free -= 4 * 4 * model.num_params()  # gradients, DDP's copy of them, AdamW's two means
    return max(1, int(0.85 * free / bytes_per_sequence))


def prefetch(loader):
    """A function of the step that returns the loader's micro-batches of that step. While a step
    trains, a thread reads the next one."""

    def use_own_gpu():
        if loader.device.type == "cuda":
            torch.cuda.set_device(loader.device)  # a new thread starts with GPU 0

    thread = ThreadPoolExecutor(1, initializer=use_own_gpu)
    futures = {}  # {step: the Future of its micro-batches}

    def get_micro_batches(step):
        if step not in futures:
            futures[step] = thread.submit(loader.micro_batches, step)
        micro_batches = futures[step].result()
        if not loader.args.overfit_one_batch:
            del futures[step]
            futures[step + 1] = thread.submit(loader.micro_batches, step + 1)
        return micro_batches

    return get_micro_batches


def load_hellaswag(args, model):
    """The HellaSwag examples. None if they are turned off or cannot be read, or if the model's
    tokenizer is unknown."""
    enc = fineweb.tokenizer_of(model)
    if args.hellaswag_every and enc:
        return hellaswag.items_or_none(args.hellaswag_data, model.config.block_size, enc)


# Hugging Face's files -------------------------------------------------------------------------


def real_vocab_size(model):
    """How many rows of the vocabulary to save: without those that pad GPT-2's 50257 to 50304."""
    size = model.config.vocab_size
    padded = size == PADDED_VOCAB_SIZE and fineweb.is_gpt2_tokenizer(fineweb.tokenizer_of(model))
    return VOCAB_SIZE if padded else size


GPT.tokenizer = None  # unknown; see fineweb.tokenizer_of


def attach_tokenizer(model, args, checkpoint):
    """Set model.tokenizer, which goes into checkpoints: the one of the weights, or else of the
    shards that are trained on."""
    if checkpoint:
        model.tokenizer = fineweb.read_tokenizer(checkpoint["path"])
    elif args.init_from != "scratch":
        model.tokenizer = model.tokenizer or fineweb.tokenizer_of(model)  # perhaps GPT-2's
    if model.tokenizer is None and not args.sample_only:
        model.tokenizer = fineweb.read_tokenizer(args.data_dir)


def load_hugging_face(name_or_dir):
    """transformers' GPT2LMHeadModel in float32. UserError if it computes anything that GPT does not
    compute."""
    hf = hellaswag.load_gpt2(name_or_dir)
    c = hf.config
    expected = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "n_inner": c.n_inner and 4 * c.n_embd,  # None means 4 * n_embd
    }
    differences = {k: getattr(c, k) for k, value in expected.items() if getattr(c, k) != value}
    if not torch.equal(hf.lm_head.weight, hf.transformer.wte.weight):
        differences["tie_word_embeddings"] = False
    if not all(p.isfinite().all() for p in hf.parameters()):
        raise UserError(f"{name_or_dir}: its weights hold NaN or infinity; choose another model")
    if differences:
        what = f"{name_or_dir} is a variant of GPT-2 that is not supported: {differences}"
        raise UserError(f"{what}; choose another model")
    return hf


def save_hugging_face(model, directory):
    """Write config.json, model.safetensors without the padding of the vocabulary, and the files of
    the tokenizer, so that transformers opens the directory as it is."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPT2Config  # half a second, so not at the top

    c = model.config
    directory = Path(directory)
    vocab_size = real_vocab_size(model)
    enc = fineweb.tokenizer_of(model)
    ids = fineweb.special_ids(enc)
    config = GPT2Config(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        vocab_size=vocab_size,
        n_positions=c.block_size,
        n_ctx=c.block_size,  # llama.cpp reads this name
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        architectures=["GPT2LMHeadModel"],
        dtype="float32",
        **ids,
    )
    state = {name: transpose_conv1d(name, t.cpu()) for name, t in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to wte
    state["transformer.wte.weight"] = model.transformer.wte.weight[:vocab_size]
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    # Without a max_length, transformers' pipeline asks for 256 new tokens, whatever the context.
    GenerationConfig(max_length=c.block_size, **ids).save_pretrained(directory)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    with never_fatal("the permissions of model.safetensors"):  # save_file lets only us read it
        shutil.copymode(directory / "config.json", directory / "model.safetensors")
    to_save = model.tokenizer or enc  # model.tokenizer may be one that cannot be used here
    if to_save:
        fineweb.save_tokenizer(directory, c.block_size, to_save)


GPT.save_pretrained = save_hugging_face  # the name that models of transformers have, too


def model_card(args, model, commit, step, records):
    """The README.md of a checkpoint, in the form of the Hugging Face hub's model cards: how it was
    trained, and its last evaluations. records: those of log.txt."""
    manifests = fineweb.read_manifests(args.data_dir)
    source = manifests[0].source if manifests and manifests[0].revision else []  # on the hub
    header = ["library_name: transformers", "pipeline_tag: text-generation"]
    is_openai = args.init_from.removeprefix("openai-community/") in hellaswag.OPENAI
    header += ["license: mit"] if is_openai or args.init_from == "scratch" else []
    header += ["language: en"] if fineweb.is_gpt2_tokenizer(fineweb.tokenizer_of(model)) else []
    header += [f"datasets: [{source[0]}]"] if source else []
    header += [f"base_model: openai-community/{Path(args.init_from).name}"] if is_openai else []
    n_tokens = tokens_before(step, args)
    rows = {
        "command": f"`{training_command(args)}` (commit {commit or 'unknown'})",
        "data": ", ".join(source) or Path(args.data_dir).name,
        "training": f"{step:,} of {args.max_steps:,} steps, {n_tokens:,} tokens",
        "context": f"{model.config.block_size} tokens; trained on sequences of {args.seq_len}",
    }
    last = {stream: (n, float(value)) for n, stream, value in records if n <= step}
    for stream, name in (("val", "validation loss"), ("hella", "HellaSwag, acc_norm")):
        if stream in last:
            rows[name] = "{1:.4f} after {0:,} steps".format(*last[stream])
    padding = (model.config.vocab_size - real_vocab_size(model)) * model.config.n_embd
    title = f"# GPT-2 with {model.num_params() - padding:,} parameters"
    lines = ["---", *header, "---", "", title, ""]
    rows = {name: " ".join(value.replace("|", "\\|").split()) for name, value in rows.items()}
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    return "\n".join(lines)


def training_command(args):
    """A command that trains with these settings, without the paths of this machine."""
    preset = PRESETS.get(args.model, "")  # what --model sets is always spelled out
    words = ["python", "train_gpt2.py"]
    skipped = ("demo", "finetune", "resume", "device", "compile", "wandb", "out_dir")
    for name, value in asdict(args).items():
        if name in ("data_dir", "init_from"):
            value = Path(value).resolve().name
        is_default = value == getattr(Args, name) and f"--{name} " not in preset
        if name in (*skipped, "hellaswag_data") or is_default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


# A run's output, signals, checkpoints and log -------------------------------------------------


def environment_number(name, default=0):
    """A whole number from an environment variable; the default if it is not set, or not one."""
    value = os.environ.get(name, "").strip()
    return int(value) if value.isdecimal() else default


stop_signals = []  # numbers of the signals that asked this process to stop, as they arrive


def catch_stop_signals():
    """From now on a signal is only recorded in stop_signals, which the training loop looks at. A
    second Ctrl-C ends the process at once."""

    def record(number, frame):
        stop_signals.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):  # Windows lacks the last two
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, record)


@never_fatal()
def print0(*args):
    """Print on rank 0 only. Failing to print never ends a run by itself. But a pipe or a terminal
    that has been closed stops it as a signal would: after the current step, with a checkpoint."""
    if environment_number("RANK") > 0:
        return
    try:
        print(*args, flush=True)
    except (OSError, ValueError) as error:  # ValueError: Python itself closed the file
        number = getattr(error, "errno", None)
        if number == errno.EPIPE:
            stop_signals.append(getattr(signal, "SIGPIPE", signal.SIGTERM))
        elif number == errno.EIO and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            stop_signals.append(signal.SIGHUP)
        fineweb.discard_what_cannot_be_written()


def innermost_cause(error):
    """The text of the error that caused this one, in one line."""
    while cause := getattr(error, "inner_exception", None) or error.__cause__:
        error = cause
    return " ".join(str(error).split()) or type(error).__name__


def gather(value):
    """The values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def find_checkpoints(out_dir):
    """[(step, path)] of a run's checkpoints, oldest first."""
    paths = [(path.name.removeprefix("step_"), path) for path in Path(out_dir).glob("step_*")]
    return sorted((int(step), path) for step, path in paths if step.isdecimal())


def newest_checkpoint(out_dir, device="auto"):
    """The state that Run.save wrote last, a dict, or None if there is no checkpoint. If the newest
    one is damaged, for any of the processes, all of them use the one before it.

    UserError if all are damaged, or if the processes do not see the same checkpoints."""
    found = find_checkpoints(out_dir)
    if device == "auto":
        device = saved_device(found)
    check_device(device)
    init_distributed(device)  # gather() needs the processes to be connected
    for _, path in reversed(found):
        problem = None
        try:
            state = read_checkpoint(path)
            check_checksums(path)
        except UserError as error:
            problem = str(error)
        names, problems = zip(*gather((path.name, problem)))
        refuse_different_checkpoints(out_dir, names)
        if not any(problems):
            return state
        print0(f"warning: {next(filter(None, problems))}")
    if found:
        raise UserError(f"{out_dir}: all of its checkpoints are damaged; choose another --out_dir")
    refuse_different_checkpoints(out_dir, [name for name, _ in gather(("no checkpoint", None))])


def refuse_different_checkpoints(out_dir, names):
    if len(set(names)) > 1:
        what = f"--resume: {out_dir} is not the same folder for all processes"
        raise UserError(f"{what}; they found {', '.join(sorted(set(names)))}")


def saved_device(found):
    """The --device of the newest checkpoint that can be read, "auto" if there is none."""
    for _, path in reversed(found):
        with suppress(UserError):
            return read_checkpoint(path)["args"]["device"]
    return "auto"


def read_checkpoint(path):
    """The state in a checkpoint's training_state.pt, with its path and the checksums of its
    tensors. The tensors are memory-mapped, so they take no memory until they are copied. UserError
    if the file is damaged."""
    file = path / "training_state.pt"
    with as_user_error(f"{path} is damaged", "the checkpoint before it is used"):
        with zipfile.ZipFile(file) as archive:
            checksums = [member.CRC for member in archive.infolist()]
        options = dict(map_location="cpu", weights_only=True)
        try:  # Windows cannot remove a file that is mapped
            state = torch.load(str(file), mmap=sys.platform != "win32", **options)
        except RuntimeError:  # some file systems cannot map files
            state = torch.load(str(file), mmap=False, **options)
        if f"step_{state['step']:05d}" != path.name:
            raise ValueError(f"it holds step {state['step']}")
        if "args" not in state:
            state["args"] = state["config"]  # its name in older checkpoints
    return state | {"path": str(path), "checksums": checksums}


def check_checksums(path):
    """UserError if the contents of training_state.pt do not fit their checksums. One process per
    machine reads them."""
    if environment_number("LOCAL_RANK") > 0:
        return
    with as_user_error(f"{path} is damaged", "the checkpoint before it is used"):
        with zipfile.ZipFile(path / "training_state.pt") as archive:
            if name := archive.testzip():
                raise ValueError(f"wrong checksum of {name}")


def write_checkpoint(path, model, state):
    """Write a checkpoint completely or not at all: under a temporary name, which becomes `path`
    when everything is on the disk. UserError if that fails."""
    temporary = path.with_name(f"tmp_{path.name}")
    remedy = "make room, then continue with --resume; older checkpoints are complete"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with as_user_error(f"{path} cannot be written", remedy):
            save_hugging_face(model, temporary)
            with open(temporary / "training_state.pt", "wb") as file:
                torch.save(state, file)
            for file in temporary.iterdir():
                with open(file, "rb+") as opened:
                    flush_to_disk(opened.fileno())
            sync_folder(temporary)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Run:
    """Everything around the training loop: the lock on out_dir, log.txt, checkpoints, signals, and
    what is printed. Only rank 0 writes files."""

    def __init__(self, args, model, train_loader, val_loader, autocast, checkpoint):
        self.args = args
        self.model = model
        self.loader = train_loader
        self.autocast = autocast
        self.first_step = checkpoint["step"] if checkpoint else 0
        self.saved_step = self.first_step
        self.started = self.saved_at = time.monotonic()
        self.skipped = 0  # steps in a row whose gradient was not finite
        self.stopping = False
        self.progress = Progress(args, model, train_loader)
        self.log_file = None
        attach_tokenizer(model, args, checkpoint)
        for loader in (train_loader, val_loader):
            loader.tokens.vocab_size = real_vocab_size(model)  # a larger id in the data is refused
        if train_loader.rank == 0:
            self.lock = lock_folder(args.out_dir)
            machine = [train_loader.world_size, describe_device(train_loader.device), args.dtype]
            self.facts = {
                "shards": fineweb.describe_shards(args.data_dir),
                "versions": versions(),
                "machine": machine,
                "micro_batch_size": train_loader.B,
            }
            self.log_file = Log(args, self.first_step)
            add_to_run_json(args, self.first_step, self.facts)
            announce(args, model, train_loader, val_loader, checkpoint, self.facts)
        for name in ("model", "optimizer", "scaler") if checkpoint else ():
            checkpoint.pop(name, None)  # they are loaded by now; free the memory
        catch_stop_signals()

    def stop_requested(self):
        """True in all processes if one of them has received a signal."""
        if not self.stopping:
            flag = torch.tensor(float(len(stop_signals) > 0))
            if dist.is_initialized():
                flag = all_reduce_mean(flag.to(self.loader.device))
            self.stopping = flag.item() > 0
        return self.stopping

    def save_minutes_passed(self, step):
        """Whether --save_minutes have passed since the last checkpoint, or the run is complete."""
        seconds = 60 * self.args.save_minutes
        passed = time.monotonic() - self.saved_at > seconds
        return seconds > 0 and (passed or step == self.args.max_steps)

    def save(self, state):
        """Write the checkpoint out_dir/step_NNNNN, unless it exists or nothing was trained yet.
        While steps are being skipped, write none except at the end. Refuse weights whose loss is
        not finite."""
        step = state["step"]
        at_the_end = self.stopping or step == self.args.max_steps
        if step == self.saved_step or (self.skipped and not at_the_end):
            return
        self.check_weights(step)
        path = Path(self.args.out_dir) / f"step_{step:05d}"
        self.remove_old_checkpoints(step)  # first, to make room
        with never_fatal("log.txt"):  # a power cut must not lose records from before a checkpoint
            flush_to_disk(self.log_file.file.fileno())
        write_checkpoint(path, self.model, state | self.facts)
        self.saved_step = step
        self.saved_at = time.monotonic()
        self.write_model_card()
        print0(f"step {step}: saved {path}")

    def write_model_card(self):
        """Write the README.md of the newest checkpoint, again after evaluations of its step."""
        path = Path(self.args.out_dir) / f"step_{self.saved_step:05d}"
        if path.exists():
            with never_fatal(f"{path}/README.md cannot be written"):
                commit, records = self.facts["versions"]["commit"], read_log(self.log_file.path)
                card = model_card(self.args, self.model, commit, self.saved_step, records)
                (path / "README.md").write_text(card, encoding="utf-8")

    @torch.no_grad()
    def check_weights(self, step):
        x, y = self.loader.load([0])
        with self.autocast:
            loss = self.model(x, y).item()
        if not math.isfinite(loss):
            self.give_up(f"the loss after {step} steps is {loss}")

    def remove_old_checkpoints(self, step):
        """Keep the newest --keep_checkpoints before this step. (Later ones are damaged: otherwise
        --resume would have continued from them.)"""
        older = [path for n, path in find_checkpoints(self.args.out_dir) if n < step]
        keep = self.args.keep_checkpoints
        for old in older[:-keep]:  # of 0, none
            with never_fatal(f"{old} cannot be removed"):
                shutil.rmtree(old)

    def give_up(self, why):
        saved = find_checkpoints(self.args.out_dir)
        where = f"--resume continues from {saved[-1][1]}" if saved else "nothing was saved before"
        raise UserError(f"{why}; lower --max_lr or look at the data: {where}")

    def log(self, step, **values):
        """Add a record to the log for each stream=value."""
        if self.log_file:
            self.log_file.write(step, values)
            if step == self.saved_step and not {"val", "hella"}.isdisjoint(values):
                self.write_model_card()

    def log_step(self, step, loss, lr, norm, dt):
        """Log a training step and print its line. UserError after 20 skipped steps in a row."""
        tokens = get_batch_size(step, self.args)
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        values = {"train": loss, "lr": lr, "norm": norm, "speed": tokens / dt}
        if step == 0 and tokens < self.args.total_batch_size:
            values["batch"] = tokens
        if step > 0 and tokens != get_batch_size(step - 1, self.args):
            values["batch"] = tokens
        if self.skipped:
            values["skip"] = self.skipped
        self.log(step, **values)
        speed = ""
        with never_fatal():
            speed = self.progress.update(step, dt)
        print0(
            f"step {step:5d}/{self.args.max_steps} | loss {loss:.6f} | lr {lr:.4e} "
            f"| norm {norm:.4f} | {dt * 1e3:.1f} ms | {speed}"
            + (" | step skipped: its gradient is not finite" if self.skipped else "")
        )
        if self.skipped == 20:
            self.give_up(f"20 steps in a row were skipped, the last one in step {step}")

    def finish(self):
        """Leave the folder to others, and print how to continue."""
        if self.log_file:
            self.log_file.close()
            self.lock.release()
        self.print_summary()
        if dist.is_initialized():
            dist.barrier()  # torchrun ends all processes with the first; rank 0 may still be saving
            dist.destroy_process_group()
        # main() exits with the first of these; the signal may have reached another process
        stop_signals[:] = (stop_signals or [signal.SIGTERM]) if self.stopping else []

    @never_fatal("the summary cannot be shown")
    def print_summary(self):
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated() / 2**30
            print0(f"peak memory: {peak:.2f} GiB per device")
        time_taken = timedelta(seconds=int(time.monotonic() - self.started))
        log_path = Path(self.args.out_dir) / "log.txt"
        print0(f"{'stopped' if self.stopping else 'done'} after {time_taken}; log: {log_path}")
        self.print_next_commands()

    def print_next_commands(self):
        out_dir = shlex.quote(self.args.out_dir)
        saved = find_checkpoints(self.args.out_dir)
        if self.stopping:
            n = environment_number("LOCAL_WORLD_SIZE", 1)
            torchrun = f"torchrun --nproc_per_node={n}"
            command = torchrun if dist.is_torchelastic_launched() else "python"
            print0(f"  {command} train_gpt2.py --resume --out_dir {out_dir}  # continues")
        elif saved:
            newest = shlex.quote(str(saved[-1][1]))
            print0(f"checkpoint: {newest}, which transformers can open, too. Next:")
            if fineweb.tokenizer_of(self.model):
                print0(f"  python train_gpt2.py --sample_only --init_from {newest}")
            print0(f"  GPT2_RUN={out_dir} jupyter execute --inplace play.ipynb  # plots the log")


def lock_folder(out_dir):
    """Create a run's folder and lock it for this process. UserError if another one has the lock."""
    with as_user_error(f"{out_dir} cannot be written", "choose another --out_dir"):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        lock = FileLock(Path(out_dir) / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            what = f"{out_dir}: another process is training there"
            raise UserError(f"{what}; wait for it to end, or choose another --out_dir") from None
        except (NotImplementedError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.ENOSPC):
                raise
            why = "its file system has no locks"
            print0(f"warning: {out_dir} is not locked, because {why}; do not train there twice")
    return lock


class Log:
    """out_dir/log.txt, with a record `step stream value` per line, and --tensorboard and --wandb.

    A resumed run first drops the records that it will write again: those of training from its first
    step on, and evaluations after that step. Evaluations in that step are replaced if they are
    repeated. Lines that are not records are kept."""

    def __init__(self, args, first_step):
        self.path = Path(args.out_dir) / "log.txt"
        self.first_step = first_step
        if self.path.exists() and first_step == 0 and read_log(self.path):
            self.keep_old_log()
        self.rewrite(lambda step, stream: step < first_step + (stream in ("val", "hella")))
        self.watchers = make_watchers(args, first_step)
        for step, stream, value in read_log(self.path):
            if step == first_step:  # --tensorboard drops all that it has of this step
                self.watch(step, {stream: float(value)})

    def keep_old_log(self):
        """--resume found no checkpoint to continue from: this is a new run with a new log."""
        number = 1
        while (old := self.path.with_name(f"log.txt.{number}")).exists():
            number += 1
        self.path.rename(old)
        print0(f"--resume: there is no checkpoint, so training starts again; the old log is {old}")

    def rewrite(self, keep):
        """Keep only the records for which keep(step, stream) is true, and open the file."""
        lines = complete_lines(self.path) if self.path.exists() else []
        records = map(parse_record, lines)
        kept = [x for x, record in zip(lines, records) if record is None or keep(*record[:2])]
        text, remedy = "".join(kept).encode(**TEXT), "make room, then use --resume"
        write_atomically(self.path, lambda file: file.write(text), remedy=remedy)
        with as_user_error(f"{self.path} cannot be written", remedy):
            self.file = self.path.open("a", buffering=1)

    def write(self, step, values):
        """Add records. values: {stream: number}. UserError if the file cannot be written."""
        if step == self.first_step and not {"val", "hella"}.isdisjoint(values):
            self.file.close()
            self.rewrite(lambda s, stream: s != step or stream not in values)
        with as_user_error(f"{self.path} cannot be written", "make room, then use --resume"):
            for stream, value in values.items():
                self.file.write(f"{step} {stream} {value:.12f}\n")
        self.watch(step, values)

    def watch(self, step, values):
        """Pass records to TensorBoard and Weights & Biases. The first failure turns one off."""
        for name, watcher in list(self.watchers.items()):
            del self.watchers[name]
            with never_fatal(name):
                watcher(values, step)
                self.watchers[name] = watcher  # it did not fail, so it stays

    def close(self):
        self.file.close()


def parse_record(line):
    """(step, stream, value as text) of a line of log.txt, or None if the line is something else."""
    with suppress(ValueError):  # a note has more or fewer than three words, or no numbers
        step, stream, value = line.split()
        float(value)
        return int(step), stream, value


TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # keeps all bytes of a user's notes


def complete_lines(path):
    """The lines of a log.txt that end with a newline."""
    with open(path, **TEXT, newline="\n") as file:
        return [line for line in file if line.endswith("\n")]


def read_log(path):
    """The records of a log.txt: [(step, stream, value as text)]. Other lines are skipped."""
    return [record for record in map(parse_record, complete_lines(path)) if record]


def make_watchers(args, first_step):
    """{flag: function of ({stream: value}, step)} for --tensorboard and --wandb. In Weights &
    Biases every start is a run of its own; those of one folder are a group. UserError if a
    package is not installed. A service that does not answer does not end the run."""
    watchers = {}
    if args.tensorboard:
        with as_user_error("--tensorboard cannot be used here", "pip install tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

        def to_tensorboard(values, step):
            for stream, value in values.items():
                board.add_scalar(stream, value, step)
            board.flush()

        with never_fatal("--tensorboard"):
            board = SummaryWriter(Path(args.out_dir) / "tensorboard", purge_step=first_step)
            watchers["--tensorboard"] = to_tensorboard
    if args.wandb:
        with as_user_error("--wandb cannot be used here", "pip install wandb; wandb login"):
            import wandb

        with never_fatal("--wandb"):
            run = wandb.init(
                project=args.wandb,
                name=f"{args.out_dir} from step {first_step}",
                group=args.out_dir,
                config=asdict(args),
                dir=args.out_dir,
            )
            watchers["--wandb"] = run.log
    return watchers


def add_to_run_json(args, first_step, facts):
    """Add the settings, versions and data of this start to out_dir/run.json, which is a list."""
    path = Path(args.out_dir) / "run.json"
    with never_fatal(f"{path} cannot be written"):
        starts = json.loads(path.read_text()) if first_step and path.exists() else []
        time_now = f"{datetime.now():%F %T}"
        start = {"first_step": first_step, "started": time_now, "args": asdict(args), **facts}
        text = json.dumps([*starts, start], indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))


def describe_device(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions():
    """Versions of the code and its libraries: {name: version}."""
    commit = ""
    with never_fatal("git describe"):
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
        if shutil.which("git"):
            commit = subprocess.run(git, capture_output=True, text=True, timeout=30).stdout.strip()
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


# Peak TFLOP/s in bfloat16 (float16 where there is no bfloat16), dense, from NVIDIA's data sheets;
# for RTX cards from its white papers. The first name that fits a device counts.
PEAK_TFLOPS = """H100 PCIe 756, H100 NVL 835, H100 989, H200 NVL 835, H200 989, GH200 989,
    H800 PCIe 756, H800 989, H20 148, B200 2250, GB200 2500, B300 2250, GB300 2500, A100 312,
    A800 312, V100 125, T4 65, A40 150, A10G 70, A10 125, L40S 362, L40 181, L4 121, A6000 155,
    RTX 6000 Ada 364, RTX PRO 6000 Blackwell Workstation 504, 3090 71, 4090 165, 5090 209"""


def peak_flops(device):
    """Peak FLOP/s of one device, or None if it is not in the table."""
    words = f" {describe_device(device)} ".replace("-", " ")
    if {"Laptop", "MIG", "D"} & set(words.split()):
        return None  # slower than the card whose name it has
    for entry in PEAK_TFLOPS.split(","):
        name, tflops = entry.strip().rsplit(" ", 1)
        if f" {name} " in words:
            return float(tflops) * 1e12


def flops_per_token(model, seq_len):
    """FLOPs of a forward and backward pass: 6 for each weight of a matrix product, and
    12 * n_layer * C * T for attention (Chowdhery et al. 2022, appendix B)."""
    weights = model.num_params() - model.transformer.wpe.weight.numel()
    return 6 * weights + 12 * model.config.n_layer * model.config.n_embd * seq_len


class Progress:
    """Speed, time left and, for a GPU in the table, MFU: the share of its peak FLOP/s that the
    model's own arithmetic uses."""

    def __init__(self, args, model, loader):
        self.args = args
        self.flops = flops_per_token(model, args.seq_len)
        self.steps = 0  # in this process
        self.seconds_per_token = None  # a running mean
        peak = peak_flops(loader.device) if args.dtype != "float32" else None
        self.peak = peak * loader.world_size if peak else math.inf

    def update(self, step, dt):
        """The end of a step's line, for a step that took dt seconds."""
        tokens = get_batch_size(step, self.args)
        self.steps += 1
        if self.steps <= 2:  # the first step compiles and warms up
            self.seconds_per_token = dt / tokens
        self.seconds_per_token = 0.9 * self.seconds_per_token + 0.1 * dt / tokens
        left = tokens_before(self.args.max_steps, self.args) - tokens_before(step + 1, self.args)
        time_left = timedelta(seconds=int(min(left * self.seconds_per_token, 1e12)))
        mfu = self.flops * tokens / dt / self.peak
        mfu = f" | MFU {mfu:.1%}" if mfu else ""
        return f"{tokens / dt:,.0f} tokens/s{mfu} | left {time_left}"


@never_fatal("the settings cannot be shown")
def announce(args, model, loader, val_loader, checkpoint, facts):
    """Print what is about to be trained, and warnings about settings that are probably mistakes."""
    V, B, T, processes = model.config.vocab_size, loader.B, loader.T, loader.world_size
    changed = {k: value for k, value in asdict(args).items() if value != getattr(Args, k)}
    accum = args.total_batch_size // (B * T * processes)
    n_tokens = len(loader.tokens)
    epochs = tokens_before(args.max_steps, args) / n_tokens
    lines = [
        "versions: " + ", ".join(f"{k} {version}" for k, version in facts["versions"].items()),
        "settings: " + ", ".join(f"{name} {value}" for name, value in changed.items()),
        f"device: {processes} x {describe_device(loader.device)}, {args.dtype}, "
        + ("compiled" if args.compile else "not compiled"),
        f"model: {model.num_params():,} parameters; {model.config}",
        f"batch: {args.total_batch_size:,} tokens = {B} sequences x {T} tokens "
        f"x {processes} processes x {accum} micro-steps",
        f"data: {n_tokens:,} tokens in {len(loader.tokens.shards)} train shards of "
        f"{args.data_dir}; {args.max_steps} steps are {epochs:.2f} epochs",
    ]
    if args.batch_ramp_steps:
        lines.append(f"batch: one eighth at first, all of it from step {args.batch_ramp_steps}")
    if args.val_every and val_loader.n_sequences * T < args.val_tokens:
        lines.append(f"validation: all {val_loader.n_sequences * T:,} tokens of the split")
    if checkpoint:
        lines.append(f"resuming {checkpoint['path']}")
        if checkpoint["step"] >= args.max_steps:
            lines.append(f"there is nothing left to do: --max_steps is {args.max_steps}")
    elif args.init_from == "scratch":
        lines.append(f"the first loss should be near ln {V} = {math.log(V):.4f}: a uniform guess")
    lines += [
        f"warning: {text}"
        for text in find_likely_mistakes(args, model, loader, epochs, checkpoint, facts)
    ]
    print0("\n".join(lines))


def find_likely_mistakes(args, model, loader, epochs, checkpoint, facts):
    """Yield a warning for each setting that works but is probably not what the user wants."""
    if args.device == "auto" and loader.device.type == "cpu" and (why := why_no_cuda()):
        yield f"{why}. Training on the CPU takes much longer"
    enc, other = fineweb.tokenizer_of(model), fineweb.read_tokenizer(args.data_dir)
    if enc is None and (args.sample_every or args.hellaswag_every):
        yield f"samples and HellaSwag are off: {fineweb.why_no_tokenizer(model)}"
    if enc and other and not fineweb.agree(enc, other):
        yield "the shards were made with another tokenizer than the weights', which samples use"
    if epochs > 50 and not args.overfit_one_batch:
        yield f"{epochs:.0f} epochs are many; --epochs 3 or --finetune trains for fewer"
    if args.resume and not checkpoint:
        yield f"--resume: {args.out_dir} has no checkpoint, so this is a new run"
    if not args.save_every and not args.save_minutes and args.max_steps:
        yield "--save_every 0 --save_minutes 0: the trained weights will not be saved"
    if args.total_batch_size > len(loader.tokens) and not args.overfit_one_batch:
        yield "a step has more tokens than the text; choose a smaller --total_batch_size"
    if args.warmup_steps > args.max_steps:
        yield "--warmup_steps is longer than the run"
    if args.min_lr > args.max_lr:
        yield "--min_lr is more than --max_lr, so the learning rate will rise"
    if checkpoint and checkpoint.get("shards") not in (None, facts["shards"]):
        yield f"{args.data_dir} holds other shards than before"
    if args.dtype == "bfloat16" and loader.device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield "this GPU only emulates bfloat16, which is slow; try --dtype float16"


# The command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Args(TrainConfig):
    """Train GPT-2: the settings of TrainConfig, and conveniences."""

    # conveniences
    demo: bool = False  # use settings for a short run on text that comes with Python
    finetune: bool = False  # use settings for training --init_from on a small text
    epochs: float = 0  # if given, sets max_steps to this many passes over the training tokens
    keep_checkpoints: int = 3  # how many older checkpoints to keep beside the newest; 0: all
    hellaswag_data: str = hellaswag.DATA  # downloaded to this file if it does not exist
    sample_only: bool = False  # do not train; print samples of --init_from (--prompt -: of stdin)
    tensorboard: bool = False  # also log to TensorBoard, in out_dir
    wandb: str = ""  # also log to this project of Weights & Biases


PRESETS = {  # the flags that --demo, --finetune and --model stand for; other flags override them
    # a real tokenizer and a real loss curve, in minutes on two laptop cores; other programs expect
    # a context of at least 256, of which the demo trains 128 positions
    "demo": """--data_dir demo/data --out_dir demo/log --n_layer 4 --n_head 4 --n_embd 128
        --block_size 256 --seq_len 128 --total_batch_size 1024 --micro_batch_size 8 --max_steps 450
        --warmup_steps 20 --max_lr 2e-3 --min_lr 2e-4 --val_every 90 --val_tokens 13824
        --hellaswag_every 0 --sample_every 225 --save_every 225 --no-compile
        --prompt 'The for statement is used to'""",
    # batch and learning rate of nanoGPT's fine-tuning on Shakespeare
    "finetune": """--init_from gpt2 --out_dir tuned --epochs 2 --total_batch_size 32768
        --warmup_steps 3 --max_lr 3e-5 --min_lr 3e-5 --val_every 10 --sample_every 0
        --hellaswag_every 0""",
    # GPT-3 table 2.1, for the sizes nearest to GPT-2's; trained on the same 10e9 tokens
    "gpt2-medium": "--max_lr 3e-4 --min_lr 3e-5",
    "gpt2-large": "--max_lr 2.5e-4 --min_lr 2.5e-5",
    "gpt2-xl": """--max_lr 2e-4 --min_lr 2e-5 --total_batch_size 1048576 --max_steps 9537
        --warmup_steps 358""",
    "gpt3-125M": "--seq_len 2048",
}
NETWORK = ("model", "n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# A run that is resumed with another value of one of these would be another run.
FIXED = NETWORK + (
    "init_from",
    "demo",
    "finetune",
    "total_batch_size",
    "batch_ramp_steps",
    "seq_len",
    "shuffle",
    "seed",
    "overfit_one_batch",
)
PATHS = ("data_dir", "out_dir", "init_from", "hellaswag_data")


def parse(argv):
    """(args, checkpoint). The flags override the defaults or, with --resume, the settings of the
    newest checkpoint, which is returned, too. UserError if a resumed run would become another."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("demo", "finetune", "resume"):
        early.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    names = ("model", "device", "out_dir", "max_steps", "vocab_size")
    for name in (*names, "total_batch_size", "micro_batch_size", "seq_len"):
        early.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    early, _ = early.parse_known_args(argv)
    given = {"demo": early.demo, "finetune": early.finetune, early.model: True}
    presets = [flags for name, flags in PRESETS.items() if given.get(name)]
    presets = shlex.split(" ".join(presets[::-1]))
    device = early.device if early.device in ("cpu", "cuda", "mps") else "auto"
    defaults = Args(compile=pick_device(device).type == "cuda")
    checkpoint = None
    if early.resume:
        out_dir = read_flags(Args, args=presets).out_dir if early.out_dir is None else early.out_dir
        out_dir = os.path.expanduser(out_dir)
        checkpoint = newest_checkpoint(out_dir, device)
    if checkpoint:
        presets = []
        defaults = replace(saved_args(checkpoint), out_dir=out_dir, resume=True)
    args = read_flags(Args, args=[*presets, *argv], default=defaults, description=__doc__)
    args = replace(args, **{name: expand_path(name, getattr(args, name)) for name in PATHS})
    check_values(args)
    if args.demo and not args.sample_only:
        fineweb.build_demo(args.data_dir)
    if not args.sample_only:
        if not checkpoint:
            args = follow_text(args, given=early)
        args = convert_epochs(args, max_steps_given=early.max_steps is not None)
    if checkpoint:
        compare_with_checkpoint(args, defaults, checkpoint["path"])
    return args, checkpoint


def follow_text(args, given):
    """Set what follows from the shards, unless a flag says otherwise: --vocab_size from their
    tokenizer, and with --finetune a batch that leaves about ten steps or more in an epoch."""
    enc = fineweb.read_tokenizer(args.data_dir)
    if args.init_from == "scratch" and given.vocab_size is None:
        if enc and not fineweb.is_gpt2_tokenizer(enc) and enc.n_vocab < math.inf:
            args = replace(args, vocab_size=enc.n_vocab)
    if args.finetune:
        n_tokens = len(fineweb.open_tokens(args.data_dir, "train"))
        if given.seq_len is None:  # so that the validation text, a tenth of all, holds a sequence
            args = replace(args, seq_len=min(args.seq_len, power_of_two(n_tokens // 10)))
        if given.total_batch_size is None:
            B = 1 if args.micro_batch_size == "auto" else args.micro_batch_size
            unit = B * args.seq_len * environment_number("WORLD_SIZE", 1)
            batch = min(args.total_batch_size, power_of_two(n_tokens // 9))
            args = replace(args, total_batch_size=unit * max(1, batch // unit))
    return args


def power_of_two(n):
    """The largest power of two up to n, but at least 16."""
    return 2 ** max(4, n.bit_length() - 1)


def saved_args(checkpoint):
    """The settings of a checkpoint. Another version of this file may have other settings: those
    that are unknown here are ignored, and those that are new have their defaults."""
    known = {field.name for field in fields(Args)}
    unknown = sorted(checkpoint["args"].keys() - known)
    if unknown:
        what = f"{checkpoint['path']} is from another version of this program"
        print0(f"warning: {what}; these settings are ignored: {', '.join(unknown)}")
    return Args(**{k: value for k, value in checkpoint["args"].items() if k in known})


def compare_with_checkpoint(args, saved, path):
    """Print what a resumed run changes. UserError if that makes it another run."""
    fixed = (*NETWORK, "init_from") if args.sample_only else FIXED
    for name, old in asdict(saved).items():
        new = getattr(args, name)
        if new != old and name in fixed:
            why = f"--resume: {path} was trained with --{name} {old}, not {new}"
            raise UserError(f"{why}; start another run with --init_from {path}")
        if new != old and not args.sample_only:
            print0(f"--resume: {name} {old} → {new}")


def convert_epochs(args, max_steps_given):
    """Replace --epochs by the --max_steps that it means, unless that is given, too."""
    if not 0 < args.epochs < math.inf:
        return args
    if not max_steps_given:
        wanted = args.epochs * len(fineweb.open_tokens(args.data_dir, "train"))
        steps = bisect_left(range(10**9), wanted, key=lambda step: tokens_before(step, args))
        args = replace(args, max_steps=steps)
    return replace(args, epochs=0)


def check_args(args, world_size, checkpoint=None):
    """UserError, in all processes, if the settings cannot work or if the processes do not see the
    same data and the same checkpoint."""
    problem, shards = None, None
    try:
        check_network(args, checkpoint)
        check_batch(args, world_size)
        check_folders(args)
        shards = fineweb.describe_shards(args.data_dir)
    except UserError as error:
        problem = str(error)
    resumed = "no checkpoint"
    if checkpoint:
        checksum = zlib.crc32(str(checkpoint["checksums"]).encode())
        resumed = f"{Path(checkpoint['path']).name} (checksum {checksum:08x})"
    problems, all_shards, all_resumed = zip(*gather((problem, shards, resumed)))
    if any(problems):
        raise UserError(next(filter(None, problems)))
    refuse_different_checkpoints(args.out_dir, all_resumed)
    if any(other != all_shards[0] for other in all_shards):
        what = f"--data_dir {args.data_dir}: the processes see different shards there"
        raise UserError(f"{what}; copy the same shards to each machine")


def check_values(args):
    """UserError if a single setting is out of range."""
    sizes = (*NETWORK, "total_batch_size", "micro_batch_size", "seq_len", "val_tokens")
    for name, value in asdict(args).items():
        least = 1 if name in sizes else 0
        if type(value) in (int, float) and not least <= value < math.inf:
            raise UserError(f"--{name} {value}: it must be at least {least}, and finite")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed}: it must be less than 2**32")
    if 0 < args.temperature < 0.01:
        raise UserError(f"--temperature {args.temperature}: it must be 0, or at least 0.01")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p}: it must be more than 0, and at most 1")
    if args.prompt == "-" and not args.sample_only:
        raise UserError("--prompt -: only --sample_only reads prompts from standard input")


def check_network(args, checkpoint=None):
    """UserError if the network cannot be made."""
    if checkpoint:
        return  # it was made before
    if args.finetune and args.init_from == "scratch":
        raise UserError("--finetune trains existing weights; give --init_from a model")
    if args.init_from != "scratch":
        for name in () if args.demo else NETWORK:  # --demo itself sets some of these
            if getattr(args, name) != getattr(Args, name):
                what = f"--{name}: the weights of --init_from have a shape of their own"
                raise UserError(f"{what}; omit --{name}")
        return
    shape = {name: getattr(args, name) or size for name, size in SIZES[args.model].items()}
    if shape["n_embd"] % shape["n_head"]:
        what = "--n_embd {n_embd} is not a multiple of --n_head {n_head}".format(**shape)
        raise UserError(f"{what}; change one of them")
    if args.block_size and args.seq_len > args.block_size:
        what = f"--seq_len {args.seq_len}: the model's context has {args.block_size} tokens"
        raise UserError(f"{what}; choose a smaller --seq_len")
    size = hellaswag.model_bytes(shape["n_layer"], shape["n_embd"], args.vocab_size)
    hellaswag.check_memory(size, "--n_layer, --n_embd")


def check_batch(args, world_size):
    """UserError if the batch cannot be divided among processes and micro-batches."""
    if args.overfit_one_batch and args.batch_ramp_steps:
        raise UserError("--overfit_one_batch: one batch cannot grow; omit --batch_ramp_steps")
    B = 1 if args.micro_batch_size == "auto" else args.micro_batch_size
    factors = {"micro_batch_size": B, "seq_len": args.seq_len, "processes": world_size}
    if args.batch_ramp_steps:
        factors = {"8 (--batch_ramp_steps)": 8, **factors}
    product = math.prod(factors.values())
    if args.total_batch_size % product:
        numbers = " x ".join(map(str, factors.values()))
        what = f"is not a multiple of {' x '.join(factors)} = {numbers} = {product}"
        raise UserError(f"--total_batch_size {args.total_batch_size} {what}; change one of them")


def check_folders(args):
    """UserError if there is not enough data, or if out_dir is not usable."""
    out_dir = Path(args.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file; choose a directory")
    log = out_dir / "log.txt"
    if not args.resume and log.exists() and log.stat().st_size:
        raise UserError(f"{out_dir} holds a run; add --resume, or choose another --out_dir")
    if args.resume and find_checkpoints(out_dir) and not Path(args.data_dir).is_dir():
        what = f"--resume: the run's --data_dir, {args.data_dir}, is not here"
        raise UserError(f"{what}; give --data_dir again, with the path that it has now")
    for split in ("train", "val") if args.val_every else ("train",):
        fineweb.list_shards(args.data_dir, split)  # UserError if there are none
        n = len(fineweb.open_tokens(args.data_dir, split))
        if n <= args.seq_len:
            what = f"{args.data_dir}: its {split} shards hold {n} tokens, too few for"
            raise UserError(f"{what} --seq_len {args.seq_len}; choose a smaller one, or more text")
    if args.val_every and args.val_tokens < args.seq_len:
        what = f"--val_tokens {args.val_tokens} is less than one sequence"
        raise UserError(f"{what}; give at least --seq_len, {args.seq_len}")


def sample(args, checkpoint):
    """--sample_only: print samples of the checkpoint or of --init_from."""
    check_network(args, checkpoint)
    if args.init_from == "scratch" and not checkpoint:
        what = "--sample_only needs weights"
        raise UserError(f"{what}; add --init_from gpt2, or --init_from with a checkpoint's folder")
    device = pick_device(args.device)
    dtype = getattr(torch, pick_dtype(args.dtype, device))
    model = build_model(args, checkpoint).to(device)
    attach_tokenizer(model, args, checkpoint)
    if fineweb.tokenizer_of(model) is None:
        raise UserError(f"--sample_only: {fineweb.why_no_tokenizer(model)}")
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    enc = fineweb.tokenizer_of(model)
    for line in sys.stdin if args.prompt == "-" else [args.prompt]:
        prompt = line.rstrip("\n")
        read = enc.decode(enc.encode_ordinary(prompt))
        if unread := sorted(set(prompt.casefold()) - set(read.casefold()) - set(" \n\t\r")):
            print0(f"warning: the model's tokenizer does not know {' '.join(unread[:20])}")
        print_samples(model, replace(args, prompt=prompt), autocast, seed=args.seed)


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_environment():
    """Make torchrun's variables usable: an empty one counts as missing, and without RANK there is
    one process. UserError if RANK is set but the others are missing or wrong."""
    one_of_several = os.environ.get("RANK", "").strip()
    for name in (*TORCHRUN, "LOCAL_WORLD_SIZE"):
        if not (one_of_several and os.environ.get(name, "").strip()):
            os.environ.pop(name, None)
    if not one_of_several:
        return
    remedy = "start several processes with torchrun, or unset RANK to train with one"
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, but {', '.join(missing)} is not; {remedy}")
    numbers = [name for name in TORCHRUN if name != "MASTER_ADDR"]
    wrong = [name for name in numbers if not os.environ[name].strip().isdecimal()]
    if wrong:
        raise UserError(f"{wrong[0]}={os.environ[wrong[0]]} is not a number; {remedy}")
    if int(os.environ["MASTER_PORT"]) >= 2**16:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} must be below 65536; {remedy}")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world_size:
        raise UserError(f"RANK={rank} is not less than WORLD_SIZE={world_size}; {remedy}")


def check_device(name):
    """UserError if --device does not exist, or if it has fewer GPUs than there are processes."""
    exists = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not exists.get(name, True):
        why = name == "cuda" and why_no_cuda()
        why = why or "this machine has none; --device auto uses what it has"
        raise UserError(f"--device {name}: {why}")
    if pick_device(name).type == "mps" and "RANK" in os.environ:
        what = "--device mps: the processes of torchrun cannot exchange gradients there"
        raise UserError(f"{what}; start without torchrun, or add --device cpu")
    processes = environment_number("LOCAL_RANK") + 1
    # Slurm may show each process only its own GPU; torchrun shows all GPUs to all processes.
    gpus = torch.cuda.device_count()
    if pick_device(name).type == "cuda" and processes > gpus:
        if gpus > 1 or dist.is_torchelastic_launched():
            what = f"--nproc_per_node: this machine has {gpus} GPU(s)"
            raise UserError(f"{what}; start at most {gpus} processes on it")


NVIDIA_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia0")  # made by any version of the driver


def why_no_cuda():
    """Why PyTorch cannot use the NVIDIA GPU of this machine, and how to fix it. None if it can, if
    there is no such GPU, or if CUDA_VISIBLE_DEVICES hides it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    present = shutil.which("nvidia-smi") or any(map(os.path.exists, NVIDIA_FILES))
    if hidden or not present or torch.cuda.is_available():
        return None
    cuda, index = torch.version.cuda, "https://download.pytorch.org/whl"
    if not cuda:
        what = f"PyTorch {torch.__version__} has no CUDA for this machine's NVIDIA GPU"
        return f"{what}; pip install torch --index-url {index}/cu130 (cu126 below driver 580)"
    cause = "PyTorch cannot use this machine's NVIDIA GPU"
    try:
        torch.cuda.init()
    except Exception as error:  # in torch's words, such as: the driver is too old
        cause = innermost_cause(error).partition(" Please")[0].strip(".")[:70]
    if "driver" not in cause:
        return cause
    if cuda.startswith("12."):  # from NVIDIA's table of compatible versions
        return f"{cause}; CUDA {cuda} needs driver 525 or newer: update it"
    return (
        f"{cause}; CUDA {cuda} needs driver 580: update it, or install PyTorch from {index}/cu126"
    )


def prepare_process():
    """Settings of PyTorch that have to be made before it is used."""
    # CUDA: let blocks of memory grow, so that less is lost between them. WSL cannot do this
    # (pytorch issue 192330).
    if sys.platform == "linux" and "microsoft" not in platform.release():
        if not any("ALLOC_CONF" in name for name in os.environ):
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # torchrun allows each process one thread, but lets each start a compiler on every core.
    processes = max(1, environment_number("LOCAL_WORLD_SIZE", 1))
    cores = max(1, fineweb.available_cores() // processes)
    if processes > 1 or cores < torch.get_num_threads():
        torch.set_num_threads(cores)
    if environment_number("TORCHINDUCTOR_COMPILE_THREADS") < 1:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(min(32, cores))


def explain(error):
    """What the user can do about an error that their files, memory or machine caused, in one
    sentence. None for a bug in this program, which gets a traceback."""
    if isinstance(error, UserError):
        return str(error)
    text = innermost_cause(error)
    cause = text[:110]  # so that a sentence has at most 200 characters
    no_memory = ("out of memory", "can't allocate", "ALLOC_FAILED")  # CUDA and MPS, CPU, cuBLAS
    if isinstance(error, MemoryError) or any(words in text for words in no_memory):
        return "out of memory; choose a smaller --micro_batch_size, which leaves the batch as it is"
    if "can't start new thread" in text:
        return "this machine allows no more threads; raise its limit (ulimit -u), or end others"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile does not work here ({cause}); add --no-compile"
    if "probability tensor contains" in text:
        return "the model's predictions are not finite; choose other weights, or another --dtype"
    if isinstance(error, dist.DistError):
        return f"the processes cannot reach each other ({cause}); start all of them with torchrun"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check that folder and its disk"


def main(argv=None):
    fineweb.prepare_streams()
    stop_signals.clear()
    argv = sys.argv[1:] if argv is None else argv
    old_launcher = ("--local-rank=", "--local_rank=")  # torch.distributed.launch adds this flag
    argv = [flag for flag in argv if not flag.startswith(old_launcher)]
    try:
        check_environment()
        prepare_process()
        args, checkpoint = parse(argv)
        check_device(args.device)
        if args.sample_only:
            sample(args, checkpoint)
        else:
            train(args, checkpoint)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        fail(sentence)
    if stop_signals:
        sys.exit(128 + stop_signals[0])  # as shells do


def fail(sentence):
    """Print a sentence and exit with status 2, which tells a shell loop not to try again. If all
    processes fail, rank 0 prints, and the others wait until torchrun ends them by a signal."""
    rank = environment_number("RANK")
    end = time.monotonic() + 20
    while rank > 0 and not stop_signals and time.monotonic() < end:
        time.sleep(0.1)
    if rank == 0 or not stop_signals:
        say(f"train_gpt2.py: {sentence}", "stderr")
    sys.exit(2)


def run_as_script():
    """Run main(). One of several processes ends without Python's own clean-up, because if a thread
    of Gloo happens to free a tensor meanwhile, it aborts the process, and torchrun reports that a
    finished run failed (https://github.com/pytorch/pytorch/issues/38228)."""
    status = 1  # of a bug, after its traceback
    if "RANK" in os.environ:
        atexit.register(lambda: os._exit(status))  # runs after what is registered from here on
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
        raise


if __name__ == "__main__":
    run_as_script()
