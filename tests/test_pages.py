"""The HTML pages: their text is escaped, only their own style and script have effect, and lists can be searched."""

import base64
import hashlib
import html.parser
import json
import math
import re

import chromium
import pytest

from jlora.pages.charts import Scale, bar_chart, interval_chart, line_chart
from jlora.pages.page import render, section
from jlora.pages.rows import Row, row_list
from jlora.pages.tables import heat_map, table

IMAGE = "<img src=x onerror='window.hacked=1'>"
SCRIPT = "</script><script>window.hacked=1; alert(1)</script>"
EVIL = f"{SCRIPT}{IMAGE}\"'><b>"
TEXTS = [
    EVIL,
    "<p>Some <b>HTML</b></p>",
    "שלום עולם (hello)\nEnglish",
    "emoji 👩‍👩‍👧 🙂",
    "w" * 5000,
    "Ｆｕｌｌ 依据第十条",
]
KINDS = ["html", "markup", "hebrew", "emoji", "long", EVIL]
WIDE_HEADER = [f"column {i}" for i in range(20)]
EMPTY_TAGS = {"meta", "line", "circle", "rect", "polyline", "input"}


def full_page(size, text="text"):
    """Returns a page with every component, in which `text` is at each place where text can be."""
    rows = [
        Row(f"file:{i} {text}", {"question": TEXTS[i % 6], text: f"answer number {i}"}, [KINDS[i % 6]], i * 7 % size)
        for i in range(size)
    ]
    sections = [
        section(text, text, table([text, "n"], [[text, 1], ["b", 0.5]], formats={"n": ".1f"}, best={"n": min})),
        section("Bars", bar_chart([text, "b"], [1000, 0])),
        section("Lines", line_chart({text: [(0, 1.0), (10, 2.0)], "empty": []}, text, text)),
        section("Intervals", interval_chart([text], [0.5], [0.4], [0.7], reference=0.5)),
        section("Sweep", heat_map([text], [text, "c"], [[1.0, None]], corner=text, best=max)),
        section("Wide", table(WIDE_HEADER, [range(20)]), heat_map(["a"], WIDE_HEADER, [range(20)])),
        section("Rows", row_list(rows, "score")),
    ]
    return render(text, [text, "two"], sections)


class Parsed(html.parser.HTMLParser):
    """The elements of a page; an end tag that does not match its start tag is an error."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in EMPTY_TAGS or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_all_text_is_escaped_and_nothing_is_loaded():
    plain, evil = Parsed(full_page(6)), Parsed(full_page(6, EVIL))
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    names = {name for _, attributes in evil.tags for name in attributes}
    assert not names & {"src", "href", "style"} and not any(name.startswith("on") for name in names)
    assert evil.text.count(EVIL) > 10
    assert full_page(6, EVIL) == full_page(6, EVIL)


def test_the_policy_allows_the_style_and_the_script_of_the_page_alone():
    page = full_page(1)
    policy = dict(Parsed(page).tags)["meta"] and re.search(r'Policy" content="([^"]+)"', page)[1]
    for tag in "style", "script":
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy


def test_control_characters_and_halves_of_characters_are_shown():
    page = render("a\x1b\u202e\udcff", [], [])
    assert '<h1 dir="auto">a\\u001b\\u202e?</h1>' in page and page.encode()


def cells(page):
    return re.findall(r'<td class="([^"]*)" dir="auto">([^<]*)</td>', page)


def test_tables():
    rows = [["a", 12345, 0.51234], ["b", None, math.nan], ["c", 7, 0.75]]
    shown = cells(table(["name", "count", "share"], rows, formats={"share": ".0%"}, best={"count": min, "share": max}))
    assert shown[:3] == [("", "a"), ("number", "12,345"), ("number", "51%")]
    assert shown[3:6] == [("", "b"), ("number", "–"), ("number", "–")]
    assert shown[6:] == [("", "c"), ("number best", "7"), ("number best", "75%")]
    assert cells(table(["loss"], [[1.23456], [math.inf]], best={"loss": min})) == [
        ("number best", "1.235"),
        ("number", "inf"),
    ]
    assert Parsed(table(["a", "b"], [])).text.split() == ["a", "b"]


def test_heat_maps():
    values = [[1.0, 5.0], [None, 9.0], [math.nan, math.inf]]
    shown = cells(heat_map(["x", "y", "z"], ["p", "q"], values, best=min, spec=".1f"))
    assert shown == [
        ("shade-1 best", "1.0"),
        ("shade-5", "5.0"),
        ("missing", "–"),
        ("shade-9", "9.0"),
        ("missing", "–"),
        ("missing", "inf"),
    ]
    assert cells(heat_map(["x"], ["p"], [[2.0]])) == [("shade-1", "2")]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 100], ["0", "20", "40", "60", "80", "100"]),
        ([0.1, 0.35], ["0.1", "0.15", "0.2", "0.25", "0.3", "0.35"]),
        ([1, 1], ["0.6", "0.8", "1", "1.2", "1.4"]),
        ([0, 25_000], ["0", "5,000", "10,000", "15,000", "20,000", "25,000"]),
        ([1e-5, 1e-3], ["0.0002", "0.0004", "0.0006", "0.0008", "0.001"]),
        ([-3, 4], ["-2", "0", "2", "4"]),
        ([], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ],
)
def test_ticks_are_round(values, ticks):
    assert [text for _, text in Scale.over(values).ticks()] == ticks


def test_charts_have_the_values():
    assert re.findall(r'width="([\d.]+%)"', bar_chart(["a", "b"], [1, 4])) == ["25.0%", "100.0%"]
    bar_chart([], []), bar_chart(["a"], [0])
    lines = line_chart({"a": [(0, 0.0), (5, math.nan), (10, 1.0)], "one": [(5, 0.5)]}, "x", "y")
    assert re.findall(r'points="([^"]*)"', lines) == ["0.0,94.64 100.0,5.36", "50.0,50.0"]
    assert "<title>a: 10, 1</title>" in lines and lines.count("<circle") == 3
    assert "<circle" not in line_chart({"a": [(i, i) for i in range(100)]}, "x", "y")
    intervals = interval_chart(["a", "b"], [0.5, math.nan], [0.0, 0.0], [1.0, 1.0], spec=".0%")
    assert "50% (0% to 100%)" in intervals and intervals.count("<circle") == 1 and ">50%</text>" in intervals


@pytest.fixture(scope="module")
def browser():
    driver = chromium.start()
    yield driver
    driver.quit()


@pytest.fixture
def view(browser, tmp_path):
    """Opens a page at a width, in light or dark, on screen or as printed; the browser must not complain about it."""

    def show(page, width=1200, scheme="light", media="screen"):
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        browser.get(file.as_uri())
        assert browser.get_log("browser") == []
        return browser

    yield show
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def browser_test(function):
    for mark in chromium.NEEDS_CHROMIUM:
        function = mark(function)
    return function


WIDE = """
document.querySelectorAll("article").forEach((row) => row.style.contentVisibility = "visible");
const wide = [...document.querySelectorAll("body *")].filter((node) =>
    node.getBoundingClientRect().right > innerWidth && !node.closest(".scroll, svg svg"));
return [document.body.scrollWidth <= innerWidth, document.documentElement.scrollWidth <= innerWidth, wide.length]
"""
OVERLAPS = """
const boxes = [...document.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect());
return boxes.some((a, i) => boxes.some((b, j) =>
    i < j && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom))
"""


@browser_test
@pytest.mark.parametrize("size", [1, 220])
@pytest.mark.parametrize("width", [1200, 375])
def test_nothing_runs_or_overflows(view, size, width):
    browser = view(full_page(size, EVIL), width)
    assert browser.title.startswith("</script>") and not browser.find_elements("css selector", "img, article b")
    assert not browser.execute_script("return window.hacked")
    assert browser.execute_script(WIDE) == [True, True, 0]
    assert not browser.execute_script(OVERLAPS)
    assert browser.find_elements("css selector", ".text:dir(rtl)") or size == 1


@browser_test
def test_the_policy_stops_what_is_not_escaped(view):
    browser = view(full_page(1))
    browser.execute_script("document.body.innerHTML = arguments[0]", IMAGE)
    assert "Content Security Policy" in json.dumps(browser.get_log("browser"))
    assert not browser.execute_script("return window.hacked")


SHOWN = """
return [...document.querySelectorAll("article")].filter((row) => row.offsetHeight).map((row) =>
    Number(row.querySelector("h3").textContent.match(/\\d+/)[0]))
"""
FILL = """
const [selector, value, event] = arguments;
const field = document.querySelector(selector);
field.value = value;
field.dispatchEvent(new Event(event));
return new Promise((resolve) => setTimeout(resolve, 200))
"""


@browser_test
@pytest.mark.parametrize("size", [1, 220, 10_000])
def test_rows_are_searched_filtered_and_sorted(view, size):
    browser = view(full_page(size))

    def fill(selector, value, event="change"):
        browser.execute_script(FILL, selector, value, event)
        return browser.execute_script(SHOWN)

    def count():
        return browser.find_element("css selector", "output").text

    everything = list(range(size))
    rows = f"{size:,} row{'s' * (size > 1)}"
    assert browser.execute_script(SHOWN) == everything and count() == rows
    assert fill("input", "number answer 0", "input") == [i for i in everything if "0" in str(i)]
    assert fill("input", "Question", "input") == [] and count() == f"0 of {rows}"  # a label, in no row's text
    assert fill("input", "full", "input") == everything[5::6]  # written with full-width letters
    assert fill("input", SCRIPT, "input") == everything[::6]
    assert fill("input", "", "input") == everything
    if size > 1:
        assert fill(".tag-choice", "emoji") == everything[3::6]
        assert fill("input", "answer 3", "input") == [i for i in everything[3::6] if "3" in str(i)]
        assert fill("input", "", "input") == everything[3::6]
        assert fill(".order", "1") == sorted(everything[3::6], key=lambda i: i * 7 % size)
        assert fill(".order", "-1") == sorted(everything[3::6], key=lambda i: -i * 7 % size)
        assert fill(".order", "0") == everything[3::6]
        assert fill(".tag-choice", EVIL) == everything[5::6]
        assert fill(".tag-choice", "") == everything and count() == rows


@browser_test
def test_rows_without_a_number_are_last(view):
    rows = [Row(f"row {i}", {}, (), number) for i, number in enumerate([2.0, None, 1.0])]
    browser = view(render("t", [], [row_list(rows, "score")]))
    assert not browser.find_elements("css selector", ".tag-choice")
    for order, expected in ("1", [2, 0, 1]), ("-1", [0, 2, 1]), ("0", [0, 1, 2]):
        browser.execute_script(FILL, ".order", order, "change")
        assert browser.execute_script(SHOWN.replace("row.offsetHeight", "true")) == expected


STYLES = """
const color = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
return [color("body", "backgroundColor"), color("body", "color"), color(".bar", "fill"), color(".series-0", "stroke"),
    color(".controls", "display"), color("article", "contentVisibility"), color(".scroll", "overflowX")]
"""


@browser_test
def test_dark_light_and_print(view):
    page = full_page(3)
    light = view(page).execute_script(STYLES)
    dark = view(page, scheme="dark").execute_script(STYLES)
    printed = view(page, scheme="dark", media="print").execute_script(STYLES)
    assert light[0] == "rgb(255, 255, 255)" and all(a != b for a, b in zip(light[:4], dark[:4], strict=True))
    assert light[4:] == dark[4:] == ["flex", "auto", "auto"]
    assert printed[:2] == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"] and printed[2:4] == light[2:4]
    assert printed[4:] == ["none", "visible", "visible"]
    assert view(full_page(6, EVIL), 700, media="print").execute_script(WIDE)[:2] == [True, True]
