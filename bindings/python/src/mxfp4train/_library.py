"""Finds and opens the C library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cffi

from ._cdef import CDEF

# What a wheel carries.
BUNDLED = Path(__file__).resolve().parent / "lib" / "libmxfp4train.so"
VARIABLE = "MXFP4TRAIN_LIBRARY"

ffi: Any = cffi.FFI()
ffi.cdef(CDEF)


def library_path() -> str:
    """The library beside the package, else the one that MXFP4TRAIN_LIBRARY names."""
    if BUNDLED.exists():
        return str(BUNDLED)
    path = os.environ.get(VARIABLE, "")
    if not path:
        raise ImportError(
            f"expected the mxfp4train library at {BUNDLED}, or its path in {VARIABLE}; "
            f"install the wheel, or set {VARIABLE} to the path of libmxfp4train.so"
        )
    return os.path.abspath(path)


def open_library() -> Any:
    """The library's functions and constants. An ImportError where it is not there, or another."""
    path = library_path()
    try:
        library = ffi.dlopen(path)
    except OSError as error:
        raise ImportError(
            f"expected the mxfp4train library at {path}: {error}; "
            f"set {VARIABLE} to the path of libmxfp4train.so"
        ) from error
    try:
        abi = library.mxt_abi_version()
    except AttributeError as error:
        raise ImportError(f"expected the mxfp4train library at {path}: {error}") from error
    if abi != library.MXT_ABI_VERSION:
        raise ImportError(
            f"expected a library with ABI version {library.MXT_ABI_VERSION}, got {abi} at {path}; "
            "install the library of this package's version"
        )
    return library


lib = open_library()


def text_of(pointer: Any) -> str:
    """A text of the library, which is copied."""
    text: str = ffi.string(pointer).decode("utf-8", "replace")
    return text
