#!/usr/bin/env bash
# What the backward pass in MXFP4 costs in loss: every command of the experiment.
#
# Usage: dev/near-lossless.sh PART..
#
#   cpu-toy    a toy model on the CPU, all parts of it, about ten minutes on two cores
#   main       124M parameters, all recipes
#   seeds      three seeds of bf16, mxfp4 and mxfp4-rht-sr, shorter
#   groups     groups of the transform, at that length
#   long       bf16, mxfp4-rht and mxfp4-rht-sr, longer
#   gradients  bias and variance of gradients, at checkpoints of main
#   variance   variance of a product by its length
#   report     tables and plots of all that is there
#
# Every part is made of runs that leave a file each; a run whose file is there is left out, so a
# part can be cut into pieces and gone on with. `report` joins them to a file of all records of a
# part, as docs/near-lossless has them. Settings are environment variables:
#
#   MXTRAIN  the program [default: built here]
#   DATA     folder of `mxtrain prepare --tokenizer gpt2`; for cpu-toy of `mxtrain prepare`
#   OUT      folder for what comes out [default: target/near-lossless]
#   GPUS     GPUs to use, by number, one run at a time on each [default: 0]
#   LIMIT    seconds after which no run is begun any more [default: none]
#   MAIN_STEPS, SHORT_STEPS, LONG_STEPS  see below
set -euo pipefail
# Records are joined in the order of their bytes.
export LC_ALL=C
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Optimizer steps of 65,536 tokens: 100, 33 and 190 million.
main_steps=${MAIN_STEPS:-1530}
short_steps=${SHORT_STEPS:-500}
long_steps=${LONG_STEPS:-2900}
draws=16

out=${OUT:-$repository/target/near-lossless}
read -ra gpus <<<"${GPUS:-0}"
limit=${LIMIT:-1000000}
mxtrain=${MXTRAIN:-}
if [[ -z $mxtrain ]]; then
    cargo build --release --manifest-path "$repository/Cargo.toml" -p mxtrain
    mxtrain=${CARGO_TARGET_DIR:-$repository/target}/release/mxtrain
fi

data() {
    if [[ ! -f ${DATA:-}/train.bin ]]; then
        echo "DATA: expected a folder made by mxtrain prepare, got '${DATA:-}'" >&2
        return 2
    fi
    echo "$DATA"
}

# Runs one command a line of its input, one at a time on each GPU, which takes the place of "GPU".
# The output of all GPUs but the first goes to files.
on_gpus() {
    local gpu pid failed=0 pids=()
    cat >"$out/queue"
    exec 3<"$out/queue"
    for gpu in "${gpus[@]}"; do
        if [[ $gpu == "${gpus[0]}" ]]; then
            work_on "$gpu" &
        else
            work_on "$gpu" >"$out/gpu-$gpu.log" 2>&1 &
        fi
        pids+=($!)
    done
    # Ctrl-C reaches the runs, too, which then end by themselves.
    trap : INT TERM
    for pid in "${pids[@]}"; do
        until wait "$pid"; do
            kill -0 "$pid" 2>/dev/null || { failed=1 && break; }
        done
    done
    trap - INT TERM
    for gpu in "${gpus[@]:1}"; do
        echo "-- GPU $gpu"
        grep -E '^(run |done: |stopped|left |mxtrain: )' "$out/gpu-$gpu.log" || true
    done
    return $failed
}

# Takes commands from the queue that all GPUs share.
work_on() {
    local command
    # One lock a worker: workers that shared an open file would share its lock.
    exec 4>"$out/queue.lock"
    while flock 4 && read -r -u 3 command && flock -u 4; do
        if ((SECONDS >= limit)); then
            echo "left for the next time: ${command/ --layers*/}"
        else
            # shellcheck disable=SC2086 # no word of a command holds a space
            "$mxtrain" ${command/--device GPU/--device cuda:$1} </dev/null 3<&- 4>&- || return
        fi
    done
    flock -u 4
}

# 124M parameters, as GPT-2 small. runs FOLDER STEPS SEEDS RECIPE..
runs() {
    local folder=$1 steps=$2 seeds=$3 recipe seed save every=$(($2 / 16)) data
    data=$(data)
    for seed in $seeds; do
        for recipe in "${@:4}"; do
            save=
            # The models that gradients are measured at.
            [[ $folder/$recipe != main/bf16 || -e $out/main/bf16-seed1.json ]] ||
                save="--save-at 0.05,0.5,1"
            echo compare train --device GPU --data "$data" --out "$out/$folder" \
                --recipe "$recipe" --seeds "$seed" \
                --layers 12 --channels 768 --heads 12 --context 1024 --vocab-size 50304 \
                --batch-size 32 --accumulation 2 --steps "$steps" --warmup $((steps / 100)) \
                --schedule cosine --lr 6e-4 --weight-decay 0.1 --clip 1.0 \
                --eval-every "$every" --eval-batches 20 $save
        done
    done | on_gpus
}

main() {
    runs main $main_steps 1 bf16 mxfp4 mxfp4-rht mxfp4-sr mxfp4-rht-sr fp8-mxfp4-rht-sr
}

seeds() { runs short $short_steps "1 2 3" bf16 mxfp4 mxfp4-rht-sr; }

# Groups of 64 are the default: a run of seeds.
groups() {
    runs short $short_steps 1 bf16 mxfp4-rht-sr mxfp4-rht-sr,g=32 mxfp4-rht-sr,g=128 \
        mxfp4-rht-sr,g=256
}

long() { runs long $long_steps 1 bf16 mxfp4-rht mxfp4-rht-sr; }

gradients() {
    local model step data
    data=$(data)
    if ! compgen -G "$out/main/models/bf16-seed1-step*" >/dev/null; then
        echo "gradients: no models in $out/main/models; part main makes them" >&2
        return 2
    fi
    mkdir -p "$out/gradients"
    for model in "$out"/main/models/bf16-seed1-step*; do
        step=$(printf %05d "${model##*-step}") # so that reports go by the step
        [[ -e $out/gradients/$step.json ]] ||
            echo compare gradients --device GPU --data "$data" --checkpoint "$model" \
                --draws $draws --batch-size 8 --out "$out/gradients/$step.json"
    done | on_gpus
}

variance() {
    local deviation
    mkdir -p "$out/variance"
    for deviation in 25 5; do
        "$mxtrain" compare variance --inputs 64 --outliers $deviation \
            --out "$out/variance/outliers-$deviation.json"
    done
}

# report_of REPORT PART..
report_of() {
    local part files=()
    for part in "${@:2}"; do
        compgen -G "$out/$part/*.json" >/dev/null || continue
        cat "$out/$part"/*.json >"$out/$part.jsonl"
        files+=("$out/$part.jsonl")
    done
    "$mxtrain" compare report "${files[@]}" --out "$out/$1"
}

report() { report_of report gradients variance main short long; }

cpu-toy() {
    local data toy=$out/cpu-toy
    # examples/quickstart.sh fetches Shakespeare's plays.
    data=$(DATA=${DATA:-$repository/target/quickstart/data} data)
    local settings="--layers 4 --channels 128 --heads 4 --context 128 --batch-size 16
        --steps 600 --warmup 6 --lr 2e-3 --eval-every 30 --eval-batches 40"
    # shellcheck disable=SC2086 # options
    {
        # One run leaves the models that gradients are measured at.
        "$mxtrain" compare train --device cpu --data "$data" --out "$toy" $settings \
            --seeds 1 --recipe bf16 --save-at 0.1,1
        "$mxtrain" compare train --device cpu --data "$data" --out "$toy" $settings \
            --seeds 1,2,3
    }
    "$mxtrain" compare gradients --device cpu --data "$data" --draws 24 \
        --checkpoint "$toy"/models/* --out "$toy/gradients.json"
    "$mxtrain" compare variance --inputs 16 --out "$toy/variance.json"
    report_of cpu-toy-report cpu-toy
}

[[ $# -gt 0 ]] || { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit 2; }
mkdir -p "$out"
for part in "$@"; do
    case $part in
    cpu-toy | main | seeds | groups | long | gradients | variance | report)
        echo "== $part"
        "$part"
        ;;
    *) echo "unknown part $part; without one, the parts are listed" >&2 && exit 2 ;;
    esac
done
