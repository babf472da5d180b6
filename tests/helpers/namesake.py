"""Another package's class of a name that torch has.

Not in the tests that use it: jsonargparse passes over modules whose path has an underscore in front
of a name.
"""

import torch


class Adagrad(torch.optim.SGD):
    """Not torch's."""
