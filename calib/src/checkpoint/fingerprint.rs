//! Short names for what was read: SHA-256 in hex, over fields that cannot run into one another.

use sha2::{Digest, Sha256};

use super::shard::Shard;

/// A hash in the making. Each field goes in with its length, so that `ab, c` and `a, bc` differ.
///
/// ```
/// use calib::checkpoint::Fingerprint;
/// let corpus = Fingerprint::of("corpus").field(b"en.txt").field(b"It was a dark night.").finish();
/// assert_eq!(corpus.len(), 64);
/// ```
#[must_use]
pub struct Fingerprint(Sha256);

impl Fingerprint {
    /// Starts a fingerprint of one kind of thing; the same fields of another kind give another hash.
    pub fn of(kind: &str) -> Self {
        Self(Sha256::new()).field(kind.as_bytes())
    }

    /// Adds a field.
    pub fn field(mut self, bytes: &[u8]) -> Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// Adds a number.
    pub fn number(self, number: u64) -> Self {
        self.field(&number.to_le_bytes())
    }

    /// 64 hex digits.
    #[must_use]
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

/// SHA-256 of bytes as they are (what `sha256sum` prints), in hex.
#[must_use]
pub fn hash_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The fingerprint of a checkpoint: its config as bytes, and of every shard its name and its header's content, which implies its size.
///
/// It takes no part in it whether the data are there, so that a plan made from a shape-only copy fits the model.
pub(super) fn of_checkpoint(config: &[u8], shards: &[Shard]) -> String {
    let mut print = Fingerprint::of("moepress checkpoint 1").field(config).number(shards.len() as u64);
    for shard in shards {
        let header = &shard.header;
        let metadata = header.metadata.iter().filter(|(key, value)| (key.as_str(), value.as_str()) != super::SHAPE_ONLY);
        print = print.field(shard.name().as_bytes()).number(metadata.clone().count() as u64).number(header.entries.len() as u64);
        for (key, value) in metadata {
            print = print.field(key.as_bytes()).field(value.as_bytes());
        }
        for entry in &header.entries {
            print = print.field(entry.name.as_bytes()).field(entry.dtype.name().as_bytes()).number(entry.shape.len() as u64);
            print = entry.shape.iter().fold(print, |print, &side| print.number(side as u64));
            print = print.number(entry.bytes.start).number(entry.bytes.end);
        }
    }
    print.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_hash() {
        // The first 16 digits of SHA-256 of nothing and of "abc" (FIPS 180-2).
        assert_eq!(hash_bytes(b"")[..16], *"e3b0c44298fc1c14");
        assert_eq!(hash_bytes(b"abc")[..16], *"ba7816bf8f01cfea");
    }

    #[test]
    fn fields_do_not_run_together() {
        let print = |fields: &[&[u8]]| fields.iter().fold(Fingerprint::of("x"), |print, field| print.field(field)).finish();
        assert_ne!(print(&[b"ab", b"c"]), print(&[b"a", b"bc"]));
        assert_ne!(print(&[b"ab"]), print(&[b"ab", b""]));
        assert_eq!(print(&[b"ab"]), print(&[b"ab"]));
    }
}
