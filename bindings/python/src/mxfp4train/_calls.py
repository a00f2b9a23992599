"""What every call of the library needs: objects that stay alive, errors, option structs."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Callable, TypeVar

from ._errors import Closed, error_of
from ._library import ffi, lib, text_of

T = TypeVar("T")


class _Thrown(threading.local):
    """What callbacks on this thread have thrown, and how deep this thread is in callbacks."""

    def __init__(self) -> None:
        # A place for each call that this thread is in, the innermost last. An exception stands
        # beside whether it makes the call fail, or asks it to end.
        self.places: list[list[tuple[BaseException, bool]]] = []
        # Above 0 while a callback runs that an exception may end in order.
        self.inside = 0
        # Whether a function runs that Ctrl-C is to leave alone, as one of a store.
        self.undisturbed = False


thrown = _Thrown()


class _Cell:
    """A pointer of the library with the number of calls that are using it.

    NOTE: the library's object is freed when no call uses it any more, not when `close` is called:
    another thread may be about to hand the pointer to the library.
    """

    def __init__(self, pointer: Any, free: Callable[[Any], None]) -> None:
        self.pointer = pointer
        self.free = free
        self.uses = 0
        self.closed = False
        # NOTE: reentrant, because a signal handler may come in anywhere.
        self.lock = threading.RLock()

    def hold(self, kind: str) -> Any:
        """The pointer, which stays valid until `leave`."""
        with self.lock:
            if self.closed:
                raise Closed(f"expected an open {kind}, got one that is closed")
            self.uses += 1
            return self.pointer

    def leave(self) -> None:
        with self.lock:
            self.uses -= 1
        self.drop()

    def close(self) -> None:
        self.closed = True
        self.drop()

    def drop(self) -> None:
        """Frees what is closed and in no call."""
        with self.lock:
            if not self.closed or self.uses > 0:
                return
            pointer, self.pointer = self.pointer, ffi.NULL
        # NOTE: not with the lock, because the library may call back. Of NULL it frees nothing.
        self.free(pointer)


class Handle:
    """An object of the library: a context manager, which `close` frees at once.

    Else it is freed when nothing refers to it any more. Objects may be closed in any order and by
    any thread, and in callbacks; one that is inside a call is freed when the call returns.
    """

    _cell: _Cell
    # What the library may call as long as this object is there.
    _lent: tuple[Any, ...] = ()

    def _own(self, pointer: Any) -> None:
        """Owns `pointer` from now on."""
        self._cell = _Cell(pointer, getattr(lib, f"mxt_{self._kind()}_free"))
        self._finalizer = weakref.finalize(self, self._cell.close)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._cell.closed

    def close(self) -> None:
        """Gives the object up; a second call does nothing."""
        self._finalizer.detach()
        self._cell.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"<mxfp4train.{kind}{': closed' if self.closed else self._description()}>"

    def _description(self) -> str:
        return ""

    def _kind(self) -> str:
        """What C calls it."""
        return type(self).__name__.lower()

    # Two objects with one pointer would free it twice.
    def __reduce__(self) -> Any:
        raise TypeError(
            f"expected plain data, got a {type(self).__name__}, which cannot be copied or pickled; "
            "a checkpoint can: save and load"
        )


def call(function: Callable[..., int], *arguments: Any) -> None:
    """Makes a call that can fail, with objects as they are among its arguments.

    Raises what a callback has thrown during the call, with its traceback, else the library's error.
    """
    held: list[_Cell] = []
    place: list[tuple[BaseException, bool]] = []
    places = thrown.places
    depth = len(places)
    try:
        places.append(place)
        pointers = []
        for argument in arguments:
            if isinstance(argument, Handle):
                pointers.append(argument._cell.hold(type(argument).__name__))
                held.append(argument._cell)
            else:
                pointers.append(argument)
        status = function(*pointers)
        # NOTE: at once, because the message is of this thread's last call.
        message = text_of(lib.mxt_last_error()) if status != lib.MXT_OK else ""
    finally:
        del places[depth:]
        for cell in held:
            cell.leave()
    try:
        if place:
            raise first_of(place, status, message)
        if status != lib.MXT_OK:
            raise error_of(status, message)
    finally:
        # An exception that has its own frame in its traceback would be a cycle.
        place.clear()


def first_of(
    place: list[tuple[BaseException, bool]], status: int, message: str
) -> BaseException:
    """The first of the exceptions of a call, with what failed beside it, as a run's save."""
    first, fails = place[0]
    if status in (lib.MXT_OK, lib.MXT_STOPPED):
        return first
    if fails or first.__cause__ is not None:
        # What the library says of it, with what else it could not do.
        note(first, message)
        return first
    error: BaseException = error_of(status, message)
    others = (other for other, fails in place[1:] if fails and other is not first)
    error.__cause__ = next(others, None)
    first.__cause__ = error
    return first


def note(exception: BaseException, text: str) -> None:
    """`BaseException.add_note`, which Python has from 3.11 on."""
    try:
        notes = exception.__dict__.setdefault("__notes__", [])
        notes.append(text)
    except (AttributeError, TypeError):
        # Whatever else it is that was raised.
        pass


def ask(function: Callable[[Any], T], handle: Handle, closed: T) -> T:
    """Asks for what cannot fail, of an open object; `closed` is the answer of a closed one."""
    try:
        pointer = handle._cell.hold("")
    except Closed:
        return closed
    try:
        return function(pointer)
    finally:
        handle._cell.leave()


def make(kind: str, function: Callable[..., int], *arguments: Any) -> Any:
    """The new handle that a function stores behind its other arguments."""
    place = ffi.new(f"mxt_{kind} **")
    try:
        call(function, *arguments, place)
    except BaseException:
        # A callback has thrown, and yet the object was made.
        getattr(lib, f"mxt_{kind}_free")(place[0])
        raise
    return place[0]


def options(struct: str, given: dict[str, Any], keep: list[Any]) -> Any:
    """A pointer to a struct with the library's defaults, but for what is given and not None.

    What its pointers point to is added to `keep`, to be kept as long as the struct is used.
    """
    filled = ffi.new(f"{struct} *")
    call(getattr(lib, f"{struct}_init"), filled, ffi.sizeof(struct))
    fields = dict(ffi.typeof(struct).fields)
    for name, value in given.items():
        if value is None:
            continue
        kind = fields[name].type
        if kind.kind != "primitive":
            keep.append(value)
        elif kind.cname in ("float", "double"):
            value = number(name, value)
        else:
            value = whole(name, value, kind.cname)
        setattr(filled, name, value)
    return filled


def sized(struct: str) -> Any:
    """A pointer to a struct for the library to fill, whose size is set."""
    filled = ffi.new(f"{struct} *")
    filled.struct_size = ffi.sizeof(struct)
    return filled


def whole(what: str, value: Any, kind: str = "size_t") -> int:
    """A whole number that fits C's type; `what` names it in errors."""
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}: expected a whole number, got {value!r}") from None
    bits = 8 * ffi.sizeof(kind)
    signed = int(ffi.cast(kind, -1)) < 0
    least, most = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if not least <= found <= most:
        raise ValueError(f"{what}: expected a whole number from {least} to {most}, got {value!r}")
    return found


def number(what: str, value: Any) -> float:
    """A number for C; `what` names it in errors."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{what}: expected a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what}: expected a number, got {value!r}") from None


def choice(what: str, names: Sequence[str], value: str | None) -> int | None:
    """C's number of one of `names`, which are in its order from 0; None stays None."""
    if value is None:
        return None
    if value not in names:
        raise ValueError(f"{what}: expected one of {', '.join(map(repr, names))}, got {value!r}")
    return names.index(value)


def text(what: str, value: str | None) -> Any:
    """Text as C's, to be kept for the call; None stays None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{what}: expected text, got {value!r}")
    return c_string(what, value.encode())


def path(what: str, value: str | bytes | os.PathLike[Any]) -> Any:
    """A path as C's, to be kept for the call."""
    return c_string(what, os.fsencode(value))


def c_string(what: str, value: bytes) -> Any:
    if b"\0" in value:
        raise ValueError(f"{what}: expected text without zero characters, got {value!r}")
    return ffi.new("char[]", value)


def tuple_of(kind: Callable[..., T], struct: Any, **instead: Any) -> T:
    """A struct of the library as a named tuple, with some fields replaced."""
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return kind(*(instead[name] if name in instead else getattr(struct, name) for name in fields))
