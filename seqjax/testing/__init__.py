"""The conformance suite, for our architectures and for yours.

from seqjax.testing import check_mixer, check_model

check_mixer(MyMixer(embed_dim=16))      # raises AssertionError, and says which promise is broken
"""

from seqjax.testing.conformance import (
    Subject,
    check_mixer,
    check_model,
    checks_for,
    mixer_subject,
    model_subject,
)

__all__ = ["Subject", "check_mixer", "check_model", "checks_for", "mixer_subject", "model_subject"]
