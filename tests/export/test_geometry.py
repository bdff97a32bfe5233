"""Graph inputs worked out in numpy: they are those of the methods, and need no torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.compression.helpers import plain, random_inputs
from tokensieve.compression import cacovid, visionzip
from tokensieve.compression.views import split_views
from tokensieve.errors import BadOption
from tokensieve.export import geometry as module
from tokensieve.export.geometry import budget_inputs, geometry, num_kept
from tokensieve.policies import light_scorer

VIEWS = ((1, 2, 3), (1, 4, 5))
RASTERS = [((4, 2, 3),), ((1, 5, 4),), VIEWS, ((1, 2, 2),) * 3, ((5, 1, 1),), ((1, 1, 1),)]


def length(grids):
    return sum(t * h * w for t, h, w in grids)


def whole(grids):
    return np.zeros(length(grids), dtype=np.int64)


@pytest.mark.parametrize("grids", RASTERS)
def test_neighbours_and_places_are_those_that_policies_are_trained_with(grids):
    inputs = geometry(grids, whole(grids))
    frames = grids[0][0] if len(grids) == 1 else 1
    x = random_inputs(length(grids), 3)
    _, _, before, after, around = light_scorer._context(x[None], grids, frames)
    near = x[torch.from_numpy(inputs["neighbours"])]
    torch.testing.assert_close(near[:, 0] - x, before[0])
    torch.testing.assert_close(near[:, 1] - x, after[0])
    torch.testing.assert_close(near[:, 2:].mean(1) - x, around[0])
    angle = torch.from_numpy(inputs["place"])[..., None] * torch.pi * 2 ** torch.arange(light_scorer.NUM_FREQUENCIES)
    sines = light_scorer._fourier(grids, torch.device("cpu"))[:, : angle[0].numel()]
    torch.testing.assert_close(angle.flatten(1).sin(), sines)


def test_dtypes_and_lengths():
    inputs = geometry(VIEWS, np.array([0] * 6 + [1, 2] * 10))
    kinds = {name: (array.dtype.name, array.shape) for name, array in inputs.items()}
    assert kinds == {
        "frames": ("float32", (1,)),
        "tile": ("int64", (26,)),
        "tiles": ("float32", (3,)),
        "place": ("float32", (26, 3)),
        "neighbours": ("int64", (26, 6)),
        "view_index": ("int64", (26,)),
    }
    assert len(geometry(((4, 2, 3),), np.zeros(24))["frames"]) == 4
    assert len(geometry(((2, 1, 6), (1, 3, 4)), np.zeros(24))["frames"]) == 1


@pytest.mark.parametrize("keep", [1, 2, 5, 11, 17, 24])
@pytest.mark.parametrize("grids, crop", [(((4, 2, 3),), None), (VIEWS, [0] * 6 + [1, 3] * 9 + [4, 4]), (VIEWS, None)])
def test_views_and_their_shares_are_those_of_the_method(grids, crop, keep):
    crop = whole(grids) if crop is None else np.array(crop)
    tokens = plain(random_inputs(length(grids)), grids=grids, crop=torch.from_numpy(crop))
    view_N = geometry(grids, crop)["view_index"]
    share_V2 = budget_inputs("visionzip", keep, grids, crop)["views"]
    seen = 0
    for member_n, share in split_views(tokens, keep):
        (view,) = set(view_N[member_n.numpy()].tolist())
        assert (view_N == view).sum() == len(member_n)
        whole_ones = max(1, round(share * visionzip.DOMINANT_SHARE)) if share else 0
        assert share_V2[view].tolist() == [whole_ones, share - whole_ones]
        seen += share
    assert share_V2.sum() == seen == keep and share_V2.dtype == np.int64


def test_every_view_with_a_share_has_a_dominant_token():
    shares = budget_inputs("visionzip", 7, ((4, 2, 3),), np.zeros(24), {"dominant": 0.1})["views"]
    assert shares[:, 0].tolist() == [1, 1, 1, 1]


def test_a_budget_is_spread_over_tiles():
    crop = np.array([0] * 6 + [1, 3] * 9 + [4, 4])
    for method in ("zoprune", "norm-diversity"):
        assert np.bincount(budget_inputs(method, 12, VIEWS, crop)["budget"]).tolist() == [4, 3, 0, 3, 2]
    for method in ("divprune", "evs", "cacovid", "uniform", "visionzip"):
        assert budget_inputs(method, 12, VIEWS, crop)["budget"].max() == 0


def test_evs_never_keeps_less_than_a_frame():
    assert num_kept("evs", 0.1, ((4, 2, 3),)) == 6 and num_kept("uniform", 0.1, ((4, 2, 3),)) == 2
    assert num_kept("evs", 0.5, ((4, 2, 3),)) == 12
    assert num_kept("evs", 0.5, VIEWS) == 26 and num_kept("evs", 0.5, ((1, 2, 3),)) == 6
    assert len(budget_inputs("evs", 2, ((4, 2, 3),), np.zeros(24))["budget"]) == 6


def test_quotas_are_of_exact_products():
    quota = lambda keep, **options: budget_inputs("cacovid", keep, ((5, 10, 10),), np.zeros(500), options)["quota"]  # noqa: E731
    assert quota(7).tolist() == [3, 4, 1]
    assert quota(10, importance=0.3).tolist() == [2, 3, 1]  # 0.3 is a little less than three tenths
    assert quota(10, importance=0.1).tolist() == [1, 1, 1]
    assert quota(200, importance=1.0, frame_cap=0.25).tolist() == [200, 200, 25]
    assert quota(200, importance=1.0, frame_cap=9.0).tolist() == [200, 200, 100]
    assert quota(200).tolist() == [100, 100, 30]


def test_constants_are_those_of_the_methods():
    assert module.DOMINANT_SHARE == visionzip.DOMINANT_SHARE
    assert (module.IMPORTANCE, module.CAP_OF_KEEP) == (cacovid.IMPORTANCE, cacovid.CAP_OF_KEEP)


@pytest.mark.parametrize("num_keep", [0, 25, -1])
def test_impossible_budgets_are_refused(num_keep):
    with pytest.raises(BadOption, match="1 to 24"):
        budget_inputs("divprune", num_keep, ((4, 2, 3),), np.zeros(24))


def test_a_crop_of_another_length_is_refused():
    with pytest.raises(BadOption, match="24 tokens"):
        geometry(((4, 2, 3),), np.zeros(23))


def test_it_needs_no_torch():
    code = """
import sys

class NoTorch:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(name)

sys.meta_path.insert(0, NoTorch())
import numpy as np
from tokensieve.export.geometry import budget_inputs, geometry
geometry(((2, 2, 2),), np.zeros(8))
budget_inputs("visionzip", 4, ((2, 2, 2),), np.zeros(8))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
