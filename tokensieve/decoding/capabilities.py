"""What a model can do with a cache, found out by trying it on a copy.

A wrong answer must differ from the right one by enough to be seen: every test therefore runs the right answer, what the
model gives, and what it would give if it ignored the request, and asks that the model is far nearer to the first.
"""

# Shape legend: L tokens so far, T new tokens, H heads, V vocabulary

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokensieve.decoding.session import DecodeSession

NEAR = 0.1  # of the distance to the answer of a model that ignores the request
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def capable(session: DecodeSession, need: str) -> bool:
    """Whether the session's model passes the test of "crop", "tree" or "bias" with the session's kind of cache.

    Tried once for each model, attention, set of hooks and kind of cache; the forward passes of the test are added to
    the session's ledger, the session itself stays as it is.
    """
    known = _known.setdefault(session.model, {})
    key = (need, *_kind(session))
    if key not in known:
        known[key] = _try(session, need)
    return known[key]


def _kind(session: DecodeSession) -> tuple:
    model = session.model
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    layers = tuple(type(layer) for layer in session.cache.layers)
    return model.config._attn_implementation, model.dtype, hooks, layers, session.gather_trouble() is None


def _try(session: DecodeSession, need: str) -> bool:
    if need == "crop" and not session.cache.is_croppable:
        return False
    if need == "tree" and session.gather_trouble():
        return False
    twin = session.copy()
    twin.select([0])
    before = twin.ledger.forward_passes, twin.ledger.computed_tokens
    try:
        right, given, ignored = {"crop": _crop, "tree": _tree, "bias": _bias}[need](twin)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, IndexError):
        return False
    finally:
        session.ledger.forward_passes += twin.ledger.forward_passes - before[0]
        session.ledger.computed_tokens += twin.ledger.computed_tokens - before[1]
    return bool((given - right).abs().max() < NEAR * (ignored - right).abs().max())


def _crop(session: DecodeSession) -> tuple[Tensor, Tensor, Tensor]:
    """A token after two that were taken back, against the token alone, and against the token after the two."""
    first, second, third = _some_ids(session, 3)
    alone, uncut = session.copy(), session.copy()
    right = alone.step(_row(third))
    for twin in (session, uncut):
        twin.step(_row(first))
        twin.step(_row(second))
    ignored = uncut.step(_row(third))
    session.truncate(2)
    return right, session.step(_row(third)), ignored


def _tree(session: DecodeSession) -> tuple[Tensor, Tensor, Tensor]:
    """The child of the last of three siblings, then one more after gathering, against a plain continuation."""
    ids = _some_ids(session, 5)
    sees = torch.eye(4, dtype=torch.bool)
    sees[3, 2] = True
    offsets = torch.tensor([0, 0, 0, 1])
    alone, causal = session.copy(), session.copy()
    right = torch.cat([alone.step(_row(ids[2], ids[3]))[:, 1:], alone.step(_row(ids[4]))], dim=1)
    both = torch.cat([causal.step(_row(*ids[:4]))[:, 3:], causal.step(_row(ids[4]))], dim=1)
    length = session.length
    child = session.step(_row(*ids[:4]), positions=session.positions(offsets), mask=session.tree_mask(sees))[:, 3:]
    session.gather([*range(length), length + 2, length + 3])
    return right, torch.cat([child, session.step(_row(ids[4]))], dim=1), both


def _bias(session: DecodeSession) -> tuple[Tensor, Tensor, Tensor]:
    """The last key hidden from every head, by an additive mask and by the 2-D mask.

    Hiding it from half of the heads only must give something else than either, or heads share one mask.
    """
    first, second = _some_ids(session, 2)
    num_heads = session.model.config.get_text_config(decoder=True).num_attention_heads
    session.step(_row(first))
    hidden, plain, halves = session.copy(), session.copy(), session.copy()
    hidden.mask_BL = hidden.mask_BL.clone()
    hidden.mask_BL[:, -1] = False
    right, ignored = hidden.step(_row(second)), plain.step(_row(second))
    mask = session.tree_mask(torch.ones(1, 1, dtype=torch.bool)).repeat(1, num_heads, 1, 1)
    mask[:, : num_heads // 2, :, -2] = torch.finfo(mask.dtype).min
    some = halves.step(_row(second), mask=mask)
    mask[..., -2] = torch.finfo(mask.dtype).min
    given = session.step(_row(second), mask=mask)
    reach = (ignored - right).abs().max()
    per_head = min((some - right).abs().max(), (some - ignored).abs().max()) > NEAR * NEAR * reach
    return right, given if per_head else ignored, ignored


def _row(*ids: int) -> Tensor:
    return torch.tensor([ids])


def _some_ids(session: DecodeSession, num: int) -> list[int]:
    """Ids that stand for no picture."""
    config = session.model.config
    visual = {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))}
    return [i for i in range(num + len(visual)) if i not in visual][:num]
