//! Datasets as a host sees them: every format, every kind of damage.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use mxfp4train::{
    Dataset, DatasetOptions, Engine, EngineOptions, Model, ModelConfig, TokenFormat, TokenType,
    Trainer, TrainerOptions,
};
use mxfp4train::{Error, LogLevel};
use proptest::prelude::*;
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
    Dataset::open(path)
}

fn pipe_at(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// Makes a file shorter, as another process may at any time.
fn cut(path: &Path, bytes: u64) {
    File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

/// Does a test's work in a process of its own, which a signal would end.
fn in_a_child(test: &str, work: impl FnOnce()) {
    const IS_CHILD: &str = "MXT_TEST_CHILD";
    if std::env::var_os(IS_CHILD).is_some() {
        return work();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", test]).env(IS_CHILD, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {text}", output.status);
    assert!(text.contains("1 passed"), "no such test: {text}");
}

/// A committed file.
fn token_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokens").join(name)
}

/// What a file is refused with.
fn refusal(path: &Path) -> String {
    let error = open(path).expect_err(&path.display().to_string());
    assert!(matches!(error, Error::Format { .. }), "{error}");
    error.to_string()
}

#[test]
fn every_format_is_told_by_its_header() {
    let dir = TempDir::new().unwrap();
    let wide: Vec<u8> = [1u32, 70_000, 3].iter().flat_map(|t| t.to_le_bytes()).collect();
    for (name, bytes, format, tokens, max) in [
        ("raw.bin", raw(&[1, 2, 65_535]), TokenFormat::Raw, 3, 65_535),
        ("gpt2.bin", llmc(20240520, 1, 2, &raw(&[9, 8])), TokenFormat::LlmC, 2, 9),
        ("llama.bin", llmc(20240801, 7, 3, &wide), TokenFormat::LlmC, 3, 70_000),
    ] {
        let path = write(&dir, name, &bytes);
        let data = open(&path).unwrap();
        assert_eq!(data.token_count(), tokens, "{name}");
        assert_eq!(data.max_token().unwrap(), max, "{name}");
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
    let (pipe, socket) = (dir.path().join("pipe"), dir.path().join("socket"));
    pipe_at(&pipe);
    let _listener = UnixListener::bind(&socket).unwrap();
    for device in ["/dev/null".as_ref(), pipe.as_path(), &socket] {
        let device = Dataset::open(device).unwrap_err();
        assert!(device.to_string().contains("pipe or device"), "{device}");
    }
    #[cfg(target_os = "linux")]
    assert!(refusal("/proc/self/status".as_ref()).contains("as in /proc?"));
    // Nobody waits for a pipe in the place of an index either.
    let pair = TempDir::new().unwrap();
    pipe_at(&pair.path().join("tokens.idx"));
    assert_eq!(open(&write(&pair, "tokens.bin", &raw(&[1, 2]))).unwrap().token_count(), 2);
    let long = Dataset::open("x".repeat(70_000)).unwrap_err().to_string();
    assert!(long.contains("at most 65536 bytes, got one of 70000"), "{long}");
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
fn every_format_is_read_as_it_was_written() {
    let two = |name: &str| {
        let data = open(&token_file(name)).unwrap_or_else(|e| panic!("{e}"));
        let file = data.files().remove(0);
        (file.format, file.token_type, file.tokens, data.max_token().unwrap())
    };
    use TokenFormat::{Megatron, Npy, Raw};
    assert_eq!(two("uint16.npy"), (Npy, TokenType::U16, 4000, 49_579));
    assert_eq!(two("uint32.bin"), (Raw, TokenType::U32, 4000, 49_579));
    assert_eq!(two("megatron16.bin"), (Megatron, TokenType::U16, 4000, 49_579));
    assert_eq!(two("megatron16.idx"), (Megatron, TokenType::U16, 4000, 49_579));
    assert_eq!(two("megatron16"), (Megatron, TokenType::U16, 4000, 49_579));
    let pair = open(&token_file("megatron16.*")).unwrap();
    assert_eq!((pair.token_count(), pair.files().len()), (4000, 1));
    assert_eq!(pair.files()[0].documents, Some(20));
    assert_eq!(pair.files()[0].path, token_file("megatron16.bin"));

    for (name, token_type) in [
        ("u1", TokenType::U8),
        ("u2", TokenType::U16),
        ("u4", TokenType::U32),
        ("i4", TokenType::I32),
        ("i8", TokenType::I64),
        ("version-2", TokenType::U16),
        ("version-3", TokenType::U16),
        ("two-dimensions", TokenType::U16),
    ] {
        assert_eq!(two(&format!("npy/{name}.npy")), (Npy, token_type, 6, 250), "{name}");
    }
    assert_eq!(two("npy/wide.npy"), (Npy, TokenType::I64, 3, u32::MAX));
}

#[test]
fn the_same_tokens_train_alike_in_every_format() {
    let dir = TempDir::new().unwrap();
    let bytes = fs::read(token_file("megatron16.bin")).unwrap();
    let tokens: Vec<u16> = bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    let wide: Vec<u8> = tokens.iter().flat_map(|&t| u32::from(t).to_le_bytes()).collect();
    let wider: Vec<u8> = tokens.iter().flat_map(|&t| i64::from(t).to_le_bytes()).collect();
    let raw = write(&dir, "raw.bin", &bytes);
    let llm_c = write(&dir, "llmc.bin", &llmc(20240520, 1, 4000, &bytes));
    let llm_c_wide = write(&dir, "llmc-32.bin", &llmc(20240801, 7, 4000, &wide));
    let raw_i64 = write(&dir, "i64.bin", &wider);

    let engine = Engine::new(EngineOptions { threads: 1, ..EngineOptions::default() }).unwrap();
    let config = ModelConfig {
        vocab_size: 50_257,
        context_length: 16,
        layers: 1,
        heads: 1,
        channels: 16,
        ..ModelConfig::default()
    };
    let losses = |path: &Path| {
        let data = open(path).unwrap();
        let options = TrainerOptions { batch_size: 2, ..TrainerOptions::default() };
        let mut trainer = Trainer::new(&Model::new(&engine, &config).unwrap(), options).unwrap();
        let mut losses: Vec<u32> =
            (0..2).map(|_| trainer.step(&data).unwrap().loss.to_bits()).collect();
        losses.push(trainer.eval(&data, 1).unwrap().loss.to_bits());
        losses
    };
    let expected = losses(&raw);
    for path in
        [&token_file("uint16.npy"), &token_file("uint32.bin"), &token_file("megatron16.bin")]
    {
        assert_eq!(losses(path), expected, "{}", path.display());
    }
    for path in [&llm_c, &llm_c_wide, &raw_i64] {
        assert_eq!(losses(path), expected, "{}", path.display());
    }
    assert_eq!(open(&raw_i64).unwrap().files()[0].token_type, TokenType::I64);
}

#[test]
fn arrays_that_are_no_tokens_are_refused_with_the_remedy() {
    for (name, parts) in [
        ("fortran", ["Fortran order", "ascontiguousarray"]),
        ("big-endian", ["\">u2\"", "newbyteorder('<')"]),
        ("three-dimensions", ["[1, 2, 3]", "reshape(-1)"]),
        ("no-dimension", ["shape []", "reshape(-1)"]),
        ("empty", ["shape [0]", "expected tokens"]),
        ("i2", ["\"<i2\"", "dtype=numpy.uint16"]),
        ("u8", ["\"<u8\"", "numpy.uint32"]),
        ("float", ["floating-point numbers", "\"<f4\""]),
        ("text", ["texts", "\"<U2\""]),
        ("objects", ["Python objects", "\"|O\""]),
        ("records", ["records", "('b', '<i8')"]),
    ] {
        let message = refusal(&token_file(&format!("npy/{name}.npy")));
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    let dir = TempDir::new().unwrap();
    let whole = fs::read(token_file("uint16.npy")).unwrap();
    for (cut, parts) in [
        (7, "header is cut off at 7 bytes"),
        (9, "cut off"),
        (100, "cut off at 100 bytes"),
        (128, "expected 8128 bytes for the u16 tokens of shape [4000]"),
        (8127, "found 8127 (a truncated copy"),
    ] {
        let message = refusal(&write(&dir, "cut.npy", &whole[..cut]));
        assert!(message.contains(parts), "{message}");
    }
    let longer = refusal(&write(&dir, "long.npy", &[&whole[..], &[0]].concat()));
    assert!(longer.contains("found 8129 (two files joined"), "{longer}");
    let mut other = whole.clone();
    other[6] = 4;
    let message = refusal(&write(&dir, "new.npy", &other));
    assert!(message.contains("expected version 1, 2 or 3, found 4.0"), "{message}");
}

#[test]
fn numbers_that_are_no_tokens_are_named_and_never_wrap() {
    for (name, at, number) in
        [("negative", 2, -100), ("negative-32", 2, -1), ("above-u32", 1, 1 << 32)]
    {
        let data = open(&token_file(&format!("npy/{name}.npy"))).unwrap();
        for error in [data.max_token().unwrap_err(), data.check_tokens(usize::MAX).unwrap_err()] {
            assert!(
                matches!(error, Error::TokenRange { offset, token, .. } if (offset, token) == (at, number)),
                "{error}"
            );
            assert!(error.to_string().contains(name), "{error}");
        }
        let read = data.read(0, &mut vec![0; data.token_count() as usize]).unwrap_err();
        assert!(matches!(read, Error::TokenRange { vocab_size: 0x1_0000_0000, .. }), "{read}");
    }
    let marks = open(&token_file("npy/negative.npy")).unwrap().max_token().unwrap_err();
    assert!(marks.to_string().contains("token -100 at offset 2"), "{marks}");
    assert!(marks.to_string().contains("padding or masking"), "{marks}");
}

/// An index of Megatron's for sequences of these lengths.
fn index(version: u64, code: u8, width: i64, lengths: &[i32]) -> Vec<u8> {
    let mut bytes = b"MMIDIDX\0\0".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.push(code);
    bytes.extend((lengths.len() as u64).to_le_bytes());
    bytes.extend((lengths.len() as u64 + 1).to_le_bytes());
    bytes.extend(lengths.iter().flat_map(|n| n.to_le_bytes()));
    let starts = lengths.iter().scan(0, |at, &n| {
        let start: i64 = *at;
        *at += i64::from(n) * width;
        Some(start)
    });
    bytes.extend(starts.flat_map(|start| start.to_le_bytes()));
    bytes.extend((0..=lengths.len() as i64).flat_map(|n| n.to_le_bytes()));
    bytes
}

#[test]
fn megatrons_pairs_are_checked() {
    let dir = TempDir::new().unwrap();
    let tokens = write(&dir, "t.bin", &[1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 8, 0]);
    let indexed = |index: Vec<u8>| open(&write(&dir, "t.idx", &index));
    for (code, width, lengths, count) in
        [(1, 1, [10, 6], 16), (8, 2, [5, 3], 8), (4, 4, [1, 3], 4), (5, 8, [1, 1], 2)]
    {
        let data = indexed(index(1, code, width, &lengths)).unwrap();
        assert_eq!((data.token_count(), data.files()[0].documents), (count, Some(2)));
        assert_eq!(open(&tokens).unwrap().files(), data.files());
        let pattern = Dataset::open(dir.path().join("*")).unwrap();
        assert_eq!(pattern.files(), data.files(), "a pair counts once");
        let listed = Dataset::open_files(&[&tokens, &tokens]).unwrap();
        assert_eq!(listed.token_count(), 2 * count, "a file named twice is read twice");
    }
    let sound = index(1, 8, 2, &[5, 3]);
    let mut with_modes = sound.clone();
    with_modes.extend([0, 0]);
    assert_eq!(indexed(with_modes).unwrap().token_count(), 8);
    let mut negative = sound.clone();
    negative[38..42].copy_from_slice(&(-3i32).to_le_bytes());
    let mut huge = sound.clone();
    huge[18..26].fill(0xff);
    for (index, part) in [
        (index(2, 8, 2, &[5, 3]), "expected version 1 of Megatron's index, found version 2"),
        (index(1, 6, 2, &[5, 3]), "found numbers float64 (code 6)"),
        (index(1, 9, 2, &[5, 3]), "unknown type (code 9)"),
        (index(1, 8, 2, &[5, 4]), "expected 18 bytes for the u16 tokens that"),
        (index(1, 8, 2, &[]), "expected 0 bytes"),
        (sound[..30].to_vec(), "Megatron's header of 34 bytes, found 30"),
        (sound[..50].to_vec(), "the 2 sequences and 3 document boundaries"),
        (negative, "the index is damaged"),
        (huge, "document boundaries that this Megatron index announces"),
    ] {
        let error = indexed(index).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    fs::remove_file(&tokens).unwrap();
    let lonely = refusal(&dir.path().join("t.idx"));
    assert!(lonely.contains("t.bin beside it, found no such file"), "{lonely}");
    // Another program's index is none of Megatron's.
    fs::write(&tokens, [1, 0, 2, 0]).unwrap();
    fs::write(dir.path().join("t.idx"), "something else").unwrap();
    assert_eq!(open(&tokens).unwrap().files()[0].format, TokenFormat::Raw);
}

#[test]
fn raw_tokens_of_other_types_are_told_or_known() {
    let dir = TempDir::new().unwrap();
    let wide =
        |tokens: &[u32]| -> Vec<u8> { tokens.iter().flat_map(|t| t.to_le_bytes()).collect() };
    let declared = |path: &Path, token_type| {
        let options = DatasetOptions { token_type: Some(token_type) };
        Dataset::open_with(path, &options).map(|data| data.files()[0].tokens)
    };
    // Few tokens may be either.
    let few = write(&dir, "few.bin", &wide(&[500, 20, 31, 7, 5, 77, 1030, 2, 9]));
    let message = refusal(&few);
    assert!(message.contains("token_type") && message.contains("--token-type"), "{message}");
    assert_eq!(declared(&few, TokenType::U32).unwrap(), 9);
    assert_eq!(declared(&few, TokenType::U16).unwrap(), 18);
    assert_eq!(declared(&few, TokenType::U8).unwrap(), 36);
    let odd = declared(&few, TokenType::I64).unwrap_err().to_string();
    assert!(odd.contains("expected i64 tokens, so a multiple of 8 bytes, found 36"), "{odd}");
    // A vocabulary above 65,536 leaves traces, which are not enough.
    let large: Vec<u32> = (0..1000).map(|i| i * 7919 % 128_256).collect();
    let large = write(&dir, "llama.bin", &wide(&large));
    assert!(refusal(&large).contains("token_type"));
    assert_eq!(declared(&large, TokenType::U32).unwrap(), 1000);
    // Zeros are what they have always been.
    assert_eq!(open(&write(&dir, "zeros.bin", &[0; 4096])).unwrap().token_count(), 2048);
    // Numbers of 64 bits, also those that mark padding, which then are named.
    let long: Vec<u8> = (0..500i64)
        .flat_map(|i| (if i == 400 { -100 } else { i * i % 50_000 }).to_le_bytes())
        .collect();
    let long = open(&write(&dir, "i64.bin", &long)).unwrap();
    assert_eq!((long.files()[0].token_type, long.token_count()), (TokenType::I64, 500));
    assert!(long.check_tokens(60_000).unwrap_err().to_string().contains("-100 at offset 400"));
    // Also where the mark is far below 0.
    let far: Vec<u8> = (0..500i64)
        .flat_map(|i| (if i == 400 { -60_000 } else { i * i % 50_000 }).to_le_bytes())
        .collect();
    let far = open(&write(&dir, "far.bin", &far)).unwrap();
    assert_eq!((far.files()[0].token_type, far.token_count()), (TokenType::I64, 500));
    // So are those of 32 bits, which are then signed.
    let signed: Vec<u8> = (0..500i32)
        .flat_map(|i| (if i == 400 { -100 } else { i * i % 50_000 }).to_le_bytes())
        .collect();
    let signed = open(&write(&dir, "i32.bin", &signed)).unwrap();
    assert_eq!((signed.files()[0].token_type, signed.token_count()), (TokenType::I32, 500));
    assert!(signed.check_tokens(60_000).unwrap_err().to_string().contains("-100 at offset 400"));
    // A header is believed, whatever is declared.
    assert_eq!(declared(&token_file("uint16.npy"), TokenType::I64).unwrap(), 4000);
    // Text is not looked for in what is said to be tokens.
    assert_eq!(declared(&token_file("plain-text.txt"), TokenType::U8).unwrap(), 4020);
}

#[test]
fn truncated_wide_tokens_are_not_taken_for_narrow_ones() {
    let dir = TempDir::new().unwrap();
    let tokens = (1..1000u32).map(|i| i * 7919 % 50_257);
    let u32s: Vec<u8> = tokens.clone().flat_map(u32::to_le_bytes).collect();
    let i64s: Vec<u8> = tokens.flat_map(|t| u64::from(t).to_le_bytes()).collect();
    for (bytes, token_type, width) in [(u32s, "u32", 4), (i64s, "i64", 8)] {
        for cut in 1..width {
            let message = refusal(&write(&dir, "cut.bin", &bytes[..bytes.len() - cut]));
            let expected = format!("expected {token_type} tokens, so a multiple of {width} bytes");
            assert!(message.contains(&expected), "{cut}: {message}");
        }
    }
}

#[test]
fn big_endian_tokens_are_refused_where_they_can_be_told() {
    let dir = TempDir::new().unwrap();
    let tokens = (1..1000u32).map(|i| i * 7919 % 50_257);
    let u32s: Vec<u8> = tokens.clone().flat_map(u32::to_be_bytes).collect();
    let i64s: Vec<u8> = tokens.flat_map(|t| u64::from(t).to_be_bytes()).collect();
    let bytes: Vec<u8> =
        fs::read(token_file("plain-text.txt")).unwrap().iter().flat_map(|&b| [0, b]).collect();
    for (name, bytes) in [("u32", u32s), ("i64", i64s), ("bytes", bytes)] {
        let message = refusal(&write(&dir, name, &bytes));
        assert!(message.contains("big-endian") && message.contains("numpy.save"), "{message}");
    }
}

#[test]
fn zeros_that_take_turns_with_a_token_are_u16() {
    let tokens: Vec<u16> = (0..600).map(|i| if i % 2 == 1 { 7 } else { 0 }).collect();
    raw_u16(&tokens).unwrap();
}

#[test]
fn files_of_other_kinds_are_named_with_the_remedy() {
    let dir = TempDir::new().unwrap();
    let zip = |name: &str| {
        let mut bytes = b"PK\x03\x04\x14\0\0\0\x08\0aabbccccddddeeee".to_vec();
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend([0, 0]);
        [&bytes[..], name.as_bytes(), &[0x80; 64]].concat()
    };
    let mut tar = vec![0; 1024];
    tar[..8].copy_from_slice(b"tokens/a");
    tar[257..263].copy_from_slice(b"ustar\0");
    let mut safetensors = 40u64.to_le_bytes().to_vec();
    safetensors.extend(format!("{:40}", "{\"a\":{\"dtype\":\"F32\"}}").bytes());
    safetensors.extend([0; 16]);
    let mut lmdb = vec![0; 64];
    lmdb[16..24].copy_from_slice(&[0xde, 0xc0, 0xef, 0xbe, 1, 0, 0, 0]);
    let utf_16: Vec<u8> = "\u{feff}A grey heron stands in the reeds"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let utf_16_be: Vec<u8> = "\u{feff}A grey heron stands in the reeds"
        .encode_utf16()
        .flat_map(u16::to_be_bytes)
        .collect();
    let utf_32 = |bytes: fn(u32) -> [u8; 4]| -> Vec<u8> {
        "\u{feff}A grey heron stands in the reeds".chars().flat_map(|c| bytes(c.into())).collect()
    };
    let mut tiff = b"II*\0\x08\0\0\0\x04\0".to_vec();
    for tag in 0..4 {
        tiff.extend([tag, 1, 3, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    }
    let mut windows = vec![0; 0x84];
    windows[..2].copy_from_slice(b"MZ");
    windows[0x3c] = 0x80;
    windows[0x80..].copy_from_slice(b"PE\0\0");
    let latin_1 = b"Die V\xf6gel singen; der Reiher wartet am Fl\xfcsschen.\n".repeat(8);
    let prose = fs::read(token_file("plain-text.txt")).unwrap();
    let json_lines = b"{\"text\": \"A grey heron stands.\"}\n".repeat(3);
    let pickled = [&b"\x80\x04\x95\x0b\0\0\0\0\0\0\0]\x94(K\x01K\x02K\x03e."[..]].concat();
    for (name, bytes, parts) in [
        ("text", prose, ["found text", "mxtrain prepare"]),
        ("bom", [&b"\xef\xbb\xbf"[..], &[b'a'; 40]].concat(), ["found text", "mxtrain prepare"]),
        ("greek", "Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ ὁ λόγος ἦν πρὸς τὸν θεόν".into(), ["found text", ""]),
        ("jsonl", json_lines, ["text (JSON or JSON lines)", "mxtrain prepare"]),
        ("json", b"[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]".to_vec(), ["text (JSON)", ""]),
        ("utf-16", utf_16, ["text in UTF-16", "mxtrain prepare"]),
        ("utf-16-be", utf_16_be, ["text in UTF-16", "mxtrain prepare"]),
        ("latin-1", latin_1, ["text that is not UTF-8", "mxtrain prepare"]),
        (
            "lfs",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n".to_vec(),
            ["Git LFS pointer", "git lfs pull"],
        ),
        ("html", b"\n<!DOCTYPE HTML><html>404</html>".to_vec(), ["HTML page", "fetch"]),
        (
            "gzip",
            b"\x1f\x8b\x08\x08\x00\x00\x00\x00\x00\x03tokens.bin\x00\xab".to_vec(),
            ["gzip", "gunzip"],
        ),
        ("zstd", b"\x28\xb5\x2f\xfd\x04\x00\x29\x00\x00abcde".to_vec(), ["zstd", "zstd -d"]),
        ("xz", b"\xfd7zXZ\0\x00\x04\xe6\xd6\xb4\x46".to_vec(), ["xz", "xz -d"]),
        ("bzip2", b"BZh91AY&SY\xd1\x2b".to_vec(), ["bzip2", "bunzip2"]),
        ("lz4", b"\x04\x22\x4d\x18\x64\x40\xa7\x00".to_vec(), ["lz4", "lz4 -d"]),
        ("zip", zip("tokens.bin"), ["zip archive", "unpack"]),
        ("npz", zip("arr_0.npy"), ["npz", "numpy.save"]),
        ("torch", zip("archive/data.pkl"), ["torch.save", "numpy.save"]),
        ("tar", tar, ["tar archive", "tar -xf"]),
        ("parquet", b"PAR1\x15\x04\x15\x10PAR1".to_vec(), ["Parquet", "mxtrain prepare"]),
        ("arrow", b"ARROW1\0\0\xff\xff\xff\xff".to_vec(), ["Arrow", "numpy.save"]),
        (
            "arrow-stream",
            b"\xff\xff\xff\xff\xf8\0\0\0\x10\0\0\0\0\0\x0a\0".to_vec(),
            ["Arrow table (a stream)", "mxtrain prepare"],
        ),
        ("pickle", pickled, ["pickle", "numpy.save"]),
        ("pickle-3", b"\x80\x03]q\0(K\x01K\x02e.".to_vec(), ["pickle", "numpy.save"]),
        (
            "torch-old",
            b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80".to_vec(),
            ["torch.save", "numpy.save"],
        ),
        ("safetensors", safetensors, ["safetensors", "from its folder"]),
        ("gguf", b"GGUF\x03\0\0\0\x01\0\0\0".to_vec(), ["GGUF", "from its folder"]),
        ("hdf5", b"\x89HDF\r\n\x1a\n\0\0".to_vec(), ["HDF5", "h5py"]),
        (
            "sentencepiece",
            b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02\x0a".to_vec(),
            ["SentencePiece", "alone"],
        ),
        ("sqlite", b"SQLite format 3\0\x10\0".to_vec(), ["SQLite", "alone"]),
        ("pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3".to_vec(), ["PDF", "text of it"]),
        ("elf", b"\x7fELF\x02\x01\x01\0\0\0".to_vec(), ["ELF", "alone"]),
        ("png", b"\x89PNG\r\n\x1a\n\0\0".to_vec(), ["PNG", "alone"]),
        ("jpeg", b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01".to_vec(), ["JPEG", "alone"]),
        ("gif", b"GIF89a\x01\0\x01\0".to_vec(), ["GIF", "alone"]),
        ("lmdb", lmdb, ["LMDB", "alone"]),
        ("llmc-model", llmc(20240326, 3, 1024, &[0; 64]), ["a model of llm.c", "from its folder"]),
        ("llmc-eval", llmc(20240522, 1, 10, &[0; 64]), ["HellaSwag", "alone"]),
        (
            "dos",
            [&b"A grey heron stands.\r\n".repeat(9)[..], b"\x1a\n"].concat(),
            ["text", "prepare"],
        ),
        ("utf-32", utf_32(u32::to_le_bytes), ["text in UTF-32", "mxtrain prepare"]),
        ("utf-32-be", utf_32(u32::to_be_bytes), ["text in UTF-32", "mxtrain prepare"]),
        ("parquet-cut", b"PAR1\x15\x04\x15\x80\x7d\x15\xf2\x3e".to_vec(), ["Parquet", ""]),
        ("pickle-cut", b"\x80\x04\x95\xb0\x60\0\0\0\0\0\0]\x94(".to_vec(), ["pickle", ""]),
        ("pickle-bytes", b"\x80\x03B\x02\0\0\0abq\0.".to_vec(), ["pickle", "numpy.save"]),
        (
            "zstd-skip",
            b"\x50\x2a\x4d\x18\x02\0\0\0ab\x28\xb5\x2f\xfd\x04\0".to_vec(),
            ["zstd", "zstd -d"],
        ),
        ("snappy", b"\xff\x06\0\0sNaPpY\0\0".to_vec(), ["Snappy", "snzip"]),
        ("flac", b"fLaC\0\0\0\x22\x10\0".to_vec(), ["FLAC", "alone"]),
        ("ogg", b"OggS\0\x02\0\0".to_vec(), ["Ogg", "alone"]),
        ("mp3", b"ID3\x04\0\0\0\0\x0f\x76TSSE".to_vec(), ["MP3", "alone"]),
        (
            "matroska",
            b"\x1a\x45\xdf\xa3\xa3\x42\x86\x81\x01\x42\x82\x88matroska".to_vec(),
            ["Matroska", "alone"],
        ),
        (
            "bmp",
            b"BM\x1c\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(),
            ["BMP", "alone"],
        ),
        ("tiff", tiff, ["TIFF", "alone"]),
        ("office", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0".to_vec(), ["office", "text of it"]),
        (
            "matlab",
            b"MATLAB 5.0 MAT-file, Platform: GLNXA64\0\x01IM".to_vec(),
            ["MATLAB", "loadmat"],
        ),
        ("windows", windows, ["Windows", "alone"]),
        ("ar", b"!<arch>\n".to_vec(), ["an archive (ar)", "unpack"]),
        // The checksum of the length, by the format.
        (
            "tfrecord",
            b"\x0e\0\0\0\0\0\0\0\xc5\xe5\x69\x3f\x0a\x0c\x0a\x0a\x0a\x04".to_vec(),
            ["TensorFlow", "numpy.save"],
        ),
        ("idx", b"\0\0\x08\x02\0\0\0\x02\0\0\0\x03abcdef".to_vec(), ["IDX", "numpy.save"]),
        ("index", index(1, 8, 2, &[1]), ["Megatron index under another name", "*.idx"]),
    ] {
        let message = refusal(&write(&dir, name, &bytes));
        assert!(message.contains(name) && message.contains("expected a token file, found"));
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}

proptest! {
    /// GPT-2's tokens as random as can be, of any number: never refused, never taken for others.
    #[test]
    fn random_tokens_are_what_they_are(tokens in prop::collection::vec(0u16..50_257, 1..3000)) {
        raw_u16(&tokens)?;
    }

    /// The same with the frequencies of a text: the most frequent ones are the lowest.
    #[test]
    fn frequent_tokens_are_what_they_are(draws in prop::collection::vec(0f64..1.0, 1..3000)) {
        raw_u16(&draws.iter().map(|x| (50_257f64.powf(*x) - 1.0) as u16).collect::<Vec<_>>())?;
    }

    /// Bytes as tokens, in which every second byte of the file is 0.
    #[test]
    fn bytes_are_what_they_are(tokens in prop::collection::vec(0u16..256, 1..3000)) {
        raw_u16(&tokens)?;
    }

    #[test]
    fn texts_as_bytes_are_what_they_are(text in "[ -~\n]{1,600}") {
        raw_u16(&text.bytes().map(u16::from).collect::<Vec<_>>())?;
    }

    /// Small vocabularies hold many zeros; a file of a few tokens may be suspected.
    #[test]
    fn small_vocabularies_are_what_they_are(tokens in prop::collection::vec(0u16..4, 60..600)) {
        raw_u16(&tokens)?;
    }

    #[test]
    fn wide_tokens_are_known(
        tokens in prop::collection::vec(1u32..50_257, 64..600),
        twice: bool,
    ) {
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|&t| if twice { u64::from(t).to_le_bytes().to_vec() } else { t.to_le_bytes().to_vec() })
            .collect();
        let dir = TempDir::new().unwrap();
        let data = open(&write(&dir, "wide.bin", &bytes)).unwrap();
        let token_type = if twice { TokenType::I64 } else { TokenType::U32 };
        prop_assert_eq!(data.files()[0].token_type, token_type);
        prop_assert_eq!(data.max_token().unwrap(), *tokens.iter().max().unwrap());
    }
}

fn raw_u16(tokens: &[u16]) -> Result<(), TestCaseError> {
    let dir = TempDir::new().unwrap();
    let data = open(&write(&dir, "raw.bin", &raw(tokens)));
    let data = data.map_err(|e| TestCaseError::fail(e.to_string()))?;
    let file = data.files().remove(0);
    prop_assert_eq!((file.format, file.token_type), (TokenFormat::Raw, TokenType::U16));
    prop_assert_eq!(file.tokens, tokens.len() as u64);
    prop_assert_eq!(data.max_token().unwrap(), u32::from(*tokens.iter().max().unwrap()));
    Ok(())
}

/// A trainer of sequences of 512 tokens with a vocabulary of 100, and what its engine has logged.
fn trainer(length: usize) -> (Trainer, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    let lines = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = lines.clone();
    let log = move |level, line: &str| {
        if level == LogLevel::Warning {
            kept.lock().unwrap().push(line.to_owned());
        }
    };
    let options =
        EngineOptions { threads: 1, log: Some(Box::new(log)), ..EngineOptions::default() };
    let engine = Engine::new(options).unwrap();
    let config = ModelConfig {
        vocab_size: 100,
        context_length: length,
        layers: 1,
        heads: 1,
        channels: 16,
        ..ModelConfig::default()
    };
    let options = TrainerOptions { batch_size: 2, ..TrainerOptions::default() };
    (Trainer::new(&Model::new(&engine, &config).unwrap(), options).unwrap(), lines)
}

#[test]
fn a_token_outside_the_vocabulary_is_known_before_the_first_step() {
    let dir = TempDir::new().unwrap();
    let mut tokens: Vec<u16> = (0..40_000u32).map(|i| (i * i % 99) as u16).collect();
    tokens[39_999] = 60_000;
    let path = write(&dir, "one-bad-token.bin", &raw(&tokens));
    let good = write(&dir, "good.bin", &raw(&tokens[..20_000]));
    let data = Dataset::open_files(&[&good, &path]).unwrap();
    let (mut trainer, _) = trainer(16);
    for error in [trainer.step(&data).unwrap_err(), trainer.eval(&data, 1).unwrap_err()] {
        let text = error.to_string();
        assert!(matches!(error, Error::TokenRange { offset: 39_999, token: 60_000, .. }), "{text}");
        assert!(text.contains("one-bad-token.bin"), "{text}");
    }
    assert_eq!(trainer.steps_done(), 0);
    assert_eq!(trainer.step(&open(&good).unwrap()).unwrap().step, 1);
}

#[test]
fn files_shorter_than_a_window_are_said_and_measured() {
    let dir = TempDir::new().unwrap();
    let piece = |n: u16| raw(&(0..n).map(|i| i * 7 % 100).collect::<Vec<_>>());
    write(&dir, "a_long.bin", &piece(1200));
    for i in 0..10 {
        write(&dir, &format!("doc_{i}.bin"), &piece(450));
    }
    let data = open(&dir.path().join("*.bin")).unwrap();
    let (mut trainer, lines) = trainer(512);
    for _ in 0..3 {
        trainer.step(&data).unwrap();
    }
    assert_eq!(
        *lines.lock().unwrap(),
        [
            "10 of 11 files are shorter than a window of 513 tokens and will never be read: 4,500 of \
          5,700 tokens (79%); use sequence_length 449 or join them"
        ]
    );
    let coverage = data.coverage(512);
    assert_eq!((coverage.files, coverage.short_files, coverage.short_tokens), (11, 10, 4500));

    // Where one file is long enough, only whole windows are measured.
    assert_eq!(trainer.eval(&data, 0).unwrap().tokens, 512);
    // Where none is, each is a window of its own length.
    let short = open(&dir.path().join("doc_*.bin")).unwrap();
    assert_eq!(trainer.eval(&short, 0).unwrap().tokens, 10 * 449);
    assert_eq!(trainer.eval(&short, 1).unwrap().tokens, 2 * 449);
    let error = trainer.step(&short).unwrap_err().to_string();
    assert!(
        error.contains("the longest of the 10 in the dataset has 450 (4500 in all)"),
        "{error}"
    );
    assert!(error.contains("at most 449 tokens"), "{error}");

    // A window has the loss that it has for a trainer of its length.
    let one = open(&dir.path().join("doc_0.bin")).unwrap();
    let stats = trainer.eval(&one, 0).unwrap();
    let options = TrainerOptions { sequence_length: 449, ..trainer.options().clone() };
    let mut exact = Trainer::new(trainer.model(), options).unwrap();
    assert_eq!(exact.eval(&one, 0).unwrap().loss.to_bits(), stats.loss.to_bits());
    assert_eq!(stats.tokens, 449);
    // A single token predicts nothing.
    let mixed = write(&dir, "mixed-0.bin", &piece(1));
    let pair = write(&dir, "mixed-1.bin", &piece(2));
    let mixed = Dataset::open_files(&[&mixed, &pair]).unwrap();
    assert_eq!(trainer.eval(&mixed, 0).unwrap().tokens, 1);
    let single = Dataset::from_tokens(vec![5]).unwrap();
    assert!(trainer.eval(&single, 0).unwrap_err().to_string().contains("use more data"));
}

#[cfg(unix)]
#[test]
fn names_need_not_be_utf_8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let dir = TempDir::new().unwrap();
    let name = |bytes: &[u8]| dir.path().join(OsStr::from_bytes(bytes));
    fs::create_dir_all(name(b"stra\xdfe/sub")).unwrap();
    for (file, n) in [
        (&b"stra\xdfe/f\xfcr.bin"[..], 1),
        (b"stra\xdfe/sub/b.bin", 2),
        (b"stra\xdfe/c\xc3\xa9.bin", 3),
    ] {
        fs::write(name(file), raw(&vec![7; n])).unwrap();
    }
    let counts = |pattern: &[u8]| {
        let data = open(&name(pattern)).unwrap_or_else(|e| panic!("{e}"));
        data.files().iter().map(|file| file.tokens).collect::<Vec<_>>()
    };
    assert_eq!(counts(b"stra\xdfe/f\xfcr.bin"), [1]);
    assert_eq!(counts(b"stra\xdfe/f?r.bin"), [1]);
    assert_eq!(counts(b"stra\xdfe/f\xfc*"), [1]);
    assert_eq!(counts(b"stra?e/*.bin"), [3, 1]);
    assert_eq!(counts(b"stra?e/c?.bin"), [3], "a character of two bytes is one");
    assert_eq!(counts(b"*/c\xc3\xa9.*"), [3]);
    assert_eq!(counts(b"**/*.bin"), [3, 1, 2]);
    assert_eq!(counts(b"stra\xdfe/**/b.bin"), [2]);
    assert_eq!(counts(b"s*/*/../f*.bin"), [1]);
    assert!(Dataset::open(name(b"stra\xde*/x")).is_err());
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

#[test]
fn a_file_that_is_cut_is_an_error_of_every_call() {
    in_a_child("a_file_that_is_cut_is_an_error_of_every_call", cut_under_every_call);
}

/// Sandboxes may forbid to read a process' memory, also one's own.
#[cfg(target_os = "linux")]
#[test]
fn a_file_that_is_cut_is_an_error_in_a_sandbox() {
    in_a_child("a_file_that_is_cut_is_an_error_in_a_sandbox", || {
        let (mut byte, from) = ([0u8], [7u8]);
        let to = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        let from = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: 1 };
        forbid(libc::SYS_process_vm_readv);
        // SAFETY: both are a byte of this function's.
        let count = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
        assert_eq!((count, byte), (-1, [0]), "it is forbidden");
        cut_under_every_call();
    });
}

/// Makes a system call fail in this thread, and in those that it starts.
#[cfg(target_os = "linux")]
fn forbid(call: libc::c_long) {
    let instruction = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call as u32),
        instruction(libc::BPF_RET, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        instruction(libc::BPF_RET, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the program is copied by the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn cut_under_every_call() {
    let dir = TempDir::new().unwrap();
    // The second file ends within a page, and all its tokens have bytes that are 0.
    let tokens: Vec<u16> = (0..50_000).map(|i| 1 + i % 99).collect();
    write(&dir, "a.bin", &raw(&tokens[..100]));
    let path = write(&dir, "b.bin", &raw(&tokens));
    // At the beginning, within a page, between pages, and within the last one.
    for keep in [0, 1000, 4096, 99_999] {
        for is_known in [false, true] {
            let data = open(&dir.path().join("*.bin")).unwrap();
            let (mut trainer, _) = trainer(16);
            if is_known {
                assert_eq!(data.max_token().unwrap(), 99);
            }
            cut(&path, keep);
            let check = |result: Result<(), Error>| {
                let error = result.expect_err("the file is cut");
                let text = error.to_string();
                assert!(matches!(error, Error::Io { .. }), "{text}");
                let expected = format!("b.bin: the file has become shorter: {keep} bytes where");
                assert!(text.contains(&expected), "{keep}: {text}");
            };
            let first = 100 + keep / 2;
            check(data.read(first.saturating_sub(50), &mut [0; 51]));
            check(data.read(0, &mut vec![0; data.token_count() as usize]));
            check(data.max_tokens().map(drop));
            // Windows need not reach the last token, but all are looked at first.
            if keep < 99_999 || !is_known {
                check(trainer.eval(&data, 0).map(drop));
            }
            if is_known {
                assert_eq!((data.max_token().unwrap(), data.check_tokens(100).is_ok()), (99, true));
                data.read(0, &mut [0; 100]).unwrap();
            } else {
                check(data.max_token().map(drop));
                check(data.check_tokens(100));
            }
            // A step needs the end of the file sooner or later.
            let mut fresh = self::trainer(16).0;
            let same = Dataset::from_tokens(vec![1; 100]).unwrap();
            if keep < 4096 || !is_known {
                let steps = (0..200).map(|_| trainer.step(&data).map(drop));
                check(steps.into_iter().find(Result::is_err).expect("a step that fails"));
            }
            // The trainer is as if it had not been asked, and the file may come back.
            fs::write(&path, raw(&tokens)).unwrap();
            let again = open(&dir.path().join("*.bin")).unwrap();
            while fresh.steps_done() < trainer.steps_done() {
                fresh.step(&again).unwrap();
            }
            let losses = [&mut trainer, &mut fresh].map(|trainer| {
                let data = if is_known { &data } else { &again };
                [trainer.step(data).unwrap().loss, trainer.step(&same).unwrap().loss]
            });
            assert_eq!(losses[0].map(f32::to_bits), losses[1].map(f32::to_bits));
        }
    }
}

#[test]
fn files_may_change_at_any_moment() {
    in_a_child("files_may_change_at_any_moment", || {
        let dir = TempDir::new().unwrap();
        let tokens = raw(&(0..200_000u32).map(|i| (i % 99) as u16).collect::<Vec<_>>());
        let path = write(&dir, "t.bin", &tokens);
        let data = open(&path).unwrap();
        let (mut trainer, _) = trainer(16);
        let is_over = AtomicBool::new(false);
        let (mut sound, mut failed) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut keep = 0;
                while !is_over.load(Ordering::Relaxed) {
                    cut(&path, keep);
                    keep = (keep + 12_345) % tokens.len() as u64;
                    fs::write(&path, &tokens).unwrap();
                }
            });
            let mut count = |result: Result<(), Error>| match result {
                Ok(()) => sound += 1,
                Err(Error::Io { .. }) => failed += 1,
                Err(e) => panic!("{e}"),
            };
            let mut all = vec![0; data.token_count() as usize];
            for _ in 0..100 {
                count(trainer.step(&data).map(drop));
                count(trainer.eval(&data, 4).map(drop));
                count(data.max_tokens().map(drop));
                count(data.read(0, &mut all));
            }
            is_over.store(true, Ordering::Relaxed);
        });
        assert_eq!(sound + failed, 400);
        trainer.step(&data).unwrap();
    });
}

#[test]
fn a_file_is_held_without_its_name() {
    let dir = TempDir::new().unwrap();
    let tokens: Vec<u16> = (0..3000).map(|i| i % 99).collect();
    let path = write(&dir, "t.bin", &raw(&tokens));
    let data = open(&path).unwrap();
    let expected: Vec<u32> = tokens.iter().map(|&t| t.into()).collect();
    let is_whole = || {
        let mut all = vec![0; 3000];
        data.read(0, &mut all).unwrap();
        assert_eq!((all, data.max_tokens().unwrap()), (expected.clone(), vec![98]));
    };
    fs::rename(write(&dir, "other.bin", &raw(&[500; 10])), &path).unwrap();
    is_whole();
    fs::remove_file(&path).unwrap();
    is_whole();
    pipe_at(&path);
    is_whole();
}

#[test]
fn there_may_be_any_number_of_files() {
    // In a process of its own, because it takes all maps.
    in_a_child("there_may_be_any_number_of_files", || {
        let dir = TempDir::new().unwrap();
        let path = write(&dir, "t.bin", &raw(&[1, 2, 3, 4, 99, 6]));
        let descriptors = || fs::read_dir("/dev/fd").unwrap().count();
        let before = descriptors();
        // More than Linux gives a process maps; a file that is named again is a file more.
        let data = Dataset::open_files(&vec![&path; 66_000]).unwrap();
        assert_eq!((data.token_count(), descriptors()), (6 * 66_000, before));
        assert_eq!(data.max_token().unwrap(), 99);
        let mut ends = [[0; 6]; 2];
        data.read(0, &mut ends[0]).unwrap();
        data.read(6 * 65_999, &mut ends[1]).unwrap();
        assert_eq!(ends, [[1, 2, 3, 4, 99, 6]; 2]);
        let (mut trainer, _) = trainer(5);
        for _ in 0..3 {
            trainer.step(&data).unwrap();
        }
        cut(&path, 10);
        for first in [0, 6 * 65_999] {
            let error = data.read(first, &mut ends[0]).unwrap_err().to_string();
            assert!(
                error.contains("t.bin: the file has become shorter: 10 bytes where 12"),
                "{error}"
            );
        }
    });
}

#[test]
fn what_links_lead_to_counts_once() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    for folder in ["real/sub", "elsewhere/deep"] {
        fs::create_dir_all(at(folder)).unwrap();
    }
    for (name, n) in [("real/a.bin", 1), ("real/sub/b.bin", 2), ("elsewhere/deep/c.bin", 3)] {
        write(&dir, name, &raw(&vec![0; n]));
    }
    fs::create_dir(at("data")).unwrap();
    fs::rename(at("real"), at("data/real")).unwrap();
    // Two ways to the same files before and behind them, circles, and a folder beside the data.
    symlink("real", at("data/again")).unwrap();
    symlink("real/sub", at("data/zsub")).unwrap();
    symlink("real/a.bin", at("data/link.bin")).unwrap();
    symlink("..", at("data/real/sub/up")).unwrap();
    symlink(".", at("data/real/here")).unwrap();
    symlink("itself", at("data/itself")).unwrap();
    symlink("../elsewhere", at("data/beside")).unwrap();
    symlink("../../elsewhere", at("data/real/beside")).unwrap();
    // Another name of a file is another file, as always.
    fs::hard_link(at("data/real/a.bin"), at("data/real/hard.bin")).unwrap();
    let names = |pattern: &str| {
        let data = open(&at(pattern)).unwrap_or_else(|e| panic!("{e}"));
        let name = |path: &Path| path.strip_prefix(dir.path()).unwrap().display().to_string();
        data.files().iter().map(|file| name(&file.path)).collect::<Vec<_>>()
    };
    let (a, b, hard) = ("data/real/a.bin", "data/real/sub/b.bin", "data/real/hard.bin");
    assert_eq!(names("data/**/*.bin"), ["data/beside/deep/c.bin", a, hard, b]);
    assert_eq!(names("data/**/**/*.bin"), names("data/**/*.bin"));
    assert_eq!(names("data/**/b.bin"), [b]);
    assert_eq!(names("data/*/*.bin"), [a, hard, b.replace("real/sub", "zsub").as_str()]);
    assert_eq!(names("data/*/sub/*.bin"), [b]);
    assert_eq!(names("data/*.bin"), ["data/link.bin"]);
    assert_eq!(names("data/again/*.bin"), ["data/again/a.bin", "data/again/hard.bin"]);
    assert_eq!(names("data/beside/**/*.bin"), ["data/beside/deep/c.bin"]);
    let twice = Dataset::open_files(&[at(a), at("data/link.bin"), at(a)]).unwrap();
    assert_eq!(twice.token_count(), 3, "a list is taken as it is");
    symlink("nowhere", at("data/real/lost.bin")).unwrap();
    let lost = open(&at("data/**/*.bin")).unwrap_err();
    assert!(matches!(lost, Error::Io { action: "open", .. }), "{lost}");
}

#[test]
fn folders_may_be_deep() {
    in_a_child("folders_may_be_deep", || {
        let dir = TempDir::new().unwrap();
        let mut deep = dir.path().to_owned();
        deep.extend(["d"; 500]);
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("t.bin"), raw(&[1, 2])).unwrap();
        let search = || Dataset::open(dir.path().join("**/t.bin")).map(|data| data.token_count());
        // A host's thread may have a small stack.
        let small = std::thread::Builder::new().stack_size(128 << 10);
        let found = std::thread::scope(|scope| {
            small.spawn_scoped(scope, search).unwrap().join().unwrap().unwrap()
        });
        assert_eq!(found, 2);

        // Deeper than a path can be long.
        let name = "n".repeat(250);
        let mut folder = File::open(dir.path()).unwrap();
        for _ in 0..20 {
            rustix::fs::mkdirat(&folder, &name, rustix::fs::Mode::RWXU).unwrap();
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
            folder = rustix::fs::openat(&folder, &name, flags, rustix::fs::Mode::empty())
                .unwrap()
                .into();
        }
        let error = search().unwrap_err();
        assert!(matches!(error, Error::Io { action: "search", .. }), "{error}");
    });
}

#[cfg(target_os = "linux")]
#[test]
fn a_list_that_memory_does_not_hold_is_an_error() {
    in_a_child("a_list_that_memory_does_not_hold_is_an_error", || {
        let dir = TempDir::new().unwrap();
        let path = write(&dir, "t.bin", &raw(&[1, 2]));
        let list = vec![path.as_path(); 4_000_000];
        // SAFETY: a struct of numbers; the limit is this process's own.
        let done = unsafe {
            let mut limit = std::mem::zeroed();
            libc::getrlimit(libc::RLIMIT_AS, &mut limit);
            // Above what any test program takes, and far below what the files would.
            limit.rlim_cur = 512 << 20;
            libc::setrlimit(libc::RLIMIT_AS, &limit)
        };
        assert_eq!(done, 0);
        let error = Dataset::open_files(&list).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    });
}
