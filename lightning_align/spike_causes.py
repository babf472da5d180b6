"""Why a step is not like the others: a cause, and the figures that say so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CauseKind = Literal["data", "learning rate", "stale second moment", "numerics", "unknown"]


@dataclass
class Cause:
    """Why an incident came about.

    Attributes:
        kind: "data", "learning rate", "stale second moment", "numerics" or "unknown".
        layer: The layer it is in, where it is in one.
        text: A sentence with the figures.
        figures: These figures by name.
    """

    kind: CauseKind
    layer: str | None = None
    text: str = ""
    figures: dict[str, float] = field(default_factory=dict)
