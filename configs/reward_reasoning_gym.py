"""A reward model learns to tell words spelled backward from wrong answers.

A tenth of the training pairs have the wrong label. The transformer has 150k parameters and starts from scratch, on a
CPU.

    python -m experiments.train_reward --config=configs/reward_reasoning_gym.py --workdir=runs/reward
    python -m experiments.train_reward --config=configs/reward_reasoning_gym.py --workdir=runs/gpm \
        --config.objective.name=gpm_rm --config.objective.tau=1.0

Expected: after 400 steps the first orders 0.840 (0.79-0.88) of 300 held-out pairs with clean labels right, the second
0.893 (0.85-0.92); calibration errors 0.134 and 0.087 (docs/preferences.md). The time was not recorded.
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
    config.data = ConfigDict(dict(name="task", flipped=0.1))
    config.policy.update(width=64, layers=3, heads=4)
    config.sampling.max_new_tokens = 8  # longer answers are left out
    config.data.bad = "drop"
    config.objective = ConfigDict(dict(name="bradley_terry_rm", c=0.01))
    config.optimizer.update(name="adamw", learning_rate=1e-3, b2=0.95, weight_decay=0.0)
    config.optimizer.schedule.warmup_steps = 10
    config.rollout.update(prompts=128)  # pairs of an iteration
    config.training.microbatches = 4
    config.steps = 400
    config.evaluation.update(every=50, prompts=300, pass_at=())
    config.checkpoint.every = 100
    return config
