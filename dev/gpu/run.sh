#!/usr/bin/env bash
# Tests and measures on a machine with an NVIDIA GPU; Rust is not needed, but what dev/gpu/pack.sh made.
#
# Usage: dev/gpu/run.sh [FOLDER [PART..]]    (default: target/gpu, all parts but the last)
#
#   tests      operations against their scalar twins, training against oracle, CPU and recorded bits
#   sanitizer  a small model under compute-sanitizer's memcheck and racecheck
#   train      mxtrain from text to a sample, resumed, and moved to the CPU and back
#   bench      training steps of every model
#   peers      PyTorch in turn with ours
#   scale      all GPUs in turn with each of them alone and with PyTorch's DDP
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$(realpath "${1:-target/gpu}")
parts=("${@:2}")
[[ ${#parts[@]} -gt 0 ]] || parts=(tests sanitizer train bench peers)

heading() { printf '\n== %s\n' "$*"; }

tests() {
    heading "operations"
    "$folder/lib" conformance::cuda backend::cuda capi::buffers --skip compile --nocapture 2>&1 | quiet
    heading "training"
    "$folder/cuda" --nocapture --test-threads 4 2>&1 | quiet
    heading "bits"
    "$folder/bits" --nocapture 2>&1 | quiet
}

# Without the lines of tests that pass and say nothing.
quiet() { grep -vE '^$|^test .* ok$|^running' || true; }

sanitizer() {
    local tool
    for tool in memcheck racecheck; do
        heading "compute-sanitizer $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/cuda" \
            every_recipe_takes_two_steps --nocapture 2>&1 | tail -n 3
    done
}

train() {
    local place mxtrain="$folder/mxtrain"
    place=$(mktemp -d)
    heading "mxtrain"
    "$mxtrain" prepare tests/text/prose.txt --out "$place/data"
    "$mxtrain" train --device cuda --data "$place/data" --out "$place/model" --layers 6 --heads 6 \
        --channels 384 --steps 300 --batch-size 16 --log "$place/log" | tail -n 3
    "$mxtrain" eval --device cuda --checkpoint "$place/model" --data "$place/data"
    "$mxtrain" eval --device cpu --checkpoint "$place/model" --data "$place/data" --batches 4
    "$mxtrain" train --device cuda --resume "$place/model" --steps 400 | tail -n 2
    "$mxtrain" train --device cpu --resume "$place/model" --steps 402 | tail -n 2
    "$mxtrain" train --device cuda --resume "$place/model" --steps 410 | tail -n 2
    "$mxtrain" generate --device cuda --checkpoint "$place/model" --prompt 'The trainer' \
        --tokens 200
    rm -r "$place"
}

bench() {
    local model
    for model in d6 d12 124M 345M 1.3B; do
        heading "$model"
        MXT_BENCH_DEVICE=cuda "$folder/train_step" "$model" bf16 mxfp4-rht-sr
    done
}

peers() {
    local model
    for model in d6 124M 345M 1.3B; do
        heading "$model"
        MXT_GPU_BENCH=$folder/train_step dev/gpu/peers.sh --model "$model"
    done
}

scale() {
    heading "several GPUs"
    local work
    work=$(mktemp -d)
    seq 1 400000 > "$work/text.txt"
    "$folder/mxtrain" prepare --tokenizer gpt2 "$work/text.txt" --out "$work/data" > /dev/null
    NCCL_NVLS_ENABLE=0 python3 benches/peers/scale.py --mxtrain "$folder/mxtrain" --data "$work/data"
    rm -r "$work"
}

for part in "${parts[@]}"; do "$part"; done
