"""Models beside the policy, which are no copies of it: found at a path, checked to know the same tokens, and loaded
onto the run's mesh.

Those of ``config.references`` are frozen and not checkpointed: a run that is resumed loads them again. The critic that
``config.critic`` names is trained and checkpointed from there on.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxpo.config.checks import check_mesh
from jaxpo.config.imports import load_imports
from jaxpo.config.resolved import Resolved, made
from jaxpo.files import read_json
from jaxpo.hub import WEIGHTS, model_files
from jaxpo.learning.programs import several
from jaxpo.learning.references import SCORED
from jaxpo.learning.trainable import lora_scale, random_critic, random_params
from jaxpo.parallel import replicated, shardings
from jaxpo.parallel.distributed import place
from jaxpo.policy import heads, hf, lora, transformer
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.stats import CRITIC, Other
from jaxpo.policy.transformer import Params
from jaxpo.registry import names
from jaxpo.runs import trust
from jaxpo.runs.restore import checkpoints_of, config_of, find_checkpoint
from jaxpo.runs.workspace import Critic, Models
from jaxpo.storage.checkpoint import restore_params, saved_paths
from jaxpo.text.tokenizers import PretrainedTokenizer, Tokenizer, first_difference, from_json


class Found(NamedTuple):
    """A model at a path, of which no weights are read yet.

    config: its shape.
    tokenizer: its own; () -> None where its files hold none.
    heads: its heads besides that of the vocabulary.
    load: (mesh, heads) -> its parameters, with those of its heads that are named.
    """

    config: TransformerConfig
    tokenizer: Callable[[], Tokenizer | None]
    heads: frozenset[str]
    load: Callable[[Mesh, tuple[str, ...]], Params]


def load_models(resolved: Resolved, tokenizer: Tokenizer, mesh: Mesh) -> Models:
    """The models that the objective needs beside the policy: frozen ones with their parameters on the mesh, and a
    critic of its own.

    Raises:
      ValueError: a path without a model, a model of other tokens, or one whose sizes the mesh does not divide; the
        message names the field.
    """
    policy, others = resolved.transformer(tokenizer.vocab_size), {}
    for name, found in find_models(resolved, policy, mesh).items():
        field = field_of(resolved, name)
        check_vocabulary(field, found, tokenizer, policy)
        params = loaded(field, found, mesh, heads_read(name))
        others[name] = Other(transformer.build(found.config, several(mesh)), params)
    if (found := find_critic(resolved, policy, mesh)) is None:
        return Models(others, None)
    field = critic_field(resolved)
    check_vocabulary(field, found, tokenizer, policy)
    start = partial(first_critic, field, found, mesh)
    return Models(others, Critic(transformer.build(found.config, several(mesh)), start))


def loaded(field: str, found: Found, mesh: Mesh, heads: tuple[str, ...]) -> Params:
    """The parameters of a model that was found; ``ValueError`` names its field."""
    try:
        return found.load(mesh, heads)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{field}: {error}") from None


def first_critic(field: str, found: Found, mesh: Mesh) -> Params:
    """What a critic of its own starts from: the model with its value head, with its score head in that place (of a
    reward model), or with a value head that gives 0."""
    head = next((name for name in ("value", "score") if name in found.heads), None)
    params = loaded(field, found, mesh, () if head is None else (head,))
    if head is None:
        fresh = heads.init(found.config.width, {"value": ()}, jax.random.key(0))
        params = {**params, **place(fresh, replicated(mesh))}
    else:
        params = {**params, "heads": {"value": params["heads"][head]}}
    trained = jax.eval_shape(partial(random_critic, found.config), jax.random.key(0))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), params, trained)


def heads_read(name: str) -> tuple[str, ...]:
    """The heads of a frozen model that scoring reads."""
    return ("score",) if SCORED[name].gives == "model_score" else ()


def field_of(resolved: Resolved, name: str) -> str:
    """The field of a model and its value, for messages."""
    return f"config.references.{name} {resolved.config.references[name]!r}"


def critic_field(resolved: Resolved) -> str:
    """The field of a critic of its own and its value, for messages."""
    return f"config.critic.path {resolved.config.critic.path!r}"


def find_models(resolved: Resolved, policy: TransformerConfig, mesh: Mesh) -> dict[str, Found]:
    """The frozen models beside the policy by name, without their weights; those in files of others compute in the
    policy's dtype.

    Raises:
      ValueError: as of `load_models`, but for the tokens.
    """
    frozen = replace(policy, param_dtype=policy.dtype, remat="none")
    out = {}
    for name in resolved.models:
        field = field_of(resolved, name)
        found = out[name] = find(field, resolved.config.references[name], frozen, mesh)
        if lacking := [head for head in heads_read(name) if head not in found.heads]:
            raise ValueError(f"{field} has no {lacking[0]} head: it must be a run directory of train_reward")
    return out


def find_critic(resolved: Resolved, policy: TransformerConfig, mesh: Mesh) -> Found | None:
    """The model that a critic of its own starts from, without its weights; None = the critic is a head, or there is
    none. It is trained as the policy is: its dtypes and rematerialization are the policy's.

    Raises:
      ValueError: as of `load_models`, but for the tokens."""
    if resolved.config.critic.path is None:
        return None
    found = find(critic_field(resolved), resolved.config.critic.path, policy, mesh)
    return found._replace(config=replace(found.config, **how_of(policy)))


def find(field: str, path: str, like: TransformerConfig, mesh: Mesh) -> Found:
    """The model at a path; files of others are read as ``like`` computes."""
    try:
        there = model_files(path, WEIGHTS)
        found = None if not there.exists() else of_run(there) if is_run(there) else of_files(there, like)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    if found is None:
        raise ValueError(f"{field} does not exist: it is a model folder, a GGUF file, a run directory or a hub id")
    sizes = dict(mesh.shape) | ({} if found.config.experts else {"expert": 1})
    check_mesh("mesh", sizes, found.config, of=field)
    return found


def is_run(path: Path) -> bool:
    """Whether a path is a run directory of jaxpo rather than the folder of a model.

    Raises:
      ValueError: a run directory without a checkpoint."""
    file = path / "config.json"
    if not file.is_file() or not {"objective", "rollout"} <= read_json(file).keys():
        return False
    if find_checkpoint(str(path)) is None:
        raise ValueError("this run directory has no checkpoint")
    return True


def of_run(path: Path) -> Found:
    """What a run has learned by its last checkpoint; adapters are added to the weights that they belong to."""
    config = config_of(path)
    if config.imports and config.policy.name not in names("policy"):
        trust.check(path, config)
        load_imports(config.imports)
    tokenizer = from_json(read_json(path / "tokenizer.json"))
    shape, directory = made(config.policy, "policy")(tokenizer.vocab_size), checkpoints_of(str(path))
    there = frozenset(p[2] for p in saved_paths(directory) if p[:2] == ("params", "heads"))

    def load(mesh: Mesh, heads: tuple[str, ...]) -> Params:
        model = transformer.build(shape, several(mesh))
        shapes = dict.fromkeys(heads, ())
        wanted = jax.eval_shape(partial(random_params, config, model, shapes), jax.random.key(0))
        behind = [("params", CRITIC), *(("params", "heads", name) for name in there.difference(heads))]
        params, _ = restore_params(directory, shardings=shardings(wanted, mesh), without=behind)
        if not config.lora.rank:
            return params
        base = hf.load(hf.open_source(config.policy.path), shape, mesh)
        return jax.jit(partial(lora.merge, scale=lora_scale(config)))(base, params)

    return Found(shape, lambda: tokenizer, there, load)


def how_of(policy: TransformerConfig) -> dict[str, Any]:
    """How a model computes, whatever its shape."""
    return {name: getattr(policy, name) for name in ("dtype", "param_dtype", "scan_layers", "remat")}


def of_files(path: Path, like: TransformerConfig) -> Found:
    """A pretrained model: a folder or a GGUF file."""
    shape = config_from_hf(hf.read_config(path), **how_of(like))

    def tokenizer() -> Tokenizer | None:
        if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return None
        return PretrainedTokenizer(str(path), chat_template=False)

    return Found(shape, tokenizer, frozenset(), lambda mesh, heads: hf.load(hf.open_source(path), shape, mesh))


def check_vocabulary(field: str, found: Found, tokenizer: Tokenizer, policy: TransformerConfig) -> None:
    """``ValueError`` unless the model has the policy's tokens; or, where its files hold no tokenizer, as many rows in
    its vocabulary as the policy. With the same tokens, the tables may be filled up by different numbers of rows."""
    theirs, rows = found.tokenizer(), found.config.vocab_size
    at = None if theirs is None else first_difference(tokenizer, theirs)
    if at is not None:
        raise ValueError(
            f"{field} has other tokens than the policy ({theirs.vocab_size} and {tokenizer.vocab_size}, the first "
            f"difference is token {at}): log-probs can be compared only over one vocabulary"
        )
    if rows < tokenizer.vocab_size or theirs is None and rows != policy.vocab_size:
        raise ValueError(
            f"{field} has {rows} vocabulary rows and the policy {policy.vocab_size}: log-probs can be compared only "
            "over one vocabulary"
        )
