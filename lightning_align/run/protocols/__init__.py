"""What strategies, modules, datamodules and callbacks ask each other: a file for whom is asked.

A class answers by having the attribute or method: it need not inherit from the protocol, nor know
of us. Below the protocols of a file stands a function for each question that has an answer for
Lightning's own classes, or one for all others. What is asked of optimizers is in
``optimizers/safety.py``.

``isinstance`` looks at the class and at what the object holds, without computing a property; it
takes microseconds, so it is asked at set-up and not in every step.
"""

from lightning_align.run.protocols.callbacks import *  # noqa: F403
from lightning_align.run.protocols.datamodules import *  # noqa: F403
from lightning_align.run.protocols.modules import *  # noqa: F403
from lightning_align.run.protocols.strategies import *  # noqa: F403
