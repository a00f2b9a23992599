"""The program mxtrain, as the wheel carries it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent / "bin" / "mxtrain"


def main() -> int:
    """Becomes mxtrain, with the same arguments."""
    if not PROGRAM.exists():
        print(
            f"mxtrain: expected the program at {PROGRAM}, which a wheel of mxfp4train has; "
            "install the wheel, or build it with `cargo build --release -p mxtrain`",
            file=sys.stderr,
        )
        return 1
    os.execv(PROGRAM, ["mxtrain", *sys.argv[1:]])
