"""What a newcomer gets wrong: a path, a type, a name, a pairing, a file or a value.

Each mistake of the list ends before anything is trained, in at most three lines that say where it
is, which rule is broken, and what to do. Every public class is in it.
"""

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.optim.optimizer import register_optimizer_step_post_hook

import lightning_align as la
from tests.laws.material import make_material
from tests.mistakes.desk import Desk, M
from tests.mistakes.files import FILES
from tests.mistakes.names import NAMES
from tests.mistakes.pairings import PAIRINGS
from tests.mistakes.paths import PATHS
from tests.mistakes.types_given import TYPES
from tests.mistakes.values import VALUES

KINDS = {
    "path": PATHS,
    "type": TYPES,
    "name": NAMES,
    "pairing": PAIRINGS,
    "file": FILES,
    "value": VALUES,
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(make_material(tmp_path_factory.mktemp("desk")))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What of a training there was, in any Trainer."""
    found: Counter[str] = Counter()
    handle = register_optimizer_step_post_hook(lambda *_: found.update(["step of an optimizer"]))
    end = _TrainingEpochLoop.on_advance_end
    counted = lambda *given: (found.update(["batch"]), end(*given))  # noqa: E731
    monkeypatch.setattr(_TrainingEpochLoop, "on_advance_end", counted)
    yield found
    handle.remove()


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(each, id=f"{kind}-{each.classes.replace(' ', '+')}-{each.names}")
        for kind, mistakes in KINDS.items()
        for each in mistakes
    ],
)
def test_ends_before_training_in_three_lines(
    mistake: M,
    desk: Desk,
    trained: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(desk.folder)
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as caught:
        mistake.make(desk)
    message = str(caught.value)
    if caught.type is SystemExit:  # of the command line, which says where in another form
        program, message = capsys.readouterr().err.split(": ", 1)
        message = f"{program}({message.replace(': ', '): ', 1)}"
    assert len(message.splitlines()) <= 3, message
    assert re.match(r"[\w.-]+\(.*\): .+[.?]", message, re.DOTALL), message
    assert mistake.names in message.partition("): ")[0], message
    assert not trained, f"{message}: {trained}"


# What functions return, and nobody builds.
RETURNED = {
    "Commit",
    "CompletionLogps",
    "FirstLoss",
    "Mean",
    "PairAttention",
    "SaveError",
    "SaveResult",
}


def public_classes() -> dict[str, type]:
    found = {}
    for info in [None, *pkgutil.iter_modules(la.__path__)]:
        room = importlib.import_module("lightning_align" + (f".{info.name}" if info else ""))
        for name in getattr(room, "__all__", ()):
            if isinstance(kind := getattr(room, name), type):
                found[name] = kind
    return found


def test_the_list_is_long_and_touches_every_public_class() -> None:
    assert min(map(len, KINDS.values())) >= 10
    listed = [mistake for mistakes in KINDS.values() for mistake in mistakes]
    assert len(listed) >= 60
    touched = {name for mistake in listed for name in mistake.classes.split()}
    assert public_classes().keys() - touched == RETURNED
