"""``lightning-align schedule``: what a pipeline schedule costs, in figures and as a picture."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_align._errors import argument_error
from lightning_align.cli.commands import CommandParser
from lightning_align.pipelining import (
    SCHEDULES,
    SimResult,
    read_schedule_csv,
    simulate,
    write_schedule_csv,
)

COSTS = ("forward_cost", "backward_cost", "weight_cost", "activation_bytes", "saved_bytes")
SHOWN = 8  # ranks; of more the first and the last half as many


def schedule(
    schedule: str | None = None,
    pp: int | None = None,
    num_microbatches: int | None = None,
    *,
    num_stages_per_rank: int | None = None,
    schedule_csv: str | Path | None = None,
    forward_cost: float | list[float] = 1.0,
    backward_cost: float | list[float] = 2.0,
    weight_cost: float | list[float] | None = None,
    comm_latency: float = 0.0,
    bandwidth: float | None = None,
    activation_bytes: float | list[float] | None = None,
    saved_bytes: float | list[float] | None = None,
    png: str | Path | None = None,
    trace: str | Path | None = None,
    csv: str | Path | None = None,
) -> str:
    """Simulate a step of a pipeline; returns the figures as text.

    Without a schedule, all that these numbers allow are compared on the same model: the costs are
    then those of all layers of a rank, which schedules of more stages cut into equal parts.

    Args:
        schedule: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble or
            DualPipeV; None compares them.
        pp: Pipeline ranks.
        num_microbatches: Microbatches of a step.
        num_stages_per_rank: Stages on each rank; by default 1 for GPipe and 1F1B, 2 for others.
        schedule_csv: File with the actions of each rank, instead of a schedule's name.
        forward_cost: Time of one stage for the forward of one microbatch, in any unit; a number,
            or one for each stage: 1,2,2,1.
        backward_cost: Time of one stage for the backward of one microbatch; likewise.
        weight_cost: Part of backward_cost for the gradient of the weights; half by default;
            likewise.
        comm_latency: Time until a message has crossed to another rank, whatever its size.
        bandwidth: Bytes per unit of time between two ranks; None for no limit.
        activation_bytes: Bytes that leave a stage with one microbatch; likewise.
        saved_bytes: Bytes that a stage keeps for the backward of one microbatch; likewise.
        png: Picture of the timeline to write; .svg and .pdf too (extra: plot).
        trace: Chrome trace of the timeline to write, for ui.perfetto.dev.
        csv: File to write the actions of each rank to, as schedule_csv and torch read it.

    Raises:
        ValueError: If an argument is out of range, or a file cannot be read or written.
    """
    numbers = (pp, num_microbatches, num_stages_per_rank)
    options: dict[str, Any] = {
        "forward_cost": forward_cost,
        "backward_cost": backward_cost,
        "weight_cost": weight_cost,
        "comm_latency": comm_latency,
        "bandwidth": bandwidth,
        "activation_bytes": activation_bytes,
        "saved_bytes": saved_bytes,
    }
    if schedule is None and schedule_csv is None:
        return _compare(numbers, options, {"png": png, "trace": trace, "csv": csv})
    order: Any = schedule
    if schedule_csv is not None:
        if schedule is not None:
            rule = "the file has its own order"
            raise argument_error("schedule", "schedule", schedule, rule, "Give only one of them")
        order = read_schedule_csv(schedule_csv, where="schedule", argument="schedule_csv")
    result = simulate(order, *numbers, **options, where="schedule")
    written = [
        _write("png", png, result.to_png),
        _write("trace", trace, result.to_chrome_trace),
        _write("csv", csv, lambda path: write_schedule_csv(result.schedule, path)),
    ]
    return "\n".join([*_figures(result), *filter(None, written)])


def _write(argument: str, path: str | Path | None, write: Callable[[str], None]) -> str:
    if path is None:
        return ""
    try:
        write(str(path))
    except (OSError, ValueError, ImportError) as error:
        rule = f"cannot be written: {str(error).rstrip('.')}"
        raise argument_error("schedule", argument, str(path), rule) from error
    return f"wrote {path}"


def _figures(result: SimResult) -> list[str]:
    order = result.schedule
    lines = [
        f"{order.name}: {order.num_ranks} ranks, {order.num_stages} stages, "
        f"{order.num_microbatches} microbatches",
        f"step time          {result.step_time:g}",
        f"busiest rank       {max(result.busy):g}",
        f"bubble over ideal  {result.bubble_over_ideal:.2%}",
    ]
    if result.own_bubble_over_ideal < result.bubble_over_ideal - 1e-9:
        own = f"{result.own_bubble_over_ideal:.2%}"
        lines.append(f"the same, where no rank waits for others to step  {own}")
    rows = [["rank", "stages", "busy", "waits", "peak activations"]]
    if result.peak_saved_bytes:
        rows[0].append("peak bytes")
    ranks = range(order.num_ranks)
    half = SHOWN // 2
    shown = ranks if len(ranks) <= SHOWN else [*ranks[:half], *ranks[-half:]]
    for rank in shown:
        stages = ",".join(str(s) for s, r in enumerate(order.stage_ranks.tolist()) if r == rank)
        busy, peak = result.busy[rank], result.peak_activations[rank]
        row = [str(rank), stages, f"{busy:g}", f"{1 - busy / result.step_time:.1%}", f"{peak:g}"]
        if result.peak_saved_bytes:
            row.append(f"{result.peak_saved_bytes[rank]:,.0f}")
        rows.append(row)
    if len(ranks) > SHOWN:
        rows.insert(1 + half, ["..."] * len(rows[0]))
    return [*lines, *_columns(rows)]


def _compare(
    numbers: tuple[int | None, ...], options: dict[str, Any], files: dict[str, str | Path | None]
) -> str:
    """A line for every schedule that these numbers allow, and why the others are not."""
    for argument, value in [*options.items(), *files.items()]:
        if isinstance(value, list) or (argument in files and value is not None):
            rule = "is for one schedule, and all of them are compared"
            raise argument_error("schedule", argument, value, rule, "Give --schedule")
    rows = [["schedule", "stages", "step time", "bubble over ideal", "peak activations"]]
    refused = []
    for name in SCHEDULES:
        try:
            v = simulate(name, *numbers, where="schedule").schedule.num_stages // (numbers[0] or 1)
            per_stage = {
                argument: value / v if value is not None else None
                for argument, value in options.items()
                if argument in ("forward_cost", "backward_cost", "weight_cost", "saved_bytes")
            }
            result = simulate(name, *numbers, **{**options, **per_stage}, where="schedule")
        except ValueError as error:
            refused.append(error)
            continue
        bubble, peak = f"{result.bubble_over_ideal:.2%}", f"{max(result.peak_activations):g}"
        stages = str(result.schedule.num_stages)
        rows.append([name, stages, f"{result.step_time:g}", bubble, peak])
    if len(refused) == len(SCHEDULES):
        raise refused[0]
    return "\n".join([*_columns(rows), *map(str, refused)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def parser() -> CommandParser:
    """Options of ``lightning-align schedule``."""
    about = "Simulate a step of a pipeline: its time, its bubble, what each rank must remember."
    parser = CommandParser("lightning-align schedule", about)
    # Plain types instead of unions with None: their errors are a line, and so is their help.
    types: dict[str, type] = dict.fromkeys(("pp", "num_microbatches", "num_stages_per_rank"), int)
    types |= dict.fromkeys(("comm_latency", "bandwidth"), float)
    described = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(schedule) or "", re.M)
    texts = {name: " ".join(text.split()) for name, text in described}
    for name, parameter in inspect.signature(schedule).parameters.items():
        default = parameter.default
        if name in COSTS and default is not None:
            default = f"{default:g}"
        parser.add_argument(
            f"--{name}", type=types.get(name, str), default=default, help=texts[name]
        )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align schedule``."""
    options = parser().parse_args(list(arguments)).as_dict()
    for name in COSTS:
        if isinstance(options[name], str):
            options[name] = _numbers(name, options[name])
    print(schedule(**options))  # noqa: T201


def _numbers(argument: str, text: str) -> float | list[float]:
    """One number, or a list of them: 1,2,3 or [1, 2, 3]."""
    try:
        numbers = [float(part) for part in text.strip("[] ").split(",")]
    except ValueError as error:
        rule = "must be a number, or one for each stage with commas between"
        raise argument_error("schedule", argument, text, rule) from error
    return numbers[0] if len(numbers) == 1 else numbers
