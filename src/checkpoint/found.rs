//! What else lies in folders that people have: pointers of Git LFS, links that lead nowhere, other
//! libraries' files, other models. None of it is read; each is an error that says what it is and,
//! where there is one, the command that helps.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use serde_json::{Map, Value};

use super::{CONFIG, FILES, INDEX, MAX_JSON, MODEL};
use crate::{Error, Result};

/// How the pointer begins that Git LFS leaves in a file's place.
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// An error if a file is a Git LFS pointer in place of its content.
pub(super) fn check_fetched(path: &Path, bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(POINTER) {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(1024)]);
    let size = text.lines().find_map(|line| line.strip_prefix("size ")?.parse::<u64>().ok());
    let size = size.map_or_else(String::new, |size| format!(" of {size} bytes"));
    let message = format!(
        "a Git LFS pointer, not the file{size} that it stands for; fetch it: run `git lfs pull` in \
         this folder"
    );
    Err(Error::format(path, message))
}

/// An error if a file is a link to one that is not there. Hugging Face's cache is made of links,
/// and half a copy of it has nothing else.
pub(super) fn check_link(path: &Path) -> Result<()> {
    match std::fs::read_link(path) {
        Ok(target) if !path.exists() => {
            let target = target.display();
            let message = format!(
                "a link to {target}, which is not there; copy the folder with the files in place of \
                 its links (cp -L), or get it again"
            );
            Err(Error::format(path, message))
        }
        _ => Ok(()),
    }
}

/// The error for a folder without `config.json`, or without weights that are read.
pub(super) fn no_checkpoint(dir: &Path, has_config: bool) -> Error {
    let wanted = if has_config { &[MODEL, INDEX][..] } else { &[CONFIG] };
    if let Some(error) = wanted.iter().find_map(|name| check_link(&dir.join(name)).err()) {
        return error;
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    names.sort_unstable();
    let message = if let Some(adapter) = names.iter().find(|name| *name == ADAPTER) {
        let base = base_of_adapter(&dir.join(adapter));
        format!(
            "adapters{base} as PEFT has them, which change a model and are none: load them beside the \
             model that they were made for (load_lora), or add them to its weights by `mxtrain export \
             MODEL MERGED --lora {}`",
            dir.display()
        )
    } else if !has_config {
        format!("expected a checkpoint folder, found no {CONFIG} in it")
    } else {
        let names = names.iter().filter_map(|name| name.to_str());
        let found = names.filter_map(|name| Some((conversion_of(name)?, name)));
        // The surest first.
        let found = found.min_by_key(|((doubt, _), _)| *doubt);
        let missing =
            format!("expected a checkpoint folder, found no {MODEL} in it, and no {INDEX}");
        let pointer = found.as_ref().and_then(|(_, name)| {
            let path = dir.join(name);
            check_fetched(&path, &beginning(&path, 1024)).err()
        });
        if let Some(pointer) = pointer {
            return pointer;
        }
        match found {
            Some(((_, conversion), name)) => format!("{missing}; it has {name}: {conversion}"),
            None => format!("{missing}: get the files of the weights, too"),
        }
    };
    Error::format(dir, message)
}

const ADAPTER: &str = "adapter_config.json";

/// ` of "gpt2"`, as the adapter's configuration has it.
fn base_of_adapter(path: &Path) -> String {
    let text = beginning(path, MAX_JSON);
    let config: Map<String, Value> = serde_json::from_slice(&text).unwrap_or_default();
    match config.get("base_model_name_or_path") {
        Some(base @ Value::String(_)) => format!(" for {base}"),
        _ => String::new(),
    }
}

/// How much it is to be doubted that a file has the weights, and what to do with it; None where it
/// has not.
fn conversion_of(name: &str) -> Option<(u8, String)> {
    let transformers = |options: &str, version: &str| {
        let command = python(&format!(
            "from transformers import AutoModelForCausalLM as M; \
             M.from_pretrained('.'{options}).save_pretrained('.')"
        ));
        Some((0, format!("convert it{version}: run in this folder {command}")))
    };
    const OLD: &str = " with a version of transformers below 5";
    match name {
        "pytorch_model.bin" | "pytorch_model.bin.index.json" => return transformers("", ""),
        "tf_model.h5" => return transformers(", from_tf=True", OLD),
        "flax_model.msgpack" => return transformers(", from_flax=True", OLD),
        // What transformers' trainer leaves beside the weights.
        "optimizer.pt" | "scheduler.pt" | "training_args.bin" => return None,
        _ if name.starts_with("rng_state") || FILES.contains(&name) => return None,
        _ => {}
    }
    let (_, extension) = name.rsplit_once('.')?;
    if let Some(files) = files_of_part(name) {
        let get = |index| {
            let text = format!("one of {files} files; get {index}, which lists them, too");
            Some((1, text))
        };
        return match extension {
            "safetensors" => get(INDEX),
            "bin" => get("pytorch_model.bin.index.json"),
            _ => None,
        };
    }
    // What a shell and Python take as it is.
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+".contains(&b));
    match extension {
        "safetensors" => Some((1, format!("if these are the weights, rename it to {MODEL}"))),
        "pt" | "pth" | "bin" => {
            let command = python(&format!(
                "import torch; from safetensors.torch import save_file; \
                 w = torch.load('{}', map_location='cpu'); \
                 save_file({{k: v.clone().contiguous() for k, v in w.items()}}, '{MODEL}', \
                 {{'format': 'pt'}})",
                if plain { name } else { "FILE" },
            ));
            let text = "if it is a state dict of PyTorch, convert it: run in this folder";
            Some((2, format!("{text} {command}")))
        }
        "gguf" | "onnx" | "h5" | "msgpack" | "ot" | "ckpt" => {
            Some((3, "this format is not read; get the model as safetensors".into()))
        }
        _ => None,
    }
}

/// How many files there are, as the name of one of them says: `model-00001-of-00003.safetensors`.
fn files_of_part(name: &str) -> Option<u32> {
    let (stem, _) = name.rsplit_once('.')?;
    let (first, files) = stem.rsplit_once("-of-")?;
    let (_, number) = first.rsplit_once('-')?;
    number.parse::<u32>().ok()?;
    files.parse().ok()
}

/// The first bytes of a file, at most `most`; nothing where they cannot be read.
fn beginning(path: &Path, most: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Without NONBLOCK a pipe would keep us waiting.
    let flags = OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path).ok();
    if let Some(file) = file.filter(|file| file.metadata().is_ok_and(|m| m.is_file())) {
        // It asks for memory as it goes and gives an error where there is none.
        let _ = file.take(most).read_to_end(&mut bytes);
    }
    bytes
}

fn python(program: &str) -> String {
    format!("`python3 -c \"{program}\"`")
}
