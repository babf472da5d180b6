"""The script is what a shell takes, and answers a TAB."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from lightning_align.__main__ import main
from lightning_align.cli.commands import COMMANDS
from lightning_align.cli.completion import script
from tests.helpers.children import forget_package, in_child


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "lightning-align"
    path.write_text(script("bash"))
    return path


def answers(bash: Path, *words: str) -> set[str]:
    """What TAB offers after ``words``, the last of which is not finished."""
    found = re.search(r"^complete .*-F (\S+) lightning-align$", bash.read_text(), re.M)
    assert found, "the script registers a function for the command"
    line = " ".join(f"'{word}'" for word in ("lightning-align", *words))
    asked = (
        f"source {bash}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; {found[1]}"
        ' && printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    return set(done.stdout.split())


def test_is_valid_bash(bash: Path) -> None:
    subprocess.run(["bash", "-n", str(bash)], check=True)


def test_completes_commands(bash: Path) -> None:
    assert {"fit", "validate", "test", "predict", *COMMANDS} <= answers(bash, "")
    assert answers(bash, "gen") == {"generate"}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["fit", "--trainer.max_st"], "--trainer.max_steps"),
        (["fit", "--data.block"], "--data.block_size"),
        (["fit", "--model.optimizer.w"], "--model.optimizer.weight_decay"),
        (["fit", "--model", "Pre"], "PretrainModule"),
        (["fit", "--data", "Pref"], "PreferenceDataModule"),
        (["fit", "--trainer.strategy", "dd"], "ddp"),
        (["fit", "--trainer.callbacks+", "SaveP"], "SavePretrained"),
        (["generate", "--max"], "--max_new_tokens"),
        (["export", "--over"], "--overwrite"),
    ],
)
def test_completes(bash: Path, words: list[str], offered: str) -> None:
    assert offered in answers(bash, *words)


def test_commands_without_a_trainer_offer_none_of_its_options(bash: Path) -> None:
    assert answers(bash, "export", "--tr") == {"--trust_remote_code"}


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "dos"])
    assert "completion(shell='dos'): must be one of bash, zsh" in str(stopped.value)


COMPLETION, *OTHERS = [["completion", "bash"], ["--help"], ["completion", "--help"]]


@pytest.fixture(scope="module")
def without_shtab(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, str, str]]:
    """What `main` exits with and writes, where shtab cannot be imported."""
    result = tmp_path_factory.mktemp("without") / "result.json"

    def run() -> None:
        for package in ("jsonargparse", "lightning", "lightning_align", "shtab"):
            forget_package(package)
        sys.modules["shtab"] = None  # type: ignore[assignment]
        from lightning_align.__main__ import main

        ends = []
        for arguments in (COMPLETION, *OTHERS):
            out, err, code = io.StringIO(), io.StringIO(), None
            with redirect_stdout(out), redirect_stderr(err):
                try:
                    main(arguments)
                except SystemExit as stopped:
                    code = stopped.code
            ends.append((code or 0, out.getvalue(), err.getvalue()))
        result.write_text(json.dumps(ends))

    assert in_child(run) == 0
    return [tuple(end) for end in json.loads(result.read_text())]


def test_without_shtab_the_way_out_is_named(
    without_shtab: list[tuple[object, str, str]],
) -> None:
    # A text that Python writes to stderr, with exit code 1.
    assert without_shtab[0] == (
        "lightning-align: completion(shell='bash'): needs shtab."
        " Run: pip install 'lightning-align[completion]'.\nWhere it was raised: add --debug.",
        "",
        "",
    )


@pytest.mark.parametrize("number", range(1, 1 + len(OTHERS)), ids=map(" ".join, OTHERS))
def test_all_else_works_without_shtab(
    without_shtab: list[tuple[object, str, str]], number: int
) -> None:
    code, out, err = without_shtab[number]
    assert code == 0, err
    assert "completion" in out
