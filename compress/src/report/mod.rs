//! What is told at the end: tables for people, the same rows as JSON.

mod table;
mod usage;

pub use table::{bytes, count, markdown, memory, seconds, table};
pub use usage::{Cost, Meter};
