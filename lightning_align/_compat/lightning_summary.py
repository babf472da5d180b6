"""Lightning's table of a model at the start of a fit, without FLOPs that nobody has counted.

It has a column of FLOPs and their sum. They are those of ``example_input_array``, and 0 of a module
without one, which reads as if they had been counted.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.callbacks.model_summary import log
from lightning.pytorch.utilities.model_summary.model_summary import (
    _format_summary_table,
    get_formatted_model_size,
    get_human_readable_count,
)

Column = tuple[str, list[str]]


def leave_out_flops(trainer: pl.Trainer) -> None:
    """Let the summaries of a Trainer say nothing of FLOPs where they would say 0.

    A summary of the user's own class is left as it is.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Trainer's own list
        kind = type(callback)
        if kind in (ModelSummary, RichModelSummary):
            callback.summarize = partial(_summarize, kind)


def _summarize(
    kind: type[ModelSummary],
    summary_data: Sequence[Column],
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    total_training_modes: dict[str, int],
    total_flops: int = 0,
    **options: Any,
) -> None:
    totals = total_parameters, trainable_parameters, model_size, total_training_modes
    columns = [column for column in summary_data if column[0] != "FLOPs"]
    if total_flops or len(columns) == len(summary_data):
        kind.summarize(list(summary_data), *totals, total_flops, **options)
    elif kind is RichModelSummary:
        _print_table(columns, *totals, **options)
    else:
        *table, _ = _format_summary_table(*totals, 0, *columns).splitlines()
        log.info("\n" + "\n".join(table))


def _print_table(
    columns: Sequence[Column],
    total_parameters: int,
    trainable_parameters: int,
    model_size: float,
    total_training_modes: dict[str, int],
    header_style: str = "bold magenta",
    **_: Any,
) -> None:
    """The table of RichModelSummary."""
    from rich import get_console
    from rich.table import Table

    table = Table(header_style=header_style)
    for name, _cells in columns:
        right = name in ("Params", "Params per Device", "In sizes", "Out sizes")
        style = "dim" if name == " " else None
        table.add_column(name, style=style, justify="right" if right else "left")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    frozen = total_parameters - trainable_parameters
    totals = {
        "Trainable params": get_human_readable_count(int(trainable_parameters)),
        "Non-trainable params": get_human_readable_count(int(frozen)),
        "Total params": get_human_readable_count(int(total_parameters)),
        "Total estimated model params size (MB)": get_formatted_model_size(model_size),
        "Modules in train mode": total_training_modes["train"],
        "Modules in eval mode": total_training_modes["eval"],
    }
    console = get_console()
    console.print(table)
    for name, value in totals.items():
        console.print(f"[bold]{name}[/]: {value}")
