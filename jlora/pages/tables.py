"""Tables, and heat maps: tables whose cells are shaded by their values."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jlora.pages.page import template

Best = Callable[[Sequence[float]], float]  # min or max
SHADES = 9  # shade-1 to shade-9 in page.css

TABLE = template("""\
<div class="scroll"><table class="{{ kind }}">
<thead><tr>
{% for text, style in header %}
<th scope="col" class="{{ style }}" dir="auto">{{ text }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr>
{% for text, style in row %}
{% if loop.first and kind == "heat" %}
<th scope="row" dir="auto">{{ text }}</th>
{% else %}
<td class="{{ style }}" dir="auto">{{ text }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>""")


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str | float | None]],
    *,
    formats: Mapping[str, str] = {},
    best: Mapping[str, Best] = {},
) -> Markup:
    """Returns a table; numbers are aligned to the right, and None is a missing cell.

    `formats` has the format of a column's numbers, such as {"accuracy": ".1%"}, and `best` the columns whose best cell
    is marked, such as {"loss": min}.
    """
    columns = zip(*rows, strict=True) if rows else [[] for _ in header]
    heads, bodies = [], []
    for name, cells in zip(header, columns, strict=True):
        numbers = [cell for cell in cells if exists(cell)]
        top = best[name](numbers) if numbers and name in best else None
        align = "number" if all(cell is None or isinstance(cell, int | float) for cell in cells) else ""
        heads.append((name, align))
        bodies.append([(show_cell(cell, formats.get(name, "")), mark_best(align, cell, top)) for cell in cells])
    return TABLE(kind="plain", header=heads, rows=zip(*bodies, strict=True))


def heat_map(
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    corner: str = "",
    spec: str = "",
    best: Best | None = None,
) -> Markup:
    """Returns a table of values, shaded from the lowest to the highest; None is a missing cell.

    `corner` is the text above the row labels, `spec` the format of the values, and `best` (min or max) picks the cell
    that is marked.
    """
    known = [value for row in values for value in row if value is not None and math.isfinite(value)]
    low, high = min(known, default=0), max(known, default=0)
    top = best(known) if known and best else None
    rows = []
    for label, row in zip(row_labels, values, strict=True):
        cells = [(label, "")]
        for _, value in zip(column_labels, row, strict=True):
            style = "missing"
            if value is not None and math.isfinite(value):
                style = f"shade-{1 + round((value - low) / (high - low or 1) * (SHADES - 1))}"
            cells.append((show_cell(value, spec), mark_best(style, value, top)))
        rows.append(cells)
    return TABLE(kind="heat", header=[(corner, ""), *((label, "") for label in column_labels)], rows=rows)


def exists(cell: Any) -> bool:
    """Returns whether a cell has a number."""
    return isinstance(cell, int | float) and not math.isnan(cell)


def show_cell(cell: str | float | None, spec: str = "") -> str:
    """Formats a cell: numbers by `spec`, or else with commas and at most four significant digits of a fraction."""
    if isinstance(cell, str):
        return cell
    if not exists(cell):
        return "–"
    return format(cell, spec or ("," if isinstance(cell, int) else ",.4g"))


def mark_best(style: str, cell: Any, best: float | None) -> str:
    """Adds the mark of the best cell to the classes of a cell."""
    return f"{style} best" if best is not None and cell == best else style
