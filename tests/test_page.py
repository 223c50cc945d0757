"""The chat page in a real browser, against a small server: what users type, see, copy and rate."""

import contextlib

import chromium
import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason=chromium.INSTALL)
ui = pytest.importorskip("selenium.webdriver.support.ui", reason=chromium.INSTALL)
page_server = pytest.importorskip("page_server", reason=chromium.INSTALL)

Keys = webdriver.Keys
pytestmark = chromium.NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def browser():
    driver = chromium.start()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server():
    server = page_server.PageServer()
    yield server
    server.close()


class Page:
    """What a user does on the page, and what is to be seen there."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server
        server.reset()
        browser.get_log("browser")
        browser.get(server.url)
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")

    def load(self, language="en-US"):
        """Opens the page anew, in a language, and waits for the models."""
        agent = self.browser.execute_script("return navigator.userAgent")
        languages = {"userAgent": agent, "acceptLanguage": language}
        self.browser.execute_cdp_cmd("Emulation.setUserAgentOverride", languages)
        self.browser.refresh()
        self.wait(lambda: self.all("#model option, dialog[open]"))
        return self

    def wait(self, true):
        return ui.WebDriverWait(self.browser, 8, poll_frequency=0.03).until(lambda _: true())

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def type(self, *keys):
        """Types where the focus is."""
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def pick(self, selector, name):
        ui.Select(self.one(selector)).select_by_visible_text(name)

    def texts(self, selector=".text"):
        return [node.text for node in self.all(selector)]

    def ask(self, question, finished=True):
        """Types a question, presses Enter, and waits until all is answered."""
        turns = len(self.all(".turn"))
        self.one("#input").send_keys(question, Keys.ENTER)
        self.wait(lambda: len(self.all(".turn")) == turns + 1)
        if finished:
            self.wait(lambda: self.one("#send").is_enabled())

    def complaints(self):
        """Returns what the browser logged: violations of the policy, errors of scripts, failed requests."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(browser, server):
    return Page(browser, server).load()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_streams_answers_and_remembers_them(page):
    assert page.one("#send").text == "Send" and not page.one("#stop").is_displayed()
    page.ask("First\nline".replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL))
    assert page.texts(".question") == ["First\nline"]
    assert page.texts() == ["base answers 1: First\nline"]
    page.ask("second")
    assert page.texts()[1] == "base answers 2: second"
    first, second = page.server.chats
    assert first == {"model": "base", "messages": [user("First\nline")], "stream": True}
    assert second["messages"] == [user("First\nline"), assistant("base answers 1: First\nline"), user("second")]
    page.one("#new").click()
    page.ask("third")
    assert page.texts() == ["base answers 1: third"]
    assert page.server.types == {"application/json"} and page.complaints() == []


def test_settings_are_sent(page):
    page.one("[popovertarget]").click()
    page.one("[name=system]").send_keys("Be brief.")
    page.one("[name=temperature]").send_keys("0")
    page.one("[name=max_tokens]").send_keys("20.5")
    page.type(Keys.ESCAPE)
    page.one("#input").send_keys("Hello", Keys.ENTER)  # half a token: the settings open again
    page.wait(lambda: page.one("[name=max_tokens]").is_displayed())
    assert not page.server.chats
    page.one("[name=max_tokens]").send_keys(Keys.BACKSPACE, Keys.BACKSPACE, Keys.ESCAPE)
    page.ask("")
    system = {"role": "system", "content": "Be brief."}
    settings = {"temperature": 0, "max_tokens": 20}
    assert page.server.chats == [{"model": "base", "messages": [system, user("Hello")], **settings, "stream": True}]


def test_two_models_answer_side_by_side(page):
    page.ask("one")
    page.pick("#other", "law")
    page.ask("two")
    page.ask("three")
    answers = ["base answers 1: one", "base answers 2: two", "law answers 2: two"]
    assert page.texts() == [*answers, "base answers 3: three", "law answers 3: three"]
    assert page.texts("h3") == ["base", "base", "law", "base", "law"]
    left, right = (card.rect for card in page.all(".turn:last-child .answer"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    histories = {body["model"]: [message["content"] for message in body["messages"]] for body in page.server.chats}
    assert histories == {
        "base": ["one", answers[0], "two", answers[1], "three"],
        "law": ["one", answers[0], "two", answers[2], "three"],
    }


def test_stops(page):
    page.ask("slow", finished=False)
    page.wait(lambda: page.texts() == ["base answers 1: slow"])
    assert not page.one("#send").is_enabled()
    page.one("#stop").click()
    assert page.server.stopped.wait(5)
    page.wait(lambda: page.texts(".note") == ["Stopped."])
    assert page.one(".down").is_displayed() and not page.one(".up").is_displayed()
    page.server.stopped.clear()
    page.ask("slow", finished=False)
    page.wait(lambda: page.texts()[1] == "base answers 2: slow")
    page.type(Keys.ESCAPE)
    assert page.server.stopped.wait(5)
    page.ask("next")  # and what had been written is remembered
    assert page.server.chats[-1]["messages"][1::2] == [assistant(f"base answers {n}: slow") for n in (1, 2)]


def test_ratings_arrive(page):
    page.one("[popovertarget]").click()
    page.one("[name=system]").send_keys("Be brief.", Keys.ESCAPE)
    page.ask("one")
    page.one(".up").click()
    page.wait(lambda: page.texts(".note") == ["Saved. Thank you."])
    page.one(".up").click()  # again: nothing more is sent
    page.ask("two")
    page.all(".down")[1].click()
    page.type("It is\nLima.")
    assert page.texts(".better span")[1] == "What would be a better answer?"
    page.all(".better .filled")[1].click()
    page.wait(lambda: len(page.server.feedback) == 2)
    messages = [{"role": "system", "content": "Be brief."}, user("one")]
    good, bad = page.server.feedback
    assert good == {"model": "base", "messages": messages, "answer": "base answers 1: one", "rating": "up"}
    messages = [*messages, assistant("base answers 1: one"), user("two")]
    expected = {"model": "base", "messages": messages, "answer": "base answers 2: two", "rating": "down"}
    assert bad == {**expected, "better": "It is\nLima."}
    page.ask("three")
    page.server.feedback_works = False
    page.all(".down")[2].click()
    page.all(".better .filled")[2].click()
    page.wait(lambda: page.texts(".note.error") == ["The disk is full."])
    page.server.feedback_works = True
    page.all(".down")[2].click()
    page.all(".better .filled")[2].click()
    page.wait(lambda: len(page.server.feedback) == 3)
    assert "better" not in page.server.feedback[2]


def test_no_ratings_where_the_server_takes_none(page):
    page.server.takes_feedback = False
    page.load().ask("one")
    assert page.one(".copy").is_displayed()
    assert not page.one(".up").is_displayed() and not page.one(".down").is_displayed()


def test_nothing_that_is_shown_can_run(page):
    page.pick("#model", page_server.EVIL)
    page.pick("#other", page_server.EVIL)
    page.ask("evil")
    assert page.texts() == [page_server.ANSWERS["evil"]] * 2 and page.texts("h3") == [page_server.EVIL] * 2
    page.ask(page_server.EVIL)
    assert page.texts(".question")[1] == page_server.EVIL
    assert not page.browser.execute_script("return window.hacked") and not page.all("img")
    assert page.complaints() == []
    # the control: the policy holds, and the log shows what breaks it
    page.browser.execute_script("document.body.innerHTML = arguments[0]", page_server.EVIL)
    page.wait(lambda: "Content Security Policy" in str(page.complaints()))


def test_keyboard_alone(page):
    page.type("one", Keys.ENTER)  # the focus is in the field from the start
    page.wait(lambda: page.all(".note") and page.one(".copy").is_displayed())
    page.browser.execute_script("document.querySelector('main').focus()")
    names = []
    for _ in range(3):
        page.type(Keys.TAB)
        focus = page.browser.switch_to.active_element
        names.append(focus.accessible_name)
        assert focus.value_of_css_property("outline-style") == "solid"
    assert names == ["Copy", "Good answer", "Bad answer"]
    page.type(Keys.ENTER, "Better", Keys.TAB, Keys.TAB, Keys.ENTER)
    page.wait(lambda: page.server.feedback)
    assert page.server.feedback[0]["better"] == "Better"
    page.wait(lambda: page.texts(".note") == ["Saved. Thank you."])
    webdriver.ActionChains(page.browser).key_down(Keys.CONTROL).send_keys("k").key_up(Keys.CONTROL).perform()
    assert not page.all(".turn") and page.browser.switch_to.active_element == page.one("#input")


def test_copies(page):
    page.browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page.ask("one")
    page.one(".copy").click()
    page.wait(lambda: page.texts(".note") == ["Copied."])
    page.one("#input").send_keys(Keys.CONTROL, "v")
    assert page.one("#input").get_attribute("value") == "base answers 1: one"


def test_chinese(page):
    page.load("zh-CN")
    assert page.one("#send").text == "发送" and page.one("html").get_attribute("lang") == "zh-CN"
    page.one("#input").send_keys("wenti")
    page.browser.execute_script(
        "const how = {key: 'Enter', isComposing: true, bubbles: true, cancelable: true};"
        "return document.activeElement.dispatchEvent(new KeyboardEvent('keydown', how))"
    )
    assert not page.all(".turn")  # this Enter ends the typing of a word, and does not send it
    page.one("#input").clear()
    page.ask("问题")
    assert page.one(".up").accessible_name == "回答得好"
    page.one("#language").click()
    assert page.one("#send").text == "Send" and page.one(".up").accessible_name == "Good answer"
    page.load("zh-CN")
    assert page.one("#send").text == "Send"  # the choice is kept


def test_asks_for_the_key(page):
    page.server.key = "secret"
    page.load()
    assert page.one("dialog input").get_attribute("type") == "password"
    page.type("wrong", Keys.ENTER)
    page.wait(lambda: "did not accept" in page.one("dialog label").text)
    page.type(Keys.ESCAPE)
    page.wait(lambda: page.one("#problem").is_displayed())
    assert page.texts("#problem p") == ["The server needs an API key."]
    page.one("#problem button").click()
    page.wait(lambda: page.one("dialog").is_displayed())
    page.type("secret", Keys.ENTER)
    page.wait(lambda: page.all("#model option"))
    assert [option.text for option in page.all("#model option")] == page_server.MODELS
    stores = "return [JSON.stringify(localStorage), JSON.stringify(sessionStorage)]"
    assert page.browser.execute_script(stores) == ["{}", '{"api-key":"secret"}']
    page.pick("#other", "law")
    for key, late in ("changed", ""), ("again", "law"):
        page.server.key, page.server.holds_refusals_of = key, late
        page.one("#new").click()
        page.ask("one", finished=False)
        page.wait(lambda: page.one("dialog").is_displayed())
        page.type(key, Keys.ENTER)  # once, for both answers
        page.wait(lambda: page.one("#send").is_enabled())
        assert page.texts() == ["base answers 1: one", "law answers 1: one"]
    page.one(".up").click()
    page.wait(lambda: page.server.feedback)


def test_errors_are_plain_and_can_be_tried_again(page):
    page.ask("refuse")
    assert page.texts(".note.error") == ["This request is too long."] and not page.one(".rate").is_displayed()
    page.ask("break")
    assert page.texts(".note.error") == ["This request is too long.", "The accelerator is out of memory."]
    assert page.texts()[1] == "base answers 1: break"  # what failed at once is not part of the conversation
    assert [button.is_displayed() for button in page.all(".retry")] == [False, True]
    page.all(".retry")[1].click()
    page.wait(lambda: len(page.server.chats) == 3 and page.one("#send").is_enabled())
    assert page.server.chats[1] == page.server.chats[2] and len(page.all(".answer")) == 2
    with contextlib.closing(page_server.PageServer()) as other:
        page.browser.get(other.url)
        page.wait(lambda: page.all("#model option"))
    page.ask("one")
    assert page.texts(".note.error") == ["The server cannot be reached, or the connection was lost."]


def test_nothing_overflows_and_scrolling_stays(page):
    phone = {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.pick("#model", page_server.EVIL)
        page.pick("#other", "law")
        page.ask("long")
        page.ask(page_server.LONG)
        widths = "return [...document.querySelectorAll('html, main, .turn, .answer, .text, header, footer')].filter("
        widths += "(node) => node.scrollWidth > node.clientWidth || node.getBoundingClientRect().right > 375).length"
        assert page.browser.execute_script(widths) == 0
        page.ask("שלום (hello)")
        assert [bool(page.all(f".question:dir({way})")) for way in ("rtl", "ltr")] == [True, True]
        gap = "const m = document.querySelector('main'); return m.scrollHeight - m.clientHeight - m.scrollTop"
        page.wait(lambda: page.browser.execute_script(gap) < 2)  # it follows what is written
        page.ask("slow", finished=False)
        page.wait(lambda: page.texts()[-1].startswith("law"))
        page.browser.execute_script("document.querySelector('main').scrollTop = 10")
        page.server.goes_on = True
        page.wait(lambda: page.one("#send").is_enabled())
        assert page.texts()[-1] == "law answers 4: slow" * 2
        assert page.browser.execute_script("return document.querySelector('main').scrollTop") == 10
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
