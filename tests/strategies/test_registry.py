import importlib

from tests.helpers.children import forget_package, in_child

NAMES = ["pipeline_1f1b", "pipeline_gpipe", "pipeline_interleaved_1f1b"]


def test_names_are_known_where_our_package_comes_first() -> None:
    def run() -> None:
        forget_package("lightning")
        forget_package()
        importlib.import_module("lightning_align")
        from lightning.pytorch.strategies import StrategyRegistry

        assert sorted(n for n in StrategyRegistry if n.startswith("pipeline")) == NAMES
        assert StrategyRegistry.get("pipeline_interleaved_1f1b").schedule == "Interleaved1F1B"

    assert in_child(run) == 0


def test_names_are_known_where_our_package_comes_last() -> None:
    def run() -> None:
        from lightning.pytorch.strategies import StrategyRegistry

        forget_package()
        for name in NAMES:
            StrategyRegistry.pop(name, None)
        import lightning_align  # noqa: F401

        assert sorted(n for n in StrategyRegistry if n.startswith("pipeline")) == NAMES
        assert StrategyRegistry.get("pipeline_interleaved_1f1b").schedule == "Interleaved1F1B"

    assert in_child(run) == 0


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
