//! Reading a recipe: TOML, then the command line's edits, then paths.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table};

use super::{Invalid, Problem, Recipe, set};

/// What the command line puts in place of the document's values.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--model DIR`.
    pub model: Option<PathBuf>,
    /// `--out DIR`.
    pub out: Option<PathBuf>,
    /// `--generate`: `calibrate.generate` with its defaults, where the document has none.
    pub generate: bool,
    /// `--set key=value`, in order.
    pub set: Vec<String>,
}

/// A recipe that was read, with what is needed to point into its file.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The recipe, edited, its paths usable from the working directory.
    pub recipe: Recipe,
    /// The file.
    pub source: Source,
}

/// A recipe's file and the keys that the command line took from it.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// Keys that were replaced, dotted.
    pub replaced: Vec<String>,
}

impl Source {
    /// Where the value of a dotted key stands (`allocate.group`, `evaluate.text.0`), if it comes from the file; a key that is not
    /// there has the place of the longest section of it that is.
    pub fn span(&self, key: &str) -> Option<Range<usize>> {
        let covers = |a: &str, b: &str| a == b || a.strip_prefix(b).is_some_and(|rest| rest.starts_with('.'));
        if self.replaced.iter().any(|replaced| covers(key, replaced) || covers(replaced, key)) {
            return None;
        }
        let table = DeTable::parse(&self.text).ok()?;
        let mut parts = key.split('.');
        let first = entry(table.get_ref(), parts.next()?)?;
        let mut at = first.1;
        let mut span = if at.get_ref().is_table() { first.0.span() } else { at.span() };
        for part in parts {
            match at.get_ref() {
                DeValue::Table(table) => match entry(table, part) {
                    Some((key, value)) => {
                        at = value;
                        span = if value.get_ref().is_table() { key.span() } else { value.span() };
                    }
                    None => break,
                },
                DeValue::Array(array) => match part.parse().ok().and_then(|i: usize| array.get(i)) {
                    Some(value) => (at, span) = (value, value.span()),
                    None => break,
                },
                _ => break,
            }
        }
        Some(span)
    }

    /// A problem at a key.
    pub fn problem(&self, key: &str, message: String, help: Option<String>) -> Problem {
        Problem { message, help, span: self.span(key) }
    }

    /// The recipe's problems as one error, in the order of the file.
    pub fn invalid(&self, mut problems: Vec<Problem>) -> Invalid {
        problems.sort_by_key(|p| p.span.as_ref().map_or(usize::MAX, |span| span.start));
        Invalid { path: self.path.clone(), text: self.text.clone(), problems }
    }
}

/// The same path as a person would write it: without detours, from the working directory where it lies below it.
fn plain(path: &Path) -> PathBuf {
    let there = path
        .ancestors()
        .find_map(|dir| Some((dir, fs_err::canonicalize(if dir.as_os_str().is_empty() { Path::new(".") } else { dir }).ok()?)));
    let Some((dir, there)) = there else { return path.to_owned() };
    // Joining nothing would add a slash, and a file with a slash behind it is not there.
    let rest = path.strip_prefix(dir).ok().filter(|rest| !rest.as_os_str().is_empty());
    let whole = rest.map_or(there.clone(), |rest| there.join(rest));
    let here = std::env::current_dir().and_then(fs_err::canonicalize).ok();
    match here.and_then(|here| whole.strip_prefix(here).ok().map(Path::to_owned)) {
        Some(below) if below.as_os_str().is_empty() => PathBuf::from("."),
        Some(below) => below,
        None => whole,
    }
}

type Entry<'a, 'i> = (&'a Spanned<toml::de::DeString<'i>>, &'a Spanned<DeValue<'i>>);

fn entry<'a, 'i>(table: &'a DeTable<'i>, key: &str) -> Option<Entry<'a, 'i>> {
    table.iter().find(|(k, _)| k.get_ref() == key)
}

/// Reads a recipe and applies the command line's edits to it.
///
/// # Errors
///
/// [`Invalid`] with one problem: the file cannot be read, is not TOML, or holds an unknown key or a value of a wrong type; or
/// an edit does.
pub fn load(path: &Path, overrides: &Overrides) -> Result<Loaded, Invalid> {
    let text = fs_err::read_to_string(path).map_err(|e| Invalid {
        path: path.into(),
        text: String::new(),
        problems: vec![Problem { message: format!("cannot be read: {e}"), help: None, span: None }],
    })?;
    let mut source = Source { path: path.into(), text, replaced: Vec::new() };
    let said = |source: &Source, e: &toml::de::Error| {
        let help = set::did_you_mean(e.message());
        source.invalid(vec![Problem { message: e.message().into(), help, span: e.span() }])
    };
    let mut recipe: Recipe = toml::from_str(&source.text).map_err(|e| said(&source, &e))?;
    let mut table: Table = toml::from_str(&source.text).map_err(|e| said(&source, &e))?;
    let generate = match &recipe.calibrate {
        _ if !overrides.generate => None,
        None => {
            let message = "--generate: there are no demonstrations to complete, for there is no [calibrate]".into();
            return Err(source.invalid(vec![Problem { message, help: Some("name texts with calibrate.corpus".into()), span: None }]));
        }
        Some(calibrate) => calibrate.generate.is_none().then(|| "calibrate.generate={}".to_owned()),
    };
    for text in generate.iter().chain(&overrides.set) {
        recipe = set::apply(&mut table, text)
            .map_err(|message| (message, None))
            .and_then(|edit| {
                source.replaced.push(edit);
                Recipe::deserialize(table.clone()).map_err(|e| (e.message().to_owned(), set::did_you_mean(e.message())))
            })
            .map_err(|(message, help)| {
                let message = format!("--set {text}: {message}");
                source.invalid(vec![Problem { message, help, span: None }])
            })?;
    }
    let home = path.parent().unwrap_or(Path::new(""));
    recipe.each_path(|path| *path = plain(&home.join(&path)));
    for (key, given, held) in [("model", &overrides.model, &mut recipe.model), ("out", &overrides.out, &mut recipe.out)] {
        if given.is_some() {
            held.clone_from(given);
            source.replaced.push(key.into());
        }
    }
    recipe.hold_to_formats();
    Ok(Loaded { recipe, source })
}

impl Recipe {
    /// Shows every path in it to `f`.
    pub fn each_path(&mut self, f: impl FnMut(&mut PathBuf)) {
        let (model, out) = (self.model.iter_mut(), self.out.iter_mut());
        let corpus = self.calibrate.iter_mut().flat_map(|c| &mut c.corpus).map(|source| &mut source.path);
        let text = self.evaluate.iter_mut().flat_map(|e| &mut e.text);
        let nvrtc = self.export.kernels.iter_mut().flat_map(|kernels| &mut kernels.nvrtc);
        model.chain(out).chain(corpus).chain(text).chain(nvrtc).for_each(f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::Quantizer;

    const TEXT: &str = "#:schema ./recipe.schema.json\nschema = 1\nmodel = \"../m\"\nout = \"/o\"\n\n[calibrate]\ncorpus = [\"a.txt\", \"b.txt\"]\n\n[quantize.gptq]\n\n[allocate]\nbits = 4\n\n[export.dense]\n";

    fn read(text: &str, set: &[&str]) -> Result<Loaded, Invalid> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.toml");
        fs_err::write(&path, text).unwrap();
        let overrides = Overrides { set: set.iter().map(|s| (*s).to_owned()).collect(), ..Overrides::default() };
        load(&path, &overrides).map_err(|invalid| Invalid { path: "r.toml".into(), ..invalid })
    }

    #[test]
    fn paths_are_relative_to_the_recipe_or_the_working_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.toml");
        fs_err::write(&path, TEXT).unwrap();
        let loaded = load(&path, &Overrides::default()).unwrap();
        // The directory is not below the working one, so what is left is the path without its detour.
        let parent = fs_err::canonicalize(dir.path()).unwrap().parent().unwrap().to_owned();
        assert_eq!(loaded.recipe.model, Some(parent.join("m")));
        assert_eq!(plain(Path::new("src/../absent")), Path::new("absent"));
        assert_eq!(plain(Path::new("src/..")), Path::new("."));
        assert_eq!(plain(Path::new("src/../Cargo.toml")).as_os_str(), "Cargo.toml");
        assert_eq!(loaded.recipe.out, Some("/o".into()));
        let overrides = Overrides { out: Some("here".into()), set: vec!["calibrate.corpus=[\"x.txt\"]".into()], ..Overrides::default() };
        let loaded = load(&path, &overrides).unwrap();
        assert_eq!(loaded.recipe.out, Some("here".into()));
        assert_eq!(loaded.recipe.calibrate.unwrap().corpus, [PathBuf::from("x.txt").into()]);
    }

    #[test]
    fn an_edit_replaces_a_value_and_a_choice_replaces_the_other() {
        let loaded = read(TEXT, &["allocate.bits=3", "quantize.rtn={}"]).unwrap();
        assert_eq!(loaded.recipe.allocate.unwrap().bits, Some(3));
        assert!(matches!(loaded.recipe.quantize, Some(Quantizer::Rtn(_))));
        let loaded = read(TEXT, &["allocate.bits_per_weight=2.5", "evaluate.text=['t.txt']"]).unwrap();
        assert_eq!(loaded.recipe.allocate.unwrap().budgets(), ["bits_per_weight"]);
    }

    #[test]
    fn generate_is_a_table_of_the_recipe_with_its_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.toml");
        let asked = |text: &str, set: &[&str]| {
            fs_err::write(&path, text).unwrap();
            let set = set.iter().map(|s| (*s).to_owned()).collect();
            load(&path, &Overrides { generate: true, set, ..Overrides::default() })
        };
        let tokens = |loaded: Loaded| loaded.recipe.calibrate.and_then(|calibrate| calibrate.generate).map(|generate| generate.tokens);
        assert_eq!(tokens(asked(TEXT, &[]).unwrap()), Some(512));
        assert_eq!(tokens(asked(TEXT, &["calibrate.generate.tokens=9"]).unwrap()), Some(9));
        assert_eq!(tokens(asked(&TEXT.replace("[quantize", "[calibrate.generate]\ntokens = 7\n[quantize"), &[]).unwrap()), Some(7));
        let said = asked("schema = 1\n", &[]).unwrap_err().to_string();
        assert!(said.contains("--generate: there are no demonstrations to complete"), "{said}");
    }

    #[test]
    fn the_first_wrong_thing_is_named_with_line_and_column() {
        let message = |text: &str, set: &[&str]| read(text, set).unwrap_err().to_string();
        assert_eq!(
            message(&TEXT.replace("bits", "bitz"), &[]),
            "r.toml:12:1: unknown field `bitz`, expected one of `bits`, `bits_per_weight`, `bytes`, `file`, `choices`, `group`, `grid`, `runtime`, `untied`, `drop`, `min_bits`, `max_bits`, `cost`, `pmq`, `fill`, `devices`, `speed`, `embedding`, `head`, `exclude`; did you mean `bits`?"
        );
        assert!(message("schema = 1\nmodel = 3\n", &[]).starts_with("r.toml:2:9: invalid type: integer `3`, expected path string"));
        assert!(message("schema = \n", &[]).starts_with("r.toml:1:10: "));
        let said = message(TEXT, &["allocate.bitz=3"]);
        assert!(said.starts_with("r.toml: --set allocate.bitz=3: unknown field `bitz`, expected one of `bits`"), "{said}");
        let said = message(TEXT, &["allocate.bits=four"]);
        assert!(said.contains("--set allocate.bits=four: not a TOML value"), "{said}");
    }

    #[test]
    fn keys_are_found_in_the_file_unless_the_command_line_replaced_them() {
        let source = Source { path: "r.toml".into(), text: TEXT.into(), replaced: vec!["allocate.bits".into()] };
        let at = |key: &str| source.span(key).map(|span| &TEXT[span]);
        assert_eq!(at("calibrate.corpus.1"), Some("\"b.txt\""));
        assert_eq!(at("model"), Some("\"../m\""));
        assert_eq!(at("quantize.gptq"), Some("gptq"));
        assert_eq!(at("allocate.bits"), None);
        assert_eq!(at("allocate.group"), Some("allocate"));
        assert_eq!(at("evaluate.text"), None);
    }
}
