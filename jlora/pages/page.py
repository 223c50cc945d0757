"""The frame of all pages: one HTML document with its style and script inside, which loads nothing.

Its Content-Security-Policy lets only that style and that script have effect. All text is escaped as well, so what a row
contains is shown and never run.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jlora.common.terminal import escape_controls


def show(value: Any) -> Any:
    """Shows control characters in text as codes; HTML and numbers stay as they are."""
    return escape_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


ENVIRONMENT = Environment(
    autoescape=True, finalize=show, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)


def template(source: str) -> Callable[..., Markup]:
    """Compiles HTML with places for values, such as {{ title }}: text is escaped there, `Markup` is not."""
    compiled = ENVIRONMENT.from_string(source)
    return lambda **values: Markup(compiled.render(values))


def load(name: str) -> tuple[Markup, str]:
    """Returns the text of a file beside this one, and its hash for the policy."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return Markup(text), f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE = template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1 dir="auto">{{ title }}</h1>
{% for line in summary %}
<p dir="auto">{{ line }}</p>
{% endfor %}
</header>
{% for section in sections %}
{{ section }}
{% endfor %}
</main>
<script>{{ script }}</script>
</body>
</html>
""")
SECTION = template("""\
<section>
<h2 dir="auto">{{ title }}</h2>
{% for part in parts %}
{% if part is escaped %}{{ part }}{% else %}<p dir="auto">{{ part }}</p>{% endif %}

{% endfor %}
</section>""")


def render(title: str, summary: Iterable[str], sections: Iterable[Markup]) -> str:
    """Returns a complete page: its title, lines that sum it up, and its sections."""
    (style, style_hash), (script, script_hash) = load("page.css"), load("page.js")
    policy = (
        f"default-src 'none'; style-src {style_hash}; script-src {script_hash}; base-uri 'none'; form-action 'none'"
    )
    page = PAGE(title=title, summary=summary, sections=sections, policy=Markup(policy), style=style, script=script)
    return page.encode("utf-8", "replace").decode()  # names of files can contain halves of characters


def section(title: str, *parts: str) -> Markup:
    """Returns a part of a page under a heading: components, and plain text as paragraphs."""
    return SECTION(title=title, parts=parts)
