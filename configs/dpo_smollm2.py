"""SmolLM2-135M-Instruct learns sums and differences from pairs of a right and a wrong number, by DPO with its SFT term
(`rpo`): by plain DPO (``--config.objective.name=dpo``) it learns to tell them apart and not to say them; on a CPU.

make smollm2
python -m experiments.train_preference --config=configs/dpo_smollm2.py --workdir=runs/dpo_smollm2
"""

from ml_collections import ConfigDict

from configs import grpo_smollm2


def get_config() -> ConfigDict:
    config = grpo_smollm2.get_config()
    config.data = ConfigDict(dict(name="task", size=180, flipped=0.0, seed=0))
    config.objective = ConfigDict(dict(name="rpo", beta=0.1, eta=1.0))
    config.optimizer.learning_rate = 3e-4
    config.rollout.update(prompts=16, responses=1)  # pairs of an iteration; answers to each prompt in the evaluation
    config.evaluation.update(every=10, pass_at=())
    return config
