//! Reads a Mixture-of-Experts checkpoint, runs it and measures it. Changes nothing.
//!
//! [`checkpoint`] gives tensors by name, [`arch`] says what each tensor is to the model and what arithmetic the config asks for,
//! [`Model`](model::Model) joins the two, [`forward`] runs one decoder layer at a time over a batch of samples on a burn
//! backend, [`backward`] goes back from a loss at the end, [`pass`] streams the layers and hands what passes through to [`stats`],
//! [`evaluate`] compares two models on text.

pub mod arch;
pub mod backward;
pub mod checkpoint;
pub mod corpus;
pub mod device;
mod error;
pub mod evaluate;
pub mod forward;
pub mod linalg;
pub mod model;
pub mod pass;
pub mod progress;
pub mod sample;
pub mod stats;
pub mod tensor;
mod weights;

pub use error::{Error, Result};
pub use model::Model;
pub use weights::{Applied, Weights};
