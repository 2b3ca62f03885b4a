//! `config.json` of an output: the source's text with single keys taken out or put in, every other byte as it was.
//!
//! The edit works on the text, because a JSON library would sort keys or rewrite numbers that nobody asked to change.

use std::ops::Range;

/// One member of the outermost object.
struct Member {
    key: String,
    /// From the first byte of the key to the last of the value.
    span: Range<usize>,
}

/// `text` without the members named in `remove` and with `add` as its last member (an older one of that key is replaced).
///
/// `None` if `text` is not a JSON object.
pub fn edit(text: &str, remove: &[&str], add: Option<(&str, &serde_json::Value)>) -> Option<String> {
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text).ok()?;
    let members = members(text)?;
    let gone = |key: &str| remove.contains(&key) || add.is_some_and(|(added, _)| added == key);
    let kept: Vec<&str> = members.iter().filter(|m| !gone(&m.key)).map(|m| &text[m.span.clone()]).collect();
    let indent = indent(text, &members);
    let mut parts: Vec<String> = kept.into_iter().map(str::to_owned).collect();
    if let Some((key, value)) = add {
        parts.push(format!("{}: {}", serde_json::json!(key), pretty(value, &indent)?));
    }
    if parts.is_empty() {
        return Some("{}\n".to_owned());
    }
    let tail = if text.ends_with('\n') { "\n" } else { "" };
    Some(match &indent {
        Some(indent) => format!("{{\n{indent}{}\n}}{tail}", parts.join(&format!(",\n{indent}"))),
        None => format!("{{{}}}{tail}", parts.join(", ")),
    })
}

/// `text` with every count named in `keys` set to `count`, however deep it stands; `own` is added where none of them does.
///
/// `None` if `text` is not a JSON object.
pub fn set_counts(text: &str, keys: &[&str], count: u64, own: &str) -> Option<String> {
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text).ok()?;
    let mut places = Vec::new();
    counts(text, 0, keys, &mut places)?;
    if places.is_empty() {
        return edit(text, &[], Some((own, &count.into())));
    }
    let mut edited = text.to_owned();
    // From the last to the first, so that the places before keep their offsets.
    places.sort_by_key(|place| std::cmp::Reverse(place.start));
    places.into_iter().for_each(|place| edited.replace_range(place, &count.to_string()));
    Some(edited)
}

/// Notes where the numbers of these keys stand in the object `text`, which begins at `offset` of the whole.
fn counts(text: &str, offset: usize, keys: &[&str], places: &mut Vec<Range<usize>>) -> Option<()> {
    for member in members(text)? {
        let key_end = string_end(text.as_bytes(), member.span.start)?;
        let start = skip(text.as_bytes(), key_end, |b| b.is_ascii_whitespace() || b == b':');
        let value = &text[start..member.span.end];
        if value.starts_with('{') {
            counts(value, offset + start, keys, places)?;
        } else if keys.contains(&member.key.as_str()) && value.parse::<u64>().is_ok() {
            places.push(offset + start..offset + member.span.end);
        }
    }
    Some(())
}

/// The white space before the first key, where each member has a line of its own.
fn indent(text: &str, members: &[Member]) -> Option<String> {
    let first = members.first().map_or(text.len(), |m| m.span.start);
    let line = text[..first].rfind('\n')?;
    Some(text[line + 1..first].to_owned())
}

fn pretty(value: &serde_json::Value, indent: &Option<String>) -> Option<String> {
    let Some(indent) = indent else { return serde_json::to_string(value).ok() };
    let mut bytes = Vec::new();
    let form = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
    serde::Serialize::serialize(value, &mut serde_json::Serializer::with_formatter(&mut bytes, form)).ok()?;
    Some(String::from_utf8(bytes).ok()?.replace('\n', &format!("\n{indent}")))
}

/// The members of the outermost object; the text is known to be a valid JSON object.
fn members(text: &str) -> Option<Vec<Member>> {
    let bytes = text.as_bytes();
    let mut at = text.find('{')? + 1;
    let mut found = Vec::new();
    loop {
        at = skip(bytes, at, |b| b.is_ascii_whitespace() || b == b',');
        if *bytes.get(at)? == b'}' {
            return Some(found);
        }
        let start = at;
        at = string_end(bytes, at)?;
        let key = serde_json::from_str(&text[start..at]).ok()?;
        at = skip(bytes, at, |b| b.is_ascii_whitespace() || b == b':');
        at = value_end(bytes, at)?;
        let end = start + text[start..at].trim_end().len();
        found.push(Member { key, span: start..end });
    }
}

fn skip(bytes: &[u8], mut at: usize, what: impl Fn(u8) -> bool) -> usize {
    while at < bytes.len() && what(bytes[at]) {
        at += 1;
    }
    at
}

/// The byte after the string that starts at `at`.
fn string_end(bytes: &[u8], at: usize) -> Option<usize> {
    let mut at = at + 1;
    loop {
        match bytes.get(at)? {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

/// The byte after the value that starts at `at`: the comma or brace of the object around it.
fn value_end(bytes: &[u8], mut at: usize) -> Option<usize> {
    let mut depth = 0_usize;
    loop {
        match bytes.get(at)? {
            b'"' => {
                at = string_end(bytes, at)?;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 0 => depth -= 1,
            b',' | b'}' if depth == 0 => return Some(at),
            _ => {}
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_nobody_asked_to_change_stays_byte_for_byte() {
        let text = "{\n  \"z\": 1e-06,\n  \"quantization_config\": {\"a\": [1, \"}\\\"\"]},\n  \"a\": [1,\n   2]\n}\n";
        let edited = edit(text, &["quantization_config"], None).unwrap();
        assert_eq!(edited, "{\n  \"z\": 1e-06,\n  \"a\": [1,\n   2]\n}\n");
    }

    #[test]
    fn an_added_key_comes_last_and_replaces_its_older_self() {
        let text = "{\n  \"q\": 1,\n  \"a\": {}\n}";
        let edited = edit(text, &[], Some(("q", &json!({"b": [1]})))).unwrap();
        assert_eq!(edited, "{\n  \"a\": {},\n  \"q\": {\n    \"b\": [\n      1\n    ]\n  }\n}");
        let value: serde_json::Value = serde_json::from_str(&edited).unwrap();
        assert_eq!(value, json!({"a": {}, "q": {"b": [1]}}));
    }

    #[test]
    fn counts_are_set_wherever_they_stand() {
        let text = "{\n  \"num_experts\": 16,\n  \"text_config\": {\"x\": {}, \"num_experts\" : 16, \"n\": [16]},\n  \"num_local_experts\": null\n}\n";
        let expected = text.replace("16,", "8,");
        assert_eq!(set_counts(text, &["num_experts", "num_local_experts"], 8, "num_experts").unwrap(), expected);
        assert_eq!(set_counts("{\"a\": 1}", &["num_experts"], 8, "num_experts").unwrap(), "{\"a\": 1, \"num_experts\": 8}");
        assert_eq!(set_counts("[]", &["a"], 1, "a"), None);
    }

    #[test]
    fn one_line_stays_one_line() {
        assert_eq!(edit(r#"{"a":1,"b":"x,}"}"#, &["a"], Some(("c", &json!(2)))).unwrap(), r#"{"b":"x,}", "c": 2}"#);
        assert_eq!(edit(r#"{"a": 1}"#, &["a"], None).unwrap(), "{}\n");
        assert_eq!(edit("[1]", &[], None), None);
    }
}
