//! `config.json`: the model's shape, as Hugging Face's `GPT2Config` writes and reads it.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::model::ModelConfig;
use crate::{Error, Result};

/// The file's text.
pub(super) fn to_json(config: &ModelConfig) -> String {
    // The shortest decimal that gives this f32, so 1e-5 and not 9.999999747378752e-6.
    let epsilon: Option<f64> = config.layer_norm_epsilon.to_string().parse().ok();
    // GPT-2's end-of-text token, where the vocabulary has it.
    let end_of_text = (config.vocab_size > 50256).then_some(50256);
    let object = json!({
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "dtype": "float32",
        "embd_pdrop": 0.0,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "layer_norm_epsilon": epsilon,
        "model_type": "gpt2",
        "n_ctx": config.context_length,
        "n_embd": config.channels,
        "n_head": config.heads,
        "n_inner": null,
        "n_layer": config.layers,
        "n_positions": config.context_length,
        "reorder_and_upcast_attn": false,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": false,
        "scale_attn_weights": true,
        "tie_word_embeddings": true,
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    format!("{object:#}\n")
}

/// Reads the file's text; messages call it `path`.
///
/// Keys that do not change what the model computes are not looked at. Dropout is one of them: this
/// library trains without.
///
/// # Errors
/// [`Error::Format`] naming the key, or line and column where it is no JSON.
pub(super) fn from_json(path: &Path, text: &[u8]) -> Result<ModelConfig> {
    let object: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|e| Error::format(path, format!("expected a JSON object: {e}")))?;
    let keys = Keys { path, object: &object };
    keys.one_of("model_type", None, &[json!("gpt2")])?;
    let gelu = [json!("gelu_new"), json!("gelu_pytorch_tanh")];
    keys.one_of("activation_function", Some(&gelu[0]), &gelu)?;
    for (key, value) in [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("tie_word_embeddings", true),
        ("add_cross_attention", false),
    ] {
        keys.one_of(key, Some(&json!(value)), &[json!(value)])?;
    }
    let config = ModelConfig {
        vocab_size: keys.count("vocab_size")?,
        context_length: keys.count("n_positions")?,
        layers: keys.count("n_layer")?,
        heads: keys.count("n_head")?,
        channels: keys.count("n_embd")?,
        layer_norm_epsilon: keys.float("layer_norm_epsilon", 1e-5)?,
    };
    config.validate().map_err(|e| Error::format(path, e.to_string()))?;
    keys.one_of("n_inner", Some(&Value::Null), &[Value::Null, json!(4 * config.channels)])?;
    Ok(config)
}

/// The shape in one line. Weights carry it, so that a `config.json` that was damaged or swapped in a
/// way that no tensor's shape betrays (heads, epsilon) is found out.
pub(super) fn summary(config: &ModelConfig) -> String {
    format!(
        "vocab_size={} n_positions={} n_layer={} n_head={} n_embd={} layer_norm_epsilon={:e}",
        config.vocab_size,
        config.context_length,
        config.layers,
        config.heads,
        config.channels,
        config.layer_norm_epsilon
    )
}

struct Keys<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn error(&self, key: &str, expected: &str) -> Error {
        let message = match self.object.get(key) {
            Some(found) => format!("{key}: expected {expected}, found {found}"),
            None => format!("{key}: expected {expected}, found no such key"),
        };
        Error::format(self.path, message)
    }

    /// Checks a key that has only some supported values; `default` stands for a missing one.
    fn one_of(&self, key: &str, default: Option<&Value>, supported: &[Value]) -> Result<()> {
        if self.object.get(key).or(default).is_some_and(|value| supported.contains(value)) {
            return Ok(());
        }
        let supported: Vec<_> = supported.iter().map(Value::to_string).collect();
        Err(self.error(key, &supported.join(" or ")))
    }

    fn count(&self, key: &str) -> Result<usize> {
        let value = self.object.get(key).and_then(Value::as_u64);
        value
            .and_then(|value| value.try_into().ok())
            .ok_or_else(|| self.error(key, "a whole number"))
    }

    fn float(&self, key: &str, default: f32) -> Result<f32> {
        match self.object.get(key) {
            None => Ok(default),
            // From its decimals straight to f32: by way of f64 it would be rounded twice.
            Some(Value::Number(number)) => {
                number.to_string().parse().map_err(|_| self.error(key, "a number"))
            }
            Some(_) => Err(self.error(key, "a number")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ModelConfig> {
        from_json(Path::new("x/config.json"), text.as_bytes())
    }

    fn changed(key: &str, value: Option<Value>) -> String {
        let mut object: Map<_, _> =
            serde_json::from_str(&to_json(&ModelConfig::default())).unwrap();
        match value {
            Some(value) => object.insert(key.into(), value),
            None => object.remove(key),
        };
        serde_json::to_string(&object).unwrap()
    }

    #[test]
    fn round_trip() {
        for (heads, epsilon) in [(12, 1e-5), (6, 1.234_567_9e-6), (1, f32::MIN_POSITIVE)] {
            let config =
                ModelConfig { heads, layer_norm_epsilon: epsilon, ..ModelConfig::default() };
            let text = to_json(&config);
            assert_eq!(read(&text).unwrap(), config);
        }
        let text = to_json(&ModelConfig::default());
        assert!(text.contains("\"layer_norm_epsilon\": 0.00001,"), "{text}");
        assert!(text.contains("\"eos_token_id\": 50256,"), "{text}");
        let bytes = to_json(&ModelConfig { vocab_size: 256, ..ModelConfig::default() });
        assert!(bytes.contains("\"eos_token_id\": null,"), "{bytes}");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (key, value, parts) in [
            ("model_type", Some(json!("llama")), ["expected \"gpt2\"", "found \"llama\""]),
            ("model_type", None, ["expected \"gpt2\"", "no such key"]),
            ("activation_function", Some(json!("relu")), ["\"gelu_new\" or", "found \"relu\""]),
            ("n_inner", Some(json!(100)), ["null or 3072", "found 100"]),
            ("scale_attn_weights", Some(json!(false)), ["expected true", "found false"]),
            ("scale_attn_by_inverse_layer_idx", Some(json!(true)), ["expected false", "true"]),
            ("tie_word_embeddings", Some(json!(false)), ["expected true", "found false"]),
            ("add_cross_attention", Some(json!(true)), ["expected false", "found true"]),
            ("n_head", Some(json!("x")), ["a whole number", "found \"x\""]),
            ("n_head", Some(json!(-1)), ["a whole number", "found -1"]),
            ("n_head", Some(json!(7)), ["7 heads do not divide 768", ""]),
            ("vocab_size", None, ["a whole number", "no such key"]),
            ("vocab_size", Some(json!(u64::MAX)), ["from 1 to 16777216", "18446744073709551615"]),
            ("layer_norm_epsilon", Some(json!(true)), ["a number", "found true"]),
            ("layer_norm_epsilon", Some(json!(-1.0)), ["between 0 and 1", "-1"]),
        ] {
            let error = read(&changed(key, value)).unwrap_err();
            let message = error.to_string();
            assert!(matches!(error, Error::Format { .. }), "{message}");
            let prefix = if message.contains("divide") { "heads" } else { "" };
            assert!(message.starts_with(&format!("x/config.json: {prefix}")), "{message}");
            assert!(parts.iter().all(|part| message.contains(part)), "{key}: {message}");
        }
        let broken = read("{\"n_head\": 1,\n  nope}").unwrap_err().to_string();
        assert!(broken.contains("line 2 column 3"), "{broken}");
        assert!(read("[]").is_err() && read("").is_err());
    }

    #[test]
    fn what_makes_no_difference_is_accepted() {
        for (key, value) in [
            ("activation_function", Some(json!("gelu_pytorch_tanh"))),
            ("activation_function", None),
            ("n_inner", Some(json!(3072))),
            ("n_inner", None),
            ("tie_word_embeddings", None),
            ("layer_norm_epsilon", None),
            ("resid_pdrop", Some(json!(0.1))),
            ("something_new", Some(json!({"a": [1]}))),
        ] {
            assert_eq!(read(&changed(key, value)).unwrap(), ModelConfig::default(), "{key}");
        }
    }
}
