"""Small random visual tokens, and the golden vectors."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tokensieve.compression import (
    Projector,
    Question,
    TowerLayer,
    TowerView,
    TwoLayerMLP,
    VisualTokens,
    in_dtype_of_input,
)
from tokensieve.compression.tokens import identity

GOLDEN = Path(__file__).parents[1] / "golden"


def load_golden(name):
    """Arrays as tensors, `params` as a dict."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: torch.from_numpy(stored[key]) for key in stored.files if stored[key].ndim}
        return {**arrays, "params": json.loads(str(stored["params"]))}


def random_mlp(width_in=16, hidden=24, width_out=32, act=None, seed=0):
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(width_in, hidden), act or nn.GELU(), nn.Linear(hidden, width_out))
    torch.set_rng_state(torch_state)
    return module.requires_grad_(False)


def as_two_layer(module):
    return TwoLayerMLP(w1=module[0].weight, b1=module[0].bias, w2=module[2].weight, act=module[1])


def projected(inputs, module, grids=None, crop=None, with_mlp=True, **evidence):
    """Visual tokens that are what `module` makes of `inputs`."""
    num_tokens = len(inputs)
    with torch.no_grad():
        features = module(inputs)
    return VisualTokens(
        features=features,
        grids=grids or ((1, 1, num_tokens),),
        crop=torch.zeros(num_tokens, dtype=torch.int64) if crop is None else crop,
        projector=Projector(
            inputs=inputs,
            fn=in_dtype_of_input(module),
            to_tokens=identity,
            mlp=as_two_layer(module) if with_mlp else None,
        ),
        **evidence,
    )


def plain(features, grids=None, crop=None):
    """Visual tokens without a projector."""
    num_tokens = len(features)
    return VisualTokens(
        features=features,
        grids=grids or ((1, 1, num_tokens),),
        crop=torch.zeros(num_tokens, dtype=torch.int64) if crop is None else crop,
    )


def random_inputs(num_tokens=96, width=16, seed=1):
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def random_tower(groups=4, patches=24, dtype=torch.float32, num_prefix=1, seed=3):
    """The last two layers of a tower of 2 heads of width 8, one group a frame, one patch a token."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    length = num_prefix + patches
    layers = {
        place: TowerLayer(
            query=tuple(2 * draw(2, length, 8) for _ in range(groups)),
            key=tuple(2 * draw(2, length, 8) for _ in range(groups)),
            scale=8**-0.5,
            num_prefix=num_prefix,
            to_tokens=identity,
        )
        for place in (-1, -2)
    }
    return TowerView(layers=layers, hidden=tuple(draw(length, 16) for _ in range(groups)))


def random_question(dtype=torch.float32, width=32, seed=5):
    embeds = torch.randn(5, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Question(embeds=embeds, text="Which digit is red?")


def random_video(dtype=torch.float32, seed=1, num_prefix=1):
    """96 tokens: 4 frames of 4 x 6, with everything that a method may look at."""
    return projected(
        random_inputs(seed=seed).to(dtype),
        random_mlp().to(dtype),
        grids=((4, 4, 6),),
        tower=random_tower(dtype=dtype, num_prefix=num_prefix),
        question=random_question(dtype),
    )


def random_policy(tokens):
    """Stands in for a trained scorer: logits made of the features, so that equal tokens get equal logits."""
    score_N = tokens.features.float()[:, 0]
    frames = score_N.view(tokens.grids[0][0], -1).mean(1)
    return torch.stack([-score_N, score_N], -1), torch.stack([-frames, frames], -1)


def options_for(method):
    """Options without which a method cannot run."""
    return {"policy": random_policy} if "policy" in method.needs else {}
