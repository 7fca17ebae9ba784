"""Speed, measured side by side: a table on the screen, and a JSON record of the figures and of how they came about.

python experiments/benchmark.py train_step --out=docs/results/train_step.json
python experiments/benchmark.py generate --new_tokens=512
python experiments/benchmark.py attention --rounds=20
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import seqjax
from seqjax.interop.pretrained import save_pretrained
from seqjax.ops.attention import flash_attention
from seqjax.parallel.rules import use_mesh
from seqjax.scaling.record import PACKAGES, provenance, table, write_record
from seqjax.scaling.timing import Timing, time_side_by_side
from seqjax.training.loop import train
from seqjax.training.losses import by_targets
from seqjax.training.progress import Console
from seqjax.training.step import TrainState, make_train_step
from seqjax.training.trainer import Trainer

Rows = list[dict[str, Any]]

ADAMW = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
VOCAB = 65  # characters of tiny Shakespeare


def gpt2_shaped(args: argparse.Namespace, max_length: int) -> tuple[Any, Any]:
    """A float32 model of GPT-2's architecture, and random variables for it."""
    sizes = {"vocab_size": VOCAB, "embed_dim": args.width, "num_layers": args.layers, "num_heads": args.heads}
    options = {"position": "learned", "max_length": max_length, "qkv_bias": True, "out_bias": True, "unroll": 0}
    model = seqjax.build({"name": "transformer", **sizes, **options})
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def compared(timings: dict[str, Timing], baseline: str, per_second: float = 1.0) -> Rows:
    """One row per function: seconds, rate, and speed relative to the baseline's."""
    return [
        {
            "function": name,
            "median_s": timing.median,
            "quartiles_s": " to ".join(f"{q:.4g}" for q in timing.quartiles),
            "per_s": per_second / timing.median,
            "speedup": timing.speedup(timings[baseline]),
            "speedup_quartiles": " to ".join(f"{q:.3g}" for q in timing.speedup_quartiles(timings[baseline])),
        }
        for name, timing in timings.items()
    ]


def train_step(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Steps of AdamW on a GPT-2-shaped model, against transformers' GPT2LMHeadModel with the same weights."""
    # On a machine with other work, threads of OpenMP that spin while they wait cost PyTorch up to a hundredfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    tokens = np.random.default_rng(0).integers(VOCAB, size=(args.batch, args.length + 1))
    batch = {"inputs": jnp.asarray(tokens[:, :-1], jnp.int32), "targets": jnp.asarray(tokens[:, 1:], jnp.int32)}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(*gpt2_shaped(args, args.length), folder, config={"bos_token_id": 0, "eos_token_id": 0})
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).train()
        ours = {
            "seqjax, layers unrolled": seqjax.load_pretrained(folder, unroll=0),
            "seqjax, layers scanned": seqjax.load_pretrained(folder, unroll=1),
        }
    functions = {"transformers": _torch_step(theirs, torch.tensor(tokens))}
    functions |= {name: _jax_step(*model, batch) for name, model in ours.items()}
    logits = jax.jit(ours["seqjax, layers unrolled"][0].apply)(ours["seqjax, layers unrolled"][1], batch["inputs"])[0]
    difference = np.abs(np.asarray(logits) - theirs(torch.tensor(tokens[:, :-1])).logits.detach().numpy()).max()
    first = {name: float(function()) for name, function in functions.items()}  # compiles, and makes the first update
    timings = time_side_by_side(functions, args.rounds)
    last = {name: float(function()) for name, function in functions.items()}
    checks = {"wait_policy": os.environ["OMP_WAIT_POLICY"], "max_abs_logit_difference": float(difference)}
    checks |= {"first_loss": first, f"loss_{args.rounds + 3}": last}
    return compared(timings, "transformers"), checks


def _torch_step(model: Any, tokens: Any) -> Callable[[], Any]:
    import torch

    options = {"lr": ADAMW["learning_rate"], "betas": (ADAMW["b1"], ADAMW["b2"]), "eps": ADAMW["eps"]}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=ADAMW["weight_decay"], fused=True, **options)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)

    def step() -> Any:
        loss = torch.nn.functional.cross_entropy(model(inputs, use_cache=False).logits.flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _jax_step(model: Any, variables: Any, batch: dict[str, jax.Array]) -> Callable[[], Any]:
    optimizer = optax.adamw(**ADAMW)
    update = make_train_step(model, optimizer, by_targets, learning_rate=lambda step: ADAMW["learning_rate"])
    jitted = jax.jit(update, donate_argnums=0)
    params = variables["params"]
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), variables={})
    state = jax.tree.map(jnp.copy, state)  # donated, step by step, so it must not be what anyone else holds

    def step() -> jax.Array:
        nonlocal state
        state, metrics = jitted(state, batch)
        total, count = metrics["loss"]
        return jax.block_until_ready(total / count)

    return step


def loop_overhead(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """What the training loop adds to a step: its time per step when the step itself takes none, beside the bare step's."""
    config = seqjax.experiment_config(
        model={"name": "transformer", "embed_dim": args.width, "num_layers": args.layers, "num_heads": args.heads, "unroll": 0},
        data={"name": "python_source", "batch_size": args.batch, "sequence_length": args.length},
        training={"num_steps": args.steps, "eval_every": 0, "checkpoint_every": 0, "plot": False},
    )
    trainer = Trainer(config)
    with use_mesh(trainer.mesh):
        state, batch = trainer.init(), trainer.place(trainer.task.batch(0))
        state, metrics = jax.block_until_ready(trainer.step(state, batch))
        bare = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(trainer.step(state, batch))
            bare.append(time.perf_counter() - start)
    called = []

    def no_step(self: Trainer, state: Any, batch: Any) -> Any:
        called.append(time.perf_counter())
        return state, metrics

    # The evaluation that ends a run comes after the last call, so it is not in the figures.
    with (
        tempfile.TemporaryDirectory() as workdir,
        mock.patch.object(Trainer, "step", no_step),
        mock.patch.object(Trainer, "evaluate", lambda *_: {"loss": 0.0}),
        mock.patch.object(Console, "line", lambda *_: None),
    ):
        train(config, workdir)
    timings = {"bare step": Timing(tuple(bare)), "loop without a step": Timing(tuple(np.diff(called)))}
    rows = [
        {"what": name, "median_s": t.median, "quartiles_s": " to ".join(f"{q:.4g}" for q in t.quartiles)}
        for name, t in timings.items()
    ]
    mean = (called[-1] - called[0]) / (len(called) - 1)
    return rows, {"overhead": mean / timings["bare step"].median}


def generate(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Greedy decoding from a carried state, against recomputing the prefix for every token."""
    total = args.prompt + args.new_tokens
    model, variables = gpt2_shaped(args, total)
    prompts = jax.random.randint(jax.random.key(1), (args.batch, args.prompt), 0, VOCAB, jnp.int32)
    buckets = range(args.prompt + args.bucket, total + args.bucket, args.bucket)
    functions = {
        f"recomputed, padded to {args.bucket}s": lambda: _recompute(
            model, variables, prompts, [min(stop, total) for stop in buckets]
        ),
        "carried state": lambda: seqjax.generate(model, variables, prompts, args.new_tokens),
    }
    outputs = {name: np.asarray(function()) for name, function in functions.items()}
    timings = time_side_by_side(functions, args.rounds, warmup=0)
    same = {name: float((output == outputs["carried state"]).mean()) for name, output in outputs.items()}
    return compared(timings, next(iter(functions)), args.batch * args.new_tokens), {"share_of_equal_tokens": same}


def _recompute(model: Any, variables: Any, prompts: jax.Array, stops: list[int]) -> jax.Array:
    """Greedy tokens after the prompts; tokens before each of `stops` see a prefix padded to that length."""
    length = prompts.shape[1]
    tokens = jnp.pad(prompts, [(0, 0), (0, stops[-1] - length)])
    for start, stop in zip([length, *stops], stops):
        tokens = _extend(model, variables, tokens, start, stop)
    return tokens[:, length:]


@functools.partial(jax.jit, static_argnames=("model", "stop"))
def _extend(model: Any, variables: Any, tokens: jax.Array, start: int, stop: int) -> jax.Array:
    def add(i: jax.Array, tokens: jax.Array) -> jax.Array:
        logits, _ = model.apply(variables, tokens[:, :stop])
        return tokens.at[:, i].set(jnp.argmax(logits[:, i - 1], axis=-1))

    return jax.lax.fori_loop(start, stop, add, tokens)


def attention(args: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Causal attention, against `jax.nn.dot_product_attention`: forward, and forward with backward."""
    rows, differences = [], {}
    for shape in args.shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, cotangent = (jax.random.normal(key, shape) for key in keys)
        competitors = {
            "jax.nn.dot_product_attention": functools.partial(
                jax.nn.dot_product_attention, is_causal=True, implementation="xla"
            ),
            "seqjax.ops.flash_attention": functools.partial(flash_attention, causal=True, implementation="xla"),
        }
        for kind, wrap in {"forward": _forward, "forward+backward": _forward_backward}.items():
            jitted = {name: jax.jit(wrap(function, cotangent)) for name, function in competitors.items()}
            functions = {name: functools.partial(function, q, k, v) for name, function in jitted.items()}
            ours, theirs = (jax.tree.leaves(function()) for function in functions.values())
            differences[f"{kind} {shape}"] = max(float(jnp.abs(a - b).max()) for a, b in zip(ours, theirs))
            timings = time_side_by_side(functions, args.rounds)
            label = {"shape": "x".join(map(str, shape)), "pass": kind}
            rows += [label | row for row in compared(timings, "jax.nn.dot_product_attention")]
    return rows, {"max_abs_difference": differences}


def _forward(function: Callable, cotangent: jax.Array) -> Callable:
    return function


def _forward_backward(function: Callable, cotangent: jax.Array) -> Callable:
    def both(*inputs: jax.Array) -> Any:
        output, pull = jax.vjp(function, *inputs)
        return output, pull(cotangent)

    return both


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
    shapes = [(4, 512, 4, 64), (1, 4096, 4, 64)]
    command(attention, 20).add_argument("--shapes", type=_shape, nargs="+", default=shapes, help="such as 4x512x4x64")
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
