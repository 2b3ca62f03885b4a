//! One decoder layer at a time over all samples, generic over the burn backend.
//!
//! Samples stand in *batches*: tensors `[samples, tokens, hidden]` of equally long samples, about [`BATCH_TOKENS`] tokens
//! each. [`embed`] makes them, [`decoder_layer`] carries them through one layer in place, [`Head`] turns them into logits;
//! a [`Tap`] sees what passes through. [`Generator`] keeps all layers and a key-value cache instead.
//!
//! **Memory.** With `R` rows (tokens of all samples), hidden width `d`, batches of `b` rows, `n` = [`Options::in_flight`],
//! experts of width `f` and queries of width `q` = heads · head width, one layer needs at its peak, in f32,
//!
//! `4 · ( 3·R·d + 2·R·k + W + max( n·b·4·(q + d) + n·max(4·b·q, 3·SCORES) , 3·n·f·d + min(R, n·CHUNK)·(3·d + 4·f) ) )` bytes:
//!
//! the residual stream, its normed copy and at most one more copy of expert outputs that wait to be added; the lists of rows of
//! `k` experts a token; `W` for attention, router and shared expert; and either the attention of `n` batches or `n` experts
//! with chunks of their rows. Never a whole layer of experts. [`peak_bytes`] computes it, and a test holds the layer to it.
//!
//! **Bits do not depend on the number of threads.** Work is cut by shapes alone; the only sums that cross a cut are the
//! experts' contributions to a row, and those are added in rising order of expert.

mod adjoint;
mod attention;
mod batch;
mod cache;
mod generate;
mod head;
mod latent;
mod layer;
mod linear;
pub(crate) mod memory;
mod moe;
mod norm;
mod parallel;
#[cfg(test)]
mod properties;
mod rope;
pub mod router;
mod tap;
#[cfg(test)]
pub(crate) mod testing;

pub(crate) use adjoint::{Adjoint, SiteRows};
pub use batch::{BATCH_TOKENS, embed, rows};
pub use cache::{Cache, LayerCache};
pub use generate::Generator;
pub(crate) use generate::likeliest;
pub use head::Head;
pub(crate) use layer::{Context, MlpKind};
pub use layer::{DecoderLayer, Experts, attention_alone, decoder_layer};
pub use memory::{Samples, generator_bytes, layer_weights, peak_bytes};
pub(crate) use moe::CHUNK;
pub(crate) use moe::{GatedMlp, Load, MlpAdjoint, MoeBlock, Output, SharedExpert, accumulate, add, blocks, expert, gather, pieces, starts};
pub use moe::{spread, values};
pub use parallel::{Options, limit_in_flight};
pub(crate) use parallel::{in_blocks, together};
pub use tap::{NoTap, Routed, Routing, Tap};
