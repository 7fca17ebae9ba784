"""What every mixer and model promises, as checks: the chunk law, causality, packing, decoding, precision, accounts.

Each check is a function of a `Subject`; `checks_for` lists those that apply. `check_mixer` and `check_model` run them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqjax.config import ConfigError
from seqjax.mixers.base import Mixer
from seqjax.scaling.flops import count_flops
from seqjax.testing.faces import BATCH, LENGTH, Faces, relative_error

X64_TOLERANCE = 1e-9
F32_TOLERANCE = 2e-4
BF16_TOLERANCE = 5e-2
FLOPS_RANGE = (0.85, 1.05)
"""Bounds on (declared FLOPs) / (counted FLOPs): declared ones leave out norms, activations and masks."""
WIDE = 256

CHUNKS = (5, 1)
"""Chunk lengths that are compiled, longest first: several tokens, more than a small `chunk_size` of a mixer, and one."""
SEGMENT_IDS = np.array([[1] * 6 + [2] * 3 + [1] * 5, [0] * 4 + [7] * 10], np.int32)
"""Row 0: three documents, the third reusing the first's id; row 1: left padding, then a document."""
ONE_SEGMENT = np.ones((BATCH, LENGTH), np.int32)


class Subject:
    """A module under test: its inputs, its variables, and its faces at each precision, made when first needed.

    Args:
      module: a mixer, or a model with one output per token.
      inputs: `[BATCH, LENGTH]` tokens or `[BATCH, LENGTH, width]` floats.
      carries_state, segments, causal: what it promises.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: np.ndarray,
        *,
        carries_state: bool,
        segments: bool,
        causal: bool,
    ) -> None:
        self.module, self.inputs = module, inputs
        self.carries_state, self.segments, self.causal = carries_state and causal, segments, causal
        self.floats = bool(np.issubdtype(inputs.dtype, np.floating))
        self.segment_ids = SEGMENT_IDS if segments else ONE_SEGMENT

    @functools.cached_property
    def boxed(self) -> Any:
        """Variables as `init` returns them, with the logical axes of each parameter."""
        return jax.jit(self.module.init)(jax.random.key(0), self.inputs)

    @functools.cached_property
    def variables(self) -> Any:
        """Initial values with noise added, because a branch that starts at zero would hide a mistake in it."""
        rng = np.random.default_rng(0)
        noisy = lambda a: np.asarray(a) + 0.1 * rng.standard_normal(a.shape).astype(a.dtype)
        return jax.tree.map(noisy, nn.unbox(self.boxed))

    @functools.cached_property
    def f64(self) -> Faces:
        wide = jax.tree.map(lambda a: a.astype(np.float64), self.variables)
        return Faces(self.module.clone(dtype="float64", param_dtype="float64"), wide, self.width, self.floats, x64=True)

    @functools.cached_property
    def f32(self) -> Faces:
        return Faces(
            self.module.clone(dtype="float32", param_dtype="float32"), self.variables, self.width, self.floats, x64=False
        )

    @functools.cached_property
    def bf16(self) -> Faces:
        return Faces(
            self.module.clone(dtype="bfloat16", param_dtype="float32"), self.variables, self.width, self.floats, x64=False
        )

    @functools.cached_property
    def width(self) -> int:
        """Of the outputs, `[BATCH, LENGTH, width]`."""
        return jax.eval_shape(self.module.apply, self.variables, self.inputs)[0].shape[-1]

    @functools.cached_property
    def cotangent(self) -> np.ndarray:
        """A random direction in the space of outputs."""
        return np.random.default_rng(1).standard_normal((BATCH, LENGTH, self.width))

    @functools.cached_property
    def whole(self) -> Any:
        """The parallel face in float64: what the other faces are compared with."""
        return self.f64.parallel(self.inputs, self.segment_ids, self.cotangent)

    def split(self, seed: int) -> list[int]:
        """A random split of LENGTH into `CHUNKS`; seed 0 takes the longest first."""
        rng, split = np.random.default_rng(seed), []
        while sum(split) < LENGTH:
            fits = [n for n in CHUNKS if n <= LENGTH - sum(split)]
            split.append(fits[0] if seed == 0 else int(rng.choice(fits)))
        return split

    def redrawn(self, seed: int) -> np.ndarray:
        """Other inputs: no token, and no value, is the same."""
        if self.floats:
            return np.random.default_rng(seed).standard_normal(self.inputs.shape)
        return self.inputs ^ 1


def chunks_equal_one_call(subject: Subject, seeds: Sequence[int] = range(4)) -> None:
    """From the start of a sequence, every split gives the parallel face's outputs and gradients (float64)."""
    for split in map(subject.split, seeds):
        state = subject.f64.init_state()
        run = subject.f64.chain(subject.inputs, state, subject.segment_ids, split, subject.cotangent)
        _close(run.outputs, subject.whole.outputs, X64_TOLERANCE, f"outputs of split {split}")
        for name, wanted in subject.whole.gradients.items():
            _close(run.gradients[name], wanted, X64_TOLERANCE, f"gradient by {name} of split {split}")


def chunks_equal_one_call_midway(subject: Subject) -> None:
    """From a state in mid-sequence, one call equals several: outputs, state, and gradients, also by that state."""
    faces, ids, longest = subject.f64, subject.segment_ids, CHUNKS[0]
    warm = faces.chain(subject.inputs[:, :5], faces.init_state(), ids[:, :5], [5]).state
    piece = slice(5, 5 + longest)
    x, cotangent = subject.inputs[:, piece], subject.cotangent[:, piece]
    rng = np.random.default_rng(2)
    pull = [rng.standard_normal(a.shape) for a in jax.tree.leaves(warm) if np.issubdtype(a.dtype, np.inexact)]
    one = faces.chain(x, warm, ids[:, piece], [longest], cotangent, pull)
    many = faces.chain(x, warm, ids[:, piece], [1] * longest, cotangent, pull)
    _close(many.outputs, one.outputs, X64_TOLERANCE, "outputs")
    _close(many.state, one.state, X64_TOLERANCE, "final state")
    for name, wanted in one.gradients.items():
        _close(many.gradients[name], wanted, X64_TOLERANCE, f"gradient by {name}")


def no_ids_means_one_segment(subject: Subject) -> None:
    """Without segment ids a row is one segment, and a carried call continues the last one."""
    alone, _ = subject.f32.forward(subject.inputs, None, None)
    wanted = subject.f64.parallel(subject.inputs, ONE_SEGMENT).outputs
    _close(alone, wanted, F32_TOLERANCE, "outputs without ids")
    if subject.carries_state:
        ids = subject.segment_ids
        _, state = subject.f32.forward(subject.inputs[:, :5], subject.f32.init_state(), ids[:, :5])
        unnamed, _ = subject.f32.forward(subject.inputs[:, 5:6], state, None)
        same = np.concatenate([ids[:, :5], ids[:, 4:5]], axis=1)
        named = subject.f64.chain(subject.inputs[:, :6], subject.f64.init_state(), same, [5, 1]).outputs
        _close(unnamed, named[:, 5:], F32_TOLERANCE, "outputs continued without ids")


def float32_is_accurate(subject: Subject) -> None:
    """Both faces in float32 agree with the parallel face in float64; a mixer's gradients too."""
    if isinstance(subject.module, Mixer) or not subject.carries_state:  # a model's gradients are those of its mixers
        run = subject.f32.parallel(subject.inputs, subject.segment_ids, subject.cotangent)
        _close(run.outputs, subject.whole.outputs, F32_TOLERANCE, "outputs of the parallel face")
        for name, wanted in subject.whole.gradients.items():
            _close(run.gradients[name], wanted, F32_TOLERANCE, f"gradient of the parallel face by {name}")
    if subject.carries_state:
        outputs, state = [], subject.f32.init_state()
        for piece in (slice(0, 5), slice(5, 10)):
            y, state = subject.f32.forward(subject.inputs[:, piece], state, subject.segment_ids[:, piece])
            outputs.append(y)
        _close(np.concatenate(outputs, axis=1), subject.whole.outputs[:, :10], F32_TOLERANCE, "outputs of the carried face")


def bfloat16_is_close(subject: Subject) -> None:
    """Computing in bfloat16 stays near the float64 result."""
    outputs, _ = subject.bf16.forward(subject.inputs, None, subject.segment_ids)
    _close(outputs, subject.whole.outputs, BF16_TOLERANCE, "outputs in bfloat16")


def never_looks_ahead(subject: Subject) -> None:
    """Output t depends on inputs up to t, and on some of them: by gradient, or for tokens by changing one."""
    for t in (0, 5, LENGTH - 1):
        if subject.floats:
            cotangent = np.zeros_like(subject.cotangent)
            cotangent[:, t] = subject.cotangent[:, t]
            influence = subject.f64.parallel(subject.inputs, ONE_SEGMENT, cotangent).gradients["inputs"]
            assert not np.any(influence[:, t + 1 :]), f"output {t} depends on later inputs"
            assert np.all(np.any(influence[:, : t + 1], axis=(1, 2))), f"output {t} depends on no input"
        else:
            changed = subject.inputs.copy()
            changed[:, t] ^= 1
            before = subject.f64.parallel(subject.inputs, ONE_SEGMENT).outputs
            after = subject.f64.parallel(changed, ONE_SEGMENT).outputs
            assert np.array_equal(before[:, :t], after[:, :t]), f"outputs before {t} depend on input {t}"
            assert np.all(np.any(before[:, t:] != after[:, t:], axis=(1, 2))), f"no output depends on input {t}"


def sees_both_sides(subject: Subject) -> None:
    """In the bidirectional form, an output depends on the input before it and on the input after it."""
    before = subject.f64.parallel(subject.inputs, ONE_SEGMENT).outputs
    for kept, moved in ((5, 6), (6, 5)):
        changed = subject.inputs.copy()
        changed[:, moved] = subject.redrawn(5)[:, moved]
        after = subject.f64.parallel(changed, ONE_SEGMENT).outputs
        assert np.all(np.any(before[:, kept] != after[:, kept], axis=-1)), f"output {kept} ignores input {moved}"


def segments_are_independent(subject: Subject) -> None:
    """A packed document's outputs are those of the document alone, and ignore its neighbours."""
    packed = subject.whole.outputs
    other = subject.redrawn(3)
    inside = np.zeros((BATCH, LENGTH), bool)
    inside[0, 9:], inside[1, 4:] = True, True
    mixed = np.where(inside[..., None] if subject.floats else inside, subject.inputs, other).astype(other.dtype)
    redone = subject.f64.parallel(mixed, subject.segment_ids).outputs
    _close(redone[inside], packed[inside], X64_TOLERANCE, "outputs of a segment after changing its neighbours")
    state = subject.f64.init_state() if subject.carries_state else None
    alone = subject.f64.chain(subject.inputs[:, 9:14], state, ONE_SEGMENT[:, :5], [5]).outputs
    _close(alone[0], packed[0, 9:], X64_TOLERANCE, "outputs of a document packed and alone")


def rows_are_independent(subject: Subject) -> None:
    """A row's outputs do not depend on the batch it is in."""
    swapped = subject.f64.parallel(subject.inputs[::-1], subject.segment_ids[::-1]).outputs
    _close(swapped[::-1], subject.whole.outputs, X64_TOLERANCE, "outputs with rows in another order")
    mixed = subject.inputs.copy()
    mixed[1] = subject.redrawn(4)[1]
    redone = subject.f64.parallel(mixed, subject.segment_ids).outputs
    _close(redone[0], subject.whole.outputs[0], X64_TOLERANCE, "outputs of row 0 after changing row 1")


def decoding_keeps_one_program(subject: Subject) -> None:
    """Token after token: nothing is traced again, and the state keeps its structure, shapes and dtypes."""
    state = first = subject.f32.init_state()
    subject.f32.forward(subject.inputs[:, :1], state, None)
    traces = subject.f32.traces
    for t in range(3):
        _, state = subject.f32.forward(subject.inputs[:, t : t + 1], state, None)
    assert subject.f32.traces == traces, "decoding traces its program again"
    kinds = lambda tree: jax.tree.map(lambda a: (a.shape, jnp.asarray(a).dtype), tree)
    assert kinds(state) == kinds(first), "the state changes structure, shape or dtype while decoding"


def bidirectional_refuses_state(subject: Subject) -> None:
    """A model that sees the whole sequence says clearly that it carries no state."""
    try:
        subject.module.init_state(BATCH, LENGTH)
    except ConfigError as error:
        assert "state" in str(error)
    else:
        raise AssertionError("a bidirectional module gave a state")


def state_bytes_are_declared(subject: Subject) -> None:
    """`costs(length).state_bytes` is the size of the state of one row with room for `length` tokens."""
    for length in (8, 64):
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(subject.module.init_state(1, length)))
        declared = subject.module.costs(length).state_bytes
        assert held == declared, f"a state for {length} tokens holds {held} bytes; costs() declares {declared}"


def parameters_are_declared(subject: Subject) -> None:
    """Every parameter has a logical name for each axis, and `costs` counts them all."""
    boxes = jax.tree.leaves(subject.boxed.get("params", {}), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned), f"a parameter of shape {box.shape} has no logical axes"
        assert len(box.names) == box.value.ndim, f"{box.names} does not name the axes of shape {box.value.shape}"
    built = sum(box.value.size for box in boxes)
    declared = subject.module.costs(LENGTH).parameters
    assert built == declared, f"{built} parameters were built; costs() declares {declared}"


def flops_are_declared(subject: Subject) -> None:
    """`costs(length).flops` is what the traced program computes, up to norms and activations."""
    # Where the width can be set, matrix products are made to outweigh what is left out.
    wide = subject.module.clone(embed_dim=WIDE) if hasattr(subject.module, "embed_dim") else subject.module
    width = (WIDE,) if isinstance(wide, Mixer) else subject.inputs.shape[2:]
    row = jax.ShapeDtypeStruct((1, LENGTH, *width), subject.inputs.dtype)
    variables = jax.eval_shape(wide.init, jax.random.key(0), row)
    counted = count_flops(lambda v, x: wide.apply(v, x)[0], variables, row)
    ratio = wide.costs(LENGTH).flops / counted
    low, high = FLOPS_RANGE
    assert low <= ratio <= high, f"costs() declares {ratio:.3f} of the {counted} FLOPs traced; allowed: {low} to {high}"


ALWAYS = (
    no_ids_means_one_segment,
    float32_is_accurate,
    bfloat16_is_close,
    rows_are_independent,
    parameters_are_declared,
    flops_are_declared,
)
CARRIED = (
    chunks_equal_one_call,
    chunks_equal_one_call_midway,
    decoding_keeps_one_program,
    state_bytes_are_declared,
)


def checks_for(*, carries_state: bool, segments: bool, causal: bool) -> list[Callable[[Subject], None]]:
    """The checks that apply to a module with these abilities."""
    checks = [never_looks_ahead] if causal else [sees_both_sides, bidirectional_refuses_state]
    checks += CARRIED if causal and carries_state else []
    checks += [segments_are_independent] if segments else []
    return [*checks, *ALWAYS]


def mixer_subject(mixer: nn.Module) -> Subject:
    """A mixer with random inputs."""
    inputs = np.random.default_rng(0).standard_normal((BATCH, LENGTH, mixer.embed_dim)).astype(np.float32)
    abilities = {"carries_state": mixer.carries_state, "segments": mixer.segments, "causal": mixer.causal}
    return Subject(mixer, inputs, **abilities)


def model_subject(model: nn.Module, *, carries_state: bool = True, segments: bool = True) -> Subject:
    """A model with one output per token, and random tokens or values."""
    rng = np.random.default_rng(0)
    if model.vocab_size is not None:
        inputs = rng.integers(0, model.vocab_size & ~1, (BATCH, LENGTH)).astype(np.int32)
    else:
        inputs = rng.standard_normal((BATCH, LENGTH, model.input_dim)).astype(np.float32)
    return Subject(model, inputs, carries_state=carries_state, segments=segments, causal=model.causal)


def check_mixer(mixer: nn.Module) -> None:
    """Hold a mixer to the contract of `seqjax.mixers.base`.

    Args:
      mixer: any module with the fields and methods of `Mixer`, small (`embed_dim` 16 or so).
    Raises:
      AssertionError: says which promise is broken, where and by how much.
    """
    _run(mixer_subject(mixer))


def check_model(model: nn.Module, *, carries_state: bool = True, segments: bool = True) -> None:
    """Hold a whole model, with a head that gives one output per token, to the same promises.

    Raises:
      AssertionError: says which promise is broken, where and by how much.
    """
    _run(model_subject(model, carries_state=carries_state, segments=segments))


def _run(subject: Subject) -> None:
    abilities = {"carries_state": subject.carries_state, "segments": subject.segments, "causal": subject.causal}
    for check in checks_for(**abilities):
        check(subject)


def _close(got: Any, want: Any, tolerance: float, what: str) -> None:
    error = relative_error(got, want)
    assert error <= tolerance, f"{what}: error {error:.2e} of scale; allowed {tolerance:.0e}"
