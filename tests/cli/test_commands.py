"""The commands beside Lightning's: each is there, and tells mistakes in a line."""

import pytest

from lightning_align.cli.commands import COMMANDS, CommandParser


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_parser_of_its_name(name):
    command = COMMANDS[name]
    module = command.load()
    assert command.help.endswith(".")
    assert callable(module.main)
    assert module.parser().prog == f"lightning-align {name}"


def test_a_mistake_is_told_in_a_line_and_exits_with_2(capsys):
    parser = CommandParser("here", "What it does.")
    parser.add_argument("--temperature", type=float, default=1.0, help="How hot.")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--temperatur", "2"])
    assert end.value.code == 2
    mistake, way_out = capsys.readouterr().err.strip().splitlines()
    assert mistake.endswith("no such option. Did you mean --temperature?")
    assert "here --help" in way_out


def test_no_prefix_stands_for_an_option():
    parser = CommandParser("here", "What it does.")
    parser.add_argument("--temperature", type=float, default=1.0, help="How hot.")
    with pytest.raises(SystemExit):
        parser.parse_args(["--temp", "2"])
