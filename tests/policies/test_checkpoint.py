"""Policies on disk: nothing is lost, and nothing that a stranger wrote does harm."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.policies.test_light_scorer import assert_same, video
from tests.policies.test_scorer import qwen_config
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.policies.checkpoint import load_policy
from tokensieve.policies.light_scorer import LightScorer
from tokensieve.policies.scorer import PolicyScorer

MAKERS = {
    "cacovid-scorer": lambda: PolicyScorer(qwen_config(), "causal", seed=5),
    "light-scorer": lambda: LightScorer(32, width=16, num_blocks=1, question_aware=True, seed=5),
    "blind": lambda: LightScorer(32, width=16, num_heads=2, question_aware=False, seed=5),
}


@pytest.fixture(params=MAKERS)
def policy(request):
    return MAKERS[request.param]()


@pytest.fixture
def folder(tmp_path):
    """A light scorer, saved."""
    MAKERS["light-scorer"]().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what was saved comes back


def test_round_trip(policy, tmp_path):
    state = torch.get_rng_state()
    policy.save_pretrained(tmp_path / "new" / "folder")
    loaded = load_policy(tmp_path / "new" / "folder", local_files_only=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(policy) and loaded.options() == policy.options() and loaded.needs == policy.needs
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert_same(loaded(video()), policy(video()), rtol=0, atol=0)
    assert type(policy).from_pretrained(str(tmp_path / "new" / "folder")).options() == policy.options()


def test_two_files_one_json_one_safetensors(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    policy.save_pretrained(tmp_path)  # over itself
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["tokensieve_policy"] == policy.kind
    assert load_file(tmp_path / "model.safetensors").keys() == policy.state_dict().keys()


def test_half_precision_is_kept(policy, tmp_path):
    policy.bfloat16().save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_same(loaded(video()), policy(video()), rtol=0, atol=0)


def test_the_layout_of_the_released_weights_is_ours(tmp_path):
    PolicyScorer(qwen_config()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    scorer = PolicyScorer.from_released(state, qwen_config(), "bidirectional")
    assert_same(scorer(video()), load_policy(tmp_path)(video()), rtol=0, atol=0)


def test_a_config_tells_nothing_of_where_the_model_was(tmp_path):
    config = qwen_config()
    config._name_or_path = "/home/someone/secret"
    PolicyScorer(config).save_pretrained(tmp_path)
    assert "secret" not in (tmp_path / "config.json").read_text()


def test_a_save_that_fails_leaves_the_old_one(folder, monkeypatch):
    expected = load_policy(folder)(video())
    other = LightScorer(32, width=8, num_heads=2)

    def full_disk(self, *_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(type(folder), "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        other.save_pretrained(folder)
    assert_same(load_policy(folder)(video()), expected, rtol=0, atol=0)


def test_pushing_uploads_what_saving_writes(policy, monkeypatch):
    seen = {}

    class Hub:
        endpoint = "https://hub.example"

        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen.update(private=private, exist_ok=exist_ok)
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen.update(repo_id=repo_id, files=sorted(os.listdir(folder_path)), policy=load_policy(folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert policy.push_to_hub("scorer", private=True, token="secret") == "https://hub.example/me/scorer"
    assert seen["repo_id"] == "me/scorer" and seen["files"] == ["config.json", "model.safetensors"]
    assert seen["private"] is True and seen["exist_ok"] is True and seen["token"] == "secret"
    assert_same(seen["policy"](video()), policy(video()), rtol=0, atol=0)


def test_a_hub_id_is_two_files_of_one_snapshot(folder, monkeypatch):
    asked = []

    def download(repo_id, *, revision, allow_patterns, local_files_only):
        asked.append((repo_id, revision, allow_patterns, local_files_only))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert isinstance(load_policy("someone/light", revision="v1"), LightScorer)
    assert asked == [("someone/light", "v1", ["config.json", "model.safetensors"], False)]


# --- what is refused


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing",
        "./nothing",
        "/nothing",
        "../up/down",
        "a/b/c",
        "a/..",
        "-a/b",
        "a/b\n",
        "a\0b",
        "~no-one/x",
        "a" * 5000,
    ],
)
def test_no_such_folder(name):
    with pytest.raises(BadOption, match="There is no folder"):
        load_policy(name)


def test_a_hub_id_that_cannot_be_reached():
    with pytest.raises(BadOption, match="'no/where' is neither a folder nor a hub id.*Check the spelling"):
        load_policy("no/where", local_files_only=True)


def test_a_file_is_no_folder(folder):
    with pytest.raises(BadOption, match="There is no folder"):
        load_policy(folder / "config.json")
    with pytest.raises(BadOption, match="is no folder"):
        LightScorer(8).save_pretrained(folder / "config.json")


def test_another_class_is_refused(folder):
    with pytest.raises(UnsupportedModel, match="holds a LightScorer, not a PolicyScorer"):
        PolicyScorer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["os.system", "LightScorer", "../light-scorer", "", None, 3, ["light-scorer"], {}])
def test_unknown_policies_are_refused(folder, kind):
    edit_config(folder, tokensieve_policy=kind)
    with pytest.raises(UnsupportedModel, match="no known policy.*one of.*'cacovid-scorer', 'light-scorer'"):
        load_policy(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "no known policy"),
        ("null", "no known policy"),
        ("{}", "no known policy"),
        ("{", "cannot be read"),
        ("\udcff".encode("utf-8", "surrogateescape"), "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (" " * (1 << 20) + "{}", "cannot be read"),
    ],
)
def test_other_json_is_refused(folder, text, message):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UnsupportedModel, match=message) as error:
        load_policy(folder)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0},
        {"width": "16"},
        {"width": 10**30},
        {"num_blocks": 10**9},
        {"num_heads": 3},
        {"question_aware": "yes"},
        {"hook": "os.system"},
        {"self": 1},
        {"seed": "x"},
    ],
)
def test_hostile_options_are_refused(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModel, match="No LightScorer can be made from the config.json"):
        load_policy(folder)


@pytest.mark.parametrize("changes", [{"width": 32}, {"width_in": 10**9}, {"num_blocks": 2}, {"question_aware": False}])
def test_shapes_are_compared_before_memory_is_taken(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModel, match="do not fit its config.json"):
        load_policy(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "no-such"}, "No PolicyScorer can be made.*does not know"),
        ({"model_type": "bert"}, "No PolicyScorer can be made.*rotary positions"),
        ({"hidden_size": "wide"}, "No PolicyScorer can be made"),
        ({"num_attention_heads": 0}, "No PolicyScorer can be made"),
        ({"hidden_size": 2**30}, "do not fit"),
        ({"head_dim": 2**40}, "No PolicyScorer can be made|do not fit"),
    ],
)
def test_hostile_decoders_are_refused(tmp_path, changes, message):
    MAKERS["cacovid-scorer"]().save_pretrained(tmp_path)
    decoder = json.loads((tmp_path / "config.json").read_text())["decoder"]
    edit_config(tmp_path, decoder=decoder | changes)
    with pytest.raises(UnsupportedModel, match=message):
        load_policy(tmp_path)


def test_layers_code_and_kernels_of_a_config_are_not_followed(tmp_path):
    policy = MAKERS["cacovid-scorer"]()
    policy.save_pretrained(tmp_path)
    decoder = json.loads((tmp_path / "config.json").read_text())["decoder"]
    more = {"num_hidden_layers": 10**9, "auto_map": {"AutoModel": "evil/repo--evil.Model"}}
    more |= {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels", "vocab_size": 10**12}
    edit_config(tmp_path, decoder=decoder | more)
    loaded = load_policy(tmp_path)
    assert loaded.config._attn_implementation == "sdpa" and "evil" not in json.dumps(loaded.options())
    assert_same(loaded(video()), policy(video()), rtol=0, atol=0)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").rename(folder / "old")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsupportedModel, match="has no model.safetensors.*Pickled weights can run code"):
        load_policy(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match="has no config.json.*save_pretrained"):
        load_policy(folder)


def test_pipes_are_not_waited_for(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UnsupportedModel, match=f"has no {name}"):
            load_policy(folder)


def _without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: _without(s, "look.bias"), r"1 are missing \(look.bias\)"),
        (lambda s: s | {"more": torch.zeros(1)}, "1 are unknown"),
        (lambda s: s | {"look.bias": torch.zeros(3)}, r"look.bias is \(3,\) instead of \(16,\)"),
        (lambda s: {k: v.long() for k, v in s.items()}, "one dtype of real numbers"),
        (lambda s: s | {"look.bias": s["look.bias"].half()}, "one dtype of real numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, spoil, message):
    save_file(spoil(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=message):
        load_policy(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: pickle.dumps({"look.bias": 1}),
        lambda data: data[:8] + b"[" + data[9:],
    ],
)
def test_damaged_weights_are_refused(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UnsupportedModel, match="model.safetensors of .* is damaged"):
        load_policy(folder)
