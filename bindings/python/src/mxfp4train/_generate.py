"""What continuing a text has in common for models and decoders."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

from . import _arrays as arrays
from . import _callbacks as callbacks
from ._calls import call, choice, options
from ._library import ffi

# In the order of C's numbers, from 0.
DECODER_WEIGHTS = ("f32", "bf16", "mxfp4")
DRAFTS = ("none", "ngram", "mxfp4", "mxfp4_ngram")


def generate_struct(
    keep: list[Any],
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop_tokens: Any = None,
    weights: str | None = None,
    draft: str | None = None,
    draft_tokens: int | None = None,
    slide: bool | None = None,
    on_token: Callable[[int], Any] | None = None,
) -> Any:
    given: dict[str, Any] = {
        "max_tokens": max_tokens,
        "top_k": top_k,
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "weights": choice("weights", DECODER_WEIGHTS, weights),
        "slide": slide,
        "draft": choice("draft", DRAFTS, draft),
        "draft_tokens": draft_tokens,
    }
    if stop_tokens is not None:
        given["stop_tokens"], given["stop_token_count"] = arrays.tokens(
            "stop_tokens", stop_tokens, arrays.HOST
        )
    if on_token is not None:
        given["on_token"] = callbacks.on_token
        given["user_data"] = callbacks.pointer_to(on_token)
    return options("mxt_generate_options", given, keep)


def sampled(
    generate: Callable[..., int],
    *before: Any,
    on_token: Callable[[int], Any] | None,
    given: dict[str, Any],
    prompt: tuple[Any, ...] = (),
) -> np.ndarray:
    """The tokens that `generate(*before, options, *prompt, tokens, capacity, written)` writes."""
    # Tokens are kept as they come, so memory is for what is written and not for max_tokens. And
    # Ctrl-C comes in there.
    found: list[int] = []

    def keep_token(token: int) -> Any:
        found.append(token)
        return None if on_token is None else on_token(token)

    keep: list[Any] = []
    struct = generate_struct(keep, on_token=keep_token, **given)
    call(generate, *before, struct, *prompt, ffi.NULL, 0, ffi.new("size_t *"))
    return np.array(found, np.uint32)
