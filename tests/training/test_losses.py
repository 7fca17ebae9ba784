import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.config import ConfigError
from seqjax.training.losses import by_targets, loss_of, softmax_cross_entropy, squared_error


def test_cross_entropy_sums_weighted_nats_and_hits():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 5)), rng.integers(0, 5, (2, 3))
    weights = np.array([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])
    sums = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    nll = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[np.arange(2)[:, None], np.arange(3), targets]
    np.testing.assert_allclose(sums["loss"], ((nll * weights).sum(), 4.5), rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"], (((logits.argmax(-1) == targets) * weights).sum(), 4.5), rtol=1e-6)


def test_large_and_low_precision_logits_stay_exact():
    logits = jnp.array([[300.0, 0.0], [-300.0, 0.0]], jnp.bfloat16)
    sums = softmax_cross_entropy(logits, jnp.array([0, 0]))
    np.testing.assert_allclose(sums["loss"], (300.0, 2.0), rtol=1e-6)
    assert sums["loss"][0].dtype == jnp.float32


def test_many_bfloat16_losses_add_up_in_float32():
    logits = jnp.zeros((4096, 2), jnp.bfloat16)
    total, count = softmax_cross_entropy(logits, jnp.zeros(4096, jnp.int32))["loss"]
    np.testing.assert_allclose(total / count, np.log(2.0), rtol=1e-6)


def test_what_has_no_weight_gives_no_gradient():
    def loss(logits):
        return softmax_cross_entropy(logits, jnp.array([0, 1]), jnp.array([0.0, 1.0]))["loss"][0]

    grad = jax.grad(loss)(jnp.array([[1.0, 2.0], [3.0, 1.0]]))
    assert (grad[0] == 0).all() and (grad[1] != 0).all()


def test_squared_error_counts_values():
    predictions, targets = jnp.array([[[1.0, 2.0]], [[0.0, 4.0]]]), jnp.zeros((2, 1, 2))
    sums = squared_error(predictions, targets, jnp.array([[1.0], [0.0]]))
    assert (float(sums["loss"][0]), float(sums["loss"][1])) == (5.0, 2.0)
    assert (float(sums["mae"][0]), float(sums["mae"][1])) == (3.0, 2.0)
    sums = squared_error(jnp.ones((2, 3, 1)), jnp.zeros((2, 3)), jnp.array([1.0, 0.5]))
    assert (float(sums["loss"][0]), float(sums["loss"][1])) == (4.5, 4.5)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ConfigError, match="predicts values of shape"):
        squared_error(jnp.ones((2, 3, 2)), jnp.ones((2, 3)))


def test_a_task_may_bring_its_own_loss():
    class Own:
        def loss(self, outputs, batch):
            return {"loss": (outputs.sum(), 1.0)}

    own = Own()
    assert loss_of(own) == own.loss
    assert loss_of(object()) is by_targets
    assert "accuracy" in by_targets(jnp.zeros((2, 3)), {"targets": jnp.zeros(2, jnp.int32)})
    assert "accuracy" not in by_targets(jnp.zeros((2, 3)), {"targets": jnp.zeros((2, 3))})
