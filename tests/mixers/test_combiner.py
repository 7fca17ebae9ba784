"""Combiner as a mixer: its options, and that its costs grow below the square of the length."""

import pytest

import seqjax
from seqjax import registry
from seqjax.config import ConfigError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 3}, "model.num_heads=3 does not divide"),
        ({"factorization": "axal"}, "did you mean 'axial'"),
        ({"span_length": 0}, "model.span_length=0 is not positive"),
    ],
)
def test_bad_options_are_explained(options, said):
    with pytest.raises(ConfigError, match=said):
        seqjax.build({**seqjax.example_config("combiner").to_dict(), **options})


@pytest.mark.parametrize(("factorization", "most"), [("fixed", 0.13), ("logsparse", 0.02), ("axial", 0.13)])
def test_attention_costs_a_fraction_of_all_pairs(factorization, most):
    length, combiner = 2048, registry.mixer("combiner")(embed_dim=64, factorization=factorization)
    attention = registry.mixer("attention")(embed_dim=64)
    projections = 8 * length * 64**2
    ratio = (combiner.costs(length).flops - projections) / (attention.costs(length).flops - projections)
    assert 0 < ratio < most
