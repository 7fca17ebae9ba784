"""What the README shows is true: its listing of a new architecture runs, and keeps the contract."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax import registry
from seqjax.mixers.base import Costs, Mixer
from seqjax.models.heads import fits
from seqjax.ops.segments import SegmentState, segments
from seqjax.testing import check_mixer, check_model

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def moving_average():
    listing = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "register_mixer" in block)
    names = {"seqjax": seqjax, "Mixer": Mixer, "Costs": Costs, "nn": nn, "jax": jax, "jnp": jnp}
    exec(listing, names | {"segments": segments, "SegmentState": SegmentState, "__name__": __name__})
    yield registry.MIXERS["moving_average"]
    del registry.MIXERS["moving_average"], registry.ARCHITECTURES["moving_average"]


def test_the_listing_keeps_every_promise(moving_average):
    check_mixer(moving_average(embed_dim=16))
    model = seqjax.build(seqjax.example_config("moving_average"))
    check_model(model)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert seqjax.generate(model, variables, [[1, 2], [3]], 3).shape == (2, 3)


def test_a_broken_mixer_is_told_what_it_breaks(moving_average):
    class Forgetful(moving_average):
        def __call__(self, x, state=None, **options):
            y, after = super().__call__(x, state, **options)
            return y, after and {**after, "average": jnp.zeros_like(after["average"])}

    class Leaky(moving_average):
        def __call__(self, x, state=None, **options):
            y, after = super().__call__(jnp.flip(x, 1), state, **options)
            return jnp.flip(y, 1), after

    class Deaf(moving_average):
        def __call__(self, x, state=None, *, segment_ids=None, train=False):
            return super().__call__(x, state, train=train)

    for broken, words in ((Forgetful, "of split"), (Leaky, "depends on later inputs"), (Deaf, "neighbours")):
        with pytest.raises(AssertionError, match=words):
            check_mixer(broken(embed_dim=8))


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which does not exist"


def test_every_architecture_is_in_the_table():
    ours = [name for name, entry in registry.ARCHITECTURES.items() if entry.make.__module__.startswith("seqjax.")]
    assert set(ours) <= set(seqjax.list_architectures()) and ours
    for name in ours:
        assert f"| `{name}` |" in README


def test_every_config_is_in_the_readme_and_builds():
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert f"configs/{path.name}" in README
        scope: dict = {}
        exec(path.read_text(), scope)
        config = scope["get_config"]().copy_and_resolve_references()
        task = registry.task(config.data.name)
        head = task.head if isinstance(task.head, str) else "classifier"  # a property where the options decide
        length = config.data.get("lookback", 16)
        if head == "language_model":
            decided = {"vocab_size": config.model.vocab_size or 257}
            inputs, wanted = jax.ShapeDtypeStruct((2, length), np.int32), (2, length, decided["vocab_size"])
        else:
            decided = {"input_dim": 3, "output_dim": 3, "num_classes": 10, "horizon": config.data.get("horizon", 1)}
            if not fits(config.model.head, head):
                decided["head"] = head
            inputs = jax.ShapeDtypeStruct((2, length, 3), np.float32)
            wanted = {
                "classifier": (2, 10),
                "forecast": (2, decided["horizon"], 3),
                "regression": (2, length, 3),
                "point_process": (2, length, 3 * config.model.get("mixture_components", 0) + 3),
            }[head]
        with config.model.ignore_type():
            config.model.update({key: value for key, value in decided.items() if key in config.model})
        model = seqjax.build(config)
        outputs = jax.eval_shape(lambda key, x, model=model: model.init_with_output(key, x)[0][0], jax.random.key(0), inputs)
        assert outputs.shape == wanted


@pytest.mark.parametrize("config", ["python_bytes", "megabyte_python", "etth1_variates", "vision"])
def test_every_model_that_a_config_names_builds(config):
    scope: dict = {}
    exec((ROOT / f"configs/{config}.py").read_text(), scope)
    series = {"input_dim": 7, "output_dim": 7, "horizon": 96}
    images = {"input_dim": 16, "head": "classifier", "num_classes": 10}
    sizes = {"etth1_variates": series, "vision": images}.get(config, {"vocab_size": 257})
    others = seqjax.list_architectures(causal=True, inputs="tokens") if config == "python_bytes" else ()
    for name in {*scope["MODELS"], *others}:
        which = f"{name},mnist" if config == "vision" else name
        seqjax.build({**scope["get_config"](which).model.to_dict(), **sizes})


@pytest.mark.parametrize("data", ["smnist", "pmnist", "scifar"])
def test_sequential_images_has_a_config_for_every_mixer(data):
    scope: dict = {}
    exec((ROOT / "configs/sequential_images.py").read_text(), scope)
    for mixer in scope["MODELS"]:
        config = scope["get_config"](f"{mixer},{data}")
        assert config.model.name == mixer and config.data.dataset == scope["DATA"][data]["dataset"]
        seqjax.build({**config.model.to_dict(), "input_dim": 1, "head": "classifier", "num_classes": 10})
