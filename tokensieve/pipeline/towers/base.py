"""Token reduction in the vision tower of any library: one line on, one line off, weights untouched.

    >>> handle = compress_tower(model, "tome", keep=0.5)      # open_clip, timm or transformers
    >>> features = model.encode_image(images)                 # the model's own call
    >>> handle.trace.anchor_mask()                            # where the tokens that are left stand
    >>> handle.remove()                                       # the model as it was

What makes a tower shorter lies between the attention and the MLP of a block, out of reach of forward hooks. So the
`forward` of every block is replaced, on the instance. A block in which nothing is to be done runs its own forward.
In the others this file runs the attention, on the parts that a `TowerBlock` names, through
`scaled_dot_product_attention`; the class row and the mean keys are computed beside it, never the whole map.

What a reduced tower does not do, and says so: gradient checkpointing (a block run again would reduce again), patch
dropout, attention masks, copies and pickles of the model while it is compressed. One forward at a time. Maps of
`output_attentions` are missing for the blocks that reduce.
"""

# Shape legend: B images, N tokens (prefix included), E extra tokens, P patches, D width, H heads, d width of a head

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokensieve.compression.tower_stage import BlockView, Reduced, TowerStage
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.towers.trace import TowerTrace

MAX_CHUNK_BYTES = 2**23  # attention of all heads for the queries of one chunk; larger ones leave the CPU's cache


class TowerBlock:
    """The parts of one block `x + attention(norm(x))`, then `x + feed_forward(x)`; one subclass a library.

    Attributes:
        module: the library's block.
        scale: what the products of queries and keys are multiplied with.
    """

    def __init__(self, module: nn.Module, scale: float):
        self.module = module
        self.scale = scale

    def norm(self, x: Tensor) -> Tensor:
        """The norm before the attention."""
        raise NotImplementedError

    def heads(self, h_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, N, d]` of the normed input, as they enter the product."""
        raise NotImplementedError

    def attention_output(self, context_BHNd: Tensor, h_BND: Tensor) -> Tensor:
        """What is added to the residual stream, from the attention's result and the normed input."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the MLP, its norm and its scale add to the residual stream."""
        raise NotImplementedError

    def dropout(self) -> float:
        """Dropout of attention weights in training."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower that can be reduced.

    Attributes:
        module: the library's tower.
        blocks: its blocks, first to last.
        num_prefix: tokens in front that are no patches.
        has_class_token: whether token 0 is a class token.
        why_not: a sentence on why the tower cannot run reduced in its present mode, or "".
        patch_outputs: makes what comes after the blocks aware of sizes; gets the handle, returns what undoes it.
        can_unmerge: whether the tower's outputs can come back at full raster length.
    """

    module: nn.Module
    blocks: Sequence[TowerBlock]
    num_prefix: int
    has_class_token: bool
    why_not: Callable[[], str]
    patch_outputs: Callable[[TowerHandle], list[Callable[[], None]]]
    can_unmerge: bool = False


@dataclass
class _Run:
    """The books of one forward: who stands where, in indices of the tokens that entered the first block."""

    batch: int
    num_tokens: int
    device: torch.device
    tokens: list[int] = field(default_factory=list)
    steps: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)  # block, owner, anchor, size

    def state(self, last_block: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Owner `[B, N0]`, anchor `[B, N]` and size `[B, N]` after that block, or now."""
        for block, *state in reversed(self.steps):
            if last_block is None or block <= last_block:
                return tuple(state)
        own = torch.arange(self.num_tokens, device=self.device).expand(self.batch, -1)
        return own, own, torch.ones(self.batch, self.num_tokens, device=self.device)

    def record(self, block: int, reduced: Reduced) -> None:
        owner, anchor, _ = self.state()
        owner = torch.where(owner >= 0, reduced.target.gather(1, owner.clamp(min=0)), -1)
        self.steps.append((block, owner, anchor.gather(1, reduced.anchor), reduced.size))


class TowerHandle:
    """A reduction at work in a tower: what it did, and the way to take it off. Also a context manager.

    Attributes:
        stage: the method.
        tower: the tower's module.
        keep: the budget.
        num_blocks: blocks that may reduce, from the first.
    """

    def __init__(self, tower: Tower, stage: TowerStage, keep: float | int, num_blocks: int, unmerge: bool):
        self.stage = stage
        self.tower = tower.module
        self.keep = keep
        self.num_blocks = num_blocks
        self.unmerges = unmerge
        self._tower = tower
        self._run: _Run | None = None
        self._undo: list[Callable[[], None]] = []
        if unmerge:
            self._check_can_unmerge()
        try:
            for index, block in enumerate(tower.blocks):
                self._undo.append(replace_method(block.module, "forward", _BlockForward(self, block, index)))
            self._undo += tower.patch_outputs(self)
        except Exception:
            self.remove()
            raise

    def remove(self) -> None:
        """Gives the tower its own forward back. The last trace stays. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> TowerHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    @property
    def trace(self) -> TowerTrace:
        """Where the patches of the last forward went.

        Raises:
            BadOption: no image went through the tower yet.
        """
        return self.trace_after(len(self._tower.blocks) - 1)

    def trace_after(self, block: int) -> TowerTrace:
        """Where they were after that block (from 0; -1 is before the first)."""
        if self._run is None:
            raise BadOption("No image went through the reduced tower yet, so there is no trace.")
        owner, anchor, size = self._run.state(block)
        prefix = self._tower.num_prefix
        owner_BP = owner[:, prefix:]
        return TowerTrace(
            anchor=anchor[:, prefix:] - prefix,
            owner=torch.where(owner_BP >= 0, owner_BP - prefix, -1),
            size=size[:, prefix:],
            num_prefix=prefix,
            tokens_per_block=tuple(self._run.tokens[: block + 2]),
        )

    @contextmanager
    def unmerged(self) -> Iterator[TowerHandle]:
        """Inside, a transformers tower gives `last_hidden_state` and `hidden_states` at full raster length.

        Raises:
            BadOption: the tower is not of transformers; there `trace.unmerge` does it by hand.
        """
        self._check_can_unmerge()
        before, self.unmerges = self.unmerges, True
        try:
            yield self
        finally:
            self.unmerges = before

    def _check_can_unmerge(self) -> None:
        if not self._tower.can_unmerge:
            raise BadOption(
                f"{type(self.tower).__name__} cannot give its outputs at full raster length; transformers towers can.",
                hint="Use handle.trace.unmerge(values) on tokens of your own.",
            )

    def sizes(self) -> Tensor | None:
        """`[B, N]` sizes of all tokens of the last forward, prefix included; None if nothing was reduced."""
        return self._run.steps[-1][3] if self._run is not None and self._run.steps else None

    def run_block(self, index: int, block: TowerBlock, x: Tensor, plain: Callable[[], Tensor]) -> Tensor:
        """One block; `plain()` is its own forward."""
        stage = self.stage
        if index == 0:
            self._begin(x)
        run = self._run
        if run is None or x.shape[1] != run.tokens[-1]:
            raise BadOption(
                f"Block {index} got {x.shape[1]} tokens that do not follow from the blocks before it.",
                hint="Run the tower as a whole, or remove the reduction first.",
            )
        acts = index < self.num_blocks and stage.acts_in(index)
        extra = stage.extra_tokens(index, x) if acts else None
        if acts or (stage.proportional and run.steps):
            x = self._reduced_block(index, block, x, extra, acts)
        else:
            x = plain()
        run.tokens.append(x.shape[1])
        stage.after_block(index, x)
        return x

    def _begin(self, x: Tensor) -> None:
        if why := self._tower.why_not():
            raise BadOption(why, hint="Call model.eval(), turn that feature off, or remove the reduction.")
        batch, num_tokens = x.shape[:2]
        self._run = _Run(batch, num_tokens, x.device, tokens=[num_tokens])
        self.stage.begin(
            num_tokens=num_tokens,
            num_prefix=self._tower.num_prefix,
            num_blocks=self.num_blocks,
            keep=self.keep,
            batch=batch,
        )

    def _reduced_block(self, index: int, block: TowerBlock, x: Tensor, extra: Tensor | None, acts: bool) -> Tensor:
        stage, run = self.stage, self._run
        num_extra = 0 if extra is None else extra.shape[1]
        h_BND = block.norm(x if extra is None else torch.cat([extra.to(x.dtype), x], dim=1))
        query, key, value = block.heads(h_BND)
        query = query[:, :, num_extra:]
        size_BN = run.state()[2]
        bias = None
        if stage.proportional and run.steps:
            bias = F.pad(size_BN.log(), (num_extra, 0))[:, None, None]
        if extra is not None and (extra_bias := stage.extra_bias(index)) is not None:
            extra_bias = F.pad(extra_bias, (0, x.shape[1]))[:, None, None]
            bias = extra_bias if bias is None else bias + extra_bias
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if bias is None else bias.to(query.dtype),
            dropout_p=block.dropout() if block.module.training else 0.0,
            scale=block.scale,
        )
        x = x + block.attention_output(context, h_BND[:, num_extra:])
        if acts:
            heads = keys = None
            if "attention" in stage.needs:
                paid = class_attention if self._tower.has_class_token else received_attention
                heads = paid(query, key, block.scale, bias)[..., num_extra:]
            if "keys" in stage.needs:
                keys = key[:, :, num_extra:].detach().mean(1, dtype=torch.float32)
            view = BlockView(
                index=index,
                num_blocks=self.num_blocks,
                num_prefix=self._tower.num_prefix,
                size=size_BN,
                class_attention=None if heads is None else heads.mean(1),
                head_attention=heads,
                keys=keys,
            )
            if (reduced := stage.reduce(x, view)) is not None:
                run.record(index, reduced)
                x = reduced.x
        return x + block.feed_forward(x)

    def __deepcopy__(self, memo):
        raise BadOption(
            "A model with a reduced tower cannot be copied or pickled.",
            hint="Remove the reduction (handle.remove()), copy the model, and compress the copy.",
        )

    def __reduce__(self):
        return self.__deepcopy__(None)


class _BlockForward:
    """Stands in for the `forward` of one block."""

    def __init__(self, handle: TowerHandle, block: TowerBlock, index: int):
        self.handle = handle  # also keeps the model from being copied: a copy would run the original's blocks
        self.block = block
        self.index = index
        self.own_forward = block.module.forward

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        if kwargs.get("is_causal") or any(isinstance(each, Tensor) for each in (*args, *kwargs.values())):
            raise BadOption("A reduced tower takes no attention mask: tokens go, so a mask would not fit.")
        return self.handle.run_block(self.index, self.block, x, lambda: self.own_forward(x, *args, **kwargs))


def class_attention(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """`[B, H, keys]` float32: attention of query 0 to all keys."""
    with torch.autocast(query.device.type, enabled=False):
        logits = (query[:, :, :1].float() * key).sum(-1, dtype=torch.float32) * scale  # a matmul would copy the keys
        return (logits if bias is None else logits + bias[:, 0]).softmax(-1)


@torch.no_grad()
def received_attention(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """`[B, H, keys]` float32: attention that every key receives, mean over queries, in chunks of queries."""
    batch, heads, num_queries = query.shape[:3]
    rows = num_queries  # at once in a graph, whose batch has no size yet
    if not torch.compiler.is_exporting():
        rows = max(1, MAX_CHUNK_BYTES // (4 * batch * heads * key.shape[2]))
    total_BHN = 0
    with torch.autocast(query.device.type, enabled=False):
        key_BHdN = key.float().transpose(-1, -2)
        for part in (query.float() * scale).split(rows, dim=2):
            logits = part @ key_BHdN
            total_BHN = total_BHN + (logits if bias is None else logits + bias).softmax(-1).sum(2)
    return total_BHN / num_queries


def replace_method(module: nn.Module, name: str, method: Callable) -> Callable[[], None]:
    """Sets `method` on the instance and returns what undoes it.

    Raises:
        BadOption: it is one of ours already.
        UnsupportedModel: somebody else replaced it on the instance.
    """
    present = module.__dict__.get(name)
    if isinstance(present, _BlockForward):
        raise BadOption("This tower is compressed already.", hint="Call remove() on its handle first.")
    if present is not None:
        raise UnsupportedModel(
            f"{type(module).__name__}.{name} was replaced by something else ({type(present).__name__}).",
            hint="Models spread over several devices by accelerate do so; load the tower on one device.",
        )
    setattr(module, name, method)
    return lambda: delattr(module, name)


def weighted_mean(x_BND: Tensor, size_BN: Tensor) -> Tensor:
    """`[B, D]` mean of the tokens weighted by size."""
    weight = (size_BN / size_BN.sum(1, keepdim=True))[..., None]
    return (x_BND.float() * weight).sum(1).to(x_BND.dtype)


class SizeBias:
    """Forward pre-hook for an attention pooling head: adds log size to its attention logits.

    Args:
        handle: whose sizes.
        tokens: from the hook's `(args, kwargs)` to the keys `[B, N, D]`; a head without the prefix gets the last N.
        shape_mask: from the `[B, 1, 1, N]` bias and the hook's `args` to the head's `attn_mask`.
    """

    def __init__(self, handle: TowerHandle, tokens: Callable[[tuple], Tensor], shape_mask: Callable):
        self.handle, self.tokens, self.shape_mask = handle, tokens, shape_mask

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if (size_BN := self.handle.sizes()) is None:
            return None
        keys = self.tokens(args)
        bias = size_BN[:, -keys.shape[1] :].log()[:, None, None].to(keys.dtype)
        return args, {**kwargs, "attn_mask": self.shape_mask(bias, args)}


def bias_multihead_attention(handle: TowerHandle, module: nn.MultiheadAttention) -> Callable[[], None]:
    """Puts a `SizeBias` on a torch attention called as `(query, tokens, tokens)`; returns what undoes it."""

    def shape_mask(bias: Tensor, args: tuple) -> Tensor:
        batch, num_queries = args[0].shape[:2]
        return bias.expand(batch, module.num_heads, num_queries, -1).flatten(0, 1)

    return module.register_forward_pre_hook(SizeBias(handle, lambda args: args[1], shape_mask), with_kwargs=True).remove
