import subprocess
import sys

import pytest

NAMES = ["pipeline_1f1b", "pipeline_gpipe", "pipeline_interleaved_1f1b"]
OURS = "import lightning_align"
REGISTRY = "from lightning.pytorch.strategies import StrategyRegistry"
ORDERS = {"ours first": f"{OURS}; {REGISTRY}", "ours last": f"{REGISTRY}; {OURS}"}


@pytest.mark.parametrize("order", ORDERS)
def test_names_are_known_whichever_package_comes_first(order: str) -> None:
    code = (
        f"{ORDERS[order]}; print(*(n for n in StrategyRegistry if n.startswith('pipeline')),"
        " StrategyRegistry.get('pipeline_interleaved_1f1b').schedule)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(run.stdout.split()[:-1]) == NAMES
    assert run.stdout.split()[-1] == "Interleaved1F1B"


def test_zero_infinity_is_a_name() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    import lightning_align  # noqa: F401

    strategy = StrategyRegistry.get("zero_infinity")
    assert type(strategy).__name__ == "ZeROInfinityStrategy"
    assert strategy.nvme_path is None


def test_zero_infinity_cpu_has_both_in_host_memory() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    import lightning_align  # noqa: F401

    devices = StrategyRegistry.get("zero_infinity_cpu").devices
    assert (devices.params, devices.optimizer, devices.stage) == ("cpu", "cpu", 3)
