"""What the documentation claims about the repository."""

import re
from pathlib import Path

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


def test_options_of_a_snippet_are_in_braces():
    """Written as ```python notest, the site reads no fence there, and one where it ends."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    wrong = [
        (page.name, line)
        for page in pages
        for line in page.read_text().splitlines()
        if re.match(r"\s*```\w+ ", line)
    ]
    assert wrong == []
