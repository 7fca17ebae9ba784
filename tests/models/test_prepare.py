"""Constants that decoding derives from the parameters once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry

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
