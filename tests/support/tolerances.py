"""Every tolerance of the tests, with its reason. Where equality holds, no test reads this table.

Values are absolute, for the tiny models, whose logits are of the order of 10.
"""

import torch

OTHER_KERNEL = {torch.float32: 1e-5, torch.bfloat16: 0.15}
"""The same function of the same numbers by another kernel: eager for sdpa, one product per head for
one of all heads, a sum over heads for one product. Measured: 2.7e-6 and 0.035."""

LENS = {torch.float32: 1e-5, torch.bfloat16: 0.15}
"""Lens at depth L against the model's logits: a product of another shape in fp32 (measured 0, but
the kernel is the BLAS' choice), in bf16 also the model's own rounding, which the lens, being fp32,
does not share (measured 0.046 on the bundled models, whose logits reach 14)."""

PATTERN_ROW_SUM = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""A softmax's row against 1, over up to 134 keys (measured 4.8e-7, and 0.0032 after rounding each
weight to bf16)."""

SUM_OVER_HEADS = {torch.float32: 6e-6, torch.bfloat16: 0.06}
"""The heads' results, added up in fp32, against one product for all of them (measured 1.5e-6;
0.020 with results in bf16)."""

SHIFTED_POSITIONS = {torch.float32: 2e-4, torch.bfloat16: 0.5}
"""Logits after 1000 is added to every position: angles near 1000 rad hold 5 digits less (measured
5.2e-5 and 0.13)."""

PADDED_ROW = {torch.float32: 2e-5, torch.bfloat16: 0.25}
"""A left-padded row against the same prompt alone: products and sums of other lengths, the audio
encoder's batch among them (measured 4.1e-6 and 0.063)."""

LENS_ROWS = 1e-5
"""Lens of the bundled models: the head's label rows alone against the whole head, and a norm of one
row against one of all. Logits are of the order of 10, norms of 100. Measured on 216 runs: logits
and norms 0 (which kernels do not promise), entropy and KL 2.5e-6."""
ATTENTION_MASS = 1e-5
"""Attention by span: one softmax row from rotated q and k, against the eager kernel's pattern.
Measured on 216 runs: 4.8e-7."""

AGAINST_FP64 = 1e-6
"""Relative: a mean of 54 squares and a root in fp32, against the same in fp64. Measured: 1.1e-7."""

LENS_SUMS = 1e-5
"""KL and entropy of the lens over 337 tokens, and norms, fp32 against float64 (measured 2.2e-6)."""

ENCODER_BATCH = {torch.float32: 1e-5}
"""Logits, when a clip was encoded alone instead of beside others, or a row run
elsewhere in a batch: the same products, cut differently. Measured: 1.2e-6."""
RESAMPLED_DONOR = 2e-5
"""Logits of a run patched with a donor resampled in time: two formulas of linear interpolation.
Measured: 1.9e-6."""

MASS_OF_PATTERN = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Mass against sums of ``hook_pattern``: another kernel (measured 1.8e-7); in bf16 the pattern is
rounded, and the mass, being fp32, is not (measured 0.0057)."""

LABEL_LOG_PROB = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Summed log-probability of a label of three tokens, in a padded batch against one prompt at a time
(measured 1.9e-6 and 0.023)."""

RECOVERED = 1e-3
"""Share of an effect of 0.01 logits that a set of edges restores: rounding of logits near 1 is
a hundredth of a percent of it. Measured: 2.2e-5."""

GENERATION_STEPS = {torch.float32: 2.5e-5, torch.bfloat16: 0.3}
"""Activations of generation, one position at a step, against one run over all positions: products
of one row against products of all (measured 7.5e-6 and 0.094)."""

ATTRIBUTION = 1e-6
"""Attribution scores, relative to the largest: two graphs of the same products, and a sum over
heads for one product. Measured: 1.4e-7."""

DETECTED = 5.1e-4
"""`detect_head`'s "abs" scores, which TransformerLens rounds to three decimals."""

SOLVED = 3e-5
"""What an iteration in fp32 finds (singular vectors, a probe's optimum, eigenvalues) against the
same by another way in float64. Measured: 7.7e-6."""

TRAINED = 1e-3
"""Losses of four steps of Adam, which turns the rounding of a vanishing gradient into a whole step.
Measured: 3.4e-4."""

FOLDED = {torch.float32: 3e-5, torch.bfloat16: 0.5}
"""Log-probabilities and activations of processed weights against those of the checkpoint's: every
product of the forward is rounded elsewhere (measured 9.5e-6; 0.153 with weights in bf16)."""
FOLDED_WEIGHTS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""A folded weight against TransformerLens', where sums run in another order: means over the
vocabulary and output biases (measured 3.0e-7, and 0 after rounding to bf16)."""
CENTRED = {torch.float32: 1e-7, torch.bfloat16: 1e-3}
"""What is left of a mean over the vocabulary that was subtracted and rounded (measured 4.6e-9 and
1.3e-4), and a weight it is subtracted from again (7.5e-9 and 2.4e-4)."""
COMPOSITION = 1e-5
"""Relative: composition scores from triangular factors in fp32, against dense products in fp64 and
TransformerLens' singular values (measured 3.2e-7 and 8.2e-7)."""
SINGULAR_VECTORS = 2e-4
"""Logits, of the order of 1, of a head's singular vectors in fp32 against fp64 (measured 1.9e-5;
vectors are as exact as their singular values are apart)."""

GRADIENT = 1e-5
"""Relative to a gradient's largest entry: the sums of autograd in another order, where heads are
shown ungrouped or tensors lie otherwise in memory (measured 3.0e-6; 0 for grouped heads)."""

BRIDGE_FORKS = 1e-5
"""TransformerLens' bridge while it splits inputs per head or sums the heads' results: one product
per head for one of all (measured 5.0e-6)."""

DIRECT_PATH = 1e-5
"""Effect of one path on a logit difference of about 10 in the bundled model: a query computed head
by head against all heads at once, and the difference of two runs (measured 9.5e-7)."""

FAST_ENGINE = {torch.float32: 2e-5, torch.bfloat16: 0.25}
"""Logits of a patched run by the fast engine against a whole run: attention in two parts by another
kernel, products of other numbers of rows (measured 7.6e-6 and 0.096; label scores of the bundled
models in ``emotion_conflict`` 4.8e-6)."""

ENGINE = {torch.float32: 1e-5, torch.bfloat16: 0.06}
"""Relative to the largest logit: the fast engine's rows, in products and softmaxes of other shapes,
against whole runs under hooks (measured 8.3e-7 over every site, mode and donor; 0.0165)."""

PATHS = {torch.float32: 2e-5}
"""Logits of a path-patched run against Hugging Face under PyTorch hooks, or the same by another
route: a message is a difference of two products, added to a stream. Measured over all comparisons:
2.6e-6 (a set of edges on Qwen3); chains 1.8e-6."""

FIRST_ORDER = 0.02
"""Relative to the largest score: half the difference of two patches of +-2 % against the gradient,
which leaves terms of third order and the rounding of logits near 10 (measured 1.1e-3)."""

SOFTMAX_FIXED = 1e-4
"""Relative to the largest effect, of 0.1 logits: attribution with the QK fix against patching,
where nothing but the softmax bends; rounding in the patched runs (measured 2e-7 on keys)."""

PADDED_SCORES = 1e-5
"""Relative to the largest score: gradients of a left-padded row in a batch against the prompt alone
(measured 2.0e-6)."""

SAME_DONOR = 2e-5
"""Relative to another donor's largest score: scores of a donor that equals the base, whose run
shares a prefix with it and is rounded elsewhere (a few 1e-7 of scores near 1)."""

EDGE_SCORES = 5e-6
"""Relative to the largest score: edge scores by einsum over nodes against autograd through forks of
the stream, sums of edges against their node, or positions summed in parts (measured 1.2e-6)."""

BENCH_SWEEPS = 1e-5
"""Differences of two logits near 4: the fast engine against the bridge's eager attention and the
fused one of Hugging Face, every cell of the smallest sweeps (measured 1.9e-6)."""

DIVERGENCE = 2e-5
"""Losses and divergences in nats: fp32 sums over chunks of the vocabulary against float64 over all
of it, and sdpa against eager attention, on logits of the order of 10 (measured 2.5e-6 with the same
kernel)."""

TUNED_LENS_STEPS = 3e-5
"""Six steps of training translators in fp32 against float64, losses in nats and parameters relative
to the largest: Adam divides gradients near 0 by their own size (measured 8.5e-6; SGD 1.8e-7)."""

HEAD_NORMS = 1e-6
"""Relative (cosines: absolute): norms of heads in fp32, by a triangular factor or summed over
tokens in fp32, against products and sums in fp64 or of other shapes (measured 2.8e-7)."""
HEAD_NORMS_CANCELLED = 2e-3
"""Relative: the same where the head's weights leave a thousandth of its output (measured 3.9e-4
over 200 draws; by the Gram matrix it is percents)."""
MERGED_MOMENTS = 4e-15
"""Means and standard deviations near 1 in fp64, of the same samples merged in another order
(measured 2.2e-16)."""

GATES = 5e-5
"""Answers and recoveries of a model built to be a gate, which are 0 and 1: its norm divides by a
constant of 1000 beside inputs of 1 (measured 1.4e-5)."""

LOG_MEL = 1e-5
"""Log-mel features near 1 in fp32 against their definition in fp64 (measured 3.0e-6), and, once,
against transformers' extractor with torchaudio (4.2e-6)."""

UNMERGED = 2e-4
"""Logits in fp32 under a merged adapter, against PEFT's layers that keep it apart:
two products for one (measured 5.1e-5)."""

BATCHED_ROWS = 2e-4
"""What is read of a prompt in a left-padded batch against the same alone, on bundled models."""

PRETENDED = 2e-6
"""Results on devices that are pretended: operations are taken apart before they are dispatched, and
some CPUs round these parts otherwise (logits: measured 4.8e-7 on an EPYC, 0 elsewhere)."""

PEER_DICTIONARY = 3e-6
"""Relative, and absolute near 0: losses and gradients of sparse autoencoders, by products with the
active latents alone, against SAELens' and dictionary_learning's dense ones, on rows near 2.
Measured: 5.8e-7."""
