//! A GPT-2 as llama.cpp knows it: names of tensors and keys, and its tokens.
//!
//! Names and keys are those of llama.cpp's architecture `gpt2`. Weights of linear layers are (out,
//! in) there, where Hugging Face has (in, out). Vectors and the table of positions are f32 always.
//!
//! In MXFP4 the token embedding is bf16, and the head MXFP4, so a tied head is stored as well:
//! layers and head are those of `mxtrain generate --weights mxfp4`, whose embedding is f32.

use std::path::Path;

use mxfp4train::formats::BLOCK;
use mxfp4train::{Activation, ModelConfig, StoredWeights, TensorInfo};

use super::gguf::{Tensor, Value};
use crate::failure::{Failure, Outcome};
use crate::hugging_face::{added_tokens, end_tokens, merges, vocabulary};
use crate::tokenizer::Tokenizer;

const WTE: &str = "transformer.wte.weight";

/// Where a tensor of a file comes from.
pub(crate) struct Origin {
    /// Hugging Face's name.
    pub(crate) name: String,
    /// Whether rows and columns change places.
    pub(crate) is_turned: bool,
}

/// A failure for a model that llama.cpp would run as another one.
pub(crate) fn check(config: &ModelConfig, weights: StoredWeights) -> Outcome {
    let why = if config.activation != Activation::GeluTanh {
        format!("the activation gelu_new alone, this model has {}", config.activation)
    } else if !config.scale_attention || config.scale_attention_by_layer {
        "attention scaled by the size of heads alone, which this model's is not".into()
    } else {
        let widths = [config.channels, mlp_channels(config)];
        return match widths.iter().find(|width| !width.is_multiple_of(BLOCK)) {
            Some(width) if weights == StoredWeights::Mxfp4 => Err(Failure::usage(format!(
                "--weights mxfp4: GGUF has whole blocks of {BLOCK}, which do not divide this model's \
                 width {width}; choose bf16, or --format safetensors"
            ))),
            _ => Ok(()),
        };
    };
    Err(Failure::usage(format!(
        "--format gguf: llama.cpp's GPT-2 has {why}; choose --format safetensors, which transformers \
         runs"
    )))
}

/// The tensors of a file, and what they are made from.
pub(crate) fn tensors(infos: &[TensorInfo], weights: StoredWeights) -> Vec<(Tensor, Origin)> {
    let is_tied = !infos.iter().any(|info| info.name == "lm_head.weight");
    let mut tensors = Vec::new();
    for info in infos {
        let Some((name, is_turned)) = renamed(&info.name) else { continue };
        let stored = match (name.as_str(), weights) {
            ("position_embd.weight", _) => StoredWeights::F32,
            ("token_embd.weight", StoredWeights::Mxfp4) => StoredWeights::Bf16,
            _ if info.shape.len() < 2 => StoredWeights::F32,
            _ => weights,
        };
        let mut shape = info.shape.clone();
        if is_turned {
            shape.reverse();
        }
        tensors
            .push((Tensor { name, shape, stored }, Origin { name: info.name.clone(), is_turned }));
        if info.name == WTE && is_tied && weights == StoredWeights::Mxfp4 {
            let head =
                Tensor { name: "output.weight".into(), shape: info.shape.clone(), stored: weights };
            tensors.push((head, Origin { name: WTE.into(), is_turned: false }));
        }
    }
    tensors
}

/// llama.cpp's name of one of Hugging Face's tensors, and whether that is transposed; None for one
/// that is not a GPT-2's.
fn renamed(name: &str) -> Option<(String, bool)> {
    if name == "lm_head.weight" {
        return Some(("output.weight".into(), false));
    }
    let name = name.strip_prefix("transformer.")?;
    let (name, part) = name.rsplit_once('.')?;
    let Some(rest) = name.strip_prefix("h.") else {
        let name = match name {
            "wte" => "token_embd",
            "wpe" => "position_embd",
            "ln_f" => "output_norm",
            _ => return None,
        };
        return Some((format!("{name}.{part}"), false));
    };
    let (layer, name) = rest.split_once('.')?;
    let (name, is_linear) = match name {
        "ln_1" => ("attn_norm", false),
        "attn.c_attn" => ("attn_qkv", true),
        "attn.c_proj" => ("attn_output", true),
        "ln_2" => ("ffn_norm", false),
        "mlp.c_fc" => ("ffn_up", true),
        "mlp.c_proj" => ("ffn_down", true),
        _ => return None,
    };
    Some((format!("blk.{layer}.{name}.{part}"), is_linear && part == "weight"))
}

fn mlp_channels(config: &ModelConfig) -> usize {
    if config.mlp_channels == 0 { 4 * config.channels } else { config.mlp_channels }
}

/// The keys of a file for the model of a checkpoint.
pub(crate) fn metadata(
    checkpoint: &Path,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    weights: StoredWeights,
) -> Outcome<Vec<(String, Value)>> {
    let number = |n: usize| Value::U32(n as u32);
    let text = |text: &str| Value::Text(text.to_owned());
    let name = checkpoint.canonicalize().ok();
    let name = name.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let file_type = match weights {
        StoredWeights::F32 => 0,
        StoredWeights::F16 => 1,
        StoredWeights::Bf16 => 32,
        StoredWeights::Mxfp4 => 38,
    };
    let mut metadata = vec![
        ("general.architecture", text("gpt2")),
        ("general.type", text("model")),
        ("general.name", text(&name)),
        ("general.file_type", Value::U32(file_type)),
        // Of the types that are quantized, as ggml counts.
        ("general.quantization_version", Value::U32(2)),
        ("gpt2.context_length", number(config.context_length)),
        ("gpt2.embedding_length", number(config.channels)),
        ("gpt2.block_count", number(config.layers)),
        ("gpt2.feed_forward_length", number(mlp_channels(config))),
        ("gpt2.attention.head_count", number(config.heads)),
        ("gpt2.attention.layer_norm_epsilon", Value::F32(config.layer_norm_epsilon)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
    ];
    let (tokens, kinds) = tokens(checkpoint, config.vocab_size, tokenizer)?;
    let ends = end_tokens(Some(checkpoint), Some(tokenizer), config.vocab_size)?;
    // NOTE: token 11 ends a text of llama.cpp's where none is named. No text of bytes has the token
    // 0, unless it is no text.
    let end = tokenizer.separator().or_else(|| ends.first().copied()).unwrap_or(0);
    metadata.extend([
        ("tokenizer.ggml.tokens", Value::Texts(tokens)),
        ("tokenizer.ggml.token_type", Value::Numbers(kinds)),
        ("tokenizer.ggml.merges", Value::Texts(merges(tokenizer))),
        ("tokenizer.ggml.bos_token_id", Value::U32(end)),
        ("tokenizer.ggml.eos_token_id", Value::U32(end)),
        // A prompt is the tokens of its text alone.
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.ggml.add_eos_token", Value::Bool(false)),
    ]);
    // A checkpoint may name another end beside the tokenizer's.
    if let Some(other) = ends.into_iter().find(|token| *token != end) {
        metadata.push(("tokenizer.ggml.eot_token_id", Value::U32(other)));
    }
    Ok(metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

/// The tokens of a vocabulary, and what they are to llama.cpp.
fn tokens(
    checkpoint: &Path,
    vocab_size: usize,
    tokenizer: &Tokenizer,
) -> Outcome<(Vec<String>, Vec<i32>)> {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const USER_DEFINED: i32 = 4;
    const UNUSED: i32 = 5;
    let mut tokens = vocabulary(tokenizer);
    let mut kinds = vec![NORMAL; tokens.len()];
    if let Some(separator) = tokenizer.separator() {
        kinds[separator as usize] = CONTROL;
    }
    // Texts have to differ, of tokens that a vocabulary is padded with, too.
    for id in tokens.len()..vocab_size {
        tokens.push(format!("[PAD{id}]"));
        kinds.push(UNUSED);
    }
    for added in added_tokens(checkpoint)? {
        let is_new = !tokens.contains(&added.content);
        if let (Some(token), Some(kind), true) =
            (tokens.get_mut(added.id), kinds.get_mut(added.id), is_new)
        {
            *token = added.content;
            *kind = if added.is_special { CONTROL } else { USER_DEFINED };
        }
    }
    Ok((tokens, kinds))
}
