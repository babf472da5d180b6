"""What the reference says about each completion of a run's data, before training.

Ranks share the work, and each then has all values; a kill costs one piece (``reference_cache``).
Where they hold parts of the reference they go through their pieces side by side: each calls it as
often as the one that has most to ask.

Shapes: B rows of a batch, P samples in it, K rows of a sample, T tokens in the longest row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import lightning.pytorch as pl
import numpy as np
import torch
from fsspec.core import url_to_fs
from torch import Tensor
from tqdm.auto import tqdm

from lightning_align._errors import argument_error
from lightning_align.data.reference_cache import (
    ReferenceCache,
    Values,
    completion_key,
    num_predicted,
    pieces,
)
from lightning_align.data.samples import Ids
from lightning_align.layers import ModelLayers
from lightning_align.losses import CompletionLogps, completion_logps
from lightning_align.run.protocols import NumbersCompletions
from lightning_align.run.replicas import of_every_rank

Row = tuple[Ids, Ids]  # prompt, completion
Piece = dict[bytes, Row]  # by completion_key
Score = Callable[[Sequence[Row], int], list[Values]]

BAR_DELAY_S = 1.0


class PrecomputedReference:
    """The reference's log-probabilities of all completions of a run's data, by number of sample.

    Args:
        where: Class the user called.
        url: Folder of the caches of all references, local or at any fsspec URL.

    Raises:
        ValueError: If fsspec knows no such URL.
    """

    # No __dict__: who looks for state in the attributes of a module must not go through all values.
    __slots__ = (
        *("__weakref__", "_about", "_data", "_has_warned", "_keys_PK", "_values"),
        *("url", "where"),
    )

    def __init__(self, where: str, url: str) -> None:
        try:
            url_to_fs(url)
        except (ImportError, ValueError) as error:
            rule = f"fsspec cannot open such a URL ({error})"
            raise argument_error(where, "ref_cache_dir", url, rule) from None
        self.where = where
        self.url = url
        self._data: ref[Any] | None = None
        self._values: dict[bytes, Values] = {}
        self._about: dict[str, str] = {}
        self._keys_PK: list[list[bytes]] = []
        self._has_warned = False

    def state_dict(self) -> dict[str, Any]:
        """Nothing, for whoever saves what a module holds: the cache has it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is left to do."""

    def __getstate__(self) -> dict[str, Any]:
        names = [name for name in self.__slots__ if name != "__weakref__"]
        return {name: getattr(self, name) for name in names} | {"_data": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def is_of(self, data: Any) -> bool:
        """Whether it has the values of this datamodule, asked in this run."""
        return self._data is not None and self._data() is data

    def forget_data(self) -> None:
        """Ask the datamodule anew: a run begins, and it may have other data by now."""
        self._data = None

    def fill(
        self,
        trainer: pl.Trainer,
        data: NumbersCompletions,
        reference: Mapping[str, str],
        prepare: Callable[[], None],
        score: Score,
        *,
        together: bool = False,
    ) -> None:
        """Read the values of a run's data; compute and keep those that are lacking. Collective.

        Args:
            trainer: Of the run.
            data: Its datamodule.
            reference: All that decides the values, see ``ReferenceCache``.
            prepare: Called before the first of all scores; never, if nothing is lacking.
            score: Log-probabilities of the predicted tokens of each row; also given is for how many
                rows it must call the reference.
            together: Whether no rank can call it alone.

        Raises:
            ValueError: What ``prepare`` or ``score`` raises, on every rank.
        """
        samples = data.completions()
        keys_PK = [[completion_key(*row) for row in sample] for sample in samples]
        pairs = zip(keys_PK, samples, strict=True)
        rows: Piece = {
            key: row for keys, sample in pairs for key, row in zip(keys, sample, strict=True)
        }
        cache = ReferenceCache(self.url, reference)
        lengths = {key: num_predicted(*row) for key, row in rows.items()}
        kept = self._values if self._about == reference else {}
        values = kept | cache.read(lengths)
        if lacking := _lacking(trainer, rows, values):
            prepare()
            shares = _shares(lacking, trainer.global_rank, trainer.world_size, together)
            values |= self._computed(trainer, cache, shares, score, together=together)
        self._values = {key: values[key] for key in rows}
        self._keys_PK, self._data, self._about = keys_PK, ref(data), dict(reference)

    def _computed(
        self,
        trainer: pl.Trainer,
        cache: ReferenceCache,
        shares: Sequence[tuple[Piece, int]],
        score: Score,
        *,
        together: bool,
    ) -> dict[bytes, Values]:
        """The values of all ranks' shares, of which each computes and keeps its own."""
        computed: dict[bytes, Values] = {}
        problem: str | None = None
        with _bar(trainer, sum(len(piece) for piece, _ in shares)) as bar:
            for piece, calls in shares:
                found: dict[bytes, Values] = {}
                try:
                    found = dict(zip(piece, score([*piece.values()], calls), strict=True))
                except ValueError as error:  # told to all: the others wait for this rank
                    problem = str(error)
                if together:  # before anybody asks on, alone
                    problem = next(filter(None, of_every_rank(trainer, problem)), None)
                if problem is not None:
                    break
                if found:
                    self._keep(cache, found)
                computed |= found
                bar.update(len(piece))
        everyone = of_every_rank(trainer, (computed, problem))
        for _, told in everyone:
            if told:
                raise ValueError(told)
        return {key: values for found, _ in everyone for key, values in found.items()}

    def _keep(self, cache: ReferenceCache, values: Mapping[bytes, Values]) -> None:
        try:
            cache.write(values)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{self.where}(ref_cache_dir={self.url!r}): cannot be written"
                    f" ({error.strerror or error}); training goes on, and the next run computes"
                    " the reference's values again",
                    stacklevel=2,
                )

    def scored(self, batch: Mapping[str, Tensor]) -> CompletionLogps:
        """The completions of a batch under the reference; what only the policy is asked is nan.

        Args:
            batch: ``number`` (P,), and ``input_ids``, ``attention_mask`` and ``completion_mask``
                (B, T), B = K P rows: the first row of each sample, then the second. A row without
                completion stays so.

        Raises:
            ValueError: If the batch is of other data.
        """
        if "number" not in batch:
            rule = "needs the 'number' of each sample in a batch"
            raise argument_error(self.where, "precompute_ref_log_probs", True, rule)
        numbers = [n for n in batch["number"].tolist() if n < len(self._keys_PK)]
        keys_PK = [self._keys_PK[number] for number in numbers]
        keys_B = [key for keys_P in zip(*keys_PK, strict=True) for key in keys_P]
        own_B = _keys_of_rows(batch)
        is_other = len(own_B) != len(keys_B) or any(
            own not in (None, key) for own, key in zip(own_B, keys_B, strict=False)
        )
        if is_other:  # the Trainer's datamodule may not be whom its loaders are of
            rule = "a batch has other tokens than the data that the reference was asked about"
            way_out = "Give the Trainer the datamodule, as datamodule=..., in the place of loaders"
            raise argument_error(self.where, "precompute_ref_log_probs", True, rule, way_out)
        completion_BT = batch["completion_mask"][:, 1:].bool()
        mask_BT = completion_BT.cpu()
        parts = [self._values[key] for key in own_B if key is not None]
        logps_BT = torch.zeros(mask_BT.shape, dtype=torch.float32)  # default may be bf16
        logps_BT[mask_BT] = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts]))
        logps_BT = logps_BT.to(completion_BT.device)
        unknown_B = torch.full_like(logps_BT[:, 0], torch.nan)
        return CompletionLogps(
            logps_B=logps_BT.sum(1),
            lengths_B=completion_BT.sum(1),
            entropy_B=unknown_B,
            mean_logit_B=unknown_B,
            top1_B=unknown_B,
            token_logps_BT=logps_BT,
            completion_BT=completion_BT,
        )


def _keys_of_rows(batch: Mapping[str, Tensor]) -> list[bytes | None]:
    """What each row's completion is found by; None of rows without one."""
    names = "input_ids", "attention_mask", "completion_mask"
    keys: list[bytes | None] = []
    for ids_T, *masks in zip(*(batch[name].cpu().numpy() for name in names), strict=True):
        is_row_T, is_completion_T = (mask_T != 0 for mask_T in masks)
        prompt, completion = ids_T[is_row_T & ~is_completion_T], ids_T[is_completion_T]
        keys.append(completion_key(prompt, completion) if len(completion) else None)
    return keys


def _lacking(trainer: pl.Trainer, rows: Piece, values: Mapping[bytes, Values]) -> list[Piece]:
    """What is to be computed, in pieces; the same on every rank.

    A file system need not be shared: what one rank does not see is computed for all.
    """
    keys = list(rows)
    own = np.array([key in values for key in keys], dtype=bool)
    seen = np.unpackbits(
        np.bitwise_and.reduce(of_every_rank(trainer, np.packbits(own))), count=len(keys)
    )
    found = ({keys[i]: rows[keys[i]] for i in piece if not seen[i]} for piece in pieces(len(keys)))
    return [piece for piece in found if piece]


def _shares(
    lacking: Sequence[Piece], rank: int, world_size: int, together: bool
) -> list[tuple[Piece, int]]:
    """A rank's pieces, every so-manieth, and for how many rows it must call the reference.

    Together each rank has as many pieces, of which some may be empty.
    """
    rounds = [lacking[start : start + world_size] for start in range(0, len(lacking), world_size)]
    shares = [(pieces[rank] if rank < len(pieces) else {}, pieces) for pieces in rounds]
    if together:
        return [(piece, max(map(len, pieces))) for piece, pieces in shares]
    return [(piece, len(piece)) for piece, _ in shares if piece]


def _bar(trainer: pl.Trainer, total: int) -> Any:
    return tqdm(
        desc="reference log-probabilities",
        total=total,
        unit=" completions",
        delay=BAR_DELAY_S,
        disable=trainer.global_rank > 0 or trainer.progress_bar_callback is None,
    )


@torch.no_grad()
def score_rows(
    layers: ModelLayers,
    rows: Sequence[Row],
    *,
    calls: int,
    batch_size: int,
    chunk_size: int | None,
    device: torch.device,
    where: str,
) -> list[Values]:
    """Log-probability of each predicted completion token of rows.

    Args:
        layers: The reference.
        rows: Prompts with their completions. Which of them run together follows from their
            lengths and order.
        calls: For how many rows the reference is called. Behind the last batch of ``rows`` it is
            called for one row of one token, as other ranks need this one to gather its layers.
        batch_size: Rows that run together.
        chunk_size: Rows whose logits exist at a time, see ``linear_logprobs``.
        device: Where the reference is.
        where: Class the user called.

    Raises:
        ValueError: If one is not finite, once all calls are done.
    """
    lowest: float | None = None
    longest_first = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
    values: dict[int, Values] = {}
    for start in range(0, len(rows), batch_size):
        places = longest_first[start : start + batch_size]
        ids_BT, mask_BT = (each.to(device) for each in _collate([rows[i] for i in places]))
        hidden_BTD = layers.hidden_states(ids_BT)  # padded on the right: no token looks there
        scored = completion_logps(
            hidden_BTD, layers.head, ids_BT, mask_BT, chunk_size=chunk_size, statistics=False
        )
        logps_N = scored.token_logps_BT[mask_BT[:, 1:].bool()].float().cpu().numpy()
        if not np.isfinite(logps_N).all():
            lowest = float(logps_N.min())
        ends = np.cumsum(scored.lengths_B.tolist())[:-1]
        values |= zip(places, np.split(logps_N, ends), strict=True)
    for _ in range(-(-len(rows) // batch_size), -(-calls // batch_size)):
        layers.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=device))
    if lowest is not None:
        rule = "must be finite; the reference gives some completion no probability, or is broken"
        raise argument_error(where, "reference.logps_B", lowest, rule)
    return [values[i] for i in range(len(rows))]


def _collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Tokens, filled up on the right with any, and 1 on those of the completions; each (B, T)."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for i, (prompt, completion) in enumerate(rows):
        begin, end = len(prompt), len(prompt) + len(completion)
        ids_BT[i, :end] = torch.from_numpy(np.concatenate([prompt, completion]))
        mask_BT[i, begin:end] = 1
    return ids_BT, mask_BT
