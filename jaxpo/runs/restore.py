"""A run as its checkpoints hold it: what is saved, and how it comes back to train, evaluate or sample."""

import shutil
from pathlib import Path
from typing import Any

import jax
from jax import Array
from ml_collections import ConfigDict

from jaxpo.config.fields import default
from jaxpo.files import read_json
from jaxpo.learning import references
from jaxpo.learning.programs import optimizer_of
from jaxpo.learning.references import held
from jaxpo.learning.state import Run, TrainState
from jaxpo.parallel import replicated, shardings
from jaxpo.policy import heads
from jaxpo.policy.hf import load, open_source
from jaxpo.policy.transformer import Params
from jaxpo.registry import unknown
from jaxpo.runs.workspace import Workspace, prepare_process, setup
from jaxpo.storage import checkpoint
from jaxpo.storage.checkpoint import finished_steps, restore_params, saved_paths
from jaxpo.text.tokenizers import from_json

MODEL = "model"  # folder of a run with the config.json of the pretrained model that it started from


def checkpoints_of(workdir: str, config: ConfigDict | None = None) -> str:
    """Where the checkpoints of a run directory are, by its config (None = the one that it holds)."""
    held = Path(workdir) / "config.json"
    if config is not None:
        directory = config.checkpoint.directory
    else:
        directory = read_json(held).get("checkpoint", {}).get("directory") if held.is_file() else None
    return directory or f"{workdir}/checkpoints"


def checkpoint_of(run: Run, seed: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The arrays and the position of a run. Its random state is the seed: every key is a function of it and the
    iteration, every epoch's order of (seed, epoch)."""
    state = run.state
    trained = dict(params=state.params, opt_state=state.opt_state, objective=state.objective)
    return dict(**trained, references=run.references, tables=run.tables), dict(
        seed=seed, iteration=run.iteration, position=run.position
    )


def template(workspace: Workspace, tables: dict[str, Any]) -> dict[str, Any]:
    """The shapes, dtypes and shardings of `checkpoint_of`, without any array."""

    def whole(key: jax.Array) -> dict[str, Any]:
        params = workspace.init_params(key)
        opt_state = optimizer_of(workspace.config, workspace.objective).init(params)
        frozen = held_of(workspace, params, opt_state)
        return dict(params=params, opt_state=opt_state, objective=workspace.objective.init(), references=frozen)

    shapes = jax.eval_shape(whole, jax.random.key(0))
    where = {name: shardings(tree, workspace.mesh) for name, tree in shapes.items()}
    frozen = shapes["references"].items()
    where["references"] = {name: workspace.reference_shardings(tree) for name, tree in frozen}
    where["objective"] = jax.tree.map(lambda _: replicated(workspace.mesh), shapes["objective"])
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    return {**placed, "tables": tables}


def restore(workspace: Workspace, tables: dict[str, Any], directory: str) -> tuple[Run, checkpoint.Restored]:
    """The latest whole checkpoint in ``directory``, on this run's mesh.

    Raises:
      FileNotFoundError: none is whole.
      ValueError: it is of another model, objective, protocol or seed (the leaf is named).
    """
    found = checkpoint.restore(directory, template(workspace, tables))
    tree, position = found.tree, dict(found.position)
    if (seed := position.pop("seed")) != workspace.config.seed:
        raise ValueError(f"config.seed is {workspace.config.seed}, but the run that is to be resumed has seed {seed}")
    state = TrainState(tree["params"], tree["opt_state"], tree["objective"])
    return Run(state, tree["references"], tree["tables"], **position), found


def check_room(directory: str, template: Any, keep: int) -> None:
    """That there is room for the checkpoints of a run: ``keep`` and the one under way, as large as ``template``.

    Raises:
      OSError: there is not (found out for local directories only).
    """
    if "://" in str(directory):
        return
    folder = Path(directory).absolute()
    leaves = [leaf for leaf in jax.tree.leaves(template) if hasattr(leaf, "dtype")]
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # room that will be free again
    free = shutil.disk_usage(next(part for part in (folder, *folder.parents) if part.exists())).free
    if (keep + 1) * one > free + held:
        raise OSError(
            f"{directory}: a checkpoint takes {one / 1e9:.3g} GB and {keep} of them stay while the next one is "
            f"written, but {free / 1e9:.3g} GB are free: make room, lower config.checkpoint.keep, or set "
            "config.checkpoint.directory"
        )


def load_params(workspace: Workspace, workdir: str, step: int | None = None) -> tuple[Params, int]:
    """Parameters of a run directory's checkpoint (the last whole one), on this mesh, and its step. Heads that this run
    has and that one had not are fresh; those that only that one had are left behind.

    Raises:
      ValueError: they are those of another model.
    """
    expected = jax.eval_shape(workspace.init_params, jax.random.key(0))
    directory, own = checkpoints_of(workdir), expected.get("heads", {})
    there = {path[2] for path in saved_paths(directory, step) if path[:2] == ("params", "heads")}
    fresh = {name: head for name, head in own.items() if name not in there}
    wanted = {**expected, "heads": {name: head for name, head in own.items() if name in there}}
    wanted = wanted if wanted["heads"] else {name: x for name, x in wanted.items() if name != "heads"}
    options = dict(
        shardings=shardings(wanted, workspace.mesh), without=[("params", "heads", n) for n in there - {*own}]
    )
    params, position = restore_params(directory, step, **options)
    if jax.tree.map(lambda x: x.shape, params) != jax.tree.map(lambda x: x.shape, wanted):
        raise ValueError(f"{workdir} holds parameters of another shape than config.policy and the tokenizer ask for")
    if fresh:
        shapes = {name: head["bias"].shape for name, head in fresh.items()}
        made = heads.init(workspace.model.config.width, shapes, jax.random.key(workspace.config.seed))["heads"]
        params = {**params, "heads": {**params.get("heads", {}), **workspace.put_whole(made)}}
    return params, position["iteration"]


def config_of(folder: Path) -> ConfigDict:
    """The config that a run directory holds. A pretrained policy has its shape from the directory: what the run started
    from may be gone."""
    config = default()
    with config.unlocked():
        config.update(read_json(folder / "config.json"))
        if config.policy.name == "pretrained" and not config.lora.rank:
            config.policy.path = str(folder / MODEL)
    return config


def open_finished(
    workdir: str, step: int | None = None, *, examples: bool = True, **changes: Any
) -> tuple[Workspace, Params, int]:
    """A run directory to evaluate or sample from: its workspace, the parameters of checkpoint ``step`` (the last
    one), and that step.

    Args:
      examples: whether its task and data are read, as of `jaxpo.runs.workspace.setup`.
      changes: config fields by path ("evaluation.prompts": 100) that differ from the run's.

    Raises:
      ValueError: no run directory, or no such checkpoint in it.
    """
    folder = Path(workdir)
    if not (folder / "config.json").is_file():
        siblings = [str(p.parent) for p in folder.parent.glob("*/config.json")]
        raise ValueError(unknown("run directory", str(folder), siblings))
    config = config_of(folder)
    with config.unlocked():
        # Nothing is trained here, so batches need not divide as they did; rows are spread over the devices there are.
        config.mesh, config.rollout.mesh = default().mesh, default().rollout.mesh
        config.rollout.prompts += -config.rollout.prompts % len(jax.devices())
        config.training.update(minibatches=1, microbatches=1, packing=False)
        config.warm_start.steps = 0
        for path, value in changes.items():
            config.update_from_flattened_dict({path: value})
    prepare_process(config.compilation_cache)
    tokenizer = from_json(read_json(folder / "tokenizer.json"))
    steps = finished_steps(checkpoints_of(workdir))
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"{workdir} has no checkpoint{'' if step is None else f' {step}'}; it has: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    workspace = setup(config, tokenizer=tokenizer, examples=examples)
    return workspace, *load_params(workspace, workdir, step)


def find_checkpoint(workdir: str) -> int | None:
    """The last finished checkpoint of a run directory."""
    return max(finished_steps(checkpoints_of(workdir)), default=None)


def held_of(workspace: Workspace, params: Params, opt_state: Any) -> dict[str, Any]:
    """The references that are made of the policy at the start of a run (of arrays or of shapes)."""
    resolved = workspace.resolved
    return held(resolved.references, resolved.protocol.facts.references, params, opt_state)


def first_references(workspace: Workspace, state: TrainState) -> dict[str, Any]:
    """The references at the start of a run. Copies of the policy share one copy; the soup is made of two other runs."""
    keeps = workspace.protocol.facts.references
    if not workspace.resolved.references and not keeps:
        return {}
    opt_state = references.copied(state.opt_state) if "center" in keeps else None
    frozen = held_of(workspace, workspace.reference(state.params), opt_state)
    if "soup" in frozen:
        soup = workspace.config.soup
        first, second = (load_params(workspace, path)[0] for path in soup.of)
        frozen["soup"] = references.blended(first, second, 1 - soup.alpha)
    return frozen


def first_params(workspace: Workspace, key: Array) -> Params:
    """Parameters of another run, pretrained ones, or random ones."""
    config = workspace.config
    if config.init_from:
        return load_params(workspace, config.init_from)[0]
    if config.policy.name == "pretrained" and not config.lora.rank:
        loaded = load(open_source(config.policy.path), workspace.model.config, workspace.mesh)
        fresh = heads.init(workspace.model.config.width, workspace.resolved.heads, key)
        return {**loaded, **workspace.put_whole(fresh)}
    return workspace.init_params(key)
