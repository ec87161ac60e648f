"""Links of the pages lead somewhere, and the site builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guides import PAGES, ROOT

LINKED = sorted({*PAGES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings: of one text, and so of no code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path: Path) -> list[str]:
    """The links of a page that lead nowhere here; links into the web are not followed."""
    found = []
    for link in re.findall(r"\]\((?!https?:)([^) ]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/api/*.md")), ids=lambda path: path.stem)
def test_the_modules_of_the_reference_are_there(path: Path) -> None:
    names = re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)
    for name in names:
        module = ROOT / name.replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file(), name
    assert names


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Two words, and `code`\n")
    links = ["b.md", "b.md#two-words-and-code", "b.md#none", "c.md", "#one", "https://c.d/e#f"]
    (tmp_path / "a.md").write_text("# One\n" + " ".join(f"[x]({link})" for link in links))
    assert broken(tmp_path / "a.md") == ["b.md#none", "c.md"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    assert "HaltHead" in (tmp_path / "api/haltwise.html").read_text()
    for path in tmp_path.rglob("*.html"):
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", path.read_text()), path
