//! Datasets as a host sees them: every format, every kind of damage.

use std::fs;
use std::path::{Path, PathBuf};

use mxfp4train::{Dataset, Error, TokenFormat};
use tempfile::TempDir;

fn raw(tokens: &[u16]) -> Vec<u8> {
    tokens.iter().flat_map(|t| t.to_le_bytes()).collect()
}

/// An llm.c file whose header announces `announced` tokens.
fn llmc(magic: i32, version: i32, announced: i32, tokens: &[u8]) -> Vec<u8> {
    let mut header = [0i32; 256];
    header[..3].copy_from_slice(&[magic, version, announced]);
    header.iter().flat_map(|word| word.to_le_bytes()).chain(tokens.iter().copied()).collect()
}

fn write(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn open(path: &Path) -> Result<Dataset, Error> {
    Dataset::open(path.to_str().unwrap())
}

#[test]
fn every_format_is_told_by_its_header() {
    let dir = TempDir::new().unwrap();
    let wide: Vec<u8> = [1u32, 70_000, 3].iter().flat_map(|t| t.to_le_bytes()).collect();
    for (name, bytes, format, tokens, max) in [
        ("raw.bin", raw(&[1, 2, 65_535]), TokenFormat::RawU16, 3, 65_535),
        ("gpt2.bin", llmc(20240520, 1, 2, &raw(&[9, 8])), TokenFormat::LlmC, 2, 9),
        ("llama.bin", llmc(20240801, 7, 3, &wide), TokenFormat::LlmC, 3, 70_000),
    ] {
        let path = write(&dir, name, &bytes);
        let data = open(&path).unwrap();
        assert_eq!(data.token_count(), tokens, "{name}");
        assert_eq!(data.max_token(), max, "{name}");
        let files = data.files();
        assert_eq!((files[0].format, files[0].path.as_path()), (format, path.as_path()));
    }
    let data = Dataset::from_tokens(vec![5, 6]).unwrap();
    assert_eq!((data.token_count(), data.files()[0].format), (2, TokenFormat::Memory));
}

#[test]
fn damage_is_named_with_its_cause() {
    let dir = TempDir::new().unwrap();
    let tokens = raw(&[1, 2, 3, 4]);
    for (name, bytes, parts) in [
        ("empty.bin", vec![], ["empty file", ""]),
        ("odd.bin", vec![1, 2, 3], ["even number of bytes", "found 3"]),
        (
            "short.bin",
            llmc(20240520, 1, 9, &tokens),
            ["expected 1042 bytes", "found 1032 (a trunc"],
        ),
        ("long.bin", llmc(20240520, 1, 3, &tokens), ["expected 1030 bytes", "found 1032 (two fi"]),
        ("wide.bin", llmc(20240801, 7, 4, &tokens), ["expected 1040 bytes", "u32 tokens"]),
        ("huge.bin", llmc(20240520, 1, -1, &tokens), ["expected 8589935614 bytes", "4294967295"]),
        ("none.bin", llmc(20240520, 1, 0, &[]), ["announces 0", ""]),
        ("new.bin", llmc(20240520, 2, 4, &tokens), ["expected version 1", "found version 2"]),
        ("old.bin", llmc(20240801, 1, 4, &tokens), ["expected version 7", "found version 1"]),
        (
            "header.bin",
            llmc(20240520, 1, 4, &tokens)[..100].to_vec(),
            ["header of 1024 bytes", "found 100"],
        ),
        ("magic.bin", 20240520i32.to_le_bytes().to_vec(), ["header of 1024 bytes", "found 4"]),
    ] {
        let path = write(&dir, name, &bytes);
        let error = open(&path).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Format { .. }), "{message}");
        assert!(message.contains(name), "{message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}

#[test]
fn paths_that_are_no_token_file_are_refused() {
    let dir = TempDir::new().unwrap();
    let folder = open(dir.path()).unwrap_err();
    assert!(matches!(folder, Error::Format { .. }), "{folder}");
    assert!(folder.to_string().contains("found a folder"), "{folder}");
    let device = Dataset::open("/dev/null").unwrap_err();
    assert!(device.to_string().contains("pipe or device"), "{device}");
    for missing in ["no/such/file.bin", ""] {
        let error = Dataset::open(missing).unwrap_err();
        assert!(matches!(error, Error::Io { action: "open", .. }), "{error}");
    }
    let nothing = open(&dir.path().join("*.bin")).unwrap_err();
    assert!(matches!(nothing, Error::InvalidArgument { what: "dataset", .. }), "{nothing}");
    let malformed = Dataset::open("no/such/[file").unwrap_err();
    assert!(malformed.to_string().contains("bad pattern"), "{malformed}");
    assert!(Dataset::open_files::<&Path>(&[]).is_err());
    assert!(Dataset::from_tokens(vec![]).is_err());
}

#[test]
fn globs_sort_by_name_and_plain_paths_come_first() {
    let dir = TempDir::new().unwrap();
    for (name, n) in [("b.bin", 2), ("a.bin", 1), ("c.bin", 3), ("c.txt", 4), ("[ab].bin", 5)] {
        write(&dir, name, &raw(&vec![0; n]));
    }
    let counts = |pattern: &str| {
        let data = open(&dir.path().join(pattern)).unwrap();
        data.files().iter().map(|file| file.tokens).collect::<Vec<_>>()
    };
    assert_eq!(counts("?.bin"), [1, 2, 3]);
    assert_eq!(counts("*.bin"), [5, 1, 2, 3]);
    assert_eq!(counts("[ab].bin"), [5], "an existing path is no pattern");
    assert_eq!(counts("[ac].bin"), [1, 3]);
    let listed = [dir.path().join("c.bin"), dir.path().join("a.bin")];
    let data = Dataset::open_files(&listed).unwrap();
    assert_eq!(data.files().iter().map(|f| f.tokens).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(data.token_count(), 4);
}

#[test]
fn tokens_are_read_across_files_and_not_beyond_their_end() {
    let dir = TempDir::new().unwrap();
    let wide: Vec<u8> = [70_000u32, 4, 5].iter().flat_map(|t| t.to_le_bytes()).collect();
    let files = [
        write(&dir, "a.bin", &raw(&[1, 2])),
        write(&dir, "b.bin", &llmc(20240801, 7, 3, &wide)),
        write(&dir, "c.bin", &raw(&[65_535])),
    ];
    let data = Dataset::open_files(&files).unwrap();
    let all = [1, 2, 70_000, 4, 5, 65_535];
    for first in 0..=all.len() {
        for end in first..=all.len() {
            let mut tokens = vec![7; end - first];
            data.read(first as u64, &mut tokens).unwrap();
            assert_eq!(tokens, all[first..end], "{first}..{end}");
        }
    }
    for (first, count) in [(0, 7), (6, 1), (7, 0), (u64::MAX, 1), (u64::MAX, 0)] {
        let mut tokens = vec![7; count];
        let error = data.read(first, &mut tokens).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        assert!(error.to_string().contains("the dataset has 6"), "{error}");
        assert!(tokens.iter().all(|&token| token == 7), "{first}: written on an error");
    }
}
