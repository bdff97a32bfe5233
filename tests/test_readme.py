"""The README's claims: its method table is the registry, its Python runs, its files exist, its commands parse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokensieve.cli import COMMANDS
from tokensieve.commands.methods import markdown
from tokensieve.compression import list_methods

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_methods_page_is_the_registry():
    """Made by `tokensieve methods --markdown`."""
    assert markdown(list_methods()) in (ROOT / "docs" / "methods.md").read_text()


def test_the_readme_names_every_method():
    section = README.split("## Methods")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w+-]+)`", section))
    assert {m.name for m in list_methods()} <= named


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    from tokensieve.cli import main

    monkeypatch.chdir(tmp_path)
    main(["clips", "--out", "demo", "--count", "4"])
    capsys.readouterr()
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "kept" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert all((page.parent / link).exists() for link in links), links


def test_every_command_of_the_readme_exists_and_the_other_way_round():
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE))
    named = set(re.findall(r"^tokensieve (\w+)", blocks, re.MULTILINE))
    assert named | {"demo"} == set(COMMANDS)


def test_make_targets_of_the_readme_exist():
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", targets, re.MULTILINE)


def test_ci_calls_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "\nmake test\n" in README


def test_no_page_names_a_registry_host_or_a_local_path():
    for page in [*PAGES, ROOT / "LOG.md", ROOT / "pyproject.toml", ROOT / "Makefile"]:
        assert not re.search(r"pypi\.org|files\.pythonhosted|/work/|/root/", page.read_text()), page


def test_every_public_name_has_a_line_in_the_docs():
    import tokensieve
    from tokensieve import analysis, compression, datasets, decoding, errors, export, policies, vla
    from tokensieve.datasets import trajectories
    from tokensieve.pipeline import adaptation, families, towers

    rooms = (tokensieve, analysis, compression, datasets, trajectories, decoding, policies, export)
    rooms += (adaptation, families, towers, vla)
    names = {name for room in rooms for name in room.__all__} - {"__version__"}
    names |= {name for name, value in vars(errors).items() if isinstance(value, type)}
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in sorted(names) if f"| `{name}` |" not in page] == []
