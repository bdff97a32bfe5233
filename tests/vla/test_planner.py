"""A planner learns which patch an instruction means, says valid codes only, and can be shown fewer patches."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import tokensieve as ts
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.vla import BehaviourTokeniser, Memory, Planner, PlannerConfig, PlannerModule, VLMPlanner, words_of

WORDS = words_of(["find red now", "find blue"])
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
SMALL = {"words": WORDS, "levels": (4, 3), "frame_size": (16, 16), "width": 32, "num_channels": 8, "num_heads": 2}


def planner(**changes) -> Planner:
    return Planner(PlannerConfig(**SMALL | changes)).eval()


def noise(num_rows: int, side: int = 16, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (num_rows, side, side, 3), generator=draw, dtype=torch.uint8)
    digits = torch.stack([torch.randint(0, n, (num_rows,), generator=draw) for n in (4, 3)], -1)
    return frames, ["find blue" if i % 3 else "find red now" for i in range(num_rows)], digits


def hidden(num_rows: int, seed: int):
    """A red and a blue patch of four; the first digit is the place of the one that is named, the second its colour."""
    draw = torch.Generator().manual_seed(seed)
    frames, texts, digits = torch.zeros(num_rows, 2, 8, 2, 8, 3, dtype=torch.uint8), [], []
    for row in range(num_rows):
        places = torch.randperm(4, generator=draw).tolist()
        for place, colour in zip(places, COLOURS.values(), strict=False):
            frames[row, place // 2, :, place % 2] = torch.tensor(colour, dtype=torch.uint8)
        named = int(torch.randint(2, (), generator=draw))
        texts.append(f"find {list(COLOURS)[named]}")
        digits.append([places[named], named])
    return frames.view(num_rows, 16, 16, 3), texts, torch.tensor(digits)


def batches(data, size=32):
    frames, texts, digits = data
    parts = torch.arange(len(frames)).split(size)
    return DataLoader([(frames[i], [texts[k] for k in i], digits[i]) for i in parts], batch_size=None)


@pytest.mark.parametrize("visual", ["resampled", "patches"])
def test_it_learns_which_patch_is_named(tmp_path, visual):
    module = PlannerModule(planner(visual=visual, num_channels=16).train(), lr=5e-3, warmup_steps=10)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {
        "max_epochs": 8,
        "gradient_clip_val": 1.0,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "precision": "bf16-mixed",
    }
    run = L.Trainer(default_root_dir=tmp_path, **options)
    run.fit(module, batches(hidden(384, seed=1)))
    (seen,) = run.validate(module, batches(hidden(128, seed=2), size=128), verbose=False)
    assert seen["val_exact"] > 0.9
    frames, texts, digits = hidden(128, seed=2)
    others = ["find red" if "blue" in text else "find blue" for text in texts]
    assert (module.planner.plan(frames, others).digits == digits).all(-1).float().mean() < 0.1


def test_a_start_from_another_planner():
    source, made = Planner(PlannerConfig(**SMALL), seed=1), planner(visual="patches", method="uniform", keep=2)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert made.start_from(source) is made and made.config.method == "uniform"
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("visual") else source.state_dict()[name])
    assert not torch.equal(made.head.weight, before["head.weight"])
    for change in ({"levels": (4, 2)}, {"width": 64}, {"words": words_of(["find green"])}):
        with pytest.raises(BadOption, match="other words"):
            made.start_from(planner(**change))


@pytest.mark.parametrize("options", [{}, {"visual": "patches", "method": "uniform", "keep": 2}])
def test_digit_by_digit_it_says_what_it_was_trained_to_say(options):
    model, (frames, texts, _) = planner(**options), noise(24)
    said = []
    hook = model.head.register_forward_hook(lambda _, inputs, out: said.append(out))
    digits = model.plan(frames, texts, generator=torch.Generator().manual_seed(0)).digits
    hook.remove()
    assert len(digits.unique(dim=0)) > 4
    logits = model.logits(frames, texts, model.vocabulary.digits_to_ids(digits))
    torch.testing.assert_close(torch.stack([out[:, -1] for out in said], 1), logits, rtol=1e-4, atol=1e-5)


def test_the_likeliest_code_is_found(monkeypatch):
    """Against all 12 codes, with networks of many seeds: one of a seed says much the same whatever it sees."""
    frames, texts, _ = noise(2)
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    found, greedy, best = [], [], []
    for seed in range(30):
        model = Planner(PlannerConfig(**SMALL), seed=seed).eval()
        with torch.no_grad():
            model.head.weight.mul_(10)  # sure enough of the second digit for the likeliest first one to mislead
        scores = [
            model.logits(frames, texts, ids.expand(2, -1)).log_softmax(-1)[:, [0, 1], ids].sum(-1)
            for ids in model.vocabulary.digits_to_ids(codes)
        ]
        best.append(codes[torch.stack(scores, -1).argmax(-1)])
        for num_beams, into in ((16, found), (1, greedy)):
            monkeypatch.setattr("tokensieve.vla.planner.NUM_BEAMS", num_beams)
            into.append(model.plan(frames, texts).digits)
    assert torch.equal(torch.cat(found), torch.cat(best))
    assert (torch.cat(greedy) != torch.cat(best)).any(-1).float().mean() > 0.1


def remembered(num_rows: int, seed: int):
    """`hidden` frames as memory of one step ago, of 3 steps ago noise; now there is noise too."""
    frames, texts, digits = hidden(num_rows, seed)
    noise_now, noise_then = noise(num_rows, seed=seed)[0], noise(num_rows, seed=seed + 1)[0]
    memory = Memory(frames=torch.stack([noise_then, frames], 1), there=torch.ones(num_rows, 2, dtype=torch.bool))
    return noise_now, texts, digits, memory


def test_it_learns_from_what_it_remembers(tmp_path):
    module = PlannerModule(planner(memory=(3, 1), num_channels=16).train(), lr=5e-3, warmup_steps=10)
    frames, texts, digits, memory = remembered(384, seed=1)
    parts = torch.arange(384).split(32)
    rows = [
        (frames[i], [texts[k] for k in i], digits[i], Memory(frames=memory.frames[i], there=memory.there[i]))
        for i in parts
    ]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    run = L.Trainer(
        default_root_dir=tmp_path, max_epochs=10, gradient_clip_val=1.0, enable_model_summary=False, **options
    )
    run.fit(module, DataLoader(rows, batch_size=None))
    frames, texts, digits, memory = remembered(128, seed=5)
    made = module.planner.eval()
    assert (made.plan(frames, texts, memory).digits == digits).all(-1).float().mean() > 0.9
    nothing = Memory(frames=memory.frames, there=torch.zeros(128, 2, dtype=torch.bool))
    assert (made.plan(frames, texts, nothing).digits == digits).all(-1).float().mean() < 0.4
    made.save_pretrained(tmp_path / "planner")
    read = Planner.from_pretrained(tmp_path / "planner")
    assert read.memory == (3, 1)
    assert torch.equal(read.plan(frames, texts, memory).digits, made.plan(frames, texts, memory).digits)


def test_what_was_not_there_is_not_seen():
    model, (frames, texts, digits) = planner(memory=(4, 8)), noise(3)
    ids = model.vocabulary.digits_to_ids(digits)
    there = torch.tensor([[True, True], [True, False], [False, False]])
    earlier = torch.stack([noise(3, seed=1)[0], noise(3, seed=2)[0]], 1)
    logits = model.logits(frames, texts, ids, Memory(frames=earlier, there=there))
    others = torch.where(there[..., None, None, None], earlier, 255 - earlier)
    assert torch.equal(model.logits(frames, texts, ids, Memory(frames=others, there=there)), logits)
    swapped = model.logits(frames, texts, ids, Memory(frames=earlier.flip(1), there=there))
    assert not torch.allclose(swapped[0], logits[0])  # how long ago it was counts
    assert torch.equal(swapped[2], logits[2])


def test_memories_that_do_not_fit():
    model, (frames, texts, digits) = planner(memory=(4, 8)), noise(2)
    one = Memory(frames=frames[:, None], there=torch.ones(2, 1, dtype=torch.bool))
    odd = Memory(frames=frames[:, None], there=torch.ones(2, 2, dtype=torch.bool))
    for given in (None, one, odd, one.to("cpu")):
        with pytest.raises(BadOption, match=r"remembers the frames \[4, 8\] steps back"):
            model.plan(frames, texts, given)
    with pytest.raises(BadOption, match="remembers"):
        planner().loss(frames, texts, digits, one)
    for memory in (4, (0,), (1.0,), (True,), (2000,), tuple(range(1, 66))):
        with pytest.raises(BadOption, match="memory"):
            planner(memory=memory)


def test_what_may_look_at_what():
    model, (frames, texts, digits) = planner(), noise(3)
    ids = model.vocabulary.digits_to_ids(digits)
    logits = model.logits(frames, texts, ids)
    later = ids.clone()
    later[:, 1] = model.vocabulary.block(1).start
    assert torch.equal(model.logits(frames, texts, later), logits)  # the last digit is an answer, never an input
    first = ids.clone()
    first[:, 0] = model.vocabulary.block(0).start
    assert not torch.allclose(model.logits(frames, texts, first)[:, 1], logits[:, 1])
    alone = model.logits(frames[1:2], texts[1:2], ids[1:2])  # "find blue" without the padding of "find red now"
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-4, atol=1e-5)
    words, _, _ = model._prefix(frames, texts, None)
    others, _, _ = model._prefix(255 - frames, texts, None)
    assert not torch.allclose(
        words[1][0][:, :, 0], others[1][0][:, :, 0]
    )  # words see the picture: a prefix, not causal


def test_only_valid_codes_are_drawn():
    model, (frames, texts, _) = planner(), noise(200)
    with torch.no_grad():
        model.head.bias[: model.vocabulary.first_id] += 100  # it would rather talk
    digits = model.plan(frames, texts, generator=torch.Generator().manual_seed(0)).digits
    assert digits.amin(0).tolist() == [0, 0] and digits.amax(0).tolist() == [3, 2]
    assert torch.equal(digits, model.plan(frames, texts, generator=torch.Generator().manual_seed(0)).digits)


@pytest.mark.parametrize("method", ["uniform", "random", "norm-diversity", "divprune"])
def test_patches_are_dropped(method):
    model, (frames, texts, digits) = planner(visual="patches"), noise(6)
    all_patches = model.plan(frames, texts)
    assert all_patches.kept.all() and all_patches.num_visual == 4
    model.compress(method, keep=2)
    few = model.plan(frames, texts)
    assert few.num_visual == 2 and few.kept.sum(1).tolist() == [2] * 6
    model.loss(frames, texts, digits).backward()
    assert model.frame.first.weight.grad.abs().sum() > 0
    assert model.compress(None).plan(frames, texts).kept.all()


def test_a_dropped_patch_is_not_seen_and_a_kept_one_keeps_its_place():
    """With the convolutions silenced, a patch is what its own pixels say."""
    model, (frames, texts, _) = planner(visual="patches", method="uniform", keep=2), noise(1)
    with torch.no_grad():
        model.frame.second.weight.zero_()
    kept = model.plan(frames, texts).kept[0].view(2, 2)
    ids = torch.tensor([[model.vocabulary.block(0).start, model.vocabulary.block(1).start]])
    before = model.logits(frames, texts, ids)
    for is_kept in (False, True):
        row, column = (kept == is_kept).nonzero()[0].tolist()
        other = frames.clone()
        other[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
        assert torch.equal(model.logits(other, texts, ids), before) != is_kept
    places = model.visual_places.detach().clone()
    with torch.no_grad():
        model.visual_places[~kept.flatten()] += 1
    assert torch.equal(model.logits(frames, texts, ids), before)
    with torch.no_grad():
        model.visual_places.copy_(places)[kept.flatten()] += torch.randn(32, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model.logits(frames, texts, ids), before)


def test_every_step_draws_a_budget(tmp_path):
    model, seen = planner(visual="patches", method="random", keep=1.0), []
    module = PlannerModule(model, keeps=(4, 2, 1.0), warmup_steps=0)

    class Watch(L.Callback):
        def on_train_batch_end(self, *_):
            seen.append(model.config.keep)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "callbacks": [Watch()]}
    run = L.Trainer(default_root_dir=tmp_path, max_steps=12, accelerator="cpu", enable_model_summary=False, **options)
    run.fit(module, batches(noise(192), size=16))
    assert set(seen) == {4, 2, 1.0} and model.config.keep == 4
    with pytest.raises(BadOption, match="method"):
        PlannerModule(planner(), keeps=(0.5,))


def test_it_is_saved_whole(tmp_path):
    model, (frames, texts, _) = planner(visual="patches"), noise(5)
    model.compress("norm-diversity", 3).save_pretrained(tmp_path)
    read = Planner.from_pretrained(tmp_path)
    assert read.config == model.config and torch.equal(
        read.plan(frames, texts).digits, model.plan(frames, texts).digits
    )
    with pytest.raises(UnsupportedModel, match="not a BehaviourTokeniser"):
        BehaviourTokeniser.from_pretrained(tmp_path)


def test_what_is_refused():
    model, (frames, texts, digits) = planner(), noise(2)
    wrong = [{"words": ()}, {"words": ("a", "a")}, {"words": "ab"}, {"levels": (1,)}, {"frame_size": (15, 16)}]
    wrong += [{"frame_size": 16}, {"visual": "all"}, {"num_heads": 5}, {"width": 0}, {"num_layers": True}]
    wrong += [{"method": "uniform", "keep": 2}, {"visual": "patches", "method": "tome"}, {"keep": 2.5}]
    wrong += [{"visual": "patches", "method": "zoprune"}, {"visual": "patches", "method": "no"}]
    for options in wrong:
        with pytest.raises(BadOption):
            PlannerConfig(**SMALL | options)
    with pytest.raises(BadOption, match="never read open, the"):
        model.plan(frames, ["open the", "find red"])
    with pytest.raises(BadOption, match="words"):
        model.plan(frames, ["...", "find red"])
    with pytest.raises(BadOption, match="16 x 16"):
        model.plan(frames[:, :8], texts)
    with pytest.raises(BadOption, match="Digit"):
        model.loss(frames, texts, digits + 4)
    for options in ({"lr": 0.0}, {"weight_decay": -1.0}, {"warmup_steps": -1}):
        with pytest.raises(BadOption):
            PlannerModule(model, **options)


def test_any_vlm_is_a_planner(tmp_path):
    """A few steps of fine-tuning on compressed pictures; then it says valid codes, and is read back from disk."""
    big = VLMPlanner(ts.load("tiny", device="cpu").compress("norm-diversity", keep=0.1), (4, 3))
    frames, texts, digits = noise(2, side=56)
    optimizer, losses = torch.optim.AdamW(big.network.parameters(), lr=1e-3), []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = big.loss(frames, texts, digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    big.network.eval()
    planned = big.plan(frames, texts)
    assert planned.digits.shape == (2, 2) and (planned.digits < torch.tensor([4, 3])).all()
    assert planned.kept is None and 0 < planned.num_visual < 50
    drawn = [big.plan(frames, texts, generator=torch.Generator().manual_seed(1)).digits for _ in range(2)]
    assert torch.equal(*drawn)
    big.save_pretrained(tmp_path)
    read = VLMPlanner.from_pretrained(tmp_path, device="cpu")
    assert read.levels == (4, 3) and read.plan(frames, texts).num_visual > 250
    read.vlm.compress("norm-diversity", keep=0.1)
    assert torch.equal(read.plan(frames, texts).digits, planned.digits)
    with pytest.raises(BadOption, match="levels"):
        VLMPlanner(read.vlm, (5, 3))


def test_a_vlm_is_taught_the_behaviour_and_nothing_else():
    big = VLMPlanner(ts.load("tiny", device="cpu"), (4, 3))
    with pytest.raises(BadOption, match="no behaviour tokens"):
        VLMPlanner(ts.load("tiny", device="cpu"))
    seen, forward = {}, big.network.forward
    big.network.forward = lambda **inputs: seen.update(inputs) or forward(**inputs)
    frames, texts, digits = noise(2, side=56)
    big.loss(frames, texts, digits)
    labelled = [labels[labels != -100].tolist() for labels in seen["labels"]]
    assert labelled == big.vocabulary.digits_to_ids(digits).tolist()
    spoken = big.vlm.processor.batch_decode(seen["input_ids"], skip_special_tokens=True)
    assert all(text in said for text, said in zip(texts, spoken, strict=True))
