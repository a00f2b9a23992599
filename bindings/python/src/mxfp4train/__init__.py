"""Trains GPT models with the backward pass in MXFP4, by way of the C library mxfp4train.

    import mxfp4train as mxt

    engine = mxt.Engine()
    model = mxt.Model(engine, layers=6, heads=6, channels=384)
    dataset = mxt.Dataset("data/train.bin")
    trainer = mxt.Trainer(model, recipe="mxfp4-rht-sr", lr=1e-3)
    for stats in trainer.steps(dataset, 1000):
        print(stats.step, stats.loss)
    trainer.save("out")    # mxt.Trainer.load(engine, "out") goes on from there

What holds everywhere:

- Options are keyword arguments with the names of the C structs; None is the library's default.
- Arrays go in as numpy's or as what becomes numpy's. C-contiguous uint32 (tokens) and float32 are
  not copied; other whole numbers are checked and converted. They must not change during the call.
  Arrays on the engine's GPU are taken by `__cuda_array_interface__` where a method says so; they
  must have been written before the call or on the engine's stream. One that names another stream
  is a ValueError.
- What comes out is a numpy array of its own. NOTE: only what a callback gets (`logits` of a loss,
  `tokens` and `weights` of a window, what ranks exchange) is the library's memory, which is used
  again after the call. An array that is kept then has other numbers, without an error: keep
  `logits.copy()`, also of a part.
- A call that fails raises an `MxtError` (InvalidArgument, Busy, OutOfMemory...) with the library's
  message, or a TypeError or ValueError that names the argument. What a callback raises ends the
  run, the text or the batch in order (a run still saves) and is raised by the call that called
  back. So does Ctrl-C.
- Objects are context managers; `close` frees one at once, else it is freed with the last reference.
  One has what it was given to call, as a Dataset its `fill` and an Engine its `log`; a cycle that
  this makes, as with `self.dataset = Dataset.from_windows(9, self.fill)`, Python's collector frees.
  They may be closed in any order. A closed one raises Closed, and answers 0 where nothing can fail.
- Calls release the interpreter's lock. Different objects are independent; one that is inside a call
  refuses others from other threads with Busy, and so does a model while its trainer is at work.
- After a fork, objects of the parent raise Forked in the child, which makes an engine of its own.
"""

from ._callbacks import STOP
from ._dataset import Dataset
from ._decoder import Decoder
from ._engine import Engine, Group
from ._errors import (
    Busy,
    Closed,
    DeviceError,
    FileError,
    Forked,
    FormatError,
    InvalidArgument,
    Mismatch,
    MxtError,
    NoSuchTensor,
    NotFinite,
    OutOfMemory,
    Panic,
    PeerError,
    Poisoned,
    Stopped,
    TokenRange,
    Unsupported,
)
from ._files import Files, FileStore
from ._library import lib as _lib
from ._library import text_of as _text_of
from ._model import LORA_LAYERS, Model
from ._snapshot import Snapshot
from ._stats import (
    Coverage,
    EvalStats,
    MemoryPlan,
    MemoryUse,
    ModelConfig,
    RunResult,
    StepStats,
    TensorUpdate,
    TrainerOptions,
    WeightMetrics,
)
from ._tensors import Tensors
from ._trainer import IGNORED, Trainer

__all__ = [
    "IGNORED",
    "LORA_LAYERS",
    "STOP",
    "Busy",
    "Closed",
    "Coverage",
    "Dataset",
    "Decoder",
    "DeviceError",
    "Engine",
    "EvalStats",
    "FileError",
    "FileStore",
    "Files",
    "Forked",
    "FormatError",
    "Group",
    "InvalidArgument",
    "MemoryPlan",
    "MemoryUse",
    "Mismatch",
    "Model",
    "ModelConfig",
    "MxtError",
    "NoSuchTensor",
    "NotFinite",
    "OutOfMemory",
    "Panic",
    "PeerError",
    "Poisoned",
    "RunResult",
    "Snapshot",
    "StepStats",
    "Stopped",
    "TensorUpdate",
    "Tensors",
    "TokenRange",
    "Trainer",
    "TrainerOptions",
    "Unsupported",
    "WeightMetrics",
    "build_info",
    "version",
]


def version() -> str:
    """The version of the library that is loaded."""
    return _text_of(_lib.mxt_version())


def build_info() -> str:
    """What the loaded library's build is, as the text of a JSON object."""
    return _text_of(_lib.mxt_build_info())
