//! A Llama and its like as llama.cpp knows them: names of tensors and keys of its architectures
//! `llama` (which Mistral's are, too), `qwen2` and `qwen3`.
//!
//! NOTE: positions turn channels i and i + D/2 of a head here, as in Hugging Face's files and in
//! llama.cpp's `qwen2` and `qwen3`. Its `llama` turns neighbours, as Meta's files do, so rows of q
//! and k are put there as its own converter puts them.

use std::f32::consts::PI;

use mxfp4train::{ModelConfig, Rope, RopeScaling, StoredWeights};

use super::gguf::{Tensor, Value};
use super::{Order, Origin, embeddings, number};
use crate::failure::{Failure, Outcome};

/// What pairs of channels turn slower by than without stretched positions.
pub(crate) const FREQUENCIES: &str = "rope_freqs.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// llama.cpp's architecture of a model.
fn architecture(config: &ModelConfig) -> &'static str {
    match (config.qkv_bias, config.qk_norm) {
        (true, _) => "qwen2",
        (_, true) => "qwen3",
        _ => "llama",
    }
}

/// That, or a failure for a model that llama.cpp would run as another one.
pub(crate) fn check(config: &ModelConfig) -> Outcome<&'static str> {
    let architecture = architecture(config);
    let why = match (architecture, config.rope.scaling) {
        ("qwen2", _) if config.heads * config.head_width() != config.channels => format!(
            "heads that are as wide together as the model, this one's are {} of {} in {} channels",
            config.heads,
            config.head_width(),
            config.channels
        ),
        ("qwen2" | "qwen3", RopeScaling::Llama3 { .. }) => {
            "no positions that are stretched as Llama 3.1's, as this model's are".into()
        }
        _ => return Ok(architecture),
    };
    Err(Failure::usage(format!(
        "--format gguf: llama.cpp's {architecture} has {why}; choose --format safetensors, which \
         transformers runs"
    )))
}

/// The keys of a file that say what is computed.
pub(crate) fn keys(config: &ModelConfig) -> Vec<(&'static str, Value)> {
    let size = config.head_width();
    let mut keys = vec![
        ("vocab_size", number(config.vocab_size)),
        ("context_length", number(config.context_length)),
        ("embedding_length", number(config.channels)),
        ("block_count", number(config.layers)),
        ("feed_forward_length", number(config.mlp_width())),
        ("attention.head_count", number(config.heads)),
        ("attention.head_count_kv", number(config.kv_head_count())),
        ("attention.key_length", number(size)),
        ("attention.value_length", number(size)),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.layer_norm_epsilon)),
        ("rope.freq_base", Value::F32(config.rope.theta)),
        ("rope.dimension_count", number(size)),
    ];
    if let RopeScaling::Linear { factor } = config.rope.scaling {
        keys.push(("rope.scaling.type", Value::Text("linear".into())));
        keys.push(("rope.scaling.factor", Value::F32(factor)));
    }
    keys
}

/// The tensors of a file, and what they are made from.
pub(crate) fn tensors(config: &ModelConfig, weights: StoredWeights) -> Vec<(Tensor, Origin)> {
    let (channels, size, width) = (config.channels, config.head_width(), config.mlp_width());
    let [q, kv] = [config.heads, config.kv_head_count()];
    let paired = |heads| match architecture(config) {
        "llama" => Order::Paired { heads },
        _ => Order::Same,
    };
    let stored = |shape: &[usize]| if shape.len() < 2 { StoredWeights::F32 } else { weights };
    let tensor = |name: &str, ours: String, shape: &[usize], order| {
        let tensor = Tensor { name: name.into(), shape: shape.to_vec(), stored: stored(shape) };
        (tensor, Origin::Tensor { name: ours, order })
    };

    let mut tensors =
        embeddings(EMBEDDING, &[config.vocab_size, channels], weights, config.tied_head);
    let (norm, head) = ("model.norm.weight".to_owned(), "lm_head.weight".to_owned());
    tensors.push(tensor("output_norm.weight", norm, &[channels], Order::Same));
    if !config.tied_head {
        let shape = [config.vocab_size, channels];
        tensors.push(tensor("output.weight", head, &shape, Order::Same));
    }
    if let Some(factors) = frequency_factors(&config.rope, size) {
        let shape = vec![factors.len()];
        let tensor = Tensor { name: FREQUENCIES.into(), shape, stored: StoredWeights::F32 };
        tensors.push((tensor, Origin::Numbers(factors)));
    }
    for layer in 0..config.layers {
        let mut add = |theirs: &str, ours: &str, shape: &[usize], order| {
            let name = format!("blk.{layer}.{theirs}");
            tensors.push(tensor(&name, format!("model.layers.{layer}.{ours}"), shape, order));
        };
        add("attn_norm.weight", "input_layernorm.weight", &[channels], Order::Same);
        for (part, heads, order) in
            [("q", q, paired(q)), ("k", kv, paired(kv)), ("v", kv, Order::Same)]
        {
            let [theirs, ours] = [format!("attn_{part}"), format!("self_attn.{part}_proj")];
            let of = |of: &str, what: &str| format!("{of}.{what}");
            let rows = heads * size;
            add(&of(&theirs, "weight"), &of(&ours, "weight"), &[rows, channels], order);
            if config.qkv_bias {
                add(&of(&theirs, "bias"), &of(&ours, "bias"), &[rows], Order::Same);
            }
        }
        if config.qk_norm {
            add("attn_q_norm.weight", "self_attn.q_norm.weight", &[size], Order::Same);
            add("attn_k_norm.weight", "self_attn.k_norm.weight", &[size], Order::Same);
        }
        for (theirs, ours, shape) in [
            ("attn_output.weight", "self_attn.o_proj.weight", &[channels, q * size][..]),
            ("ffn_norm.weight", "post_attention_layernorm.weight", &[channels]),
            ("ffn_gate.weight", "mlp.gate_proj.weight", &[width, channels]),
            ("ffn_up.weight", "mlp.up_proj.weight", &[width, channels]),
            ("ffn_down.weight", "mlp.down_proj.weight", &[channels, width]),
        ] {
            add(theirs, ours, shape, Order::Same);
        }
    }
    tensors
}

/// What the frequency of each pair of channels is divided by, where it is not the same for all:
/// Llama 3.1's, in the arithmetic of llama.cpp's converter.
fn frequency_factors(rope: &Rope, size: usize) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low, high, original_context } = rope.scaling else {
        return None;
    };
    let context = original_context as f32;
    let of_pair = |pair: usize| {
        let exponent = (2 * pair) as f32 / size as f32;
        let frequency = 1.0 / f64::from(rope.theta).powf(exponent.into()) as f32;
        let length = 2.0 * PI / frequency;
        if length < context / high {
            return 1.0;
        }
        if length > context / low {
            return factor;
        }
        let smooth = (context / length - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    Some((0..size / 2).map(of_pair).collect())
}
