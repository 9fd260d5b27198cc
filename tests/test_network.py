"""The network: its size and initial weights, its weights in files, what it samples, and the same
network computed in other ways. (test_6 and test_7 of test_invariants.py have the rest.)"""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import FAULTS, run_here, train
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, TopPLogitsWarper

import train_gpt2
from fineweb import EOT, VOCAB_SIZE, UserError, gpt2_tokenizer, load_tokenizer
from train_gpt2 import GPT, SIZES, Args, CausalSelfAttention, CPUCrossEntropy, GPTConfig
from train_gpt2 import print_samples

OFF = torch.autocast("cpu", torch.bfloat16, enabled=False)
SMALL = dict(block_size=8, n_layer=1, n_head=1, n_embd=8)


def random_ids(B, T, vocab_size=VOCAB_SIZE):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(2))


# Sizes, initial weights -----------------------------------------------------------------------

COUNTS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168}
COUNTS |= {"gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_sizes(name, count):
    """Parameters and FLOPs: 6 for each weight but those of the positions, and attention's."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES[name]))
    C, loader = SIZES[name]["n_embd"], SimpleNamespace(device=torch.device("cpu"), world_size=1)
    flops = 6 * (count - 1024 * C) + 12 * SIZES[name]["n_layer"] * C * 1024
    assert model.num_params() == count
    assert train_gpt2.Progress(Args(), model, loader).flops_per_token == flops


def test_initial_weights(tiny):
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=128, vocab_size=4096, n_layer=8, n_head=4, n_embd=128))
    # The tied tensor still holds the first draw from the seed, so it is initialized once.
    first = torch.empty(4096, 128).normal_(0, 0.02, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    model.init_weights()
    assert torch.equal(model.transformer.wte.weight, first)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(p.std().item() / std - 1) < 0.03 and abs(p.mean().item()) < 0.1 * std, name
    ids = random_ids(4, 33)
    assert abs(tiny(ids[:, :-1], ids[:, 1:]).item() - math.log(50304)) < 0.1  # a uniform guess


# Weights in files -----------------------------------------------------------------------------


def random_hugging_face(directory, **changes):
    """Save and return a random GPT-2 of Hugging Face's, with no tensor at its initial value."""
    torch.manual_seed(1)
    shape = dict(n_layer=3, n_head=4, n_embd=64, n_positions=48, vocab_size=50257)
    dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = GPT2LMHeadModel(GPT2Config(**shape | dropout | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(directory)
    return model.train()


def change_file(directory, change):
    """Replace the tensors of model.safetensors by change({name: tensor})."""
    state = change(load_file(directory / "model.safetensors"))
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def as_openai(state):
    """The tensors as OpenAI's files have them: with shorter names, and with masks."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    mask = torch.ones(1, 1, 48, 48).tril()
    return state | {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}


REFUSED = {  # what is said: (settings in config.json, a change of the tensors)
    "activation_function": (dict(activation_function="gelu"), dict),
    "n_inner": (dict(n_inner=100), dict),
    "layer_norm_epsilon": (dict(layer_norm_epsilon=1e-6), dict),
    "scale_attn_weights": (dict(scale_attn_weights=False), dict),
    "scale_attn_by_inverse": (dict(scale_attn_by_inverse_layer_idx=True), dict),
    "tie_word_embeddings": (dict(tie_word_embeddings=False), dict),
    "tensors are missing": ({}, lambda state: {k: t for k, t in state.items() if "bias" not in k}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_no_gpt2_is_refused(tmp_path, sentence):
    """An activation, a scale or a tensor that differs would give another loss without a word."""
    settings, change = REFUSED[sentence]
    random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_head=2, **settings)
    change_file(tmp_path, change)
    with pytest.raises(UserError, match=sentence):
        GPT.from_pretrained(tmp_path)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    """n_inner may be given as 4 * n_embd, and dropout is off when a model is not trained."""
    theirs = random_hugging_face(tmp_path, n_layer=1, n_embd=16, n_inner=64, resid_pdrop=0.1).eval()
    ids = random_ids(2, 9)
    logits = GPT.from_pretrained(tmp_path)(ids)
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


ROWS = [(50304, 50257, 50257), (50400, 50400, 50400), (300, 280, 280), (300, VOCAB_SIZE, 300)]


@pytest.mark.parametrize("vocab_size, n_tokens, rows", ROWS)
def test_the_rows_that_pad_the_vocabulary_are_not_saved(tmp_path, vocab_size, n_tokens, rows):
    """The last case is a checkpoint that says nothing of n_tokens: it has no padding."""
    model = GPT(GPTConfig(vocab_size=vocab_size, n_tokens=n_tokens, **SMALL))
    train_gpt2.save_hugging_face(model, gpt2_tokenizer(), tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.config.vocab_size == rows and back.lm_head.weight is back.transformer.wte.weight
    assert torch.equal(back.lm_head.weight, model.lm_head.weight[:rows])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_positions"] == config["n_ctx"] == 8 and config["eos_token_id"] == EOT
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0


# Sampling -------------------------------------------------------------------------------------


def test_sampling_has_its_own_random_numbers(tiny):
    before, idx = torch.get_rng_state(), torch.tensor([[1]])
    same, again, other = (tiny.generate(idx, 9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert torch.equal(before, torch.get_rng_state())


def test_with_the_cache_each_token_is_computed_once(tiny):
    seen = []
    tiny.transformer.wte.register_forward_hook(lambda m, args, out: seen.append(out.size(1)))
    tiny.generate(random_ids(2, 30), 4)  # the context of 32 tokens moves on at the end
    tiny.generate(random_ids(2, 5), 4, use_cache=False)
    assert seen == [30, 1, 1, 32] + [5, 6, 7, 8]


@pytest.mark.parametrize("n_tokens", [65, 128])
def test_ids_that_only_pad_are_never_drawn_and_all_others_may_be(n_tokens):
    model = GPT(GPTConfig(vocab_size=128, n_tokens=n_tokens, **SMALL))
    with torch.no_grad():
        model.lm_head.weight[65:] *= 1000
    ids = model.generate(torch.zeros(4, 1, dtype=torch.int64), 32, top_k=0)
    assert ids.max() < n_tokens and (ids >= 65).any() == (n_tokens == 128)


@pytest.mark.parametrize("top_p, n", [(1e-9, 1), (0.6, 2), (0.7, 8)])
def test_top_p_samples_from_the_same_tokens_as_transformers(top_p, n):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=32))
    with torch.no_grad():
        model.transformer.wte.weight *= 10
        idx = torch.tensor([[5, 77, 100]])
        keep = TopPLogitsWarper(top_p)(None, model(idx)[:, -1] / 0.7)[0].isfinite()
    drawn = model.generate(idx.repeat(20_000, 1), 1, 0.7, top_k=0, top_p=top_p)[:, -1]
    assert drawn.unique().tolist() == keep.nonzero()[:, 0].tolist() and keep.sum() == n


def test_sampling_flags_reach_the_samples(base, tmp_path, monkeypatch):
    """Of a training run, and of --sample_only with a checkpoint or with the folder of its run,
    whose random numbers also depend on --seed."""
    seen, original = [], GPT.generate

    def generate(self, idx, max_new_tokens, **options):
        seen.append((idx.tolist(), max_new_tokens, options))
        return original(self, idx, max_new_tokens, **options)

    monkeypatch.setattr(GPT, "generate", generate)
    flags = "--sample_tokens 3 --temperature 0.7 --top_k 9 --top_p 0.8 --prompt".split()
    train(base[0], tmp_path / "out", *flags, "Once", "--max_steps", 1, "--sample_every", 1)
    given, once = dict(temperature=0.7, top_k=9, top_p=0.8), load_tokenizer(base[0]).encode("Once")
    assert seen == [([once.tolist()] * 4, 3, dict(given, seed=42))] * 2
    flags = [*flags, "", "--sample_only", "--device", "cpu", "--dtype", "float32", "--seed", 7]
    screen = run_here(*flags, "--init_from", base[1] / "step_00008").stdout
    assert run_here(*flags, "--resume", "--out_dir", base[1]).stdout == screen
    # An empty prompt means <|endoftext|>, which begins each document.
    assert seen[2:] == [([[256]] * 4, 3, dict(given, seed=7))] * 2 and screen.startswith("> ")


SHE, SAYS = [25001, 117], [46237, 112]  # each character is two tokens
ENDS = [([*SHE, *SAYS], "她说"), ([*SHE, SAYS[0]], "她"), ([*SHE, EOT, *SAYS], "她"), ([EOT], "")]


@pytest.mark.parametrize("new, text", ENDS)
def test_a_sample_ends_at_end_of_text_and_shows_no_half_character(monkeypatch, capsys, new, text):
    model = GPT(GPTConfig(vocab_size=300, **SMALL))
    new = torch.tensor([new] * 4)
    monkeypatch.setattr(model, "generate", lambda idx, *a, **options: torch.cat([idx, new], 1))
    print_samples(model, gpt2_tokenizer(), Args(prompt="x"), OFF)
    assert capsys.readouterr().out == f"> x{text}\n" * 4


# Faster code for CPUs: the same loss, and the same gradient of every parameter -----------------


@pytest.fixture
def one_process():  # a process group of this process alone, which DDP needs
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def medium():
    """(model, idx, targets): two layers, few tokens in the vocabulary, and a context of 600, which
    both kernels cut into three parts. Some targets do not count."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=600, vocab_size=300, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():  # away from the initial values, so that attention matters
            p.add_(0.1 * torch.randn_like(p))
    idx, targets = torch.randint(300, (2, 2, 600))
    targets[1, 500:] = -100
    return model, idx, targets


def with_cpu_kernels(model, dtype, compile=False):
    """A copy of the model, after use_cpu_kernels; and the autocast of that precision."""
    model = copy.deepcopy(model)
    train_gpt2.use_cpu_kernels(model, Args(dtype=dtype, compile=compile))
    autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")
    return model, autocast


def assert_same_loss_and_gradients(network, model, autocast, medium, tolerance):
    """As GPT has them in float64, up to this part of the norm of each gradient. The loss is
    multiplied by 3, because its gradient must take part in that."""
    exact, idx, targets = copy.deepcopy(medium[0]).double(), *medium[1:]
    logits = exact(idx)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (3 * expected).backward()
    with autocast:
        loss = network(idx, targets)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=tolerance)
    reference = dict(exact.named_parameters())
    for name, p in model.named_parameters():
        grad = reference[name].grad
        assert p.grad.dtype == torch.float32 and grad.norm() > 0, name
        assert (p.grad - grad).norm() <= tolerance * grad.norm(), name
    with torch.no_grad(), autocast:  # as in validation, and when HellaSwag is scored
        assert model(idx, targets).item() == pytest.approx(loss.item(), abs=1e-5)
        assert (model(idx) - logits).norm() <= tolerance * logits.norm()


PRECISIONS = [("float32", 1e-5), ("bfloat16", 3e-2), ("float16", 3e-3)]


@pytest.mark.parametrize("wrapper", [lambda model: model, DDP])
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_cpu_kernels_change_no_result(one_process, medium, dtype, tolerance, wrapper):
    model, autocast = with_cpu_kernels(medium[0], dtype)
    assert_same_loss_and_gradients(wrapper(model), model, autocast, medium, tolerance)


@FAULTS
@pytest.mark.parametrize("wrapper", [lambda model: model, DDP])
def test_cpu_kernels_change_no_result_under_torch_compile(one_process, medium, wrapper):
    """In bfloat16; in the other precisions they replace nothing that is compiled."""
    model, autocast = with_cpu_kernels(medium[0], "bfloat16", compile=True)
    torch.compiler.reset()
    network = wrapper(torch.compile(model, dynamic=False))
    assert_same_loss_and_gradients(network, model, autocast, medium, 3e-2)


@torch.no_grad()
def test_an_evaluation_on_a_cpu_computes_no_gradients(tiny):
    x, targets = torch.randn(2, 16, 32), torch.zeros(2, 16, dtype=torch.int64)
    weight = tiny.lm_head.weight  # (V, C)
    with FlopCounterMode(display=False) as counter:
        CPUCrossEntropy.apply(x, weight, targets)
    assert counter.get_total_flops() == 2 * 2 * 16 * weight.numel()  # only the logits


@pytest.mark.parametrize("rows", [1, 10, 33, 100])  # 10: the last part has fewer rows
def test_cpu_kernels_may_cut_anywhere(monkeypatch, tiny, rows):
    """In float32, where they equal the network's own code."""
    monkeypatch.setattr(train_gpt2.CPUCrossEntropy, "ROWS", rows)
    x = torch.randn(2, 33, 48)
    attn = CausalSelfAttention(GPTConfig(n_head=3, n_embd=48))
    ours = train_gpt2.cpu_attention(attn, x, rows)
    torch.testing.assert_close(ours, attn(x), rtol=1e-5, atol=1e-5)
    idx, targets = random_ids(4, 16).split(2)
    expected = tiny(idx, targets)
    loss = train_gpt2.cpu_forward(tiny, idx, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cpu_kernels_replace_what_is_slower(medium, dtype, compile):
    """Attributes named forward hide the methods of the classes."""
    model, _ = with_cpu_kernels(medium[0], dtype, compile)
    assert ("forward" in vars(model)) == (not compile)
    for block in model.transformer.h:
        assert ("forward" in vars(block.attn)) == (dtype == "bfloat16")
