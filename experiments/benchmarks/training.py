"""Steps of training: ours beside PyTorch's, and what the loop adds to them."""

from __future__ import annotations

import argparse
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
from benchmarks.comparison import Rows, compared
from benchmarks.gpt2 import VOCAB, gpt2_shaped
from seqjax.interop.pretrained import save_pretrained
from seqjax.parallel.rules import use_mesh
from seqjax.scaling.timing import Timing, time_side_by_side
from seqjax.training.loop import train
from seqjax.training.losses import by_targets
from seqjax.training.progress import Console
from seqjax.training.step import TrainState, make_train_step
from seqjax.training.trainer import Trainer

ADAMW = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


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
    functions |= {name: train_step_of(*model, batch) for name, model in ours.items()}
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


def train_step_of(model: Any, variables: Any, batch: dict[str, jax.Array]) -> Callable[[], Any]:
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
