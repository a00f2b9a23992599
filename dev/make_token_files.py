#!/usr/bin/env python3
"""Writes tests/tokens/npy, arrays as numpy.save writes them: those that are read and those that are not.

Needs numpy. tests/data.rs says what each file holds.
"""

from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parents[1] / "tests/tokens/npy"
TOKENS = [5, 0, 250, 17, 99, 1]


def save(name, array, version=None):
    with open(OUT / f"{name}.npy", "wb") as file:
        np.lib.format.write_array(file, np.asanyarray(array), version=version)


OUT.mkdir(parents=True, exist_ok=True)
for dtype in ["u1", "u2", "u4", "i4", "i8"]:
    save(dtype, np.array(TOKENS, dtype=f"<{dtype}"))
for version in [(2, 0), (3, 0)]:
    save(f"version-{version[0]}", np.array(TOKENS, dtype="<u2"), version)
save("two-dimensions", np.array(TOKENS, dtype="<u2").reshape(2, 3))
save("wide", np.array([0, 70_000, 4_294_967_295], dtype="<i8"))
save("negative", np.array([3, 4, -100, 5], dtype="<i8"))
save("negative-32", np.array([3, 4, -1, 5], dtype="<i4"))
save("above-u32", np.array([3, 4_294_967_296], dtype="<i8"))

save("fortran", np.asfortranarray(np.array(TOKENS, dtype="<u2").reshape(2, 3)))
save("big-endian", np.array(TOKENS, dtype=">u2"))
save("three-dimensions", np.array(TOKENS, dtype="<u2").reshape(1, 2, 3))
save("no-dimension", np.array(7, dtype="<u2"))
save("empty", np.array([], dtype="<u2"))
save("i2", np.array(TOKENS, dtype="<i2"))
save("u8", np.array(TOKENS, dtype="<u8"))
save("float", np.array(TOKENS, dtype="<f4"))
save("text", np.array(["a", "bc"]))
save("objects", np.array([[1], [2, 3]], dtype=object))
save("records", np.array([(1, 2)], dtype=[("a", "<u2"), ("b", "<i8")]))
