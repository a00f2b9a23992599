//! `mxtrain prepare`: the bytes that it writes, and what it refuses.

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Output, Stdio};

use common::{failed, interrupt, mxtrain, refuse, run, run_args, start, succeed, tokens, wait_for};

/// What people have: stories in files, marks in a file, a short text, tables.
const TEXTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/texts");
/// The token between documents.
const END_OF_TEXT: u16 = 50256;

#[test]
fn documents_stay_whole_and_meta_tells_where_they_went() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("a.txt"), "one\ntwo\nthree\nfour\n").unwrap();
    fs::write(path("b.txt"), "é\nü\n").unwrap();
    fs::write(path("c.txt"), "five\n").unwrap();
    let out = succeed(dir.path(), "prepare a.txt b.txt c.txt --out data/set --val-fraction 0.3");
    assert!(out.contains("train.bin: 24 tokens, 2 documents"), "{out}");
    assert!(out.contains("val.bin: 6 tokens, 1 document, 20.0% of the text"), "{out}");
    let info = succeed(dir.path(), "info data/set");
    assert!(info.contains("documents  2 for training, 1 for validation\n"), "{info}");

    assert_eq!(text(&path("data/set/train.bin")), "one\ntwo\nthree\nfour\nfive\n");
    assert_eq!(text(&path("data/set/val.bin")), "é\nü\n");

    let meta = fs::read(path("data/set/meta.json")).unwrap();
    let meta: serde_json::Value = serde_json::from_slice(&meta).unwrap();
    let source = |path, documents: [u64; 2], bytes: [u64; 2]| {
        serde_json::json!({
            "path": path,
            "files": 1,
            "train_documents": documents[0],
            "val_documents": documents[1],
            "train_bytes": bytes[0],
            "val_bytes": bytes[1],
        })
    };
    let expected = serde_json::json!({
        "version": 1,
        "tokenizer": "bytes",
        "vocab_size": 256,
        "train_tokens": 24,
        "val_tokens": 6,
        "documents": {"train": 2, "val": 1, "cut": false},
        "sources": [
            source("a.txt", [1, 0], [19, 0]),
            source("b.txt", [0, 1], [0, 6]),
            source("c.txt", [1, 0], [5, 0]),
        ],
    });
    assert_eq!(meta, expected);
    // Nothing temporary is left.
    assert_eq!(fs::read_dir(path("data/set")).unwrap().count(), 3);
}

#[test]
fn a_single_document_is_cut_at_a_line() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), "one\ntwo\nthree\nfour\n").unwrap();
    let out = succeed(dir.path(), "prepare a.txt --out data --val-fraction 0.5");
    assert!(out.contains("train.bin: 14 tokens, the beginning of the only document"), "{out}");
    assert!(out.contains("val.bin: 5 tokens, its end from a line on, 26.3%"), "{out}");
    assert_eq!(text(&dir.path().join("data/train.bin")), "one\ntwo\nthree\n");
    assert_eq!(text(&dir.path().join("data/val.bin")), "four\n");
}

#[test]
fn without_validation_text_an_older_file_of_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), "one\ntwo\n").unwrap();
    succeed(dir.path(), "prepare a.txt --out data --val-fraction 0.5");
    assert!(dir.path().join("data/val.bin").exists());
    succeed(dir.path(), "prepare a.txt --out data --val-fraction 0");
    assert!(!dir.path().join("data/val.bin").exists());
    assert_eq!(tokens(&dir.path().join("data/train.bin")).len(), 8);
}

#[test]
fn the_last_file_can_be_the_validation_text() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), "one\n").unwrap();
    fs::write(dir.path().join("b.txt"), "two\n").unwrap();
    succeed(dir.path(), "prepare a.txt b.txt --out data --val-last");
    assert_eq!(tokens(&dir.path().join("data/train.bin")), b"one\n".map(u16::from));
    assert_eq!(tokens(&dir.path().join("data/val.bin")), b"two\n".map(u16::from));
    let error = refuse(dir.path(), "prepare a.txt --out data --val-last");
    assert!(error.contains("two or more inputs"), "{error}");
}

/// Several chunks of 1 MiB, encoded by several threads, give the tokens of the whole text;
/// multi-byte characters lie across the chunk borders.
#[test]
fn gpt2_tokens_in_a_stream_are_those_of_the_whole_text() {
    let source = concat!(include_str!("../src/tokenizer.rs"), include_str!("../src/cli.rs"));
    let mut text = String::new();
    for i in 0.. {
        if text.len() >= 5 << 19 {
            break;
        }
        text.push_str(source);
        text.push_str(&format!("{i}: „Größe“ — 語語語 🦀🦀 naïve…\u{3000}x\r\n\n\n   \t"));
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.txt"), &text).unwrap();
    fs::write(dir.path().join("b.txt"), "The end").unwrap();
    succeed(dir.path(), "prepare a.txt b.txt --out data --tokenizer gpt2 --val-fraction 0");

    let bpe = tiktoken_rs::r50k_base_singleton();
    let mut expected = bpe.encode_with_special_tokens(&text);
    assert!(expected.contains(&50256)); // the sources speak of it
    expected.push(50256);
    expected.extend(bpe.encode_ordinary("The end"));
    let found = tokens(&dir.path().join("data/train.bin"));
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().map(|&t| u32::from(t)).eq(expected));
}

/// What breaks naive encoders: no place to cut for megabytes, and nothing but whitespace.
#[test]
fn monotonous_text_takes_no_long_time() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("words.txt"), "語".repeat(3 << 20)).unwrap();
    fs::write(dir.path().join("spaces.txt"), " ".repeat(9 << 20)).unwrap();
    let line = "prepare words.txt spaces.txt --out data --tokenizer gpt2 --val-fraction 0";
    succeed(dir.path(), line);
    let bpe = tiktoken_rs::r50k_base_singleton();
    let found: Vec<u32> =
        tokens(&dir.path().join("data/train.bin")).iter().map(|&t| t.into()).collect();
    let text = bpe.decode_bytes(&found).unwrap();
    let separator = "<|endoftext|>".len();
    assert_eq!(text.len(), (9 << 20) + (9 << 20) + separator);
}

#[test]
fn wrong_inputs_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("latin1.txt"), b"caf\xe9 noir\n").unwrap();
    fs::write(dir.path().join("empty.txt"), "").unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
    for (line, expected) in [
        ("prepare none.txt --out data", "cannot read none.txt: No such file"),
        ("prepare empty --out data", "empty: expected files named .txt"),
        ("prepare empty.txt --out data", "no training text"),
        ("prepare latin1.txt --out latin1.txt/data", "cannot create latin1.txt/data"),
        ("prepare latin1.txt --out data --tokenizer gpt2", "byte 0xe9 at offset 3"),
        ("prepare latin1.txt --out data --val-fraction 1", "from 0 to below 1"),
        (
            "prepare latin1.txt --out data --tokenizer bpe",
            "bpe: no such file or folder; expected by",
        ),
        ("prepare --out data", "required arguments were not provided: <INPUT>..."),
    ] {
        let error = refuse(dir.path(), line);
        assert!(error.contains(expected), "{line}: {error}");
    }
    assert!(!dir.path().join("data").exists());
    // Bytes need not be UTF-8.
    succeed(dir.path(), "prepare latin1.txt --out data --val-fraction 0");
    assert_eq!(tokens(&dir.path().join("data/train.bin"))[3], 0xe9);
}

/// The text of a file of byte tokens.
fn text(path: &Path) -> String {
    let bytes = tokens(path).into_iter().map(|token| u8::try_from(token).unwrap()).collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn file_names_may_hold_anything() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a [b] *.txt"), "text\n").unwrap();
    let args = ["prepare", "a [b] *.txt", "--out", "data [1]", "--val-fraction=0"];
    assert!(run_args(dir.path(), args).status.success());
    assert_eq!(tokens(&dir.path().join("data [1]/train.bin")).len(), 5);
}

#[test]
fn of_a_folder_of_stories_whole_ones_are_for_validation() {
    let dir = tempfile::tempdir().unwrap();
    let line = format!("prepare {TEXTS}/stories --out data");
    let out = succeed(dir.path(), &line);
    assert!(out.contains("in 20 files"), "{out}");
    assert!(
        out.contains("tokens, 19 documents\n") && out.contains("tokens, 1 document, 5."),
        "{out}"
    );
    let [train, val] =
        ["train.bin", "val.bin"].map(|name| text(&dir.path().join("data").join(name)));
    let story = |i| fs::read_to_string(format!("{TEXTS}/stories/s{i:02}.txt")).unwrap();
    let kept: Vec<usize> = (0..20).filter(|&i| val.contains(&story(i))).collect();
    assert_eq!(kept, [10]);
    let others: String = (0..20).filter(|&i| i != 10).map(story).collect();
    assert_eq!((train, val), (others, story(10)));
}

#[test]
fn a_mark_between_stories_is_one_token() {
    let dir = tempfile::tempdir().unwrap();
    let line = format!("prepare {TEXTS}/end-of-text.txt --out data --tokenizer gpt2");
    succeed(dir.path(), &format!("{line} --val-fraction 0"));
    let path = dir.path().join("data/train.bin");
    // "First story.", the mark, "Second story.", the mark that the file ends with.
    assert_eq!(tokens(&path), [5962, 1621, 13, END_OF_TEXT, 12211, 1621, 13, END_OF_TEXT]);

    let out = succeed(dir.path(), &line);
    assert!(out.contains("train.bin: 4 tokens, 1 document\n"), "{out}");
    assert_eq!(tokens(&path), [12211, 1621, 13, END_OF_TEXT]); // the first is the shorter one
    succeed(dir.path(), &format!("{line} --val-fraction 0 --no-special"));
    let literal = tokens(&path);
    assert_eq!(literal.len(), 18);
    assert!(!literal.contains(&END_OF_TEXT));
    let bytes = line.replace("gpt2", "bytes");
    succeed(dir.path(), &format!("{bytes} --val-fraction 0"));
    assert_eq!(text(&path), fs::read_to_string(format!("{TEXTS}/end-of-text.txt")).unwrap());
}

#[test]
fn short_validation_text_is_said_and_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(dir.path(), &format!("prepare {TEXTS}/short.txt --out data"));
    assert!(output.status.success());
    let notes = String::from_utf8(output.stderr).unwrap();
    let expected = "note: val.bin has 145 tokens: shorter than a window of 1,024 tokens and the one \
                    behind it; prepare it with --val-fraction 0.33, or train with a --context below \
                    145\n";
    assert_eq!(notes, expected);
    let output =
        run(dir.path(), &format!("prepare {TEXTS}/short.txt --out data --val-fraction 0.33"));
    assert!(output.stderr.is_empty());
}

/// The same documents in every form that people have them in.
#[test]
fn every_form_of_the_same_documents_gives_the_same_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let texts: Vec<String> = (0..60)
        .map(|i| {
            format!("{i}: {} „naïve“ 語 🦀\n\t{{\"quoted\"}}\n", "word\\ ".repeat(i * 37 % 101))
        })
        .collect();
    let row = |text: &String| serde_json::json!({"id": 1, "text": text, "more": [{"text": 5}]});
    let rows: Vec<String> = texts.iter().map(|text| row(text).to_string()).collect();
    fs::create_dir(dir.join("folder")).unwrap();
    for (i, text) in texts.iter().enumerate() {
        fs::write(dir.join(format!("folder/{i:03}.txt")), text).unwrap();
    }
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let lines = rows.join("\n") + "\n";
    let array = format!("[\n{}\n]\n", rows.join(",\n"));
    let marked = texts.join("<|endoftext|>");
    write("rows.jsonl", lines.as_bytes());
    write("windows.jsonl", ("\u{feff}".to_owned() + &rows.join("\r\n")).as_bytes());
    write("rows.json", array.as_bytes());
    let (first, second) = lines.split_at(lines.len() / 2);
    write("rows.jsonl.gz", &[gzip(first.as_bytes()), gzip(second.as_bytes())].concat());
    write("rows.ndjson.zst", &zstd::encode_all(lines.as_bytes(), 3).unwrap());
    write("body.jsonl", lines.replace("\"text\":\"", "\"body\":\"").as_bytes());
    write("marked.txt", marked.as_bytes());
    write("marked.txt.gz", &gzip(marked.as_bytes()));

    let prepare = |line: &str, input: Option<&str>| -> [Vec<u16>; 2] {
        let line = format!("prepare {line} --out data --tokenizer gpt2 --val-fraction 0.1");
        let mut command = mxtrain();
        command.args(line.split_whitespace());
        if let Some(input) = input {
            command.stdin(File::open(dir.join(input)).unwrap());
        }
        let output = start(dir, &mut command).wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {error}");
        ["train.bin", "val.bin"].map(|name| tokens(&dir.join("data").join(name)))
    };
    let expected = prepare("folder", None);
    let found =
        [&expected[0], &expected[1]].map(|t| t.iter().filter(|&&t| t == END_OF_TEXT).count());
    assert_eq!(found[0] + found[1], 60 - 2);
    assert!((4..12).contains(&found[1]), "{found:?}");
    for line in [
        "folder --threads 1",
        "folder --threads 7",
        "rows.jsonl",
        "windows.jsonl",
        "rows.json",
        "rows.jsonl.gz",
        "rows.ndjson.zst",
        "body.jsonl --text-field body",
    ] {
        assert!(prepare(line, None) == expected, "{line}");
    }
    for input in ["rows.jsonl", "rows.jsonl.gz", "rows.ndjson.zst"] {
        assert!(prepare("-", Some(input)) == expected, "- < {input}");
    }
    // Marks in a text end the documents before them, so the split counts them there.
    let marked = prepare("marked.txt", None);
    for (line, input) in
        [("marked.txt.gz", None), ("-", Some("marked.txt")), ("-", Some("marked.txt.gz"))]
    {
        assert!(prepare(line, input) == marked, "{line}");
    }
    let sum = |sets: &[Vec<u16>; 2]| sets[0].len() + sets[1].len();
    assert!((sum(&marked) as i64 - sum(&expected) as i64).abs() <= 6);
}

#[test]
fn parquet_tables_of_other_programs() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let text_of = |i: usize| format!("row {i}: naïve 語 🦀 {}\n", "ha ".repeat(i % 5));
    let expected: String = (0..40).filter(|i| ![7, 21].contains(i)).map(text_of).collect();
    let mut files = 0;
    for entry in fs::read_dir(format!("{TEXTS}/parquet")).unwrap() {
        let path = entry.unwrap().path();
        files += 1;
        let line = format!("prepare {} --out data --val-fraction 0", path.display());
        if path.ends_with("lz4.parquet") {
            let error = refuse(dir, &line);
            assert!(error.contains("snappy, zstd, gzip or not at all, found LZ4"), "{error}");
            continue;
        }
        let output = run(dir, &line);
        let notes = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {notes}");
        assert_eq!(notes, "note: skipped 2 rows without text\n");
        assert!(String::from_utf8_lossy(&output.stdout).contains("38 documents"));
        assert_eq!(text(&dir.join("data/train.bin")), expected, "{line}");
    }
    assert_eq!(files, 8);

    let line = format!("prepare {TEXTS}/parquet/snappy.parquet --out data");
    let error = refuse(dir, &format!("{line} --text-field body"));
    let names = r#"found "id", "text", "tags"; name another with --text-field"#;
    assert!(error.contains(names), "{error}");
    let error = refuse(dir, &format!("{line} --text-field id"));
    assert!(error.contains("expected strings in column \"id\", found INT64"), "{error}");
    let error = refuse(dir, &format!("{line} --text-field tags"));
    assert!(error.contains("found lists of BYTE_ARRAY"), "{error}");
}

/// A table with one byte changed, or cut off anywhere, is an error in one line or still a table.
#[test]
fn damaged_tables_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let whole = fs::read(format!("{TEXTS}/parquet/snappy.parquet")).unwrap();
    let path = dir.path().join("damaged.parquet");
    let line = "prepare damaged.parquet --out data --val-fraction 0";
    let check = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let output = run(dir.path(), line);
        if !output.status.success() {
            failed(&output, line);
        }
    };
    for at in (4..whole.len()).step_by(41) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        check(&bytes);
        check(&whole[..at]);
    }
}

#[test]
fn what_is_no_text_is_named_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();
    let zeros = [&b"\x7fELF"[..], &[0; 100]].concat();
    let utf16: Vec<u8> = "text\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let pack = |text: &str| zstd::encode_all(text.as_bytes(), 1).unwrap();
    let packed = pack(&"some text ".repeat(1000));
    write("binary.txt", &zeros);
    write("nul.txt", b"text\0and more");
    write("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n");
    write("packed.txt", &[0x1f, 0x8b, 8, 0, 0, 0]);
    write("packed.jsonl", &packed);
    write("bom.txt", &[&[0xff, 0xfe][..], &utf16].concat());
    write("utf16.txt", &utf16);
    write("latin1.txt", b"caf\xe9 noir\n");
    write("plain.txt.gz", b"plain text\n");
    write("cut.txt.zst", &packed[..packed.len() / 2]);
    write("text.parquet", b"plain text\n");
    write("a.txt.xz", b"\xfd7zXZ\0\0\0");
    write("rows.jsonl", b"{\"text\": \"a\"}\n{\"body\": \"b\"}\n");
    write("rows.json", b"{\"body\": \"b\"}\n");
    write("array.json", b"[{\"text\": \"a\"},\n {\"text\": \"b\"}");
    write("half.jsonl", b"{\"text\": \"\\ud83d\"}\n");
    write("twice.txt.zst", &zstd::encode_all(&packed[..], 1).unwrap());
    let tar = [&[b'a'; 257][..], b"ustar\0", &[0; 249]].concat();
    write("tar.txt.zst", &zstd::encode_all(&tar[..], 1).unwrap());
    // A frame that names dictionary 7, and a block that is not packed.
    write("dictionary.txt.zst", b"\x28\xb5\x2f\xfd\x21\x07\x04\x21\0\0text");
    write("empty.parquet", b"");
    for (name, expected) in [
        ("binary.txt", "expected text, found a program; give its text as a UTF-8 file"),
        ("nul.txt", "found binary data (NUL bytes)"),
        (
            "pointer.txt",
            "found a Git LFS pointer, which stands for the file itself; fetch that with `git lfs pull`",
        ),
        (
            "packed.txt",
            "found data compressed with gzip; rename it to packed.txt.gz, or use `gzip -dc packed.txt | mxtrain",
        ),
        (
            "packed.jsonl",
            "expected JSON, found data compressed with zstd; rename it to packed.jsonl.zst",
        ),
        ("bom.txt", "found UTF-16 text; use `iconv -f UTF-16 -t UTF-8 bom.txt`"),
        ("utf16.txt", "found UTF-16 text; use `iconv -f UTF-16LE"),
        (
            "latin1.txt --tokenizer gpt2",
            "found byte 0xe9 at offset 3; it may be Latin-1: convert it with `iconv -f LATIN1 -t UTF-8 latin1.txt`",
        ),
        ("plain.txt.gz", "expected data of gzip as its name says, found something else; rename"),
        ("cut.txt.zst", "its zstd data is cut off"),
        ("text.parquet", "expected a Parquet file, found something else"),
        ("a.txt.xz", "found data compressed with xz; use `xz -dc a.txt.xz | mxtrain prepare -`"),
        (
            "rows.jsonl",
            "rows.jsonl:2: expected the field \"text\" with a document, found body; name another with --text-field",
        ),
        ("rows.json", "rows.json:1: expected the field \"text\""),
        ("array.json", "array.json:2: expected ] at the end of the array"),
        ("half.jsonl", "half of a surrogate pair"),
        (
            "twice.txt.zst",
            "found data compressed with zstd within its zstd data; unpack it with `zstd -dc twice.txt.zst`",
        ),
        ("tar.txt.zst", "found a tar archive, compressed; unpack it with `tar -xf`"),
        ("dictionary.txt.zst", "was made with a dictionary, which is not in it; unpack it with"),
        ("empty.parquet", "found an empty file; fetch or make it again"),
        ("- -", "standard input (-) can be read only once"),
    ] {
        let error = refuse(dir, &format!("prepare {name} --out data"));
        assert!(error.contains(expected), "{name}: {error}");
    }
    write("empty.txt", b"");
    let error = refuse(dir, "prepare latin1.txt empty.txt --val-last --out data");
    assert!(error.contains("the last input holds no text for validation"), "{error}");
    // A mark of byte order before UTF-8 is no text.
    write("utf8.txt", b"\xef\xbb\xbftext\n");
    succeed(dir, "prepare utf8.txt --out data --val-fraction 0");
    assert_eq!(text(&dir.join("data/train.bin")), "text\n");
    // Nor does it hide JSON lines on standard input.
    write("rows.jsonl", b"\xef\xbb\xbf{\"text\": \"a\"}\n{\"text\": \"b\"}\n");
    let mut command = mxtrain();
    command.args(["prepare", "-", "--out", "data", "--val-fraction", "0"]);
    command.stdin(File::open(dir.join("rows.jsonl")).unwrap());
    assert!(start(dir, &mut command).wait_with_output().unwrap().status.success());
    assert_eq!(text(&dir.join("data/train.bin")), "ab");
}

#[test]
fn a_folder_says_what_it_skips_and_never_reads_what_was_prepared() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::create_dir(dir.join("sub")).unwrap();
    for name in ["b.txt", "sub/a.md", "image.png", "c.txt.bz2", ".hidden.txt"] {
        fs::write(dir.join(name), format!("{name}\n")).unwrap();
    }
    for _ in 0..2 {
        let output = run(dir, "prepare . --out data --val-fraction 0");
        let notes = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{notes}");
        assert!(
            notes.starts_with("note: skipped 1 file that is no text by name (1 .png)"),
            "{notes}"
        );
        assert!(notes.contains("1 file in a compression that is not read"), "{notes}");
        assert!(notes.contains("1 hidden entry"), "{notes}");
        assert_eq!(text(&dir.join("data/train.bin")), "b.txt\nsub/a.md\n");
    }
    fs::create_dir(dir.join("images")).unwrap();
    fs::rename(dir.join("image.png"), dir.join("images/image.png")).unwrap();
    let error = refuse(dir, "prepare images --out data");
    assert!(error.contains("found none among 1 files; name the files themselves"), "{error}");
}

#[test]
fn the_last_input_is_left_out_of_the_folder_that_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::create_dir(dir.join("all")).unwrap();
    for name in ["a", "b", "val"] {
        fs::write(dir.join(format!("all/{name}.txt")), name).unwrap();
    }
    succeed(dir, "prepare all all/val.txt --out data --val-last");
    assert_eq!(text(&dir.join("data/train.bin")), "ab");
    assert_eq!(text(&dir.join("data/val.bin")), "val");
}

#[test]
fn names_that_are_not_utf8_are_names() {
    let dir = tempfile::tempdir().unwrap();
    let [input, out] = [&b"caf\xe9.txt"[..], b"donn\xe9es"].map(OsStr::from_bytes);
    fs::write(dir.path().join(input), "text\n").unwrap();
    let args = ["prepare".as_ref(), input, "--out".as_ref(), out, "--val-fraction=0".as_ref()];
    let output = run_args(dir.path(), args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text(&dir.path().join(out).join("train.bin")), "text\n");
    let meta = fs::read_to_string(dir.path().join(out).join("meta.json")).unwrap();
    let meta: serde_json::Value = serde_json::from_str(&meta).unwrap();
    let path = serde_json::json!({"unix_bytes": [99, 97, 102, 233, 46, 116, 120, 116]});
    assert_eq!(meta["sources"][0]["path"], path);
}

/// Starts a run that waits for its standard input.
fn start_waiting(dir: &Path) -> std::process::Child {
    let mut command = mxtrain();
    command.args("prepare - --out data --val-fraction 0".split_whitespace());
    let child = start(dir, command.stdin(Stdio::piped()));
    wait_for(|| dir.join("data/train.bin.tmp").exists());
    child
}

#[test]
fn of_two_runs_into_one_folder_the_second_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("b.txt"), "bbb").unwrap();
    let mut first = start_waiting(dir);
    first.stdin.as_mut().unwrap().write_all(b"aa").unwrap();
    let error = refuse(dir, "prepare b.txt --out data");
    let holder = format!("--out: another run (process {} on ", first.id());
    assert!(error.starts_with(&holder) && error.contains("is using data"), "{error}");
    drop(first.stdin.take());
    assert!(first.wait().unwrap().success());
    assert_eq!(text(&dir.join("data/train.bin")), "aa");
    let meta = fs::read_to_string(dir.join("data/meta.json")).unwrap();
    assert!(meta.contains("\"train_tokens\": 2"), "{meta}");
}

#[test]
fn a_run_that_is_stopped_leaves_the_older_result() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("b.txt"), "bbb").unwrap();
    succeed(dir, "prepare b.txt --out data --val-fraction 0");
    let mut stopped = start_waiting(dir);
    stopped.stdin.as_mut().unwrap().write_all(b"aa").unwrap();
    interrupt(&stopped);
    assert_eq!(stopped.wait().unwrap().code(), Some(130));
    assert_eq!(text(&dir.join("data/train.bin")), "bbb");
    assert_eq!(fs::read_dir(dir.join("data")).unwrap().count(), 2);
    succeed(dir, "info data");
    // The lock went with it, and so does what it left.
    succeed(dir, "prepare b.txt --out data --val-fraction 0");
    assert_eq!(fs::read_dir(dir.join("data")).unwrap().count(), 2);
}

/// The texts are as long as each other, so only their tokens tell whose they are.
#[test]
fn a_result_is_whole_or_refused_whoever_else_writes_it_and_whatever_kills_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for name in ["a", "b"] {
        fs::write(dir.join(name), name.repeat(300_000)).unwrap();
    }
    let begin = |name: &str| {
        let line = format!("prepare {name} --out data --threads 1");
        start(dir, mxtrain().args(line.split_whitespace()))
    };
    let (mut killed, mut refused) = (0, 0);
    for round in 0..24 {
        let mut runs = [begin("a"), begin("b")];
        if round % 2 == 0 {
            std::thread::sleep(std::time::Duration::from_millis(round));
            runs[0].kill().unwrap();
        }
        for run in runs {
            let output = run.wait_with_output().unwrap();
            match output.status.code() {
                Some(0) => {}
                Some(2) => refused += 1,
                None => killed += 1,
                code => panic!("{code:?}"),
            }
        }
        let info = run(dir, "info data --json");
        if !info.status.success() {
            continue;
        }
        let about: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        let whose = about["sources"][0]["path"].as_str().unwrap();
        for name in ["train.bin", "val.bin"] {
            let text = text(&dir.join("data").join(name));
            assert!(text.bytes().all(|byte| byte == whose.as_bytes()[0]), "{round}: {whose}");
        }
    }
    assert!(killed > 0 && refused > 0, "{killed} killed, {refused} refused");
    succeed(dir, "prepare a --out data");
    let names = fs::read_dir(dir.join("data")).unwrap().count();
    assert_eq!(names, 3, "what killed runs have left is gone");
}

/// The largest size of a file ends no command by a signal.
#[test]
fn a_file_that_may_not_grow_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("a.txt"), "text\n".repeat(10_000)).unwrap();
    let program = env!("CARGO_BIN_EXE_mxtrain");
    let line = format!("ulimit -f 4; exec {program} prepare a.txt --out data");
    let child = start(dir, std::process::Command::new("sh").args(["-c", &line]));
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cannot write data/train.bin.tmp: File too large"), "{error}");
    assert!(!dir.join("data").exists());
}

/// A failure does not wait for a pipe that nobody writes to.
#[test]
fn an_error_ends_the_run_while_standard_input_is_open() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bad.jsonl"), "no json\n").unwrap();
    let mut command = mxtrain();
    command.args("prepare bad.jsonl - --out data".split_whitespace());
    let mut child = start(dir.path(), command.stdin(Stdio::piped()));
    let open = child.stdin.take();
    let output: Output = child.wait_with_output().unwrap();
    drop(open);
    assert!(failed(&output, "prepare").starts_with("bad.jsonl:1: expected ident"));
}
