"""Token ids without torch equal those of every family's processor."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from tests.pipeline.tiny_families import IMAGE, VIDEO
from tests.pipeline.tiny_processors import make_processor, noise
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export import prompts
from tokensieve.export.items import make_item
from tokensieve.export.packing import NEWLINE, mrope_positions
from tokensieve.export.prompts import Prompt, Tokenizer, Words, padded_left
from tokensieve.pipeline.loader import ASSETS
from tokensieve.pipeline.prompt import run_processor, shows_video, user_turn

QUESTION = "What moves, and where to? (Ünïcode, too)"
MODEL = {
    "llava": {"patches_per_tile": 16},
    "llava_onevision": {
        "patches_per_tile": 16,
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]],
        "vision_aspect_ratio": "anyres_max_1",
    },
    "smolvlm": {"patches_per_tile": 4},
    "qwen2_5_vl": {"merge": 2, "window": 32, "patch": 4, "tokens_per_second": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with the processor's files for every family."""

    @cache
    def folder(name: str):
        path = tmp_path_factory.mktemp(name)
        make_processor(name).save_pretrained(path)
        return path

    return folder


@cache
def processor_of(name: str):
    return make_processor(name)


def clip(
    num_frames: int, height: int = 20, width: int = 28, spacing_s: float = 0.7, duration_s: float = 70.9
) -> Frames:
    times_s = np.arange(num_frames) * spacing_s + (58.3 if num_frames > 1 else 0)
    return Frames(data=noise(num_frames, height, width), times_s=times_s, duration_s=duration_s, source="test")


def words(name: str) -> Words:
    tokenizer = processor_of(name).tokenizer
    return Words(
        image=tokenizer.convert_ids_to_tokens(IMAGE),
        video="" if name == "llava" else tokenizer.convert_ids_to_tokens(VIDEO),
    )


def ours(folder, name: str, shown: Frames, question: str = QUESTION):
    config = json.loads((folder / "processor_config.json").read_text())
    item = make_item(name, shown, config, MODEL[name], words(name))
    tokenizer = Tokenizer(folder)
    text = tokenizer.render([user_turn(shown, question, item.as_video)], item.template)
    word = words(name).video if item.as_video else words(name).image
    return item, tokenizer, tokenizer.encode(prompts.expand(text, word, item.texts))


@pytest.mark.parametrize("num_frames", [1, 4, 5, 13])
@pytest.mark.parametrize("name", list(MODEL))
def test_ids_are_those_of_the_processor(folders, name, num_frames):
    processor = processor_of(name)
    for height, width in ((20, 28), (60, 21), (16, 16)):
        shown = clip(num_frames, height, width)
        turn = user_turn(shown, QUESTION, shows_video(processor, shown))
        inputs = run_processor(processor, [shown], [[turn]])
        item, tokenizer, ids = ours(folders(name), name, shown)
        np.testing.assert_array_equal(ids, inputs["input_ids"][0].numpy())
        assert item.as_video == shows_video(processor, shown)
        slots = np.flatnonzero(ids == tokenizer.id(item.word))
        assert len(slots) == len(item.packing.slots)
        if name == "qwen2_5_vl":
            assert_positions(inputs, ids, item, num_frames)


def assert_positions(inputs, ids, item, num_frames):
    from tests.pipeline.tiny_families import make_model

    model = make_model("qwen2_5_vl")
    extra = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if k in inputs}
    extra = {k: torch.as_tensor(v) for k, v in extra.items()}
    expected, _ = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **extra)
    visual = np.isin(ids, (IMAGE, VIDEO))
    np.testing.assert_array_equal(mrope_positions(visual, item.packing.grids[0], item.interval), expected[:, 0].numpy())


@pytest.mark.parametrize("num_frames", [1, 3])
def test_a_template_that_smolvlm_uses_for_images_alone(tmp_path, num_frames):
    processor = make_processor("smolvlm")
    processor.chat_template = "Look: " + processor.chat_template
    processor.save_pretrained(tmp_path)
    shown = clip(num_frames)
    inputs = run_processor(processor, [shown], [[user_turn(shown, QUESTION, num_frames > 1)]])
    _, _, ids = ours(tmp_path, "smolvlm", shown)
    np.testing.assert_array_equal(ids, inputs["input_ids"][0].numpy())


def test_the_shipped_models_prompts():
    from transformers import AutoProcessor

    folder = ASSETS / "tiny"
    processor = AutoProcessor.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    model = {
        "patches_per_tile": 144,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "vision_aspect_ratio": config["vision_aspect_ratio"],
    }
    tokenizer = Tokenizer(folder)
    asked = "which digit is red"
    for shown in (clip(8, 64, 64), clip(1, 90, 130)):
        found = Words(image=tokenizer.token(4), video=tokenizer.token(5))
        settings = json.loads((folder / "processor_config.json").read_text())
        item = make_item("llava_onevision", shown, settings, model, found)
        text = tokenizer.render([user_turn(shown, asked, item.as_video)])
        ids = tokenizer.encode(prompts.expand(text, item.word, item.texts))
        turn = user_turn(shown, asked, shows_video(processor, shown))
        np.testing.assert_array_equal(ids, run_processor(processor, [shown], [[turn]])["input_ids"][0].numpy())
    answer = processor.tokenizer("the red digit is 7<|end|>")["input_ids"]
    assert tokenizer.decode(answer) == processor.batch_decode([answer], skip_special_tokens=True)[0]


def test_special_tokens_by_name(tmp_path):
    """A checkpoint may call SmolVLM's frame tokens otherwise."""
    processor = make_processor("smolvlm")
    processor.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"fake_image_token": {"content": "<|im_start|>"}, "global_image_token": 7}
    path.write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.named("fake_image_token", "x") == "<|im_start|>"
    assert tokenizer.named("global_image_token", "x") == tokenizer.named("nothing", "x") == "x"


def render(folder, template: str, **more) -> str:
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder).render([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])


def test_what_templates_may_use(tmp_path):
    make_processor("llava").save_pretrained(tmp_path)
    template = (
        "{{ bos_token }}{% for message in messages %}{% generation %}{{ message['role'] }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}\n"
        "{{ {'a': '<ü>'} | tojson }}{% if add_generation_prompt %}!{% endif %}"
    )
    assert render(tmp_path, template) == '<bos>user{"a": "<ü>"}!'


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for %}", UnsupportedModel),
        ("{{ raise_exception('roles must alternate') }}", BadOption),
        ("{{ messages.__class__.__mro__ }}", BadOption),
        ("{% for i in range(10**9) %}x{% endfor %}", BadOption),
        ("{{ messages.append(1) }}", BadOption),
    ],
)
def test_templates_that_are_damaged_or_hostile(tmp_path, template, error):
    make_processor("llava").save_pretrained(tmp_path)
    with pytest.raises(error) as caught:
        render(tmp_path, template)
    assert "roles must" not in str(caught.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "link", "bytes"])
def test_damaged_files(tmp_path, file, damage):
    make_processor("llava").save_pretrained(tmp_path)
    path = tmp_path / file
    content = path.read_bytes()
    path.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage != "missing":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "bytes": b"\xff\xfe\x00"}[damage])
    if file.endswith("jinja") and damage in ("truncated", "empty"):
        return  # may be a template
    with pytest.raises(UnsupportedModel):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [{}, {"model": {"type": "BPE"}}, {"model": 3, "added_tokens": "x"}])
def test_json_that_is_no_tokenizer(tmp_path, content):
    make_processor("llava").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModel, match="no tokenizer"):
        Tokenizer(tmp_path)


def test_placeholders_in_a_question_are_refused():
    found = Words(image="<image>", video="")
    found.check("Is <video> a word?")
    with pytest.raises(BadOption, match="<image>"):
        found.check("What is <image>?")


def test_as_many_replacements_as_placeholders():
    assert prompts.expand("a<i>b<i>", "<i>", ["1", "22"]) == "a1b22"
    for texts in ([], ["1"], ["1", "2", "3"]):
        with pytest.raises(BadOption, match="2 pictures"):
            prompts.expand("a<i>b<i>", "<i>", texts)


@pytest.mark.parametrize("axes", [1, 3])
def test_dropped_tokens_leave_the_positions_of_the_others(axes):
    ids = np.asarray([7, 9, 9, 9, 9, 9, 8])
    positions = np.stack([np.arange(7) * (a + 1) for a in range(axes)])
    positions = positions[0] if axes == 1 else positions
    full = Prompt(ids=ids, positions=positions, places=np.arange(1, 6))
    slots = np.asarray([0, 1, NEWLINE, 2, 3])
    short, source = full.without_dropped(slots, np.asarray([1, 3]))
    np.testing.assert_array_equal(short.ids, [7, 9, 9, 9, 8])
    np.testing.assert_array_equal(short.places, [1, 2, 3])
    np.testing.assert_array_equal(source, [0, NEWLINE, 1])
    np.testing.assert_array_equal(short.positions, positions[..., [0, 2, 3, 5, 6]])


def test_padding_on_the_left():
    rows = [np.asarray([1, 2, 3]), np.asarray([4])]
    np.testing.assert_array_equal(padded_left(rows, 9), [[1, 2, 3], [9, 9, 4]])
    three = [np.tile(row, (3, 1)) for row in rows]
    padded = padded_left(three)
    assert padded.shape == (3, 2, 3)
    np.testing.assert_array_equal(padded[1], [[1, 2, 3], [0, 0, 4]])
    wide = [np.ones((3, 5)), np.ones((2, 5))]
    padded = padded_left(wide, axis=0)
    assert padded.shape == (2, 3, 5) and padded[1, 0].sum() == 0
