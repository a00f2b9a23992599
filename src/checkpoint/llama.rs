//! What `config.json` says of a model with Llama's blocks, in the words of transformers' classes for
//! them: `llama` (SmolLM is one), `mistral`, `qwen2` and `qwen3`.
//!
//! Rotary positions have two spellings: `rope_theta` with `rope_scaling`, and from transformers 5 on
//! `rope_parameters`. Both are read; new files say the same in both.

use serde_json::{Map, Value, json};

use super::keys::{Keys, exact, object_of};
use crate::gpt::{Architecture, ModelConfig, Rope, RopeScaling};
use crate::{Error, Result};

/// A class of transformers.
pub(super) struct Class {
    /// Its `model_type`.
    pub(super) kind: &'static str,
    /// Its name.
    pub(super) name: &'static str,
    /// What stands for a missing number of kv heads, if it is not the number of heads.
    kv_heads: Option<usize>,
    /// And for a missing head size, if it is not the width over the heads.
    head_size: Option<usize>,
    qkv_bias: bool,
    qk_norm: bool,
}

/// The classes that are read and written.
pub(super) const CLASSES: [Class; 4] = [
    Class {
        kind: "llama",
        name: "LlamaForCausalLM",
        kv_heads: None,
        head_size: None,
        qkv_bias: false,
        qk_norm: false,
    },
    Class {
        kind: "mistral",
        name: "MistralForCausalLM",
        kv_heads: Some(8),
        head_size: None,
        qkv_bias: false,
        qk_norm: false,
    },
    Class {
        kind: "qwen2",
        name: "Qwen2ForCausalLM",
        kv_heads: Some(32),
        head_size: None,
        qkv_bias: true,
        qk_norm: false,
    },
    Class {
        kind: "qwen3",
        name: "Qwen3ForCausalLM",
        kv_heads: Some(32),
        head_size: Some(128),
        qkv_bias: false,
        qk_norm: true,
    },
];

impl Class {
    /// The class of this `model_type`.
    pub(super) fn of_kind(kind: &str) -> Option<&'static Self> {
        CLASSES.iter().find(|class| class.kind == kind)
    }

    /// A class that has such a model: the one that it came as, if that has.
    pub(super) fn of(config: &ModelConfig, found: Option<&str>) -> &'static Self {
        let is_divided = config.channels.is_multiple_of(config.heads);
        let has = |class: &&Self| {
            // transformers' `llama` wants it even where heads have a size of their own.
            let is_taken = is_divided || class.kind != "llama";
            is_taken && class.qkv_bias == config.qkv_bias && class.qk_norm == config.qk_norm
        };
        let found = found.and_then(Self::of_kind).filter(has);
        found.or_else(|| CLASSES.iter().find(has)).unwrap_or(&CLASSES[0])
    }

    /// The model that a file describes.
    pub(super) fn parse(&self, keys: &Keys<'_>) -> Result<ModelConfig> {
        self.refuse(keys)?;
        let (heads, channels) = (keys.count("num_attention_heads")?, keys.count("hidden_size")?);
        let or = |key, default: Option<usize>| match keys.value(key) {
            None => Ok(default.unwrap_or(0)),
            Some(Value::Null) => Ok(0),
            Some(_) => keys.at_least_one(key),
        };
        let head_size = or("head_dim", self.head_size)?;
        if head_size == 0 && heads > 0 && !channels.is_multiple_of(heads) {
            let expected = format!("a divisor of hidden_size ({channels}), beside no head_dim");
            return Err(keys.error("num_attention_heads", &expected));
        }
        Ok(ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: keys.count("vocab_size")?,
            context_length: keys.count("max_position_embeddings")?,
            layers: keys.count("num_hidden_layers")?,
            heads,
            kv_heads: or("num_key_value_heads", self.kv_heads)?,
            head_size,
            channels,
            layer_norm_epsilon: keys.float("rms_norm_eps", 1e-6)?,
            mlp_channels: keys.at_least_one("intermediate_size")?,
            qkv_bias: self.qkv_bias,
            qk_norm: self.qk_norm,
            rope: rope(keys)?,
            tied_head: keys.flag("tie_word_embeddings", false)?,
            ..ModelConfig::default()
        })
    }

    /// An error for what such a class may have and this library has not.
    fn refuse(&self, keys: &Keys<'_>) -> Result<()> {
        match keys.value("hidden_act").map(Value::as_str) {
            None | Some(Some("silu" | "swish")) => {}
            Some(_) => return Err(keys.error("hidden_act", "\"silu\", SwiGLU's")),
        }
        // Of q, k, v and what attention's result passes through; qwen2 has the first three whatever
        // is said.
        for (key, classes) in
            [("attention_bias", &["llama", "qwen3"][..]), ("mlp_bias", &["llama"])]
        {
            if classes.contains(&self.kind) && keys.flag(key, false)? {
                return Err(keys.error(key, "false: no released model has these biases"));
            }
        }
        self.refuse_windows(keys)?;
        for key in ["rope_interleaved", "rope_interleave"] {
            if keys.flag(key, false)? {
                return Err(
                    keys.error(key, "false: pairs of channels are i and i + half a head here")
                );
            }
        }
        if keys.value("partial_rotary_factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
            return Err(keys.error("partial_rotary_factor", "1: positions turn whole heads here"));
        }
        Ok(())
    }

    /// An error where attention would not see all that is before.
    fn refuse_windows(&self, keys: &Keys<'_>) -> Result<()> {
        const WHOLE: &str = "attention to all positions: sliding windows are not supported";
        if let Some(Value::Array(types)) = keys.value("layer_types")
            && types.iter().any(|of_layer| of_layer != "full_attention")
        {
            return Err(keys.error("layer_types", WHOLE));
        }
        let is_used = match self.kind {
            "mistral" => true,
            "qwen2" | "qwen3" => keys.flag("use_sliding_window", false)?,
            _ => return Ok(()),
        };
        let window = match keys.value("sliding_window") {
            Some(Value::Null) => return Ok(()),
            Some(_) => keys.count("sliding_window")?,
            // What transformers puts there, for all classes.
            None => 4096,
        };
        if is_used && window < keys.count("max_position_embeddings")? {
            let expected = format!(
                "null or a window over all positions; {WHOLE}. Up to {window} tokens are the same with \
                 max_position_embeddings {window} and sliding_window null"
            );
            return Err(keys.error("sliding_window", &expected));
        }
        Ok(())
    }
}

/// Rotary positions, in either spelling.
fn rope(keys: &Keys<'_>) -> Result<Rope> {
    let theta = keys.float("rope_theta", 1e4)?;
    // Where both say something, transformers takes the old words.
    let (key, scaling) = match keys.value("rope_scaling") {
        None | Some(Value::Null) => ("rope_parameters", keys.value("rope_parameters")),
        scaling => ("rope_scaling", scaling),
    };
    let of = match scaling {
        None | Some(Value::Null) => return Ok(Rope { theta, scaling: RopeScaling::None }),
        Some(Value::Object(object)) => Keys { path: keys.path, object },
        Some(_) => return Err(keys.error(key, "an object, or null")),
    };
    if of.object.values().any(Value::is_object) {
        return Err(keys.error(key, "one set of numbers for all layers"));
    }
    let theta = of.float("rope_theta", theta)?;
    // `type` in files from before transformers 4.43.
    let kind = of.value("rope_type").or_else(|| of.value("type"));
    let scaling = match kind.map(|kind| kind.as_str().unwrap_or_default()) {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: of.number("factor")? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: of.number("factor")?,
            low: of.number("low_freq_factor")?,
            high: of.number("high_freq_factor")?,
            original_context: of.count("original_max_position_embeddings")?,
        },
        Some(_) => {
            let found = keys.error(key, "rope_type \"default\", \"linear\" or \"llama3\"");
            return Err(found);
        }
    };
    if of.value("partial_rotary_factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
        return Err(of.error("partial_rotary_factor", "1: positions turn whole heads here"));
    }
    Ok(Rope { theta, scaling })
}

/// The keys that say what a model computes.
pub(super) fn keys_of(config: &ModelConfig, kind: &str) -> Map<String, Value> {
    let mut keys = object_of(json!({
        "head_dim": config.head_width(),
        "hidden_act": "silu",
        "hidden_size": config.channels,
        "intermediate_size": config.mlp_width(),
        "max_position_embeddings": config.context_length,
        "model_type": kind,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_head_count(),
        "rms_norm_eps": exact(config.layer_norm_epsilon),
        "tie_word_embeddings": config.tied_head,
        "vocab_size": config.vocab_size,
    }));
    let theta = exact(config.rope.theta);
    let scaling = match config.rope.scaling {
        RopeScaling::None => json!({ "rope_type": "default" }),
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": exact(factor) }),
        RopeScaling::Llama3 { factor, low, high, original_context } => json!({
            "rope_type": "llama3",
            "factor": exact(factor),
            "low_freq_factor": exact(low),
            "high_freq_factor": exact(high),
            "original_max_position_embeddings": original_context,
        }),
    };
    let old = if config.rope.scaling == RopeScaling::None { Value::Null } else { scaling.clone() };
    let mut parameters = object_of(scaling);
    parameters.insert("rope_theta".into(), theta.clone());
    keys.insert("rope_theta".into(), theta);
    keys.insert("rope_scaling".into(), old);
    keys.insert("rope_parameters".into(), Value::Object(parameters));
    keys
}

/// What a new model's file has besides.
pub(super) fn defaults(kind: &str) -> Map<String, Value> {
    let biases = match kind {
        "llama" => json!({ "attention_bias": false, "mlp_bias": false }),
        "qwen3" => json!({ "attention_bias": false }),
        _ => json!({}),
    };
    let mut keys = object_of(biases);
    if kind == "mistral" {
        keys.insert("sliding_window".into(), Value::Null);
    }
    for (key, value) in [
        ("attention_dropout", json!(0.0)),
        ("bos_token_id", Value::Null),
        ("eos_token_id", Value::Null),
        ("initializer_range", json!(0.02)),
        ("use_cache", json!(true)),
    ] {
        keys.insert(key.into(), value);
    }
    keys
}

/// What is wrong with a model of this type, where it is known.
pub(super) fn why_not(kind: &str) -> Option<&'static str> {
    let is = |part: &str| kind.contains(part);
    if is("moe") || is("mixtral") || is("deepseek") || kind == "llama4" {
        return Some("mixtures of experts are not supported");
    }
    if is("gemma") || is("cohere") || kind == "olmo2" || kind == "smollm3" || is("phi") {
        return Some("its blocks differ from Llama's in more than sizes");
    }
    None
}

/// The message of an error about a field of [`ModelConfig`], with the field's key in the file.
pub(super) fn in_words_of_file(error: Error) -> String {
    let Error::InvalidArgument { what, message } = error else { return error.to_string() };
    let key = match what {
        "channels" => "hidden_size",
        "context_length" => "max_position_embeddings",
        "heads" => "num_attention_heads",
        "kv_heads" => "num_key_value_heads",
        "head_size" => "head_dim",
        "layers" => "num_hidden_layers",
        "layer_norm_epsilon" => "rms_norm_eps",
        "mlp_channels" => "intermediate_size",
        "rope_factor" => "factor",
        "rope_low_frequency" => "low_freq_factor",
        "rope_high_frequency" => "high_freq_factor",
        "rope_original_context" => "original_max_position_embeddings",
        same => same,
    };
    format!("{key}: {message}")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::config::from_json;
    use super::*;

    fn read(config: &Value) -> Result<ModelConfig> {
        Ok(from_json(Path::new("x/config.json"), config.to_string().as_bytes())?.0)
    }

    /// SmolLM2-135M, as it is on the hub.
    fn smollm2() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
            "is_llama_config": true, "max_position_embeddings": 8192, "model_type": "llama",
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
            "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
            "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 49152
        })
    }

    /// Qwen3-0.6B.
    fn qwen3() -> Value {
        json!({
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
            "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
            "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
            "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936
        })
    }

    #[test]
    fn models_of_the_hub_have_as_many_parameters_as_they_are_said_to() {
        let config = read(&smollm2()).unwrap();
        assert_eq!(config.parameter_count(), 134_515_008);
        assert_eq!((config.kv_head_count(), config.head_width(), config.rope.theta), (3, 64, 1e5));
        let config = read(&qwen3()).unwrap();
        assert_eq!(config.parameter_count(), 596_049_920);
        assert!(
            config.qk_norm && config.head_width() == 128 && config.linears()[1] == [2048, 1024]
        );
        // TinyLlama, whose width of the MLP is the usual one.
        let tiny = ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 32_000,
            context_length: 2048,
            layers: 22,
            heads: 32,
            kv_heads: 4,
            channels: 2048,
            tied_head: false,
            ..ModelConfig::default()
        };
        assert_eq!((tiny.mlp_width(), tiny.parameter_count()), (5632, 1_100_048_384));
    }

    /// Llama 3.2's positions, in both spellings.
    #[test]
    fn positions_are_read_in_old_words_and_in_new_ones() {
        let of = |pairs: Value| {
            let (mut config, Value::Object(pairs)) = (smollm2(), pairs) else {
                panic!("no object")
            };
            let object = config.as_object_mut().unwrap();
            object.remove("rope_scaling");
            object.extend(pairs);
            read(&config).unwrap().rope
        };
        let scaling = json!({
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        });
        let mut parameters = object_of(scaling.clone());
        parameters.insert("rope_theta".into(), json!(500000.0));
        let (factor, low, high) = (32.0, 1.0, 4.0);
        let stretched = RopeScaling::Llama3 { factor, low, high, original_context: 8192 };
        let expected = Rope { theta: 5e5, scaling: stretched };
        assert_eq!(of(json!({ "rope_theta": 500000.0, "rope_scaling": scaling })), expected);
        // What is beside the new words does not count.
        assert_eq!(of(json!({ "rope_theta": 7.0, "rope_parameters": parameters })), expected);
        // Files from before transformers 4.43.
        let linear = of(json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }));
        assert_eq!(linear.scaling, RopeScaling::Linear { factor: 2.0 });
        let both = json!({ "rope_scaling": { "rope_type": "linear", "factor": 2.0 },
                           "rope_parameters": { "rope_type": "default", "rope_theta": 7.0 } });
        assert_eq!(of(both), Rope { theta: 1e5, ..linear });
        assert_eq!(
            of(json!({ "rope_theta": 9e3 })),
            Rope { theta: 9e3, scaling: RopeScaling::None }
        );
    }

    /// What a class leaves out stands for what transformers puts there.
    #[test]
    fn missing_keys_have_their_classes_defaults() {
        for (kind, kv_heads, head_size) in
            [("llama", 64, 16), ("mistral", 8, 16), ("qwen2", 32, 16), ("qwen3", 32, 128)]
        {
            let mut config = smollm2();
            let object = config.as_object_mut().unwrap();
            object.remove("num_key_value_heads");
            object.extend(object_of(json!({
                "model_type": kind, "num_attention_heads": 64, "hidden_size": 1024, "sliding_window": null
            })));
            let config = read(&config).unwrap();
            let found = (config.kv_head_count(), config.head_width());
            assert_eq!(found, (kv_heads, head_size), "{kind}");
        }
    }
}
