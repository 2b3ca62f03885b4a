//! What is wrong with a recipe, and where.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, with its numbers.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Where it stands, in bytes of the recipe; `None` where nothing in the file is to blame.
    pub span: Option<Range<usize>>,
}

/// A recipe that cannot be followed: every problem found, with the text they stand in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The recipe's file.
    pub path: PathBuf,
    /// Its text; empty where it could not be read.
    pub text: String,
    /// What is wrong with it, in the order of the file.
    pub problems: Vec<Problem>,
}

impl Invalid {
    /// Line and column of a byte of the text, both from 1, columns in characters.
    pub fn position(&self, at: usize) -> (usize, usize) {
        let before = &self.text[..self.text.floor_char_boundary(at)];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{}", self.path.display())?;
            if let Some(span) = &problem.span {
                let (line, column) = self.position(span.start);
                write!(f, ":{line}:{column}")?;
            }
            write!(f, ": {}", problem.message)?;
            if let Some(help) = &problem.help {
                write!(f, "; {help}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_has_its_line_and_column() {
        let problem = |message: &str, span| Problem { message: message.into(), help: None, span };
        let invalid = Invalid {
            path: "r.toml".into(),
            text: "a = 1\né = 2\n".into(),
            // `é` is two bytes: byte 9 is the `=` behind it, the third character of its line.
            problems: vec![problem("one", Some(0..1)), problem("two", Some(9..10)), problem("three", None)],
        };
        assert_eq!(invalid.to_string(), "r.toml:1:1: one\nr.toml:2:3: two\nr.toml: three");
    }
}
