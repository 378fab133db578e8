"""A run as its checkpoints hold it: what is saved, and how it comes back to train, evaluate or sample."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxpo.parallel import shardings
from jaxpo.policy.transformer import Params
from jaxpo.registry import unknown
from jaxpo.tasks.tokenizers import from_json
from jaxpo.training.checkpoint import Checkpoints, finished_steps, restore_params
from jaxpo.training.config import default
from jaxpo.training.protocols import Run, advance
from jaxpo.training.workspace import Workspace, prepare_process, setup

MODEL = "model"  # folder of a run with the config.json of the pretrained model that it started from


def checkpoint_of(run: Run, seed: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The arrays and the position of a run. Its random state is the seed: every key is a function of it and the
    iteration, every epoch's order of (seed, epoch)."""
    state = run.state
    arrays = dict(
        params=state.params, opt_state=state.opt_state, objective=state.objective, slots=run.slots, tables=run.tables
    )
    return arrays, dict(seed=seed, iteration=run.iteration, position=run.position)


def restore(checkpoints: Checkpoints, run: Run, seed: int) -> Run:
    """The latest checkpoint, with the shapes, dtypes and sharding of ``run``.

    Raises:
      ValueError: the checkpoint is of another shape (the leaf is named).
    """
    arrays, position = checkpoints.restore(checkpoint_of(run, seed)[0])
    position.pop("seed")
    state = run.state.replace(params=arrays["params"], opt_state=arrays["opt_state"], objective=arrays["objective"])
    return advance(run, state=state, slots=arrays["slots"], tables=arrays["tables"], **position)


def load_params(workspace: Workspace, directory: str, step: int | None = None) -> Params:
    """Parameters of a run directory's checkpoint (the last one), on this mesh."""
    params, _ = restore_params(f"{directory}/checkpoints", step)
    expected = jax.eval_shape(workspace.init_params, jax.random.key(0))
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, expected):
        raise ValueError(f"{directory} holds parameters of another shape than config.policy and the tokenizer ask for")
    return jax.device_put(params, shardings(params, workspace.mesh))


def open_finished(workdir: str, step: int | None = None, **changes: Any) -> tuple[Workspace, Params, int]:
    """A run directory to evaluate or sample from: its workspace, the parameters of checkpoint ``step`` (the last
    one), and that step.

    Args:
      changes: config fields by path ("evaluation.prompts": 100) that differ from the run's.

    Raises:
      ValueError: no run directory, or no such checkpoint in it.
    """
    folder = Path(workdir)
    if not (folder / "config.json").is_file():
        siblings = [str(p.parent) for p in folder.parent.glob("*/config.json")]
        raise ValueError(unknown("run directory", str(folder), siblings))
    config = default()
    with config.unlocked():
        config.update(json.loads((folder / "config.json").read_text()))
        # Nothing is trained here, so batches need not divide as they did; rows are spread over the devices there are.
        config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
        config.rollout.prompts += -config.rollout.prompts % len(jax.devices())
        config.training.update(minibatches=1, microbatches=1)
        config.warm_start.steps = 0
        if config.policy.name == "pretrained" and not config.lora.rank:  # what it started from may be gone
            config.policy.path = str(folder / MODEL)
        for path, value in changes.items():
            config.update_from_flattened_dict({path: value})
    prepare_process(config.compilation_cache)
    tokenizer = from_json(json.loads((folder / "tokenizer.json").read_text()))
    steps = finished_steps(f"{workdir}/checkpoints")
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"{workdir} has no checkpoint{'' if step is None else f' {step}'}; it has: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    workspace = setup(config, tokenizer=tokenizer)
    step = max(steps) if step is None else step
    return workspace, load_params(workspace, workdir, step), step


def find_checkpoint(workdir: str) -> int | None:
    """The last finished checkpoint of a run directory."""
    return max(finished_steps(f"{workdir}/checkpoints"), default=None)
