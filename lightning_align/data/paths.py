"""What a user names as data: files, globs, folders, datasets on the hub, embedded corpora."""

from __future__ import annotations

import posixpath
import re
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import fsspec

from lightning_align._errors import argument_error
from lightning_align.data.columns import Columns
from lightning_align.data.corpora import EMBEDDED_CORPORA, embedded_path
from lightning_align.data.files import RECORD_SUFFIXES, InputFile, InputTable
from lightning_align.data.hub import ask_hub
from lightning_align.data.hub_datasets import HUB_NAME, is_saved

# The fsspec protocol that reads each kind of archive.
ARCHIVES = {".zip": "zip", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar"}
# Words in the names of files that are not for training: those of ``datasets``, and more.
_HELD_OUT = re.compile(
    "tests?|testing|testset|val|valid|validation|dev|development|evals?|evaluation|held|heldout"
    "|holdout"
)


def find_files(
    where: str, argument: str, paths: str | Sequence[str], columns: Columns | None = None
) -> list[InputFile]:
    """What ``paths`` names, in the order given: embedded corpora, files, globs, tables.

    A folder of Parquet is all of its files, unless some are of another split than train: these
    must be named. A table is a folder that ``datasets`` wrote with save_to_disk, or a dataset on
    the Hugging Face hub: owner/name, owner/name:split or owner/name/configuration:split. What
    exists locally is not looked up on the hub.

    Args:
        where: Class the user called.
        argument: Name of the argument that holds ``paths``.
        paths: One or several of them.
        columns: What the files call the columns that are looked at; None is as we do.

    Raises:
        ValueError: If a path names nothing.
    """
    columns = columns or Columns()
    files: list[InputFile] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if path in EMBEDDED_CORPORA:
            files.append(InputFile(where, argument, str(embedded_path(path)), columns))
        else:
            files += _expand(InputFile(where, argument, path, columns))
    if not files:
        raise argument_error(where, argument, paths, "must name at least one file")
    return files


def _expand(path: InputFile) -> list[InputFile]:
    url = path.url
    filesystem, stripped = _filesystem(path)
    if filesystem.isfile(stripped):
        _refuse_archive(path)
        return [path]
    if filesystem.isdir(stripped):
        if not is_saved(filesystem, stripped):
            if parquet := _one_split_of_parquet(filesystem, stripped):
                return [replace(path, url=_url_of(name, filesystem, url)) for name in parquet]
            rule = (
                "is a folder, and must be a file, or a folder that datasets' save_to_disk wrote, or"
                " one that holds Parquet of a single split"
            )
            inside = f"{url.rstrip('/')}/{_pattern(filesystem, stripped)}"
            raise path.error(rule, f"Name its files, for instance {inside!r}")
        return [InputTable(path.where, path.argument, url, path.columns)]
    if HUB_NAME.fullmatch(url) and path.suffix not in (".txt", *RECORD_SUFFIXES):
        return [InputTable(path.where, path.argument, url, path.columns, on_hub=True)]
    if any(character in stripped for character in "*?["):
        try:
            found = sorted(name for name in filesystem.glob(stripped) if filesystem.isfile(name))
        except FileNotFoundError:  # some file systems want the folder to be there
            found = []
        if not found:
            raise path.error("no file matches this pattern")
        return [replace(path, url=_url_of(name, filesystem, url)) for name in found]
    corpora = ", ".join(map(repr, EMBEDDED_CORPORA))
    way_out = f"Embedded corpora: {corpora}. A dataset on the hub has the form owner/name:split"
    raise path.error("is neither a file nor an embedded corpus", way_out)


def _filesystem(path: InputFile) -> tuple[Any, str]:
    """The file system that a path is on, and what the path is called there."""
    if path.url.startswith("hf://datasets/"):
        name = "/".join(path.url.removeprefix("hf://datasets/").split("/")[:2]).partition("@")[0]
        problem = ask_hub("dataset", name)
        if problem is not None:
            raise path.error(problem, "Correct the URL, or give a local file")
    try:
        filesystem, stripped = fsspec.core.url_to_fs(path.url)
    except FileNotFoundError as error:  # an archive, or what stands behind a first "::"
        raise path.error(f"no such file as {error.filename or error!s}") from None
    except (ImportError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise path.error(f"fsspec cannot open such a URL ({error})") from None
    return filesystem, stripped


def _url_of(name: str, filesystem: Any, pattern: str) -> str:
    """The URL of a file that a pattern has found."""
    first, chained, rest = pattern.partition("::")
    if chained and "://" not in first:  # simplecache::s3://bucket/*.jsonl
        return f"{first}::{_url_of(name, filesystem, rest)}"
    if chained:  # zip://*.jsonl::archive.zip
        return f"{first.partition('://')[0]}://{name}::{rest}"
    return str(filesystem.unstrip_protocol(name)) if "://" in pattern else name


def _refuse_archive(path: InputFile) -> None:
    """Say how files in an archive are named, if a path is one."""
    name = path.url.partition("::")[0]
    protocol = next((read for end, read in ARCHIVES.items() if name.endswith(end)), None)
    if protocol is None:
        return
    try:
        inside = _pattern(fsspec.core.url_to_fs(f"{protocol}://::{path.url}")[0], "")
    except (OSError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise path.error(f"must be a complete archive ({error})") from None
    way_out = f"Name files in it, for instance '{protocol}://{inside}::{path.url}'"
    raise path.error("is an archive", way_out)


def _one_split_of_parquet(filesystem: Any, folder: str) -> list[str]:
    """Its files in order, if all data are Parquet and no name is of data to be held out."""
    root = filesystem._strip_protocol(folder).rstrip("/")
    found: list[str] = []
    for_training: list[bool] = []
    for name in sorted(filesystem.find(folder)):
        inside = name.removeprefix(root).lstrip("/")
        if any(part.startswith((".", "_")) for part in inside.split("/")) or name.endswith(".md"):
            continue  # _SUCCESS, .part-0.parquet.crc: of those who write such folders
        words = re.split(r"[^a-z]+", inside.lower())
        if not name.endswith(".parquet") or any(map(_HELD_OUT.fullmatch, words)):
            return []
        found.append(name)
        for_training.append(not {"train", "training"}.isdisjoint(words))
    return found if all(for_training) or not any(for_training) else []


def _pattern(filesystem: Any, folder: str) -> str:
    """A pattern that most of the data in a folder match; of several splits, the training data."""
    root = filesystem._strip_protocol(folder).rstrip("/")
    names = [name.removeprefix(root).lstrip("/") for name in filesystem.find(folder, maxdepth=3)]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = InputFile("", "", name).suffix
        if kind in (".txt", *RECORD_SUFFIXES):
            end = name[name.rindex(kind) :]  # with a compression
            kinds.setdefault(end, []).append(name)
    if not kinds:
        return "*.txt"
    end, found = max(kinds.items(), key=lambda item: len(item[1]))
    within = "**/" if all("/" in name for name in found) else ""
    train = any(posixpath.basename(name).startswith("train") for name in found)
    return f"{within}{'train' if train else ''}*{end}"
