from __future__ import annotations

import pytest
import torch

from tests.decoding.models import new_model, prompts, shared_model
from tests.decoding.test_recycling import VOCAB, random_matrix, told
from tokensieve.decoding import RecyclingCandidates, RecyclingMatrix, recycling_chain
from tokensieve.errors import BadOption
from tokensieve.pipeline.vlm import VLM


def generate(name, keep=None, custom=None, **options):
    options = dict(max_new_tokens=24, do_sample=False) | options
    return shared_model(name).generate(**prompts(name, keep), custom_generate=custom, **options)


@pytest.mark.parametrize(
    ("name", "keep"), [("llama", None), ("llava", 0.4), ("qwen2_5_vl", None), ("qwen2_5_vl", 0.4), ("gemma3", None)]
)
def test_it_equals_greedy(name, keep):
    want = generate(name, keep)
    for matrix in (None, random_matrix(), told(name, keep)):
        assert torch.equal(generate(name, keep, recycling_chain(matrix)), want)
    assert "_get_candidate_generator" not in vars(shared_model(name))


def test_the_ledger():
    custom = recycling_chain(told("llava", 0.4), num_guesses=3)
    out = generate("llava", 0.4, custom, return_dict_in_generate=True)
    ledger, inputs = out.ledger, prompts("llava", 0.4)
    length = inputs["input_ids"].shape[1]
    assert (ledger.prompt_tokens, ledger.visual_tokens) == (length, int((inputs["input_ids"] == 95).sum()))
    assert ledger.generated_tokens == out.sequences.shape[1] - length
    assert ledger.drafted_tokens == 3 * (ledger.forward_passes - 1) and ledger.accepted_tokens > 0
    assert ledger.generated_tokens <= ledger.forward_passes + ledger.accepted_tokens
    assert ledger.forward_passes < ledger.generated_tokens


def test_cold_sampling_is_greedy_and_warm_sampling_follows_the_state():
    custom = recycling_chain(told("llama"))
    assert torch.equal(generate("llama", None, custom, do_sample=True, temperature=1e-4), generate("llama"))
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(generate("llama", None, recycling_chain(told("llama")), do_sample=True))
    assert torch.equal(*made) and not torch.equal(made[0], generate("llama"))


def test_what_it_guesses_and_notes():
    matrix = RecyclingMatrix(6, 2)
    matrix.successors_Vk = torch.tensor([[1, 2], [3, 4], [5, 0], [0, 1], [2, 2], [4, 3]], dtype=torch.int32)
    candidates = RecyclingCandidates(matrix, 3)
    ids, logits = candidates.get_candidates(torch.tensor([[4, 0]]))
    assert ids.tolist() == [[4, 0]] and logits is None  # the prompt runs alone
    candidates.update_candidate_strategy(torch.tensor([[4, 0, 5]]), torch.eye(6)[None, 5:], 0)
    assert matrix.successors_Vk[0, 0] == 5
    ids, _ = candidates.get_candidates(torch.tensor([[4, 0, 5]]))
    assert ids.tolist() == [[4, 0, 5, 4, 2, 5]]
    candidates.update_candidate_strategy(torch.tensor([[4, 0, 5, 4, 1]]), torch.eye(6)[None, :4], 1)
    assert matrix.successors_Vk[4, 0] == 1 and matrix.successors_Vk[5, 0] == 3  # of two 5s the later
    assert (candidates.drafted_tokens, candidates.accepted_tokens) == (3, 1)


def test_what_it_refuses():
    for bad in (0, -1):
        with pytest.raises(BadOption, match="num_guesses"):
            recycling_chain(num_guesses=bad)
        with pytest.raises(BadOption, match="num_guesses"):
            RecyclingCandidates(RecyclingMatrix(VOCAB), bad)
    with pytest.raises(BadOption, match="96 tokens"):
        generate("llama", None, recycling_chain(RecyclingMatrix(96)))
    with pytest.raises(BadOption, match="no beams"):
        generate("llama", None, recycling_chain(), num_beams=2)
    model = shared_model("llama")
    with pytest.raises(BadOption, match="one prompt"):
        model.generate(**prompts("llama", batch=2), custom_generate=recycling_chain(), max_new_tokens=3)
    embeds = model.get_input_embeddings()(prompts("llama")["input_ids"])
    with pytest.raises(BadOption, match="one prompt of ids"):
        model.generate(inputs_embeds=embeds, custom_generate=recycling_chain(), max_new_tokens=3)


def test_compression_inside_the_language_model_is_refused():
    model = new_model("llava")
    vlm = VLM(model).compress("fastv", 0.4)
    with pytest.raises(BadOption, match="take.*compression inside the language model off|Take compression"):
        model.generate(**vlm.compress_inputs(prompts("llava")), custom_generate=recycling_chain(), max_new_tokens=8)
    assert "_get_candidate_generator" not in vars(model)
