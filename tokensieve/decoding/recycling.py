"""Token Recycling, arXiv 2408.08696, ACL 2025: greedy decoding that checks many guesses in one forward pass.

A      the recycling matrix: likeliest successors of every token, as last seen
root   the last token that is known; not yet in the cache
tree   guesses: node i has the token A[token of its parent, rank of i] and stands at the root's place + its depth

One step: run the tree under a mask by which every node sees the cache, its ancestors and itself; walk from the root
along guesses that are the model's own greedy choice; keep the keys of that path; note the successors of all nodes in A.
The answer is that of greedy decoding whatever A and the tree are (in float16 and bfloat16 up to ties of the logits).

Differs from the official code: processors and stopping criteria count at every token, so that the answer ends where
that of `generate` ends; a matrix belongs to a call, not to the process; of a token twice in the tree the later node is
noted on every device. The official code also drops the prompt's logits; so do we.
"""

# Shape legend: T nodes, L tokens so far, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from tokensieve.decoding.draft_tree import DraftTree, static_tree
from tokensieve.decoding.loop import Decoding, Loop
from tokensieve.decoding.recycling_matrix import RecyclingMatrix
from tokensieve.errors import BadOption

NODES = {"cpu": 8}  # a CPU computes every node; on a GPU they ride along
NODES_ELSEWHERE = 80


def token_recycling(matrix: RecyclingMatrix | None = None, *, tree: DraftTree | None = None) -> Decoding:
    """Greedy decoding in fewer forward passes, for `generate(custom_generate=...)`. One prompt at a time.

    Needs a plain dynamic cache and attention that takes a mask of its own (sdpa or eager); both are tested. It gains
    where decoding waits for memory (GPU, batch 1, long answers) and loses on most CPUs.

    Args:
        matrix: used and changed; an empty one, kept from call to call of what is returned, if left out.
        tree: 80 guesses, on a CPU 8, if left out; see `static_tree`.

    `DecodeOutput.details` has "accepted", how many tokens each forward pass after the prompt's gave, and "matrix".

    Raises:
        BadOption: when called: sampling, several prompts, or a matrix for another vocabulary.
        UnsupportedModel: when called: the cache or the attention failed the test.

    Example:
        >>> model.generate(**inputs, custom_generate=token_recycling(), max_new_tokens=200)
    """
    kept = [matrix]

    def run(loop: Loop) -> dict[str, object]:
        if loop.config.do_sample:
            raise BadOption("Token Recycling is greedy.", hint="Leave do_sample out, or use recycling_chain.")
        loop.session.require("tree")
        vocab_size = loop.logits_BV.shape[-1]
        if kept[0] is None:
            kept[0] = RecyclingMatrix(vocab_size, min(8, vocab_size))
        if kept[0].vocab_size != vocab_size:
            raise BadOption(f"The matrix is for {kept[0].vocab_size} tokens, the model has {vocab_size}.")
        guesses = tree
        if guesses is None:
            num_nodes = NODES.get(loop.logits_BV.device.type, NODES_ELSEWHERE)
            guesses = static_tree(num_nodes, kept[0].num_successors)
        root = loop.draw(loop.scores(loop.ids_BL, loop.logits_BV))
        accepted, done = [], not _append(loop, root)
        while not done:
            num, done = _step(loop, kept[0], guesses)
            accepted.append(num)
        return {"accepted": accepted, "matrix": kept[0]}

    return Decoding("token_recycling", run, one_prompt=True)


def _append(loop: Loop, token_1: Tensor) -> bool:
    """Adds a token; returns whether the answer goes on."""
    loop.ids_BL = torch.cat([loop.ids_BL, token_1[:, None]], dim=1)
    return not bool(loop.stopped(loop.ids_BL).all())


def _step(loop: Loop, matrix: RecyclingMatrix, tree: DraftTree) -> tuple[int, bool]:
    """Runs the tree once; returns how many tokens the answer grew by, and whether it has ended."""
    session, before = loop.session, loop.session.length
    tokens = matrix.draft(int(loop.ids_BL[0, -1]), tree)
    logits_TV = session.step(
        torch.tensor([tokens], device=loop.ids_BL.device),
        positions=session.positions(tree.depth_T),
        mask=session.tree_mask(tree.sees_TT),
    )[0]
    matrix.update(tokens, logits_TV)
    path, chosen = _longest(loop, tokens, logits_TV, tree, 0, loop.ids_BL)
    session.gather(torch.cat([torch.arange(before), before + torch.tensor(path)]))
    num, going = 0, True
    while going and num < len(chosen):
        going = _append(loop, chosen[num])
        num += 1
    loop.ledger.drafted_tokens += len(tokens) - 1
    loop.ledger.accepted_tokens += min(num, len(path) - 1)  # the last choice was no guess
    return num, not going


def _longest(
    loop: Loop, tokens: list[int], logits_TV: Tensor, tree: DraftTree, node: int, ids_1L: Tensor
) -> tuple[list[int], list[Tensor]]:
    """The longest path of right guesses from a node on, and the greedy choice after each of its nodes.

    Several children can hold the same token as long as the matrix has empty rows; then the first longest path counts.
    """
    token_1 = loop.scores(ids_1L, logits_TV[node : node + 1]).argmax(-1)
    best: tuple[list[int], list[Tensor]] = ([], [])
    right = [child for child in tree.children[node] if tokens[child] == token_1]
    if right:
        ids_1L = torch.cat([ids_1L, token_1[:, None]], dim=1)
        best = max((_longest(loop, tokens, logits_TV, tree, c, ids_1L) for c in right), key=lambda found: len(found[0]))
    return [node, *best[0]], [token_1, *best[1]]
