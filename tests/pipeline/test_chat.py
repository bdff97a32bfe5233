"""Later turns on the cached prompt give the tokens of the whole compressed conversation computed from scratch."""

from __future__ import annotations

import pytest
import torch

from tests.pipeline.tiny_processors import RECIPES, letters_only, make_vlm, noise, shared_vlm
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.pipeline.chat import Chat
from tokensieve.pipeline.prompt import run_processor

NEW = 4
QUESTIONS = ["what?", "which one is it?", "why?"]
FAMILIES = [name for name in RECIPES if name != "paligemma"]


@pytest.fixture(params=FAMILIES)
def vlm(request):
    return shared_vlm(request.param)


@pytest.fixture
def small():
    return shared_vlm("llava_onevision").compress("uniform", keep=0.5)


def media(kind: str):
    return noise(4) if kind == "video" else noise(1)[0]


def from_scratch(chat: Chat, conversation: list[dict], **options) -> tuple[str, int]:
    """Answer and prompt length without a cache from earlier turns: everything is encoded and computed again."""
    vlm = chat.vlm
    inputs = run_processor(vlm.processor, [chat.clip], [conversation])
    joined = chat.clip.num_frames > 1 and vlm.adapter.family.join_frames
    with torch.no_grad():
        prepared = vlm.compress_inputs(inputs, frames_as_video=joined)
        ids = vlm.model.generate(**prepared, do_sample=False, max_new_tokens=NEW, **options)
    length = prepared["input_ids"].shape[1]
    return vlm.processor.batch_decode(ids[:, length:], skip_special_tokens=True)[0].strip(), length


class Counter:
    """Counts the tokens that each pass through the language model computes, and the runs of the vision encoder."""

    def __init__(self, vlm):
        self.computed: list[int] = []
        self.encoded = 0
        self.hooks = [
            vlm.model.get_input_embeddings().register_forward_hook(lambda m, args, out: self._add(args[0])),
            vlm.adapter.projector.register_forward_hook(lambda m, args, out: self._encode()),
        ]

    def _add(self, ids):
        self.computed.append(ids.shape[1])

    def _encode(self):
        self.encoded += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize(("method", "positions"), [(None, "preserve"), ("uniform", "preserve"), ("uniform", "compact")])
def test_every_turn_equals_the_conversation_from_scratch(vlm, kind, method, positions):
    vlm.compress(method, keep=0.4, positions=positions)
    options = {"suppress_tokens": letters_only(vlm)}
    chat = Chat(vlm, media(kind))
    lengths = []
    for question in QUESTIONS:
        with Counter(vlm) as counter:
            text = chat.ask(question, max_new_tokens=NEW, **options)
        want, length = from_scratch(chat, chat.turns[:-1], **options)
        assert text == want and len(text) == NEW
        assert chat.turns[-1]["content"] == [{"type": "text", "text": text}]
        assert counter.encoded == (1 if len(lengths) == 0 else 0)
        # Only what the last turn added is computed, and of that at most its question: the answer is mostly cached.
        assert counter.computed[0] <= length - (lengths[-1] if lengths else 0)
        assert counter.computed[1:] == [1] * (NEW - 1)
        lengths.append(length)
    assert len({tuple(turn["role"] for turn in chat.turns)}) == 1 and len(chat.turns) == 6


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "smolvlm"])
def test_answers_that_decoding_changes(name):
    """Random bytes become other bytes as text, so the cache is cut back inside the answer."""
    vlm = shared_vlm(name).compress("uniform", keep=0.5)
    chat = Chat(vlm, noise(4))
    for question in QUESTIONS:
        text = chat.ask(question, max_new_tokens=NEW)
        assert text == from_scratch(chat, chat.turns[:-1])[0]


@pytest.mark.parametrize("cut_back", [False, True])
def test_a_sliding_window_shorter_than_the_prompt(cut_back):
    vlm = make_vlm("gemma3").compress("uniform", keep=0.5)
    vlm.model.config.text_config.sliding_window = 8
    for module in vlm.model.modules():
        if hasattr(module, "sliding_window") and module.sliding_window is not None:
            module.sliding_window = 8
    options = {} if cut_back else {"suppress_tokens": letters_only(vlm)}
    wide = Chat(shared_vlm("gemma3").compress("uniform", keep=0.5), noise(4))
    chat = Chat(vlm, noise(4))
    texts = []
    for question in QUESTIONS:
        texts.append(chat.ask(question, max_new_tokens=NEW, **options))
        assert texts[-1] == from_scratch(chat, chat.turns[:-1], **options)[0]
    assert texts != [wide.ask(q, max_new_tokens=NEW, **options) for q in QUESTIONS]  # the window is felt


def chat_with_template(template: str, keep=0.5) -> tuple[Chat, dict]:
    vlm = make_vlm("llava_onevision").compress("uniform", keep=keep)
    vlm.processor.chat_template = template
    return Chat(vlm, noise(4)), {"suppress_tokens": letters_only(vlm)}


SHOW = "{% for p in message['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<video>{% endif %}"
SHOW += "{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        # Earlier answers are left out, as reasoning models do with their thoughts.
        "{% for message in messages %}{% if message['role'] == 'user' %}U:" + SHOW + "{% endif %}{% endfor %}A:",
        # The number of turns stands in front of everything: nothing in the cache fits.
        "{{ messages | length }}{% for message in messages %}U:" + SHOW + "{% endfor %}A:",
        # The picture moves to another place.
        "{{ 'x' * messages | length }}{% for message in messages %}U:" + SHOW + "{% endfor %}A:",
    ],
)
def test_templates_that_rewrite_history(template):
    chat, options = chat_with_template(template)
    for turn, question in enumerate(QUESTIONS):
        with Counter(chat.vlm) as counter:
            text = chat.ask(question, max_new_tokens=NEW, **options)
        assert counter.encoded == (turn == 0)
        assert text == from_scratch(chat, chat.turns[:-1], **options)[0]


def test_a_template_that_leaves_out_the_picture():
    chat, options = chat_with_template("{% for message in messages[-1:] %}U:" + SHOW + "{% endfor %}A:")
    chat.ask("what?", max_new_tokens=NEW, **options)
    before = list(chat.turns)
    with pytest.raises(BadOption):
        chat.ask("why?", max_new_tokens=NEW)
    assert chat.turns == before


def test_the_same_question_twice_and_an_empty_rest(small):
    """A template that renders two turns alike leaves nothing new: one token is computed again all the same."""
    chat, options = chat_with_template("{% for message in messages[:1] %}U:" + SHOW + "{% endfor %}A:")
    first = chat.ask("what?", max_new_tokens=NEW, **options)
    with Counter(chat.vlm) as counter:
        assert chat.ask("why?", max_new_tokens=NEW, **options) == first
    assert counter.computed == [1] * NEW


def test_other_calls_between_the_turns():
    vlm = shared_vlm("qwen2_5_vl").compress("uniform", keep=0.5)
    options = {"suppress_tokens": letters_only(vlm), "max_new_tokens": NEW}
    alone = Chat(vlm, noise(4))
    want = [alone.ask(q, **options) for q in QUESTIONS]
    chat, got = Chat(vlm, noise(4)), []
    for question in QUESTIONS:
        got.append(chat.ask(question, **options))
        vlm.compress(None).answer(noise(6, 40, 40), "what?", max_new_tokens=2)  # the chat keeps its own compression
    assert got == want


def test_a_turn_that_fails_changes_nothing(small, monkeypatch):
    options = {"suppress_tokens": letters_only(small), "max_new_tokens": NEW}
    alone, chat = Chat(small, noise(4)), Chat(small, noise(4))
    want = [alone.ask(q, **options) for q in QUESTIONS]
    last = small.model.model.language_model.layers[-1]
    got = []
    for question in QUESTIONS:
        with monkeypatch.context() as patch:  # broken off between two layers of the second pass
            calls = iter([last.forward, broken])
            patch.setattr(last, "forward", lambda *args, calls=calls, **kwargs: next(calls)(*args, **kwargs))
            with pytest.raises(ZeroDivisionError):
                chat.ask(question, **options)
        got.append(chat.ask(question, **options))
    assert got == want and len(chat.turns) == 6


def broken(*args, **kwargs):
    raise ZeroDivisionError


def test_options_of_generate(small):
    chat = Chat(small, noise(4))
    for wrong in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(BadOption, match="one conversation"):
            chat.ask("what?", **wrong)
    with pytest.raises(BadOption, match="max_new_tokens"):
        chat.ask("what?", max_new_tokens=0)
    for question in ("", None, "a <video>"):
        with pytest.raises(BadOption):
            chat.ask(question)
    assert chat.turns == []
    torch.manual_seed(0)
    texts = [chat.ask("what?", max_new_tokens=NEW, do_sample=True, temperature=5.0) for _ in range(2)]
    assert texts[0] != texts[1]


def test_what_has_no_chat(small):
    with pytest.raises(UnsupportedModel, match="one question"):
        Chat(shared_vlm("paligemma"), noise(4))
    from tokensieve.pipeline.vlm import VLM

    with pytest.raises(BadOption, match="processor"):
        Chat(VLM(small.model), noise(4))
    with pytest.raises(BadOption):
        Chat(small, 3)
