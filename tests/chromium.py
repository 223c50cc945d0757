"""A headless Chromium for tests of pages; tests with the marks `NEEDS_CHROMIUM` are skipped where there is none."""

import shutil

import pytest

INSTALL = "the tests in a browser need pip install -e '.[test,browser]'"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NEEDS_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium (or google-chrome) and chromedriver in PATH"),
]
OPTIONS = "--headless=new --no-sandbox --disable-dev-shm-usage --window-size=1200,800 --lang=en-US"


def start():
    """Starts Chromium with a log of all that the browser complains about; returns its driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason=INSTALL)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in OPTIONS.split():
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
