"""GRPO teaches a transformer to spell words backward, after a warm start on imperfect demonstrations.

The transformer has 150k parameters and starts from scratch, on a CPU.

    python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/quickstart

Expected, seed 0: greedy accuracy on 300 unseen words 0.107 after the warm start, 0.843 after 120 iterations; 118 s on
2 shared cores. Seeds 1 and 2: 0.340 to 0.760 in 78 s, 0.333 to 0.853 in 83 s. Another type of CPU gave 0.110 to 0.823
for seed 0, in 58 s (README.md).
"""

from ml_collections import ConfigDict

from jaxpo.config.fields import default


def get_config() -> ConfigDict:
    config = default()
    config.task = ConfigDict(
        dict(
            name="reasoning_gym",
            dataset="spell_backward",
            train_size=20000,
            test_size=300,
            seed=0,
            min_word_len=3,
            max_word_len=6,
            prompt_field="word",  # the instructions are the same in every item
        )
    )
    config.policy.update(width=64, layers=3, heads=4)
    config.sampling.max_new_tokens = 8
    config.objective = ConfigDict(dict(name="grpo", eps_low=0.2, eps_high=0.28, beta=0.0, agg="token_mean"))
    config.optimizer.update(name="adamw", learning_rate=3e-4, b2=0.95, weight_decay=0.0)
    config.optimizer.schedule.warmup_steps = 10
    config.rollout.update(prompts=32, responses=16)
    config.training.microbatches = 4
    config.steps = 120
    config.warm_start.update(steps=450, batch=128, microbatches=4, drop_last=0.6)
    config.evaluation.update(every=20, prompts=300, samples=16)
    return config
