# What scripts of experiments share, which source this: settings, the queue, reports, parts.
# shellcheck shell=bash
#
# A script says its name, `experiment`, and has a function for each of its parts; `parts PART..`
# runs them. Settings are environment variables, which its head comment names.
set -euo pipefail
# Records are joined in the order of their bytes.
export LC_ALL=C
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refused() {
    echo "$1: expected $2, got '$3'" >&2
    exit 2
}

out=${OUT:-$repository/target/$experiment}
[[ $out != *[[:space:]]* ]] || refused OUT "a folder without a space in its name" "$out"
read -ra gpus <<<"${GPUS:-0}"
((${#gpus[@]})) || refused GPUS "numbers of GPUs, such as 0 1" "$GPUS"
stop=${STOP:-1000000}
limit=${LIMIT:-$stop}
for gpu in "${gpus[@]}"; do
    [[ $gpu =~ ^[0-9]+$ ]] || refused GPUS "numbers of GPUs, such as 0 1" "$GPUS"
done
# Whole numbers that arithmetic of the shell neither takes for octal nor loses digits of.
seconds='^(0|[1-9][0-9]{0,8})$'
[[ $stop =~ $seconds ]] || refused STOP "whole seconds" "$stop"
[[ $limit =~ $seconds ]] || refused LIMIT "whole seconds" "$limit"

# The program; built where none is named.
program() {
    mxtrain=${MXTRAIN:-}
    if [[ -z $mxtrain ]]; then
        cargo build --release --manifest-path "$repository/Cargo.toml" -p mxtrain
        mxtrain=${CARGO_TARGET_DIR:-$repository/target}/release/mxtrain
    fi
    command -v "$mxtrain" >/dev/null || refused MXTRAIN "the program" "$mxtrain"
}

data() {
    if [[ ! -f ${DATA:-}/train.bin || ! -f $DATA/meta.json || $DATA == *[[:space:]]* ]]; then
        refused DATA "a folder made by mxtrain prepare, without a space in its name" "${DATA:-}"
    fi
    echo "$DATA"
}

# Fails unless the text has so many tokens that none is seen twice. has_tokens FOLDER NEEDED
has_tokens() {
    # Windows begin at a random place of the first, and the last one needs a token more.
    local tokens needed=$(($2 + 2 * 1024))
    tokens=$(sed -n 's/.*"train_tokens": *\([0-9]*\).*/\1/p' "$1/meta.json")
    if ((${tokens:-0} < needed)); then
        refused DATA "$needed tokens or more, so that none is seen twice" "${tokens:-0}"
    fi
}

# Runs one command a line of its input, one at a time on each GPU, which takes the place of "GPU". A
# GPU that is named twice runs two at a time. The output of all but the first goes to files. One that
# fails keeps none of the others from being run.
on_gpus() {
    local worker pid failed=0 pids=()
    cat >"$out/queue"
    exec 3<"$out/queue"
    for worker in "${!gpus[@]}"; do
        if ((worker == 0)); then
            work_on "${gpus[worker]}" &
        else
            work_on "${gpus[worker]}" >"$out/worker-$worker.log" 2>&1 &
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
    for worker in "${!gpus[@]}"; do
        ((worker > 0)) || continue
        echo "-- GPU ${gpus[worker]}"
        grep -E '^(run |done: |stopped|left |failed|mxtrain: )' "$out/worker-$worker.log" || true
    done
    return $failed
}

# Takes commands from the queue that all GPUs share.
work_on() {
    local command status failed=0
    # One lock a worker: workers that shared an open file would share its lock.
    exec 4>"$out/queue.lock"
    while flock 4 && read -r -u 3 command && flock -u 4; do
        if ((SECONDS >= limit)); then
            echo "left for the next time: ${command/ --layers*/}"
        else
            status=0
            # shellcheck disable=SC2086 # no word of a command holds a space
            timeout --foreground $((stop > SECONDS ? stop - SECONDS : 1)) \
                "$mxtrain" ${command/--device GPU/--device cuda:$1} </dev/null 3<&- 4>&- || status=$?
            # 124 is that of a run that was stopped in time, and has saved what it had done; 3 that of
            # one that is done, but for something on the side, which it has said; 130 and 143 those of
            # one that was told to stop, and who tells one tells all.
            case $status in
            0 | 3 | 124) ;;
            130 | 143) return $status ;;
            *) failed=1 && echo "failed, with exit code $status: ${command/ --layers*/}" ;;
            esac
        fi
    done
    flock -u 4
    return $failed
}

# report_of REPORT PART..
report_of() {
    local part files=()
    for part in "${@:2}"; do
        compgen -G "$out/$part/*.json" >/dev/null || continue
        cat "$out/$part"/*.json >"$out/$part.jsonl"
        files+=("$out/$part.jsonl")
    done
    ((${#files[@]})) || refused OUT "a folder with records" "$out"
    "$mxtrain" compare report "${files[@]}" --out "$out/$1"
}

# Runs the parts that are named, which the head comment lists; lists them where none is.
# known_parts holds those that there are.
parts() {
    local part
    [[ $# -gt 0 ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 2; }
    for part in "$@"; do
        if [[ $part == *' '* || " $known_parts " != *" $part "* ]]; then
            echo "unknown part $part; without one, the parts are listed" >&2
            exit 2
        fi
    done
    program
    mkdir -p "$out"
    for part in "$@"; do
        echo "== $part"
        "$part"
    done
}
