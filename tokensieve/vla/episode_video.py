"""A roll-out as pictures: what the agent saw, with the instruction, the code and the action written beside it."""

# Shape legend: S steps, T pictures, H height, W width in pixels

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tokensieve.datasets.trajectories.episodes import ACTIONS
from tokensieve.datasets.trajectories.tiles import TILE, VIEW, render_grids
from tokensieve.datasets.write import write_video
from tokensieve.errors import BadOption
from tokensieve.vla.rollout import EpisodeTrace
from tokensieve.vla.vocabulary import BehaviourVocabulary

ZOOM = 6
SIDE, PANEL = VIEW * TILE * ZOOM, 264  # pixels of the view, and width of the text beside it
FPS, LAST = 3, 5  # pictures a second, and how many show how it ended
_PAPER, _INK, _FADED, _GOOD, _BAD = (250, 250, 248), (30, 30, 34), (110, 110, 116), (20, 120, 50), (170, 40, 30)
_DIM = 0.35  # brightness of cells that the planner dropped


def draw_episode(trace: EpisodeTrace, levels: tuple[int, ...] | None = None) -> np.ndarray:
    """Pictures `[S + 5, H, W, 3]` uint8 of an episode: one a step, then how it ended.

    Where the planner's tokens are cells, those that it did not keep are dimmed in the pictures it was asked about.

    Args:
        trace: of `roll_out`.
        levels: of the code; None for agents without one.

    Raises:
        BadOption: the episode has codes, but no levels are given.
    """
    if trace.digits and levels is None:
        raise BadOption("The episode has codes; give their levels.")
    vocabulary = BehaviourVocabulary(levels, 0) if trace.digits else None
    views = render_grids(np.stack(trace.grids))
    pictures = []
    for step in range(len(trace)):
        view = views[step].repeat(ZOOM, 0).repeat(ZOOM, 1)
        if trace.kept[step] is not None:
            cells = trace.kept[step].reshape(VIEW, VIEW).repeat(TILE * ZOOM, 0).repeat(TILE * ZOOM, 1)
            view = np.where(cells[..., None], view, (view * _DIM).astype(np.uint8))
        lines = [("told", trace.told)]
        if trace.told != trace.instruction:
            lines.append(("asked for", trace.instruction))
        if vocabulary is not None:
            digits = torch.from_numpy(trace.digits[step])
            names = " ".join(str(i) for i in trace.digits[step].tolist())
            lines.append(("behaviour", f"{vocabulary.display(digits)}\ndigits {names}"))
        lines.append(("step", f"{step + 1} of {len(trace)}"))
        lines.append(("action", ACTIONS[trace.actions[step]]))
        pictures.append(_page(view, lines))
    end = ("end", "done", _GOOD) if trace.success else ("end", "not done", _BAD)
    calls = ("calls of the planner", str(trace.num_calls))
    pictures += [_page(view, [("told", trace.told), ("steps", str(len(trace))), calls, end])] * LAST
    return np.stack(pictures)


def write_episodes_video(
    path: str | os.PathLike, traces: Sequence[EpisodeTrace], levels: tuple[int, ...] | None = None
) -> None:
    """Writes episodes one after the other as an MP4.

    Raises:
        BadOption: there are none, or as `draw_episode`.
    """
    if not traces:
        raise BadOption("There is no episode to draw.")
    write_video(path, np.concatenate([draw_episode(trace, levels) for trace in traces]), FPS)


def _page(view: np.ndarray, lines: Sequence[tuple]) -> np.ndarray:
    page = Image.new("RGB", (SIDE + PANEL, SIDE), _PAPER)
    page.paste(Image.fromarray(view), (0, 0))
    draw, y = ImageDraw.Draw(page), 14
    small, large = ImageFont.load_default(13), ImageFont.load_default(18)
    for label, text, *colour in lines:
        draw.text((SIDE + 16, y), label, fill=_FADED, font=small)
        y += 17
        for line in [part for whole in text.split("\n") for part in textwrap.wrap(whole, 25)]:
            draw.text((SIDE + 16, y), line, fill=colour[0] if colour else _INK, font=large)
            y += 23
        y += 10
    return np.asarray(page)
