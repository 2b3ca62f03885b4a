//! Texts as token ids: what calibration samples are cut from and what evaluation runs on.
//!
//! A corpus is a list of sources, each a domain named by its file stem or by the recipe, with a weight. `.txt` is one run of
//! text, in which `<|endoftext|>` and its like are the tokenizer's special tokens; `.jsonl` is a document a line (`text`;
//! `messages`, which the model's own [chat template](chat) turns into text; or `prompt` and `completion`, which are joined);
//! `.parquet`, behind a feature of that name, is a document a row, its columns named likewise. Documents are packed one after the
//! other with the tokenizer's end token after each. No BOS, no padding, no truncation: what the tokenizer's file says about them is
//! switched off.
//!
//! The first four fifths of each text's tokens are calibration; the last fifth, the validation split, enters no statistic
//! and is what settings are chosen on.

pub mod chat;
mod demonstrations;
mod documents;
mod source;
mod tokenizer;

use std::path::{Path, PathBuf};

use crate::{Error, Result};
use documents::Documents;

pub use demonstrations::{Demonstrations, Finish};
pub use source::Source;
pub use tokenizer::Tokenizer;

/// Endings of files that a text is read from.
pub const ENDINGS: [&str; 3] = ["txt", "jsonl", "parquet"];

/// One file as tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// The domain: the file's stem, or its name in the recipe.
    pub domain: String,
    /// The file.
    pub path: PathBuf,
    /// All its tokens.
    pub ids: Vec<u32>,
    /// Where each document ends in `ids`, rising; the last ends with them.
    pub ends: Vec<usize>,
    /// Its part of the samples, as a multiple of a text with weight 1.
    pub weight: f64,
}

impl Text {
    /// A text of one document that is tokens already, with weight 1.
    pub fn new(domain: impl Into<String>, path: impl Into<PathBuf>, ids: Vec<u32>) -> Self {
        Self { domain: domain.into(), path: path.into(), ends: vec![ids.len()], ids, weight: 1.0 }
    }

    /// Reads a `.txt`, `.jsonl` or `.parquet` file.
    ///
    /// # Errors
    ///
    /// An IO error, [`Error::TextFormat`], [`Error::NoParquet`], [`Error::Parquet`], [`Error::NotUtf8`]; [`Error::JsonLine`],
    /// [`Error::JsonFields`] and, for a conversation without a template or that it refuses, [`Error::AtLine`], with file and line;
    /// [`Error::TokenPastVocabulary`], [`Error::EmptyText`].
    pub fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let Documents { ids, ends, .. } = Documents::read(path, tokenizer)?;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= tokenizer.vocab) {
            return Err(Error::TokenPastVocabulary { path: path.into(), id, vocab: tokenizer.vocab });
        }
        if ids.is_empty() {
            return Err(Error::EmptyText { path: path.into() });
        }
        let domain = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { domain, path: path.into(), ids, ends, weight: 1.0 })
    }

    /// The documents of the calibration part, each cut at `tokens` and at the part's end; those of less than two tokens are left
    /// out.
    pub fn documents(&self, tokens: usize) -> Vec<&[u32]> {
        let ids = self.calibration();
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let spans = starts.zip(&self.ends).map(|(start, &end)| (start, end.min(start + tokens).min(ids.len())));
        spans.filter(|(start, end)| start + 2 <= *end).map(|(start, end)| &ids[start..end]).collect()
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

    /// Reads the sources of a recipe, in the order given.
    ///
    /// # Errors
    ///
    /// As [`Corpus::read`].
    pub fn of(sources: &[Source], tokenizer: &Tokenizer) -> Result<Self> {
        let text = |source: &Source| {
            let text = Text::read(&source.path, tokenizer)?;
            Ok(Text { domain: source.domain().into_owned(), weight: source.weight, ..text })
        };
        sources.iter().map(text).collect::<Result<Vec<_>>>().and_then(Self::new)
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
    fn documents_are_cut_at_the_sample_and_at_the_validation_part() {
        // 10 tokens, 8 of them calibration: documents of 3, 1 and 6 tokens, the last cut at 8.
        let text = Text { ends: vec![3, 4, 10], ..Text::new("x", "x.txt", (0..10).collect()) };
        assert_eq!(text.documents(100), [&[0, 1, 2][..], &[4, 5, 6, 7]]);
        assert_eq!(text.documents(2), [&[0, 1][..], &[4, 5]]);
    }

    #[test]
    fn sources_bring_their_names_and_weights() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = tiny(dir.path());
        let path = dir.path().join("x.txt");
        fs_err::write(&path, "a b").unwrap();
        let named = Source { path: path.clone(), name: Some("code".into()), weight: 2.0 };
        let corpus = Corpus::of(&[path.into(), named], &tokenizer).unwrap();
        let seen: Vec<_> = corpus.texts().iter().map(|t| (t.domain.as_str(), t.weight)).collect();
        assert_eq!(seen, [("x", 1.0), ("code", 2.0)]);
    }

    #[test]
    fn texts_that_cannot_be_read_say_why() {
        assert!(message("x.txt", " ").contains("the text is empty"));
        assert!(message("x.md", "a").contains("a text is a .txt, .jsonl or .parquet file"));
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
        let text = Text::new("x", "x.txt", (0..11).collect());
        assert_eq!(text.windows(4, None).unwrap(), [&[0, 1, 2, 3][..], &[4, 5, 6, 7]]);
        assert_eq!(text.windows(4, Some(7)).unwrap(), [&[0, 1, 2, 3][..]]);
        let error = text.windows(12, None).unwrap_err().to_string();
        assert!(error.contains("1 window of 12 tokens asked for, but the text has 11 tokens, which is 0 windows"), "{error}");
        assert!(text.windows(1, None).is_err());
    }

    #[test]
    fn a_corpus_has_texts_with_names_of_their_own() {
        assert!(matches!(Corpus::new(vec![]), Err(Error::EmptyCorpus)));
        let text = |path: &str| Text::new("en", path, vec![1]);
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
        let tokenizer = Tokenizer::open(dir.path(), 11).unwrap();
        assert_eq!((tokenizer.end(), tokenizer.stops().unwrap()), (Some(7), vec![7]));
        fs_err::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [5, 7]}"#).unwrap();
        assert_eq!(tokenizer.stops().unwrap(), [7, 5, 7]);
    }
}
