"""From logits to a token: greedy, temperature, top-k and nucleus sampling."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqjax.config import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is drawn. Which filters apply is static; their strengths are values: changing one compiles nothing.

    Attributes:
      temperature: divides the logits; None takes the most likely token.
      top_k: keep the k most likely tokens (Fan et al. 2018); None keeps all.
      top_p: keep the fewest tokens whose probability reaches p (Holtzman et al. 2020); None keeps all.
    """

    temperature: Float[Array, ""] | None = None
    top_k: Int[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None

    @classmethod
    def create(cls, temperature: float, top_k: int | None, top_p: float | None) -> Sampler:
        """Check the strengths and make a sampler; temperature 0 is greedy."""
        if temperature < 0:
            raise ConfigError(f"temperature={temperature} is negative; allowed: 0 (greedy) and above.")
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k={top_k} keeps no token; allowed: None, or 1 and above.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ConfigError(f"top_p={top_p} is not a probability; allowed: None, or above 0 up to 1.")
        if temperature == 0:
            return cls()
        return cls(
            jnp.float32(temperature),
            None if top_k is None else jnp.int32(top_k),
            None if top_p is None else jnp.float32(top_p),
        )

    def sample(self, logits: Float[Array, "B V"], key: Array | None) -> Int[Array, "B"]:
        """One token per row."""
        if self.temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = self.filter(logits.astype(jnp.float32) / self.temperature)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)

    def filter(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """-inf for tokens outside the top k, then outside the nucleus of what is left."""
        if self.top_k is None and self.top_p is None:
            return logits
        ranked = jnp.sort(logits, axis=-1)[..., ::-1]
        keep = jnp.ones(ranked.shape, bool)
        if self.top_k is not None:
            keep &= jnp.arange(ranked.shape[-1]) < self.top_k
        if self.top_p is not None:
            probabilities = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the more likely tokens
            keep &= before < self.top_p
        threshold = jnp.min(jnp.where(keep, ranked, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < threshold, -jnp.inf, logits)
