# Copyright (C) 2026 The anomalib-osdirf authors
# SPDX-License-Identifier: Apache-2.0
"""For mkdocs: pages that live elsewhere in the repository, and links that work there as well as on the site."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "models/osdirf.md": "src/anomalib_osdirf/models/osdirf/README.md",
    "models/invad.md": "src/anomalib_osdirf/models/invad/README.md",
    "models/diffusionad.md": "src/anomalib_osdirf/models/diffusionad/README.md",
}
_PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>(?P<short>~?)(?P<name>[\w.]+)</code>")
_LINK = re.compile(r"(?P<image>!?)\[(?P<label>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    root = Path(config.config_file_path).parent
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(root / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links between files of the repository at pages; a file that is no page keeps its name only."""
    here = page.file.src_uri
    folder = posixpath.dirname(ELSEWHERE.get(here, f"docs/{here}"))

    def relinked(link: re.Match[str]) -> str:
        image, label, target, anchor = link.group("image", "label", "target", "anchor")
        if "://" in target:
            return link[0]
        file = posixpath.normpath(posixpath.join(folder, target))
        if file in _PAGE_OF:
            found = _PAGE_OF[file]
        elif file.startswith("docs/") and file.endswith((".md", ".jpg")):
            found = file.removeprefix("docs/")
        else:
            return label
        return f"{image}[{label}]({posixpath.relpath(found, posixpath.dirname(here) or '.')}{anchor or ''})"

    return _LINK.sub(relinked, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Show what docstrings refer to by a role, such as ``:class:``, by its name alone."""

    def name(role: re.Match[str]) -> str:
        return f"<code>{role['name'].rpartition('.')[2] if role['short'] else role['name']}</code>"

    return _ROLE.sub(name, html)
