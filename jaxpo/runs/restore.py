"""A run as its checkpoints hold it: what is saved, and how it comes back to train, evaluate or sample."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax import Array
from ml_collections import ConfigDict

from jaxpo.config.fields import default
from jaxpo.learning import references
from jaxpo.learning.programs import optimizer_of
from jaxpo.learning.references import held
from jaxpo.learning.state import Run, TrainState
from jaxpo.learning.trainable import policy_alone
from jaxpo.parallel import replicated, shardings
from jaxpo.policy import heads
from jaxpo.policy.adapters import load_adapter
from jaxpo.policy.hf import load, open_source
from jaxpo.policy.stats import CRITIC
from jaxpo.policy.transformer import Params
from jaxpo.registry import names, unknown
from jaxpo.runs import trust
from jaxpo.runs.finite import check_finite
from jaxpo.runs.kept import held_config, tokenizer_of, use_kept
from jaxpo.runs.workspace import Workspace, prepare_process, setup
from jaxpo.storage import checkpoint
from jaxpo.storage.checkpoint import finished_steps, restore_params, saved_origin, saved_paths
from jaxpo.storage.paths import expanded, local
from jaxpo.storage.rundir import METRICS, read_metrics

NONFINITE = "take an earlier checkpoint, or open it nevertheless with --nonfinite where a program has that flag"


def checkpoints_of(workdir: str, config: ConfigDict | None = None) -> str:
    """Where the checkpoints of a run directory are, by its config (None = the one that it holds)."""
    if config is not None:
        directory = config.checkpoint.directory
    else:
        directory = (held_config(expanded(workdir)) or {}).get("checkpoint", {}).get("directory")
    return expanded(directory or f"{workdir}/checkpoints")


def begins_again(workdir: str, config: ConfigDict) -> bool:
    """Whether a folder holds a run that has not finished an iteration, though it was to: no more than checkpoint 0,
    which is a function of its config and seed. Such a run may be begun again in its folder."""
    held = Path(workdir) / "config.json"
    if not held.is_file() or checkpoints_of(workdir) != checkpoints_of(workdir, config):
        return False
    try:
        to_do = (held_config(workdir) or {}).get("steps", 0)
    except (ValueError, AttributeError):
        return False
    written = (Path(workdir) / METRICS).is_file() and max(read_metrics(workdir, lenient=True)["step"], default=0) > 0
    return bool(to_do) and not written and set(checkpoint.all_steps(checkpoints_of(workdir))) <= {0}


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


def load_params(
    workspace: Workspace, workdir: str, step: int | None = None, *, nonfinite: bool = False
) -> tuple[Params, int]:
    """Parameters of a run directory's checkpoint (the last whole one), on this mesh, and its step. Heads that this run
    has and that one had not are fresh; those that only that one had are left behind, as is a critic of its own.

    Args:
      nonfinite: whether they may hold NaN or infinity.

    Raises:
      ValueError: they are those of another model, or adapters of other frozen weights, or are not finite.
    """
    expected = policy_alone(jax.eval_shape(workspace.init_params, jax.random.key(0)))
    directory, own = checkpoints_of(workdir), expected.get("heads", {})
    frozen = workspace.origin.get("base")
    if frozen and saved_origin(directory, step).get("base", frozen) != frozen:
        raise ValueError(
            f"config.policy.path {workspace.config.policy.path!r} does not hold the frozen weights beside which "
            f"{workdir} trained its adapters"
        )
    there = {path[2] for path in saved_paths(directory, step) if path[:2] == ("params", "heads")}
    fresh = {name: head for name, head in own.items() if name not in there}
    wanted = {**expected, "heads": {name: head for name, head in own.items() if name in there}}
    wanted = wanted if wanted["heads"] else {name: x for name, x in wanted.items() if name != "heads"}
    behind = [("params", CRITIC), *(("params", "heads", name) for name in there - {*own})]
    options = dict(shardings=shardings(wanted, workspace.mesh), without=behind)
    params, position = restore_params(directory, step, **options)
    if jax.tree.map(lambda x: x.shape, params) != jax.tree.map(lambda x: x.shape, wanted):
        raise ValueError(f"{workdir} holds parameters of another shape than config.policy and the tokenizer ask for")
    if not nonfinite:
        check_finite(params, f"{workdir}, checkpoint {position['iteration']}", NONFINITE)
    if fresh:
        shapes = {name: head["bias"].shape for name, head in fresh.items()}
        made = heads.init(workspace.model.config.width, shapes, jax.random.key(workspace.config.seed))["heads"]
        params = {**params, "heads": {**params.get("heads", {}), **workspace.put_whole(made)}}
    return params, position["iteration"]


def config_of(folder: Path, *, examples: bool = False) -> ConfigDict:
    """The config that a run directory holds, with the copies that it keeps: what the run started from may be gone.
    examples: whether its data will be read.

    Raises:
      ValueError: the file is no config; or as of `use_kept`."""
    config = default()
    with config.unlocked():
        try:
            config.update(held_config(folder))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            what = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{folder / 'config.json'} is not the config of a run: {what}") from None
    use_kept(config, folder, finished=True, examples=examples)
    return config


def alone(config: ConfigDict) -> ConfigDict:
    """The config of a policy that only writes or is exported: names that it does not use give way to known ones."""
    plain = default()
    with config.unlocked():
        if config.task.name is not None and config.task.name not in names("task"):
            config.task = plain.task
        config.judge, config.trace = plain.judge, plain.trace
        if config.objective.name not in names():
            for field in ("objective", "protocol", "data", "optimizers", "references", "soup", "training"):
                config[field] = plain[field]
        if config.policy.name in names("policy"):
            config.imports = ()
    return config


def check_writes(workdir: str, step: int | None) -> None:
    """``ValueError`` if a run whose objective is not known has the heads of a reward model."""
    paths = saved_paths(checkpoints_of(workdir), step) if find_checkpoint(workdir) is not None else ()
    heads = {path[2] for path in paths if path[:2] == ("params", "heads")} & {"score", "embed"}
    if heads:
        raise ValueError(f"{workdir} holds a reward model (head {', '.join(sorted(heads))}), which writes no answers")


def open_finished(
    workdir: str,
    step: int | None = None,
    *,
    examples: bool = True,
    nonfinite: bool = False,
    writes_only: bool = False,
    **changes: Any,
) -> tuple[Workspace, Params, int]:
    """A run directory to evaluate or sample from: its workspace, the parameters of checkpoint ``step`` (the last
    one), and that step.

    Args:
      examples: whether its task and data are read, as of `jaxpo.runs.workspace.setup`.
      nonfinite: whether the parameters may hold NaN or infinity.
      writes_only: the run's task, data, objective and judge are not used (`alone`), so they need not be known.
      changes: config fields by path ("evaluation.prompts": 100) that differ from the run's.

    Raises:
      ValueError: no run directory, no such checkpoint in it, parameters that are not finite, or it names code and came
        from elsewhere.
    """
    folder = local(workdir, "run directory")
    workdir = str(folder)
    if not (folder / "config.json").is_file():
        siblings = [str(p.parent) for p in folder.parent.glob("*/config.json")]
        raise ValueError(unknown("run directory", str(folder), siblings))
    config = config_of(folder, examples=examples)
    if writes_only:
        known = config.objective.name
        config = alone(config)
        if config.objective.name != known:
            check_writes(workdir, step)
    if config.imports or not writes_only:
        trust.check(folder, config)
    with config.unlocked():
        # Nothing is trained here, so batches need not divide as they did; rows are spread over the devices there are.
        config.mesh, config.rollout.mesh = default().mesh, default().rollout.mesh
        config.rollout.prompts += -config.rollout.prompts % len(jax.devices())
        config.training.update(minibatches=1, microbatches=1, packing=False)
        config.warm_start.steps = 0
        for path, value in changes.items():
            config.update_from_flattened_dict({path: value})
    prepare_process(None)  # not the run's own cache of compiled programs: that is code
    tokenizer = tokenizer_of(folder)
    steps = finished_steps(checkpoints_of(workdir))
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"{workdir} has no checkpoint{'' if step is None else f' {step}'}; it has: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    was = saved_origin(checkpoints_of(workdir), step).get("data")

    def tell(now: Mapping[str, Any]) -> None:
        if was and was != now:
            print(f"WARNING: the data are not those that {workdir} was trained on: its test examples may be others")

    workspace = setup(config, tokenizer=tokenizer, examples=examples, check_data=tell)
    return workspace, *load_params(workspace, workdir, step, nonfinite=nonfinite)


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
    """The parameters that training starts from: the policy's, and those of a critic of its own."""
    params = first_policy(workspace, key)
    return params if workspace.critic is None else {**params, CRITIC: workspace.critic.load()}


def first_policy(workspace: Workspace, key: Array) -> Params:
    """Parameters of another run, pretrained ones, an adapter of peft, or random ones."""
    config = workspace.config
    if config.init_from:
        return load_params(workspace, config.init_from)[0]
    if config.policy.name == "pretrained" and not config.lora.rank:
        loaded = load(open_source(config.policy.path), workspace.model.config, workspace.mesh)
        check_finite(loaded, f"config.policy.path {config.policy.path}")
        fresh = heads.init(workspace.model.config.width, workspace.resolved.heads, key)
        return {**loaded, **workspace.put_whole(fresh)}
    params = policy_alone(workspace.init_params(key))
    if not config.lora.path:
        return params
    return {**params, **workspace.put_whole(load_adapter(config.lora.path, workspace.model.config))}
