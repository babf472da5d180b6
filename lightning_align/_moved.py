"""Modules that have another place now: what saved files and users' code name is still found."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old place -> new place, within the package. Frozen: nothing is ever taken out.
MOVED = {
    "callbacks.spike_checks": "callbacks.spikes.checks",
    "callbacks.spike_evidence": "callbacks.spikes.evidence",
    "callbacks.spike_guard": "callbacks.spikes.guard",
    "callbacks.spike_ladder": "callbacks.spikes.ladder",
    "callbacks.spike_layers": "callbacks.spikes.layers",
    "callbacks.spike_measures": "callbacks.spikes.measures",
    "callbacks.spike_memory": "callbacks.spikes.memory",
    "callbacks.spike_rewind": "callbacks.spikes.rewind",
    "checkpointing.host_block": "host_block",
    "completion": "cli.completion",
    "export": "cli.export",
    "generate": "cli.generate",
    "pretrained": "models.build",
    "pretrained_weights": "models.weights",
    "run.pictures": "reports.pictures",
    "run.texts": "reports.texts",
    "schedule_command": "cli.schedule",
    "strategies.chain": "strategies.pipeline.chain",
    "tokenizer_state": "models.tokenizer_state",
    "trained": "models.trained",
}


class _Moved:
    """Finds a module under its old name: it is the one in the new place, imported then."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """A spec for what has moved, and for nothing else."""
        old = name.removeprefix(f"{self._package}.")
        if old == name or old not in MOVED:
            return None
        return ModuleSpec(name, self, origin=f"{self._package}.{MOVED[old]}")  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary one, until it is executed."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new place where importlib looks for the one that it asked for."""
        spec = module.__spec__
        assert spec is not None
        assert spec.origin is not None
        sys.modules[spec.name] = importlib.import_module(spec.origin)


def find_moved(package: str) -> None:
    """Find modules of a package under the names that they had."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved(package))
