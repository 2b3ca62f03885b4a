//! The tokenizer of a checkpoint.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::chat::Chat;
use crate::{Error, Result};

/// The tokenizer of a checkpoint.
pub struct Tokenizer {
    pub(super) path: PathBuf,
    pub(super) inner: tokenizers::Tokenizer,
    pub(super) end: Option<u32>,
    pub(super) vocab: usize,
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

    /// Tokens at which the model has said what it says: [`Tokenizer::end`] and `eos_token_id` of generation_config.json.
    ///
    /// # Errors
    ///
    /// An IO error, [`Error::Json`].
    pub fn stops(&self) -> Result<Vec<u32>> {
        let config = json_file(&self.path.with_file_name("generation_config.json"))?.unwrap_or_default();
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let asked = &config["eos_token_id"];
        let many = asked.as_array().into_iter().flatten().chain([asked]).filter_map(id);
        Ok(self.end.into_iter().chain(many).collect())
    }

    /// How many ids the tokenizer gives a meaning, from 0 on; an embedding may have further rows.
    pub fn known(&self) -> usize {
        self.inner.get_vocab_size(true).min(self.vocab)
    }

    /// The checkpoint's chat template.
    ///
    /// # Errors
    ///
    /// [`Error::NoChatTemplate`], [`Error::ChatTemplate`] where it does not compile, an IO error, [`Error::Json`].
    pub fn chat(&self) -> Result<Chat> {
        Chat::open(self.path.parent().unwrap_or(Path::new("")))
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

pub(super) fn json_file(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_slice(&fs_err::read(path)?).map(Some).map_err(|source| Error::Json { path: path.into(), source })
}
