"""docs/composition.md says what the laws of this session have found, cell by cell."""

from tests.laws.composition import FINDINGS, PAGE, is_written_now, read, render


def test_the_page_is_what_the_laws_found() -> None:
    if is_written_now():
        PAGE.write_text(render(FINDINGS))
    page = read(PAGE.read_text())
    way_out = "Run: make composition"
    assert {key: page.get(key) for key in FINDINGS} == FINDINGS, way_out


def test_a_table_is_read_as_it_was_written() -> None:
    findings = {
        ("Callbacks", "A", "B"): "any order, resumes",
        ("Callbacks", "B", "C"): "refuses",
        ("Optimizers and modules", "A", "C"): "no: it is lost",
    }
    assert read(render(findings)) == findings
