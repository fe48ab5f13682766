"""The page at / in a real Chromium, by keyboard and mouse, dark, light and narrow; skipped where there is no Chromium.

Screenshots go to the folder that PAGE_SCREENSHOTS names, for whoever wants to look.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.gateway.test_openai_package import ANSWER, QUESTION
from tests.triton.live_server import LiveServer, wait_until
from tests.triton.metrics import wait_until_idle

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--force-device-scale-factor=1"),
)
TIMEOUT_S = 60.0

pytestmark = [
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="no Chromium with chromedriver (apt-get install chromium-driver)"
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Page:
    """The page in a browser, asked as a person would look at it."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        self.url = url

    def open(self, width: int = 1280, height: int = 800, *, dark: bool = False) -> Page:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.get(self.url)
        wait_until(lambda: self.text("#status") == "ready", TIMEOUT_S, "the page does not say ready")
        wait_until(lambda: self.all("#model option"), TIMEOUT_S, "no models are listed")
        return self

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def answers(self) -> list[str]:
        return [each.text for each in self.all(".message.assistant .body")]

    def is_running(self) -> bool:
        return bool(self.all(".message.running"))

    def wait_for_answer(self) -> None:
        wait_until(lambda: not self.is_running(), TIMEOUT_S, lambda: f"still running: {self.answers()}")

    def type(self, text: str) -> None:
        self.browser.switch_to.active_element.send_keys(text)

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            self.browser.save_screenshot(str(Path(folder, f"{name}.png")))

    def complaints(self) -> list[str]:
        """What the browser's console has against the page."""
        entries: list[dict[str, str]] = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = Chrome(options=options, service=ChromeService(DRIVER))
    yield made
    made.quit()


@pytest.fixture
def page(browser: Chrome, live: LiveServer) -> Iterator[Page]:
    wait_until_idle(live)
    found = Page(browser, f"http://127.0.0.1:{live.openai_port}/")
    yield found
    assert found.complaints() == []


def test_a_question_by_keyboard_alone(page: Page) -> None:
    page.open()
    assert page.browser.switch_to.active_element == page.find("#question"), "typing goes to the question at once"
    page.type(QUESTION + Keys.ENTER)
    wait_until(lambda: page.answers() and page.answers()[0], TIMEOUT_S, "nothing came")
    page.wait_for_answer()
    assert page.answers() == [ANSWER]
    assert page.text(".message.user .body") == QUESTION
    assert "10 prompt tokens" in page.text(".meta")
    assert "answer tokens, first after" in page.text(".meta")
    assert page.browser.switch_to.active_element == page.find("#question")
    page.type("first line" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "second line")
    assert page.find("#question").get_attribute("value") == "first line\nsecond line"
    assert len(page.answers()) == 1
    page.type(Keys.CONTROL + "a" + Keys.NULL + "Thank you" + Keys.ENTER)
    wait_until(lambda: len(page.answers()) == 2 and page.answers()[1], TIMEOUT_S, "nothing came")
    page.wait_for_answer()
    assert len(page.answers()) == 2
    page.shoot("light")
    reached = set()
    for _ in range(30):
        page.type(Keys.TAB)
        reached.add(
            page.browser.switch_to.active_element.get_attribute("id") or page.browser.switch_to.active_element.tag_name
        )
    assert {"question", "send", "clear", "theme", "summary", "log"} <= reached
    page.find("#clear").click()
    assert page.answers() == []
    assert page.find("#empty").is_displayed()


def long_answer(page: Page) -> None:
    """Begin an answer that would go on for long: by the settings, as a person would."""
    page.find("summary").click()
    for name, value in (("max_tokens", "3000"), ("temperature", "2"), ("seed", "1"), ("top_k", "0")):
        page.find(f"#{name}").clear()
        page.find(f"#{name}").send_keys(value)
    page.find("#question").send_keys("Tell me a very long story" + Keys.ENTER)
    wait_until(lambda: page.answers() and len(page.answers()[-1]) > 20, TIMEOUT_S, "nothing came")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_an_answer_can_be_stopped(page: Page, live: LiveServer, how: str) -> None:
    page.open(dark=True)
    long_answer(page)
    assert page.find("#stop").is_displayed()
    assert not page.find("#send").is_displayed()
    wait_until(lambda: page.text("#plot-running .value") == "1", TIMEOUT_S, lambda: page.text("#plots"))
    wait_until(lambda: page.text("#plot-speed .value") not in ("0", "–"), TIMEOUT_S, lambda: page.text("#plots"))
    page.shoot("dark")
    if how == "button":
        page.find("#stop").click()
    else:
        page.type(Keys.ESCAPE)
    page.wait_for_answer()
    assert page.text(".message:last-child .meta") == "stopped"
    assert page.find("#send").is_displayed()
    wait_until_idle(live)


def test_gauges_are_those_of_the_engine(page: Page) -> None:
    page.open()
    names = [each.text for each in page.all(".plot .name")]
    assert names == ["Running", "Waiting", "Pages", "Tokens/s", "Prefix hits"]
    wait_until(lambda: page.text("#plot-running .value") == "0", TIMEOUT_S, lambda: page.text("#plots"))
    assert page.text("#plot-pages .value") == "0 of 1,024"
    wait_until(lambda: "L" in (page.find("#plot-hits .curve").get_attribute("d") or ""), TIMEOUT_S, "no curve")
    assert "Running: 0" in (page.find("#plot-running svg").get_attribute("aria-label") or "")


def test_errors_are_shown(page: Page) -> None:
    page.open()
    page.find("summary").click()
    page.find("#max_tokens").clear()
    page.find("#max_tokens").send_keys("100000")
    page.find("#question").send_keys("Hello" + Keys.ENTER)
    page.wait_for_answer()
    assert "max_model_len 4096" in page.text(".meta.error")
    assert [each for each in page.complaints() if "400 (Bad Request)" not in each] == []


def test_themes(page: Page) -> None:
    def ground() -> str:
        return page.find("body").value_of_css_property("background-color")

    page.open()
    light = ground()
    page.find("#theme").click()
    dark = ground()
    assert dark != light
    page.open()
    assert ground() == dark, "the choice is remembered"
    page.find("#theme").click()
    page.browser.execute_script("localStorage.clear()")
    page.open(dark=True)
    assert ground() == dark, "without a choice the system's"


def test_narrow_screens_need_no_sideways_scrolling(page: Page) -> None:
    page.open(width=360, height=740)
    page.find(".examples button").click()
    page.wait_for_answer()
    assert page.answers()[0].startswith("Mistral NeMo is a language model")
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 360
    page.shoot("narrow")
    page.browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    page.find("summary").click()
    page.shoot("narrow-below")
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_everything_comes_from_the_gateway_itself(page: Page) -> None:
    page.open()
    wait_until(lambda: page.text("#plot-running .value") != "–", TIMEOUT_S, "no gauges")
    loaded: list[str] = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((each) => each.name)"
    )
    assert len(loaded) >= 5
    assert all(each.startswith(page.url) for each in loaded), loaded
