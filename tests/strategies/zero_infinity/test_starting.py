"""However its processes are started, a run comes to what DDP comes to."""

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.children import in_child
from tests.helpers.offloaded import Regression, assert_same, fit, points, small
from tests.helpers.ranks import run_ranks
from tests.strategies.zero_infinity.test_ranks import fit as fit_on_rank

SCRIPT = """
import atexit, os, sys
from pathlib import Path
def tell_threads():  # the last thing before the interpreter ends
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"\\nat the end of {os.getpid()}: {sorted(names)}", flush=True)
atexit.register(tell_threads)
import torch
import lightning.pytorch as pl
import lightning_align
from tests.helpers.offloaded import Regression, points
torch.set_num_threads(1)
folder, strategy = sys.argv[1:]
trainer = pl.Trainer(strategy=strategy, devices=2, accelerator="cpu", max_epochs=1, logger=False,
                     default_root_dir=folder, enable_progress_bar=False, enable_checkpointing=False)
pl.seed_everything(11)
trainer.fit(Regression(), points(4))
state = trainer.strategy.lightning_module_state_dict()
if trainer.is_global_zero:
    torch.save({name: value.clone() for name, value in state.items()}, f"{folder}/state")
"""


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")

    def train(rank):
        module = Regression()
        fit_on_rank(folder, rank, module, points(4), "ddp")
        return module.state_dict()

    return run_ranks(train)[0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("strategy", ["zero_infinity", "zero_infinity_cpu"])
def test_a_script_runs_under_lightning_and_under_torchrun(tmp_path, under_ddp, launcher, strategy):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(script), str(tmp_path), strategy],
        env=environment,  # not what runs in this process have set: a port in use, a rank
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    # One that still holds a tensor when the interpreter ends would abort the process.
    assert run.stdout.count("at the end of") == 2
    assert "gloo" not in run.stdout
    assert_same(torch.load(tmp_path / "state"), under_ddp)


def forked(folder, devices, **arguments):
    """Train in processes that Lightning forks; the module of this one is what counts."""
    module = Regression()
    trainer = pl.Trainer(
        strategy=small(start_method="fork", **arguments),
        devices=devices,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    pl.seed_everything(11)
    trainer.fit(module, points(8 // devices))
    torch.save(module.state_dict(), folder / "state")


def test_processes_that_are_forked_hand_the_values_back(tmp_path, under_ddp):
    theirs = Regression()
    fit(tmp_path, theirs, points())
    for devices, expected in ((1, theirs.state_dict()), (2, under_ddp)):
        folder = tmp_path / str(devices)
        folder.mkdir()
        assert in_child(lambda folder=folder, devices=devices: forked(folder, devices)) == 0
        assert_same(torch.load(folder / "state"), expected)
