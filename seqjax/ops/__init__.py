"""Pure functions on arrays: no parameters, no Flax. Needs jax and jaxtyping alone."""

from seqjax.ops.affine_scan import affine_scan
from seqjax.ops.attention import attended_pairs, decode_attention, flash_attention, merge_attention
from seqjax.ops.complex_pairs import Pair
from seqjax.ops.convolution import Tail, long_convolution, short_convolution
from seqjax.ops.discretization import discretize_dense, discretize_diagonal
from seqjax.ops.linear_attention import bidirectional_linear_attention, linear_attention
from seqjax.ops.newton_scan import newton_scan
from seqjax.ops.prefix_attention import prefix_attention
from seqjax.ops.scan import AFFINE, COMPLEX_AFFINE, Monoid, linear_scan, prefix_scan
from seqjax.ops.segments import Segments, SegmentState, segments
from seqjax.ops.softmax import SOFTMAX, SoftmaxSums
from seqjax.ops.state_space import CompanionSystem, DenseSystem, DiagonalPlusLowRankSystem, DiagonalSystem

__all__ = [
    "AFFINE",
    "COMPLEX_AFFINE",
    "SOFTMAX",
    "CompanionSystem",
    "DenseSystem",
    "DiagonalPlusLowRankSystem",
    "DiagonalSystem",
    "Monoid",
    "Pair",
    "SegmentState",
    "Segments",
    "SoftmaxSums",
    "Tail",
    "affine_scan",
    "attended_pairs",
    "bidirectional_linear_attention",
    "decode_attention",
    "discretize_dense",
    "discretize_diagonal",
    "flash_attention",
    "linear_attention",
    "linear_scan",
    "long_convolution",
    "merge_attention",
    "newton_scan",
    "prefix_attention",
    "prefix_scan",
    "segments",
    "short_convolution",
]
