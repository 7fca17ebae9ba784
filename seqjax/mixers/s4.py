"""S4: structured state spaces, diagonal plus low rank."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from seqjax.config import ConfigError, choose
from seqjax.mixers.s4d import check_num_systems, tiled
from seqjax.mixers.state_space import ContinuousMixer, complex_normal, constant, constant_pair
from seqjax.ops.complex_pairs import Pair
from seqjax.ops.hippo import diagonal_plus_low_rank
from seqjax.ops.state_space import DiagonalPlusLowRankSystem
from seqjax.registry import register_mixer

RANKS = {"legs": 1, "legt": 2, "fout": 1}
"""Measures whose HiPPO matrix is normal plus low rank, and that rank."""


@register_mixer("s4")
class S4(ContinuousMixer):
    """Structured state spaces (Gu, Goel and Re 2022): `A = diag(Lambda) - P P^*` by the bilinear rule.

    P on both sides keeps A stable whatever P learns (Goel et al. 2022), `Lambda = -exp(a_log) - i a_imag`. C itself is the
    parameter, not the authors' `C (I - A^L)`, so one set of weights makes a kernel of any length.

    Attributes:
      measure: of the HiPPO matrix that A starts as: "legs", "legt" or "fout".
      num_systems: S copies of A, B and P; feature h uses copy `h mod S`. None gives each feature its own.
    """

    measure: str = "legs"
    num_systems: int | None = None

    optimizer_groups = (("/(log_dt|a_log|a_imag|b_real|b_imag|p_real|p_imag)$", "state_space"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(RANKS, self.measure, "model.measure")
        check_num_systems(self.num_systems, self.embed_dim)
        if self.measure == "fout" and self.state_dim < 4:
            raise ConfigError(
                f"model.state_dim={self.state_dim} leaves model.measure='fout' no frequency; allowed: 4 and above."
            )

    @property
    def systems(self) -> int:
        return self.num_systems or self.embed_dim

    @property
    def modes(self) -> int:
        return self.state_dim // 2

    def system(self) -> DiagonalPlusLowRankSystem:
        start = diagonal_plus_low_rank(self.measure, self.state_dim)
        shape, axes = (self.modes, self.systems), ("state", "embed")
        # A decay of 0 (FouT, LegT before the low rank) has no logarithm: the authors' floor.
        a_log = self.vector("a_log", constant(np.log(np.maximum(-start.eigenvalues.real, 1e-4))), shape, axes)
        a_imag = self.vector("a_imag", constant(-start.eigenvalues.imag), shape, axes)
        a = Pair(-jnp.exp(a_log.astype(self.wide)), -a_imag.astype(self.wide))
        b = self.pair("b", constant_pair(start.B.real + 1j * start.B.imag.clip(-2, 2)), shape, axes)
        p = self.pair("p", constant_pair(start.P), (RANKS[self.measure], *shape), (None, *axes))
        c = self.pair("c", complex_normal, (self.outputs_per_feature, self.modes, self.embed_dim), (None, *axes))
        dt = self.time_steps(self.embed_dim)
        a, b, p = (tiled(x, self.embed_dim) for x in (a, b, p))
        return DiagonalPlusLowRankSystem(a, p, b, c, dt)

    def system_parameters(self) -> int:
        per_system = 2 * self.modes * (2 + RANKS[self.measure])
        return per_system * self.systems + (2 * self.modes * self.outputs_per_feature + 1) * self.embed_dim

    def step_flops(self) -> int:
        rank = RANKS[self.measure]
        return (22 + 16 * rank + 4 * self.channels) * self.modes * self.embed_dim

    def kernel_flops(self, length: int) -> int:
        rank, nodes = RANKS[self.measure], length + 1
        sums = (self.outputs_per_feature + rank) * (1 + rank)
        transforms = int(5 * length * np.log2(2 * length)) * self.outputs_per_feature
        return self.embed_dim * (nodes * self.modes * (30 + 8 * sums) + transforms)

    def empty_state(self, batch_size: int) -> Pair:
        return Pair(*(jnp.zeros((batch_size, self.modes, self.embed_dim), self.wide) for _ in range(2)))
