# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""What runs below a process, as Linux tells."""

from pathlib import Path


def descendants(process: int) -> dict[int, str]:
    """Return the command lines of all processes below one, by their numbers."""
    children: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found: dict[int, str] = {}
    waiting = [process]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found[child] = commands[child]
            waiting.append(child)
    return found
