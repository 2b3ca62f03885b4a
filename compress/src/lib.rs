//! Decides what becomes of a model and does it: recipe, plan, transforms, export, command line.
//!
//! Data runs one way. A [`recipe`] and a measured model make a [`plan`](plan::Plan); the plan is applied layer by layer; the result is
//! exported and evaluated. [`run`] strings these stages together and knows how to go on after an interruption; [`cli`] is what a
//! person types.

pub mod allocate;
pub mod apply;
mod blend;
pub mod cli;
pub mod constants;
pub mod dump;
mod error;
pub mod export;
pub mod fold;
pub mod imatrix;
pub mod merge;
pub mod mtp;
pub mod objective;
pub mod packed;
pub mod plan;
pub mod prune;
pub mod quantize;
pub mod recipe;
pub mod reduce;
pub mod repair;
pub mod report;
pub mod run;
pub mod solved;
pub mod survey;
pub mod tensorfile;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
