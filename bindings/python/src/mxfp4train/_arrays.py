"""Arrays on their way to the library: numpy's, what becomes numpy's, and arrays of a GPU.

An array that is as C wants it is not copied. One on a GPU shows itself by
`__cuda_array_interface__` (PyTorch's, CuPy's, Numba's) or by DLPack alone (JAX's, TensorFlow's); its
pointer is passed through.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from ._library import ffi, lib

# An array's pointer for C. What it points to lives as long as the object.
Pointer = Any

LARGEST = 0xFFFFFFFF


class Place(NamedTuple):
    """Where the arrays of an engine may lie, besides the host's memory."""

    device: str
    """The name of the engine's device; empty where arrays of the host alone are taken."""
    stream: Optional[int] = None
    """The stream of the host that the engine works on, if it has one."""


HOST = Place("")


def tokens(
    what: str, value: Any, place: Place, shape: Sequence[int] | None = None, ignored: bool = False
) -> tuple[Pointer, int]:
    """Tokens as C wants them, and how many they are.

    With `ignored`, numbers below 0 become IGNORED.
    """
    cuda = cuda_pointer(what, value, "uint32_t *", ("<u4", "<i4"), place, shape)
    if cuda is not None:
        return cuda
    array = host_array(value)
    if array.size == 0 and array.dtype.kind == "f":
        # An empty list.
        array = array.astype(np.uint32)
    if array.dtype.kind not in "ui":
        raise TypeError(f"{what}: expected whole numbers, such as uint32, got {array.dtype}")
    check_shape(what, array.shape, shape)
    if array.dtype != np.uint32:
        array = as_uint32(what, array, ignored)
    array = np.ascontiguousarray(array)
    return ffi.from_buffer("uint32_t[]", array), array.size


def as_uint32(what: str, array: np.ndarray, ignored: bool) -> np.ndarray:
    """Whole numbers of another type, all of which must fit."""
    if array.size == 0:
        return array.astype(np.uint32)
    least, most = int(array.min()), int(array.max())
    if most > LARGEST or (least < 0 and not ignored):
        wrong = most if most > LARGEST else least
        raise ValueError(f"{what}: expected tokens from 0 to {LARGEST}, got {wrong}")
    if least < 0:
        array = np.where(array < 0, lib.MXT_IGNORED, array.astype(np.int64, copy=False))
    return array.astype(np.uint32)


def floats(
    what: str, value: Any, place: Place, shape: Sequence[int] | None = None
) -> tuple[Pointer, int]:
    """Numbers to be read as float32, and how many they are."""
    cuda = cuda_pointer(what, value, "float *", ("<f4",), place, shape)
    if cuda is not None:
        return cuda
    array = host_array(value)
    if array.dtype.kind not in "buif":
        raise TypeError(f"{what}: expected real numbers, such as float32, got {array.dtype}")
    check_shape(what, array.shape, shape)
    array = np.ascontiguousarray(array, dtype=np.float32)
    return ffi.from_buffer("float[]", array), array.size


def room(
    what: str, value: Any, place: Place, shape: Sequence[int] | None = None
) -> tuple[Pointer, int]:
    """An array of float32 for C to write into, and its length. Nothing is converted."""
    cuda = cuda_pointer(what, value, "float *", ("<f4",), place, shape, writable=True)
    if cuda is not None:
        return cuda
    if not isinstance(value, np.ndarray) and hasattr(value, "__array__"):
        # Such as a tensor of PyTorch, whose numpy array has the same memory; a copy would show.
        value = value.__array__()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{what}: expected a numpy array of float32 to fill, got {type(value)}")
    if value.dtype != np.float32 or not value.flags.c_contiguous or not value.flags.writeable:
        raise TypeError(
            f"{what}: expected a writable C-contiguous array of float32 to fill, got {value.dtype} "
            f"with strides {value.strides}{'' if value.flags.writeable else ', read-only'}"
        )
    check_shape(what, value.shape, shape)
    return ffi.from_buffer("float[]", value, require_writable=True), value.size


def host_array(value: Any) -> np.ndarray:
    """A numpy array of whatever can be one, without a copy where that can be."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        array: np.ndarray = np.from_dlpack(value)
        return array
    return np.asarray(value)


def cuda_pointer(
    what: str,
    value: Any,
    kind: str,
    types: tuple[str, ...],
    place: Place,
    shape: Sequence[int] | None,
    writable: bool = False,
) -> tuple[Pointer, int] | None:
    """The pointer and the length of an array on a GPU; None where it is none."""
    capsule = None
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        capsule, interface = of_dlpack(value, place)
    if interface is None:
        return None
    if not place.device.startswith("cuda"):
        why = f", where the engine is ({place.device})" if place.device else ""
        raise ValueError(f"{what}: expected an array in the host's memory{why}, got one on a GPU")
    if interface["typestr"] not in types:
        wanted = " or ".join(types)
        raise TypeError(
            f"{what}: expected an array of {wanted}, got {interface['typestr']}; convert it there"
        )
    found = tuple(interface["shape"])
    check_shape(what, found, shape)
    count = math.prod(found)
    step = 4
    for length, stride in reversed(list(zip(found, interface.get("strides") or ()))):
        if count > 0 and length > 1 and stride != step:
            raise ValueError(f"{what}: expected a C-contiguous array, got other strides")
        step *= length
    stream = interface.get("stream")
    if stream and stream != place.stream:
        # NOTE: what makes the array may still be queued there, and the engine's stream waits for no
        # other one, CUDA's default streams (1 and 2) included.
        own = "none of the host's" if place.stream is None else place.stream
        raise ValueError(
            f"{what}: expected an array that names no stream, or the engine's cuda_stream ({own}), "
            f"got one of the stream {stream}; make it on the engine's stream, or synchronize and "
            "pass it without one (CuPy: CUPY_CUDA_ARRAY_INTERFACE_EXPORT_VERSION=2)"
        )
    pointer, read_only = interface["data"]
    if writable and read_only:
        raise ValueError(f"{what}: expected an array to write into, got one that is read-only")
    # The capsule keeps what the pointer points to.
    return ffi.gc(ffi.cast(kind, pointer), lambda _, kept=capsule: None), count


class _DLTensor(ctypes.Structure):
    """DLPack's, which a managed tensor begins with."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


# CUDA's memory, and CUDA's managed memory.
DLPACK_CUDA = (2, 13)


def of_dlpack(value: Any, place: Place) -> tuple[Any, dict[str, Any] | None]:
    """A capsule and what `__cuda_array_interface__` would say, of an array on a GPU by DLPack.

    The producer is told the engine's stream where that is the program's; else it is asked to wait for
    nothing, as the engine's own stream waits for no other one.
    """
    device = getattr(value, "__dlpack_device__", None)
    if device is None or int(device()[0]) not in DLPACK_CUDA:
        return None, None
    capsule = value.__dlpack__(stream=-1 if place.stream is None else place.stream)
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _DLTensor.from_address(pointer_of(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    size = tensor.bits // 8 * tensor.lanes
    strides = tuple(tensor.strides[i] * size for i in range(tensor.ndim)) if tensor.strides else None
    letter = {0: "i", 1: "u", 2: "f"}.get(tensor.code, "V")
    return capsule, {
        "typestr": f"<{letter}{size}",
        "shape": shape,
        "strides": strides,
        "data": ((tensor.data or 0) + tensor.byte_offset, False),
    }


def check_shape(what: str, shape: Sequence[int], expected: Sequence[int] | None) -> None:
    """An error unless the shape is the expected one.

    NOTE: C sees numbers in a row, and would train on a transposed array as on any other.
    """
    if expected is None or tuple(shape) == tuple(expected):
        return
    raise ValueError(f"{what}: expected the shape {tuple(expected)}, got {tuple(shape)}")


def view(pointer: Any, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """C's memory as a numpy array, as long as C lends it."""
    dtype = np.dtype(kind)
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(ffi.buffer(pointer, count * dtype.itemsize), dtype=dtype).reshape(shape)
