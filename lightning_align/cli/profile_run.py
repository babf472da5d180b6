"""The run behind ``lightning-align profile``: a ``fit`` that leaves nothing, and what it tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.callbacks import RooflineMonitor, SavePretrained
from lightning_align.cli.profile import Profile
from lightning_align.cli.profile_meta import on_meta
from lightning_align.cli.traceless import Traceless
from lightning_align.models.weights import parameters_on_meta
from lightning_align.planner.advice import Advice
from lightning_align.planner.chrome_trace import write_chrome_trace
from lightning_align.planner.step_time import StepTime

NEVER = 10**9
# What writes, what looks at a validation that there is none of, and what has its own place here.
_LEFT_OUT = (Checkpoint, SavePretrained, EarlyStopping, RooflineMonitor)


class ProfileCLI(Traceless):
    """The command whose ``fit`` makes a few steps.

    The length of the run is left as it is, so that schedules and checks are those of the real one;
    it ends early.

    Args:
        args: Those of ``fit``.
        profile: What is asked for.
        folder: For whatever the run writes; its end is up to the caller.
    """

    def __init__(self, args: Sequence[str], profile: Profile, folder: str) -> None:
        self.profile = profile
        super().__init__(args, folder)

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self._options["ckpt_path"] = None  # a finished run would have no steps left

    @override
    def instantiate_classes(self) -> None:
        with parameters_on_meta() if self.profile.meta else nullcontext():
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        kept = [each for each in self.given_callbacks() if not isinstance(each, _LEFT_OUT)]
        monitor = RooflineMonitor(NEVER, hardware=self.profile.hardware, plot=False)
        quiet = {
            **self.quiet([*kept, monitor, Steps(self.profile, monitor)]),
            "enable_checkpointing": False,
            "limit_val_batches": 0,
            "log_every_n_steps": self.profile.steps + 2,  # once, of all steps
        }
        return super().instantiate_trainer(**{**kwargs, **quiet})

    def fit(self, model: pl.LightningModule, datamodule: Any = None, **options: Any) -> None:
        """What runs in the place of ``Trainer.fit``."""
        if self.profile.meta:
            tell(self.profile, *on_meta(self.trainer, model, datamodule, self.profile.hardware))
        else:
            self.trainer.fit(model, datamodule=datamodule, **options)


class Steps(pl.Callback):
    """Ends a run after some steps, and tells what the monitor has found, in the process that has.

    Args:
        profile: What is asked for.
        monitor: Stands before this one.
    """

    def __init__(self, profile: Profile, monitor: RooflineMonitor) -> None:
        self.profile, self.monitor = profile, monitor

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let no scheduler wait for what it monitors: a profile has no validation to find it."""
        for each in trainer.lr_scheduler_configs:
            if each.reduce_on_plateau:
                each.frequency = NEVER

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step >= self.profile.steps + 2:
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell it.

        Raises:
            ValueError: If the run was too short.
        """
        report, machine = self.monitor.report, self.monitor.machine
        if report is None or not self.monitor.values:
            rule = f"the run has only {trainer.global_step}, and the first two are not timed"
            way_out = "Raise max_steps or max_epochs, or give it more data"
            raise argument_error("profile", "steps", self.profile.steps, rule, way_out)
        if trainer.is_global_zero:
            values = self.monitor.values
            tell(self.profile, StepTime(report, machine), values, self.monitor.advice)


def tell(
    profile: Profile, step: StepTime, values: dict[str, float], advice: Sequence[Advice]
) -> None:
    """Print what was found, and write the files.

    Args:
        profile: What is asked for.
        step: The one that was analysed.
        values: Measured; empty on meta.
        advice: What would help.
    """
    lines = [*told(step, values), "", step.to_table(profile.top_k)]
    if advice:
        lines += ["", "what would help", *(f"  {each}" for each in advice)]
    if step.report.uncounted:
        lines += ["", f"FLOPs not known, taken for 0: {', '.join(step.report.uncounted)}"]
    content = {
        "measured": values,
        "report": step.report.to_dict(),
        "time": step.to_dict(),
        "advice": [{"name": a.name, "text": a.text, "gain": a.gain} for a in advice],
    }
    ways: dict[str, Callable[[str], object]] = {
        "json_file": lambda path: Path(path).write_text(json.dumps(content, indent=1)),
        "png": lambda path: step.report.plot(step.hardware, top_k=profile.top_k).savefig(path),
        "trace": lambda path: write_chrome_trace(step, path),
    }
    for argument, write in ways.items():
        path = getattr(profile, argument)
        if path is not None:
            lines.append(_written(path, write))
    print("\n".join(lines))  # noqa: T201


def told(step: StepTime, values: dict[str, float]) -> list[str]:
    """A step in a few lines.

    Args:
        step: Analysed.
        values: Measured; empty on meta.
    """
    report, machine = step.report, step.hardware
    lines = [
        f"{machine.name}: {machine.peak_flops / 1e9:,.4g} GFLOP/s,"
        f" {machine.mem_bandwidth / 1e9:,.4g} GB/s, ridge at {machine.ridge_point:.3g} FLOP/B",
        f"a step: {report.total_flops / 1e9:,.4g} GFLOP, {report.bytes / 1e9:,.4g} GB moved,"
        f" {report.intensity:.3g} FLOP/B, {report.peak_bytes / 1e9:,.4g} GB at the peak",
        f"predicted {1e3 * step.seconds:,.4g} ms, bound by {step.bound}",
    ]
    if values:
        lines.append(f"measured  {1e3 * values['step_s']:,.4g} ms: {_rates(values)}")
        shares = {k.removesuffix("_share"): v for k, v in values.items() if k.endswith("_share")}
        lines.append(", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    else:
        lines.append("nothing measured; rows as long as they may be, and all of it learned")
    return lines


def _rates(values: dict[str, float]) -> str:
    rates = [f"MFU {values['mfu']:.1%}", f"HFU {values['hfu']:.1%}"]
    if "tokens_per_s" in values:
        rates.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(rates)


def _written(path: str, write: Callable[[str], object]) -> str:
    try:
        write(path)
    except (OSError, ValueError, ImportError) as error:  # a path never ends a run
        return f"{path} was not written: {error}"
    return f"wrote {path}"
