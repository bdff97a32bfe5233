"""Our light scorer: its equations by loops, what the question changes, and that it learns."""

import dataclasses
import math

import pytest
import torch

from tests.compression.helpers import plain, random_inputs
from tests.pipeline.tiny_families import make_inputs, make_model
from tokensieve.compression import Question
from tokensieve.errors import BadOption
from tokensieve.pipeline.vlm import VLM
from tokensieve.policies.light_scorer import LightScorer, _context, _fourier

GRIDS = [((4, 2, 3),), ((1, 4, 4),), ((1, 2, 2), (1, 3, 4)), ((5, 1, 1),), ((1, 1, 1),)]


def video(grids=((4, 2, 3),), num_text=6, seed=1, width=32, dtype=torch.float32):
    num_tokens = sum(math.prod(grid) for grid in grids)
    tokens = plain(random_inputs(num_tokens, width, seed).to(dtype), grids=grids)
    text = random_inputs(num_text, width, seed + 50).to(dtype) if num_text else torch.zeros(0, width, dtype=dtype)
    return dataclasses.replace(tokens, question=Question(embeds=text))


def asked(tokens, seed):
    """The same tokens and another question."""
    other = Question(embeds=random_inputs(len(tokens.question.embeds), tokens.features.shape[1], seed))
    return dataclasses.replace(tokens, question=other)


def assert_same(got, expected, **tolerance):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance or {"rtol": 1e-5, "atol": 1e-5})


# --- the equations


@pytest.mark.parametrize("grids", GRIDS)
def test_context_is_that_of_the_definition(grids):
    frames = grids[0][0] if len(grids) == 1 else 1
    num_tokens = sum(math.prod(grid) for grid in grids)
    x = random_inputs(2 * num_tokens, 7).view(2, num_tokens, 7)
    frame, everything, before, after, around = _context(x, grids, frames)
    torch.testing.assert_close(frame, x.view(2, frames, -1, 7).mean(2).repeat_interleave(num_tokens // frames, 1))
    torch.testing.assert_close(everything, x.mean(1, keepdim=True).expand_as(x))
    start = 0
    for t, h, w in grids:
        block = x[:, start : start + t * h * w].view(2, t, h, w, 7)
        at = lambda i, j, k, block=block, size=(t, h, w): block[  # noqa: E731, places outside hold their neighbour
            (slice(None), *(min(max(p, 0), s - 1) for p, s in zip((i, j, k), size, strict=True)))
        ]
        for place in range(t * h * w):
            i, j, k = place // (h * w), place // w % h, place % w
            own = at(i, j, k)
            torch.testing.assert_close(before[:, start + place], at(i - 1, j, k) - own)
            torch.testing.assert_close(after[:, start + place], at(i + 1, j, k) - own)
            four = (at(i, j - 1, k) + at(i, j + 1, k) + at(i, j, k - 1) + at(i, j, k + 1)) / 4
            torch.testing.assert_close(around[:, start + place], four - own)
        start += t * h * w


def test_places_are_told_apart_and_scaled_to_the_raster():
    code = _fourier(((4, 2, 3), (1, 2, 2)), torch.device("cpu"))
    assert code.shape == (28, 36) and len(code[:24].unique(dim=0)) == 24
    angles = torch.tensor(
        [[place * math.pi * 2**k for k in range(6)] for place in (2.5 / 4, 1.5 / 2, 0.5 / 3)]
    ).flatten()
    torch.testing.assert_close(code[2 * 6 + 3], torch.cat([angles.sin(), angles.cos()]), atol=1e-5, rtol=0)
    torch.testing.assert_close(code[24:], _fourier(((1, 2, 2),), torch.device("cpu")))


def test_attention_to_the_question_is_softmax_over_words_and_nothing():
    block = LightScorer(32, num_heads=4).blocks[0].ask
    x, text = random_inputs(5, 64)[None], random_inputs(3, 64, 9)[None]
    allowed = torch.tensor([True, True, False, True])[None, None, None]
    words = block.text_norm(torch.cat([block.nothing[None], text[0]]))[[0, 1, 3]]
    query, (key, value) = block.query(block.norm(x[0])), block.key_value(words).chunk(2, -1)
    heads = []
    for h in range(4):
        own = slice(16 * h, 16 * h + 16)
        heads.append((query[:, own] @ key[:, own].T / 4).softmax(-1) @ value[:, own])
    torch.testing.assert_close(block(x, text, allowed)[0], block.out(torch.cat(heads, -1)))


def test_frame_logits_are_of_the_mean_of_the_frame():
    scorer, seen = LightScorer(32), []
    scorer.token_head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    _, frame_logits = scorer(video())
    torch.testing.assert_close(frame_logits, scorer.frame_head(seen[0].view(4, 6, 64).mean(1)))


def test_size():
    count = lambda scorer: sum(p.numel() for p in scorer.parameters())  # noqa: E731
    assert count(LightScorer(3584)) == 631_108 and count(LightScorer(3584, question_aware=False)) == 355_652


# --- what the logits depend on


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("question_aware", [True, False])
def test_shapes(grids, question_aware):
    tokens = video(grids)
    token_logits, frame_logits = LightScorer(32, question_aware=question_aware)(tokens)
    assert token_logits.shape == (len(tokens), 2) and token_logits.dtype == frame_logits.dtype == torch.float32
    assert frame_logits.shape == (grids[0][0] if len(grids) == 1 else 1, 2)


def test_the_question_counts_only_where_it_is_read():
    tokens = video()
    aware, blind = LightScorer(32), LightScorer(32, question_aware=False)
    assert aware.needs == ("question",) and blind.needs == ()
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(aware(tokens), aware(asked(tokens, 9)), strict=True))
    assert_same(blind(tokens), blind(asked(tokens, 9)), rtol=0, atol=0)
    assert_same(blind(dataclasses.replace(tokens, question=None)), blind(tokens), rtol=0, atol=0)
    assert not any(name.split(".")[0] in ("read", "phrase") or "ask" in name for name, _ in blind.named_parameters())


def test_word_order_and_every_word_count():
    tokens, scorer = video(), LightScorer(32)
    embeds = tokens.question.embeds
    expected = scorer(tokens)[0]
    for other in (embeds.flip(0), embeds[1:], embeds[:-1]):
        changed = dataclasses.replace(tokens, question=Question(embeds=other))
        assert (scorer(changed)[0] - expected).abs().max() > 1e-4


def test_places_frames_and_neighbours_count():
    scorer = LightScorer(32)
    same = dataclasses.replace(video(), features=torch.ones(24, 32))
    assert len(scorer(same)[0].unique(dim=0)) == 24  # equal tokens, told apart by their places
    changed = video().features.clone()
    changed[6:12] += 1
    difference = (scorer(dataclasses.replace(video(), features=changed))[0] - scorer(video())[0]).abs().amax(1)
    assert difference.min() > 1e-6


def test_the_scale_of_features_does_not_count():
    scorer, tokens = LightScorer(32), video()
    louder = dataclasses.replace(
        tokens, features=1000 * tokens.features, question=Question(embeds=0.1 * tokens.question.embeds)
    )
    assert_same(scorer(louder), scorer(tokens), rtol=1e-3, atol=1e-4)


# --- batches, dtype, seed, export


def test_a_batch_is_one_by_one():
    scorer = LightScorer(32)
    batch = [video(seed=1), video(GRIDS[2], 3, 2), video(seed=3, num_text=11), video(GRIDS[1], 0, 4), video(seed=5)]
    for tokens, got in zip(batch, scorer.forward_batch(batch), strict=True):
        assert_same(got, scorer(tokens))
    for tokens, got in zip(batch, LightScorer(32, question_aware=False).forward_batch(batch), strict=True):
        assert_same(got, LightScorer(32, question_aware=False)(tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_logits(dtype):
    scorer = LightScorer(32)
    expected = scorer(video())
    got = scorer(video(dtype=dtype))  # a float32 scorer beside a model in half precision
    assert_same(got, expected, rtol=0.05, atol=0.03)
    half = scorer.to(dtype)(video(dtype=dtype))
    assert all(x.dtype == torch.float32 for x in (*got, *half))
    assert_same(half, expected, rtol=0.1, atol=0.1)


def test_the_seed_decides_and_the_global_generator_rests():
    state = torch.get_rng_state()
    first = LightScorer(32, seed=3)(video())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert_same(LightScorer(32, seed=3)(video()), first, rtol=0, atol=0)
    assert not torch.equal(LightScorer(32, seed=4)(video())[0], first[0])
    torch.set_rng_state(state)


def test_gradients_reach_every_weight():
    scorer = LightScorer(32)
    token_logits, frame_logits = scorer(video())
    (token_logits.square().sum() + frame_logits.square().sum()).backward()
    assert [name for name, p in scorer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_it_exports_with_a_question_of_any_length():
    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scorer = LightScorer(32, num_blocks=1)

        def forward(self, features, text):
            return self.scorer.logits(features, ((4, 2, 3),), 4, text)

    module, tokens = Exported().eval(), video()
    given = (tokens.features[None], tokens.question.embeds[None])
    length = torch.export.Dim("words", min=2, max=64)
    program = torch.export.export(module, given, dynamic_shapes=(None, {1: length}))
    longer = (given[0], random_inputs(17, 32, 8)[None])
    for inputs in (given, longer):
        assert_same(program.module()(*inputs), module(*inputs))


def test_it_learns_which_tokens_were_asked_for():
    """Every video holds tokens of 4 kinds and the question names one; a scorer that does not read it cannot know."""
    kinds = random_inputs(4, 24, 3)
    words = random_inputs(4, 24, 4)
    found = {}
    for question_aware in (True, False):
        generator = torch.Generator().manual_seed(0)
        scorer = LightScorer(24, width=32, num_blocks=1, question_aware=question_aware)
        optimizer = torch.optim.Adam(scorer.parameters(), lr=3e-3)
        right = []
        for step in range(150):
            kind = torch.randint(4, (16, 24), generator=generator)
            target = torch.randint(4, (16,), generator=generator)
            noise = torch.randn(16, 24, 24, generator=generator)
            text = torch.stack([words[target], random_inputs(16, 24, 5)], 1) if question_aware else None
            token_logits, _ = scorer.logits(kinds[kind] + 0.3 * noise, ((4, 2, 3),), 4, text)
            wanted = kind == target[:, None]
            loss = torch.nn.functional.cross_entropy(token_logits.flatten(0, 1), wanted.flatten().long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= 130:
                right.append(wanted.gather(1, token_logits.diff(dim=-1)[..., 0].argmax(1, keepdim=True)).float().mean())
        found[question_aware] = float(torch.stack(right).mean())
    assert found[True] > 0.95 and found[False] < 0.5, found


# --- as a policy


@pytest.mark.parametrize("family", ["llava_onevision-video", "llava_onevision-image", "qwen3_vl", "smolvlm"])
def test_a_model_is_compressed_by_it(family):
    vlm = VLM(make_model(family))
    scorer = LightScorer(32)
    vlm.compress("cacovid", keep=0.25, policy=scorer)
    kept = [vlm.compress_inputs(make_inputs(family, 2)).plans for _ in range(2)]
    for plan, again in zip(*kept, strict=True):
        assert torch.equal(plan.kept, again.kept) and plan.num_kept == max(1, int(plan.num_tokens * 0.25))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width_in": 0}, "width_in must be a whole number above 0"),
        ({"width_in": 8.0}, "width_in must be a whole number above 0"),
        ({"width": True}, "width must be a whole number above 0"),
        ({"num_blocks": 0}, "num_blocks must be a whole number above 0"),
        ({"num_blocks": 65}, "num_blocks must be at most 64, got 65"),
        ({"num_heads": 5}, "num_heads must divide the width, got 5 heads and a width of 64"),
        ({"question_aware": 1}, "question_aware must be True or False, got 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(BadOption, match=message):
        LightScorer(**{"width_in": 32} | options)


def test_bad_tokens_are_refused():
    with pytest.raises(BadOption, match="reads the question.*come without"):
        LightScorer(32)(dataclasses.replace(video(), question=None))
    with pytest.raises(BadOption, match="reads features of width 16, got 32"):
        LightScorer(16)(video())
    with pytest.raises(BadOption, match=r"embeddings must be \[tokens, 32\]"):
        LightScorer(32)(dataclasses.replace(video(), question=Question(embeds=torch.zeros(3, 8))))
