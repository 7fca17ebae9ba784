"""Linen models as NNX modules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import seqjax

TOKENS = jnp.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def model():
    return seqjax.build(seqjax.example_config("transformer"))


@pytest.mark.parametrize("boxed", [True, False])
def test_given_variables(model, boxed):
    variables = jax.jit(model.init)(jax.random.key(1), TOKENS)
    module = seqjax.as_nnx(model, variables if boxed else nn.unbox(variables))
    logits, state = module(TOKENS)
    assert state is None
    np.testing.assert_array_equal(logits, model.apply(variables, TOKENS)[0])


def test_fresh_parameters_and_a_carried_state(model):
    module = seqjax.as_nnx(model, rngs=nnx.Rngs(3)).lazy_init(TOKENS)
    logits, _ = module(TOKENS)
    head, state = module(TOKENS[:, :4], model.init_state(2, 6))
    tail, _ = module(TOKENS[:, 4:], state)
    np.testing.assert_allclose(jnp.concatenate([head, tail], axis=1), logits, atol=1e-5)


def test_it_trains(model):
    module = seqjax.as_nnx(model).lazy_init(TOKENS)
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        def loss_of(module):
            logits, _ = module(TOKENS, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(module)
        optimizer.update(module, gradients)
        return loss

    losses = [float(step(module, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_as_a_part_of_a_larger_module(model):
    class Scaled(nnx.Module):
        def __init__(self):
            self.body = seqjax.as_nnx(model).lazy_init(TOKENS)
            self.scale = nnx.Param(jnp.float32(2.0))

        def __call__(self, tokens):
            return self.scale * self.body(tokens)[0]

    module = Scaled()
    np.testing.assert_allclose(module(TOKENS), 2 * module.body(TOKENS)[0], rtol=1e-6)
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == 1 + len(jax.tree.leaves(model.init(jax.random.key(0), TOKENS)))
