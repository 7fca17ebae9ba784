import math

import numpy as np
import pytest

from seqjax.training.optimizer import OptimizerConfig, make_schedule
from seqjax.training.schedules import SCHEDULES

STEPS, WARMUP = 100, 10


def closed_form(name, step, decay_steps, final):
    rise = min(1.0, (step + 1) / WARMUP)
    if name == "constant":
        return rise
    if name == "cosine":
        progress = min(1.0, max(0.0, (step - WARMUP) / (decay_steps or STEPS - WARMUP)))
        return rise * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
    if name == "rsqrt":
        return rise if step < WARMUP else max(final, math.sqrt(WARMUP / (step + 1)))
    span = decay_steps or STEPS // 5
    return rise * (1.0 if step < STEPS - span else 1 - (1 - final) * (step - (STEPS - span)) / span)


@pytest.mark.parametrize("decay_steps", [None, 40])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_follow_their_closed_forms(name, decay_steps):
    config = OptimizerConfig(schedule=name, warmup_steps=WARMUP, decay_steps=decay_steps, final_fraction=0.2)
    schedule = make_schedule(config, STEPS)
    steps = range(STEPS)
    wanted = [closed_form(name, step, decay_steps, 0.2) for step in steps]
    np.testing.assert_allclose([float(schedule(step)) for step in steps], wanted, rtol=1e-5)


def test_without_warmup_the_first_update_has_the_peak_rate():
    for name in SCHEDULES:
        assert float(make_schedule(OptimizerConfig(schedule=name), STEPS)(0)) == pytest.approx(1.0)
