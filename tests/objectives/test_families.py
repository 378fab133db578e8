"""Every family of objectives has a folder that compares it with oracles."""

from pathlib import Path

import jaxpo
from tests.oracles.families import family, registered

HERE = Path(__file__).parent


def test_every_family_is_compared_with_oracles():
    families = {family(name) for name in jaxpo.names()} - {"grammar"}
    assert registered("grammar") == {"policy_gradient"}  # it spells those of the others: grammar/test_composition.py
    assert {path.parent.name for path in HERE.glob("*/test_oracle.py")} == families
    assert families < {path.stem for path in (HERE.parent / "oracles").glob("*.py")}
