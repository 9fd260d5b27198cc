#!/usr/bin/env bash
# What only a GPU can show. The parts, with their seconds on an H200 (estimates, except "shipped"):
#
#     shipped    210  the program: train under torchrun, resume, sample, HellaSwag, test_cuda.py
#     candidate  345  a residual stream in bfloat16: speed, memory and the losses of 600 steps with it,
#                     beside the lecture's own code and ours, on equal weights and batches
#     ladder      85  torch.compile without and with flash attention
#     hellaswag   50  seconds for all items as a run scores them, with several token budgets
#     two_ranks  120  two processes on one GPU, over Gloo, against one process; only if it is named
#
#     tests/on_gpu.sh                      # all but the last: about twelve minutes
#     tests/on_gpu.sh shipped ladder       # the same in two calls, of five minutes ...
#     tests/on_gpu.sh candidate hellaswag  # ... and of seven
#     DEVICE=cpu SMALL=1 tests/on_gpu.sh   # tries this script itself, with a tiny model
#
# ITEMS=FILE  HellaSwag's examples; without them HellaSwag is skipped.
# DATA=DIR    shards to train on; otherwise the text that comes with Python, too short for "candidate".
# OUT=DIR     report.md and the logs are copied there, after each step. Everything is in on_gpu/.
#             A step that fails is noted in the report, and the others continue.
set -auo pipefail # -a: the steps run in shells of their own, which need all names from here
PATH=$(dirname "$(python3 -c 'import sys; print(sys.executable)')"):$PATH # its torchrun
items=${ITEMS:+$(realpath -- "$ITEMS")} data=${DATA:+$(realpath -- "$DATA")}
copy=${OUT:+$(realpath -m -- "$OUT")}
cd "$(dirname "$0")/.." || exit
out=on_gpu device=${DEVICE:-cuda} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
[ "$device" = cpu ] && CUDA_VISIBLE_DEVICES=
data=${data:-$out/data}
mkdir -p "$out" ${copy:+"$copy"}

# Sizes: those of the recipe, and what a CPU does in seconds
batch="--total_batch_size 524288" half="--total_batch_size 65536 --micro_batch_size 16"
small="--rounds 1 --steps 10" big="--rounds 1 --steps 597 --batch 64"
rows="bfloat16 compile flash" budgets="8192 32768 65536 131072" tests="" val=65536
if [ "${SMALL:-}" ]; then
    batch="--n_layer 1 --n_head 1 --n_embd 32 --seq_len 64 --block_size 256 --total_batch_size 512"
    half="$batch --micro_batch_size 2" batch="$batch --compile" val=1024
    small="--rounds 1 --steps 1 --seq_len 16 --batch 1" big=$small
    rows="bfloat16 flash" budgets="512 1024" tests="attention or cached or adamw"
    [ "$items" ] && head -8 "$items" >"$out/items.jsonl" && items=$out/items.jsonl
fi
hella="--hellaswag_every 0"
[ "$items" ] && hella="--hellaswag_every 10 --hellaswag_data $items"
often="--device $device --data_dir $data --warmup_steps 4 $hella"
often+=" --val_every 10 --val_tokens $val --sample_every 10 --save_every 10"

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    python -c "
import platform, torch, transformers
cuda = f'CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
print(f'PyTorch {torch.__version__}, {cuda}, transformers {transformers.__version__},', end=' ')
print('Python', platform.python_version())"
}
shards() { [ -e "$data" ] || python -c "import fineweb; fineweb.build_demo('$data')"; }

# As shipped: NCCL, DDP, torch.compile, auto micro-batch, validation, HellaSwag, samples, checkpoints
run() {
    torchrun --standalone --nproc_per_node=1 train_gpt2.py $often $batch --out_dir "$out/a" "$@"
}
newest() { ls -d "$out"/a/step_* | tail -1; }
train() { rm -rf "$out/a" && run --max_steps 20; }
resume() { run --max_steps 24 --resume; }
sample() { python train_gpt2.py --device "$device" --sample_only --init_from "$(newest)"; }
score() { python hellaswag.py --device "$device" --model "$(newest)" --data "$items"; }
test_cuda() { # most of the time goes into starting processes and compiling: six tests at a time
    local together=""
    python -c "import xdist" 2>/dev/null && [ -z "${SMALL:-}" ] && together="-n 6"
    python -m pytest -o addopts= -q $together tests/test_cuda.py -k "$tests"
}
shipped() {
    step train 240 'step +(0|19)/.*|peak memory.*|done after .*'
    step test_cuda 300 '[0-9]+ (passed|failed).*' & # nothing below is measured
    step resume 150 'resuming.*|step +2(0|3)/.*|validation loss.*'
    step sample 90 '^> .{9,70}'
    [ "$items" ] && step score 90 '[0-9]+ acc: .*'
    wait
}

# Speed and losses beside the lecture's own code
rungs() { python tests/bench_ladder.py "$@"; }
losses() { rungs $big --data "$data" --rungs shipped ours residual --json "$out/losses.json"; }
candidate() { step losses 460 '^$'; }
missing_rows() { rungs $small --rungs $rows; }
ladder() { step missing_rows 240 '^$'; }
all_items() {
    python - "$device" "$items" $budgets <<'PYTHON'
import cProfile, sys, time
import torch, hellaswag, train_gpt2
device, path, *budgets = sys.argv[1:]
items = hellaswag.load_items(path)
model = train_gpt2.GPT(train_gpt2.GPTConfig()).to(device)
print(f"\n| token_budget | seconds for {len(items)} items, in bfloat16: first, second |\n|---|---|")
with torch.autocast(device, torch.bfloat16):
    for budget in map(int, budgets):
        start = [time.perf_counter()]
        for _ in range(2):
            hellaswag.evaluate(model, items, device, token_budget=budget)
            start.append(time.perf_counter())
        print(f"| {budget} | {start[1] - start[0]:.2f}, {start[2] - start[1]:.2f} |")
    print("\nWhere the time goes with the default budget:")
    cProfile.run("hellaswag.evaluate(model, items, device)", sort="tottime")
PYTHON
}
hellaswag() { [ "$items" ] && step all_items 150 '^$'; }

one() { python train_gpt2.py $often $half --max_steps 12 --out_dir "$out/b"; }
two() {
    torchrun --standalone --nproc_per_node=2 tests/two_ranks.py $often $half --max_steps 12 \
        --out_dir "$out/c"
}
compare() {
    rm -rf "$out/b" "$out/c" && one && two && python - "$out/b" "$out/c" <<'PYTHON'
import sys
from train_gpt2 import read_log
one, two = ({r[:2]: float(r[2]) for r in read_log(f"{folder}/log.txt")} for folder in sys.argv[1:])
assert one.keys() == two.keys(), one.keys() ^ two.keys()
for stream in ("train", "val", "norm"):
    most = max(abs(one[key] - two[key]) for key in one if key[1] == stream)
    print(f"{stream} differs by {most:.1e}")
    assert most < 0.05
PYTHON
}
two_ranks() { step compare 300 '.* differs by .*'; }

report() {
    printf '## On a GPU\n\n`tests/on_gpu.sh`, %s, commit %s\n\n' "$(date +%F)" \
        "$(git describe --always --dirty=+)"
    printf '| step | as it should be | seconds | shows |\n|---|---|---:|---|\n'
    cat "$out/steps.md"
    for log in losses missing_rows all_items; do
        [ -e "$out/$log.log" ] && grep -E '^(\||20[0-9-]+;|$)' "$out/$log.log" | cat -s
    done
}
step() { # NAME LIMIT PATTERN: run NAME for at most LIMIT seconds, and note what matches in its log
    local start=$SECONDS status=yes shows
    echo "$1 ..." >&2
    timeout -s INT -k 30 "$2" bash -c "$1" >"$out/$1.log" 2>&1 || status="NO: exit status $?"
    shows=$(grep -oE "$3" "$out/$1.log" | tail -5 | tr '|' ',' | paste -sd'|' | sed 's/|/; /g')
    echo "| $1 | $status | $((SECONDS - start)) | $shows |" >>"$out/steps.md"
    report >"$out/report.md" 2>/dev/null
    [ -z "$copy" ] || { cp "$out/report.md" "$copy" && tar -czf "$copy/logs.tar.gz" "$out"/*.log; }
}

rm -f "$out"/*.log "$out/steps.md"
trap 'kill $(jobs -p) 2>/dev/null' EXIT
step machine 60 '.+' # a part that needs nothing else
step shards 60 '^$'
for part in ${*:-shipped candidate ladder hellaswag}; do "$part"; done
cat "$out/report.md"
! grep -q '| NO:' "$out/steps.md"
