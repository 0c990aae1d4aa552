# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual environments that borrow this one's packages, and what is run in them."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
}


def output_of(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command that has to succeed."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def make_environment(directory: Path) -> Path:
    """Make a virtual environment that sees the packages of this one, but none of its start-up files."""
    venv.create(directory, with_pip=False, symlinks=os.name != "nt")
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site_packages = Path(output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    borrowed = [place for place in sys.path if Path(place).name in {"site-packages", "dist-packages"}]
    (site_packages / "zz_borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return python


def install(python: Path, *arguments: str | Path, within: Sequence[str] = ()) -> None:
    """Install with this environment's pip; it has our package too, perhaps, which must be left alone.

    ``within`` is the command that runs pip, if any.
    """
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-input")
    output_of(*within, *pip, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *arguments)
