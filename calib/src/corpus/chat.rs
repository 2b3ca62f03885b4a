//! A checkpoint's own chat template, rendered as transformers' `apply_chat_template` does.
//!
//! The template is `chat_template.jinja`, else `chat_template` of tokenizer_config.json: a text, or a list of named ones of which
//! `default` is taken. It sees `messages`, `tools` where the line has any, `add_generation_prompt` (false but for prompts) and the special
//! tokens by their names; blocks are trimmed, strings have Python's methods. `strftime_now` gives a fixed date: no output holds a clock.
//! Keys of an object come in alphabetical order.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value as Jinja};
use minijinja::{Environment, ErrorKind, context};
use serde_json::{Map, Value};

use super::tokenizer::json_file;
use crate::{Error, Result};

/// What `strftime_now` gives, whatever format is asked for.
const TODAY: &str = "01 Jan 2026";

/// Name of the template within its environment.
const NAME: &str = "chat_template";

/// Whose turn it is behind the messages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nobody's: the conversation is over.
    Over,
    /// The assistant's, which is announced.
    Assistant,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct Chat {
    path: PathBuf,
    env: Environment<'static>,
    /// `bos_token`, `eos_token` and whatever else the tokenizer's config names.
    specials: Map<String, Value>,
}

impl Chat {
    /// Finds and compiles the template of a checkpoint's directory.
    ///
    /// # Errors
    ///
    /// [`Error::NoChatTemplate`], [`Error::ChatTemplate`] where it does not compile, an IO error, [`Error::Json`].
    pub fn open(dir: &Path) -> Result<Self> {
        let config_path = dir.join("tokenizer_config.json");
        let config = json_file(&config_path)?.unwrap_or_default();
        let own = dir.join("chat_template.jinja");
        let (path, template) = if own.is_file() {
            (own.clone(), fs_err::read_to_string(&own)?)
        } else {
            let template = default_of(&config["chat_template"]).ok_or_else(|| Error::NoChatTemplate { dir: dir.into() })?;
            (config_path, template.to_owned())
        };
        let fail = |e: minijinja::Error| Error::ChatTemplate { path: path.clone(), message: e.to_string() };
        let mut env = Environment::new();
        env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(fail)?);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |said: String| -> std::result::Result<Jinja, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, said))
        });
        env.add_function("strftime_now", |_format: String| TODAY);
        env.add_template_owned(NAME, without_generation_marks(&template)).map_err(fail)?;
        let mut specials = special_tokens(&json_file(&dir.join("special_tokens_map.json"))?.unwrap_or_default());
        specials.extend(special_tokens(&config));
        Ok(Self { path, env, specials })
    }

    /// The text of a conversation: `messages` as a list of objects (`role`, `content`), `tools` as the line has them.
    ///
    /// # Errors
    ///
    /// [`Error::ChatTemplate`] with what the template said.
    pub fn render(&self, messages: &Value, tools: Option<&Value>) -> Result<String> {
        self.rendered(messages, tools, Turn::Over)
    }

    /// The text of a conversation up to where the assistant begins to answer.
    ///
    /// # Errors
    ///
    /// As [`Chat::render`].
    pub fn prompt(&self, messages: &Value, tools: Option<&Value>) -> Result<String> {
        self.rendered(messages, tools, Turn::Assistant)
    }

    fn rendered(&self, messages: &Value, tools: Option<&Value>, turn: Turn) -> Result<String> {
        let fail = |e: minijinja::Error| Error::ChatTemplate { path: self.path.clone(), message: e.to_string() };
        let template = self.env.get_template(NAME).map_err(fail)?;
        let tools = tools.map_or_else(|| Jinja::from(()), |tools| Jinja::from(Serde(tools)));
        let answer = turn == Turn::Assistant;
        let named = context! { messages => Serde(messages), tools => tools, documents => (), add_generation_prompt => answer };
        template.render(context! { ..named, ..Jinja::from(Serde(&self.specials)) }).map_err(fail)
    }
}

/// A template that is a text, or the one named `default` of a list.
fn default_of(value: &Value) -> Option<&str> {
    let named = || value.as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
    value.as_str().or_else(named)
}

/// Tokens by name: `"eos_token": "<end>"` or `"eos_token": {"content": "<end>"}`.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let entries = config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token"));
    let text = |value: &Value| value.as_str().or(value["content"].as_str()).map(Value::from);
    entries.filter_map(|(key, value)| Some((key.clone(), text(value)?))).collect()
}

/// `{% generation %}` and its end, which mark what an assistant said and print nothing, as blocks that every Jinja knows.
fn without_generation_marks(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else { break };
        let inner = &rest[start + 2..end];
        let word = match inner.trim_matches(['-', '+', ' ', '\n', '\t']) {
            "generation" => Some(("generation", "if true")),
            "endgeneration" => Some(("endgeneration", "endif")),
            _ => None,
        };
        out += &rest[..start + 2];
        out += &word.map_or_else(|| inner.to_owned(), |(word, known)| inner.replace(word, known));
        out += "%}";
        rest = &rest[end + 2..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chat(config: &Value) -> Result<Chat> {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Chat::open(dir.path())
    }

    /// ChatML as Qwen has it, with a method of Python's strings and a loop control.
    const CHATML: &str = "{%- for m in messages %}\n    {%- if m.role.startswith('x') %}{% continue %}{% endif %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content.strip() + '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ 'no' }}{% endif %}";

    #[test]
    fn a_conversation_is_what_transformers_makes_of_it() {
        let chat = chat(&json!({"chat_template": CHATML})).unwrap();
        let messages =
            json!([{"role": "user", "content": " hi "}, {"role": "x1", "content": "-"}, {"role": "assistant", "content": "a\nb"}]);
        let said = chat.render(&messages, None).unwrap();
        assert_eq!(said, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na\nb<|im_end|>\n");
        assert_eq!(chat.prompt(&json!([{"role": "user", "content": "a"}]), None).unwrap(), "<|im_start|>user\na<|im_end|>\nno");
    }

    #[test]
    fn blocks_are_trimmed_and_special_tokens_have_their_names() {
        let template = "{{ bos_token }}\n{% for m in messages %}\n  {% generation %}\n{{ m['content'] }}{{ eos_token }}\n  {% endgeneration %}\n{% endfor %}\n";
        let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null,
            "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]});
        let said = chat(&config).unwrap().render(&json!([{"role": "user", "content": "a"}]), None).unwrap();
        assert_eq!(said, "<s>\na</s>\n");
    }

    #[test]
    fn tools_and_json_and_dates_are_there() {
        let template = "{% if tools %}{{ tools[0] | tojson }}{% endif %}{{ strftime_now('%d %b %Y') }}{{ tools is none }}";
        let chat = chat(&json!({"chat_template": template})).unwrap();
        let said = chat.render(&json!([]), Some(&json!([{"a": 1}]))).unwrap();
        assert!(said.starts_with("{\"a\":") && said.ends_with("01 Jan 2026False"), "{said}");
        assert_eq!(chat.render(&json!([]), None).unwrap(), "01 Jan 2026True");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let said = |config: &Value| chat(config).unwrap_err().to_string();
        assert!(said(&json!({})).contains("there is no chat template"), "{}", said(&json!({})));
        assert!(said(&json!({"chat_template": [{"name": "rag", "template": ""}]})).contains("there is no chat template"));
        assert!(said(&json!({"chat_template": "{% if %}"})).contains("tokenizer_config.json: the chat template"));
        let refuses = chat(&json!({"chat_template": "{{ raise_exception('roles must alternate') }}"})).unwrap();
        assert!(refuses.render(&json!([]), None).unwrap_err().to_string().contains("roles must alternate"));
    }

    #[test]
    fn a_file_of_its_own_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("tokenizer_config.json"), r#"{"chat_template": "old"}"#).unwrap();
        fs_err::write(dir.path().join("chat_template.jinja"), "new").unwrap();
        assert_eq!(Chat::open(dir.path()).unwrap().render(&json!([]), None).unwrap(), "new");
    }
}
