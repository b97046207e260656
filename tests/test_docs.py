"""What the documents point at exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tessera.words import problems

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_symbol_of_the_paper_index_exists():
    found = re.findall(r"`([\w/]+)\.py::(\w+)`", (ROOT / "docs" / "papers.md").read_text())
    assert len(found) > 10
    for module, name in found:
        assert hasattr(importlib.import_module(module.replace("/", ".")), name), f"{module}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_composes(page):
    """The words are checked as `train.py` checks them, except those with a placeholder and those that add a file."""
    for line in re.findall(r"^python train\.py (.*)$", page.read_text(), re.M):
        words = [word for word in shlex.split(line, comments=True) if "<" not in word and ".jsonl" not in word]
        words = [word for word in words if not word.startswith("hydra/")]  # plugins that are not installed here
        if not {"--help", "model=rwr"} & set(words):
            assert problems([word for word in words if word != "-m"], multirun="-m" in words) == [], line
