"""The shipped model, exported once a session for each method."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tokensieve.pipeline.vlm import VLM


@pytest.fixture(scope="session")
def exported_tiny(tmp_path_factory) -> Callable[[str | None], tuple[VLM, Path]]:
    """`exported_tiny(method)`: the shipped model with `keep=0.25`, and the folder it was exported to."""

    import tokensieve
    from tokensieve.export.vlm import export_vlm

    @cache
    def export(method: str | None) -> tuple[VLM, Path]:
        vlm = tokensieve.load("tiny", device="cpu").compress(method, 0.25)
        folder = tmp_path_factory.mktemp("exported") / f"tiny-{method}"
        export_vlm(vlm, folder, verify=False)
        return vlm, folder

    return export
