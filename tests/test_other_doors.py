"""Programs outside of the requirements open a checkpoint. A test skips where its tool is missing:

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
from conftest import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from fineweb import VOCAB_SIZE, tokenizer
from train_gpt2 import GPT

STRANGE = [
    "",
    " ",
    "\n \n\n",
    "I'm it’s I'LL",
    " \u00a0a",
    "\u2028\x1c",
    "a\u0301",
    "١٢٣ ½",
    "👩‍👩‍👧 🇩🇪",
]
STRANGE += [
    "你好",
    "x" * 99,
    " " * 99,
    "a<|endoftext|>b",
    "\r\n\t",
    "\u200b\ufeff",
    "SolidGoldMagikarp",
]
N = 12  # new tokens


@pytest.fixture(scope="module")
def expected(saved):
    """For each prompt: its ids, its N most likely next tokens, and the logits of them all."""
    model, _ = saved
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer().encode_ordinary(prompt)
        new = model.generate(torch.tensor([ids]), N, temperature=0)[0, len(ids) :].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids + new]))[0, :, :VOCAB_SIZE].numpy()
        rows.append((ids, new, logits))
    return rows


def test_ctranslate2(saved, expected, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    directory = str(saved[1])
    ctranslate2.converters.TransformersConverter(directory).convert(str(tmp_path / "ct2"))
    to_tokens = AutoTokenizer.from_pretrained(directory).convert_ids_to_tokens
    generator = ctranslate2.Generator(
        str(tmp_path / "ct2"), compute_type="float32", intra_threads=1
    )
    options = dict(max_length=N, sampling_topk=1, include_prompt_in_result=False)
    for (
        ids,
        new,
        logits,
    ) in expected:  # one at a time: version 4.8.5 shifts a batch's shorter prompts
        (result,) = generator.generate_batch([to_tokens(ids)], **options)
        assert result.sequences_ids[0] == new
        found = np.array(generator.forward_batch([to_tokens(ids + new)]))[0]
        np.testing.assert_allclose(found[:, :VOCAB_SIZE], logits, atol=1e-3)


def test_peft_adapts_and_merges(saved, expected, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(saved[1])
    where = dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **where))
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


def test_onnx(saved, expected, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = GPT2LMHeadModel.from_pretrained(saved[1]).eval()

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        Logits(),
        (torch.tensor([[1, 2, 3]]),),
        path,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes=({1: torch.export.Dim("T", min=2, max=256)},),
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
        assert found == tokenizer().encode_ordinary(text)
    for ids, new, logits in expected:
        model.reset()
        model.eval(ids + new)
        found = np.array(model.scores[: len(ids + new)])
        np.testing.assert_allclose(found, logits, atol=0.02)  # float16 cache, a table for GELU
        model.reset()
        generated = model.generate(ids, temp=0.0, repeat_penalty=1.0)
        assert [token for token, _ in zip(generated, range(N))] == new
