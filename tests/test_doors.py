"""Other programs open a checkpoint as it is. Those that are not among the requirements are skipped
where they are missing:

    pip install ctranslate2 peft onnx onnxscript onnxruntime llama-cpp-python

LLAMA_CPP is the folder of llama.cpp's source, which has its converter. (llama-cpp-python's source
distribution has it in vendor/; the wheel does not.)"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROMPTS, QUIET, STEPS, log_of, run_here
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

from fineweb import VOCAB_SIZE, gpt2_tokenizer
from train_gpt2 import GPT

N = 12  # new tokens
STRANGE = ["", " ", "\n \n\n", "I'm it’s I'LL", " \u00a0a", "\u2028\x1c", "a\u0301", "١٢٣ ½"]
STRANGE += ["👩‍👩‍👧 🇩🇪", "你好", "x" * 99, " " * 99, "a<|endoftext|>b", "\r\n\t", "\u200b\ufeff"]


@pytest.fixture(scope="module")
def expected(saved):
    """For each prompt: its ids, its N most likely next tokens, and the logits of them all. The
    tokens vary, so a wrong position or mask would change them."""
    model, _ = saved
    rows = []
    for prompt in PROMPTS:
        ids = gpt2_tokenizer().encode(prompt).tolist()
        new = model.generate(torch.tensor([ids]), N, temperature=0)[0, len(ids) :].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids + new]))[0, :, :VOCAB_SIZE].numpy()
        rows.append((ids, new, logits))
    assert len({token for _, new, _ in rows for token in new}) > 10
    return rows


# transformers ---------------------------------------------------------------------------------


def test_auto_model_has_the_logits_and_auto_tokenizer_the_ids(saved, expected):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    tokenizer = AutoTokenizer.from_pretrained(saved[1])
    assert isinstance(model, GPT2LMHeadModel) and model.dtype == torch.float32
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    for prompt, (ids, new, logits) in zip(PROMPTS, expected):
        assert tokenizer(prompt)["input_ids"] == ids
        with torch.no_grad():
            found = model(torch.tensor([ids + new])).logits[0].numpy()
        np.testing.assert_allclose(found, logits, atol=1e-3)
    for text in STRANGE:
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == list(
            gpt2_tokenizer().encode(text)
        )


def test_a_pipeline_generates_what_generate_does(saved, expected):
    """Of one prompt, and of a batch of prompts of different lengths, which are padded."""
    write = pipeline("text-generation", str(saved[1]))
    options = dict(do_sample=False, max_new_tokens=N, return_tensors=True)
    one = [write(prompt, **options)[0] for prompt in PROMPTS]
    batch = [found[0] for found in write(PROMPTS, batch_size=4, **options)]
    for (_, new, _), *found in zip(expected, one, batch):
        for theirs in found:
            assert theirs["generated_token_ids"][-N:] == new


def test_a_pipeline_without_arguments_stays_within_the_context(saved):
    """transformers asks for 256 new tokens where generation_config.json has no max_length."""
    write = pipeline("text-generation", str(saved[1]))
    found = write("Once", return_tensors=True)[0]["generated_token_ids"]
    assert 1 < len(found) <= saved[0].config.block_size == 256


def test_a_checkpoint_has_its_validation_loss_in_transformers_and_in_another_run(base, tmp_path):
    """The loss in log.txt is that of transformers' GPT-2 on the same 480 tokens. A run that starts
    from the checkpoint by --init_from begins with it."""
    shards, out, _ = base
    model = GPT2LMHeadModel.from_pretrained(out / "step_00008")
    ids = np.load(shards / "made_val_000000.npy")[: 15 * 32 + 1].astype(np.int64)
    ids = torch.from_numpy(ids)
    with torch.no_grad():
        logits = model(ids[:-1].view(15, 32)).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, ids[1:]).item()
    assert log_of(out)["val"][8] == pytest.approx(loss, abs=1e-5)
    flags = [*QUIET, *STEPS, "--seq_len", 32, "--device", "cpu", "--dtype", "float32"]
    flags += ["--init_from", out / "step_00008", "--max_steps", 1, "--data_dir", shards]
    done = run_here(*flags, "--out_dir", tmp_path / "out")
    assert "block_size=64, vocab_size=257" in done.stdout
    assert log_of(tmp_path / "out")["val"][0] == pytest.approx(loss, abs=1e-5)


# Others ---------------------------------------------------------------------------------------


def test_ctranslate2(saved, expected, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder = str(tmp_path / "ct2")
    ctranslate2.converters.TransformersConverter(str(saved[1])).convert(folder)
    to_tokens = AutoTokenizer.from_pretrained(saved[1]).convert_ids_to_tokens
    generator = ctranslate2.Generator(folder, compute_type="float32", intra_threads=1)
    options = dict(max_length=N, sampling_topk=1, include_prompt_in_result=False)
    # One at a time, because version 4.8.5 shifts the shorter prompts of a batch.
    for ids, new, logits in expected:
        (result,) = generator.generate_batch([to_tokens(ids)], **options)
        assert result.sequences_ids[0] == new
        found = np.array(generator.forward_batch([to_tokens(ids + new)]))[0]
        np.testing.assert_allclose(found[:, :VOCAB_SIZE], logits, atol=1e-3)


def test_peft_adapts_and_merges(saved, expected, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    where = dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **where))
    ids = torch.tensor([expected[0][0]])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        adapted = model.eval()(ids).logits
        model.merge_and_unload().save_pretrained(tmp_path)
        torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids), adapted, atol=1e-3, rtol=0)
    before = torch.tensor(expected[0][2][: ids.size(1)])
    assert (adapted[0] - before).abs().max() > 0.1


def test_onnx_runtime(saved, expected, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = GPT2LMHeadModel.from_pretrained(saved[1]).eval()

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    path = str(tmp_path / "model.onnx")
    lengths = torch.export.Dim("T", min=2, max=256)
    torch.onnx.export(
        Logits(),
        (torch.tensor([[1, 2, 3]]),),
        path,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes=({1: lengths},),
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for ids, new, logits in expected:
        (found,) = session.run(None, {"input_ids": np.array([ids + new])})
        np.testing.assert_allclose(found[0], logits, atol=1e-3)


def test_llama_cpp(saved, expected, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    script = Path(os.environ.get("LLAMA_CPP", "none")) / "convert_hf_to_gguf.py"
    if not script.exists():
        pytest.skip("LLAMA_CPP names no folder of llama.cpp")
    gguf = tmp_path / "model.gguf"
    convert = [sys.executable, script, saved[1], "--outtype", "f32", "--outfile", gguf]
    subprocess.run(convert, check=True, capture_output=True)
    options = dict(n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    model = llama_cpp.Llama(str(gguf), **options)
    assert (model.token_bos(), model.token_eos()) == (50256, 50256)
    for text in STRANGE + PROMPTS:
        found = model.tokenize(text.encode(), special=False)
        assert found == gpt2_tokenizer().encode(text).tolist()
    for ids, new, logits in expected:
        model.reset()
        model.eval(ids + new)
        found = np.array(model.scores[: len(ids + new)])
        np.testing.assert_allclose(found, logits, atol=0.02)  # float16 cache, a table for GELU
        model.reset()
        generated = model.generate(ids, temp=0.0, repeat_penalty=1.0)
        assert [token for token, _ in zip(generated, range(N))] == new
