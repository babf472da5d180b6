"""Timelines as text, to be held against the figures of the papers."""

from lightning_align.pipelining import SimResult


def diagram(result: SimResult) -> list[str]:
    """A line for each rank: ``F0`` or ``B0`` at its start, ``--`` while it runs, ``..`` waits."""
    lines = []
    for rank in range(result.schedule.num_ranks):
        cells: list[str] = []
        for event in result.events:
            if event.rank == rank:
                cells += [".."] * (round(event.start_s) - len(cells))
                cells += [f"{event.action}{event.microbatch_index}"]
                cells += ["--"] * (round(event.end_s - event.start_s) - 1)
        lines.append(" ".join(cells))
    return lines
