"""Supervised training on a task's own demonstrations: objective `sft`, the same optimizer step as everything else."""
import time
from functools import partial

import jax
import numpy as np

from jaxpo.batch import Demonstrations, Rollouts
from jaxpo.objectives import make
from jaxpo.parallel import replicated
from jaxpo.policy import stats
from jaxpo.policy.transformer import Params
from jaxpo.tasks import imperfect
from jaxpo.training.compiled import Compiled
from jaxpo.training.optimizers import make_optimizer
from jaxpo.training.rundir import Progress, RunDirectory
from jaxpo.training.step import optimizer_step
from jaxpo.training.workspace import Workspace


def demonstrations(workspace: Workspace, indices: np.ndarray) -> Rollouts:
    """Demonstrations of training examples: their prompts, and answers that end with the first EOS id.

    Raises:
      ValueError: the task has no answers, or one is longer than ``sampling.max_new_tokens``.
    """
    config, prompts, tokenizer = workspace.config, workspace.train, workspace.tokenizer
    if workspace.task.demonstrate is None:
        raise ValueError(f"config.warm_start.steps: task {workspace.task.name} has no answers to demonstrate")
    demonstrate = workspace.task.demonstrate
    if config.warm_start.drop_last:
        demonstrate = imperfect(demonstrate, config.warm_start.drop_last, config.seed)
    answers = [[*tokenizer.encode(demonstrate(prompts.examples[i])), tokenizer.eos_ids[0]] for i in indices]
    longest = max(map(len, answers))
    if longest > config.sampling.max_new_tokens:
        raise ValueError(f"config.sampling.max_new_tokens {config.sampling.max_new_tokens} is too short for demonstrations of {longest} tokens")
    questions = [prompts.tokens[i, prompts.tokens.shape[1] - prompts.length[i]:].tolist() for i in indices]
    return Demonstrations(questions, answers, prompt_width=prompts.tokens.shape[1], width=config.sampling.max_new_tokens, pad_id=tokenizer.pad_id)


def warm_start(workspace: Workspace, params: Params, log: RunDirectory) -> Params:
    """Train ``params`` by ``config.warm_start`` and return them. Logged as ``sft/*`` under negative steps: reinforcement learning begins at 0."""
    config = workspace.config.warm_start
    objective = make("sft")
    optimizer = make_optimizer(config.optimizer.to_dict(), config.steps)
    apply = stats.policy_of(workspace.model, temperature=workspace.config.policy_temperature)
    step = Compiled("supervised update", partial(optimizer_step, objective, apply, optimizer), donate_argnums=(0, 1, 2))
    data = demonstrations(workspace, np.arange(len(workspace.train)))
    opt_state, state = optimizer.init(params), jax.device_put(objective.init(), replicated(workspace.mesh))
    rng, seen, start = np.random.default_rng((workspace.config.seed, 1)), 0.0, time.perf_counter()
    with Progress(config.steps, metrics={"nll": "sft/loss", "tok/s": "sft/tokens_per_s"}, every=max(config.steps // 5, 1)) as progress:
        step._report = progress.print
        for i in range(config.steps):
            rows = rng.choice(len(workspace.train), config.batch, replace=len(workspace.train) < config.batch)
            batch = workspace.put(jax.tree.map(lambda x, rows=rows: x[rows], data))
            batch, state = objective.prepare(batch, state)
            params, opt_state, state, out = step(params, opt_state, state, batch)
            if i % 10 == 9 or i == config.steps - 1:
                out = jax.device_get(out)
                seen += float(out["tokens"]) * 10
                metrics = {"sft/loss": float(out["loss"]), "sft/grad_norm": float(out["grad_norm"]),
                           "sft/tokens_per_s": seen / (time.perf_counter() - start)}
                log.write(i + 1 - config.steps if i + 1 < config.steps else -0, metrics)
                progress.update(metrics, i + 1 - progress.step)
    return params
