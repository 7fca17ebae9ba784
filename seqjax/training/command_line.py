"""What the entry points share: flags, and mistakes told in one sentence."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from seqjax.config import ConfigError, flatten
from seqjax.training.errors import RunError

USAGE, FAILED, INTERRUPTED = 2, 1, 130


def define_config(required: bool = True) -> flags.FlagHolder:
    """The flags `--config=FILE` and `--config.section.key=VALUE`; call it from an entry point, never on import."""
    holder = config_flags.DEFINE_config_file("config", None, "File of the experiment's config.", lock_config=True)
    if required:
        flags.mark_flag_as_required("config")
    return holder


def define_workdir() -> flags.FlagHolder:
    """The required flag `--workdir=DIR`."""
    return flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.", required=True)


def define_imports() -> flags.FlagHolder:
    """The flag `--import=MODULE,...` for entry points without a config file: a file would import its own modules."""
    return flags.DEFINE_list("import", [], "Modules to import first, such as one that registers a mixer of yours.")


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> int:
    """Parse the command line, call `main` and return the exit status; the user's mistakes become one sentence on stderr.

    Status 0: done, or stopped by a signal and saved. 1: the run failed (RunError). 2: a mistake in the config or on the
    command line. 130: interrupted before there was anything to save.
    """
    argv = list(sys.argv if argv is None else argv)
    # Read when SciPy loads, below: OpenBLAS's threads beside XLA's make small solves up to a thousand times as slow.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is meant: a reader opens a run's folder to read
    try:
        if _asks_for_help(argv):
            return 0
        _parse(argv)
        _import_modules()
        return main() or 0
    except ConfigError as error:
        return _say(error, USAGE)
    except RunError as error:
        return _say(error, FAILED)
    except KeyboardInterrupt:
        return _say("Interrupted before anything was saved.", INTERRUPTED)


def _say(sentence: object, status: int) -> int:
    print(" ".join(str(sentence).split()), file=sys.stderr)
    return status


def _asks_for_help(argv: list[str]) -> bool:
    if not {"--help", "-help", "-h", "--helpfull"} & set(argv[1:]):
        return False
    print(sys.modules["__main__"].__doc__ or "")
    print(flags.FLAGS.main_module_help())
    print(flags.FLAGS.module_help(__name__))
    return True


def _parse(argv: list[str]) -> None:
    """Parse flags; every way in which that fails is a ConfigError."""
    path = _config_path(argv)
    if path is not None:
        _check_keys(argv, load_config(path))
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        missing = re.search(r"Flag (--\w+) must have a value other than None", str(error))
        raise ConfigError(f"{missing[1]} is required and was not given." if missing else str(error)) from error
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is not a flag; flags are given as --name=value.")


def load_config(path: str) -> ConfigDict:
    """What `get_config` in the file returns; `FILE:argument` passes it an argument.

    Raises:
      ConfigError: no such file, no `get_config`, or whatever the file raises.
    """
    file, *arguments = path.split(":", 1)
    if not os.path.isfile(file):
        raise ConfigError(f"--config={path}: there is no such file.")
    try:
        config = runpy.run_path(file)["get_config"](*arguments)
    except ConfigError as error:
        raise ConfigError(f"--config={path}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"--config={path} cannot be loaded: it has no {error}.") from error
    except Exception as error:
        raise ConfigError(f"--config={path} cannot be loaded: {type(error).__name__}: {error}.") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: get_config returns {type(config).__name__}, not a ConfigDict.")
    return config


def _check_keys(argv: list[str], config: ConfigDict) -> None:
    """Raise a ConfigError for a `--config.key` that is not a key of `config`."""
    keys = list(flatten(config))
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match is None or match[1] in keys:
            continue
        inner = [key for key in keys if key.startswith(match[1] + ".")]
        if inner:
            raise ConfigError(f"--config.{match[1]} is a section; set its keys, such as --config.{inner[0]}.")
        near = difflib.get_close_matches(match[1], keys, n=1)
        hint = f"did you mean --config.{near[0]}?" if near else f"its sections are {', '.join(config)}."
        raise ConfigError(f"--config.{match[1]} is not a key of this config; {hint}")


def _import_modules() -> None:
    for module in flags.FLAGS["import"].value if "import" in flags.FLAGS else ():
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ConfigError(f"--import={module} cannot be imported: {type(error).__name__}: {error}.") from error


def _config_path(argv: list[str]) -> str | None:
    for i, argument in enumerate(argv):
        if re.match(r"--?config=", argument):
            return argument.split("=", 1)[1]
        if argument in ("--config", "-config") and i + 1 < len(argv):
            return argv[i + 1]
    return None
