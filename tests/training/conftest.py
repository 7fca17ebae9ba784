"""What tests of training share: the tiny experiment is importable, here and in the processes that tests start."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def start():
    """Starts `python ARGUMENTS...` in the repository, where the tiny experiment can be imported."""

    def start(*arguments, **environment):
        paths = os.pathsep.join([str(ROOT), str(HERE)])
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def start_training(start):
    """Starts `experiments/train.py` on the tiny experiment: 12 steps, a checkpoint every 4."""

    def start_training(workdir, *flags, **environment):
        config = f"--config={HERE / 'tiny_config.py'}"
        return start("experiments/train.py", config, f"--workdir={workdir}", *flags, **environment)

    return start_training
