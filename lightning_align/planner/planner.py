"""Will it fit, how fast will it be, and why: ``Planner``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lightning_align._declared import declared
from lightning_align._errors import argument_error, finite_number
from lightning_align.planner.block_work import Pass, frozen
from lightning_align.planner.calibration import fitted
from lightning_align.planner.efficiencies import IDEAL, Efficiencies, efficiencies_of
from lightning_align.planner.hardware_spec import HardwareSpec
from lightning_align.planner.memory import HOST, NVME, device_memory, elsewhere
from lightning_align.planner.model_spec import ModelSpec
from lightning_align.planner.parallel_spec import ParallelSpec
from lightning_align.planner.quantities import BYTES, quantity, shown
from lightning_align.planner.step_cost import all_passes
from lightning_align.planner.step_prediction import StepPrediction, predict_step

WHERE = "Planner"
Row = tuple[ModelSpec, ParallelSpec, float]
LEAST_ROWS = 3
# Factors within which nine steps in ten are, by the design half of the A100 rows: where nothing was
# measured, and where there is one measured step for each thing that they say.
UNCALIBRATED, DETERMINED = 2.0, 1.4
FAR = 2.0  # factor from which on a row is of other hardware, more likely than not
USABLE = 0.94  # of a device's memory: what the driver, the context and fragments leave


@dataclass(frozen=True)
class Plan:
    """A way to train, and what it would take.

    Attributes:
        model: What is trained.
        parallel: How.
        step_time: Seconds of a step.
        breakdown: Seconds by what they go into, of the busiest rank.
        memory_per_device: Bytes that the fullest device needs.
        memory_breakdown: Bytes by what they are.
        host_bytes: Bytes in the host memory of a node.
        nvme_bytes: Bytes on the drives of a node.
        nvme_traffic: Bytes that a rank reads and writes in a step.
        bound: Part of the step that takes longest.
        fits: Whether there is room for all of it.
        missing_bytes: How much is missing on a device, or else in host memory or on drives.
        interval: Seconds between which the step takes, nine times in ten.
    """

    model: ModelSpec
    parallel: ParallelSpec
    step_time: float
    breakdown: Mapping[str, float]
    memory_per_device: float
    memory_breakdown: Mapping[str, float]
    host_bytes: float
    nvme_bytes: float
    nvme_traffic: float
    bound: str
    fits: bool
    missing_bytes: float
    interval: tuple[float, float]
    hardware: HardwareSpec = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together; pairs have twice the tokens of a row."""
        per_row = 2 if self.parallel.objective == "dpo" else 1
        return per_row * self.parallel.batch_size * self.model.seq_len / self.step_time

    @property
    def model_flops(self) -> float:
        """FLOPs of a step that its mathematics asks for, on all devices.

        They are counted as in ``StepReport.model_flops``: all pairs of tokens, masked or not.
        """
        spec = self.parallel
        plain = ParallelSpec(
            micro_batch_size=spec.micro_batch_size,
            objective=spec.objective,
            shared_prefix=spec.shared_prefix,
        )
        # Of unfused attention no product is repeated, and none is left out.
        model = replace(self.model, attention="unfused")
        (forward, backward), *ends = all_passes(model, plain)
        forwards = 1 + spec.has_reference
        trained = model.num_layers if spec.lisa_layers is None else spec.lisa_layers
        flops = model.num_layers * (forwards * _flops(forward) + _flops(frozen(backward)))
        flops += trained * (_flops(backward) - _flops(frozen(backward)))
        flops += sum(forwards * _flops(first) + _flops(second) for first, second in ends)
        return spec.batch_size / spec.micro_batch_size * flops

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        peak = self.hardware.product_flops(self.parallel.is_half) * self.parallel.devices
        return self.model_flops / (self.step_time * peak)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "parallel": self.parallel.told(),
            "hardware": self.hardware.name,
            "step_time": self.step_time,
            "interval": list(self.interval),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "breakdown": dict(self.breakdown),
            "bound": self.bound,
            "memory_per_device": self.memory_per_device,
            "memory_breakdown": dict(self.memory_breakdown),
            "host_bytes": self.host_bytes,
            "nvme_bytes": self.nvme_bytes,
            "nvme_traffic": self.nvme_traffic,
            "fits": self.fits,
            "missing_bytes": self.missing_bytes,
        }


def _flops(work: Pass) -> float:
    return float(sum(piece.flops for piece in work.pieces))


@declared
class Planner:
    """Says what fits, how fast it would be, and which split to take.

    Times come from what a step computes, moves and sends, and from a few constants of the hardware
    (``Efficiencies``), which measured steps move; memory from what tensors there are.

    Args:
        hw: Hardware, or its name such as ``"8xh100-sxm"``.
        efficiencies: Constants that are used until something is measured.

    Attributes:
        efficiencies: Constants in use.

    Raises:
        ValueError: If the hardware is not known.

    Example:
        >>> planner = Planner("8xh100-sxm")
        >>> gpt = ModelSpec(24, 2048, 16, vocab_size=50304, seq_len=2048)
        >>> planner.predict(gpt, ParallelSpec(devices=8, micro_batch_size=4)).fits
        True
    """

    def __init__(self, hw: HardwareSpec | str, efficiencies: Efficiencies | None = None) -> None:
        if isinstance(hw, str):
            hw = HardwareSpec.from_name(hw)
        if not isinstance(hw, HardwareSpec):
            rule = "must be a HardwareSpec, or the name of hardware"  # type: ignore[unreachable]
            raise argument_error(WHERE, "hw", hw, rule)
        self.hw = hw
        self.efficiencies = efficiencies or efficiencies_of(hw.overhead_s, hw.is_asynchronous)
        self._factor = UNCALIBRATED
        self._usable = USABLE

    def calibrate(self, rows: Iterable[Row]) -> Planner:
        """Move the constants to what measured steps say.

        Args:
            rows: Models, how they were trained, and the seconds of a step.

        Returns:
            This planner.

        Raises:
            ValueError: If a time is not positive, or shorter than the hardware's peak allows.

        Note: with fewer than three different steps, or ones that say but one thing, nothing moves,
        and a warning says so.
        """
        rows = list(rows)
        for number, row in enumerate(rows):
            self._check_row(number, row)
        if len({(model, parallel) for model, parallel, _ in rows}) < LEAST_ROWS:
            self._warn(f"{len(rows)} rows, and {LEAST_ROWS} different ones are needed")
            return self

        def predict(constants: Efficiencies) -> list[float]:
            return [predict_step(m, p, self.hw, constants).seconds for m, p, _ in rows]

        found = fitted(predict, [seconds for _, _, seconds in rows], self.efficiencies)
        if found.directions < 2:
            self._warn("the rows say one thing only, as if of one step")
            return self
        worst = int(np.argmax(np.abs(np.log1p(found.errors))))
        if not 1 / FAR < 1 + found.errors[worst] < FAR:
            off = f"row {worst} is predicted at {1 + found.errors[worst]:.2g} times what it took"
            warnings.warn(f"{WHERE}.calibrate: {off}; is it of other hardware?", stacklevel=2)
        self.efficiencies = found.constants
        spread = float(np.quantile(np.abs(np.log1p(found.errors)), 0.9))
        # The rows that constants were moved to say little of how far others are off.
        left = np.log(DETERMINED) * np.sqrt(found.directions / len(rows))
        self._factor = float(np.exp(np.hypot(spread, left)))
        return self

    def _check_row(self, number: int, row: Any) -> None:
        where = f"{WHERE}.calibrate"
        if not isinstance(row, tuple) or len(row) != 3:
            rule = f"row {number} must be a ModelSpec, a ParallelSpec and the seconds of a step"
            raise argument_error(where, "rows", row, rule)
        model, parallel, seconds = row
        self._check(where, model, parallel)
        if (finite_number(seconds) or 0) <= 0:
            rule = f"the seconds of row {number} must be a positive, finite number"
            raise argument_error(where, "rows", seconds, rule)
        least = predict_step(model, parallel, self.hw, IDEAL).breakdown["compute"]
        if seconds < least:
            rule = (
                f"row {number} took less than the {least:.3g} s that {self.hw.name}'s peak allows"
            )
            way_out = "It may be of other hardware, or in other units"
            raise argument_error(where, "rows", seconds, rule, way_out)

    def _warn(self, why: str) -> None:
        told = f"{WHERE}.calibrate: {why}; nothing was learned, and what is known of hardware"
        warnings.warn(f"{told} like {self.hw.name} is used.", stacklevel=3)

    def predict(self, model: ModelSpec, parallel: ParallelSpec) -> Plan:
        """How long a step takes, and what it needs.

        Args:
            model: What is trained.
            parallel: How.

        Raises:
            ValueError: If the model cannot be split so.
        """
        self._check(f"{WHERE}.predict", model, parallel)
        return self._plan(
            model, parallel, predict_step(model, parallel, self.hw, self.efficiencies)
        )

    def _plan(self, model: ModelSpec, parallel: ParallelSpec, step: StepPrediction) -> Plan:
        on_device = self.hw.is_asynchronous
        parts = device_memory(model, parallel, is_processor=not on_device)
        needed = sum(parts.values())
        near = min(parallel.devices, self.hw.devices_per_node)
        on_node = {
            tier: nbytes * near / parallel.devices
            for tier, nbytes in elsewhere(model, parallel, on_device=on_device).items()
        }
        # The memory of a processor is the host's.
        beside = 0.0 if on_device else on_node[HOST] / near
        missing = max(0.0, needed + beside - self._usable * self.hw.memory)
        missing = missing or max(0.0, on_node[HOST] - USABLE * self.hw.cpu_memory)
        no_drive = on_node[NVME] and not self.hw.nvme_read_bandwidth
        missing = missing or (on_node[NVME] if no_drive else 0.0)
        seconds = step.seconds
        return Plan(
            model=model,
            parallel=parallel,
            step_time=seconds,
            breakdown=step.breakdown,
            memory_per_device=needed,
            memory_breakdown=parts,
            host_bytes=on_node[HOST],
            nvme_bytes=on_node[NVME],
            nvme_traffic=step.nvme.read + step.nvme.written,
            bound=max(step.breakdown, key=step.breakdown.__getitem__),
            fits=not missing,
            missing_bytes=missing,
            interval=(seconds / self._factor, seconds * self._factor),
            hardware=self.hw,
        )

    def recommend(
        self,
        model: ModelSpec,
        top_k: int = 5,
        memory_limit: float | str | None = None,
        *,
        base: ParallelSpec | None = None,
    ) -> list[Plan]:
        """The fastest ways to train that fit, the fastest first.

        Args:
            model: What is trained.
            top_k: How many.
            memory_limit: Bytes of a device that may be used, such as ``"40GB"``; None for all.
            base: Number of devices, batch, objective, optimizer and precision, which stay as they
                are; None takes all devices of the hardware and a row for each.

        Raises:
            ValueError: If nothing fits; the message names the nearest, what is missing, and what
                would free it.
        """
        from lightning_align.planner.search import ranked

        where = f"{WHERE}.recommend"
        if type(top_k) is not int or top_k < 1:
            raise argument_error(where, "top_k", top_k, "must be a whole number of at least 1")
        scoped = self.limited_to(memory_limit)
        plans = ranked(scoped, model, base or ParallelSpec(devices=self.hw.devices))
        if plans[0].fits:
            return [plan for plan in plans if plan.fits][:top_k]
        nearest = plans[0]
        rule = (
            f"nothing fits {nearest.parallel.devices} x {shown(self.hw.memory)}; nearest is "
            f"{nearest.parallel.told()}, which lacks {shown(nearest.missing_bytes)}"
        )
        largest = max(nearest.memory_breakdown, key=nearest.memory_breakdown.__getitem__)
        size = shown(nearest.memory_breakdown[largest])
        way_out = f"Most of it is {largest} ({size}); {_FREES[largest]}"
        raise argument_error(where, "model", f"{model.parameters / 1e9:.3g}B", rule, way_out)

    def limited_to(self, memory: float | str | None) -> Planner:
        """The same planner for devices of which only so much memory may be used.

        Args:
            memory: Bytes, or a text such as ``"40GB"``; None for all.

        Raises:
            ValueError: If it is no number of bytes.
        """
        if memory is None:
            return self
        nbytes = quantity(WHERE, "memory_limit", memory, BYTES)
        other = copy(self)
        usable = min(nbytes, self._usable * self.hw.memory)
        other.hw = replace(self.hw, memory=min(nbytes, self.hw.memory))
        other._usable = usable / other.hw.memory
        return other

    def _check(self, where: str, model: object, parallel: object) -> None:
        if not isinstance(model, ModelSpec):
            raise argument_error(where, "model", model, "must be a ModelSpec")
        if not isinstance(parallel, ParallelSpec):
            raise argument_error(where, "parallel", parallel, "must be a ParallelSpec")
        parallel.check_model(model)


_FREES = {
    "weights": "more devices, bf16-true, or parameters on NVMe free it",
    "gradients": "LISA, ZeRO's second stage, or bf16-true free it",
    "optimizer": "GaLore, Muon, LISA, or optimizer state on NVMe free it",
    "activations": "full activation checkpointing, a smaller micro-batch or shorter rows free it",
    "temporary": "a smaller micro-batch or shorter rows free it",
    "reference": "log-probabilities of the reference that are computed before free it",
}
