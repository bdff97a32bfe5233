"""CDPruner: relevance, the greedy search for the greatest determinant, and CLIP's text tower."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional as F

from tests.compression.helpers import load_golden, plain, random_inputs, random_tower, random_video
from tokensieve.compression import Question, get_method, maxmin
from tokensieve.compression.cdpruner import embedding_relevance, greedy_map, scaled_relevance
from tokensieve.compression.clip_relevance import ClipText, clip_relevance
from tokensieve.compression.maxmin import unit_rows
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.stages import Compression, Stage

cdpruner = get_method("cdpruner")


def kernel(unit_ND, relevance_N):
    return relevance_N[:, None] * (unit_ND @ unit_ND.T) * relevance_N


def relevances(num_tokens, seed=4):
    return scaled_relevance(random_inputs(num_tokens, 1, seed=seed)[:, 0])


# --- against the official code


def test_cdpruner_matches_the_official_code():
    golden = load_golden("cdpruner-b1")
    relevance_N = scaled_relevance(clip_relevance(golden["in_image_embeds"][0], golden["in_text_embeds"]))
    order_K = greedy_map(unit_rows(golden["in_features"][0]), relevance_N, golden["params"]["k"])
    assert torch.equal(order_K.sort().values, golden["out_mask"][0].nonzero()[:, 0])


def test_cdpruner_matches_the_official_code_with_the_min_and_max_of_its_batch():
    golden = load_golden("cdpruner-b2-batch-minmax")
    relevance_BN = torch.stack([clip_relevance(x, golden["in_text_embeds"]) for x in golden["in_image_embeds"]])
    low, high = relevance_BN.aminmax()
    differs = False
    for features_ND, relevance_N, mask_N in zip(golden["in_features"], relevance_BN, golden["out_mask"], strict=True):
        kept, alone = (
            greedy_map(unit_rows(features_ND), scaled, golden["params"]["k"]).sort().values
            for scaled in (scaled_relevance(relevance_N, low, high), scaled_relevance(relevance_N))
        )
        assert torch.equal(kept, mask_N.nonzero()[:, 0])
        differs |= not torch.equal(kept, alone)
    assert differs  # else this file could not tell the two apart


# --- against the equations


@pytest.mark.parametrize("seed", range(20))
def test_every_pick_has_the_greatest_log_determinant(seed):
    unit_ND, relevance_N = unit_rows(random_inputs(24, 12, seed=seed)), relevances(24, seed + 100)
    kernel_NN = kernel(unit_ND.double(), relevance_N.double())
    picked = []
    for pick in greedy_map(unit_ND, relevance_N, 10).tolist():
        gains = {i: torch.logdet(kernel_NN[[*picked, i]][:, [*picked, i]]).item() for i in range(24) if i not in picked}
        assert pick == max(gains, key=gains.get)
        picked.append(pick)


def test_two_picks_are_close_to_the_best_pair():
    unit_ND, relevance_N = unit_rows(random_inputs(12, 8)), relevances(12)
    kernel_NN = kernel(unit_ND, relevance_N)
    best = max(kernel_NN[list(p)][:, list(p)].det() for p in itertools.combinations(range(12), 2))
    greedy = greedy_map(unit_ND, relevance_N, 2)
    assert kernel_NN[greedy][:, greedy].det() >= 0.5 * best  # greedy MAP promises (1 - 1/e) of the logarithm


def test_the_most_relevant_token_comes_first():
    relevance_N = relevances(40)
    assert greedy_map(unit_rows(random_inputs(40)), relevance_N, 1).item() == relevance_N.argmax()


def test_an_exhausted_kernel_is_filled_up_by_relevance():
    relevance_N = relevances(40)
    order_K = greedy_map(unit_rows(random_inputs(40, 3)), relevance_N, 40)  # rank 3
    rest = order_K[3:]
    assert order_K.sort().values.tolist() == list(range(40))
    assert torch.equal(rest, rest[relevance_N[rest].argsort(descending=True)])


def test_copies_are_picked_last():
    unit_ND = unit_rows(random_inputs(10, 16).repeat(2, 1))
    relevance_N = relevances(10).repeat(2)
    order_K = greedy_map(unit_ND, relevance_N, 20)
    assert (order_K[:10] % 10).unique().numel() == 10 and (order_K[10:] % 10).unique().numel() == 10


def test_equal_tokens_and_zero_tokens():
    assert greedy_map(unit_rows(torch.ones(6, 4)), torch.ones(6), 4).tolist() == [0, 1, 2, 3]
    zero_first = torch.cat([torch.zeros(1, 4), random_inputs(5, 4)])
    assert 0 not in greedy_map(unit_rows(zero_first), torch.ones(6), 4)


def test_float32_holds_over_many_picks():
    unit_ND, relevance_N = unit_rows(random_inputs(1200, 256)), relevances(1200)
    single = greedy_map(unit_ND, relevance_N, 250)
    double = greedy_map(unit_ND.double(), relevance_N.double(), 250)
    assert (single == double).all()


def test_chunks_do_not_matter(monkeypatch):
    unit_ND, relevance_N = unit_rows(random_inputs(60)), relevances(60)
    order_K = greedy_map(unit_ND, relevance_N, 14)
    monkeypatch.setattr(maxmin, "MAX_MATRIX_BYTES", 4)
    assert torch.equal(greedy_map(unit_ND, relevance_N, 14), order_K)


# --- relevance


def test_scaled_relevance():
    scaled_N = scaled_relevance(torch.tensor([-0.3, 0.1, 0.2]))
    torch.testing.assert_close(scaled_N, torch.tensor([2e-6, 0.8, 1.0]), rtol=1e-5, atol=3e-6)
    assert scaled_N[0] > 0
    assert scaled_relevance(torch.full((4,), 0.3)).tolist() == [1, 1, 1, 1]
    assert scaled_relevance(0.3 + 1e-7 * torch.arange(4.0)).tolist() == [1, 1, 1, 1]


def test_clip_relevance_is_minus_the_mean_cosine():
    patches, texts = random_inputs(9, 6), random_inputs(3, 6, seed=8)
    expected = -F.cosine_similarity(patches[:, None], texts[None], dim=-1).mean(1)
    torch.testing.assert_close(clip_relevance(patches, texts), expected)


def test_without_clip_relevance_is_the_mean_cosine_with_the_prompt():
    tokens = random_video()
    expected = F.cosine_similarity(tokens.features[:, None], tokens.question.embeds[None], dim=-1).mean(1)
    torch.testing.assert_close(embedding_relevance(tokens), expected)


def test_tokens_like_the_question_are_kept():
    tokens = plain(random_inputs(64, 32), grids=((1, 8, 8),))
    tokens.features[11] = random_inputs(1, 32, seed=9)[0]
    tokens = dataclasses.replace(tokens, question=Question(embeds=tokens.features[11:12].clone()))
    assert cdpruner(tokens, 2).mask()[11]
    away = dataclasses.replace(tokens, question=Question(embeds=-tokens.features[11:12]))
    assert not cdpruner(away, 2).mask()[11]


def test_frames_are_selected_from_alone_with_the_min_and_max_of_the_video():
    tokens = random_video()
    relevance_N = scaled_relevance(embedding_relevance(tokens))
    kept = cdpruner(tokens, 40).kept
    for t in range(4):
        own = slice(24 * t, 24 * t + 24)
        order_K = greedy_map(unit_rows(tokens.features[own]), relevance_N[own], 10)
        assert kept[kept // 24 == t].tolist() == sorted(24 * t + i for i in order_K.tolist())


# --- CLIP


class Letters:
    """A tokenizer: one id a letter."""

    bos_token_id, eos_token_id = 0, 1

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [2 + ord(letter) % 26 for letter in text]}


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = dict(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        text_config=dict(
            hidden_size=16, vocab_size=30, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, **sizes
        ),
        vision_config=dict(hidden_size=16, image_size=16, patch_size=4, **sizes),
        projection_dim=10,
    )
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = CLIPModel(config).eval().requires_grad_(False)
    torch.set_rng_state(state)
    return ClipText(model, Letters())


def test_text_is_cut_into_segments(clip):
    text = "what is the digit that moves"  # 28 letters, 10 a segment beside the start and the end
    embeds = clip.text_embeds(text)
    assert embeds.shape == (3, 10)
    for i, segment in enumerate((text[:10], text[10:20], text[20:])):
        ids = torch.tensor([[0, *Letters()(segment, False, False)["input_ids"], 1]])
        torch.testing.assert_close(embeds[i], clip.model.get_text_features(input_ids=ids).pooler_output[0])
    assert clip.text_embeds("").shape == (1, 10)


def test_patches_go_through_the_last_norm_and_the_projection(clip):
    tokens = random_video()
    hidden = torch.cat([h[1:] for h in tokens.tower.hidden])
    expected = clip.model.visual_projection(clip.model.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(clip.patch_embeds(tokens), expected)


def test_pooled_patches_are_averaged(clip):
    tokens = dataclasses.replace(random_video(), tower=random_tower(4, 48))
    halve = lambda values: values.unflatten(0, (-1, 2)).mean(1)  # noqa: E731
    layers = {p: dataclasses.replace(layer, to_tokens=halve) for p, layer in tokens.tower.layers.items()}
    pooled = dataclasses.replace(tokens, tower=dataclasses.replace(tokens.tower, layers=layers))
    torch.testing.assert_close(clip.patch_embeds(pooled), halve(clip.patch_embeds(tokens)))


def test_cdpruner_with_clip(clip):
    tokens = random_video()
    relevance_N = clip_relevance(clip.patch_embeds(tokens), clip.text_embeds(tokens.question.text))
    image = dataclasses.replace(tokens, grids=((1, 8, 12),))
    expected = greedy_map(unit_rows(image.features), scaled_relevance(relevance_N), 20)
    assert torch.equal(cdpruner(image, 20, clip=clip).kept, expected.sort().values)
    assert not torch.equal(cdpruner(image, 20, clip=clip).kept, cdpruner(image, 20).kept)


def test_a_half_precision_tower_is_looked_at_in_float32(clip):
    tokens = random_video(torch.bfloat16)
    assert clip.patch_embeds(tokens).dtype == torch.float32
    assert cdpruner(tokens, 20, clip=clip).num_kept == 20


def test_the_tower_is_recorded_where_clip_is_given(clip):
    with_clip = Compression(stages=(Stage("cdpruner", clip=clip),))
    assert {"tower", "question"} <= with_clip.needs
    assert "tower" not in Compression(stages=(Stage("cdpruner"),)).needs


# --- bad input


def test_what_clip_needs_must_be_there(clip):
    tokens = random_video()
    with pytest.raises(BadOption, match="hidden states of the vision tower.*needs="):
        cdpruner(dataclasses.replace(tokens, tower=None), 20, clip=clip)
    with pytest.raises(BadOption, match="question as text"):
        cdpruner(dataclasses.replace(tokens, question=Question(embeds=tokens.question.embeds)), 20, clip=clip)
    narrow = dataclasses.replace(tokens.tower, hidden=tuple(h[:, :8] for h in tokens.tower.hidden))
    with pytest.raises(UnsupportedModel, match="width 8, the CLIP model given as clip= has 16"):
        cdpruner(dataclasses.replace(tokens, tower=narrow), 20, clip=clip)
    with pytest.raises(BadOption, match="clip must be a ClipText, got str"):
        cdpruner(tokens, 20, clip="openai/clip")


def test_a_prompt_without_text_is_refused():
    with pytest.raises(BadOption, match="no text"):
        cdpruner(dataclasses.replace(random_video(), question=Question(embeds=torch.empty(0, 32))), 20)


def test_embeddings_that_are_no_numbers_are_refused():
    with pytest.raises(BadOption, match="relevance of some tokens is NaN"):
        cdpruner(dataclasses.replace(random_video(), question=Question(embeds=torch.full((2, 32), torch.nan))), 20)
