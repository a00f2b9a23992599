"""Tokens to train on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Callable, overload

import numpy as np

from . import _arrays as arrays
from . import _callbacks as callbacks
from ._calls import Handle, ask, call, choice, make, options, path, sized, tuple_of, whole
from ._library import ffi, lib
from ._stats import Coverage

# In the order of C's numbers, from 0.
TOKEN_TYPES = ("auto", "u16", "u32", "i64", "u8", "i32")

Fill = Callable[[int, np.ndarray, np.ndarray], Any]
PackedFill = Callable[[int, np.ndarray, np.ndarray, np.ndarray], Any]

# Tokens that one call reads for a loop.
CHUNK = 1 << 14


class Dataset(Handle):
    """Tokens: of files, which are mapped and not read, or a copy of an array.

        Dataset("data/train_*.bin")         # a file, or all that a pattern matches
        Dataset(["a.bin", "b.npy"])         # files in this order
        Dataset(numpy.array([1, 2, 3]))     # a copy of tokens
        Dataset.from_memory(array)          # tokens that are not copied
        Dataset.from_windows(1000, fill)    # windows that the program fills

    `token_type` is what a token is in a file without a header: "u16", "u32", "i64", "u8" or "i32";
    "auto" finds out. A dataset is read like a sequence: `dataset[0]` is an int, `dataset[10:20]` an
    array of uint32, and `len(dataset)` the number of tokens of all files.

    Raises InvalidArgument (a pattern that matches nothing), FileError, FormatError, OutOfMemory.
    """

    def __init__(self, source: Any, *, token_type: str | None = None) -> None:
        how = options(
            "mxt_dataset_options", {"token_type": choice("token_type", TOKEN_TYPES, token_type)}, []
        )
        if isinstance(source, (str, bytes, os.PathLike)):
            pattern = path("source", source)
            self._own(make("dataset", lib.mxt_dataset_open_with, pattern, how))
            return
        if isinstance(source, (list, tuple)) and source and is_path(source[0]):
            strings = [path("source", name) for name in source]
            paths = ffi.new("char *[]", strings)
            open_files = lib.mxt_dataset_open_files_with
            self._own(make("dataset", open_files, paths, len(strings), how))
            return
        given, count = arrays.tokens("source", source, arrays.HOST)
        self._own(make("dataset", lib.mxt_dataset_from_tokens, given, count))

    @classmethod
    def from_memory(cls, tokens: np.ndarray) -> Dataset:
        """Tokens of an array, which is not copied: C-contiguous, of uint16 or uint32.

        The array is kept as long as it is used, and must not change. It may be a `numpy.memmap`.
        """
        types = {
            np.dtype(np.uint16): lib.MXT_TOKEN_TYPE_U16,
            np.dtype(np.uint32): lib.MXT_TOKEN_TYPE_U32,
        }
        tokens = arrays.host_array(tokens)
        if tokens.dtype not in types or not tokens.flags.c_contiguous:
            raise TypeError(
                "tokens: expected a C-contiguous array of uint16 or uint32, got "
                f"{tokens.dtype} with strides {tokens.strides}; Dataset(tokens) copies any"
            )
        kept = callbacks.pointer_to(tokens)
        dataset = cls.__new__(cls)
        with callbacks.lending(kept):
            place = ffi.from_buffer(tokens)
            kind = types[tokens.dtype]
            new = lib.mxt_dataset_from_memory
            dataset._own(make("dataset", new, place, tokens.size, kind, kept, callbacks.on_free))
        return dataset

    @classmethod
    def from_windows(cls, count: int, fill: Fill) -> Dataset:
        """`count` windows that the program fills, numbered from 0, each time that one is wanted.

        `fill(number, tokens, weights)` fills two arrays: (sequence_length + 1) tokens, uint32, of
        which each but the first is the target of the one before it, and (sequence_length) float32,
        a factor of each target's loss, at least 0, which are 1 before: 0 for what is not to be
        learned, as a prompt or padding. A step whose weights are all 0 has a loss of 0. The same
        number has to give the same window, so that a resumed run is the run that was not stopped.
        It runs on the thread that trains, and must not use that trainer. What it raises, the step
        raises, and changes nothing.

        NOTE: both arrays are the library's memory, which is used again after the call. Keep what is
        wanted of them with `tokens.copy()`: an array that is kept itself has other numbers later,
        without an error.

        Training asks for all of them once in an epoch, in an order that the engine's seed gives. Of
        such a dataset no tokens can be read.
        """
        return cls._filled(lib.mxt_dataset_from_windows, count, fill, callbacks.on_window)

    @classmethod
    def from_packed_windows(cls, count: int, fill: PackedFill) -> Dataset:
        """`from_windows` of windows that are packed with documents, which are kept apart.

        `fill(number, tokens, weights, documents)` fills one array more: (sequence_length) uint32, the
        number of the document that each input is of, which is 0 before. Where it changes along the
        window another document begins: attention looks at no document but a token's own, and
        positions are counted from where it begins, so that each has the logits that it has alone. A
        window of one number is cut at the trainer's `document_end`, where there is one. The last
        input of a document has the first of the next as its target: its weight is to be 0 where that
        is not to be learned.
        """
        new = lib.mxt_dataset_from_packed_windows
        return cls._filled(new, count, fill, callbacks.on_packed_window)

    @classmethod
    def _filled(cls, new: Any, count: int, fill: Callable[..., Any], callback: Any) -> Dataset:
        if not callable(fill):
            raise TypeError(f"fill: expected a function, got {fill!r}")
        number = whole("count", count, "uint64_t")
        dataset = cls.__new__(cls)
        filler = callbacks.Owned(fill)
        dataset._lent = (filler,)
        kept = filler.pointer()
        with callbacks.lending(kept):
            dataset._own(make("dataset", new, number, callback, kept, callbacks.on_free))
        return dataset

    def __len__(self) -> int:
        return ask(lib.mxt_dataset_token_count, self, 0)

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> np.ndarray: ...

    def __getitem__(self, place: int | slice) -> int | np.ndarray:
        count = len(self)
        if isinstance(place, slice):
            start, stop, step = place.indices(count)
            if step != 1:
                raise ValueError(f"expected a slice with a step of 1, got {step}")
            return self._read(start, max(stop - start, 0))
        index = whole("place", place, "int64_t")
        if not -count <= index < count:
            raise IndexError(f"expected a place from 0 to {count - 1}, got {place}")
        return int(self._read(index % count, 1)[0])

    def __iter__(self) -> Iterator[int]:
        for first in range(0, len(self), CHUNK):
            yield from self[first : first + CHUNK].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(
                "expected a copy to be allowed: tokens may be in a file, of other numbers"
            )
        return self[:] if dtype is None else self[:].astype(dtype)

    def _read(self, first: int, count: int) -> np.ndarray:
        found = np.empty(count, np.uint32)
        room = ffi.from_buffer("uint32_t[]", found, require_writable=True)
        call(lib.mxt_dataset_read, self, first, count, room)
        return found

    @property
    def max_token(self) -> int:
        """The largest token: a model needs a vocab_size above it. Reads all files at first."""
        token = ffi.new("uint32_t *")
        call(lib.mxt_dataset_max_token, self, token)
        found: int = token[0]
        return found

    def coverage(self, sequence_length: int) -> Coverage:
        """What training with sequences of that length reads of the files."""
        coverage = sized("mxt_coverage")
        length = whole("sequence_length", sequence_length)
        call(lib.mxt_dataset_coverage, self, length, coverage)
        return tuple_of(Coverage, coverage)

    def _description(self) -> str:
        return f" of {len(self)} tokens"


def is_path(value: Any) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))
