"""The registry writes the documentation, and its command line lists and describes what it has."""

from pathlib import Path

import pytest

from jaxpo.objectives.__main__ import run
from jaxpo.registry import entry, names

DOCS = Path(__file__).parents[3] / "docs" / "objectives.md"


def test_docs_are_those_of_the_registry():
    assert DOCS.read_text() == run(["docs"]), "run: python -m jaxpo.objectives docs docs/objectives.md"


def test_docs_have_everything():
    text = DOCS.read_text()
    for name in names():
        assert f"\n### `{name}`\n" in text and entry(name).source in text
    for kind in ("advantage", "ratio", "surrogate", "regularizer", "aggregation", "filter", "reward", "correction"):
        for name in names(kind):
            row = entry(name, kind)
            assert f"| `{name}` |" in text and (row.factory.__doc__ or "").strip(), (kind, name)


def test_names_have_the_ids_of_the_cards():
    ids = """reinforce rloo reinforce_pp grpo dr_grpo dapo gspo gspo_token cispo rec opmd asymre bnpo gtpo bapo
    spo_single_stream spo_segment a_grae adora canon hapo d3s clip_cov kl_cov mhpo r2vpo dcpo_distribution lp_reg
    lite_ppo ppo_outer_loop""".split()
    ids += """dpo ipo slic_hinge kto orpo simpo cpo sppo bradley_terry_rm rso rdpo rpo srpo copg hypo online_ipo ipo_md
    nash_md nash_ema nash_mp egpo inpo dno gpm_rm gpo mpo_mixed mapl rationale_dpo rationale_orpo opa_dpo seppo
    dpa_logic preference_orchestrator rluf themis""".split()
    assert set(ids) <= set(names())
    slots = {
        "advantage": "rloo reinforce_pp asymre bnpo gtpo spo_single_stream spo_segment a_grae adora canon hapo "
        "lite_ppo dcpo_distribution",
        "ratio": "gspo gspo_token mhpo",
        "surrogate": "cispo bapo hapo clip_cov mhpo rec",
        "regularizer": "kl_estimators kl_cov r2vpo lp_reg ppo_outer_loop orpo_chi2",
        "reward": "salsa flr relevance_reward_r3 preference_orchestrator rluf rso_reward rlhs",
        "filter": "dapo d3s",
        "sampler": "hapo spo_single_stream",
        "protocol": "dapo ppo_outer_loop hapo spo_single_stream spo_segment",
        "diagnostic": "ppo_outer_loop dpo_ranking_accuracy mode_seeking",
    }
    import jaxpo.protocols  # noqa: F401 (for its registrations)

    for kind, ids in slots.items():
        assert set(ids.split()) <= set(names(kind)), kind


def test_run_lists_describes_and_writes(capsys, tmp_path):
    assert run([]).count("\n") == len(names()) - 1
    assert "surrogate\n" in run(["list"]) and "cispo" in run(["list", "surrogate"])
    assert "advantage gtpo(" in run(["describe", "gtpo"]) and "objective gtpo(" in run(["describe", "gtpo"])
    assert run(["describe", "gtpo", "advantage"]).startswith("advantage gtpo(")
    assert run(["docs", str(tmp_path / "x.md")]).startswith("wrote") and (tmp_path / "x.md").read_text() == run(
        ["docs"]
    )
    assert run(["--help"]).startswith("usage")


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["describe", "gtppo"], "unknown name 'gtppo': did you mean 'gtpo'"),
        (["list", "surogate"], "unknown kind 'surogate': did you mean 'surrogate'"),
        (["describe", "gtpo", "ratio"], "unknown ratio 'gtpo'"),
        (["lst"], "usage: python -m jaxpo.objectives"),
    ),
)
def test_run_refuses_what_it_does_not_know(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(arguments)
