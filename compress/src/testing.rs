//! What the tests of several modules share.

use std::path::Path;

use calib::Model;

/// A tiny checkpoint of `tests/parity`.
pub fn fixture(name: &str) -> Model {
    Model::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity").join(name)).unwrap()
}
