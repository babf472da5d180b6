"""What every test is given and gives back."""

import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from tests.helpers.children import in_child

ROOT = Path(__file__).resolve().parents[1]


def test_runs_set_an_environment() -> None:
    pl.seed_everything(3)
    os.environ["MASTER_PORT"] = "1"
    os.environ.pop("OMP_NUM_THREADS")


def test_the_next_test_finds_none_of_it() -> None:
    assert "MASTER_PORT" not in os.environ
    assert "PL_GLOBAL_SEED" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "1"


class Refusing(BoringModel):
    def train_dataloader(self) -> DataLoader[object]:
        raise ValueError("no data")


def test_lightning_watches_loaders_for_ever_once_a_hook_has_raised() -> None:
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="no data"):
        trainer.fit(Refusing())
    assert hasattr(DataLoader.__init__, "__wrapped__")


def test_the_next_test_has_loaders_that_nobody_watches() -> None:
    assert not hasattr(DataLoader.__init__, "__wrapped__")
    assert not [name for name in vars(DataLoader) if name.startswith("__old__")]


LEAVES = """
```python
import os
from torch import distributed

os.environ["MASTER_PORT"] = "1"
store = distributed.HashStore()
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
```
"""
FINDS_NONE = """
```python
import os
from torch import distributed

assert "MASTER_PORT" not in os.environ
assert not distributed.is_initialized()
```
"""


def run_page(folder: Path, page: str) -> int:
    """Run the snippets of a page as those of the docs are; 0 where they pass."""
    shutil.copy(ROOT / "conftest.py", folder)
    (folder / "page.md").write_text(page)
    options = ["--markdown-docs", "--markdown-docs-syntax=superfences"]
    options += ["-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={folder}"]

    def run() -> None:
        assert pytest.main([*options, str(folder)]) == 0

    return in_child(run)


def test_snippets_leave_nothing_to_tests_either(tmp_path: Path) -> None:
    """They run beside the tests, in their processes."""
    assert run_page(tmp_path, LEAVES + FINDS_NONE) == 0


COUNTS = """
```python
with open("{runs}", "a") as file:
    file.write("{name} ")
```
"""


def test_snippets_that_continue_each_other_run_once(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first, second, third, alone = (COUNTS.format(runs=runs, name=name) for name in "1234")
    page = first + "".join(
        each.replace("```python", "```{.python continuation}") for each in (second, third)
    )
    assert run_page(tmp_path, page + alone) == 0
    assert runs.read_text() == "1 2 3 4 "
    fails = COUNTS.replace("file.write", "raise ValueError")
    assert run_page(tmp_path, fails + second.replace("```python", "```{.python continuation}")) != 0
