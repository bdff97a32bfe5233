"""CNTP against a loop without cache that runs every trial by itself."""

from __future__ import annotations

import pytest
import torch

from tests.decoding.models import prompts, shared_model
from tokensieve.decoding import cautious, num_trials, punctuation_ids
from tokensieve.errors import BadOption, UnsupportedModel

MARKS = tuple(range(0, 90, 7))
NAMES = [("llama", None), ("llava", 0.4), ("qwen2_5_vl", 0.4), ("gemma3", None)]


def generate(name, keep, **options):
    return shared_model(name).generate(**prompts(name, keep), **dict(max_new_tokens=14) | options)


@pytest.mark.parametrize(
    ("entropy", "code", "paper"),
    [
        (0.0, 1, 1),
        (0.01, 1, 1),
        (0.15, 1, 1),
        (0.2335, 2, 1),
        (0.31, 2, 2),
        (1.4255, 9, 9),
        (1.5, 10, 10),
        (9, 10, 10),
    ],
)
def test_number_of_trials(entropy, code, paper):
    assert num_trials(entropy) == code and num_trials(entropy, rule="paper") == paper


def test_more_entropy_never_means_fewer_trials():
    for rule in ("code", "paper"):
        counts = [num_trials(h / 100, 10, rule=rule) for h in range(200)]
        assert counts == sorted(counts) and set(counts) == set(range(1, 11))


@pytest.mark.parametrize(("name", "keep"), NAMES)
def test_without_uncertainty_it_is_plain_sampling(name, keep):
    shared_model(name)  # made before the seed is set
    torch.manual_seed(3)
    want = generate(name, keep, do_sample=True)
    for custom in (cautious(MARKS, min_entropy=50, max_entropy=60, seed=3), cautious(MARKS, max_trials=1, seed=3)):
        assert torch.equal(generate(name, keep, do_sample=True, custom_generate=custom), want)


@pytest.mark.parametrize(("name", "keep"), NAMES)
def test_cold_it_is_greedy(name, keep):
    want = generate(name, keep, do_sample=False)
    custom = cautious(MARKS)
    assert torch.equal(generate(name, keep, do_sample=True, temperature=1e-4, custom_generate=custom), want)
    # even where every token is tried several times
    forced = cautious(MARKS, min_entropy=0, max_entropy=1e-30)
    out = generate(name, keep, do_sample=True, temperature=1e-4, custom_generate=forced, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)


def sequential(model, inputs, options, settings, seed, max_length):
    """The same draws, every distribution from a forward of the whole sequence, every trial's surprise in one list."""
    processors = model._get_logits_processor(
        generation_config=model._prepare_generation_config(None, do_sample=True, **options)[0],
        input_ids_seq_length=inputs["input_ids"].shape[1],
    )
    generator = torch.Generator().manual_seed(seed)
    ids, counts = inputs["input_ids"], []

    def scores(ids):
        return processors(ids, model(ids).logits[:, -1].float())

    def ended(row):
        return row[-1] == model.generation_config.eos_token_id or len(row) == max_length

    while True:
        probs = scores(ids).softmax(-1)[0]
        entropy = -sum(float(p) * torch.log(p + 1e-10).item() for p in probs)
        num = num_trials(entropy, *settings)
        counts.append(num)
        rows, surprise = [ids[0].tolist() for _ in range(num)], [[] for _ in range(num)]
        live = [True] * num
        while any(live):
            width = max(map(len, rows))
            padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            probs_NV = scores(padded).softmax(-1)
            tokens = torch.multinomial(probs_NV, 1, generator=generator)[:, 0].tolist()
            for i in [i for i in range(num) if live[i]]:
                rows[i].append(tokens[i])
                surprise[i].append(-torch.log(probs_NV[i, tokens[i]]).item())
                live[i] = not (ended(rows[i]) or (num > 1 and tokens[i] in MARKS) or num == 1)
        ppl = [sum(s) / len(s) for s in surprise]
        ids = torch.tensor([rows[ppl.index(min(ppl))]])
        if ended(ids[0].tolist()):
            return ids, counts


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_it_equals_trials_without_a_cache(seed):
    model, inputs, options = shared_model("llama"), prompts("llama"), dict(temperature=0.9, top_p=0.9)
    settings = (5, 0.2, 2.0)
    want, counts = sequential(model, inputs, options, settings, seed, 9 + 20)
    custom = cautious(MARKS, max_trials=5, min_entropy=0.2, max_entropy=2.0, seed=seed)
    out = model.generate(
        **inputs, **options, do_sample=True, max_new_tokens=20, custom_generate=custom, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, want) and out.details["trials"] == counts
    assert len(set(counts)) > 1  # sure tokens and trials of several sizes
    ledger = out.ledger
    assert ledger.accepted_tokens + counts.count(1) == ledger.generated_tokens <= 20
    assert ledger.drafted_tokens >= ledger.accepted_tokens


def test_trials_are_drawn_though_sampling_is_off():
    """As in the official code; sure tokens are greedy."""
    custom = cautious(MARKS, max_trials=3, min_entropy=0, max_entropy=1e-9, seed=1)
    assert not torch.equal(
        generate("llama", None, do_sample=False, custom_generate=custom), generate("llama", None, do_sample=False)
    )
    sure = cautious(MARKS, min_entropy=50, max_entropy=60)
    assert torch.equal(
        generate("llama", None, do_sample=False, custom_generate=sure), generate("llama", None, do_sample=False)
    )


def test_marks_of_a_tokenizer():
    class Words:
        pieces = {".": [4], ",": [5, 6], "\n": [7, 8], "?": [9], "!": [10]}

        def encode(self, text, add_special_tokens):
            assert add_special_tokens is False
            return self.pieces.get(text, [])

        def decode(self, ids):
            return {4: ".", 5: ",", 7: " ", 9: "?", 10: "!"}[ids[0]]

    class Processor:
        tokenizer = Words()

    assert punctuation_ids(Words()) == punctuation_ids(Processor()) == {4, 5, 9, 10}  # 7 is only a space


def test_a_model_that_cannot_crop_is_refused(monkeypatch):
    monkeypatch.setattr("tokensieve.decoding.capabilities.capable", lambda session, need: need != "crop")
    with pytest.raises(UnsupportedModel, match="'crop'"):
        generate("llama", None, do_sample=True, custom_generate=cautious(MARKS, min_entropy=0, max_entropy=1e-9))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(max_trials=0), "max_trials"),
        (dict(max_trials=2.5), "max_trials"),
        (dict(min_entropy=2.0), "entropy"),
        (dict(min_entropy=-1), "entropy"),
        (dict(rule="official"), "rule"),
        (dict(punctuation=[".", ","]), "token ids"),
    ],
)
def test_bad_values(options, word):
    with pytest.raises(BadOption, match=word):
        cautious(**{"punctuation": MARKS} | options)
