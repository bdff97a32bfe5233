"""The memory of Token Recycling: for every token the k tokens last seen as its likeliest successors.

It starts with zeros and gets better with every forward pass; kept or saved, it makes the next request faster. It holds
ids only, V * k * 4 bytes. What a file holds changes the speed of decoding, never its outcome.
"""

# Shape legend: V vocabulary, k successors, T tokens

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokensieve.decoding.draft_tree import DraftTree
from tokensieve.errors import BadOption

_NAME = "successors"


class RecyclingMatrix:
    """Successors of every token, likeliest first.

    Args:
        vocab_size: V, the width of the model's logits.
        num_successors: k, 8 in the paper.

    Attributes:
        successors_Vk: int32, on the CPU.

    Raises:
        BadOption: a number below 1, or more successors than tokens.
    """

    def __init__(self, vocab_size: int, num_successors: int = 8):
        if not 1 <= num_successors <= vocab_size:
            raise BadOption(f"Needed: 1 <= num_successors <= vocab_size, got {num_successors} and {vocab_size}.")
        self.successors_Vk = torch.zeros(vocab_size, num_successors, dtype=torch.int32)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.successors_Vk)

    @property
    def num_successors(self) -> int:
        """k."""
        return self.successors_Vk.shape[1]

    def draft(self, root: int, tree: DraftTree) -> list[int]:
        """The token of every node of the tree, that of the root first.

        Raises:
            BadOption: the tree has ranks that the matrix does not keep.
        """
        if max(tree.ranks) >= self.num_successors:
            raise BadOption(
                f"The tree has ranks up to {max(tree.ranks)}, the matrix keeps {self.num_successors} successors.",
                hint="Make the tree with static_tree(max_rank=...).",
            )
        tokens = [root]
        for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
            tokens.append(int(self.successors_Vk[tokens[parent], rank]))
        return tokens

    def update(self, tokens: Sequence[int], logits_TV: Tensor) -> None:
        """Notes the successors of tokens that went through the model; of a token that came twice the later ones."""
        top_Tk = logits_TV.topk(self.num_successors, dim=-1).indices.to("cpu", torch.int32)
        last = {token: place for place, token in enumerate(tokens)}
        self.successors_Vk[list(last)] = top_Tk[list(last.values())]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        save_file({_NAME: self.successors_Vk}, str(path), metadata={"format": "tokensieve recycling matrix 1"})

    @classmethod
    def load(cls, path: str | Path) -> RecyclingMatrix:
        """Reads what `save` wrote.

        Raises:
            BadOption: no such file, another kind of file, or ids outside the vocabulary.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise BadOption(f"{str(path)!r} is not a readable safetensors file.") from error
        stored = tensors.get(_NAME)
        if stored is None or stored.ndim != 2 or stored.dtype != torch.int32 or not stored.numel():
            raise BadOption(f"{str(path)!r} holds no recycling matrix.", hint="Write it with RecyclingMatrix.save.")
        matrix = cls(*stored.shape)
        if stored.min() < 0 or stored.max() >= matrix.vocab_size:
            raise BadOption(f"{str(path)!r} names tokens outside its vocabulary of {matrix.vocab_size}.")
        matrix.successors_Vk = stored
        return matrix
