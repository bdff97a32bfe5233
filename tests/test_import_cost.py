"""`import tokensieve` and `tokensieve --help` must not load torch, transformers or a decoder."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "lightning", "av", "decord", "sklearn", "PIL", "pyarrow", "jinja2")


@pytest.mark.parametrize(
    ("code", "seconds"),
    [
        ("import tokensieve", 0.3),
        ("from tokensieve.cli import main; main(['--help'])", 0.5),
        ("from tokensieve.cli import main; main(['answer', '--help'])", 0.5),
        ("from tokensieve.cli import main; main(['train', 'tiny', '--help'])", 0.6),
    ],
)
def test_light(code, seconds):
    probe = f"""
import sys
try:
    {code}
except SystemExit:
    pass
loaded = [m for m in {HEAVY} if m in sys.modules]
sys.exit(f"loaded {{loaded}}" if loaded else 0)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr
    # User CPU time hardly depends on load; three times the goal keeps a slow machine from failing a right program.
    assert spent < 3 * seconds, f"{spent:.2f} s"


def test_every_public_name_exists_and_is_documented():
    import tokensieve

    for name in tokensieve.__all__:
        value = getattr(tokensieve, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), f"{name} has no docstring"
