"""The run report in a browser: it draws, answers to pointer and keys, and can be read on a phone, in the dark and on paper.

Needs a browser of this machine's, such as Debian's chromium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from paci_megatron.cli.report import main
from tests.support import report_runs as made

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")

FIGURES = ["timeline", "losses", "throughput", "bubble", "time", "drift", "clipping", "memory"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made.write_runs(folder)
    assert main([str(folder), "--output", str(folder / "report.html")]) == 0
    return folder / "report.html"


@contextmanager
def opened(browser: Any, path: Path, width: int = 1400, scheme: str = "light") -> Iterator[Any]:
    """The page, drawn. Nothing in the browser's console and no request but for the page itself, at the end."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn=yes]")
    yield page
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    context.close()


@pytest.fixture(scope="module")
def page(browser: Any, report: Path) -> Iterator[Any]:
    """A page of the usual width, of all tests that only look at it or choose something."""
    with opened(browser, report) as one:
        yield one


def contrast(page: Any, element: str, background: str) -> float:
    """By WCAG, of the element's text on the background of another."""
    code = """([element, background]) => {
        const rgb = (which, name) => getComputedStyle(document.querySelector(which))[name].match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
            .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const [a, b] = [light(rgb(element, "color")), light(rgb(background, "backgroundColor"))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""
    return float(page.evaluate(code, [element, background]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_screen(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    with opened(browser, report, width, scheme) as page:
        for name in FIGURES:
            marks = page.locator(f"#{name} .trace, #{name} .scatterlayer path.js-line, #{name} .bars .point").count()
            assert marks > 0, name
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for element in (".caption", ".about", ".tile .more", "th[scope=row]"):
            assert contrast(page, element, "body" if element == ".about" else "section:not(.tiles)") >= 4.5, element


def test_pointing_at_an_action_tells_what_it_is(page: Any) -> None:
    bars = page.locator("#timeline .bars .point path")
    for bar in (bars.nth(3), bars.nth(40)):
        bar.scroll_into_view_if_needed()
        box = bar.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector("#timeline .hoverlayer .hovertext")
        for told in (page.locator("#timeline .hoverlayer").text_content(), page.locator("#details").text_content()):
            for part in ("on stage ", "of micro-batch ", "weight version ", " ms before"):
                assert part in told
        page.mouse.move(5, 5)


def test_the_timeline_can_be_used_with_the_keyboard(page: Any) -> None:

    def shown() -> list[float]:
        return [float(end) for end in page.evaluate("document.getElementById('timeline-0').layout.xaxis.range")]

    whole = shown()
    page.locator("#timeline-0").focus()
    page.keyboard.press("+")
    begin, end = shown()
    assert end - begin == pytest.approx((whole[1] - whole[0]) / 2)
    page.keyboard.press("0")
    assert shown() == whole
    page.keyboard.press("ArrowRight")
    first = page.locator("#details").text_content()
    page.keyboard.press("ArrowRight")
    second = page.locator("#details").text_content()
    page.keyboard.press("ArrowDown")
    third = page.locator("#details").text_content()
    assert len({first, second, third}) == 3
    assert "stage 0" in first and "stage 0" in second and "stage 1" in third
    page.wait_for_timeout(300)
    assert page.locator("#timeline .hoverlayer").text_content() == third, "what is pointed at is what is told"
    page.get_by_role("button", name="zoom in").press("Enter")
    assert shown() != whole


def test_another_loss_is_chosen_with_the_keyboard(page: Any) -> None:
    title = page.locator("#losses-0 .ytitle")
    assert title.text_content() == "validation perplexity"
    page.locator("input[name=losses]").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#losses-0 .ytitle').textContent.startsWith('training loss')")


def test_colours_follow_the_theme_and_paper_is_light(page: Any) -> None:

    def first_line() -> str:
        return str(page.locator("#throughput .js-line").first.evaluate("line => line.style.stroke"))

    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    dark, dark_page = first_line(), page.evaluate("getComputedStyle(document.body).color")
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(200)
    light = first_line()
    assert light != dark
    page.emulate_media(color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(color_scheme="dark", media="print")
    page.wait_for_timeout(200)
    assert first_line() == light
    assert page.evaluate("getComputedStyle(document.body).color") != dark_page
    assert contrast(page, ".caption", "section:not(.tiles)") >= 4.5
    assert page.evaluate("Math.max(...[...document.querySelectorAll('.plot')].map((plot) => plot.scrollWidth))") <= 700
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(color_scheme="light", media="screen")


def test_a_page_without_anything_measured_is_a_page(browser: Any, tmp_path: Path) -> None:
    label = "<i>none</i> & more"
    path = made.write_events(tmp_path / "run.jsonl", [made.header("paci")])
    assert main([f"{label}={path}", "--output", str(tmp_path / "r.html")]) == 0
    with opened(browser, tmp_path / "r.html") as page:
        assert page.locator("h1").text_content() == label
        assert page.locator("#timeline .note").count() == 1 and page.locator(".plot").count() == 0
