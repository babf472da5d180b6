"""What a batch must hold for an objective, said before anything is computed of it.

Of a datamodule that tells, at set-up; of anybody's loaders, where the first batch comes.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lightning_align._errors import argument_error
from lightning_align.run.protocols import batch_keys


def check_data(where: str, data: Any, keys: Collection[str], way_out: str) -> None:
    """Refuse a datamodule whose batches lack something.

    Args:
        where: Class of the module.
        data: The datamodule of its run, None without one.
        keys: What a batch must hold.
        way_out: What to do then.

    Raises:
        ValueError: If it tells of its batches, and they lack one of these.
    """
    found = batch_keys(data)
    if found is not None and (missing := [key for key in keys if key not in found]):
        rule = f"its batches hold {_listed(found)}, and {where} needs {_listed(missing)}"
        raise argument_error(where, "datamodule", type(data).__name__, rule, way_out)


def check_batch(where: str, batch: Any, keys: Collection[str], way_out: str) -> None:
    """Refuse a batch that lacks something, or has rows and labels of other shapes.

    Args:
        where: Class of the module.
        batch: As a loader yields it.
        keys: What it must hold.
        way_out: What to do if it does not.

    Raises:
        ValueError: If it is no mapping with these keys to tensors of one shape.
    """
    if not isinstance(batch, Mapping):
        rule = f"must be a mapping with {_listed(keys)}"
        raise argument_error(where, "batch", f"<{type(batch).__name__}>", rule, way_out)
    if missing := [key for key in keys if key not in batch]:
        rule = f"must hold {_listed(keys)}, and lacks {_listed(missing)}"
        raise argument_error(where, "batch", list(map(str, batch)), rule, way_out)
    rows = batch["input_ids"]
    if not isinstance(rows, Tensor) or rows.ndim < 2 or rows.is_floating_point():
        kind = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows)
        rule = f"must be token ids of shape (rows, tokens), and is {kind}"
        raise argument_error(where, "batch", "input_ids", rule, way_out)
    if "labels" in keys and (rows.shape[1] < 2 or batch["labels"].is_floating_point()):
        kind = f"labels {batch['labels'].dtype} of rows {tuple(rows.shape)}"
        rule = f"must have whole numbers and 2 tokens a row, one to read and one to predict: {kind}"
        raise argument_error(where, "batch", "labels", rule, way_out)
    for key in ("labels", "completion_mask", "attention_mask"):
        if key in keys and batch[key].shape != rows.shape:
            rule = f"{key} has the shape {tuple(batch[key].shape)}, input_ids {tuple(rows.shape)}"
            raise argument_error(where, "batch", key, rule, "Labels are not shifted: equal shapes")


def _listed(names: Collection[str]) -> str:
    in_order = names if isinstance(names, (list, tuple)) else sorted(map(str, names))
    *most, last = in_order or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last
