//! Examples to learn answers from: JSON lines with a prompt and an answer each.
//!
//! An example is a window of its own: the prompt, the answer, the token that ends a text, and padding.
//! Or several share a window, one behind the other, as documents that do not see each other.
//! Only the answer and its end are learned. Prompts are encoded by themselves, as `mxtrain generate`
//! encodes them, so that the tokens that a model has learned to answer are those that it is asked with.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use indicatif::HumanCount;
use mxfp4train::Dataset;
use serde_json::{Map, Value};

use crate::cli::ExampleArgs;
use crate::failure::{Failure, Outcome};
use crate::tokenizer::Tokenizer;

/// What some programs begin UTF-8 with.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Examples as tokens, one behind the other.
pub(crate) struct Examples {
    tokens: Vec<u32>,
    all: Vec<Example>,
    end: u32,
}

/// Where an example lies.
#[derive(Clone, Copy)]
struct Example {
    first: usize,
    /// Its first token that is learned.
    answer: usize,
    /// Behind its last.
    end: usize,
}

/// How large they are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Size {
    pub(crate) examples: u64,
    pub(crate) tokens: u64,
    /// Of them, those that are learned.
    pub(crate) learned: u64,
}

impl Examples {
    /// Reads a file.
    pub(crate) fn read(path: &Path, args: &ExampleArgs, tokenizer: &Tokenizer) -> Outcome<Self> {
        let mut file = BufReader::new(File::open(path).map_err(Failure::io("open", path))?);
        let head = file.fill_buf().map_err(Failure::io("read", path))?;
        if head.trim_ascii_start().starts_with(b"[") {
            return Err(Failure::usage(format!(
                "{}: expected JSON objects, one a line, found an array; `jq -c '.[]' FILE` makes lines of \
                 it",
                path.display()
            )));
        }
        if head.starts_with(BYTE_ORDER_MARK) {
            file.consume(BYTE_ORDER_MARK.len());
        }
        let rows = serde_json::Deserializer::from_reader(file).into_iter();
        let end = tokenizer.end_of_text()?.unwrap_or_else(|| b'\n'.into());
        let mut examples = Self { tokens: Vec::new(), all: Vec::new(), end };
        for (number, row) in rows.enumerate() {
            let row: Map<String, Value> = row.map_err(|error| {
                Failure::usage(format!(
                    "{}: {error}; expected JSON objects, one a line, with a prompt and an answer",
                    path.display()
                ))
            })?;
            let text = |name: &str| text_of(&row, name, (path, number + 1));
            let prompt = text(&args.prompt_field)? + &args.between;
            examples.push(&prompt, &text(&args.answer_field)?, tokenizer)?;
        }
        if examples.all.is_empty() {
            return Err(Failure::usage(format!("{}: no example in it", path.display())));
        }
        Ok(examples)
    }

    fn push(&mut self, prompt: &str, answer: &str, tokenizer: &Tokenizer) -> Outcome {
        let first = self.tokens.len();
        self.tokens.extend(tokenizer.encode_prompt(prompt)?);
        let of_answer = self.tokens.len();
        self.tokens.extend(tokenizer.encode_behind(answer)?);
        self.tokens.push(self.end);
        self.all.push(Example { first, answer: of_answer, end: self.tokens.len() });
        Ok(())
    }

    pub(crate) fn size(&self) -> Size {
        let learned = self.all.iter().map(|example| example.end - example.answer).sum::<usize>();
        Size {
            examples: self.all.len() as u64,
            tokens: self.tokens.len() as u64,
            learned: learned as u64,
        }
    }

    /// Tokens of each.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.all.iter().map(|example| example.end - example.first).collect()
    }

    /// Writes examples to a window, one behind the other, and padding: of one that is longer, without
    /// the beginning of its prompt, or where that is not enough without the end of its answer. Each is
    /// a document, and so is the padding.
    fn fill(
        &self,
        numbers: Range<usize>,
        tokens: &mut [u32],
        weights: &mut [f32],
        documents: &mut [u32],
    ) {
        tokens.fill(self.end);
        weights.fill(0.0);
        documents.fill(numbers.end as u32);
        let mut place = 0;
        for number in numbers {
            let Example { first, answer, end } = self.all[number];
            let room = tokens.len() - place;
            // Something has to be there that the answer follows.
            let excess = (end - first).saturating_sub(room);
            let first = first + excess.min(answer - first - 1);
            let taken = (end - first).min(room);
            tokens[place..][..taken].copy_from_slice(&self.tokens[first..][..taken]);
            // The weight of a target stands with the token before it.
            let learned = place + answer - first - 1..place + taken - 1;
            weights[learned].fill(1.0);
            let last = (place + taken).min(documents.len());
            documents[place..last].fill(number as u32);
            place += taken;
        }
    }

    /// The windows of a run, with an example each.
    pub(crate) fn dataset(self: &Arc<Self>) -> Outcome<Dataset> {
        let (count, all) = (self.all.len() as u64, self.clone());
        Ok(Dataset::from_windows(count, move |number, tokens, weights| {
            let number = number as usize;
            all.fill(number..number + 1, tokens, weights, &mut []);
            Ok(())
        })?)
    }

    /// The windows of a run with as many examples each, in their order, as a sequence of this length
    /// and the last target hold; and how many there are.
    pub(crate) fn packed(self: &Arc<Self>, sequence_length: usize) -> Outcome<(Dataset, u64)> {
        let (window, mut firsts, mut left) = (sequence_length + 1, Vec::new(), 0);
        for (number, length) in self.lengths().into_iter().enumerate() {
            if number == 0 || length > left {
                firsts.push(number);
                left = window;
            }
            left = left.saturating_sub(length);
        }
        firsts.push(self.all.len());
        let (count, all) = (firsts.len() as u64 - 1, self.clone());
        let fill = move |number: u64, tokens: &mut [u32], weights: &mut [f32], of: &mut [u32]| {
            let number = number as usize;
            all.fill(firsts[number]..firsts[number + 1], tokens, weights, of);
            Ok(())
        };
        Ok((Dataset::from_packed_windows(count, fill)?, count))
    }
}

/// What should be known of examples, of these lengths, that windows do not hold.
pub(crate) fn note(lengths: &[usize], sequence_length: usize, context: usize) -> Option<String> {
    let window = sequence_length + 1;
    let longer = lengths.iter().filter(|length| **length > window).count();
    let longest = lengths.iter().max().copied().unwrap_or(0);
    let remedy = match sequence_length < context {
        true => "; --sequence-length takes more",
        false => ", since the model sees no more",
    };
    (longer > 0).then(|| {
        format!(
            "{} of {} examples are longer than {window} tokens (the longest has {longest}): there the \
             prompt begins later, or the answer ends earlier{remedy}",
            HumanCount(longer as u64),
            HumanCount(lengths.len() as u64),
        )
    })
}

/// A string in an object's field.
fn text_of(
    row: &Map<String, Value>,
    field: &str,
    (path, number): (&Path, usize),
) -> Outcome<String> {
    const NAMED: usize = 8;
    let place = || format!("{}: example {number}", path.display());
    match row.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(Failure::usage(format!(
            "{}: expected a string in the field {field:?}, found {other:.60}",
            place()
        ))),
        None => {
            let names: Vec<_> = row.keys().take(NAMED).map(String::as_str).collect();
            Err(Failure::usage(format!(
                "{}: expected the field {field:?}, found {}; name others with --prompt-field and \
                 --answer-field",
                place(),
                if names.is_empty() { "no field".to_owned() } else { names.join(", ") }
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> ExampleArgs {
        ExampleArgs {
            examples: None,
            val_examples: None,
            prompt_field: "prompt".into(),
            answer_field: "answer".into(),
            between: "=".into(),
        }
    }

    fn read(text: &str) -> Outcome<Examples> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Examples::read(file.path(), &args(), &Tokenizer::Bytes)
    }

    fn window(examples: &Examples, number: usize, length: usize) -> (String, Vec<f32>) {
        let (mut tokens, mut weights) = (vec![0; length + 1], vec![1.0; length]);
        examples.fill(number..number + 1, &mut tokens, &mut weights, &mut []);
        (tokens.iter().map(|token| char::from(*token as u8)).collect(), weights)
    }

    #[test]
    fn answers_and_their_ends_are_learned() {
        let examples = read(
            "{\"prompt\": \"1+2\", \"answer\": \"3\", \"other\": 5}\n\n{\"answer\":\"16\",\n\
             \"prompt\":\"7+9\"}",
        );
        let examples = examples.unwrap();
        let size = Size { examples: 2, tokens: 13, learned: 5 };
        assert_eq!(examples.size(), size);
        let whole = ("1+2=3\n\n\n".to_owned(), vec![0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
        assert_eq!(window(&examples, 0, 7), whole);
        let exact = ("7+9=16\n".to_owned(), vec![0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(window(&examples, 1, 6), exact);
        // Too long by two, and by more than its prompt has.
        assert_eq!(window(&examples, 1, 4), ("9=16\n".to_owned(), vec![0.0, 1.0, 1.0, 1.0]));
        assert_eq!(window(&examples, 1, 1), ("=1".to_owned(), vec![1.0]));
        assert_eq!(examples.lengths(), [6, 7]);
    }

    #[test]
    fn examples_share_windows_as_documents() {
        let row = |prompt: &str| format!("{{\"prompt\": \"{prompt}\", \"answer\": \"5\"}}\n");
        // 4, 5, 4, 9 and 4 tokens each.
        let text: String = ["a", "bc", "d", "efghij", "k"].into_iter().map(row).collect();
        let examples = Arc::new(read(&text).unwrap());
        let window = |numbers, length| {
            let (mut tokens, mut weights) = (vec![0; length + 1], vec![1.0; length]);
            let mut documents = vec![9; length];
            examples.fill(numbers, &mut tokens, &mut weights, &mut documents);
            let text: String = tokens.iter().map(|token| char::from(*token as u8)).collect();
            let learned: Vec<_> = (0..length).filter(|i| weights[*i] > 0.0).collect();
            (text, learned, documents)
        };
        let of_two = window(0..2, 10);
        assert_eq!(of_two.0, "a=5\nbc=5\n\n\n");
        assert_eq!(of_two.1, [1, 2, 6, 7]);
        assert_eq!(of_two.2, [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]);
        // The last token of the last is only predicted.
        assert_eq!(window(2..3, 3), ("d=5\n".to_owned(), vec![1, 2], vec![2; 3]));
        assert_eq!(window(3..4, 5), ("hij=5\n".to_owned(), vec![3, 4], vec![3; 5]));
        for (length, windows) in [(3, 5), (7, 5), (8, 4), (12, 2), (24, 2), (25, 1), (100, 1)] {
            assert_eq!(examples.packed(length).unwrap().1, windows, "{length}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_none_of_the_text() {
        let examples = read("\u{feff}{\"prompt\": \"a\", \"answer\": \"b\"}\r\n").unwrap();
        assert_eq!(window(&examples, 0, 3), ("a=b\n".to_owned(), vec![0.0, 1.0, 1.0]));
    }

    #[test]
    fn what_is_no_example_is_named() {
        for (text, words) in [
            ("", "no example in it"),
            ("{\"prompt\": \"a\"}", "example 1: expected the field \"answer\", found prompt; name"),
            ("{}", "found no field"),
            (
                "{\"prompt\": \"a\", \"answer\": \"b\"}\n{\"prompt\": 5, \"answer\": \"b\"}",
                "example 2: expected a string in the field \"prompt\", found 5",
            ),
            ("{\"prompt\": \"a\"\n", "EOF while parsing an object at line 2"),
            (" [1]", "found an array; `jq"),
            ("text\n", "expected JSON objects"),
        ] {
            let failure = read(text).err().unwrap();
            assert!(failure.message.contains(words), "{}", failure.message);
        }
    }
}
