"""docs/composition.md says what the laws of this session have found, cell by cell."""

from pathlib import Path

import pytest

from tests.laws.composition import FINDINGS, PAGE, is_written_now, read, render


def test_the_page_is_what_the_laws_found(request: pytest.FixtureRequest) -> None:
    if is_written_now():
        known = {} if every_law_was_run(request) else read(PAGE.read_text())
        PAGE.write_text(render(known | FINDINGS))
    page = read(PAGE.read_text())
    way_out = "run: make composition"
    if every_law_was_run(request):
        assert page == FINDINGS, way_out
    for key, cell in FINDINGS.items():
        assert set(cell.split(", ")) <= set(page.get(key, "").split(", ")), way_out


def every_law_was_run(request: pytest.FixtureRequest) -> bool:
    folder = Path(__file__).parent
    run = {item.path for item in request.session.items}
    chosen = any(request.config.getoption(name) for name in ("keyword", "deselect", "markexpr"))
    return not chosen and set(folder.glob("test_*.py")) <= run


def test_a_table_is_read_as_it_was_written() -> None:
    findings = {
        ("Callbacks", "A", "B"): "any order, resumes",
        ("Callbacks", "B", "C"): "refuses",
        ("Optimizers and modules", "A", "C"): "no: it is lost",
    }
    assert read(render(findings)) == findings
