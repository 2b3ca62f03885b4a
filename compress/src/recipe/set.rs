//! `--set key=value`: edits of the document.

use toml::{Table, Value};

use crate::allocate::BUDGETS;

/// Tables of which a document holds one key: setting another replaces it. The second list names the keys; empty: all.
const CHOICES: [(&str, &[&str]); 3] = [("quantize", &[]), ("calibrate.sampler", &[]), ("allocate", &BUDGETS)];

/// Keys that hold paths: on the command line they are relative to the working directory, and so are made absolute.
const PATHS: [&str; 4] = ["model", "out", "calibrate.corpus", "evaluate.text"];

/// Puts one `key=value` into the document, the value written as in TOML, and gives the dotted key.
///
/// # Errors
///
/// What is wrong with the text, as the end of a sentence.
pub(super) fn apply(document: &mut Table, text: &str) -> Result<String, String> {
    let (key, written) = text.split_once('=').ok_or("no `=`; write key=value, such as allocate.bits=3")?;
    let parts: Vec<&str> = key.trim().split('.').map(str::trim).collect();
    if parts.iter().any(|part| part.is_empty() || !part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')) {
        return Err(format!("`{}` is not a key; write section.key=value, such as allocate.bits=3", key.trim()));
    }
    let mut parsed: Table = toml::from_str(&format!("value = {}", written.trim()))
        .ok()
        .filter(|table: &Table| table.len() == 1)
        .ok_or("not a TOML value; text stands in quotes, such as 'out=\"../out\"'")?;
    let mut value = parsed.remove("value").ok_or("no value")?;
    let key = parts.join(".");
    make_absolute(&key, &mut value)?;
    put(document, &parts, value)?;
    Ok(key)
}

fn put(document: &mut Table, parts: &[&str], value: Value) -> Result<(), String> {
    let Some((last, sections)) = parts.split_last() else { return Ok(()) };
    let mut table = document;
    for (depth, section) in sections.iter().enumerate() {
        table = match table.entry(*section).or_insert_with(|| Value::Table(Table::new())) {
            Value::Table(table) => table,
            _ => return Err(format!("`{}` is a value, not a section", parts[..=depth].join("."))),
        };
        let next = parts[depth + 1];
        if let Some((_, keys)) = CHOICES.iter().find(|(path, _)| *path == parts[..=depth].join(".")) {
            let of_choice = |key: &str| keys.is_empty() || keys.contains(&key);
            if of_choice(next) {
                table.retain(|key, _| key == next || !of_choice(key));
            }
        }
    }
    table.insert((*last).to_owned(), value);
    Ok(())
}

fn make_absolute(key: &str, value: &mut Value) -> Result<(), String> {
    if !PATHS.contains(&key) {
        return Ok(());
    }
    let paths = match value {
        Value::Array(items) => items.iter_mut().collect(),
        other => vec![other],
    };
    for path in paths {
        // A text of a corpus may be a table that holds its path.
        let path = match path {
            Value::Table(table) => table.get_mut("path"),
            path => Some(path),
        };
        if let Some(Value::String(text)) = path {
            let absolute = std::path::absolute(&*text).map_err(|e| format!("the path cannot be made absolute: {e}"))?;
            *text = absolute.to_str().ok_or("the working directory's name is not UTF-8")?.to_owned();
        }
    }
    Ok(())
}

/// Which of the fields that serde expected an unknown one is nearest to, if any is near.
pub(super) fn did_you_mean(message: &str) -> Option<String> {
    let mut words = message.split('`').skip(1).step_by(2);
    let unknown = message.starts_with("unknown field").then(|| words.next()).flatten();
    let unknown = unknown.or_else(|| message.starts_with("unknown variant").then(|| message.split('`').nth(1)).flatten())?;
    let near = message.split('`').skip(3).step_by(2).map(|word| (distance(unknown, word), word)).min()?;
    (near.0 <= unknown.len().div_ceil(3)).then(|| format!("did you mean `{}`?", near.1))
}

/// Edit distance: insertions, deletions, replacements.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for j in 0..b.len() {
            let cost = diagonal + usize::from(x != b[j]);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_toml() {
        let mut document: Table = toml::from_str("[allocate]\nbits = 4\ngroup = 64\n[quantize.gptq]\ndamping = 0.1\n").unwrap();
        assert_eq!(apply(&mut document, " allocate.bits = 3 ").unwrap(), "allocate.bits");
        apply(&mut document, "quantize.gptq.damping=0.02").unwrap();
        apply(&mut document, "allocate.exclude=[\"*.0.*\"]").unwrap();
        let said = document.to_string();
        assert_eq!(said, "[allocate]\nbits = 3\nexclude = [\"*.0.*\"]\ngroup = 64\n\n[quantize.gptq]\ndamping = 0.02\n");
        apply(&mut document, "allocate.bytes=\"1GB\"").unwrap();
        assert_eq!(document["allocate"].get("bits"), None);
        assert_eq!(document["allocate"]["group"], Value::Integer(64));
    }

    #[test]
    fn what_is_not_an_edit_is_refused() {
        let mut document = Table::new();
        document.insert("model".into(), "m".into());
        for (text, said) in [
            ("allocate.bits", "no `=`"),
            ("allocate..bits=3", "is not a key"),
            ("out=../o", "not a TOML value"),
            ("out=1\nx=2", "not a TOML value"),
            ("model.x=1", "`model` is a value, not a section"),
        ] {
            let error = apply(&mut document, text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn the_nearest_field_is_offered() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "ab"), 2);
        assert_eq!(did_you_mean("unknown field `goup`, expected one of `bits`, `group`").as_deref(), Some("did you mean `group`?"));
        assert_eq!(did_you_mean("unknown variant `gtpq`, expected `rtn` or `gptq`").as_deref(), Some("did you mean `gptq`?"));
        assert_eq!(did_you_mean("unknown field `prune`, expected `schema` or `model`"), None);
    }
}
