"""The page of an evaluation in a real Chromium: hostile rows, 10,000 of them, on wide and narrow screens."""

import chromium
import pytest
from test_evaluate import made

from jlora.evaluation import page

pytestmark = chromium.NEEDS_CHROMIUM
EVIL = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
TEXTS = [EVIL, "<b>HTML</b>", "שלום עולם", "emoji 👩‍👩‍👧 🙂", "w" * 3000]


@pytest.fixture(scope="module")
def driver():
    """A browser."""
    started = chromium.start()
    yield started
    started.quit()


@pytest.mark.parametrize("size", [1, 220, 10_000])
def test_nothing_runs_or_overflows_and_rows_are_found(driver, tmp_path, size):
    file = tmp_path / "evaluation.html"
    file.write_text(page.as_html(made(size, TEXTS[size % 5], EVIL), f"Evaluation {EVIL}", {"adapters": {}}))
    for width in (1200, 375):
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get(file.as_uri())
        wide, hacked = driver.execute_script("return [document.documentElement.scrollWidth, window.hacked]")
        assert wide <= width
        assert hacked is None
        assert driver.get_log("browser") == []
    assert len(driver.find_elements("css selector", "article")) == size + 1
    driver.find_element("css selector", "input[type=search]").send_keys(f"rows:{size - 1}")
    shown = "return document.querySelectorAll('.row-list')[0].querySelector('output').textContent"
    WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
    WebDriverWait(driver, 8).until(lambda driver: driver.execute_script(shown).split(" ")[0] == "1")
