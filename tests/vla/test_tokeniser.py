"""The encoder sees everything, the decoder never ahead, and padding counts for nothing."""

import json
from dataclasses import replace

import pytest
import torch

from tests.vla.fixture import config, episode, trunks
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.policies import load_policy
from tokensieve.vla import (
    FSQ,
    BehaviourTokeniser,
    PolicyDecoder,
    action_accuracy,
    cloning_loss,
    cut_trunks,
)

KINDS = {
    "plain": {},
    "queries": {"summary": "queries"},
    "actions": {"encoder_sees_actions": True, "decoder_sees_previous_action": True},
    "vpt": {"num_actions": (8641, 121), "decoder_sees_previous_action": True, "fsq_variant": "pypi"},
}


def tokeniser(seed=0, **options):
    made = BehaviourTokeniser(config(**options), seed=seed).eval()
    with torch.no_grad():  # as training would: a bias that is zero everywhere hides mistakes
        made.decoder.distance.normal_(generator=torch.Generator().manual_seed(9))
    return made


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def of_kind(kind, num_steps=10, seed=0):
    return trunks(num_steps, num_actions=kind.get("num_actions", (7,)), seed=seed)


def changed(batch, **parts):
    return replace(batch, **parts)


def with_frame(batch, step, value=200):
    """The same with other pixels at one step of the first trunk."""
    frames = batch.frames.clone()
    frames[0, step] = value
    return changed(batch, frames=frames)


# --- shapes and codes


def test_shapes(kind):
    made, batch = tokeniser(**kind), of_kind(kind)
    logits, codes = made(batch)
    assert [list(part.shape) for part in logits] == [[3, 4, n] for n in made.config.num_actions]
    digits = made.digits(batch)
    assert codes.shape == (3, 2) and torch.equal(made.config.fsq.digits_to_codes(digits), codes)
    assert torch.equal(made.encode(batch), codes) and digits.dtype == torch.int64


def test_a_batch_is_its_trunks_one_by_one(kind):
    made, batch = tokeniser(**kind), of_kind(kind)
    logits, codes = made(batch)
    for i in range(3):
        own_logits, own_code = made(batch[i : i + 1])
        torch.testing.assert_close(own_code, codes[i : i + 1])
        for own, part in zip(own_logits, logits, strict=True):
            torch.testing.assert_close(own, part[i : i + 1], rtol=1e-4, atol=1e-5)


def test_first_weights_follow_the_seed_alone():
    state = torch.get_rng_state()
    first, same, other = (BehaviourTokeniser(config(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["encoder.out.weight"], other["encoder.out.weight"])


# --- who sees what


def test_the_encoder_is_not_causal(kind):
    made, batch = tokeniser(**kind), of_kind(kind)
    before = made.encoder(batch)[0]
    for step in range(4):
        assert not torch.allclose(made.encoder(with_frame(batch, step))[0], before)


def test_order_counts_for_the_encoder():
    made, batch = tokeniser(), trunks()
    flipped = changed(batch, frames=batch.frames.flip(1))
    assert not torch.allclose(made.encoder(flipped)[0], made.encoder(batch)[0])


def test_the_last_frame_can_change_the_code():
    made, batch = tokeniser(), trunks()
    out = made.encoder.out
    with torch.no_grad():  # a random network says nearly the same of all frames: look closely around this trunk
        out.weight *= 100
        out.bias -= made.encoder(batch)[0]
    digits = [made.digits(with_frame(batch, 3, value))[0].tolist() for value in (0, 80, 160, 240)]
    assert made.digits(batch)[0].tolist() == [2, 1] and len(set(map(tuple, digits))) > 1


def test_the_decoder_is_causal(kind):
    made, batch = tokeniser(**kind), of_kind(kind)
    codes = made.encode(batch)
    before = made.decode(batch, codes)
    for step in range(4):
        for part, old in zip(made.decode(with_frame(batch, step), codes), before, strict=True):
            torch.testing.assert_close(part[0, :step], old[0, :step])
            differs = (part[0, step:] - old[0, step:]).abs().amax(-1)
            assert differs.gt(0).all()  # and it does see the present and the past


def test_the_code_reaches_every_step(kind):
    made, batch = tokeniser(**kind), of_kind(kind)
    low, high = -torch.ones(3, 2), made.config.fsq.digits_to_codes(torch.tensor([[4, 2]] * 3))
    for one, other in zip(made.decode(batch, low), made.decode(batch, high), strict=True):
        assert (one - other).abs().amax(-1)[batch.mask].gt(1e-5).all()


def test_the_code_is_added_beside_the_scaling_of_channels():
    made, batch = tokeniser(), trunks()
    with torch.no_grad():
        made.decoder.film.weight.zero_(), made.decoder.film.bias.zero_()
    low, high = (made.decode(batch, torch.full((3, 2), value))[0] for value in (-1.0, 1.0))
    assert (low - high).abs().amax(-1)[batch.mask].gt(1e-5).all()


@pytest.mark.parametrize("sees", [False, True])
def test_actions_are_seen_only_where_asked_for(sees):
    made, batch = tokeniser(encoder_sees_actions=sees, decoder_sees_previous_action=sees), trunks()
    other = changed(batch, actions=(batch.actions + 1) % 7)
    assert torch.equal(made.encoder(other), made.encoder(batch)) != sees
    later = batch.previous.clone()
    later[0, 2] = (later[0, 2] + 1) % 7
    codes = made.encode(batch)
    before, after = (made.decode(x, codes)[0][0] for x in (batch, changed(batch, previous=later)))
    assert torch.equal(before[:2], after[:2]) and torch.equal(before[2:], after[2:]) != sees


# --- padding


def test_padding_counts_for_nothing(kind):
    made, batch = tokeniser(**kind), of_kind(kind)
    padding = ~batch.mask
    other = changed(
        batch,
        frames=batch.frames.masked_fill(padding[..., None, None, None], 77),
        actions=batch.actions.masked_fill(padding[..., None], 3),
    )
    results = []
    for x in (batch, other):
        made.zero_grad()
        logits, codes = made(x)
        loss = cloning_loss(logits, x.actions, x.mask)
        loss.backward()
        results.append((codes.detach(), loss.detach(), made.encoder.frame.patch.weight.grad.clone()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_short_trunk_is_a_padded_one(kind):
    made = tokeniser(**kind)
    frames, actions = episode(2, num_actions=made.config.num_actions)
    short, padded = cut_trunks(frames, actions, 2), cut_trunks(frames, actions, 4)
    torch.testing.assert_close(made.encoder(short), made.encoder(padded), rtol=1e-4, atol=1e-5)
    codes = made.encode(short)
    for one, two in zip(made.decode(short, codes), made.decode(padded, codes), strict=True):
        torch.testing.assert_close(one, two[:, :2], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_valid_steps_of_minus_log_pi():
    logits = [torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 2)]
    actions = torch.stack([torch.randint(4, (2, 3)), torch.randint(2, (2, 3))], -1)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = cloning_loss(logits, actions, mask)
    expected = 0.0
    for r, t in mask.nonzero().tolist():
        expected -= sum(part[r, t].log_softmax(0)[actions[r, t, i]] for i, part in enumerate(logits)) / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits[0].grad[~mask].eq(0).all() and logits[0].grad[mask].ne(0).any(-1).all()
    assert cloning_loss(logits, actions, torch.zeros_like(mask)) == 0


def test_accuracy_counts_whole_actions_at_valid_steps():
    logits = [torch.eye(3)[None], torch.eye(2)[[0, 0, 1]][None]]  # choose (0, 0), (1, 0), (2, 1)
    actions = torch.tensor([[[0, 0], [1, 1], [2, 1]]])
    assert action_accuracy(logits, actions, torch.tensor([[True, True, True]])) == pytest.approx(2 / 3)
    assert action_accuracy(logits, actions, torch.tensor([[True, True, False]])) == 0.5


# --- gradients


def grad_of_encoder(made, loss):
    made.zero_grad()
    loss.backward()
    grads = [p.grad for p in made.encoder.parameters()]
    return sum(0.0 if grad is None else grad.abs().sum().item() for grad in grads)


def test_the_encoder_learns_through_the_code_alone(kind, monkeypatch):
    made, batch = tokeniser(**kind), of_kind(kind)

    def loss(codes):
        return cloning_loss(made.decode(batch, codes), batch.actions, batch.mask)

    assert grad_of_encoder(made, loss(made.encode(batch))) > 0
    assert grad_of_encoder(made, loss(made.encode(batch).detach())) == 0
    monkeypatch.setattr(FSQ, "quantise", lambda self, z: z)
    assert grad_of_encoder(made, loss(made.encode(batch))) > 0


def test_every_weight_has_a_gradient(kind):
    made, batch = tokeniser(**kind), of_kind(kind, 40)
    cloning_loss(made(batch)[0], batch.actions, batch.mask).backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_bfloat16_autocast_is_finite(kind):
    made, batch = tokeniser(**kind), of_kind(kind)
    with torch.autocast("cpu", torch.bfloat16):
        logits, codes = made(batch)
        loss = cloning_loss(logits, batch.actions, batch.mask)
    loss.backward()
    assert codes.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in made.parameters())


# --- step by step


def test_step_by_step_is_the_whole_trunk(kind):
    """Over more steps than the decoder looks back."""
    made = tokeniser(**kind)
    frames, actions = episode(11, num_actions=made.config.num_actions)
    codes = torch.tensor([[0.5, -1.0]])
    previous = torch.cat([torch.full_like(actions[:1], -1), actions[:-1]])[None]
    whole, _ = made.decoder(frames[None], codes, previous=previous)
    history, parts = None, []
    for t in range(11):
        step = slice(t, t + 1)
        logits, history = made.decoder(frames[None, step], codes, previous=previous[:, step], history=history)
        parts.append(logits)
        assert history.mask.shape[1] == min(t + 1, 3)
    for i, part in enumerate(whole):
        torch.testing.assert_close(torch.cat([step[i] for step in parts], 1), part, rtol=1e-4, atol=1e-5)


def test_the_look_back_is_bounded():
    """Two layers of four steps each reach seven steps together."""
    made = tokeniser()
    frames, _ = episode(12)
    other = frames.clone()
    other[0] = 200
    one, two = (made.decoder(x[None], torch.zeros(1, 2))[0][0][0] for x in (frames, other))
    assert (one - two).abs().amax(-1).gt(0).tolist() == [True] * 7 + [False] * 5


def test_rows_that_forget_start_afresh():
    made = tokeniser()
    frames = torch.stack([episode(4, seed=seed)[0] for seed in (0, 1)])
    codes = torch.tensor([[0.5, -1.0], [0.0, 1.0]])
    _, history = made.decoder(frames[:, :3], codes)
    forgot, _ = made.decoder(frames[:, 3:], codes, history=history.forget(torch.tensor([True, False])))
    remembers, _ = made.decoder(frames[:, 3:], codes, history=history)
    afresh, _ = made.decoder(frames[:, 3:], codes)
    torch.testing.assert_close(forgot[0][0], afresh[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forgot[0][1], remembers[0][1])
    assert not torch.allclose(forgot[0][0], remembers[0][0]) and not torch.allclose(forgot[0][1], afresh[0][1])


def test_acting(kind):
    made, batch = tokeniser(**kind), of_kind(kind)
    codes = made.encode(batch)
    likeliest = torch.stack([part.argmax(-1) for part in made.decode(batch, codes)], -1)
    history = None
    for t in range(2):
        actions, history = made.act(batch.frames[:, t], codes, previous=batch.previous[:, t], history=history)
        assert torch.equal(actions, likeliest[:, t])
    draws = [
        made.act(batch.frames[:, 0], codes, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(draws[0], draws[1]) and len({str(draw.tolist()) for draw in draws}) > 1


def test_draws_follow_the_policy():
    made, (frames, _) = tokeniser(), episode(1)
    many = frames.expand(4000, -1, -1, -1)
    codes = torch.zeros(4000, 2)
    actions, _ = made.act(many, codes, generator=torch.Generator().manual_seed(0))
    expected = made.decoder(frames[None], codes[:1])[0][0][0, 0].softmax(-1)
    torch.testing.assert_close(actions[:, 0].bincount(minlength=7) / 4000, expected, rtol=0, atol=0.03)


# --- on disk


def test_saved_and_read(kind, tmp_path):
    made, batch = tokeniser(**kind), of_kind(kind)
    made.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for read in (BehaviourTokeniser.from_pretrained(tmp_path), load_policy(tmp_path)):
        assert read.config == made.config and not read.training
        (logits, codes), (old_logits, old_codes) = read(batch), made(batch)
        assert torch.equal(codes, old_codes)
        assert all(torch.equal(one, two) for one, two in zip(logits, old_logits, strict=True))


@pytest.mark.parametrize(
    "change",
    [{"levels": [5, 4]}, {"levels": "53"}, {"width": 10**9}, {"summary": "x"}, {"unknown": 1}, {"levels": None}],
)
def test_a_config_that_lies_is_refused(tmp_path, change):
    tokeniser().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    options = json.loads(path.read_text())
    options["config"] |= change
    path.write_text(json.dumps(options))
    if change == {"levels": [5, 4]}:  # fits the weights: other levels are another meaning, not another shape
        assert BehaviourTokeniser.from_pretrained(tmp_path).config.levels == (5, 4)
        return
    with pytest.raises(UnsupportedModel):
        BehaviourTokeniser.from_pretrained(tmp_path)


# --- refusals


def test_inputs_that_do_not_fit_are_refused():
    made, batch = tokeniser(decoder_sees_previous_action=True), trunks()
    codes = torch.zeros(3, 2)
    for call in (
        lambda: made.encode(trunks(length=5)),
        lambda: made.encode(trunks(side=24)),
        lambda: made.encode(changed(batch, actions=batch.actions + 7)),
        lambda: made.encode(changed(batch, actions=batch.actions - 7)),
        lambda: made.encode(of_kind(KINDS["vpt"])),
        lambda: made.decode(batch, codes[:2]),
        lambda: made.decode(batch, torch.zeros(3, 5)),
        lambda: made.decode(changed(batch, previous=batch.previous - 1), codes),
        lambda: made.decoder(batch.frames, codes),
        lambda: made.decoder(batch.frames.float(), codes, previous=batch.previous),
    ):
        with pytest.raises(BadOption):
            call()
    assert isinstance(made.decoder, PolicyDecoder)
