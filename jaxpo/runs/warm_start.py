"""Supervised training on a task's own demonstrations: the objective `sft` and the ordinary optimizer step."""

import time
from collections.abc import Callable

import jax
import numpy as np

from jaxpo.learning.optimizers import make_optimizer
from jaxpo.learning.programs import Computation, init_state, make_step
from jaxpo.objectives import make
from jaxpo.parallel import replicated
from jaxpo.parallel.distributed import place
from jaxpo.policy.transformer import Params
from jaxpo.runs.workspace import Workspace
from jaxpo.storage.rundir import Progress, RunDirectory


def warm_start(
    workspace: Workspace, params: Params, log: RunDirectory, *, report: Callable[[str], None] = print
) -> Params:
    """Train ``params`` as ``config.warm_start`` says, and return them; the given ones are donated.

    Metrics are logged as ``sft/*`` at steps up to 0, where reinforcement learning starts.
    """
    config, mesh, objective = workspace.config.warm_start, workspace.mesh, make("sft")
    optimizer = make_optimizer(config.optimizer.to_dict(), config.steps)
    rows = config.batch // config.microbatches
    pad_id = workspace.tokenizer.pad_id
    of = Computation(workspace.config, mesh, workspace.model, objective, pad_id, rows, workspace.base)
    step = make_step(of, optimizer, microbatches=config.microbatches, name="supervised update", report=report)
    state = init_state(params, optimizer, objective, mesh)
    size = len(workspace.questions.train)
    data = workspace.questions.demonstrations(np.arange(size), config.drop_last, workspace.config.seed)
    data, memory = objective.prepare(data, state.objective)
    data, state = workspace.put_whole(data), state.replace(objective=place(memory, replicated(mesh)))
    rng, tokens, start = np.random.default_rng((workspace.config.seed, 1)), 0.0, time.perf_counter()
    with Progress(
        config.steps, metrics={"nll": "sft/loss", "tok/s": "sft/tokens_per_s"}, every=max(config.steps // 5, 1)
    ) as progress:
        for i in range(1, config.steps + 1):
            rows = rng.choice(size, config.batch, replace=size < config.batch).astype(np.int32)
            state, out = step(state, data, rows)
            if i % 10 == 0 or i == config.steps:
                out = jax.device_get(out)
                if out["step/nonfinite"]:
                    raise FloatingPointError(
                        f"supervised step {i}: the loss or its gradient is not finite; lower "
                        "config.warm_start.optimizer.learning_rate"
                    )
                tokens += float(out["tokens"]) * (i - progress.step)
                metrics = {
                    "sft/loss": float(out["loss"]),
                    "sft/grad_norm": float(out["grad_norm"]),
                    "sft/tokens_per_s": tokens / (time.perf_counter() - start),
                }
                log.write(i - config.steps, metrics)
                progress.update(metrics, i - progress.step)
    return state.params
