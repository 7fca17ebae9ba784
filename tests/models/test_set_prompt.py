"""Set-based prompting: the order of a set's sub-sequences changes nothing behind it."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.ops.set_prompt import set_order, sibling_bias

PREFIX, SETS, SUFFIX = [5, 1, 2], [[7, 3], [4, 4, 9, 6], [8]], [2, 3]
PARTS = [len(PREFIX), tuple(map(len, SETS)), len(SUFFIX)]
PROMPT = np.array([[*PREFIX, *itertools.chain(*SETS), *SUFFIX]], np.int32)
MASK = """
x...........
xx..........
xxx.........
xxxx........
xxxxx.......
xxx..x......
xxx..xx.....
xxx..xxx....
xxx..xxxx...
xxx......x..
xxxxxxxxxxx.
xxxxxxxxxxxx
"""
"""Who sees whom, as made by the authors' rule: query by key."""
POSITIONS = [0, 1, 2, 3, 4, 3, 4, 5, 6, 3, 7, 8]


class Decoder:
    """A model in float64 with parameters off their initial values, and its compiled call."""

    def __init__(self, **options):
        config = {"name": "transformer", "vocab_size": 12, "embed_dim": 8, "num_heads": 2, "num_layers": 2, "max_length": 24}
        self.model = seqjax.build({**config, "dtype": "float64", "param_dtype": "float64", **options})
        rng = np.random.default_rng(0)
        with jax.enable_x64(True):
            variables = nn.unbox(jax.jit(self.model.init)(jax.random.key(0), PROMPT))
            self.variables = jax.tree.map(lambda a: np.asarray(a) + 0.3 * rng.standard_normal(a.shape), variables)
        self.call = jax.jit(self.model.apply)

    def __call__(self, tokens, order=None, state=None, segment_ids=None):
        with jax.enable_x64(True):
            return self.call(self.variables, np.asarray(tokens, np.int32), state, order=order, segment_ids=segment_ids)

    def fresh(self, batch_size=1):
        with jax.enable_x64(True):
            return self.model.init_state(batch_size, 24)


@pytest.fixture(scope="module")
def decoder():
    return Decoder()


def permuted(order):
    sets = [SETS[i] for i in order]
    return np.array([[*PREFIX, *itertools.chain(*sets), *SUFFIX]]), set_order([3, tuple(map(len, sets)), 2])


def test_positions_and_mask_are_the_authors():
    order = set_order(PARTS)
    assert np.asarray(order.positions)[0].tolist() == POSITIONS
    causal = np.tril(np.ones((12, 12), bool))
    seen = causal & (np.asarray(sibling_bias(order, 12))[0, 0] == 0)
    assert ["".join("x" if s else "." for s in row) for row in seen] == MASK.split()


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "none"])
def test_any_order_of_the_set_gives_the_same_continuation(position):
    decoder = Decoder(position=position)
    found = []
    for order in itertools.permutations(range(3)):
        tokens, placed = permuted(order)
        outputs, state = decoder(tokens, placed, decoder.fresh())
        following, _ = decoder([[6]], state=state)
        found.append(np.concatenate([outputs[:, -2:], following], axis=1))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-10, atol=1e-11)
    plain = [np.asarray(decoder(permuted(order)[0])[0])[:, -1] for order in ((0, 1, 2), (2, 1, 0))]
    assert np.max(np.abs(plain[0] - plain[1])) > 1e-3  # which is not so of a plain prompt


def test_a_sub_sequence_is_as_behind_the_prefix_alone(decoder):
    outputs, at = np.asarray(decoder(PROMPT, set_order(PARTS))[0]), len(PREFIX)
    for tokens in SETS:
        alone = np.asarray(decoder([[*PREFIX, *tokens]])[0])
        np.testing.assert_allclose(outputs[:, at : at + len(tokens)], alone[:, len(PREFIX) :], rtol=1e-10, atol=1e-11)
        at += len(tokens)


def test_a_set_of_one_is_a_plain_prompt(decoder):
    ordered = decoder(PROMPT, set_order([3, (9,)]))[0]
    np.testing.assert_allclose(ordered, decoder(PROMPT)[0], rtol=1e-10, atol=1e-11)


def test_later_sets_see_earlier_ones_and_a_carried_prefix_is_the_same(decoder):
    tokens = np.array([[1, 2, 3, 4, 5, 6, 7, 8]])
    whole, after = decoder(tokens, set_order([2, (1, 2), 1, (1, 1)]), decoder.fresh())
    _, state = decoder(tokens[:, :2], state=decoder.fresh())
    _, state = decoder(tokens[:, 2:5], set_order([(1, 2)]), state)
    parts, state = decoder(tokens[:, 5:], set_order([1, (1, 1)]), state)
    np.testing.assert_allclose(parts, whole[:, 5:], rtol=1e-10, atol=1e-11)
    assert state.segment.position == after.segment.position == 6
    parallel = decoder(tokens, set_order([2, (1, 2), 1, (1, 1)]))[0]
    np.testing.assert_allclose(parallel, whole, rtol=1e-10, atol=1e-11)


def test_left_padding_changes_nothing(decoder):
    order = jax.tree.map(lambda a: np.pad(np.asarray(a), [(0, 0), (2, 0)]), set_order(PARTS))
    padded = np.pad(PROMPT, [(0, 0), (2, 0)])
    ids = np.array([[0, 0, *[1] * 12]], np.int32)
    outputs, state = decoder(padded, order, decoder.fresh(), ids)
    np.testing.assert_allclose(outputs[:, 2:], decoder(PROMPT, set_order(PARTS))[0], rtol=1e-10, atol=1e-11)
    assert state.segment.position == 9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 4}, "window=4"),
        ({"position": "alibi"}, "position='alibi'"),
        ({"name": "mamba", "pattern": (("mamba",), ("attention",))}, "mamba takes tokens as they are stored"),
    ],
)
def test_mixers_that_count_stored_tokens_refuse(options, said):
    config = {"name": "transformer", "vocab_size": 12, "embed_dim": 8, "num_layers": 2, **options}
    model = seqjax.build(config)
    with pytest.raises(ConfigError, match=said):
        jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens, order=set_order(PARTS)), PROMPT)


def test_a_part_without_tokens_is_refused():
    with pytest.raises(ValueError, match="has no token"):
        set_order([3, (2, 0)])


def test_without_positions_one_layer_reads_a_set_and_two_read_a_sequence():
    """A language model without positions knows order by its causal mask (Haviv et al. 2022), from the second layer on."""
    swapped = PROMPT[:, [1, 0, *range(2, 12)]]
    for layers in (1, 2):
        decoder = Decoder(position="none", num_layers=layers)
        one, other = (np.asarray(decoder(tokens)[0])[:, -1] for tokens in (PROMPT, swapped))
        assert np.allclose(one, other, rtol=1e-10, atol=1e-11) == (layers == 1)
