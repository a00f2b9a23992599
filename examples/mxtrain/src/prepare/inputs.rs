//! Which files `mxtrain prepare` reads, in which order, and what they hold by their names.
//!
//! A file that is named is read whatever it is called; in a folder, only names that promise text
//! count. What is passed over there is counted, so that nothing is missing in silence.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use walkdir::{DirEntry, WalkDir};

use crate::failure::{Failure, Outcome};
use crate::files::identity;
use crate::prepared::{Meta, TRAIN_FILE};

/// The name that stands for standard input.
const STANDARD_INPUT: &str = "-";

/// What an input holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Plain text, one document, or several with `<|endoftext|>` between them.
    Text,
    /// JSON objects, one a line or in one array; each is one document.
    Json,
    /// A Parquet table; each row is one document.
    Parquet,
}

/// How an input is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// One file, or a stream.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Input {
    /// Place of the command line's argument that it belongs to.
    pub(super) source: usize,
    /// Its path; `None` is standard input.
    pub(super) path: Option<PathBuf>,
    /// What it holds; `None` where its name does not say.
    pub(super) format: Option<Format>,
    /// How it is compressed; `None` where its name does not say.
    pub(super) compression: Option<Compression>,
    /// Its length in bytes, as it lies there; `None` for pipes.
    pub(super) length: Option<u64>,
}

impl Input {
    /// Its name for messages.
    pub(super) fn name(&self) -> PathBuf {
        self.path.clone().unwrap_or_else(|| "standard input".into())
    }
}

/// All inputs in their order, and what was passed over.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    pub(super) list: Vec<Input>,
    pub(super) skipped: Skipped,
}

/// What folders hold beside text, and files that were given twice.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Skipped {
    /// Files by the end of their names.
    by_extension: BTreeMap<String, u64>,
    /// Files in a compression that is not read.
    packed: u64,
    /// Hidden files and folders.
    hidden: u64,
    /// Folders made by `mxtrain prepare`.
    prepared: u64,
    /// The same file once more.
    repeated: u64,
}

impl Inputs {
    /// Finds the files behind the command line's inputs. `format` is what all of them hold, where
    /// the user says so. With `last_wins` a file that the last input names is left out of the
    /// others. `out` is not read even where an input contains it.
    pub(super) fn find(
        paths: &[PathBuf],
        format: Option<Format>,
        last_wins: bool,
        out: &Path,
    ) -> Outcome<Self> {
        let mut inputs = Self::default();
        let out = fs::metadata(out).ok().map(|m| identity(&m));
        // Files by device and inode, with their place in the list.
        let mut seen: HashMap<(u64, u64), usize> = HashMap::new();
        let mut replaced = Vec::new();
        for (source, path) in paths.iter().enumerate() {
            if path.as_os_str() == STANDARD_INPUT {
                let stream = Input::stream(source, None, format)?;
                if inputs.list.iter().any(|input| input.path.is_none()) {
                    return Err(Failure::usage("standard input (-) can be read only once"));
                }
                inputs.list.push(stream);
                continue;
            }
            let metadata = fs::metadata(path).map_err(Failure::io("read", path))?;
            if out == Some(identity(&metadata)) {
                return Err(Failure::usage(format!(
                    "{}: the folder is that of --out too, which is not read; name another with --out, \
                     such as {}",
                    path.display(),
                    path.join("prepared").display()
                )));
            }
            let found = match metadata.is_dir() {
                true => inputs.walk(path, out)?,
                false => vec![(path.clone(), metadata)],
            };
            let is_last = source + 1 == paths.len();
            for (path, metadata) in found {
                if metadata.is_file() {
                    match seen.insert(identity(&metadata), inputs.list.len()) {
                        None => {}
                        Some(first) if last_wins && is_last => replaced.push(first),
                        Some(first) => {
                            seen.insert(identity(&metadata), first);
                            inputs.skipped.repeated += 1;
                            continue;
                        }
                    }
                }
                inputs.list.push(Input::named(source, path, format, &metadata)?);
            }
        }
        // Places in the list stay right from the last to the first.
        replaced.sort_unstable();
        for place in replaced.into_iter().rev() {
            // A file that the last input holds twice keeps one of its places.
            inputs.list.remove(place);
            inputs.skipped.repeated += 1;
        }
        Ok(inputs)
    }

    /// The text files below a folder, sorted by their paths.
    fn walk(&mut self, dir: &Path, out: Option<(u64, u64)>) -> Outcome<Vec<(PathBuf, Metadata)>> {
        let mut found = Vec::new();
        let mut others = 0_u64;
        let skipped = &mut self.skipped;
        let is_wanted = |entry: &DirEntry| {
            if entry.depth() == 0 {
                return true;
            }
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            skipped.hidden += u64::from(hidden);
            !hidden
        };
        let mut walk = WalkDir::new(dir)
            .follow_links(true) // the files of Hugging Face's cache are links
            .sort_by_file_name()
            .into_iter()
            .filter_entry(is_wanted);
        let mut prepared = 0;
        let mut passed = Vec::new();
        while let Some(entry) = walk.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // A link to a folder above: everything there is read without it.
                Err(error) if error.loop_ancestor().is_some() => continue,
                Err(error) => {
                    let path = error.path().unwrap_or(dir).to_owned();
                    let kind = Kind::of(&path);
                    // A link to nothing is missed where its name promises text.
                    if path.is_symlink() && !matches!(kind, Kind::Text { by_name: true, .. }) {
                        others += 1;
                        passed.push((path.extension().map(OsStr::to_owned), kind));
                        continue;
                    }
                    let error = error.into_io_error().expect("it is no loop");
                    return Err(Failure::io("read", &path)(error));
                }
            };
            let path = entry.path();
            let metadata = fs::metadata(path).map_err(Failure::io("read", path))?;
            if metadata.is_dir() {
                let is_ours = Meta::is_in(path) && path.join(TRAIN_FILE).exists();
                if out == Some(identity(&metadata)) || is_ours {
                    prepared += 1;
                    walk.skip_current_dir();
                }
                continue;
            }
            match Kind::of(path) {
                Kind::Text { by_name: true, .. } if metadata.is_file() => {
                    found.push((entry.into_path(), metadata));
                }
                kind => {
                    others += 1;
                    passed.push((path.extension().map(OsStr::to_owned), kind));
                }
            }
        }
        drop(walk);
        self.skipped.prepared += prepared;
        for (extension, kind) in passed {
            if matches!(kind, Kind::Packed) {
                self.skipped.packed += 1;
                continue;
            }
            let name = extension.map_or_else(
                || "without extension".to_owned(),
                |extension| format!(".{}", extension.to_string_lossy()),
            );
            *self.skipped.by_extension.entry(name).or_default() += 1;
        }
        if found.is_empty() {
            return Err(Failure::usage(format!(
                "{}: expected files named .txt, .text, .md, .json, .jsonl, .ndjson or .parquet, \
                 or those with .gz or .zst, found none among {others} files; name the files \
                 themselves if they hold text",
                dir.display()
            )));
        }
        Ok(found)
    }
}

impl Input {
    /// Standard input, or a pipe.
    fn stream(source: usize, path: Option<PathBuf>, format: Option<Format>) -> Outcome<Self> {
        let stream = Self { source, path, format, compression: None, length: None };
        if format == Some(Format::Parquet) {
            return Err(Failure::usage(format!(
                "{}: a Parquet file is read in no order and cannot come through a pipe; give the \
                 file itself",
                stream.name().display()
            )));
        }
        Ok(stream)
    }

    fn named(
        source: usize,
        path: PathBuf,
        format: Option<Format>,
        metadata: &Metadata,
    ) -> Outcome<Self> {
        // Pipes have names that say nothing.
        if !metadata.is_file() {
            return Self::stream(source, Some(path), format);
        }
        let (by_name, compression) = match Kind::of(&path) {
            Kind::Text { format, compression, .. } => (format, compression),
            Kind::Packed => (Format::Text, Compression::None), // its content says it better
        };
        let format = format.unwrap_or(by_name);
        if format == Format::Parquet && compression != Compression::None {
            return Err(Failure::usage(format!(
                "{}: a Parquet file is read in no order and cannot be compressed as a whole; \
                 decompress it first",
                path.display()
            )));
        }
        Ok(Self {
            source,
            path: Some(path),
            format: Some(format),
            compression: Some(compression),
            length: Some(metadata.len()),
        })
    }
}

impl Skipped {
    /// What was passed over, in a line; `None` if nothing was.
    pub(super) fn in_words(&self) -> Option<String> {
        let mut words = Vec::new();
        let others: u64 = self.by_extension.values().sum();
        if others > 0 {
            let mut kinds: Vec<_> = self.by_extension.iter().collect();
            kinds.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), (*name).clone()));
            let shown: Vec<String> =
                kinds.iter().take(5).map(|(name, count)| format!("{count} {name}")).collect();
            let more = if kinds.len() > 5 { ", ..." } else { "" };
            let shown = shown.join(", ");
            words.push(format!(
                "{} that {} no text by name ({shown}{more})",
                counted(others, "file"),
                if others == 1 { "is" } else { "are" },
            ));
        }
        if self.packed > 0 {
            words.push(format!(
                "{} in a compression that is not read (use `xz -dc FILE | mxtrain prepare -`, or \
                 bzip2, lz4, unzip -p)",
                counted(self.packed, "file")
            ));
        }
        for (count, what) in [(self.hidden, "hidden entry"), (self.prepared, "prepared folder")] {
            if count > 0 {
                words.push(counted(count, what));
            }
        }
        if self.repeated > 0 {
            words.push(format!("{} given twice", counted(self.repeated, "file")));
        }
        (!words.is_empty()).then(|| format!("skipped {}", words.join("; ")))
    }
}

/// "1 file", "2,000 files".
pub(super) fn counted(count: u64, what: &str) -> String {
    let number = indicatif::HumanCount(count);
    match what.strip_suffix('y') {
        _ if count == 1 => format!("1 {what}"),
        Some(stem) => format!("{number} {stem}ies"),
        None => format!("{number} {what}s"),
    }
}

/// What a name promises.
enum Kind {
    /// Something that can be read; text where the name does not tell (`by_name` is false).
    Text { format: Format, compression: Compression, by_name: bool },
    /// A compression that is not read.
    Packed,
}

impl Kind {
    fn of(path: &Path) -> Self {
        let extension =
            |path: &Path| path.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase);
        let outer = extension(path);
        let (inner, compression) = match outer.as_deref() {
            Some("gz") => (path.file_stem().and_then(|s| extension(s.as_ref())), Compression::Gzip),
            Some("zst" | "zstd") => {
                (path.file_stem().and_then(|s| extension(s.as_ref())), Compression::Zstd)
            }
            Some("xz" | "bz2" | "lz4" | "zip" | "7z" | "br") => return Self::Packed,
            _ => (outer, Compression::None),
        };
        let format = match inner.as_deref() {
            Some("txt" | "text" | "md") => Some(Format::Text),
            Some("json" | "jsonl" | "ndjson") => Some(Format::Json),
            Some("parquet") => Some(Format::Parquet),
            _ => None,
        };
        Self::Text {
            format: format.unwrap_or(Format::Text),
            compression,
            by_name: format.is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(dir: &Path, names: &[&str]) -> Inputs {
        let paths: Vec<PathBuf> = names.iter().map(|name| dir.join(name)).collect();
        Inputs::find(&paths, None, false, &dir.join("out")).unwrap()
    }

    fn names(inputs: &Inputs, dir: &Path) -> Vec<String> {
        let relative = |input: &Input| {
            input.path.as_ref().unwrap().strip_prefix(dir).unwrap().display().to_string()
        };
        inputs.list.iter().map(relative).collect()
    }

    #[test]
    fn a_folder_gives_its_text_files_in_order_and_counts_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        for name in [
            "in/b.txt",
            "in/a/z.MD",
            "in/a/2.jsonl.gz",
            "in/c.parquet",
            "in/c.png",
            "in/d.png",
            "in/e.txt.xz",
            "in/Makefile",
            "in/.git/config.txt",
            "in/out/meta.json",
            "in/old/meta.json",
            "in/old/train.bin",
        ] {
            fs::create_dir_all(dir.join(name).parent().unwrap()).unwrap();
            fs::write(dir.join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("..", dir.join("in/a/loop")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.join("in/a/dangling.png")).unwrap();
        let inputs = Inputs::find(&[dir.join("in")], None, false, &dir.join("in/out")).unwrap();
        assert_eq!(
            names(&inputs, dir),
            ["in/a/2.jsonl.gz", "in/a/z.MD", "in/b.txt", "in/c.parquet"]
        );
        let gz = &inputs.list[0];
        assert_eq!(gz.format, Some(Format::Json));
        assert_eq!(gz.compression, Some(Compression::Gzip));
        let words = inputs.skipped.in_words().unwrap();
        assert!(words.contains("4 files that are no text by name (3 .png, 1 without"), "{words}");
        assert!(words.contains("1 file in a compression that is not read"), "{words}");
        assert!(words.contains("1 hidden entry; 2 prepared folders"), "{words}");
    }

    #[test]
    fn the_folder_of_the_output_is_no_input() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.txt"), "text").unwrap();
        let input = [dir.path().to_owned()];
        let failure = Inputs::find(&input, None, false, dir.path()).unwrap_err();
        assert!(failure.message.contains("is that of --out too"), "{}", failure.message);
        assert_eq!(Inputs::find(&input, None, false, &input[0].join("out")).unwrap().list.len(), 1);
    }

    #[test]
    fn a_file_counts_once_and_the_last_input_may_take_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        fs::create_dir(dir.join("in")).unwrap();
        for name in ["in/a.txt", "in/b.txt", "in/c.txt"] {
            fs::write(dir.join(name), name).unwrap();
        }
        let inputs = find(dir, &["in/b.txt", "in", "in/b.txt"]);
        assert_eq!(names(&inputs, dir), ["in/b.txt", "in/a.txt", "in/c.txt"]);
        assert_eq!(inputs.skipped.in_words().unwrap(), "skipped 2 files given twice");

        let paths = [dir.join("in"), dir.join("in/b.txt")];
        let inputs = Inputs::find(&paths, None, true, &dir.join("out")).unwrap();
        assert_eq!(names(&inputs, dir), ["in/a.txt", "in/c.txt", "in/b.txt"]);
        assert_eq!(inputs.list[2].source, 1);
    }

    #[test]
    fn a_named_file_is_text_unless_its_name_says_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.rst", "b.log.gz", "c.parquet.zst"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        let inputs = find(dir.path(), &["a.rst", "b.log.gz"]);
        assert_eq!(inputs.list[0].format, Some(Format::Text));
        assert_eq!(inputs.list[1].compression, Some(Compression::Gzip));
        let packed = [dir.path().join("c.parquet.zst")];
        let failure = Inputs::find(&packed, None, false, dir.path()).unwrap_err();
        assert!(failure.message.contains("decompress it first"), "{}", failure.message);
    }
}
