import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqjax.training.integrity import checksum, summarize

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_changed_bit_and_any_exchange_shows(dtype):
    rng = np.random.default_rng(0)
    array = np.array(jnp.asarray(rng.normal(size=(4, 33)) * 100, dtype))
    total = int(checksum(jnp.asarray(array)))
    rewritten = array.copy()
    raw = rewritten.view(np.uint8)
    for place in range(0, raw.size, 7):
        raw.flat[place] ^= 1
        assert int(checksum(jnp.asarray(rewritten))) != total
        raw.flat[place] ^= 1
    assert int(checksum(jnp.asarray(rewritten))) == total
    exchanged = array[::-1]
    assert (exchanged == array).all() or int(checksum(jnp.asarray(exchanged))) != total


def test_values_that_share_low_bits_are_not_interchangeable():
    """Whole numbers in float32 end in zero bits, which a multiplier linear in the position would lose."""
    array = jnp.arange(1.0, 4097.0)
    totals = {int(checksum(jnp.roll(array, shift))) for shift in range(0, 4096, 512)}
    assert len(totals) == 8


def test_zero_and_minus_zero_differ_and_scalars_work():
    assert int(checksum(jnp.float32(0.0))) != int(checksum(jnp.float32(-0.0)))
    assert int(checksum(jnp.int32(5))) == int(checksum(jnp.int32(5))) != int(checksum(jnp.int32(6)))


def test_a_summary_names_what_is_not_finite():
    tree = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": {"c": jnp.array([1.0, jnp.inf])}}
    summary = jax.tree.map(lambda x: x, summarize(tree))
    assert {path: entry["finite"] for path, entry in summary.items()} == {"a": True, "b/c": False}
    assert summary["a"]["shape"] == [2, 3] and summary["a"]["dtype"] == "bfloat16"
