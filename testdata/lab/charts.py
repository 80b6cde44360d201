"""Line charts side by side, as an SVG that is read on light and on dark ground."""

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 300, 190  # of one chart's frame
LEFT, TOP, RIGHT, BOTTOM = 52, 66, 14, 46
# A series: x and y of each of its points.
Points = Sequence[tuple[float, float]]
# The series in their order: colours that stand out from white and from black.
COLOURS = ["#8b949e", "#2f81f7", "#d29922", "#a371f7"]
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a; }
.head { font-size: 13px; font-weight: 600; fill: #24292f; }
.grid { stroke: #d0d7de; }
.axis { stroke: #8c959f; }
@media (prefers-color-scheme: dark) {
  text { fill: #9da7b3; }
  .head { fill: #e6edf3; }
  .grid { stroke: #30363d; }
  .axis { stroke: #6e7681; }
}
"""


class Scale:
    """The places of an axis."""

    def __init__(self, low: float, high: float, length: float, log: bool = False) -> None:
        self.log = log
        self.low, self.length = self.place(low), length
        self.span = self.place(high) - self.low

    def place(self, value: float) -> float:
        return math.log2(value) if self.log else value

    def __call__(self, value: float) -> float:
        return (self.place(value) - self.low) / self.span * self.length


def steps(high: float) -> list[float]:
    """Round numbers from zero to `high` or a little more, at most six."""
    step = 10.0 ** math.floor(math.log10(high))
    step = next(step * part for part in (0.2, 0.5, 1, 2, 5) if high / (step * part) <= 5)
    return [step * i for i in range(math.ceil(high / step) + 1)]


def text(x: float, y: float, words: str, anchor: str = "middle", style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(words)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def chart(left: float, title: str, label: str, ticks: Mapping[int, str], log: bool,
          lines: Sequence[Points]) -> list[str]:
    """One chart. `ticks`: the places on the x axis and what they are called; `lines`: the points
    of every series."""
    x = Scale(min(ticks), max(ticks), WIDTH, log)
    rises = steps(max(y for points in lines for _, y in points))
    y = Scale(0, rises[-1], HEIGHT)
    bottom = TOP + HEIGHT
    parts = [text(left, TOP - 14, title, "start", "head")]
    for rise in rises:
        parts.append(line("grid", left, bottom - y(rise), left + WIDTH, bottom - y(rise)))
        parts.append(text(left - 8, bottom - y(rise) + 4, f"{rise:g}", "end"))
    parts.append(line("axis", left, bottom, left + WIDTH, bottom))
    for at, name in ticks.items():
        parts.append(line("axis", left + x(at), bottom, left + x(at), bottom + 4))
        parts.append(text(left + x(at), bottom + 18, name))
    parts.append(text(left + WIDTH / 2, bottom + 38, label))
    for colour, points in zip(COLOURS, lines):
        places = [(left + x(a), bottom - y(b)) for a, b in points]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
                     + " ".join(f"{a:.1f},{b:.1f}" for a, b in places) + '"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
    return parts


def svg(names: Sequence[str], label: str, ticks: Mapping[int, str],
        charts: Sequence[tuple[str, Sequence[Points]]], log: bool = False) -> str:
    """`names` of the series; `charts`: a title and the points of every series, for each."""
    step = LEFT + WIDTH + RIGHT
    width, height = step * len(charts), TOP + HEIGHT + BOTTOM
    parts: list[str] = []
    at = LEFT
    for colour, name in zip(COLOURS, names):
        parts.append(f'<circle cx="{at + 4}" cy="16" r="4" fill="{colour}"/>')
        parts.append(text(at + 14, 20, name, "start"))
        at += 40 + 7 * len(name)
    for number, (title, lines) in enumerate(charts):
        parts += chart(LEFT + number * step, title, label, ticks, log, lines)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">\n<style>{STYLE}</style>\n'
            + "\n".join(parts) + "\n</svg>\n")
