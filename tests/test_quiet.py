"""A fit of ours says nothing that is not about the run, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What a run says about itself on stderr; whatever is not here fails the test.
ABOUT_THE_RUN = (
    r"(GPU|TPU|HPU|MPS) available: .*",
    r"Seed set to \d+",
    r"Tokenising: .*",
    r"Initializing distributed: .*",
    r"distributed_backend=gloo",
    r"All distributed processes registered\. .*",
    r"-+",
    r"`Trainer\.fit` stopped: .*",
    r"ZeROInfinityStrategy: .*",
    r"PipelineStrategy(: |\().*",
    r"LISA: .*",
    r"Samples written: .*",
    r"SpikeGuard: .*",
    r"GaLoreAdamW: .*",
    r"Curves drawn: .*",
    r".*Consider increasing the value of the `num_workers` argument.*",  # with many processors
    r" *\d+ +\d+ .*|stage +rank .*",  # the stages of a pipeline, as a table
)


def unexpected(printed: str) -> list[str]:
    """Lines of stderr that are not about the run, each behind the fit that it is of."""
    fit, found = "", []
    for line in filter(None, map(str.rstrip, printed.splitlines())):
        if line.startswith("== "):
            fit = line
        elif not any(re.fullmatch(about, line) for about in ABOUT_THE_RUN):
            found.append(f"{fit}: {line}")
    return found


@pytest.mark.slow
def test_fits_print_nothing_that_is_not_about_them(tmp_path: Path) -> None:
    """Pretraining, callbacks, SFT, DPO, LISA, GaLore, ZeRO-Infinity, DDP and a pipeline."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    environment.pop("PYTHONWARNINGS", None)
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.quiet_fits"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr.count("== ") == 9
    assert "\n".join(unexpected(run.stderr)) == ""
    for words in ("warning", "recommended", "deprecated", "Tip:", "Loading weights", "shards"):
        assert words not in run.stdout, words


def test_a_line_that_is_not_about_the_run_is_found() -> None:
    assert unexpected("== dpo\nGPU available: False, used: False\nTip: buy this\n") == [
        "== dpo: Tip: buy this"
    ]
