"""The weights of a model by name, and the gradients of a trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable

import numpy as np

from . import _arrays as arrays
from ._calls import Handle, call, sized, text
from ._library import lib, text_of

if TYPE_CHECKING:
    from ._model import Model
    from ._stats import ModelConfig


def parts_of(config: ModelConfig) -> list[tuple[str, str, int, int]]:
    """What files have in parts: part, whole, and how many of how many equal groups of rows."""
    if config.architecture != "llama":
        return []
    q, kv = config.heads, config.kv_heads or config.heads
    merged = "self_attn.qkv_proj."
    return [
        ("self_attn.q_proj.", merged, q, q + 2 * kv),
        ("self_attn.k_proj.", merged, kv, q + 2 * kv),
        ("self_attn.v_proj.", merged, kv, q + 2 * kv),
        ("mlp.gate_proj.", "mlp.gate_up_proj.", 1, 2),
        ("mlp.up_proj.", "mlp.gate_up_proj.", 1, 2),
    ]


class Tensors(Mapping[str, np.ndarray]):
    """Arrays by name, in the order of the model. Reading an entry copies it, assigning overwrites.

        weights = model.tensors
        weights["transformer.wte.weight"]                 # a copy, (vocabulary, channels)
        weights["transformer.ln_f.bias"] = numpy.zeros(768)

    Names are those of Hugging Face's gpt2, where a linear weight is (in, out), or llama, where it
    is (out, in). "self_attn.qkv_proj" of Llama's blocks has the rows of q_proj, k_proj and v_proj,
    and "mlp.gate_up_proj" those of gate_proj and up_proj: these names have values, too, and are not
    among those that are listed. Values are float32. What is read is an array of its own: change it
    as often as you like and assign it once. Another shape is a ValueError, a name that is not there
    a KeyError.

    An array on the engine's GPU is taken as it is, by `__cuda_array_interface__`.
    """

    def __init__(
        self, source: Handle, model: Model, read: Callable[..., int], write: Callable[..., int]
    ) -> None:
        self._source = source
        self._place = model._place
        self._read = read
        self._write = write
        self.shapes: dict[str, tuple[int, ...]] = {}
        """The shape of each, without reading it."""
        self._parts = parts_of(model.config)
        info = sized("mxt_tensor_info")

        def list_tensors(pointer: Any) -> int:
            for index in range(lib.mxt_model_tensor_count(pointer)):
                status: int = lib.mxt_model_tensor_info(pointer, index, info)
                if status != lib.MXT_OK:
                    return status
                self.shapes[text_of(info.name)] = tuple(info.shape[0 : info.rank])
            return 0

        call(list_tensors, model)

    def __getitem__(self, name: str) -> np.ndarray:
        values = np.empty(self._shape(name), np.float32)
        self.read(name, values)
        return values

    def read(self, name: str, out: Any) -> None:
        """Copies a tensor into `out`: a writable C-contiguous float32 array of its shape."""
        pointer, count = arrays.room(name, out, self._place, self._shape(name))
        call(self._read, self._source, text("name", name), pointer, count)

    def __setitem__(self, name: str, values: Any) -> None:
        pointer, count = arrays.floats(name, values, self._place, self._shape(name))
        call(self._write, self._source, text("name", name), pointer, count)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        for part, whole, rows, of in self._parts:
            before, found, kind = name.partition(part)
            shape = self.shapes.get(f"{before}{whole}{kind}", ())
            if found and shape and kind in ("weight", "bias"):
                return (shape[0] // of * rows, *shape[1:])
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and len(self._shape(name)) > 0
        except KeyError:
            return False

    def __repr__(self) -> str:
        return f"<mxfp4train.Tensors: {len(self)} tensors>"
