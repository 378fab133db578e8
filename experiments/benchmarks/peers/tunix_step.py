"""Tunix's GRPOLearner on a random Qwen3, with everything local: `python -m experiments.benchmarks.peers.tunix_step`.

Run by `experiments.benchmarks.step`. Its own ("vanilla") sampler, one mesh of one device for all roles, the batch as
one micro-batch; the other options are Tunix's defaults. Qwen3 differs from Llama by the norms of queries and keys.
"""

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from experiments.benchmarks import record


class WordTokenizer:
    """Words t1, t2, ... of the ids 1, 2, ...; the id after the vocabulary ends a sequence."""

    def __init__(self, job: record.Job):
        self._eos = job.eos

    def encode(self, text: str, **_) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(f"t{int(i)}" for i in ids)

    def bos_id(self) -> int:
        return 0  # Tunix puts no such token before a prompt when it is 0

    def eos_id(self) -> int:
        return self._eos

    def pad_id(self) -> int:
        return record.PAD


def make_model(job: record.Job) -> qwen3.Qwen3:
    """A random policy; the same one at every call."""
    config = qwen3.ModelConfig(
        num_layers=job.layers, vocab_size=job.vocab, embed_dim=job.hidden, hidden_dim=job.mlp, num_heads=job.heads,
        head_dim=record.HEAD_DIM, num_kv_heads=job.heads, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True,
    )  # fmt: skip
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def make_cluster(job: record.Job, actor: qwen3.Qwen3, mesh: jax.sharding.Mesh) -> rl_cluster.RLCluster:
    """Policy, reference and sampler on one mesh."""
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    return rl_cluster.RLCluster(
        actor=actor,
        reference=make_model(job),
        tokenizer=WordTokenizer(job),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(record.LEARNING_RATE), max_steps=job.warmup + job.steps,
                eval_every_n_steps=10**6, mini_batch_size=job.prompts, train_micro_batch_size=job.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=job.new_tokens, max_prompt_length=job.prompt_len,
                kv_cache_size=job.prompt_len + job.new_tokens, temperature=1.0, top_p=1.0, eos_tokens=[job.eos],
            ),
        ),
    )  # fmt: skip


def watch(cluster: rl_cluster.RLCluster, actor: qwen3.Qwen3, recorder: record.Recorder) -> None:
    """Times the phases inside the learner's own loop; each waits for its result, which JAX returns early."""
    generate, reference, update = cluster.generate, cluster.get_ref_per_token_logps, cluster.update_actor

    def timed_generate(*args, **kwargs):
        with recorder.phase("generate"):
            output = generate(*args, **kwargs)
        recorder.gen_tokens += sum(len(ids) for ids in output.tokens)
        return output

    def timed_reference(*args, **kwargs):
        with recorder.phase("reference"):
            return jax.block_until_ready(reference(*args, **kwargs))

    def timed_update(*args, **kwargs):
        with recorder.phase("update"):
            update(*args, **kwargs)
            jax.block_until_ready(nnx.state(actor))
        recorder.end_step()

    cluster.generate = timed_generate
    cluster.get_ref_per_token_logps = timed_reference
    cluster.update_actor = timed_update


def reward(prompts: list[str], completions: list[str], **_) -> list[float]:
    """`record.reward` of the ids that the words name."""
    return [record.reward([int(word[1:]) for word in text.split()]) for text in completions]


def main() -> None:
    """Runs the job and prints its record."""
    recorder = record.Recorder()
    job = record.job_from_flags(__doc__)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        actor = make_model(job)
        params = sum(x.size for x in jax.tree.leaves(nnx.state(actor, nnx.Param)))
        cluster = make_cluster(job, actor, mesh)
        watch(cluster, actor, recorder)
        learner = grpo_learner.GRPOLearner(
            cluster,
            reward_fns=reward,
            algo_config=grpo_learner.GRPOConfig(num_generations=job.generations, num_iterations=1, beta=record.BETA),
        )
        words = [[" ".join(f"t{i}" for i in ids) for ids in prompts] for prompts in job.prompt_ids()]
        learner.train([{"prompts": np.array(prompts)} for prompts in words])
    recorder.print("tunix", job, ("google-tunix", "jax", "flax", "optax"), params)


if __name__ == "__main__":
    main()
