# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The app in a real browser: good, defective, broken and too large images, several users, the threshold, the table, a
watched folder."""

import csv
import io
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_osdirf.inference.scoring import load_scorer
from brightness import brightness_model

pytest.importorskip("gradio", reason="the extra `app` is not installed")
EVIL = "<img src=x onerror=document.title='hacked'>.png"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a model whose score is the brightest pixel."""
    from anomalib_osdirf.app.interface import App

    app = App(load_scorer(brightness_model(tmp_path_factory.mktemp("model"))), max_pixels=40_000)
    yield app.launch("127.0.0.1", None)
    app.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several kinds: a dark one is good, one with a bright spot defective."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.full((60, 80), 60, np.uint8)
    Image.fromarray(pixels).save(folder / "good.png")
    pixels[20:30, 20:30] = 204
    Image.fromarray(pixels).save(folder / "defect.png")
    Image.fromarray(pixels).save(folder / EVIL)
    Image.fromarray(np.zeros((300, 300), np.uint8)).save(folder / "large.png")
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:60])
    return folder


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page; whatever it asks another computer for is an error."""
    opened = _open(browser, address)
    yield opened
    opened.close()
    assert opened.strangers == []


def _open(browser: Any, address: str, wanted: str = "#files input[type=file]", **options: Any) -> Any:
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    page.strangers = []
    local = ("data:", "blob:", address)
    page.on("request", lambda request: None if request.url.startswith(local) else page.strangers.append(request.url))
    page.goto(address)
    page.wait_for_selector(wanted, state="attached")
    return page


def _upload(page: Any, *files: Path) -> None:
    page.set_input_files("#files input[type=file]", list(files))


def _result(page: Any, start: str) -> str:
    """Wait for a result that starts so."""
    condition = "start => document.querySelector('#result textarea')?.value.startsWith(start)"
    page.wait_for_function(condition, arg=start, timeout=15_000)
    return str(page.locator("#result textarea").input_value())


def test_good_defective_and_broken_images(page: Any, images: Path) -> None:
    _upload(page, images / "good.png", images / "defect.png", images / "broken.png")
    sentence = _result(page, "1 anomalous, 1 normal;")
    assert "broken.png can't be read as an image" in sentence
    page.wait_for_selector("#overlays img")
    captions = page.locator("#overlays .caption-label").all_inner_texts()
    assert captions == ["anomalous 0.800, defect.png", "normal 0.235, good.png"]
    assert "broken.png can't be read" in page.locator("#table").inner_text()
    # and it lives on
    page.locator("#files button[aria-label='Clear']").click()
    _upload(page, images / "good.png")
    _result(page, "0 anomalous, 1 normal;")


def test_too_large_images_and_names_with_markup(page: Any, images: Path) -> None:
    _upload(page, images / "large.png", images / EVIL)
    sentence = _result(page, "1 anomalous, 0 normal;")
    assert "large.png has 300 x 300 pixels, more than the 0.04 million" in sentence
    page.wait_for_timeout(300)
    assert page.title() != "hacked"


def test_threshold_changes_labels_without_scoring_again(page: Any, images: Path) -> None:
    _upload(page, images / "good.png", images / "defect.png")
    _result(page, "1 anomalous, 1 normal;")
    number = page.locator("#threshold input[type=number]")
    number.fill("0.9")
    number.blur()
    _result(page, "0 anomalous, 2 normal;")


def test_originals_are_shown_without_overlays(page: Any, images: Path) -> None:
    def pixels() -> Any:
        response = page.request.get(page.locator("#overlays img").first.get_attribute("src"))
        return np.asarray(Image.open(io.BytesIO(response.body())).convert("RGB")).astype(int)

    _upload(page, images / "defect.png")
    _result(page, "1 anomalous, 0 normal;")
    page.wait_for_selector("#overlays img")
    assert np.ptp(pixels(), axis=2).max() > 30  # a map's colours
    before = page.locator("#overlays img").first.get_attribute("src")
    page.locator("#originals input").check()
    changed = "before => document.querySelector('#overlays img')?.getAttribute('src') !== before"
    page.wait_for_function(changed, arg=before)
    page.wait_for_selector("#overlays img")
    assert np.ptp(pixels(), axis=2).max() < 10  # the image is grey


def test_table_is_saved_as_csv(page: Any, images: Path) -> None:
    _upload(page, images / "good.png", images / "defect.png", images / "broken.png")
    _result(page, "1 anomalous, 1 normal;")
    with page.expect_download() as download:
        page.locator("#csv").click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text("utf-8-sig"))))
    assert [(row["image"], row["label"]) for row in rows] == [
        ("defect.png", "anomalous"),
        ("good.png", "normal"),
        ("broken.png", ""),
    ]
    assert float(rows[0]["score"]) == pytest.approx(0.8)
    assert rows[0]["ms"].isdecimal()
    assert "p-value" not in rows[0]


def test_a_folder_is_scored(page: Any, images: Path) -> None:
    page.get_by_role("tab", name="Folder").click()
    page.set_input_files("#folder input[type=file]", str(images))
    sentence = _result(page, "2 anomalous, 1 normal;")
    assert "more have a note in the table" in sentence
    assert f"{images.name} - good.png" in page.locator("#table").inner_text()


def test_camera_pictures_are_scored_as_the_part_lies_there(page: Any) -> None:
    page.get_by_role("tab", name="Camera").click()
    page.locator("#camera [title='grant webcam access'] button").click()
    has_a_picture = "document.querySelector('#camera video').readyState >= 2"
    page.wait_for_function(has_a_picture, timeout=60_000)
    page.locator("#camera button[aria-label='capture photo']").click()
    _result(page, "1 anomalous, 0 normal;")
    response = page.request.get(page.locator("#overlays img").first.get_attribute("src"))
    pixels = np.asarray(Image.open(io.BytesIO(response.body())).convert("L")).astype(float)
    height, width = pixels.shape
    assert pixels[: height // 4, : width // 4].mean() > 1.3 * pixels[:, width // 2 :].mean()  # not mirrored


def test_two_people_at_once_see_their_own_images(browser: Any, address: str, images: Path) -> None:
    first, second = _open(browser, address), _open(browser, address)
    _upload(first, images / "good.png")
    _upload(second, images / "defect.png", images / "good.png")
    _result(first, "0 anomalous, 1 normal;")
    _result(second, "1 anomalous, 1 normal;")
    first.close()
    second.close()


def test_pictures_are_walked_through_by_keyboard(page: Any, images: Path) -> None:
    _upload(page, images / "good.png", images / "defect.png")
    _result(page, "1 anomalous, 1 normal;")
    page.locator("#overlays button.thumbnail-item").first.click()
    shown = page.locator("#overlays .preview img.media-image, #overlays .preview img").first
    first = shown.get_attribute("src")
    page.wait_for_selector("#overlays .preview :focus")  # keys go to the picture in focus
    page.keyboard.press("ArrowRight")
    page.wait_for_function("first => document.querySelector('#overlays .preview img').src !== first", arg=first)


def test_images_of_a_watched_folder_are_scored_as_they_come(browser: Any, images: Path, tmp_path: Path) -> None:
    from anomalib_osdirf.app.interface import App

    watched = tmp_path / "watched"
    watched.mkdir()
    app = App(load_scorer(brightness_model(tmp_path / "model")), max_pixels=40_000, watched=watched)
    address = app.launch("127.0.0.1", None)
    page = _open(browser, address, "#stream")

    def wait(start: str) -> None:
        condition = "start => document.querySelector('#stream textarea').value.startsWith(start)"
        page.wait_for_function(condition, arg=start, timeout=15_000)

    wait("0 scored, 0 anomalous, 0 errors")
    for name in ("good.png", "defect.png", "broken.png", EVIL):
        shutil.copy(images / name, watched)
    wait("3 scored, 2 anomalous, 1 error.")
    page.wait_for_selector("#history svg, #history canvas")
    page.wait_for_selector("#anomalous img")
    assert "first 100 of this stream" in page.locator("#drift").inner_text()
    assert "broken.png can't be read" in page.locator("#latest").inner_text()
    assert page.title() != "hacked"
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shutil.rmtree(watched)
    page.wait_for_function("document.querySelector('#stream textarea').value.includes('scoring goes on once')")
    assert page.strangers == []
    page.close()
    app.close()


def test_phones_need_no_scrolling_sideways(browser: Any, address: str, images: Path) -> None:
    page = _open(browser, address, viewport={"width": 390, "height": 844}, color_scheme="dark")
    _upload(page, images / "good.png", images / "broken.png")
    _result(page, "0 anomalous, 1 normal;")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_only_this_computer_is_listened_to(address: str) -> None:
    port = int(address.rsplit(":", 1)[1].strip("/"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        try:
            client.connect(("192.0.2.1", 9))  # nothing is sent; it tells this computer's own address
            own = client.getsockname()[0]
        except OSError:  # no network: Linux has further addresses of this computer's own
            own = "127.0.0.2"
    for host, reached in ((own, False), ("127.0.0.1", True)):
        with socket.socket() as client:
            client.settimeout(5)
            assert (client.connect_ex((host, port)) == 0) == reached


def test_only_the_highest_scores_keep_pictures(tmp_path: Path) -> None:
    from anomalib_osdirf.app.interface import App

    calibration = {"image": {"false_alarm_rate": 0.01}}
    app = App(load_scorer(brightness_model(tmp_path / "model", calibration=calibration)), max_pixels=40_000)
    paths = []
    for number in range(70):
        Image.fromarray(np.full((4, 4), number * 3, np.uint8)).save(tmp_path / f"{number:02d}.png")
        paths.append(str(tmp_path / f"{number:02d}.png"))
    rows = app.score(paths)
    pictures, table, file, sentence = app.show(rows, 0.4)
    assert len(pictures) == 60
    assert "the 60 highest scores have pictures" in sentence
    assert [row[0] for row in table["data"]] == sorted((f"{number:02d}.png" for number in range(70)), reverse=True)
    assert table["headers"][-1] == "p-value"
    assert file is not None
    assert app.show(app.score(None), 0.4)[1:] == (
        {"headers": ["image", "score", "label", "ms", "note"], "data": []},
        None,
        "",
    )
    app.close()
