//! Globs over tensor names.

/// A pattern over module or tensor names: `*` stands for any run of characters (dots too), `?` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(Vec<char>);

impl Glob {
    /// A pattern. Every text is one.
    pub fn new(pattern: &str) -> Self {
        Self(pattern.chars().collect())
    }

    /// Whether it matches a tensor: its whole name, or the name of its module (without the last `.weight`).
    pub fn matches(&self, tensor: &str) -> bool {
        self.matches_whole(tensor) || tensor.strip_suffix(".weight").is_some_and(|module| self.matches_whole(module))
    }

    /// The classic walk with one point to fall back to: the last star, which then swallows one character more.
    fn matches_whole(&self, text: &str) -> bool {
        let (pattern, text) = (&self.0, text.chars().collect::<Vec<_>>());
        let (mut p, mut t, mut star) = (0, 0, None);
        while t < text.len() {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, t));
                    p += 1;
                }
                Some(&c) if c == '?' || c == text[t] => (p, t) = (p + 1, t + 1),
                _ => {
                    let Some((at, from)) = star else { return false };
                    star = Some((at, from + 1));
                    (p, t) = (at + 1, from + 1);
                }
            }
        }
        pattern[p..].iter().all(|&c| c == '*')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_or_a_tensor_or_a_run_of_them() {
        let down = "model.layers.0.mlp.down_proj.weight";
        for yes in ["model.layers.0.mlp.down_proj", down, "*down_proj", "model.layers.?.mlp.*", "*", "*.0.*proj"] {
            assert!(Glob::new(yes).matches(down), "{yes}");
        }
        for no in ["model.layers.1.*", "down_proj", "model.layers.0.mlp.down_pro", "", "*up_proj", "model.layers.0.mlp.down_proj?"] {
            assert!(!Glob::new(no).matches(down), "{no}");
        }
    }

    #[test]
    fn the_last_star_falls_back() {
        // "ab" must be found again after the first "aba" fails on its tail.
        assert!(Glob::new("*ab").matches("abaab"));
        assert!(!Glob::new("*ab").matches("abaa"));
        assert!(Glob::new("").matches(""));
    }
}
