//! What the files of a corpus hold, as documents.

use std::path::Path;

use serde_json::Value;

use super::chat::Chat;
use super::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Tokens of one file, one document after the other.
pub(super) struct Documents<'a> {
    path: &'a Path,
    tokenizer: &'a Tokenizer,
    /// Opened by the first conversation.
    chat: Option<Chat>,
    pub ids: Vec<u32>,
    /// Where each document ends in `ids`, rising.
    pub ends: Vec<usize>,
}

impl<'a> Documents<'a> {
    /// Reads a file by its extension.
    pub fn read(path: &'a Path, tokenizer: &'a Tokenizer) -> Result<Self> {
        let mut all = Self { path, tokenizer, chat: None, ids: Vec::new(), ends: Vec::new() };
        match path.extension().and_then(|e| e.to_str()) {
            Some("txt") => all.running(&text_of(path)?)?,
            Some("jsonl") => all.lines(&text_of(path)?)?,
            Some("parquet") => all.parquet()?,
            _ => return Err(Error::TextFormat { path: path.into() }),
        }
        Ok(all)
    }

    /// One run of text; a document ends where the text has the end token.
    fn running(&mut self, text: &str) -> Result<()> {
        self.ids = self.tokenizer.encode(text)?;
        let end = self.tokenizer.end();
        self.ends = (1..=self.ids.len()).filter(|&i| Some(self.ids[i - 1]) == end || i == self.ids.len()).collect();
        Ok(())
    }

    /// A document a line. Empty lines are skipped.
    fn lines(&mut self, text: &str) -> Result<()> {
        for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let json = |source| Error::JsonLine { path: self.path.into(), line: i + 1, source };
            self.add(&serde_json::from_str(line).map_err(json)?, i + 1)?;
        }
        Ok(())
    }

    /// `text`, or `messages` through the chat template, or `prompt` and `completion` joined. The end token follows each but
    /// conversations, whose template says itself how they end.
    fn add(&mut self, value: &Value, line: usize) -> Result<()> {
        let field = |name: &str| value[name].as_str();
        let (document, end) = match (field("text"), &value["messages"], field("prompt"), field("completion")) {
            (Some(text), ..) => (text.to_owned(), self.tokenizer.end()),
            (None, messages @ Value::Array(turns), ..) if turns.iter().all(Value::is_object) => {
                (self.rendered(messages, value, line)?, None)
            }
            (None, _, Some(prompt), Some(completion)) => (format!("{prompt}{completion}"), self.tokenizer.end()),
            _ => return Err(Error::JsonFields { path: self.path.into(), line }),
        };
        let before = self.ids.len();
        self.ids.extend(self.tokenizer.encode(&document)?);
        self.ids.extend(end);
        if self.ids.len() > before {
            self.ends.push(self.ids.len());
        }
        Ok(())
    }

    fn rendered(&mut self, messages: &Value, line: &Value, number: usize) -> Result<String> {
        let at = |source: Error| Error::AtLine { path: self.path.into(), line: number, source: Box::new(source) };
        let chat = match self.chat.take() {
            Some(chat) => chat,
            None => self.tokenizer.chat().map_err(at)?,
        };
        let text = chat.render(messages, line.get("tools").filter(|tools| !tools.is_null())).map_err(at);
        self.chat = Some(chat);
        text
    }

    /// A document a row, by its columns as a line of a `.jsonl` by its fields.
    #[cfg(feature = "parquet")]
    fn parquet(&mut self) -> Result<()> {
        use parquet::file::reader::{FileReader, SerializedFileReader};

        let path = self.path;
        let fail = |e: parquet::errors::ParquetError| Error::Parquet { path: path.into(), message: e.to_string() };
        let reader = SerializedFileReader::new(fs_err::File::open(path)?.into_parts().0).map_err(fail)?;
        for (i, row) in reader.get_row_iter(None).map_err(fail)?.enumerate() {
            self.add(&row.map_err(fail)?.to_json_value(), i + 1)?;
        }
        Ok(())
    }

    #[cfg(not(feature = "parquet"))]
    fn parquet(&mut self) -> Result<()> {
        Err(Error::NoParquet { path: self.path.into() })
    }
}

pub(super) fn text_of(path: &Path) -> Result<String> {
    String::from_utf8(fs_err::read(path)?).map_err(|e| Error::NotUtf8 { path: path.into(), at: e.utf8_error().valid_up_to() })
}

#[cfg(test)]
mod tests {
    use super::super::Text;
    use super::super::tests::tiny;
    use super::*;

    fn read(name: &str, content: &str, template: Option<&str>) -> Result<Text> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs_err::write(&path, content).unwrap();
        let tokenizer = tiny(dir.path());
        if let Some(template) = template {
            fs_err::write(dir.path().join("chat_template.jinja"), template).unwrap();
        }
        Text::read(&path, &tokenizer)
    }

    fn message(name: &str, content: &str, template: Option<&str>) -> String {
        read(name, content, template).unwrap_err().to_string()
    }

    #[test]
    fn documents_are_packed_with_the_end_token_after_each() {
        let text = read("chat.jsonl", "{\"text\": \"a b\"}\n\n{\"prompt\": \"c \", \"completion\": \"d\"}\n", None).unwrap();
        assert_eq!((text.ids, text.ends), (vec![1, 2, 0, 3, 4, 0], vec![3, 6]));
    }

    #[test]
    fn a_running_text_has_a_document_up_to_every_end_token() {
        let text = read("x.txt", "a b <|end|> c <|end|> d e", None).unwrap();
        assert_eq!((text.ids, text.ends), (vec![1, 2, 0, 3, 0, 4, 5], vec![3, 5, 7]));
        assert_eq!(read("x.txt", "a <|end|>", None).unwrap().ends, [2]);
    }

    #[test]
    fn conversations_go_through_the_chat_template() {
        let template = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}";
        let line = r#"{"messages": [{"role": "a", "content": "b c"}, {"role": "d", "content": "e"}]}"#;
        let text = read("x.jsonl", &format!("{line}\n{line}\n"), Some(template)).unwrap();
        assert_eq!(text.ids, [1, 2, 3, 0, 4, 5, 0, 1, 2, 3, 0, 4, 5, 0]);
        assert_eq!(text.ends, [7, 14]);
        let error = message("x.jsonl", &format!("\n{line}\n"), None);
        assert!(error.contains("x.jsonl, line 2: ") && error.contains("there is no chat template"), "{error}");
        let error = message("x.jsonl", &format!("{line}\n{line}"), Some("{{ raise_exception('odd roles') }}"));
        assert!(error.contains("x.jsonl, line 1: ") && error.contains("odd roles"), "{error}");
        let error = message("x.jsonl", r#"{"messages": ["a"]}"#, Some(template));
        assert!(error.contains("x.jsonl, line 1: a document has"), "{error}");
    }

    #[test]
    fn bad_lines_are_named_by_file_and_line() {
        let error = message("x.jsonl", "{\"text\": \"a\"}\n{\"text\": ", None);
        assert!(error.contains("x.jsonl, line 2: not valid JSON"), "{error}");
        let error = message("x.jsonl", "{\"text\": \"a\"}\n\n{\"prompt\": \"a\"}", None);
        assert!(error.contains("x.jsonl, line 3: a document has"), "{error}");
    }

    #[cfg(not(feature = "parquet"))]
    #[test]
    fn parquet_wants_its_feature() {
        let error = message("x.parquet", "PAR1", None);
        assert!(error.contains("--features parquet"), "{error}");
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn rows_of_a_parquet_file_are_documents() {
        use parquet::data_type::{ByteArray, ByteArrayType};
        use parquet::file::properties::WriterProperties;
        use parquet::file::writer::SerializedFileWriter;
        use parquet::schema::parser::parse_message_type;

        let dir = tempfile::tempdir().unwrap();
        let tokenizer = tiny(dir.path());
        let write = |name: &str, column: &str, rows: &[&str]| {
            let path = dir.path().join(name);
            let schema = parse_message_type(&format!("message m {{ REQUIRED BINARY {column} (UTF8); }}")).unwrap();
            let compressed = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
            let file = fs_err::File::create(&path).unwrap().into_parts().0;
            let mut writer = SerializedFileWriter::new(file, schema.into(), compressed.into()).unwrap();
            let mut group = writer.next_row_group().unwrap();
            let mut writing = group.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(*row)).collect();
            writing.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            writing.close().unwrap();
            group.close().unwrap();
            writer.close().unwrap();
            Text::read(&path, &tokenizer)
        };
        let text = write("x.parquet", "text", &["a b", "c"]).unwrap();
        assert_eq!((text.ids, text.ends), (vec![1, 2, 0, 3, 0], vec![3, 5]));
        let error = write("y.parquet", "words", &["a b"]).unwrap_err().to_string();
        assert!(error.contains("y.parquet, line 1: a document has"), "{error}");
        let path = dir.path().join("z.parquet");
        fs_err::write(&path, "no").unwrap();
        assert!(matches!(Text::read(&path, &tokenizer), Err(Error::Parquet { .. })));
    }
}
