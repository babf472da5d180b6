"""What AsyncCheckpoint names, in ModelCheckpoint's words: the best, the newest, the k-th best."""

from collections.abc import Callable
from typing import Any

import torch

from lightning_align.checkpointing.retention import Retention


def standing(
    retention: Retention, path: Callable[[str], str], *, monitored: bool
) -> dict[str, Any]:
    """Attributes of a ModelCheckpoint that holds what ``retention`` holds.

    Args:
        retention: What is stored, or what will be.
        path: From the name of a checkpoint to its path or URL.
        monitored: Whether scores are those of a monitored value, and not steps.
    """
    scores = {path(name): torch.tensor(score) for name, score in retention.ranked.items()}
    best, newest = next(iter(scores), ""), retention.newest
    paths = {"best_model_path": best, "last_model_path": path(newest) if newest else ""}
    if not monitored:
        return paths
    worst, latest = retention.worst, retention.latest_score
    return {
        **paths,
        "best_model_score": scores.get(best),
        "best_k_models": scores,
        "current_score": None if latest is None else torch.tensor(latest),
        "kth_best_model_path": path(worst) if worst else "",
        "kth_value": torch.tensor(retention.worst_score),
    }
