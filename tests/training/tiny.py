"""A model and a task that compile in a second, for tests of training; registered as "tiny" when imported."""

import dataclasses
import time

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from seqjax import registry
from seqjax.data.task import Task
from seqjax.mixers.base import Costs


class TinyModel(nn.Module):
    """Predicts each token from the one before; one hidden layer. Covers what a model may do: axes, losses, dropout."""

    embed_dim: int = 16
    vocab_size: int | None = None
    head: str = "language_model"
    num_layers: int = 2
    dropout: float = 0.0
    balance: float = 0.0

    @nn.compact
    def __call__(self, inputs, state=None, *, segment_ids=None, train=False):
        normal = nn.initializers.normal(0.3)

        def weight(name, shape, names, init=normal):
            return self.param(name, nn.with_logical_partitioning(init, names), shape)

        width = self.embed_dim
        x = weight("embedding", (self.vocab_size, width), ("vocab", "embed"))[inputs]
        x = nn.with_logical_constraint(x, ("batch", "length_act", "embed_act"))
        layers = weight("stack", (self.num_layers, width, 2 * width), ("layers", "embed", "mlp"))
        biases = weight("stack_bias", (self.num_layers, 2 * width), ("layers", "mlp"))
        back = weight("back", (self.num_layers, 2 * width, width), ("layers", "mlp", "embed"))
        for layer in range(self.num_layers):
            hidden = nn.with_logical_constraint(x @ layers[layer] + biases[layer], ("batch", "length_act", "mlp_act"))
            x = x + nn.Dropout(self.dropout, deterministic=not train)(nn.relu(hidden)) @ back[layer]
        if self.balance:
            self.sow("losses", "balance", self.balance * jnp.mean(jnp.square(x)))
        x = x * weight("A_log", (width,), ("embed",), nn.initializers.ones)
        logits = x @ weight("logits", (width, self.vocab_size), ("embed", "vocab"))
        return nn.with_logical_constraint(logits, ("batch", "length_act", "vocab_act")), state

    @nn.nowrap
    def costs(self, length):
        return Costs(parameters=1, flops=length, state_bytes=0)

    @nn.nowrap
    def optimizer_groups(self):
        return (("A_log", "state_space"),)


class Arithmetic:
    """Example i counts up from i with a stride, so the next token is learnable."""

    def __init__(self, task, size, start):
        self.task, self.size, self.start = task, size, start

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        index += self.start
        tokens = (index + np.arange(self.task.seq_length + 1) * (1 + index % 2)) % self.task.vocab_size
        weights = (np.arange(self.task.seq_length) >= index % 3).astype(np.float32)
        return {
            "inputs": tokens[:-1].astype(np.int32),
            "targets": tokens[1:].astype(np.int32),
            "weights": weights,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyTask(Task):
    """Counting modulo 16. `delay` seconds per batch; targets are out of range from step `poison` on."""

    vocab_size = 16
    loss_unit = "bits/token"
    loss_scale = 1.0 / float(np.log(2.0))
    locations = frozenset({"delay"})

    batch_size: int = 16
    seq_length: int = 8
    content_version: str = "1"
    delay: float = 0.0
    poison: int | None = None

    @property
    def length(self):
        return self.seq_length

    @property
    def content(self):
        return self.content_version

    def examples(self, split):
        return Arithmetic(self, 64, 0) if split == "train" else Arithmetic(self, 37, 1000)

    def batch(self, step, rows=None):
        time.sleep(self.delay)
        examples = [self.examples("train")[(step * 7 + row) % 64] for row in range(self.batch_size)[rows or slice(None)]]
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        if self.poison is not None and step >= self.poison:
            batch["weights"] = batch["weights"] * np.float32(np.nan)
        return batch

    def baselines(self):
        return {"uniform": 4.0}


registry.register_architecture("tiny", example={"vocab_size": 16})(TinyModel)
registry.register_task("tiny")(TinyTask)
