#!/usr/bin/env bash
# What small optimizer states cost in loss, and what other optimizers gain, on text of which no token
# is seen twice.
#
# Usage: dev/optimizers.sh PART..
#
#   state   124M parameters as GPT-2 small, 2,000 steps of 16,384 tokens under mxfp4-rht-sr, seeds 1
#           to 6: adamw, and with 8-bit moments and split masters
#   rates   19M parameters without embeddings, 66 million bytes, bf16 and mxfp4-rht-sr, seed 1: adamw,
#           stable-spam and muon, each at three learning rates
#   report  tables of all that is there
#
# Every part is made of runs that leave a file each; a run whose file is there is left out, and one
# that was stopped goes on where it was, so a part can be cut into pieces. Settings are environment
# variables:
#
#   MXTRAIN  the program [default: built here]
#   DATA     folder of `dev/recipes-data.sh tokens`, which needs more text than usual (TEXT_BYTES);
#            for rates of `dev/recipes-data.sh bytes`
#   OUT      folder for what comes out [default: target/optimizers]
#   GPUS     GPUs to use, by number, one run at a time on each [default: 0]
#   LIMIT    seconds after which no run is begun any more [default: STOP]
#   STOP     seconds after which runs are stopped, which go on the next time [default: none]
#   STATE_STEPS, RATES_STEPS  see below
experiment=optimizers
known_parts="state rates report"
# shellcheck source=dev/experiment.sh
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

# Optimizer steps of 16,384 and of 32,768 tokens.
state_steps=${STATE_STEPS:-2000}
rates_steps=${RATES_STEPS:-2000}

# One run as a command: run PART OPTIMIZER LR RECIPE SEED STEPS OPTION..
run() {
    echo compare train --device GPU --data "$data" --out "$out/$1/$2,lr=$3" --optimizer "$2" \
        --lr "$3" --recipe "$4" --seeds "$5" --steps "$6" --warmup $(($6 / 50)) --schedule cosine \
        --weight-decay 0.1 --eval-every $(($6 / 5)) --eval-batches 40 "${@:7}"
}

state() {
    local data seed optimizer
    data=$(data)
    has_tokens "$data" $((state_steps * 16384))
    for seed in 1 2 3 4 5 6; do
        for optimizer in adamw adamw,moments=int8,master=split; do
            run state $optimizer 6e-4 mxfp4-rht-sr $seed "$state_steps" \
                --layers 12 --channels 768 --heads 12 --context 1024 --vocab-size 50304 \
                --batch-size 16
        done
    done | on_gpus
}

rates() {
    local data recipe lr
    data=$(data)
    has_tokens "$data" $((rates_steps * 32768))
    for recipe in bf16 mxfp4-rht-sr; do
        # Those of Muon are of what AdamW updates; its matrices take 66.67 times as much.
        for lr in 1e-3 5e-4 2e-3; do
            run_small adamw $lr "$recipe"
            run_small stable-spam $lr "$recipe"
        done
        for lr in 3e-4 1.5e-4 6e-4; do run_small muon $lr "$recipe"; done
    done | on_gpus
}

# run_small OPTIMIZER LR RECIPE
run_small() {
    run rates "$@" 1 "$rates_steps" --layers 6 --channels 512 --heads 8 --context 512 \
        --vocab-size 256 --batch-size 64
}

report() {
    local part
    for part in state rates; do
        compgen -G "$out/$part/*/*.json" >/dev/null || continue
        cat "$out/$part"/*/*.json >"$out/$part.jsonl"
        "$mxtrain" compare report "$out/$part.jsonl" --out "$out/$part-report"
    done
}

parts "$@"
