"""A run's folder: whose it is, whether it may be written, and the config it belongs to.

config.json        the complete config, and the digest of the data
checkpoints/       one folder per checkpoint
set_aside/         checkpoints that could not be read, kept for inspection
metrics.jsonl, metrics.csv, loss.png, tensorboard/, profile/
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from seqjax.config import ConfigError, differing_keys, digest, plain
from seqjax.training.experiment import REPORTING

CONFIG = "config.json"
OWN = ("checkpoints", "metrics.jsonl", "metrics.csv")


def claim(workdir: str | os.PathLike, config: ConfigDict, data_digest: str, exempt: Iterable[str] = ()) -> Path:
    """The folder of a run, made if it is not there, for `config`; nothing is changed in one that belongs to another run.

    Args:
      config: complete and resolved.
      data_digest: of the task, to refuse data that changed under the same config.
      exempt: dotted keys that may differ from the stored config besides `REPORTING`, such as a data folder's place.
    Raises:
      ConfigError: the path is not a folder or cannot be written, or holds a run of another config or other data.
    """
    path = Path(workdir).expanduser().absolute()
    stored = read_identity(path)
    if stored is not None:
        refuse_changes(path, stored, config, data_digest, exempt)
    elif path.is_dir() and (found := [name for name in OWN if (path / name).exists()]):
        raise ConfigError(f"--workdir={path} holds {found[0]} but no {CONFIG}; choose another folder.")
    identity = {"config": plain(config), "config_digest": digest(config), "data_digest": data_digest}
    try:
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_atomically(path / CONFIG, json.dumps(identity, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--workdir={path} cannot be written: {error.strerror or error}.") from error
    return path


def read_identity(path: Path) -> dict[str, Any] | None:
    """What `claim` stored in a folder: `config`, `config_digest`, `data_digest`; None where no run began."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--workdir={path} is a file; give a folder.")
    try:
        return json.loads((path / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / CONFIG} cannot be read: {error}.") from error


def refuse_changes(
    path: Path, stored: dict[str, Any], config: ConfigDict, data_digest: str, exempt: Iterable[str] = ()
) -> None:
    """Raise a ConfigError if `config` would not continue the stored run."""
    allowed = {*REPORTING, *exempt}
    changed = [key for key in differing_keys(stored["config"], config) if key not in allowed]
    if "model.name" in changed:
        theirs, ours = stored["config"]["model"]["name"], config.model.name
        raise ConfigError(f"--workdir={path} holds a run of model {theirs!r}, not {ours!r}; choose another folder.")
    if changed:
        raise ConfigError(f"--workdir={path} holds a run that differs in {', '.join(changed)}; choose another folder.")
    if stored["data_digest"] != data_digest:
        raise ConfigError(
            f"--workdir={path} holds a run on other data: the digest was {stored['data_digest']} and is now "
            f"{data_digest}; restore the data or choose another folder."
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old text or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
