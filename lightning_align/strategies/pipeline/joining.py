"""What a batch comes to, out of what its micro-batches came to.

A count adds up, a mean is averaged, a list of predictions is put one below the other, a largest
value is the largest of all: nothing says which, so each value's rule is found where the same rows
have been run in one piece as well. Values are numbers, tensors, texts, and containers of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class _Parts(NamedTuple):
    """A value after each of m micro-batches, which all began with ``before``.

    Attributes:
        values: (m, ...).
        before: (...).
        shares: Of the batch, (m, 1...); they sum to one.
    """

    values: Tensor
    before: Tensor
    shares: Tensor


# In the order of preference where several give the same.
RULES: dict[str, Callable[[_Parts], Tensor]] = {
    "mean": lambda m: (m.values * m.shares).sum(0),
    "mean over rows": lambda m: m.values.mean(0),
    "sum": lambda m: m.before + (m.values - m.before).sum(0),
    "total": lambda m: m.values.sum(0),  # of what was put in place of ``before``
    "max": lambda m: m.values.amax(0),
    "min": lambda m: m.values.amin(0),
    "geometric mean": lambda m: (m.values.log() * m.shares).sum(0).exp(),
    "root mean square": lambda m: (m.values.square() * m.shares).sum(0).sqrt(),
    "norm": lambda m: m.values.square().sum(0).sqrt(),
}
_SHORT = 16  # elements
_CANCELS = 0.05  # of the summands: where their rounding in 24 bits is what 2e-5 of the sum is
_NUMBERS = (bool, int, float, np.number, np.bool_)


class Mismatch(Exception):  # noqa: N818  # it is no failure
    """No rule makes the value of the batch out of those of its micro-batches."""

    def __init__(self, path: str, whole: Any, parts: Sequence[Any]) -> None:
        super().__init__(path)
        self.path, self.whole, self.parts = path, whole, parts


def is_number(value: Any) -> bool:
    """Whether it is a number, of Python, of NumPy, or a tensor without dimensions."""
    return isinstance(value, _NUMBERS) or (isinstance(value, Tensor) and value.ndim == 0)


def as_tensor(value: Any) -> Tensor:
    """A value in double precision; nothing before counts as zero."""
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.as_tensor(0 if value is None else value, dtype=torch.float64)


def distance(ours: Any, theirs: Any, least: float = 0.0) -> float:
    """Largest difference relative to the largest value; infinite between different shapes.

    Args:
        ours: A number, an array or a tensor.
        theirs: What it is compared with.
        least: The largest value counts as no smaller than this.
    """
    a, b = as_tensor(ours), as_tensor(theirs)
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    b = b.to(a.device)
    same = (a == b) | (a.isnan() & b.isnan())
    size = max(_largest(a), _largest(b), least)
    apart = (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
    return float(apart.max()) / (size or 1.0)


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if values.numel() else 0.0


def fitting(
    before: Any, parts: Sequence[Any], whole: Any, shares: Sequence[float], tolerance: float
) -> list[str]:
    """Rules that make ``whole`` out of ``parts``, in the order of preference.

    Args:
        before: The value before the batch; None if there was none.
        parts: The values after each micro-batch, which all began with ``before``.
        whole: The value after all their rows in one piece.
        shares: Which part of the batch each is.
        tolerance: Largest relative difference.
    """
    if isinstance(whole, Tensor) and whole.ndim and len(whole) == sum(map(len, parts)) != 0:
        stacked = _applied("rows", before, parts, shares)
        return ["rows"] if distance(stacked, whole) <= tolerance else []
    if {as_tensor(part).shape for part in parts} != {as_tensor(whole).shape}:
        return []
    # A sum that comes to nearly nothing is as exact as what was added up.
    least = _CANCELS * max(_largest(as_tensor(part)) for part in parts)
    apart = {name: distance(_applied(name, before, parts, shares), whole, least) for name in RULES}
    # Rounding differs between the rules, too: what is as near as the best cannot be told from it.
    near = min(max(4 * min(apart.values()), tolerance / 10), tolerance)
    return [name for name, error in apart.items() if error <= near]


def _applied(rule: str, before: Any, parts: Sequence[Any], shares: Sequence[float]) -> Tensor:
    if rule == "rows":
        return torch.cat([torch.as_tensor(part).detach() for part in parts])
    values = torch.stack([as_tensor(part) for part in parts])
    weights = values.new_tensor(shares).reshape(-1, *[1] * (values.ndim - 1))
    start = as_tensor(before).to(values.device)
    if start.ndim and start.shape != values.shape[1:]:
        start = torch.zeros_like(values[0])
    return RULES[rule](_Parts(values, start, weights))


def _like(value: Tensor, like: Any) -> Any:
    """The value in the type that the micro-batches' values have."""
    if isinstance(like, Tensor):
        kept = value.round() if not _is_floating(like) and value.is_floating_point() else value
        return kept.to(like.dtype)
    if isinstance(like, np.ndarray):
        return value.numpy().astype(like.dtype)
    number = value.item()
    if isinstance(like, (bool, np.bool_)):
        return type(like)(number >= 0.5)
    if isinstance(like, (int, np.integer)):
        return type(like)(round(number)) if number == number else like
    return type(like)(number)


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class Joiner:
    """Joins what micro-batches came to, by rules that it learns.

    Args:
        tolerance: Largest relative difference between values that count as one.

    Attributes:
        rules: path of a value -> rules that may hold for it, the preferred one first.
        unseen: Paths that were joined without having been learned.
        batches: How many were joined.
        comparisons: How often there was something to learn from.
        is_compared: Whether the first batch could be run in one piece, too, to learn from.
        has_changed: Whether a later batch was found not to come to the same.
        has_warned: Whether a value that it has not learned was reported.
        random: Paths of values that other random numbers change, which were said to be so.
        undecided: Paths whose possible rules have come to different values.
    """

    def __init__(self, tolerance: float = 2e-5) -> None:
        self.tolerance = tolerance
        self.batches = self.comparisons = 0
        self.is_compared = self.has_changed = self.has_warned = False
        self.rules: dict[str, list[str]] = {}
        self.unseen: set[str] = set()
        self.random: set[str] = set()
        self.undecided: set[str] = set()

    def learn(
        self,
        path: str,
        before: Any,
        parts: Sequence[Any],
        whole: Any,
        shares: Sequence[float],
    ) -> None:
        """Note the rules that make ``whole`` out of ``parts``; arguments as of ``fitting``.

        Raises:
            Mismatch: If there are none.
        """

        def note(path: str, found: list[str]) -> None:
            known = [rule for rule in self.rules.get(path, found) if rule in found]
            if not known:
                raise Mismatch(path, whole, parts)
            self.rules[path] = known
            self.undecided.discard(path)

        if is_number(whole) or isinstance(whole, (Tensor, np.ndarray)):
            if not all(is_number(part) or isinstance(part, (Tensor, np.ndarray)) for part in parts):
                raise Mismatch(path, whole, parts)
            found = fitting(before, parts, whole, shares, self.tolerance)
            if found or not _is_short(whole, parts):
                note(path, found)
            else:  # such as a sum and a count, side by side
                self.rules[path] = []
                begun, *values = (_elements(v, len(whole)) for v in (before, *parts))
                for number, element in enumerate(whole):
                    each = [value[number] for value in values]
                    self.learn(f"{path}[{number}]", begun[number], each, element, shares)
        elif isinstance(whole, (Mapping, tuple)):
            for entry, (start, each, theirs, having) in _entries(path, before, parts, whole):
                held = [share for share, has in zip(shares, having, strict=True) if has]
                self.learn(entry, start, each, theirs, _normalized(held))
        elif isinstance(whole, (list, deque)):
            self._learn_list(path, before, parts, whole, shares, note)
        elif isinstance(whole, (set, frozenset)):
            note(path, ["union"] if set().union(*parts) == whole else [])
        else:
            named = {"last": parts[-1], "first": parts[0]}
            note(path, [name for name, part in named.items() if _equal(part, whole)])

    def _learn_list(
        self,
        path: str,
        before: Any,
        parts: Sequence[Any],
        whole: Any,
        shares: Sequence[float],
        note: Callable[[str, list[str]], None],
    ) -> None:
        if not all(isinstance(part, (list, deque)) for part in parts):
            raise Mismatch(path, whole, parts)
        new = [appended(before, part) for part in parts]
        whole_new = appended(before, whole)
        if len(whole_new) == 0 and not any(new):  # entries were changed where they are
            for number, entry in enumerate(whole):
                inner = [part[number] for part in parts]
                if before is None or any(value is not before[number] for value in [*inner, entry]):
                    begun = before[number] if before is not None else None
                    self.learn(f"{path}[{number}]", begun, inner, entry, shares)
        else:
            joined = [entry for entries in new for entry in entries]
            is_extended = len(joined) == len(whole_new) and all(
                _equal(ours, theirs, self.tolerance)
                for ours, theirs in zip(joined, whole_new, strict=True)
            )
            is_one_each = {len(entries) for entries in new} == {len(whole_new)}
            # Both where only one of the micro-batches has the list.
            note(path, ["one each"] * is_one_each + ["extend"] * is_extended)
            if "one each" in self.rules[path]:
                for number, entry in enumerate(whole_new):
                    values = [entries[number] for entries in new]
                    self.learn(f"{path}[+{number}]", None, values, entry, shares)

    def join(self, path: str, before: Any, parts: Sequence[Any], shares: Sequence[float]) -> Any:
        """The value of the batch; arguments as of ``fitting``."""
        first = parts[0]
        if is_number(first) or isinstance(first, (Tensor, np.ndarray)):
            return self._join_values(path, before, parts, shares)
        if isinstance(first, (Mapping, tuple)):
            return self._join_entries(path, before, parts, shares)
        if isinstance(first, (list, deque)):
            return self._join_lists(path, before, parts, shares)
        if isinstance(first, (set, frozenset)):
            return type(first)(set().union(*parts))
        rules = self.rules.get(path, ["last"])
        if len(rules) > 1 and not _equal(parts[0], parts[-1]):
            self.undecided.add(path)
        return parts[0] if rules[0] == "first" else parts[-1]

    def _join_values(
        self, path: str, before: Any, parts: Sequence[Any], shares: Sequence[float]
    ) -> Any:
        rules = self.rules.get(path)
        if rules == []:
            begun, *each = (_elements(value, len(parts[0])) for value in (before, *parts))
            joined = [
                self.join(f"{path}[{number}]", start, [value[number] for value in each], shares)
                for number, start in enumerate(begun)
            ]
            return torch.stack(joined) if isinstance(parts[0], Tensor) else np.stack(joined)
        has_rows = isinstance(parts[0], Tensor) and parts[0].ndim > 0
        is_changed = before is not None and parts[0].__class__ is before.__class__
        rules = rules or self._of_siblings(path)
        if rules is None:
            self.unseen.add(path)
            same_shape = is_changed and as_tensor(before).shape == as_tensor(parts[0]).shape
            if has_rows and not same_shape:
                rules = ["rows"]
            else:
                rules = ["sum" if is_changed or isinstance(parts[0], int) else "mean"]
        values = [_applied(rule, before, parts, shares) for rule in rules]
        if any(distance(value, values[0]) > 5 * self.tolerance for value in values[1:]):
            self.undecided.add(path)
        return _like(values[0], parts[0])

    def _of_siblings(self, path: str) -> list[str] | None:
        """What holds for all other entries of the same dict, for a key that is new."""
        parent = path.rpartition("[")[0]
        if not parent:
            return None
        siblings = [r for p, r in self.rules.items() if r and p.rpartition("[")[0] == parent]
        common = [rule for rule in RULES if siblings and all(rule in r for r in siblings)]
        return common or None

    def _join_entries(
        self, path: str, before: Any, parts: Sequence[Any], shares: Sequence[float]
    ) -> Any:
        joined: dict[Any, Any] = {}
        for entry, (begun, values, key, has) in _entries(path, before, parts, None):
            if begun is not None and all(value is begun for value in values):
                joined[key] = begun
                continue
            held = _normalized([share for share, h in zip(shares, has, strict=True) if h])
            joined[key] = self.join(entry, begun, values, held)
        first = parts[0]
        if isinstance(first, tuple):
            values = [joined[key] for key in range(len(first))]
            return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
        return joined

    def _join_lists(
        self, path: str, before: Any, parts: Sequence[Any], shares: Sequence[float]
    ) -> Any:
        new = [appended(before, part) for part in parts]
        if before is not None and not any(new):
            return [
                value
                if all(part[number] is value for part in parts)
                else self.join(f"{path}[{number}]", value, [p[number] for p in parts], shares)
                for number, value in enumerate(before)
            ]
        rules = self.rules.get(path, ["extend" if before is None else "one each"])
        if path not in self.rules:
            self.unseen.add(path)
        if len(rules) > 1 and sum(map(bool, new)) > 1:
            self.undecided.add(path)
        if rules[0] == "one each" and len({len(entries) for entries in new}) == 1:
            added = [
                self.join(f"{path}[+{number}]", None, [entries[number] for entries in new], shares)
                for number in range(len(new[0]))
            ]
        else:
            added = [entry for entries in new for entry in entries]
        joined = [*(before or []), *added]
        return deque(joined, parts[0].maxlen) if isinstance(parts[0], deque) else joined


def appended(before: Any, after: Any) -> list[Any]:
    """The entries of ``after`` that were put behind those of ``before``; all if it is another."""
    if not before:
        return list(after)
    old, new = list(before), list(after)
    if not isinstance(after, deque):
        is_longer = len(new) > len(old) and new[len(old) - 1] is old[-1]
        return new[len(old) :] if is_longer or len(new) == len(old) else new
    for dropped in range(len(old)):  # one of bounded length drops its first entries
        kept = old[dropped:]
        if len(kept) <= len(new) and all(a is b for a, b in zip(kept, new, strict=False)):
            return new[len(kept) :]
    return new


def _entries(
    path: str, before: Any, parts: Sequence[Any], whole: Any
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(path, (value before, values, value of the whole or key, who has it)) of each entry."""
    tables = [_table(part) for part in parts]
    begun, wholes = _table(before), _table(whole)
    keys = dict.fromkeys(key for table in (*tables, wholes) for key in table)
    for key in keys:
        has = [key in table for table in tables]
        values = [table[key] for table in tables if key in table]
        start = begun.get(key)
        same = [*values, start] if whole is None else [*values, wholes.get(key)]
        if whole is not None and start is not None and all(value is start for value in same):
            continue
        if whole is not None and (key not in wholes or not values):
            raise Mismatch(f"{path}[{key!r}]", wholes.get(key), values)
        yield f"{path}[{key!r}]", (start, values, key if whole is None else wholes[key], has)


def _table(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    return dict(enumerate(value)) if isinstance(value, tuple) else {}


def _is_short(whole: Any, parts: Sequence[Any]) -> bool:
    """Whether each element may have its own rule."""
    shapes = {tuple(as_tensor(value).shape) for value in (whole, *parts)}
    return shapes <= {(count,) for count in range(1, _SHORT + 1)} and len(shapes) == 1


def _elements(value: Any, count: int) -> Any:
    return [None] * count if value is None or len(value) != count else value


def _normalized(shares: Sequence[float]) -> list[float]:
    total = sum(shares) or 1.0
    return [share / total for share in shares]


def _equal(ours: Any, theirs: Any, tolerance: float = 0.0) -> bool:
    if ours is theirs:
        return True
    both = (ours, theirs)
    if all(is_number(value) or isinstance(value, (Tensor, np.ndarray)) for value in both):
        return distance(ours, theirs) <= tolerance
    try:
        return bool(type(ours) is type(theirs) and ours == theirs)
    except (TypeError, ValueError, RuntimeError):
        return False
