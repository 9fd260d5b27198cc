"""GPT-2's training on a pretended CUDA device; test_without_gpu.py runs this script in a process of
its own. The tensors have shapes, dtypes and a device, but no values: whatever needs a value, as
.item() does, raises an error.

    python tests/fake_cuda.py fake_cuda.so  # compiled from fake_cuda.cpp; needs no GPU
"""

import ctypes
import os
import sys
import weakref
from pathlib import Path

library = ctypes.CDLL(sys.argv[1])  # before torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.cuda.amp.common as common  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import hellaswag  # noqa: E402
import train_gpt2 as T  # noqa: E402

library.pretend()
common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
DEVICE = torch.device("cuda", 0)
attended = []  # for each call of attention: is there a mask, and may PyTorch take cuDNN's kernel?


def flash(q, k, v, attn_mask=None, is_causal=False):
    """F.scaled_dot_product_attention as on a GPU: a CPU build would write all weights down."""
    attended.append((attn_mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


class Memory(TorchDispatchMode):
    """Adds up the bytes of the tensors that are made under it, as long as they live."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in self.known:
                self.known.add(id(storage))
                self.add(storage.nbytes())
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        return out

    def add(self, n):
        self.now += n
        self.most = max(self.most, self.now)

    def gone(self, storage, n):
        self.known.discard(storage)
        self.now -= n


def a_step_waits_once(model):
    """For its norm, in each precision. Devices and dtypes agree; otherwise fake tensors raise."""
    waits = []
    torch.Tensor.isfinite = lambda norm: waits.append(norm) or True
    optimizer = model.configure_optimizers(0.1, 6e-4)
    tokens = torch.zeros(8, 1025, dtype=torch.int64, device=DEVICE)
    batches = [(tokens[:, :-1], tokens[:, 1:])] * 2
    for name in ("float32", "bfloat16", "float16"):
        autocast = torch.autocast("cuda", getattr(torch, name), enabled=name != "float32")
        scaler = torch.amp.GradScaler("cuda", enabled=name == "float16")
        loss, norm = T.training_step(model, batches, optimizer, scaler, autocast, 1.0)
        for tensor in (T.all_reduce_mean(loss), norm):
            assert tensor.device == DEVICE and tensor.dtype == torch.float32
        assert len(waits) == 1 and waits.pop() is norm
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    optimizer.zero_grad()
    del torch.Tensor.isfinite  # which uncovers the real one


def masks_keep_away_from_cudnn(model):
    """Which has been wrong in silence under a mask; training and sampling have none."""
    assert attended and all(seen == (False, True) for seen in attended), attended
    attended.clear()
    grid = torch.zeros(3, 2, 64, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        hellaswag.token_losses(model, grid, torch.zeros(2, 9, dtype=torch.int64, device=DEVICE))
        cache = T.KVCache(model)
        cache.next_logits(grid[0, :, :7])
        cache.next_logits(grid[0, :, :8])
    layers = len(model.transformer.h)
    assert attended == [(True, False)] * layers + [(False, True)] * 2 * layers, attended


def micro_batch(model, gigabytes, seq_len, sequences):
    """What `--micro_batch_size auto` takes for a batch of so many sequences on a GPU of that size.
    The memory is that of its own passes here."""
    with Memory() as memory:
        torch.cuda.reset_peak_memory_stats = lambda device: setattr(memory, "most", memory.now)
        torch.cuda.memory_allocated = lambda device: memory.now
        torch.cuda.max_memory_allocated = lambda device: memory.most
        weights = 4 * model.num_params()
        free = int(gigabytes * 1e9) - weights - 500_000_000  # and CUDA's own
        torch.cuda.mem_get_info = lambda device: (free, None)
        torch.cuda.empty_cache = lambda: None
        args = T.Args(seq_len=seq_len, total_batch_size=sequences * seq_len)
        return T.pick_micro_batch_size(args, model, 1, torch.autocast("cuda", torch.bfloat16), None)


F.scaled_dot_product_attention = flash
with FakeTensorMode(allow_non_fake_inputs=True):
    with DEVICE:
        small, gpt2 = (T.GPT(T.GPTConfig(vocab_size=50304, n_layer=n)) for n in (2, 12))
    a_step_waits_once(small)
    masks_keep_away_from_cudnn(small)
    for seq_len, sequences in ((1024, 512), (256, 240)):
        found = {size: micro_batch(gpt2, size, seq_len, sequences) for size in (16, 24, 48, 80)}
        print(found, flush=True)
os._exit(0)  # a CUDA build aborts in a normal exit, because it has no real device to release
