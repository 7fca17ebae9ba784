"""Train an experiment, or continue it: the same command does both.

For example:
    python experiments/train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python experiments/train.py --config=configs/quickstart.py --workdir=runs/wide --config.model.embed_dim=512
"""

from __future__ import annotations

import sys

from absl import flags

from seqjax.training import command_line

_CONFIG = command_line.define_config()
_WORKDIR = command_line.define_workdir()
_PROFILE = flags.DEFINE_bool("profile", False, "Trace a few steps into WORKDIR/profile.")


def main() -> None:
    from seqjax.training.loop import train
    from seqjax.training.memory import keep_freed_memory

    keep_freed_memory()
    config = _CONFIG.value
    if _PROFILE.value and not config.training.profile_steps:
        config.training.profile_steps = 5
    train(config, _WORKDIR.value)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
