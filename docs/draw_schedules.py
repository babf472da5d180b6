"""Draw docs/images/pipeline_<schedule>.png: the schedules of docs/pipeline_schedules.md.

By hand: `python docs/draw_schedules.py`. The measured one is drawn by
`benchmarks/pipeline/simulator.py --picture`.
"""

from pathlib import Path

from lightning_align.pipelining import simulate

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Draw each schedule on 4 ranks with 8 microbatches, T_F = T_B = T_W."""
    for name in ("GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"):
        simulate(name, 4, 8).to_png(IMAGES / f"pipeline_{name.lower()}.png")


if __name__ == "__main__":
    main()
