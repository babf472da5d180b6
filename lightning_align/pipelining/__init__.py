"""Pipeline parallelism as arithmetic: where to cut, what runs when, and how long it takes.

Pure functions of numbers, without processes: ``strategies/pipeline`` runs what is planned here.
"""

from lightning_align.pipelining.actions import Action, Event, Schedule
from lightning_align.pipelining.costs import measured_costs
from lightning_align.pipelining.partition import partition, partition_table
from lightning_align.pipelining.plot import draw_timeline, write_chrome_trace
from lightning_align.pipelining.schedule import SCHEDULES, build_schedule
from lightning_align.pipelining.schedule_csv import read_schedule_csv, write_schedule_csv
from lightning_align.pipelining.simulate import SimResult, simulate

__all__ = [
    "SCHEDULES",
    "Action",
    "Event",
    "Schedule",
    "SimResult",
    "build_schedule",
    "draw_timeline",
    "measured_costs",
    "partition",
    "partition_table",
    "read_schedule_csv",
    "simulate",
    "write_chrome_trace",
    "write_schedule_csv",
]
