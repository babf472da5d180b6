"""Each module of the package has its tests under its own name, in the same place under tests/."""

from pathlib import Path

import pytest

import lightning_align

PACKAGE = Path(lightning_align.__file__).parent
TESTS = Path(__file__).parent

# What a package names and what starts it are tested where they lead to.
MODULES = sorted(
    path.relative_to(PACKAGE)
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_its_tests_under_its_name(module: Path) -> None:
    """A leading underscore says nothing about the tests."""
    mirror = TESTS / module.parent / f"test_{module.stem.lstrip('_')}.py"
    assert mirror.is_file(), f"{module} needs {mirror.relative_to(TESTS.parent)}"
    assert "\ndef test_" in mirror.read_text(), f"{mirror.name} has no test"
