"""The losses that TRL has, by TRL's own code (`GRPOTrainer._compute_loss`, `RLOOTrainer._compute_loss`): `make parity`.

The trainers are stand-ins: all that the loss code asks of them is settings and the policy's log-probs, which are ours.
"""

from collections import defaultdict
from unittest.mock import MagicMock

import numpy as np
import pytest

from tests.oracles import Case
from tests.oracles.cases import CASES, WIDTH, evaluate
from tests.oracles.groups import group_advantage, leave_one_out

pytestmark = pytest.mark.parity

ADV_EPS = 1e-4  # TRL's
LABELS = ("K=4", "K=8", "K=2")  # groups of one size, every row drawn once


def plain(case: Case) -> Case:
    """No empty row, whose mean TRL and we both take as 0 but whose sequence ratio TRL takes as 1."""
    mask = case.mask.copy()
    mask[~mask.any(1), 0] = True
    fill = {n: np.where(mask, np.nan_to_num(getattr(case, n), nan=-1.0), np.nan) for n in ("logp", "logp_old", "ref")}
    return case.replace(mask=mask, **fill)


def trainer(settings: dict, logp, entropies) -> MagicMock:
    """What `_compute_loss` looks at."""
    fake = MagicMock()
    defaults = dict(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        max_completion_length=WIDTH,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    for name, value in {**defaults, **settings}.items():
        setattr(fake, name, value)
    fake.args.delta = settings.get("delta")
    fake.args.use_bias_correction_kl = settings.get("use_bias_correction_kl", False)
    fake.args.steps_per_generation = 1
    fake.accelerator.num_processes = 1
    fake.model.training = True
    for method in ("gather", "gather_for_metrics"):
        setattr(fake.accelerator, method, lambda x: x)
    fake.accelerator.reduce = lambda x, **_: x
    fake._get_per_token_logps_and_entropies = lambda *_, **__: (logp, entropies, None)
    return fake


def of_trl(trainer_class, case: Case, advantages: np.ndarray, **settings) -> tuple[float, np.ndarray]:
    """Loss and gradient in log-prob, by TRL."""
    import torch

    def tensor(x: np.ndarray) -> "torch.Tensor":
        return torch.tensor(np.nan_to_num(np.asarray(x, np.float64)))

    logp = tensor(case.logp).requires_grad_()
    mask = tensor(case.mask)
    ids = torch.zeros(case.mask.shape, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids[:, :1],
        prompt_mask=mask[:, :1],
        completion_ids=ids,
        completion_mask=mask,
        advantages=tensor(advantages),
        old_per_token_logps=tensor(case.logp_old),
        old_logps=(tensor(case.logp_old) * mask).sum(1),
        ref_per_token_logps=tensor(case.ref),
        num_items_in_batch=mask.sum(),
    )
    loss = trainer_class._compute_loss(trainer(settings, logp, torch.zeros_like(logp)), MagicMock(), inputs)
    loss.backward()
    return loss.item(), logp.grad.numpy()


def row_array(case: Case, by_row: dict[int, float]) -> np.ndarray:
    return np.array([by_row[b] for b in range(len(case.reward))])


GRPO = [
    ("grpo", dict(beta=0.0), dict(loss_type="grpo")),
    ("grpo", dict(beta=0.04), dict(loss_type="grpo", beta=0.04)),
    ("grpo", dict(beta=0.04, kl_is=True), dict(loss_type="grpo", beta=0.04, use_bias_correction_kl=True)),
    ("grpo", dict(beta=0.0, agg="token_mean", eps_high=0.28), dict(loss_type="dapo", epsilon_high=0.28)),
    ("grpo", dict(beta=0.0, agg="token_mean"), dict(loss_type="bnpo")),
    ("dr_grpo", dict(L_const=WIDTH), dict(loss_type="dr_grpo")),
    ("gspo", dict(eps_low=0.1, eps_high=0.2), dict(importance_sampling_level="sequence", epsilon_low=0.1)),
    ("cispo", dict(eps_low=1.0, eps_high=0.5), dict(loss_type="cispo", epsilon_high=1.5)),
    ("lite_ppo", {}, dict(loss_type="dapo")),
]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(("name", "ours", "theirs"), GRPO, ids=lambda x: x if isinstance(x, str) else "")
def test_grpo_trainer(name, ours, theirs, label):
    from trl import GRPOTrainer

    case = plain(CASES[label])
    scale = {"dr_grpo": "none", "lite_ppo": "batch"}.get(name, "group")
    advantages = row_array(case, group_advantage(case, case.reward, scale=scale, adv_eps=ADV_EPS))
    expected = of_trl(GRPOTrainer, case, advantages, **theirs)
    actual = evaluate(name, case, **ours, **({} if name == "dr_grpo" else {"adv_eps": ADV_EPS}))
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-9, atol=1e-12)
    assert actual[0] == pytest.approx(expected[0], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("label", LABELS)
def test_rloo_trainer(label):
    from trl import RLOOTrainer

    case = plain(CASES[label])
    advantages = row_array(case, leave_one_out(case, case.reward))
    expected = of_trl(RLOOTrainer, case, advantages)
    actual = evaluate("rloo", case, form="ppo", beta=0.0)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-9, atol=1e-12)
    assert actual[0] == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
