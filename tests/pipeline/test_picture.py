from __future__ import annotations

import numpy as np
import torch

from tokensieve.compression import Plan, VisualTokens
from tokensieve.pipeline.adapter import VisualItem
from tokensieve.pipeline.picture import captioned_frames, contact_sheet, draw_kept, kept_masks, seen_area


def test_dropped_places_are_dimmed_and_kept_ones_untouched():
    frames = np.random.default_rng(0).integers(1, 255, (2, 8, 8, 3), dtype=np.uint8)
    mask = np.zeros((2, 2, 2), bool)
    mask[0, 0, 1] = True
    shown = draw_kept(frames, mask)
    assert np.array_equal(shown[0, :4, 4:], frames[0, :4, 4:])
    assert shown[0, :, :4].max() < 90 and shown[1].max() < 90
    assert shown.shape == frames.shape and shown.dtype == np.uint8


def test_token_frames_cover_several_pictures():
    frames = np.full((4, 6, 6, 3), 200, np.uint8)
    mask = np.array([[[True]], [[False]]])
    assert [int(f.max()) for f in draw_kept(frames, mask)] == [200, 200, 70, 70]


def test_raster_that_does_not_divide_the_picture():
    frames = np.full((1, 7, 5, 3), 100, np.uint8)
    assert draw_kept(frames, np.ones((1, 3, 3), bool)).min() == 100


def test_masks_follow_the_blocks_of_an_item():
    tokens = VisualTokens(features=torch.zeros(10, 2), grids=((1, 2, 2), (1, 2, 3)), crop=torch.zeros(10).long())
    item = VisualItem(
        row=0,
        modality="image",
        slots=torch.arange(10),
        features=tokens.features,
        candidates=torch.arange(10),
        tokens=tokens,
        deepstack=(),
        output_type=dict,
        in_tensor=False,
    )
    base, high = kept_masks(item, Plan(torch.tensor([1, 4, 9]), 10))
    assert base.tolist() == [[[False, True], [False, False]]]
    assert high.tolist() == [[[True, False, False], [False, False, True]]]


def test_seen_area_follows_the_crop():
    class Crops:
        do_center_crop = True

    class Processor:
        image_processor = Crops()

    frames = np.arange(2 * 4 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 3)
    assert np.array_equal(seen_area(frames, Processor()), frames[:, :, 2:6])
    Crops.do_center_crop = False
    assert seen_area(frames, Processor()) is frames


def test_contact_sheet_has_room_for_all():
    frames = np.full((5, 20, 40, 3), 120, np.uint8)
    tiles = captioned_frames(frames, np.ones((5, 2, 2), bool), labels=list("abcde"), width=80)
    assert tiles.shape == (5, 40 + 22, 80, 3)
    sheet = contact_sheet(tiles, "two lines\nof title", columns=4)
    assert sheet.width >= 4 * 80 and sheet.height >= 2 * 62 + 44
    assert contact_sheet(tiles[:1], "a title much wider than its only picture").width > 200


def test_of_a_tiled_image_only_the_view_of_the_whole_is_drawn():
    from tests.pipeline.tiny_processors import make_vlm, noise
    from tokensieve.pipeline.picture import shown_masks

    vlm = make_vlm("internvl").compress("uniform", 0.5)
    prepared = vlm.prepare(noise(1, height=16, width=48), "what?")
    (item,) = prepared.items
    assert len(item.tokens.grids) > 2
    (mask,) = shown_masks([item], prepared.plans, 1)
    whole = item.tokens.crop[prepared.plans[0].kept] == 0
    assert mask.sum() == whole.sum()
