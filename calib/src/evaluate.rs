//! Perplexity, KL divergence and top-1 agreement on held-out text.
