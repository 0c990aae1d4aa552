# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The documentation's pictures, from what the quick start left behind (embedded data only), by an installed Chromium.

    python -m anomalib_osdirf quickstart
    python benchmarks/pictures.py results/OSDIRF/SyntheticSurfaces/weave/latest

Writes docs/report.jpg, overview and gallery of the report page, and docs/images/defects.jpg, the image that
scores highest of each defect type, with its truth, map and overlay.
"""

import argparse
import io
import shutil
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import sync_playwright

from anomalib_osdirf.app.overlay import overlay
from anomalib_osdirf.colours import COLOURS, TRUTH
from anomalib_osdirf.inference.reading import read_image
from anomalib_osdirf.inference.scoring import load_scorer
from anomalib_osdirf.report.page import PAGE_NAME
from anomalib_osdirf.report.results import Results

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


def show_defects(run: Path, output: Path) -> None:
    """Show the image that scores highest of each defect type: image, truth, map in its own range, and overlay."""
    scorer, results = load_scorer(run), Results(run)
    rows = []
    for kind in sorted({kind for kind, label in zip(results.defect_types, results.labels, strict=True) if label == 1}):
        own = [index for index, one in enumerate(results.defect_types) if one == kind]
        path = Path(str(results.paths[max(own, key=lambda index: results.scores[index])]))
        image = read_image(path, max_pixels=10**7)
        found = scorer.score(image)
        pixels = (255 * image).round().astype(np.uint8)
        mask = cv2.imread(str(next((path.parents[2] / "ground_truth" / kind).glob(f"{path.stem}*"))), 0)
        lines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        truth = cv2.drawContours(pixels.copy(), lines, -1, TRUTH, 2, cv2.LINE_AA)
        values = cv2.resize(found.map, pixels.shape[1::-1])
        share = (values - values.min()) / np.ptp(values)
        shown = overlay(image, found.map, threshold=scorer.pixel_threshold)
        rows.append(np.concatenate([pixels, truth, COLOURS[(255 * share).astype(np.uint8)], shown], axis=1))
    _save(np.concatenate(rows, axis=0), output / "images" / "defects.jpg", width=900, quality=80)


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
    show_defects(arguments.results, arguments.output)


if __name__ == "__main__":
    main()
