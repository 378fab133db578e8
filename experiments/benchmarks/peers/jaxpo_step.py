"""jaxpo's side of the step benchmark: the compiled functions of the training loop on the common job
(`..record.Job`)."""

from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks import record
from jaxpo.config.fields import default
from jaxpo.config.resolve import resolve
from jaxpo.learning.programs import Computation, compile_programs, init_state, optimizer_of
from jaxpo.parallel import make_mesh, shardings
from jaxpo.parallel.host import keep_freed_memory
from jaxpo.policy import transformer
from jaxpo.rollout import SamplingOptions


def config_of(job: record.Job) -> ConfigDict:
    """GRPO with a KL to the reference, one update over all rows at once."""
    config = default()
    config.policy.update(width=job.hidden, layers=job.layers, heads=job.heads, mlp_width=job.mlp)
    config.sampling.max_new_tokens = job.new_tokens
    config.rollout.update(prompts=job.prompts, responses=job.generations)
    # One optimizer step over all rows whatever the number of slices: the same update with less memory to touch.
    config.training.microbatches = 4 if job.rows % 4 == 0 else 1
    config.objective = ConfigDict(dict(name="grpo", beta=record.BETA, agg="token_mean"))
    config.optimizer.learning_rate = record.LEARNING_RATE
    return config


def main() -> None:
    """Runs the job and prints its record."""
    recorder = record.Recorder()
    job = record.job_from_flags(__doc__)
    keep_freed_memory()
    config, mesh = config_of(job), make_mesh()
    resolved = resolve(config, mesh.size)
    model, objective = transformer.build(resolved.transformer(job.vocab)), resolved.objective
    options = SamplingOptions(max_new_tokens=job.new_tokens)
    of = Computation(config, mesh, model, objective, record.PAD, resolved.microbatch_rows)
    programs = compile_programs(of, resolved.protocol.facts.compiles, report=lambda text: None)
    init = partial(transformer.init, model.config)
    where = shardings(jax.eval_shape(init, jax.random.key(0)), mesh)  # or the second step would be compiled anew
    params = jax.jit(init, out_shardings=where)(jax.random.key(0))
    reference = jax.tree.map(lambda x: x.copy(), params)
    state = init_state(params, optimizer_of(config, objective), objective, mesh)
    rows = np.arange(job.rows, dtype=np.int32)
    for i, prompts in enumerate(job.prompt_ids()):
        tokens, length = np.array(prompts, np.int32), np.full(job.prompts, job.prompt_len, np.int32)
        with recorder.phase("generate"):
            batch = jax.block_until_ready(
                programs.generate(state.params, tokens, length, jax.random.key(i), options, responses=job.generations)
            )
        recorder.gen_tokens += int(batch.mask.sum())
        batch = batch.replace(
            reward=np.array([record.reward(row) for row in np.asarray(batch.completions).tolist()], np.float32)
        )
        with recorder.phase("reference"):
            batch = batch.replace(logp_ref=jax.block_until_ready(programs.score_old(reference, batch).logp))
        with recorder.phase("update"):
            batch, memory = programs.prepare(batch, state.objective)
            state, _ = programs.update(state.replace(objective=memory), batch, rows)
            jax.block_until_ready(state.params)
        recorder.end_step()
    recorder.print("jaxpo", job, ("jax", "flax", "optax"), transformer.parameter_count(reference))


if __name__ == "__main__":
    main()
