#!/usr/bin/env bash
# Builds what dev/gpu/run.sh needs on a machine with a GPU and without Rust: tests, benchmark and
# mxtrain, optimized and stripped.
#
# Usage: dev/gpu/pack.sh [FOLDER]    (default: target/gpu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-target/gpu}
mkdir -p "$folder"

build() {
    cargo "$@" --release --message-format=json-render-diagnostics
}
{
    build test --no-run --lib --test cuda --test bits
    build build --bench train_step --bench decode
    build build -p mxtrain
} | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        target = message["target"]
        name = "lib" if "lib" in target["kind"] else target["name"]
        print(name, message["executable"])
' | while read -r name executable; do
    strip -o "$folder/$name" "$executable"
done
ls -lh "$folder"
