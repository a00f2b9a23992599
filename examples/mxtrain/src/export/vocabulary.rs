//! The tokens of a model as llama.cpp knows them.
//!
//! llama.cpp has no patterns in its files: it knows some by name, which it compiles in, and here
//! they are recognised by themselves. A vocabulary of SentencePiece is a list of scores there,
//! where a `tokenizer.json` has a list of merges, which says more; it is written where the scores
//! say the same.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use mxfp4train::Model;
use serde_json::Value as Json;

use super::gguf::Value;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::hugging_face::{AddedToken, added_tokens, end_tokens, merges, vocabulary};
use crate::tokenizer::Tokenizer;
use crate::tokenizer_file::{CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, TokenizerFile};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;
/// What stands for a space in SentencePiece's tokens.
const SPACE: char = '\u{2581}';

/// How Llama 3's splits texts.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Patterns that llama.cpp knows: how a file writes one, whether a piece that is a token is one
/// whatever the merges say, and its name.
///
/// NOTE: llama.cpp has the pattern of Llama 3 under several names, of which only `llama-bpe` and
/// its like take whole pieces.
const PATTERNS: [(&str, bool, &str); 5] = [
    (LLAMA3, true, "llama-bpe"),
    (LLAMA3, false, "smaug-bpe"),
    (
        concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        false,
        "qwen2",
    ),
    (
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        true,
        "tekken",
    ),
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", false, "gpt-2"),
];

/// The tokens of a vocabulary, and what they are.
struct Vocabulary {
    /// How llama.cpp makes tokens of a text.
    model: &'static str,
    /// Its name of the pattern that splits it.
    pre: &'static str,
    tokens: Vec<String>,
    kinds: Vec<i32>,
    /// Of `llama`.
    scores: Vec<f32>,
    /// Of `gpt2`.
    merges: Vec<String>,
    /// Whether a space is put before a text; of `llama`.
    adds_space: bool,
}

/// Tokens that llama.cpp knows by what they are for.
struct Special {
    /// The token before a text, and whether it is put there.
    begin: u32,
    is_begun: bool,
    end: u32,
    unknown: Option<u32>,
    padding: Option<u32>,
    chat_template: Option<String>,
}

/// The keys of a file for the tokens of a checkpoint's model.
pub(crate) fn keys(
    checkpoint: &Path,
    vocab_size: usize,
    tokenizer: &Tokenizer,
) -> Outcome<Vec<(String, Value)>> {
    let ends = end_tokens(Some(checkpoint), Some(tokenizer), vocab_size)?;
    let (vocabulary, special) = match tokenizer.file() {
        Some(file) => (of_file(file, vocab_size)?, special(file, checkpoint, vocab_size)?),
        None => {
            // NOTE: token 11 ends a text of llama.cpp's where none is named. No text of bytes has
            // the token 0, unless it is no text.
            let end = tokenizer.separator().or_else(|| ends.first().copied()).unwrap_or(0);
            let special = Special {
                begin: end,
                is_begun: false,
                end,
                unknown: None,
                padding: None,
                chat_template: None,
            };
            (of_ours(checkpoint, vocab_size, tokenizer)?, special)
        }
    };
    let text = |text: &str| Value::Text(text.to_owned());
    let mut keys = vec![
        ("model", text(vocabulary.model)),
        ("pre", text(vocabulary.pre)),
        ("tokens", Value::Texts(vocabulary.tokens)),
        ("token_type", Value::Numbers(vocabulary.kinds)),
    ];
    if vocabulary.model == "llama" {
        keys.push(("scores", Value::Floats(vocabulary.scores)));
        keys.push(("add_space_prefix", Value::Bool(vocabulary.adds_space)));
    } else {
        keys.push(("merges", Value::Texts(vocabulary.merges)));
    }
    keys.extend([
        ("bos_token_id", Value::U32(special.begin)),
        ("eos_token_id", Value::U32(special.end)),
        // A prompt is the tokens of its text, and what stands before a text.
        ("add_bos_token", Value::Bool(special.is_begun)),
        ("add_eos_token", Value::Bool(false)),
    ]);
    let token = |name, token: Option<u32>| token.map(|token| (name, Value::U32(token)));
    keys.extend(token("unknown_token_id", special.unknown));
    keys.extend(token("padding_token_id", special.padding));
    // A checkpoint may name another end beside the tokenizer's.
    keys.extend(token("eot_token_id", ends.into_iter().find(|token| *token != special.end)));
    let named = keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
    let template = special.chat_template.map(Value::Text);
    Ok(named.chain(template.map(|of| ("tokenizer.chat_template".to_owned(), of))).collect())
}

/// Those of GPT-2 or of bytes.
fn of_ours(checkpoint: &Path, vocab_size: usize, tokenizer: &Tokenizer) -> Outcome<Vocabulary> {
    let mut tokens = vocabulary(tokenizer);
    let mut kinds = vec![NORMAL; tokens.len()];
    if let Some(separator) = tokenizer.separator() {
        kinds[separator as usize] = CONTROL;
    }
    // Texts have to differ, of tokens that a vocabulary is padded with, too.
    for id in tokens.len()..vocab_size {
        tokens.push(padding(id));
        kinds.push(UNUSED);
    }
    for added in added_tokens(checkpoint)? {
        let is_new = !tokens.contains(&added.content);
        if let (Some(token), Some(kind), true) =
            (tokens.get_mut(added.id), kinds.get_mut(added.id), is_new)
        {
            *token = added.content;
            *kind = if added.is_special { CONTROL } else { USER_DEFINED };
        }
    }
    Ok(Vocabulary {
        model: "gpt2",
        pre: "gpt-2",
        tokens,
        kinds,
        scores: Vec::new(),
        merges: merges(tokenizer),
        adds_space: false,
    })
}

fn padding(id: usize) -> String {
    format!("[PAD{id}]")
}

/// What a `tokenizer.json` says of a model.
#[derive(serde::Deserialize)]
struct Description {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: Bpe,
}

#[derive(serde::Deserialize)]
struct Bpe {
    /// Old files do not say it of BPE.
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    dropout: Option<f32>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    merges: Vec<Merge>,
}

/// Two tokens that become one.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    /// With a space between them, of files before transformers 4.45.
    Line(String),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Line(line) => line.split_once(' '),
        }
    }
}

/// Those of a `tokenizer.json`.
fn of_file(file: &TokenizerFile, vocab_size: usize) -> Outcome<Vocabulary> {
    let Description { added_tokens, model } =
        files::parse_json(file.path(), &file.contents()[TOKENIZER])?;
    if let Some(kind) = model.kind.as_ref().filter(|kind| *kind != "BPE") {
        return Err(unknown(file, &format!("a model of the type {kind}")));
    }
    let is_plain = |part: &Option<String>| part.as_ref().is_none_or(String::is_empty);
    if !is_plain(&model.continuing_subword_prefix) || !is_plain(&model.end_of_word_suffix) {
        return Err(unknown(file, "tokens with a prefix or a suffix"));
    }
    if model.dropout.is_some_and(|part| part != 0.0) {
        return Err(unknown(file, "a dropout of merges"));
    }
    if model.byte_fallback {
        of_sentence_piece(file, &added_tokens, &model, vocab_size)
    } else {
        of_bytes(file, &added_tokens, &model, vocab_size)
    }
}

/// A failure for a tokenizer that llama.cpp has no name for.
fn unknown(file: &TokenizerFile, has: &str) -> Failure {
    Failure::usage(format!(
        "--format gguf: {} has {has}, for which no name of llama.cpp's is known here; choose \
         --format safetensors, and convert the folder with llama.cpp's convert_hf_to_gguf.py",
        file.path().display()
    ))
}

/// Byte-level BPE.
fn of_bytes(
    file: &TokenizerFile,
    added: &[AddedToken],
    model: &Bpe,
    vocab_size: usize,
) -> Outcome<Vocabulary> {
    // NOTE: of NFC llama.cpp's converter says nothing either; llama.cpp takes texts as they are.
    if let Some(other) = file.normalizers().iter().find(|part| part["type"] != "NFC") {
        return Err(unknown(file, &format!("the normalizer {}", other["type"])));
    }
    let pre = pattern(&file.splits(), model.ignore_merges).map_err(|has| unknown(file, &has))?;
    let (tokens, kinds) = tokens(file, added, vocab_size);
    // A space parts the two.
    let spelled = |part: &str| part.replace(' ', "Ġ");
    let merges = model.merges.iter().filter_map(Merge::pair);
    let merges = merges.map(|(a, b)| format!("{} {}", spelled(a), spelled(b))).collect();
    Ok(Vocabulary {
        model: "gpt2",
        pre,
        tokens,
        kinds,
        scores: Vec::new(),
        merges,
        adds_space: false,
    })
}

/// llama.cpp's name of what splits a text; else what there is that it has no name for.
fn pattern(splits: &[Json], takes_whole: bool) -> Result<&'static str, String> {
    let is_byte_level = |part: &Json, splits: bool| {
        part["type"] == "ByteLevel"
            && part["add_prefix_space"] == false
            && (part["use_regex"] != false) == splits
    };
    let is_digits =
        |part: &Json| part["type"] == "Digits" && part["individual_digits"].as_bool() == Some(true);
    let (pattern, name) = match splits {
        [bytes] if is_byte_level(bytes, true) => (None, Some("gpt-2")),
        [digits, bytes] if is_digits(digits) && is_byte_level(bytes, true) => {
            (None, Some("smollm"))
        }
        [split, bytes] if split["type"] == "Split" && is_byte_level(bytes, false) => {
            let is_isolated = split["behavior"] == "Isolated" && split["invert"] == false;
            let pattern = split["pattern"]["Regex"].as_str().filter(|_| is_isolated);
            let known =
                PATTERNS.iter().find(|(of, whole, _)| pattern == Some(of) && *whole == takes_whole);
            (pattern, known.map(|(_, _, name)| *name))
        }
        _ => (None, None),
    };
    match (name, pattern) {
        // The others take whole pieces or not by their names.
        (Some(name), None) if takes_whole => {
            Err(format!("ignore_merges beside the pattern of {name}"))
        }
        (Some(name), _) => Ok(name),
        (None, Some(pattern)) if takes_whole => {
            Err(format!("ignore_merges beside the splitting pattern {pattern:?}"))
        }
        (None, Some(pattern)) => Err(format!("the splitting pattern {pattern:?}")),
        (None, None) => {
            let types: Vec<_> =
                splits.iter().map(|part| part["type"].as_str().unwrap_or("?")).collect();
            Err(format!("the pre-tokenizers {types:?}"))
        }
    }
}

/// The texts of tokens, and what they are.
fn tokens(
    file: &TokenizerFile,
    added: &[AddedToken],
    vocab_size: usize,
) -> (Vec<String>, Vec<i32>) {
    let mut kinds = vec![UNUSED; vocab_size];
    let name = |(id, kind): (usize, &mut i32)| match file.name(id as u32) {
        Some(name) => {
            *kind = NORMAL;
            name
        }
        None => padding(id),
    };
    let mut tokens: Vec<String> = kinds.iter_mut().enumerate().map(name).collect();
    for AddedToken { content, is_special, .. } in added {
        // Numbers that leave a gap are not those that a text gets.
        let Some(id) = file.token(content).map(|id| id as usize) else { continue };
        let (Some(token), Some(kind)) = (tokens.get_mut(id), kinds.get_mut(id)) else { continue };
        // Not all files say it of those that only templates of chats write.
        let looks_special = content.starts_with("<|") && content.ends_with("|>");
        *kind = if *is_special || looks_special { CONTROL } else { USER_DEFINED };
        *token = match *kind {
            CONTROL => content.clone(),
            _ => content.replace(SPACE, " "),
        };
    }
    (tokens, kinds)
}

/// BPE with tokens for bytes, as SentencePiece's.
fn of_sentence_piece(
    file: &TokenizerFile,
    added: &[AddedToken],
    model: &Bpe,
    vocab_size: usize,
) -> Outcome<Vocabulary> {
    let is_space = |part: &Json| {
        part["type"] == "Replace"
            && part["pattern"]["String"] == " "
            && part["content"] == "\u{2581}"
    };
    let is_before = |part: &Json| part["type"] == "Prepend" && part["prepend"] == "\u{2581}";
    let is_metaspace = |part: &Json| {
        part["type"] == "Metaspace" && part["replacement"] == "\u{2581}" && part["split"] == false
    };
    let is_known = match (&file.normalizers()[..], &file.splits()[..]) {
        ([before, space], []) => is_before(before) && is_space(space),
        ([space], []) => is_space(space),
        ([], [metaspace]) => is_metaspace(metaspace),
        _ => false,
    };
    if !is_known {
        return Err(unknown(file, "tokens for bytes, but not the spaces of Llama 2's"));
    }
    if model.ignore_merges {
        return Err(unknown(file, "ignore_merges beside tokens for bytes"));
    }
    let byte = |byte: u8| format!("<0x{byte:02X}>");
    if let Some(missing) = (0..=255).map(byte).find(|name| file.token(name).is_none()) {
        return Err(unknown(file, &format!("no token {missing} beside others for bytes")));
    }

    let (tokens, mut kinds) = tokens(file, added, vocab_size);
    for id in (0..=255).filter_map(|of| file.token(&byte(of))) {
        kinds[id as usize] = BYTE;
    }
    let unknown_token = model.unk_token.as_ref().and_then(|name| file.token(name));
    let named = named(file, &file.beside(TOKENIZER_CONFIG)?, "unk");
    if let Some(id) = unknown_token.or(named) {
        kinds[id as usize] = UNKNOWN;
    }
    let merges: Vec<_> = model.merges.iter().filter_map(Merge::pair).collect();
    let scores = scores_of(&tokens, &kinds, &merges).map_err(|has| {
        Failure::usage(format!(
            "--format gguf: llama.cpp has scores of tokens in place of merges, and those of {} are \
             not of scores: it has {has}; choose --format safetensors",
            file.path().display()
        ))
    })?;
    Ok(Vocabulary {
        model: "llama",
        pre: "default",
        tokens,
        kinds,
        scores,
        merges: Vec::new(),
        adds_space: file.adds_space(),
    })
}

/// Scores by which SentencePiece's algorithm, which joins any two neighbours that make a token, the
/// one with the highest score first, makes the tokens that merges make; else what is in the way.
///
/// Merges that come from scores are all splits of every token into two, in the order of the tokens'
/// scores. What a trainer of merges leaves is one split of each, and joins less.
fn scores_of(
    tokens: &[String],
    kinds: &[i32],
    merges: &[(&str, &str)],
) -> Result<Vec<f32>, String> {
    let normal = || kinds.iter().enumerate().filter(|(_, kind)| **kind == NORMAL).map(|(id, _)| id);
    let ids: HashMap<&str, usize> = normal().map(|id| (tokens[id].as_str(), id)).collect();
    let mut scores: Vec<_> = kinds.iter().map(|_| None).collect();
    let (mut count, mut last) = (0, String::new());
    let mut pairs = HashSet::new();
    for pair in merges {
        let joined = [pair.0, pair.1].concat();
        pairs.insert(*pair);
        if joined == last {
            continue;
        }
        // Of a token that is added, which no text has, it does nothing.
        if let Some(score) = ids.get(joined.as_str()).map(|id| &mut scores[*id]) {
            match score {
                None => {
                    *score = Some(-(count as f32));
                    count += 1;
                }
                // NOTE: Mistral's have one score, which leaves their merges in the order of parts.
                // The first of them tells the order in which runs of spaces grow.
                Some(_) if joined.chars().all(|c| c == SPACE) => {}
                Some(_) => {
                    return Err(format!("merges of {joined:?} in several places of their order"));
                }
            }
        }
        last = joined;
    }
    // A character that is no token becomes bytes in the end, but may be joined before.
    let is_part = |part: &str| ids.contains_key(part) || part.chars().nth(1).is_none();
    for id in normal() {
        let token = tokens[id].as_str();
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let missing =
            splits.filter(|(a, b)| is_part(a) && is_part(b)).find(|of| !pairs.contains(of));
        if let Some((left, right)) = missing {
            return Err(format!("a token {token:?}, but no merge of {left:?} and {right:?}"));
        }
    }
    // What is never joined follows.
    let rest = |(id, score): (usize, Option<f32>)| match (score, kinds[id]) {
        (Some(score), _) => score,
        (None, NORMAL) => {
            count += 1;
            -((count - 1) as f32)
        }
        (None, UNKNOWN | CONTROL | BYTE) => 0.0,
        (None, UNUSED) => -10_000.0,
        (None, _) => -1000.0,
    };
    Ok(scores.into_iter().enumerate().map(rest).collect())
}

/// What the files beside a `tokenizer.json`, and its post-processor, say of single tokens.
fn special(file: &TokenizerFile, checkpoint: &Path, vocab_size: usize) -> Outcome<Special> {
    let config = file.beside(TOKENIZER_CONFIG)?;
    let of_model = Model::folder_of(checkpoint).join("config.json");
    let of_model = files::read_json(&of_model)?.unwrap_or_default();
    let named = |what: &str| {
        let of_model = of_model[format!("{what}_token_id")].as_u64();
        let token = named(file, &config, what).map(u64::from).or(of_model);
        token.filter(|token| *token < vocab_size as u64).map(|token| token as u32)
    };
    let (begin, is_begun) = match file.begin() {
        [] => (named("bos"), false),
        [begin] => (Some(*begin), true),
        begin => {
            return Err(unknown(file, &format!("{} tokens before a text", begin.len())));
        }
    };
    let Some(end) = file.end_of_text().or(begin) else {
        return Err(Failure::usage(format!(
            "--format gguf: nothing says which token ends a text of {}, and llama.cpp would take one \
             of its own; name it in {TOKENIZER_CONFIG} beside it: {{\"eos_token\": \"...\"}}",
            file.path().display()
        )));
    };
    Ok(Special {
        begin: begin.unwrap_or(end),
        is_begun,
        end,
        unknown: named("unk"),
        padding: named("pad"),
        chat_template: chat_template(file, &config)?,
    })
}

/// The token that `tokenizer_config.json` names for something.
fn named(file: &TokenizerFile, config: &Json, what: &str) -> Option<u32> {
    // With its properties, in older files.
    let name = &config[format!("{what}_token")];
    name.as_str().or_else(|| name["content"].as_str()).and_then(|name| file.token(name))
}

/// How a chat is written as a text, where a file says it.
fn chat_template(file: &TokenizerFile, config: &Json) -> Outcome<Option<String>> {
    let text = |template: &Json| match template {
        Json::Array(several) => {
            let default = several.iter().find(|of| of["name"] == "default");
            default.and_then(|of| of["template"].as_str()).map(str::to_owned)
        }
        template => template.as_str().map(str::to_owned),
    };
    if let Some(template) = text(&config["chat_template"]) {
        return Ok(Some(template));
    }
    if let Some(jinja) = file.contents().get(&format!("{CHAT_TEMPLATE}jinja")) {
        return Ok(Some(String::from_utf8_lossy(jinja).into_owned()));
    }
    Ok(text(&file.beside(&format!("{CHAT_TEMPLATE}json"))?["chat_template"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mistral's runs of spaces: the merges of one are not beside each other.
    #[test]
    fn runs_of_spaces_may_have_one_score() {
        let tokens = ["▁", "▁▁", "▁▁▁", "▁▁▁▁", "a", "▁a", "b"].map(str::to_owned);
        let merges = [
            ("▁", "a"),
            ("▁▁▁", "▁"),
            ("▁▁", "▁▁"),
            ("▁▁", "▁"),
            ("▁", "▁▁▁"),
            ("▁", "▁▁"),
            ("▁", "▁"),
        ];
        let scores = scores_of(&tokens, &[NORMAL; 7], &merges).unwrap();
        assert_eq!(scores, [-4.0, -3.0, -2.0, -1.0, -5.0, 0.0, -6.0]);
        let kinds = [NORMAL, NORMAL, NORMAL, NORMAL, NORMAL, CONTROL, UNUSED];
        let scores = scores_of(&tokens, &kinds, &merges).unwrap();
        assert_eq!(scores, [-3.0, -2.0, -1.0, 0.0, -4.0, 0.0, -10_000.0]);
        let missing = scores_of(&tokens, &[NORMAL; 7], &merges[..6]).unwrap_err();
        assert_eq!(missing, r#"a token "▁▁", but no merge of "▁" and "▁""#);
    }

    #[test]
    fn patterns_are_known_by_themselves() {
        let bytes = |splits: bool| {
            serde_json::json!({
                "type": "ByteLevel", "add_prefix_space": false, "use_regex": splits,
            })
        };
        let split = |pattern: &str, behavior: &str| {
            serde_json::json!({
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior,
                "invert": false,
            })
        };
        for (of, whole, name) in PATTERNS {
            let splits = [split(of, "Isolated"), bytes(false)];
            assert_eq!(pattern(&splits, whole), Ok(name));
            assert!(pattern(&[split(of, "Removed"), bytes(false)], whole).is_err());
            assert!(pattern(&[split(of, "Isolated"), bytes(true)], whole).is_err());
            assert!(pattern(&splits[..1], whole).is_err());
        }
        assert_eq!(pattern(&[bytes(true)], false), Ok("gpt-2"));
        assert!(pattern(&[bytes(false)], false).is_err());
        let error = pattern(&[bytes(true)], true).unwrap_err();
        assert_eq!(error, "ignore_merges beside the pattern of gpt-2");
    }
}
