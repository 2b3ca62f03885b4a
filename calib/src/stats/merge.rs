//! Statistics of several passes added up into one folder.

use super::{Manifest, Store};
use crate::{Error, Result};

impl Store {
    /// Fills this folder with the sum of finished passes over different samples of one model. Domains of the same name are
    /// one domain; the others stand behind each other in the order in which they come up.
    ///
    /// # Errors
    ///
    /// [`Error::Unmergeable`] where this folder holds something already, or a pass is not finished, is of another model, or has samples
    /// that another one has too; an IO error; [`Error::OtherVersion`], [`Error::Statistics`] and [`Error::StatsDiffer`] where files do not fit their manifests.
    pub fn merge(&self, from: &[Self]) -> Result<Manifest> {
        if self.dir().is_dir() && fs_err::read_dir(self.dir())?.next().is_some() {
            let reason = "it holds something already; statistics are added up into an empty or new directory".to_owned();
            return Err(Error::Unmergeable { dir: self.dir().into(), reason });
        }
        let manifests = from.iter().map(finished).collect::<Result<Vec<_>>>()?;
        let Some(first) = manifests.first() else { return Err(Error::EmptyCorpus) };
        let mut merged = Manifest { domains: vec![], parts: vec![], ..first.clone() };
        for (store, manifest) in from.iter().zip(&manifests) {
            let refuse = |reason: &str| Err(Error::Unmergeable { dir: store.dir().into(), reason: reason.to_owned() });
            if (&manifest.model, manifest.layers) != (&first.model, first.layers) {
                return refuse(&format!("it is of another model than the first ({:.12}…, not {:.12}…)", manifest.model, first.model));
            }
            let alike = |m: &Manifest| m.parts.iter().any(|part| part.similarity_tokens > 0);
            if alike(manifest) != alike(first) {
                return refuse("of it and the first only one has measured how alike experts are (calibrate.similarity_tokens)");
            }
            if manifest.parts.iter().any(|part| merged.parts.iter().any(|other| other.corpus == part.corpus)) {
                return refuse("its samples are among the others' already and would count twice");
            }
            merged.parts.extend(manifest.parts.iter().cloned());
            for domain in &manifest.domains {
                if !merged.domains.contains(domain) {
                    merged.domains.push(domain.clone());
                }
            }
        }
        for layer in 0..merged.layers {
            let mut sum = None;
            for (store, manifest) in from.iter().zip(&manifests) {
                let to: Vec<usize> =
                    manifest.domains.iter().filter_map(|name| merged.domains.iter().position(|other| other == name)).collect();
                let stats = store.get(layer)?.with_domains(&to, merged.domains.len());
                match &mut sum {
                    None => sum = Some(stats),
                    Some(sum) => sum.merge(&stats)?,
                }
            }
            if let Some(sum) = sum {
                self.put(layer, &sum)?;
            }
        }
        self.finish(&merged)?;
        Ok(merged)
    }
}

fn finished(store: &Store) -> Result<Manifest> {
    let reason = "it holds no finished pass (no manifest.json)".to_owned();
    store.manifest()?.ok_or_else(|| Error::Unmergeable { dir: store.dir().into(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::forward::testing::{Table, latent_spec, random, samples};
    use crate::pass::{Pass, run};
    use crate::progress::Quiet;
    use crate::sample::{Calibrate, Samples};

    fn measured(dir: &std::path::Path, table: &Table, ids: &[Vec<u32>], domains: &[&str], domain: &[usize]) -> Store {
        let store = Store::new(dir.join(domains.join("-") + &ids.len().to_string()));
        let domains = domains.iter().map(|d| (*d).to_owned()).collect();
        let samples = Samples { domains, tokens: ids[0].len(), ids: ids.to_vec(), domain: domain.to_vec(), ..Default::default() };
        let calibrate = Calibrate::over(vec![]);
        let pass = Pass {
            weights: table,
            fingerprint: "m",
            samples: &samples,
            calibrate: &calibrate,
            store: &store,
            watch: None,
            progress: &Quiet,
        };
        run(&pass, Device::Cpu).unwrap();
        store
    }

    fn relative(a: f64, b: f64) -> f64 {
        (a - b).abs() / b.abs().max(1e-9)
    }

    #[test]
    fn two_halves_are_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let table = random(latent_spec(), 5);
        let ids = samples(&[300; 5], 32);
        let whole = measured(dir.path(), &table, &ids, &["en", "code"], &[0, 1, 0, 1, 0]);
        // The second half knows its domains in another order, and one more that has no sample.
        let halves = [
            measured(dir.path(), &table, &ids[..2], &["en", "code"], &[0, 1]),
            measured(dir.path(), &table, &ids[2..], &["code", "en", "cjk"], &[1, 0, 1]),
        ];
        let sum = Store::new(dir.path().join("sum"));
        let manifest = sum.merge(&halves).unwrap();
        assert_eq!((manifest.domains.as_slice(), manifest.parts.len()), (["en", "code", "cjk"].map(String::from).as_slice(), 2));
        for layer in 0..2 {
            let (sum, whole) = (sum.get(layer).unwrap(), whole.get(layer).unwrap());
            for (a, b) in sum.channels.values().zip(whole.channels.values()) {
                assert_eq!(a.tokens, b.tokens);
                assert!(a.squares.iter().zip(&b.squares).all(|(&a, &b)| relative(a, b) < 1e-5));
            }
            let (Some(a), Some(b)) = (sum.experts, whole.experts) else { continue };
            assert_eq!(a.router.counts.slice(ndarray::s![..2, ..]), b.router.counts);
            assert_eq!(a.router.pairs, b.router.pairs);
            assert_eq!(a.router.counts.row(2).sum(), 0);
            let sums = [
                (&a.router.mass, &b.router.mass),
                (&a.outputs.weighted, &b.outputs.weighted),
                (&a.outputs.importance, &b.outputs.importance),
            ];
            for (a, b) in sums {
                assert!(a.slice(ndarray::s![..2, ..]).iter().zip(b).all(|(&a, &b)| relative(a, b) < 1e-4), "{a}, {b}");
            }
        }
    }

    #[test]
    fn what_does_not_add_up_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let table = random(latent_spec(), 5);
        let store = measured(dir.path(), &table, &samples(&[30; 2], 32), &["en"], &[0, 0]);
        let sum = Store::new(dir.path().join("sum"));
        let error = sum.merge(&[store.clone(), store.clone()]).unwrap_err().to_string();
        assert!(error.contains("en2") && error.contains("count twice"), "{error}");
        let error = sum.merge(&[store.clone(), sum.clone()]).unwrap_err().to_string();
        assert!(error.contains("no finished pass"), "{error}");
        let other = Store::new(dir.path().join("other"));
        other.finish(&Manifest { model: "n".into(), parts: vec![], ..store.manifest().unwrap().unwrap() }).unwrap();
        assert!(sum.merge(&[store.clone(), other.clone()]).unwrap_err().to_string().contains("of another model"));
        other.finish(&Manifest { schema: 2, parts: vec![], ..store.manifest().unwrap().unwrap() }).unwrap();
        assert!(sum.merge(&[store.clone(), other.clone()]).unwrap_err().to_string().contains("its form is 2"));
        assert!(other.merge(&[store]).unwrap_err().to_string().contains("holds something already"));
    }
}
