"""One record and one picture from finished runs: their scores, and over seeds of one experiment mean and standard error.

python experiments/report.py runs/seed0 runs/seed1 runs/seed2 --out=docs/results/shakespeare_char.json

Scores of `experiments/evaluate.py` are taken in where a run has them: of `--split=test`, and of other lengths, say, from
`--output=WORKDIR/evaluation_NAME.json`.
"""

from __future__ import annotations

import argparse
import json
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
    # Options that are younger than a run have their defaults there.
    configs = [complete(_config(workdir)).to_dict() for workdir in workdirs]
    runs = [read_records(workdir / "metrics.jsonl") for workdir in workdirs]
    task = make_task(complete(configs[0]))
    varied = sorted({key for config in configs for key in differing_keys(configs[0], config)})
    if "model.name" in varied:  # architectures have options of their own; their names tell them apart
        varied = [key for key in varied if not key.startswith("model.")] + ["model.name"]
    rows = [
        {**{key: flatten(config).get(key) for key in varied}, **_final(run, workdir)}
        for config, run, workdir in zip(configs, runs, workdirs)
    ]
    summary = {"unit": task.loss_unit, "runs": len(rows), "baselines": task.baselines()}
    if set(varied) <= {"training.seed", "data.seed"}:
        scores = [key for key in rows[0] if key.endswith(("_loss", "_accuracy", "_mae", "_rmse"))]
        summary |= {key: _mean_and_error([row[key] for row in rows]) for key in scores}
    where = {key: configs[0]["data"].get(key) for key in getattr(task, "locations", ())}
    config = {name: {k: v for k, v in section.items() if k not in where} for name, section in configs[0].items()}
    write_record(out, provenance(), rows, summary=summary, config=config, data_digest=task.digest)
    drawn = dict(zip((config["model"]["name"] for config in configs), runs)) if "model.name" in varied else runs[0]
    plot_losses(drawn, out.with_suffix(".png"), task.loss_unit, task.baselines())
    print(table(rows))
    print(*(f"{key}: {value}" for key, value in summary.items()), sep="\n")


def _mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean, and with several values its standard error."""
    found = {"mean": float(np.mean(values))}
    if len(values) > 1:
        found["standard_error"] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return found


def _config(workdir: pathlib.Path) -> dict[str, Any]:
    identity = read_identity(workdir)
    if identity is None:
        raise ConfigError(f"{workdir} holds no run: there is no config.json.")
    return identity["config"]


def _final(run: list[dict[str, Any]], workdir: pathlib.Path) -> dict[str, Any]:
    """The last validation scores of a run, others that were taken of it, and its median speed."""
    scores = [record for record in run if record["split"] == "validation"]
    if not scores:
        raise ConfigError(f"{workdir} holds no validation scores; let the run finish.")
    speed = float(np.median([record["tokens_per_second"] for record in run if "tokens_per_second" in record]))
    splits = {"validation": scores[-1]}
    for path in sorted(workdir.glob("evaluation_*.json")):
        splits.setdefault(path.stem.removeprefix("evaluation_"), json.loads(path.read_text()))
    kinds = ("loss", "accuracy", "mae", "rmse")
    found = {f"{split}_{kind}": record[kind] for split, record in splits.items() for kind in kinds if kind in record}
    return {"step": scores[-1]["step"], **found, "tokens_per_second": speed}


if __name__ == "__main__":
    sys.exit(main())
