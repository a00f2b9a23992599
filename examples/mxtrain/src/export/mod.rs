//! `mxtrain export`: a checkpoint's model for programs that run it, in the numbers that they want.
//!
//! A folder of safetensors is written by the library, as checkpoints are, and the tokenizer's files
//! are put beside it. A GGUF file is written tensor by tensor under a temporary name, and renamed
//! when it is whole. docs/hugging-face.md says what reads them.
//!
//! In a GGUF file in MXFP4 the token embedding is bf16, and the head MXFP4, so a tied head is
//! stored as well: layers and head are those of `mxtrain generate --weights mxfp4`, whose embedding
//! is f32.

mod gguf;
mod gpt2;
mod llama;
mod vocabulary;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;
use indicatif::{HumanBytes, HumanCount};
use mxfp4train::formats::BLOCK;
use mxfp4train::{Architecture, Model, ModelConfig, StoredWeights};

use crate::cli::{ExportArgs, MachineArgs};
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::hugging_face::{self, Files, Found, load, tokenizer_of, tokenizer_to_read};
use crate::machine;
use crate::run_file;
use crate::signals::Signals;
use crate::tokens_file::{create_anew, temporary_name};
use crate::train::{adapters_in_words, is_checkpoint};
use gguf::{Tensor, Value};

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// A folder that Hugging Face's programs read.
    Safetensors,
    /// A file that llama.cpp reads.
    Gguf,
    /// A folder of adapters that PEFT reads.
    Peft,
}

impl ExportFormat {
    /// The one that a name asks for.
    fn of(out: &Path) -> Self {
        match out.extension() {
            Some(end) if end == "gguf" => Self::Gguf,
            _ => Self::Safetensors,
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: &ExportArgs) -> Outcome<ExitCode> {
    let signals = Signals::listen()?;
    let format = args.format.unwrap_or_else(|| ExportFormat::of(&args.out));
    match format {
        ExportFormat::Safetensors => check_folder(args)?,
        ExportFormat::Gguf => check_file(args)?,
        ExportFormat::Peft => check_adapters(args)?,
    }
    // Nothing is computed but what weights are rounded to.
    let on_cpu = MachineArgs { threads: 0, device: "cpu".into() };
    let (engine, _) = machine::open(&on_cpu, 0)?;
    let mut model = load(&engine, &args.checkpoint)?;
    if let Some(dir) = &args.lora {
        model = model.load_lora(dir).map_err(|error| Failure::from(error).within("--lora"))?;
    }
    if format == ExportFormat::Peft {
        write_adapters(args, &model)?;
        return Ok(ExitCode::SUCCESS);
    }
    if model.config().lora.is_some() {
        model = model.merge_lora()?;
    }
    match format {
        ExportFormat::Gguf => write_file(args, &model, &signals)?,
        _ => write_folder(args, &model)?,
    }
    console::print(&format!(
        "{}: {} parameters in {}, {}\n",
        console::shown(&args.out),
        HumanCount(model.config().parameter_count()),
        args.weights,
        HumanBytes(size(&args.out).map_err(Failure::io("read", &args.out))?),
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn write_adapters(args: &ExportArgs, model: &Model) -> Outcome {
    let ExportArgs { checkpoint, out, .. } = args;
    let config = model.config();
    let Some(lora) = &config.lora else {
        return Err(Failure::usage(format!(
            "--format peft: {} has no adapters, which mxtrain train --lora makes; choose another format",
            checkpoint.display()
        )));
    };
    model.save_lora(out)?;
    let alone = ModelConfig { lora: None, ..config.clone() };
    console::print(&format!(
        "{}: {}, {} parameters in f32\n",
        console::shown(out),
        adapters_in_words(lora, config.architecture),
        HumanCount(config.parameter_count() - alone.parameter_count()),
    ))?;
    Ok(())
}

/// Whether adapters may be written to the folder.
fn check_adapters(args: &ExportArgs) -> Outcome {
    if is_checkpoint(&args.out) {
        let message = "holds a model, beside which adapters would be taken for its own; name another \
                       folder";
        return Err(Failure::usage(message).within(args.out.display()));
    }
    let is_there = args.out.join("adapter_model.safetensors").exists();
    if is_there { check_overwrite(args, "a folder of adapters") } else { Ok(()) }
}

/// Bytes of a file, or of the weights in a folder.
fn size(out: &Path) -> io::Result<u64> {
    let weights = out.join("model.safetensors");
    Ok(fs::metadata(if out.is_dir() { &weights } else { out })?.len())
}

/// Whether the checkpoint may be exported to the folder.
fn check_folder(args: &ExportArgs) -> Outcome {
    let ExportArgs { checkpoint, out, .. } = args;
    if out.extension().is_some_and(|end| end == "safetensors") {
        return Err(Failure::usage(format!(
            "{}: safetensors are written as a folder, with config.json and the tokenizer beside \
             model.safetensors; name a folder",
            out.display()
        )));
    }
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(checkpoint, out) {
        let message =
            "the checkpoint itself, which an export does not replace; name another folder";
        return Err(Failure::usage(message).within(out.display()));
    }
    if !is_checkpoint(out) {
        return Ok(());
    }
    if let Some(of_run) =
        [run_file::FILE, "trainer.json"].iter().find(|file| out.join(file).exists())
    {
        return Err(Failure::usage(format!(
            "{}: holds a run of mxtrain train ({of_run}), which an export does not replace; name \
             another folder",
            out.display()
        )));
    }
    check_overwrite(args, "a model")
}

/// Whether the checkpoint may be exported to the file.
fn check_file(args: &ExportArgs) -> Outcome {
    let out = &args.out;
    let mut magic = [0; 4];
    let is_gguf = match fs::symlink_metadata(out) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Failure::io("open", out)(e)),
        Ok(_) if out.is_dir() => {
            let message = "a folder, and --format gguf writes a file; name one in it, such as \
                           model.gguf";
            return Err(Failure::usage(message).within(out.display()));
        }
        Ok(_) => {
            let file = files::open(out).map_err(Failure::io("open", out))?;
            io::Read::read_exact(&mut &file, &mut magic).is_ok() && &magic == gguf::MAGIC
        }
    };
    if !is_gguf {
        let message = "there is a file that is no GGUF, which an export does not replace; name \
                       another file";
        return Err(Failure::usage(message).within(out.display()));
    }
    check_overwrite(args, "a GGUF file")
}

fn check_overwrite(args: &ExportArgs, there: &str) -> Outcome {
    if args.overwrite {
        return Ok(());
    }
    let out = args.out.display();
    let message =
        format!("there already is {there}; replace it (--overwrite) or name another place");
    Err(Failure::usage(message).within(out))
}

fn write_folder(args: &ExportArgs, model: &Model) -> Outcome {
    let ExportArgs { checkpoint, out, weights, .. } = args;
    let found = match tokenizer_of(checkpoint)? {
        Some(Found::Ours(tokenizer)) => Some(tokenizer),
        _ => None,
    };
    let named = args.tokenizer.as_ref().map(|named| named.open(None)).transpose()?;
    let tokenizer = named.or(found);
    let mut files = Files::new(Some(checkpoint), tokenizer, model.config().context_length)?;
    model.save_as(out, *weights)?;
    // All that an earlier export has put there is replaced.
    files.put(out, &hugging_face::listed(out)?)?;
    files.notes.iter().for_each(|note| console::note(&format!("mxtrain: {note}")));
    Ok(())
}

/// What the numbers of a tensor of a file are made from.
enum Origin {
    /// A tensor of the model, by Hugging Face's name.
    Tensor { name: String, order: Order },
    /// Numbers that are no weights.
    Numbers(Vec<f32>),
}

/// How the numbers of a tensor lie in a file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    /// As in the model.
    Same,
    /// Rows and columns change places.
    Turned,
    /// Rows i and i + D/2 of each of so many heads become neighbours.
    Paired { heads: usize },
}

impl Origin {
    fn of(name: &str) -> Self {
        Self::Tensor { name: name.to_owned(), order: Order::Same }
    }

    /// What errors call it.
    fn name(&self) -> &str {
        match self {
            Self::Tensor { name, .. } => name,
            Self::Numbers(_) => llama::FREQUENCIES,
        }
    }

    /// Reads the numbers of a tensor of this shape, by way of `other`.
    fn read(
        &self,
        model: &Model,
        shape: &[usize],
        values: &mut Vec<f32>,
        other: &mut Vec<f32>,
    ) -> Outcome {
        let (name, order) = match self {
            Self::Tensor { name, order } => (name, *order),
            Self::Numbers(numbers) => {
                values.clone_from(numbers);
                return Ok(());
            }
        };
        values.resize(shape.iter().product(), 0.0);
        model.read_tensor(name, values)?;
        let &[outputs, inputs] = shape else { return Ok(()) };
        match order {
            Order::Same => return Ok(()),
            Order::Turned => {
                other.resize(values.len(), 0.0);
                turn(values, other, [inputs, outputs]);
            }
            Order::Paired { heads } => {
                other.clear();
                pair(values, other, inputs, outputs / heads);
            }
        }
        std::mem::swap(values, other);
        Ok(())
    }
}

/// The token embedding, and the head where it has no weights of its own and is stored nevertheless.
fn embeddings(
    name: &str,
    shape: &[usize],
    weights: StoredWeights,
    is_tied: bool,
) -> Vec<(Tensor, Origin)> {
    let tensor = |name: &str, stored| Tensor { name: name.into(), shape: shape.into(), stored };
    if weights != StoredWeights::Mxfp4 {
        return vec![(tensor("token_embd.weight", weights), Origin::of(name))];
    }
    let mut tensors = vec![(tensor("token_embd.weight", StoredWeights::Bf16), Origin::of(name))];
    tensors.extend(is_tied.then(|| (tensor("output.weight", weights), Origin::of(name))));
    tensors
}

/// A failure for a model whose linear layers are not made of whole blocks, where a file has blocks.
fn check_blocks(config: &ModelConfig, weights: StoredWeights) -> Outcome {
    let widths = config.linears().map(|[inputs, _]| inputs);
    match widths.iter().find(|width| !width.is_multiple_of(BLOCK)) {
        Some(width) if weights == StoredWeights::Mxfp4 => Err(Failure::usage(format!(
            "--weights mxfp4: GGUF has whole blocks of {BLOCK}, which do not divide this model's \
             width {width}; choose bf16, or --format safetensors"
        ))),
        _ => Ok(()),
    }
}

fn number(n: usize) -> Value {
    Value::U32(n as u32)
}

/// The keys of a file that say what it is.
fn general(checkpoint: &Path, architecture: &str, weights: StoredWeights) -> Vec<(String, Value)> {
    let text = |text: &str| Value::Text(text.to_owned());
    let name = checkpoint.canonicalize().ok();
    let name = name.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let file_type = match weights {
        StoredWeights::F32 => 0,
        StoredWeights::F16 => 1,
        StoredWeights::Bf16 => 32,
        StoredWeights::Mxfp4 => 38,
    };
    let keys = [
        ("architecture", text(architecture)),
        ("type", text("model")),
        ("name", text(&name)),
        ("file_type", Value::U32(file_type)),
        // Of the types that are quantized, as ggml counts.
        ("quantization_version", Value::U32(2)),
    ];
    keys.into_iter().map(|(key, value)| (format!("general.{key}"), value)).collect()
}

fn write_file(args: &ExportArgs, model: &Model, signals: &Signals) -> Outcome {
    let ExportArgs { checkpoint, out, weights, .. } = args;
    let config = model.config();
    let architecture = match config.architecture {
        Architecture::Gpt2 => gpt2::check(config).map(|()| "gpt2")?,
        Architecture::Llama => llama::check(config)?,
    };
    check_blocks(config, *weights)?;
    let tokenizer = tokenizer_to_read(checkpoint, args.tokenizer.as_ref(), config.vocab_size)?;
    let (keys, tensors) = match config.architecture {
        Architecture::Gpt2 => (gpt2::keys(config), gpt2::tensors(model.tensors(), *weights)),
        Architecture::Llama => (llama::keys(config), llama::tensors(config, *weights)),
    };
    let mut metadata = general(checkpoint, architecture, *weights);
    metadata.extend(keys.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)));
    metadata.extend(vocabulary::keys(checkpoint, config.vocab_size, &tokenizer)?);
    let (tensors, origins): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
    let mut file = Unfinished::create(out, signals)?;
    file.write(&gguf::header(&metadata, &tensors))?;
    let (mut values, mut other, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    for (tensor, origin) in tensors.iter().zip(&origins) {
        origin.read(model, &tensor.shape, &mut values, &mut other)?;
        for part in values.chunks(PIECE) {
            bytes.clear();
            gguf::encode(tensor.stored, part, &mut bytes).map_err(|value| {
                Failure::usage(format!(
                    "--weights {}: tensor {} has the number {value:e}, which it does not have; \
                     choose f32",
                    tensor.stored,
                    origin.name()
                ))
            })?;
            file.write(&bytes)?;
        }
        file.write(&vec![0; gguf::padding(tensor.bytes())])?;
    }
    file.finish()
}

/// Numbers that become bytes at once: whole blocks of all formats.
const PIECE: usize = 1 << 16;

/// Transposes a matrix of `rows` and `cols`, square by square, so that lines of both are used whole
/// while they are in a cache.
fn turn(from: &[f32], to: &mut [f32], [rows, cols]: [usize; 2]) {
    const TILE: usize = 32;
    for r in (0..rows).step_by(TILE) {
        for c in (0..cols).step_by(TILE) {
            for row in r..rows.min(r + TILE) {
                for col in c..cols.min(c + TILE) {
                    to[col * rows + row] = from[row * cols + col];
                }
            }
        }
    }
}

/// Puts rows i and i + D/2 of every head of D (`size`) rows beside each other.
fn pair(from: &[f32], to: &mut Vec<f32>, width: usize, size: usize) {
    for head in from.chunks_exact(size * width) {
        let (first, second) = head.split_at(head.len() / 2);
        for (a, b) in first.chunks_exact(width).zip(second.chunks_exact(width)) {
            to.extend(a.iter().chain(b));
        }
    }
}

/// A file under its temporary name, which it loses when it is whole.
struct Unfinished<'a> {
    path: &'a Path,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl<'a> Unfinished<'a> {
    fn create(path: &'a Path, signals: &Signals) -> Outcome<Self> {
        let temporary = temporary_name(path);
        let create = || create_anew(&temporary).map_err(Failure::io("create", &temporary));
        let file = signals.making(create, |_| vec![temporary.clone()])?;
        Ok(Self { path, file: BufWriter::new(file), temporary })
    }

    fn write(&mut self, bytes: &[u8]) -> Outcome {
        self.file.write_all(bytes).map_err(Failure::io("write", &self.temporary))
    }

    /// Gives it its name, in place of an older file.
    fn finish(mut self) -> Outcome {
        let flushed = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        flushed.map_err(Failure::io("write", &self.temporary))?;
        fs::rename(&self.temporary, self.path).map_err(Failure::io("create", self.path))
    }
}

impl Drop for Unfinished<'_> {
    /// Takes an unfinished file away; a finished one no longer has its temporary name.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary);
    }
}
