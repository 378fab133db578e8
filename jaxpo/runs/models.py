"""Models beside the policy, which are no copies of it (``config.references``): found at a path, checked to know the
same tokens, and loaded onto the run's mesh. They are not checkpointed: a run that is resumed loads them again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxpo.config.checks import check_mesh
from jaxpo.config.resolved import Resolved, made
from jaxpo.files import read_json
from jaxpo.hub import WEIGHTS, model_files
from jaxpo.learning.programs import several
from jaxpo.learning.trainable import lora_scale, random_params
from jaxpo.parallel import shardings
from jaxpo.policy import hf, lora, transformer
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.stats import Other
from jaxpo.policy.transformer import Params
from jaxpo.runs.restore import checkpoints_of, config_of, find_checkpoint
from jaxpo.storage.checkpoint import restore_params
from jaxpo.text.tokenizers import PretrainedTokenizer, Tokenizer, first_difference, from_json


class Found(NamedTuple):
    """A model at a path, of which no weights are read yet.

    config: its shape.
    tokenizer: its own; () -> None where its files hold none.
    load: (mesh) -> its parameters.
    """

    config: TransformerConfig
    tokenizer: Callable[[], Tokenizer | None]
    load: Callable[[Mesh], Params]


def load_models(resolved: Resolved, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Other]:
    """The models beside the policy that the objective needs, by name, with their parameters on the mesh.

    Raises:
      ValueError: a path without a model, a model of other tokens, or one whose sizes the mesh does not divide; the
        message names the field.
    """
    policy, out = resolved.transformer(tokenizer.vocab_size), {}
    for name, found in find_models(resolved, policy, mesh).items():
        field = field_of(resolved, name)
        check_vocabulary(field, found, tokenizer, policy)
        try:
            params = found.load(mesh)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{field}: {error}") from None
        out[name] = Other(transformer.build(found.config, several(mesh)), params)
    return out


def field_of(resolved: Resolved, name: str) -> str:
    """The field of a model and its value, for messages."""
    return f"config.references.{name} {resolved.config.references[name]!r}"


def find_models(resolved: Resolved, policy: TransformerConfig, mesh: Mesh) -> dict[str, Found]:
    """The models beside the policy by name, without their weights; those in files of others compute in the policy's
    dtype.

    Raises:
      ValueError: as of `load_models`, but for the tokens.
    """
    out = {}
    for name in resolved.models:
        field = field_of(resolved, name)
        try:
            path = model_files(resolved.config.references[name], WEIGHTS)
            found = None if not path.exists() else of_run(path) if is_run(path) else of_files(path, policy)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        if found is None:
            raise ValueError(f"{field} does not exist: it is a model folder, a GGUF file, a run directory or a hub id")
        sizes = dict(mesh.shape) | ({} if found.config.experts else {"expert": 1})
        check_mesh("mesh", sizes, found.config, of=field)
        out[name] = found
    return out


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
    tokenizer = from_json(read_json(path / "tokenizer.json"))
    shape = made(config.policy, "policy")(tokenizer.vocab_size)

    def load(mesh: Mesh) -> Params:
        model = transformer.build(shape, several(mesh))
        wanted = jax.eval_shape(partial(random_params, config, model, {}), jax.random.key(0))
        places, heads = shardings(wanted, mesh), [("params", "heads")]
        params, _ = restore_params(checkpoints_of(str(path)), shardings=places, without=heads)
        if not config.lora.rank:
            return params
        base = hf.load(hf.open_source(config.policy.path), shape, mesh)
        return jax.jit(partial(lora.merge, scale=lora_scale(config)))(base, params)

    return Found(shape, lambda: tokenizer, load)


def of_files(path: Path, policy: TransformerConfig) -> Found:
    """A pretrained model: a folder or a GGUF file."""
    how = dict(dtype=policy.dtype, param_dtype=policy.dtype, scan_layers=policy.scan_layers)
    shape = config_from_hf(hf.read_config(path), **how)

    def tokenizer() -> Tokenizer | None:
        if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return None
        return PretrainedTokenizer(str(path), chat_template=False)

    return Found(shape, tokenizer, lambda mesh: hf.load(hf.open_source(path), shape, mesh))


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
