//! The files beside a checkpoint's weights that Hugging Face's and llama.cpp's programs look for:
//! the tokenizer and the settings of generation.
//!
//! A run carries those of the checkpoint that it begins with. Where there are none, it takes those
//! of the data's tokenizer over, or writes them where that is one of ours, so that
//! `AutoTokenizer.from_pretrained` gives the tokens that the model was trained on. What a user put
//! into the folder stays: `mxtrain.json` lists the files that came from here with their checksums,
//! and a file that is not on the list, or was changed since, is the user's. docs/hugging-face.md
//! says all that to users.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use mxfp4train::{Engine, Model};
use serde::ser::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::failure::{Failure, Outcome};
use crate::files;
use crate::run_file::RunFile;
use crate::tokenizer::{END_OF_TEXT_MARK, Kind, Named, Tokenizer};
use crate::tokenizer_file::{
    CHAT_TEMPLATE, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TokenizerFile, of_sentence_piece,
    spelled,
};
use crate::tokens_file::write_whole;

const VOCABULARY: &str = "vocab.json";
/// Files that only mean something together with the vocabulary.
const OF_TOKENIZER: [&str; 9] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    VOCABULARY,
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION,
];
/// Those of them that say which text a token is.
const VOCABULARIES: [&str; 4] = [TOKENIZER, VOCABULARY, "vocab.txt", "tokenizer.model"];

/// What is put beside a checkpoint's weights.
pub(crate) struct Files {
    /// By name.
    contents: BTreeMap<String, Vec<u8>>,
    /// What the user should know, a line each.
    pub(crate) notes: Vec<String>,
    /// The checkpoint that they come from, if they do.
    origin: Option<PathBuf>,
    /// How the run's data became tokens, where that is known.
    tokenizer: Option<Tokenizer>,
}

impl Files {
    /// Collects the files for a run on data made by `tokenizer` (where that is known), of a model
    /// with `context` positions: those of the checkpoint `origin` that it begins with, or new ones.
    pub(crate) fn new(
        origin: Option<&Path>,
        tokenizer: Option<Tokenizer>,
        context: usize,
    ) -> Outcome<Self> {
        let mut files = Self {
            contents: BTreeMap::new(),
            notes: Vec::new(),
            origin: None,
            tokenizer: tokenizer.clone(),
        };
        if let Some(origin) = origin {
            let of_origin = tokenizer_of(origin)?;
            match (&of_origin, &tokenizer) {
                (Some(found), Some(of_data))
                    if *found != Found::Ours(of_data.clone())
                        && !is_file_of(&origin.join(TOKENIZER), of_data) =>
                {
                    files.notes.push(format!(
                        "the text that {} was trained on became tokens by {found}, this run's data \
                         by {of_data}; its tokenizer files are not taken over",
                        origin.display()
                    ));
                }
                _ => {
                    files.contents = read_all(origin)?;
                    for (name, bytes) in &files.contents {
                        files::check_fetched(&origin.join(name), bytes)?;
                    }
                    files.origin = Some(origin.to_owned());
                }
            }
        }
        let has_tokenizer = files.contents.keys().any(|name| name != GENERATION);
        match tokenizer.filter(|_| !has_tokenizer) {
            None => {}
            Some(Tokenizer::File(of_data)) => {
                for (name, bytes) in of_data.contents() {
                    files.contents.entry(name.clone()).or_insert_with(|| bytes.clone());
                }
            }
            Some(ours) => {
                files.contents.insert(TOKENIZER.to_owned(), tokenizer_json(&ours).into_bytes());
                let config = tokenizer_config_json(&ours, context).into_bytes();
                files.contents.insert(TOKENIZER_CONFIG.to_owned(), config);
            }
        }
        Ok(files)
    }

    /// Puts the files into a checkpoint folder, of which `before` lists the files that an earlier
    /// run put there. Gives the list of those that are this run's.
    pub(crate) fn put(
        &mut self,
        dir: &Path,
        before: &BTreeMap<String, String>,
    ) -> Outcome<BTreeMap<String, String>> {
        let there = read_all(dir)?;
        let is_ours = |name: &str| {
            there.get(name).is_none_or(|bytes| before.get(name) == Some(&files::checksum(bytes)))
        };
        // Half of the user's tokenizer and half of another would be neither.
        let theirs =
            VOCABULARIES.into_iter().find(|name| there.contains_key(*name) && !is_ours(name));
        if let (Some(theirs), Some(tokenizer)) = (theirs, &self.tokenizer)
            && !is_file_of(&dir.join(theirs), tokenizer)
            && in_file(&dir.join(theirs))? != Some(Found::Ours(tokenizer.clone()))
        {
            self.notes.push(format!(
                "{} was there before this run and stays, but is not {tokenizer}, the tokenizer of \
                 this run's data",
                dir.join(theirs).display()
            ));
            self.contents.clear();
        }
        // Ours of a run before, which this one replaces: another tokenizer's would be left
        // otherwise.
        for name in there.keys().filter(|name| is_ours(name) && !self.contents.contains_key(*name))
        {
            let path = dir.join(name);
            fs::remove_file(&path).map_err(Failure::io("remove", &path))?;
        }
        let mut ours = BTreeMap::new();
        for (name, bytes) in self.contents.iter().filter(|(name, _)| is_ours(name)) {
            if there.get(name) != Some(bytes) {
                write_whole(&dir.join(name), bytes)?;
            }
            ours.insert(name.clone(), files::checksum(bytes));
        }
        Ok(ours)
    }

    /// The tokens that end a text of the run, as [`end_tokens`] of a checkpoint.
    pub(crate) fn end_tokens(&self, vocab_size: usize) -> Outcome<Vec<u32>> {
        let of_data = self.tokenizer.as_ref().and_then(Tokenizer::file).map(TokenizerFile::dir);
        end_tokens(self.origin.as_deref().or(of_data), self.tokenizer.as_ref(), vocab_size)
    }
}

/// Loads a model for a command that takes its folder. Whoever gives the name of a model on the hub,
/// or a file of the folder, is told what to give.
pub(crate) fn load(engine: &Engine, dir: &Path) -> Outcome<Model> {
    Model::load(engine, dir).map_err(|error| {
        let mut failure = Failure::from(error);
        if dir.is_file() {
            failure.message.push_str("; name the folder that it lies in");
        } else if !dir.exists() && is_name_on_hub(dir) {
            let name = dir.display();
            failure.message.push_str(&format!(
                "; a model of Hugging Face's hub has to be fetched first: `hf download {name} \
                 --local-dir FOLDER`"
            ));
        }
        failure
    })
}

/// Whether it may be a name such as `gpt2` or `openai-community/gpt2`.
fn is_name_on_hub(path: &Path) -> bool {
    let parts: Vec<_> = path.components().collect();
    let is_name = |part: &Component| match part {
        Component::Normal(name) => name.to_str().is_some_and(|name| {
            name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        }),
        _ => false,
    };
    (1..=2).contains(&parts.len()) && parts.iter().all(is_name)
}

/// How the text of a checkpoint became tokens, as far as its folder tells.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Found {
    /// A tokenizer that this program has, or reads.
    Ours(Tokenizer),
    /// One that it cannot read, in this file.
    Other(PathBuf),
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ours(tokenizer) => tokenizer.fmt(f),
            Self::Other(path) => write!(f, "the tokenizer in {}", path.display()),
        }
    }
}

/// The tokenizer of a checkpoint: what `mxtrain.json` says, else what its tokenizer files turn out
/// to be; `None` where there is neither.
pub(crate) fn tokenizer_of(checkpoint: &Path) -> Outcome<Option<Found>> {
    let dir = Model::folder_of(checkpoint);
    let kind = RunFile::read(checkpoint)?.and_then(|file| file.tokenizer);
    // A user may have changed the file since.
    let is_there = |kind: &Kind| match kind {
        Kind::File { crc32, .. } => {
            files::read(&dir.join(TOKENIZER)).is_ok_and(|bytes| files::checksum(&bytes) == *crc32)
        }
        Kind::Bytes | Kind::Gpt2 => true,
    };
    match kind.filter(is_there) {
        Some(kind) => Ok(Some(Found::Ours(kind.open(&dir)?))),
        None => in_folder(checkpoint),
    }
}

/// The tokenizer of a checkpoint where it is one of ours, for reports: no matter if its tokenizer
/// files cannot be read.
pub(crate) fn known_tokenizer(checkpoint: &Path) -> Outcome<Option<Kind>> {
    let of_run = RunFile::read(checkpoint)?.and_then(|file| file.tokenizer);
    Ok(of_run.or_else(|| match in_folder(checkpoint) {
        Ok(Some(Found::Ours(tokenizer))) => Some(tokenizer.kind()),
        _ => None,
    }))
}

/// The tokenizer of a checkpoint with a vocabulary of `vocab_size` tokens: the one that the user
/// names, else its own, which has to be one of ours.
pub(crate) fn tokenizer_to_read(
    checkpoint: &Path,
    named: Option<&Named>,
    vocab_size: usize,
) -> Outcome<Tokenizer> {
    // Hugging Face's GPT-2 models have its vocabulary, and no file of ours.
    let guess = || (vocab_size == Tokenizer::Gpt2.vocab_size()).then_some(Tokenizer::Gpt2);
    let tokenizer = match named {
        Some(named) => named.open(None)?,
        None => match tokenizer_of(checkpoint)? {
            Some(Found::Ours(tokenizer)) => tokenizer,
            Some(Found::Other(path)) if path.ends_with("tokenizer.model") => {
                return Err(of_sentence_piece(&path, &Model::folder_of(checkpoint)));
            }
            // With what is wrong with it.
            Some(Found::Other(path)) if path.ends_with(TOKENIZER) => {
                Tokenizer::File(Arc::new(TokenizerFile::open(&path, None)?))
            }
            Some(found @ Found::Other(_)) => {
                return Err(Failure::usage(format!(
                    "{found} is not GPT-2's, and others are read from a tokenizer.json, which is not \
                     there; make it with save_pretrained of transformers' AutoTokenizer, or say \
                     --tokenizer"
                )));
            }
            None => guess().ok_or_else(|| {
                Failure::usage(format!(
                    "--tokenizer is missing: {} does not say how its text became tokens",
                    checkpoint.display()
                ))
            })?,
        },
    };
    if tokenizer.vocab_size() > vocab_size {
        return Err(Failure::usage(format!(
            "--tokenizer: {tokenizer} has {} tokens, the checkpoint's vocabulary is {vocab_size}",
            tokenizer.vocab_size()
        )));
    }
    Ok(tokenizer)
}

/// The tokens that end a text of a checkpoint whose vocabulary has `vocab_size` tokens: what its
/// `generation_config.json`, else its `config.json` says, and what `tokenizer` puts between
/// documents.
pub(crate) fn end_tokens(
    checkpoint: Option<&Path>,
    tokenizer: Option<&Tokenizer>,
    vocab_size: usize,
) -> Outcome<Vec<u32>> {
    let mut tokens = Vec::new();
    let files = checkpoint.map(|dir| [GENERATION, "config.json"].map(|name| dir.join(name)));
    for path in files.iter().flatten() {
        let ids = match files::read_json(path)? {
            Some(Value::Object(mut config)) => config.remove("eos_token_id"),
            Some(_) => {
                let message = "expected a JSON object, found another value; fetch the file again";
                return Err(Failure::usage(message).within(path.display()));
            }
            None => None,
        };
        let ids = match ids {
            Some(Value::Array(ids)) => ids,
            Some(Value::Null) | None => continue,
            Some(id) => vec![id],
        };
        // Some write -1 for none.
        for id in ids.iter().filter(|id| id.as_i64().is_none_or(|id| id >= 0)) {
            let token = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
                let message = format!("eos_token_id: expected tokens, numbers from 0, found {id}");
                Failure::usage(message).within(path.display())
            })?;
            tokens.push(token);
        }
        break;
    }
    tokens.extend(tokenizer.and_then(Tokenizer::separator));
    tokens.sort_unstable();
    tokens.dedup();
    // A padded or edited configuration may name one that the model cannot draw.
    tokens.retain(|token| (*token as usize) < vocab_size);
    Ok(tokens)
}

/// What the tokenizer files of a folder turn out to be.
fn in_folder(dir: &Path) -> Outcome<Option<Found>> {
    let dir = Model::folder_of(dir);
    let path = VOCABULARIES.into_iter().map(|name| dir.join(name)).find(|path| path.is_file());
    path.map_or(Ok(None), |path| in_file(&path))
}

/// What one of [`VOCABULARIES`] turns out to be.
fn in_file(path: &Path) -> Outcome<Option<Found>> {
    let is = |name: &str| path.file_name().is_some_and(|file| file == name);
    if !is(TOKENIZER) && !is(VOCABULARY) {
        return Ok(Some(Found::Other(path.to_owned())));
    }
    let Some(file) = files::read_json(path)? else { return Ok(None) };
    let vocabulary = if is(VOCABULARY) { Some(&file) } else { byte_level_vocabulary(&file) };
    Ok(Some(match vocabulary.and_then(with_vocabulary) {
        Some(ours) => Found::Ours(ours),
        None if is(VOCABULARY) => Found::Other(path.to_owned()),
        // One that cannot be read is no reason not to go on with tokens that are there.
        None => match TokenizerFile::open(path, None) {
            Ok(file) => Found::Ours(Tokenizer::File(Arc::new(file))),
            Err(_) => Found::Other(path.to_owned()),
        },
    }))
}

/// The vocabulary of a `tokenizer.json`, where that is byte-level BPE as GPT-2's is.
fn byte_level_vocabulary(file: &Value) -> Option<&Value> {
    let model = &file["model"];
    // Old files do not say the type of a model that is BPE.
    let is_bpe = model["type"].is_null() || model["type"] == "BPE";
    let is_byte_level = file["pre_tokenizer"]["type"] == "ByteLevel";
    (is_bpe && is_byte_level).then(|| &model["vocab"])
}

/// Whether it is the very file that a tokenizer was read from, whatever else it may be taken for.
fn is_file_of(path: &Path, tokenizer: &Tokenizer) -> bool {
    let contents = tokenizer.file().and_then(|file| file.contents().get(TOKENIZER));
    contents.is_some_and(|contents| files::read(path).is_ok_and(|bytes| bytes == *contents))
}

/// The tokenizer that gives every token the number that it has in `vocabulary`, which may have
/// more.
fn with_vocabulary(vocabulary: &Value) -> Option<Tokenizer> {
    let vocabulary = vocabulary.as_object()?;
    let has = |(token, id): (String, u32)| {
        vocabulary.get(&token).and_then(Value::as_u64) == Some(id.into())
    };
    [Tokenizer::Gpt2, Tokenizer::Bytes]
        .into_iter()
        .filter(|tokenizer| match tokenizer {
            // A larger one has merges, which make other tokens of most texts.
            Tokenizer::Bytes => vocabulary.len() == tokenizer.vocab_size(),
            _ => vocabulary.len() >= tokenizer.vocab_size(),
        })
        .find(|tokenizer| Vocabulary(tokenizer).entries().all(has))
}

/// The files of [`OF_TOKENIZER`] and chat templates that a folder has.
fn read_all(dir: &Path) -> Outcome<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(Failure::io("read", dir))? {
        let entry = entry.map_err(Failure::io("read", dir))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        let wanted = OF_TOKENIZER.contains(&name.as_str()) || name.starts_with(CHAT_TEMPLATE);
        if wanted && path.is_file() {
            files.insert(name, files::read(&path).map_err(Failure::io("read", &path))?);
        }
    }
    Ok(files)
}

/// The files of [`read_all`] with their checksums.
pub(crate) fn listed(dir: &Path) -> Outcome<BTreeMap<String, String>> {
    Ok(read_all(dir)?.into_iter().map(|(name, bytes)| (name, files::checksum(&bytes))).collect())
}

/// The files of [`read_all`] that are as a list of names and checksums has them.
pub(crate) fn unchanged(dir: &Path, listed: &BTreeMap<String, String>) -> Vec<String> {
    let found = read_all(dir).unwrap_or_default().into_iter();
    let same = found.filter(|(name, bytes)| listed.get(name) == Some(&files::checksum(bytes)));
    same.map(|(name, _)| name).collect()
}

/// `tokenizer.json`: byte-level BPE. That of bytes has no merges, so a token is a byte.
fn tokenizer_json(tokenizer: &Tokenizer) -> String {
    let added: Vec<_> = (tokenizer.separator().into_iter())
        .map(|id| {
            json!({
                "id": id,
                "content": END_OF_TEXT_MARK,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": true,
                "special": true,
            })
        })
        .collect();
    let byte_level = |trim_offsets: bool| {
        json!({
            "type": "ByteLevel",
            "add_prefix_space": false,
            "trim_offsets": trim_offsets,
            "use_regex": true,
        })
    };
    let file = Document {
        version: "1.0",
        truncation: (),
        padding: (),
        added_tokens: added,
        normalizer: (),
        pre_tokenizer: byte_level(true),
        post_processor: byte_level(false),
        decoder: byte_level(true),
        model: ModelPart {
            kind: "BPE",
            dropout: (),
            unk_token: (),
            continuing_subword_prefix: "",
            end_of_word_suffix: "",
            fuse_unk: false,
            byte_fallback: false,
            vocab: Vocabulary(tokenizer),
            merges: merges(tokenizer),
        },
    };
    serde_json::to_string_pretty(&file).expect("plain data becomes JSON") + "\n"
}

/// `tokenizer_config.json`, what `AutoTokenizer` makes of the file above.
fn tokenizer_config_json(tokenizer: &Tokenizer, context: usize) -> String {
    let mut config = json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        // Decoded text is the text that was encoded, blanks before punctuation included.
        "clean_up_tokenization_spaces": false,
        // Without token types, which GPT-2 would add to its embeddings.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    if *tokenizer == Tokenizer::Gpt2 {
        config["tokenizer_class"] = "GPT2Tokenizer".into();
        for token in ["bos_token", "eos_token", "unk_token"] {
            config[token] = END_OF_TEXT_MARK.into();
        }
    }
    format!("{config:#}\n")
}

/// How GPT-2's separator is written.
#[derive(serde::Serialize)]
struct Document<'t> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Value>,
    normalizer: (),
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: ModelPart<'t>,
}

#[derive(serde::Serialize)]
struct ModelPart<'t> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: (),
    unk_token: (),
    continuing_subword_prefix: &'static str,
    end_of_word_suffix: &'static str,
    fuse_unk: bool,
    byte_fallback: bool,
    vocab: Vocabulary<'t>,
    /// Two parts with a space between them, which readers of every age take.
    merges: Vec<String>,
}

/// The tokens of a tokenizer in the byte-level alphabet, in the order of their numbers.
struct Vocabulary<'t>(&'t Tokenizer);

impl Vocabulary<'_> {
    fn entries(&self) -> impl Iterator<Item = (String, u32)> {
        let Self(tokenizer) = *self;
        let separator = tokenizer.separator();
        (0..tokenizer.vocab_size() as u32).map(move |id| match separator {
            Some(separator) if id == separator => (END_OF_TEXT_MARK.to_owned(), id),
            _ => (alphabet(&tokenizer.bytes(id)), id),
        })
    }
}

impl Serialize for Vocabulary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.entries())
    }
}

/// The tokens of a tokenizer in the byte-level alphabet, in the order of their numbers.
pub(crate) fn vocabulary(tokenizer: &Tokenizer) -> Vec<String> {
    Vocabulary(tokenizer).entries().map(|(token, _)| token).collect()
}

/// A token that was added to a tokenizer.
#[derive(serde::Deserialize)]
pub(crate) struct AddedToken {
    pub(crate) id: usize,
    pub(crate) content: String,
    /// Whether it is none of a text's.
    #[serde(rename = "special")]
    pub(crate) is_special: bool,
}

/// Those of the `tokenizer.json` of a checkpoint; none where there is no such file.
pub(crate) fn added_tokens(checkpoint: &Path) -> Outcome<Vec<AddedToken>> {
    #[derive(serde::Deserialize)]
    struct Added {
        #[serde(default)]
        added_tokens: Vec<AddedToken>,
    }
    let path = Model::folder_of(checkpoint).join(TOKENIZER);
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let text = files::read(&path).map_err(Failure::io("read", &path))?;
    files::check_fetched(&path, &text)?;
    Ok(files::parse_json::<Added>(&path, &text)?.added_tokens)
}

/// The merges of a byte-pair encoding, in their order.
///
/// The vocabulary is in the order in which training made the tokens, so the merge that made a token
/// is what is left to do once its bytes are merged by all earlier ones.
pub(crate) fn merges(tokenizer: &Tokenizer) -> Vec<String> {
    let tokens: Vec<_> = (0..tokenizer.vocab_size() as u32)
        .filter(|id| tokenizer.separator() != Some(*id))
        .map(|id| tokenizer.bytes(id))
        .collect();
    let ranks: HashMap<&[u8], usize> =
        tokens.iter().enumerate().map(|(rank, token)| (token.as_slice(), rank)).collect();
    let mut merges = Vec::new();
    for (rank, token) in tokens.iter().enumerate().filter(|(_, token)| token.len() > 1) {
        // Where the parts begin, and the end.
        let mut cuts: Vec<usize> = (0..=token.len()).collect();
        let next = |cuts: &[usize]| {
            (0..cuts.len().saturating_sub(2))
                .filter_map(|i| Some((*ranks.get(&token[cuts[i]..cuts[i + 2]])?, i)))
                .filter(|(merged, _)| *merged < rank)
                .min()
        };
        while let Some((_, i)) = next(&cuts) {
            cuts.remove(i + 1);
        }
        let parts: Vec<_> = cuts.windows(2).map(|cut| alphabet(&token[cut[0]..cut[1]])).collect();
        merges.push(parts.join(" "));
    }
    merges
}

/// Bytes in the byte-level alphabet of GPT-2's files.
fn alphabet(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| spelled(*byte)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static GPT2: LazyLock<tokenizers::Tokenizer> =
        LazyLock::new(|| tokenizers_own(&Tokenizer::Gpt2));
    static BYTES: LazyLock<tokenizers::Tokenizer> =
        LazyLock::new(|| tokenizers_own(&Tokenizer::Bytes));

    fn tokenizers_own(tokenizer: &Tokenizer) -> tokenizers::Tokenizer {
        tokenizer_json(tokenizer).parse().unwrap()
    }

    /// Their tokens of a text are ours, and their text of these tokens is the text.
    fn agree(text: &str) {
        for (ours, theirs) in [(Tokenizer::Gpt2, &*GPT2), (Tokenizer::Bytes, &*BYTES)] {
            let encoded = theirs.encode(text, true).unwrap();
            // Nothing has no tokens; as a prompt it begins a text.
            let expected = if text.is_empty() { vec![] } else { ours.encode_prompt(text).unwrap() };
            assert!(encoded.get_ids() == expected, "{ours}: other tokens of {text:?}");
            assert!(theirs.decode(&expected, false).unwrap() == text, "{ours}: not {text:?}");
        }
    }

    #[test]
    fn every_token_but_bytes_has_one_merge_of_two_parts() {
        let merges = merges(&Tokenizer::Gpt2);
        assert_eq!(merges.len(), 50_000);
        assert!(merges.iter().all(|merge| merge.split(' ').count() == 2));
        assert_eq!(merges[..4], ["Ġ t", "Ġ a", "h e", "i n"]);
        assert!(super::merges(&Tokenizer::Bytes).is_empty());
    }

    #[test]
    fn hugging_faces_tokenizer_gives_our_tokens_of_real_text() {
        for text in [
            include_str!("hugging_face.rs"),
            include_str!("../../../README.md"),
            "",
            " ",
            "\n\n \n\t \r\n x",
            "<|endoftext|>It was. <|endoftext|> \n<|endoftext|><|endoftext|>",
            "I've we'LL 'tis '' ’s 3.14159 1e-5 ２３ Ⅷ",
            "naïve façade — “quotes” … 語彙は重要です 한국어 العربية हिन्दी ไทย",
            "🦀🇩🇪👩‍👩‍👧‍👦 \u{200d}\u{feff}\u{0}\u{7f}\u{a0}\u{2003}\u{3000}x",
        ] {
            agree(text);
        }
        assert_eq!(GPT2.token_to_id(END_OF_TEXT_MARK), Some(50256));
        assert_eq!(GPT2.get_vocab_size(true), 50257);
        assert_eq!(BYTES.get_vocab_size(true), 256);
    }

    proptest! {
        #[test]
        fn hugging_faces_tokenizer_gives_our_tokens(text in "\\PC{0,60}|(\\s|\\w|[!-/]|'(s|ll|t))*") {
            agree(&text);
        }

        #[test]
        fn of_any_characters(text in proptest::collection::vec(any::<char>(), 0..60)) {
            agree(&text.into_iter().collect::<String>());
        }
    }

    #[test]
    fn tokenizers_are_told_by_their_vocabulary() {
        let dir = tempfile::tempdir().unwrap();
        let found = || tokenizer_of(dir.path()).unwrap();
        assert_eq!(found(), None);
        for tokenizer in [Tokenizer::Bytes, Tokenizer::Gpt2] {
            fs::write(dir.path().join(TOKENIZER), tokenizer_json(&tokenizer)).unwrap();
            assert_eq!(found(), Some(Found::Ours(tokenizer)));
        }
        let mut changed: Value = serde_json::from_str(&tokenizer_json(&Tokenizer::Gpt2)).unwrap();
        changed["model"]["vocab"]["Ġthe"] = 5.into();
        fs::write(dir.path().join(TOKENIZER), changed.to_string()).unwrap();
        // With two tokens of one number it is another tokenizer.
        assert!(matches!(found(), Some(Found::Ours(Tokenizer::File(_)))));
        fs::remove_file(dir.path().join(TOKENIZER)).unwrap();
        let vocabulary = serde_json::to_string(&Vocabulary(&Tokenizer::Gpt2)).unwrap();
        fs::write(dir.path().join(VOCABULARY), vocabulary).unwrap();
        assert_eq!(found(), Some(Found::Ours(Tokenizer::Gpt2)));
        fs::write(dir.path().join(VOCABULARY), "{").unwrap();
        assert!(tokenizer_of(dir.path()).unwrap_err().message.contains("vocab.json: EOF"));
    }

    #[test]
    fn a_pointer_of_git_lfs_is_no_tokenizer() {
        let dir = tempfile::tempdir().unwrap();
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
        for name in OF_TOKENIZER {
            let path = dir.path().join(name);
            fs::write(&path, pointer).unwrap();
            let message = Files::new(Some(dir.path()), None, 8).map(|_| ()).unwrap_err().message;
            assert!(message.contains(&format!("{name}: a Git LFS pointer")), "{message}");
            assert!(message.contains("`git lfs pull`"), "{message}");
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn what_ends_a_text_is_what_the_folder_says_and_the_separator() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let end = |tokenizer| end_tokens(Some(dir.path()), tokenizer, 50_257).unwrap();
        assert!(end(None).is_empty());
        write("config.json", r#"{"eos_token_id": 7}"#);
        assert_eq!(end(None), [7]);
        assert_eq!(end(Some(&Tokenizer::Gpt2)), [7, 50_256]);
        write(GENERATION, r#"{"eos_token_id": null}"#);
        assert_eq!(end(Some(&Tokenizer::Bytes)), [7]);
        write(GENERATION, r#"{"eos_token_id": [3, 50257, 3, 2]}"#);
        assert_eq!(end(None), [2, 3]);
        write(GENERATION, r#"{"eos_token_id": -1}"#);
        assert!(end(None).is_empty());
        write(GENERATION, r#"{"eos_token_id": "x"}"#);
        let message = end_tokens(Some(dir.path()), None, 9).unwrap_err().message;
        assert!(message.contains("generation_config.json: eos_token_id: expected"), "{message}");
        for text in ["[]", "7", "\"x\"", "null"] {
            write(GENERATION, text);
            let message = end_tokens(Some(dir.path()), None, 9).unwrap_err().message;
            assert!(
                message.contains("generation_config.json: expected a JSON object"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_users_files_stay_and_those_of_an_earlier_run_go() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let names = || read_all(dir).unwrap().into_keys().collect::<Vec<_>>();
        let run = |tokenizer, before: &BTreeMap<_, _>| {
            let mut files = Files::new(None, Some(tokenizer), 8).unwrap();
            let ours = files.put(dir, before).unwrap();
            (ours, files.notes)
        };
        let is = |tokenizer| in_folder(dir).unwrap() == Some(Found::Ours(tokenizer));
        let (first, notes) = run(Tokenizer::Gpt2, &BTreeMap::new());
        assert_eq!(names(), [TOKENIZER, TOKENIZER_CONFIG]);
        assert!(is(Tokenizer::Gpt2) && notes.is_empty());
        // Another run into the folder, which an earlier one made.
        let (second, notes) = run(Tokenizer::Bytes, &first);
        assert!(is(Tokenizer::Bytes) && notes.is_empty());
        // A changed file is the user's; the rest of the tokenizer is still ours.
        fs::write(dir.join(TOKENIZER_CONFIG), "{}").unwrap();
        let (third, notes) = run(Tokenizer::Bytes, &second);
        assert_eq!(third.keys().collect::<Vec<_>>(), [TOKENIZER]);
        assert_eq!(fs::read(dir.join(TOKENIZER_CONFIG)).unwrap(), b"{}");
        assert!(notes.is_empty());
        // A tokenizer of the user's is not mixed with another.
        fs::write(dir.join(TOKENIZER), tokenizer_json(&Tokenizer::Gpt2)).unwrap();
        let (fourth, notes) = run(Tokenizer::Bytes, &third);
        assert!(fourth.is_empty() && is(Tokenizer::Gpt2));
        assert!(notes[0].contains("was there before this run and stays"), "{notes:?}");
    }
}
