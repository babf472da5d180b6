"""Pipeline parallelism as arithmetic: where to cut, what runs when, and how long it takes.

Pure functions of numbers, without processes: ``strategies/pipeline.py`` runs what is planned here.
"""

from lightning_align.pipelining.partition import partition, partition_table

__all__ = ["partition", "partition_table"]
