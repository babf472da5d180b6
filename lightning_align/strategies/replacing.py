"""Putting a new checkpoint, file or folder, in the place of an old one; a kill loses neither.

A folder cannot be replaced at once where the old one is not empty. So the new one is written beside
it and takes three names in turn, each by one rename, which happens or does not:

``.NAME.unfinished``  whatever it is, it may be deleted
``.NAME.new``         the new one, whole; from here on it is the checkpoint
``NAME``              its place, once the old one is ``.NAME.old``

Whatever is under one of the last three names is whole. What a killed run left half done is finished
by the next save, and until then found by :func:`whereabouts`.
"""

import os
import shutil
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Where the new checkpoint is written that will stand at ``path``."""
    return path.with_name(f".{path.name}.unfinished")


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def whereabouts(path: Path) -> Path:
    """Where the newest whole checkpoint of a path is, also after a kill."""
    places = [_new(path), path, _old(path)] if path.name else []
    return next((place for place in places if os.path.lexists(place)), path)


def empty_places(folder: Path) -> list[Path]:
    """Where in a folder a killed run has yet to put a whole checkpoint, which no listing shows."""
    places = [new.with_name(new.name[1:-4]) for new in folder.glob(".*.ckpt.new")]
    return sorted(place for place in places if not os.path.lexists(place))


def begin(path: Path) -> Path:
    """Make an empty folder to write a new checkpoint into, and return where."""
    finish(path)
    folder = unfinished(path)
    folder.mkdir(parents=True)
    return folder


def end(path: Path) -> None:
    """What was written to ``unfinished(path)`` is whole: put it in its place."""
    os.replace(unfinished(path), _new(path))
    finish(path)


def remove(path: Path) -> None:
    """Delete a checkpoint; if that is interrupted, nothing of it is left in its place."""
    finish(path)
    _discard(path, path)


def finish(path: Path) -> None:
    """Do what a killed run has left to do, from whatever point on."""
    new, old = _new(path), _old(path)
    if os.path.lexists(new):
        if os.path.lexists(path):
            _discard(old, path)
            os.replace(path, old)
        os.replace(new, path)
    elif not os.path.lexists(path) and os.path.lexists(old):
        os.replace(old, path)
    _discard(old, path)
    _delete(unfinished(path))


def _discard(place: Path, path: Path) -> None:
    """Delete what is whole: half of it must never be found under its name."""
    if os.path.lexists(place):
        _delete(unfinished(path))
        os.replace(place, unfinished(path))
        _delete(unfinished(path))


def _delete(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
