"""Errors of the library, a class for each that a program may want to tell apart."""

from __future__ import annotations

from typing import Any

from ._library import lib


class MxtError(Exception):
    """A call that failed. The message is the library's: what was expected, what came, and the fix.

    `status` is one of the negative numbers of `mxt_status_code`.
    """

    status: int = 0

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status

    # NOTE: KeyError would show its message quoted.
    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> Any:
        return type(self), (self.args[0], self.status)


class Closed(MxtError, ValueError):
    """A call on an object that was closed before."""

    status = lib.MXT_ERROR_NULL


class InvalidArgument(MxtError, ValueError):
    """An argument or an option has a value that the call cannot use."""

    status = lib.MXT_ERROR_INVALID_ARGUMENT


class TokenRange(MxtError, ValueError):
    """A token is not below the vocabulary size of the model."""

    status = lib.MXT_ERROR_TOKEN_RANGE


class Busy(MxtError):
    """Another call is inside this object: from another thread, or this one came from a callback."""

    status = lib.MXT_ERROR_BUSY


class FileError(MxtError, OSError):
    """A file or folder cannot be opened, read, written or renamed."""

    status = lib.MXT_ERROR_IO


class FormatError(MxtError, ValueError):
    """A file is damaged, truncated or of a kind that this version does not read."""

    status = lib.MXT_ERROR_FORMAT


class Mismatch(MxtError, ValueError):
    """A file does not fit what it is used with, or ranks do not have alike what they must."""

    status = lib.MXT_ERROR_MISMATCH


class OutOfMemory(MxtError, MemoryError):
    """More memory is needed than the limit allows or the system gives."""

    status = lib.MXT_ERROR_OUT_OF_MEMORY


class Unsupported(MxtError):
    """The device or this build cannot do it; the message says what can be done instead."""

    status = lib.MXT_ERROR_UNSUPPORTED


class NotFinite(MxtError, ArithmeticError):
    """A loss, a gradient norm or a weight is NaN or infinite."""

    status = lib.MXT_ERROR_NOT_FINITE


class NoSuchTensor(MxtError, KeyError):
    """The model has no tensor of this name."""

    status = lib.MXT_ERROR_NO_SUCH_TENSOR


class Forked(MxtError):
    """The object was made before a fork in a parent of this process."""

    status = lib.MXT_ERROR_FORKED


class DeviceError(MxtError):
    """A GPU failed: close the object and what was made on the same device."""

    status = lib.MXT_ERROR_DEVICE


class Stopped(MxtError):
    """A stop was asked for while the call was at work. It has changed nothing."""

    status = lib.MXT_STOPPED


class PeerError(MxtError):
    """Another rank of the group failed, is gone, or does not answer."""

    status = lib.MXT_ERROR_PEER


class Panic(MxtError):
    """A defect of the library showed itself inside this call; please report the message."""

    status = lib.MXT_ERROR_PANIC


class Poisoned(MxtError):
    """A panic in an earlier call left this object unusable: close it."""

    status = lib.MXT_ERROR_POISONED


# NOTE: not `Closed`, which only this package finds. The library's word for NULL is a defect here.
CLASSES = {kind.status: kind for kind in MxtError.__subclasses__() if kind is not Closed}


def error_of(status: int, message: str) -> MxtError:
    """The exception for a status. One that this package does not know is an MxtError."""
    return CLASSES.get(status, MxtError)(message, status)
