"""S4D, S4, DSS, LSSL and S5 against the papers' equations in NumPy float64, token by token, and the authors' code."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import seqjax
from seqjax import registry
from seqjax.config import ConfigError
from seqjax.training.groups import settings_by_leaf
from seqjax.training.optimizer import OptimizerConfig

registry.load_all()
GOLDEN = np.load(pathlib.Path(__file__).parent / "data/state_space.npz")
BATCH, LENGTH, WIDTH = 2, 37, 4


def made(name, **options):
    """A mixer in float64, its parameters moved off their initial values, an input, and `[L, ...]` outputs of both forms."""
    mixer = registry.mixer(name)(embed_dim=WIDTH, dtype="float64", param_dtype="float64", **options)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, LENGTH, WIDTH))
    variables = jax.tree.map(np.asarray, jax.jit(mixer.init)(jax.random.key(0), x))
    variables = jax.tree.map(lambda a: a + 0.05 * rng.standard_normal(a.shape), unboxed(variables))
    return mixer, variables, x


def unboxed(variables):
    return jax.tree.map(lambda b: np.asarray(b.value), variables, is_leaf=lambda b: hasattr(b, "names"))


def applied(mixer, variables, x, **options):
    return np.asarray(jax.jit(mixer.apply)(variables, x, **options)[0])


def stepped(A, B, C, u):
    """`x_k = A x_(k-1) + B u_k`, `y_k = C x_k` for one feature: matrices, `u [L]`, `y [L, M]`."""
    x, y = np.zeros(len(B), complex), []
    for now in u:
        x = A @ x + B * now
        y.append(C @ x)
    return np.array(y).real


def gelu(x):
    return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def finished(p, y, x, output):
    """Skip, activation and output map of the S4 family: `y [B, L, M, D]`."""
    y = gelu(y + p["skip"] * x[:, :, None]).reshape(*x.shape[:2], -1)
    linear = lambda name: y @ p[name]["kernel"] + p[name]["bias"]
    return linear("out") * sigmoid(linear("gate")) if output == "glu" else linear("out")


def expected(p, x, matrices, output="glu", causal=True):
    """The mixer's output from `matrices(p, feature) -> A, B, C [M, N]`, run over each feature by itself."""
    channels = p["skip"].shape[0]
    y = np.zeros((*x.shape[:2], channels, x.shape[2]))
    for row in range(x.shape[0]):
        for feature in range(x.shape[2]):
            A, B, C = matrices(p, feature)
            y[row, :, :, feature] = stepped(A, B, C[:channels], x[row, :, feature])
            if not causal:  # lag 0 of the second kernel meets the next input
                back = stepped(A, B, C[channels:], x[row, ::-1, feature])[::-1]
                y[row, :-1, :, feature] += back[1:]
    return finished(p, y, x, output)


def both_conjugates(a):
    return np.concatenate([a, np.conj(a)], axis=-1)


def s4d_matrices(method):
    def matrices(p, h):
        pick = lambda name: p[name][:, h % p[name].shape[1]]
        A = both_conjugates(-np.exp(pick("a_log")) - 1j * pick("a_imag"))
        B = both_conjugates(pick("b_real") + 1j * pick("b_imag"))
        C = both_conjugates(p["c_real"][..., h] + 1j * p["c_imag"][..., h])
        dt = np.exp(p["log_dt"][h])
        if method == "zoh":
            return np.diag(np.exp(dt * A)), (np.exp(dt * A) - 1) / A * B, C
        return np.diag((1 + dt * A / 2) / (1 - dt * A / 2)), dt / (1 - dt * A / 2) * B, C

    return matrices


def s4_matrices(p, h):
    pick = lambda name: p[name][..., h % p[name].shape[-1]]
    low_rank = both_conjugates(pick("p_real") + 1j * pick("p_imag"))
    A = np.diag(both_conjugates(-np.exp(pick("a_log")) - 1j * pick("a_imag"))) - low_rank.T @ low_rank.conj()
    B = both_conjugates(pick("b_real") + 1j * pick("b_imag"))
    C = both_conjugates(p["c_real"][..., h] + 1j * p["c_imag"][..., h])
    return *bilinear(A, B, np.exp(p["log_dt"][h])), C


def bilinear(A, B, dt, alpha=0.5):
    left = np.eye(len(A)) - alpha * dt * A
    return np.linalg.solve(left, np.eye(len(A)) + (1 - alpha) * dt * A), np.linalg.solve(left, dt * B)


def dss_matrices(kernel_length):
    def matrices(p, h):
        real = p["a_real"] if kernel_length else -np.exp(p["a_log"])
        A = (real + 1j * p["a_imag"])[:, 0]
        dt, w = np.exp(p["log_dt"][h]), p["w_real"][..., h] + 1j * p["w_imag"][..., h]
        if not kernel_length:
            return np.diag(np.exp(dt * A)), (np.exp(dt * A) - 1) / A, w
        sums = A * np.exp(dt * A[:, None] * np.arange(kernel_length)).sum(1)
        return np.diag(np.exp(dt * A)), sums.conj() / (np.abs(sums) ** 2 + 1e-7), w

    return matrices


def lssl_matrices(alpha):
    def matrices(p, h):
        n = len(p["left"])
        T = np.diag(p["diagonal"]) + np.diag(p["sub"], -1) + np.diag(p["super"], 1)
        A = -np.diag(p["left"]) @ (np.diag(p["scale"]) + np.linalg.inv(T)) @ np.diag(p["right"])
        assert A.shape == (n, n)
        return *bilinear(A, p["left"] * p["b"], np.exp(p["log_dt"][h]), alpha), p["c"][:, h]

    return matrices


CASES = {
    "s4d": ("s4d", {"state_dim": 8}, s4d_matrices("zoh"), {}),
    "s4d-bilinear": ("s4d", {"state_dim": 8, "discretization": "bilinear", "a_init": "lin"}, s4d_matrices("bilinear"), {}),
    "s4d-tied": ("s4d", {"state_dim": 6, "num_systems": 2, "channels": 2, "a_init": "inv"}, s4d_matrices("zoh"), {}),
    "s4d-two-sided": ("s4d", {"state_dim": 8, "causal": False}, s4d_matrices("zoh"), {"causal": False}),
    "s4": ("s4", {"state_dim": 8}, s4_matrices, {}),
    "s4-legt": ("s4", {"state_dim": 8, "measure": "legt", "channels": 2}, s4_matrices, {}),
    "s4-fout": ("s4", {"state_dim": 8, "measure": "fout", "num_systems": 1}, s4_matrices, {}),
    "s4-two-sided": ("s4", {"state_dim": 8, "causal": False}, s4_matrices, {"causal": False}),
    "dss": ("dss", {"state_dim": 4}, dss_matrices(None), {}),
    "dss-softmax": ("dss", {"state_dim": 4, "kernel": "softmax", "kernel_length": 40}, dss_matrices(40), {}),
    "lssl": ("lssl", {"state_dim": 5}, lssl_matrices(0.5), {"output": "linear"}),
    "lssl-euler": (
        "lssl",
        {"state_dim": 4, "alpha": 1.0, "channels": 2, "measure": "lagt"},
        lssl_matrices(1.0),
        {"output": "linear"},
    ),
}


@pytest.mark.parametrize("implementation", ["convolution", "scan"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_equations(case, implementation):
    name, options, matrices, how = CASES[case]
    with jax.enable_x64(True):
        mixer, variables, x = made(name, implementation=implementation, **options)
        got = applied(mixer, variables, x)
    want = expected(variables["params"], x, matrices, **how)
    assert np.abs(got - want).max() < 1e-8 * np.abs(want).max()


@pytest.mark.parametrize("name", ["s4d", "s4", "dss", "s5"])
def test_resampled_system_equals_the_one_with_longer_steps(name):
    with jax.enable_x64(True):
        mixer, variables, x = made(name, state_dim=8)
        slow = jax.tree.map(np.copy, variables)
        slow["params"]["log_dt"] = slow["params"]["log_dt"] + np.log(2)
        got = applied(mixer.clone(resample=2.0), variables, x)
        assert np.abs(got - applied(mixer, slow, x)).max() < 1e-12
        assert np.abs(got - applied(mixer, variables, x)).max() > 1e-3


def test_s4_sees_the_same_signal_at_half_the_rate():
    """A smooth signal sampled half as often, read with steps twice as long, gives nearly the same outputs."""
    with jax.enable_x64(True):
        mixer, variables, _ = made("s4", state_dim=16, dt_min=0.005, dt_max=0.01, implementation="convolution")
        t = np.arange(512)[None, :, None]
        x = np.sin(2 * np.pi * t * np.array([1, 2, 3, 4]) / 512)
        fine = applied(mixer, variables, x)[:, ::2]
        coarse = applied(mixer.clone(resample=2.0), variables, x[:, ::2])
        unadapted = applied(mixer, variables, x[:, ::2])
    scale = np.abs(fine).max()
    assert np.abs(coarse - fine).max() < 0.05 * scale < 0.3 * np.abs(unadapted - fine).max()


def test_lssl_fixed_is_hippo():
    """With `learn="none"` A, B are LegS themselves: n from 0, A_nn = -(n + 1), A_nk = -sqrt((2n+1)(2k+1)) below."""
    n = np.arange(6)
    A = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1.0)
    with jax.enable_x64(True):
        mixer, variables, x = made("lssl", state_dim=6, learn="none", dt_min=0.01, dt_max=0.01)
        got = applied(mixer, variables, x)
    step = bilinear(A, np.sqrt(2 * n + 1.0), 0.01)
    want = expected(variables["params"], x, lambda p, h: (*step, p["c"][:, h]), output="linear")
    assert np.abs(got - want).max() < 1e-9 * np.abs(want).max()


def s5_expected(p, x, gate, causal=True, blocks_dt=1.0):
    """One complex system over all features, both conjugates written out."""
    A = both_conjugates(p["lambda_real"] + 1j * p["lambda_imag"])
    dt = both_conjugates(np.exp(p["log_dt"]))
    B = np.concatenate([p["b_real"] + 1j * p["b_imag"], p["b_real"] - 1j * p["b_imag"]])
    C = p["c_real"] + 1j * p["c_imag"]
    sides = [C] if causal else np.split(C, 2)
    y = p["skip"] * x
    for side, C in enumerate(sides):
        C = np.concatenate([C, C.conj()])
        state = np.zeros((x.shape[0], len(A)), complex)
        for t in range(x.shape[1]) if side == 0 else reversed(range(x.shape[1])):
            state = np.exp(dt * A) * state + x[:, t] @ (((np.exp(dt * A) - 1) / A)[:, None] * B).T
            y[:, t] += (state @ C).real
    z = gelu_tanh(y)
    linear = lambda name: z @ p[name]["kernel"] + p[name]["bias"]
    if gate == "gelu":
        return z
    if gate == "full_glu":
        return linear("out") * sigmoid(linear("gate"))
    return (z if gate == "half_glu1" else y) * sigmoid(linear("gate"))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("implementation", ["sequential", "associative", "chunked"])
@pytest.mark.parametrize("gate", ["full_glu", "half_glu2"])
@pytest.mark.parametrize("causal", [True, False])
def test_s5_equals_the_equations(gate, causal, implementation):
    with jax.enable_x64(True):
        options = {"state_dim": 8, "blocks": 2, "gate": gate, "causal": causal, "implementation": implementation}
        mixer, variables, x = made("s5", **options)
        got = applied(mixer, variables, x)
    want = s5_expected(variables["params"], x.copy(), gate, causal)
    assert np.abs(got - want).max() < 1e-11 * np.abs(want).max()


def golden(name):
    return {key.split("/", 1)[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{name}/")}


def complex_of(a):
    return a[..., 0] + 1j * a[..., 1]


def s4_parameters(g, prefix):
    """The authors' arrays `[.., H, N, 2]` under our names, `[.., N, H]`."""
    p = {"log_dt": g[f"{prefix}kernel.inv_dt"][:, 0], "skip": g[f"{prefix}D"]}
    p |= {"a_log": g[f"{prefix}kernel.A_real"].T, "a_imag": g[f"{prefix}kernel.A_imag"].T}
    for ours, theirs in (("b", "B"), ("c", "C"), ("p", "P")):
        if f"{prefix}kernel.{theirs}" in g:
            value = np.swapaxes(complex_of(g[f"{prefix}kernel.{theirs}"]), -1, -2)
            value = value[0] if ours == "b" else value
            p |= {f"{ours}_real": value.real, f"{ours}_imag": value.imag}
    return p


def test_s4_block_equals_the_authors():
    g = golden("s4_block_glu")
    p = s4_parameters(g, "init.layer.")
    weight, bias = g["init.output_linear.0.weight"], g["init.output_linear.0.bias"]
    for name, part in (("out", slice(0, 4)), ("gate", slice(4, 8))):
        p[name] = {"kernel": weight[part].T, "bias": bias[part]}
    mixer = registry.mixer("s4")(embed_dim=4, state_dim=8, implementation="convolution")
    assert np.abs(applied(mixer, {"params": p}, g["x"]) - g["y"]).max() < 5e-6


@pytest.mark.parametrize(
    ("name", "file", "options"), [("s4", "s4_dplr_legs_bidir", {}), ("s4d", "s4d_lin_bidir", {"a_init": "lin"})]
)
@pytest.mark.parametrize("implementation", ["convolution", "scan"])
def test_two_sided_systems_equal_the_authors(name, file, options, implementation):
    g = golden(file)
    options |= {"causal": False, "activation": "identity", "output": "none", "implementation": implementation}
    mixer = registry.mixer(name)(embed_dim=3, state_dim=8, **options)
    assert np.abs(applied(mixer, {"params": s4_parameters(g, "init.")}, g["x"]) - g["y"]).max() < 1e-5


@pytest.mark.parametrize("gate", ["full_glu", "half_glu1", "gelu"])
def test_s5_layer_equals_the_authors(gate):
    g = golden(f"s5_layer_{gate}_pre")
    b, c = complex_of(g["w.seq.B"]), complex_of(g["w.seq.C"]).T
    p = {"lambda_real": g["w.seq.Lambda_re"], "lambda_imag": g["w.seq.Lambda_im"], "log_dt": g["w.seq.log_step"][:, 0]}
    p |= {"b_real": b.real, "b_imag": b.imag, "c_real": c.real, "c_imag": c.imag, "skip": g["w.seq.D"]}
    for ours, theirs in (("out", "out1"), ("gate", "out2")):
        if f"w.{theirs}.kernel" in g:
            p[ours] = {"kernel": g[f"w.{theirs}.kernel"], "bias": g[f"w.{theirs}.bias"]}
    x = g["x"]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    normed = normed * g["w.norm.scale"] + g["w.norm.bias"]
    mixer = registry.mixer("s5")(embed_dim=4, state_dim=8, gate=gate)
    assert np.abs(x + applied(mixer, {"params": p}, normed[None])[0] - g["y"]).max() < 5e-6


@pytest.mark.parametrize(
    ("options", "count"),
    [({"embed_dim": 128}, 66048), ({"embed_dim": 128, "num_systems": 1}, 41664), ({"embed_dim": 256}, 197632)],
)
def test_s4_has_as_many_parameters_as_the_authors(options, count):
    assert registry.mixer("s4")(**options).costs(16).parameters == count


def test_s4d_has_as_many_parameters_as_the_authors():
    assert registry.mixer("s4d")(embed_dim=128).costs(16).parameters == 57856
    assert registry.mixer("s4d")(embed_dim=128, num_systems=1).costs(16).parameters == 41600


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("s4d", {"state_dim": 7}, "state_dim=7 .* did you mean 8"),
        ("s4", {"state_dim": 7}, "state_dim=7 .* conjugate pairs"),
        ("s4d", {"dt_min": 0.2}, "dt_min=0.2 and model.dt_max=0.1"),
        ("s5", {"dt_min": 0.2}, "dt_min=0.2 and model.dt_max=0.1"),
        ("s4d", {"num_systems": 3}, "num_systems=3 does not divide"),
        ("s4d", {"a_init": "lgs"}, "did you mean 'legs'"),
        ("s4", {"measure": "lagt"}, "model.measure='lagt' is unknown; did you mean"),
        ("s5", {"state_dim": 12, "blocks": 4}, "state_dim=12 .* multiples of 8"),
        ("s5", {"gate": "glu"}, "model.gate='glu' is unknown"),
        ("lssl", {"learn": "none", "alpha": 0.0, "state_dim": 64}, "makes A unstable"),
        ("lssl", {"alpha": 2.0}, "alpha=2.0 is out of range"),
        ("dss", {"kernel": "softmax"}, "kernel_length=None"),
        ("s4d", {"implementation": "fft"}, "model.implementation='fft' is unknown"),
    ],
)
def test_mistakes_are_told_before_anything_compiles(name, options, words):
    with pytest.raises(ConfigError, match=words):
        registry.mixer(name)(embed_dim=8, **options)


def test_a_softmax_kernel_takes_no_longer_sequence():
    mixer = registry.mixer("dss")(embed_dim=4, kernel="softmax", kernel_length=8)
    with pytest.raises(ConfigError, match=r"9 tokens is longer than model.kernel_length=8"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 9, 4)))
    with pytest.raises(ConfigError, match="a sequence of 9 tokens is longer"):
        mixer.init_state(1, 9)


@pytest.mark.parametrize("name", ["s4d", "s4", "s5", "lssl", "dss"])
def test_a_two_sided_mixer_takes_no_state(name):
    mixer = registry.mixer(name)(embed_dim=4, state_dim=8, causal=False)
    state = registry.mixer(name)(embed_dim=4, state_dim=8).init_state(1, 8)
    with pytest.raises(ConfigError, match="carries no state"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 4, 4)), state)


def test_a_two_sided_convolution_takes_no_segments():
    mixer = registry.mixer("s4d")(embed_dim=4, state_dim=8, causal=False, implementation="convolution")
    with pytest.raises(ConfigError, match="segment_ids with model"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 4, 4)), segment_ids=jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["s4d", "s4", "s5", "lssl", "dss"])
def test_lowers_for_accelerators(name, platform):
    """One program lowers everywhere, forward and backward, also with packed documents."""
    mixer = registry.mixer(name)(embed_dim=4, state_dim=8)
    x, ids = jnp.zeros((1, 64, 4)), jnp.zeros((1, 64), jnp.int32)
    variables = jax.eval_shape(lambda key, x: nn.unbox(mixer.init(key, x)), jax.random.key(0), x)

    def loss(variables, x):
        return mixer.apply(variables, x)[0].sum() + mixer.apply(variables, x, segment_ids=ids)[0].sum()

    lowered = jax.jit(jax.grad(loss)).trace(variables, x).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()


@pytest.mark.parametrize("name", ["s4d", "s4", "s5", "lssl", "dss"])
def test_time_scales_train_apart(name):
    """A, B and the time steps have the state-space group's rate and no decay; C decays as matrices do."""
    model = seqjax.build(seqjax.example_config(name))
    parameters = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, groups={"state_space": {"learning_rate": 0.01}})
    found = settings_by_leaf(config, parameters, model.optimizer_groups())["repeats"][f"{name}_0"]
    for key, settings in found.items():
        if key in ("gate", "out", "skip"):
            continue
        apart = key not in ("c", "c_real", "c_imag", "w_real", "w_imag")
        assert settings.learning_rate == (0.01 if apart else 0.1), key
        assert settings.weight_decay == (0.0 if apart else 0.2), key


def test_a_mode_that_forgets_everything_in_a_step_stays_finite():
    """Bilinear steps with `dt a = -2` have a decay of exactly 0: its kernel is the first lag, and gradients are finite."""
    options = {"a_init": "real", "discretization": "bilinear", "dt_min": 2.0, "dt_max": 2.0, "state_dim": 2}
    mixer = registry.mixer("s4d")(embed_dim=4, activation="identity", output="none", implementation="convolution", **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, 4)), jnp.float32)
    variables = nn.unbox(mixer.init(jax.random.key(0), x))
    gradient = jax.grad(lambda v: mixer.apply(v, x)[0].sum())(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    p = variables["params"]
    c, state, wanted = np.asarray(p["c_real"])[0], np.zeros((2, 4)), []
    for now in np.asarray(x)[0]:  # modes -1 and -2: decays 0 and -1/3, gains 1 and 2/3
        state = np.array([[0.0], [-1 / 3]]) * state + np.array([[1.0], [2 / 3]]) * now
        wanted.append((c * state).sum(0) + np.asarray(p["skip"])[0] * now)
    assert np.abs(np.asarray(mixer.apply(variables, x)[0][0]) - np.array(wanted)).max() < 1e-5
