from __future__ import annotations

import pytest
import torch

from tests.decoding.models import prompts, shared_model
from tokensieve.decoding import best_of, self_certainty, self_consistency
from tokensieve.errors import BadOption

NAMES = [("llama", None), ("llava_onevision-video", 0.4), ("qwen2_5_vl", 0.4)]
ENDS = [93, *range(2, 90, 11)]  # answers of different lengths


def generate(name, keep, batch, custom=None, **options):
    options = dict(max_new_tokens=10, do_sample=True, temperature=0.9, eos_token_id=ENDS) | options
    model = shared_model(name)
    return model.generate(**prompts(name, keep, batch), custom_generate=custom, return_dict_in_generate=True, **options)


@pytest.mark.parametrize(("name", "keep"), NAMES)
def test_one_sample_is_plain_sampling(name, keep):
    shared_model(name)  # made before the seed is set
    torch.manual_seed(4)
    want = generate(name, keep, 2)
    got = generate(name, keep, 2, best_of(1, seed=4))
    assert torch.equal(got.sequences, want.sequences)
    assert got.ledger.drafted_tokens == 0


@pytest.mark.parametrize(("name", "keep"), NAMES)
def test_the_samples_are_those_of_generate_with_one_prefill(name, keep):
    shared_model(name)  # made before the seed is set
    torch.manual_seed(4)
    want = generate(name, keep, 2, num_return_sequences=4, output_logits=True)
    out = generate(name, keep, 2, best_of(4, power=None, seed=4))
    start = prompts(name, keep, 2)["input_ids"].shape[1]
    new = want.sequences[:, start:]
    rows = [row for group in out.details["candidates"] for row in group]
    assert [new[i, : len(row)].tolist() for i, row in enumerate(rows)] == rows and len({len(r) for r in rows}) > 1
    mask = torch.arange(new.shape[1]) < torch.tensor([[len(row)] for row in rows])
    certainty = self_certainty(torch.stack(want.logits, 1), mask).view(2, 4)
    torch.testing.assert_close(out.details["certainty"], certainty, atol=1e-4, rtol=1e-4)
    assert out.details["winner"] == certainty.argmax(1).tolist()
    for prompt, winner in enumerate(out.details["winner"]):
        best = rows[4 * prompt + winner]
        assert out.sequences[prompt, start : start + len(best)].tolist() == best
        assert (out.sequences[prompt, start + len(best) :] == 0).all()
    ledger = out.ledger
    assert ledger.forward_passes == max(map(len, rows)) and ledger.drafted_tokens == sum(map(len, rows))
    assert ledger.generated_tokens == ledger.accepted_tokens == int((out.sequences[:, start:] != 0).sum())
    prompt_tokens = prompts(name, keep, 2)["input_ids"].numel()
    assert ledger.computed_tokens == prompt_tokens + 8 * (ledger.forward_passes - 1)


def test_voting_counts_answers():
    def parity(ids):
        assert ids and ids[-1] not in ENDS
        return len(ids) % 2

    majority = generate("llama", None, 2, self_consistency(9, answer_of=parity, seed=2))
    for prompt, group in enumerate(majority.details["candidates"]):
        answers = [len(ids[:-1] if ids[-1] in ENDS else ids) % 2 for ids in group]
        winner = int(sum(answers) > 4)
        assert majority.details["votes"][prompt] == {a: answers.count(a) for a in set(answers)}
        assert majority.details["winner"][prompt] == answers.index(winner)
    borda = generate("llama", None, 2, best_of(9, power=40.0, answer_of=parity, seed=2))
    assert borda.details["candidates"] == majority.details["candidates"]
    for prompt, group in enumerate(borda.details["candidates"]):
        surest = group[int(borda.details["certainty"][prompt].argmax())]
        answers = [len(ids[:-1] if ids[-1] in ENDS else ids) % 2 for ids in group]
        wanted = len(surest[:-1] if surest[-1] in ENDS else surest) % 2
        assert borda.details["winner"][prompt] == answers.index(wanted)


def parity_of_none(ids):
    return None


def test_without_answers_the_first_sample_stands():
    out = generate("llama", None, 1, best_of(3, answer_of=parity_of_none))
    assert out.details["winner"] == [0] and out.details["votes"] == [{}]


def test_an_answer_by_default_is_its_ids():
    out = generate("llama", None, 1, best_of(5, power=0, seed=1), temperature=0.05)
    (votes,) = out.details["votes"]
    assert sum(votes.values()) <= 5 and max(votes.values()) > 1 and all(isinstance(key, tuple) for key in votes)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(num_samples=0), "num_samples"),
        (dict(num_samples=True), "num_samples"),
        (dict(power=-0.1), "power"),
        (dict(power=None, answer_of=parity_of_none), "answer_of"),
    ],
)
def test_bad_values(options, word):
    with pytest.raises(BadOption, match=word):
        best_of(**options)


def test_samples_that_would_be_the_same_are_refused():
    with pytest.raises(BadOption, match="do_sample"):
        generate("llama", None, 1, best_of(2), do_sample=False, temperature=None)


def test_infinite_logits_fail_loudly(monkeypatch):
    model = shared_model("llama")
    hook = model.lm_head.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor([5]), -torch.inf))
    try:
        with pytest.raises(BadOption, match="raw logits"):
            generate("llama", None, 1, best_of(2))
    finally:
        hook.remove()
