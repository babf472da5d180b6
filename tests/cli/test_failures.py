"""What ends a command is told in two lines, with the traceback on request."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_align._errors import argument_error
from lightning_align.cli.failures import (
    DEBUG,
    debug_if_asked,
    debugging,
    in_a_line,
    readers_may_leave,
    refusals_told,
)


class Picky:
    """A class of somebody else's, with an error of its own."""

    def __init__(self, size: int = 1) -> None:
        if size < 1:
            raise KeyError("size\n  must be positive")


def raised(error: Exception, cause: Exception | None = None) -> Callable[[], None]:
    def run() -> None:
        raise error from cause

    return run


def told(run: Callable[[], object], everything: bool = False) -> str:
    with pytest.raises(SystemExit) as end, refusals_told("here", everything=everything):
        run()
    assert len(str(end.value).splitlines()) == 2
    return str(end.value)


def test_a_refusal_is_told_wherever_in_the_chain_it_is() -> None:
    refused = argument_error("Muon", "lr", -1, "must be positive")
    text = told(raised(RuntimeError("outer"), refused))
    assert text.startswith("here: Muon(lr=-1): must be positive.\n")


def test_a_constructor_in_a_union_of_types_is_named_with_its_error() -> None:
    """jsonargparse makes of it 20 lines, and the cause is the error of another type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--thing", type=int | Picky | list[Picky])
    name = f"{__name__}.Picky"
    config = parser.parse_args([f"--thing={name}", "--thing.size=0"])
    text = told(lambda: parser.instantiate(config), everything=True)
    assert text.startswith("here: Picky: KeyError: 'size\\n must be positive'")


def test_an_optimizer_that_is_built_when_the_run_has_begun_is_named() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    config = parser.parse_args(["--optimizer=torch.optim.AdamW", "--optimizer.lr=-1"])

    def run() -> None:
        build = parser.instantiate(config).optimizer
        build([torch.nn.Parameter(torch.ones(1))])

    assert told(run).startswith("here: AdamW: Invalid learning rate: -1.0\n")


def test_a_misconfiguration_of_lightning_is_the_users() -> None:
    assert told(raised(MisconfigurationException("no GPU"))).startswith("here: no GPU\n")


def test_an_error_of_the_run_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"), refusals_told("here"):
        raise RuntimeError("a bug")
    assert told(raised(RuntimeError("while building")), everything=True).startswith(
        "here: RuntimeError: while building"
    )


def test_debug_is_taken_out_of_the_words_and_shows_the_traceback() -> None:
    before = dict(os.environ)
    with debug_if_asked(["fit", DEBUG, "-c", "run.yaml"]) as words:
        assert words == ["fit", "-c", "run.yaml"]
        assert debugging()
        with pytest.raises(ValueError, match="must be positive"), refusals_told("here"):
            raise argument_error("Muon", "lr", -1, "must be positive")
    assert not debugging()
    assert dict(os.environ) == before


def test_a_long_message_is_cut() -> None:
    line = in_a_line(ValueError("many\n   words " * 100))
    assert line.startswith("many words many")
    assert line.endswith(" ...")
    assert len(line) < 420


@pytest.mark.parametrize("words", [["recipes"], ["--help"], ["export", "--help"]])
def test_a_reader_that_has_read_enough_ends_a_command_without_a_traceback(
    words: list[str],
) -> None:
    command = [sys.executable, "-m", "lightning_align", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)  # and not 120, Python's own at its end


def test_another_pipe_that_breaks_is_an_error() -> None:
    with pytest.raises(BrokenPipeError), readers_may_leave():
        raise BrokenPipeError
