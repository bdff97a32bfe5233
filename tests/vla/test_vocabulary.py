"""New tokens go in, old ones keep every bit, and codes travel between digits, ids and what people read."""

import pytest
import torch

import tokensieve as ts
from tests.vla.fixture import LEVELS, language_model, tokenizer, with_behaviour
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.vla import BehaviourVocabulary, add_behaviour_tokens


def rows(model):
    return model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_grows_by_the_sum_and_old_rows_keep_every_bit(tied, dtype):
    tok = tokenizer()
    model, num_old = language_model(len(tok), tied).to(dtype), len(tok)
    with torch.no_grad():  # unlike any first weights
        model.get_output_embeddings().weight.mul_(3).add_(0.25)
    before, state = rows(model), torch.get_rng_state()
    vocabulary = add_behaviour_tokens(model, tok, LEVELS)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(tok) == num_old + 35 == model.config.vocab_size and vocabulary.first_id == num_old
    for old, new in zip(before, rows(model), strict=True):
        assert new.shape[0] == num_old + 35 and new.dtype == dtype
        assert torch.equal(new[:num_old], old) and new[num_old:].isfinite().all()
        assert len(new.unique(dim=0)) == len(new)  # no two tokens alike
        for statistic in (torch.Tensor.std, torch.Tensor.mean):
            wanted = statistic(old.float()).item()
            assert statistic(new[num_old:].float()).item() == pytest.approx(wanted, rel=0.2, abs=0.01)
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tied


def test_new_rows_follow_the_seed_and_input_and_head_differ():
    made = []
    for seed in (0, 0, 1):
        tok = tokenizer()
        model = language_model(len(tok))
        first = add_behaviour_tokens(model, tok, (5, 3), seed=seed).first_id
        made.append([x[first:] for x in rows(model)])
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])
    assert not torch.equal(made[0][0], made[2][0]) and not torch.equal(made[0][0], made[0][1])


def test_answers_to_old_tokens_are_as_before():
    tok = tokenizer()
    model = language_model(len(tok)).eval()
    ids = torch.tensor([tok("which digit is red")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        add_behaviour_tokens(model, tok, LEVELS)
        torch.testing.assert_close(model(ids).logits[..., : before.shape[-1]], before, rtol=0, atol=1e-6)


def test_spare_rows_of_the_embedding_are_used_first():
    tok = tokenizer()
    model = language_model(len(tok) + 20)
    before = rows(model)[0]
    vocabulary = add_behaviour_tokens(model, tok, LEVELS)
    after = rows(model)[0]
    assert after.shape[0] == len(tok) == vocabulary.all_ids.stop
    assert torch.equal(after[: vocabulary.first_id], before[: vocabulary.first_id])
    roomy = language_model(len(tok) + 100)
    tok = tokenizer()
    last = rows(roomy)[0][-1]
    add_behaviour_tokens(roomy, tok, LEVELS)
    assert torch.equal(rows(roomy)[0][-1], last) and len(rows(roomy)[0]) > len(tok)


def test_a_vision_language_model():
    vlm = ts.load("tiny")
    tok, before = vlm.processor.tokenizer, rows(vlm.model)
    vocabulary = add_behaviour_tokens(vlm.model, tok, LEVELS)
    for old, new in zip(before, rows(vlm.model), strict=True):
        assert torch.equal(new[: len(old)], old) and len(new) == len(old) + 35
    assert vlm.model.config.get_text_config().vocab_size == len(tok) == vocabulary.all_ids.stop
    assert vlm.model.get_input_embeddings().weight is vlm.model.get_output_embeddings().weight


def test_a_head_with_a_bias():
    from transformers import PhiConfig, PhiForCausalLM

    tok = tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=len(tok), **small, bos_token_id=None, eos_token_id=1))
    torch.nn.init.normal_(model.lm_head.bias)
    bias, num_old = model.lm_head.bias.detach().clone(), len(tok)
    add_behaviour_tokens(model, tok, LEVELS)
    assert torch.equal(model.lm_head.bias[:num_old], bias)
    assert model.lm_head.bias[num_old:].tolist() == [pytest.approx(bias.mean().item())] * 35


def test_texts_of_tokens_are_single_tokens(tmp_path):
    _, tok, vocabulary = with_behaviour()
    ids = vocabulary.digits_to_ids(vocabulary.parse("[BEHAVIOR-12372]"))
    text = f"go on{tok.decode(ids)}then"
    assert tok(text)["input_ids"][len(tok("go on")["input_ids"]) :][:5] == ids.tolist()
    tok.save_pretrained(tmp_path)
    assert BehaviourVocabulary.of(type(tok).from_pretrained(tmp_path)) == vocabulary


# --- digits, ids, display


def test_ids_and_digits_are_a_bijection():
    vocabulary = BehaviourVocabulary(LEVELS, 1000)
    blocks = [vocabulary.block(i) for i in range(5)]
    assert [len(block) for block in blocks] == list(LEVELS)
    assert [i for block in blocks for i in block] == list(vocabulary.all_ids) == list(range(1000, 1035))
    digits = torch.cartesian_prod(*(torch.arange(level) for level in LEVELS))
    ids = vocabulary.digits_to_ids(digits)
    assert torch.equal(vocabulary.ids_to_digits(ids), digits) and len(ids.unique(dim=0)) == 15360
    assert all(set(ids[:, i].tolist()) == set(block) for i, block in enumerate(blocks))


def test_the_papers_displays():
    vocabulary = BehaviourVocabulary(LEVELS, 1000)
    assert vocabulary.parse("[BEHAVIOR-12372]").tolist() == [4, 2, 1, 0, 4]
    assert vocabulary.display(torch.tensor([7, 3, 5, 2, 0])) == "[BEHAVIOR-1375]"
    assert vocabulary.digits_to_ids(torch.tensor([4, 2, 1, 0, 4])).tolist() == [1004, 1010, 1017, 1024, 1034]


@pytest.mark.parametrize(
    "text", ["[BEHAVIOR-15360]", "[BEHAVIOR-01]", "[BEHAVIOR-]", "BEHAVIOR-1", "[BEHAVIOR--1]", ""]
)
def test_displays_that_are_none(text):
    with pytest.raises(BadOption):
        BehaviourVocabulary(LEVELS, 1000).parse(text)


@pytest.mark.parametrize(
    "ids", [[1008, 1008, 1016, 1024, 1030], [999, 1008, 1016, 1024, 1030], [1000, 1008, 1016, 1024]]
)
def test_ids_that_are_no_code(ids):
    with pytest.raises(BadOption):
        BehaviourVocabulary(LEVELS, 1000).ids_to_digits(torch.tensor(ids))


def test_digits_that_are_no_code():
    vocabulary = BehaviourVocabulary(LEVELS, 1000)
    for digits in ([8, 0, 0, 0, 0], [0, 0, 0, 0, -1], [0, 0, 0, 0]):
        with pytest.raises(BadOption):
            vocabulary.digits_to_ids(torch.tensor(digits))
    with pytest.raises(BadOption):
        vocabulary.block(5)


# --- refusals


@pytest.mark.parametrize("levels", [LEVELS, (5, 3)])
def test_adding_twice_is_refused(levels):
    tok = tokenizer()
    model = language_model(len(tok))
    add_behaviour_tokens(model, tok, LEVELS)
    before, num_tokens = rows(model)[0], len(tok)
    with pytest.raises(BadOption, match="already"):
        add_behaviour_tokens(model, tok, levels)
    assert len(tok) == num_tokens and torch.equal(rows(model)[0], before)


def test_a_name_that_clashes_is_refused():
    tok = tokenizer()
    tok.add_tokens(["<|behaviour_1_2|>"])
    with pytest.raises(BadOption, match="already"):
        add_behaviour_tokens(language_model(len(tok)), tok, LEVELS)
    with pytest.raises(BadOption, match="missing"):
        BehaviourVocabulary.of(tok)
    with pytest.raises(BadOption, match="no behaviour tokens"):
        BehaviourVocabulary.of(tokenizer())


def test_ids_that_are_not_in_a_row_are_refused():
    tok = tokenizer()
    tok.add_tokens(["<|behaviour_0_0|>", "something", "<|behaviour_0_1|>"])
    with pytest.raises(BadOption, match="in a row"):
        BehaviourVocabulary.of(tok)


def test_models_that_are_refused_stay_as_they_are():
    tok, num_old = tokenizer(), len(tokenizer())
    small = language_model(num_old - 1)
    headless = language_model(num_old).model
    taken = language_model(num_old + 100)
    taken.config.image_token_id = num_old + 34
    for model in (small, headless, taken):
        with pytest.raises(UnsupportedModel):
            add_behaviour_tokens(model, tok, LEVELS)
    assert len(tok) == num_old
    taken.config.image_token_id = num_old + 35
    add_behaviour_tokens(taken, tok, LEVELS)


def test_a_first_id_that_is_none():
    with pytest.raises(BadOption):
        BehaviourVocabulary(LEVELS, -1)
