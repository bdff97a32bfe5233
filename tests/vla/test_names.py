"""The room's names exist, cost nothing until used, and its page's examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tokensieve.vla
from tests.vla.fixture import language_model, tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "vla.md"


@pytest.mark.parametrize("name", tokensieve.vla.__all__)
def test_every_public_name_exists_and_is_documented(name):
    assert (getattr(tokensieve.vla, name).__doc__ or "").strip()


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError):
        tokensieve.vla.nothing  # noqa: B018


def test_importing_the_room_loads_nothing_heavy():
    code = "import sys, tokensieve.vla; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_examples_of_the_page_run():
    tok = tokenizer()
    given = {"model": language_model(len(tok)), "tokenizer": tok, "picture_ids": [4, 4, 4]}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(example, str(PAGE), "exec"), given)
    assert given["digits"].shape == (3, 3) and given["action"].shape == (3, 1)
    assert given["vocabulary"].num_tokens == 35 and (given["sequence"].labels != -100).sum() > 5
