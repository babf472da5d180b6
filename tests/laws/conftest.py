"""The material that all laws train on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.laws.material import make_material
from tests.laws.runs import Outcome, Run


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, material: Path) -> Callable[[Run], Outcome]:
    """The outcome of an undisturbed run; each is trained once."""
    known: dict[Run, Outcome] = {}

    def outcome(run: Run) -> Outcome:
        if run not in known:
            known[run] = run.fit(tmp_path_factory.mktemp("reference"), material)
        return known[run]

    return outcome


@pytest.hookimpl(tryfirst=True)  # before marks select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here is a law's; the page is compared with the findings when all are there."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("law")
    items.sort(key=lambda item: item.path.name == "test_composition.py")
