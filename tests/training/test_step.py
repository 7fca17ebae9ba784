import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_config

from seqjax.config import ConfigError
from seqjax.parallel.rules import use_mesh
from seqjax.training.evaluate import evaluate
from seqjax.training.losses import softmax_cross_entropy
from seqjax.training.trainer import Trainer


def trainer(**changes):
    config = tiny_config.get_config()
    config.update_from_flattened_dict(changes)
    return Trainer(config)


def run(made, steps=3, batch_of=None):
    """The state after some steps, and the last step's metrics."""
    batch_of = batch_of or made.task.batch
    state = made.init()
    with use_mesh(made.mesh):
        for step in range(steps):
            state, metrics = made.step(state, made.place(batch_of(step)))
    return state, jax.device_get(metrics)


def close(a, b, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def uneven(task):
    """Batches whose microbatches hold very different weights."""

    def batch(step):
        made = task.batch(step)
        made["weights"] = made["weights"] * (np.arange(task.batch_size)[:, None] ** 2)
        return made

    return batch


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_give_the_update_of_the_whole_batch(microbatches):
    task = tiny.TinyTask()
    options = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.3}
    whole, metrics = run(trainer(**options), batch_of=uneven(task))
    parts, part_metrics = run(trainer(**options, **{"training.microbatches": microbatches}), batch_of=uneven(task))
    close(whole.params, parts.params)
    close(metrics, part_metrics)


def test_the_gradient_is_that_of_the_mean_over_tokens():
    made = trainer(**{"optimizer.name": "sgd", "optimizer.beta1": 0.0, "optimizer.learning_rate": 1.0})
    made_batch = uneven(made.task)(0)
    before = jax.device_get(made.init().params)

    def mean(params):
        logits, _ = made.model.apply({"params": params}, made_batch["inputs"])
        total, count = softmax_cross_entropy(logits, made_batch["targets"], made_batch["weights"])["loss"]
        return total / count

    grads = jax.grad(mean)(before)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    state, metrics = run(made, 1, uneven(made.task))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    close(state.params, jax.tree.map(lambda p, g: p - g / max(1.0, norm), before, grads))


def test_auxiliary_losses_count_and_train():
    _, without = run(trainer(), 1)
    _, metrics = run(trainer(**{"model.balance": 0.5}), 1)
    total, count = metrics["auxiliary"]
    assert total / count > 0 and "auxiliary" not in without
    close(metrics["loss"], without["loss"])  # the loss itself is reported without it
    assert metrics["grad_norm"] != without["grad_norm"]


def test_a_batch_without_weight_changes_nothing():
    made = trainer()
    before = jax.device_get(made.init().params)

    def weightless(step):
        return {**made.task.batch(step), "weights": np.zeros((16, 8), np.float32)}

    state, metrics = run(made, 1, weightless)
    close(state.params, before, rtol=0, atol=0)
    assert metrics["grad_norm"] == 0


def test_dropout_is_a_function_of_seed_and_step():
    options = {"model.dropout": 0.5}
    first, _ = run(trainer(**options))
    second, _ = run(trainer(**options))
    close(first.params, second.params, rtol=0, atol=0)
    made = trainer(**options)
    state = made.init()
    with use_mesh(made.mesh):
        batch = made.place(made.task.batch(0))
        _, at_zero = made.step(jax.tree.map(jnp.copy, state), batch)
        _, at_one = made.step(state.replace(step=state.step + 1), batch)
    assert float(at_zero["loss"][0]) != float(at_one["loss"][0])


def test_the_moving_average_follows_and_is_what_is_evaluated():
    made = trainer(**{"training.ema_decay": 0.75})
    start = jax.device_get(made.init().params)
    state, _ = run(made, 1)
    close(state.ema, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start, jax.device_get(state.params)))
    assert state.model_variables()["params"] is state.ema


def test_learning_rate_and_step_are_those_of_the_update():
    made = trainer(**{"optimizer.warmup_steps": 10})
    state, metrics = run(made, 3)
    assert int(state.step) == 3
    np.testing.assert_allclose(metrics["learning_rate"], 0.01 * 3 / 10, rtol=1e-6)


def test_the_step_compiles_once():
    made = trainer()
    run(made, 3)
    assert made._step._cache_size() == 1


def test_evaluation_is_exact_over_a_split_that_does_not_fill_its_last_batch():
    made = trainer()
    variables = made.init().model_variables()
    scores = evaluate(made.model, variables, made.task, "validation", made.mesh)
    examples = made.task.examples("validation")
    rows = {key: np.stack([examples[i][key] for i in range(len(examples))]) for key in ("inputs", "targets", "weights")}
    logits, _ = made.model.apply(variables, rows["inputs"])
    total, count = softmax_cross_entropy(logits, rows["targets"], rows["weights"])["loss"]
    np.testing.assert_allclose(scores["loss"], total / count / np.log(2), rtol=1e-5)  # in the task's unit, bits
    assert len(examples) % made.task.batch_size


def test_splits_that_cannot_be_scored_are_told():
    made = trainer()
    with pytest.raises(ConfigError, match="did you mean 'validation'"):
        made.evaluate(made.init(), "validatio")

    class Empty(tiny.TinyTask):
        def eval_batches(self, split="validation", rows=None):
            return iter(())

    with pytest.raises(ConfigError, match="nothing to score"):
        evaluate(made.model, made.init().model_variables(), Empty())


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"data.batch_size=16 does not divide .* allowed: multiples of 3"):
        trainer(**{"training.microbatches": 3})
