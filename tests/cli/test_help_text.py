"""Help in the words of a reader, and without importing what it does not need."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lightning_align.__main__ import main
from lightning_align.cli.commands import COMMANDS, RUNS, overview
from lightning_align.cli.help_text import described, kind_of, plain

# What takes seconds to import.
HEAVY = ("torch", "lightning", "transformers", "numpy", "matplotlib")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


def imported(words: list[str]) -> set[str]:
    """The heavy modules of a process that prints a help."""
    code = (
        "import sys\nfrom lightning_align.__main__ import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [["--help"], []], ids=["help", "nothing"])
def test_the_overview_imports_nothing_heavy(words: list[str]) -> None:
    assert imported(words) == set()


@pytest.mark.parametrize(
    "name", ["generate", "export", "recipes", "check", "profile", "spikes", "plan", "demo"]
)
def test_the_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    assert imported([name, "--help"]) == set()


def test_the_overview_names_every_command() -> None:
    text = overview()
    for name in (*RUNS, *COMMANDS):
        assert f"\n    {name} " in text
    assert "--debug" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_no_help_reads_like_source(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, name, "--help")
    usage = text.partition("\n\n")[0]
    assert len(usage.splitlines()) <= 6, "an overview, not a list of everything"
    for mark in ("``", "Union[", "Optional[", "| null", "NoneType", "(type:", "Yield "):
        assert mark not in text


def test_the_help_of_a_class_says_what_it_is_and_its_arguments_once() -> None:
    """In a process of its own: it lists the classes that have been imported."""
    command = [sys.executable, "-m", "lightning_align", "fit", "--model.help", "PretrainModule"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = text.replace("__main__.py", "lightning-align")
    assert text.startswith("usage: --model PretrainModule [--model.ARGUMENT VALUE ...]\n")
    assert text.count("Next-token loss on packed text") == 1
    assert "arguments:" in text
    assert "--model.chunk_size INT" in text
    listed = re.findall(r"\w+", text.partition("Known classes:")[2])
    assert listed[0] in ("GaLoreAdamW", "Muon"), f"ours first: {listed[:9]}"
    for mark in ("``", "Union[", "known subclasses", "__main__", "Callable[", "(type:"):
        assert mark not in text
    assert len(text.splitlines()) < 100, "not a list of all of torch's modules"


@pytest.mark.parametrize(
    ("hint", "kind"),
    [
        (int, "INT"),
        (float | None, "NUMBER"),
        (str | Path, "TEXT|PATH"),
        (Literal["a", "b"], "a|b"),
        (list[int], "LIST"),
        (Callable[[Iterable], torch.optim.Optimizer] | None, "CLASS"),
        (Any, ""),
        (None, ""),
    ],
)
def test_kinds_of_values_in_a_word(hint: Any, kind: str) -> None:
    assert kind_of(hint) == kind


def test_marks_of_python_and_sphinx_are_left_out() -> None:
    text = "``None`` is :class:`~torch.optim.Adam`, or :func:`seed`, True."
    assert plain(text) == "null is Adam, or seed, true."


def test_a_description_ends_where_the_arguments_begin() -> None:
    def of() -> None:
        """What it does.

        How it does it.

        Args:
            nothing: At all.
        """

    assert described(of) == "What it does.\n\nHow it does it."
