#!/usr/bin/env python3
"""Writes src/mxfp4train/_cdef.py, include/mxfp4train.h as cffi reads it.

  bindings/python/gen/cdef.py           writes the file
  bindings/python/gen/cdef.py --check   fails if the one that is there is another

cffi's parser knows no comments of one line and no preprocessor, but takes a macro that is a number.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HEADER = ROOT / "include/mxfp4train.h"
OUTPUT = ROOT / "bindings/python/src/mxfp4train/_cdef.py"

INTRODUCTION = '''\
"""The C API for cffi. Made from include/mxfp4train.h by gen/cdef.py, to be run when it changes."""

CDEF = """
'''


def cdef(header: str) -> str:
    """The declarations of a header, and its macros that are numbers."""
    code = re.sub(r"//.*", "", header)
    # What only C++ sees.
    code = re.sub(r"#ifdef __cplusplus\n.*?#endif *\n", "", code, flags=re.DOTALL)
    numbers = dict(re.findall(r"^#define (MXT_\w+) (\d+)$", code, re.MULTILINE))
    code = re.sub(r"^#.*$", "", code, flags=re.MULTILINE)
    # cffi wants lengths of arrays as numbers.
    code = re.sub(r"\[(\w+)\]", lambda match: f"[{numbers[match[1]]}]", code)
    lines = [line.rstrip() for line in code.splitlines() if line.strip()]
    macros = [f"#define {name} {number}" for name, number in numbers.items()]
    return "\n".join(macros + lines) + "\n"


def main() -> int:
    """Writes or compares the file."""
    text = f'{INTRODUCTION}{cdef(HEADER.read_text(encoding="utf-8"))}"""\n'
    if sys.argv[1:] == ["--check"]:
        if not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != text:
            print(f"{OUTPUT}: expected what the header makes; run {__file__}", file=sys.stderr)
            return 1
        return 0
    if sys.argv[1:]:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    OUTPUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
