"""Ctrl-C while the library trains: a run stops in order, saves, and then says KeyboardInterrupt."""

from __future__ import annotations

import signal
import socket
import threading
from typing import Any, Callable

from ._calls import thrown
from ._errors import Stopped


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
        # Whether SIGINT has come, and whether Python's handler has run for it.
        self.seen = False
        self.handled = False
        self.active = False
        self.sockets: tuple[socket.socket, socket.socket] | None = None
        self.watcher: threading.Thread | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return self
        try:
            signal.signal(signal.SIGINT, self.handle)
        except ValueError:
            # The main thread of an interpreter that is not the main one.
            return self
        self.active = True
        self.watch()
        return self

    def __exit__(self, _kind: object, exception: BaseException | None, _traceback: object) -> None:
        if not self.active:
            return
        self.unwatch()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.seen:
            return
        # What the call has not used up.
        self.clear_stop()
        if not isinstance(exception, KeyboardInterrupt):
            # NOTE: what else went wrong, as a save, is told as its cause.
            raise KeyboardInterrupt from (None if isinstance(exception, Stopped) else exception)

    def handle(self, _number: int, _frame: Any) -> None:
        """SIGINT's handler. A callback of the program ends at once, as it would elsewhere.

        A function of a store first gets the time to end its save.
        """
        again, self.handled = self.handled, True
        self.stop()
        if thrown.inside > 0 or (thrown.undisturbed and again):
            raise KeyboardInterrupt

    def stop(self) -> None:
        self.seen = True
        self.request_stop()

    def watch(self) -> None:
        reader, writer = self.sockets = socket.socketpair()
        writer.setblocking(False)
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
