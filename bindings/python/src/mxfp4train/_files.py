"""Checkpoints without a folder: in memory, in a mapping, or wherever a store keeps its files."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator, MutableMapping
from typing import Any, BinaryIO, Protocol, Union

from . import _callbacks as callbacks
from ._calls import Handle, ask, c_string, call, make, options, path
from ._errors import Busy
from ._interrupt import whole
from ._library import ffi, lib, text_of


class FileStore(Protocol):
    """What a program gives to keep the files of a checkpoint itself.

    A save calls `begin`, then for one file after the other `create`, with its size in bytes,
    `write` and `close` of what that returned, and in the end `commit`, or `abort` where anything
    failed. Until `commit` returns, and after `abort`, `open` finds the files of the save before;
    behind it those of this one, and no "trainer.json" or "trainer.safetensors" where a model was
    saved without training state. What one raises, the call that loads or saves raises.
    """

    def open(self, name: str) -> BinaryIO:
        """A file that can be read and seeked, or FileNotFoundError."""

    def begin(self) -> Any:
        """A save begins."""

    def create(self, name: str, size: int) -> BinaryIO:
        """A file to be written, from its first byte to its last."""

    def commit(self) -> Any:
        """All files are written and closed: they take the place of those before."""

    def abort(self) -> Any:
        """The save is given up; its files are closed."""


class Files(Handle, MutableMapping[str, bytes]):
    """The files of a checkpoint in memory, as bytes by their names; there are none at first.

    `Trainer.save`, `Trainer.load` and the like take it in place of a folder, and load from it at
    full speed: numbers go straight from these bytes into the model. What `files["config.json"]`
    gives is a copy.
    """

    def __init__(self) -> None:
        self._own(make("files", lib.mxt_files_in_memory))
        # NOTE: between the place of some bytes and the end of their copy nothing may change them.
        self._lock = threading.RLock()
        # The thread whose run saves here.
        self._runner: int | None = None

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The bytes stay where they are, also where another thread closes the files."""
        with self._lock:
            self._check_runner()
            self._cell.hold("Files")
            try:
                yield
            finally:
                self._cell.leave()

    def _check_runner(self) -> None:
        if self._runner not in (None, threading.get_ident()):
            raise Busy("a run on another thread saves to these files; look at them in its on_step")

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        """For this thread alone: a run replaces bytes at any time."""
        with self._lock:
            self._check_runner()
            before, self._runner = self._runner, threading.get_ident()
        try:
            yield
        finally:
            self._runner = before

    def lend(self, name: str, content: Any) -> None:
        """Puts a file without a copy: bytes, an mmap or whatever else has a buffer.

        It must not change, and is kept, until the file is replaced or removed, or all are closed.
        """
        buffer = ffi.from_buffer(content)
        pointer = callbacks.pointer_to((content, buffer))
        where = c_string("name", name.encode())
        with self._lock, callbacks.lending(pointer):
            function = lib.mxt_files_lend
            call(function, self, where, buffer, len(buffer), pointer, callbacks.on_free)

    def __getitem__(self, name: str) -> bytes:
        if not isinstance(name, str) or name not in list(self):
            raise KeyError(name)
        place, count = ffi.new("void const **"), ffi.new("size_t *")
        where = c_string("name", name.encode())
        with self._held():
            call(lib.mxt_files_view, self, where, place, count)
            return bytes(ffi.buffer(place[0], count[0])) if count[0] else b""

    def __setitem__(self, name: str, content: Any) -> None:
        buffer = ffi.from_buffer(content)
        with self._lock:
            call(lib.mxt_files_put, self, c_string("name", name.encode()), buffer, len(buffer))

    def __delitem__(self, name: str) -> None:
        with self._lock:
            if not isinstance(name, str) or name not in list(self):
                raise KeyError(name)
            call(lib.mxt_files_remove, self, c_string("name", name.encode()))

    def __iter__(self) -> Iterator[str]:
        with self._held():
            files = self._cell.pointer
            count = lib.mxt_files_count(files)
            names = [lib.mxt_files_name(files, index) for index in range(count)]
            return iter([text_of(name) for name in names if name != ffi.NULL])

    def __len__(self) -> int:
        return ask(lib.mxt_files_count, self, 0)

    # As objects, and not by what they hold.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _description(self) -> str:
        try:
            return f" {list(self)}"
        except Busy:
            return ""


class _Stored(Handle):
    """The C library's handle of a store, for one call."""

    def _kind(self) -> str:
        return "files"

    def __init__(self, store: Any) -> None:
        state = callbacks.Owned(_State(store))
        pointer = state.pointer()
        self._lent = (state,)
        given = {
            "user_data": pointer,
            "open": callbacks.on_file_open,
            "read": callbacks.on_file_read,
            "close": callbacks.on_file_close,
            "begin": callbacks.on_files_begin,
            "create": callbacks.on_file_create,
            "write": callbacks.on_file_write,
            "commit": callbacks.on_files_commit,
            "abort": callbacks.on_files_abort,
            "user_data_free": callbacks.on_free,
        }
        struct = options("mxt_file_callbacks", given, [])
        with callbacks.lending(pointer):
            self._own(make("files", lib.mxt_files_from_callbacks, struct))


class _State:
    """A store with the files that are open, by their numbers."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.files: dict[int, Any] = {}
        self.last = 0

    def add(self, file: Any) -> int:
        self.last += 1
        self.files[self.last] = file
        return self.last


class _Mapping:
    """A mapping of names to bytes as a store. What is being saved is kept until it is whole."""

    def __init__(self, mapping: MutableMapping[str, bytes]) -> None:
        self.mapping = mapping
        self.new: dict[str, _Growing] = {}

    def open(self, name: str) -> BinaryIO:
        try:
            return io.BytesIO(self.mapping[name])
        except KeyError:
            raise FileNotFoundError(name) from None

    def begin(self) -> None:
        self.new = {}

    def create(self, name: str, _size: int) -> Any:
        self.new[name] = _Growing()
        return self.new[name]

    def commit(self) -> None:
        checkpoint = ("config.json", "model.safetensors", "trainer.json", "trainer.safetensors")
        # Of a checkpoint before, nothing stays beside one; adapters are none.
        is_one = any(name in self.new for name in checkpoint)
        names = [*self.new, *(name for name in checkpoint if is_one and name not in self.new)]
        before = {name: self.mapping[name] for name in names if name in self.mapping}
        try:
            for name in names:
                if name in self.new:
                    self.mapping[name] = bytes(self.new[name].content)
                elif name in before:
                    del self.mapping[name]
        except BaseException:
            for name in names:
                if name in before:
                    self.mapping[name] = before[name]
                else:
                    self.mapping.pop(name, None)
            raise
        finally:
            self.new = {}

    def abort(self) -> None:
        self.new = {}


class _Growing:
    """A file that keeps what is written."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, part: Any) -> None:
        self.content += part

    def close(self) -> None:
        pass


Place = Union[str, "os.PathLike[Any]", Files, MutableMapping[str, bytes], FileStore]
"""Where a checkpoint is: a folder, or files without one."""


def files_of(place: Any) -> Handle | None:
    """The files that a place means, or None for a folder."""
    if isinstance(place, Files):
        return place
    if isinstance(place, MutableMapping):
        return _Stored(_Mapping(place))
    if hasattr(place, "open") and hasattr(place, "commit"):
        return _Stored(place)
    return None


def run_of(files: Handle | None) -> contextlib.AbstractContextManager[None]:
    """What holds for a run that saves to files, if it does."""
    return files._run() if isinstance(files, Files) else contextlib.nullcontext()


def folder_of(place: Place) -> Any:
    """The path of a place that is a folder, as C's."""
    return path("folder", place)  # type: ignore[arg-type]


def save(folder: Place, to_folder: Any, to_files: Any, this: Handle, *more: Any) -> None:
    """Saves `this` by one of two functions of C."""
    files = files_of(folder)
    if files is None:
        call(to_folder, this, folder_of(folder), *more)
    elif isinstance(files, Files):
        with files._lock:
            call(to_files, this, files, *more)
    else:
        with files, whole():
            call(to_files, this, files, *more)


def load(kind: str, from_files: Any, engine: Handle, files: Handle, *more: Any) -> Any:
    """Makes an object of what files hold."""
    if isinstance(files, Files):
        with files._lock:
            return make(kind, from_files, engine, files, *more)
    with files:
        return make(kind, from_files, engine, files, *more)
