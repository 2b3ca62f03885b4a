//! Decides and changes.

pub mod allocate;
mod error;
pub mod quantize;

pub use error::{Error, Result};
