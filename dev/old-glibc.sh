#!/usr/bin/env bash
# Runs what `make portable` made under Debian 11's own loader and C library (glibc 2.31): mxtrain, and a C
# program that trains. Neither is installed; the packages are only unpacked.
#
# Usage: dev/old-glibc.sh [DIST]      (default: dist)
#
# Needs apt, and a mirror of Debian in its sources.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dist=$(realpath "${1:-dist}")
root=$PWD/target/debian11

if [[ ! -x $root/lib/x86_64-linux-gnu/ld-2.31.so ]]; then
    apt=$(mktemp -d)
    trap 'rm -rf "$apt"' EXIT
    mkdir -p "$apt"/lists/partial "$apt"/archives/partial
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security \
        | sed -n 1p)
    [[ -n $mirror ]] || { echo "expected a mirror of Debian in apt's sources, found none" >&2; exit 1; }
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bullseye main" \
        > "$apt/sources.list"
    : > "$apt/status"
    options=(-qq -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=-
        -o Dir::State::lists="$apt/lists" -o Dir::State::status="$apt/status"
        -o Dir::Cache::archives="$apt/archives" -o Acquire::Languages=none
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
        -o APT::Sandbox::User=root -o Debug::NoLocking=1)
    apt-get "${options[@]}" update
    (cd "$apt" && apt-get "${options[@]}" download libc6 libgcc-s1)
    mkdir -p "$root"
    for package in "$apt"/*.deb; do dpkg -x "$package" "$root"; done
fi

work=$(mktemp -d)
trap 'rm -rf "$work" ${apt:+"$apt"}' EXIT
lib=$root/lib/x86_64-linux-gnu
old=("$lib/ld-2.31.so" --library-path "$lib:$dist/lib")

"${old[@]}" "$dist/bin/mxtrain" --version
"${old[@]}" "$dist/bin/mxtrain" prepare tests/text/prose.txt --out "$work/data" >/dev/null
"${old[@]}" "$dist/bin/mxtrain" train --device cpu --data "$work/data" --out "$work/model" --layers 1 \
    --heads 2 --channels 64 --context 32 --batch-size 2 --steps 5 > "$work/log"
"${old[@]}" "$dist/bin/mxtrain" info "$work/model" >/dev/null

# A program's own code asks for the newest functions, too, so it is linked as the library was.
target/portable/linker -std=c99 tests/consumers/pkg-config/main.c -o "$work/program" \
    -I"$dist/include" "$dist/lib/libmxfp4train.so"
"${old[@]}" "$work/program"
