"""A list of rows that page.js searches, filters and sorts, also if there are ten thousand of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from jlora.common.plural import plural
from jlora.pages.page import template


@dataclass(frozen=True)
class Row:
    """One row: its heading, its texts by label (HTML if they are `Markup`), its tags, and a number to sort by."""

    heading: str
    texts: Mapping[str, str]
    tags: Sequence[str] = ()
    number: float | None = None


ROW_LIST = template("""\
<div class="row-list">
<div class="controls" hidden>
<label>Search <input type="search" autocomplete="off"></label>
{% if tags %}
<label>Tag <select class="tag-choice" autocomplete="off"><option value="">all</option>
{% for tag, count in tags.items() %}
<option value="{{ tag }}">{{ tag }} ({{ "{:,}".format(count) }})</option>
{% endfor %}
</select></label>
{% endif %}
{% if number_name %}
<label>Order <select class="order" autocomplete="off"><option value="0">as listed</option>
<option value="1">lowest {{ number_name }} first</option><option value="-1">highest {{ number_name }} first</option>
</select></label>
{% endif %}
<output>{{ size }}</output>
</div>
<div class="rows">
{% for row in rows %}
<article{% if row.number is not none %} data-number="{{ row.number }}"{% endif %}>
<h3 dir="auto">{{ row.heading }}</h3>
{% if row.tags %}
<ul class="tags">{% for tag in row.tags %}<li class="tag" dir="auto">{{ tag }}</li>{% endfor %}</ul>
{% endif %}
<div class="texts">
{% for label, text in row.texts.items() %}
<div>{% if label %}<h4 dir="auto">{{ label }}</h4>{% endif %}<div class="text" dir="auto">{{ text }}</div></div>
{% endfor %}
</div>
</article>
{% endfor %}
</div>
</div>""")


def row_list(rows: Iterable[Row], number_name: str = "") -> Markup:
    """Returns a list of rows with a search box, a filter by tag, and, if the numbers have a name, orders by number."""
    rows = list(rows)
    tags = Counter(tag for row in rows for tag in dict.fromkeys(row.tags))
    return ROW_LIST(rows=rows, tags=tags, number_name=number_name, size=plural(len(rows), "row"))
