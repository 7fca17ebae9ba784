"""Kernels on a mesh of several devices."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_each_device_scans_its_rows_and_features():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/ops")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "tests/ops/on_four_devices.py"]
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # [rows, L, features]; features stay whole where their division would cut groups, which are rows of their own.
    assert json.loads(done.stdout.splitlines()[-1]) == {"1 groups": [[2, 18, 6]], "3 groups": [[6, 18, 4]]}
