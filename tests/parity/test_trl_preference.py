"""The preference losses that TRL has, by TRL's own code: `make parity`.

The trainers are stand-ins, as in `test_trl`: a model that gives our log-probs, and settings. Losses that TRL computes
from sequence sums (`cpo_loss`, `odds_ratio_loss`) are called with those; the NLL that it takes from logits is written
here.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from tests.oracles.preference_cases import evaluate, make_batch
from tests.oracles.units import Batch

# The notice that trl.experimental may change, which its first import would raise.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")]

PAIR = ("chosen", "rejected")


def contiguous(batch: Batch) -> Batch:
    """No hole and no empty row: TRL's masks come from lengths."""
    mask = np.arange(batch.mask.shape[1]) < np.maximum(batch.mask.sum(1), 1)[:, None]
    fields = {n: np.where(mask, np.nan_to_num(getattr(batch, n), nan=-1.0), np.nan) for n in ("logp", "ref")}
    return replace(batch, mask=mask, **fields)


PAIRS, LABELS = contiguous(make_batch(PAIR, 3)), contiguous(make_batch((), 3))


def tensor(x):
    import torch

    return torch.tensor(np.nan_to_num(np.asarray(x, np.float64)))


def settings_of(**settings) -> MagicMock:
    fake = MagicMock()
    defaults = dict(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        label_smoothing=0.0,
        loss_weights=[1.0],
        alpha=0.0,
        ref_model=None,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    for name, value in {**defaults, **settings}.items():
        setattr(fake, name, value)
    fake.accelerator.device = "cpu"
    for method in ("gather", "gather_for_metrics"):
        setattr(fake.accelerator, method, lambda x: x)
    fake.model.training = True
    return fake


def model_of(logp):
    """A model whose answer is these log-probs."""
    import torch

    zeros = torch.zeros_like(logp).detach()
    for_its_metrics = dict(entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)
    said = SimpleNamespace(log_probs=logp, loss=None, **for_its_metrics)
    return MagicMock(side_effect=lambda **_: said)


def order(batch: Batch) -> np.ndarray:
    """TRL's rows: all chosen, then all rejected."""
    return np.concatenate([batch.rows(r) for r in PAIR])


def by_dpo_trainer(batch: Batch, **settings):
    import torch
    from trl import DPOTrainer

    rows = order(batch)
    logp, mask = tensor(batch.logp).requires_grad_(), tensor(batch.mask)[rows]
    padded = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)  # the position before the first completion token
    fake = settings_of(ref_model=model_of((tensor(batch.ref))[rows] * mask), **settings)
    inputs = dict(input_ids=padded.long(), attention_mask=torch.ones_like(padded), completion_mask=padded)
    loss = DPOTrainer._compute_loss(fake, model_of(logp[rows] * mask), inputs, False)
    loss.backward()
    return loss.item(), logp.grad.numpy()


def assert_same(ours, theirs, rtol=1e-9):
    np.testing.assert_allclose(ours[1], theirs[1], rtol=rtol, atol=1e-12)
    assert ours[0] == pytest.approx(theirs[0], rel=rtol, abs=1e-12)


def of_ours(name: str, batch: Batch, into: str = "logp", **settings):
    value, grads = evaluate(name, batch, (into,), **settings)
    return value, grads[into]


DPO = [
    ("dpo", dict(beta=0.3), dict(loss_types=["sigmoid"], beta=0.3)),
    ("rso", dict(gamma=0.3, form="hinge-norm"), dict(loss_types=["hinge"], beta=0.3)),
    ("ipo", dict(tau=0.3), dict(loss_types=["ipo"], beta=0.3)),
    ("rdpo", dict(beta=0.3, eps=0.2), dict(loss_types=["robust"], beta=0.3, label_smoothing=0.2)),
    ("sppo", dict(beta=0.3, half=False, hard=True), dict(loss_types=["sppo_hard"], beta=0.3)),
    (
        "rpo",
        dict(beta=0.3, eta=0.4, nll="token_mean"),
        dict(loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.4], beta=0.3),
    ),
]


@pytest.mark.parametrize(("name", "ours", "theirs"), DPO, ids=lambda x: x if isinstance(x, str) else "")
def test_dpo_trainer(name, ours, theirs):
    assert_same(of_ours(name, PAIRS, **ours), by_dpo_trainer(PAIRS, **theirs))


def test_kto_trainer():
    import torch
    from trl import KTOTrainer

    own, kl = (np.flatnonzero(f(LABELS.role)) for f in (lambda r: r != "kl", lambda r: r == "kl"))
    logp, ref, mask = tensor(LABELS.logp).requires_grad_(), tensor(LABELS.ref), tensor(LABELS.mask)
    padded = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)[own]
    fake = settings_of(
        beta=0.3,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        ref_model=model_of((ref * mask)[own]),
    )
    fake._compute_kl_logps = lambda model, batch: ((ref if model is fake.ref_model else logp.detach()) * mask)[kl].sum(
        1
    )
    inputs = dict(
        input_ids=padded.long(),
        attention_mask=torch.ones_like(padded),
        completion_mask=padded,
        label=torch.tensor(LABELS.extra["label"][own] > 0),
    )
    loss = KTOTrainer._compute_loss(fake, model_of((logp * mask)[own]), inputs, False)
    loss.backward()
    ours = of_ours("kto", LABELS, beta=0.3, lam_D=1.3, lam_U=0.7)
    assert_same(ours, (loss.item(), logp.grad.numpy()))


def sums(logp, batch: Batch, average: bool):
    """Chosen and rejected answers, and TRL's token mean over the chosen."""
    mask = tensor(batch.mask)
    total = (logp * mask).sum(1) / (mask.sum(1) if average else 1)
    chosen, rejected = (batch.rows(r) for r in PAIR)
    return total[chosen], total[rejected], -(logp * mask)[chosen].sum() / mask[chosen].sum()


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("cpo", dict(beta=0.3, alpha=0.7, eps=0.1), dict(beta=0.3, loss_type="sigmoid", label_smoothing=0.1)),
        (
            "simpo",
            dict(beta=2.5, gamma=1.375, eps=0.1),
            dict(beta=2.5, loss_type="simpo", simpo_gamma=1.375, label_smoothing=0.1),
        ),
        ("slic_hinge", dict(delta=1.0, lam=0.0), dict(beta=1.0, loss_type="hinge", label_smoothing=0.0)),
    ],
)
def test_cpo_trainer(name, ours, theirs):
    from trl.experimental.cpo import CPOTrainer

    logp = tensor(PAIRS.logp).requires_grad_()
    w, l, nll = sums(logp, PAIRS, name == "simpo")  # noqa: E741
    loss = CPOTrainer.cpo_loss(settings_of(**theirs), w, l)[0].mean() + ours.get("alpha", 0.0) * nll
    loss.backward()
    assert_same(of_ours(name, PAIRS, **ours), (loss.item(), logp.grad.numpy()))


def test_orpo_trainer():
    from trl.experimental.orpo import ORPOTrainer

    logp = tensor(PAIRS.logp).requires_grad_()
    w, l, nll = sums(logp, PAIRS, True)  # noqa: E741
    loss = nll - ORPOTrainer.odds_ratio_loss(settings_of(beta=0.3), w, l)[0].mean()
    loss.backward()
    assert_same(of_ours("orpo", PAIRS, lam=0.3), (loss.item(), logp.grad.numpy()), rtol=1e-5)  # TRL: odds in float32


@pytest.mark.parametrize("margins", (False, True))
def test_reward_trainer(margins):
    import torch
    from trl import RewardTrainer

    score = tensor(PAIRS.extra["score"]).requires_grad_()
    fake = settings_of()
    fake.args.center_rewards_coefficient = 0.1
    inputs = dict(attention_mask=torch.ones(16, 2))
    if margins:
        inputs["margin"] = tensor(PAIRS.x("margin"))
    model = MagicMock(side_effect=lambda **_: SimpleNamespace(logits=score[order(PAIRS)][:, None], loss=None))
    loss = RewardTrainer.compute_loss(fake, model, inputs)
    loss.backward()
    ours = of_ours("bradley_terry_rm", PAIRS, "score", c=0.1, margins=margins)
    assert_same(ours, (loss.item(), score.grad.numpy()))
