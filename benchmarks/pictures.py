# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The README's pictures, from what the quick start left behind (embedded data only), by an installed Chromium.

    python -m anomalib_osdirf quickstart
    python benchmarks/pictures.py results/OSDIRF/SyntheticSurfaces/weave/latest

Writes docs/report.jpg: threshold and gallery of the report page.
"""

import argparse
import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from anomalib_osdirf.report.page import PAGE_NAME

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECTIONS = ("threshold", "gallery")
WIDTH, HEIGHT = 1100, 900


def photograph(page: Path, output: Path) -> None:
    """Photograph two sections of a page side by side."""
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
    both = Image.fromarray(np.concatenate(parts, axis=1))
    both.resize((1500, round(750 * HEIGHT / WIDTH)), Image.Resampling.LANCZOS).save(output, quality=85)


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results folder of the quick start")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder to write to")
    arguments = parser.parse_args()
    photograph(arguments.results / PAGE_NAME, arguments.output / "report.jpg")


if __name__ == "__main__":
    main()
