"""Runs entry points with many command lines in one process tree: reads `[[script, flag, ...], ...]` from stdin and prints
`[[exit status, stdout, stderr], ...]`. Each runs in a fork of a process that has imported everything and computed nothing.
"""

import json
import os
import runpy
import sys
import tempfile

import seqjax.training.loop
import seqjax.training.restore  # noqa: F401


def child(arguments, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as exit:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(99)


results = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            child(arguments, out, err)
        _, status = os.waitpid(pid, 0)
        out.seek(0), err.seek(0)
        results.append([os.waitstatus_to_exitcode(status), out.read(), err.read()])
print(json.dumps(results))
