//! A `.jsonl` file of demonstrations: prompts, and what follows each.
//!
//! A line lacks its completion where it has a `prompt` and no `completion`, or `messages` of which the last is not the assistant's. The
//! second kind becomes a prompt through the chat template, up to where the assistant begins.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Tokenizer;
use super::documents::text_of;
use crate::{Error, Result};

/// The lines of one file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demonstrations {
    path: PathBuf,
    /// The number of each line in the file, from 1, and what it holds.
    lines: Vec<(usize, Value)>,
}

/// Why a completion ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    End,
    /// It has as many tokens as were asked for.
    Length,
}

impl Demonstrations {
    /// Whether a file of this name holds them: a `.jsonl`.
    pub fn are_in(path: &Path) -> bool {
        path.extension().is_some_and(|ending| ending == "jsonl")
    }

    /// Reads a `.jsonl` file; empty lines are left out.
    ///
    /// # Errors
    ///
    /// An IO error, [`Error::NotUtf8`], [`Error::JsonLine`].
    pub fn read(path: &Path) -> Result<Self> {
        let text = text_of(path)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let json = |(i, line): (usize, &str)| match serde_json::from_str(line) {
            Ok(value) => Ok((i + 1, value)),
            Err(source) => Err(Error::JsonLine { path: path.into(), line: i + 1, source }),
        };
        Ok(Self { path: path.into(), lines: lines.map(json).collect::<Result<_>>()? })
    }

    /// Which lines lack their completion, as indices over the lines that are not empty.
    pub fn unfinished(&self) -> Vec<usize> {
        (0..self.lines.len()).filter(|&i| is_unfinished(&self.lines[i].1)).collect()
    }

    /// What makes a line no document, and no prompt that the model could complete.
    ///
    /// # Errors
    ///
    /// [`Error::JsonFields`], [`Error::EmptyPrompt`] with the first such line.
    pub fn check(&self) -> Result<()> {
        for (line, value) in &self.lines {
            let text = |name: &str| value[name].is_string();
            let turns = value["messages"].as_array().is_some_and(|turns| turns.iter().all(Value::is_object));
            if !(text("text") || turns || text("prompt") && (text("completion") || value["completion"].is_null())) {
                return Err(Error::JsonFields { path: self.path.clone(), line: *line });
            }
            if is_unfinished(value) && (value["prompt"] == "" || value["messages"].as_array().is_some_and(Vec::is_empty)) {
                return Err(Error::EmptyPrompt { path: self.path.clone(), line: *line });
            }
        }
        Ok(())
    }

    /// Refuses lines that lack their completion.
    ///
    /// # Errors
    ///
    /// [`Error::NoCompletion`] with the first such line and how many there are.
    pub fn complete(&self) -> Result<()> {
        let lacking: Vec<usize> = self.lines.iter().filter(|(_, value)| lacks_completion(value)).map(|(line, _)| *line).collect();
        match lacking.first() {
            Some(&line) => Err(Error::NoCompletion { path: self.path.clone(), line, lacking: lacking.len(), lines: self.lines.len() }),
            None => Ok(()),
        }
    }

    /// The tokens of line `index`, up to where its completion begins.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`]; for a conversation without a template or that it refuses, [`Error::AtLine`]; [`Error::EmptyPrompt`],
    /// [`Error::TokenPastVocabulary`].
    pub fn prompt(&mut self, index: usize, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let (path, (line, value)) = (self.path.clone(), &mut self.lines[index]);
        if value["messages"].is_array() {
            let at = |source: Error| Error::AtLine { path: path.clone(), line: *line, source: Box::new(source) };
            let tools = value.get("tools").filter(|tools| !tools.is_null());
            let prompt = tokenizer.chat().and_then(|chat| chat.prompt(&value["messages"], tools)).map_err(at)?;
            *value = json!({ "prompt": prompt });
        }
        let ids = tokenizer.encode(value["prompt"].as_str().unwrap_or_default())?;
        if ids.is_empty() {
            return Err(Error::EmptyPrompt { path, line: *line });
        }
        match ids.iter().find(|&&id| id as usize >= tokenizer.vocab) {
            Some(&id) => Err(Error::TokenPastVocabulary { path, id, vocab: tokenizer.vocab }),
            None => Ok(ids),
        }
    }

    /// Puts a completion to line `index`, and why it ends. Where the model had nothing to say, the prompt is all of the document.
    pub fn finish(&mut self, index: usize, completion: &str, finish: Finish) {
        let finish = if finish == Finish::End { "end" } else { "length" };
        let value = &mut self.lines[index].1;
        let prompt = value["prompt"].take();
        *value = match completion {
            "" => json!({ "text": prompt, "finish": finish }),
            _ => json!({ "prompt": prompt, "completion": completion, "finish": finish }),
        };
    }

    /// The file's text: a line each.
    pub fn text(&self) -> String {
        self.lines.iter().map(|(_, value)| format!("{value}\n")).collect()
    }

    /// Lines whose completion the model did not end.
    pub fn cut(&self) -> usize {
        self.lines.iter().filter(|(_, value)| value["finish"] == "length").count()
    }
}

/// Whether a line has a prompt and nothing after it.
fn lacks_completion(value: &Value) -> bool {
    value["text"].is_null() && value["messages"].is_null() && value["prompt"].is_string() && value["completion"].is_null()
}

/// Whether the model is to go on with a line: [`lacks_completion`], or a conversation in which it is the assistant's turn.
fn is_unfinished(value: &Value) -> bool {
    let turn = || value["messages"].as_array().is_some_and(|turns| turns.last().is_none_or(|last| last["role"] != "assistant"));
    lacks_completion(value) || value["text"].is_null() && turn()
}

#[cfg(test)]
mod tests {
    use super::super::tests::tiny;
    use super::*;

    fn read(content: &str) -> Result<Demonstrations> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        fs_err::write(&path, content).unwrap();
        Demonstrations::read(&path)
    }

    const LINES: &str = "{\"prompt\": \"a b\"}\n\n{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"text\": \"c\"}\n\
        {\"messages\": [{\"role\": \"user\", \"content\": \"d\"}]}\n\
        {\"messages\": [{\"role\": \"user\", \"content\": \"d\"}, {\"role\": \"assistant\", \"content\": \"e\"}]}\n";

    #[test]
    fn prompts_and_open_conversations_are_what_the_model_is_to_finish() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = tiny(dir.path());
        let template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}f{% endif %}";
        fs_err::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let mut lines = read(LINES).unwrap();
        lines.check().unwrap();
        assert_eq!(lines.unfinished(), [0, 3]);
        assert_eq!((lines.prompt(0, &tokenizer).unwrap(), lines.prompt(3, &tokenizer).unwrap()), (vec![1, 2], vec![4, 6]));
        lines.finish(0, "c", Finish::Length);
        lines.finish(3, "", Finish::End);
        assert_eq!((lines.unfinished().len(), lines.cut()), (0, 1));
        let text = lines.text();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first, json!({ "prompt": "a b", "completion": "c", "finish": "length" }));
        assert!(text.contains(r#"{"finish":"end","text":"d f"}"#) || text.contains(r#"{"text":"d f","finish":"end"}"#), "{text}");
        // What is written is read as any file of documents.
        let path = dir.path().join("y.jsonl");
        fs_err::write(&path, lines.text()).unwrap();
        let ends = super::super::Text::read(&path, &tokenizer).unwrap().ends;
        assert_eq!(ends.len(), 5, "{ends:?}");
    }

    #[test]
    fn lines_that_are_no_demonstration_are_named() {
        let message = |text: &str| read(text).and_then(|lines| lines.check().and_then(|()| lines.complete())).unwrap_err().to_string();
        let said = message(LINES);
        assert!(said.contains("x.jsonl, line 1: a prompt without a completion (1 of 5 lines)") && said.contains("--generate"), "{said}");
        assert!(message("{\"text\": \"a\"}\n{\"prompt\": ").contains("line 2: not valid JSON"));
        assert!(message("{\"text\": \"a\"}\n{\"prompts\": \"a\"}").contains("line 2: a document has"));
        assert!(message("{\"prompt\": \"a\", \"completion\": 3}").contains("line 1: a document has"));
        assert!(message("{\"prompt\": \"\"}").contains("line 1: the prompt is empty"));
        assert!(message("{\"messages\": []}").contains("line 1: the prompt is empty"));
    }
}
