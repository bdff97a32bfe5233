"""The recipe of the shipped model, end to end on a few steps, and the parts it is made of."""

from __future__ import annotations

import pytest
import torch

from tokensieve.datasets.clips import make_clip
from tokensieve.datasets.mosaic import make_mosaics
from tokensieve.errors import BadOption
from tokensieve.pipeline.loader import load
from tokensieve.pipeline.optim import muon_adamw, warm_up_then_cosine
from tokensieve.pipeline.tiny_model import build_model, build_processor, build_tokenizer, question_corpus
from tokensieve.pipeline.tiny_recipe import TinyRecipe
from tokensieve.pipeline.train_clips import ClipModule, branch_mask, encode_question, pack_questions
from tokensieve.pipeline.train_tiny import train_tiny
from tokensieve.pipeline.train_tower import TowerModule


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_every_answer_is_one_token_and_any_text_survives():
    tokenizer = build_tokenizer()
    assert len(tokenizer) <= 512
    for text in question_corpus():
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for word in ("7", "purple", "left", "four"):
        assert len(tokenizer.encode(word)) == 1
    assert tokenizer.decode(tokenizer.encode("Ünïcode, 漢字!")) == "Ünïcode, 漢字!"


def test_model_fits_the_size_limit(processor):
    model = build_model(processor.tokenizer)
    assert sum(p.numel() for p in model.parameters()) * 4 < 12e6


def test_tower_learns_from_mosaics(processor):
    torch.manual_seed(0)
    module = TowerModule(build_model(processor.tokenizer), lr=2e-3, total_steps=12)
    mosaic = make_mosaics("train", 4, torch.Generator().manual_seed(0))
    optimizers = muon_adamw(module, 2e-3)
    losses = []
    for _ in range(12):
        loss, _ = module.losses(mosaic)
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_questions_of_a_clip_do_not_see_each_other():
    mask = branch_mask(2, torch.tensor([[0, 0, 1, 1, -1]]))[0, 0]
    assert mask[3].tolist() == [True, True, True, True, False, False, False]
    assert mask[5].tolist() == [True, True, False, False, True, True, False]


def test_branches_give_the_logits_of_single_questions(processor):
    """Training on packed questions is training on what `generate` sees."""
    torch.manual_seed(0)
    model = build_model(processor.tokenizer).eval()
    module = ClipModule(model, processor.tokenizer, lr=1e-3, total_steps=1)
    clip = make_clip("train", 0)
    visual = torch.randn(1, 288, 192)
    with torch.no_grad():
        packed, targets, branch = module.answer_logits(visual, pack_questions(processor.tokenizer, [clip]), 1.0)
        for i, question in enumerate(clip.questions):
            ids, labels = encode_question(processor.tokenizer, question.text, question.answer)
            embed = model.get_input_embeddings()
            start = embed(torch.tensor([[module.prefix_id]]))
            newline = model.model.image_newline.view(1, 1, -1)
            inputs = torch.cat([start, visual, newline, embed(torch.tensor([ids]))], 1)
            logits = model(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2])).logits[0]
            at = [290 + j - 1 for j, label in enumerate(labels) if label != -100]
            torch.testing.assert_close(packed[branch == i], logits[at], atol=1e-4, rtol=1e-4)
            assert targets[branch == i].tolist() == [label for label in labels if label != -100]


def test_prompt_of_training_is_the_prompt_of_the_processor(processor):
    clip = make_clip("train", 0)
    question = clip.questions[0]
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question.text}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    asked, labels = encode_question(processor.tokenizer, question.text, question.answer)
    prompt = asked[: labels.index(next(label for label in labels if label != -100))]
    ids = processor.tokenizer.encode(text)
    user, video = (processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<video>"))
    assert ids == [user, video, *prompt]


def test_schedule_rises_and_falls():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warm_up_then_cosine(optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] < rates[4] == max(rates) and rates[-1] < 0.02 and rates[50] > rates[80]


def test_both_stages_run_and_leave_a_model_that_answers(tmp_path):
    recipe = TinyRecipe(tower_steps=2, tower_batch=2, clips=4, clip_steps=2, clip_batch=2, val_clips=2, compile=False)
    folder = train_tiny(tmp_path, recipe)
    from tokensieve.datasets import clip_frames

    vlm = load(folder).compress("zoprune", 0.25)
    answer = vlm.answer(clip_frames(make_clip("val", 0)), "Which digit is red?", max_new_tokens=2)
    assert answer.visual_tokens == {"full": 289, "kept": 73}
    assert (tmp_path / "recipe.json").exists() and (tmp_path / "logs" / "clips" / "metrics.csv").exists()


@pytest.mark.parametrize("bad", [dict(tower_steps=0), dict(clip_lr=-1.0), dict(clips=3, clip_batch=4)])
def test_bad_recipe(bad):
    with pytest.raises(BadOption):
        TinyRecipe(**bad)


def test_bad_stages(tmp_path):
    with pytest.raises(BadOption, match="stages"):
        train_tiny(tmp_path, TinyRecipe(), ("towel",))
    with pytest.raises(BadOption, match="no trained tower"):
        train_tiny(tmp_path, TinyRecipe(), ("clips",))
