"""What a trainer was, for another thread to save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _files as files
from ._calls import Handle, call
from ._library import lib

if TYPE_CHECKING:
    from ._trainer import Trainer


class Snapshot(Handle):
    """A copy in the host's memory of what `Trainer.save` would write: `Trainer.snapshot` makes it.

    Another thread saves it while training goes on. It takes as much memory as the two tensor files
    of a checkpoint together. The trainer may be closed before it.
    """

    def __init__(self) -> None:
        raise TypeError(
            "expected trainer.snapshot(), which makes a Snapshot, got a call of Snapshot"
        )

    @classmethod
    def _of(cls, pointer: Any, trainer: Trainer) -> Snapshot:
        snapshot = cls.__new__(cls)
        snapshot._own(pointer)
        snapshot._lent = trainer._lent
        return snapshot

    def renew(self, trainer: Trainer) -> None:
        """Copies a trainer as it is now in place of what it held: faster than another snapshot.

        After an error it may hold nothing. Raises OutOfMemory, Busy, DeviceError.
        """
        call(lib.mxt_snapshot_renew, self, trainer)
        self._lent = trainer._lent

    def save(self, folder: files.Place) -> None:
        """Saves what the trainer was, as `Trainer.save` would have done then."""
        files.save(folder, lib.mxt_snapshot_save, lib.mxt_snapshot_save_to, self)
