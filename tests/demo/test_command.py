"""The options of the demo."""

import pytest

from lightning_align.demo.command import main, parser


def test_what_it_runs_with() -> None:
    options = parser().parse_args(["--fast", "--output", "elsewhere"])
    assert (options.fast, options.output, options.seed) == (True, "elsewhere", 0)


def test_a_wrong_option_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--fats"])
    assert end.value.code == 2
    assert "Did you mean --fast?" in capsys.readouterr().err
