"""Where a run's records go: metrics.jsonl, metrics.csv and, when asked for, TensorBoard.

A record is `{"step": k, "split": "train" | "validation", name: value, ...}`: what was measured once k updates were made.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, Protocol

from seqjax.config import ConfigError
from seqjax.training.workdir import write_atomically

Record = dict[str, Any]


class Writer(Protocol):
    """A place for records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsFiles:
    """metrics.jsonl and metrics.csv, kept alike.

    Args:
      workdir: the run's folder.
      step: the restored step; records past it belong to updates that are now made again, and are dropped.

    Attributes:
      records: all of them, oldest first.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        self._jsonl, self._csv = workdir / "metrics.jsonl", workdir / "metrics.csv"
        self.records = [record for record in read_records(self._jsonl) if record["step"] <= step]
        self._restored = {(record["step"], record["split"]) for record in self.records}
        self._columns = _columns(self.records)
        write_atomically(self._jsonl, "".join(_json_line(record) for record in self.records))
        self._rewrite_csv()

    def write(self, record: Record) -> None:
        """Append a record; it is on disk, for a reader and after a crash of the process, when this returns."""
        if (record["step"], record["split"]) in self._restored:
            return  # a run that had finished is evaluated again when its command is repeated
        self.records.append(record)
        with self._jsonl.open("a") as file:
            file.write(_json_line(record))
        if set(record) <= set(self._columns):
            with self._csv.open("a", newline="") as file:
                file.write(self._csv_line(record))
        else:  # a new column, so every line gains a field
            self._columns = _columns(self.records)
            self._rewrite_csv()

    def close(self) -> None:
        """Nothing stays open between records."""

    def _rewrite_csv(self) -> None:
        header = ",".join(self._columns) + "\n" if self._columns else ""
        write_atomically(self._csv, header + "".join(self._csv_line(record) for record in self.records))

    def _csv_line(self, record: Record) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(record.get(column, "") for column in self._columns)
        return line.getvalue()


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "split" in record:
            records.append(record)
    return records


class TensorBoard:
    """Event files in `workdir/tensorboard`, one scalar per metric and split. Needs tensorboardX."""

    def __init__(self, workdir: Path, step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "training.tensorboard=True needs the package tensorboardX: pip install 'seqjax[tensorboard]'."
            ) from error
        # purge_step hides events that an earlier process wrote for updates that are now made again.
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


def _columns(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _json_line(record: Record) -> str:
    """JSON has no NaN or infinity: null stands for them."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"
