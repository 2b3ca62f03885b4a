//! What a tensor is to the model: its role.
//!
//! Roles are total: every tensor of a checkpoint is claimed by exactly one, or opening fails and lists the strangers.

use std::fmt;

/// One of the three matrices of a gated MLP, each stored as `[out, in]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Projection {
    /// `W_g`, `[inner, hidden]`.
    Gate,
    /// `W_u`, `[inner, hidden]`.
    Up,
    /// `W_d`, `[hidden, inner]`.
    Down,
}

impl Projection {
    /// All three, in the order in which they are applied.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

/// A tensor's place inside one decoder layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Part {
    /// Gain of the norm before attention, `[hidden]`.
    InputNorm,
    /// Bias of the norm before attention, `[hidden]`.
    InputNormBias,
    /// Gain of the norm before the MLP, `[hidden]`.
    PostNorm,
    /// Bias of the norm before the MLP, `[hidden]`.
    PostNormBias,
    /// Query projection, `[heads · head_dim, hidden]` (MLA without query rank: `[heads · (nope + rope), hidden]`).
    Query,
    /// Its bias.
    QueryBias,
    /// Key projection, `[kv_heads · head_dim, hidden]`.
    Key,
    /// Its bias.
    KeyBias,
    /// Value projection, `[kv_heads · head_dim, hidden]`.
    Value,
    /// Its bias.
    ValueBias,
    /// Output projection, `[hidden, heads · value_dim]`.
    Output,
    /// Its bias.
    OutputBias,
    /// Gain of the query norm: `[head_dim]`, or `[heads · head_dim]` over the full width.
    QueryNorm,
    /// Gain of the key norm: `[head_dim]`, or `[kv_heads · head_dim]` over the full width.
    KeyNorm,
    /// MLA: query compression, `[q_rank, hidden]`.
    QueryA,
    /// Its bias.
    QueryABias,
    /// MLA: gain of the norm over the compressed query, `[q_rank]`.
    QueryANorm,
    /// MLA: query expansion, `[heads · (nope + rope), q_rank]`.
    QueryB,
    /// MLA: key-value compression with the shared rope key, `[kv_rank + rope, hidden]`.
    KvA,
    /// Its bias.
    KvABias,
    /// MLA: gain of the norm over the compressed key-value, `[kv_rank]`.
    KvANorm,
    /// MLA: key-value expansion, `[heads · (nope + value), kv_rank]`.
    KvB,
    /// Router, `[experts, hidden]`.
    Router,
    /// Selection bias of the router (`e_score_correction_bias`), `[experts]`.
    RouterCorrection,
    /// A routed expert's matrix.
    Expert(usize, Projection),
    /// The shared expert's matrix (all shared experts are stored as one MLP).
    Shared(Projection),
    /// Gate of the shared expert, `[1, hidden]`.
    SharedGate,
    /// A matrix of the MLP of a layer that has no experts.
    Dense(Projection),
}

/// A tensor's place in the model.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Role {
    /// Token embedding, `[vocab, hidden]`.
    Embedding,
    /// A tensor of decoder layer `.0`.
    Layer(usize, Part),
    /// Gain of the last norm, `[hidden]`.
    FinalNorm,
    /// Bias of the last norm, `[hidden]`.
    FinalNormBias,
    /// Output head, `[vocab, hidden]`; absent where it is tied to the embedding.
    Head,
    /// Bias of the output head, `[vocab]`.
    HeadBias,
    /// A tensor of a multi-token-prediction layer: carried through, not run. Told apart by name.
    Mtp,
    /// A buffer of old checkpoints (`rotary_emb.inv_freq`), or a stored copy of a tied head: dropped and counted.
    Buffer,
}

/// The kinds that `inspect` counts bytes by and that recipes speak of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// Token embedding.
    Embedding,
    /// Output head and its bias.
    Head,
    /// Norm gains and biases, also those inside attention.
    Norm,
    /// Attention matrices and their biases.
    Attention,
    /// Router and its selection bias.
    Router,
    /// Routed experts.
    Expert,
    /// Shared experts.
    Shared,
    /// Gate of the shared expert.
    SharedGate,
    /// MLPs of layers without experts.
    Dense,
    /// Multi-token-prediction layers.
    Mtp,
    /// Dropped buffers.
    Buffer,
}

impl Role {
    /// The kind of this tensor.
    pub fn kind(self) -> Kind {
        match self {
            Self::Embedding => Kind::Embedding,
            Self::FinalNorm | Self::FinalNormBias => Kind::Norm,
            Self::Head | Self::HeadBias => Kind::Head,
            Self::Mtp => Kind::Mtp,
            Self::Buffer => Kind::Buffer,
            Self::Layer(_, part) => part.kind(),
        }
    }

    /// The decoder layer it stands in, if any.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Layer(layer, _) => Some(layer),
            _ => None,
        }
    }

    /// Whether it is a Linear matrix of a decoder layer that quantizers may change:
    /// routed and shared experts, dense MLPs, attention; never router, shared-expert gate, norms, biases, embedding, head, MTP.
    pub fn is_quantizable(self) -> bool {
        matches!(self, Self::Layer(_, part) if part.site().is_some())
    }
}

/// Where rows enter a Linear matrix: matrices that share a site share their inputs and so their second moment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Site {
    /// After the input norm: query, key, value; MLA: query (or query A) and kv A. `[tokens, hidden]`.
    AttentionIn,
    /// MLA: the normed compressed query, into query B. `[tokens, q_rank]`.
    QueryB,
    /// MLA: the normed compressed key-value, into kv B. `[tokens, kv_rank]`.
    KvB,
    /// Attention's weighted values, into the output projection. `[tokens, heads · value_dim]`.
    AttentionOut,
    /// Into a dense MLP's gate and up.
    DenseIn,
    /// Into a dense MLP's down.
    DenseDown,
    /// Into the shared expert's gate and up: every token.
    SharedIn,
    /// Into the shared expert's down.
    SharedDown,
    /// Into one routed expert's gate and up: the tokens routed to it.
    ExpertIn(usize),
    /// Into one routed expert's down.
    ExpertDown(usize),
}

impl Part {
    /// The site whose rows this matrix multiplies; `None` for what is not a quantizable Linear matrix.
    pub fn site(self) -> Option<Site> {
        use Projection::{Down, Gate, Up};
        Some(match self {
            Self::Query | Self::Key | Self::Value | Self::QueryA | Self::KvA => Site::AttentionIn,
            Self::QueryB => Site::QueryB,
            Self::KvB => Site::KvB,
            Self::Output => Site::AttentionOut,
            Self::Dense(Gate | Up) => Site::DenseIn,
            Self::Dense(Down) => Site::DenseDown,
            Self::Shared(Gate | Up) => Site::SharedIn,
            Self::Shared(Down) => Site::SharedDown,
            Self::Expert(e, Gate | Up) => Site::ExpertIn(e),
            Self::Expert(e, Down) => Site::ExpertDown(e),
            _ => return None,
        })
    }

    fn kind(self) -> Kind {
        match self {
            Self::InputNorm
            | Self::InputNormBias
            | Self::PostNorm
            | Self::PostNormBias
            | Self::QueryNorm
            | Self::KeyNorm
            | Self::QueryANorm
            | Self::KvANorm => Kind::Norm,
            Self::Router | Self::RouterCorrection => Kind::Router,
            Self::Expert(..) => Kind::Expert,
            Self::Shared(_) => Kind::Shared,
            Self::SharedGate => Kind::SharedGate,
            Self::Dense(_) => Kind::Dense,
            _ => Kind::Attention,
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AttentionIn => f.write_str("attention.in"),
            Self::QueryB => f.write_str("attention.q_b"),
            Self::KvB => f.write_str("attention.kv_b"),
            Self::AttentionOut => f.write_str("attention.out"),
            Self::DenseIn => f.write_str("dense.in"),
            Self::DenseDown => f.write_str("dense.down"),
            Self::SharedIn => f.write_str("shared.in"),
            Self::SharedDown => f.write_str("shared.down"),
            Self::ExpertIn(e) => write!(f, "expert.{e}.in"),
            Self::ExpertDown(e) => write!(f, "expert.{e}.down"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embedding => "embedding",
            Self::Head => "head",
            Self::Norm => "norms",
            Self::Attention => "attention",
            Self::Router => "router",
            Self::Expert => "experts",
            Self::Shared => "shared experts",
            Self::SharedGate => "shared-expert gate",
            Self::Dense => "dense MLPs",
            Self::Mtp => "MTP layers",
            Self::Buffer => "buffers",
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(layer, part) => write!(f, "layer {layer}, {part}"),
            Self::Embedding => f.write_str("token embedding"),
            Self::FinalNorm => f.write_str("last norm"),
            Self::FinalNormBias => f.write_str("last norm, bias"),
            Self::Head => f.write_str("output head"),
            Self::HeadBias => f.write_str("output head, bias"),
            Self::Mtp => f.write_str("MTP layer"),
            Self::Buffer => f.write_str("buffer"),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expert(expert, projection) => write!(f, "expert {expert}, {projection}"),
            Self::Shared(projection) => write!(f, "shared expert, {projection}"),
            Self::Dense(projection) => write!(f, "MLP, {projection}"),
            Self::SharedGate => f.write_str("gate of the shared expert"),
            Self::Router => f.write_str("router"),
            Self::RouterCorrection => f.write_str("router, selection bias"),
            Self::InputNorm => f.write_str("norm before attention"),
            Self::InputNormBias => f.write_str("norm before attention, bias"),
            Self::PostNorm => f.write_str("norm before the MLP"),
            Self::PostNormBias => f.write_str("norm before the MLP, bias"),
            Self::Query => f.write_str("query"),
            Self::QueryBias => f.write_str("query, bias"),
            Self::Key => f.write_str("key"),
            Self::KeyBias => f.write_str("key, bias"),
            Self::Value => f.write_str("value"),
            Self::ValueBias => f.write_str("value, bias"),
            Self::Output => f.write_str("attention output"),
            Self::OutputBias => f.write_str("attention output, bias"),
            Self::QueryNorm => f.write_str("query norm"),
            Self::KeyNorm => f.write_str("key norm"),
            Self::QueryA => f.write_str("query compression"),
            Self::QueryABias => f.write_str("query compression, bias"),
            Self::QueryANorm => f.write_str("norm of the compressed query"),
            Self::QueryB => f.write_str("query expansion"),
            Self::KvA => f.write_str("key-value compression"),
            Self::KvABias => f.write_str("key-value compression, bias"),
            Self::KvANorm => f.write_str("norm of the compressed key-value"),
            Self::KvB => f.write_str("key-value expansion"),
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}
