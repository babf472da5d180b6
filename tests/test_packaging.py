"""What a user gets from `pip install` and `import`: names, files, pins and no slow imports."""

import ast
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import lightning_align

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"datasets", "matplotlib", "trl", "wandb"}


def modules_added(first: str, then: str) -> set[str]:
    """Top-level modules that a fresh interpreter loads for `then` beyond those `first` loaded."""
    code = (
        f"import sys; {first}; seen = set(sys.modules); {then}; print(*(set(sys.modules) - seen))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_importing_the_package_loads_nothing_but_itself():
    added = modules_added("import importlib, typing", "import lightning_align")
    assert added == {"lightning_align"}


def test_public_classes_load_no_heavy_library_that_lightning_does_not():
    names = "; ".join(f"lightning_align.{name}" for name in lightning_align.__all__)
    added = modules_added("import lightning", f"import lightning_align; {names}")
    assert "lightning_align" in added
    assert not added & HEAVY
    assert "transformers" not in added


ROOMS = {
    room: importlib.import_module(f"lightning_align.{room}")
    for room in ("callbacks", "data", "modules", "optimizers", "planner", "run", "strategies")
}
PACKAGES = pytest.mark.parametrize("package", [lightning_align, *ROOMS.values()])


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_loads_nothing_before_a_name_of_it_is_used(room):
    added = modules_added("import importlib, typing", f"import lightning_align.{room}")
    assert added == {"lightning_align"}


def in_order(names):
    """As ruff sorts them: names in capitals come first."""
    return sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))


@PACKAGES
def test_public_names_are_sorted_and_resolve(package):
    assert package.__all__ == in_order(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        assert value.__name__.rpartition(".")[2] == name
    assert set(package.__all__) <= set(dir(package))


@PACKAGES
def test_type_checkers_see_the_same_names_from_the_same_modules(package):
    """The lazy table and the TYPE_CHECKING block are written by hand: they must not drift apart."""
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {
        name: package.__name__ if name == home else f"{package.__name__}.{home}"
        for name, home in package._HOMES.items()
    }
    assert static == lazy
    assert in_order(static) == package.__all__
    # A `__getattr__` that they saw would make every name one of the package's.
    hidden = {node.id for part in block.orelse for node in ast.walk(part) if is_assigned(node)}
    assert {"__getattr__", "__dir__"} <= hidden


def is_assigned(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def test_each_public_class_is_a_name_of_the_room_that_holds_it():
    """`data` is apart: its names are building blocks, and the top level has none of them."""
    held = {
        name: value.__module__.split(".")[1]
        for name in lightning_align.__all__
        if not isinstance(value := getattr(lightning_align, name), ModuleType)
    }
    exported = {
        name: room for room, package in ROOMS.items() if room != "data" for name in package.__all__
    }
    elsewhere = {"ModelLayers": "layers", "SpikeDetector": "stability", "find_layers": "layers"}
    elsewhere["AlignCLI"] = "cli"
    assert exported | elsewhere == held
    assert not set(ROOMS["data"].__all__) & set(held)
    for name, room in held.items():
        room = importlib.import_module(f"lightning_align.{room}")
        assert getattr(room, name) is getattr(lightning_align, name)


@PACKAGES
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="has no attribute 'PretrainModul'"):
        package.PretrainModul  # noqa: B018


def test_the_wheel_holds_types_corpus_licence_and_command(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_align", source / "lightning_align", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels)]
    subprocess.run([*pip, *options, str(source)], check=True)

    (wheel,) = wheels.glob("lightning_align-*.whl")
    assert wheel.name.startswith(f"lightning_align-{lightning_align.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        commands = next(name for name in files if name.endswith("entry_points.txt"))
        assert b"lightning-align = lightning_align.__main__:main" in archive.read(commands)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_align").rglob("*.py")}
    assert sources <= files
    assert "lightning_align/py.typed" in files
    recipes = (ROOT / "lightning_align").rglob("*.yaml")
    assert {str(path.relative_to(ROOT)) for path in recipes} <= files
    assert "lightning_align/data/corpora/pride_and_prejudice.txt.xz" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_what_the_package_imports_is_declared():
    """Directly imported libraries must not merely happen to come with another one."""
    from packaging.requirements import Requirement

    declared = {
        Requirement(line).name.lower().replace("_", "-")
        for line in importlib.metadata.requires("lightning-align") or []
    }
    declared.add("rich")  # where Lightning's RichModelSummary, which asks for it, is in use
    providers = importlib.metadata.packages_distributions()
    undeclared = {}
    for path in (ROOT / "lightning_align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for library in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                found = {name.lower().replace("_", "-") for name in providers.get(library, [])}
                if not found & (declared | {"lightning-align"}):
                    undeclared[library] = path.name
    assert undeclared == {}


def test_the_oldest_versions_are_the_lower_ends_of_our_ranges():
    """`make test-oldest` would else try what pip does not install for a user."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    text = (ROOT / "constraints-oldest.txt").read_text()
    pins = {name: Version(pin) for name, pin in re.findall(r"^([a-z0-9-]+)==(\S+)$", text, re.M)}
    ours = {"test", "completion", "check", "docs", "peer", "demo", "litdata"}  # tools, not needs
    lower = {}
    for line in importlib.metadata.requires("lightning-align") or []:
        needed = Requirement(line)
        extra = re.search(r'extra == "([\w-]+)"', str(needed.marker))
        if needed.name != "torch" and not (extra and extra[1] in ours):
            ends = [each.version for each in needed.specifier if each.operator == ">="]
            lower[needed.name] = Version(ends[0])
    assert {name: pins[name] for name in lower} == lower


def test_every_installed_dependency_is_pinned_to_the_version_in_use():
    """A dependency that constraints.txt does not name would float on the next fresh machine."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    extras = ("check", "docs", "peer", "plot", "test")
    waiting = [Requirement(f"lightning-align[{','.join(extras)}]")]
    seen, versions = set(), {}
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in seen:
            continue
        seen.add((name, *sorted(wanted.extras)))
        distribution = importlib.metadata.distribution(name)
        versions[name] = distribution.version.partition("+")[0]
        for line in distribution.requires or []:
            needed = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *wanted.extras)]
            if needed.marker is None or any(needed.marker.evaluate(e) for e in environments):
                waiting.append(needed)
    del versions["lightning-align"]
    if "torch" in versions and "nvidia-cublas" in versions:  # a CUDA build brings its own libraries
        versions = {name: v for name, v in versions.items() if not name.startswith("nvidia-")}
    assert {name: pins.get(name) for name in versions} == versions
