# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The report page in a real browser: the threshold is dragged, the gallery filtered, images are opened by keyboard."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalib_osdirf.report.page import write_page
from anomalib_osdirf.report.results import ImageResult
from results_folder import image_result, ordinary_images, write_results

IMAGES = ordinary_images(40)
EVIL = "<img src=x onerror=document.title='hacked'>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two runs on the same images."""
    root = tmp_path_factory.mktemp("report")
    other = [image_result(image.path, image.label, 20 - (image.score or 0), seed=1) for image in IMAGES]
    folders = [write_results(root / "a", IMAGES), write_results(root / "b", other, model=EVIL)]
    return write_page(folders, root / "report.html")


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The page, opened from its file; anything it asks a network for or complains about is an error."""
    yield from _open(browser, report)


def _open(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    opened = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    opened.on(
        "request", lambda request: None if request.url[:5] in {"file:", "data:"} else troubles.append(request.url)
    )
    opened.goto(file.as_uri())
    opened.wait_for_selector("html[data-ready]", state="attached")
    yield opened
    opened.close()
    assert troubles == []


def _counts(images: list[ImageResult], threshold: float) -> dict[str, int]:
    scores = np.array([image.score for image in images], dtype=float) / 20
    labels = np.array([image.label for image in images])
    above = scores > threshold
    return {
        "caught": int((above & (labels == 1)).sum()),
        "missed": int((~above & (labels == 1)).sum()),
        "false-alarms": int((above & (labels == 0)).sum()),
        "passed": int((~above & (labels == 0)).sum()),
    }


def _shown_counts(page: Any) -> dict[str, int]:
    return {name: int(page.locator(f"#{name}").inner_text()) for name in ("caught", "missed", "false-alarms", "passed")}


def _threshold(page: Any) -> float:
    return float(re.search(r"Threshold (-?[\d.]+)", page.locator("#value").inner_text())[1])


def test_dragging_the_line_changes_the_counts(page: Any) -> None:
    assert _shown_counts(page) == _counts(IMAGES, 0.5)
    chart = page.locator("#histogram svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    middle = box["y"] + box["height"] / 2
    seen = []
    page.mouse.move(box["x"] + box["width"] * 0.6, middle)
    page.mouse.down()
    for share in (0.4, 0.3, 0.7):
        before = page.locator("#value").inner_text()
        page.mouse.move(box["x"] + box["width"] * share, middle)
        page.wait_for_function("before => document.querySelector('#value').innerText !== before", arg=before)
        threshold = _threshold(page)
        assert _shown_counts(page) == _counts(IMAGES, threshold)
        seen.append(threshold)
    page.mouse.up()
    assert seen[1] < seen[0] < seen[2]
    page.mouse.move(box["x"] + 100, middle)
    assert _threshold(page) == seen[2]
    counts = _counts(IMAGES, seen[2])
    f1 = 2 * counts["caught"] / (2 * counts["caught"] + counts["missed"] + counts["false-alarms"])
    assert float(page.locator("#f1").inner_text()) == pytest.approx(f1, abs=1e-3)
    assert f"{counts['missed']} of 20" in page.locator("#miss-rate").inner_text()
    page.wait_for_selector(f"#outcomes button:has-text('Missed ({counts['missed']})')")  # once the line rests
    page.locator("#reset").click()
    assert _shown_counts(page) == _counts(IMAGES, 0.5)


def test_slider_moves_the_threshold_by_keyboard(page: Any) -> None:
    page.locator("#slider").focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    threshold = _threshold(page)
    assert threshold > 0.5
    assert _shown_counts(page) == _counts(IMAGES, threshold)


def test_gallery_filters_sorts_and_searches(page: Any) -> None:
    counts = _counts(IMAGES, 0.5)
    page.locator("#outcomes button", has_text="Missed").click()
    assert page.locator(".card").count() == counts["missed"] > 0
    assert all("✗ missed" in text for text in page.locator(".card").all_inner_texts())
    scores = [float(text.split()[-1]) for text in page.locator(".card").all_inner_texts()]
    assert scores == sorted(scores)  # the worst miss first
    page.locator("#outcomes button", has_text="All").click()
    page.locator("#order").select_option("high")
    scores = [float(text.split()[-1]) for text in page.locator(".card").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.locator("#kind").select_option(label="bolt / dent")
    assert page.locator(".card").count() == sum(image.kind == "dent" for image in IMAGES)
    page.locator("#kind").select_option(label="all kinds")
    page.locator("#search").fill("00007")
    assert page.locator(".card").count() == 1


def test_images_are_opened_and_walked_through_by_keyboard(page: Any) -> None:
    assert page.locator(".card").count() == 24
    page.locator("#next").click()
    assert page.locator(".card").count() == 16
    page.locator("#previous").click()
    page.locator(".card").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    dialog = page.locator("#large")
    assert dialog.is_visible()
    assert page.locator("#large-name").inner_text() in page.locator(".card").nth(1).inner_text()
    first = page.locator("#large-name").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#large-name").inner_text() != first
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.locator("#large img").evaluate_all(loaded)
    assert page.locator("#large .panes").count() == 2  # the same image in the other run
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    third = page.locator(".card").nth(2).inner_text()
    page.wait_for_function("text => document.activeElement.innerText === text", arg=third)  # closing tells it later


def test_other_run_is_shown_and_its_name_is_text(page: Any) -> None:
    page.locator("#run").select_option(index=1)
    mirrored = [image_result(None, image.label, 20 - (image.score or 0)) for image in IMAGES]
    counts = _counts(mirrored, 0.5)
    caught = "caught => document.querySelector('#caught').innerText === String(caught)"
    page.wait_for_function(caught, arg=counts["caught"])
    assert _shown_counts(page) == counts
    assert page.title() != "hacked"
    assert EVIL in page.locator("#metrics thead").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phones_show_everything_without_scrolling_sideways(browser: Any, report: Path, scheme: str) -> None:
    for page in _open(browser, report, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True):
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 200
        assert dark == (scheme == "dark")
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_page_with_next_to_nothing_in_it_opens(browser: Any, tmp_path: Path) -> None:
    one = image_result("test/x/日本.png", 0, 3.0)
    one.map = one.map_low = one.map_high = one.picture = None
    runs = {"one": [one], "unlabelled": [image_result("x/1.png", None, 1.0)], "none": []}
    for name, images in runs.items():
        file = write_page([write_results(tmp_path / name, images, post_processing=None)], tmp_path / f"{name}.html")
        for page in _open(browser, file):
            assert page.locator(".card").count() == len(images)
            assert page.locator("#losses svg").count() == 1
