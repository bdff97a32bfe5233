"""Sequences say what they should, and only thoughts and behaviours carry loss."""

import numpy as np
import pytest
import torch

import tokensieve as ts
from tests.vla.fixture import LEVELS, tokenizer, with_behaviour
from tokensieve.errors import BadOption
from tokensieve.vla import Packer, SubTask, add_behaviour_tokens, collate

PICTURE = [7, 4, 4, 4, 8]  # what a processor might write: 4 is the image placeholder
DIGITS = [(4, 2, 1, 0, 4), (0, 0, 0, 0, 0), (7, 7, 7, 5, 4)]


@pytest.fixture
def packer():
    return Packer(with_behaviour()[1])


def sub_task(i=0, **parts):
    return SubTask(observation=PICTURE, digits=DIGITS[i], **{"thought": "the ball is left"} | parts)


def read(packer, ids):
    return packer.tokenizer.decode(ids).replace(packer.tokenizer.decode(PICTURE), "(picture)")


def test_the_text_is_the_papers(packer):
    tasks = [sub_task(0, inventory="a key", caption="a room"), sub_task(1, thought="now open it")]
    packed = packer.pack("go to the red ball", tasks, memory="opened the door")
    assert read(packer, packed.input_ids) == (
        "TASK: go to the red ball\nMEMORY: opened the door"
        "\nOBSERVATION: (picture)\nINVENTORY: a key\nCAPTION: a room\nTHOUGHT: the ball is left\nCONTROL:"
        "<|behaviour_0_4|><|behaviour_1_2|><|behaviour_2_1|><|behaviour_3_0|><|behaviour_4_4|>"
        "\nOBSERVATION: (picture)\nTHOUGHT: now open it\nCONTROL:"
        "<|behaviour_0_0|><|behaviour_1_0|><|behaviour_2_0|><|behaviour_3_0|><|behaviour_4_0|>"
    )


def test_empty_parts_are_left_out(packer):
    packed = packer.pack("go", [sub_task(thought="")])
    assert read(packer, packed.input_ids[:-5]) == "TASK: go\nOBSERVATION: (picture)\nCONTROL:"


@pytest.mark.parametrize("count", [1, 3])
def test_labels_are_thoughts_with_their_end_and_behaviours(packer, count):
    packed = packer.pack("go to the red ball", [sub_task(i) for i in range(count)], memory="opened the door")
    active = packed.labels != -100
    assert torch.equal(packed.labels[active], packed.input_ids[active])
    thought = [*packer.tokenizer(" the ball is left")["input_ids"], *packer.control_ids]
    ids = packer.vocabulary.digits_to_ids(torch.tensor(DIGITS[:count])).tolist()
    assert packed.labels[active].tolist() == [i for code in ids for i in [*thought, *code]]


def test_without_a_thought_there_are_five_labels_per_sub_task(packer):
    packed = packer.pack("go", [sub_task(i, thought="") for i in range(3)])
    active = packed.labels != -100
    assert packed.labels[active].tolist() == packer.vocabulary.digits_to_ids(torch.tensor(DIGITS)).flatten().tolist()


def test_pictures_are_never_labels(packer):
    packed = packer.pack("go", [sub_task(i) for i in range(3)])
    assert (packed.input_ids == 4).sum() == 9 and (
        packed.labels[torch.isin(packed.input_ids, torch.tensor(PICTURE))] == -100
    ).all()


def test_the_models_loss_is_over_the_response_alone(packer):
    model, _, _ = with_behaviour()
    batch = collate(
        [packer.pack("go", [sub_task(0)]), packer.pack("go far away", [sub_task(1), sub_task(2)])], pad_id=0
    )
    with torch.no_grad():
        out = model(**batch)
    logprobs = out.logits[:, :-1].log_softmax(-1)
    following = batch["input_ids"][:, 1:]
    nll = -logprobs.gather(-1, following[..., None])[..., 0]
    active = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(out.loss, nll[active].mean())
    with torch.no_grad():
        assert model(**batch | {"labels": batch["input_ids"]}).loss != out.loss  # the prefix would count


def test_a_vision_language_model_learns_from_it():
    """The picture's placeholders as its processor writes them: the loss is finite and reaches the new tokens."""
    vlm = ts.load("tiny")
    tok = vlm.processor.tokenizer
    vocabulary = add_behaviour_tokens(vlm.model, tok, LEVELS)
    seen = vlm.processor(text="<image>", images=np.zeros((96, 96, 3), np.uint8), return_tensors="pt")
    ids = seen.pop("input_ids")[0]
    packed = Packer(tok).pack("go to the red digit", [SubTask(observation=ids.tolist(), digits=DIGITS[0])])
    pictures = packed.input_ids == vlm.model.config.image_token_id
    assert pictures.sum() == (ids == vlm.model.config.image_token_id).sum() > 1
    assert packed.labels[pictures].eq(-100).all() and (packed.labels != -100).sum() == 5
    del seen["attention_mask"]
    vlm.model(**collate([packed], tok.pad_token_id), **seen).loss.backward()
    grad = vlm.model.get_output_embeddings().weight.grad[vocabulary.first_id :]
    assert grad.isfinite().all() and grad.abs().sum(1).gt(0).all()


@pytest.mark.parametrize("thought", [True, False])
def test_a_prompt_is_the_beginning_of_its_training_sequence(packer, thought):
    parts = {"thought": "the ball is left" if thought else "", "inventory": "a key"}
    past, done = [sub_task(0, **parts)], sub_task(1, **parts)
    now = SubTask(observation=PICTURE, inventory="a key")
    for before in ([], past):
        packed = packer.pack("go", [*before, done], memory="opened the door")
        prompt = packer.prompt("go", now, memory="opened the door", past=before, thought=thought)
        num_labels = 5 + (len(packer.tokenizer(" the ball is left")["input_ids"]) + len(packer.control_ids)) * thought
        assert packed.input_ids[: len(prompt)].tolist() == prompt and len(packed) == len(prompt) + num_labels
        assert packed.labels[len(prompt)] != -100 and packed.labels[len(prompt) - 1] == -100


def test_a_tokenizer_that_begins_sequences_with_a_token():
    from tokenizers.processors import TemplateProcessing

    _, tok, _ = with_behaviour()
    plain = Packer(tok).prompt("go", SubTask(observation=PICTURE))
    tok.bos_token = "<|user|>"
    tok._tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    assert Packer(tok).prompt("go", SubTask(observation=PICTURE)) == [2, *plain]


def test_collate_pads_on_the_right(packer):
    sequences = [packer.pack("go", [sub_task(0)]), packer.pack("go", [sub_task(0), sub_task(1)])]
    batch = collate(sequences, pad_id=3)
    length = len(sequences[0])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, len(sequences[1]))
    assert torch.equal(batch["input_ids"][0, :length], sequences[0].input_ids)
    assert batch["input_ids"][0, length:].eq(3).all() and batch["labels"][0, length:].eq(-100).all()
    assert batch["attention_mask"].sum(1).tolist() == [length, len(sequences[1])]
    with pytest.raises(BadOption):
        collate([], pad_id=0)


@pytest.mark.parametrize("hostile", ["<image>", "<|end|>", "<|behaviour_0_0|>", "go <|user|> now"])
def test_texts_with_reserved_tokens_are_refused(packer, hostile):
    for call in (
        lambda: packer.pack(hostile, [sub_task()]),
        lambda: packer.pack("go", [sub_task(thought=hostile)]),
        lambda: packer.pack("go", [sub_task(inventory=hostile)]),
        lambda: packer.prompt("go", SubTask(observation=PICTURE, caption=hostile)),
        lambda: packer.prompt("go", SubTask(observation=PICTURE), memory=hostile),
    ):
        with pytest.raises(BadOption, match="special or behaviour"):
            call()


def test_what_is_missing_is_refused(packer):
    now = SubTask(observation=PICTURE)
    for call in (
        lambda: packer.pack("go", []),
        lambda: packer.pack(" ", [sub_task()]),
        lambda: packer.pack("go", [now]),
        lambda: packer.pack("go", [SubTask(observation=PICTURE, digits=(8, 0, 0, 0, 0))]),
        lambda: packer.pack("go", [SubTask(observation=[], digits=DIGITS[0])]),
        lambda: packer.prompt("", now),
        lambda: packer.prompt("go", sub_task()),
        lambda: packer.prompt("go", sub_task(thought="")),
        lambda: packer.prompt("go", now, past=[now]),
        lambda: Packer(tokenizer()),
    ):
        with pytest.raises(BadOption):
            call()
