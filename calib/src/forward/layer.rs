//! One decoder layer: attention and MLP with their norms and residual sums.

use burn::tensor::{Tensor, backend::Backend};

use super::adjoint::{Adjoint, Frame};
use super::attention::{GroupedAttention, Pass};
use super::cache::LayerCache;
use super::latent::LatentAttention;
use super::linear::Source;
use super::moe::{GatedMlp, MoeBlock, accumulate};
use super::norm::NormLayer;
use super::parallel::{Options, in_blocks};
use super::rope::Rotary;
use super::tap::Tap;
use crate::arch::{Attention, Mlp, NormKind, Part, Rope, Site, Spec};
use crate::{Result, Weights};

/// Whether a loaded layer holds its routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experts {
    /// They are read when the layer runs, a few at a time, and dropped.
    Streamed,
    /// They are read once and kept.
    Resident,
}

/// A decoder layer's weights on a device.
#[derive(Clone, Debug)]
pub struct DecoderLayer<B: Backend> {
    index: usize,
    window: Option<usize>,
    rope: Rope,
    input_norm: NormLayer<B>,
    attention: AttentionKind<B>,
    pub(crate) post_norm: NormLayer<B>,
    pub(crate) mlp: MlpKind<B>,
}

#[derive(Clone, Debug)]
enum AttentionKind<B: Backend> {
    Grouped(GroupedAttention<B>),
    Latent(LatentAttention<B>),
}

#[derive(Clone, Debug)]
pub(crate) enum MlpKind<B: Backend> {
    Dense(GatedMlp<B>),
    Moe(Box<MoeBlock<B>>),
}

/// One batch on its way through attention.
struct Batch<'a, B: Backend> {
    index: usize,
    x: Tensor<B, 3>,
    cache: Option<&'a mut LayerCache<B>>,
    rotary: Rotary<B>,
}

/// What one layer's run is done with.
pub(crate) struct Context<'a, B: Backend> {
    pub weights: &'a dyn Weights,
    pub layer: usize,
    pub device: &'a B::Device,
    pub tap: &'a dyn Tap<B>,
    pub options: Options,
}

impl<B: Backend> Context<'_, B> {
    /// Where this layer's tensors come from.
    pub fn source(&self) -> Source<'_, B> {
        Source { weights: self.weights, layer: self.layer, device: self.device }
    }

    /// All rows of these sites have been shown.
    pub fn done<const N: usize>(&self, sites: [Site; N]) -> Result<()> {
        let mut wanted = sites.into_iter().filter(|&site| self.tap.wants(self.layer, site));
        wanted.try_for_each(|site| self.tap.done(self.layer, site))
    }

    /// Shows a tensor of every batch by name.
    pub fn show_all(&self, name: &'static str, batches: &[Tensor<B, 2>]) -> Result<()> {
        batches.iter().enumerate().try_for_each(|(batch, x)| self.tap.block(self.layer, name, batch, x))
    }
}

/// Carries all samples through one decoder layer, in place.
///
/// `hidden` are batches `[samples, tokens, hidden]` as [`embed`](super::embed) gives them; after an error they are lost.
/// The layer's weights are read for this call and dropped, its experts a few at a time.
///
/// # Errors
///
/// What reading a weight or the tap says; [`Error::WeightShape`](crate::Error::WeightShape) and
/// [`Error::RouterNotFinite`](crate::Error::RouterNotFinite).
pub fn decoder_layer<B: Backend>(
    w: &dyn Weights,
    layer: usize,
    hidden: &mut [Tensor<B, 3>],
    tap: &dyn Tap<B>,
    options: Options,
) -> Result<()> {
    let Some(first) = hidden.first() else { return Ok(()) };
    let device = first.device();
    DecoderLayer::load(w, layer, &device, Experts::Streamed)?.forward(w, hidden, &mut [], tap, options)
}

/// Carries all samples through one layer's attention alone, and gives what then enters its MLP or experts: the rows behind the second
/// norm, `[rows, hidden]` a batch. `hidden` stays as it is; the tap sees attention's sites.
///
/// # Errors
///
/// As [`decoder_layer`].
pub fn attention_alone<B: Backend>(
    w: &dyn Weights,
    layer: usize,
    hidden: &[Tensor<B, 3>],
    tap: &dyn Tap<B>,
    options: Options,
) -> Result<Vec<Tensor<B, 2>>> {
    let Some(first) = hidden.first() else { return Ok(Vec::new()) };
    let device = first.device();
    let context = Context { weights: w, layer, device: &device, tap, options };
    let loaded = DecoderLayer::load(w, layer, &device, Experts::Streamed)?;
    let mut attended = hidden.to_vec();
    loaded.attend(&context, &mut attended, &mut [])?;
    Ok(attended.into_iter().map(|x| loaded.post_norm.apply(super::rows(x))).collect())
}

impl<B: Backend> DecoderLayer<B> {
    /// Reads a layer's weights; with [`Experts::Resident`] all of them.
    ///
    /// # Errors
    ///
    /// As [`decoder_layer`].
    pub fn load(w: &dyn Weights, layer: usize, device: &B::Device, experts: Experts) -> Result<Self> {
        let spec = w.spec();
        let source = Source { weights: w, layer, device };
        let attention = match &spec.attention {
            Attention::Grouped(shape) => AttentionKind::Grouped(GroupedAttention::load(&source, spec, shape)?),
            Attention::Latent(shape) => AttentionKind::Latent(LatentAttention::load(&source, spec, shape)?),
        };
        let mlp = match &spec.layers[layer].mlp {
            Mlp::Dense { inner } => MlpKind::Dense(GatedMlp::load(&source, Part::Dense, *inner)?),
            Mlp::Moe(moe) => MlpKind::Moe(Box::new(MoeBlock::load(&source, moe, experts)?)),
        };
        Ok(Self {
            index: layer,
            window: spec.layers[layer].window,
            rope: spec.rope.clone(),
            input_norm: norm(&source, spec, Part::InputNorm, Part::InputNormBias)?,
            attention,
            post_norm: norm(&source, spec, Part::PostNorm, Part::PostNormBias)?,
            mlp,
        })
    }

    /// Carries all batches through the layer, in place.
    ///
    /// `caches` holds one cache a batch, whose tokens stand before these, or is empty: then every sample starts at
    /// position 0 and nothing is kept. `w` gives the experts that are not resident.
    ///
    /// # Errors
    ///
    /// As [`decoder_layer`].
    pub fn forward(
        &self,
        w: &dyn Weights,
        hidden: &mut [Tensor<B, 3>],
        caches: &mut [LayerCache<B>],
        tap: &dyn Tap<B>,
        options: Options,
    ) -> Result<()> {
        let Some(first) = hidden.first() else { return Ok(()) };
        let device = first.device();
        let context = Context { weights: w, layer: self.index, device: &device, tap, options };
        self.attend(&context, hidden, caches)?;
        let shapes: Vec<[usize; 3]> = hidden.iter().map(|x| x.dims()).collect();
        let mut residual: Vec<_> = hidden.iter_mut().map(|x| take(x, &device)).collect();
        self.feed_forward(&context, &mut residual)?;
        if tap.wants_blocks() {
            context.show_all("hidden", &residual)?;
        }
        for ((x, residual), shape) in hidden.iter_mut().zip(residual).zip(shapes) {
            *x = residual.reshape(shape);
        }
        Ok(())
    }

    /// The first half: `x += attention(norm(x))`, batch by batch.
    pub(crate) fn attend(&self, context: &Context<'_, B>, hidden: &mut [Tensor<B, 3>], caches: &mut [LayerCache<B>]) -> Result<()> {
        let wants = |site| context.tap.wants(context.layer, site);
        let task = |Batch { index, x, cache, rotary }: Batch<'_, B>| {
            let mut pass = Pass { rotary: &rotary, window: self.window, cache, wants: &wants, seen: Vec::new() };
            let normed = self.input_norm.apply(x.clone());
            let out = match &self.attention {
                AttentionKind::Grouped(attention) => attention.forward(normed, &mut pass),
                AttentionKind::Latent(attention) => attention.forward(normed, &mut pass),
            };
            Ok((index, x, out, pass.seen))
        };
        let batches = self.batches(hidden, caches, context.device);
        in_blocks(context.options.in_flight, batches, task, |(index, x, out, seen)| {
            for (site, rows) in seen {
                context.tap.rows(context.layer, site, &rows, None)?;
            }
            if context.tap.wants_blocks() {
                context.tap.block(context.layer, "attn", index, &super::rows(out.clone()))?;
            }
            hidden[index] = x + out;
            Ok(())
        })?;
        self.attention_done(context)
    }

    /// The batches with their caches and rotary tables, which are made once for batches of one length.
    fn batches<'a>(&self, hidden: &[Tensor<B, 3>], caches: &'a mut [LayerCache<B>], device: &B::Device) -> Vec<Batch<'a, B>> {
        let mut caches = caches.iter_mut();
        let mut known: Option<([usize; 2], Rotary<B>)> = None;
        let mut batch = |(index, x): (usize, &Tensor<B, 3>)| {
            let cache = caches.next();
            let at = [cache.as_ref().map_or(0, |cache| cache.tokens()), x.dims()[1]];
            let rotary = match known.take() {
                Some((known, rotary)) if known == at => rotary,
                _ => Rotary::new(&self.rope, at[0], at[1], device),
            };
            known = Some((at, rotary.clone()));
            Batch { index, x: x.clone(), cache, rotary }
        };
        hidden.iter().enumerate().map(&mut batch).collect()
    }

    /// The gradient at a batch before attention, from the batch `x` as it entered and `gradient`, that after the residual sum,
    /// all `[rows, hidden]`; and what passed attention's matrices.
    pub(crate) fn attend_backward(&self, x: Tensor<B, 2>, gradient: Tensor<B, 2>, [samples, tokens]: [usize; 2]) -> Adjoint<B> {
        let rotary = Rotary::new(&self.rope, 0, tokens, &x.device());
        let frame = Frame { shape: [samples, tokens], rotary: &rotary, window: self.window };
        let normed = self.input_norm.apply(x.clone());
        let Adjoint { input, sites } = match &self.attention {
            AttentionKind::Grouped(attention) => attention.backward(normed, gradient.clone(), &frame),
            AttentionKind::Latent(attention) => attention.backward(normed, gradient.clone(), &frame),
        };
        Adjoint { input: gradient + self.input_norm.backward(x, input), sites }
    }

    /// Tells the tap that the sites of attention are done.
    fn attention_done(&self, context: &Context<'_, B>) -> Result<()> {
        context.done([Site::AttentionIn])?;
        if let AttentionKind::Latent(attention) = &self.attention {
            if attention.compresses_queries() {
                context.done([Site::QueryB])?;
            }
            context.done([Site::KvB])?;
        }
        context.done([Site::AttentionOut])
    }

    /// The second half: `x += mlp(norm(x))`.
    pub(crate) fn feed_forward(&self, context: &Context<'_, B>, residual: &mut [Tensor<B, 2>]) -> Result<()> {
        let mut normed = Vec::with_capacity(residual.len());
        let task = |x: &Tensor<B, 2>| Ok(self.post_norm.apply(x.clone()));
        in_blocks(context.options.in_flight, residual.iter(), task, |x| {
            normed.push(x);
            Ok(())
        })?;
        match &self.mlp {
            MlpKind::Moe(block) => block.forward(context, &normed, residual),
            MlpKind::Dense(mlp) => mlp.run_all(context, [Site::DenseIn, Site::DenseDown], &normed, |batch, out| {
                accumulate(&mut residual[batch], out);
                Ok(())
            }),
        }
    }
}

/// A norm of the residual stream.
fn norm<B: Backend>(source: &Source<'_, B>, spec: &Spec, gain: Part, bias: Part) -> Result<NormLayer<B>> {
    let gain = source.vector(gain, spec.hidden)?;
    Ok(match spec.norm.kind {
        NormKind::Rms => NormLayer::rms(gain, spec.norm.eps),
        NormKind::Layer => NormLayer::layer(gain, source.vector(bias, spec.hidden)?, spec.norm.eps),
    })
}

/// Takes a batch out as rows, so that it can be changed without a copy.
fn take<B: Backend>(x: &mut Tensor<B, 3>, device: &B::Device) -> Tensor<B, 2> {
    super::rows(std::mem::replace(x, Tensor::empty([1, 1, 1], device)))
}
