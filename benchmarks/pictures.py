# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The documentation's pictures, from what the quick start left behind (embedded data only), by an installed Chromium.

    python -m anomalib_osdirf quickstart
    python benchmarks/pictures.py results/OSDIRF/SyntheticSurfaces/weave/latest

Writes docs/report.jpg, overview and gallery of the report page, and docs/images/defects.jpg, anomalib's picture of the
first image of each kind of defect.
"""

import argparse
import io
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import sync_playwright

from anomalib_osdirf.report.page import PAGE_NAME

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECTIONS = ("overview", "gallery")
WIDTH, HEIGHT = 1100, 900


def photograph(page: Path, output: Path) -> None:
    """Photograph two sections of a page, side by side."""
    program = next(path for path in map(shutil.which, BROWSERS) if path)
    parts = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        opened.goto(page.resolve().as_uri())
        opened.wait_for_selector("html[data-ready]", state="attached")
        for section in SECTIONS:
            top = opened.evaluate(f"document.getElementById({section!r}).getBoundingClientRect().top")
            clip = {"x": 0, "y": top, "width": WIDTH, "height": HEIGHT}
            parts.append(
                np.asarray(Image.open(io.BytesIO(opened.screenshot(full_page=True, clip=clip))).convert("RGB"))
            )
        browser.close()
    _save(np.concatenate(parts, axis=1), output / "report.jpg", width=1500, quality=85)


def show_defects(folder: Path, output: Path) -> None:
    """Put the first picture of each kind of defect below one another."""
    kinds = sorted(kind for kind in folder.iterdir() if kind.name != "good")
    pictures = [np.asarray(Image.open(min(kind.iterdir())).convert("RGB")) for kind in kinds]
    _save(np.concatenate(pictures, axis=0), output / "images" / "defects.jpg", width=640, quality=70)


def _save(pixels: NDArray[np.uint8], file: Path, width: int, quality: int) -> None:
    picture = Image.fromarray(pixels)
    size = (width, round(picture.height * width / picture.width))
    picture.resize(size, Image.Resampling.LANCZOS).save(file, quality=quality)


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results folder of the quick start")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder to write to")
    arguments = parser.parse_args()
    (arguments.output / "images").mkdir(parents=True, exist_ok=True)
    photograph(arguments.results / PAGE_NAME, arguments.output)
    show_defects(arguments.results / "images" / "test", arguments.output)


if __name__ == "__main__":
    main()
