"""A model: making, loading, saving, sampling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Callable, Literal, overload

import numpy as np

from . import _arrays as arrays
from . import _files as files
from ._calls import Handle, ask, call, choice, make, options, sized, tuple_of
from ._engine import Engine
from ._generate import DECODER_WEIGHTS, sampled
from ._library import ffi, lib
from ._stats import ModelConfig
from ._tensors import Tensors

if TYPE_CHECKING:
    from ._trainer import Trainer

# In the order of C's numbers, from 0.
ARCHITECTURES = ("gpt2", "llama")
ACTIVATIONS = ("gelu_tanh", "gelu")
ROPE_SCALINGS = ("none", "linear", "llama3")
STORED_WEIGHTS = ("f32", "f16", "bf16", "mxfp4")
LORA_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def lora_bits(layers: Iterable[str] | None) -> int:
    """Linear layers as C's bits; None is 0, which stands for all."""
    bits = 0
    for layer in layers or ():
        number = choice("layers", LORA_LAYERS, layer)
        bits |= 1 << (number or 0)
    return bits


def config_struct(
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    channels: int | None = None,
    layer_norm_epsilon: float | None = None,
    architecture: str | None = None,
    mlp_channels: int | None = None,
    activation: str | None = None,
    tied_head: bool | None = None,
    scale_attention: bool | None = None,
    scale_attention_by_layer: bool | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_layers: Iterable[str] | None = None,
    kv_heads: int | None = None,
    head_size: int | None = None,
    rope_theta: float | None = None,
    rope_original_context: int | None = None,
    qkv_bias: bool | None = None,
    qk_norm: bool | None = None,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    rope_low_frequency: float | None = None,
    rope_high_frequency: float | None = None,
) -> Any:
    given = {
        "vocab_size": vocab_size,
        "context_length": context_length,
        "layers": layers,
        "heads": heads,
        "channels": channels,
        "layer_norm_epsilon": layer_norm_epsilon,
        "architecture": choice("architecture", ARCHITECTURES, architecture),
        "mlp_channels": mlp_channels,
        "activation": choice("activation", ACTIVATIONS, activation),
        "tied_head": tied_head,
        "scale_attention": scale_attention,
        "scale_attention_by_layer": scale_attention_by_layer,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_layers": lora_bits(lora_layers),
        "kv_heads": kv_heads,
        "head_size": head_size,
        "rope_theta": rope_theta,
        "rope_original_context": rope_original_context,
        "qkv_bias": qkv_bias,
        "qk_norm": qk_norm,
        "rope_scaling": choice("rope_scaling", ROPE_SCALINGS, rope_scaling),
        "rope_factor": rope_factor,
        "rope_low_frequency": rope_low_frequency,
        "rope_high_frequency": rope_high_frequency,
    }
    return options("mxt_model_config", given, [])


class Model(Handle):
    """A model with random initial weights, drawn from the engine's seed.

    The shape is by default that of GPT-2 small: `vocab_size` 50257, `context_length` 1024,
    `layers` 12, `heads` 12, `channels` 768, `mlp_channels` 4 * channels. `activation` is
    "gelu_tanh" (default) or "gelu". With `tied_head=False` there is a tensor "lm_head.weight". With
    a `lora_rank` there are adapters, as `with_lora` makes them.

    `architecture` is "gpt2" (default) or "llama": RMSNorm, rotary positions, SwiGLU, and no biases.
    Its `kv_heads` are as many as `heads` by default, its `head_size` channels / heads, and its
    `mlp_channels` 8/3 * channels, rounded up to a multiple of 256. With `qkv_bias` it is a Qwen2,
    with `qk_norm` a Qwen3. Pair i of a head of n channels turns by rope_theta^(-2 i / n) a
    position; `rope_theta` is 10000. `rope_scaling` is None (default), "linear", which divides
    positions by `rope_factor`, or "llama3", which divides those of pairs that turn less than
    `rope_low_frequency` (1) times in `rope_original_context` (8192) positions, and leaves those
    that turn more than `rope_high_frequency` (4) times. All these are of a Llama alone.

    Raises InvalidArgument, which names the field, and OutOfMemory.
    """

    _place: arrays.Place
    _ranks: int

    def __init__(
        self,
        engine: Engine,
        *,
        vocab_size: int | None = None,
        context_length: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        channels: int | None = None,
        layer_norm_epsilon: float | None = None,
        architecture: str | None = None,
        mlp_channels: int | None = None,
        activation: str | None = None,
        tied_head: bool | None = None,
        scale_attention: bool | None = None,
        scale_attention_by_layer: bool | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_layers: Iterable[str] | None = None,
        kv_heads: int | None = None,
        head_size: int | None = None,
        rope_theta: float | None = None,
        rope_original_context: int | None = None,
        qkv_bias: bool | None = None,
        qk_norm: bool | None = None,
        rope_scaling: str | None = None,
        rope_factor: float | None = None,
        rope_low_frequency: float | None = None,
        rope_high_frequency: float | None = None,
    ) -> None:
        config = config_struct(
            vocab_size=vocab_size,
            context_length=context_length,
            layers=layers,
            heads=heads,
            channels=channels,
            layer_norm_epsilon=layer_norm_epsilon,
            architecture=architecture,
            mlp_channels=mlp_channels,
            activation=activation,
            tied_head=tied_head,
            scale_attention=scale_attention,
            scale_attention_by_layer=scale_attention_by_layer,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_layers=lora_layers,
            kv_heads=kv_heads,
            head_size=head_size,
            rope_theta=rope_theta,
            rope_original_context=rope_original_context,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            rope_scaling=rope_scaling,
            rope_factor=rope_factor,
            rope_low_frequency=rope_low_frequency,
            rope_high_frequency=rope_high_frequency,
        )
        self._own(make("model", lib.mxt_model_new, engine, config))
        self._made_from(engine)

    def _made_from(self, source: Engine | Trainer | Model) -> None:
        self._lent, self._place, self._ranks = source._lent, source._place, source._ranks

    @classmethod
    def _of(cls, pointer: Any, source: Engine | Trainer | Model) -> Model:
        model = cls.__new__(cls)
        model._own(pointer)
        model._made_from(source)
        return model

    @classmethod
    def load(cls, engine: Engine, folder: files.Place) -> Model:
        """The model of a checkpoint folder, written by this library or by transformers.

        Of transformers' models these are gpt2, llama, mistral, qwen2 and qwen3.

        In place of a folder there may be files without one: a `Files`, a mapping of names to bytes,
        or a `FileStore`.

        Raises FileError, FormatError, Mismatch, NotFinite, OutOfMemory.
        """
        found = files.files_of(folder)
        if found is not None:
            return cls._of(files.load("model", lib.mxt_model_load_from, engine, found), engine)
        return cls._of(make("model", lib.mxt_model_load, engine, files.folder_of(folder)), engine)

    def save(self, folder: files.Place, *, weights: str = "f32") -> None:
        """Saves weights and configuration; Hugging Face transformers opens the folder.

        In place of a folder there may be files without one: a `Files`, a mapping of names to bytes,
        or a `FileStore`.

        `weights` is what they are stored as: "f32", "f16", "bf16", or "mxfp4", which this library
        alone reads. A failure leaves what was there before. Raises FileError, FormatError,
        NotFinite.
        """
        number = choice("weights", STORED_WEIGHTS, weights)
        files.save(folder, lib.mxt_model_save_as, lib.mxt_model_save_to, self, number)

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        shape = sized("mxt_model_config")
        call(lib.mxt_model_get_config, self, shape)
        return tuple_of(
            ModelConfig,
            shape,
            architecture=ARCHITECTURES[shape.architecture],
            activation=ACTIVATIONS[shape.activation],
            tied_head=bool(shape.tied_head),
            scale_attention=bool(shape.scale_attention),
            scale_attention_by_layer=bool(shape.scale_attention_by_layer),
            lora_layers=tuple(
                layer for i, layer in enumerate(LORA_LAYERS) if shape.lora_layers >> i & 1
            ),
            qkv_bias=bool(shape.qkv_bias),
            qk_norm=bool(shape.qk_norm),
            rope_scaling=ROPE_SCALINGS[shape.rope_scaling] if shape.rope_scaling else None,
        )

    def with_lora(
        self,
        rank: int = 8,
        *,
        alpha: float | None = None,
        layers: Iterable[str] = LORA_LAYERS,
    ) -> Model:
        """A new model with these weights, and adapters (LoRA) beside its linear layers.

        They change nothing yet; a Trainer of it trains them alone. `alpha` is by default twice the
        rank. `layers` are some of `LORA_LAYERS`, of every block: in Llama's they stand for
        self_attn.qkv_proj, self_attn.o_proj, mlp.gate_up_proj and mlp.down_proj. Both models take
        memory.

        Raises InvalidArgument, OutOfMemory.
        """
        bits = lora_bits(layers)
        if not bits:
            raise ValueError(f"layers: expected some of {', '.join(LORA_LAYERS)}, got none")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        made = make("model", lib.mxt_model_with_lora, self, rank, alpha or 0.0, bits)
        return self._of(made, self)

    def load_lora(self, folder: files.Place) -> Model:
        """A new model with these weights, and the adapters that PEFT or `save_lora` saved.

        In place of a folder there may be files without one, as in `load`.

        They are LoRA of one rank, without DoRA, biases or further modules, the same in all blocks.

        Raises FileError, FormatError, Mismatch, NotFinite, InvalidArgument, OutOfMemory.
        """
        found = files.files_of(folder)
        if found is not None:
            return self._of(files.load("model", lib.mxt_model_load_lora_from, self, found), self)
        found = files.folder_of(folder)
        return self._of(make("model", lib.mxt_model_load_lora, self, found), self)

    def merge_lora(self) -> Model:
        """A new model with the adapters of this one added to its weights.

        Raises InvalidArgument (no adapters), OutOfMemory.
        """
        return self._of(make("model", lib.mxt_model_merge_lora, self), self)

    def save_lora(self, folder: files.Place) -> None:
        """Saves the adapters alone; PEFT opens the folder beside the model they were made for.

        In place of a folder there may be files without one, as in `save`.

        Raises InvalidArgument (no adapters), FileError, FormatError, NotFinite.
        """
        files.save(folder, lib.mxt_model_save_lora, lib.mxt_model_save_lora_to, self)

    @property
    def parameter_count(self) -> int:
        """Number of trained numbers; 0 of a closed model."""
        return ask(lib.mxt_model_parameter_count, self, 0)

    @property
    def tensor_count(self) -> int:
        """Number of tensors; 0 of a closed model."""
        return ask(lib.mxt_model_tensor_count, self, 0)

    @property
    def tensors(self) -> Tensors:
        """The weights by name: see `Tensors`. The moments of a trainer stay as they are."""
        return Tensors(self, self, lib.mxt_model_tensor_read, lib.mxt_model_tensor_write)

    def next_logits(self, tokens: Any, *, out: Any = None) -> Any:
        """The logits of the token after some tokens, at least one: (vocab_size), float32.

        Of more than the context holds, the last ones count. They go to `out` where one is given.
        """
        given, count = arrays.tokens("tokens", tokens, self._place)
        logits = np.empty(self.config.vocab_size, np.float32) if out is None else out
        pointer, room_of = arrays.room("out", logits, self._place)
        call(lib.mxt_model_next_logits, self, given, count, pointer, room_of)
        return logits

    @overload
    def score(
        self, texts: Iterable[Any], *, weights: str = ..., hidden: Literal[False] = ...
    ) -> list[np.ndarray]: ...

    @overload
    def score(
        self, texts: Iterable[Any], *, weights: str = ..., hidden: Literal[True]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]: ...

    def score(self, texts: Iterable[Any], *, weights: str = "f32", hidden: bool = False) -> Any:
        """The log-probability of every token of some texts, each after those before it.

        An array of float32 for each text, with 0 for its first token. With `hidden` a pair: the
        same, and for each text what the norm behind the last block puts out, (tokens, channels).
        `weights` is "f32" or "bf16", which is quicker on a GPU. A text has at most context_length
        tokens. Raises InvalidArgument, TokenRange, OutOfMemory.
        """
        all_texts = [np.asarray(given) for given in texts]
        lengths = [len(given) for given in all_texts]
        filled = [given for given in all_texts if given.size > 0]
        joined = np.concatenate(filled) if filled else np.empty(0, np.uint32)
        tokens, count = arrays.tokens("texts", joined, arrays.HOST)
        found = np.empty(count, np.float32)
        states = np.empty((count, self.config.channels if hidden else 0), np.float32)
        call(
            lib.mxt_model_score,
            self,
            choice("weights", DECODER_WEIGHTS, weights),
            tokens,
            count,
            ffi.new("size_t[]", lengths),
            len(lengths),
            arrays.room("found", found, arrays.HOST)[0],
            arrays.room("states", states, arrays.HOST)[0] if hidden else ffi.NULL,
        )
        ends = np.cumsum([0, *lengths])
        of_text = [slice(ends[i], ends[i + 1]) for i in range(len(lengths))]
        scores = [found[place] for place in of_text]
        return (scores, [states[place] for place in of_text]) if hidden else scores

    def generate(
        self,
        prompt: Any,
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
    ) -> np.ndarray:
        """A continuation of the tokens of `prompt`, at least one, without it: uint32.

        At most `max_tokens` (256). `temperature` (0.8) divides the logits, and 0 takes the most
        likely token. `top_k`, `top_p` and `min_p` keep the k most likely tokens, those that
        together have this probability, and those at least this part as likely as the first; 0, 1
        and 0, the defaults, keep all. `repetition_penalty` above 1 makes tokens that the text has
        less likely. The same `seed` (1337) gives the same text. A token of `stop_tokens` ends the
        text and is its last one. `weights` is "f32" (default), "bf16" or "mxfp4". `draft` is who
        guesses tokens, for several to be checked at once, which changes no text: "none" (default),
        "ngram", "mxfp4" or "mxfp4_ngram"; `draft_tokens` is how many at a time. With `slide`, a
        quarter of the context falls out of a text that exceeds it at once.

        `on_token(token)` is called for each token; the text ends when it returns STOP. What it
        raises is raised here.

        Raises InvalidArgument, TokenRange, NotFinite, OutOfMemory, Busy.
        """
        given = {key: value for key, value in locals().items() if key in GENERATE_OPTIONS}
        start = arrays.tokens("prompt", prompt, arrays.HOST)
        return sampled(lib.mxt_model_generate, self, on_token=on_token, given=given, prompt=start)

    def _description(self) -> str:
        return f" of {self.parameter_count} parameters"


# The options that go to C as they are, but for on_token.
GENERATE_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop_tokens",
    "weights",
    "draft",
    "draft_tokens",
    "slide",
)
