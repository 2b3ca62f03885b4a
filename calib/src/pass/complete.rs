//! Completions of demonstrations, written by the model itself before it is measured on them.
//!
//! Each file of the corpus with prompts that nothing follows is written anew, with what the model said, as `NAME-KEY.jsonl`, the key being
//! over the model, the file and what was asked for. The file is replaced after every group of completions, so that a run that is started
//! again goes on with the lines that are left. Prompts of equally many tokens are continued side by side, each by random numbers of its own.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;

use crate::checkpoint::{Fingerprint, hash_bytes};
use crate::corpus::{Demonstrations, Finish, Source, Tokenizer};
use crate::device::{Device, Job};
use crate::forward::{Generator, NoTap, likeliest, values};
use crate::progress::Progress;
use crate::sample::Generate;
use crate::sample::write::Stream;
use crate::stats::store::write_whole;
use crate::{Result, Weights};

/// What completions are written with.
#[derive(Clone, Copy)]
pub struct Complete<'a> {
    /// The model.
    pub weights: &'a dyn Weights,
    /// Its fingerprint.
    pub fingerprint: &'a str,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// How they are written.
    pub params: &'a Generate,
    /// Seed of whatever is drawn.
    pub seed: u64,
    /// Where the files go.
    pub dir: &'a Path,
    /// Hears of every token.
    pub progress: &'a dyn Progress,
}

/// A file that is being written.
struct File {
    /// Its place in the corpus, from which its random numbers come.
    source: usize,
    path: PathBuf,
    lines: Demonstrations,
}

/// The sources with every demonstration complete: those with prompts that nothing follows are replaced by what is written for them.
///
/// # Errors
///
/// An IO error, [`Error::NotUtf8`], [`Error::JsonLine`], those of [`Demonstrations::prompt`], and what running the model says.
pub fn complete(asked: &Complete<'_>, sources: &[Source], device: Device) -> Result<Vec<Source>> {
    let (mut files, mut all) = (Vec::new(), sources.to_vec());
    for (i, source) in all.iter_mut().enumerate() {
        if !Demonstrations::are_in(&source.path) {
            continue;
        }
        let mut lines = Demonstrations::read(&source.path)?;
        if lines.unfinished().is_empty() {
            continue;
        }
        let domain = source.domain().into_owned();
        let path = asked.dir.join(format!("{domain}-{:.12}.jsonl", asked.key(&source.path, i)?));
        if path.is_file() {
            lines = Demonstrations::read(&path)?;
        }
        (source.path, source.name) = (path.clone(), Some(domain));
        files.push(File { source: i, path, lines });
    }
    if files.iter().any(|file| !file.lines.unfinished().is_empty()) {
        device.run(Write { asked, files: &mut files })?;
    }
    for file in &files {
        tracing::info!(
            "{}: completions by the model, {} of them cut at {} tokens",
            file.path.display(),
            file.lines.cut(),
            asked.params.tokens
        );
    }
    Ok(all)
}

impl Complete<'_> {
    /// Over everything that a completion depends on but how many are written at once.
    fn key(&self, path: &Path, source: usize) -> Result<String> {
        let key = Fingerprint::of("completions")
            .field(self.fingerprint.as_bytes())
            .field(hash_bytes(&fs_err::read(path)?).as_bytes())
            .field(self.params.temperature.to_string().as_bytes())
            .number(self.params.tokens as u64)
            .number(self.seed)
            .number(source as u64)
            .number(self.tokenizer.known() as u64);
        Ok(key.finish())
    }
}

struct Write<'a> {
    asked: &'a Complete<'a>,
    files: &'a mut [File],
}

impl Job for Write<'_> {
    type Output = Result<()>;

    fn run<B: Backend>(self, device: &B::Device) -> Result<()> {
        let Complete { params, tokenizer, progress, .. } = *self.asked;
        let stops = tokenizer.stops()?;
        let left: usize = self.files.iter().map(|file| file.lines.unfinished().len()).sum();
        let generator = Generator::<B>::load(self.asked.weights, device, params.experts.experts())?;
        progress.start("written tokens at most", (left * params.tokens) as u64);
        for File { source, path, lines } in self.files {
            let unfinished = lines.unfinished();
            let prompt = |line: usize| Ok((line, lines.prompt(line, tokenizer)?));
            let mut prompts: Vec<(usize, Vec<u32>)> = unfinished.into_iter().map(prompt).collect::<Result<_>>()?;
            prompts.sort_by_key(|(line, ids)| (ids.len(), *line));
            for group in prompts.chunk_by(|a, b| a.1.len() == b.1.len()).flat_map(|alike| alike.chunks(params.at_once.max(1))) {
                for (line, said, finish) in self.asked.group(&generator, *source, group, &stops)? {
                    lines.finish(line, &tokenizer.decode(&said)?, finish);
                }
                write_whole(path, |file| file.write_all(lines.text().as_bytes()))?;
            }
        }
        progress.finish();
        Ok(())
    }
}

/// One completion that is being written.
struct Text {
    line: usize,
    ids: Vec<u32>,
    random: Stream,
}

impl Complete<'_> {
    /// Continues equally long prompts side by side: the line of each, what the model said and why it ends there.
    fn group<B: Backend>(
        &self,
        generator: &Generator<'_, B>,
        source: usize,
        prompts: &[(usize, Vec<u32>)],
        stops: &[u32],
    ) -> Result<Vec<(usize, Vec<u32>, Finish)>> {
        let Generate { tokens, temperature, .. } = *self.params;
        let random = |line: usize| Stream::new(self.seed, ((source as u64) << 32) + line as u64);
        let mut texts: Vec<Text> =
            prompts.iter().map(|(line, ids)| Text { line: *line, ids: ids.clone(), random: random(*line) }).collect();
        let begin = prompts.first().map_or(0, |(_, ids)| ids.len());
        let (mut cache, mut done, known) = (generator.cache(), Vec::new(), self.tokenizer.known());
        for length in begin..begin + tokens {
            if generator.outgrown(&cache, length) {
                cache = generator.cache();
            }
            let new: Vec<Vec<u32>> = texts.iter().map(|text| text.ids[cache.tokens()..].to_vec()).collect();
            let logits = generator.step(&new, &mut cache, &NoTap)?;
            let vocab = logits.dims()[1];
            let logits = values(logits, "logits")?;
            let mut going = Vec::new();
            let rows = std::mem::take(&mut texts);
            let count = rows.len();
            for (row, mut text) in rows.into_iter().enumerate() {
                let logits = &logits[row * vocab..][..known.min(vocab)];
                let next = if temperature > 0.0 { text.random.sample(logits, temperature, known) } else { likeliest(logits) };
                if stops.contains(&next) {
                    self.progress.tick((begin + tokens - length) as u64);
                    done.push((text.line, text.ids.split_off(begin), Finish::End));
                } else {
                    self.progress.tick(1);
                    text.ids.push(next);
                    going.push(row);
                    texts.push(text);
                }
            }
            if going.is_empty() {
                return Ok(done);
            }
            if going.len() < count {
                cache.select(&going);
            }
        }
        done.extend(texts.into_iter().map(|mut text| (text.line, text.ids.split_off(begin), Finish::Length)));
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::tests::tiny;
    use crate::forward::Experts;
    use crate::forward::testing::{Table, grouped_spec, latent_spec, random};
    use crate::progress::Quiet;

    const PROMPTS: &str = "{\"prompt\": \"a b\"}\n{\"prompt\": \"c d e\"}\n{\"text\": \"a b\"}\n{\"prompt\": \"f g\"}\n{\"prompt\": \"h i\"}\n{\"prompt\": \"b c\"}\n";

    fn written(table: &Table, params: &Generate, dir: &Path) -> Vec<serde_json::Value> {
        let tokenizer = tiny(dir);
        let path = dir.join("x.jsonl");
        fs_err::write(&path, PROMPTS).unwrap();
        let out = dir.join("written");
        let asked = Complete { weights: table, fingerprint: "m", tokenizer: &tokenizer, params, seed: 3, dir: &out, progress: &Quiet };
        let found = complete(&asked, &[dir.join("other.txt").into(), path.into()], Device::Cpu).unwrap();
        assert_eq!((found[0].path.clone(), found[1].domain().into_owned()), (dir.join("other.txt"), "x".to_owned()));
        fs_err::read_to_string(&found[1].path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The same, a full pass for every token; stops at the end token, 0.
    fn slow(table: &Table, prompt: &[u32], tokens: usize) -> Vec<u32> {
        let generator = Generator::<crate::device::Cpu>::load(table, &Default::default(), Experts::Streamed).unwrap();
        let mut ids = prompt.to_vec();
        for _ in 0..tokens {
            let logits = values(generator.step(std::slice::from_ref(&ids), &mut generator.cache(), &NoTap).unwrap(), "test").unwrap();
            match likeliest(&logits[..11]) {
                0 => break,
                next => ids.push(next),
            }
        }
        ids.split_off(prompt.len())
    }

    #[test]
    fn prompts_side_by_side_say_what_each_says_alone() {
        let mut words = 0;
        for spec in [grouped_spec(), latent_spec()] {
            let dir = tempfile::tempdir().unwrap();
            let table = random(spec, 5);
            let params = Generate { tokens: 9, at_once: 3, ..Generate::default() };
            let lines = written(&table, &params, dir.path());
            let tokenizer = tiny(dir.path());
            assert_eq!((lines.len(), &lines[2]["text"]), (6, &"a b".into()));
            for (line, prompt) in [(0, [1, 2].as_slice()), (1, &[3, 4, 5]), (3, &[6, 7]), (4, &[8, 9]), (5, &[2, 3])] {
                let said = slow(&table, prompt, 9);
                match said.as_slice() {
                    [] => assert_eq!(lines[line]["text"], tokenizer.decode(prompt).unwrap(), "line {line}"),
                    said => assert_eq!(lines[line]["completion"], tokenizer.decode(said).unwrap(), "line {line}: {said:?}"),
                }
                words += said.len();
                assert_eq!(lines[line]["finish"], if said.len() < 9 { "end" } else { "length" }, "line {line}");
            }
        }
        assert!(words > 20, "{words} tokens were written");
    }

    #[test]
    fn a_completion_ends_where_the_model_ends_it() {
        // With a temperature all tokens come up, the end token among them.
        let dir = tempfile::tempdir().unwrap();
        let table = random(grouped_spec(), 5);
        let params = Generate { tokens: 200, temperature: 50.0, at_once: 4, ..Generate::default() };
        let lines = written(&table, &params, dir.path());
        let ended: Vec<_> = lines.iter().filter(|line| line["finish"] == "end").collect();
        assert!(ended.len() >= 4, "{lines:?}");
        assert!(ended.iter().all(|line| !line["completion"].as_str().unwrap_or_default().contains("<|end|>")), "{lines:?}");
        let one = Generate { at_once: 1, ..params };
        let again = tempfile::tempdir().unwrap();
        assert_eq!(written(&table, &one, again.path()), lines, "however many are written at once");
    }

    #[test]
    fn what_is_written_is_kept_and_gone_on_with() {
        let (whole, begun) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (table, params) = (random(grouped_spec(), 5), Generate { tokens: 6, at_once: 2, ..Generate::default() });
        let all = written(&table, &params, whole.path());
        written(&table, &params, begun.path());
        let path = fs_err::read_dir(begun.path().join("written")).unwrap().next().unwrap().unwrap().path();
        let text = fs_err::read_to_string(&path).unwrap();
        let half: Vec<&str> = text.lines().take(2).chain(PROMPTS.lines().skip(2)).collect();
        fs_err::write(&path, half.join("\n")).unwrap();
        assert_eq!(written(&table, &params, begun.path()), all);
        // Finished: weights that cannot be read do no harm.
        let mut broken = table.clone();
        broken.tensors.clear();
        assert_eq!(written(&broken, &params, begun.path()), all);
        let other = Generate { tokens: 5, ..params };
        assert_ne!(written(&table, &other, begun.path()), all);
    }
}
