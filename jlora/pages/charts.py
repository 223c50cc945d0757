"""Charts in SVG that scale to the width of the page: bars, lines, and values with intervals.

Only what is drawn scales. Texts are at percentages of the width and keep their size; long labels are HTML, which wraps.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from jlora.pages.page import template
from jlora.pages.tables import show_cell

COLORS = 6  # series-0 to series-5 in page.css
MOST_DOTS = 60  # of a line, beyond which its points have no dots

BARS = template("""\
<table class="tracks">
{% for label, width, count in bars %}
<tr><th scope="row" dir="auto">{{ label }}</th>\
<td class="track"><svg aria-hidden="true"><rect class="bar" width="{{ width }}" height="100%" rx="2"/></svg></td>\
<td class="number">{{ count }}</td></tr>
{% endfor %}
</table>""")
INTERVALS = template("""\
<table class="tracks">
{% for label, dot, low, high, text in points %}
<tr><th scope="row" dir="auto">{{ label }}</th><td class="track"><svg aria-hidden="true">
{% for tick, _ in ticks %}
<line class="grid" x1="{{ tick }}" x2="{{ tick }}" y2="100%"/>
{% endfor %}
{% if reference %}
<line class="reference" x1="{{ reference }}" x2="{{ reference }}" y2="100%"/>
{% endif %}
{% if dot %}
<line class="interval" x1="{{ low }}" x2="{{ high }}" y1="50%" y2="50%"/><circle cx="{{ dot }}" cy="50%" r="5"/>
{% endif %}
</svg></td><td class="number">{{ text }}</td></tr>
{% endfor %}
<tr class="axis"><td></td><td class="track"><svg>
{% for tick, text in ticks %}
<text x="{{ tick }}" y="50%" text-anchor="middle">{{ text }}</text>
{% endfor %}
</svg></td><td></td></tr>
</table>""")
LINES = template("""\
<figure class="lines">
<figcaption><b dir="auto">{{ y_label }}</b>
{% for name, color, _, _ in lines %}
<span class="key"><svg class="swatch" aria-hidden="true"><line class="{{ color }}" x2="100%" y1="50%" y2="50%"/></svg> \
<span dir="auto">{{ name }}</span></span>
{% endfor %}
</figcaption>
<svg class="plot" role="img" aria-label="{{ y_label }} by {{ x_label }}">
{% for place, text in y_ticks %}
<line class="grid" x2="100%" y1="{{ place }}" y2="{{ place }}"/>
<text x="0" y="{{ place }}" dx="-10" dy="0.35em" text-anchor="end">{{ text }}</text>
{% endfor %}
{% for place, text in x_ticks %}
<text x="{{ place }}" y="100%" dy="1.7em" text-anchor="middle">{{ text }}</text>
{% endfor %}
<line class="base" x2="100%" y1="100%" y2="100%"/>
<svg viewBox="0 0 100 100" preserveAspectRatio="none">
{% for _, color, line, _ in lines %}
<polyline class="{{ color }}" points="{{ line }}"/>
{% endfor %}
</svg>
{% for name, color, _, dots in lines %}
{% for x, y, text in dots %}
<circle class="{{ color }}" cx="{{ x }}" cy="{{ y }}" r="3.5"><title>{{ name }}: {{ text }}</title></circle>
{% endfor %}
{% endfor %}
</svg>
<p class="x-label" dir="auto">{{ x_label }}</p>
</figure>""")


@dataclass(frozen=True)
class Scale:
    """An axis: the values at its two ends."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float], margin: float = 0.0) -> "Scale":
        """Returns an axis for values, with a margin at both ends as a share of the range."""
        known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        space = (high - low) * margin if high > low else abs(low) / 2 or 1.0
        return cls(low - space, high + space)

    def percent(self, value: float) -> float:
        """Returns the place of a value, in percent of the axis."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self, percent: bool = False) -> list[tuple[str, str]]:
        """Returns up to six round numbers on the axis, as numbers or in percent, each with its place."""
        unit = 10.0 ** math.floor(math.log10((self.high - self.low) / 5))
        step = next(unit * factor for factor in (1, 2, 5, 10) if 5.000001 * unit * factor >= self.high - self.low)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        texts = [f"{100 * i * step:,.6g}%" if percent else f"{i * step:,.6g}" for i in range(first, last + 1)]
        return [(f"{self.percent(i * step)}%", text) for i, text in enumerate(texts, first)]


def bar_chart(labels: Sequence[str], counts: Sequence[float]) -> Markup:
    """Returns a horizontal bar for each label, with its count."""
    most = max(counts, default=0) or 1
    pairs = zip(labels, counts, strict=True)
    return BARS(bars=[(label, f"{round(100 * count / most, 2)}%", show_cell(count)) for label, count in pairs])


def interval_chart(
    labels: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    *,
    spec: str = ".3g",
    reference: float | None = None,
) -> Markup:
    """Returns a dot with its interval for each label, and the numbers in the format `spec`.

    `reference` is a value that is marked in all rows, such as the base model's.
    """
    scale = Scale.over([*values, *lows, *highs, *([] if reference is None else [reference])], margin=0.08)

    def place(value: float) -> str:
        return f"{scale.percent(value)}%"

    points = [
        (label, place(value), place(low), place(high), f"{value:{spec}} ({low:{spec}} to {high:{spec}})")
        if math.isfinite(value + low + high)
        else (label, "", "", "", show_cell(None))
        for label, value, low, high in zip(labels, values, lows, highs, strict=True)
    ]
    return INTERVALS(
        points=points, ticks=scale.ticks(spec.endswith("%")), reference=reference is not None and place(reference)
    )


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Markup:
    """Returns a line for each series of points (x, y), with axes and a legend; points without a number are left out."""
    known = {name: [p for p in points if math.isfinite(p[0] + p[1])] for name, points in series.items()}
    x_scale = Scale.over(x for points in known.values() for x, _ in points)
    y_scale = Scale.over((y for points in known.values() for _, y in points), margin=0.06)
    lines = []
    for i, (name, points) in enumerate(known.items()):
        places = [(x_scale.percent(x), round(100 - y_scale.percent(y), 2)) for x, y in points]
        dots = [
            (f"{x}%", f"{y}%", f"{show_cell(point[0])}, {show_cell(point[1])}")
            for (x, y), point in zip(places, points, strict=True)
        ]
        line = " ".join(f"{x},{y}" for x, y in places)
        lines.append((name, f"series-{i % COLORS}", line, dots if len(dots) <= MOST_DOTS else []))
    y_ticks = [(f"{round(100 - float(place[:-1]), 2)}%", text) for place, text in y_scale.ticks()]
    return LINES(lines=lines, x_ticks=x_scale.ticks(), y_ticks=y_ticks, x_label=x_label, y_label=y_label)
