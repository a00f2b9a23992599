#!/usr/bin/env bash
# Packs the Python package with a library, mxtrain and the licences into a wheel, and checks that it
# runs where its name says. Called by `make wheel`.
#
# Usage: packaging/wheel.sh FLOOR FOLDER NOTICES DIST
#   (such as 2.17 target/portable target/release/THIRD-PARTY.txt dist)
#
# Needs Python 3 with pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage="usage: packaging/wheel.sh FLOOR FOLDER NOTICES DIST"
floor=${1:?$usage}
folder=${2:?$usage}
notices=${3:?$usage}
dist=${4:?$usage}
tag=manylinux_${floor/./_}_$(uname -m)

tools=$PWD/target/wheel-tools
if [[ ! -x $tools/bin/auditwheel ]]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check hatchling==1.33.0 auditwheel==6.8.2
fi

python3 bindings/python/gen/cdef.py --check
# NOTE: in a tree of its own, so that the sources never have a library beside them.
stage=$PWD/target/wheel
rm -rf "$stage"
mkdir -p "$stage" "$dist"
(cd bindings/python && cp -r pyproject.toml hatch_build.py README.md LICENSE-* src "$stage")
find "$stage" -name __pycache__ -prune -exec rm -r {} +
install -D -m 755 "$folder/libmxfp4train.so" "$stage/src/mxfp4train/lib/libmxfp4train.so"
install -D -m 755 "$folder/mxtrain" "$stage/src/mxfp4train/bin/mxtrain"
install -m 644 "$notices" "$stage/THIRD-PARTY.txt"
echo "$tag" > "$stage/platform-tag"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' bindings/python/pyproject.toml)
wheel=$(realpath "$dist")/mxfp4train-$version-py3-none-$tag.whl
rm -f "$wheel"
(cd "$stage" && "$tools/bin/python" -m hatchling build -t wheel -d "$(dirname "$wheel")")
# It finds the oldest systems by the versions of functions, and what is not everywhere.
report=$("$tools/bin/auditwheel" show "$wheel")
if ! grep -Fq "\"$tag\"" <<<"$report"; then
    printf 'expected a wheel for %s, got:\n%s\n' "$tag" "$report" >&2
    exit 1
fi
