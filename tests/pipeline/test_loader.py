"""`load`: folders saved by transformers come back the same; anything else is an error of ours that runs nothing."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

import tokensieve
from tests.pipeline.tiny_processors import RECIPES, make_vlm, noise, shared_vlm
from tokensieve.errors import BadOption, TokensieveError, UnsupportedModel
from tokensieve.pipeline.loader import load

SECRET = "0x7f-leaked-address"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(shared_vlm("llava_onevision"), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage; the space and the accent are part of the test."""
    return shutil.copytree(saved, tmp_path / "a modèl")


def save(vlm, folder):
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def edit(path, change) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def weights(folder):
    return folder / "model.safetensors"


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("name", list(RECIPES))
def test_round_trip(name, tmp_path):
    vlm = shared_vlm(name).compress("uniform", keep=0.5)
    loaded = tokensieve.load(save(vlm, tmp_path / "model")).compress("uniform", keep=0.5)
    assert not loaded.model.training
    want, got = (v.answer(noise(4), "what?", max_new_tokens=3) for v in (vlm, loaded))
    assert (got.answer, got.visual_tokens, got.prompt_tokens) == (want.answer, want.visual_tokens, want.prompt_tokens)
    assert got.model == str(tmp_path / "model")


def test_a_folder_as_text_and_from_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load(f"~/{folder.name}").name == f"~/{folder.name}"
    monkeypatch.chdir(folder.parent)
    assert load(folder.name, local_files_only=True).model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32", "auto"])
def test_dtype(saved, dtype):
    want = {"bfloat16": torch.bfloat16, torch.float16: torch.float16}.get(dtype, torch.float32)
    assert load(saved, dtype=dtype).model.dtype == want


def test_auto_is_the_dtype_it_was_saved_in(tmp_path):
    vlm = make_vlm("llava")
    vlm.model.to(torch.bfloat16)
    assert load(save(vlm, tmp_path)).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "float", 16, None, torch.int8, torch.complex64])
def test_wrong_dtype(saved, dtype):
    with pytest.raises(BadOption, match="dtype"):
        load(saved, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "cuda:99", object(), ""])
def test_wrong_device(saved, device):
    with pytest.raises(BadOption, match="(?i)device"):
        load(saved, device=device)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nothing", "~/nothing", "a/b/c", "", "no-such/model", "x\0y", "?"]
)
def test_nothing_there(name):
    with pytest.raises(BadOption):
        load(name)


def test_a_file_and_an_empty_folder(saved, tmp_path):
    with pytest.raises(BadOption, match="no folder"):
        load(saved / "config.json")
    with pytest.raises(UnsupportedModel, match="config.json"):
        load(tmp_path)


def refused(folder, match: str = ".") -> TokensieveError:
    """The error, after checking that it tells what to do and nothing from inside the checkpoint."""
    with pytest.raises(UnsupportedModel, match=match) as caught:
        load(folder)
    assert caught.value.hint and SECRET not in str(caught.value) and caught.value.exit_code == 4
    return caught.value


@pytest.mark.parametrize("model_type", ["llama", "no_such_family", "__class__", 7, None, ["llava"], {"a": 1}])
def test_unknown_family_is_refused_by_its_config_alone(folder, model_type):
    edit(folder / "config.json", lambda c: c.update(model_type=model_type))
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    refused(folder, "not supported; supported are")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"model_type": ' * 3000, '{"model_type": "llava_onevision"', "\x00\xff" + SECRET]
)
def test_config_that_is_no_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        dict(text_config=3),
        dict(text_config={"model_type": SECRET}),
        dict(vision_config=None, text_config={"model_type": "qwen2", "hidden_size": SECRET}),
        dict(text_config={"model_type": "qwen2", "hidden_size": -1}),
        dict(dtype=SECRET),
        dict(image_grid_pinpoints=SECRET, vision_feature_layer=SECRET, vision_config=SECRET),
        dict(architectures=[SECRET], text_config=[]),
    ],
)
def test_config_with_nonsense(folder, change):
    edit(folder / "config.json", lambda c: c.update(change))
    refused(folder)


@pytest.mark.parametrize("suffix", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_are_refused_unread(folder, suffix, tmp_path):
    weights(folder).unlink()
    marker = tmp_path / "marker"
    (folder / suffix).write_bytes(pickle.dumps(Bomb(marker)))
    error = refused(folder, "are pickled")
    assert "save_pretrained" in error.hint and not marker.exists()


def test_pickled_weights_beside_good_ones_are_not_read(folder, tmp_path):
    marker = tmp_path / "marker"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    load(folder)
    assert not marker.exists()


def test_no_weights(folder):
    weights(folder).unlink()
    refused(folder, "no weights")


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:5],
        lambda good: good[:200],
        lambda good: good[:-1],
        lambda good: good[: len(good) // 2],
        lambda good: b"\xff" * 8 + good[8:],
        lambda good: header(b"{" * 1000),
        lambda good: header(b"not json " + SECRET.encode()),
        lambda good: header(b"{}"),
        lambda good: header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8000000]}}'),
        lambda good: pickle.dumps({"a": 1}) + good,
    ],
)
def test_damaged_weights(folder, damage):
    weights(folder).write_bytes(damage(weights(folder).read_bytes()))
    refused(folder)


def test_pickle_named_safetensors(folder, tmp_path):
    marker = tmp_path / "marker"
    weights(folder).write_bytes(pickle.dumps(Bomb(marker)))
    refused(folder)
    assert not marker.exists()


def test_weights_that_are_missing_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights(folder))
    gone = next(k for k in tensors if "multi_modal_projector" in k)
    save_file({k: v for k, v in tensors.items() if k != gone}, weights(folder), {"format": "pt"})
    refused(folder, "lacks 1 of the model's weights")


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", lambda c: c["text_config"].update(intermediate_size=50))
    refused(folder)


@pytest.mark.parametrize(
    "gone", [["processor_config.json"], ["tokenizer.json"], ["processor_config.json", "tokenizer.json"]]
)
def test_missing_processor(folder, gone):
    for file in gone:
        (folder / file).unlink()
    for file in folder.glob("preprocessor_config.json"):
        file.unlink()
    refused(folder, "processor")


def test_tokenizer_in_place_of_a_processor(folder, monkeypatch):
    from transformers import AutoProcessor

    tokenizer = shared_vlm("llava_onevision").processor.tokenizer
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer)
    refused(folder, "no processor for pictures")


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"processor_class": "os.system", "a": 1}', SECRET])
def test_damaged_processor(folder, file, text):
    (folder / file).write_text(text)
    try:
        load(folder)  # a tokenizer_config.json with other settings is no damage
    except UnsupportedModel as error:
        assert error.hint and SECRET not in str(error)
    else:
        assert file == "tokenizer_config.json"


CODE = "open({marker!r}, 'w').close()\nclass Model: pass\n"
MAP = {k: "evil.Model" for k in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")}
MAP |= {"AutoTokenizer": ["evil.Model", "evil.Model"], "AutoImageProcessor": "evil.Model"}


@pytest.fixture
def evil(folder, tmp_path):
    """A folder with code of its own; returns it and whether the code ran."""
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
    return folder, marker.exists


def test_code_of_the_checkpoint_never_runs(evil):
    folder, ran = evil
    for file in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        edit(folder / file, lambda c: c.update(auto_map=MAP))
    vlm = load(folder)  # transformers has code of its own for this family, and that is what runs
    vlm.answer(noise(4), "what?", max_new_tokens=1)
    assert not ran() and type(vlm.processor).__module__.startswith("transformers.")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_code_for_a_part_of_the_model(evil, part, monkeypatch):
    folder, ran = evil
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for permission"))
    edit(folder / "config.json", lambda c: c[part].update(auto_map=MAP))
    refused(folder, "code of its own")
    assert not ran()


@pytest.mark.parametrize("where", [(), ("text_config",), ("vision_config",)])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_from_the_hub(folder, where, key):
    def change(config):
        for part in where:
            config = config[part]
        config[key] = "someone/kernels"

    edit(folder / "config.json", change)
    refused(folder, "code of its own")


def test_unknown_processor_class_with_code(evil):
    folder, ran = evil
    edit(folder / "processor_config.json", lambda c: c.update(processor_class="Model", auto_map=MAP))
    edit(folder / "tokenizer_config.json", lambda c: c.update(processor_class="Model"))
    try:
        load(folder)
    except UnsupportedModel as error:
        assert "evil" not in str(error)
    assert not ran()


def test_messages_never_repeat_what_an_error_said(folder, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for owner in (AutoModelForImageTextToText, AutoProcessor):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "from_pretrained", broken)
            error = refused(folder, "RuntimeError")
            assert SECRET in str(error.__cause__)  # still there for who debugs


def broken(*args, **kwargs):
    raise RuntimeError(SECRET)


def test_package_that_a_processor_needs(folder, monkeypatch):
    from transformers import AutoProcessor

    def lacking(*args, **kwargs):
        raise ImportError(SECRET)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lacking)
    assert "install" in refused(folder, "needs a package").hint


def test_pickles_and_code_are_off_for_the_hub_too(saved, monkeypatch):
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    seen = {}
    for owner in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
        original = owner.from_pretrained

        def spy(*args, original=original, owner=owner, **options):
            seen.setdefault(owner, options)
            return original(*args, **options)

        monkeypatch.setattr(owner, "from_pretrained", spy)
    load(saved)
    assert len(seen) == 3 and all(options["trust_remote_code"] is False for options in seen.values())
    assert seen[AutoModelForImageTextToText]["use_safetensors"] is True
