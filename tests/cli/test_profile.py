"""lightning-align profile: what it takes, and what it refuses before anything is built."""

import pytest

from lightning_align.__main__ import main
from lightning_align.cli.profile import Profile, divided, parser


def test_own_words_are_told_from_those_of_fit() -> None:
    words = [
        "-c",
        "run.yaml",
        "--steps",
        "3",
        "--model.lr=1",
        "--png=a.png",
        "--meta",
        "--trace",
        "t",
    ]
    own, others = divided(words)
    assert own == ["--steps", "3", "--png=a.png", "--meta", "--trace", "t"]
    assert others == ["-c", "run.yaml", "--model.lr=1"]
    assert divided(["--meta", "false", "-c", "x"]) == (["--meta", "false"], ["-c", "x"])


def test_each_option_has_its_line_of_help() -> None:
    given = parser().parse_args(["--meta", "--steps=7"])
    assert Profile(**given.as_dict()) == Profile(steps=7, meta=True)
    text = parser().format_help()
    assert "Optimizer steps whose time is taken" in text
    assert "Chrome trace" in text


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"steps": 0}, "steps=0.*at least 1"),
        ({"top_k": 0}, "top_k=0.*at least 1"),
        ({"png": "nowhere/at/all.png"}, "its folder is not there"),
    ],
)
def test_bad_options(options: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Profile(**options)  # type: ignore[arg-type]


def test_a_mistake_ends_in_its_message() -> None:
    with pytest.raises(SystemExit, match=r"profile\(steps=0\): must be at least 1"):
        main(["profile", "--steps", "0"])
