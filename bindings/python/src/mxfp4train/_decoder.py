"""Texts that grow: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import numpy as np

from . import _arrays as arrays
from ._calls import Handle, call, choice, make, options, whole
from ._generate import DECODER_WEIGHTS, generate_struct, sampled
from ._library import ffi, lib
from ._model import GENERATE_OPTIONS, Model


class Decoder(Handle):
    """Texts of a model, beside each other and empty at first: tokens in, logits of the next out.

    There are `sequences` of them (1), numbered from 0, with room for `room` tokens each (the
    model's context). Keys and values are kept, so that a token takes little time. `weights` is
    "f32" (default), "bf16" or "mxfp4"; `drafts` keeps them in MXFP4, too, for drafts of `generate`.
    A decoder follows its model: where weights have been changed, the next logits are those of the
    new ones. It is busy while its model is trained.

        decoder = Decoder(model)
        decoder.push([1, 2, 3])
        decoder.logits()

    Raises InvalidArgument, Unsupported, OutOfMemory, Busy.
    """

    def __init__(
        self,
        model: Model,
        *,
        sequences: int | None = None,
        room: int | None = None,
        weights: str | None = None,
        drafts: bool | None = None,
    ) -> None:
        given = {
            "sequences": sequences,
            "room": room,
            "weights": choice("weights", DECODER_WEIGHTS, weights),
            "drafts": drafts,
        }
        how = options("mxt_decoder_options", given, [])
        self._vocab_size = model.config.vocab_size
        self._own(make("decoder", lib.mxt_decoder_new, model, how))
        self._lent, self._place = model._lent, model._place

    def push(self, tokens: Any, *, sequence: int = 0) -> None:
        """Appends tokens to a text. They are computed when logits are asked for.

        Raises InvalidArgument (no room) and TokenRange; the text is then as before.
        """
        pointer, count = arrays.tokens("tokens", tokens, self._place)
        call(lib.mxt_decoder_push, self, whole("sequence", sequence), pointer, count)

    def logits(self, *, sequence: int = 0, out: Any = None) -> Any:
        """The logits of the token after a text, which has at least one: (vocab_size), float32."""
        found = np.empty(self._vocab_size, np.float32) if out is None else out
        pointer, count = arrays.room("out", found, self._place)
        call(lib.mxt_decoder_logits, self, whole("sequence", sequence), pointer, count)
        return found

    def logits_from(self, start: int, *, sequence: int = 0, out: Any = None) -> Any:
        """The logits of what comes after each token of a text from number `start` on:
        (tokens, vocab_size), float32. What it takes to score a text."""
        rows = max(self._length(sequence) - whole("start", start), 0)
        found = np.empty((rows, self._vocab_size), np.float32) if out is None else out
        pointer, count = arrays.room("out", found, self._place)
        call(lib.mxt_decoder_logits_from, self, sequence, start, pointer, count)
        return found

    def logits_of(self, sequences: Sequence[int], *, out: Any = None) -> Any:
        """The logits of the tokens after several different texts, for which the weights are read
        once: (texts, vocab_size), float32."""
        numbers = [whole("sequences", sequence) for sequence in sequences]
        found = np.empty((len(numbers), self._vocab_size), np.float32) if out is None else out
        pointer, count = arrays.room("out", found, self._place)
        array = ffi.new("size_t[]", numbers)
        call(lib.mxt_decoder_logits_of, self, array, len(numbers), pointer, count)
        return found

    def generate(
        self,
        *,
        sequence: int = 0,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop_tokens: Any = None,
        draft: str | None = None,
        draft_tokens: int | None = None,
        slide: bool | None = None,
        on_token: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """Samples a continuation of a text, which has at least one token, appends and returns it.

        The options are those of `Model.generate`. Where there is no more room, the oldest tokens
        fall out. A text that is continued again wants another seed.
        """
        given = {key: value for key, value in locals().items() if key in GENERATE_OPTIONS}
        number = whole("sequence", sequence)
        generate = lib.mxt_decoder_generate
        return sampled(generate, self, number, on_token=on_token, given=given)

    def generate_each(
        self,
        sequences: Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop_tokens: Any = None,
        slide: bool | None = None,
    ) -> list[np.ndarray]:
        """`generate` of several different texts at once, which read the weights together.

        The first has the seed of the options, each other one the next.
        """
        given = {key: value for key, value in locals().items() if key in GENERATE_OPTIONS}
        numbers = [whole("sequences", sequence) for sequence in sequences]
        keep: list[Any] = []
        how = generate_struct(keep, **given)
        found = np.empty((len(numbers), how.max_tokens), np.uint32)
        written = ffi.new("size_t[]", len(numbers))
        call(
            lib.mxt_decoder_generate_each,
            self,
            ffi.new("size_t[]", numbers),
            len(numbers),
            how,
            ffi.from_buffer("uint32_t[]", found, require_writable=True),
            how.max_tokens,
            written,
        )
        return [row[: written[i]].copy() for i, row in enumerate(found)]

    def rewind(self, length: int, *, sequence: int = 0) -> None:
        """Takes the tokens of a text from number `length` on out again; 0 empties it."""
        number = whole("sequence", sequence)
        call(lib.mxt_decoder_rewind, self, number, whole("length", length))

    def fork(self, source: int, target: int) -> None:
        """Makes text `target` that of `source`, with what is computed of it."""
        call(lib.mxt_decoder_fork, self, whole("source", source), whole("target", target))

    def tokens(self, *, sequence: int = 0) -> np.ndarray:
        """A text so far: uint32."""
        found = np.empty(self._length(sequence), np.uint32)
        written = ffi.new("size_t *")
        place = ffi.from_buffer("uint32_t[]", found, require_writable=True)
        call(lib.mxt_decoder_tokens, self, sequence, place, found.size, written)
        return found[: written[0]]

    def _length(self, sequence: int) -> int:
        written = ffi.new("size_t *")
        number = whole("sequence", sequence)
        call(lib.mxt_decoder_tokens, self, number, ffi.NULL, 0, written)
        length: int = written[0]
        return length
