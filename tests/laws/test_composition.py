"""docs/composition.md says what the laws of this session have found, cell by cell."""

from pathlib import Path

import pytest

from tests.laws import composition
from tests.laws.composition import (
    FINDINGS,
    PAGE,
    collected,
    is_written_now,
    note,
    read,
    render,
    shared_folder,
)


def test_the_page_is_what_the_laws_found(request: pytest.FixtureRequest) -> None:
    findings, all_of_them = FINDINGS, every_law_was_run(request)
    folder = shared_folder()
    if folder and {item.path for item in request.session.items} == {Path(__file__)}:
        findings, all_of_them = collected(folder), True  # the processes before this one ran them
    if is_written_now():
        known = {} if all_of_them else read(PAGE.read_text())
        PAGE.write_text(render(known | findings))
    page = read(PAGE.read_text())
    way_out = "run: make composition"
    if all_of_them:
        assert page == findings, way_out
    for key, cell in findings.items():
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


def test_processes_side_by_side_find_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composition, "FINDINGS", {})
    monkeypatch.setenv(composition.SHARED, str(tmp_path / "shared"))
    for law, finding in (("test_b", "resumes"), ("test_a", "exact"), ("test_a", "any order")):
        monkeypatch.setenv("PYTEST_CURRENT_TEST", f"tests/laws/{law}.py::test[x::y] (call)")
        note("Callbacks", "A", "B", finding)
    assert composition.FINDINGS == {("Callbacks", "A", "B"): "resumes, exact, any order"}
    assert collected(tmp_path / "shared") == {("Callbacks", "A", "B"): "exact, any order, resumes"}
