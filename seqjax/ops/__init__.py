"""Pure functions on arrays: no parameters, no Flax. Needs jax and jaxtyping alone."""

from seqjax.ops.attention import attended_pairs, flash_attention
from seqjax.ops.segments import Segments, SegmentState, segments

__all__ = ["SegmentState", "Segments", "attended_pairs", "flash_attention", "segments"]
