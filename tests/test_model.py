"""The network, its initialisation, the faster code for CPUs, its weights on the disk, the optimizer
and the schedules."""

import copy
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import FAULTS
from test_invariants import random_hugging_face
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import AutoTokenizer, pipeline

import train_gpt2
from fineweb import EOT, VOCAB_SIZE, UserError, tokenizer
from train_gpt2 import (
    GPT,
    SIZES,
    Args,
    CausalSelfAttention,
    CPUCrossEntropy,
    GPTConfig,
    KVCache,
    TrainConfig,
    cpu_attention,
    cpu_forward,
    flops_per_token,
    get_batch_size,
    get_lr,
    load_hugging_face,
    real_vocab_size,
    save_hugging_face,
    tokens_before,
    training_step,
    use_cpu_kernels,
)

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(B=3, T=41):
    return torch.randint(VOCAB_SIZE, (B, T), generator=torch.Generator().manual_seed(2))


def autocast(dtype):
    """As train() makes it."""
    enabled = dtype != torch.float32
    return torch.autocast("cpu", dtype if enabled else torch.bfloat16, enabled=enabled)


@pytest.fixture
def one_process():
    """A process group of this process alone, which DDP needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# -- sizes, initialisation, loss

COUNTS = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


@pytest.mark.parametrize("name, count", zip(SIZES, COUNTS))
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert GPT(GPTConfig(**SIZES[name])).num_params() == count


def test_flops_per_token_of_the_recipe():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    # by hand: 6 x (50257 x 768 + 12 blocks x 7,087,872 + 1,536) + 12 x 12 x 768 x 1024
    multiply = 50257 * 768 + 12 * 7_087_872 + 1536
    assert flops_per_token(model, 1024) == 6 * multiply + 113_246_208


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=4096, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(p.std().item() / std - 1) < 0.03 and abs(p.mean().item()) < 0.1 * std, name
    assert model.lm_head.weight is model.transformer.wte.weight
    # once: the tied tensor, which comes first, still holds the first draw from the seed at the end
    torch.manual_seed(3)
    model.init_weights()
    first = torch.empty(4096, 128).normal_(0, 0.02, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.transformer.wte.weight, first)


def test_loss_at_initialisation_is_that_of_a_uniform_guess(tiny):
    ids = tokens(4, 33)
    assert abs(tiny(ids[:, :-1], ids[:, 1:]).item() - math.log(50304)) < 0.1


def test_loss_is_cross_entropy_and_ignores_minus_100(tiny):
    ids = tokens(2, 20)
    kept = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    log_p = F.log_softmax(tiny(ids).double(), -1).gather(-1, ids[..., None])[..., 0]
    assert tiny(ids, torch.where(kept, ids, -100)).item() == pytest.approx(
        -log_p[kept].mean().item(), abs=1e-5
    )


def test_attention_equals_the_formula():
    """Vaswani et al. 2017, equation 1, head by head and token by token."""
    torch.manual_seed(0)
    attn = CausalSelfAttention(GPTConfig(n_head=3, n_embd=48))
    x = torch.randn(2, 9, 48)
    q, k, v = F.linear(x, attn.c_attn.weight, attn.c_attn.bias).split(48, dim=2)
    y = torch.zeros(2, 9, 48)
    for head in (slice(0, 16), slice(16, 32), slice(32, 48)):
        for t in range(9):
            scores = (q[:, t, None, head] * k[:, : t + 1, head]).sum(2) / 4  # sqrt(16)
            y[:, t, head] = (scores.softmax(1)[..., None] * v[:, : t + 1, head]).sum(1)
    expected = F.linear(y, attn.c_proj.weight, attn.c_proj.bias)
    torch.testing.assert_close(attn(x), expected, rtol=1e-5, atol=1e-5)


def test_a_token_sees_only_itself_and_earlier_tokens(tiny):
    ids = tokens(2, 20)
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCAB_SIZE
    difference = (tiny(ids) - tiny(changed)).abs().amax(2)  # (B, T)
    assert (difference[:, :12] == 0).all() and (difference[:, 12:] > 0).all()


def test_too_long_a_context_is_refused(tiny):
    with pytest.raises(AssertionError, match="33 tokens > block_size 32"):
        tiny(tokens(1, 33))


# -- the faster code for CPUs: the same loss, and the same gradient of every parameter


def loss_and_gradients(function, model, dtype, *args):
    """(loss, {name: gradient}) of `function`, as training computes them in this precision. The loss
    is multiplied by 3, because the gradient must take part in that."""
    model.zero_grad()
    with autocast(dtype):
        loss = function(*args)
    (3 * loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


def assert_equal_gradients(ours, expected, tolerance):
    """Each gradient differs from the expected one by at most `tolerance` of its norm."""
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        assert ours[name].dtype == grad.dtype and grad.norm() > 0, name
        assert (ours[name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("dtype, tolerance", zip(DTYPES, (1e-5, 2e-2, 2e-3)))
def test_the_loss_for_cpus_equals_cross_entropy(tiny, monkeypatch, rows, dtype, tolerance):
    monkeypatch.setattr(CPUCrossEntropy, "ROWS", rows)
    idx, targets = torch.randint(50257, (2, 2, 10), generator=torch.Generator().manual_seed(0))
    targets[0, 3:5] = -100  # these targets do not count
    loss, gradients = loss_and_gradients(GPT.forward, tiny, dtype, tiny, idx, targets)
    found, ours = loss_and_gradients(cpu_forward, tiny, dtype, tiny, idx, targets)
    assert found.dtype == loss.dtype == torch.float32
    assert found.item() == pytest.approx(loss.item(), abs=1e-5)
    assert_equal_gradients(ours, gradients, tolerance)
    with torch.no_grad(), autocast(dtype):
        assert cpu_forward(tiny, idx, targets).item() == pytest.approx(loss.item(), abs=1e-5)
        assert torch.equal(cpu_forward(tiny, idx), tiny(idx))  # the logits


@pytest.mark.parametrize("T, heads", [(1, 2), (33, 6), (256, 1), (600, 2)])  # 600: three parts
@pytest.mark.parametrize("dtype, tolerance", zip(DTYPES, (1e-5, 1.5e-2, 2e-3)))
def test_attention_for_cpus_equals_attention_in_float64(T, heads, dtype, tolerance):
    """The output, and the gradients of the input and of all parameters, of cpu_attention in a
    precision, and of CausalSelfAttention in float64."""
    torch.manual_seed(0)
    attn = CausalSelfAttention(GPTConfig(n_head=heads, n_embd=16 * heads))
    x, dy = torch.randn(2, 2, T, 16 * heads)
    found = []
    for exact in (False, True):
        model = copy.deepcopy(attn).double() if exact else attn
        x = x.detach().to(torch.float64 if exact else torch.float32).requires_grad_()
        with OFF if exact else autocast(dtype):
            y = model(x) if exact else cpu_attention(model, x)
        assert y.dtype == (torch.float64 if exact else dtype)
        gradients = torch.autograd.grad(y, (x, *model.parameters()), dy.to(y.dtype))
        found.append([y.detach().double(), *(grad.double() for grad in gradients)])
    for ours, exact in zip(*found):
        assert ours.shape == exact.shape
        # With one token, the keys and queries have no gradient at all.
        assert (ours - exact).norm() <= tolerance * exact.norm() + 1e-6


@pytest.mark.parametrize("rows", [1, 10, 33, 100])  # 10: the last part has fewer rows
def test_attention_for_cpus_may_be_cut_anywhere(rows):
    torch.manual_seed(0)
    attn = CausalSelfAttention(GPTConfig(n_head=3, n_embd=48))
    x = torch.randn(2, 33, 48)
    torch.testing.assert_close(cpu_attention(attn, x, rows), attn(x), rtol=1e-5, atol=1e-5)


def medium_batch():
    """(model, idx, targets): two layers, few tokens in the vocabulary, and a context of 600, which
    both kernels cut into three parts."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=600, vocab_size=300, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():  # away from the initial values, so that attention matters
            p.add_(0.1 * torch.randn_like(p))
    idx, targets = torch.randint(300, (2, 2, 600))
    targets[1, 500:] = -100
    return model, idx, targets


def replaced(model, dtype, **settings):
    """A copy of the model, after use_cpu_kernels."""
    model = copy.deepcopy(model)
    use_cpu_kernels(model, Args(dtype=str(dtype).removeprefix("torch."), **settings))
    return model


@pytest.mark.parametrize("wrapper", ["none", "ddp"])
@pytest.mark.parametrize("dtype, tolerance", zip(DTYPES, (1e-5, 3e-2, 3e-3)))
def test_use_cpu_kernels_changes_no_result(one_process, dtype, tolerance, wrapper):
    """The loss and all gradients of the whole model, alone and in DistributedDataParallel."""
    plain, *batch = medium_batch()
    loss, gradients = loss_and_gradients(plain, plain, dtype, *batch)
    ours = replaced(plain, dtype, compile=False)
    found, new = loss_and_gradients(DDP(ours) if wrapper == "ddp" else ours, ours, dtype, *batch)
    assert found.item() == pytest.approx(loss.item(), abs=1e-5 if dtype == DTYPES[0] else 5e-3)
    assert_equal_gradients(new, gradients, tolerance)


@FAULTS
@pytest.mark.parametrize("wrapper", ["none", "ddp"])
def test_use_cpu_kernels_changes_no_result_under_torch_compile(one_process, wrapper):
    """In bfloat16; in the other precisions it replaces nothing that is compiled."""
    plain, *batch = medium_batch()
    loss, gradients = loss_and_gradients(plain, plain, torch.bfloat16, *batch)
    ours = replaced(plain, torch.bfloat16, compile=True)
    torch.compiler.reset()
    compiled = torch.compile(ours, dynamic=False)
    network = DDP(compiled) if wrapper == "ddp" else compiled
    found, new = loss_and_gradients(network, ours, torch.bfloat16, *batch)
    assert found.item() == pytest.approx(loss.item(), abs=5e-3)
    assert_equal_gradients(new, gradients, 3e-2)


@pytest.mark.parametrize(
    "dtype, compile, kernels",
    [
        ("float32", False, {"loss"}),
        ("float16", False, {"loss"}),
        ("bfloat16", False, {"attention", "loss"}),
        ("bfloat16", True, {"attention"}),
        ("float32", True, set()),
    ],
)
def test_use_cpu_kernels_replaces_what_it_should(monkeypatch, dtype, compile, kernels):
    """Which of the kernels run in a forward pass of the model, in which precision."""
    used = []
    for kind, name in (("attention", "cpu_attention"), ("loss", "cpu_forward")):
        original = getattr(train_gpt2, name)

        def counted(*args, kind=kind, original=original):
            used.append(kind)
            return original(*args)

        monkeypatch.setattr(train_gpt2, name, counted)
    plain, idx, targets = medium_batch()
    plain(idx, targets)
    assert used == []
    model = replaced(plain, getattr(torch, dtype), compile=compile)
    with autocast(getattr(torch, dtype)):
        model(idx, targets)
    assert set(used) == kernels
    assert used.count("attention") == (2 if "attention" in kernels else 0)  # in each layer


# -- weights on the disk


def test_a_saved_directory_opens_in_transformers_with_its_tokenizer(tiny, tmp_path):
    save_hugging_face(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0
    assert config["vocab_size"] == VOCAB_SIZE and config["eos_token_id"] == EOT
    assert config["n_positions"] == config["n_ctx"] == 32  # n_ctx: llama.cpp reads it
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes  # another user can read all files, or none
    theirs, text = AutoTokenizer.from_pretrained(tmp_path), "Hello, wörld 東京 🙂  x+=1;\n\n"
    assert theirs.encode(text) == tokenizer().encode_ordinary(text)
    assert theirs.encode("<|endoftext|>") == [EOT] == [theirs.pad_token_id]
    write = pipeline("text-generation", str(tmp_path))
    written = write(["Hello", "I'm a"], max_new_tokens=4, min_new_tokens=4, batch_size=2)
    assert all(len(w[0]["generated_text"]) > len("Hello") for w in written)


def test_the_rows_that_pad_the_vocabulary_are_not_saved(tmp_path):
    for vocab_size, rows in ((50304, 50257), (50257, 50257), (50400, 50400), (300, 300)):
        model = GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=4))
        assert real_vocab_size(model) == rows
        save_hugging_face(model, tmp_path / str(vocab_size))
        back = GPT.from_pretrained(tmp_path / str(vocab_size))
        assert torch.equal(back.lm_head.weight, model.lm_head.weight[:rows])
        assert back.lm_head.weight is back.transformer.wte.weight


VARIANTS = [
    dict(activation_function="gelu"),
    dict(n_inner=100),
    dict(layer_norm_epsilon=1e-6),
    dict(scale_attn_weights=False),
    dict(scale_attn_by_inverse_layer_idx=True),
    dict(tie_word_embeddings=False),
]


@pytest.mark.parametrize("change", VARIANTS)
def test_a_variant_of_gpt2_is_refused(tmp_path, change):
    random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2, **change)
    with pytest.raises(UserError, match=next(iter(change))):
        GPT.from_pretrained(tmp_path)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    """n_inner may be given as 4 * n_embd, and dropout is off when a model is not trained."""
    random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2, n_inner=64, resid_pdrop=0.1)
    assert load_hugging_face(tmp_path).config.n_inner == 64


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.h.0.mlp.c_fc.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="c_fc.bias"):
        GPT.from_pretrained(tmp_path)


# -- sampling (test_7 has the rest)


def test_sampling_has_its_own_random_numbers(tiny):
    before, idx = torch.get_rng_state(), torch.tensor([[1]])
    same, again, other = (tiny.generate(idx, 9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert torch.equal(before, torch.get_rng_state())


@torch.no_grad()
def test_the_cache_computes_only_new_tokens(tiny):
    seen = []
    tiny.transformer.wte.register_forward_hook(lambda m, args, out: seen.append(out.size(1)))
    cache, ids = KVCache(tiny), tokens(2, 32)
    for T in [*range(5, 33), 32]:  # the last one: the context is full and has moved on
        torch.testing.assert_close(cache.next_logits(ids[:, :T]), tiny(ids[:, :T])[:, -1])
    assert seen[::2] == [5, *[1] * 27, 32]  # every other entry is the model's own


@torch.no_grad()
def test_the_cache_refuses_several_new_tokens_at_once(tiny):
    """is_causal would compare each of them with the wrong keys."""
    cache, ids = KVCache(tiny), tokens(2, 8)
    cache.next_logits(ids[:, :5])
    with pytest.raises(AssertionError, match="one by one"):
        cache.next_logits(ids[:, :7])


def test_generate_uses_the_cache(tiny):
    """With it, each token after the prompt is computed once; without it, all are computed again."""
    seen = []
    tiny.transformer.wte.register_forward_hook(lambda m, args, out: seen.append(out.size(1)))
    tiny.generate(tokens(2, 5), 4)
    tiny.generate(tokens(2, 5), 4, use_cache=False)
    assert seen == [5, 1, 1, 1] + [5, 6, 7, 8]


# -- optimizer, step, schedules


def test_weight_decay_groups(tiny):
    optimizer = tiny.configure_optimizers(0.1, 6e-4)
    decay, rest = optimizer.param_groups
    names = {id(p): name for name, p in tiny.named_parameters()}
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    decayed, others = ([names.pop(id(p)) for p in group["params"]] for group in (decay, rest))
    assert all(name.endswith(".weight") and "ln_" not in name for name in decayed)
    assert all(name.endswith(".bias") or "ln_" in name for name in others)
    assert not names
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-8
    assert optimizer.defaults["fused"]


def by_the_paper(model, lr, clip, batches_of_steps):
    """Algorithm 2 of Loshchilov and Hutter, applied to the mean gradient of each step's batches
    after clipping it to the norm `clip`, in float64. Returns the weights and the norms."""
    params = list(model.parameters())
    weights = [p.detach().double() for p in params]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    norms = []
    for t, batches in enumerate(batches_of_steps, 1):
        for p, w in zip(params, weights):
            p.data = w.float()
        losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in batches]
        grads = torch.autograd.grad(sum(losses) / len(losses), params)
        norms.append(math.sqrt(sum((g.double() ** 2).sum().item() for g in grads)))
        for g, w, (m, v), p in zip(grads, weights, moments, params):
            g = g.double() * min(1, clip / norms[-1])
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            w.mul_(1 - lr * (0.1 if p.dim() >= 2 else 0))
            w.sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
    return weights, norms


@pytest.mark.parametrize("clip", [0.5, 1e9, 0])
def test_a_training_step_equals_the_papers_formulas(tiny, clip):
    """Accumulation, clipping and AdamW: three steps, each with three micro-batches."""
    batches = [[(t[:, :-1], t[:, 1:]) for t in tokens(6, 17).split(2)] for _ in range(3)]
    weights, norms = by_the_paper(copy.deepcopy(tiny), 1e-3, clip or math.inf, batches)
    assert min(norms) > 0.6  # so that a limit of 0.5 matters
    optimizer = tiny.configure_optimizers(0.1, 1e-3)
    for step, expected in zip(batches, norms):
        with torch.no_grad():
            mean_loss = sum(tiny(x, y).item() for x, y in step) / 3
        loss, norm = training_step(tiny, step, optimizer, NO_SCALER, OFF, clip)
        assert loss.item() == pytest.approx(mean_loss, rel=1e-5)
        assert norm.item() == pytest.approx(expected, rel=1e-4)
    for p, w in zip(tiny.parameters(), weights):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-5)


def test_float16_gradients_are_scaled_and_unscaled(tiny):
    """The loss is multiplied by 65536 before backward(), but the norm is that of the gradient."""
    optimizer, t = tiny.configure_optimizers(0.1, 1e-3), tokens(2, 17)
    scaler = torch.amp.GradScaler("cpu")
    tiny(t[:, :-1], t[:, 1:]).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in tiny.parameters()]).item()
    seen = []
    tiny.transformer.ln_f.bias.register_hook(lambda grad: seen.append(grad.norm().item()))
    true = tiny.transformer.ln_f.bias.grad.norm().item()
    micro_batches = [(t[:, :-1], t[:, 1:])]
    _, norm = training_step(tiny, micro_batches, optimizer, scaler, autocast(torch.float16), 1.0)
    assert norm.item() == pytest.approx(expected, rel=0.01)
    assert seen[0] == pytest.approx(65536 * true, rel=0.01)


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
def test_processes_average_gradients_only_in_the_last_micro_step(
    one_process, tiny, grad_accum_steps
):
    """DDP calls its hook when it averages a bucket of gradients."""
    model, now, averaged = DDP(tiny), [], []

    def hook(state, bucket):
        averaged.append(len(now))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, hook)
    tiny.transformer.wte.register_forward_hook(lambda *args: now.append("a forward pass"))
    optimizer = tiny.configure_optimizers(0.1, 1e-3)
    micro_batches = [(t[:, :-1], t[:, 1:]) for t in tokens(2, 17).split(2)] * grad_accum_steps
    training_step(model, micro_batches, optimizer, NO_SCALER, OFF, 1.0)
    assert len(now) == grad_accum_steps and set(averaged) == {grad_accum_steps}


LR = [(0, 6e-4 / 715), (356, 6e-4 * 357 / 715), (714, 6e-4), (715, 6e-4)]
LR += [(715 + 9179, 3.3e-4), (19073, 6e-5), (30000, 6e-5)]


@pytest.mark.parametrize("step, lr", LR)
def test_learning_rate_by_hand(step, lr):
    assert get_lr(step, TrainConfig()) == pytest.approx(lr, rel=1e-9)


def test_batch_sizes_by_hand():
    args = TrainConfig(total_batch_size=800, batch_ramp_steps=7)
    expected = [100, 100, 100, 200, 200, 400, 400, 800, 800]
    assert [get_batch_size(step, args) for step in range(9)] == expected
    assert [tokens_before(step, args) for step in range(10)] == [
        sum(expected[:step]) for step in range(10)
    ]
    assert get_batch_size(0, TrainConfig()) == get_batch_size(10**6, TrainConfig()) == 524288
    assert tokens_before(19073, TrainConfig()) == 19073 * 524288
