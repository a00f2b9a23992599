//! A GPT-2 as llama.cpp knows it: names of tensors and keys of its architecture `gpt2`.
//!
//! Weights of linear layers are (out, in) there, where Hugging Face has (in, out). Vectors and the
//! table of positions are f32 always.

use mxfp4train::{Activation, ModelConfig, StoredWeights, TensorInfo};

use super::gguf::{Tensor, Value};
use super::{Order, Origin, embeddings, number};
use crate::failure::{Failure, Outcome};

const WTE: &str = "transformer.wte.weight";

/// A failure for a model that llama.cpp would run as another one.
pub(crate) fn check(config: &ModelConfig) -> Outcome {
    let why = if config.activation != Activation::GeluTanh {
        format!("the activation gelu_new alone, this model has {}", config.activation)
    } else if !config.scale_attention || config.scale_attention_by_layer {
        "attention scaled by the size of heads alone, which this model's is not".into()
    } else {
        return Ok(());
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
        if info.name == WTE {
            tensors.extend(embeddings(WTE, &info.shape, weights, is_tied));
            continue;
        }
        let stored = match name.as_str() {
            "position_embd.weight" => StoredWeights::F32,
            _ if info.shape.len() < 2 => StoredWeights::F32,
            _ => weights,
        };
        let mut shape = info.shape.clone();
        if is_turned {
            shape.reverse();
        }
        let order = if is_turned { Order::Turned } else { Order::Same };
        let origin = Origin::Tensor { name: info.name.clone(), order };
        tensors.push((Tensor { name, shape, stored }, origin));
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

/// The keys of a file that say what is computed.
pub(crate) fn keys(config: &ModelConfig) -> Vec<(&'static str, Value)> {
    vec![
        ("context_length", number(config.context_length)),
        ("embedding_length", number(config.channels)),
        ("block_count", number(config.layers)),
        ("feed_forward_length", number(config.mlp_width())),
        ("attention.head_count", number(config.heads)),
        ("attention.layer_norm_epsilon", Value::F32(config.layer_norm_epsilon)),
    ]
}
