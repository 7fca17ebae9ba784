"""Importing seqjax must cost its users nothing that they did not ask for."""

import subprocess
import sys

import pytest

HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "grain",
    "orbax",
    "matplotlib",
    "tensorboardX",
    "safetensors",
    "pytest",
    "hypothesis",
)


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import seqjax",
        "import seqjax; seqjax.build(seqjax.example_config('transformer')); seqjax.generate; seqjax.experiment_config",
    ],
)
def test_a_model_needs_no_pipeline_checkpoint_or_plot(code):
    # Flax itself imports orbax for its own checkpoint helpers; what counts is that we add nothing to it.
    already = modules_after("import flax.linen, optax, ml_collections")
    assert not {name for name in HEAVY if name in modules_after(code) - already}


def test_ops_need_jax_alone():
    assert not {"flax", "optax", "ml_collections", "chex"} & modules_after("import seqjax.ops")


def test_no_flags_are_defined():
    before = modules_after("import jax")
    code = "import seqjax, seqjax.registry as r; r.load_all(); from absl import flags; assert 'config' not in flags.FLAGS"
    assert "absl" in modules_after(code) | before


def test_unknown_names_raise():
    import seqjax

    with pytest.raises(AttributeError, match="no attribute 'transformers'"):
        _ = seqjax.transformers
    assert "build" in dir(seqjax)
