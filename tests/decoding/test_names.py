"""What is public, and that no module hides it."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import tokensieve as ts
from tokensieve import decoding


def test_no_module_has_the_name_of_something_public():
    """Importing such a module would put it in the place of the function."""
    modules = {module.name for module in pkgutil.iter_modules(decoding.__path__)}
    assert not modules & set(decoding.__all__)
    for module in modules:
        importlib.import_module(f"tokensieve.decoding.{module}")
    for name in decoding.__all__:
        assert callable(getattr(decoding, name)) and (getattr(decoding, name).__doc__ or "").strip(), name


def test_the_room_is_reached_from_the_top():
    assert ts.decoding is decoding and "decoding" in ts.__all__


def test_the_room_and_its_ledger_need_no_torch():
    code = "import sys, tokensieve.decoding.ledger; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
