"""Constants that decoding derives from the parameters once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError

DERIVING = ["dss", "gss", "lssl", "s4", "s4d", "s5", "sashimi", "spacetime"]


def built(name):
    model = seqjax.build({"name": name, **registry.architecture(name).example})
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 3)))
    return model, jax.jit(model.init)(jax.random.key(0), tokens), tokens


@pytest.mark.parametrize("name", DERIVING)
def test_prepared_variables_give_the_same_outputs_for_less_work(name):
    model, variables, tokens = built(name)
    assert set(variables) == {"params"}
    prepared = jax.jit(model.prepare)(variables)
    assert set(prepared) == {"params", "derived"}
    state = model.init_state(2, 8)
    step = jax.jit(model.apply)
    expected, _ = step(variables, tokens, state)
    found, _ = step(prepared, tokens, state)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    work = [len(str(jax.make_jaxpr(model.apply)(v, tokens[:, :1], state)).splitlines()) for v in (variables, prepared)]
    assert work[1] < work[0]


def test_models_without_such_constants_are_left_as_they_are():
    model, variables, _ = built("transformer")
    assert model.prepare(variables) is variables


@pytest.mark.parametrize("name", ["s4", "lssl", "sashimi"])
def test_a_kept_kernel_serves_whole_sequences_up_to_its_length(name):
    model, variables, _ = built(name)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 40)))
    prepared = jax.jit(model.prepare, static_argnums=1)(variables, 40)
    kernels = [a for path, a in jax.tree.leaves_with_path(prepared["derived"]) if "kernel" in jax.tree_util.keystr(path)]
    assert kernels and max(a.shape[-1] for a in kernels) == 40
    apply = jax.jit(model.apply)
    for length in (40, 17):
        expected, _ = apply(variables, tokens[:, :length])
        found, _ = apply(prepared, tokens[:, :length])
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    state = model.init_state(2, 40)
    np.testing.assert_allclose(apply(prepared, tokens, state)[0], apply(variables, tokens, state)[0], rtol=2e-4, atol=2e-5)


def test_a_sequence_longer_than_the_kept_kernel_is_refused():
    model, variables, _ = built("s4")
    with pytest.raises(ConfigError, match="40 tokens is longer than the kernel of 20 lags that prepare kept; allowed: up to"):
        model.apply(model.prepare(variables, 20), jnp.zeros((1, 40), jnp.int32))
