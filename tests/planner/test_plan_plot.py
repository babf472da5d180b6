"""Plans as bars."""

from pathlib import Path

from lightning_align.planner import ModelSpec, ParallelSpec, Planner
from lightning_align.planner.plan_plot import draw_plans


def test_a_picture_has_a_bar_for_each_plan(tmp_path: Path) -> None:
    model = ModelSpec(4, 256, 4, vocab_size=1000, seq_len=128)
    plans = [Planner(name).predict(model, ParallelSpec()) for name in ("h100", "a100")]
    path = tmp_path / "plans.svg"
    draw_plans(path, plans)
    text = path.read_text()
    assert text.startswith("<?xml")
    assert all(f"{word}" in text for word in ("weights", "seconds a step", "h100-sxm"))
