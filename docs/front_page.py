"""A hook of mkdocs: the site has the pages that lie beside docs/, with their links made to fit."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# By what each page is called in the site.
PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
# Files that are linked and are no page: their names stay, as code.
_NO_PAGE = re.compile(r"\[([^]]+)\]\((CITATION\.cff|LICENSE)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=_NO_PAGE.sub(r"`\1`", text)))
    return files
