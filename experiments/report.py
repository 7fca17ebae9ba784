"""One record and one picture from finished runs of the same experiment: their scores, mean and standard error.

python experiments/report.py runs/seed0 runs/seed1 runs/seed2 --out=docs/results/shakespeare_char.json
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from typing import Any

import numpy as np

from seqjax.config import ConfigError, differing_keys, flatten
from seqjax.scaling.record import provenance, table, write_record
from seqjax.training.experiment import complete
from seqjax.training.plots import plot_losses
from seqjax.training.trainer import make_task
from seqjax.training.workdir import read_identity
from seqjax.training.writers import read_records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, help="folders of finished runs")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="file of the JSON record; the picture lies beside it")
    args = parser.parse_args()
    try:
        report(args.workdirs, args.out)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def report(workdirs: list[pathlib.Path], out: pathlib.Path) -> None:
    """Write `out` and the picture, and print the table."""
    configs = [_config(workdir) for workdir in workdirs]
    runs = [read_records(workdir / "metrics.jsonl") for workdir in workdirs]
    task = make_task(complete(configs[0]))
    varied = sorted({key for config in configs for key in differing_keys(configs[0], config)})
    rows = [
        {**{key: flatten(config)[key] for key in varied}, **_final(run, workdir)}
        for config, run, workdir in zip(configs, runs, workdirs)
    ]
    losses = np.array([row["validation_loss"] for row in rows])
    summary = {"unit": task.loss_unit, "mean": losses.mean(), "runs": len(losses), "baselines": task.baselines()}
    if len(losses) > 1:
        summary["standard_error"] = losses.std(ddof=1) / math.sqrt(len(losses))
    summary = {key: float(value) if isinstance(value, np.floating) else value for key, value in summary.items()}
    where = {key: configs[0]["data"].get(key) for key in getattr(task, "locations", ())}
    config = {name: {k: v for k, v in section.items() if k not in where} for name, section in configs[0].items()}
    write_record(out, provenance(), rows, summary=summary, config=config, data_digest=task.digest)
    plot_losses(runs[0], out.with_suffix(".png"), task.loss_unit, task.baselines())
    print(table(rows))
    print(*(f"{key}: {value}" for key, value in summary.items()), sep="\n")


def _config(workdir: pathlib.Path) -> dict[str, Any]:
    identity = read_identity(workdir)
    if identity is None:
        raise ConfigError(f"{workdir} holds no run: there is no config.json.")
    return identity["config"]


def _final(run: list[dict[str, Any]], workdir: pathlib.Path) -> dict[str, Any]:
    """The last validation scores of a run, and its median speed."""
    scores = [record for record in run if record["split"] == "validation"]
    if not scores:
        raise ConfigError(f"{workdir} holds no validation scores; let the run finish.")
    speed = float(np.median([record["tokens_per_second"] for record in run if "tokens_per_second" in record]))
    return {"step": scores[-1]["step"], "validation_loss": scores[-1]["loss"], "tokens_per_second": speed}


if __name__ == "__main__":
    sys.exit(main())
