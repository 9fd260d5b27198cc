"""Reproduce GPT-2 (124M): the network, OpenAI's weights, training, evaluation, sampling.

    python train_gpt2.py --demo                             # trains a small GPT-2 on any laptop
    python fineweb.py                                       # writes 10B tokens to edu_fineweb10B/
    python train_gpt2.py                                    # trains GPT-2 (124M) on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py  # the same training on eight GPUs
    python train_gpt2.py --resume                           # continues from the newest checkpoint
    python train_gpt2.py --init_from gpt2 --sample_only     # prints samples from OpenAI's GPT-2
    python fineweb.py --source my.txt --out my_text         # makes shards of your own text ...
    python train_gpt2.py --finetune --data_dir my_text      # ... and trains OpenAI's GPT-2 on it

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

The code after train(), below a double line, covers checkpoint files, the log, the command line and
faster code for CPUs. You can skip it. But if you change the network, also change KVCache,
use_cpu_kernels and hellaswag.py, which repeat parts of it (the tests check that they agree). These
names come from there:

    load_tokenizer .......... the tokenizer found beside the weights or the shards, else GPT-2's
    load_hugging_face ....... transformers' GPT2LMHeadModel, loaded by name or from a directory
    KVCache ................. keeps the keys and values of earlier tokens, for generate()
    print0 .................. print, in the first process (rank 0) only
    check_args .............. stops with a message if the settings cannot work
    use_cpu_kernels ......... on a CPU, replaces attention and loss by faster code
    bfloat16_is_faster ...... times bfloat16 and float32 on this CPU
    pick_micro_batch_size ... the largest micro-batch (part of a batch) that fits in memory
    prefetch ................ reads the next batch in a thread while the current one trains
    Run ..................... save(state) writes a checkpoint, log(...) adds to log.txt, and
                              stop_requested() asks all processes whether one got Ctrl-C

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

    block_size: int = 1024  # longest context: the most tokens read at once
    vocab_size: int = fineweb.VOCAB_SIZE  # 50257: 50,000 BPE merges, 256 bytes, <|endoftext|>
    n_tokens: int = fineweb.VOCAB_SIZE  # ids >= n_tokens, if any, only pad the vocabulary
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    """Each token attends to itself and to earlier tokens. Later ones are masked, because the model
    must predict them."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head  # GPT-2 (124M): 12 heads of 64 channels
        # A token's query says what it is looking for, its key says what it offers, and its value is
        # what it passes on to the tokens whose queries match its key. Each head has its own query,
        # key and value, so a token can look for several things at once.
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        # Each token's query is compared with its own key and all earlier ones. Softmax turns the
        # scores into weights that average the values (equation 1 of Vaswani et al. 2017, masked):
        #     att = q @ k.transpose(2, 3) / math.sqrt(D)  # (B, H, T, T)
        #     att = att.masked_fill(future, -math.inf)  # future: True where the key comes later
        #     y = F.softmax(att, dim=-1) @ v
        # If entries of q and k are independent, with mean 0 and variance 1, their dot product has
        # variance D, and dividing it by sqrt(D) restores variance 1. With larger scores, softmax
        # would put almost all weight on one token, and almost no gradient would get through.
        #
        # The next line computes the same. On recent NVIDIA GPUs, in bfloat16 or float16, it runs as
        # flash attention (Dao et al. 2022): tile by tile in fast on-chip memory. The (B, H, T, T)
        # matrix never goes to GPU memory and back, which would take longer than the arithmetic.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenates the heads
        return self.c_proj(y)  # mixes the heads


class MLP(nn.Module):
    """Linear, GELU, linear, for each token separately; only attention mixes tokens."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")  # a smooth ReLU; OpenAI used the tanh approximation
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
        """Matrices and embeddings: normal with standard deviation 0.02 (GPT-1, section 4.1). Each
        output of a linear layer after a LayerNorm, such as a logit, is a weighted sum of C inputs
        of variance 1. With C = 768, its standard deviation is 0.02 * sqrt(768) = 0.55: not extreme.

        The residual stream sums the embeddings and the outputs of 2 * n_layer c_proj layers (one
        per attention, one per MLP). At first the outputs are uncorrelated, so the stream's standard
        deviation would grow in proportion to sqrt(2 * n_layer). Scaling the weights of c_proj by
        1 / sqrt(2 * n_layer) makes it the same for networks of any depth (GPT-2, section 2.3)."""
        for name, p in self.named_parameters():  # yields the tied tensor once, as wte.weight
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)  # LayerNorm's scales keep PyTorch's default, 1

    def forward(self, idx, targets=None):
        """idx: token ids, (B, T) int64. Returns the logits (B, T, V).

        targets: (B, T) int64, the token after each token of idx. If they are given, forward returns
        the loss alone, the mean of -ln(probability of the target). If it also returned the logits,
        they would take up gigabytes. Untrained logits are small, so all V tokens are about equally
        likely: the first loss should be near -ln(1 / V) = ln V = 10.83 for V = 50304. (More exactly
        10.98: logits of standard deviation s = 0.55 raise ln(sum(exp(logits))) by s**2 / 2.)"""
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens > block_size {self.config.block_size}"
        pos = torch.arange(T, device=idx.device)  # attention ignores the order of earlier tokens
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
        from a directory written by this script or by Hugging Face's save_pretrained."""
        hf = load_hugging_face(name_or_dir)
        c = hf.config
        sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        sizes |= dict(block_size=c.n_positions, vocab_size=c.vocab_size, n_tokens=c.vocab_size)
        model = cls(GPTConfig(**sizes))
        state_dict = {name: transpose_conv1d(name, p) for name, p in hf.state_dict().items()}
        model.load_state_dict(state_dict)  # raises if a name or a shape differs
        return model

    def configure_optimizers(self, weight_decay, learning_rate):
        """AdamW (Loshchilov and Hutter 2019) updates each weight w, whose gradient is g:

            m = beta1 * m + (1 - beta1) * g     # the mean of g over about 1 / (1 - 0.9) = 10 steps
            v = beta2 * v + (1 - beta2) * g**2  # of g**2 over about 1 / (1 - 0.95) = 20 steps
            w = w - lr * m / (sqrt(v) + eps) - lr * weight_decay * w

        (Both start at 0, which is corrected first.) |m| / sqrt(v) is about 1 for gradients of any
        scale, so each weight moves by about lr, or less where successive gradients disagree. The
        betas are GPT-3's (appendix B). With PyTorch's default beta2, 0.999, v would average
        over 1000 steps and lag behind growing gradients, so the steps would be too large.

        Weight decay pulls each weight toward 0, so that an output depends a little on many inputs
        rather than strongly on a few. Biases multiply no inputs, so they are exempt. The scales of
        LayerNorm are exempt, too, because a scale near 0 would silence its channel."""
        params = list(self.parameters())
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        # fused: a few GPU programs (kernels) do the whole update, instead of one for each operation
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=50, top_p=1.0, seed=42, use_cache=True
    ):
        """Continue idx, (B, T) int64, to (B, T + max_new_tokens).

        Each token is sampled from the top_k most likely ones (top_k = 0: from all), because the
        thousands of unlikely ones together would be drawn often enough to spoil the text. The
        logits are divided by temperature: a temperature of 0.5 squares the ratio of any two
        probabilities (3 : 1 becomes 9 : 1), so the text is safer and more repetitive; above 1 the
        text varies more; at 0 the most likely token is always taken. top_p then keeps the fewest
        tokens whose total probability is at least top_p: few where the model is sure."""
        # Earlier tokens never see later ones, so their keys and values stay valid and are cached,
        # until idx is longer than the context: then all positions shift.
        cache = KVCache(self)
        generator = torch.Generator(idx.device).manual_seed(seed)
        if temperature == 0:
            temperature, top_k = 1.0, 1
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]  # crop to the longest context
            logits = cache.next_logits(context) if use_cache else self(context)[:, -1]  # (B, V)
            logits = logits[:, : self.config.n_tokens].float()  # without the ids that only pad
            k = min(top_k or logits.size(1), logits.size(1))  # top_k = 0: all
            logits, ids = logits.topk(k)  # (B, k), sorted
            probs = F.softmax(logits / temperature, dim=-1)  # (B, k)
            if top_p < 1:  # of 0.6, 0.3 and 0.1, top_p = 0.8 keeps two
                before = probs.cumsum(-1) - probs  # total probability of all more likely tokens
                probs = probs.masked_fill(before >= top_p, 0.0)  # multinomial divides by the sum
            choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1), index into the k
            next_token = ids.gather(1, choice)  # (B, 1)
            idx = torch.cat([idx, next_token], dim=1)
        return idx


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

SIZES = {  # 124M, 355M, 774M and 1558M parameters; table 2 of the GPT-2 paper has wrong counts
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "gpt3-125M": dict(n_layer=12, n_head=12, n_embd=768),  # trained with a seq_len of 2048
}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run, passed to functions as args. The defaults train GPT-2 (124M) on
    10B tokens. Each field is a command-line option, such as --max_lr 3e-4. So are --sample_only,
    --demo and --finetune; the last two and --model change defaults (see PRESETS, near the end)."""

    # input and output
    data_dir: str = "edu_fineweb10B"  # fineweb.py's shards (files of tokens): educational web pages
    out_dir: str = "log"  # log.txt and checkpoints
    init_from: str = "scratch"  # random weights; or those of gpt2 ... gpt2-xl, or of a directory
    resume: bool = False  # continue from out_dir's newest checkpoint; flags override its settings
    hellaswag_data: str = hellaswag.DATA  # downloaded if it does not exist
    # network
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3-125M"] = "gpt2"
    n_layer: int | None = None  # overrides --model
    n_head: int | None = None  # overrides --model
    n_embd: int | None = None  # overrides --model
    block_size: int | None = None  # longest context; None: seq_len
    vocab_size: int | None = None  # None: PADDED_VOCAB_SIZE, or another tokenizer's size
    # batches
    total_batch_size: int = 524288  # tokens per step: 2**19, about GPT-3's 0.5M (table 2.1)
    batch_ramp_steps: int = 0  # first train this many steps on smaller batches (get_batch_size)
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences per device per forward pass
    seq_len: int = 1024  # tokens per sequence
    shuffle: bool = True  # sequences in a new random order in each epoch
    seed: int = 1337  # for the initial weights and the shuffling
    overfit_one_batch: bool = False  # a test for bugs: the loss must fall to about 0
    # optimizer: GPT-3, appendix B, except the length of the run
    max_steps: int = 19073  # 10e9 tokens / 2**19
    warmup_steps: int = 715  # 375M tokens / 2**19
    max_lr: float = 6e-4  # GPT-3's for 125M (table 2.1); larger models have lower ones
    min_lr: float = 6e-5  # 10% of max_lr; if you change one, change both
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # clip the global norm of the gradient to this; 0: no limit
    # each runs at step 0 (saving does not), every N steps and after the last step; 0: never
    val_every: int = 250  # validation loss (on FineWeb-Edu, OpenAI's 124M has 3.29)
    hellaswag_every: int = 250  # HellaSwag accuracy
    sample_every: int = 250  # samples
    save_every: int = 5000  # checkpoints
    save_minutes: float = 30  # also when the last checkpoint is this many minutes old; 0: off
    val_tokens: int = 10485760  # tokens used for the validation loss: 20 * 2**19
    # sampling
    prompt: str = "Hello, I'm a language model,"
    sample_tokens: int = 32  # new tokens per sample
    temperature: float = 1.0
    top_k: int = 50  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # of those, from the smallest set with this total probability
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # autocast's
    compile: bool = torch.cuda.is_available()  # --demo and --device cpu turn it off


def get_lr(step, args):
    """The learning rate of step number `step` (the first is 0): linear warm-up, then cosine decay
    (GPT-3, appendix B). Warm-up: steps stay small while AdamW's means rest on few, quickly changing
    gradients. Decay: large steps approach a minimum quickly, small ones settle into it. A cosine
    spends more steps near max_lr and near min_lr than a straight line."""
    if step < args.warmup_steps:
        return args.max_lr * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # from 1 to 0
    return args.min_lr + cosine * (args.max_lr - args.min_lr)


def get_batch_size(step, args):
    """Tokens in a step. Early in training all examples give similar gradients, so a smaller and
    cheaper batch suffices. GPT-3's grew linearly from 32k tokens during the first 4-12 billion
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
    """The batches of one split. Its shards form one long array of tokens, cut into sequences of
    T + 1 tokens that overlap by one: the last target of a sequence is the first input of the next.

    The batch of a step depends only on the settings and the step's number. So a checkpoint need not
    store a position in the data, and 8 GPUs, which share each batch, see the same batches as one
    GPU. With 512 sequences per step, step 3 takes sequences 1536 to 2047 of the shuffled order; on
    2 GPUs with B = 64, ranks 0 and 1 take turns, 64 sequences at a time."""

    def __init__(self, args, split, B, rank=0, world_size=1, device="cpu", n_tokens=2**16):
        self.args, self.B, self.T = args, B, args.seq_len
        self.rank, self.world_size, self.device = rank, world_size, device
        self.tokens = fineweb.open_tokens(args.data_dir, split, n_tokens)  # refuses ids >= n_tokens
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
            rng = np.random.RandomState([self.args.seed, epoch])  # same in all NumPy versions
            self.epoch, self.permutation = epoch, rng.permutation(self.n_sequences)
        return self.permutation[i]

    def split_by_rank(self, indices):
        """This process's share of a list, in parts of B (the last one may be shorter in evaluate;
        check_args refuses a training batch that is no multiple of B * T * world_size)."""
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
    """Mean loss on text that training never sees, so memorized text cannot lower it. It is always
    the same text, the split's first val_tokens tokens. All processes must call this. (If you add
    dropout, call model.eval() before evaluations and samples, and model.train() after them.)"""
    n_sequences = max(1, min(val_tokens // loader.T, loader.n_sequences))
    totals = torch.zeros(2, device=loader.device)  # sum of losses, number of sequences
    for indices in loader.split_by_rank(range(n_sequences)):
        x, y = loader.load(indices)
        network = model if len(x) == loader.B else raw_model  # avoids compiling a new shape
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
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)  # connects NVIDIA GPUs
        else:
            dist.init_process_group("gloo")  # connects CPUs
    return rank, world_size, device


def pick_device(name, local_rank=0):
    """A torch.device. auto: an NVIDIA GPU (cuda), else an Apple GPU (mps), else the CPU."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        # Some clusters show each process only its own GPU, always as number 0; hence the modulo.
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        return torch.device("mps")
    return torch.device("cpu")


def pick_dtype(name, device):
    """The dtype of matrix products, as a string. auto: bfloat16 where the hardware supports it
    (NVIDIA A100, RTX 30 and newer; CPUs on which it is faster), else float16 on CUDA, else float32.

    Bits for      exponent (range)  mantissa (precision)
        float32          8                 23
        TF32             8                 10    float32 in memory; rounded for faster products
        bfloat16         8                  7    half the bytes, twice TF32's peak speed
        float16          5                 10    as fast; its small range needs a gradient scaler"""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float16"
    return "bfloat16" if device.type == "cpu" and bfloat16_is_faster() else "float32"


# Training -------------------------------------------------------------------------------------


def training_step(model, micro_batches, optimizer, scaler, autocast, grad_clip):
    """One optimizer step on micro_batches, a list of (inputs, targets) of equal size. Returns two
    tensors: the mean loss of this process, and the norm of the gradient before clipping. (DDP has
    averaged the gradient over all processes.) scaler: see train; it acts only in float16."""
    grad_accum_steps = len(micro_batches)  # the whole batch at once would not fit in memory
    mean_loss = 0.0
    optimizer.zero_grad()
    for micro_step, (x, y) in enumerate(micro_batches):
        if isinstance(model, DDP):
            # DDP averages the gradients of all processes during backward(). That is needed only in
            # the last micro-step. (The forward pass reads this flag, too, so it is set here.)
            model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        # Weights, gradients and AdamW's means stay in float32: in bfloat16, a weight plus a small
        # update would round back to the weight. Under autocast, matrix products and attention use
        # bfloat16 (or float16) copies; LayerNorm and the loss use float32.
        with autocast:
            loss = model(x, y)
        # backward() adds to .grad, so the gradients of the micro-batches are summed. But the loss
        # of the whole batch is the mean over its micro-batches, hence the division.
        loss = loss / grad_accum_steps
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)  # undo the scaling, so that clipping sees the true norm
    # If the norm of the whole gradient exceeds grad_clip, scale it down to that norm. Without
    # this, one unusual batch would dominate AdamW's running means for many steps.
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)  # 0: no limit
    # If the gradient has an inf or nan, all ranks skip the step, since their gradients are equal.
    if norm.isfinite():
        scaler.step(optimizer)  # AdamW
    scaler.update()  # after an inf or nan it lowers the factor
    return mean_loss, norm


def all_reduce_mean(x):
    """The tensor x averaged over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)  # x is now the sum over all processes
        x = x / dist.get_world_size()
    return x


def build_model(args, enc, checkpoint=None):
    """The model to train: from the checkpoint, else from --init_from, else newly initialized, with
    an embedding for each token of the tokenizer enc. Raises UserError if it has too few."""
    if checkpoint:
        model = GPT(GPTConfig(**checkpoint["gpt_config"]))
        model.load_state_dict(checkpoint["model"])
    elif args.init_from != "scratch":
        model = GPT.from_pretrained(args.init_from)
    else:
        sizes = {name: getattr(args, name) or n for name, n in SIZES[args.model].items()}
        sizes |= dict(block_size=args.block_size or args.seq_len, n_tokens=enc.n_vocab)
        padded = PADDED_VOCAB_SIZE if enc.n_vocab == fineweb.VOCAB_SIZE else enc.n_vocab
        sizes |= dict(vocab_size=args.vocab_size or padded)
        torch.manual_seed(args.seed)  # on the CPU: the same weights for all devices
        model = GPT(GPTConfig(**sizes))
    if model.config.vocab_size < enc.n_vocab:
        what = f"the model embeds {model.config.vocab_size} tokens, its tokenizer has {enc.n_vocab}"
        raise fineweb.UserError(f"{what}; correct --vocab_size or tokenizer.json")
    return model


def due(every, step, max_steps):
    """True at step 0, at multiples of `every`, and after the last step. 0: never."""
    return every > 0 and (step % every == 0 or step == max_steps)


def print_samples(model, enc, args, autocast, n_samples=4, seed=42):
    """Print continuations of --prompt, each cut at <|endoftext|>. enc: the tokenizer."""
    prompt = enc.encode(args.prompt).tolist() or [enc.eot]
    idx = torch.tensor([prompt] * n_samples, device=model.lm_head.weight.device)  # (B, T)
    with autocast:
        options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=seed)
        idx = model.generate(idx, args.sample_tokens, **options)
    for tokens in idx[:, len(prompt) :].tolist():
        end = tokens.index(enc.eot) if enc.eot in tokens else len(tokens)
        print0(">", enc.decode(prompt + tokens[:end]))


def train(args, checkpoint=None):
    """Train from step 0 or from a checkpoint, a dict made by state() below and read by main().
    Returns the exit status. Milliseconds per 16,384 tokens on one A100 in the lecture, cumulative:
    float32 1000; TF32 333; bfloat16 300; compile 130; flash attention 96; padded V 93; fused 90."""
    rank, world_size, device = init_distributed(args.device)
    check_args(args, world_size, checkpoint)
    master_process = rank == 0  # prints, logs and saves

    torch.set_float32_matmul_precision("high")  # TF32, for products that stay in float32
    args = replace(args, dtype=pick_dtype(args.dtype, device))
    use_amp = args.dtype != "float32"  # automatic mixed precision
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=use_amp)
    # In float16, activations' gradients below 3e-8 (half of its smallest number) become 0 before
    # they reach .grad. So the scaler multiplies the loss, hence all gradients, by a large factor,
    # which it lowers after an overflow and raises again later.
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

    enc = load_tokenizer(args, checkpoint)
    raw_model = build_model(args, enc, checkpoint).to(device)
    optimizer = raw_model.configure_optimizers(args.weight_decay, args.max_lr)
    first_step = 0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # if a flag has changed it
        if checkpoint["scaler"]:  # empty if the run was not in float16
            scaler.load_state_dict(checkpoint["scaler"])
        first_step = checkpoint["step"]
    if device.type == "cpu":
        use_cpu_kernels(raw_model, args)
    # A step has total_batch_size = B * T * world_size * grad_accum_steps tokens. With the defaults
    # on 8 GPUs and B = 64: 524288 = 64 * 1024 * 8 * 1. The micro-batch size B changes speed and
    # memory, but not the result (up to rounding).
    B = pick_micro_batch_size(args, raw_model, world_size, autocast, checkpoint)
    model = raw_model  # the same network; samples and HellaSwag use raw_model
    if args.compile:
        # torch.compile fuses the operations between matrix products (LayerNorm, GELU, additions)
        # into a few kernels, so that intermediate results need not go to GPU memory and back. It
        # compiles again for each new shape, so samples and HellaSwag are not compiled.
        model = torch.compile(raw_model, dynamic=False)
    ddp_model = model  # the same weights again; only training_step uses it
    if dist.is_initialized():
        # DDP broadcasts rank 0's weights once, here, and in each step averages the gradients of all
        # processes, so that all take the same steps and their weights stay equal.
        ddp_model = DDP(model)

    train_loader = DataLoaderLite(args, "train", B, rank, world_size, device, enc.n_vocab)
    val_loader = DataLoaderLite(args, "val", B, rank, world_size, device, enc.n_vocab)
    get_micro_batches = prefetch(train_loader)  # a function: step -> micro-batches
    examples = None
    if args.hellaswag_every:
        examples = hellaswag.items_or_none(args.hellaswag_data, raw_model.config.block_size, enc)
    run = Run(args, raw_model, enc, train_loader, checkpoint)

    def state(step):
        """Everything needed to continue. (Learning rate, batch size and data follow from step.)"""
        return {
            "step": step,
            "args": asdict(args),
            "micro_batch_size": B,  # another one would change the rounding
            "gpt_config": asdict(raw_model.config),
            "model": raw_model.state_dict(),
            "optimizer": optimizer.state_dict(),  # AdamW's m and v
            "scaler": scaler.state_dict(),
        }

    # step: the number of steps done so far. When it is max_steps, training is done.
    for step in range(first_step, args.max_steps + 1):
        # Up to the training step, all is done only now and then and does not affect training,
        # except stop_requested(), which all processes call in each step. The checkpoint comes
        # first, so that a failure in an evaluation loses nothing.
        save_due = due(args.save_every, step, args.max_steps) or run.save_minutes_passed(step)
        if master_process and save_due:
            run.save(state(step))  # does nothing in the first step of this run
        if due(args.val_every, step, args.max_steps) and not run.stop_requested():
            val_loss = evaluate(model, raw_model, val_loader, args.val_tokens, autocast)
            print0(f"step {step}: validation loss {val_loss:.4f}")
            run.log(step, val=val_loss)
        hellaswag_due = examples and due(args.hellaswag_every, step, args.max_steps)
        if hellaswag_due and not run.stop_requested():
            # HellaSwag tests common sense: 10,042 contexts with four endings, one of them right.
            # The model's answer is the ending whose tokens have the lowest mean loss (acc_norm;
            # with the sum, short endings would win). Guessing scores 0.25, GPT-2 0.2955.
            with autocast:
                score = hellaswag.evaluate(raw_model, examples, device, rank, world_size)
            print0(f"step {step}: HellaSwag accuracy {score.acc_norm:.4f} on {score.n} examples")
            run.log(step, hella=score.acc_norm)
        if due(args.sample_every, step, args.max_steps) and not run.stop_requested():
            if master_process:
                print_samples(raw_model, enc, args, autocast)
        if run.stop_requested():  # Ctrl-C or SIGTERM, in any process
            if master_process:
                run.save(state(step))
            break
        if step == args.max_steps:
            break

        # -------------------------------- one training step --------------------------------
        t0 = time.perf_counter()
        lr = get_lr(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = get_micro_batches(0 if args.overfit_one_batch else step)
        loss, norm = training_step(ddp_model, batch, optimizer, scaler, autocast, args.grad_clip)
        loss = all_reduce_mean(loss).item()  # .item() waits for the GPU, so dt is true
        dt = time.perf_counter() - t0
        # -----------------------------------------------------------------------------------

        run.log_step(step, loss, lr, norm.item(), dt)

    return run.finish()


# ==============================================================================================
# You do not need anything below this line to understand how GPT-2 is trained: faster code for CPUs
# and for samples, Hugging Face's files, checkpoints and the log, the command line.
# ==============================================================================================

import ctypes
import functools
import platform
import re
import shlex
import shutil
import signal
import sys
import timeit
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import tyro
from filelock import FileLock, Timeout

from fineweb import UserError, as_user_error, sync, write_atomically

# The same network computed in other ways, and what suits this machine -------------------------


def use_cpu_kernels(model, args):
    """On a CPU, replace attention in bfloat16, and the loss unless torch.compile fuses it, by code
    that is faster there. The results are the same up to rounding."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Keep memory that is freed. By default glibc returns every large tensor to the system, and
        # the next step has to fetch all of its pages again.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap
    if args.dtype == "bfloat16":
        for block in model.transformer.h:
            block.attn.forward = functools.partial(cpu_attention, block.attn)
    if not args.compile:
        model.forward = functools.partial(cpu_forward, model)


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
            part = flat_x[rows].to(dtype)
            part_targets = flat_targets[rows]
            log_p = F.linear(part, w).log_softmax(-1, dtype=torch.float32)  # (ROWS, V)
            total += F.nll_loss(log_p, part_targets, reduction="sum")
            if ctx.needs_input_grad[0]:  # False in evaluations
                # The gradient for the logits is their probabilities, minus 1 at the target.
                d_logits = log_p.exp_()
                d_logits[torch.arange(len(rows)), part_targets] -= 1
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
    """Computes the last logits of GPT.forward for ids (B, T) that grow by one token per call. It
    keeps the keys and values of all earlier tokens, so that only the new token is computed."""

    def __init__(self, model):
        self.model = model
        self.n_cached = 0  # tokens whose keys and values are kept
        self.keys_values = [None] * model.config.n_layer  # a pair of (B, H, n_cached, D) per block

    def next_logits(self, idx):
        """Logits (B, V) of the token that follows idx (B, T)."""
        if idx.size(1) <= self.n_cached:
            return self.model(idx)[:, -1]  # the full context moved on: all positions changed
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
    return gather(bfloat16 < float32)[0]


def pick_micro_batch_size(args, model, world_size, autocast, checkpoint):
    """Sequences per device per forward pass. auto: the largest divisor of a process's share of the
    batch that fits in memory, with at most 65,536 tokens on CUDA and 4,096 elsewhere. A resumed run
    keeps its size, because another one would change the rounding. UserError if the model cannot
    read --seq_len tokens."""
    if args.seq_len > model.config.block_size:
        what = f"--seq_len {args.seq_len}: the model's context has {model.config.block_size} tokens"
        raise UserError(f"{what}; choose a smaller --seq_len")
    if args.micro_batch_size != "auto":
        return args.micro_batch_size
    share = get_batch_size(0, args) // (args.seq_len * world_size)  # sequences
    if checkpoint and share % checkpoint["micro_batch_size"] == 0:
        return checkpoint["micro_batch_size"]
    if model.lm_head.weight.device.type == "cuda":
        most = min(sequences_that_fit(args, model, autocast), 65536 // args.seq_len)
    else:
        most = 4096 // args.seq_len
    B = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(1, most))
    return min(gather(B))  # GPUs may differ


def sequences_that_fit(args, model, autocast):
    """How many sequences of one micro-batch fit in the free memory of this GPU. The difference of
    two forward and backward passes shows how much memory a sequence takes."""
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
    return int(0.85 * free / bytes_per_sequence)


def prefetch(loader):
    """A function of the step that returns the loader's micro-batches of that step. While a step
    trains, a thread reads the next one."""
    thread = ThreadPoolExecutor(1)
    futures = {}  # {step: the Future of its micro-batches}

    def get_micro_batches(step):
        future = futures.pop(step, None) or thread.submit(loader.micro_batches, step)
        futures[step + 1] = thread.submit(loader.micro_batches, step + 1)
        return future.result()

    return get_micro_batches


def gather(value):
    """The values of all processes, in the order of their ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


# Hugging Face's files -------------------------------------------------------------------------


def load_tokenizer(args, checkpoint):
    """The tokenizer whose files lie beside the weights, else beside the shards, else GPT-2's. A
    warning is printed if the shards' ids mean other text."""
    of_shards = fineweb.load_tokenizer(args.data_dir) or fineweb.gpt2_tokenizer()
    folder = checkpoint["path"] if checkpoint else args.init_from
    if folder == "scratch":
        return of_shards
    is_openai = folder.removeprefix("openai-community/") in hellaswag.OPENAI
    enc = fineweb.gpt2_tokenizer() if is_openai else fineweb.load_tokenizer(folder) or of_shards
    if not args.sample_only and not of_shards.vocab.items() <= enc.vocab.items():
        print0(f"warning: {folder} has another tokenizer than {args.data_dir}: ids mean other text")
    return enc


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
        "tie_word_embeddings": True,
        "n_inner": 4 * c.n_embd if c.n_inner else None,
    }
    differences = {k: getattr(c, k) for k, value in expected.items() if getattr(c, k) != value}
    if differences:
        what = f"{name_or_dir} is a variant of GPT-2 that is not supported: {differences}"
        raise UserError(f"{what}; choose another model")
    return hf


def save_hugging_face(model, enc, directory):
    """Write config.json, model.safetensors without the rows that pad the vocabulary, and the files
    of the tokenizer enc, so that transformers opens the directory as it is."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPT2Config  # half a second, so not at the top

    c = model.config
    state = {name: transpose_conv1d(name, t.cpu()) for name, t in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to wte
    wte = state["transformer.wte.weight"][: c.n_tokens]  # without the padding
    state["transformer.wte.weight"] = wte.contiguous()
    ids = dict(bos_token_id=enc.eot, eos_token_id=enc.eot, pad_token_id=enc.eot)
    config = GPT2Config(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        vocab_size=len(wte),
        n_positions=c.block_size,
        n_ctx=c.block_size,  # llama.cpp reads this name
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        architectures=["GPT2LMHeadModel"],
        dtype="float32",
        **ids,
    )
    config.save_pretrained(directory)
    # Without a max_length, transformers' pipeline asks for 256 new tokens, whatever the context.
    GenerationConfig(max_length=c.block_size, **ids).save_pretrained(directory)
    save_file(state, Path(directory) / "model.safetensors", {"format": "pt"})
    enc.save(directory)


# A run: checkpoints, signals, console output, the log -----------------------------------------


def find_checkpoints(out_dir):
    """[(step, path)] of a run's checkpoints, oldest first."""
    paths = [path for path in Path(out_dir).glob("step_*") if path.name[5:].isdecimal()]
    return sorted((int(path.name[5:]), path) for path in paths)


def best_checkpoint(out_dir):
    """(validation loss, step, path) of the checkpoint with the lowest loss in log.txt, or None."""
    log = read_log(Path(out_dir) / "log.txt")
    losses = {int(step): float(value) for step, stream, value in log if stream == "val"}
    found = [(losses.get(step, math.nan), step, path) for step, path in find_checkpoints(out_dir)]
    return min((entry for entry in found if math.isfinite(entry[0])), default=None)


def write_checkpoint(path, model, enc, state):
    """Write a checkpoint completely or not at all: under a temporary name, which becomes `path`
    when everything is on the disk."""
    temporary = path.with_name("tmp_checkpoint")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with as_user_error(f"{path} cannot be written", "make room, then continue with --resume"):
            save_hugging_face(model, enc, temporary)
            torch.save(state, temporary / "training_state.pt")
            for file in [*temporary.iterdir(), temporary]:
                sync(file)
            shutil.rmtree(path, ignore_errors=True)  # a damaged one
            temporary.rename(path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # frees the disk if it failed


def newest_checkpoint(out_dir):
    """The newest state that Run.save wrote and that is not damaged, a dict; None if there are no
    checkpoints. UserError if all are damaged. The tensors are memory-mapped, so they take no memory
    until they are copied."""
    found = find_checkpoints(out_dir)
    for _, path in reversed(found):
        file = path / "training_state.pt"
        try:
            with zipfile.ZipFile(file) as archive:
                if name := archive.testzip():  # torch.load does not compare checksums
                    raise ValueError(f"wrong checksum of {name}")
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            return state | {"path": str(path)}
        except Exception as error:  # whatever prevents reading it
            print0(f"warning: {path} cannot be read ({error}); trying the one before it")
    if found:
        raise UserError(f"{out_dir}: none of its checkpoints can be read; choose another --out_dir")
    print0(f"{out_dir} has no checkpoint: a new run begins")


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


def print0(*args):
    """Print on rank 0. A pipe or a terminal that was closed does not end a run."""
    if int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError, ValueError):
            print(*args, flush=True)


class Run:
    """Everything around the training loop: the lock on out_dir, log.txt, checkpoints, signals, and
    what is printed. Only rank 0 writes files."""

    def __init__(self, args, model, enc, loader, checkpoint):
        self.args = args
        self.model = model
        self.enc = enc
        self.device = loader.device
        self.saved_step = checkpoint["step"] if checkpoint else 0
        self.started = self.saved_at = time.monotonic()
        self.skipped = 0  # steps in a row whose gradient was not finite
        self.stopping = False
        self.progress = Progress(args, model, loader)
        self.log_file = None
        if loader.rank == 0:
            self.lock = lock_folder(args.out_dir)
            self.log_file = open_log(Path(args.out_dir) / "log.txt", first_step=self.saved_step)
            self.dashboards = make_dashboards(args, first_step=self.saved_step)
        announce(args, model, loader, self.progress.device, checkpoint)
        catch_stop_signals()

    def stop_requested(self):
        """True in all processes if one of them has received a signal."""
        if not self.stopping:
            flag = torch.tensor(float(len(stop_signals) > 0), device=self.device)
            self.stopping = all_reduce_mean(flag).item() > 0
        return self.stopping

    def save_minutes_passed(self, step):
        """Whether --save_minutes have passed since the last checkpoint, or the run is complete."""
        seconds = 60 * self.args.save_minutes
        passed = time.monotonic() - self.saved_at > seconds
        return seconds > 0 and (passed or step == self.args.max_steps)

    def save(self, state):
        """Write the checkpoint out_dir/step_NNNNN, unless this run began or saved in that step, and
        remove older ones: --keep_checkpoints of them stay, and the one with the lowest validation
        loss. While steps are being skipped, write none except at the end."""
        step = state["step"]
        at_the_end = self.stopping or step == self.args.max_steps
        if step == self.saved_step or (self.skipped and not at_the_end):
            return
        path = Path(self.args.out_dir) / f"step_{step:05d}"
        write_checkpoint(path, self.model, self.enc, state)
        self.saved_step = step
        self.saved_at = time.monotonic()
        print0(f"step {step}: saved {path}")
        if self.args.keep_checkpoints:
            best = best_checkpoint(self.args.out_dir)
            older = [path for n, path in find_checkpoints(self.args.out_dir) if n < step]
            for old in older[: -self.args.keep_checkpoints]:
                if best is None or old != best[2]:
                    shutil.rmtree(old, ignore_errors=True)

    def log(self, step, **values):
        """Add a record to log.txt, and to the dashboards, for each stream=value."""
        if self.log_file is None:
            return
        self.log_file.writelines(f"{step} {name} {value:.12f}\n" for name, value in values.items())
        for dashboard in list(self.dashboards):
            try:
                dashboard(values, step)
            except Exception as error:  # it must not end a run
                print0(f"warning: a dashboard is turned off: {error}")
                self.dashboards.remove(dashboard)

    def log_step(self, step, loss, lr, norm, dt):
        """Log a training step and print its line. UserError after 20 skipped steps in a row."""
        tokens = get_batch_size(step, self.args)
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        values = {"train": loss, "lr": lr, "norm": norm, "speed": tokens / dt}
        before = get_batch_size(step - 1, self.args) if step else self.args.total_batch_size
        if tokens != before:
            values["batch"] = tokens
        if self.skipped:
            values["skip"] = self.skipped
        self.log(step, **values)
        print0(
            f"step {step:5d}/{self.args.max_steps} | loss {loss:.6f} | lr {lr:.4e} "
            f"| norm {norm:.4f} | {dt * 1e3:.1f} ms | {self.progress.update(step, dt)}"
            + (" | step skipped: its gradient is not finite" if self.skipped else "")
        )
        if self.skipped == 20:
            why = f"20 steps in a row were skipped, the last one in step {step}"
            raise UserError(f"{why}; lower --max_lr or look at the data, then use --resume")

    def finish(self):
        """Leave the folder to others, and print how to continue. Returns the exit status of the
        script: 0, or 128 + the number of the signal that has stopped it, as in shells."""
        if self.log_file:
            self.log_file.close()
            self.lock.release()
        if self.device.type == "cuda":
            print0(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB per device")
        seconds = int(time.monotonic() - self.started)
        print0(f"{'stopped' if self.stopping else 'done'} after {timedelta(seconds=seconds)}")
        saved = find_checkpoints(self.args.out_dir)
        best = best_checkpoint(self.args.out_dir)
        if best and best[1] != saved[-1][0]:
            print0("lowest validation loss {:.4f} after {} steps: {}".format(*best))
        if self.stopping:
            print0("the same command with --resume continues")
        elif saved:
            print0(f"  python train_gpt2.py --sample_only --init_from {saved[-1][1]}")
        if dist.is_initialized():
            dist.barrier()  # torchrun ends all processes with the first that ends
        number = (stop_signals or [signal.SIGTERM])[0]  # or another process received it
        return 128 + number if self.stopping else 0


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
    except (NotImplementedError, OSError):
        print0(f"warning: the file system of {out_dir} has no locks; do not train there twice")
    return lock


def open_log(path, first_step):
    """log.txt, with a record `step stream value` per line, to append to. A resumed run first drops
    the records that it will write again: those of training from its first step on, and evaluations
    after that step. (Evaluations in that step may appear twice, alike.)"""
    kept = []
    for step, stream, value in read_log(path):
        is_evaluation = stream in ("val", "hella")
        if int(step) < first_step or (is_evaluation and int(step) == first_step):
            kept.append(f"{step} {stream} {value}\n")
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
    return path.open("a", buffering=1)


def read_log(path):
    """The records of a log.txt: [(step, stream, value)], three strings each; [] without a file."""
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
    return [tuple(line.split()) for line in lines if re.fullmatch(r"\d+ \w+ \S+", line)]


def make_dashboards(args, first_step):
    """Functions of ({stream: value}, step) for --tensorboard and --wandb."""
    dashboards = []
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(Path(args.out_dir) / "tensorboard", purge_step=first_step)

        def to_tensorboard(values, step):
            for stream, value in values.items():
                board.add_scalar(stream, value, step)

        dashboards.append(to_tensorboard)
    if args.wandb:  # every start is a run of its own; those of one folder are a group
        import wandb

        run = wandb.init(project=args.wandb, group=args.out_dir, config=asdict(args))
        dashboards.append(run.log)
    return dashboards


# Peak TFLOP/s in bfloat16 (float16 where there is no bfloat16), dense, from NVIDIA's data sheets.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "V100": 125}
PEAK_TFLOPS |= {"L40S": 362, "L4": 121, "T4": 65, "A10": 125, "A6000": 155}
PEAK_TFLOPS |= {"3090": 71, "4090": 165, "5090": 209}


class Progress:
    """Speed, time left and, for a GPU in the table, MFU: the share of its peak FLOP/s that the
    model's own arithmetic uses. That is 6 FLOPs for each weight of a matrix product and token, and
    12 * n_layer * C * T per token for attention (Chowdhery et al. 2022, appendix B)."""

    def __init__(self, args, model, loader):
        self.args = args
        c = model.config
        weights = model.num_params() - model.transformer.wpe.weight.numel()
        self.flops_per_token = 6 * weights + 12 * c.n_layer * c.n_embd * args.seq_len
        device = loader.device
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        name = f" {self.device} ".replace("-", " ")
        peaks = [peak for gpu, peak in PEAK_TFLOPS.items() if f" {gpu} " in name]
        is_known = peaks and args.dtype != "float32"
        self.peak = loader.world_size * peaks[0] * 1e12 if is_known else math.inf
        self.seconds_per_token = None  # a running mean

    def update(self, step, dt):
        """The end of a step's line, for a step that took dt seconds."""
        tokens = get_batch_size(step, self.args)
        self.seconds_per_token = 0.9 * (self.seconds_per_token or dt / tokens) + 0.1 * dt / tokens
        left = tokens_before(self.args.max_steps, self.args) - tokens_before(step + 1, self.args)
        mfu = self.flops_per_token * tokens / dt / self.peak
        text = f"{tokens / dt:,.0f} tokens/s" + (f" | MFU {mfu:.1%}" if mfu else "")
        return f"{text} | left {timedelta(seconds=int(left * self.seconds_per_token))}"


def announce(args, model, loader, device, checkpoint):
    """Print what is about to be trained, and warnings about settings that are probably mistakes."""
    B, T, processes = loader.B, loader.T, loader.world_size
    accum = args.total_batch_size // (B * T * processes)
    shares = f"{B} sequences x {T} tokens x {processes} processes x {accum} micro-steps"
    n_tokens = len(loader.tokens)
    epochs = tokens_before(args.max_steps, args) / n_tokens
    changed = {k: value for k, value in asdict(args).items() if value != getattr(Args, k)}
    print0("changed settings:", ", ".join(f"{name} {value}" for name, value in changed.items()))
    compiled = ", compiled" if args.compile else ""
    print0(f"device: {processes} x {device}, {args.dtype}{compiled}; torch {torch.__version__}")
    print0(f"model: {model.num_params():,} parameters; {model.config}")
    print0(f"batch: {args.total_batch_size:,} tokens = {shares}")
    print0(f"data: {n_tokens:,} tokens; {args.max_steps} steps are {epochs:.2f} epochs")
    if checkpoint:
        print0(f"resuming {checkpoint['path']}")
    if args.device == "auto" and loader.device.type == "cpu" and model.num_params() > 50e6:
        print0("warning: PyTorch finds no GPU; on a CPU, a model of this size takes weeks")
    if args.warmup_steps >= args.max_steps > 0:
        print0("warning: --warmup_steps is not shorter than the run")


# The command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Args(TrainConfig):
    """Train GPT-2: the settings of TrainConfig, and conveniences. Settings without effect, such as
    those of training with --sample_only, are ignored."""

    # conveniences
    demo: bool = False  # use settings for a short run on text that comes with Python
    finetune: bool = False  # use settings for training --init_from on a small text
    epochs: float = 0  # sets max_steps, unless that is given: passes over the training tokens
    keep_checkpoints: int = 3  # older ones to keep beside the newest and the best; 0: all
    sample_only: bool = False  # do not train; print samples of --init_from (--prompt -: of stdin)
    tensorboard: bool = False  # also log to TensorBoard, in out_dir
    wandb: str = ""  # also log to this project of Weights & Biases


PRESETS = {  # the flags that --demo, --finetune and --model stand for; other flags override them
    # a real tokenizer and a real loss curve, in minutes on two laptop cores; other programs expect
    # a context of at least 256, of which the demo trains 128 positions
    "demo": """--data_dir demo/data --out_dir demo/log --no-compile
        --n_layer 4 --n_head 4 --n_embd 128 --block_size 256 --seq_len 128
        --total_batch_size 1024 --micro_batch_size 8 --max_steps 450 --warmup_steps 20
        --max_lr 2e-3 --min_lr 2e-4 --val_every 90 --val_tokens 13824 --hellaswag_every 0
        --sample_every 225 --save_every 225 --prompt 'The for statement is used to'""",
    # batch and learning rate of nanoGPT's fine-tuning on Shakespeare
    "finetune": """--init_from gpt2 --out_dir tuned --epochs 2 --total_batch_size 32768
        --warmup_steps 3 --max_lr 3e-5 --min_lr 3e-5 --val_every 10 --save_every 10
        --sample_every 0 --hellaswag_every 0""",
    # GPT-3 table 2.1, for the sizes nearest to GPT-2's; trained on the same 10e9 tokens
    "gpt2-medium": "--max_lr 3e-4 --min_lr 3e-5",
    "gpt2-large": "--max_lr 2.5e-4 --min_lr 2.5e-5",
    "gpt2-xl": """--max_lr 2e-4 --min_lr 2e-5 --total_batch_size 1048576 --max_steps 9537
        --warmup_steps 358""",
    "gpt3-125M": "--seq_len 2048",
}
# A run that is resumed with another value of one of these would be another run.
FIXED = "model n_layer n_head n_embd block_size vocab_size init_from seq_len seed shuffle".split()
FIXED += "total_batch_size batch_ramp_steps overfit_one_batch".split()


def parse(argv):
    """(args, checkpoint). Settings come from the flags, else --demo, else --finetune, else --model.
    With --resume, flags override the settings of the newest checkpoint, which is returned, too.
    UserError if a resumed run would become another."""
    read = functools.partial(tyro.cli, Args, description=__doc__)
    args = read(args=argv, default=Args())  # shows which presets are wanted
    wanted = [args.model, "finetune" if args.finetune else "", "demo" if args.demo else ""]
    flags = " ".join(PRESETS.get(name, "") for name in wanted)
    defaults = Args(compile=pick_device(args.device).type == "cuda")
    defaults = read(args=shlex.split(flags), default=defaults)
    args = read(args=argv, default=defaults)
    checkpoint = newest_checkpoint(args.out_dir) if args.resume else None
    if checkpoint:
        known = {field.name for field in fields(Args)}  # another version may have had others
        saved = {name: value for name, value in checkpoint["args"].items() if name in known}
        defaults = replace(Args(**saved), out_dir=args.out_dir, resume=True)
        args = read(args=argv, default=defaults)
    if args.sample_only:
        return args, checkpoint
    if args.demo:
        fineweb.build_demo(args.data_dir)
    if args.epochs and args.max_steps == defaults.max_steps:  # --max_steps was not given
        tokens = args.epochs * len(fineweb.open_tokens(args.data_dir, "train"))
        args = replace(args, max_steps=math.ceil(tokens / args.total_batch_size))
    args = replace(args, epochs=0)
    if checkpoint:
        compare_with_checkpoint(args, defaults, checkpoint["path"])
    return args, checkpoint


def compare_with_checkpoint(args, saved, path):
    """Print what a resumed run changes. UserError if that makes it another run."""
    for name, old in asdict(saved).items():
        new = getattr(args, name)
        if new != old and name in FIXED:
            why = f"--resume: {path} was trained with --{name} {old}, not {new}"
            raise UserError(f"{why}; start another run with --init_from {path}")
        if new != old:
            print0(f"--resume: {name} {old} → {new}")


def check_args(args, world_size, checkpoint):
    """UserError if the settings cannot work, or if this process sees other files than rank 0."""
    if args.init_from != "scratch" and not checkpoint:
        for name in ("model", "n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(args, name) not in (getattr(Args, name), args.init_from):
                raise UserError(f"--{name}: the weights of --init_from have their own; omit it")
    if args.min_lr > args.max_lr:
        raise UserError(f"--min_lr {args.min_lr} is above --max_lr {args.max_lr}; lower it, too")
    B = 1 if args.micro_batch_size == "auto" else args.micro_batch_size
    unit = B * args.seq_len * world_size * (8 if args.batch_ramp_steps else 1)
    if args.total_batch_size % unit or args.total_batch_size <= 0:
        factors = f"micro_batch_size {B} x seq_len {args.seq_len} x {world_size} processes"
        factors += " x 8 (--batch_ramp_steps)" if args.batch_ramp_steps else ""
        what = f"--total_batch_size {args.total_batch_size} is not a multiple of {factors}"
        raise UserError(f"{what} = {unit}; change one of them")
    log = Path(args.out_dir) / "log.txt"
    if not args.resume and (find_checkpoints(args.out_dir) or read_log(log)):
        raise UserError(f"{args.out_dir} holds a run; add --resume, or choose another --out_dir")
    seen = [checkpoint["path"] if checkpoint else "no checkpoint"]
    for split in ("train", "val") if args.val_every else ("train",):
        n = len(fineweb.open_tokens(args.data_dir, split))  # UserError if there are no shards
        if n <= args.seq_len:
            what = f"{args.data_dir}: its {split} shards hold {n} tokens, too few for"
            raise UserError(f"{what} --seq_len {args.seq_len}; choose a smaller one, or more text")
        seen.append(f"{n:,} {split} tokens")
    of_rank_0 = gather(seen)[0]
    if seen != of_rank_0:
        raise UserError(f"this process sees {seen}, but rank 0 sees {of_rank_0}")


def sample(args, checkpoint):
    """--sample_only: print samples of the newest checkpoint (--resume), or of --init_from."""
    if args.init_from == "scratch" and not checkpoint:
        raise UserError("--sample_only needs weights; add --init_from gpt2, or a checkpoint")
    device = pick_device(args.device)
    dtype = getattr(torch, pick_dtype(args.dtype, device))
    enc = load_tokenizer(args, checkpoint)
    model = build_model(args, enc, checkpoint).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    for line in sys.stdin if args.prompt == "-" else [args.prompt]:
        args = replace(args, prompt=line.rstrip("\n"))
        print_samples(model, enc, args, autocast, seed=args.seed)


def main(argv=None):
    stop_signals.clear()
    sys.stdout.reconfigure(errors="replace")  # some consoles cannot show all characters
    # torchrun allows each process one thread, and a container may allow fewer cores than it shows.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = max(1, fineweb.available_cores() // processes)
    if processes > 1 or cores < torch.get_num_threads():
        torch.set_num_threads(cores)
    if "microsoft" not in platform.release():  # WSL cannot do it (PyTorch issue 192330)
        # Let blocks of GPU memory grow, so that less is lost between them.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    status = 0
    try:
        args, checkpoint = parse(sys.argv[1:] if argv is None else argv)
        if args.sample_only:
            sample(args, checkpoint)
        else:
            status = train(args, checkpoint)
    except UserError as error:
        print(f"train_gpt2.py: {error}", file=sys.stderr)
        status = 2
    except torch.OutOfMemoryError:
        print("train_gpt2.py: out of memory; choose a smaller --micro_batch_size", file=sys.stderr)
        status = 2
    if dist.is_initialized():
        # Gloo's threads can abort a process that Python is ending (PyTorch issue 38228).
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
