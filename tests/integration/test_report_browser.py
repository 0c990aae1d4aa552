# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The report page in a real browser: the threshold is dragged, the gallery filtered, images are opened by keyboard."""

import json
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
        "found": int((above & (labels == 1)).sum()),
        "missed": int((~above & (labels == 1)).sum()),
        "false-alarm": int((above & (labels == 0)).sum()),
    }


def _shown_counts(page: Any) -> dict[str, int]:
    shown = {name: page.locator(f"#{name}-count").inner_text() for name in ("found", "missed", "false-alarm")}
    return {name: int(text.split()[0]) for name, text in shown.items()}


def _threshold(page: Any) -> float:
    return float(page.locator("#raw").text_content()) / 20


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
    verdict = page.locator("#verdict").inner_text()
    assert f"{counts['found']} of 20 defects found" in verdict
    assert f"{counts['false-alarm']} false alarm" in verdict.replace("no false", "0 false")
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


def test_a_bin_ends_at_the_threshold(page: Any) -> None:
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(500)
    edges = "[...document.querySelectorAll('#histogram .mark-rect path')].map((one) => one.getBoundingClientRect())"
    boxes = page.evaluate(f"{edges}.map((box) => [box.left, box.right])")
    line = page.locator("#histogram .mark-rule line").last.bounding_box()
    middle = line["x"] + line["width"] / 2
    assert len(boxes) > 5
    assert not [box for box in boxes if box[0] + 1.5 < middle < box[1] - 1.5]


def test_the_threshold_can_be_copied_as_the_models_own_score(page: Any) -> None:
    page.locator("#take summary").click()
    page.locator("[data-copy=raw]").click()
    assert page.evaluate("getSelection().toString()") == "10.0000000"
    assert page.locator("#take-command").is_hidden()  # there is no model in the folder


def test_the_threshold_is_saved_as_json(page: Any) -> None:
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#take summary").click()
    with page.expect_download() as download:
        page.locator("#save").click()
    saved = json.loads(download.value.path().read_text("utf-8"))
    assert saved == json.loads(page.locator("#json").inner_text())
    assert saved["image_threshold"] == float(page.locator("#raw").inner_text()) > 10
    counts = _counts(IMAGES, saved["image_threshold"] / 20)
    assert {name: saved[name] for name in ("defects", "found", "false_alarms")} == {
        "defects": 20,
        "found": counts["found"],
        "false_alarms": counts["false-alarm"],
    }


def test_times_are_local_ones(page: Any) -> None:
    assert re.match(r"[A-Z][a-z]{2} \d+, \d{4}, \d", page.locator("header time").inner_text())


def test_the_loss_is_smoothed_over_the_raw_one(page: Any) -> None:
    assert page.locator("#losses .mark-line path").count() == 4  # of two runs


def test_first_screen_shows_a_miss_a_false_alarm_and_a_catch(page: Any) -> None:
    texts = page.locator("#telling .card").all_inner_texts()
    assert [next(word for word in ("missed", "false alarm", "found") if word in text) for text in texts] == [
        "missed",
        "false alarm",
        "found",
    ]
    page.locator("#telling .card").first.click()
    assert page.locator("#large-name").inner_text() in texts[0]


def test_gallery_begins_with_mistakes_then_close_calls_and_catches(page: Any) -> None:
    sections = page.locator("#cards h3").all_inner_texts()
    assert sections == ["Missed", "False alarms", "Closest calls", "Best catches", "All others"]
    counts = _counts(IMAGES, 0.5)
    texts = page.locator("#cards .card").all_inner_texts()
    assert all("✗ missed" in text for text in texts[: counts["missed"]])
    assert "! false alarm" in texts[counts["missed"]]


def test_a_map_takes_the_colours_of_its_own_range_or_the_common_one(page: Any) -> None:
    green = """() => {
      const canvas = document.querySelector("#cards canvas");
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      return pixels.filter((_, at) => at % 4 === 1);
    }"""
    page.wait_for_function("document.querySelector('#cards canvas').width !== 300")
    own = page.evaluate(green)
    assert max(own) > 220  # yellow
    assert min(own) < 20  # violet
    page.locator("#common").check()
    page.wait_for_function("document.querySelector('#cards canvas').width !== 300")
    assert page.evaluate(green) != own


def test_gallery_filters_sorts_and_searches(page: Any) -> None:
    counts = _counts(IMAGES, 0.5)
    page.locator("#outcomes button", has_text="Missed").click()
    assert page.locator("#cards .card").count() == counts["missed"] > 0
    assert all("✗ missed" in text for text in page.locator("#cards .card").all_inner_texts())
    scores = [float(text.split()[-1]) for text in page.locator("#cards .card").all_inner_texts()]
    assert scores == sorted(scores)  # the worst miss first
    page.locator("#outcomes button", has_text="All").click()
    page.locator("#order").select_option("high")
    scores = [float(text.split()[-1]) for text in page.locator("#cards .card").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.locator("#defect-type").select_option(label="bolt / dent")
    assert page.locator("#cards .card").count() == sum(image.defect_type == "dent" for image in IMAGES)
    page.locator("#defect-type").select_option(label="all defect types")
    page.locator("#search").fill("00007")
    assert page.locator("#cards .card").count() == 1


def test_images_are_opened_and_walked_through_by_keyboard(page: Any) -> None:
    assert page.locator("#cards .card").count() == 24
    page.locator("#next").click()
    assert page.locator("#cards .card").count() == 16
    page.locator("#previous").click()
    page.locator("#cards .card").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    dialog = page.locator("#large")
    assert dialog.is_visible()
    assert page.locator("#large-name").inner_text() in page.locator("#cards .card").nth(1).inner_text()
    first = page.locator("#large-name").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#large-name").inner_text() != first
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.locator("#large img").evaluate_all(loaded)
    assert page.locator("#large .panes").count() == 2  # the same image in the other run
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    third = page.locator("#cards .card").nth(2).inner_text()
    page.wait_for_function("text => document.activeElement.innerText === text", arg=third)  # closing tells it later


def test_other_run_is_shown_and_its_name_is_text(page: Any) -> None:
    page.locator("#run").select_option(index=1)
    mirrored = [image_result(None, image.label, 20 - (image.score or 0)) for image in IMAGES]
    counts = _counts(mirrored, 0.5)
    found = "found => document.querySelector('#found-count').innerText.startsWith(`${found} of`)"
    page.wait_for_function(found, arg=counts["found"])
    assert _shown_counts(page) == counts
    assert page.title() != "hacked"
    assert EVIL in page.locator("#metrics thead").inner_text()


def test_images_that_only_one_of_two_runs_finds(page: Any) -> None:
    """Scores of the second run are mirrored: it finds what the first one misses."""
    counts = _counts(IMAGES, 0.5)
    button = page.locator("[data-versus='found other']")
    assert int(button.inner_text()) == counts["missed"] > 0
    assert page.locator("[data-versus='found both']").is_disabled()
    button.click()
    texts = page.locator("#cards .card").all_inner_texts()
    assert len(texts) == counts["missed"]
    assert all(text.index("missed") < text.index(EVIL) < text.index("✓ found") for text in texts)
    page.locator("#versus").click()
    assert page.locator("#cards .card").count() == 24
    page.locator("[data-versus='false-alarm this']").click()
    assert page.locator("#cards .card").count() == counts["false-alarm"] > 0


def test_runs_without_a_common_image_are_said_to_have_none(browser: Any, tmp_path: Path) -> None:
    folders = [
        write_results(tmp_path / name, [image_result(f"{name}/good/{number}.png", 0, 3.0) for number in range(2)])
        for name in ("one", "two")
    ]
    for page in _open(browser, write_page(folders, tmp_path / "report.html")):
        assert "no scored test image is in both" in page.locator("#shared").inner_text().lower()
        assert page.locator("#differing").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phones_show_everything_without_scrolling_sideways(browser: Any, report: Path, scheme: str) -> None:
    for page in _open(browser, report, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True):
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 200
        assert dark == (scheme == "dark")
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_print_fits_a4(page: Any) -> None:
    page.set_viewport_size({"width": 718, "height": 1046})  # A4 less Chromium's margins
    page.emulate_media(media="print")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every((one) => one.scrollWidth <= 718)")


def test_page_with_next_to_nothing_in_it_opens(browser: Any, tmp_path: Path) -> None:
    one = image_result("test/x/日本.png", 0, 3.0)
    one.map = one.map_low = one.map_high = one.picture = None
    runs = {"one": [one], "unlabelled": [image_result("x/1.png", None, 1.0)], "none": []}
    for name, images in runs.items():
        file = write_page([write_results(tmp_path / name, images, post_processing=None)], tmp_path / f"{name}.html")
        for page in _open(browser, file):
            assert page.locator("#cards .card").count() == len(images)
            assert page.locator("#losses svg").count() == 1
