"""What calls tell, as named tuples. The fields are those of the C structs."""

from __future__ import annotations

from typing import NamedTuple, Optional


class StepStats(NamedTuple):
    """What one optimizer step did."""

    step: int
    """Steps done since step 0, this one included."""
    tokens: int
    """Tokens trained on in this step."""
    seconds: float
    """Wall-clock duration of the step."""
    loss: float
    """Mean loss of the step before the update, in nats a token."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    lr: float
    """Learning rate of the step."""
    tokens_per_second: float
    """tokens / seconds."""
    raised_blocks: int
    """Blocks of MXFP4 whose scale was raised on a GPU; 0 on processors."""
    update_rms_max: float
    """Where `watch_updates` watches this step, the largest rms of a tensor, else NaN."""
    update_rms_tensor: Optional[int]
    """The index of that tensor in `list(model.tensors)`, else None."""
    exchange_seconds: float
    """Of `seconds`, those of waiting for other ranks and exchanging gradients with them."""


class EvalStats(NamedTuple):
    """What an evaluation found. All but the first four are NaN unless asked for."""

    tokens: int
    """Tokens that were predicted."""
    seconds: float
    """Wall-clock duration."""
    loss: float
    """Mean cross-entropy in nats a token."""
    perplexity: float
    """exp(loss)."""
    sharpness: float
    """How much the loss could rise, in percent of 1 + loss: see `set_sharpness`."""
    sharpness_last: float
    """The same of the last tokens of the sequences alone."""
    sharpness_epsilon: float
    """How far logits may move."""
    logit_amax: float
    """Mean over the tokens of the largest magnitude of a logit."""
    spared_products: float
    """With "haste" in the recipe, the part of operations that merging channels would spare."""
    spared_all: float
    """The same, less the operations that merging itself adds."""


class RunResult(NamedTuple):
    """What a run did."""

    steps: int
    """Steps done in this call."""
    tokens: int
    """Tokens trained on in this call."""
    seconds: float
    """Seconds spent in steps, without evaluations, checkpoints and callbacks."""
    last_loss: float
    """Loss of the last step, NaN if there was none."""
    last_eval_loss: float
    """Loss of the last evaluation that did not fail, NaN if there was none."""
    end: str
    """Why it ended: "finished", "callback" or "request"."""
    saved: bool
    """Whether save_dir holds the trainer as it is now."""
    eval_errors: int
    """Evaluations that failed; the log has their messages."""
    save_errors: int
    """Checkpoints that could not be saved; the log has their messages."""


class MemoryPlan(NamedTuple):
    """Bytes that a model with its trainer takes, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    """What the optimizer keeps, such as moments."""
    activations: int
    """What the forward pass keeps for the backward pass, and the gradients that flow back."""
    workspace: int
    """Packed operands and other scratch memory."""
    total: int
    exchange: int
    """Sums of lanes that are kept until others are added to them."""


class MemoryUse(NamedTuple):
    """What an engine, and all that was made from it, has in use of large memory, in bytes."""

    device_bytes: int
    """Of the device now: weights, gradients, states, activations, workspaces."""
    device_peak: int
    """The most of them since the engine was made."""
    device_limit: int
    """What the device has for all that runs there, or the engine's `memory_limit`; 0: unknown."""
    host_bytes: int
    """Of the host beside them now: snapshots."""
    host_peak: int
    """The most of them since the engine was made."""
    host_limit: int
    """What the machine and the process's control groups give; 0: unknown."""


class ModelConfig(NamedTuple):
    """The shape of a model; see `Model`."""

    vocab_size: int
    context_length: int
    layers: int
    heads: int
    channels: int
    layer_norm_epsilon: float
    architecture: str
    mlp_channels: int
    """0 stands for four times `channels`, or in Llama's blocks for 8/3, up to a multiple of 256."""
    activation: str
    tied_head: bool
    scale_attention: bool
    scale_attention_by_layer: bool
    lora_rank: int
    """0 where there are no adapters."""
    lora_alpha: float
    lora_layers: tuple[str, ...]
    kv_heads: int
    """0 stands for `heads`."""
    head_size: int
    """0 stands for `channels` over `heads`."""
    rope_theta: float
    rope_original_context: int
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: Optional[str]
    rope_factor: float
    rope_low_frequency: float
    rope_high_frequency: float


class TrainerOptions(NamedTuple):
    """What a trainer was made from, and the schedule last set; see `Trainer`."""

    batch_size: int
    sequence_length: int
    accumulation: int
    recipe: str
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip: float
    schedule: str
    lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    decay_steps: int
    recompute: str
    optimizer: str
    token_drop: Optional[str]
    lanes: int
    frozen: Optional[str]
    document_end: Optional[int]


class Coverage(NamedTuple):
    """What sequences of some length read of a dataset."""

    windows: int
    """Windows of an epoch, of a sequence and one more token each."""
    files: int
    short_files: int
    """Files shorter than a window, which training never reads."""
    tokens: int
    short_tokens: int
    """Tokens of the files that training never reads."""
    shortest: int
    """Tokens of the shortest file."""
    longest: int
    """Tokens of the longest file."""


class TensorUpdate(NamedTuple):
    """What an update did to a tensor."""

    step: int
    """The step that made it, from 1 on."""
    grad_norm: float
    """Norm of the tensor's gradient, before clipping."""
    rms: float
    """How far the gradient is beyond what the second moment has seen coming: 1 while gradients stay
    as they were. NaN of a tensor without a second moment."""


class WeightMetrics(NamedTuple):
    """How weights changed over a window of steps, and what they are rounded to."""

    step: int
    """The last step of the window."""
    steps: int
    """Steps of the window."""
    change: float
    """Mean over the steps of |W - W before| / |W before|."""
    rounded_change: float
    """The same of the rounded weights."""
    flipped: float
    """Mean over the steps of the share of weights whose codes changed."""
    confidence: float
    """Mean distance from the nearest threshold at which a code changes, over the largest one."""
    oscillating: float
    """Share of weights whose rounded numbers moved more than 16 times as far as themselves."""
    clipped: float
    """Share of weights above the largest number of their blocks."""
    amax: float
    """The largest magnitude of a weight."""
    tensors: int
    """Number of tensors that this is of."""
