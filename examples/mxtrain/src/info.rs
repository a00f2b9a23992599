//! `mxtrain info`: what a checkpoint, a token file or a prepared folder contains.
//!
//! A checkpoint is described from its small files and the header of its weights, so that a large one
//! takes no longer than a small one.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use indicatif::{HumanBytes, HumanCount};
use mxfp4train::{Dataset, ModelConfig};
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};

use crate::cli::InfoArgs;
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::hugging_face::known_tokenizer;
use crate::prepared::{Documents, Meta, Source};
use crate::tokenizer::Tokenizer;
use crate::train::is_checkpoint;

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// Runs the command.
pub(crate) fn run(args: &InfoArgs) -> Outcome<ExitCode> {
    let path = &args.path;
    let about = if Meta::is_in(path) {
        About::Data(prepared(path)?)
    } else if is_checkpoint(path) {
        About::Checkpoint(checkpoint(path)?)
    } else if path.is_dir() {
        return Err(Failure::usage(format!(
            "{}: expected a checkpoint (config.json) or a prepared folder (meta.json), found neither",
            path.display()
        )));
    } else {
        let files = token_files(&Dataset::open_with(path, &args.tokens.options())?)?;
        About::Data(Prepared { files, ..Prepared::default() })
    };
    if args.json {
        let json = serde_json::to_string_pretty(&about).expect("plain data becomes JSON");
        console::print(&(json + "\n"))?;
    } else {
        console::print(&match &about {
            About::Checkpoint(checkpoint) => checkpoint.text(args.tensors),
            About::Data(data) => data.text(),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum About {
    Checkpoint(Checkpoint),
    Data(Prepared),
}

/// A checkpoint folder.
#[derive(Serialize)]
struct Checkpoint {
    config: Config,
    parameters: u64,
    /// The trainer's part; `None` for weights alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    training: Option<Training>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<Tokenizer>,
    tensors: Vec<Tensor>,
}

/// The keys of Hugging Face's `config.json` that give the shape.
#[derive(Serialize, Deserialize)]
struct Config {
    vocab_size: usize,
    n_positions: usize,
    n_layer: usize,
    n_head: usize,
    n_embd: usize,
}

/// The keys of `trainer.json` that a reader wants to know.
#[derive(Serialize, Deserialize)]
struct Training {
    step: u64,
    recipe: String,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

/// A prepared folder, or a token file alone.
#[derive(Default, Serialize)]
struct Prepared {
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<Tokenizer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vocab_size: Option<usize>,
    files: Vec<TokenFile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    documents: Option<Documents>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sources: Vec<Source>,
}

#[derive(Serialize)]
struct TokenFile {
    /// As text; bytes that are not UTF-8 are replaced.
    path: String,
    format: String,
    token_type: String,
    tokens: u64,
    largest_token: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    documents: Option<u64>,
}

fn checkpoint(dir: &Path) -> Outcome<Checkpoint> {
    let config: Config = json(&dir.join("config.json"))?;
    let shape = ModelConfig {
        vocab_size: config.vocab_size,
        context_length: config.n_positions,
        layers: config.n_layer,
        heads: config.n_head,
        channels: config.n_embd,
        ..ModelConfig::default()
    };
    shape.validate().map_err(|e| Failure::from(e).within(dir.join("config.json").display()))?;
    let trainer = dir.join("trainer.json");
    Ok(Checkpoint {
        config,
        parameters: shape.parameter_count(),
        training: trainer.exists().then(|| json(&trainer)).transpose()?,
        tokenizer: known_tokenizer(dir)?,
        tensors: tensors(&dir.join("model.safetensors"))?,
    })
}

fn json<T: for<'a> Deserialize<'a>>(path: &Path) -> Outcome<T> {
    let text = fs::read_to_string(path).map_err(Failure::io("read", path))?;
    serde_json::from_str(&text).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

/// Reads the names and shapes in a safetensors file, without the values.
fn tensors(path: &Path) -> Outcome<Vec<Tensor>> {
    let damaged = |what: String| Failure::usage(format!("{}: {what}", path.display()));
    let mut file = File::open(path).map_err(Failure::io("open", path))?;
    let file_length = file.metadata().map_err(Failure::io("read", path))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length)
        .map_err(|_| damaged("too short for a safetensors file".to_owned()))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(damaged(format!("a header of {length} bytes: not a sound safetensors file")));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(Failure::io("read", path))?;
    let header: Metadata = serde_json::from_slice(&header)
        .map_err(|e| damaged(format!("not a sound safetensors file: {e}")))?;

    let expected = (header.data_len() as u64).checked_add(8 + length);
    if expected != Some(file_length) {
        return Err(damaged(format!(
            "its header tells of {} bytes of tensors, the file holds {}; it is damaged or truncated",
            header.data_len(),
            file_length.saturating_sub(8 + length)
        )));
    }
    Ok((header.offset_keys().into_iter())
        .filter_map(|name| {
            let info = header.info(&name)?;
            Some(Tensor { dtype: format!("{:?}", info.dtype), shape: info.shape.clone(), name })
        })
        .collect())
}

fn prepared(dir: &Path) -> Outcome<Prepared> {
    let meta = Meta::read(dir)?;
    let mut files = token_files(&meta.open_train(dir)?)?;
    if let Some(val) = meta.open_val(dir)? {
        files.extend(token_files(&val)?);
    }
    Ok(Prepared {
        tokenizer: Some(meta.tokenizer),
        vocab_size: Some(meta.vocab_size),
        files,
        documents: meta.documents,
        sources: meta.sources,
    })
}

fn token_files(data: &Dataset) -> Outcome<Vec<TokenFile>> {
    let largest = data.max_tokens()?;
    let described = data.files().into_iter().zip(largest).map(|(file, largest_token)| TokenFile {
        path: file.path.to_string_lossy().into_owned(),
        format: file.format.to_string(),
        token_type: file.token_type.to_string(),
        tokens: file.tokens,
        largest_token,
        documents: file.documents,
    });
    Ok(described.collect())
}

impl Checkpoint {
    fn text(&self, with_tensors: bool) -> String {
        let c = &self.config;
        let mut text = format!(
            "model       GPT-2, {} layers x {} channels x {} heads, context {}, vocabulary {}\n\
             parameters  {}\n",
            c.n_layer,
            c.n_embd,
            c.n_head,
            HumanCount(c.n_positions as u64),
            HumanCount(c.vocab_size as u64),
            HumanCount(self.parameters),
        );
        if let Some(training) = &self.training {
            let Training { step, recipe } = training;
            text.push_str(&format!("training    step {step}, recipe {recipe}\n"));
        }
        if let Some(tokenizer) = self.tokenizer {
            text.push_str(&format!("tokenizer   {tokenizer}\n"));
        }
        text.push_str(&format!("tensors     {}\n", self.tensors.len()));
        let width = self.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
        for t in self.tensors.iter().filter(|_| with_tensors) {
            text.push_str(&format!("  {:width$}  {}  {:?}\n", t.name, t.dtype, t.shape));
        }
        text
    }
}

impl Prepared {
    fn text(&self) -> String {
        let mut text = String::new();
        if let (Some(tokenizer), Some(vocab_size)) = (self.tokenizer, self.vocab_size) {
            let vocab_size = HumanCount(vocab_size as u64);
            text.push_str(&format!("tokenizer  {tokenizer}, vocabulary {vocab_size}\n"));
        }
        for file in &self.files {
            let documents = file.documents.map_or_else(String::new, |documents| {
                format!(" in {} documents", HumanCount(documents))
            });
            text.push_str(&format!(
                "tokens     {}: {}{documents}, {} {}, the largest is {}\n",
                file.path,
                HumanCount(file.tokens),
                file.format,
                file.token_type,
                HumanCount(file.largest_token.into()),
            ));
        }
        if self.vocab_size.is_none()
            && let Some(largest) = self.files.iter().map(|file| file.largest_token).max()
        {
            let tokens = self.files.iter().map(|file| file.tokens).sum();
            text.push_str(&format!(
                "total      {} tokens; a vocabulary of {} would do\n",
                HumanCount(tokens),
                HumanCount(u64::from(largest) + 1),
            ));
        }
        match self.documents {
            Some(Documents { cut: true, .. }) => {
                text.push_str("documents  one, its end for validation\n");
            }
            Some(Documents { train, val, .. }) => text.push_str(&format!(
                "documents  {} for training, {} for validation\n",
                HumanCount(train),
                HumanCount(val),
            )),
            None => {}
        }
        for source in &self.sources {
            text.push_str(&format!(
                "source     {}: {} for training, {} for validation\n",
                source.path.display(),
                HumanBytes(source.train_bytes),
                HumanBytes(source.val_bytes),
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_header_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        for (contents, expected) in [
            (&b"1234"[..], "too short"),
            (&[0xff; 16], "not a sound safetensors file"),
            (b"\x10\0\0\0\0\0\0\0{\"a\"", "not a sound safetensors file"),
            (b"\x02\0\0\0\0\0\0\0{}more", "0 bytes of tensors, the file holds 4"),
        ] {
            fs::write(&path, contents).unwrap();
            let message = tensors(&path).err().unwrap().message;
            assert!(message.contains(expected), "{message}");
            assert!(message.contains("model.safetensors"), "{message}");
        }
    }
}
