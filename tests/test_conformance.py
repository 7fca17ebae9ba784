"""Every registered mixer and architecture keeps every promise of the contract; new ones are found by themselves."""

import time
from collections.abc import Callable

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

import seqjax
from seqjax import registry, testing
from seqjax.models.sequence_model import SequenceModel
from seqjax.testing import conformance

registry.load_all()

CPU_SECONDS = 30.0
"""What one mixer or architecture, with its default options, may cost, compilation included: half of it on most machines."""

MIXER_VARIANTS = {
    "attention": [
        {"num_kv_heads": 2, "window": 4, "rope_fraction": 0.5},
        {"num_kv_heads": 1, "window": 6, "position": "alibi", "qkv_bias": True, "out_bias": True},
        {"head_dim": 6, "position": "none", "implementation": "reference"},
        {"causal": False},
        {"causal": False, "window": 3, "position": "alibi"},
    ],
    "aaren": [{"implementation": "associative", "num_heads": 2, "qkv_bias": True}],
    "combiner": [
        {"span_length": 3, "num_heads": 2},
        {"factorization": "logsparse"},
        {"factorization": "fixed", "span_length": 4},
    ],
    "deltanet": [{"negative_eigenvalues": True, "conv_width": 0, "qk_norm": "sum", "feature_map": "relu", "chunk_size": 4}],
    "dss": [{"state_dim": 3, "kernel": "softmax", "kernel_length": 64, "implementation": "convolution"}],
    "gated_deltanet": [{"negative_eigenvalues": True, "chunk_size": 4, "output_gate": "sigmoid", "head_norm": "layer"}],
    "fourier": [{"max_length": 14}],
    "gla": [{"chunk_size": 4, "conv_width": 3, "output_gate": None, "feature_map": "elu_plus_one", "qkv_bias": True}],
    "glu": [{"activation": "gelu", "mlp_bias": False}],
    "gru": [{"hidden_dim": 5}],
    "gss": [{"state_dim": 4, "inner_dim": 3, "implementation": "convolution"}],
    "hydra": [{"state_dim": 4, "head_dim": 4, "num_groups": 2, "conv_width": 3, "chunk_size": 4, "conv_bias": False}],
    "lightnet": [
        {"initial_unit": True, "chunk_size": 4, "num_heads": 2, "gate_rank": 3, "shape": (2, 3)},
        {"causal": False, "shape": (2, 2, 2), "chunk_size": 4},
    ],
    "linear_transformer": [
        {"chunk_size": 4, "feature_map": "taylor"},
        {"normalize": False, "feature_map": "identity", "head_norm": "rms", "num_heads": 2, "implementation": "reference"},
    ],
    "lmu": [{"state_dim": 5, "theta": 10.0, "implementation": "convolution"}],
    "lstm": [{"hidden_dim": 5}],
    "lssl": [{"state_dim": 5, "implementation": "convolution", "learn": "none", "channels": 2}],
    "mamba": [
        {"state_dim": 4, "selective": ("C",), "complex_modes": True, "gate": False, "conv_bias": False, "use_bias": True},
        {"state_dim": 3, "selective": ("dt", "B"), "implementation": "xla", "chunk_size": 4},
        {"state_dim": 4, "causal": False},
    ],
    "mamba2": [
        {"state_dim": 3, "head_dim": 4, "num_groups": 2, "chunk_size": 4, "use_bias": True, "dt_limit": (0.01, 0.5)},
        {"state_dim": 3, "head_dim": 8, "conv_width": 1, "conv_bias": False},
    ],
    "min_gru": [{"expand": 1, "conv_width": 1, "candidate": "positive", "use_bias": True}],
    "mlstm": [{"expand": 1, "qkv_block": 2, "num_heads": 2, "chunk_size": 4, "conv_width": 2}],
    "para_gru": [{"implementation": "newton"}, {"implementation": "newton", "max_iterations": 1, "conv_width": 1}],
    "para_lstm": [{"implementation": "newton", "num_heads": 2, "expand": 2}],
    "retnet": [{"rope_theta": None, "head_norm": "layer", "num_heads": 1, "chunk_size": 4}],
    "rg_lru": [{"num_heads": 2, "conv_width": 1, "use_bias": False, "expand": 2}],
    "routing": [{"num_clusters": 3, "num_heads": 2, "position": "none"}],
    "rwkv_channel_mix": [{"mlp_ratio": 2.0, "depth": 0.0}],
    "rwkv_time_mix": [{"inner_dim": 10, "depth": 1.0}],
    "s4": [
        {"state_dim": 8, "implementation": "convolution", "measure": "legt", "num_systems": 4, "channels": 2},
        {"state_dim": 8, "causal": False},
    ],
    "s4d": [
        {"state_dim": 8, "implementation": "convolution", "discretization": "bilinear", "output": "none"},
        {"state_dim": 8, "a_init": "real", "causal": False},
    ],
    "s5": [
        {"state_dim": 8, "blocks": 2, "gate": "half_glu2", "implementation": "chunked", "discretization": "bilinear"},
        {"state_dim": 8, "causal": False, "implementation": "associative"},
    ],
    "slstm": [{"num_heads": 2, "conv_width": 2}],
    "spacetime": [
        {"state_dim": 5, "implementation": "convolution", "num_kernels": 4, "channels": 2},
        {"state_dim": 2, "preprocess": True},
        {"state_dim": 4, "causal": False},
    ],
    "tpe": [{"shape": (2, 3)}, {"shape": (2, 2, 2), "num_heads": 2}],
}
"""Options beside the defaults under which a mixer is held to the contract as well."""

MODEL_VARIANTS = {
    "perceiver_ar": [
        {"num_latents": 2, "stride": 1, "norm": "rms", "position": "sinusoidal"},
        {"num_latents": 4, "stride": 4, "pattern": ("mamba", "mlp"), "state_dim": 4, "position": "learned"},
    ],
    "transformer": [
        {"norm": "rms", "norm_position": "post", "position": "learned", "num_layers": 1},
        {"norm": "batch", "position": "sinusoidal", "tie_embeddings": False, "num_layers": 1},
        {"pattern": (({"name": "attention", "window": 4},), ("glu",)), "num_layers": 3},
        {"pattern": ("attention", {"name": "attention", "shares": True}, "mlp"), "window": 6, "num_kv_heads": 1},
        {"vocab_size": None, "input_dim": 3, "head": "regression", "output_dim": 5, "num_layers": 1},
        {"causal": False, "remat": "full"},
    ],
    "universal_transformer": [
        {"halting": "act", "step_embedding": "learned", "position": "learned", "position_restart": 2, "vocab_size": 4},
        {"halting": "act", "halted": "copy", "norm_position": "post", "position": "alibi", "window": 4, "num_steps": 2},
        {"halting": "act", "causal": False},
        {"pattern": ("s4d", "attention", "mlp"), "norm": "rms", "position": "none", "step_embedding": "none", "num_steps": 2},
    ],
}

SPENT: dict[str, float] = {}
LAST: list[str] = []
"""The label of the subject that this process checked last."""


def make_subject(kind: str, name: str, options: dict) -> testing.Subject:
    if kind == "mixer":
        return testing.mixer_subject(registry.mixer(name)(embed_dim=16, **options))
    model = seqjax.build({**seqjax.example_config(name).to_dict(), **options})
    entry = registry.architecture(name)
    return testing.model_subject(model, carries_state=entry.carries_state, segments=entry.segments)


def find_subjects() -> dict[str, testing.Subject]:
    """Everything registered, with its variants; nothing is compiled yet."""
    found = {}
    for kind, names, variants in (
        ("mixer", registry.MIXERS, MIXER_VARIANTS),
        ("model", registry.ARCHITECTURES, MODEL_VARIANTS),
    ):
        for name in names:
            for i, options in enumerate([{}, *variants.get(name, [])]):
                found[f"{kind}-{name}-{i}"] = make_subject(kind, name, options)
    return found


SUBJECTS = find_subjects()
ALL_CHECKS = {"transformer", "griffin"}
"""Of the architectures that are stacks of mixers, those that take every check."""
STACK_CHECKS = (
    conformance.decoding_keeps_one_program,
    conformance.bidirectional_refuses_state,
    conformance.state_bytes_are_declared,
    conformance.parameters_are_declared,
    conformance.flops_are_declared,
)
"""What the others take: the stack is one piece of code, and their mixers went through all. `-m exhaustive` does the rest."""


def marks_of(label: str, check: Callable) -> list[pytest.MarkDecorator]:
    # One worker takes all checks of a subject, so that its programs are compiled once.
    marks = [pytest.mark.xdist_group(label)]
    stack = type(SUBJECTS[label].module) is SequenceModel and label.split("-")[1] not in ALL_CHECKS
    return marks if not stack or check in STACK_CHECKS else [*marks, pytest.mark.exhaustive]


CASES = [
    pytest.param(label, check, id=f"{label}-{check.__name__}", marks=marks_of(label, check))
    for label, made in SUBJECTS.items()
    for check in testing.checks_for(carries_state=made.carries_state, segments=made.segments, causal=made.causal)
]


@pytest.fixture(scope="module", autouse=True)
def warm_process():
    """The first subject in a process would else be charged for what JAX sets up once."""
    testing.check_mixer(registry.mixer("mlp")(embed_dim=4))


@pytest.fixture
def subject(label):
    """The module under test; what was compiled for the one before is forgotten (see `conftest.forget_programs`)."""
    if LAST and LAST[-1] != label:
        jax.clear_caches()
    LAST[:] = [label]
    return SUBJECTS[label]


@pytest.mark.parametrize(("label", "check"), CASES)
def test_keeps_its_promises(label, check, subject):
    start = time.process_time()
    try:
        check(subject)
    finally:
        SPENT[label] = SPENT.get(label, 0.0) + time.process_time() - start
    within = not label.endswith("-0") or SPENT[label] < CPU_SECONDS
    assert within, f"{label} costs {SPENT[label]:.1f} CPU seconds; allowed: {CPU_SECONDS}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(registry.ARCHITECTURES))
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(seed=st.integers(1, 10**6))
def test_chunk_law_for_many_splits(name, seed):
    made = SUBJECTS[f"model-{name}-0"]
    if made.carries_state:
        conformance.chunks_equal_one_call(made, [seed])
