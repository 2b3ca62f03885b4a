//! Texts as token ids: what calibration samples are cut from and what evaluation runs on.
//!
//! A corpus is a list of files, each a domain named by its file stem. `.txt` is one run of text, in which
//! `<|endoftext|>` and its like are the tokenizer's special tokens; `.jsonl` is a document a line (`text`, or `prompt` and
//! `completion`, which are joined), and documents are packed one after the other with the tokenizer's end token after each.
//! No BOS, no padding, no truncation: what the tokenizer's file says about them is switched off.
//!
//! The first four fifths of each text's tokens are calibration; the last fifth, the validation split, enters no statistic
//! and is what settings are chosen on.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, Result};

/// The tokenizer of a checkpoint.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    end: Option<u32>,
    vocab: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint's directory, and its end token from `tokenizer_config.json` or
    /// `config.json`. `vocab`: rows of the model's embedding, which no token may pass.
    ///
    /// # Errors
    ///
    /// [`Error::NoTokenizer`]; [`Error::Tokenizer`] where the library cannot load it; [`Error::Json`].
    pub fn open(dir: &Path, vocab: usize) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::NoTokenizer { dir: dir.into() });
        }
        let fail = |e: Box<dyn std::error::Error + Send + Sync>| Error::Tokenizer { path: path.clone(), message: e.to_string() };
        let mut inner = tokenizers::Tokenizer::from_bytes(fs_err::read(&path)?).map_err(fail)?;
        // A tokenizer.json may carry both from whoever saved it, and they would silently cut or pad a text.
        inner.with_truncation(None).map_err(fail)?;
        inner.with_padding(None);
        let end = end_token(dir, &inner)?;
        Ok(Self { path, inner, end, vocab })
    }

    /// Token ids of a text; nothing is put before or after it.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false);
        let encoding = encoding.map_err(|e| Error::Tokenizer { path: self.path.clone(), message: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids, special tokens written out.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|e| Error::Tokenizer { path: self.path.clone(), message: e.to_string() })
    }

    /// The token that ends a document, if the checkpoint names one.
    pub fn end(&self) -> Option<u32> {
        self.end
    }

    /// Tokens of the model's vocabulary.
    pub fn vocab(&self) -> usize {
        self.vocab
    }
}

/// `eos_token` of tokenizer_config.json (a string or an object with `content`), else `eos_token_id` of config.json.
fn end_token(dir: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<Option<u32>> {
    if let Some(config) = json_file(&dir.join("tokenizer_config.json"))? {
        let token = &config["eos_token"];
        let id = token.as_str().or(token["content"].as_str()).and_then(|t| tokenizer.token_to_id(t));
        if id.is_some() {
            return Ok(id);
        }
    }
    let config = json_file(&dir.join("config.json"))?.unwrap_or_default();
    let id = &config["eos_token_id"];
    Ok(id.as_u64().or(id[0].as_u64()).and_then(|id| u32::try_from(id).ok()))
}

fn json_file(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_slice(&fs_err::read(path)?).map(Some).map_err(|source| Error::Json { path: path.into(), source })
}

/// One file as tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// The file's stem.
    pub domain: String,
    /// The file.
    pub path: PathBuf,
    /// All its tokens.
    pub ids: Vec<u32>,
}

impl Text {
    /// Reads a `.txt` or `.jsonl` file.
    ///
    /// # Errors
    ///
    /// An IO error, [`Error::TextFormat`], [`Error::NotUtf8`], [`Error::JsonLine`] and [`Error::JsonFields`] with file and
    /// line, [`Error::TokenPastVocabulary`], [`Error::EmptyText`].
    pub fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let jsonl = match path.extension().and_then(|e| e.to_str()) {
            Some("txt") => false,
            Some("jsonl") => true,
            _ => return Err(Error::TextFormat { path: path.into() }),
        };
        let text =
            String::from_utf8(fs_err::read(path)?).map_err(|e| Error::NotUtf8 { path: path.into(), at: e.utf8_error().valid_up_to() })?;
        let ids = if jsonl { documents(path, &text, tokenizer)? } else { tokenizer.encode(&text)? };
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= tokenizer.vocab) {
            return Err(Error::TokenPastVocabulary { path: path.into(), id, vocab: tokenizer.vocab });
        }
        if ids.is_empty() {
            return Err(Error::EmptyText { path: path.into() });
        }
        let domain = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { domain, path: path.into(), ids })
    }

    /// The first four fifths of the tokens: what calibration windows are cut from.
    pub fn calibration(&self) -> &[u32] {
        &self.ids[..self.ids.len() * 4 / 5]
    }

    /// The last fifth: enters no statistic.
    pub fn validation(&self) -> &[u32] {
        &self.ids[self.ids.len() * 4 / 5..]
    }

    /// Windows of `window` tokens from the start of the text that do not overlap, of at most `max_tokens` tokens; the last
    /// partial window is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::TooFewTokens`] if that leaves no window, [`Error::TooSmall`] for a window of less than two tokens.
    pub fn windows(&self, window: usize, max_tokens: Option<usize>) -> Result<Vec<&[u32]>> {
        if window < 2 {
            return Err(Error::TooSmall { what: "the context", value: window, least: 2 });
        }
        let ids = &self.ids[..self.ids.len().min(max_tokens.unwrap_or(usize::MAX))];
        if ids.len() < window {
            let what = if ids.len() < self.ids.len() { "what the token limit leaves of the text" } else { "the text" };
            return Err(Error::TooFewTokens { path: self.path.clone(), what, tokens: ids.len(), asked: 1, window });
        }
        Ok(ids.chunks_exact(window).collect())
    }
}

/// The documents of a `.jsonl`, one after the other, each followed by the end token. Empty lines are skipped.
fn documents(path: &Path, text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let value: Value = serde_json::from_str(line).map_err(|source| Error::JsonLine { path: path.into(), line: i + 1, source })?;
        let field = |name: &str| value[name].as_str();
        let document = match (field("text"), field("prompt"), field("completion")) {
            (Some(text), ..) => text.to_owned(),
            (None, Some(prompt), Some(completion)) => format!("{prompt}{completion}"),
            _ => return Err(Error::JsonFields { path: path.into(), line: i + 1 }),
        };
        ids.extend(tokenizer.encode(&document)?);
        ids.extend(tokenizer.end);
    }
    Ok(ids)
}

/// Several texts, each a domain.
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    texts: Vec<Text>,
}

impl Corpus {
    /// Reads every file, in the order given.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyCorpus`], [`Error::SameDomain`], and those of [`Text::read`].
    pub fn read(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Self> {
        paths.iter().map(|path| Text::read(path, tokenizer)).collect::<Result<Vec<_>>>().and_then(Self::new)
    }

    /// A corpus of texts that are tokens already.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyCorpus`], [`Error::SameDomain`].
    pub fn new(texts: Vec<Text>) -> Result<Self> {
        if texts.is_empty() {
            return Err(Error::EmptyCorpus);
        }
        for (i, text) in texts.iter().enumerate() {
            if let Some(first) = texts[..i].iter().find(|t| t.domain == text.domain) {
                let (first, second) = (first.path.clone(), text.path.clone());
                return Err(Error::SameDomain { domain: text.domain.clone(), first, second });
            }
        }
        Ok(Self { texts })
    }

    /// The texts, in order.
    pub fn texts(&self) -> &[Text] {
        &self.texts
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A tokenizer of whole words: `<|end|>` is 0, then `a` to `j`; unknown words are `j`. Saved with a truncation and padding.
    pub(crate) fn tiny(dir: &Path) -> Tokenizer {
        let words: String = ('a'..='j').enumerate().map(|(i, c)| format!(",\"{c}\":{}", i + 1)).collect();
        let json = format!(
            r#"{{"version":"1.0","truncation":{{"max_length":4,"strategy":"LongestFirst","stride":0,"direction":"Right"}},
            "padding":{{"strategy":{{"Fixed":64}},"direction":"Right","pad_to_multiple_of":null,"pad_id":0,"pad_type_id":0,"pad_token":"<|end|>"}},
            "added_tokens":[{{"id":0,"content":"<|end|>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}],
            "normalizer":null,"pre_tokenizer":{{"type":"Whitespace"}},"post_processor":null,"decoder":null,
            "model":{{"type":"WordLevel","vocab":{{"<|end|>":0{words}}},"unk_token":"j"}}}}"#
        );
        fs_err::write(dir.join("tokenizer.json"), json).unwrap();
        fs_err::write(dir.join("tokenizer_config.json"), r#"{"eos_token":{"content":"<|end|>"}}"#).unwrap();
        Tokenizer::open(dir, 11).unwrap()
    }

    fn read(name: &str, content: &str) -> Result<Text> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs_err::write(&path, content).unwrap();
        Text::read(&path, &tiny(dir.path()))
    }

    fn message(name: &str, content: &str) -> String {
        read(name, content).unwrap_err().to_string()
    }

    #[test]
    fn a_text_is_its_tokens_and_nothing_else() {
        // Longer than the file's truncation, shorter than its padding; the end token in the text is one token.
        let text = read("en.txt", "a b c <|end|> d e f a b c").unwrap();
        assert_eq!(text.ids, [1, 2, 3, 0, 4, 5, 6, 1, 2, 3]);
        assert_eq!(text.domain, "en");
        assert_eq!((text.calibration(), text.validation()), (&[1, 2, 3, 0, 4, 5, 6, 1][..], &[2, 3][..]));
    }

    #[test]
    fn documents_are_packed_with_the_end_token_after_each() {
        let text = read("chat.jsonl", "{\"text\": \"a b\"}\n\n{\"prompt\": \"c \", \"completion\": \"d\"}\n").unwrap();
        assert_eq!(text.ids, [1, 2, 0, 3, 4, 0]);
    }

    #[test]
    fn bad_lines_are_named_by_file_and_line() {
        let error = message("x.jsonl", "{\"text\": \"a\"}\n{\"text\": ");
        assert!(error.contains("x.jsonl, line 2: not valid JSON"), "{error}");
        let error = message("x.jsonl", "{\"text\": \"a\"}\n\n{\"prompt\": \"a\"}");
        assert!(error.contains("x.jsonl, line 3: a document has"), "{error}");
    }

    #[test]
    fn texts_that_cannot_be_read_say_why() {
        assert!(message("x.txt", " ").contains("the text is empty"));
        assert!(message("x.md", "a").contains("a text is a .txt or a .jsonl file"));
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer { vocab: 3, ..tiny(dir.path()) };
        let path = dir.path().join("x.txt");
        fs_err::write(&path, "a b c d").unwrap();
        let error = Text::read(&path, &tokenizer).unwrap_err().to_string();
        assert!(error.contains("token 3 is past the model's vocabulary of 3"), "{error}");
        fs_err::write(&path, b"ab\xff").unwrap();
        assert!(Text::read(&path, &tokenizer).unwrap_err().to_string().contains("not UTF-8 at byte 2"));
        let none = tempfile::tempdir().unwrap();
        let error = Tokenizer::open(none.path(), 3).err().unwrap().to_string();
        assert!(error.contains("there is no tokenizer.json"), "{error}");
        fs_err::write(none.path().join("tokenizer.json"), "{}").unwrap();
        assert!(matches!(Tokenizer::open(none.path(), 3), Err(Error::Tokenizer { .. })));
    }

    #[test]
    fn windows_do_not_overlap_and_the_partial_one_is_dropped() {
        let text = Text { domain: "x".into(), path: "x.txt".into(), ids: (0..11).collect() };
        assert_eq!(text.windows(4, None).unwrap(), [&[0, 1, 2, 3][..], &[4, 5, 6, 7]]);
        assert_eq!(text.windows(4, Some(7)).unwrap(), [&[0, 1, 2, 3][..]]);
        let error = text.windows(12, None).unwrap_err().to_string();
        assert!(error.contains("1 window of 12 tokens asked for, but the text has 11 tokens, which is 0 windows"), "{error}");
        assert!(text.windows(1, None).is_err());
    }

    #[test]
    fn a_corpus_has_texts_with_names_of_their_own() {
        assert!(matches!(Corpus::new(vec![]), Err(Error::EmptyCorpus)));
        let text = |path: &str| Text { domain: "en".into(), path: path.into(), ids: vec![1] };
        let error = Corpus::new(vec![text("a/en.txt"), text("b/en.txt")]).unwrap_err().to_string();
        assert!(error.contains("a/en.txt and b/en.txt are both the domain `en`"), "{error}");
    }

    #[test]
    fn the_end_token_may_stand_in_the_config() {
        let dir = tempfile::tempdir().unwrap();
        tiny(dir.path());
        fs_err::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
        assert_eq!(Tokenizer::open(dir.path(), 11).unwrap().end(), None);
        fs_err::write(dir.path().join("config.json"), r#"{"eos_token_id": [7, 8]}"#).unwrap();
        assert_eq!(Tokenizer::open(dir.path(), 11).unwrap().end(), Some(7));
    }
}
