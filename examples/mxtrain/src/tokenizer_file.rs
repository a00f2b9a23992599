//! A tokenizer of somebody else's: Hugging Face's `tokenizer.json`, with the files beside it.
//!
//! NOTE: in documents the text of a special token is text like any other, but for the token that
//! ends a text, which `prepare` looks for itself: a page about tokenizers is no sequence of
//! messages. In prompts all special tokens are tokens, as in transformers, so that a chat's marks
//! can be written.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};

use mxfp4train::Model;
use serde_json::Value;
use tokenizers::Tokenizer as Encoder;

use crate::failure::{Failure, Outcome};
use crate::files;

/// What it is called in a folder.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const GENERATION: &str = "generation_config.json";
/// Prefix of chat templates, `chat_template.jinja` or `chat_template.json`.
pub(crate) const CHAT_TEMPLATE: &str = "chat_template.";
/// Files beside it that go where it goes.
const BESIDE: [&str; 4] =
    [TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", GENERATION];
/// How the token that ends a text is usually called, where nothing else tells.
const USUAL_ENDS: [&str; 4] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"];
/// Token numbers are below this; the largest vocabularies have a fiftieth.
const MOST_TOKENS: u32 = 1 << 24;

/// A tokenizer that a file describes.
pub(crate) struct TokenizerFile {
    /// Takes special tokens for text.
    of_documents: Encoder,
    /// Takes them for tokens.
    of_prompts: OnceLock<Encoder>,
    spelling: Spelling,
    cuts: Cuts,
    vocab_size: usize,
    end: Option<End>,
    /// What its post-processor puts before a text, such as a token that begins one.
    begin: Vec<u32>,
    /// Whether it puts a space before a text, as Llama 2's does.
    adds_space: bool,
    path: PathBuf,
    /// Its bytes and those of the files beside it, by their names in a folder.
    contents: BTreeMap<String, Vec<u8>>,
}

/// The token that ends a text.
#[derive(Clone, Debug, PartialEq)]
struct End {
    token: u32,
    /// How it is written in a text, if it can be.
    mark: Option<String>,
}

/// How the bytes of a text are written in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spelling {
    /// Each byte is a character of GPT-2's alphabet.
    Bytes,
    /// As they are, with U+2581 for a space; perhaps with tokens for single bytes, `<0x0A>`.
    Spaces { byte_fallback: bool },
    /// In a way that only the tokenizer's decoder knows.
    Other,
}

/// Where a text may be cut so that the tokens of its parts are those of the whole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cuts {
    /// Before a space or a line break behind a visible character.
    Whitespace,
    /// Before a space behind a visible character.
    Spaces,
    /// Nowhere, as far as is known.
    Nowhere,
}

impl TokenizerFile {
    /// Reads a `tokenizer.json`, or that of a folder. `end` names the token that ends a text, where
    /// the files beside it do not.
    pub(crate) fn open(path: &Path, end: Option<&str>) -> Outcome<Self> {
        let path = &find(path)?;
        let dir = path.parent().map_or_else(PathBuf::new, Path::to_owned);
        let bytes = files::read(path).map_err(Failure::io("read", path))?;
        files::check_fetched(path, &bytes)?;
        let mut encoder = Encoder::from_bytes(&bytes).map_err(|error| {
            Failure::usage(format!(
                "expected a tokenizer.json of Hugging Face's tokenizers, found something else: \
                 {error}; make it with save_pretrained of transformers' AutoTokenizer"
            ))
            .within(path.display())
        })?;
        // Some files keep what they were last used with.
        encoder.with_padding(None);
        encoder.with_truncation(None).map_err(|e| Failure::usage(e.to_string()))?;
        encoder.set_encode_special_tokens(true);
        let largest = encoder.get_vocab(true).into_values().max();
        let vocab_size = match largest {
            Some(largest) if largest < MOST_TOKENS => largest as usize + 1,
            Some(largest) => {
                let message = format!("expected tokens below {MOST_TOKENS}, found {largest}");
                return Err(Failure::usage(message).within(path.display()));
            }
            None => return Err(Failure::usage("no token in it").within(path.display())),
        };
        // What lies beside a file of another name may be of another tokenizer.
        let is_alone = path.file_name().is_none_or(|name| name != TOKENIZER);
        let mut contents = if is_alone { BTreeMap::new() } else { beside(&dir)? };
        contents.insert(TOKENIZER.to_owned(), bytes);

        let part = |value: serde_json::Result<Value>| value.expect("its parts were JSON");
        let [normalizer, pre_tokenizer, decoder] = [
            part(serde_json::to_value(encoder.get_normalizer())),
            part(serde_json::to_value(encoder.get_pre_tokenizer())),
            part(serde_json::to_value(encoder.get_decoder())),
        ];
        let mut tokenizer = Self {
            spelling: Spelling::of(&decoder),
            cuts: Cuts::of(&normalizer, &pre_tokenizer, &encoder),
            of_documents: encoder,
            of_prompts: OnceLock::new(),
            vocab_size,
            end: None,
            begin: Vec::new(),
            adds_space: false,
            path: path.clone(),
            contents,
        };
        let [bare, whole] = [false, true].map(|special| tokenizer.tokens("a", special));
        let (bare, whole) = (bare?, whole?);
        let place = whole.windows(bare.len().max(1)).position(|part| part == bare);
        tokenizer.begin = whole[..place.unwrap_or(0)].to_vec();
        let first = bare.first().map(|token| tokenizer.bytes(*token)).unwrap_or_default();
        tokenizer.adds_space = first.starts_with(b" ");
        tokenizer.end = match end {
            Some(name) => Some(tokenizer.end_called(name)?),
            None => tokenizer.end_of_files(is_alone)?,
        };
        Ok(tokenizer)
    }

    /// With another token that ends a text.
    pub(crate) fn with_end(mut self, token: Option<u32>) -> Self {
        self.end = token.map(|token| self.end(token));
        self
    }

    pub(crate) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends a text.
    pub(crate) fn end_of_text(&self) -> Option<u32> {
        self.end.as_ref().map(|end| end.token)
    }

    /// How that is written in a text.
    pub(crate) fn mark(&self) -> Option<&str> {
        self.end.as_ref()?.mark.as_deref()
    }

    /// The tokens that a text begins with before its own.
    pub(crate) fn begin(&self) -> &[u32] {
        &self.begin
    }

    /// Whether it puts a space before a text.
    pub(crate) fn adds_space(&self) -> bool {
        self.adds_space
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that it lies in.
    pub(crate) fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// The files that go where it goes, by name.
    pub(crate) fn contents(&self) -> &BTreeMap<String, Vec<u8>> {
        &self.contents
    }

    /// What tells it from other tokenizers.
    pub(crate) fn checksum(&self) -> String {
        files::checksum(&self.contents[TOKENIZER])
    }

    pub(crate) fn cuts(&self) -> Cuts {
        self.cuts
    }

    /// The tokens of a text alone, special ones taken for text.
    pub(crate) fn encode(&self, text: &str) -> Outcome<Vec<u32>> {
        self.tokens(text, false)
    }

    /// The tokens of a text that goes on where another ends.
    pub(crate) fn encode_behind(&self, text: &str) -> Outcome<Vec<u32>> {
        if !self.adds_space || text.is_empty() {
            return self.encode(text);
        }
        // The space that it puts there is the text's own.
        if let Some(rest) = text.strip_prefix(' ')
            && rest.starts_with(|next: char| !next.is_whitespace())
        {
            return self.encode(rest);
        }
        let before = self.encode("\n")?;
        let both = self.encode(&format!("\n{text}"))?;
        both.strip_prefix(before.as_slice()).map_or_else(|| self.encode(text), |of| Ok(of.into()))
    }

    /// The tokens of a prompt, special ones and those that a text begins with among them.
    pub(crate) fn encode_prompt(&self, text: &str) -> Outcome<Vec<u32>> {
        let encoder = self.of_prompts.get_or_init(|| {
            let mut encoder = self.of_documents.clone();
            encoder.set_encode_special_tokens(false);
            encoder
        });
        let tokens = encoder.encode_fast(text, false).map_err(failed)?.get_ids().to_vec();
        // Chat templates write them out.
        let is_begun = tokens.starts_with(&self.begin);
        Ok(if is_begun { tokens } else { [&self.begin[..], &tokens].concat() })
    }

    fn tokens(&self, text: &str, special: bool) -> Outcome<Vec<u32>> {
        let encoding = self.of_documents.encode_fast(text, special).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The bytes that a token stands for in the middle of a text, or what it is called where only
    /// the decoder knows them; none for one that the tokenizer does not have.
    pub(crate) fn bytes(&self, token: u32) -> Vec<u8> {
        self.name(token).map_or_else(Vec::new, |name| self.spelling.bytes(&name))
    }

    /// Whether [`Self::bytes`] are those of the text.
    pub(crate) fn knows_bytes(&self) -> bool {
        self.spelling != Spelling::Other
    }

    /// The text of tokens.
    pub(crate) fn decode(&self, tokens: &[u32]) -> String {
        self.of_documents.decode(tokens, false).unwrap_or_default()
    }

    /// What a token is called in the file.
    pub(crate) fn name(&self, token: u32) -> Option<String> {
        self.of_documents.id_to_token(token)
    }

    /// The token of that name.
    pub(crate) fn token(&self, name: &str) -> Option<u32> {
        self.of_documents.token_to_id(name)
    }

    /// What is done to a text before it is split.
    pub(crate) fn normalizers(&self) -> Vec<Value> {
        let of = serde_json::to_value(self.of_documents.get_normalizer());
        parts(&of.expect("it was JSON"), "normalizers").into_iter().cloned().collect()
    }

    /// How a text is split.
    pub(crate) fn splits(&self) -> Vec<Value> {
        let of = serde_json::to_value(self.of_documents.get_pre_tokenizer());
        parts(&of.expect("it was JSON"), "pretokenizers").into_iter().cloned().collect()
    }

    /// A file that lies beside it; null where there is none.
    pub(crate) fn beside(&self, name: &str) -> Outcome<Value> {
        match self.contents.get(name) {
            Some(bytes) => files::parse_json(&self.dir().join(name), bytes),
            None => Ok(Value::Null),
        }
    }

    fn end(&self, token: u32) -> End {
        let added = self.of_documents.get_added_vocabulary().get_added_tokens_decoder();
        End { token, mark: added.get(&token).map(|token| token.content.clone()) }
    }

    /// The token of a name, or of the text that is one token.
    fn end_called(&self, name: &str) -> Outcome<End> {
        let token = match (self.of_documents.token_to_id(name), &self.encode_behind(name)?[..]) {
            (Some(token), _) | (None, &[token]) => token,
            (None, tokens) => {
                return Err(Failure::usage(format!(
                    "--end-of-text: expected one token of {}, found {} in {name:?}",
                    self.path.display(),
                    tokens.len()
                )));
            }
        };
        Ok(self.end(token))
    }

    /// What the files beside it say, else a token that is called as such are.
    fn end_of_files(&self, is_alone: bool) -> Outcome<Option<End>> {
        let id = |name: &str| self.of_documents.token_to_id(name);
        let config = self.beside(TOKENIZER_CONFIG)?;
        // With its properties, in older files.
        let called = &config["eos_token"];
        let called = called.as_str().or_else(|| called["content"].as_str());
        if let Some(token) = called.and_then(id) {
            return Ok(Some(self.end(token)));
        }
        let of_model = match is_alone {
            true => None,
            false => files::read_json(&self.dir().join("config.json"))?,
        };
        for config in [of_model.unwrap_or_default(), self.beside(GENERATION)?] {
            let ids = &config["eos_token_id"];
            let token = ids.as_u64().or_else(|| ids[0].as_u64());
            if let Some(token) = token.filter(|token| *token < self.vocab_size as u64) {
                return Ok(Some(self.end(token as u32)));
            }
        }
        Ok(USUAL_ENDS.into_iter().find_map(id).map(|token| self.end(token)))
    }
}

fn failed(error: tokenizers::Error) -> Failure {
    Failure::usage(format!("{TOKENIZER}: cannot encode a text: {error}"))
}

/// The file that a user names, or the one in the folder.
fn find(path: &Path) -> Outcome<PathBuf> {
    let dir = Model::folder_of(path);
    if !dir.is_dir() {
        if !path.exists() {
            return Err(Failure::usage(format!(
                "{}: no such file or folder; expected bytes, gpt2, or the path of a tokenizer.json \
                 or of a folder that has one",
                path.display()
            )));
        }
        if path.extension().is_some_and(|end| end == "model") {
            return Err(of_sentence_piece(path, path.parent().unwrap_or(path)));
        }
        return Ok(path.to_owned());
    }
    let file = dir.join(TOKENIZER);
    if file.exists() {
        return Ok(file);
    }
    let of_others = dir.join("tokenizer.model");
    if of_others.exists() {
        return Err(of_sentence_piece(&of_others, &dir));
    }
    Err(Failure::usage(format!(
        "{}: no tokenizer.json in this folder; fetch it with the model, or make it with \
         save_pretrained of transformers' AutoTokenizer",
        path.display()
    )))
}

/// A failure for a SentencePiece file, with the line that makes a `tokenizer.json` of it.
pub(crate) fn of_sentence_piece(path: &Path, dir: &Path) -> Failure {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir }.display();
    Failure::usage(format!(
        "{}: a SentencePiece model, which is not read; make a tokenizer.json of it: python3 -c \
         \"from transformers import AutoTokenizer as T; \
         T.from_pretrained('{dir}').save_pretrained('{dir}')\"",
        path.display()
    ))
}

/// The files of a folder that go where its tokenizer goes.
fn beside(dir: &Path) -> Outcome<BTreeMap<String, Vec<u8>>> {
    let named = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let mut contents = BTreeMap::new();
    for entry in fs::read_dir(named).map_err(Failure::io("read", named))? {
        let entry = entry.map_err(Failure::io("read", named))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = dir.join(&name);
        if (BESIDE.contains(&&*name) || name.starts_with(CHAT_TEMPLATE)) && path.is_file() {
            let bytes = files::read(&path).map_err(Failure::io("read", &path))?;
            files::check_fetched(&path, &bytes)?;
            contents.insert(name, bytes);
        }
    }
    Ok(contents)
}

/// The parts of a sequence of normalizers and the like, or the only one.
fn parts<'v>(value: &'v Value, of_sequence: &str) -> Vec<&'v Value> {
    match value[of_sequence].as_array() {
        Some(parts) => parts.iter().flat_map(|part| self::parts(part, of_sequence)).collect(),
        None if value.is_null() => Vec::new(),
        None => vec![value],
    }
}

impl Spelling {
    fn of(decoder: &Value) -> Self {
        let parts = parts(decoder, "decoders");
        let is = |part: &&Value, name: &str| part["type"] == name;
        let is_space = |part: &&Value| {
            let replaces = is(part, "Replace")
                && (&part["pattern"]["String"], &part["content"])
                    == (&"\u{2581}".into(), &" ".into());
            replaces || (is(part, "Metaspace") && part["replacement"] == "\u{2581}")
        };
        let is_known = |part: &&Value| {
            is_space(part) || ["ByteFallback", "Fuse", "Strip"].iter().any(|name| is(part, name))
        };
        if parts.iter().any(|part| is(part, "ByteLevel")) {
            Self::Bytes
        } else if parts.iter().any(is_space) && parts.iter().all(is_known) {
            Self::Spaces { byte_fallback: parts.iter().any(|part| is(part, "ByteFallback")) }
        } else {
            Self::Other
        }
    }

    fn bytes(self, name: &str) -> Vec<u8> {
        match self {
            Self::Bytes => {
                // What has other characters was added as it is.
                let bytes: Option<_> = name.chars().map(|c| BYTES.get(&c).copied()).collect();
                bytes.unwrap_or_else(|| name.into())
            }
            Self::Spaces { byte_fallback } => {
                let byte = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                let byte = byte.filter(|digits| byte_fallback && digits.len() == 2);
                match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => name.replace('\u{2581}', " ").into_bytes(),
                }
            }
            Self::Other => name.into(),
        }
    }
}

/// The character of a byte in the alphabet of GPT-2's files: a byte that is a visible Latin-1
/// character is that, the others are the characters from U+0100 on, in their order.
pub(crate) fn spelled(byte: u8) -> char {
    let visible = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match visible(&byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|byte| !visible(byte)).count() as u32;
            char::from_u32(0x100 + before).expect("there are 68 of them, far below the surrogates")
        }
    }
}

static BYTES: LazyLock<HashMap<char, u8>> =
    LazyLock::new(|| (0..=255).map(|byte| (spelled(byte), byte)).collect());

/// Alternatives of splitting patterns, in which a space behind a visible character is never inside
/// a match, and nothing looks back or tells the end of a text from a space. So such a space always
/// begins a match, which is the same whatever stands before it, as is what stands before it.
const ALTERNATIVES: [&str; 24] = [
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'(?:[sdmt]|ll|ve|re)",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r" ?\p{L}+",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}",
    r"\p{N}+",
    r"\p{N}{1,3}",
    r"\s*[\r\n]+",
    r"\s*[\r\n]",
    r"\s+(?!\S)",
    r"\s+",
];

impl Cuts {
    fn of(normalizer: &Value, pre_tokenizer: &Value, encoder: &Encoder) -> Self {
        // A space is composed with nothing.
        let is_plain = parts(normalizer, "normalizers").iter().all(|part| part["type"] == "NFC");
        let parts = parts(pre_tokenizer, "pretokenizers");
        // What is found before the text is split must not have a cut inside, or look over it.
        let added = encoder.get_added_vocabulary().get_added_tokens_decoder();
        let crosses = added.values().any(|token| {
            let content = token.content.as_str();
            let behind = |(at, _): (usize, char)| !content[..at].trim_end().is_empty();
            (!token.special && (token.rstrip || token.single_word))
                || content.char_indices().filter(|(_, c)| c.is_whitespace()).any(behind)
        });
        if !is_plain || parts.is_empty() || crosses {
            return Self::Nowhere;
        }
        let of_part = |part: &&Value| match part["type"].as_str() {
            Some("Digits") => Self::Whitespace,
            Some("ByteLevel") if part["add_prefix_space"] == false => Self::Whitespace,
            Some("Split") => match part["pattern"]["Regex"].as_str() {
                Some(pattern)
                    if [("Isolated", false), ("Removed", true)].iter().any(|(how, invert)| {
                        part["behavior"] == *how && part["invert"] == *invert
                    }) && alternatives(pattern).iter().all(|a| ALTERNATIVES.contains(a)) =>
                {
                    Self::Spaces
                }
                _ => Self::Nowhere,
            },
            _ => Self::Nowhere,
        };
        let of_parts: Vec<_> = parts.iter().map(of_part).collect();
        let splits_as_gpt2 =
            parts.iter().any(|part| part["type"] == "ByteLevel" && part["use_regex"] != false);
        match of_parts.contains(&Self::Spaces) {
            _ if of_parts.contains(&Self::Nowhere) => Self::Nowhere,
            true => Self::Spaces,
            false if splits_as_gpt2 => Self::Whitespace,
            false => Self::Nowhere,
        }
    }

    /// The last place where `text` can be cut.
    pub(crate) fn last_in(self, text: &str) -> Option<usize> {
        let places: &[char] = match self {
            Self::Whitespace => &[' ', '\n'],
            Self::Spaces => &[' '],
            Self::Nowhere => return None,
        };
        let visible_before = |at: &usize| {
            text[..*at].chars().next_back().is_some_and(|before| !before.is_whitespace())
        };
        text.rmatch_indices(places).map(|(at, _)| at).find(visible_before)
    }
}

/// The last space in `text` between two visible characters, where it costs a token or so at most to
/// cut it where [`Cuts`] knows no place.
pub(crate) fn last_word(text: &str) -> Option<usize> {
    let is_between = |at: &usize| {
        let before = text[..*at].chars().next_back();
        let behind = text[at + 1..].chars().next();
        [before, behind].iter().all(|c| c.is_some_and(|c| !c.is_whitespace()))
    };
    text.rmatch_indices(' ').map(|(at, _)| at).find(is_between)
}

/// The alternatives of a regular expression, split where no group or class is open.
fn alternatives(pattern: &str) -> Vec<&str> {
    let (mut depth, mut is_class, mut is_escaped, mut first) = (0, false, false, 0);
    let mut found = Vec::new();
    for (at, c) in pattern.char_indices() {
        match c {
            _ if is_escaped => {
                is_escaped = false;
                continue;
            }
            '\\' => is_escaped = true,
            '[' => is_class = true,
            ']' => is_class = false,
            '(' if !is_class => depth += 1,
            ')' if !is_class => depth -= 1,
            '|' if !is_class && depth == 0 => {
                found.push(&pattern[first..at]);
                first = at + 1;
            }
            _ => {}
        }
    }
    found.push(&pattern[first..]);
    found
}

#[cfg(test)]
#[path = "../tests/common/tokenizers.rs"]
pub(crate) mod samples;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::tokenizer::{TextStream, Tokenizer};

    const TEXT: &str = "ROMEO:  O, she doth teach\n\n\t the torches'll burn…  bright 123 456!\u{a0} x\n \
                        naïve “語” 語語 🦀\r\n (end).\n<|im|> <|end|></s>";

    fn open(file: &Value) -> TokenizerFile {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(TOKENIZER), file.to_string()).unwrap();
        TokenizerFile::open(dir.path(), None).unwrap()
    }

    fn theirs(file: &Value) -> Encoder {
        file.to_string().parse().unwrap()
    }

    static ALL: LazyLock<Vec<(&str, Value)>> = LazyLock::new(|| {
        let mut never = samples::llama2();
        never["normalizer"] = Value::Null;
        never["pre_tokenizer"] = json!({
            "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first",
            "split": false,
        });
        vec![
            ("llama3", samples::llama3()),
            ("smol", samples::smol()),
            ("wide", samples::wide()),
            ("llama2", samples::llama2()),
            ("metaspace", never),
        ]
    });

    #[test]
    fn tokens_of_prompts_are_those_of_the_crate() {
        for (name, file) in ALL.iter() {
            let (ours, theirs) = (open(file), theirs(file));
            for text in [TEXT, "", " ", "x", "</s>x", "<|begin|>x<|im|>y", "<s>x", "\n\nx"] {
                let mut expected = theirs.encode(text, true).unwrap().get_ids().to_vec();
                // Twice, where it is written out.
                let is_doubled = !ours.begin().is_empty()
                    && expected.starts_with(&[ours.begin(), ours.begin()].concat());
                expected.drain(..usize::from(is_doubled));
                assert_eq!(ours.encode_prompt(text).unwrap(), expected, "{name}: {text:?}");
            }
            // What a file was last used with is no part of it.
            let mut used = file.clone();
            used["truncation"] = json!({
                "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0,
            });
            used["padding"] = json!({
                "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
            });
            let used = open(&used);
            for text in ["x", TEXT] {
                assert_eq!(used.encode(text).unwrap(), ours.encode(text).unwrap(), "{name}");
            }
            let mut literal = theirs.clone();
            literal.set_encode_special_tokens(true);
            let tokens = literal.encode(TEXT, false).unwrap().get_ids().to_vec();
            assert_eq!(ours.encode(TEXT).unwrap(), tokens, "{name}");
            assert!(tokens.iter().all(|token| !ours.begin().contains(token)), "{name}");
            assert!(ours.end_of_text().is_none_or(|end| !tokens.contains(&end)), "{name}");
        }
    }

    #[test]
    fn what_stands_before_a_text_and_ends_it_is_known() {
        let known = |name| {
            let file = &ALL.iter().find(|(of, _)| *of == name).unwrap().1;
            let file = open(file);
            let end = file.end_of_text().unwrap();
            (file.begin().to_vec(), end, file.mark().unwrap().to_owned(), file.adds_space())
        };
        assert_eq!(known("smol"), (vec![], 0, "<|endoftext|>".into(), false));
        assert_eq!(known("wide"), (vec![], 70_001, "</s>".into(), false));
        assert_eq!(known("llama2"), (vec![1], 2, "</s>".into(), true));
        assert_eq!(known("metaspace"), (vec![1], 2, "</s>".into(), true));
    }

    #[test]
    fn the_token_that_ends_a_text_is_looked_for_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let end = |name| TokenizerFile::open(dir.path(), name).map(|file| file.end_of_text());
        write(TOKENIZER, &samples::llama3().to_string());
        assert_eq!(end(None).unwrap(), None);
        write("config.json", r#"{"eos_token_id": 1}"#);
        assert_eq!(end(None).unwrap(), Some(1));
        fs::remove_file(dir.path().join("config.json")).unwrap();
        write(GENERATION, r#"{"eos_token_id": [2, 1]}"#);
        assert_eq!(end(None).unwrap(), Some(2));
        write("config.json", r#"{"eos_token_id": 0}"#);
        assert_eq!(end(None).unwrap(), Some(0));
        write(TOKENIZER_CONFIG, r#"{"eos_token": {"content": "<|end|>", "special": true}}"#);
        assert_eq!(end(None).unwrap(), Some(1));
        write(TOKENIZER_CONFIG, r#"{"eos_token": "<|im|>"}"#);
        assert_eq!(end(None).unwrap(), Some(2));
        // One that it does not have is none.
        write(TOKENIZER_CONFIG, r#"{"eos_token": "</s>"}"#);
        assert_eq!(end(None).unwrap(), Some(0));
        assert_eq!(end(Some("<|end|>")).unwrap(), Some(1));
        let message = end(Some("no such token")).unwrap_err().message;
        assert!(message.starts_with("--end-of-text: expected one token of "), "{message}");
        // The text of a token that is not special ends nothing by itself.
        let file = TokenizerFile::open(dir.path(), Some("\n")).unwrap();
        assert_eq!((file.bytes(file.end_of_text().unwrap()), file.mark()), (b"\n".into(), None));
    }

    #[test]
    fn streamed_text_is_the_text() {
        for (name, file) in ALL.iter() {
            let tokenizer = Tokenizer::File(Arc::new(open(file)));
            let tokens = tokenizer.encode(TEXT).unwrap();
            let streamed = |prompt: &[u32], tokens: &[u32]| {
                let mut stream = TextStream::behind(&tokenizer, prompt);
                let text: String = tokens.iter().map(|token| stream.push(*token)).collect();
                text + &stream.finish()
            };
            assert_eq!(streamed(tokenizer.begin(), &tokens), TEXT, "{name}");
            assert_eq!(theirs(file).decode(&tokens, false).unwrap(), TEXT, "{name}");
            let behind = tokenizer.encode_behind(TEXT).unwrap();
            assert_eq!(streamed(&tokens, &behind), TEXT, "{name}");
            let spaced = tokenizer.encode_behind(" word").unwrap();
            assert_eq!(streamed(&tokens, &spaced), " word", "{name}");
            assert_eq!(streamed(&tokens, &[90_000]), "", "{name}");
        }
    }

    /// A decoder that puts spaces between tokens.
    #[test]
    fn text_is_streamed_whose_tokens_depend_on_each_other() {
        let mut file = samples::llama2();
        file["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": false});
        file["model"]["vocab"] = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "##b": 4, "c": 5});
        file["model"]["merges"] = json!([]);
        let tokenizer = Tokenizer::File(Arc::new(open(&file)));
        let mut stream = TextStream::behind(&tokenizer, &[1, 3]);
        let text: String = [4, 5, 3, 4, 4, 4, 4, 5].map(|token| stream.push(token)).concat();
        assert_eq!(text + &stream.finish(), "b c abbbb c");
    }

    #[test]
    fn where_a_text_may_be_cut_is_known_of_patterns_that_are_known() {
        let cuts = |change: &dyn Fn(&mut Value), file: &Value| {
            let mut file = file.clone();
            change(&mut file);
            open(&file).cuts()
        };
        let [llama3, smol] = [samples::llama3(), samples::smol()];
        assert_eq!(cuts(&|_| (), &llama3), Cuts::Spaces);
        assert_eq!(cuts(&|_| (), &smol), Cuts::Whitespace);
        assert_eq!(cuts(&|_| (), &samples::llama2()), Cuts::Nowhere);
        let nfc = |file: &mut Value| file["normalizer"] = json!({"type": "NFC"});
        assert_eq!(cuts(&nfc, &llama3), Cuts::Spaces);
        let strip = |file: &mut Value| {
            file["normalizer"] = json!({"type": "Strip", "strip_left": true, "strip_right": true});
        };
        assert_eq!(cuts(&strip, &llama3), Cuts::Nowhere);
        let whole = |file: &mut Value| {
            file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+ \S+|\s+".into();
        };
        assert_eq!(cuts(&whole, &llama3), Cuts::Nowhere);
        // Nothing splits at spaces.
        let bytes = |file: &mut Value| {
            file["pre_tokenizer"] = file["pre_tokenizer"]["pretokenizers"][1].clone();
        };
        assert_eq!(cuts(&bytes, &llama3), Cuts::Nowhere);
        assert_eq!(cuts(&bytes, &smol), Cuts::Whitespace);
        for (content, rstrip, expected) in [
            ("  ", false, Cuts::Spaces),
            ("word", false, Cuts::Spaces),
            ("two words", false, Cuts::Nowhere),
            ("word", true, Cuts::Nowhere),
        ] {
            let add = |file: &mut Value| {
                let token = json!({
                    "id": 500, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": rstrip, "normalized": false, "special": false,
                });
                file["added_tokens"].as_array_mut().unwrap().push(token);
            };
            assert_eq!(cuts(&add, &llama3), expected, "{content:?} {rstrip}");
        }
    }

    static OPENED: LazyLock<Vec<(&str, Tokenizer)>> = LazyLock::new(|| {
        let open = |file: &Value| Tokenizer::File(Arc::new(open(file)));
        ALL.iter().map(|(name, file)| (*name, open(file))).collect()
    });

    /// At every place where a part of the text would be cut, known or not.
    fn cutting_keeps_the_tokens(text: &str) -> usize {
        let mut count = 0;
        for (name, tokenizer) in OPENED.iter() {
            let whole = tokenizer.encode(text).unwrap();
            for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
                let known = tokenizer.cut_point(&text[..end]);
                // What Llama 2's vocabulary joins are no words.
                let Some(at) = known.or_else(|| tokenizer.forced_cut(&text[..end])) else {
                    continue;
                };
                let mut parts = tokenizer.encode(&text[..at]).unwrap();
                parts.extend(tokenizer.encode_behind(&text[at..]).unwrap());
                assert_eq!(parts, whole, "{name}: {text:?} cut at {at}");
                count += 1;
            }
        }
        count
    }

    #[test]
    fn cutting_keeps_the_tokens_of_text() {
        // Tokens on which a wrong place would show.
        let vocabulary = &ALL[0].1["model"]["vocab"];
        assert!(vocabulary[".Ċ"].is_u64() && vocabulary["Ġthe"].is_u64());
        assert!(cutting_keeps_the_tokens(TEXT) > 300);
        assert!(cutting_keeps_the_tokens(include_str!("tokenizer_file.rs").split_at(900).0) > 1000);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

        #[test]
        fn cutting_keeps_the_tokens_of_any(text in "(\\PC|\\s|\\w|[!-/]|'(s|ll|t)| ){0,24}") {
            cutting_keeps_the_tokens(&text);
        }
    }

    #[test]
    fn alternatives_are_those_of_the_pattern() {
        assert_eq!(alternatives(samples::PATTERN).len(), 7);
        assert_eq!(alternatives(r"a|[|(]\||(b|c)"), ["a", r"[|(]\|", "(b|c)"]);
    }
}
