#!/usr/bin/env bash
# Puts Debian 11's Julia 1.5.3 into a folder, without installing anything:
#
#   dev/julia.sh [FOLDER]     default: target/julia, where tests/julia.rs looks
#
# FOLDER/julia then runs it. A folder that has it already is left as it is. Takes half a minute and
# 355 MB. Needs apt and dpkg, as on Debian and what is made from it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath --canonicalize-missing "${1:-target/julia}")
if [[ -x $folder/julia ]] && "$folder/julia" --version; then
    exit
fi
if [[ -e $folder && ! -e $folder/root/usr/bin/julia ]]; then
    echo "$folder: expected a new folder, or one that this script has made" >&2
    exit 2
fi

# An apt of its own: it knows this one release and nothing of what is installed here.
made=$folder.part
rm -rf "$made"
apt=$made/apt
mkdir -p "$made/root" "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/etc/preferences.d"
sources=/etc/apt/sources.list.d/debian.sources
mirror=$(sed -n 's/^URIs: *//p' "$sources" 2>/dev/null | head -n 1 || true)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} bullseye main" \
    >"$apt/etc/sources.list"
: >"$apt/status"
options=(
    -qq
    -o "Dir::Etc=$apt/etc"
    -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$apt/lists"
    -o "Dir::State::status=$apt/status"
    -o "Dir::Cache=$apt/cache"
    -o APT::Install-Recommends=false
    -o Acquire::Languages=none
    -o Acquire::Retries=3
    -o APT::Sandbox::User=root
    -o Debug::NoLocking=1
)
apt-get "${options[@]}" update
apt-get "${options[@]}" install -y --download-only julia >/dev/null

for package in "$apt"/cache/archives/*.deb; do
    name=${package##*/}
    case ${name%%_*} in
        # NOTE: the machine's own are newer, and the library that Julia is to load needs those.
        libc6 | libc-bin | libcrypt1 | libgcc-s1 | libstdc++6 | gcc-10-base) ;;
        # Programs that only installing needs.
        dpkg | tar | perl* | debconf*) ;;
        *) dpkg --extract "$package" "$made/root" ;;
    esac
done
rm -rf "$apt"

cat >"$made/julia" <<'SCRIPT'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
for lib in "$root"/usr/lib/*-linux-gnu; do
    LD_LIBRARY_PATH=$lib:$lib/julia:$root/lib/${lib##*/}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
done
export LD_LIBRARY_PATH JULIA_BINDIR="$root/usr/bin"
exec "$root/usr/bin/julia" "$@"
SCRIPT
chmod +x "$made/julia"
"$made/julia" --version
rm -rf "$folder"
mv "$made" "$folder"
