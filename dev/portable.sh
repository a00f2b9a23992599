#!/usr/bin/env bash
# Links what `make` built once more, for machines with an older glibc than this one. Called by
# `make portable`.
#
# Usage: dev/portable.sh FLOOR FOLDER      (such as 2.17 target/portable)
#
# A program asks for the newest version of a function that the linking machine's glibc has, so the
# floor is a matter of the linker alone: the objects are those of target/release, and the bits of every
# result with them. zig knows which functions each version of glibc had.
# Needs Python 3 with pip, unless `zig` is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
floor=${1:?usage: dev/portable.sh FLOOR FOLDER}
folder=${2:?usage: dev/portable.sh FLOOR FOLDER}
machine=$(uname -m)
mkdir -p "$folder"
folder=$(realpath "$folder")

if command -v zig >/dev/null; then
    zig=(zig)
else
    zig=("$PWD/target/zig/bin/python" -m ziglang)
    if [[ ! -x ${zig[0]} ]]; then
        python3 -m venv target/zig
        target/zig/bin/pip install --quiet --disable-pip-version-check ziglang==0.17.1
    fi
fi

# The linker as rustc calls it. NOTE: the unwinder is the system's libgcc_s. zig would link one of its own
# into the library, and a C++ exception on its way through a run would meet two that do not know
# each other's contexts.
linker=$folder/linker
unwinder=$(cc -print-file-name=libgcc_s.so.1)
cat > "$linker" <<EOF
#!/usr/bin/env bash
arguments=()
for argument; do
    case \$argument in
        -fuse-ld=* | -B* | -nodefaultlibs | -m64 | -no-pie | -pie | -l:libpthread.a) ;;
        -lgcc_s | -lgcc | -lgcc_eh) arguments+=('$unwinder') ;;
        *) arguments+=("\$argument") ;;
    esac
done
exec $(printf '%q ' "${zig[@]}") cc -target $machine-linux-gnu.$floor \\
    -Wl,--allow-shlib-undefined "\${arguments[@]}"
EOF
chmod +x "$linker"

version=$(sed -n 's/^#define MXT_ABI_VERSION //p' include/mxfp4train.h)
"$linker" -shared -o "$folder/libmxfp4train.so" \
    -Wl,--whole-archive target/release/libmxfp4train-packed.a -Wl,--no-whole-archive \
    -Wl,-soname,"libmxfp4train.so.$version" -Wl,-z,nodelete -Wl,--gc-sections \
    -lgcc_s -lm -lpthread -ldl -lc
cp target/release/libmxfp4train-packed.a "$folder"
cargo rustc --release --locked --target-dir target -p mxtrain -- -C linker="$linker"
cp target/release/mxtrain "$folder"

dev/glibc-floor.sh "$floor" "$folder/libmxfp4train.so" "$folder/mxtrain"
# That program was put in the ordinary one's place; cargo still has the other.
cargo build --quiet --release --locked --target-dir target -p mxtrain
