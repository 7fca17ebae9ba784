"""Names, options and the sentences that wrong ones get."""

import jax
import pytest
from ml_collections import ConfigDict

import seqjax
from seqjax import registry
from seqjax.config import ConfigError, check_options, differing_keys, digest, options_of


def config(**options):
    made = seqjax.example_config("transformer")
    made.update(options)
    return made


def test_lists_by_ability():
    everything = seqjax.list_architectures()
    assert "transformer" in everything
    assert "transformer" in seqjax.list_architectures(inputs="tokens", causal=True, carries_state=True, segments=True)
    assert "transformer" in seqjax.list_architectures(inputs="continuous", causal=False)
    assert seqjax.list_architectures(inputs="smells") == []


@pytest.mark.parametrize("name", seqjax.list_architectures())
def test_example_config_builds_abstractly(name):
    model = seqjax.build(seqjax.example_config(name))
    tokens = "tokens" in registry.architecture(name).inputs
    inputs = jax.ShapeDtypeStruct((2, 14), "int32") if tokens else jax.ShapeDtypeStruct((2, 14, model.input_dim), "float32")
    outputs, state = jax.eval_shape(lambda key, x: model.init_with_output(key, x)[0], jax.random.key(0), inputs)
    assert outputs.shape == (2, 14, model.vocab_size or model.input_dim)
    assert state is None


def test_build_takes_the_model_section_of_an_experiment():
    assert seqjax.build(ConfigDict({"model": config()})) == seqjax.build(config())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "transfomer"}, ["model.name='transfomer'", "did you mean 'transformer'?"]),
        ({"num_head": 4}, ["model.num_head is not an option", "did you mean 'num_heads'?"]),
        ({"num_heads": "four"}, ["model.num_heads='four'", "str", "int"]),
        ({"num_heads": True}, ["model.num_heads=True", "bool", "int"]),
        ({"num_heads": 5}, ["model.num_heads=5", "model.embed_dim=32", "did you mean 4?"]),
        ({"num_kv_heads": 3}, ["model.num_kv_heads=3", "1, 2, 4"]),
        ({"norm": "layr"}, ["model.norm='layr'", "did you mean 'layer'?"]),
        ({"norm_position": "middle"}, ["model.norm_position='middle'", "post, pre"]),
        ({"position": "ropes"}, ["model.position='ropes'", "did you mean 'rope'?"]),
        ({"activation": "gelo"}, ["model.activation='gelo'", "did you mean 'gelu'?"]),
        ({"remat": "all"}, ["model.remat='all'", "full"]),
        ({"head": "language_mode"}, ["model.head='language_mode'", "did you mean 'language_model'?"]),
        ({"head": "classifier"}, ["model.num_classes"]),
        ({"input_dim": 3}, ["model.vocab_size=64", "model.input_dim=3", "exactly one"]),
        ({"pool": "max", "head": "classifier", "num_classes": 2}, ["model.pool='max'"]),
        ({"dtype": "float8"}, ["model.dtype='float8'"]),
        ({"dropout": 1.0}, ["model.dropout=1.0"]),
        ({"stochastic_depth": -0.1}, ["model.stochastic_depth=-0.1"]),
        ({"num_layers": 0}, ["model.num_layers=0"]),
        ({"window": 0}, ["model.window=0"]),
        ({"pattern": ("atention", "mlp")}, ["'atention'", "did you mean 'attention'?"]),
        ({"pattern": ()}, ["model.pattern=()"]),
        ({"pattern": ("s4",)}, ["model.pattern=('s4',)", "model.name='s4'", "('attention', 'mlp')"]),
        ({"pattern": ({"name": "attention", "windw": 3}, "mlp")}, ["windw", "did you mean 'window'?"]),
        ({"mlp_ratio": 0.0}, ["model.mlp_ratio=0.0"]),
    ],
)
def test_a_wrong_config_gets_one_clear_sentence(options, words):
    made = ConfigDict({**config().to_dict(), **options})
    with pytest.raises(ConfigError) as caught:
        seqjax.build(made)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match=r"model\.name is required"):
        seqjax.build(ConfigDict({"embed_dim": 8}))
    with pytest.raises(ConfigError, match=r"model\.embed_dim is required"):
        seqjax.build(ConfigDict({"name": "transformer", "vocab_size": 8}))


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ConfigError, match="registered already"):
        registry.register_mixer("attention")(type("Other", (), {}))


def test_options_are_checked_and_completed():
    def make(width: int, rate: float = 0.1, *, names: tuple[str, ...] = (), label: str | None = None): ...

    allowed = options_of(make)
    assert check_options({"width": 3, "rate": 1, "names": ["a"]}, allowed, "x") == {
        "width": 3,
        "rate": 1.0,
        "names": ("a",),
        "label": None,
    }
    with pytest.raises(ConfigError, match=r"x\.width is required"):
        check_options({}, allowed, "x")


def test_digest_and_differences():
    a = ConfigDict({"model": {"width": 1, "names": ("a", "b")}, "seed": 0})
    b = ConfigDict({"seed": 0, "model": {"names": ["a", "b"], "width": 1}})
    assert digest(a) == digest(b)
    b.model.width = 2
    assert digest(a) != digest(b)
    assert differing_keys(a, b) == ["model.width"]
    assert differing_keys({"a": 1}, {"b": 1}) == ["a", "b"]
