"""A package whose names are imported on first use."""

import sys
from types import ModuleType

import pytest

from lightning_align._lazy import lazy

PACKAGE = "lazy_package_of_the_tests"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Two names: one of the package's submodule, one that is a submodule."""
    module, home = ModuleType(PACKAGE), ModuleType(f"{PACKAGE}.home")
    module.__path__ = []
    home.Thing = object()
    monkeypatch.setitem(sys.modules, PACKAGE, module)
    monkeypatch.setitem(sys.modules, f"{PACKAGE}.home", home)
    module.__getattr__, module.__dir__ = lazy(PACKAGE, {"Thing": "home", "home": "home"})
    return module


def test_a_name_is_that_of_its_home_and_then_a_plain_attribute(package: ModuleType) -> None:
    assert "Thing" not in vars(package)
    assert package.Thing is sys.modules[f"{PACKAGE}.home"].Thing
    assert "Thing" in vars(package)


def test_a_submodule_is_its_own_home(package: ModuleType) -> None:
    assert package.home is sys.modules[f"{PACKAGE}.home"]


def test_dir_lists_what_was_not_imported_yet(package: ModuleType) -> None:
    assert {"Thing", "home", "__name__"} <= set(dir(package))
    assert "Thing" not in vars(package)


def test_another_name_is_not_there(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=f"'{PACKAGE}' has no attribute 'thing'"):
        _ = package.thing
