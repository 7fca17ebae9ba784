"""Tokens begun before the last ones are done, against plain decoding and against the rule in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.config import ConfigError
from seqjax.generation.diffusion_forcing import DiffusionForcing, Wave
from seqjax.generation.generate import pad_left

MARK = 44
PROMPTS = [[5, 6, 7, MARK], [9, MARK], [MARK, 10, MARK, 11]]
NUM_TOKENS, DEPTH = 10, 4
VARIED = {"tie_embeddings": False, "embed_init": 2.0}  # so that tokens change what follows
VARIANTS = [
    {"position_restart": MARK, "bidirectional_source": True},  # which it generates
    {"position": "rope", "step_embedding": "none", "norm_position": "post", "num_kv_heads": 2},
    {
        "position": "learned",
        "max_length": 14,
        "pattern": ("attention", {"name": "attention", "shares": True}, "glu"),
        "norm": "rms",
    },
]


def build(**options):
    model = seqjax.build({**seqjax.example_config("universal_transformer").to_dict(), "num_steps": DEPTH, **VARIED, **options})
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    rng = np.random.default_rng(0)  # initial values would leave the block the identity
    return model, jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape).astype(a.dtype), variables)


def run(model, variables, inner_steps, threshold=0.0, prompts=PROMPTS, num_tokens=NUM_TOKENS, **options):
    """Tokens, and passes."""
    passes = []
    parallel = DiffusionForcing(inner_steps, threshold, passes.append)
    new = seqjax.generate(model, variables, prompts, num_tokens, parallel=parallel, **options)
    return np.asarray(new), passes[0]


def read_outs(model, variables, new):
    """What behind the prompts each position reads out at each depth, `[DEPTH, B, N - 1]`: as models of this depth do."""
    whole, segment_ids = pad_left([[*prompt, *row[:-1]] for prompt, row in zip(PROMPTS, new)], model.vocab_size)
    apply = jax.jit(nn.Module.apply, static_argnums=0)
    depths = [model.clone(num_steps=depth) for depth in range(1, DEPTH + 1)]
    logits = [apply(shallow, variables, jnp.asarray(whole), segment_ids=jnp.asarray(segment_ids))[0] for shallow in depths]
    return np.stack(logits).argmax(-1)[:, :, 1 - NUM_TOKENS :]


@pytest.mark.parametrize("options", VARIANTS)
def test_tokens_are_those_of_plain_decoding_and_drafts_save_passes(options):
    model, variables = build(**options)
    plain = np.asarray(seqjax.generate(model, variables, PROMPTS, NUM_TOKENS))
    right = read_outs(model, variables, plain) == plain[:, 1:]
    assert right[-1].all() and not right[0].all()
    for inner_steps in (1, 2, DEPTH):
        new, passes = run(model, variables, inner_steps)
        np.testing.assert_array_equal(new, plain)
        stages = DEPTH // inner_steps
        # A position begins for good behind the last pass in which the one before it reads out a wrong token, and one more.
        wrong = np.where(right[inner_steps - 1 :: inner_steps], 0, np.arange(1, stages + 1)[:, None, None]).max(0)
        np.testing.assert_array_equal(passes, (wrong[:, :-1] + 1).sum(1) + stages)
        assert (passes <= (NUM_TOKENS - 1) * stages).all()
    assert (passes == NUM_TOKENS - 1).all()  # all steps in one pass


def layer_norm(x, p):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p["scale"] + p["bias"]


def by_the_rule(model, variables, prompt, num_tokens, inner_steps, threshold):
    """The sampler one position, step and pass after another: tokens, and passes. Pre-norm, sinusoidal positions."""
    p = jax.tree.map(np.asarray, variables["params"])
    table, block = p["embedding"]["table"], p["step"]["block"]
    frequencies = 10000.0 ** (-np.arange(table.shape[1] // 2) / (table.shape[1] // 2))
    wave = lambda at: np.concatenate([np.sin(at * frequencies), np.cos(at * frequencies)])
    seen = {}  # position: what its keys and values are made of, step by step

    def step(x, at, number):
        x = x + wave(at) + wave(number)
        seen[at].append(layer_norm(x, block["norm_0"]))
        past = np.stack([seen[k][min(number, len(seen[k]) - 1)] for k in range(at + 1)])
        q = np.einsum("d,dhk->hk", past[-1], block["attention_0"]["query"]["kernel"])
        k, v = (np.einsum("ld,dhk->lhk", past, block["attention_0"][name]["kernel"]) for name in ("key", "value"))
        weights = np.exp(np.einsum("hk,lhk->lh", q, k) / np.sqrt(q.shape[-1]))
        x = x + np.einsum("lh,lhk,hkd->d", weights / weights.sum(0), v, block["attention_0"]["out"]["kernel"])
        hidden = np.maximum(layer_norm(x, block["norm_1"]) @ block["mlp_1"]["up"]["kernel"] + block["mlp_1"]["up"]["bias"], 0)
        return x + hidden @ block["mlp_1"]["down"]["kernel"] + block["mlp_1"]["down"]["bias"]

    def advance(at, x, steps):
        for _ in range(steps):
            x = step(x, at, len(seen[at]))
        return x, int((layer_norm(x, p["norm"]) @ p["head"]["logits"]["kernel"]).argmax())

    for at, token in enumerate(prompt):
        seen[at] = []
        _, drawn = advance(at, table[token], model.num_steps)
    tokens, window, passes = [*prompt, drawn], {}, 0
    frozen = len(prompt)  # all positions below it are
    while frozen < len(prompt) + num_tokens - 1:
        newest = len(tokens) - 1
        if newest not in window and newest < len(prompt) + num_tokens - 1:
            window[newest], seen[newest] = table[tokens[newest]], []
        passes += 1
        moved = {at: advance(at, window[at], inner_steps) for at in window}
        small = {at: np.linalg.norm(moved[at][0] - window[at]) < threshold * np.linalg.norm(moved[at][0]) for at in window}
        window = {}
        for at, (x, drawn) in moved.items():
            window[at] = x
            if at + 1 == len(tokens) or tokens[at + 1] != drawn:
                tokens = [*tokens[: at + 1], drawn]
                break
        while frozen in window and (small[frozen] or len(seen[frozen]) == model.num_steps):
            del window[frozen]
            frozen += 1
    return tokens[len(prompt) :], passes


@pytest.mark.parametrize(("inner_steps", "threshold"), [(1, 0.0), (1, 0.3), (1, 0.7), (2, 0.6)])
def test_the_rule(inner_steps, threshold):
    with jax.enable_x64(True):
        model, variables = build(num_steps=6, activation="relu", dtype="float64", param_dtype="float64")
        prompts = [[9, 20], [33, 4, 50], [2]]
        new, passes = run(model, variables, inner_steps, threshold, prompts, 12)
        wanted = [by_the_rule(model, variables, prompt, 12, inner_steps, threshold) for prompt in prompts]
        np.testing.assert_array_equal(new, [tokens for tokens, _ in wanted])
        np.testing.assert_array_equal(passes, [count for _, count in wanted])


@pytest.mark.parametrize(
    ("drawn", "ready", "tokens", "numbers", "frozen"),
    [
        ([7, 6, 0], [True, False, True], [5, 6, 7, 0], [-1, 1, 0], 0),  # what is behind waits for what is before
        ([7, 6, 0], [False, True, True], [5, 6, 7, 0], [-1, 1, -1], 1),
        ([7, 6, 0], [True, True, True], [5, 6, 7, 0], [-1, -1, -1], 2),
        ([7, 9, 0], [True, False, True], [5, 9, 0, 0], [-1, -1, 0], 0),  # a revised draft
        ([7, 9, 0], [True, True, True], [5, 9, 0, 0], [-1, -1, -1], 1),
    ],
)
def test_a_wave_moves_up(drawn, ready, tokens, numbers, frozen):
    column = lambda values, dtype: jnp.asarray(values, dtype)[:, None]
    nothing = jnp.zeros((1,), jnp.int32)
    before = jnp.asarray([[5, 6, 0, 0]], jnp.int32)
    wave = Wave(column([1, 0, -1], jnp.int32), jnp.zeros((3, 1, 2)), (), before, None, nothing, nothing)
    after, number, _ = wave.advanced(column(drawn, jnp.int32), column(ready, bool))
    assert after.tokens.tolist() == [tokens]
    assert after.numbers[:, 0].tolist() == numbers and after.frozen.tolist() == [frozen]
    assert number.tolist() == [tokens.index(0) - 1]


def test_a_wide_threshold_is_plain_decoding_at_the_depth_of_a_pass():
    (model, variables), prompt = build(**VARIANTS[2]), PROMPTS[0]
    new, passes = run(model, variables, 2, 1e9, [prompt])
    rest = seqjax.generate(model.clone(num_steps=2), variables, [[*prompt, int(new[0, 0])]], NUM_TOKENS - 1)
    np.testing.assert_array_equal(new[0, 1:], rest[0])
    assert (new != seqjax.generate(model, variables, [prompt], NUM_TOKENS)).any()
    assert passes[0] == NUM_TOKENS - 1


def test_sampled_tokens_do_not_depend_on_the_passes():
    model, variables = build()
    options = {"temperature": 2.0, "top_k": 20, "key": jax.random.key(1)}
    (new, passes), (same, _) = (run(model, variables, inner_steps, **options) for inner_steps in (1, DEPTH))
    np.testing.assert_array_equal(new, same)
    assert (passes < (NUM_TOKENS - 1) * DEPTH).any()


def test_final_tokens_stream_in_order_and_an_end_is_repeated():
    model, variables = build(step_embedding="learned")
    plain = np.asarray(seqjax.generate(model, variables, PROMPTS, NUM_TOKENS))
    eos, stream = int(plain[0, 3]), []
    ended, passes = run(model, variables, 1, eos=eos, stream=stream.append)
    np.testing.assert_array_equal(ended, seqjax.generate(model, variables, PROMPTS, NUM_TOKENS, eos=eos))
    np.testing.assert_array_equal(np.stack(stream, axis=1), ended)
    assert passes[0] <= 3 * DEPTH
    assert run(model, variables, 1, num_tokens=1)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "options", "inner_steps", "words"),
    [
        ("transformer", {}, 1, "this is a SequenceModel; allowed: model.name='universal_transformer'"),
        ("universal_transformer", {"halting": "act"}, 1, "model.halting='act' is not served"),
        ("universal_transformer", {}, 2, "inner_steps=2 does not divide model.num_steps=3; allowed: 1, 3"),
        ("universal_transformer", {}, 0, "inner_steps=0 does not divide"),
        ("universal_transformer", {"window": 200}, 1, "which attention in model.pattern cannot"),
        ("universal_transformer", {"pattern": ("attention", "mamba", "mlp")}, 1, "which mamba in model.pattern cannot"),
    ],
)
def test_what_is_not_served_is_refused(name, options, inner_steps, words):
    model = seqjax.build({**seqjax.example_config(name).to_dict(), **options})
    with pytest.raises(ConfigError, match=words):
        seqjax.generate(model, {}, [[1]], 2, parallel=DiffusionForcing(inner_steps))


def test_a_negative_threshold_is_refused():
    with pytest.raises(ConfigError, match=r"threshold=-0.1 is negative"):
        DiffusionForcing(1, -0.1)
