"""Supervised training on a task's own demonstrations: objective `sft`, the same optimizer step as everything else."""

import time
from collections.abc import Callable

import jax
import numpy as np

from jaxpo.batch import Demonstrations, Rollouts
from jaxpo.learning.optimizers import make_optimizer
from jaxpo.learning.programs import init_state, make_step, policy_of
from jaxpo.objectives import make
from jaxpo.parallel import replicated
from jaxpo.parallel.distributed import place
from jaxpo.policy.transformer import Params
from jaxpo.runs.workspace import Workspace
from jaxpo.storage.rundir import Progress, RunDirectory
from jaxpo.tasks import imperfect


def demonstrations(workspace: Workspace, indices: np.ndarray, drop_last: float = 0.0) -> Rollouts:
    """Demonstrations of training examples: their prompts, and answers that end with the first EOS id; of a share
    ``drop_last`` of them the last character is missing.

    Raises:
      ValueError: the task has no answers, or one is longer than ``sampling.max_new_tokens``.
    """
    config, prompts, tokenizer = workspace.config, workspace.train, workspace.tokenizer
    if workspace.task.demonstrate is None:
        raise ValueError(f"config.task.name: {workspace.task.name} has no answers to demonstrate")
    demonstrate = workspace.task.demonstrate
    if drop_last:
        demonstrate = imperfect(demonstrate, drop_last, config.seed)
    answers = [[*tokenizer.encode(demonstrate(prompts.examples[i])), tokenizer.eos_ids[0]] for i in indices]
    longest = max(map(len, answers))
    if longest > config.sampling.max_new_tokens:
        raise ValueError(
            f"config.sampling.max_new_tokens {config.sampling.max_new_tokens} is too short for demonstrations "
            f"of {longest} tokens"
        )
    questions = [prompts.tokens[i, prompts.tokens.shape[1] - prompts.length[i] :].tolist() for i in indices]
    return Demonstrations(
        questions,
        answers,
        prompt_width=prompts.tokens.shape[1],
        width=config.sampling.max_new_tokens,
        pad_id=tokenizer.pad_id,
    )


def warm_start(
    workspace: Workspace, params: Params, log: RunDirectory, *, report: Callable[[str], None] = print
) -> Params:
    """Train ``params`` by ``config.warm_start`` and return them; they are donated.

    Logged as ``sft/*`` under steps up to 0: reinforcement learning goes on from there.
    """
    config, mesh, objective = workspace.config.warm_start, workspace.mesh, make("sft")
    optimizer = make_optimizer(config.optimizer.to_dict(), config.steps)
    apply = policy_of(workspace.model, workspace.config, objective, mesh=workspace.mesh)
    slices = config.microbatches
    options = dict(base=workspace.base, microbatches=slices, name="supervised update", report=report)
    step = make_step(workspace.config, objective, apply, optimizer, mesh, **options)
    state = init_state(params, optimizer, objective, mesh)
    data, memory = objective.prepare(
        demonstrations(workspace, np.arange(len(workspace.train)), config.drop_last), state.objective
    )
    data, state = workspace.put_whole(data), state.replace(objective=place(memory, replicated(mesh)))
    rng, tokens, start = np.random.default_rng((workspace.config.seed, 1)), 0.0, time.perf_counter()
    with Progress(
        config.steps, metrics={"nll": "sft/loss", "tok/s": "sft/tokens_per_s"}, every=max(config.steps // 5, 1)
    ) as progress:
        for i in range(1, config.steps + 1):
            rows = rng.choice(len(workspace.train), config.batch, replace=len(workspace.train) < config.batch).astype(
                np.int32
            )
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
