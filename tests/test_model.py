"""The model, its weights in and out, the optimizer groups and generation, against Hugging Face's and torch's own."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from fineweb import EOT, VOCAB_SIZE, UserError
from train_gpt2 import (
    GPT, SIZES, ChunkedCrossEntropy, Config, GPTConfig, causal_attention, get_lr, plain_attention, transpose_conv1d,
)  # fmt: skip


def make_hf(directory, **changes):
    """A random GPT-2 of Hugging Face's, with every tensor away from its initial value, and its directory."""
    torch.manual_seed(1)
    shape = dict(n_layer=3, n_head=4, n_embd=64, n_positions=48, vocab_size=50257, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    hf = GPT2LMHeadModel(GPT2Config(**shape | changes))
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.05 * torch.randn_like(p))
    hf.save_pretrained(directory)
    return hf.train()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf")
    return make_hf(directory), directory


def tokens(B=3, T=41):
    return torch.randint(VOCAB_SIZE, (B, T), generator=torch.Generator().manual_seed(2))


def test_logits_loss_and_gradients_equal_hugging_face(hf):
    theirs, directory = hf
    ours = GPT.from_pretrained(directory)
    assert ours.config == GPTConfig(block_size=48, vocab_size=50257, n_layer=3, n_head=4, n_embd=64)
    ids = tokens()
    logits, loss = ours(ids[:, :-1], ids[:, 1:])
    out = theirs(ids, labels=ids)
    torch.testing.assert_close(logits, out.logits[:, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, out.loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    theirs.zero_grad()
    out.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    reference = {name: transpose_conv1d(name, p.grad) for name, p in theirs.named_parameters()}
    assert grads.keys() == reference.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], reference[name], rtol=1e-4, atol=1e-6, msg=name)


def test_saved_weights_load_in_hugging_face_without_the_padding_rows(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "out")
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ids = tokens(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(tiny(ids)[0][..., :VOCAB_SIZE], theirs(ids).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == VOCAB_SIZE and config["eos_token_id"] == EOT and config["n_positions"] == 32
    back = GPT.from_pretrained(tmp_path / "out")
    back.append_vocab_rows(tiny.lm_head.weight[VOCAB_SIZE:])
    assert back.config == tiny.config and back.lm_head.weight is back.transformer.wte.weight
    for (name, a), (_, b) in zip(tiny.named_parameters(), back.named_parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "change", [dict(activation_function="gelu"), dict(n_inner=100), dict(tie_word_embeddings=False), dict(layer_norm_epsilon=1e-6)]
)
def test_what_is_no_plain_gpt2_is_refused(tmp_path, change):
    make_hf(tmp_path, n_layer=1, n_embd=16, n_head=2, **change)
    with pytest.raises(UserError, match=next(iter(change))):
        GPT.from_pretrained(tmp_path)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_hf(tmp_path, n_layer=1, n_embd=16, n_head=2)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.h.0.mlp.c_fc.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="c_fc.bias"):
        GPT.from_pretrained(tmp_path)


def test_a_directory_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        GPT.from_pretrained(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "name, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)]
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert GPT(GPTConfig(**SIZES[name])).num_params() == count


def test_flops_per_token_of_the_recipe():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    # by hand: 6 x (50257 x 768 + 12 blocks x 7,087,872 + 1,536) + 12 x 12 x 768 x 1024
    assert model.flops_per_token(1024) == 6 * (50257 * 768 + 12 * 7_087_872 + 1536) + 113_246_208


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
    loss = tiny(ids[:, :-1], ids[:, 1:])[1].item()
    assert abs(loss - math.log(50304)) < 0.1


def test_loss_is_cross_entropy_and_ignores_minus_100(tiny):
    ids = tokens(2, 20)
    targets = torch.where(torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.5, ids, -100)
    logits, loss = tiny(ids, targets)
    by_hand = -F.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0][targets != -100].mean()
    assert abs(loss.item() - by_hand.item()) < 1e-5
    assert tiny(ids, targets, return_logits=False)[0] is None and tiny(ids)[1] is None


@pytest.mark.parametrize("chunk, dtype, tolerance", [(1, None, 1e-5), (7, None, 1e-5), (512, None, 1e-5), (7, torch.bfloat16, 2e-2),
                                                     (7, torch.float16, 2e-3)])  # fmt: skip
def test_the_chunked_loss_equals_cross_entropy(tiny, monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setattr(ChunkedCrossEntropy, "CHUNK", chunk)
    idx, targets = torch.randint(50257, (2, 2, 10))
    targets[0, 3:5] = -100
    losses, gradients = [], []
    for chunked in (False, True):
        tiny.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = tiny(idx, targets, return_logits=not chunked)[1]
        (3 * loss).backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in tiny.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name, plain in gradients[0].items():
        assert (gradients[1][name] - plain).norm() <= tolerance * plain.norm(), name
    with torch.no_grad():
        assert tiny(idx, targets, return_logits=False)[1].item() == pytest.approx(tiny(idx, targets)[1].item(), abs=1e-5)


@pytest.mark.parametrize("T, heads", [(1, 2), (33, 6), (256, 1), (600, 2)])  # 600 tokens are done in three parts
def test_attention_on_the_cpu_in_bfloat16_equals_that_in_float64(T, heads):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1, T, heads, 16, generator=generator).transpose(1, 2).bfloat16() for _ in range(4)]
    found = []
    for attention, dtype in ((causal_attention, torch.bfloat16), (partial(F.scaled_dot_product_attention, is_causal=True), torch.float64)):
        q, k, v, dy = (t.to(dtype).detach().requires_grad_() for t in values)
        y = attention(q, k, v)
        found.append([y.detach(), *torch.autograd.grad(y, (q, k, v), dy)])
    for ours, exact in zip(*found):
        assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= 0.01 * exact.norm() + 1e-6  # seen: 0.004


def test_plain_attention_equals_that_of_torch_in_float32():
    q, k, v = torch.randn(3, 6, 33, 16, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(plain_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-5, atol=1e-5)


def test_too_long_a_context_is_said(tiny):
    with pytest.raises(ValueError, match="context of 32"):
        tiny(tokens(1, 33))


def test_weight_decay_groups(tiny):
    optimizer = tiny.configure_optimizers(0.1, 6e-4)
    decay, rest = optimizer.param_groups
    names = {id(p): name for name, p in tiny.named_parameters()}
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert all(n.endswith(".weight") and "ln_" not in n for n in (names.pop(id(p)) for p in decay["params"]))
    assert all(n.endswith(".bias") or "ln_" in n for n in (names.pop(id(p)) for p in rest["params"]))
    assert not names
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-8 and optimizer.defaults["fused"]


def test_fused_adamw_equals_the_paper_formula(tiny):
    """Three updates against Loshchilov and Hutter's algorithm 2, written out in float64."""
    optimizer = tiny.configure_optimizers(0.1, 1e-3)
    reference = [(p, p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()) for p in tiny.parameters()]
    for t in range(1, 4):
        ids = tokens(2, 17)
        tiny.zero_grad()
        tiny(ids[:, :-1], ids[:, 1:])[1].backward()
        for p, w, m, v in reference:
            g = p.grad.double()
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            w.mul_(1 - 1e-3 * (0.1 if p.dim() >= 2 else 0))
            w.sub_(1e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8))
        optimizer.step()
    for p, w, _, _ in reference:
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "step, lr", [(0, 6e-4 / 715), (356, 6e-4 * 357 / 715), (714, 6e-4), (715, 6e-4), (715 + 9179, 3.3e-4), (19073, 6e-5), (30000, 6e-5)]
)
def test_learning_rate_by_hand(step, lr):
    assert get_lr(step, Config()) == pytest.approx(lr, rel=1e-9)


# generation


def reference_generate(model, prompt, n, temperature, top_k, seed):
    """One row, no cache, no padding: the sampling loop as the lecture has it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt])
    for _ in range(n):
        logits = model(ids[:, -model.config.block_size :])[0][:, -1, :VOCAB_SIZE]
        probs, top = F.softmax(logits / temperature, -1).topk(top_k)
        ids = torch.cat([ids, top.gather(1, torch.multinomial(probs, 1, generator=generator))], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("n", [10, 40])  # within the context of 32, and past it
def test_generation_equals_the_plain_loop(tiny, use_cache, n):
    prompt = [5, 50256, 77, 1000]
    rows = tiny.generate([prompt], n, temperature=0.8, top_k=50, seed=7, use_cache=use_cache)
    with torch.no_grad():
        assert rows == [reference_generate(tiny, prompt, n, 0.8, 50, 7)]


def test_prompts_of_different_lengths_equal_each_alone(tiny):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [], [11, 12, 13]]
    together = tiny.generate(prompts, 12, temperature=0)
    alone = [tiny.generate([p], 12, temperature=0)[0] for p in prompts]
    assert together == alone
    assert [len(r) for r in together] == [19, 13, 13, 15] and together[2][0] == EOT
    assert together == tiny.generate(prompts, 12, temperature=0, use_cache=False)


def test_no_id_of_50257_or_more_is_ever_drawn(tiny):
    with torch.no_grad():
        tiny.lm_head.weight[VOCAB_SIZE:] *= 1000  # padding rows that would win every draw
    rows = tiny.generate([[1], [2]], 25, top_k=0, temperature=2.0)
    assert max(max(r) for r in rows) < VOCAB_SIZE


def test_rows_stop_at_end_of_text_if_asked(tiny):
    with torch.no_grad():
        tiny.transformer.wte.weight[:] = 0
        tiny.transformer.wte.weight[EOT] = 1
        tiny.transformer.ln_f.weight[:] = 0
        tiny.transformer.ln_f.bias[:] = 1  # every position now predicts <|endoftext|>
    assert tiny.generate([[1, EOT, 2], [3]], 5, temperature=0, stop_at_eot=True) == [[1, EOT, 2], [3]]
    assert tiny.generate([[3]], 2, temperature=0) == [[3, EOT, EOT]]


def test_generation_moves_no_other_random_stream_and_refuses_bad_ids(tiny):
    before = torch.get_rng_state()
    assert tiny.generate([[1]], 5, seed=3) == tiny.generate([[1]], 5, seed=3) != tiny.generate([[1]], 5, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="50256"):
        tiny.generate([[50257]], 1)
