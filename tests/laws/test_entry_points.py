"""Law: plain Trainer, a LightningCLI YAML and the ``lightning-align`` command are the same run."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_align.__main__ import main
from tests.helpers.covers import cover, with_slow
from tests.laws import broken
from tests.laws.composition import note
from tests.laws.members import CALLBACKS, MODULES, Member, filled, spec
from tests.laws.runs import SEED, Outcome, Run, needs_exact_resume, on_its_data, quiet, refusal

ROOT = Path(__file__).parents[2]


def lightning_cli(path: str) -> None:
    """Somebody's own LightningCLI, which knows nothing of us."""
    LightningCLI(
        args=["fit", "-c", path],
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
    )


def command(path: str) -> None:
    """The function behind the ``lightning-align`` command."""
    main(["fit", "-c", path])


def process(path: str) -> None:
    """The command in a process of its own."""
    arguments = [sys.executable, "-m", "lightning_align", "fit", "-c", path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(arguments, check=True, capture_output=True, env=environment)


def yaml_file(run: Run, folder: Path, material: Path) -> str:
    """The run as a user would write it."""
    callbacks = [member.spec for member in run.callbacks]
    if needs_exact_resume(run):
        callbacks.append(spec("lightning_align.ExactResume"))
    callbacks.append(spec("tests.laws.runs.Recorder", folder=str(folder)))
    content = {
        "seed_everything": SEED,
        "model": run.module_spec,
        "data": run.data_spec,
        "trainer": {**run.trainer_options(folder), "callbacks": callbacks},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(filled(content, {"data": str(material), "run": str(folder)})))
    return str(path)


def is_the_same_run(run: Run, entry: Callable[[str], None], folder: Path, material: Path) -> None:
    """The law."""
    for name in ("python", "yaml"):
        (folder / name).mkdir()
    expected = run.fit(folder / "python", material)
    path = yaml_file(run, folder / "yaml", material)
    before = Path.cwd()
    os.chdir(folder / "yaml")  # without a logger, the configuration is saved here
    try:
        with quiet():
            entry(path)
    finally:
        os.chdir(before)
    ours = Outcome.read(folder / "yaml")
    assert ours == expected, "not the same run"


@pytest.fixture(autouse=True)
def _quiet_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-align"])


@cover(module=MODULES, entry=[lightning_cli, command])
def test_modules(
    module: Member, entry: Callable[[str], None], tmp_path: Path, material: Path
) -> None:
    is_the_same_run(on_its_data(module), entry, tmp_path, material)
    note("Modules alone", "Trainer = YAML = command", module.name, "exact")


@pytest.mark.parametrize("callback", with_slow(CALLBACKS, ("AsyncCheckpoint", "OptimizerSwap")))
def test_callbacks(callback: Member, tmp_path: Path, material: Path) -> None:
    module = next(module for module in MODULES if not refusal(callback, module))
    run = replace(on_its_data(module), callbacks=(callback,))
    is_the_same_run(run, command, tmp_path, material)
    note("Callbacks alone", "Trainer = YAML = command", callback.name, "yes")


@pytest.mark.slow
def test_a_process_of_its_own(tmp_path: Path, material: Path) -> None:
    is_the_same_run(on_its_data(MODULES[0]), process, tmp_path, material)


def test_the_law_fails_where_it_is_broken(tmp_path: Path, material: Path) -> None:
    run = replace(on_its_data(MODULES[-1]), module=broken.OTHER_UNDER_YAML)
    with pytest.raises(AssertionError, match="not the same run"):
        is_the_same_run(run, command, tmp_path, material)
