"""Byte-level probabilities against brute force over all token sequences of tiny vocabularies, and what they are for."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import pytest
import torch

from tests.decoding.toy_tokenizers import ASCII, byte_fallback, byte_level, toy_model
from tokensieve.decoding.byte_sampling import average_law, middle_prompt, sample_bytes
from tokensieve.decoding.byte_session import END, ByteSession
from tokensieve.decoding.byte_vocabulary import ByteVocabulary
from tokensieve.decoding.session import DecodeSession
from tokensieve.errors import BadOption, UnsupportedModel

BEGIN = torch.tensor([[0]])
# A space first: there the dummy space of the SentencePiece kind is what the text starts with.
FALLBACK = (["\u2581", "a", "b"], [("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581", "\u2581"), ("b", "b")])


@lru_cache
def toy(kind: str):
    """Tokenizer, model, fixed ids."""
    tokenizer = byte_level(*ASCII) if kind == "byte-level" else byte_fallback(*FALLBACK)
    return tokenizer, toy_model(tokenizer), torch.tensor([[tokenizer.bos_token_id]])


class Brute:
    """The definition: sum over all token sequences, by the tokenizer's own encoding and one forward for each prefix."""

    def __init__(self, tokenizer, model, encode=None):
        self.tokenizer, self.model = tokenizer, model
        self.bytes = ByteVocabulary(tokenizer).token_bytes
        self.encode = encode or (lambda data: tokenizer.encode(data.decode(), add_special_tokens=False))
        self.cache: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def after(self, tokens: tuple) -> torch.Tensor:
        if tokens not in self.cache:
            ids = torch.tensor([[self.tokenizer.bos_token_id, *tokens]])
            self.cache[tokens] = self.model(ids).logits[0, -1].double().softmax(-1)
        return self.cache[tokens]

    def covers(self, data: bytes, tokens: tuple = (), p: float = 1.0, read: bytes = b""):
        """All sequences whose bytes start with `data` and would not without the last token."""
        if len(read) >= len(data):
            if self.encode(read) == list(tokens):
                yield tokens, p
            return
        law = self.after(tokens)
        for token, spelled in enumerate(self.bytes):
            if spelled and (read + spelled).startswith(data[: len(read + spelled)]):
                yield from self.covers(data, (*tokens, token), p * float(law[token]), read + spelled)

    def prob(self, data: bytes) -> float:
        return sum(p for _, p in self.covers(data))

    def law(self, data: bytes, alphabet: bytes) -> torch.Tensor:
        joint = torch.zeros(END + 1, dtype=torch.float64)
        for byte in alphabet:
            joint[byte] = self.prob(data + bytes([byte]))
        whole = tuple(self.encode(data))
        p = 1.0
        for i, token in enumerate(whole):
            p *= float(self.after(whole[:i])[token])
        joint[END] = p * float(self.after(whole)[self.tokenizer.eos_token_id])
        return joint / joint.sum()


def encode_behind_space(tokenizer):
    def encode(data: bytes):
        assert data.startswith(b" ")
        return tokenizer.encode(data[1:].decode(), add_special_tokens=False)

    return encode


@pytest.mark.parametrize("text", ["", "a", "ab", " ab", "abab", "a  b", "a  ", "a'sb", "11 1", " abb a"])
def test_equals_enumeration(text):
    tokenizer, model, begin = toy("byte-level")
    brute = Brute(tokenizer, model)
    session = ByteSession(model, ByteVocabulary(tokenizer), begin, text=text)
    data = text.encode()
    assert session.log_prob == pytest.approx(math.log(brute.prob(data)) if data else 0.0, abs=1e-6)
    torch.testing.assert_close(session.law(), brute.law(data, b"ab1 's"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", [" b", " a", " ab", " aba", "  ab"])
def test_equals_enumeration_with_fallback_bytes(text):
    tokenizer, model, begin = toy("fallback")
    brute = Brute(tokenizer, model, encode_behind_space(tokenizer))
    session = ByteSession(model, ByteVocabulary(tokenizer), begin, text=text)
    assert session.log_prob == pytest.approx(math.log(brute.prob(text.encode())), abs=1e-6)
    got, want = session.law(), brute.law(text.encode(), b"ab 1\n")
    seen = [*b"ab 1\n", END]
    torch.testing.assert_close(got[seen] / got[seen].sum(), want[seen], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["byte-level", "fallback"])
def test_byte_by_byte_equals_at_once(kind):
    tokenizer, model, begin = toy(kind)
    vocabulary, text = ByteVocabulary(tokenizer), b" abab  b abb" if kind == "fallback" else b"a'sb 11 1abab  ab"
    session = ByteSession(model, vocabulary, begin)
    total = 0.0
    for i, byte in enumerate(text):
        before, law = session.log_prob, session.law()
        session.extend(byte)
        # Unscaled, the chain rule holds exactly: P(x b) = P(x) P(b | x)
        total += session.log_prob - before
        fresh = ByteSession(model, vocabulary, begin, text=text[: i + 1])
        assert session.log_prob == pytest.approx(fresh.log_prob, abs=1e-6)
        torch.testing.assert_close(session.law(), fresh.law(), atol=1e-6, rtol=0)
        assert law.sum() == pytest.approx(1) and law[byte] >= math.exp(session.log_prob - before) - 1e-9
    assert total == pytest.approx(session.log_prob)
    at_once = ByteSession(model, vocabulary, begin, text=text[:2])
    at_once.extend(text[2:])
    assert at_once.log_prob == pytest.approx(session.log_prob, abs=1e-6) and at_once.data == text


def test_characters_of_several_bytes():
    """A whole character by the chain rule; within one, covers may end anywhere."""
    merges = [("Ã", "©"), ("a", "Ã©"), ("Ã", "Ĺ")]
    tokenizer = byte_level("aé×", merges)
    assert tokenizer.encode("é×", add_special_tokens=False) == [
        tokenizer.convert_tokens_to_ids("Ã©"),
        tokenizer.convert_tokens_to_ids("ÃĹ"),
    ]
    model, vocabulary = toy_model(tokenizer), ByteVocabulary(tokenizer)
    brute = Brute(tokenizer, model)
    for text in ("é", "aé", "é×a", "×é"):
        session = ByteSession(model, vocabulary, BEGIN)
        for byte in text.encode():
            session.extend(byte)
        assert session.log_prob == pytest.approx(math.log(brute.prob(text.encode())), abs=1e-6)
        with pytest.raises(BadOption, match="cannot follow"):
            session.extend(0xA9)  # no character starts like this
        assert session.data == text.encode()
        assert session.law()[ord("a")] > 0
    within = ByteSession(model, vocabulary, BEGIN, text="aé".encode()[:2])
    law = within.law()
    assert set(law.nonzero()[:, 0].tolist()) == {0xA9, 0x97}


def test_no_text_is_one_cover():
    """At a token boundary the law is that of the first bytes of the next token."""
    tokenizer, model, begin = toy("byte-level")
    session = ByteSession(model, ByteVocabulary(tokenizer), begin)
    with torch.no_grad():
        law = model(begin).logits[0, -1].double().softmax(-1)
    want = torch.zeros(END + 1, dtype=torch.float64)
    for token, data in enumerate(ByteVocabulary(tokenizer).token_bytes):
        if data and tokenizer.encode(data.decode(), add_special_tokens=False) == [token]:
            want[data[0]] += law[token]
    want[END] = law[tokenizer.eos_token_id]
    torch.testing.assert_close(session.law(), want / want.sum(), atol=1e-9, rtol=0)


def markov_model(p_same: float):
    """A model of the tokens A, B and AA that follows exactly from bytes which repeat with `p_same`.

    The encoding of a run of A is AA as long as two are left, so a single A is always followed by B.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level("AB", [("A", "A")])
    a, b, aa = tokenizer.convert_tokens_to_ids(["A", "B", "AA"])
    law = torch.full((len(tokenizer), len(tokenizer)), 1e-30)
    for last, p_a in ((tokenizer.bos_token_id, 0.5), (b, 1 - p_same), (aa, p_same)):
        law[last, aa], law[last, a], law[last, b] = p_a * p_same, p_a * (1 - p_same), 1 - p_a
    law[a, b] = 1
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        rms_norm_eps=0.0,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.model.layers.parameters():
        parameter.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(len(tokenizer), 8)
    model.lm_head.weight.data = torch.nn.functional.pad(law.log().T / math.sqrt(8), (0, 8 - len(tokenizer)))
    return tokenizer, model


@pytest.fixture
def _no_capability_test(monkeypatch):
    """A model that ignores all tokens but the last cannot show that its cache was cropped."""
    monkeypatch.setattr(DecodeSession, "require", lambda self, *needs: None)


@pytest.mark.usefixtures("_no_capability_test")
def test_a_markov_chain_is_recovered_and_naive_conditioning_is_not():
    tokenizer, model = markov_model(0.7)
    session = ByteSession(model, ByteVocabulary(tokenizer), BEGIN)
    last = None
    for byte in b"ABAAABBABAAAA":
        law = session.law()
        p_a = 0.5 if last is None else 0.7 if last == ord("A") else 0.3
        assert law[ord("A")] == pytest.approx(p_a, abs=1e-6) and law[ord("B")] == pytest.approx(1 - p_a, abs=1e-6)
        session.extend(byte)
        last = byte
    ids = torch.tensor([[0, *tokenizer.encode("BA", add_special_tokens=False)]])
    with torch.no_grad():
        naive = model(ids).logits[0, -1].softmax(-1)
    assert naive[tokenizer.convert_tokens_to_ids("B")] > 0.99  # though B follows A with 0.3


def test_ignored_tokens_change_little():
    tokenizer, model, begin = toy("byte-level")
    exact = ByteSession(model, ByteVocabulary(tokenizer), begin, text="ab", ignore=0).law()
    close = ByteSession(model, ByteVocabulary(tokenizer), begin, text="ab", ignore=0.2).law()
    assert 0 < (exact - close).abs().max() < 0.2


def test_passes_and_cache():
    """One forward pass a byte where the tokens go on, and the fixed part is run once."""
    tokenizer, model, begin = toy("byte-level")
    session = ByteSession(model, ByteVocabulary(tokenizer), begin)
    before = session.ledger.forward_passes
    for byte in b"ab ab":
        session.extend(byte)
    assert session.ledger.forward_passes - before == 5
    assert session._session.length == 1 + len(tokenizer.encode("ab ab"))


def test_ensembles():
    tokenizer, model, begin = toy("byte-level")
    other_tokenizer = byte_level("ab1 's", [("b", "a"), ("1", "'"), ("a", "a")])
    other_model = toy_model(other_tokenizer, seed=5)

    def members():
        return [
            ByteSession(model, ByteVocabulary(tokenizer), begin, text="ab"),
            ByteSession(other_model, ByteVocabulary(other_tokenizer), BEGIN, text="ab"),
        ]

    one, two = (m.law() for m in members())
    torch.testing.assert_close(average_law([one, one]), one)
    torch.testing.assert_close(average_law([one, two]), (one + two) / 2)
    torch.testing.assert_close(average_law([one, two], [3, 1]), (3 * one + two) / 4)
    without = torch.zeros_like(one)
    without[ord("1")] = 1
    assert average_law([one, without])[ord("1")] == 1
    with pytest.raises(BadOption, match="in common"):
        average_law([one * (torch.arange(257) != ord("1")), without])
    same = [members()[0], members()[0]]
    single = sample_bytes(members()[0], 12, temperature=1.0, seed=3)
    assert sample_bytes(same, 12, temperature=1.0, seed=3) == single
    pair = members()
    out = sample_bytes(pair, 12, seed=1)
    length = len(out.data) - (not out.ended)
    assert [m.data for m in pair] == [b"ab" + out.data[:length]] * 2


def test_sampling_follows_the_law():
    tokenizer, model, begin = toy("byte-level")
    law = ByteSession(model, ByteVocabulary(tokenizer), begin, text="a").law()
    session = ByteSession(model, ByteVocabulary(tokenizer), begin, text="a")

    def counts(**options) -> torch.Tensor:
        drawn = [sample_bytes(session, 1, seed=s, **options) for s in range(600)]  # a limit of 1 leaves the session
        assert session.data == b"a"
        outcomes = [END if out.ended else out.data[0] for out in drawn]
        return torch.bincount(torch.tensor(outcomes), minlength=END + 1) / len(drawn)

    assert (counts(temperature=1.0) - law).abs().max() < 0.08
    sharper = (law**2) / (law**2).sum()
    assert (counts(temperature=0.5) - sharper).abs().max() < 0.08
    ranked = law.sort(descending=True)
    few = counts(temperature=1.0, top_p=float(ranked.values[:2].sum()) - 1e-6)
    assert set(few.nonzero()[:, 0].tolist()) == set(ranked.indices[:2].tolist())
    greedy = sample_bytes(session, 1, temperature=0)
    assert (END if greedy.ended else greedy.data[0]) == int(law.argmax())


@pytest.mark.usefixtures("_no_capability_test")
def test_stop_texts_and_whole_characters():
    tokenizer, model = markov_model(0.7)
    out = sample_bytes(ByteSession(model, ByteVocabulary(tokenizer), BEGIN), 50, temperature=1.0, stop=["AB"])
    assert out.ended and out.data.endswith(b"AB") and out.data.count(b"AB") == 1 and out.text == out.data.decode()
    tokenizer = byte_level("é", [])
    out = sample_bytes(ByteSession(toy_model(tokenizer), ByteVocabulary(tokenizer), BEGIN, end_ids=[]), 5)
    assert out.data == "ééé".encode()[:5] and out.text == "éé" and not out.ended


def test_filling_a_gap_within_a_token():
    tokens = ("<s>", "</s>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    tokenizer = byte_level(*ASCII, specials=tokens)
    model, vocabulary = toy_model(tokenizer), ByteVocabulary(tokenizer)
    prompt = middle_prompt(tokenizer, "b a", " 11")
    before, after, middle = tokenizer.convert_tokens_to_ids(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    suffix = tokenizer.encode(" 11", add_special_tokens=False)
    assert prompt["input_ids"].tolist() == [[before, after, *suffix, middle]] and prompt["text"] == "b a"
    session = ByteSession(model, vocabulary, **prompt)
    ab = tokenizer.convert_tokens_to_ids("Ġab")
    assert any(ab in covers.last_M for covers in session._covers)  # " a" may be the beginning of " ab"
    assert sample_bytes(session, 8).data
    with pytest.raises(BadOption, match="no token '<PRE>'"):
        middle_prompt(tokenizer, "", "", ("<PRE>", "<SUF>", "<MID>"))


@pytest.mark.parametrize(("name", "keep"), [("llava", None), ("qwen2_5_vl", None), ("llava", 0.4)])
def test_behind_pictures(name, keep):
    """With a vocabulary of single bytes the law is the model's own, and the picture is run once."""
    from tests.decoding.models import prompts
    from tests.pipeline.tiny_processors import shared_vlm

    vlm = shared_vlm(name)
    inputs = prompts(name, keep, 1, model=vlm.model)
    vocabulary = ByteVocabulary(vlm.processor)
    session = ByteSession(vlm.model, vocabulary, **inputs)
    ids = vlm.processor.tokenizer.encode("red", add_special_tokens=False)
    options = dict(max_new_tokens=4, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    again = prompts(name, keep, 1, model=vlm.model)
    forced = vlm.model.generate(
        **again,
        prefix_allowed_tokens_fn=lambda _, row: [(ids + [0])[len(row) - again["input_ids"].shape[1]]],
        **options,
    )
    for byte, logits in zip(b"red\0", forced.logits, strict=True):
        law = logits[0].double().softmax(-1)
        want = torch.zeros(END + 1, dtype=torch.float64)
        for token, data in enumerate(vocabulary.token_bytes):
            if data and (data[0] < 0x80 or 0xC2 <= data[0] <= 0xF4):  # others start no character
                want[data[0]] = law[token]
        want[END] = law[vlm.model.generation_config.eos_token_id]
        torch.testing.assert_close(session.law(), want / want.sum(), atol=1e-6, rtol=0)
        session.extend(byte)
    assert session.data == b"red\0"


def test_the_shipped_model_scores_a_word():
    import tokensieve as ts

    tiny = ts.load("tiny")
    tokenizer = tiny.processor.tokenizer
    vocabulary = ByteVocabulary(tiny.processor)
    begin = torch.tensor([tokenizer.encode("<|user|>Which digit is red?<|assistant|>")])
    whole = ByteSession(tiny.model, vocabulary, begin, text="the")
    healed = ByteSession(tiny.model, vocabulary, begin, text="th")
    p = math.exp(healed.log_prob) * float(healed.law()[ord("e")])
    assert p == pytest.approx(math.exp(whole.log_prob), rel=0.05)  # but for what is not valid
    for text in ("Which digit is red?", "it's  12345\n\n  naïve 漢字 🙂 x"):
        assert vocabulary.encode(text.encode()) == tokenizer.encode(text, add_special_tokens=False)


def test_vocabularies():
    tokenizer, _, _ = toy("byte-level")
    vocabulary = ByteVocabulary(tokenizer)
    assert len(vocabulary) == len(tokenizer) and vocabulary.longest == 3
    assert vocabulary.token_bytes[:2] == [None, None]
    names = {tokenizer.convert_ids_to_tokens(i) for i in vocabulary.starting_with(b"ab")}
    assert names == {"ab", "aba"}
    assert vocabulary.encode(b"\xff") is None and vocabulary.encode(b"z") is None and vocabulary.encode(b"") == []
    assert vocabulary.decode([0]) is None and vocabulary.decode([10_000]) is None
    a, b, ab, gap, gaps = tokenizer.convert_tokens_to_ids(["a", "b", "ab", "Ġ", "ĠĠ"])
    assert not vocabulary.may_follow(vocabulary.tail(b"a", [a]), b)
    assert vocabulary.may_follow(vocabulary.tail(b"ab", [ab]), b)
    assert vocabulary.stems(b"ab") == [[ab]] and vocabulary.stems(b"\xff") == []
    assert vocabulary.stems(b"a  ") == [[a, gaps], [a, gap, gap]]  # at the end, and before a word
    fallback = ByteVocabulary(toy("fallback")[0])
    assert fallback.decode(fallback.encode(" aé".encode())) == " aé".encode()
    assert fallback.encode(" aé".encode()[:3]) == fallback.encode(" aé".encode())[:-1]


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("words", ["gpt2", "qwen", "llama3", "shipped"])
def test_all_beginnings_of_encodings_are_stems(words):
    """Whatever the pre-tokenizer looks at: every prefix of an encoding is found from its bytes alone."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    generator = random.Random(0)
    letters = "aaab  \n\n1122''sltre!(é×漢 "
    texts = ["".join(generator.choices(letters, k=12)) for _ in range(400)]
    if words == "shipped":
        import tokensieve as ts

        tokenizer = ts.load("tiny").processor.tokenizer
    else:
        backend = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words == "gpt2")
        pattern = QWEN if words == "qwen" else QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = level if words == "gpt2" else pre_tokenizers.Sequence([split, level])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    vocabulary = ByteVocabulary(tokenizer)
    for text in texts[:60]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert vocabulary.encode(text.encode()) == ids
        for end in range(len(ids)):
            data = vocabulary.decode(ids[:end])
            assert ids[:end] in vocabulary.stems(data), (text, end)
            may = vocabulary.may_follow(vocabulary.tail(data, ids[:end]), ids[end])
            assert may == _whole(vocabulary, ids[: end + 1])


def test_words_that_a_later_byte_joins():
    """`'r` is two words, `'re` is one, and then one token."""
    tokenizer = byte_level("a're", [("'", "r"), ("'r", "e")])
    vocabulary = ByteVocabulary(tokenizer)
    a, mark, r, e = tokenizer.convert_tokens_to_ids(["a", "'", "r", "e"])
    assert vocabulary.encode(b"a'r") == [a, mark, r]
    assert not vocabulary.may_follow(vocabulary.tail(b"a'r", [a, mark, r]), e)
    assert vocabulary.may_follow(vocabulary.tail(b"a'r", [a, mark, r]), a)


def _whole(vocabulary, ids) -> bool:
    """Whether tokens are the encoding of their own bytes, and not only the beginning of a longer one."""
    return vocabulary.encode(vocabulary.decode(ids)) == ids


def test_refusals():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer, model, begin = toy("byte-level")
    vocabulary = ByteVocabulary(tokenizer)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UnsupportedModel, match="another kind"):
        ByteVocabulary(words)
    spaces = byte_level(*ASCII)
    spaces.add_tokens(["  "])
    with pytest.raises(UnsupportedModel, match="added tokens for spaces"):
        ByteVocabulary(spaces)
    whole_words = byte_level(*ASCII)
    whole_words.add_tokens(["it"])
    with pytest.raises(UnsupportedModel, match="changes texts"):
        ByteVocabulary(whole_words)
    prefixed = byte_level(*ASCII)
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UnsupportedModel, match="another kind"):
        ByteVocabulary(prefixed)
    for ids in (None, torch.zeros(1, 0, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(BadOption, match="one prompt with at least one fixed token"):
            ByteSession(model, vocabulary, ids)
    with pytest.raises(BadOption, match="ignore must be"):
        ByteSession(model, vocabulary, begin, ignore=1)
    with pytest.raises(BadOption, match="cannot follow"):
        ByteSession(model, vocabulary, begin, text="xyz")
    session = ByteSession(model, vocabulary, begin)
    for options in (dict(max_bytes=0), dict(temperature=-1), dict(top_p=0), dict(weights=[1, 2]), dict(weights=[0])):
        with pytest.raises(BadOption):
            sample_bytes(session, **options)
    with pytest.raises(BadOption, match="needs a session"):
        sample_bytes([])
