"""``Curriculum``: its hooks (``callback``), and a file for each thing that they decide.

How batches and rows are made is in ``data``: nothing of it knows of a Trainer.
"""

from lightning_align.callbacks.curriculum.callback import Curriculum as Curriculum
