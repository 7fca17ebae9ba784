"""The two-dimensional scan against a float64 loop over the grid, stored arrays, and systems with closed forms."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from seqjax.ops.selective_scan import selective_scan
from seqjax.ops.selective_scan_2d import IMPLEMENTATIONS, Axes, Transition, linear_scan_2d, selective_scan_2d

DATA = pathlib.Path(__file__).parent / "data" / "chimera_2d.npz"
FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
EVERY = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def made(seed, batch_size=2, length=9, variates=3, features=4, modes=2, groups=2):
    """Arguments of `selective_scan_2d`, float64."""
    normal = np.random.default_rng(seed).standard_normal
    grid = (batch_size, length, variates)
    both = lambda make: Axes(make(), make())
    rates = lambda: -np.exp(normal((features, modes)))
    free = lambda: normal((features, modes))
    return {
        "u": normal((*grid, features)),
        "dt": both(lambda: np.exp(normal((*grid, features)) - 1)),
        "A": Transition(rates(), free(), free(), rates()),
        "B": both(lambda: normal((*grid, groups, modes))),
        "C": both(lambda: normal((*grid, groups, modes))),
        "h0": both(lambda: normal((batch_size, modes, variates, features))),
    }


def expected(u, dt, A, B, C, h0, starts=None):
    """Point by point, feature by feature."""
    batch_size, length, variates, features = u.shape
    groups, modes = B.time.shape[3:]
    y = np.zeros_like(u)
    h1, h2 = (np.zeros((batch_size, length + 1, variates + 1, features, modes)) for _ in range(2))
    # One more row and one more token, in front: what the first ones continue from.
    h1[:, 0, 1:], h2[:, 0, 1:] = (a.transpose(0, 2, 3, 1) for a in h0)
    for b, t, v, e in np.ndindex(u.shape):
        g = e // (features // groups)
        kept = 0.0 if starts is not None and starts[b, t] else 1.0
        before = [kept * h[b, t, v + 1, e] for h in (h1, h2)]
        above = [h[b, t + 1, v, e] for h in (h1, h2)]
        abar1, abar4 = np.exp(dt.time[b, t, v, e] * A.a1[e]), np.exp(dt.variate[b, t, v, e] * A.a4[e])
        g1, g2 = (abar1 - 1) / A.a1[e], (abar4 - 1) / A.a4[e]
        h1[b, t + 1, v + 1, e] = abar1 * before[0] + g1 * (A.a2[e] * before[1] + B.time[b, t, v, g] * u[b, t, v, e])
        h2[b, t + 1, v + 1, e] = abar4 * above[1] + g2 * (A.a3[e] * above[0] + B.variate[b, t, v, g] * u[b, t, v, e])
        y[b, t, v, e] = C.time[b, t, v, g] @ h1[b, t + 1, v + 1, e] + C.variate[b, t, v, g] @ h2[b, t + 1, v + 1, e]
    return y, Axes(*(h[:, -1, 1:].transpose(0, 3, 1, 2) for h in (h1, h2)))


def run(given, starts=None, dtype=np.float64, **options):
    given = jax.tree.map(lambda a: jnp.asarray(a, dtype), given)
    starts = None if starts is None else jnp.asarray(starts)
    return jax.jit(functools.partial(selective_scan_2d, **options))(**given, starts=starts)


def close(found, wanted, tolerance):
    for mine, reference in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(mine - reference).max() <= tolerance * max(1, np.abs(reference).max())


@EVERY
def test_the_stored_grid(implementation):
    stored = np.load(DATA)
    with jax.enable_x64(True):
        grid = lambda a: jnp.asarray(a).swapaxes(0, 1)[None]  # [V, T, N] to [1, T, V, N]
        x = grid(stored["x"][..., None])
        a = Transition(*(grid(stored[f"a{i}"]) for i in range(1, 5)))
        inputs = Axes(grid(stored["b1"]) * x, grid(stored["b2"]) * x)
        states, last = jax.jit(functools.partial(linear_scan_2d, implementation=implementation))(a, inputs)
        y = (grid(stored["c1"]) * states.time + grid(stored["c2"]) * states.variate).sum(-1)
        close((*states, y), (grid(stored["h1"]), grid(stored["h2"]), grid(stored["y"])), 1e-14)
        close(last, jax.tree.map(lambda a: a[:, -1], states), 0)


@EVERY
@pytest.mark.parametrize(("length", "variates"), [(6, 3), (1, 4), (5, 1)])
def test_equals_a_loop_over_the_grid(implementation, length, variates):
    given = made(0, length=length, variates=variates)
    starts = np.random.default_rng(1).random((2, length)) < 0.3 if variates > 1 else None
    with jax.enable_x64(True):
        close(run(given, starts, implementation=implementation), expected(**given, starts=starts), 1e-12)


@pytest.mark.parametrize("implementation", FAST)
def test_float32(implementation):
    given = made(12, length=7)
    starts = np.random.default_rng(13).random((2, 7)) < 0.3
    close(run(given, starts, np.float32, implementation=implementation), expected(**given, starts=starts), 2e-6)


def test_more_variates_than_are_unrolled():
    given = made(2, batch_size=1, length=3, variates=19, features=2, modes=1)
    with jax.enable_x64(True):
        close(run(given, implementation="sequential"), expected(**given), 1e-12)


def test_gradients_are_those_of_the_reference():
    """Of a random sum of outputs and last states."""
    rng = np.random.default_rng(3)
    pull = [rng.standard_normal(shape) for shape in ((2, 5, 2, 4), (2, 2, 2, 4), (2, 2, 2, 4))]
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, made(4, length=5, variates=2))
        starts = jnp.asarray(np.random.default_rng(5).random((2, 5)) < 0.3)

        def gradients(implementation, chunk_size=None):
            how = {"starts": starts, "chunk_size": chunk_size, "implementation": implementation}

            def loss(given):
                y, last = selective_scan_2d(**given, **how)
                return sum((a * b).sum() for a, b in zip((y, *last), pull))

            return jax.jit(jax.grad(loss))(given)

        wanted = gradients("reference")
        close(gradients("sequential", chunk_size=2), wanted, 1e-12)
        close(gradients("associative"), wanted, 1e-12)


@pytest.mark.parametrize("implementation", FAST)
def test_gradients_are_differences(implementation):
    given = made(6, batch_size=1, length=3, variates=2, features=2, modes=1, groups=1)
    starts = jnp.array([[False, False, True]])
    with jax.enable_x64(True):
        f = lambda given: selective_scan_2d(**given, starts=starts, implementation=implementation)
        check_grads(jax.jit(f), (jax.tree.map(jnp.asarray, given),), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_pieces_in_time_are_the_whole(implementation):
    given = made(7)
    starts = np.random.default_rng(8).random((2, 9)) < 0.3
    with jax.enable_x64(True):
        h, outputs = given["h0"], []
        for piece in (slice(0, 5), slice(5, 6), slice(6, 9)):
            part = {k: jax.tree.map(lambda a: a[:, piece], given[k]) for k in ("u", "dt", "B", "C")}  # noqa: B023
            y, h = run({**part, "A": given["A"], "h0": h}, starts[:, piece], implementation=implementation)
            outputs.append(y)
        close((np.concatenate(outputs, axis=1), h), expected(**given, starts=starts), 1e-12)


def test_one_variate_is_a_selective_scan():
    """With one row and no coupling, the state in time is Mamba's, but for its input that is held exactly."""
    given = made(9, variates=1, groups=1)
    zeros = np.zeros_like(given["A"].a2)
    given["A"] = given["A"]._replace(a2=zeros)
    given["C"] = given["C"]._replace(variate=np.zeros_like(given["C"].variate))
    dt, A = given["dt"].time[:, :, 0], given["A"].a1[:, :1]
    with jax.enable_x64(True):
        # One mode at a time: the exact gain depends on the mode, where `selective_scan` has dt for all.
        y = 0
        for n in range(2):
            A = given["A"].a1[:, n : n + 1]
            held = given["u"][:, :, 0] * np.expm1(dt * A[:, 0]) / A[:, 0] / dt
            B, C = (given[k].time[:, :, 0, :, n : n + 1] for k in "BC")
            h0 = given["h0"].time[:, n : n + 1, 0]
            y += selective_scan(*(jnp.asarray(a) for a in (held, dt, A, B, C)), h0=jnp.asarray(h0))
        close(run(given)[0][:, :, 0], y, 1e-12)


@pytest.mark.parametrize("implementation", FAST)
def test_constant_coefficients_are_a_filter_of_two_dimensions(implementation):
    """Impulse responses are those of `(I - diag(z, w) A)^-1 b`, with z a token's delay and w a row's, on a padded torus."""
    a, b, size = np.array([[0.6, 0.2], [0.15, 0.5]]), np.array([0.7, -1.1]), 128
    z = np.exp(-2j * np.pi * np.arange(size) / size)
    systems = np.eye(2) - np.stack(np.broadcast_arrays(z[:, None, None], z[None, :, None]), -2) * a
    response = np.fft.ifft2(np.linalg.solve(systems, np.broadcast_to(b[:, None], (size, size, 2, 1)))[..., 0], axes=(0, 1))
    length, variates = 12, 7
    with jax.enable_x64(True):
        grid = (1, length, variates, 1)
        impulse = jnp.zeros(grid).at[0, 0, 0, 0].set(1.0)
        transition = Transition(*(jnp.full(grid, value) for value in a.ravel()))
        scan = jax.jit(functools.partial(linear_scan_2d, implementation=implementation))
        states, _ = scan(transition, Axes(b[0] * impulse, b[1] * impulse))
    for found, wanted in zip(states, np.moveaxis(response.real, -1, 0)):
        np.testing.assert_allclose(found[0, :, :, 0], wanted[:length, :variates], atol=1e-12)


def test_states_are_wide():
    given = made(10)
    y, last = run(given, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and all(a.dtype == jnp.float32 for a in last)
    exact = expected(**jax.tree.map(lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64), given))
    close(last, exact[1], 2e-6)


def test_mistakes():
    given = jax.tree.map(jnp.asarray, made(11))
    with pytest.raises(ValueError, match="implementation='rows' is unknown; allowed: None, sequential"):
        selective_scan_2d(**given, implementation="rows")
    with pytest.raises(ValueError, match="2 groups do not divide 3 features"):
        selective_scan_2d(**{**given, "u": given["u"][..., :3]})
