"""Rooms whose names are imported on first use."""

import importlib

import pytest

ROOMS = [
    "tokensieve",
    "tokensieve.datasets",
    "tokensieve.datasets.trajectories",
    "tokensieve.decoding",
    "tokensieve.export",
    "tokensieve.vla",
]


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_is_found_and_listed_and_others_are_not(room):
    module = importlib.import_module(room)
    assert set(module.__all__) - {"__version__"} <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{room}' has no attribute 'nonsense'"):
        _ = module.nonsense
