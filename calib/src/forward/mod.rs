//! One decoder layer at a time over all samples, generic over the burn backend.

mod tap;

pub use tap::{NoTap, Routed, Routing, Tap};
