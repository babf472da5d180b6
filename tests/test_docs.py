"""What the documentation claims about the repository."""

import re
from pathlib import Path

import pytest

import lightning_align

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_that_the_docs_name_exists():
    """The paper index, the contract and the benchmarks point into the tree by path."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    named = {
        (path, page.name)
        for page in pages
        for path in re.findall(
            r"\b(?:lightning_align|tests|benchmarks|examples)/[\w/.*-]+\.\w+", page.read_text()
        )
    }
    assert len(named) > 10
    missing = sorted((path, page) for path, page in named if not list(ROOT.glob(path)))
    assert missing == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"[\w_]+\.md", navigation)) == pages


# Pages of what one may pick: what for, a few lines, when not; then the rest, and the reference at
# the end.
TECHNIQUES = [
    "async_checkpoint",
    "curriculum",
    "conversation_data",
    "dpo",
    "exact_resume",
    "generate_samples",
    "lisa",
    "metric_plot",
    "optimizers",
    "pipeline",
    "planner",
    "preference_data",
    "preference_diagnostics",
    "pretrain",
    "roofline",
    "save_pretrained",
    "spike_guard",
    "stability",
    "text_data",
    "token_schedule",
    "zero_infinity",
]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_page_says_first_what_it_is_for_and_last_what_its_arguments_are(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    headings = re.findall(r"^## (.*)", page, flags=re.MULTILINE)
    assert headings[:2] == ["In a few lines", "When not to use it"]
    introduction = page.partition("\n## ")[0]
    assert len(introduction.split()) > 30
    before, _, reference = page.partition("\n## Reference\n")
    assert ":::" not in before
    assert name == "stability" or reference.lstrip().startswith(":::")


def test_a_technique_in_the_readme_is_a_line_of_the_users_and_the_line_instead():
    readme = (ROOT / "README.md").read_text()
    diffs = re.findall(r"```diff\n(.*?)```", readme, flags=re.DOTALL)
    assert len(diffs) >= 11
    for diff in diffs:
        assert {line[0] for line in diff.splitlines()} == {"-", "+"}
    lines = [line[1:] for diff in diffs for line in diff.splitlines() if line[0] == "+"]
    lightnings = {"Trainer", "ModelParallelStrategy"}
    named = set(re.findall(r"\b[A-Z]\w+(?=\()", "\n".join(lines))) - lightnings
    assert len(named) >= 8
    assert named <= set(lightning_align.__all__)
    assert readme.count("![") <= 4
