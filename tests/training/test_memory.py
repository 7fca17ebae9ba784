import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept():
    program = """
import resource
import numpy as np
from seqjax.training.memory import keep_freed_memory
assert keep_freed_memory()
np.ones(50_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(50_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    pages = 50_000_000 * 8 // 4096
    assert int(result.stdout) < pages  # five times as many where each array is mapped anew
