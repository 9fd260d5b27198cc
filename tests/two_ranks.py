"""Run train_gpt2.py with several processes on one GPU, over Gloo, as NCCL needs a GPU for each:

torchrun --standalone --nproc_per_node=2 tests/two_ranks.py --micro_batch_size 16 ...
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt2  # noqa: E402

if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"  # all processes use GPU 0
    init = dist.init_process_group
    dist.init_process_group = lambda *args, **flags: init("gloo")
    train_gpt2.main()
