"""The page in a real browser, headless and without a network: it does what it says."""

import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalib_sgfr.report.page import render, write_page
from tests.example_report import HOSTILE, contents, drawn_scores, explanation, stream

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="needs Debian's packages chromium and chromium-driver, which are not here",
)
selenium = pytest.importorskip(
    "selenium.webdriver", reason="needs selenium, which the extra dev brings"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for switch in (
        "headless=new no-sandbox disable-gpu disable-quic no-first-run"
        " disable-background-networking disable-component-update disable-sync"
        f" disable-dev-shm-usage hide-scrollbars user-data-dir={tmp_path_factory.mktemp('profile')}"
    ).split():
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER)) as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield driver


def opened(browser: Any, page: str, folder: Path, width: int = 1280, height: int = 900) -> float:
    """Open a page from the disk; returns the seconds until it was drawn."""
    file = folder / "report with a space.html"
    write_page(page, file)
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser")
    started = time.perf_counter()
    browser.get(file.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"
    taken = time.perf_counter() - started
    assert browser.get_log("browser") == []
    return taken


def text(browser: Any, selector: str) -> str:
    found: str = browser.find_element("css selector", selector).text
    return found


def cards(browser: Any) -> list[int]:
    found: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('.card')].map(c => c.dataset.image)"
    )
    return [int(number) for number in found]


def expected(scores: np.ndarray, truths: np.ndarray, threshold: float) -> tuple[str, str]:
    alarms, missed = (scores > threshold)[truths == 0], (scores <= threshold)[truths == 1]
    return f"{alarms.sum()} of {alarms.size}, ", f"{missed.sum()} of {missed.size}, "


def agree(browser: Any, scores: np.ndarray, truths: np.ndarray, every: Any = None) -> float:
    """Compare the counts on the page with numpy's at the threshold that the page shows; cards may
    be of more images.
    """
    threshold = float(browser.find_element("id", "value").get_attribute("value"))
    alarms, missed = expected(scores, truths, threshold)
    assert text(browser, "#count-alarms i").startswith(alarms)
    assert text(browser, "#count-missed i").startswith(missed)
    command = (
        f"anomalib-sgfr threshold '/models/my model.ckpt' --score {threshold:.9g} --read_from"
        " /parts/test/"
    )
    assert text(browser, "#command").startswith(command)
    rate = (scores > threshold)[truths == 0].mean()
    assert f"{100 * rate:.1f}%" in text(
        browser, "[data-table=kind] [data-row='0'] [data-cell=alarms]"
    )
    words = {
        (0, False): "passed",
        (0, True): "false alarm",
        (1, True): "found",
        (1, False): "missed",
    }
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.card')]"
        ".map(card => [card.dataset.image, card.querySelector('.mark').textContent])"
    )
    scores, truths = every or (scores, truths)
    for image, mark in marks:
        assert mark == words[int(truths[int(image)]), bool(scores[int(image)] > threshold)]
    return threshold


def test_dragging_the_threshold_changes_counts_to_what_numpy_says(
    browser: Any, tmp_path: Path
) -> None:
    drawn = drawn_scores(120)
    scores, truths = np.array(drawn[0], np.float32).astype(float), np.array(drawn[1])
    opened(browser, render(contents(*drawn)), tmp_path)
    assert agree(browser, scores, truths) == 0.5
    handle = browser.find_element("id", "handle")
    moved = []
    for far in (180, -320):
        selenium.ActionChains(browser).drag_and_drop_by_offset(handle, far, 0).perform()
        moved.append(agree(browser, scores, truths))
    assert moved[1] < 0.5 < moved[0]
    handle.send_keys(selenium.Keys.ARROW_RIGHT * 3)
    assert agree(browser, scores, truths) > moved[1]
    assert float(handle.get_attribute("aria-valuenow")) == agree(browser, scores, truths)
    field = browser.find_element("id", "value")
    field.send_keys(selenium.Keys.CONTROL + "a")
    field.send_keys("0.4321")
    assert agree(browser, scores, truths) == 0.4321
    browser.find_element("id", "reset").click()
    assert agree(browser, scores, truths) == 0.5
    browser.save_screenshot(str(tmp_path / "threshold.png"))
    assert (tmp_path / "threshold.png").stat().st_size > 10_000


def test_images_that_are_not_new_count_in_a_line_of_their_own(browser: Any, tmp_path: Path) -> None:
    drawn = drawn_scores(90)
    scores, truths = np.array(drawn[0], np.float32).astype(float), np.array(drawn[1])
    opened(browser, render(contents(*drawn, trained_on=10, chose=30)), tmp_path)
    handle = browser.find_element("id", "handle")
    handle.send_keys(selenium.Keys.PAGE_DOWN)
    assert agree(browser, scores[30:], truths[30:], every=(scores, truths)) != 0.5
    for which, some in (("count", slice(30, None)), ("all", slice(None))):
        alarms, missed = expected(
            scores[some], truths[some], float(handle.get_attribute("aria-valuenow"))
        )
        assert text(browser, f"#{which}-alarms i").startswith(alarms)
        assert text(browser, f"#{which}-missed i").startswith(missed)
    choose(browser, "mark", "")  # arranges the cards anew, and not later
    marked = browser.execute_script(
        "return [...document.querySelectorAll('.card')].filter(c => c.textContent.includes('chose"
        " the threshold')).map(card => Number(card.dataset.image))"
    )
    assert set(marked) == set(range(30)) & set(cards(browser))
    assert marked
    choose(browser, "mark", "fresh")
    assert set(cards(browser)) <= set(range(30, 90))
    assert text(browser, "#shown") == "60 of 90 images"
    browser.find_element("class name", "card").click()
    image = cards(browser)[0]
    assert f"peak at row {30 + image}, column 40 of the file" in text(browser, "#large")


def test_a_touch_drags_it_too(browser: Any, tmp_path: Path) -> None:
    drawn = drawn_scores(60)
    opened(browser, render(contents(*drawn)), tmp_path, 390, 844)
    box = browser.execute_script(
        "const p = document.getElementById('plot'); p.scrollIntoView({block: 'center', behavior:"
        " 'instant'});const b = p.getBoundingClientRect(); return [b.left, b.top, b.width,"
        " b.height]"
    )
    x, y = box[0] + box[2] / 2, box[1] + box[3] / 2
    for kind, places in (("touchStart", [x]), ("touchMove", [x + 60]), ("touchEnd", [])):
        points = [{"x": place, "y": y} for place in places]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    agree(browser, np.array(drawn[0], np.float32).astype(float), np.array(drawn[1]))
    axis = [
        float(browser.find_element("id", "handle").get_attribute(f"aria-value{end}"))
        for end in ("min", "max")
    ]
    value = float(browser.find_element("id", "value").get_attribute("value"))
    assert value == pytest.approx(
        axis[0] + (axis[1] - axis[0]) * (box[2] / 2 + 60) / box[2], abs=0.01
    )


def choose(browser: Any, name: str, value: str) -> None:
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        " s.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def test_the_gallery_sorts_and_filters(browser: Any, tmp_path: Path) -> None:
    drawn = drawn_scores(40)
    scores, truths = np.array(drawn[0]), np.array(drawn[1])
    opened(browser, render(contents(*drawn)), tmp_path)
    wrong = (scores > 0.5) != (truths == 1)
    first = cards(browser)
    assert set(first[: wrong.sum()]) == set(np.flatnonzero(wrong))
    for name, key in (("high", -scores), ("low", scores), ("near", abs(scores - 0.5))):
        choose(browser, "sort", name)
        assert cards(browser) == np.argsort(key, kind="stable").tolist()
    choose(browser, "kind", "1")
    assert set(cards(browser)) == set(np.flatnonzero(truths == 1))
    choose(browser, "mark", "wrong")
    assert set(cards(browser)) == set(np.flatnonzero(wrong & (truths == 1)))
    assert text(browser, "#shown") == f"{(wrong & (truths == 1)).sum()} of 40 images"


def test_the_large_view_opens_by_a_key_and_arrows_go_on(browser: Any, tmp_path: Path) -> None:
    drawn = drawn_scores(12)
    order = np.argsort([-score for score in drawn[0]], kind="stable").tolist()
    opened(browser, render(contents(*drawn, explanations={order[0]: explanation()})), tmp_path)
    choose(browser, "sort", "high")
    browser.find_element("class name", "card").send_keys(selenium.Keys.ENTER)
    large = browser.find_element("id", "large")
    assert large.get_attribute("open") == "true"
    assert "Region 1, patches of 8 pixels: residual 3" in large.text
    assert "image is gone" in large.text
    assert len(large.find_elements("css selector", ".patches img")) == 2
    seen = [text(browser, "#large-h")]
    for key in (selenium.Keys.ARROW_RIGHT, selenium.Keys.ARROW_RIGHT, selenium.Keys.ARROW_LEFT):
        browser.switch_to.active_element.send_keys(key)
        seen.append(text(browser, "#large-h"))
    assert [int(name.rpartition("/")[2][:4]) for name in seen] == [
        order[0],
        order[1],
        order[2],
        order[1],
    ]
    assert "this is not one of them" in large.text
    browser.save_screenshot(str(tmp_path / "large.png"))
    browser.switch_to.active_element.send_keys(selenium.Keys.ESCAPE)
    assert large.get_attribute("open") is None
    assert browser.switch_to.active_element.get_attribute("data-image") == str(order[1])


def test_maps_are_coloured_on_one_scale(browser: Any, tmp_path: Path) -> None:
    opened(browser, render(contents([0.9, 0.2], [1, 0])), tmp_path)
    colours = (
        "const c = arguments[0]; return [...c.getContext('2d').getImageData(40, 20, 1, 1).data]"
    )
    for _ in range(50):
        found = [
            browser.execute_script(colours, each)
            for each in browser.find_elements("css selector", ".card canvas")
        ]
        if all(colour[3] for colour in found):
            break
        time.sleep(0.05)
    import matplotlib as mpl

    of_unit = dict(zip(cards(browser), found, strict=True))
    for number, value in ((0, 0.9), (1, 0.2)):
        assert of_unit[number][:3] == pytest.approx(
            [255 * part for part in mpl.colormaps["inferno"](value)[:3]], abs=5
        )


def test_hostile_names_do_nothing(browser: Any, tmp_path: Path) -> None:
    number = len(HOSTILE)
    given = contents(
        [0.6] * number, [1] * number, names=HOSTILE, kinds=HOSTILE, group="(.*)", notes=HOSTILE
    )
    opened(browser, render(given), tmp_path)
    assert len(cards(browser)) == number
    browser.find_element("class name", "card").click()
    assert (
        browser.execute_script("return document.querySelectorAll('img[src=x], script').length") == 2
    )
    assert any(
        "alert(1)</script>.png" in card.text for card in browser.find_elements("class name", "card")
    )
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(
    "given",
    [
        contents([0.6], [None]),
        contents([0.4, 0.2], [0, 0]),
        contents([3.0, 700.0], [0, 1], threshold=None, normalised=False),
        contents([], []),
    ],
    ids=["one, not labelled", "good alone", "no threshold", "none"],
)
def test_little_data_makes_no_error(given: Any, browser: Any, tmp_path: Path) -> None:
    opened(browser, render(given), tmp_path)
    browser.find_element("id", "handle").send_keys(selenium.Keys.ARROW_LEFT)
    assert browser.get_log("browser") == []
    assert "NaN" not in text(browser, "body")


def test_five_thousand_images_open_within_three_seconds(browser: Any, tmp_path: Path) -> None:
    drawn = drawn_scores(5000)
    assert opened(browser, render(contents(*drawn, with_media=500)), tmp_path) < 3.0
    assert len(cards(browser)) < 300
    assert "The page shows 500 of 5000 images" in text(browser, "#images")
    handle = browser.find_element("id", "handle")
    handle.send_keys(selenium.Keys.ARROW_RIGHT)
    agree(browser, np.array(drawn[0], np.float32).astype(float), np.array(drawn[1]))
    before = len(cards(browser))
    browser.execute_script("document.getElementById('more').scrollIntoView({behavior: 'instant'})")
    for _ in range(40):
        if len(cards(browser)) > before:
            break
        time.sleep(0.05)
    assert len(cards(browser)) > before


def test_a_phone_need_not_scroll_sideways_and_headings_are_in_order(
    browser: Any, tmp_path: Path
) -> None:
    drawn = drawn_scores(30)
    names = ["a-name-without-any-place-to-break-it-" * 4 + f"{number}.png" for number in range(30)]
    opened(browser, render(contents(*drawn, names=names)), tmp_path, 390, 844)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    browser.find_element("class name", "card").click()
    assert (
        browser.execute_script(
            "const d = document.getElementById('large'); return d.scrollWidth - d.clientWidth"
        )
        == 0
    )
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert browser.execute_script("return [...document.images].every(image => image.alt)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_the_paper(scheme: str, browser: Any, tmp_path: Path) -> None:
    """Contrast of 4.5 at least, WCAG 2 AA, in the colours that the page has words in."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    opened(browser, render(contents([0.4, 0.6], [0, 1])), tmp_path)
    colours = {
        name: browser.execute_script(
            "const e = document.createElement('i'); e.style.color = `var(--${arguments[0]})`;"
            " document.body.append(e);return getComputedStyle(e).color",
            name,
        )
        for name in ("ink", "soft", "accent", "paper", "faint")
    }

    def light(name: str) -> float:
        parts = np.array([int(part) for part in colours[name][4:-1].split(",")]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for ground in ("paper", "faint"):
        for word in ("ink", "soft", "accent"):
            low, high = sorted((light(ground), light(word)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, ground, word)


@pytest.mark.parametrize("width", [390, 1280])
def test_what_to_do_about_a_change_is_copied(browser: Any, tmp_path: Path, width: int) -> None:
    page = render(contents(*drawn_scores(20), streams=[stream("cam2"), stream("cam1")]))
    opened(browser, page, tmp_path, width)
    assert browser.execute_script("return document.body.scrollWidth") <= width
    assert "alarm at 200" in text(browser, "#conditions .evidence")
    line = browser.find_element("css selector", ".evidence .line")
    assert line.rect["height"] > 100  # the evidence rises through the chart
    chosen = browser.find_elements("css selector", "#conditions .command")[1]
    button = chosen.find_element("css selector", "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    for _ in range(20):
        if button.text != "Copy":
            break
        time.sleep(0.05)
    assert button.text in {"Copied", "Press Ctrl+C"}
    selected = browser.execute_script("return getSelection().toString()")
    command = chosen.find_element("css selector", "code").text
    assert command.startswith("anomalib-sgfr threshold")
    assert selected in {"", command}
    assert text(browser, "#copy") == "Copy"


def test_it_prints(browser: Any, tmp_path: Path) -> None:
    opened(browser, render(contents(*drawn_scores(120))), tmp_path)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert "Released for" in text(browser, "body")
        assert not browser.find_element("id", "copy").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert len(printed) > 50_000
    assert "96 of 120 images are printed" in browser.find_element("id", "printed").get_attribute(
        "textContent"
    )


def test_the_first_screen_needs_no_script(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    drawn = drawn_scores(50)
    write_page(render(contents(*drawn)), file)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(file.as_uri())
        words = browser.find_element("css selector", "main").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    alarms, _ = expected(np.array(drawn[0]), np.array(drawn[1]), 0.5)
    assert alarms.strip(", ") in words
    assert "The images need scripts" in words
