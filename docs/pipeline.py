"""Figure of the pipeline: ``python docs/pipeline.py`` writes ``docs/pipeline.svg``."""

from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

BOXES = [  # left, width, lines; the colour says whether training makes it
    (10, 96, ["image", "256 x 256"], False),
    (136, 122, ["backbone layers", "strides 4 to 32"], False),
    (288, 122, ["patch embeddings", "one grid a scale"], False),
    (440, 132, ["reconstruction", "of 5 nearest atoms"], False),
    (602, 122, ["residual maps", "one a scale"], False),
    (754, 136, ["anomaly map", "strides 4, 8, 16"], False),
]
HEIGHT, TOP = 52, 96
FONT = "font-family='sans-serif' font-size='13' text-anchor='middle'"


def box(left: float, top: float, width: float, lines: list[str], *, trained: bool) -> str:
    """SVG of a box with two lines of text."""
    fill, middle = "#fbe3cf" if trained else "#e3ebf3", left + width / 2
    rows = "".join(
        f"<text x='{middle}' y='{top + 22 + 17 * row}' {FONT} "
        f"fill='{'#222' if row == 0 else '#555'}'>{escape(line)}</text>"
        for row, line in enumerate(lines)
    )
    frame = f"x='{left}' y='{top}' width='{width}' height='{HEIGHT}' rx='6'"
    return f"<rect {frame} fill='{fill}' stroke='#789'/>{rows}"


def arrow(*points: tuple[float, float]) -> str:
    """SVG of an arrow through points."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='#456' marker-end='url(#head)'/>"


def main() -> None:
    """Write the figure."""
    centre = TOP + HEIGHT / 2
    parts = [box(left, TOP, width, lines, trained=made) for left, width, lines, made in BOXES]
    parts += [
        arrow((left + width, centre), (following, centre))
        for (left, width, *_), (following, *_) in pairwise(BOXES)
    ]
    parts += [
        box(288, 10, 122, ["subspace sampling", "k-center, one pass"], trained=True),
        box(440, 10, 132, ["memory banks", "atoms, one a scale"], trained=True),
        arrow((349, TOP), (349, 10 + HEIGHT)),
        arrow((410, 10 + HEIGHT / 2), (440, 10 + HEIGHT / 2)),
        arrow((506, 10 + HEIGHT), (506, TOP)),
        box(754, 10, 136, ["image score", "max, strides 8 to 32"], trained=False),
        arrow((663, TOP), (663, 10 + HEIGHT / 2), (754, 10 + HEIGHT / 2)),
        box(920, 96, 122, ["label and mask", "above thresholds"], trained=False),
        box(920, 10, 122, ["thresholds", "of good images"], trained=True),
        arrow((890, centre), (920, centre)),
        arrow((890, 10 + HEIGHT / 2), (905, 10 + HEIGHT / 2), (905, TOP + 12), (920, TOP + 12)),
        arrow((981, 10 + HEIGHT), (981, TOP)),
    ]
    head = (
        "<defs><marker id='head' markerWidth='8' markerHeight='8' refX='7' refY='3' orient='auto'>"
        "<path d='M0,0 L7,3 L0,6 z' fill='#456'/></marker></defs>"
    )
    figure = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1052 160' width='1052' height='160'>"
        f"<rect width='1052' height='160' fill='white'/>{head}{''.join(parts)}</svg>\n"
    )
    Path(__file__).with_name("pipeline.svg").write_text(figure, encoding="utf-8")


if __name__ == "__main__":
    main()
