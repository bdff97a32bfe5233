"""Token Recycling gives what greedy decoding gives, whatever it guesses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.decoding.models import CASES, new_model, prompts, shared_model
from tokensieve.decoding import DraftTree, RecyclingMatrix, static_tree, token_recycling
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.vlm import VLM

VOCAB = 97


def generate(name, keep=None, custom=None, **options):
    options = dict(max_new_tokens=24, do_sample=False) | options
    return shared_model(name).generate(**prompts(name, keep), custom_generate=custom, **options)


def random_matrix(seed=0):
    matrix = RecyclingMatrix(VOCAB)
    generator = torch.Generator().manual_seed(seed)
    matrix.successors_Vk = torch.randint(0, VOCAB, (VOCAB, 8), generator=generator, dtype=torch.int32)
    return matrix


def told(name, keep=None):
    """A matrix that knows the greedy answer by heart, as far as every token has one successor in it."""
    matrix, ids = RecyclingMatrix(VOCAB), generate(name, keep)[0].tolist()
    for token, after in zip(ids, ids[1:], strict=False):
        matrix.successors_Vk[token] = torch.cat([torch.tensor([after]), matrix.successors_Vk[token][:-1]])
    return matrix


@pytest.mark.parametrize(("name", "keep"), [*CASES, ("qwen3_vl", 0.4), ("paligemma", None), ("internvl", None)])
def test_it_equals_greedy(name, keep):
    want = generate(name, keep)
    custom = token_recycling()
    for _ in range(2):  # cold, then with what the first answer left
        out = generate(name, keep, custom, return_dict_in_generate=True)
        assert torch.equal(out.sequences, want)
    for matrix, tree in [(random_matrix(), static_tree(80)), (told(name, keep), static_tree(30, 3, 5))]:
        assert torch.equal(generate(name, keep, token_recycling(matrix, tree=tree)), want)


def test_a_good_matrix_saves_passes_and_the_ledger_says_how_many():
    custom = token_recycling(told("llama"), tree=static_tree(30, 3, 5))
    generate("llama", custom=custom)  # the model's test is behind us
    out = generate("llama", custom=custom, return_dict_in_generate=True)
    accepted, ledger = out.details["accepted"], out.ledger
    assert sum(accepted) + 1 == ledger.generated_tokens == out.sequences.shape[1] - 9
    assert ledger.forward_passes == 1 + len(accepted) < ledger.generated_tokens
    assert all(1 <= num <= 6 for num in accepted) and max(accepted) > 2
    assert ledger.drafted_tokens == 30 * len(accepted)
    assert 0 <= ledger.accepted_tokens - (sum(accepted) - len(accepted)) <= 1  # the last pass may end in a guess
    assert ledger.computed_tokens == 9 + 31 * len(accepted)


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.8),
        dict(no_repeat_ngram_size=2),
        dict(suppress_tokens=list(range(0, 60))),
        dict(min_new_tokens=15, eos_token_id=list(range(0, 97, 5))),
        dict(eos_token_id=list(range(0, 97, 9)), max_new_tokens=60),
        dict(forced_eos_token_id=93),
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_and_ends_count_at_every_token(options):
    want = generate("llama", **options)
    assert not torch.equal(want, generate("llama")) or "forced_eos_token_id" in options
    custom = token_recycling(told("llama"), tree=static_tree(30, 3, 5))
    for _ in range(2):
        assert torch.equal(generate("llama", custom=custom, **options), want)


def test_every_length_limit_is_met():
    custom, want = token_recycling(told("llama"), tree=static_tree(30, 3, 5)), generate("llama")
    for length in range(1, 12):
        assert torch.equal(generate("llama", custom=custom, max_new_tokens=length), want[:, : 9 + length])


def test_the_longest_path_wins_among_equal_children():
    """An empty matrix guesses 0 everywhere; the second of two equal children leads further. Later only one is 0."""
    model = shared_model("llama")
    tree = DraftTree(parents=(-1, 0, 0, 2), ranks=(0, 0, 1, 0))
    zeros = torch.zeros(1, VOCAB)
    zeros[0, 0] = 100

    hook = model.lm_head.register_forward_hook(lambda m, a, out: zeros.expand(*out.shape))
    try:
        out = generate("llama", custom=token_recycling(tree=tree), max_new_tokens=7, return_dict_in_generate=True)
    finally:
        hook.remove()
    assert out.details["accepted"] == [3, 2, 1]


def test_what_it_refuses():
    with pytest.raises(BadOption, match="recycling_chain"):
        generate("llama", custom=token_recycling(), do_sample=True)
    with pytest.raises(BadOption, match="96 tokens, the model has 97"):
        generate("llama", custom=token_recycling(RecyclingMatrix(96)))
    with pytest.raises(BadOption, match="ranks up to 7, the matrix keeps 4"):
        generate("llama", custom=token_recycling(RecyclingMatrix(VOCAB, 4), tree=static_tree(80)))
    with pytest.raises(UnsupportedModel, match="'tree'.*DynamicSlidingWindowLayer"):
        generate("gemma3", custom=token_recycling())


def test_compression_inside_the_language_model_is_refused_by_name():
    model = new_model("llava")
    vlm = VLM(model).compress("pyramiddrop", 0.4)
    inputs = vlm.compress_inputs(prompts("llava"))
    with pytest.raises(UnsupportedModel, match="take compression inside the language model off"):
        model.generate(**inputs, custom_generate=token_recycling(), max_new_tokens=4)


def test_a_tree_of_paths():
    tree = static_tree(80)
    depths = tree.depth_T.tolist()
    assert len(tree) == 81 and depths == sorted(depths) and max(depths) <= 6 and depths[0] == 0
    assert max(tree.ranks) <= 7
    for node in range(1, 81):
        parent = tree.parents[node]
        assert node in tree.children[parent] and depths[node] == depths[parent] + 1
        assert tree.sees_TT[node, node] and tree.sees_TT[node, 0] and tree.sees_TT[node].sum() == depths[node] + 1
        if tree.ranks[node]:  # a likelier sibling is there as well
            siblings = [tree.ranks[child] for child in tree.children[parent]]
            assert tree.ranks[node] - 1 in siblings
    assert len(static_tree(5, max_rank=1, max_depth=5)) == 6


@pytest.mark.parametrize("values", [(0,), (5, 1, 4), (5, 0), (5, 8, 0)])
def test_bad_trees(values):
    with pytest.raises(BadOption):
        static_tree(*values)


@pytest.mark.parametrize(
    "tree", [dict(parents=(), ranks=()), dict(parents=(-1, 1), ranks=(0, 0)), dict(parents=(-1, 0, 0), ranks=(0, 1, 1))]
)
def test_bad_tree_shapes(tree):
    with pytest.raises(BadOption):
        DraftTree(**tree)


def test_drafts_follow_the_matrix():
    matrix = RecyclingMatrix(6, 2)
    matrix.successors_Vk = torch.tensor([[1, 2], [3, 4], [5, 0], [0, 1], [2, 2], [4, 3]], dtype=torch.int32)
    tree = DraftTree(parents=(-1, 0, 0, 1, 2, 4), ranks=(0, 0, 1, 1, 0, 0))
    assert matrix.draft(0, tree) == [0, 1, 2, 4, 5, 4]


def test_updates_note_the_last_of_equal_tokens_and_leave_the_others():
    matrix = random_matrix()
    before = matrix.successors_Vk.clone()
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    matrix.update([7, 9, 7], logits)
    assert torch.equal(matrix.successors_Vk[7].long(), logits[2].topk(8).indices)
    assert torch.equal(matrix.successors_Vk[9].long(), logits[1].topk(8).indices)
    others = [i for i in range(VOCAB) if i not in (7, 9)]
    assert torch.equal(matrix.successors_Vk[others], before[others])


def test_a_matrix_is_saved_and_read(tmp_path):
    matrix = told("llama")
    matrix.save(tmp_path / "m.safetensors")
    again = RecyclingMatrix.load(tmp_path / "m.safetensors")
    assert torch.equal(again.successors_Vk, matrix.successors_Vk) and again.successors_Vk.dtype == torch.int32
    assert (again.vocab_size, again.num_successors) == (97, 8)


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(3, 2, dtype=torch.int32)},
        {"successors": torch.zeros(3, 2)},
        {"successors": torch.zeros(3, dtype=torch.int32)},
        {"successors": torch.zeros(0, 8, dtype=torch.int32)},
        {"successors": torch.full((3, 2), 3, dtype=torch.int32)},
        {"successors": torch.full((3, 2), -1, dtype=torch.int32)},
        {"successors": torch.zeros(2, 3, dtype=torch.int32)},
    ],
)
def test_files_that_are_no_matrix(tensors, tmp_path):
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(BadOption):
        RecyclingMatrix.load(tmp_path / "m.safetensors")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"\x80\x04nonsense")
    for name in ("m.safetensors", "missing.safetensors"):
        with pytest.raises(BadOption, match="not a readable safetensors file"):
            RecyclingMatrix.load(tmp_path / name)


@pytest.mark.parametrize("values", [(0, 0), (97, 0), (5, 8)])
def test_bad_matrices(values):
    with pytest.raises(BadOption):
        RecyclingMatrix(*values)
