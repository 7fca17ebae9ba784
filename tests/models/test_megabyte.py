"""MEGABYTE against arrays derived from the paper's equations, what its outputs see, packing, and decoding."""

import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.models import megabyte

GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "megabyte.npz")
"""Two global and two local layers, P = 4, 12 tokens of a vocabulary of 11; no local positions, and the global level's last norm
before the map to the local level."""
BOS = 11


def build(**options):
    return seqjax.build({"name": "megabyte", **seqjax.registry.architecture("megabyte").example, **options})


def noisy(model, inputs):
    """Variables away from zeros and ones."""
    rng = np.random.default_rng(0)
    noise = lambda a: (a + 0.2 * rng.standard_normal(a.shape)).astype(a.dtype)
    return jax.tree.map(noise, jax.tree.map(np.asarray, nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs))))


# --- the paper's equations ---


@pytest.fixture(scope="module")
def golden_model():
    with jax.enable_x64(True):
        sizes = {"vocab_size": 12, "embed_dim": 8, "global_dim": 24, "global_layers": 2, "local_layers": 2, "num_heads": 2}
        mlp = {"mlp_ratio": 2.0, "activation": "relu"}
        model = build(**sizes, **mlp, max_length=12, dtype="float64", param_dtype="float64")
        yield model, {"params": golden_params()}


def golden_params():
    w = {key[2:]: GOLDEN[key] for key in GOLDEN if key.startswith("w/")}
    start = w["Egpad"][-1]  # before the text stands a beginning, in place of the padding's last vector
    return {
        "embedding": {"table": np.concatenate([w["El"], np.zeros((1, 8))])},
        "global_embedding": {"table": np.concatenate([w["Eg"], start[None]])},
        # Input t is the token before the one that is predicted, which has position t - 1 in the paper.
        "positions": {"table": np.concatenate([np.zeros((1, 6)), w["Epos"][:-1]])},
        "global_pad": w["Egpad"][:-1],
        "local_pad": w["Elpad"],
        "global_to_local": {"kernel": w["wGL"]},
        "global": level(w, "g"),
        "local": level(w, "l"),
    }


def level(w, name):
    layers = [layer({key[3:]: a for key, a in w.items() if key.startswith(f"{name}{i}.")}) for i in range(2)]
    return {"repeats": jax.tree.map(lambda *a: np.stack(a), *layers), "norm": norm(w, f"{name}f")}


def layer(w):
    width = len(w["q"])
    split = lambda a: {"kernel": a.reshape(width, 2, width // 2)}
    return {
        "norm_0": norm(w, "n1"),
        "attention_0": {
            "query": split(w["q"]),
            "key": split(w["k"]),
            "value": split(w["v"]),
            "out": {"kernel": w["o"].reshape(2, width // 2, width)},
        },
        "norm_1": norm(w, "n2"),
        "mlp_1": {
            "up": {"kernel": w["w1"], "bias": np.zeros(2 * width)},
            "down": {"kernel": w["w2"], "bias": np.zeros(width)},
        },
    }


def norm(w, name):
    return {"scale": w[f"{name}.g"], "bias": w[f"{name}.b"]}


def test_the_papers_equations(golden_model):
    model, variables = golden_model
    with jax.enable_x64(True):
        tokens = np.pad(GOLDEN["x"][:, :-1], [(0, 0), (1, 0)], constant_values=BOS)
        logits, _ = jax.jit(model.apply)(variables, tokens)
        np.testing.assert_allclose(logits[..., :11], GOLDEN["logits"], rtol=1e-10, atol=1e-12)
        # Two texts in one row, the second from the middle of the first's last patch.
        tokens = np.concatenate([tokens[0, :7], tokens[1, :10]])[None]
        ids = np.repeat([1, 2], [7, 10])[None]
        wanted = np.concatenate([GOLDEN["logits"][0, :7], GOLDEN["logits"][1, :10]])
        logits, _ = jax.jit(model.apply)(variables, tokens[:, :12], segment_ids=ids[:, :12])
        np.testing.assert_allclose(logits[0, :, :11], wanted[:12], rtol=1e-10, atol=1e-12)
        logits, _ = jax.jit(model.apply)(variables, tokens[:, :12], model.init_state(1, 12), segment_ids=ids[:, :12])
        np.testing.assert_allclose(logits[0, :, :11], wanted[:12], rtol=1e-10, atol=1e-12)


# --- what outputs see ---


@pytest.fixture(scope="module")
def seen():
    """`[t, s]`: whether output t depends on input s, with both paths, without the global one and without the local one."""
    model = build(vocab_size=None, input_dim=2, head="regression", output_dim=3)
    inputs = np.random.default_rng(1).standard_normal((1, 13, 2)).astype(np.float32)
    params = noisy(model, inputs)["params"]
    zeroed = lambda name: {**params, name: {**params[name], "kernel": np.zeros_like(params[name]["kernel"])}}
    gradients = jax.jit(jax.jacrev(lambda params, x: model.apply({"params": params}, x)[0][0], argnums=1))
    depends = lambda params: np.any(np.asarray(gradients(params, inputs))[:, :, 0] != 0, axis=(1, 3))
    return {"both": depends(params), "local": depends(zeroed("global_to_local")), "global": depends(zeroed("embedding"))}


def test_no_output_sees_a_later_input_and_all_see_each_earlier_one(seen):
    t, s = np.indices((13, 13))
    np.testing.assert_array_equal(seen["both"], s <= t)


def test_what_each_path_sees(seen):
    t, s = np.indices((13, 13))
    first = t // 4 * 4
    np.testing.assert_array_equal(seen["local"], (s > first) & (s <= t))  # never the input at the first place of a patch
    np.testing.assert_array_equal(seen["global"], s <= first)


# --- packing ---


def test_aligned_segments_need_no_rearranging():
    tokens = np.random.default_rng(0).integers(0, 64, (2, 14)).astype(np.int32)
    ids = np.array([[1] * 8 + [2] * 6, [1] * 4 + [2] * 4 + [0] * 6])
    anywhere, aligned = build(), build(aligned=True)
    assert (anywhere.segment_alignment, aligned.segment_alignment) == (1, 4)
    variables = noisy(anywhere, tokens)
    wanted, _ = jax.jit(anywhere.apply)(variables, tokens, segment_ids=ids)
    got, _ = jax.jit(aligned.apply)(variables, tokens, segment_ids=ids)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    ids[1, 4:7] = 1  # now the second segment of row 1 starts within a patch
    got, _ = jax.jit(aligned.apply)(variables, tokens, segment_ids=ids)
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-5)
    assert np.isnan(got[1]).all()


# --- decoding ---


def test_generates_what_parallel_calls_would():
    model = build(aligned=True)
    prompts = [[5, 9, 2, 44, 17, 3, 8], [7, 1], [30]]
    variables = noisy(model, np.zeros((1, 8), np.int32))
    new = np.asarray(seqjax.generate(model, variables, prompts, 9))
    call = jax.jit(model.apply)
    for prompt, row in zip(prompts, new):
        text = np.zeros((1, 16), np.int32)
        text[0, : len(prompt) + 9] = [*prompt, *row]
        logits, _ = call(variables, text)
        np.testing.assert_array_equal(np.argmax(logits[0], -1)[len(prompt) - 1 :][:9], row)


def test_global_level_runs_once_a_patch(monkeypatch):
    calls = []
    plain = megabyte.Level.__call__

    def counted(self, x, *args, **options):
        jax.debug.callback(lambda: calls.append(self.name))
        return plain(self, x, *args, **options)

    model = build(aligned=True)
    variables = noisy(model, np.zeros((1, 8), np.int32))
    monkeypatch.setattr(megabyte.Level, "__call__", counted)
    seqjax.generate(model.clone(), variables, [[1]], 12).block_until_ready()
    jax.effects_barrier()
    assert (calls.count("global"), calls.count("local")) == (3, 12)


def test_any_mixer_at_either_level():
    model = build(global_pattern=("s4d",), local_pattern=("s4d",), state_dim=4, unroll=0)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
    ids = np.array([[1] * 3 + [2] * 9, [0] * 5 + [1] * 7])
    variables, call = noisy(model, tokens), jax.jit(model.apply)
    whole, _ = call(variables, tokens, segment_ids=ids)
    first, state = call(variables, tokens[:, :6], model.init_state(2, 12), segment_ids=ids[:, :6])
    second, _ = call(variables, tokens[:, 6:], state, segment_ids=ids[:, 6:])
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-4)


def test_options_reach_both_levels():
    model = build(num_heads=2, window=6, global_pattern=({"name": "attention", "num_heads": 8}, "mlp"))
    (coarse, _), (fine, _) = model.global_pattern[0], model.local_pattern[0]
    assert (dict(coarse.options)["num_heads"], dict(coarse.options)["window"]) == (8, 6)
    assert (dict(fine.options)["num_heads"], dict(fine.options)["window"]) == (2, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 1}, "patch_size=1"),
        ({"patch_size": 5}, "multiple of model.patch_size=5; did you mean 30"),
        ({"global_layers": 0}, "global_layers=0"),
        ({"causal": False}, "causal=False"),
        ({"local_pattern": ("atention",)}, "did you mean 'attention'"),
        ({"num_heads": 3}, "num_heads=3"),
    ],
)
def test_config_errors(options, words):
    with pytest.raises(ConfigError, match=words):
        build(**options)
