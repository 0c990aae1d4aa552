# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m anomalib_osdirf app``: try a model in the browser."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from anomalib_osdirf.arguments import fail, positive
from anomalib_osdirf.inference.scoring import load_scorer

LOCAL = "127.0.0.1"


def main(arguments: Sequence[str], program: str) -> int:
    """Serve a page."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Try a model in the browser: drop images or a folder, or use the camera. Exported models of any "
        "anomalib model will do, and checkpoints.",
    )
    parser.add_argument("path", type=Path, metavar="MODEL", help=".xml, .onnx or .ckpt file, or a results folder")
    parser.add_argument("--model", help="model class of a checkpoint that is not of this package, such as Patchcore")
    parser.add_argument("--watch", type=Path, metavar="FOLDER", help="score the images in this folder as they come")
    parser.add_argument("--host", default=LOCAL, help=f"address to listen on ({LOCAL}: this computer only)")
    parser.add_argument("--port", type=_port, help="port to listen on (a free one)")
    parser.add_argument("--max-pixels", type=positive, default=50_000_000, help="most pixels of an image (50000000)")
    options = parser.parse_args(arguments)
    if find_spec("gradio") is None:
        raise ImportError("The app needs gradio; install the extra: pip install 'anomalib-osdirf[app]'.")
    if options.watch is not None and not options.watch.is_dir():
        raise ValueError(f"--watch {str(options.watch)!r} is not a folder; give the one that images are written to.")
    scorer = load_scorer(options.path, options.model)
    from anomalib_osdirf.app.interface import App

    if options.host != LOCAL:
        print(f"Everybody who can reach {options.host} can use this page; it asks for no password.", file=sys.stderr)  # noqa: T201
    app = App(scorer, options.max_pixels, options.watch)
    try:
        address = app.launch(options.host, options.port)
        print(f"{scorer.name} is at {address} (Ctrl+C ends it).", flush=True)  # noqa: T201
        app.page.block_thread()
    except OSError as error:
        return fail(program, f"--host {options.host} --port {options.port}: {error}")
    finally:
        app.close()
    return 0


def _port(text: str) -> int:
    number = positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; use 1 to 65535")
    return number
