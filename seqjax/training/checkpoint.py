"""Checkpoints: saved in the background, verified when restored, set aside when broken.

The only module that knows Orbax. A checkpoint holds the state's arrays and a JSON record: config and data digests,
tokenizer, step, and for every array its shape, dtype and exact checksum.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from seqjax.config import ConfigError, digest, plain
from seqjax.training.errors import RunError
from seqjax.training.groups import parameter_path
from seqjax.training.integrity import layouts, summarize

FOLDER, ASIDE = "checkpoints", "set_aside"


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: an existing folder.
      keep: how many of the newest stay; None keeps all.
      report: called with a sentence about each checkpoint that is set aside.
      create: make the checkpoint folder; False is for readers.
    """

    def __init__(
        self, workdir: Path, keep: int | None = None, report: Callable[[str], None] = print, create: bool = True
    ) -> None:
        self.workdir, self._report = workdir, report
        self.folder = workdir / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, read_only=not create)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._write = create

    def latest(self) -> int | None:
        """The newest step that is saved, or being saved."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Save `state` (any tree of arrays) in the background; the arrays may be donated as soon as this returns.

        Raises:
          RunError: an array is not finite, or writing fails, now or for the checkpoint before.
        """
        if step == self.latest():
            return
        state = to_dicts(state)
        arrays = summarize(state)
        broken = [path for path, summary in arrays.items() if not summary["finite"]]
        if broken:
            raise RunError(f"step {step}: {broken[0]} is not finite, so no checkpoint was written; {self.last_good()}.")
        record = plain({**record, "step": step, "arrays": arrays})
        record["record_digest"] = digest(record)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))
        self._attempt(lambda: self._manager.save(step, args=items, force=True))

    def wait(self) -> None:
        """Wait until everything is on disk; RunError if it could not be written."""
        self._attempt(self._manager.wait_until_finished)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # Orbax re-raises here whatever its threads met: a full disk, a lost mount
            reason = _one_line(error)
            raise RunError(f"a checkpoint could not be written to {self.folder}: {reason}; {self.last_good()}.") from error

    def last_good(self) -> str:
        """Which checkpoint is the last complete one, as part of a sentence."""
        step = max((int(p.name) for p in self.folder.glob("*") if p.name.isdigit()), default=None)
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is {self.folder / str(step)}"

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint; ValueError if it is not what was saved."""
        record = dict(self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record)
        if record.pop("record_digest", None) != digest(record) or record["step"] != step:
            raise ValueError("its record does not match its digest")
        return record

    def restore_latest(self, target: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that proves intact, and its record; None if nothing was ever saved.

        Args:
          target: given a record, returns the part of the saved state to restore, a tree like the saved one whose
            leaves are `jax.ShapeDtypeStruct`s with shardings. Any mesh will do, whatever the checkpoint was saved on.
        Raises:
          ConfigError: the checkpoint is of another model: names, shapes or dtypes differ.
          RunError: there are checkpoints and none is intact.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        with quiet_abandoned_reads():
            for step in steps:
                try:
                    return self._verified(step, target)
                except (ConfigError, PermissionError, MemoryError):
                    raise  # nothing is wrong with the file
                except Exception as error:
                    if "RESOURCE_EXHAUSTED" in str(error):
                        raise
                    reason = _one_line(error)
                self._set_aside(step, reason)
        if steps:
            raise RunError(f"none of the {len(steps)} checkpoints in {self.folder} was intact; start in another workdir.")
        return None

    def _verified(self, step: int, target: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]]:
        record = self.record(step)
        wanted = target(record)
        self._refuse_other_model(step, record, wanted)
        return from_dicts(wanted, self._restore(step, record, to_dicts(wanted))), record

    def _restore(self, step: int, record: dict[str, Any], target: Any) -> Any:
        arguments = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        state = self._manager.restore(step, args=ocp.args.Composite(state=arguments)).state
        for path, summary in summarize(state).items():
            if summary["checksum"] != record["arrays"][path]["checksum"]:
                raise ValueError(f"the checksum of {path} does not match")
        return state

    def _refuse_other_model(self, step: int, record: dict[str, Any], target: Any) -> None:
        saved = {path: (list(a["shape"]), a["dtype"]) for path, a in record["arrays"].items()}
        for path, wanted in layouts(target).items():
            if saved.get(path) != (wanted["shape"], wanted["dtype"]):
                has = "no such array" if path not in saved else f"{saved[path][1]}{saved[path][0]}"
                raise ConfigError(
                    f"checkpoint {self.folder / str(step)} is of another model: {path} is "
                    f"{wanted['dtype']}{wanted['shape']} here, and {has} there; choose another workdir."
                )

    def _set_aside(self, step: int, reason: str) -> None:
        """Move a broken checkpoint out of the way; nothing is deleted."""
        place = self.workdir / ASIDE
        number = 0
        while (destination := place / (str(step) if number == 0 else f"{step}.{number}")).exists():
            number += 1
        moved = "it was left where it is"
        if self._write:
            if jax.process_index() == 0:
                place.mkdir(exist_ok=True)
                os.rename(self.folder / str(step), destination)
            self._manager.reload()
            moved = f"it was moved to {destination}"
        self._report(f"Checkpoint {step} is broken ({reason}); {moved}, and the one before is used.")

    def preempted(self, step: int) -> bool:
        """Whether any process was told to stop: the same answer on all of them (needs `jax.distributed`)."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Wait for background work and release it."""
        self._manager.close()


def to_dicts(tree: Any) -> dict[str, Any]:
    """A tree's arrays in nested dicts by their paths: what is on disk does not depend on the classes of optimizers."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = parameter_path(path).split("/")
        place = nested
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = leaf
    return nested


def from_dicts(tree: Any, nested: dict[str, Any]) -> Any:
    """`tree` with its leaves replaced by those of `nested`, the inverse of `to_dicts`."""

    def find(path: tuple, _: Any) -> Any:
        place: Any = nested
        for key in parameter_path(path).split("/"):
            place = place[key]
        return place

    return jax.tree_util.tree_map_with_path(find, tree)


@contextlib.contextmanager
def quiet_abandoned_reads() -> Iterator[None]:
    """Drop the tracebacks of reads that Orbax abandons when one array of a checkpoint cannot be read.

    Orbax reads all arrays at once and closes its event loop at the first that fails. The others then complain, from
    TensorStore's threads and when their coroutines are collected, about nothing a user could act on: the failure itself
    is raised as usual.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        abandoned = getattr(unraisable.object, "__name__", "") == "_read_array_index_and_device_put"
        if not abandoned and "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        gc.collect()  # while the hook is in place
        sys.unraisablehook = before


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".:;") if lines else type(error).__name__)[:200]
