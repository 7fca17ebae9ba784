"""Importing the data floor costs little: the heavy libraries are imported when data is first asked for."""

import subprocess
import sys

PROGRAM = """
import sys
from seqjax.registry import TASKS, load_all
load_all("seqjax.data")
names = {"python_source", "text_file", "sequential_images", "forecasting", "autoregressive", "hawkes", "control"}
assert names <= set(TASKS), TASKS
heavy = {"tensorflow_datasets", "grain", "tensorflow", "array_record", "PIL", "jax"}
print(*sorted(heavy & set(sys.modules)))
"""


def test_no_heavy_import():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
