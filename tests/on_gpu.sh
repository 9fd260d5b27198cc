#!/usr/bin/env bash
# Everything that needs a GPU, in about half an hour on one H100: is it correct, how fast is it, how
# much memory does it take? It ends with Markdown for tests/README.md.
#
#     tests/on_gpu.sh                              # text that ships with Python; no HellaSwag
#     tests/on_gpu.sh hellaswag_val.jsonl          # with HellaSwag
#     DEVICE=cpu SMALL=1 tests/on_gpu.sh           # tries the script itself, with a tiny model
#
# All output is in on_gpu/, with a folder for each start. A part that fails is noted, and the others
# continue.
set -uo pipefail
items=$(realpath -- "${1:-/dev/null}")
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
out=on_gpu/$(date +%Y%m%d-%H%M%S)
mkdir -p "$out" && echo "everything is in $out" >&2

# Sizes: a batch of the recipe; SMALL: what a CPU does in seconds
batch="--total_batch_size 524288" half="--total_batch_size 65536 --micro_batch_size 16"
bench="--steps 10 --rounds 1" steps=40 big=64 sizes="16 128" tests=""
ladder="--rungs float32 tf32 bfloat16 compile flash vocab fused loss eager shipped"
variants="none late adamw fa2 cudnn residual coordinate combo autotune"
if [ "${SMALL:-}" ]; then
    batch="--n_layer 1 --n_head 1 --n_embd 32 --seq_len 64 --total_batch_size 2048"
    half="$batch --micro_batch_size 8" batch="$batch --compile" val=4096 steps=3
    bench="--steps 1 --rounds 1 --seq_len 16" big=2 sizes=1 tests="attention or cached or adamw"
    ladder="--rungs float32 shipped" variants="none fa2 residual"
    [ -s "$items" ] && head -20 "$items" >"$out/items.jsonl" && items=$out/items.jsonl
fi
often="--warmup_steps 4 --val_every 10 --val_tokens ${val:-65536} --sample_every 10 --save_every 10"
common="--device $device --data_dir $out/data $often"
hella="--hellaswag_every 0"
[ -s "$items" ] && hella="--hellaswag_every 10 --hellaswag_data $items"

note() { echo "| $1 | $2 | $3 | $4 |" >>"$out/parts.md"; }

# part NAME PATTERN COMMAND...: runs a command, with its output in NAME.log. The table shows the
# first and the last two texts there that match the pattern. WANT: the expected exit status.
part() {
    local name=$1 pattern=$2 start=$SECONDS status
    shift 2
    echo "$name ..." >&2
    "$@" >"$out/$name.log" 2>&1
    status=$?
    [ "$status" = "${WANT:-0}" ] && status=yes || status="NO: exit status $status"
    note "$name" "$status" "$((SECONDS - start)) s" \
        "$(grep -oE "$pattern" "$out/$name.log" | awk '{ a[NR] = $0 }
            END { for (i = 1; i <= NR; i++) if (i == 1 || i > NR - 2) print a[i] }' |
            tr '|' ',' | paste -sd';' | sed 's/;/; /g')"
}

# The largest differences of losses and norms between two runs
compare() {
    python - "$@" <<'PYTHON'
import sys
from train_gpt2 import read_log
a, b = ({r[:2]: float(r[2]) for r in read_log(f"{folder}/log.txt")} for folder in sys.argv[1:])
assert a.keys() == b.keys(), a.keys() ^ b.keys()
for stream in ("train", "val", "norm"):
    most = max(abs(a[key] - b[key]) for key in a if key[1] == stream)
    print(f"{stream} differs by {most:.1e}")
    assert most < 0.05
PYTHON
}

speed='step +0/.* ms|[0-9,]+ tokens/s( . MFU [0-9.]+%)?|peak memory: [0-9.]+ GiB'
run="python train_gpt2.py $common"
one="torchrun --standalone --nproc_per_node=1 train_gpt2.py $common"
two="torchrun --standalone --nproc_per_node=2 tests/two_ranks.py $common"
export TORCH_LOGS=recompiles,graph_breaks PYTHONPATH=$PWD

part machine '.*' python -c "
import torch
print(torch.__version__, 'cuDNN', torch.backends.cudnn.version())
print(*(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), sep=', ')"
part data '^$' python -c "import fineweb; fineweb.build_demo('$out/data')"

# 1. Correctness: precisions, attention, compiled gradients, how often a step waits
part correctness '[0-9]+ (passed|failed).*' python -m pytest tests/test_cuda.py -k "$tests"

# 2. The product under torchrun, resumed, sampled from, scored
part train "$speed" $one $batch $hella --out_dir "$out/a" --max_steps 20
part resume 'resuming.*|step +2[0-9]/.*loss [0-9.]+' \
    $one $hella --out_dir "$out/a" --max_steps 24 --resume
newest=$(ls -d "$out"/a/step_* | tail -1)
part sample '^> .{9,70}' python train_gpt2.py --device "$device" --sample_only --init_from "$newest"
[ -s "$items" ] && part hellaswag '[0-9]+ acc: .*' \
    python hellaswag.py --device "$device" --model "$newest" --data "$items"
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
[ "$gpus" -gt 1 ] && part all_gpus "$speed" torchrun --standalone --nproc_per_node="$gpus" \
    train_gpt2.py $common $batch $hella --out_dir "$out/all" --max_steps 20

# 3. Two processes on one GPU, over Gloo, compared with one; float16
part two_ranks "$speed" $two $half $hella --out_dir "$out/b" --max_steps 12
part one_rank "$speed" $run $half $hella --out_dir "$out/c" --max_steps 12
part two_against_one '.* differs by .*' compare "$out/b" "$out/c"
part float16 'step +[0-9]+/.*loss [0-9.]+' $run $half --dtype float16 --max_steps $steps \
    --hellaswag_every 0 --sample_every 0 --save_every 0 --out_dir "$out/d"

# 4. Out of memory: one sentence. What `auto` takes while another process holds 60%
if [ "$device" = cuda ]; then
    WANT=2 part out_of_memory 'train_gpt2.py: .*' $run --total_batch_size 4194304 \
        --micro_batch_size 4096 --hellaswag_every 0 --max_steps 1 --out_dir "$out/e"
    python -c "
import time, torch
held = torch.empty(int(0.6 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device='cuda')
print('held', flush=True)
time.sleep(600)" >"$out/ballast.log" &
    until grep -q held "$out/ballast.log" || ! kill -0 $! 2>/dev/null; do sleep 1; done
    part auto_beside_60_percent 'batch: .*micro-steps|peak memory: .*' $run $batch --max_steps 2 \
        --hellaswag_every 0 --sample_every 0 --save_every 0 --out_dir "$out/f"
    kill $!
else
    note out_of_memory – – "needs a GPU"
fi

# 5. Throughput: the ladder; variants of its last rung; other micro-batches. 6. A profile
rungs() {
    env -u TORCH_LOGS python tests/bench_ladder.py --device "$device" $bench "$@" 2>>"$out/stderr"
}
part ladder '^$' rungs $ladder --json "$out/ladder.json"
part variants '^$' rungs --batch $big --rungs $variants --json "$out/variants.json"
for B in $sizes; do part "batch_$B" '^$' rungs --batch "$B" --rungs none; done
part profile '^$' rungs --batch $big --rungs none --profile "$out/profile.md"

{
    echo "## On a GPU"
    echo
    echo "\`tests/on_gpu.sh\`, $(date +%F), commit $(git describe --always --dirty=+)."
    printf '\n| part | as it should be | time | shows |\n|---|---|---:|---|\n'
    cat "$out/parts.md"
    for log in ladder variants; do printf '\n'; cat "$out/$log.log"; done
    for B in $sizes; do tail -1 "$out/batch_$B.log"; done
    printf '\nWhere the time of three steps goes:\n\n'
    cat "$out/profile.md"
} | tee "$out/report.md"
! grep -q '| NO:' "$out/parts.md"
