#!/bin/sh
# Fails if one of the files needs a newer glibc than FLOOR; prints what each needs.
#
# Usage: dev/glibc-floor.sh FLOOR FILE..      (such as 2.17 dist/bin/mxtrain)
#
# Needs GNU binutils.
set -eu
floor=${1:?usage: dev/glibc-floor.sh FLOOR FILE..}
shift
for file; do
    needed=$(objdump -T "$file" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -n 1)
    needed=${needed#GLIBC_}
    echo "$file needs glibc $needed"
    if [ "$(printf '%s\n' "$needed" "$floor" | sort -V | tail -n 1)" != "$floor" ]; then
        echo "expected no function newer than glibc $floor, got:" >&2
        objdump -T "$file" | grep "GLIBC_$needed" >&2
        exit 1
    fi
done
