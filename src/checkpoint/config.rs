//! `config.json`: the model's shape, as Hugging Face's `GPT2Config` writes and reads it, or those of
//! models with Llama's blocks (`llama`).
//!
//! A loaded model keeps the file as it was found (`FoundConfig`). A save writes it again, keys that
//! nobody here reads included, except where it says something else than the weights.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::files::OpenFile;
use super::keys::{Keys, exact, object_of};
use super::llama::{self, Class};
use super::{CONFIG, StoredWeights, read_json};
use crate::gpt::{Activation, Lora, ModelConfig};
use crate::{Error, Result};

impl ModelConfig {
    /// The shape that a `config.json` of Hugging Face describes, or that of a folder, without its
    /// weights.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the key, or what is not supported.
    pub fn read(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { &path.join(CONFIG) } else { path };
        let file = OpenFile::Disk(std::fs::File::open(path).map_err(Error::io("open", path))?);
        file.check_is_file(path)?;
        Ok(from_json(path, &read_json(path, &file)?)?.0)
    }
}

/// `config.json` as a model was loaded with it. What this library does not look at (special tokens,
/// dropout, anything new) goes into the files of later saves.
#[derive(Clone)]
pub(crate) struct FoundConfig(Map<String, Value>);

/// The file's text, of a new model or, with `found`, of one that was loaded.
///
/// What was found stays as it is, in its own words, wherever it says what `config` does.
pub(super) fn to_json(
    config: &ModelConfig,
    found: Option<&FoundConfig>,
    stored: StoredWeights,
) -> String {
    let mut object = match found {
        Some(FoundConfig(object)) => object.clone(),
        None => object_of_new(config, stored),
    };
    let kind = object.get("model_type").and_then(Value::as_str);
    let (class, kind) = match config.is_llama() {
        false => ("GPT2LMHeadModel", "gpt2"),
        true => {
            let class = Class::of(config, kind);
            (class.name, class.kind)
        }
    };
    // The names of our tensors are those of this class.
    object.insert("architectures".into(), json!([class]));
    // transformers makes of weights what these say.
    for key in ["dtype", "torch_dtype"] {
        if let Some(dtype) = object.get_mut(key) {
            *dtype = json!(stored.dtype_name());
        }
    }
    match config.lora {
        Some(lora) => object.insert(LORA.into(), of_lora(&lora)),
        None => object.remove(LORA),
    };
    if parse(Path::new(""), &object).ok().as_ref() != Some(config) {
        object.extend(keys_of(config, kind));
    }
    format!("{:#}\n", Value::Object(object))
}

/// What a new model's file has besides the keys that say what it computes.
fn object_of_new(config: &ModelConfig, stored: StoredWeights) -> Map<String, Value> {
    if config.is_llama() {
        let mut object = llama::defaults(Class::of(config, None).kind);
        object.insert("dtype".into(), json!(stored.dtype_name()));
        return object;
    }
    // GPT-2's end-of-text token, where the vocabulary has it.
    let end_of_text = (config.vocab_size > 50256).then_some(50256);
    object_of(json!({
        "attn_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "dtype": stored.dtype_name(),
        "embd_pdrop": 0.0,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "n_ctx": config.context_length,
        "reorder_and_upcast_attn": false,
        "resid_pdrop": 0.0,
        "use_cache": true,
    }))
}

/// The key of the adapters, whose weights lie beside the model's.
///
/// NOTE: transformers knows no such key and takes the model without its adapters, with a warning
/// that it names their tensors in; for it they are saved alone, or merged.
const LORA: &str = "mxfp4train_lora";

fn of_lora(lora: &Lora) -> Value {
    let (alpha, names) = (exact(lora.alpha), lora.layer_names().collect::<Vec<_>>());
    json!({ "rank": lora.rank, "alpha": alpha, "layers": names })
}

/// The keys that say what the model computes, in a file of this `model_type`.
fn keys_of(config: &ModelConfig, kind: &str) -> Map<String, Value> {
    if config.is_llama() {
        return llama::keys_of(config, kind);
    }
    object_of(json!({
        "activation_function": config.activation.to_string(),
        "layer_norm_epsilon": exact(config.layer_norm_epsilon),
        "model_type": "gpt2",
        "n_embd": config.channels,
        "n_head": config.heads,
        "n_inner": (config.mlp_channels > 0).then_some(config.mlp_channels),
        "n_layer": config.layers,
        "n_positions": config.context_length,
        "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
        "scale_attn_weights": config.scale_attention,
        "tie_word_embeddings": config.tied_head,
        "vocab_size": config.vocab_size,
    }))
}

/// Reads the file's text; messages call it `path`.
///
/// Keys that do not change what the model computes are kept, but not looked at. Dropout is one of
/// them: this library trains without. `reorder_and_upcast_attn` is another: scores are f32 sums
/// here in any case.
///
/// # Errors
/// [`Error::Format`] naming the key, or line and column where it is no JSON.
pub(super) fn from_json(path: &Path, text: &[u8]) -> Result<(ModelConfig, FoundConfig)> {
    let object: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|e| Error::format(path, format!("expected a JSON object: {e}")))?;
    Ok((parse(path, &object)?, FoundConfig(object)))
}

fn parse(path: &Path, object: &Map<String, Value>) -> Result<ModelConfig> {
    let keys = Keys { path, object };
    let kind = object.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let (config, in_words): (_, fn(Error) -> String) = match Class::of_kind(kind) {
        Some(class) => (class.parse(&keys)?, llama::in_words_of_file),
        None => (keys.gpt2()?, in_words_of_file),
    };
    let config = ModelConfig { lora: keys.lora()?, ..config };
    config.validate().map_err(|e| Error::format(path, in_words(e)))?;
    Ok(config.canonical())
}

/// The message of an error about a field of [`ModelConfig`], with the field's key in the file.
fn in_words_of_file(error: Error) -> String {
    let Error::InvalidArgument { what, message } = error else { return error.to_string() };
    let key = match what {
        "channels" => "n_embd",
        "context_length" => "n_positions",
        "heads" => "n_head",
        "layers" => "n_layer",
        "mlp_channels" => "n_inner",
        same => same,
    };
    format!("{key}: {message}")
}

/// The shape in one line. Weights carry it, so that a `config.json` that was damaged or swapped in
/// a way that no tensor's shape betrays (heads, epsilon) is found out. What GPT-2 has not is named
/// only where it is, so that files of earlier versions say the same.
pub(super) fn summary(config: &ModelConfig) -> String {
    if config.is_llama() {
        // Of a kind that says how it is computed, whatever class it came as.
        let keys = keys_of(config, Class::of(config, None).kind);
        let said =
            keys.iter().filter(|(key, _)| !["rope_theta", "rope_scaling"].contains(&key.as_str()));
        let words: Vec<_> = said.map(|(key, value)| format!("{key}={value}")).collect();
        return with_lora(words.join(" "), config);
    }
    let mut text = format!(
        "vocab_size={} n_positions={} n_layer={} n_head={} n_embd={} layer_norm_epsilon={:e}",
        config.vocab_size,
        config.context_length,
        config.layers,
        config.heads,
        config.channels,
        config.layer_norm_epsilon
    );
    let keys = keys_of(config, "gpt2");
    for (key, value) in keys_of(&ModelConfig::default(), "gpt2") {
        const OPTIONAL: [&str; 5] = [
            "activation_function",
            "n_inner",
            "scale_attn_by_inverse_layer_idx",
            "scale_attn_weights",
            "tie_word_embeddings",
        ];
        if OPTIONAL.contains(&key.as_str()) && keys[&key] != value {
            text.push_str(&format!(" {key}={}", keys[&key]));
        }
    }
    with_lora(text, config)
}

fn with_lora(mut text: String, config: &ModelConfig) -> String {
    if let Some(lora) = &config.lora {
        text.push_str(&format!(" {LORA}={}", of_lora(lora)));
    }
    text
}

impl Keys<'_> {
    /// A GPT-2.
    fn gpt2(&self) -> Result<ModelConfig> {
        self.check_model()?;
        if self.flag("add_cross_attention", false)? {
            return Err(self.error("add_cross_attention", "false"));
        }
        let config = ModelConfig {
            vocab_size: self.count("vocab_size")?,
            context_length: self.count("n_positions")?,
            layers: self.count("n_layer")?,
            heads: self.count("n_head")?,
            channels: self.count("n_embd")?,
            layer_norm_epsilon: self.float("layer_norm_epsilon", 1e-5)?,
            mlp_channels: match self.object.get("n_inner") {
                None | Some(Value::Null) => 0,
                Some(_) => self.count("n_inner")?,
            },
            activation: self.activation()?,
            tied_head: self.flag("tie_word_embeddings", true)?,
            scale_attention: self.flag("scale_attn_weights", true)?,
            scale_attention_by_layer: self.flag("scale_attn_by_inverse_layer_idx", false)?,
            ..ModelConfig::default()
        };
        if self.object.get("n_inner").and_then(Value::as_u64) == Some(0) {
            return Err(self.error("n_inner", "null or a number from 1 on"));
        }
        if config.heads > 0 && !config.channels.is_multiple_of(config.heads) {
            return Err(self.error("n_head", &format!("a divisor of n_embd ({})", config.channels)));
        }
        Ok(config)
    }

    /// An error for a model of another kind.
    fn check_model(&self) -> Result<()> {
        let kind = self.object.get("model_type");
        if kind.is_some_and(|kind| kind == "gpt2") {
            return Ok(());
        }
        let class = match self.object.get("architectures").and_then(|classes| classes.get(0)) {
            Some(Value::String(class)) => format!(" ({class})"),
            _ => String::new(),
        };
        let known = kind.and_then(Value::as_str).and_then(llama::why_not);
        let (found, why) = match kind {
            Some(kind) => {
                let why = known.unwrap_or("models of other architectures are not read");
                (kind.to_string(), why)
            }
            // As the first versions of transformers wrote it.
            None => ("no such key".into(), "if it is a GPT-2, add \"model_type\": \"gpt2\""),
        };
        let kinds = llama::CLASSES.map(|class| format!("{:?}", class.kind)).join(", ");
        let message =
            format!("model_type: expected \"gpt2\", {kinds}, found {found}{class}; {why}");
        Err(Error::format(self.path, message))
    }

    fn activation(&self) -> Result<Activation> {
        const KEY: &str = "activation_function";
        let name = match self.object.get(KEY) {
            None => return Ok(Activation::GeluTanh),
            Some(name) => name.as_str(),
        };
        name.and_then(|name| name.parse().ok())
            .ok_or_else(|| self.error(KEY, "\"gelu_new\" (GELU's tanh form) or \"gelu\" (exact)"))
    }

    fn lora(&self) -> Result<Option<Lora>> {
        let Some(value) = self.object.get(LORA) else { return Ok(None) };
        let rank = value["rank"].as_u64().and_then(|rank| rank.try_into().ok());
        let alpha = value["alpha"].as_number().and_then(|alpha| alpha.to_string().parse().ok());
        let names = value["layers"].as_array();
        let names = names.and_then(|names| names.iter().map(Value::as_str).collect::<Option<_>>());
        let lora = rank.zip(alpha).zip(names).and_then(|((rank, alpha), names): (_, Vec<_>)| {
            Some(Lora { rank, alpha, layers: Lora::layers_of(&names.join(",")).ok()? })
        });
        let lora = lora.ok_or_else(|| self.error(LORA, "rank, alpha and layers of adapters"))?;
        Ok(Some(lora))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ModelConfig> {
        Ok(from_json(Path::new("x/config.json"), text.as_bytes())?.0)
    }

    fn changed(key: &str, value: Option<Value>) -> String {
        let mut object: Map<_, _> =
            serde_json::from_str(&to_json(&ModelConfig::default(), None, StoredWeights::F32))
                .unwrap();
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
            let text = to_json(&config, None, StoredWeights::F32);
            assert_eq!(read(&text).unwrap(), config);
        }
        let text = to_json(&ModelConfig::default(), None, StoredWeights::F32);
        assert!(text.contains("\"layer_norm_epsilon\": 0.00001,"), "{text}");
        assert!(text.contains("\"eos_token_id\": 50256,"), "{text}");
        let bytes = to_json(
            &ModelConfig { vocab_size: 256, ..ModelConfig::default() },
            None,
            StoredWeights::F32,
        );
        assert!(bytes.contains("\"eos_token_id\": null,"), "{bytes}");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (key, value, parts) in [
            ("model_type", Some(json!("opt")), ["expected \"gpt2\"", "found \"opt\""]),
            ("model_type", Some(json!("mixtral")), ["found \"mixtral\"", "mixtures of experts"]),
            ("model_type", None, ["expected \"gpt2\"", "no such key"]),
            ("activation_function", Some(json!("relu")), ["\"gelu_new\" (", "found \"relu\""]),
            ("activation_function", Some(json!("silu")), ["or \"gelu\"", "found \"silu\""]),
            ("activation_function", Some(json!(1)), ["or \"gelu\"", "found 1"]),
            ("n_inner", Some(json!(0)), ["null or a number from 1", "found 0"]),
            ("n_inner", Some(json!(1.5)), ["a whole number", "found 1.5"]),
            ("n_inner", Some(json!(1 << 23)), ["n_inner: expected a number up to", "8388608"]),
            ("scale_attn_weights", Some(json!(1)), ["true or false", "found 1"]),
            ("scale_attn_by_inverse_layer_idx", Some(json!("no")), ["true or false", "\"no\""]),
            ("tie_word_embeddings", Some(json!(null)), ["true or false", "found null"]),
            ("add_cross_attention", Some(json!(true)), ["expected false", "found true"]),
            ("n_head", Some(json!("x")), ["a whole number", "found \"x\""]),
            ("n_head", Some(json!(-1)), ["a whole number", "found -1"]),
            ("n_head", Some(json!(7)), ["n_head: expected a divisor of n_embd (768)", "found 7"]),
            ("n_head", Some(json!(0)), ["n_head: expected a number from 1", "got 0"]),
            ("n_layer", Some(json!(4096)), ["n_layer: expected a number from 1", "got 4096"]),
            ("n_embd", Some(json!(0)), ["n_embd: expected a number from 1", "got 0"]),
            ("n_positions", Some(json!(0)), ["n_positions: expected a number from 1", "got 0"]),
            ("vocab_size", None, ["a whole number", "no such key"]),
            ("vocab_size", Some(json!(u64::MAX)), ["from 1 to 16777216", "18446744073709551615"]),
            ("layer_norm_epsilon", Some(json!(true)), ["a number", "found true"]),
            ("layer_norm_epsilon", Some(json!(-1.0)), ["between 0 and 1", "-1"]),
        ] {
            let error = read(&changed(key, value)).unwrap_err();
            let message = error.to_string();
            assert!(matches!(error, Error::Format { .. }), "{message}");
            assert!(message.starts_with("x/config.json: "), "{message}");
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
            ("reorder_and_upcast_attn", Some(json!(true))),
            ("something_new", Some(json!({"a": [1]}))),
        ] {
            assert_eq!(read(&changed(key, value)).unwrap(), ModelConfig::default(), "{key}");
        }
    }

    #[test]
    fn what_differs_from_gpt2_is_read_and_written() {
        for (key, value, config) in [
            ("n_inner", json!(37), ModelConfig { mlp_channels: 37, ..ModelConfig::default() }),
            (
                "activation_function",
                json!("gelu"),
                ModelConfig { activation: Activation::Gelu, ..ModelConfig::default() },
            ),
            (
                "tie_word_embeddings",
                json!(false),
                ModelConfig { tied_head: false, ..ModelConfig::default() },
            ),
            (
                "scale_attn_weights",
                json!(false),
                ModelConfig { scale_attention: false, ..ModelConfig::default() },
            ),
            (
                "scale_attn_by_inverse_layer_idx",
                json!(true),
                ModelConfig { scale_attention_by_layer: true, ..ModelConfig::default() },
            ),
        ] {
            assert_eq!(read(&changed(key, Some(value.clone()))).unwrap(), config, "{key}");
            let written = to_json(&config, None, StoredWeights::F32);
            assert_eq!(read(&written).unwrap(), config, "{key}");
            let object: Map<_, _> = serde_json::from_str(&written).unwrap();
            assert_eq!(object[key], value);
            let expected = format!("{} {key}={value}", summary(&ModelConfig::default()));
            assert_eq!(summary(&config), expected);
        }
    }

    #[test]
    fn what_was_found_is_written_again() {
        let mut found: Map<_, _> =
            serde_json::from_str(&to_json(&ModelConfig::default(), None, StoredWeights::F32))
                .unwrap();
        for key in ["n_ctx", "scale_attn_weights", "use_cache"] {
            found.remove(key);
        }
        for (key, value) in [
            ("activation_function", json!("gelu_fast")),
            ("n_inner", json!(3072)),
            ("bos_token_id", json!(3)),
            ("eos_token_id", json!([4, 5])),
            ("pad_token_id", json!(6)),
            ("attn_pdrop", json!(0.1)),
            ("dtype", json!("float16")),
            ("transformers_version", json!("5.24.0")),
            ("layer_norm_epsilon", json!(1e-5)),
            ("task_specific_params", json!({"text-generation": {"do_sample": true}})),
        ] {
            found.insert(key.into(), value);
        }
        let text = serde_json::to_string(&found).unwrap();
        let (config, kept) = from_json(Path::new("x/config.json"), text.as_bytes()).unwrap();
        assert_eq!(config, ModelConfig::default());
        let written: Map<_, _> =
            serde_json::from_str(&to_json(&config, Some(&kept), StoredWeights::F32)).unwrap();
        // What the file beside it holds.
        found.insert("dtype".into(), json!("float32"));
        assert_eq!(written, found);

        // What the weights say otherwise, and the class of what is written, are ours to say.
        found.insert("architectures".into(), json!(["GPT2Model"]));
        let text = serde_json::to_string(&found).unwrap();
        let (config, kept) = from_json(Path::new("x/config.json"), text.as_bytes()).unwrap();
        let config = ModelConfig {
            architecture: Default::default(),
            kv_heads: 0,
            head_size: 0,
            qkv_bias: false,
            qk_norm: false,
            rope: Default::default(),
            tied_head: false,
            ..config
        };
        let text = to_json(&config, Some(&kept), StoredWeights::F32);
        assert_eq!(read(&text).unwrap(), config);
        let written: Map<_, _> = serde_json::from_str(&text).unwrap();
        assert_eq!(written["architectures"], json!(["GPT2LMHeadModel"]));
        assert_eq!(written["tie_word_embeddings"], json!(false));
        assert_eq!(written["eos_token_id"], json!([4, 5]));
    }

    #[test]
    fn a_model_of_another_kind_is_named() {
        let text = r#"{"model_type": "opt", "architectures": ["OPTForCausalLM"]}"#;
        let message = read(text).unwrap_err().to_string();
        assert!(message.contains("found \"opt\" (OPTForCausalLM)"), "{message}");
        let message = read("{}").unwrap_err().to_string();
        assert!(message.contains("expected \"gpt2\", \"llama\", \"mistral\""), "{message}");
        assert!(message.contains("found no such key; if it is"), "{message}");
    }
}
