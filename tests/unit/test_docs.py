"""The documentation builds as a site: every page can be reached, no link leads nowhere, the reference is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` does: a page outside of the navigation and a dead link are errors."""
    pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install 'paci-megatron[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: warnings that are not shown are not counted, and the status is 0.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")} - {"index", "package-page"}
    text = (site / "index.html").read_text(encoding="utf-8")
    assert pages and not {page for page in pages if f'href="{page}/"' not in text}


@pytest.mark.parametrize(
    ("room", "name"),
    [("schedule", "validate.validate"), ("simulate", "engine.simulate"), ("runtime", "executor.Executor.run_to_update")],
)
def test_the_reference_has_the_docstrings(site: Path, room: str, name: str) -> None:
    text = (site / "api" / room / "index.html").read_text(encoding="utf-8")
    assert f'id="paci_megatron.{room}.{name}"' in text


def test_the_site_needs_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text and 'rel="stylesheet" href="http' not in text, page


def test_the_readme_and_the_site_have_the_same_commands_for_ones_own_data() -> None:
    """They are run from the README: tests/functional/test_commands.py."""
    commands = [
        (ROOT / page).read_text(encoding="utf-8").partition("# Your own data, end to end\n")[2].split("```\n")[1]
        for page in ("README.md", "docs/try-it.md")
    ]
    assert commands[0] == commands[1] and "paci-megatron report" in commands[0]
