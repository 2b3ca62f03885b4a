//! Windows drawn at random from a text, none twice.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Nothing to set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {}

/// Which of `windows` to take: `take ≤ windows` different ones in the order drawn. Every text has a stream of its own, so
/// that another text in the corpus does not change it.
pub(super) fn pick(windows: usize, take: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    let mut order: Vec<usize> = (0..windows).collect();
    for i in 0..take {
        // The bias of a remainder of 64 bits by a few thousand windows is below 1e-15.
        let j = i + (rng.next_u64() % (windows - i) as u64) as usize;
        order.swap(i, j);
    }
    order.truncate(take);
    order
}

#[test]
fn all_of_them_is_a_permutation() {
    let mut all = pick(50, 50, 3, 0);
    assert_ne!(all, (0..50).collect::<Vec<_>>());
    all.sort_unstable();
    assert_eq!(all, (0..50).collect::<Vec<_>>());
}

#[test]
fn seeds_and_streams_differ() {
    assert_ne!(pick(50, 10, 3, 0), pick(50, 10, 4, 0));
    assert_ne!(pick(50, 10, 3, 0), pick(50, 10, 3, 1));
}
