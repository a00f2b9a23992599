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
#   GPUS     GPUs to use, by number, one run at a time on each; 0 0 for two [default: 0]
#   LIMIT    seconds after which no run is begun any more [default: STOP]
#   STOP     seconds after which runs are stopped, which go on the next time [default: none]
#   MAIN_STEPS, SHORT_STEPS, LONG_STEPS  see below
experiment=near-lossless
known_parts="cpu-toy main seeds groups long gradients variance report"
# shellcheck source=dev/experiment.sh
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"

# Optimizer steps of 65,536 tokens: 100, 33 and 190 million.
main_steps=${MAIN_STEPS:-1530}
short_steps=${SHORT_STEPS:-500}
long_steps=${LONG_STEPS:-2900}
draws=16

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

parts "$@"
