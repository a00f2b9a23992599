"""The way of a callback through C: functions that stay, whose user data are Python's."""

from __future__ import annotations

import contextlib
import os
import traceback
import weakref
from collections.abc import Iterator
from typing import Any, Callable

import numpy as np

from ._arrays import view
from ._calls import thrown, tuple_of
from ._library import ffi, lib, text_of
from ._stats import EvalStats, StepStats


class _Stop:
    """The type of STOP."""

    def __repr__(self) -> str:
        return "mxfp4train.STOP"


STOP = _Stop()
"""What a callback returns to end a run or a text. Whatever else it returns goes on."""

LOG_LEVELS = ("", "warning", "info", "debug")


# Pointers of which C itself says when it needs them no more, by their addresses.
lent: dict[int, Any] = {}


class Owned:
    """What C may use as long as one of Python's objects has this: those that C calls it for.

    NOTE: C has but a weak reference to it. What C calls often has the object that it is called for,
    as in `self.dataset = Dataset.from_windows(9, self.fill)`: a cycle, which would never be freed
    if `lent`, which is always there, were a part of it.
    """

    def __init__(self, content: Any) -> None:
        self.content = content

    def pointer(self) -> Any:
        """C's user data for it."""
        return ffi.new_handle(weakref.ref(self))


def owned(user_data: Any, gone: Any = None) -> Any:
    """The content of an `Owned`, or `gone` where nothing has it any more."""
    found = ffi.from_handle(user_data)()
    return gone if found is None or found.content is None else found.content


def stop(*_: object) -> _Stop:
    """In place of a function that is gone."""
    return STOP


def pointer_to(content: Any) -> Any:
    """C's user data for a Python object, which lives as long as the pointer.

    NOTE: nothing of it may have the pointer, which would be a cycle that keeps a trainer's memory.
    """
    return ffi.new_handle(content)


def address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


@contextlib.contextmanager
def lending(*pointers: Any) -> Iterator[None]:
    """Keeps pointers for C until it calls `on_free` with them, or the body fails."""
    lent.update((address(pointer), pointer) for pointer in pointers)
    try:
        yield
    except BaseException:
        for pointer in pointers:
            lent.pop(address(pointer), None)
        raise


def kept(exception: BaseException, fails: bool = True) -> int:
    """Keeps what a callback has thrown for `call`, which is around; it says stop.

    `fails` says whether the library takes that for a failure, and not for a wish to end.
    """
    if thrown.places:
        thrown.places[-1].append((exception, fails))
    else:
        # No call is around, as where an engine is freed.
        traceback.print_exception(type(exception), exception, exception.__traceback__)
    return 1


def guarded(function: Callable[..., Any], *arguments: Any, fails: bool = True) -> int:
    """Runs a callback. 0 goes on, and 1 says stop, which an exception does (see `kept`)."""
    # What a log callback has thrown in between is on its way: nothing more is called.
    if thrown.places and thrown.places[-1]:
        return 1
    before = thrown.inside
    try:
        thrown.inside = before + 1
        return 1 if function(*arguments) is STOP else 0
    except BaseException as exception:
        return kept(exception, fails)
    finally:
        thrown.inside = before


def callback(
    kind: str, error: int | None = 1, fails: bool = True
) -> Callable[[Callable[..., Any]], Any]:
    """Makes C's function of a Python function, which returns `error` where nothing else can."""

    def on_error(_kind: Any, exception: BaseException, _traceback: Any) -> None:
        # What comes outside of `guarded`, as Ctrl-C may.
        kept(exception, fails)

    decorate: Callable[[Callable[..., Any]], Any] = ffi.callback(
        kind, error=error, onerror=on_error
    )
    return decorate


@callback("mxt_step_fn", fails=False)
def on_step(user_data: Any, step: Any, evaluation: Any) -> int:
    found = None if evaluation == ffi.NULL else tuple_of(EvalStats, evaluation)
    return guarded(ffi.from_handle(user_data), step_stats(step), found, fails=False)


@callback("mxt_token_fn", fails=False)
def on_token(user_data: Any, token: int) -> int:
    return guarded(ffi.from_handle(user_data), token, fails=False)


@callback("mxt_loss_fn")
def on_loss(user_data: Any, rows: Any) -> int:
    return guarded(loss_of, ffi.from_handle(user_data), rows)


def loss_of(loss: Callable[[np.ndarray, int], Any], rows: Any) -> Any:
    count = rows.rows
    answer = loss(view(rows.logits, np.float32, (count, rows.vocab_size)), rows.first_row)
    if answer is STOP:
        return STOP
    losses = np.asarray(answer)
    if losses.shape != (count,) or losses.dtype.kind not in "fiu":
        came = "None" if answer is None else f"{losses.dtype} of the shape {losses.shape}"
        raise ValueError(f"loss: expected to return the loss of each of {count} rows, got {came}")
    view(rows.losses, np.float32, (count,))[:] = losses
    return None


@callback("mxt_window_fn")
def on_window(user_data: Any, number: int, tokens: Any, weights: Any, sequence_length: int) -> int:
    return guarded(
        owned(user_data, stop),
        number,
        view(tokens, np.uint32, (sequence_length + 1,)),
        view(weights, np.float32, (sequence_length,)),
    )


@callback("mxt_packed_window_fn")
def on_packed_window(
    user_data: Any, number: int, tokens: Any, weights: Any, documents: Any, sequence_length: int
) -> int:
    return guarded(
        owned(user_data, stop),
        number,
        view(tokens, np.uint32, (sequence_length + 1,)),
        view(weights, np.float32, (sequence_length,)),
        view(documents, np.uint32, (sequence_length,)),
    )


@callback("mxt_log_fn", error=None, fails=False)
def on_log(user_data: Any, level: int, line: Any) -> None:
    guarded(owned(user_data, stop), LOG_LEVELS[min(level, 3)], text_of(line), fails=False)


@callback("mxt_user_data_free_fn", error=None)
def on_free(user_data: Any) -> None:
    pointer = lent.pop(address(user_data), None)
    found = None if pointer is None else ffi.from_handle(pointer)
    found = found() if isinstance(found, weakref.ref) else None
    if found is not None:
        # Such as of a dataset that is closed, which is still referred to.
        found.content = None


def exchanged(function: Callable[..., Any], *arguments: Any) -> int:
    """Runs a function of a group. What it throws ends the group.

    NOTE: nothing else ends it, since the other ranks wait for this one. Ctrl-C waits for a callback
    that can stop in order, or for the end of the call.
    """
    before = thrown.inside
    try:
        thrown.inside = 0
        return 1 if function(*arguments) is STOP else 0
    except BaseException as exception:
        return kept(exception)
    finally:
        thrown.inside = before


@callback("mxt_all_to_all_fn")
def on_all_to_all(user_data: Any, send: Any, receive: Any, bytes_per_rank: int) -> int:
    group = owned(user_data)
    if group is None:
        return 1
    shape = (group.size * bytes_per_rank,)
    return exchanged(group.all_to_all, view(send, np.uint8, shape), view(receive, np.uint8, shape))


@callback("mxt_all_gather_fn")
def on_all_gather(user_data: Any, send: Any, receive: Any, bytes_per_rank: int) -> int:
    group = owned(user_data)
    if group is None:
        return 1
    mine = view(send, np.uint8, (bytes_per_rank,))
    return exchanged(
        group.all_gather, mine, view(receive, np.uint8, (group.size * bytes_per_rank,))
    )


@callback("mxt_abort_fn", error=None)
def on_abort(user_data: Any) -> None:
    group = owned(user_data)
    if group is not None:
        exchanged(group.abort)


def undisturbed(function: Callable[..., Any], *arguments: Any) -> int:
    """Runs what a call needs for its end, as a function of a store, also where a callback has thrown.

    NOTE: a run saves at its end, however it ends. So Ctrl-C, too, waits until the save that it comes
    into is done; only another one cuts it off.
    """
    before = thrown.inside, thrown.undisturbed
    try:
        thrown.inside, thrown.undisturbed = 0, True
        function(*arguments)
        return 0
    except BaseException as exception:
        return kept(exception)
    finally:
        thrown.inside, thrown.undisturbed = before


# Files of a store, in C numbers that are no pointers.


def file_of(user_data: Any, file: Any) -> Any:
    """An open file, while its store is there."""
    state = owned(user_data)
    return None if state is None else state.files.get(address(file))


@callback("mxt_file_open_fn", error=-1)
def on_file_open(user_data: Any, name: Any, file: Any, size: Any) -> int:
    found: list[Any] = []

    def find(state: Any) -> None:
        try:
            opened = state.store.open(text_of(name))
        except FileNotFoundError:
            return
        found.append(opened)
        length = opened.seek(0, os.SEEK_END)
        size[0] = opened.tell() if length is None else length
        file[0] = ffi.cast("void *", state.add(opened))

    state = owned(user_data)
    if state is None or undisturbed(find, state) != 0:
        return -1
    return 0 if found else int(lib.MXT_NO_SUCH_FILE)


@callback("mxt_file_read_fn")
def on_file_read(user_data: Any, file: Any, offset: int, to: Any, count: int) -> int:
    def read(opened: Any) -> None:
        opened.seek(offset)
        buffer = ffi.buffer(to, count)
        done = 0
        while done < count:
            part = opened.read(count - done)
            if not part:
                raise EOFError(f"expected {count} bytes from byte {offset} on, got {done}")
            buffer[done : done + len(part)] = part
            done += len(part)

    opened = file_of(user_data, file)
    return 1 if opened is None else undisturbed(read, opened)


@callback("mxt_file_close_fn")
def on_file_close(user_data: Any, file: Any) -> int:
    state = owned(user_data)
    opened = None if state is None else state.files.pop(address(file), None)
    return 1 if opened is None else undisturbed(opened.close)


@callback("mxt_files_begin_fn")
def on_files_begin(user_data: Any) -> int:
    state = owned(user_data)
    return 1 if state is None else undisturbed(state.store.begin)


@callback("mxt_file_create_fn")
def on_file_create(user_data: Any, name: Any, size: int, file: Any) -> int:
    def create(state: Any) -> None:
        file[0] = ffi.cast("void *", state.add(state.store.create(text_of(name), size)))

    state = owned(user_data)
    return 1 if state is None else undisturbed(create, state)


@callback("mxt_file_write_fn")
def on_file_write(user_data: Any, file: Any, content: Any, count: int) -> int:
    def write(opened: Any) -> None:
        part = bytes(ffi.buffer(content, count))
        while part:
            done = opened.write(part)
            # Raw files write a part, and say how much.
            part = b"" if done is None else part[done:]

    opened = file_of(user_data, file)
    return 1 if opened is None else undisturbed(write, opened)


@callback("mxt_files_commit_fn")
def on_files_commit(user_data: Any) -> int:
    state = owned(user_data)
    return 1 if state is None else undisturbed(state.store.commit)


@callback("mxt_files_abort_fn", error=None)
def on_files_abort(user_data: Any) -> None:
    state = owned(user_data)
    if state is not None:
        undisturbed(state.store.abort)


@callback("mxt_allocate_fn", error=ffi.NULL)
def on_allocate(user_data: Any, count: int, alignment: int) -> Any:
    found: list[Any] = []
    allocate, _ = ffi.from_handle(user_data)
    if undisturbed(lambda: found.append(allocate(count, alignment))) != 0:
        return ffi.NULL
    return ffi.cast("void *", found[0] or 0)


@callback("mxt_deallocate_fn", error=None)
def on_deallocate(user_data: Any, memory: Any, count: int, alignment: int) -> None:
    _, deallocate = ffi.from_handle(user_data)
    undisturbed(lambda: deallocate(address(memory), count, alignment))


def step_stats(struct: Any) -> StepStats:
    place = struct.update_rms_tensor
    return tuple_of(StepStats, struct, update_rms_tensor=None if place == 0xFFFFFFFF else place)
