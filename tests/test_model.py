"""The network's numbers, its initialisation, its weights on the disk, optimizer and schedules."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_invariants import random_hugging_face
from transformers import AutoTokenizer, pipeline

from fineweb import EOT, VOCAB_SIZE, UserError, tokenizer
from train_gpt2 import (
    GPT,
    SIZES,
    CachedDecoder,
    Config,
    CPUCrossEntropy,
    GPTConfig,
    attention,
    cpu_attention,
    flops_per_token,
    get_batch_size,
    get_lr,
    make_scaler,
    tokens_before,
    training_step,
)

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)


def tokens(B=3, T=41):
    return torch.randint(VOCAB_SIZE, (B, T), generator=torch.Generator().manual_seed(2))


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


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize(
    "dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_the_loss_on_a_cpu_equals_cross_entropy(tiny, monkeypatch, rows, dtype, tolerance):
    monkeypatch.setattr(CPUCrossEntropy, "ROWS", rows)
    idx, targets = torch.randint(50257, (2, 2, 10), generator=torch.Generator().manual_seed(0))
    targets[0, 3:5] = -100
    losses, gradients = [], []
    for plain in (True, False):
        tiny.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            x, weight = tiny.transformer(idx).flatten(0, 1), tiny.lm_head.weight
            if plain:
                loss = F.cross_entropy(F.linear(x, weight).float(), targets.flatten())
            else:
                loss = tiny(idx, targets)
        (3 * loss).backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in tiny.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name, grad in gradients[0].items():
        assert (gradients[1][name] - grad).norm() <= tolerance * grad.norm(), name
    with torch.no_grad():
        assert tiny(idx, targets).item() == pytest.approx(
            losses[0], abs=1e-5 if dtype is None else 1e-2
        )


@pytest.mark.parametrize("T, heads", [(1, 2), (33, 6), (256, 1), (600, 2)])  # 600: three parts
def test_attention_on_the_cpu_in_bfloat16_equals_that_in_float64(T, heads):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1, T, heads, 16, generator=generator).transpose(1, 2) for _ in range(4)]
    found = []
    exact = partial(F.scaled_dot_product_attention, is_causal=True)
    for attend, dtype in ((attention, torch.bfloat16), (exact, torch.float64)):
        q, k, v, dy = (t.bfloat16().to(dtype).detach().requires_grad_() for t in values)
        y = attend(q, k, v)
        found.append([y.detach(), *torch.autograd.grad(y, (q, k, v), dy)])
    for ours, exact in zip(*found):
        assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= 0.01 * exact.norm() + 1e-6  # seen: 0.004


def test_attention_equals_the_formula_with_and_without_a_mask():
    q, k, v = torch.randn(3, 2, 3, 33, 16, generator=torch.Generator().manual_seed(0)).unbind()
    causal = torch.ones(33, 33).tril().bool()
    other = causal & (torch.arange(33) % 3 != 1) | torch.eye(33).bool()
    for mask, given in ((causal, None), (other, other)):
        scores = (q @ k.transpose(2, 3) / 4).masked_fill(~mask, -math.inf)
        expected = scores.softmax(-1) @ v
        torch.testing.assert_close(attention(q, k, v, given), expected, rtol=1e-5, atol=1e-5)
    parts = cpu_attention(q, k, v, rows=10)  # the last part is shorter
    torch.testing.assert_close(parts, attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_too_long_a_context_is_said(tiny):
    with pytest.raises(ValueError, match="context of 32"):
        tiny(tokens(1, 33))


# -- weights on the disk


def test_a_saved_directory_opens_in_transformers_with_its_tokenizer(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == VOCAB_SIZE and config["eos_token_id"] == EOT
    assert config["n_positions"] == config["n_ctx"] == 32  # n_ctx: llama.cpp reads it
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, modes  # a server of another user's can read all or none
    theirs, text = AutoTokenizer.from_pretrained(tmp_path), "Hello, wörld 東京 🙂  x+=1;\n\n"
    assert theirs.encode(text) == tokenizer().encode_ordinary(text)
    assert theirs.encode("<|endoftext|>") == [EOT] == [theirs.pad_token_id]
    write = pipeline("text-generation", str(tmp_path))
    written = write(["Hello", "I'm a"], max_new_tokens=4, min_new_tokens=4, batch_size=2)
    assert all(len(w[0]["generated_text"]) > len("Hello") for w in written)


def test_what_was_trained_is_saved_and_what_pads_is_not(tmp_path):
    for vocab_size, rows in ((50304, 50257), (50257, 50257), (50400, 50400), (300, 300)):
        model = GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=4))
        model.save_pretrained(tmp_path / str(vocab_size))
        back = GPT.from_pretrained(tmp_path / str(vocab_size))
        assert torch.equal(back.lm_head.weight, model.lm_head.weight[:rows])
        assert back.lm_head.weight is back.transformer.wte.weight


ODD = [
    dict(activation_function="gelu"),
    dict(n_inner=100),
    dict(layer_norm_epsilon=1e-6),
    dict(scale_attn_by_inverse_layer_idx=True),
    dict(tie_word_embeddings=False),
]


@pytest.mark.parametrize("change", ODD)
def test_what_is_no_plain_gpt2_is_refused(tmp_path, change):
    random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2, **change)
    with pytest.raises(UserError, match=next(iter(change))):
        GPT.from_pretrained(tmp_path)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.h.0.mlp.c_fc.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="c_fc.bias"):
        GPT.from_pretrained(tmp_path)


# -- sampling: test_7 has the rest


def test_sampling_moves_no_other_random_stream(tiny):
    before, idx = torch.get_rng_state(), torch.tensor([[1]])
    same, again, other = (tiny.generate(idx, 9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert torch.equal(before, torch.get_rng_state())


@torch.no_grad()
def test_the_cache_reads_only_what_is_new(tiny):
    seen = []
    tiny.transformer.wte.register_forward_hook(lambda m, args, out: seen.append(out.size(1)))
    decode, ids = CachedDecoder(tiny), tokens(2, 32)
    for T in [*range(5, 33), 32]:  # the last one: the context is full and has moved
        torch.testing.assert_close(decode(ids[:, :T]), tiny(ids[:, :T])[:, -1])
    assert seen[::2] == [5, *[1] * 27, 32]  # every other one is the model's


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
    """Loshchilov and Hutter's algorithm 2 on the mean gradient of each step's batches, clipped to
    the norm `clip`, written out in float64. Returns the weights and the norms."""
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
    """Accumulation, clipping and AdamW: three updates from three micro-batches each."""
    import copy

    batches = [[(t[:, :-1], t[:, 1:]) for t in tokens(6, 17).split(2)] for _ in range(3)]
    weights, norms = by_the_paper(copy.deepcopy(tiny), 1e-3, clip or math.inf, batches)
    assert min(norms) > 0.6  # so that a limit of 0.5 is felt
    optimizer = tiny.configure_optimizers(0.1, 1e-3)
    scaler = make_scaler("float32", torch.device("cpu"))
    for step, expected in zip(batches, norms):
        loss, norm = training_step(tiny, step, optimizer, scaler, OFF, clip)
        assert norm.item() == pytest.approx(expected, rel=1e-4)
    for p, w in zip(tiny.parameters(), weights):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-5)


def test_float16_gradients_are_scaled_and_unscaled(tiny):
    """The loss is multiplied by 65536 before backward(), and the norm is the true one."""
    optimizer, t = tiny.configure_optimizers(0.1, 1e-3), tokens(2, 17)
    scaler = make_scaler("float16", torch.device("cpu"))
    tiny(t[:, :-1], t[:, 1:]).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in tiny.parameters()]).item()
    seen = []
    tiny.transformer.ln_f.bias.register_hook(lambda grad: seen.append(grad.norm().item()))
    true = tiny.transformer.ln_f.bias.grad.norm().item()
    autocast = torch.autocast("cpu", torch.float16)
    _, norm = training_step(tiny, [(t[:, :-1], t[:, 1:])], optimizer, scaler, autocast, 1.0)
    assert norm.item() == pytest.approx(expected, rel=0.01)
    assert seen[0] == pytest.approx(65536 * true, rel=0.01)


LR = [(0, 6e-4 / 715), (356, 6e-4 * 357 / 715), (714, 6e-4), (715, 6e-4)]
LR += [(715 + 9179, 3.3e-4), (19073, 6e-5), (30000, 6e-5)]


@pytest.mark.parametrize("step, lr", LR)
def test_learning_rate_by_hand(step, lr):
    assert get_lr(step, Config()) == pytest.approx(lr, rel=1e-9)


def test_batch_sizes_by_hand():
    config = Config(total_batch_size=800, batch_ramp_steps=7)
    expected = [100, 100, 100, 200, 200, 400, 400, 800, 800]
    assert [get_batch_size(step, config) for step in range(9)] == expected
    assert [tokens_before(step, config) for step in range(10)] == [
        sum(expected[:step]) for step in range(10)
    ]
    assert get_batch_size(0, Config()) == get_batch_size(10**6, Config()) == 524288
    assert tokens_before(19073, Config()) == 19073 * 524288
