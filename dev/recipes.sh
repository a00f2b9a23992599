#!/usr/bin/env bash
# What every recipe costs in loss, on text of which no token is seen twice.
#
# Usage: dev/recipes.sh PART..
#
#   large   124M parameters as GPT-2 small, 100 million tokens, one recipe of each kind, one seed
#   small   19M parameters without embeddings, 151 million bytes, all recipes, seeds 1 and 2
#   seed3   a third seed of small
#   report  tables and plots of all that is there
#
# Every part is made of runs that leave a file each; a run whose file is there is left out, and one
# that was stopped goes on where it was, so a part can be cut into pieces. Settings are environment
# variables:
#
#   MXTRAIN  the program [default: built here]
#   DATA     folder of `dev/recipes-data.sh tokens`; for small and seed3 of `dev/recipes-data.sh bytes`
#   OUT      folder for what comes out [default: target/recipes]
#   GPUS     GPUs to use, by number, one run at a time on each; 0 0 for two [default: 0]
#   LIMIT    seconds after which no run is begun any more [default: STOP]
#   STOP     seconds after which runs are stopped, which go on the next time [default: none]
#   RECIPES  recipes to run in place of a part's, with spaces between; in that order
#   LARGE_STEPS, SMALL_STEPS  see below
experiment=recipes
known_parts="large small seed3 report"
# shellcheck source=dev/experiment.sh
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

# Optimizer steps of 65,536 and of 32,768 tokens.
large_steps=${LARGE_STEPS:-1530}
small_steps=${SMALL_STEPS:-4600}

# The longest first, so that no GPU waits long for the last run: those whose 4 bits are emulated on
# most chips.
large_recipes="quartet2 nvfp4-eden tetrajet nvidia-nvfp4
    bf16 fp8 mxfp4-rht,range=3/4 mxfp4-rht-sr"

# Switches that are worth a row of their own.
switched="
    nvidia-nvfp4,bf16-last-layers=0
    tetrajet,ema=0.998
    tetrajet2,reset=200:50:8@0.6
    nvfp4-nvfp4-rht-sr,46=fwd
    mxfp4-mxfp4-rht-sr,scale-fwd=quest
    bf16,mantissa=3
    mxfp4,range=3/4
    mxfp4-rht,range=3/4
    mxfp4-rht-sr,sr=dy
    mxfp4-rht-sr,bf16-last-steps=0.1"

# Those of the small model: all that the program knows but fp32, which takes seven times as long, and
# the above. First what all others are compared with, then those that are emulated.
small_recipes() {
    local all fast='^(fp8|((fp8|mxfp4)-)?mxfp4(-rht)?(-sr)?)(,|$)'
    all=$("$mxtrain" recipes | sed -n 's/^| `\([^`]*\)` .*/\1/p' | grep -vxE 'bf16|fp32' | uniq)
    all+=$'\n'$(tr -s ' \n' '\n' <<<"$switched" | sed '/^$/d')
    echo bf16
    grep -vE "$fast" <<<"$all" || true
    grep -E "$fast" <<<"$all" || true
}

# runs FOLDER STEPS STEP_TOKENS SEEDS RECIPES EVALUATIONS OPTION..
runs() {
    local folder=$1 steps=$2 seeds=$4 recipes=${RECIPES:-$5} recipe seed data
    [[ $recipes == *[![:space:]]* ]] || refused RECIPES "names of recipes" "$recipes"
    [[ $steps =~ ^[1-9][0-9]{0,8}$ ]] || refused "${folder^^}_STEPS" "a number of steps" "$steps"
    data=$(data)
    has_tokens "$data" $((steps * $3))
    for recipe in $recipes; do
        for seed in $seeds; do
            echo compare train --device GPU --data "$data" --out "$out/$folder" \
                --recipe "$recipe" --seeds "$seed" "${@:7}" \
                --steps "$steps" --warmup $((steps / 50)) --schedule cosine \
                --weight-decay 0.1 --clip 1.0 --eval-every $((steps / $6)) --eval-batches 40
        done
    done | on_gpus
}

large() {
    runs large $large_steps 65536 1 "$large_recipes" 10 \
        --layers 12 --channels 768 --heads 12 --context 1024 --vocab-size 50304 \
        --batch-size 32 --accumulation 2 --lr 6e-4
}

# Bytes, because half of what a model of this size computes with a larger vocabulary is the head's,
# which no recipe quantizes.
small_of() {
    runs small $small_steps 32768 "$1" "$(small_recipes)" 5 \
        --layers 6 --channels 512 --heads 8 --context 512 --vocab-size 256 \
        --batch-size 64 --lr 1e-3
}

small() { small_of "1 2"; }

seed3() { small_of 3; }

report() { report_of report large small; }

parts "$@"
