#!/usr/bin/env bash
# Text for dev/recipes.sh: packs it for a machine without a network, and turns it into tokens there.
#
# Usage: dev/recipes-data.sh pack CORPUS PIECES     packed text, in files that can go one by one
#        dev/recipes-data.sh tokens PIECES TOKENS   TOKENS, of GPT-2, is then DATA of dev/recipes.sh
#        dev/recipes-data.sh bytes PIECES BYTES     the same for small models, whose tokens are bytes
#
# CORPUS is a folder of JSON lines with a field "text": files train-*.jsonl, whose documents are
# taken in their order, and val.jsonl, other documents. `tokens` and `bytes` take such a folder, too,
# and as many pieces as there are. `pack` needs zstd, the others the program alone.
#
#   MXTRAIN      the program [default: built here]
#   TEXT_BYTES   JSON lines that are packed [default: 400,000,000]
#   PIECE_BYTES  of which a piece holds, as a fifth of it packed [default: 250,000,000]
set -euo pipefail
export LC_ALL=C
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

pack() {
    local corpus=$1 pieces=$2
    if [[ ! -f $corpus/val.jsonl ]] || ! compgen -G "$corpus/train-*.jsonl" >/dev/null; then
        echo "CORPUS: expected a folder with train-*.jsonl and val.jsonl, got $corpus" >&2
        exit 2
    fi
    mkdir -p "$pieces"
    if [[ $corpus -ef $pieces ]]; then
        echo "PIECES: expected another folder than CORPUS, got $pieces" >&2
        exit 2
    fi
    rm -f "$pieces"/train-*.jsonl.zst
    # Bytes, newlines included; the document that would be too much ends it.
    awk -v left="${TEXT_BYTES:-400000000}" \
        '{ left -= length($0) + 1 } left < 0 { exit } { print }' "$corpus"/train-*.jsonl |
        split -C "${PIECE_BYTES:-250000000}" -d -a 3 \
            --filter='zstd -q -f -19 --long=27 -o "$FILE.jsonl.zst"' - "$pieces/train-"
    if ! compgen -G "$pieces/train-*.jsonl.zst" >/dev/null; then
        echo "expected documents of at most TEXT_BYTES in $corpus/train-*.jsonl; found none" >&2
        exit 2
    fi
    zstd -q -f -19 --long=27 "$corpus/val.jsonl" -o "$pieces/val.jsonl.zst"
    ls -l "$pieces"
}

prepare() {
    local mxtrain=${MXTRAIN:-}
    if [[ -z $mxtrain ]]; then
        cargo build --release --manifest-path "$repository/Cargo.toml" -p mxtrain
        mxtrain=${CARGO_TARGET_DIR:-$repository/target}/release/mxtrain
    fi
    if compgen -G "$2/train-*.jsonl" >/dev/null && compgen -G "$2/train-*.jsonl.*" >/dev/null; then
        echo "PIECES: expected text that is packed or not, got both in $2; move one away" >&2
        exit 2
    fi
    "$mxtrain" prepare --tokenizer "$1" --val-last "$2"/train-*.jsonl* "$2"/val.jsonl* --out "$3"
}

tokens() { prepare gpt2 "$@"; }

bytes() { prepare bytes "$@"; }

for setting in TEXT_BYTES PIECE_BYTES; do
    # A document that is longer than a piece would be cut.
    if [[ ! ${!setting-1000000} =~ ^[1-9][0-9]{6,14}$ ]]; then
        echo "$setting: expected a number of bytes, at least 1000000, got '${!setting}'" >&2
        exit 2
    fi
done
if [[ $# != 3 || ($1 != pack && $1 != tokens && $1 != bytes) ]]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    exit 2
fi
"$@"
