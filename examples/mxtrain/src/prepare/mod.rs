//! `mxtrain prepare`: text as people have it to token files.
//!
//! Inputs become a stream of documents (`inputs`, `content`, then `text`, `json` or `parquet`),
//! threads turn them into tokens (`encode`), and each document goes whole to training or to
//! validation (`split`). Nothing is held in memory for longer than that takes.

mod content;
mod encode;
mod inputs;
mod json;
mod parquet;
mod split;
mod text;

use std::fs;
use std::process::ExitCode;
use std::thread;

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

use crate::cli::PrepareArgs;
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::lock::RunLock;
use crate::prepared::{Documents, Meta, Source, TRAIN_FILE, VAL_FILE};
use crate::signals::Signals;
use crate::tokens_file::{TokensFile, Width, temporary_name};
use encode::Options;
pub(crate) use inputs::Format;
use inputs::{Input, Inputs, counted};
use split::{Rule, Sets};

/// A window that people train with; shorter validation text is worth a word.
const USUAL_WINDOW: u64 = 1024;

/// Runs the command.
pub(crate) fn run(args: &PrepareArgs) -> Outcome<ExitCode> {
    run_with(args, &Signals::listen()?)
}

/// Runs the command in a process that listens to signals.
pub(crate) fn run_with(args: &PrepareArgs, signals: &Signals) -> Outcome<ExitCode> {
    let last = args.inputs.len() - 1;
    if args.val_last && last == 0 {
        return Err(Failure::usage(
            "--val-last: expected two or more inputs, the last for validation; got one",
        ));
    }
    let tokenizer = args.tokenizer.open(args.end_of_text.as_deref())?;
    tokenizer.end_of_text()?;
    let inputs = Inputs::find(&args.inputs, args.format, args.val_last, &args.out)?;
    let mut sources: Vec<Source> = (args.inputs.iter())
        .map(|path| Source { path: path.clone(), ..Source::default() })
        .collect();
    for input in &inputs.list {
        sources[input.source].files += 1;
    }
    // A signal ends the command, and leaves neither half a file nor the lock.
    let paths = [TRAIN_FILE, VAL_FILE].map(|name| args.out.join(name));
    let traces = |lock: &RunLock| -> Vec<_> {
        paths.iter().map(|path| temporary_name(path)).chain(lock.traces()).collect()
    };
    let lock = signals.making(|| RunLock::take(&args.out), traces)?;
    Meta::check_place(&args.out, &tokenizer)?;

    let options = Options {
        tokenizer: tokenizer.clone(),
        special: !args.no_special,
        text_field: args.text_field.clone(),
        threads: match args.threads {
            0 => thread::available_parallelism().map_or(1, |n| n.get()),
            threads => threads,
        },
        chunk: encode::CHUNK,
    };
    let rule = match args.val_last {
        true => Rule::Source(last),
        false => Rule::Fraction(args.val_fraction),
    };
    // No signal comes in between: what was made after it has removed the others would stay.
    let begin = || {
        fs::create_dir_all(&args.out).map_err(Failure::io("create", &args.out))?;
        let width = Width::of(tokenizer.vocab_size());
        let [train, val] = paths.clone().map(|path| TokensFile::create(path, width));
        Ok([train?, val?])
    };
    let files = signals.making(begin, |_| traces(&lock))?;
    let sets = Sets::new(rule, tokenizer.clone(), options.special, files, sources);
    let skipped = inputs.skipped.in_words();
    let bar = progress_bar(&inputs);
    let (sets, empty) = tokenize(inputs.list, &options, sets, |done| bar.inc(done))?;
    bar.finish_and_clear();
    if sets.train.tokens() == 0 {
        return Err(Failure::usage(
            "the inputs hold no training text; give more text or a smaller --val-fraction",
        ));
    }

    if args.val_last && sets.val.tokens() == 0 {
        return Err(Failure::usage("--val-last: the last input holds no text for validation"));
    }

    let (bytes, documents) = (sets.bytes(), sets.documents());
    let mut meta = Meta::new(&tokenizer, sets.sources);
    meta.documents = Some(documents);
    let train = sets.train.seal()?;
    let val = (sets.val.tokens() > 0).then(|| sets.val.seal()).transpose()?;
    meta.train_tokens = train.tokens();
    meta.val_tokens = val.as_ref().map_or(0, |val| val.tokens());
    // Nor does one come between the files.
    signals.making(|| meta.publish(&args.out, &tokenizer, train, val), |()| Vec::new())?;

    console::print(&summary(args, &meta, documents, bytes))?;
    let empty = (empty > 0).then(|| format!("skipped {} without text", counted(empty, "row")));
    for note in [skipped, empty, short_validation(&meta)].into_iter().flatten() {
        console::note(&format!("note: {note}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Puts the tokens of all inputs into the sets, and counts the rows without a text. `done` hears of
/// bytes of input.
fn tokenize(
    inputs: Vec<Input>,
    options: &Options,
    mut sets: Sets,
    done: impl Fn(u64),
) -> Outcome<(Sets, u64)> {
    let mut empty = 0;
    encode::encode(inputs, options, |encoded| {
        sets.take(&encoded)?;
        empty += encoded.empty;
        done(encoded.input);
        Ok(())
    })?;
    sets.finish()?;
    Ok((sets, empty))
}

/// Bytes of input that are done; without a length if a pipe is among them.
fn progress_bar(inputs: &Inputs) -> ProgressBar {
    let length: Option<u64> = inputs.list.iter().map(|input| input.length).sum();
    let (bar, template) = match length {
        Some(length) => (
            ProgressBar::new(length),
            "{wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
        ),
        None => (ProgressBar::no_length(), "{spinner} {decimal_bytes} {decimal_bytes_per_sec}"),
    };
    bar.with_style(ProgressStyle::with_template(template).expect("the template is valid"))
}

/// What was made, for the user.
fn summary(args: &PrepareArgs, meta: &Meta, documents: Documents, bytes: [u64; 2]) -> String {
    let all = bytes[0] + bytes[1];
    let files = meta.sources.iter().map(|source| source.files).sum();
    let share = 100.0 * bytes[1] as f64 / all.max(1) as f64;
    let [train, val] = [documents.train, documents.val].map(|count| counted(count, "document"));
    let (train, val) = match documents.cut {
        true => (
            "the beginning of the only document".to_owned(),
            format!("its end from a line on, {share:.1}% of the text"),
        ),
        false => (train, format!("{val}, {share:.1}% of the text")),
    };
    format!(
        "{}: {} of text in {}, tokenizer {}, vocabulary {}\n  {TRAIN_FILE}: {} tokens, {train}\n  \
         {VAL_FILE}: {} tokens{}\n",
        console::shown(&args.out),
        HumanBytes(all),
        counted(files, "file"),
        meta.tokenizer,
        HumanCount(meta.vocab_size as u64),
        HumanCount(meta.train_tokens),
        HumanCount(meta.val_tokens),
        if meta.val_tokens > 0 { format!(", {val}") } else { String::new() },
    )
}

/// What to say of validation text that is shorter than people's windows.
fn short_validation(meta: &Meta) -> Option<String> {
    let (train, val) = (meta.train_tokens, meta.val_tokens);
    if val == 0 || val > USUAL_WINDOW {
        return None;
    }
    // A tenth more, because documents and lines stay whole.
    let wanted = 1.1 * (USUAL_WINDOW + 1) as f64 / (train + val) as f64;
    let remedy = match (wanted * 100.0).ceil() / 100.0 {
        wanted if wanted <= 0.5 => format!("prepare it with --val-fraction {wanted}"),
        _ => "give more text".to_owned(),
    };
    let shorter = match val {
        1 | 2 => String::new(),
        _ => format!(", or train with a --context below {val}"),
    };
    Some(format!(
        "{VAL_FILE} has {} tokens: shorter than a window of {} tokens and the one behind it; \
         {remedy}{shorter}",
        HumanCount(val),
        HumanCount(USUAL_WINDOW),
    ))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::{Path, PathBuf};
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::{END_OF_TEXT, Named, Tokenizer};
    use crate::tokenizer_file::samples;

    /// What came out of a run.
    #[derive(Debug, PartialEq)]
    struct Made {
        train: Vec<u32>,
        val: Vec<u32>,
        documents: Documents,
        sources: Vec<Source>,
    }

    fn make(paths: &[PathBuf], options: &Options, rule: Rule) -> Outcome<Made> {
        let dir = tempfile::tempdir().unwrap();
        let last_wins = matches!(rule, Rule::Source(_));
        let inputs = Inputs::find(paths, None, last_wins, dir.path()).unwrap();
        let create = |name| TokensFile::create(dir.path().join(name), Width::U16).unwrap();
        let files = ["train", "val"].map(create);
        let sources = vec![Source::default(); paths.len()];
        let sets = Sets::new(rule, options.tokenizer.clone(), options.special, files, sources);
        let (mut sets, _) = tokenize(inputs.list, options, sets, |_| {})?;
        let tokens = |file: &mut TokensFile| {
            let mut tokens = vec![0; file.tokens() as usize];
            file.read(0, &mut tokens).unwrap();
            tokens
        };
        let documents = sets.documents();
        let (train, val) = (tokens(&mut sets.train), tokens(&mut sets.val));
        Ok(Made { train, val, documents, sources: sets.sources })
    }

    fn options(tokenizer: Tokenizer) -> Options {
        let text_field = "text".to_owned();
        Options { tokenizer, special: true, text_field, threads: 2, chunk: encode::CHUNK }
    }

    fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
        let mut text = Vec::new();
        for &token in tokens {
            tokenizer.decode(token, &mut text);
        }
        String::from_utf8(text).unwrap()
    }

    fn files(dir: &Path, contents: &[String]) -> Vec<PathBuf> {
        let name = |i: usize, text: &str| {
            dir.join(format!("{i:04}.{}", if text.starts_with('{') { "jsonl" } else { "txt" }))
        };
        let write = |(i, text): (usize, &String)| {
            let path = name(i, text);
            fs::write(&path, text).unwrap();
            path
        };
        contents.iter().enumerate().map(write).collect()
    }

    /// Where a single text is cut, and the tokens of both parts, each encoded alone.
    fn cut_directly(tokenizer: &Tokenizer, text: &str, fraction: f64) -> (Vec<u32>, Vec<u32>) {
        let wanted = (text.len() as f64 * (1.0 - fraction)).round() as usize;
        let line = text.as_bytes()[wanted - 1..].iter().position(|&b| b == b'\n');
        let line = line.map(|at| wanted + at).filter(|&at| at < text.len());
        let cut = line.unwrap_or_else(|| text.ceil_char_boundary(wanted));
        (tokenizer.encode(&text[..cut]).unwrap(), tokenizer.encode(&text[cut..]).unwrap())
    }

    #[test]
    fn a_single_text_has_the_tokens_of_its_two_parts() {
        let dir = tempfile::tempdir().unwrap();
        let verse =
            "KING:\n  “Well, we'll see 1234 naïve things…” \n\n\n語 語語 🦀\t tabs\r\nend  \n";
        let long = verse.repeat(1 << 10);
        let unbroken = "語é🦀".repeat(2000);
        for text in [verse, &verse.repeat(3), &long, &unbroken, "one\ntwo", "\n\n\n\nx", "éé"] {
            let paths = files(dir.path(), &[text.to_owned()]);
            for tokenizer in [Tokenizer::Bytes, Tokenizer::Gpt2] {
                for fraction in [0.05, 0.1, 0.31, 0.5, 0.8] {
                    let made = make(&paths, &options(tokenizer.clone()), Rule::Fraction(fraction))
                        .unwrap();
                    let (train, val) = cut_directly(&tokenizer, text, fraction);
                    let rest = decode(&tokenizer, &made.val);
                    // Between letters without a space the tokens around the cut may differ.
                    if text != unbroken {
                        assert_eq!(made.train, train, "{tokenizer} {fraction} {text:?}");
                        assert_eq!(made.val, val, "{tokenizer} {fraction} {text:?}");
                        if val.is_empty() {
                            continue; // a part that rounds to nothing
                        }
                    }
                    assert_eq!(decode(&tokenizer, &made.train) + &rest, text);
                    assert_eq!(rest, decode(&tokenizer, &val), "{tokenizer} {fraction}");
                    let source = &made.sources[0];
                    assert_eq!(source.val_bytes, rest.len() as u64);
                    assert_eq!(source.train_bytes + source.val_bytes, text.len() as u64);
                }
            }
        }
    }

    #[test]
    fn documents_for_validation_come_from_everywhere_and_are_about_the_fraction() {
        let dir = tempfile::tempdir().unwrap();
        let document = |i: usize| format!("{i:04} {}\n", "word ".repeat(20 + i * 7919 % 60));
        let texts: Vec<String> = (0..400).map(document).collect();
        let all: usize = texts.iter().map(String::len).sum();
        let paths = files(dir.path(), &texts);
        for fraction in [0.01, 0.05, 0.3, 0.5, 0.9] {
            let made = make(&paths, &options(Tokenizer::Gpt2), Rule::Fraction(fraction)).unwrap();
            let val: u64 = made.sources.iter().map(|s| s.val_bytes).sum();
            let share = val as f64 / all as f64;
            assert!((share - fraction).abs() < 0.002, "{fraction}: {share}");
            // Each tenth of the inputs gives its part, as far as a tenth can.
            for tenth in made.sources.chunks(40).filter(|_| fraction >= 0.05) {
                let (train, val) =
                    tenth.iter().fold((0, 0), |(t, v), s| (t + s.train_bytes, v + s.val_bytes));
                let share = val as f64 / (train + val) as f64;
                assert!((share - fraction).abs() < 0.03, "{fraction}: {share} of a tenth");
            }
            let documents: u64 = made.sources.iter().map(|s| s.train_documents).sum();
            assert_eq!((documents, 400 - documents), (made.documents.train, made.documents.val));
        }
    }

    #[test]
    fn a_long_document_is_not_paid_for_by_all_short_ones_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut texts = vec!["book ".repeat(400_000)];
        texts.extend((0..100).map(|i| format!("note {i:03}: {}\n", "x ".repeat(500))));
        let made =
            make(&files(dir.path(), &texts), &options(Tokenizer::Bytes), Rule::Fraction(0.05));
        let documents = made.unwrap().documents;
        assert!((10..=20).contains(&documents.val), "{documents:?}");
        // A book among others of its kind may be chosen, known by its length alone.
        let texts: Vec<String> = (0..30).map(|i| format!("{i} ").repeat(500_000)).collect();
        let made =
            make(&files(dir.path(), &texts), &options(Tokenizer::Bytes), Rule::Fraction(0.1));
        assert_eq!(made.unwrap().documents.val, 3);
    }

    #[test]
    fn of_a_few_large_documents_the_smallest_is_for_validation() {
        let dir = tempfile::tempdir().unwrap();
        let texts = |texts: &[&str]| texts.iter().map(|t| t.to_string()).collect::<Vec<_>>();
        for (files_of, train, val) in [
            (texts(&["first one", "second", "third one"]), "first one|third one", "second"),
            (texts(&["first", "second one"]), "second one", "first"),
            (texts(&["first one", "second"]), "first one", "second"),
            (texts(&["first one|second", "third one"]), "first one|third one", "second"),
            (texts(&["first|", "second one|"]), "second one|", "first|"),
            (texts(&["first one|", "|second"]), "first one|", "|second"),
            (
                texts(&["first one and much more", "|second", "third one and much more"]),
                "first one and much more|third one and much more",
                "|second",
            ),
        ] {
            let mark = |text: &str| text.replace('|', "<|endoftext|>");
            let paths = files(dir.path(), &files_of.iter().map(|t| mark(t)).collect::<Vec<_>>());
            let made = make(&paths, &options(Tokenizer::Gpt2), Rule::Fraction(0.05)).unwrap();
            let [found, found_val] = [&made.train, &made.val].map(|t| decode(&Tokenizer::Gpt2, t));
            assert_eq!((found, found_val), (mark(train), mark(val)), "{files_of:?}");
            assert_eq!(made.documents.val, 1);
            for path in paths {
                fs::remove_file(path).unwrap();
            }
        }
    }

    #[test]
    fn marks_are_one_token_and_never_double() {
        let dir = tempfile::tempdir().unwrap();
        let mark = "<|endoftext|>";
        let texts = [
            format!("{mark}first{mark}second{mark}\n"),
            "third".to_owned(),
            format!("fourth {mark}"),
            format!("{mark}fifth"),
        ];
        let paths = files(dir.path(), &texts);
        let rule = Rule::Fraction(0.0);
        let made = make(&paths, &options(Tokenizer::Gpt2), rule).unwrap();
        let expected =
            format!("{mark}first{mark}second{mark}\n{mark}third{mark}fourth {mark}fifth");
        // (The mark at the fifth's beginning is there already.)
        let expected =
            expected.replace("fourth <|endoftext|>fifth", "fourth <|endoftext|><|endoftext|>fifth");
        assert_eq!(decode(&Tokenizer::Gpt2, &made.train), expected);
        assert_eq!(made.train.iter().filter(|&&t| t == END_OF_TEXT).count(), 7);
        assert_eq!(made.documents, Documents { train: 5, val: 0, cut: false });

        // As text like any other, a file is one document.
        let literal = Options { special: false, ..options(Tokenizer::Gpt2) };
        let made = make(&paths, &literal, rule).unwrap();
        assert_eq!(made.train.iter().filter(|&&t| t == END_OF_TEXT).count(), 3);
        assert_eq!(made.documents, Documents { train: 4, val: 0, cut: false });

        // Bytes stay bytes.
        let made = make(&paths, &options(Tokenizer::Bytes), rule).unwrap();
        assert_eq!(decode(&Tokenizer::Bytes, &made.train), texts.concat());
        assert_eq!(made.documents.train, 5);
    }

    #[test]
    fn a_file_that_becomes_shorter_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        fs::write(&path, "some text\n").unwrap();
        let inputs = Inputs::find(std::slice::from_ref(&path), None, false, dir.path()).unwrap();
        fs::write(&path, "some").unwrap();
        let outcome = encode::encode(inputs.list, &options(Tokenizer::Bytes), |_| Ok(()));
        assert!(outcome.unwrap_err().message.contains("became shorter while it was read"));
    }

    #[test]
    fn a_stream_without_a_known_length_is_read_in_constant_memory() {
        use std::sync::atomic::{AtomicU64, Ordering};
        // A pipe of 200 MB; the writer counts how far it is ahead of the tokens.
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).unwrap();
        let (written, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let ahead = AtomicU64::new(0);
        let options = options(Tokenizer::Bytes);
        let inputs = Inputs::find(std::slice::from_ref(&pipe), None, false, dir.path()).unwrap();
        let mut count = 0;
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut pipe = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
                let line = [b'a'; 1 << 16];
                for _ in 0..3200 {
                    pipe.write_all(&line).unwrap();
                    let now = written.fetch_add(1 << 16, Ordering::SeqCst) + (1 << 16);
                    ahead.fetch_max(now - done.load(Ordering::SeqCst), Ordering::SeqCst);
                }
            });
            encode::encode(inputs.list, &options, |encoded| {
                count += encoded.tokens.len() as u64;
                done.fetch_add(encoded.tokens.len() as u64, Ordering::SeqCst);
                Ok(())
            })
            .unwrap();
        });
        assert_eq!(count, 3200 << 16);
        let ahead = ahead.into_inner();
        assert!(ahead <= 12 << 20, "{ahead} bytes were held");
    }

    static SMOL: LazyLock<Tokenizer> = LazyLock::new(|| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.json"), samples::smol().to_string()).unwrap();
        Named::Path(dir.path().into()).open(None).unwrap()
    });

    /// Documents that are told apart by their first word, with what makes cutting hard.
    fn documents() -> impl Strategy<Value = Vec<String>> {
        let word = prop::sample::select(vec![
            "a",
            "word",
            "naïve",
            "語語",
            "🦀",
            " ",
            "\n",
            "\n\n",
            "\t",
            "<|endof",
            "text|>",
            "<|",
            "1234",
            "'ll",
            "\u{3000}",
            "\r\n",
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ]);
        let body = prop::collection::vec(word, 0..30);
        prop::collection::vec(body, 2..12).prop_map(|bodies| {
            let text = |(i, body): (usize, Vec<&str>)| format!("#{i}#{}", body.concat());
            let texts = bodies.into_iter().enumerate().map(text);
            // Two halves of a mark may have met.
            texts.map(|text| text.replace("<|endoftext|>", "_")).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

        #[test]
        fn threads_and_chunks_change_nothing_and_no_document_is_in_both_sets(
            texts in documents(),
            layout in prop::collection::vec(0..3, 12),
            chunk in 1_usize..80,
            threads in 1_usize..5,
            fraction in prop::sample::select(vec![0.0, 0.05, 0.3, 0.5, 0.9]),
            tokenizer in 0..3_usize,
        ) {
            let tokenizer = [Tokenizer::Bytes, Tokenizer::Gpt2, SMOL.clone()][tokenizer].clone();
            let mark = "<|endoftext|>";
            // Documents in files of their own, behind a mark, or as rows.
            let mut contents: Vec<String> = Vec::new();
            for (text, layout) in texts.iter().zip(layout) {
                match (layout, contents.last_mut()) {
                    (0, Some(last)) if !last.starts_with('{') => {
                        last.push_str(mark);
                        last.push_str(text);
                    }
                    (1, _) => contents.push(serde_json::json!({ "text": text }).to_string()),
                    _ => contents.push(text.clone()),
                }
            }
            let dir = tempfile::tempdir().unwrap();
            let paths = files(dir.path(), &contents);
            let rule = Rule::Fraction(fraction);
            let made = make(&paths, &options(tokenizer.clone()), rule).unwrap();
            let small = Options { chunk, threads, ..options(tokenizer.clone()) };
            prop_assert_eq!(&make(&paths, &small, rule).unwrap(), &made);

            let [train, val] = [&made.train, &made.val].map(|tokens| decode(&tokenizer, tokens));
            let mut found = 0;
            for (i, text) in texts.iter().enumerate() {
                let begin = format!("#{i}#");
                prop_assert!(train.contains(&begin) != val.contains(&begin), "{} {} {}", i, train, val);
                let set = if val.contains(&begin) { &val } else { &train };
                prop_assert!(set.contains(text.as_str()));
                found += usize::from(val.contains(&begin));
            }
            prop_assert_eq!(found as u64, made.documents.val);
            prop_assert_eq!(fraction > 0.0, found > 0);
            prop_assert!(found < texts.len());
            if fraction == 0.0 && tokenizer != Tokenizer::Bytes {
                prop_assert_eq!(train, texts.join(mark));
            }
        }
    }
}
