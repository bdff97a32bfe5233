"""Exported models answer as the models they were made from, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tests.export import graphs
from tokensieve.datasets import make_clip, write_video
from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadMedia, BadOption, UnsupportedModel
from tokensieve.export.runtime import OnnxVLM

METHOD = "norm-diversity"
GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
EMPTY = Frames(data=np.zeros((0, 8, 8, 3), np.uint8), times_s=np.zeros(0), duration_s=0, source="")


@cache
def clip(index: int) -> tuple[np.ndarray, str]:
    """Frames of a generated clip and a question about it."""
    from tokensieve.datasets.render import render_clips

    made = make_clip("val", index)
    (frames,) = render_clips([made]).numpy()
    return frames, made.questions[index % len(made.questions)].text


@pytest.fixture(scope="module")
def tiny(exported_tiny):
    vlm, folder = exported_tiny(METHOD)
    return vlm, OnnxVLM.from_pretrained(folder, "cpu", threads=1)


def facts(answer) -> dict:
    """All but the times and the name, which differ."""
    found = answer.to_dict()
    assert set(found.pop("seconds")) == {"read", "encode", "select", "generate"}
    found.pop("model")
    return found


def test_answers_of_the_shipped_model(tiny):
    vlm, onnx_vlm = tiny
    for index in range(4):
        media, question = clip(index)
        media = media if index % 2 else media[3]
        assert facts(onnx_vlm.answer(media, question)) == facts(vlm.answer(media, question))


@pytest.mark.parametrize("keep", [0.1, 0.5, 40, 1.0])
def test_one_file_serves_every_budget(tiny, keep):
    vlm, onnx_vlm = tiny
    media, question = clip(5)
    try:
        for shown in (media, media[2]):
            expected = vlm.compress(METHOD, keep).answer(shown, question)
            assert facts(onnx_vlm.answer(shown, question, keep=keep)) == facts(expected)
    finally:
        vlm.compress(METHOD, 0.25)


def test_batches(tiny):
    vlm, onnx_vlm = tiny
    media, questions = zip(*(clip(i) for i in range(4)), strict=True)
    together = onnx_vlm.answer(list(media), list(questions))
    assert [facts(a) for a in together] == [facts(a) for a in vlm.answer(list(media), list(questions))]
    assert [facts(a) for a in together] == [facts(onnx_vlm.answer(m, q)) for m, q in zip(media, questions, strict=True)]
    of_any_kind = [media[0][:3], media[1][0], media[2]]  # more than a processor can batch
    mixed = onnx_vlm.answer(of_any_kind, questions[0])
    assert [facts(a) for a in mixed] == [facts(vlm.answer(m, questions[0])) for m in of_any_kind]


def test_pictures_that_are_resampled(tiny):
    """A grey level here and there; the answers stay."""
    vlm, onnx_vlm = tiny
    from PIL import Image

    media, question = clip(1)
    large = np.stack([np.asarray(Image.fromarray(f).resize((250, 170), Image.Resampling.BICUBIC)) for f in media])
    assert facts(onnx_vlm.answer(large, question)) == facts(vlm.answer(large, question))


def test_sampling(tiny):
    _, onnx_vlm = tiny
    media, question = clip(2)
    first, again = (onnx_vlm.answer(media, question, do_sample=True, temperature=5.0, seed=3) for _ in range(2))
    others = {str(onnx_vlm.answer(media, question, do_sample=True, temperature=5.0, seed=s)) for s in range(8)}
    assert str(first) == str(again) and len(others) > 1


def test_files_and_notes(tiny, tmp_path):
    vlm, onnx_vlm = tiny
    media, question = clip(0)
    path = tmp_path / "clip.mp4"
    write_video(path, media, fps=4)
    ours = onnx_vlm.answer(str(path), question, read_options={"num_frames": 4})
    assert facts(ours) == facts(vlm.answer(str(path), question, read_options={"num_frames": 4}))
    assert ours.seconds["select"] == 0.0 and ours.seconds["read"] > 0
    noted = Frames(data=media, times_s=np.arange(len(media), dtype=float), duration_s=8.0, source="x", notes=("torn",))
    assert onnx_vlm.answer(noted, question).notes == ("torn",)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"question": " "}, BadOption),
        ({"question": 3}, BadOption),
        ({"question": []}, BadOption),
        ({"question": ["a", "b"], "media": [np.zeros((1, 8, 8, 3), np.uint8)]}, BadOption),
        ({"question": "What is <image>?"}, BadOption),
        ({"media": np.zeros((8, 8), np.uint8)}, BadOption),
        ({"media": EMPTY}, BadMedia),
        ({"keep": 0}, BadOption),
        ({"keep": float("nan")}, BadOption),
        ({"max_new_tokens": 0}, BadOption),
        ({"num_beams": 2}, BadOption),
    ],
)  # fmt: skip
def test_wrong_use(tiny, arguments, error):
    _, onnx_vlm = tiny
    with pytest.raises(error):
        onnx_vlm.answer(**({"media": np.zeros((8, 8, 3), np.uint8), "question": "What?"} | arguments))


def test_budgets_that_an_export_cannot_serve(exported_tiny, tmp_path):
    media, question = clip(0)
    fixed = OnnxVLM.from_pretrained(changed(exported_tiny(METHOD)[1], tmp_path, dynamic_keep=False), "cpu")
    assert fixed.answer(media, question, keep=0.25).keep == 0.25
    with pytest.raises(BadOption, match="keep=0.25 alone"):
        fixed.answer(media, question, keep=0.5)


def test_what_a_policy_is_asked(tiny, exported_tiny, tmp_path):
    """The question's embeddings, and how many of them stand before the picture, as the torch model gives them."""
    vlm, _ = tiny
    folder = changed(exported_tiny(METHOD)[1], tmp_path)
    graphs.save(graphs.asking(vlm.model.config.text_config.hidden_size), folder, "vision_encoder.onnx", 1024)
    asking = OnnxVLM.from_pretrained(folder, "cpu")
    for shown, question in (clip(0), (clip(1)[0][0], "is it the red one")):
        asked = vlm.prepare(shown, question, needs={"question"}).items[0].tokens.question
        expected = asked.embeds.mean(0).numpy() + asked.num_before
        ours = asking.prepare(shown, question)
        visual = np.isin(ours.input_ids[0], asking.manifest.model["suppress_token_ids"])
        visual[np.flatnonzero(visual)[-1]] = False  # the newline
        kept = ours.inputs_embeds[0, visual]
        np.testing.assert_allclose(kept[:5], np.tile(expected, (5, 1)), rtol=0, atol=1e-5)
        assert len(ours.kept[0]) == len(vlm.prepare(shown, question).plans[0].kept)


def changed(folder: Path, to: Path, **manifest) -> Path:
    """A copy of an exported folder whose manifest says something else."""
    shutil.copytree(folder, to / "copy")
    path = to / "copy" / "tokensieve.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | manifest))
    return to / "copy"


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        ({"kind": "tower"}, "no exported vision-language model"),
        ({"graphs": {"vision_encoder": "onnx/vision_encoder.onnx"}}, "no exported vision-language model"),
        ({"positions": "compact"}, "preserve"),
        ({"family": "paligemma"}, "paligemma"),
        ({"graphs": dict.fromkeys(GRAPHS, "onnx/no.onnx")}, "lacks"),
        ({"graphs": dict.fromkeys(GRAPHS, "config.json")}, "no ONNX graph"),
        ({"graphs": dict.fromkeys(GRAPHS, "onnx/embed_tokens.onnx")}, "not those of a decoder"),
    ],
)
def test_folders_that_hold_something_else(exported_tiny, tmp_path, manifest, match):
    folder = changed(exported_tiny(METHOD)[1], tmp_path, **manifest)
    with pytest.raises(UnsupportedModel, match=match):
        OnnxVLM.from_pretrained(folder, "cpu")


def test_a_manifest_that_does_not_fit_the_graphs(exported_tiny, tmp_path):
    media, question = clip(0)
    found = json.loads((exported_tiny(METHOD)[1] / "tokensieve.json").read_text())
    wrong = [
        {"method": None},
        {"model": {k: v for k, v in found["model"].items() if k != "patches_per_tile"}},
        {"model": found["model"] | {"patches_per_tile": "many"}},
        {"model": found["model"] | {"image_token_id": "<image>"}},
        {"model": found["model"] | {"vocab": 5}},
    ]
    for i, change in enumerate(wrong):
        (tmp_path / str(i)).mkdir()
        folder = changed(exported_tiny(METHOD)[1], tmp_path / str(i), **change)
        with pytest.raises(UnsupportedModel):
            OnnxVLM.from_pretrained(folder, "cpu").answer(media, question)


@pytest.mark.parametrize(
    "file", ["processor_config.json", "generation_config.json", "tokenizer.json", "onnx/decoder_model_merged.onnx_data"]
)
@pytest.mark.parametrize("damage", ["missing", "cut off", "link"])
def test_damaged_folders(exported_tiny, tmp_path, file, damage):
    folder = changed(exported_tiny(METHOD)[1], tmp_path)
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "link":
        (tmp_path / "outside").write_bytes(content)
        path.symlink_to(tmp_path / "outside")
    with pytest.raises(UnsupportedModel):
        OnnxVLM.from_pretrained(folder, "cpu")


def test_a_model_that_wants_another_generation(exported_tiny, tmp_path):
    folder = changed(exported_tiny(METHOD)[1], tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"no_repeat_ngram_size": 2}))
    media, question = clip(0)
    with pytest.raises(UnsupportedModel, match="no_repeat_ngram_size"):
        OnnxVLM.from_pretrained(folder, "cpu").answer(media, question)


def test_cuda_is_no_silent_cpu(exported_tiny):
    if "CUDAExecutionProvider" in ort.get_available_providers() and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BadOption, match="cuda"):
        OnnxVLM.from_pretrained(exported_tiny(METHOD)[1], "cuda")


WITHOUT_TORCH = '''
import importlib.util, sys

BLOCKED = ("torch", "torchvision", "transformers", "lightning")
find_spec = importlib.util.find_spec


class Blocker:
    """As if none of these were installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker)
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in BLOCKED else find_spec(name, *rest)
'''

SCRIPT = """
import importlib.util, json, sys

assert importlib.util.find_spec("torch") is None
try:
    import torch
except ImportError:
    pass
else:
    sys.exit("torch can be imported")
from tokensieve.export.runtime import OnnxVLM

folder, clip, picture, question = sys.argv[1:]
vlm = OnnxVLM.from_pretrained(folder, threads=1)
answers = [vlm.answer(clip, question), vlm.answer(picture, question), vlm.answer(clip, question, keep=0.5)]
answers += vlm.answer([clip, picture], [question, question])
print(json.dumps([a.to_dict() for a in answers]))
"""


def test_it_runs_where_torch_cannot_be_imported(exported_tiny, tmp_path):
    """In a process, and its children that decode, in which torch, torchvision and transformers are not to be had."""
    from PIL import Image

    vlm, folder = exported_tiny(METHOD)
    media, question = clip(3)
    write_video(tmp_path / "clip.mp4", media, fps=4)
    Image.fromarray(media[1]).save(tmp_path / "picture.png")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WITHOUT_TORCH)
    root = Path(graphs.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, tmp_path / "clip.mp4", tmp_path / "picture.png", question],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{root}"},
    )
    assert done.returncode == 0, done.stderr
    paths = [str(tmp_path / "clip.mp4"), str(tmp_path / "picture.png")]
    expected = [facts(vlm.answer(path, question)) for path in paths]
    more = facts(vlm.compress(METHOD, 0.5).answer(paths[0], question))
    vlm.compress(METHOD, 0.25)
    found = json.loads(done.stdout)
    for answer in found:
        answer.pop("seconds"), answer.pop("model")
    assert found == [*expected, more, *expected]
