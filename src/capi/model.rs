//! `mxt_model`: a GPT, its files, and its tensors by name.

use std::ffi::{CString, c_char};
use std::sync::Arc;

use super::engine::mxt_engine;
use super::guard;
use super::handle::{Handle, State};
use super::message::Slot;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, Out, read, versioned};
use super::{arguments, buffers};
use crate::reserve::{collect, reserve};
use crate::{Activation, Architecture, Lora, Model, ModelConfig, Rope, RopeScaling, StoredWeights};

/// Most dimensions that a tensor can have.
pub const MXT_MAX_RANK: usize = 4;

/// The kind of model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_architecture {
    /// GPT-2: LayerNorm before each half of a block, learned positions, GELU, biases, and one
    /// matrix for the embedding and the head unless tied_head is 0.
    Gpt2 = 0,
    /// Llama: RMSNorm before each half of a block, rotary positions, SwiGLU, heads that share keys and
    /// values where kv_heads says so, and no biases. With qkv_bias it is a Qwen2, with qk_norm a Qwen3;
    /// Mistral and SmolLM are Llamas. A tensor "self_attn.qkv_proj" of a block has the rows of q_proj,
    /// k_proj and v_proj in files, and "mlp.gate_up_proj" those of gate_proj and up_proj; these names are
    /// taken as well where one tensor is read or written.
    Llama = 1,
}

/// How rotary positions are stretched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_rope_scaling {
    /// Not at all.
    None = 0,
    /// All alike: positions are divided by rope_factor.
    Linear = 1,
    /// As Llama 3.1 has it: what turns less than rope_low_frequency times in rope_original_context
    /// positions is divided by rope_factor, what turns more than rope_high_frequency times is not.
    Llama3 = 2,
}

/// What the MLP of a block applies between its two layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_activation {
    /// GELU in its tanh form, as GPT-2 has it ("gelu_new").
    GeluTanh = 0,
    /// GELU itself, by the error function ("gelu").
    Gelu = 1,
}

/// The linear layers of a block, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_lora_layer {
    /// What makes queries, keys and values: attn.c_attn, or self_attn.qkv_proj of Llama's blocks.
    AttnCAttn = 1,
    /// What attention's result passes through: attn.c_proj, or self_attn.o_proj.
    AttnCProj = 2,
    /// The first of the MLP: mlp.c_fc, or mlp.gate_up_proj.
    MlpCFc = 4,
    /// The second of the MLP: mlp.c_proj, or mlp.down_proj.
    MlpCProj = 8,
}

/// The number format of a tensor's values as they cross this interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_dtype {
    /// 32-bit floating point.
    F32 = 0,
}

/// The shape of a model. Fill it with mxt_model_config_init, which makes it GPT-2 small (124M).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_model_config {
    /// Set by mxt_model_config_init.
    pub struct_size: usize,
    /// Number of different tokens; tokens are 0 to vocab_size - 1. Default 50257.
    pub vocab_size: usize,
    /// Longest sequence in tokens that the model can see. Default 1024.
    pub context_length: usize,
    /// Number of blocks. Default 12.
    pub layers: usize,
    /// Attention heads of a block; must divide channels where head_size is 0. Default 12.
    pub heads: usize,
    /// Width of the model. Default 768.
    pub channels: usize,
    /// Added to the variance in LayerNorm, or to the mean square in RMSNorm. Default 1e-5.
    pub layer_norm_epsilon: f32,
    /// One of mxt_architecture. Default MXT_ARCHITECTURE_GPT2.
    pub architecture: i32,
    /// Width of the MLP inside a block. Default 0, which stands for 4 x channels, or in Llama's blocks
    /// for 8/3 x channels, rounded up to a multiple of 256, and is what a model of that width reports.
    pub mlp_channels: usize,
    /// One of mxt_activation, of GPT-2's blocks; Llama's have SwiGLU whatever it is. Default
    /// MXT_ACTIVATION_GELU_TANH.
    pub activation: i32,
    /// 1 where the head shares its weights with the token embedding; 0 where it has a tensor
    /// "lm_head.weight" (vocab_size, channels) of its own. Default 1.
    pub tied_head: i32,
    /// 1 where attention divides its scores by the square root of a head's width, 0 where it does
    /// not. Default 1.
    pub scale_attention: i32,
    /// 1 where attention divides its scores by the number of its block, from 1 on, as well. Default
    /// 0.
    pub scale_attention_by_layer: i32,
    /// What is trained beside linear layers, in the place of everything else, is of this rank (LoRA).
    /// Default 0: nothing is.
    pub lora_rank: usize,
    /// Over the rank, the factor of what is added to a layer's result. 0 (default) is twice the rank.
    /// Without a rank neither this nor lora_layers counts.
    pub lora_alpha: f32,
    /// Which linear layers of every block have it: some of mxt_lora_layer. 0 (default) is all.
    pub lora_layers: u32,
    /// Heads of keys and values of a block, which divide heads; of Llama's blocks. Default 0, which
    /// stands for heads and is what a model with as many reports.
    pub kv_heads: usize,
    /// Channels of a head, an even number; of Llama's blocks. Default 0, which stands for channels /
    /// heads and is what a model with such heads reports.
    pub head_size: usize,
    /// Pair i of a head of n channels turns by rope_theta^(-2 i / n) a position; of Llama's blocks.
    /// Default 10000.
    pub rope_theta: f64,
    /// With rope_scaling MXT_ROPE_SCALING_LLAMA3: positions that the model saw before. Default 8192.
    pub rope_original_context: usize,
    /// 1 where what makes queries, keys and values has a bias; of Llama's blocks, as in Qwen2. Default 0.
    pub qkv_bias: i32,
    /// 1 where every head of queries and keys is normalized; of Llama's blocks, as in Qwen3. Default 0.
    pub qk_norm: i32,
    /// One of mxt_rope_scaling. Default MXT_ROPE_SCALING_NONE, with which none of what follows counts.
    pub rope_scaling: i32,
    /// By how much, from 1 on. Default 1.
    pub rope_factor: f32,
    /// Of MXT_ROPE_SCALING_LLAMA3, above 0. Default 1.
    pub rope_low_frequency: f32,
    /// Of MXT_ROPE_SCALING_LLAMA3, above rope_low_frequency. Default 4.
    pub rope_high_frequency: f32,
}
versioned!(
    mxt_model_config,
    last = architecture: i32,
    then mlp_channels: usize,
    then activation: i32,
    then tied_head: i32,
    then scale_attention: i32,
    then scale_attention_by_layer: i32,
    then lora_rank: usize,
    then lora_alpha: f32,
    then lora_layers: u32,
    then kv_heads: usize,
    then head_size: usize,
    then rope_theta: f64,
    then rope_original_context: usize,
    then qkv_bias: i32,
    then qk_norm: i32,
    then rope_scaling: i32,
    then rope_factor: f32,
    then rope_low_frequency: f32,
    then rope_high_frequency: f32
);

impl Options for mxt_model_config {
    fn defaults() -> Self {
        Self::from(&ModelConfig::default())
    }
}

impl From<&ModelConfig> for mxt_model_config {
    fn from(config: &ModelConfig) -> Self {
        let (factor, low, high, original) = match config.rope.scaling {
            RopeScaling::None => (1.0, 1.0, 4.0, 8192),
            RopeScaling::Linear { factor } => (factor, 1.0, 4.0, 8192),
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                (factor, low, high, original_context)
            }
        };
        Self {
            struct_size: size_of::<Self>(),
            vocab_size: config.vocab_size,
            context_length: config.context_length,
            layers: config.layers,
            heads: config.heads,
            channels: config.channels,
            layer_norm_epsilon: config.layer_norm_epsilon,
            architecture: match config.architecture {
                Architecture::Gpt2 => mxt_architecture::Gpt2,
                Architecture::Llama => mxt_architecture::Llama,
            } as i32,
            mlp_channels: config.mlp_channels,
            activation: match config.activation {
                Activation::GeluTanh => mxt_activation::GeluTanh,
                Activation::Gelu => mxt_activation::Gelu,
            } as i32,
            tied_head: config.tied_head.into(),
            scale_attention: config.scale_attention.into(),
            scale_attention_by_layer: config.scale_attention_by_layer.into(),
            lora_rank: config.lora.map_or(0, |lora| lora.rank),
            lora_alpha: config.lora.map_or(0.0, |lora| lora.alpha),
            lora_layers: config.lora.map_or(0, |lora| bits_of(lora.layers)),
            kv_heads: config.kv_heads,
            head_size: config.head_size,
            qkv_bias: config.qkv_bias.into(),
            qk_norm: config.qk_norm.into(),
            rope_theta: config.rope.theta.into(),
            rope_scaling: match config.rope.scaling {
                RopeScaling::None => mxt_rope_scaling::None,
                RopeScaling::Linear { .. } => mxt_rope_scaling::Linear,
                RopeScaling::Llama3 { .. } => mxt_rope_scaling::Llama3,
            } as i32,
            rope_factor: factor,
            rope_low_frequency: low,
            rope_high_frequency: high,
            rope_original_context: original,
        }
    }
}

impl mxt_model_config {
    /// The crate's form.
    pub(super) fn parse(self) -> Result<ModelConfig, Failure> {
        const GPT2: i32 = mxt_architecture::Gpt2 as i32;
        const LLAMA: i32 = mxt_architecture::Llama as i32;
        let architecture = match self.architecture {
            GPT2 => Architecture::Gpt2,
            LLAMA => Architecture::Llama,
            other => {
                let message = format!(
                    "expected MXT_ARCHITECTURE_GPT2 (0) or MXT_ARCHITECTURE_LLAMA (1), got {other}"
                );
                return Err(Failure::invalid("architecture", message));
            }
        };
        const GELU_TANH: i32 = mxt_activation::GeluTanh as i32;
        const GELU: i32 = mxt_activation::Gelu as i32;
        let activation = match self.activation {
            GELU_TANH => Activation::GeluTanh,
            GELU => Activation::Gelu,
            other => {
                let message = format!(
                    "expected MXT_ACTIVATION_GELU_TANH (0) or MXT_ACTIVATION_GELU (1), got {other}"
                );
                return Err(Failure::invalid("activation", message));
            }
        };
        Ok(ModelConfig {
            architecture,
            kv_heads: self.kv_heads,
            head_size: self.head_size,
            qkv_bias: arguments::flag("qkv_bias", self.qkv_bias)?,
            qk_norm: arguments::flag("qk_norm", self.qk_norm)?,
            rope: Rope { theta: self.rope_theta as f32, scaling: self.rope_scaling()? },
            vocab_size: self.vocab_size,
            context_length: self.context_length,
            layers: self.layers,
            heads: self.heads,
            channels: self.channels,
            layer_norm_epsilon: self.layer_norm_epsilon,
            mlp_channels: self.mlp_channels,
            activation,
            tied_head: arguments::flag("tied_head", self.tied_head)?,
            scale_attention: arguments::flag("scale_attention", self.scale_attention)?,
            scale_attention_by_layer: arguments::flag(
                "scale_attention_by_layer",
                self.scale_attention_by_layer,
            )?,
            lora: match self.lora_rank {
                0 => None,
                rank => Some(lora(rank, self.lora_alpha, self.lora_layers)?),
            },
        })
    }

    fn rope_scaling(&self) -> Result<RopeScaling, Failure> {
        const NONE: i32 = mxt_rope_scaling::None as i32;
        const LINEAR: i32 = mxt_rope_scaling::Linear as i32;
        const LLAMA3: i32 = mxt_rope_scaling::Llama3 as i32;
        let factor = self.rope_factor;
        match self.rope_scaling {
            NONE => Ok(RopeScaling::None),
            LINEAR => Ok(RopeScaling::Linear { factor }),
            LLAMA3 => Ok(RopeScaling::Llama3 {
                factor,
                low: self.rope_low_frequency,
                high: self.rope_high_frequency,
                original_context: self.rope_original_context,
            }),
            other => {
                let message = format!(
                    "expected MXT_ROPE_SCALING_NONE (0), MXT_ROPE_SCALING_LINEAR (1) or \
                     MXT_ROPE_SCALING_LLAMA3 (2), got {other}"
                );
                Err(Failure::invalid("rope_scaling", message))
            }
        }
    }
}

/// What there is to know about a tensor. Set struct_size to sizeof(mxt_tensor_info) before the
/// call that fills it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_tensor_info {
    /// sizeof(mxt_tensor_info), set by the caller.
    pub struct_size: usize,
    /// The name that Hugging Face's gpt2 or llama gives it, such as
    /// "transformer.h.0.attn.c_attn.weight"; see mxt_architecture for what has no name there. Valid as
    /// long as the model handle.
    pub name: *const c_char,
    /// Product of the dimensions.
    pub element_count: u64,
    /// The dimensions, slowest first; those from rank on are 0. Linear weights of GPT-2
    /// are (in, out), those of Llama's blocks (out, in).
    pub shape: [u64; MXT_MAX_RANK],
    /// Number of dimensions.
    pub rank: u32,
    /// Number format of mxt_model_tensor_read and mxt_model_tensor_write: MXT_DTYPE_F32.
    pub dtype: i32,
}
versioned!(mxt_tensor_info, last = dtype: i32);

/// A model: its shape and its weights. Several handles can be the same model (see
/// mxt_trainer_model). Calls that change it, or that take it without const, need it for themselves;
/// calls with a const model may run at once on several threads. Make with mxt_model_new,
/// mxt_model_load or mxt_trainer_model, free with mxt_model_free.
pub struct mxt_model {
    state: State,
    pub(super) model: Model,
    /// The tensors' names as C strings, which `mxt_tensor_info` borrows.
    names: Arc<Vec<CString>>,
}

const NAMES: &str = "the names of the tensors";

impl mxt_model {
    /// A handle on a model that no other handle reaches.
    pub(super) fn new(model: Model) -> Result<Self, Failure> {
        let names = model.tensors().iter().map(|tensor| {
            let mut name = Vec::new();
            reserve(&mut name, NAMES, tensor.name.len() + 1)?;
            name.extend_from_slice(tensor.name.as_bytes());
            CString::new(name).map_err(|error| {
                crate::Error::invalid("tensors", format!("expected no zero bytes: {error}"))
            })
        });
        let names = Arc::new(collect(NAMES, names)?);
        Ok(Self { state: State::new(), model, names })
    }

    /// Another handle on the same model, with the same lock.
    pub(super) fn another(&self) -> Self {
        Self {
            state: State::sharing(self.state.access()),
            model: self.model.clone(),
            names: self.names.clone(),
        }
    }
}

impl Handle for mxt_model {
    const SLOT: Slot = Slot::Model;
    const NAME: &'static str = "model";

    fn state(&self) -> &State {
        &self.state
    }
}

/// Fills `config` with the defaults. `struct_size` is sizeof(mxt_model_config) as the caller's
/// compiler sees it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_config_init(
    config: *mut mxt_model_config,
    struct_size: usize,
) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_model_config_init", || unsafe { structs::init(config, struct_size) })
}

/// Makes a model with random initial weights, as GPT-2's, drawn from the engine's seed, and stores it
/// in `*model` for the caller to free.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (names the field),
/// MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error and on the engine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_new(
    engine: *const mxt_engine,
    config: *const mxt_model_config,
    model: *mut *mut mxt_model,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_model_new", engine, |engine| {
            let out = arguments::place("model", model)?;
            let config = read("config", config)?.parse()?;
            out.put(mxt_model::new(Model::new(&engine.engine, &config)?)?.into_raw());
            Ok(())
        })
    }
}

/// Loads the model of a checkpoint folder, written by this library or by Hugging Face transformers
/// (gpt2, llama, mistral, qwen2 or qwen3), and stores it in `*model` for the caller to free. Weights
/// are safetensors in 16, 32 or 64 bits, in one file or in several with an index; a head that differs
/// from the embedding stays one of its own.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO,
/// MXT_ERROR_FORMAT (a damaged file; names the tensor), MXT_ERROR_MISMATCH, MXT_ERROR_NOT_FINITE (a
/// weight in a file), MXT_ERROR_OUT_OF_MEMORY. The message is in mxt_last_error and on the engine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_load(
    engine: *const mxt_engine,
    dir: *const c_char,
    model: *mut *mut mxt_model,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::child("mxt_model_load", engine, |engine| {
            let out = arguments::place("model", model)?;
            let dir = arguments::path("dir", dir)?;
            out.put(mxt_model::new(Model::load(&engine.engine, &dir)?)?.into_raw());
            Ok(())
        })
    }
}

/// Saves weights and configuration as a folder that Hugging Face transformers opens. The folder is
/// made if it is not there. A failure, or a kill at any instant, leaves a whole
/// checkpoint there, the one before or the new one. Whatever else is in the folder stays, and so do
/// keys of the configuration that a loaded model came with, such as special tokens.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_IO, MXT_ERROR_FORMAT (a file, or a
/// folder that holds other things and no checkpoint), MXT_ERROR_NOT_FINITE (a weight),
/// MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_save(model: *const mxt_model, dir: *const c_char) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_save", model, |model| {
            let dir = arguments::path("dir", dir)?;
            let _reading = model.state.access().read()?;
            Ok(model.model.save(&dir)?)
        })
    }
}

const LORA_LAYERS: [mxt_lora_layer; 4] = [
    mxt_lora_layer::AttnCAttn,
    mxt_lora_layer::AttnCProj,
    mxt_lora_layer::MlpCFc,
    mxt_lora_layer::MlpCProj,
];

fn bits_of(layers: [bool; 4]) -> u32 {
    let bits = LORA_LAYERS.into_iter().zip(layers).filter(|(_, is)| *is);
    bits.map(|(layer, _)| layer as u32).sum()
}

/// Adapters as their three numbers say.
fn lora(rank: usize, alpha: f32, layers: u32) -> Result<Lora, Failure> {
    let all = bits_of([true; 4]);
    if layers > all {
        let message =
            format!("expected a sum of some of mxt_lora_layer, at most {all}, got {layers}");
        return Err(Failure::invalid("lora layers", message));
    }
    let layers = if layers == 0 { all } else { layers };
    let layers = LORA_LAYERS.map(|layer| layers & layer as u32 != 0);
    let alpha = if alpha == 0.0 { 2.0 * rank as f32 } else { alpha };
    Ok(Lora { rank, alpha, layers })
}

/// Makes a model with the weights of `model`, which stays as it is, and adapters beside its linear
/// layers (LoRA: x A^T B^T, times alpha / rank, is added to a layer's result), and stores it in
/// `*adapted` for the caller to free. A trainer of it trains the adapters alone and has gradients and
/// states of nothing else. A, "NAME.lora_A.weight" (rank, in), is drawn from the engine's seed; B,
/// "NAME.lora_B.weight" (out, rank), is 0, so that it computes what `model` does. `alpha` is 0 for
/// twice the rank; `layers` are some of mxt_lora_layer, 0 for all. Both models take memory.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a rank of 0, or a model that has adapters),
/// MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_with_lora(
    model: *const mxt_model,
    rank: usize,
    alpha: f32,
    layers: u32,
    adapted: *mut *mut mxt_model,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_with_lora", model, |model| {
            let out = arguments::place("adapted", adapted)?;
            let lora = lora(rank, alpha, layers)?;
            let _reading = model.state.access().read()?;
            out.put(mxt_model::new(model.model.with_lora(lora)?)?.into_raw());
            Ok(())
        })
    }
}

/// Makes a model of the weights of `model`, which stays as it is, with its adapters added to them, and
/// stores it in `*merged` for the caller to free.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a model without adapters),
/// MXT_ERROR_NOT_FINITE (a sum beyond f32), MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_merge_lora(
    model: *const mxt_model,
    merged: *mut *mut mxt_model,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_merge_lora", model, |model| {
            let out = arguments::place("merged", merged)?;
            let _reading = model.state.access().read()?;
            out.put(mxt_model::new(model.model.merge_lora()?)?.into_raw());
            Ok(())
        })
    }
}

/// Saves the adapters of a model alone, as a folder that PEFT opens beside the model that they were
/// made for: adapter_config.json and adapter_model.safetensors. As atomic as mxt_model_save.
///
/// Errors: those of mxt_model_save; MXT_ERROR_INVALID_ARGUMENT also for a model without adapters.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_save_lora(
    model: *const mxt_model,
    dir: *const c_char,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_save_lora", model, |model| {
            let dir = arguments::path("dir", dir)?;
            let _reading = model.state.access().read()?;
            Ok(model.model.save_lora(&dir)?)
        })
    }
}

/// mxt_model_with_lora of adapters that PEFT or mxt_model_save_lora saved: LoRA of one rank, without
/// DoRA, biases or further modules, the same in all blocks.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_INVALID_ARGUMENT (a model that has adapters), MXT_ERROR_IO,
/// MXT_ERROR_FORMAT (names the key or the tensor), MXT_ERROR_MISMATCH (adapters of another model),
/// MXT_ERROR_NOT_FINITE, MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_load_lora(
    model: *const mxt_model,
    dir: *const c_char,
    adapted: *mut *mut mxt_model,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_load_lora", model, |model| {
            let out = arguments::place("adapted", adapted)?;
            let dir = arguments::path("dir", dir)?;
            let _reading = model.state.access().read()?;
            out.put(mxt_model::new(model.model.load_lora(&dir)?)?.into_raw());
            Ok(())
        })
    }
}

/// What the weights of a saved model are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_stored_weights {
    /// f32, as they are.
    F32 = 0,
    /// f16, to nearest. Numbers that round above 65504 are refused.
    F16 = 1,
    /// bf16, to nearest.
    Bf16 = 2,
    /// The linear layers and a head of its own in MXFP4, 4.25 bits a weight, as a decoder in MXFP4 has
    /// them; all else in f32. Read by this library alone.
    Mxfp4 = 3,
}

/// mxt_model_save of weights that are stored as other numbers, for programs that run the model:
/// training that goes on from them begins with what they were rounded to. `weights` is one of
/// mxt_stored_weights. In MXFP4 only mxt_model_load reads them, as f32 numbers of which a decoder in
/// MXFP4 makes the codes of the file again.
///
/// Errors: those of mxt_model_save; MXT_ERROR_INVALID_ARGUMENT also for a number that is beyond the
/// format, which it names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_save_as(
    model: *const mxt_model,
    dir: *const c_char,
    weights: i32,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_save_as", model, |model| {
            let dir = arguments::path("dir", dir)?;
            let weights = stored_weights(weights)?;
            let _reading = model.state.access().read()?;
            Ok(model.model.save_as(&dir, weights)?)
        })
    }
}

/// What a number of mxt_stored_weights stands for.
pub(super) fn stored_weights(value: i32) -> Result<StoredWeights, Failure> {
    use mxt_stored_weights as C;
    let all = [
        (C::F32 as i32, "MXT_STORED_WEIGHTS_F32", StoredWeights::F32),
        (C::F16 as i32, "MXT_STORED_WEIGHTS_F16", StoredWeights::F16),
        (C::Bf16 as i32, "MXT_STORED_WEIGHTS_BF16", StoredWeights::Bf16),
        (C::Mxfp4 as i32, "MXT_STORED_WEIGHTS_MXFP4", StoredWeights::Mxfp4),
    ];
    arguments::one_of("weights", value, &all)
}

/// Stores the model's shape in `*config`, whose struct_size the caller has set.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_get_config(
    model: *const mxt_model,
    config: *mut mxt_model_config,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_get_config", model, |model| {
            let out = Out::required("config", config)?;
            out.put(model.model.config().into());
            Ok(())
        })
    }
}

/// Numbers in all tensors, those of adapters among them. 0 if `model` is NULL. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_parameter_count(model: *const mxt_model) -> u64 {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe {
        guard::getter("mxt_model_parameter_count", model, |m| m.model.config().parameter_count())
    }
}

/// Number of tensors. 0 if `model` is NULL. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_tensor_count(model: *const mxt_model) -> usize {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::getter("mxt_model_tensor_count", model, |m| m.model.tensors().len()) }
}

/// Stores name and shape of tensor `index` (0 to mxt_model_tensor_count - 1) in `*info`, whose
/// struct_size the caller has set.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE, MXT_ERROR_INVALID_ARGUMENT (no such index).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_tensor_info(
    model: *const mxt_model,
    index: usize,
    info: *mut mxt_tensor_info,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_tensor_info", model, |model| {
            let out = Out::required("info", info)?;
            let tensors = model.model.tensors();
            let tensor = tensors.get(index).ok_or_else(|| {
                let message = format!("expected less than {} tensors, got {index}", tensors.len());
                Failure::invalid("index", message)
            })?;
            let mut shape = [0; MXT_MAX_RANK];
            for (to, from) in shape.iter_mut().zip(&tensor.shape) {
                *to = *from as u64;
            }
            out.put(mxt_tensor_info {
                struct_size: size_of::<mxt_tensor_info>(),
                name: model.names[index].as_ptr(),
                element_count: tensor.shape.iter().map(|n| *n as u64).product(),
                shape,
                rank: tensor.shape.len() as u32,
                dtype: mxt_dtype::F32 as i32,
            });
            Ok(())
        })
    }
}

/// Copies tensor `name` into `values`, row-major; or, of one that files have in parts, a part by its
/// name there, such as "model.layers.0.self_attn.q_proj.weight". `count` is the number of floats that
/// `values` has room for and must be the tensor's element_count, or the part's. `values`
/// may lie in memory of the engine's GPU.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
/// wrong count), MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_tensor_read(
    model: *const mxt_model,
    name: *const c_char,
    values: *mut f32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_tensor_read", model, |model| {
            let name = arguments::text("name", name)?;
            let _reading = model.state.access().read()?;
            buffers::fill(model.model.engine(), "values", values, count, |values| {
                Ok(model.model.read_tensor(&name, values)?)
            })
        })
    }
}

/// Overwrites tensor `name`, or a part of one, with `values`, as mxt_model_tensor_read has them.
/// `count` is the number of floats in `values` and must be the tensor's element_count, or the part's.
/// The moments of a trainer of this model stay as they are.
/// `values` may lie in memory of the engine's GPU.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_UTF8, MXT_ERROR_NO_SUCH_TENSOR, MXT_ERROR_INVALID_ARGUMENT (a
/// wrong count), MXT_ERROR_NOT_FINITE, MXT_ERROR_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_tensor_write(
    model: *mut mxt_model,
    name: *const c_char,
    values: *const f32,
    count: usize,
) -> mxt_status {
    // SAFETY: pointers are NULL or valid, as the header asks.
    unsafe {
        guard::method("mxt_model_tensor_write", model, |model| {
            let name = arguments::text("name", name)?;
            let _writing = model.state.access().write()?;
            buffers::read(model.model.engine(), "values", values, count, |values| {
                Ok(model.model.write_tensor(&name, values)?)
            })
        })
    }
}

/// The message of the last call with this handle that failed, on whichever thread; the empty string
/// when there is none.
///
/// Never NULL. The text belongs to the calling thread and stays valid until that thread's next
/// call of mxt_model_last_error. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_last_error(model: *const mxt_model) -> *const c_char {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::last_error("mxt_model_last_error", model) }
}

/// Gives the handle up; NULL does nothing. Trainers of the model stay usable, and so do other
/// handles: the weights go with the last of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_model_free(model: *mut mxt_model) {
    // SAFETY: a live handle or NULL, as the header asks.
    unsafe { guard::free("mxt_model_free", model) }
}
