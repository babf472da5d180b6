"""Names for ``Trainer(strategy=...)``, known as soon as this package and Lightning are imported.

Importing lightning_align does not import Lightning. If it has not been imported yet, the names wait
for it: ``import lightning_align`` may come first or last.
"""

import sys
from typing import Any

_HOME = "lightning.pytorch.strategies"  # the module that has the registry
_PIPELINES = {
    "pipeline_gpipe": "GPipe",
    "pipeline_1f1b": "1F1B",
    "pipeline_interleaved_1f1b": "Interleaved1F1B",
}


def _pipeline(**arguments: Any) -> Any:
    from lightning_align.strategies.pipeline.strategy import PipelineStrategy

    return PipelineStrategy(**arguments)


def _zero_infinity(**arguments: Any) -> Any:
    from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy

    return ZeROInfinityStrategy(**arguments)


def register(registry: Any) -> None:
    """Add our names to Lightning's registry; from then on it advertises nothing, either."""
    from lightning_align._compat.lightning_quiet import leave_out_tips

    leave_out_tips()
    for name, schedule in _PIPELINES.items():
        if name not in registry:
            about = f"Pipeline parallelism, {schedule} schedule"
            registry.register(name, _pipeline, about, schedule=schedule)
    if "zero_infinity" not in registry:
        about = "ZeRO-Infinity: parameters, gradients and optimizer state on NVMe"
        registry.register("zero_infinity", _zero_infinity, about)
    if "zero_infinity_cpu" not in registry:
        about = "ZeRO-Infinity with host memory in the place of NVMe"
        host = {"offload_params_device": "cpu", "offload_optimizer_device": "cpu"}
        registry.register("zero_infinity_cpu", _zero_infinity, about, **host)


class _OnImport:
    """Finds the module of the registry as ever, and registers once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the finders after this one find."""
        if name != _HOME:
            return None
        sys.meta_path.remove(self)
        specs = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                register(module.StrategyRegistry)

            loader.exec_module = run_and_register
        return spec


def register_on_import() -> None:
    """Register now if Lightning is there, else when it comes."""
    if _HOME in sys.modules:
        register(sys.modules[_HOME].StrategyRegistry)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
