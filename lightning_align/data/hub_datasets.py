"""Tables of the ``datasets`` library: folders that ``save_to_disk`` wrote, and datasets on the hub.

They stay on the disk, memory-mapped. Datasets is imported inside the functions: it costs seconds.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from lightning_align.data.hub import ask_hub
from lightning_align.data.tables import ROWS_AT_ONCE, Error, Row, extra_error, without_nulls

DATASET_FILES = ("state.json", "dataset_info.json")
DICT_FILE = "dataset_dict.json"  # in the folder of a DatasetDict, beside one folder per split

# owner/name, owner/name:split or owner/name/configuration:split; a split may be sliced.
HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:(?:/(?P<config>[\w.-]+))?:(?P<split>\w[\w.-]*(\[[^\]]+\])?))?"
)


def is_saved(filesystem: Any, folder: str) -> bool:
    """Whether ``save_to_disk`` wrote this folder, as a Dataset or a DatasetDict."""
    return any(filesystem.isfile(posixpath.join(folder, n)) for n in (*DATASET_FILES, DICT_FILE))


def load_saved(url: str, error: Error) -> Any:
    """The dataset of a folder.

    Args:
        url: Folder that ``save_to_disk`` wrote.
        error: Makes an error of a rule and a way out.

    Raises:
        ValueError: If it is the folder of several splits, or a part of it is missing or broken.
    """
    datasets = _datasets(error)
    filesystem, folder = fsspec.core.url_to_fs(url)
    present = [n for n in DATASET_FILES if filesystem.isfile(posixpath.join(folder, n))]
    if filesystem.isfile(posixpath.join(folder, DICT_FILE)):
        if present:
            rule = f"must be one dataset, but it holds both {present[0]} and {DICT_FILE}"
            raise error(rule, "Save either of them to a folder of its own")
        try:
            with filesystem.open(posixpath.join(folder, DICT_FILE), "rb") as stream:
                splits = list(json.load(stream)["splits"])
        except (ValueError, LookupError, TypeError, RecursionError) as problem:
            raise error(f"its {DICT_FILE} cannot be read ({type(problem).__name__})", "") from None
        rule = f"is a DatasetDict, and one split must be named; it has {_listed(splits)}"
        raise error(rule, f"Give {url.rstrip('/')}/{_training(splits)}")
    try:
        return datasets.load_from_disk(url, keep_in_memory=False)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as problem:
        rule = f"datasets cannot load this folder ({type(problem).__name__}: {problem})"
        raise error(rule, "Save it anew with save_to_disk") from problem


def load_hub(url: str, error: Error) -> Any:
    """The dataset of a name on the hub, downloaded once.

    Args:
        url: owner/name, owner/name:split or owner/name/configuration:split; the split is train
            unless it is named.
        error: Makes an error of a rule and a way out.

    Raises:
        ValueError: If it is neither cached nor found on the hub, or has no such split.
    """
    datasets = _datasets(error, "is neither a local file nor folder; on the hub, ")
    parts = HUB_NAME.fullmatch(url)
    assert parts is not None, url
    name, config, split = parts["name"], parts["config"], parts["split"] or "train"
    with _offline_if(datasets, _unreachable(datasets, name, error)):
        try:
            builder = datasets.load_dataset_builder(name, config)
            builder.download_and_prepare()
        except Exception as problem:
            # Every HTTP client and every reader of files has its own exceptions.
            told = " ".join(str(problem).split()).rstrip(".")
            rule = f"datasets cannot load it ({type(problem).__name__}: {told})"
            way_out = "Form: owner/name, owner/name:split or owner/name/configuration:split"
            raise error(rule, way_out) from problem
    splits = list(builder.info.splits)
    if split.partition("[")[0] not in splits:
        rule = f"has no split {split!r}; it has {_listed(splits)}"
        named = f"{name}/{config}" if config else name
        raise error(rule, f"Name one, as in {named}:{_training(splits)}")
    try:
        return builder.as_dataset(split)
    except (ValueError, AssertionError) as problem:
        raise error(f"datasets cannot read the split {split!r} ({problem})", "") from None


def table_rows(table: Any, columns: Sequence[str] | None) -> Iterator[Row]:
    """Rows of a dataset, whatever format was set on it; ``columns`` are those to be looked at."""
    table = table.with_format(None)
    if columns is not None and set(columns) <= set(table.column_names):
        table = table.select_columns(list(columns))
    for batch in table.iter(ROWS_AT_ONCE):
        for cells in zip(*batch.values(), strict=True):
            yield without_nulls(dict(zip(batch, cells, strict=True)))


def table_hash(table: Any) -> str:
    """Hash of the rows as they are stored; the files are read once, piece by piece."""
    digest = hashlib.blake2b(repr((table.features, len(table))).encode(), digest_size=16)
    for file in table.cache_files:
        with Path(file["filename"]).open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _datasets(error: Error, otherwise: str = "") -> Any:
    try:
        import datasets
    except ImportError:
        raise extra_error("datasets", error, otherwise) from None
    return datasets


def _unreachable(datasets: Any, name: str, error: Error) -> bool:
    """Whether the hub cannot give a dataset that is cached; raises if it is not cached either."""
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    problem = "HF_HUB_OFFLINE forbids to ask the hub" if offline else ask_hub("dataset", name)
    if problem is None:
        return False
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    owner, _, short = name.partition("/")
    folder = cache / f"{owner}___{datasets.naming.camelcase_to_snakecase(short)}"
    if not any(folder.glob("*/*/*")):
        rule = f"is neither a local file nor folder, nor a dataset in the cache {cache}"
        raise error(f"{rule}, and {problem}", "Correct the path, or fill the cache while online")
    return True


@contextmanager
def _offline_if(datasets: Any, offline: bool) -> Iterator[None]:
    """Keep ``datasets`` from asking, again and again, a hub that has just failed to answer."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _training(splits: Sequence[str]) -> str:
    """The split that somebody who named none may well have meant."""
    return "train" if "train" in splits else next(iter(splits), "split")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
