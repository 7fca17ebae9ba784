"""Pretrained weights: parity with stored logits, exact round trips, and every way in which a folder can be wrong."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.interop import folder as folders
from seqjax.interop import pretrained
from seqjax.interop.gpt2 import GPT2
from seqjax.training.losses import by_targets

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed (the extra interop)")

GOLDEN = pathlib.Path(__file__).parent / "pretrained"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2_LIKE = {
    "name": "transformer", "vocab_size": 19, "embed_dim": 16, "num_heads": 2, "max_length": 12, "position": "learned",
    "qkv_bias": True, "out_bias": True,
}  # fmt: skip


@pytest.fixture
def gpt2(tmp_path):
    """A copy of the golden GPT-2 folder, to spoil."""
    return shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2")


@pytest.fixture
def llama(tmp_path):
    return shutil.copytree(GOLDEN / "llama_grouped", tmp_path / "llama")


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    """Rewrite the folder's weights with `change(tensors)`, which edits them in place."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors")


def assert_same_variables(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def build(**options):
    model = seqjax.build(GPT2_LIKE | options)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    model, variables = seqjax.load_pretrained(GOLDEN / name)
    stored = np.load(GOLDEN / name / "logits.npz")
    tokens = jnp.asarray(stored["tokens"])
    logits, _ = jax.jit(model.apply)(variables, tokens)
    np.testing.assert_allclose(logits, stored["logits"], atol=1e-5, rtol=0)
    _, state = jax.jit(model.apply)(variables, tokens[:, :7], model.init_state(2, tokens.shape[1]))
    logits, _ = jax.jit(model.apply)(variables, tokens[:, 7:], state)
    np.testing.assert_allclose(logits, stored["logits"][:, 7:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_exact(name, shard_bytes, tmp_path):
    model, variables = seqjax.load_pretrained(GOLDEN / name)
    pretrained.save_pretrained(model, variables, tmp_path, shard_bytes=shard_bytes, config={"eos_token_id": 1})
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 1
    again, read = seqjax.load_pretrained(tmp_path)
    assert pretrained._described(again) == pretrained._described(model)
    assert_same_variables(read, variables)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_written_as_they_were_read(name, tmp_path):
    pretrained.save_pretrained(*seqjax.load_pretrained(GOLDEN / name), tmp_path)
    before = safetensors.load_file(GOLDEN / name / "model.safetensors")
    after = safetensors.load_file(tmp_path / "model.safetensors")
    before = {k.removeprefix("transformer."): v for k, v in before.items() if not k.endswith(".attn.bias")}
    assert {k.removeprefix("transformer.") for k in after} == before.keys()
    for key, value in after.items():
        np.testing.assert_array_equal(value, before[key.removeprefix("transformer.")])


def test_fewer_shards_replace_more(tmp_path):
    model, variables = seqjax.load_pretrained(GOLDEN / "gpt2")
    pretrained.save_pretrained(model, variables, tmp_path, shard_bytes=3000)
    zeros = jax.tree.map(jnp.zeros_like, variables)
    pretrained.save_pretrained(model, zeros, tmp_path)
    assert_same_variables(seqjax.load_pretrained(tmp_path)[1], zeros)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": False, "num_layers": 1},
        {"activation": "relu_squared", "hidden_dim": 24, "norm_epsilon": 1e-4},
        {"pattern": ("attention", "glu"), "position": "rope", "norm": "rms", "mlp_bias": True},
        {"pattern": ("attention", "glu"), "position": "rope", "norm": "rms", "qkv_bias": False, "out_bias": False,
         "mlp_bias": False, "num_kv_heads": 1, "rope_llama3": (8.0, 1.0, 4.0, 16), "tie_embeddings": False},
    ],
)  # fmt: skip
def test_own_models_round_trip(options, tmp_path):
    model, variables = build(**options)
    pretrained.save_pretrained(model, variables, tmp_path)
    again, read = seqjax.load_pretrained(tmp_path)
    tokens = jnp.arange(10).reshape(2, 5)
    np.testing.assert_array_equal(jax.jit(again.apply)(read, tokens)[0], jax.jit(model.apply)(variables, tokens)[0])


@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_patterns_of_several_blocks_and_remainders(blocks, tmp_path, monkeypatch):
    """A family whose pattern spells out several equal blocks is the same model as one that repeats one block."""
    model, variables = build(num_layers=3)
    pretrained.save_pretrained(model, variables, tmp_path)
    spelled = dataclasses.replace(
        GPT2, blocks=GPT2.blocks * blocks, model={**GPT2.model, "pattern": (GPT2.model["pattern"],) * blocks}
    )
    monkeypatch.setitem(pretrained.FAMILIES, "gpt2", spelled)
    wide, read = seqjax.load_pretrained(tmp_path)
    assert (wide.repeats, len(wide.remainder)) == {2: (1, 2), 3: (1, 0), 5: (0, 6)}[blocks]
    tokens = jnp.arange(10).reshape(2, 5)
    np.testing.assert_allclose(jax.jit(wide.apply)(read, tokens)[0], jax.jit(model.apply)(variables, tokens)[0], atol=1e-6)
    pretrained.save_pretrained(wide, read, tmp_path)
    assert_same_variables(seqjax.load_pretrained(tmp_path)[1], read)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_load_as_float32(gpt2, dtype):
    def halve(tensors):
        tensors |= {k: v.astype(dtype) for k, v in tensors.items() if v.dtype == np.float32}

    edit_tensors(gpt2, halve)
    exact = seqjax.load_pretrained(GOLDEN / "gpt2")[1]
    expected = jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), exact)
    assert_same_variables(seqjax.load_pretrained(gpt2)[1], expected)


def test_precision_and_training_options_are_the_callers(tmp_path):
    options = {"param_dtype": "bfloat16", "dtype": "bfloat16", "dropout": 0.1, "unroll": 0}
    model, variables = seqjax.load_pretrained(GOLDEN / "gpt2", **options)
    assert {key: getattr(model, key) for key in options} == options
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(variables))
    pretrained.save_pretrained(model, variables, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["resid_pdrop"] == 0.1
    assert_same_variables(seqjax.load_pretrained(tmp_path, param_dtype="bfloat16")[1], variables)
    with pytest.raises(ConfigError, match=r"load_pretrained: norm is decided by the weights.*remat"):
        seqjax.load_pretrained(GOLDEN / "gpt2", norm="rms")


def test_parameters_go_where_they_are_told():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, variables = seqjax.load_pretrained(GOLDEN / "gpt2", sharding=sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(variables))


def test_rope_in_older_configs(llama, tmp_path):
    """`rope_theta` and `rope_scaling` say what `rope_parameters` does, and "type" what "rope_type" does."""
    stretched = shutil.copytree(GOLDEN / "llama_rope3_tied", tmp_path / "stretched")
    rope = json.loads((stretched / "config.json").read_text())["rope_parameters"]
    scaling = {("type" if key == "rope_type" else key): rope[key] for key in rope if key != "rope_theta"}
    edit_config(stretched, rope_parameters=..., rope_scaling=scaling, rope_theta=rope["rope_theta"])
    assert seqjax.load_pretrained(stretched)[0] == seqjax.load_pretrained(GOLDEN / "llama_rope3_tied")[0]
    edit_config(llama, rope_parameters=..., rope_scaling=None, rope_theta=5000.0)
    assert seqjax.load_pretrained(llama)[0] == seqjax.load_pretrained(GOLDEN / "llama_grouped")[0]


def test_a_tied_heads_copy_is_dropped_where_it_is_one(gpt2):
    edit_tensors(gpt2, lambda t: t.update({"lm_head.weight": t["wte.weight"].copy()}))
    assert_same_variables(seqjax.load_pretrained(gpt2)[1], seqjax.load_pretrained(GOLDEN / "gpt2")[1])
    edit_tensors(gpt2, lambda t: t.update({"lm_head.weight": t["wte.weight"] + 1}))
    with pytest.raises(ConfigError, match=r"tie_word_embeddings=True, but lm_head.weight and .*wte.weight differ"):
        seqjax.load_pretrained(gpt2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "gpt3"}, r"model_type='gpt3' is unknown; did you mean 'gpt2'\? Allowed: gpt2, llama"),
        ({"model_type": ...}, r"model_type=None is unknown"),
        ({"activation_function": "quick_gelu"}, r"activation_function='quick_gelu' is not served.*gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True is not served; allowed: False"),
        ({"scale_attn_weights": False}, r"scale_attn_weights=False is not served"),
        ({"add_cross_attention": True}, r"add_cross_attention=True is not served"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.* is not served; allowed: None"),
        ({"n_embd": ...}, r"n_embd is required and was not given"),
        ({"n_embd": "wide"}, r"model.embed_dim='wide' is of type str"),
        ({"n_head": 5}, r"model.num_heads=5 does not divide model.embed_dim=16"),
        ({"n_layer": 3}, r"missing: transformer.h.2.attn.c_attn.bias, .* and 4 more"),
        ({"n_layer": 1}, r"unexpected: transformer.h.1.attn.c_attn.bias"),
        ({"vocab_size": 41}, r"of another shape: transformer.wte.weight \[40, 16\], not \[41, 16\]"),
        ({"tie_word_embeddings": False}, r"missing: lm_head.weight"),
    ],
)
def test_configs_that_gpt2_cannot_follow(gpt2, entries, message):
    edit_config(gpt2, **entries)
    with pytest.raises(ConfigError, match=message):
        seqjax.load_pretrained(gpt2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            r"rope_type='yarn' is not served; allowed: default, llama3",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type='linear' is not served"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, r"'llama3' needs low_freq_factor, and .*=None is not"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0.5 is not served"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not served"),
        ({"rope_parameters": "yarn"}, r"rope_parameters='yarn' is not an object with a rope_type"),
        ({"rope_parameters": {**LLAMA3, "factor": "8"}}, r"factor='8' is not a number"),
        ({"hidden_act": "silk"}, r"hidden_act='silk' is not served; did you mean 'silu'"),
        ({"attention_bias": True}, r"missing: model.layers.0.self_attn.k_proj.bias"),
        ({"num_key_value_heads": 3}, r"model.num_kv_heads=3 does not divide model.num_heads=4"),
        ({"num_key_value_heads": 4}, r"model.layers.0.self_attn.k_proj.weight \[16, 16\], not \[32, 16\]"),
    ],
)
def test_configs_that_llama_cannot_follow(llama, entries, message):
    edit_config(llama, **entries)
    with pytest.raises(ConfigError, match=message):
        seqjax.load_pretrained(llama)


def test_folders_that_are_not_whole(gpt2, tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        seqjax.load_pretrained(tmp_path / "nowhere")
    weights = gpt2 / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 5, 200, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"model.safetensors is damaged or cut off"):
            seqjax.load_pretrained(gpt2)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model.safetensors is missing"):
        seqjax.load_pretrained(gpt2)
    (gpt2 / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match=r"config.json is not valid JSON"):
        seqjax.load_pretrained(gpt2)
    (gpt2 / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config.json holds a JSON list"):
        seqjax.load_pretrained(gpt2)
    (gpt2 / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        seqjax.load_pretrained(gpt2)


def test_shards_that_are_not_whole(tmp_path):
    pretrained.save_pretrained(*seqjax.load_pretrained(GOLDEN / "gpt2"), tmp_path, shard_bytes=10_000)
    index = tmp_path / "model.safetensors.index.json"
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.wte.weight"] = shards[-1].name
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"lacks tensors that .*index.json puts there: transformer.wte.weight"):
        seqjax.load_pretrained(tmp_path)
    shards[0].unlink()
    with pytest.raises(ConfigError, match=r"model-00001-of-0000\d.safetensors is missing"):
        seqjax.load_pretrained(tmp_path)
    for content in ("{}", '{"weight_map": ["model.safetensors"]}'):
        index.write_text(content)
        with pytest.raises(ConfigError, match=r"index.json has no weight_map from tensors to files"):
            seqjax.load_pretrained(tmp_path)


def test_tensors_that_are_not_floats(gpt2):
    edit_tensors(gpt2, lambda t: t.update({"wte.weight": t["wte.weight"].astype(np.int8)}))
    with pytest.raises(ConfigError, match=r"tensor wte.weight is of type I8; allowed: BF16, F16, F32, F64"):
        seqjax.load_pretrained(gpt2)


def test_without_safetensors(monkeypatch, gpt2):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ConfigError, match=r"need the package safetensors: pip install seqjax\[interop\]"):
        folders.open_tensors(gpt2).__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_position": "post"}, r"nearest, gpt2, differs in norm_position"),
        ({"position": "sinusoidal"}, r"nearest, gpt2, differs in .*position"),
        ({"head_dim": 4}, r"nearest, gpt2, differs in attention_0.head_dim"),
        ({"window": 4}, r"nearest, gpt2, differs in attention_0.window"),
        (
            {"pattern": ("attention", "glu"), "position": "rope", "norm": "rms", "out_bias": False},
            r"nearest, llama, differs in",
        ),
        ({"head": "classifier", "num_classes": 2}, r"differs in head"),
        ({"causal": False}, r"differs in causal"),
    ],
)
def test_models_that_no_family_has(options, message, tmp_path):
    model, variables = build(**options)
    with pytest.raises(ConfigError, match=message):
        pretrained.save_pretrained(model, variables, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_variables_of_another_model(tmp_path):
    model, variables = build()
    for wrong in ({}, variables["params"], build(tie_embeddings=False)[1], build(embed_dim=32)[1]):
        with pytest.raises(ConfigError, match=r"save_pretrained: the variables are not this model's; they differ in"):
            pretrained.save_pretrained(model, wrong, tmp_path)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_loss_of_64_tokens_is_that_of_transformers(name):
    model, variables = seqjax.load_pretrained(GOLDEN / name)
    stored = np.load(GOLDEN / name / "logits.npz")
    tokens = jnp.asarray(stored["tokens"])
    logits = jax.jit(model.apply)(variables, tokens)[0][:, :-1]
    sums = by_targets(logits, {"targets": tokens[:, 1:], "weights": jnp.ones((2, 63))})
    total, count = sums["loss"]
    np.testing.assert_allclose(total / count, stored["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_authors_form_of_mamba(name, tmp_path):
    """Another config.json, another name for the embedding, and the tied head written out."""
    theirs = shutil.copytree(GOLDEN / name, tmp_path / name)
    own = {"d_state": 8, "headdim": 16, "layer": "Mamba2"} if name == "mamba2" else {"d_state": 8, "dt_rank": 4}
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 37, "ssm_cfg": own, "rms_norm": True, "residual_in_fp32": True}
    (theirs / "config.json").write_text(json.dumps(config | {"pad_vocab_size_multiple": 8}))

    def rename(tensors):
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].copy()

    edit_tensors(theirs, rename)
    model, variables = seqjax.load_pretrained(theirs)
    again, expected = seqjax.load_pretrained(GOLDEN / name)
    assert pretrained._described(model) == pretrained._described(again)
    assert_same_variables(variables, expected)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ({"attn_cfg": {"num_heads": 2}}, "without attention"),
        ({"ssm_cfg": {"A_init_range": 3}}, "ssm_cfg.A_init_range"),
    ],
)
def test_configs_that_mamba_cannot_follow(entries, message, tmp_path):
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 37, "ssm_cfg": {}} | entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        seqjax.load_pretrained(tmp_path)


def test_the_authors_file_of_weights(tmp_path):
    """Their repositories hold no safetensors, but what `torch.save` wrote."""
    theirs = shutil.copytree(GOLDEN / "mamba", tmp_path / "mamba")
    (theirs / "model.safetensors").unlink()
    _, variables = seqjax.load_pretrained(theirs)
    assert_same_variables(variables, seqjax.load_pretrained(GOLDEN / "mamba")[1])
