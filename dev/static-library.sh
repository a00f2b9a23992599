#!/bin/sh
# Makes a static library whose only global symbols are those of the header:
#
#   dev/static-library.sh target/release/libmxfp4train.a out/libmxfp4train.a
#
# The archive that cargo makes exports all of Rust's runtime, which clashes with a second Rust library
# in the same program. Here its objects become one, of which only what the C API needs is kept.
# Needs GNU binutils.
set -eu
[ $# -eq 2 ] || { echo "usage: $0 IN.a OUT.a" >&2; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# NOTE: the names come from the header. nm with LLVM's plugin dies on the bitcode of Rust's archives.
header=$(dirname "$0")/../include/mxfp4train.h
grep -v '^ *//' "$header" | grep -o 'mxt_[a-z0-9_]*(' | tr -d '(' | sort -u > "$work/api"

# shellcheck disable=SC2046 # one -u for each symbol
ld -r --gc-sections $(sed 's/^/-u /' "$work/api") "$1" -o "$work/all.o"
# The personality routine is found through this one when exception tables are merged.
echo DW.ref.rust_eh_personality >> "$work/api"
# NOTE: without --strip-unneeded, names that only dropped code referred to stay as undefined symbols.
# Some are weak in Rust's runtime and strong here, and then the other library's cannot be linked.
objcopy -R .llvmbc -R .llvmcmd --keep-global-symbols="$work/api" --strip-unneeded \
  "$work/all.o" "$work/mxfp4train.o"
rm -f "$2"
ar rcs "$2" "$work/mxfp4train.o"
