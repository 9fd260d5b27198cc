"""Other ways into a run and out of it: other tools that open a checkpoint, presets of settings,
other vocabularies, TensorBoard and Weights & Biases, machines that are not this one."""

import errno
import io
import json
import os
import re
import shlex
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import FAULTS, PROMPTS, log_of, refused, run_here, train, write_shards
from tokenizers import ByteLevelBPETokenizer
from torch._inductor.exc import GPUTooOldForTriton, TritonMissing
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TopPLogitsWarper,
    pipeline,
)

import fineweb
import hellaswag
import train_gpt2
from fineweb import tokenizer
from train_gpt2 import (
    GPT,
    Args,
    GPTConfig,
    find_checkpoints,
    parse,
    read_checkpoint,
    save_hugging_face,
    saved_args,
)

# -- other tools open a checkpoint as it is


@FAULTS
def test_auto_tokenizer_equals_tiktoken_on_every_code_point(saved):
    theirs, ours = AutoTokenizer.from_pretrained(saved[1]), tokenizer()
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(f"a{c}1 {c}!" for c in characters[i : i + 512]) for i in range(0, 2**20, 512)]
    assert theirs(texts)["input_ids"] == [ours.encode_ordinary(text) for text in texts]
    assert theirs.pad_token == theirs.eos_token == "<|endoftext|>"
    assert theirs.model_max_length == 256


def test_auto_tokenizer_equals_tiktoken_on_a_corpus(saved):
    from pydoc_data.topics import topics

    theirs = AutoTokenizer.from_pretrained(saved[1])
    for text in topics.values():
        assert theirs(text)["input_ids"] == tokenizer().encode_ordinary(text)


def test_a_pipeline_generates_what_generate_does(saved):
    """The most likely tokens, of one prompt and of a batch with prompts of different lengths, which
    are padded. They vary, so a wrong position or mask would change them."""
    model, directory = saved
    write = pipeline("text-generation", str(directory))
    options = dict(do_sample=False, max_new_tokens=12, return_tensors=True)
    one = [write(prompt, **options)[0] for prompt in PROMPTS]
    batch = [found[0] for found in write(PROMPTS, batch_size=4, **options)]
    rows = []
    for prompt, *found in zip(PROMPTS, one, batch):
        ids = tokenizer().encode_ordinary(prompt)
        ours = model.generate(torch.tensor([ids]), 12, temperature=0)[0, len(ids) :].tolist()
        rows.append(ours)
        for theirs in found:
            assert theirs["generated_token_ids"][-12:] == ours
    assert len({token for row in rows for token in row}) > 10


def test_a_pipeline_without_arguments_stays_within_the_context(saved):
    """transformers asks for 256 new tokens where generation_config.json has no max_length."""
    write = pipeline("text-generation", str(saved[1]))
    assert write("Once")[0]["generated_text"].startswith("Once")
    assert len(write("Once", return_tensors=True)[0]["generated_token_ids"]) <= 256


def test_the_tokenizers_files_are_in_the_forms_of_older_readers_too(saved):
    """tokenizers before 0.20 read a merge as "t h"; transformers 4 reads vocab.json, merges.txt."""
    whole = json.loads((saved[1] / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in whole["model"]["merges"])
    assert json.loads((saved[1] / "vocab.json").read_text()) == whole["model"]["vocab"]
    merges = (saved[1] / "merges.txt").read_text().splitlines()
    assert merges[0].startswith("#version") and merges[1:] == whole["model"]["merges"]
    old = ByteLevelBPETokenizer(str(saved[1] / "vocab.json"), str(saved[1] / "merges.txt"))
    text = "Hello, wörld 東京 🙂  x+=1;"
    assert old.encode(text).ids == tokenizer().encode_ordinary(text)
    settings = json.loads((saved[1] / "tokenizer_config.json").read_text())
    assert settings["clean_up_tokenization_spaces"] is False


def test_with_a_pad_token_of_its_own_a_model_can_learn_to_stop(saved):
    """Collators give padding the label -100, which has no loss. README's line keeps the label of
    <|endoftext|>."""
    theirs = AutoTokenizer.from_pretrained(saved[1])
    collate = DataCollatorForLanguageModeling(theirs, mlm=False)
    examples = [{"input_ids": theirs(text)["input_ids"]} for text in ("Hello<|endoftext|>", "Hi")]
    assert fineweb.EOT not in collate(examples)["labels"]
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    labels = collate(examples)["labels"]
    assert labels[0, -1] == fineweb.EOT and labels[1, -1] == -100


def test_the_model_card_has_the_evaluations_of_its_step(base):
    card = (base[1] / "step_00008" / "README.md").read_text()
    header, text = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(header) == dict(
        license="mit", language="en", library_name="transformers", pipeline_tag="text-generation"
    )
    assert f"validation loss | {log_of(base[1])['val'][8]:.4f} after 8 steps" in text
    assert "| 8 of 8 steps, 2,048 tokens |" in text
    command = re.search("`(python train_gpt2.py .*)`", text)[1]
    assert "--n_embd 32" in command and "out_dir" not in command and str(base[0].parent) not in card
    again = parse([*shlex.split(command)[2:], "--device", "cpu", "--no-compile"])[0]
    saved_settings = asdict(saved_args(read_checkpoint(base[1] / "step_00008")))
    for name in ("out_dir", "data_dir", "compile"):
        saved_settings.pop(name)
    assert saved_settings.items() <= asdict(again).items()


def test_the_model_card_names_the_data_set_and_openais_model(tmp_path):
    fineweb.build_demo(tmp_path / "shards")
    (manifest,) = fineweb.read_manifests(tmp_path / "shards")
    manifest.source, manifest.revision = ["HuggingFaceFW/fineweb-edu", "sample-10BT"], "abc"
    manifest.save(tmp_path / "shards")
    model = GPT(GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=4))
    args = Args(init_from="gpt2", data_dir=str(tmp_path / "shards"))
    card = train_gpt2.model_card(args, model, "v1", 3, [(1, "hella", "0.5"), (9, "hella", "0.9")])
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert header["base_model"] == "openai-community/gpt2"
    assert "| HellaSwag, acc_norm | 0.5000 after 1 steps |" in card and "(commit v1)" in card
    assert f"GPT-2 with {model.num_params() - 47 * 4:,} parameters" in card


def test_no_tokenizer_for_another_vocabulary(tmp_path):
    for vocab_size in (65, 50400):
        model = GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=4))
        save_hugging_face(model, tmp_path / str(vocab_size))
        names = {path.name for path in (tmp_path / str(vocab_size)).iterdir()}
        assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_lm_evaluation_harness_agrees(saved, tmp_path, monkeypatch):
    """Its own hellaswag task, on items that are made here, compared with --style harness."""
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.models.huggingface import HFLM

    words = "a cat the dog [x] under. [title] runs then  quickly Paris jumps, and over 7 café"
    words, r = words.split(" "), np.random.default_rng(0)

    def text():
        return "the " + " ".join(r.choice(words, size=r.integers(3, 12)))

    records = [
        dict(ind=i, activity_label="Sports", ctx_a=text(), ctx_b=text(), label=i % 4)
        | dict(endings=[text() for _ in range(4)])
        for i in range(24)
    ]
    records = [record | dict(ctx=f"{record['ctx_a']} {record['ctx_b']}") for record in records]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    items = hellaswag.load_items(path, style="harness")
    ours = hellaswag.evaluate(saved[0], items, "cpu")
    data = datasets.Dataset.from_list(
        [record | dict(label=str(record["label"])) for record in records]
    )
    splits = datasets.DatasetDict(train=data, validation=data)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: splits)
    model = HFLM(str(saved[1]), device="cpu", batch_size=4)
    found = lm_eval.simple_evaluate(model, tasks=["hellaswag"], bootstrap_iters=0)
    theirs = found["results"]["hellaswag"]
    assert theirs["acc,none"] == pytest.approx(ours.acc)
    assert theirs["acc_norm,none"] == pytest.approx(ours.acc_norm)


def test_a_step_of_gold_distils_from_another_tokenizer(saved, tmp_path):
    """The README's recipe, with a small Llama whose tokenizer is made here as the teacher."""
    gold = pytest.importorskip("trl.experimental.gold")
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    teacher, shape = str(tmp_path / "teacher"), dict(hidden_size=32, intermediate_size=64)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tok.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    names = dict(bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=tok, **names).save_pretrained(teacher)
    shape |= dict(num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **shape)).save_pretrained(teacher)
    pairs = Dataset.from_list([dict(prompt="the cat", completion=" sat on the mat")] * 4)
    args = gold.GOLDConfig(
        str(tmp_path / "distilled"),
        teacher_tokenizer_name_or_path=teacher,
        use_uld_loss=True,
        use_cpu=True,
        max_length=64,
        max_completion_length=8,
        max_steps=1,
        report_to=[],
        per_device_train_batch_size=2,
        learning_rate=1e-3,
    )
    trainer = gold.GOLDTrainer(str(saved[1]), teacher, args, train_dataset=pairs)
    before = trainer.model.transformer.wte.weight.detach().clone()
    result = trainer.train()
    assert np.isfinite(result.training_loss) and result.global_step == 1
    assert not torch.equal(before, trainer.model.transformer.wte.weight)


# -- machines that are not this one


def test_a_checkpoint_is_saved_where_folders_cannot_be_opened(base, tmp_path, monkeypatch):
    """As on Windows: os.open refuses a directory, and os.fsync a handle that only reads."""
    original_open, original_fsync = os.open, os.fsync

    def open_file(path, *args, **kw):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return original_open(path, *args, **kw)

    def fsync(number):
        import fcntl

        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return original_fsync(number)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", fsync)
    train(base[0], tmp_path / "out", "--max_steps", 1)
    assert [step for step, _ in find_checkpoints(tmp_path / "out")] == [1]


OLD = SimpleNamespace(name="Tesla P100", major=6, minor=0)


@pytest.mark.parametrize("error", [TritonMissing(None), GPUTooOldForTriton(OLD, None)])
def test_compiling_without_triton_is_refused(base, tmp_path, monkeypatch, error):
    def compile(*args, **kw):
        raise error

    monkeypatch.setattr(torch, "compile", compile)
    done = train(base[0], tmp_path / "out", "--compile", check=False)
    refused(done, "torch.compile does not work here")
    assert "add --no-compile" in done.stderr


# -- presets


def settings(*flags):
    return asdict(parse(["--device", "cpu", *map(str, flags)])[0])


TABLE = {  # GPT-3 table 2.1: learning rate, batch in tokens (rounded to powers of two), context
    "gpt2": (6e-4, 2**19, 1024),
    "gpt2-medium": (3e-4, 2**19, 1024),
    "gpt2-large": (2.5e-4, 2**19, 1024),
    "gpt2-xl": (2e-4, 2**20, 1024),
    "gpt3-125M": (6e-4, 2**19, 2048),
}


@pytest.mark.parametrize("name, row", TABLE.items())
def test_a_size_sets_its_learning_rate_and_batch(name, row):
    found = settings("--model", name)
    assert (found["max_lr"], found["total_batch_size"], found["seq_len"]) == row
    assert found["min_lr"] == pytest.approx(0.1 * row[0])
    assert found["max_steps"] * row[1] == pytest.approx(10e9, rel=1e-3)
    assert found["warmup_steps"] * row[1] == pytest.approx(375e6, rel=1e-2)
    other = settings("--model", name, "--max_lr", 1e-3, "--total_batch_size", 1024)
    assert (other["max_lr"], other["total_batch_size"]) == (1e-3, 1024)
    assert settings(f"--model={name}")["max_lr"] == row[0]


def test_the_effective_settings_are_printed(base, tmp_path):
    done = train(base[0], tmp_path / "out", "--model", "gpt2-xl", "--max_steps", 1)
    line = next(line for line in done.stdout.splitlines() if line.startswith("settings: "))
    assert "model gpt2-xl" in line and "max_steps 1," in line and "min_lr 0.001," in line
    assert "block_size=64" in done.stdout


def test_gpt3_has_a_context_of_2048():
    args = Args(**settings("--model", "gpt3-125M", "--n_layer", 1, "--n_embd", 12))
    assert train_gpt2.SIZES["gpt3-125M"] == train_gpt2.SIZES["gpt2"]
    assert train_gpt2.build_model(args).config.block_size == 2048


def test_presets_can_be_combined_and_resumed(tmp_path, monkeypatch):
    """A flag counts more than --demo, --demo more than --finetune, and that more than --model. A
    run is resumed in the folder that the preset trains in."""
    monkeypatch.chdir(tmp_path)
    found = settings("--finetune", "--model", "gpt2-xl", "--epochs", 0)
    assert (found["max_lr"], found["max_steps"], found["out_dir"]) == (3e-5, 9537, "tuned")
    assert found["init_from"] == "gpt2"
    found = settings("--demo", "--finetune", "--epochs", 0, "--max_lr", 1e-3, "--sample_only")
    assert (found["max_lr"], found["n_layer"], found["val_every"]) == (1e-3, 4, 90)
    asked = []
    monkeypatch.setattr(train_gpt2, "newest_checkpoint", lambda out_dir, _: asked.append(out_dir))
    settings("--finetune", "--resume", "--epochs", 0)
    settings("--demo", "--resume", "--sample_only")
    settings("--resume", "--demo", "--out-dir", "mine", "--sample_only")
    assert asked == ["tuned", "demo/log", "mine"]


def test_a_fine_tune_ends(base, tmp_path, capsys):
    """--finetune trains for two epochs of the 6,000 tokens, with a constant learning rate after
    warm-up. Other flags override it, and a resumed run keeps its settings."""
    shards, out, _ = base
    given = ["--finetune", "--init_from", out / "step_00008", "--data_dir", shards]
    found = settings(*given)
    assert (found["max_steps"], found["total_batch_size"]) == (24, 512)
    assert found["hellaswag_every"] == 0
    flags = "--seq_len 32 --dtype float32 --device cpu --total_batch_size 1024".split()
    done = run_here(
        *given, *flags, "--out_dir", tmp_path / "out", "--max_lr", 1e-3, "--min_lr", 1e-3
    )
    log = log_of(tmp_path / "out")
    assert "12 steps are 2.05 epochs" in done.stdout and list(log["train"]) == list(range(12))
    assert set(list(log["lr"].values())[3:]) == {1e-3}
    assert log["val"][12] < log["val"][0] - 0.1
    without = settings("--finetune", "--data_dir", shards)
    assert without["init_from"] == "gpt2" and found["init_from"] == str(out / "step_00008")
    assert settings(*given, "--max_steps", 7)["max_steps"] == 7
    assert settings(*given, *flags, "--epochs", 1)["max_steps"] == 6
    again = ["--resume", "--out_dir", tmp_path / "out"]
    assert settings(*again)["max_steps"] == 12
    assert settings(*again, "--epochs", 3.5)["max_steps"] == 21
    assert "--resume: max_steps 12 → 21" in capsys.readouterr().out


def test_many_epochs_are_warned_about(tmp_path):
    """51 epochs of 640 tokens, in two steps."""
    shards = write_shards(tmp_path / "shards", train=(640,), vocab=100)
    flags = ["--vocab_size", 100, "--total_batch_size", 51 * 320, "--val_every", 0]
    done = train(shards, tmp_path / "many", *flags, "--max_steps", 2, batch=51)
    assert "warning: 51 epochs are many; --epochs 3" in done.stdout
    done = train(shards, tmp_path / "few", *flags, "--max_steps", 1, batch=51)
    assert "are many" not in done.stdout


# -- TensorBoard, Weights & Biases, run.json


def test_run_json_has_an_entry_for_each_start(base, tmp_path):
    shards = write_shards(tmp_path / "shards")
    train(shards, tmp_path / "out", "--max_steps", 2)
    run_here("--resume", "--out_dir", tmp_path / "out", "--max_steps", 3)
    first, second = json.loads((tmp_path / "out/run.json").read_text())
    assert (first["first_step"], second["first_step"]) == (0, 2)
    assert first["args"]["max_steps"] == 2 and second["args"]["max_steps"] == 3
    assert first["versions"]["torch"] == torch.__version__
    assert first["machine"] == [1, "cpu", "float32"] and first["micro_batch_size"] == 4
    assert set(first["shards"]) == {path.name for path in shards.iterdir()}


@pytest.fixture
def writers(monkeypatch):
    """The list of the SummaryWriters that runs make; they stand in for TensorBoard's."""
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars = folder, purge_step, {}
            made.append(self)

        def add_scalar(self, stream, value, step):
            self.scalars.setdefault(stream, {})[step] = value

        def flush(self):
            pass

    module = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def test_tensorboard_gets_what_the_log_gets(base, tmp_path, writers):
    """Also after resuming, when it drops what it has from the first step on."""
    out = tmp_path / "out"
    train(base[0], out, "--tensorboard", "--save_every", 4)
    run_here("--resume", "--out_dir", out, "--max_steps", 9, "--val_every", 2)
    first, second = writers
    assert first.folder == second.folder == out / "tensorboard"
    assert (first.purge_step, second.purge_step) == (0, 8)
    log = log_of(out)
    assert set(log) == {"train", "val", "lr", "norm", "speed"}
    for stream, values in log.items():
        before = {step: v for step, v in first.scalars[stream].items() if step < 8}
        assert before | second.scalars[stream] == pytest.approx(values, abs=1e-9), stream
    assert second.scalars["val"].keys() == {8, 9}


def test_tensorboard_keeps_an_evaluation_that_is_not_repeated(base, tmp_path, writers):
    """Step 8 was evaluated because it was the last. When the run goes on, TensorBoard drops what it
    has of step 8, so it gets that evaluation once more."""
    out = tmp_path / "out"
    train(base[0], out, "--tensorboard", "--val_every", 3)
    run_here("--resume", "--out_dir", out, "--max_steps", 10)
    first, second = writers
    log = log_of(out)["val"]
    assert list(log) == [0, 3, 6, 8, 9, 10] and list(second.scalars["val"]) == [8, 9, 10]
    before = {step: value for step, value in first.scalars["val"].items() if step < 8}
    assert before | second.scalars["val"] == pytest.approx(log, abs=1e-9)


def test_tensorboard_reads_what_is_written(base, tmp_path):
    """With the real package, where it is installed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(base[0], tmp_path / "out", "--tensorboard")
    events, log = EventAccumulator(str(tmp_path / "out/tensorboard")), log_of(tmp_path / "out")
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(log) == {"train", "val", "lr", "norm", "speed"}
    for stream, values in log.items():
        found = {event.step: event.value for event in events.Scalars(stream)}
        assert found == pytest.approx(values, rel=1e-6), stream


def test_wandb_gets_what_the_log_gets(base, tmp_path, monkeypatch):
    """Every start is a run of its own, in one group per folder."""
    runs, sent = [], {}

    def init(**settings):
        runs.append(settings)

        def log(values, step):
            for stream, value in values.items():
                sent.setdefault(stream, {})[step] = value

        return SimpleNamespace(log=log)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    out = tmp_path / "out"
    train(base[0], out, "--wandb", "mine", "--save_every", 4)
    run_here("--resume", "--out_dir", out, "--max_steps", 9)
    assert [run["project"] for run in runs] == ["mine", "mine"]
    assert [run["group"] for run in runs] == [str(out)] * 2
    assert [run["name"] for run in runs] == [f"{out} from step 0", f"{out} from step 8"]
    assert [run["config"]["max_steps"] for run in runs] == [8, 9]
    log = log_of(out)
    assert sent.keys() == log.keys()
    for stream, values in log.items():
        assert {step: sent[stream][step] for step in values} == pytest.approx(values, abs=1e-9)


def test_wandb_offline(base, tmp_path, monkeypatch):
    """With the real package, where it is installed."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sent, original = [], wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda run, *a, **kw: (sent.append(a), original(run, *a, **kw))
    )
    train(base[0], tmp_path / "out", "--wandb", "mine")
    wandb.finish()
    log = log_of(tmp_path / "out")
    assert [step for values, step in sent if "train" in values] == list(log["train"])
    assert list((tmp_path / "out").rglob("*.wandb"))


@pytest.mark.parametrize(
    "flags, module", [(["--tensorboard"], "tensorboard"), (["--wandb", "mine"], "wandb")]
)
def test_a_missing_package_is_refused(base, tmp_path, monkeypatch, flags, module):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    done = train(base[0], tmp_path / "out", *flags, check=False)
    refused(done, f"{flags[0]} cannot be used here")
    assert f"pip install {module}" in done.stderr


# -- samples of a checkpoint


def test_prompts_from_standard_input(base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon\nThe cat\n"))
    loads, original = [], train_gpt2.build_model
    monkeypatch.setattr(train_gpt2, "build_model", lambda *a: loads.append(a) or original(*a))
    weights = ["--init_from", base[1] / "step_00008", "--device", "cpu"]
    done = run_here("--sample_only", "--prompt", "-", *weights, "--sample_tokens", 3)
    starts = [line[:5] for line in done.stdout.splitlines() if line.startswith("> ")]
    assert starts == ["> Onc"] * 4 + ["> The"] * 4 and len(loads) == 1
    refused(run_here("--prompt", "-", "--out_dir", "nowhere", check=False), "standard input")


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9])
def test_top_p_samples_from_the_same_tokens_as_transformers(top_p):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=32))
    with torch.no_grad():
        model.transformer.wte.weight *= 30
        idx = torch.tensor([[5, 77, 100]])
        keep = TopPLogitsWarper(top_p)(None, model.next_logits(idx) / 0.7)[0].isfinite()
    drawn = model.generate(idx.repeat(20_000, 1), 1, 0.7, top_k=0, top_p=top_p)[:, -1]
    drawn, keep = set(drawn.tolist()), set(keep.nonzero()[:, 0].tolist())
    assert drawn <= keep and (top_p > 0.5 or drawn == keep)


# -- data of other programs


def test_ready_made_shards_of_llm_c(tmp_path):
    """The names and the format of FineWeb shards that are on the hub."""
    folder, r = tmp_path / "edu", np.random.default_rng(0)
    folder.mkdir()
    for name in ("finewebedu_val_000000.bin", "finewebedu_train_000001.bin"):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 3000  # magic number, version, tokens
        tokens = np.resize(r.integers(0, 50257, 7), 3000).astype(np.uint16)
        (folder / name).write_bytes(header.tobytes() + tokens.tobytes())
    done = train(folder, tmp_path / "out")
    assert "3,000 tokens in 1 train shards" in done.stdout
    assert log_of(tmp_path / "out")["val"][8] < log_of(tmp_path / "out")["val"][0]


def test_characters_as_tokens(tmp_path):
    """The README's recipe: the characters of a text are the ids in two shards."""
    text = "to be, or not to be: that is the question. " * 200
    table = sorted(set(text))
    ids = np.array([table.index(c) for c in text], dtype=np.uint16)
    np.save(tmp_path / "chars_val_0.npy", ids[:800])
    np.save(tmp_path / "chars_train_1.npy", ids[800:])
    flags = ["--vocab_size", len(table), "--max_steps", 60, "--warmup_steps", 5, "--val_every", 0]
    done = train(tmp_path, tmp_path / "out", *flags)
    model = GPT.from_pretrained(tmp_path / "out/step_00060")
    start = torch.tensor([[table.index(c) for c in "to be, or not"]])
    written = "".join(table[i] for i in model.generate(start, 20, temperature=0)[0])
    assert len(set(written)) > 3 and set(written) <= set(table)
    assert log_of(tmp_path / "out")["train"][59] < 1.5
    assert "--sample_only" not in done.stdout
