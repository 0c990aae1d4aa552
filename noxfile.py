# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""The tests on every Python that is here, with the oldest and the newest packages that pyproject.toml allows.

    python -m pip install nox uv
    nox                                       # all, one after the other: an environment is some 6 GB large
    nox --session "tests-3.11(lowest)"        # one of them
    nox --session "tests-3.11(lowest)" -- tests/unit -x

A Python that is not installed is skipped, and named. `lowest` takes the oldest version of each direct dependency
(anomalib, torch, diffusers, openvino, ...) for which there is a wheel, and the newest of what those depend on.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False

# Of anomalib and omegaconf: pure Python, published as source archives alone.
WITHOUT_WHEELS = ("freia", "antlr4-python3-runtime")
SHOWN = ("anomalib", "torch", "torchvision", "lightning", "timm", "diffusers", "openvino", "nncf", "onnx", "numpy")


@nox.session(python=["3.10", "3.11", "3.12", "3.13"], venv_params=["--seed"])  # tests install with pip
@nox.parametrize("resolution", [nox.param("lowest-direct", id="lowest"), nox.param("highest", id="highest")])
def tests(session: nox.Session, resolution: str) -> None:
    """Install and test."""
    locked = Path(session.create_tmp()) / "requirements.txt"
    # Wheels only: the oldest source archive that still builds says nothing about the oldest package that works.
    wheels = ("--only-binary", ":all:", *(option for name in WITHOUT_WHEELS for option in ("--no-binary", name)))
    session.run_install(
        *("uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--quiet", *wheels),
        *("--resolution", resolution, "--python-version", str(session.python), "--output-file", str(locked)),
        external=True,
    )
    session.install("--requirements", str(locked))
    session.install("--no-deps", "--editable", ".")
    versions = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {SHOWN}), sep=', ')"
    session.run("python", "-c", versions)
    session.run("python", "-m", "pytest", *session.posargs)
