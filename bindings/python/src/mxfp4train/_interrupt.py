"""Ctrl-C while the library trains: a run stops in order, saves, and then says KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any, Callable

from ._calls import thrown
from ._errors import Stopped
from ._library import lib

# NOTE: found here and not by the handler of a signal. What cffi looks up for the first time it locks, and
# the signal may have come while it does.
REQUEST_STOP, CLEAR_STOP = lib.mxt_trainer_request_stop, lib.mxt_trainer_clear_stop

# The call of the main thread that has SIGINT, if one has; others inside it leave it there.
ACTIVE: list[Interrupts] = []


class Interrupts:
    """Takes SIGINT for the time of a call on the main thread, and asks the call to stop.

    Where the program has a handler of its own, that is left alone, as on other threads, which get
    no signals.

    NOTE: Python runs its handlers between instructions of the main thread, which is inside C for as
    long as a step takes. But a signal's number comes at once through the wake-up socket, where
    another thread waits for it. Where the program has a wake-up socket of its own, as asyncio, a
    stop is seen after the step.
    """

    def __init__(self, request_stop: Callable[[], None], clear_stop: Callable[[], None]) -> None:
        self.request_stop = request_stop
        self.clear_stop = clear_stop
        # The calls to be asked: this one, and those that its callbacks make.
        self.asked = [request_stop]
        # Callbacks that this call was made in.
        self.depth = thrown.inside
        # Whether SIGINT has come, and whether Python's handler has run for it.
        self.seen = False
        self.handled = False
        self.active = False
        self.within: Interrupts | None = None
        self.sockets: tuple[socket.socket, socket.socket] | None = None
        self.watcher: threading.Thread | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        if ACTIVE:
            # A call inside another one is asked as well.
            self.within = ACTIVE[-1]
            self.within.asked.append(self.request_stop)
            if self.within.seen:
                self.request_stop()
            return self
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return self
        try:
            signal.signal(signal.SIGINT, self.handle)
        except ValueError:
            # The main thread of an interpreter that is not the main one.
            return self
        self.active = True
        ACTIVE.append(self)
        try:
            self.watch()
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(self, _kind: object, exception: BaseException | None, _traceback: object) -> None:
        if self.within is not None:
            self.within.asked.remove(self.request_stop)
            if self.within.seen:
                self.clear_stop()
                # The callback ends, with which the call around it does; a save of a store does not.
                if exception is None and thrown.inside > 0:
                    raise KeyboardInterrupt
            return
        if not self.active:
            return
        self.leave()
        if not self.seen:
            return
        # What the call has not used up.
        self.clear_stop()
        if not isinstance(exception, KeyboardInterrupt):
            # NOTE: what else went wrong, as a save, is told as its cause.
            raise KeyboardInterrupt from (None if isinstance(exception, Stopped) else exception)

    def leave(self) -> None:
        try:
            self.unwatch()
        finally:
            ACTIVE.remove(self)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def handle(self, _number: int, _frame: Any) -> None:
        """SIGINT's handler. A callback of the program ends at once, as it would elsewhere.

        A function of a store first gets the time to end its save.
        """
        again, self.handled = self.handled, True
        self.stop()
        if thrown.inside > self.depth or (thrown.undisturbed and again):
            raise KeyboardInterrupt

    def stop(self) -> None:
        self.seen = True
        for request_stop in list(self.asked):
            request_stop()

    def watch(self) -> None:
        reader, writer = self.sockets = socket.socketpair()
        writer.setblocking(False)
        # Whatever the program's default is (socket.setdefaulttimeout).
        reader.settimeout(None)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            return

        def wait() -> None:
            while numbers := reader.recv(64):
                if signal.SIGINT in numbers:
                    self.stop()

        self.watcher = threading.Thread(target=wait, name="mxfp4train SIGINT", daemon=True)
        self.watcher.start()

    def unwatch(self) -> None:
        if self.sockets is None:
            return
        reader, writer = self.sockets
        if self.watcher is not None:
            signal.set_wakeup_fd(-1)
        writer.close()
        if self.watcher is not None:
            self.watcher.join()
        reader.close()


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """What is to come to its end where a callback does it, as a save to a store; Ctrl-C ends the
    callback behind it."""
    before = thrown.inside, thrown.undisturbed
    thrown.inside, thrown.undisturbed = 0, True
    try:
        yield
    finally:
        thrown.inside, thrown.undisturbed = before
    if threading.current_thread() is threading.main_thread() and ACTIVE:
        around = ACTIVE[-1]
        if around.seen and thrown.inside > around.depth:
            raise KeyboardInterrupt
