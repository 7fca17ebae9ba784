"""Speed, measured side by side: a table on the screen, and a JSON record of the figures and of how they came about.

python experiments/benchmark.py train_step --out=docs/results/train_step.json
python experiments/benchmark.py generate --new_tokens=512
python experiments/benchmark.py generate_runs runs/megabyte runs/transformer --new_tokens=8192
python experiments/benchmark.py generate_images --batch=8
python experiments/benchmark.py attention --rounds=20
python experiments/benchmark.py attention_gpu --out=docs/results/attention_gpu.json  # on an H100 or H200
python experiments/benchmark.py scan --shapes 1x1024x256x16
python experiments/benchmark.py state_space --batches 1 8 --lengths 256 4096
python experiments/benchmark.py selective_scan --shapes 4x1024x256x16
python experiments/benchmark.py selective_scan --shapes 8x4096x2048x16 --dtype bfloat16 --rounds 20  # on a GPU
python experiments/benchmark.py decode --out=docs/results/decode.json
python experiments/benchmark.py linear_attention --out=docs/results/linear_attention.json
python experiments/benchmark.py newton --lengths 256 4096
python experiments/benchmark.py newton_tpu --out=docs/results/newton_tpu.json  # compiles with libtpu; needs no TPU
python experiments/benchmark.py kernels_tpu --out=docs/results/kernels_tpu.json  # the same
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable

from benchmarks.attention import attention, attention_gpu
from benchmarks.generation import generate, generate_images, generate_runs
from benchmarks.kernels_tpu import kernels_tpu
from benchmarks.linear_attention import linear_attention
from benchmarks.newton_scan import newton, newton_tpu
from benchmarks.scan import scan
from benchmarks.selective_scan import selective_scan
from benchmarks.state_space import decode, state_space
from benchmarks.training import loop_overhead, train_step

from seqjax.scaling.record import PACKAGES, provenance, table, write_record


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def parser() -> argparse.ArgumentParser:
    """The command line: a subcommand per benchmark, each with its sizes."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="benchmark", required=True)

    def command(function: Callable, rounds: int, packages: tuple[str, ...] = (), **sizes: int) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        added.set_defaults(run=function, packages=packages)
        added.add_argument("--out", help="file for the JSON record")
        added.add_argument("--rounds", type=int, default=rounds, help="timed calls of each competitor")
        for name, default in sizes.items():
            added.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
        return added

    model = {"layers": 6, "width": 384, "heads": 6, "batch": 8}
    command(train_step, 20, ("torch", "transformers"), **model, length=256, threads=os.cpu_count() or 1)
    command(loop_overhead, 10, **model, length=256, steps=300)
    command(generate, 1, **model, prompt=16, new_tokens=512, bucket=64)
    runs = command(generate_runs, 3, batch=1, new_tokens=8192)
    runs.add_argument("workdirs", nargs="+", help="folders of runs, the baseline last")
    command(generate_images, 1, layers=8, width=256, heads=8, batch=1, pixels=784, bucket=56)
    shapes = [(4, 512, 4, 64), (1, 4096, 4, 64)]
    command(attention, 20).add_argument("--shapes", type=_shape, nargs="+", default=shapes, help="such as 4x512x4x64")
    command(attention_gpu, 20, calls=20)
    shapes = [(1, 1024, 256, 16), (4, 1024, 256, 16), (8, 2048, 512, 16)]
    command(scan, 5).add_argument("--shapes", type=_shape, nargs="+", default=shapes, help="B, L, D, N, such as 1x1024x256x16")
    selective = command(selective_scan, 5, layers=4, width=256, batch=4, length=1024)
    selective.add_argument("--shapes", type=_shape, nargs="+", default=shapes, help="B, L, E, N, such as 1x1024x256x16")
    selective.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the scans' inputs")
    matrix = command(linear_attention, 5, batch=1, length=2048, heads=4, key=64, value=64)
    matrix.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 17)], help="for the memory")
    for solved in (command(newton, 5, batch=4, width=256), command(newton_tpu, 1, batch=4, width=256)):
        solved.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    command(kernels_tpu, 1, length=4096, features=2048, modes=16)
    faces = command(state_space, 3, width=256, state=64, tokens=64)
    faces.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    faces.add_argument("--lengths", type=int, nargs="+", default=[4**n for n in range(2, 8)])
    long = command(decode, 3, layers=2, width=256, heads=4, state=64, tokens=64, again=2, new_tokens=4096)
    long.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(8, 17)])
    return made


def main() -> None:
    args = parser().parse_args()
    absent = [name for name in (*args.packages, "safetensors") if args.packages and importlib.util.find_spec(name) is None]
    if absent:
        raise SystemExit(f"{args.benchmark} compares with other libraries: pip install {' '.join(absent)}")
    origin = provenance((*PACKAGES, *args.packages))
    rows, checks = args.run(args)
    print(table(rows))
    for name, value in checks.items():
        print(f"{name}: {value}")
    if args.out:
        kept = {key: value for key, value in vars(args).items() if key not in ("run", "packages", "out", "benchmark")}
        write_record(args.out, origin, rows, settings=kept, checks=checks)


if __name__ == "__main__":
    main()
