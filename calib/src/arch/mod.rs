//! Families: what a tensor's name means and what arithmetic a config asks for.
//!
//! [`FAMILIES`] is the registry. [`resolve`] reads a config through its family into a [`Spec`], [`Layout::claim`] gives every
//! tensor of a checkpoint its [`Role`].

pub mod family;

mod claim;
#[cfg(test)]
mod hub;
mod keys;
mod resolve;
mod role;
mod ropes;
mod spec;

mod deepseek;
mod deepseek_v2;
mod deepseek_v3;
mod mixtral;
mod olmoe;
mod phimoe;
mod qwen2_moe;
mod qwen3_moe;

pub use claim::{Axis, Claimed, Layout, Misfit, expected};
pub use family::Family;
pub use resolve::{Resolved, resolve};
pub use role::{Kind, Part, Projection, Role, Site};
pub use spec::{
    Attention, GroupScore, Grouped, Groups, Latent, LayerSpec, Mlp, Moe, Norm, NormKind, Pairing, QkNorm, Rope, RopeScaling, Router, Score,
    Shared, Spec,
};

/// Every family that can be opened, by `model_type`.
pub static FAMILIES: &[&Family] = &[
    &deepseek::FAMILY,
    &deepseek_v2::FAMILY,
    &deepseek_v3::FAMILY,
    &mixtral::FAMILY,
    &olmoe::FAMILY,
    &phimoe::FAMILY,
    &qwen2_moe::FAMILY,
    &qwen3_moe::FAMILY,
];
