//! Families: what a tensor's name means and what arithmetic a config asks for.

mod role;
mod spec;

pub use role::{Kind, Part, Projection, Role, Site};
pub use spec::{
    Attention, GroupScore, Grouped, Groups, Latent, LayerSpec, Mlp, Moe, Norm, NormKind, Pairing, QkNorm, Rope, RopeScaling, Router, Score,
    Shared, Spec,
};
