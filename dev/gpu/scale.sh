#!/usr/bin/env bash
# One run on 1, 2, 4 and 8 GPUs of a host: how much faster it gets, whether its bits stay, and what is
# left when a process is killed. PyTorch is needed for its DDP and FSDP2.
#
# Usage: dev/gpu/scale.sh [FOLDER [PART..]]    (default: target/gpu, which dev/gpu/pack.sh made; all parts)
#
#   bits   50 steps on every number of GPUs, with the lanes of the largest: losses, norms and files are
#          the same; a run that goes on on fewer and on more is the one that never stopped
#   kills  kill -9 of a process in a step: the others end, and the last checkpoint is whole
#   speed  tokens a second, the exchange that nothing hides, memory: benches/peers/scale.py
#
# MXT_SCALE_RANKS names the numbers (default: those of 1, 2, 4, 8 that there are GPUs for), MXT_SCALE_MODELS
# the models of `speed` (default: 124M,345M,1.3B), MXT_SCALE_WAYS its transports (default: those that
# exchange beside the backward pass, and `host`, which does not), MXT_SCALE_PEERS PyTorch's ways.
# MXT_SCALE_DEVICE=cpu has processes on the processor take the part of GPUs in `bits` and `kills`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$(realpath "${1:-target/gpu}")
parts=("${@:2}")
[[ ${#parts[@]} -gt 0 ]] || parts=(bits kills speed)
device=${MXT_SCALE_DEVICE:-cuda}
# NVLink multicast, which NCCL's collectives of all ranks would want, is not used by ours.
export NCCL_NVLS_ENABLE=0

if [[ $device == cpu ]]; then
    sizes=(--layers 2 --channels 64 --heads 2 --context 64 --batch-size 2)
    present=8
else
    sizes=(--layers 12 --channels 768 --heads 12 --context 1024 --batch-size 8)
    present=$(nvidia-smi -L | wc -l)
fi
read -ra counts <<< "${MXT_SCALE_RANKS:-1 2 4 8}"
possible=()
for count in "${counts[@]}"; do [[ $count -gt $present ]] || possible+=("$count"); done
counts=("${possible[@]}")
most=${counts[-1]}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
seq 1 400000 > "$work/text.txt"
"$folder/mxtrain" prepare --tokenizer gpt2 "$work/text.txt" --out "$work/data" > /dev/null

heading() { printf '\n== %s\n' "$*"; }

# The words that share a run among so many.
on() {
    if [[ $device == cpu ]]; then echo "--ranks $1 --threads 1"; else echo "--gpus $1"; fi
}

# A log without what differs from run to run: when, how long, on how many.
numbers() {
    python3 - "$1" << 'END'
import json, sys
for line in open(sys.argv[1]):
    record = json.loads(line)
    if record.get("type") == "step":
        kept = {name: record[name] for name in ("step", "loss", "grad_norm") if name in record}
        print(json.dumps(kept))
END
}

# Whether a run has the losses and the files of another.
same() {
    local name what=$3
    cmp <(numbers "$work/$1.jsonl") <(numbers "$work/$2.jsonl") || { echo "$what: other numbers"; exit 1; }
    for name in model.safetensors trainer.safetensors; do
        cmp "$work/$1/$name" "$work/$2/$name" || { echo "$what: another $name"; exit 1; }
    done
    echo "$what: 0 differing bits"
}

# train NAME RANKS WORDS..: one run with a log.
train() {
    local name=$1 ranks=$2
    shift 2
    # shellcheck disable=SC2046
    "$folder/mxtrain" train --out "$work/$name" --log "$work/$name.jsonl" $(on "$ranks") "$@" \
        > "$work/words" 2>&1 || { cat "$work/words"; exit 1; }
}

begin=(--data "$work/data" "${sizes[@]}" --lanes "$most" --seed 1 --recipe fp8-mxfp4-rht-sr
    --eval-every 0 --save-every 0 --schedule constant --warmup 0)

bits() {
    heading "bits, $most lanes"
    local count ways=("")
    [[ $most -eq 1 ]] || ways+=(--shard-states)
    for count in "${counts[@]}"; do
        for way in "${ways[@]}"; do
            # shellcheck disable=SC2086
            train "of$count$way" "$count" "${begin[@]}" --steps 50 $way
            [[ $count$way == "${counts[0]}" ]] || same "of${counts[0]}" "of$count$way" "$count ${way:-with all states on every rank}"
        done
    done
    # From the most to the fewest, and back.
    local steps=20 before=$most order=()
    for ((i = ${#counts[@]} - 2; i >= 0; i--)); do order+=("${counts[i]}"); done
    order+=("$most")
    train resumed "$most" "${begin[@]}" --steps 10
    for count in "${order[@]}"; do
        [[ $count != "${order[-1]}" ]] || steps=50
        "$folder/mxtrain" train --resume "$work/resumed" --log "$work/resumed.jsonl" $(on "$count") \
            --steps "$steps" > "$work/words" 2>&1 || { cat "$work/words"; exit 1; }
        echo "$before -> $count"
        before=$count
        steps=$((steps + 10))
    done
    same "of${counts[0]}" resumed "resumed"
}

kills() {
    heading "kill -9 of a process, $most ranks"
    [[ $most -gt 1 ]] || { echo "there is one"; return; }
    local run victim seconds way
    for way in "" --shard-states; do
        rm -rf "$work/killed" "$work/killed.jsonl"
        # shellcheck disable=SC2046,SC2086
        "$folder/mxtrain" train --out "$work/killed" --log "$work/killed.jsonl" $(on "$most") \
            "${begin[@]}" --steps 100000 --save-every 20 $way > "$work/words" 2>&1 &
        run=$!
        until [[ $(numbers "$work/killed.jsonl" 2> /dev/null | wc -l) -ge 45 ]]; do
            kill -0 $run 2> /dev/null || { cat "$work/words"; exit 1; }
            sleep 0.1
        done
        victim=$(pgrep -P $run | tail -n 1)
        SECONDS=0
        kill -9 "$victim"
        wait $run && { echo "the run did not say that it lost a process"; exit 1; }
        seconds=$SECONDS
        tail -n 2 "$work/words"
        ! pgrep -f "$work/killed" > /dev/null || { echo "a process is left"; exit 1; }
        # shellcheck disable=SC2046,SC2086
        "$folder/mxtrain" train --resume "$work/killed" $(on 1) --steps 100 > "$work/words" 2>&1 \
            || { cat "$work/words"; exit 1; }
        echo "ended within $((seconds + 1)) s, and goes on (${way:-all states on every rank})"
    done
}

speed() {
    [[ $device == cuda ]] || { heading "speed: of GPUs alone"; return; }
    local count accumulation ways peers=${MXT_SCALE_PEERS:-ddp,fsdp}
    for count in "${counts[@]}"; do
        [[ $count -gt 1 ]] || continue
        ways=${MXT_SCALE_WAYS:-auto,auto+shards,nccl,nccl+shards,host}
        for accumulation in 1 4; do
            heading "$count GPUs, $accumulation micro-batches a rank"
            python3 benches/peers/scale.py --mxtrain "$folder/mxtrain" --data "$work/data" \
                --models "${MXT_SCALE_MODELS:-124M,345M,1.3B}" --gpus "$count" --ways "$ways" \
                --peers "$peers" --accumulation "$accumulation" --rounds 1 --steps 20
            # Others have less to lose where less is exchanged.
            ways=auto,auto+shards
        done
    done
}

for part in "${parts[@]}"; do "$part"; done
