//! Reads small files that others may have made: descriptions in JSON and TOML, tokenizers.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::failure::{Failure, Outcome};

/// Most bytes of such a file; the largest tokenizers have a tenth.
const LARGEST: u64 = 256 << 20;

/// Opens a file, and nothing else: a pipe of this name would wait for its writer, and a device may
/// never end.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::options().read(true).custom_flags(flags.bits() as i32).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "expected a file, found a folder, pipe or device",
        )),
    }
}

/// The contents of a file that [`open`] opens.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    contents(&open(path)?)
}

/// [`read`], of a file that is text.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// All that an open file holds, which is refused if it is too large to be what it should.
pub(crate) fn contents(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if file.metadata()?.len() <= LARGEST {
        // It can grow while it is read.
        file.take(LARGEST + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 <= LARGEST {
            return Ok(bytes);
        }
    }
    let message = format!("expected at most {} MiB, found more", LARGEST >> 20);
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}

/// The value in the JSON text of a file. What is wrong is named with its file and field.
pub(crate) fn parse_json<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Outcome<T> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let field = error.path().to_string();
        let message = match field.as_str() {
            "." | "?" => error.inner().to_string(),
            field => format!("{field}: {}", error.inner()),
        };
        Failure::usage(message).within(path.display())
    })?;
    json.end().map_err(|e| Failure::usage(e.to_string()).within(path.display()))?;
    Ok(value)
}

/// A JSON file, or `None` where there is none.
pub(crate) fn read_json(path: &Path) -> Outcome<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = read(path).map_err(Failure::io("read", path))?;
    check_fetched(path, &text)?;
    let value = serde_json::from_slice(&text);
    value.map(Some).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

/// What Git LFS left in a file's place is nobody's tokenizer, and would be copied on.
pub(crate) fn check_fetched(path: &Path, bytes: &[u8]) -> Outcome {
    if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        let message = "a Git LFS pointer, not the file that it stands for; fetch it: run `git lfs \
                       pull` in this folder";
        return Err(Failure::usage(message).within(path.display()));
    }
    Ok(())
}

/// CRC-32, by which files are known again.
pub(crate) fn checksum(bytes: &[u8]) -> String {
    format!("{:08x}", crc32fast::hash(bytes))
}

/// What tells a file from all others that there are at the same time.
pub(crate) fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Whether `path` is the name of the open file.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    let named = fs::metadata(path);
    matches!((file.metadata(), named), (Ok(a), Ok(b)) if identity(&a) == identity(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_a_sensible_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "words").unwrap();
        assert_eq!(read_text(&at("file")).unwrap(), "words");
        let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), fifo, mode, 0).unwrap();
        for path in [at("pipe"), dir.path().to_owned(), "/dev/zero".into()] {
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("found a folder, pipe"), "{}: {error}", path.display());
        }
        // Without blocks on the disk.
        File::create(at("large")).unwrap().set_len(LARGEST + 1).unwrap();
        assert!(read(&at("large")).unwrap_err().to_string().contains("at most 256 MiB"));
        fs::write(at("file"), [0xff]).unwrap();
        assert!(read_text(&at("file")).is_err());
    }

    #[test]
    fn the_field_that_is_wrong_is_named() {
        #[derive(Debug, serde::Deserialize)]
        #[expect(dead_code, reason = "it is only read")]
        struct Outer {
            inner: std::collections::BTreeMap<String, u8>,
        }
        let message = |text: &str| {
            parse_json::<Outer>(Path::new("a.json"), text.as_bytes()).unwrap_err().message
        };
        let wrong = message(r#"{"inner": {"steps": "x"}}"#);
        assert!(wrong.starts_with("a.json: inner.steps: invalid type: string \"x\""), "{wrong}");
        assert!(message(r#"{"inner": {}} x"#).starts_with("a.json: trailing characters"));
        assert!(message("{").starts_with("a.json: EOF"));
    }
}
