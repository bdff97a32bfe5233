"""Other tokenisers of actions: their papers' rules and numbers."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.vla import BinnedActions, CountDown, FastActions, QuantileScale, ResidualVQActions
from tokensieve.vla.fast_actions import dct_matrix


def waves(count, num_steps=50, seed=0):
    """`[N, H, 7]` sinusoids within [-1, 1]."""
    draw = torch.Generator().manual_seed(seed)
    phase, rate = (torch.rand(count, 1, 7, generator=draw) for _ in range(2))
    time = torch.linspace(0, 1, num_steps)[None, :, None]
    return torch.sin(2 * math.pi * ((0.2 + rate) * time + phase))


# --- layouts and scales


def test_layouts_of_the_papers():
    openvla = CountDown(32000, 256)
    assert openvla.ids([0, 255]) == [31999, 31744]  # digits 1 and 256: 32000 - digit
    assert openvla.codes([31999, 31744]) == [0, 255]
    assert CountDown(257152, 1024, skip=128).ids([0, 7]) == [257023, 257016]  # pi0-FAST
    everything = CountDown(300, 256, skip=5)
    assert everything.codes(everything.ids(range(256))) == list(range(256)) and min(everything.ids(range(256))) == 39


def test_layouts_refuse_what_is_none():
    layout = CountDown(300, 256, skip=5)
    for call in (
        lambda: layout.ids([256]),
        lambda: layout.ids([-1]),
        lambda: layout.codes([295]),
        lambda: layout.codes([38]),
        lambda: CountDown(256, 256, skip=1),
        lambda: CountDown(256, 0),
        lambda: CountDown(256, 2, skip=-1),
    ):
        with pytest.raises(BadOption):
            call()


def test_the_scale_puts_percentiles_at_one():
    actions = torch.stack([torch.arange(101.0), 5 + 2 * torch.arange(101.0), torch.full((101,), 3.0)], -1)
    scale = QuantileScale.fit(actions)
    assert scale.low.tolist() == [1, 7, 3] and scale.high.tolist() == [99, 203, 3]
    normal = scale.normalise(actions)
    assert normal[[1, 99]].tolist() == [[-1, -1, 0], [1, 1, 0]] and normal[100, 0] > 1
    torch.testing.assert_close(scale.restore(normal), actions)
    for wrong in (torch.zeros(0, 2), torch.zeros(3), torch.full((3, 2), torch.nan)):
        with pytest.raises(BadOption):
            QuantileScale.fit(wrong)


# --- bins


def test_bins_are_openvlas():
    """Its rule, written with NumPy as the paper's code does it: digitize, and middles with the top index clipped."""
    edges = np.linspace(-1, 1, 256)
    chunk = torch.cat([torch.rand(500, 7, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2, torch.ones(1, 7)])
    digits = np.digitize(np.clip(chunk.double().numpy(), -1, 1), edges)
    bins = BinnedActions(7)
    codes = bins.encode(chunk)
    assert CountDown(32000, 256).ids(codes) == (32000 - digits).flatten().tolist()
    middles = ((edges[:-1] + edges[1:]) / 2)[np.clip(digits - 1, 0, 254)]
    np.testing.assert_allclose(bins.decode(codes).numpy(), middles, rtol=0, atol=1e-7)
    assert {0, 254, 255} <= set(codes)


def test_bins_err_by_at_most_a_255th():
    chunk, bins = torch.linspace(-1, 1, 10001)[:, None], BinnedActions(1)
    error = (bins.decode(bins.encode(chunk)) - chunk).abs().max()
    assert 0.99 / 255 < error <= 1 / 255 + 1e-6
    assert bins.encode(torch.tensor([[-1.0], [1.0], [-5.0], [5.0]])) == [0, 255, 0, 255]
    assert torch.equal(bins.decode([254]), bins.decode([255]))


def test_bins_refuse():
    bins = BinnedActions(2)
    for call in (
        lambda: bins.encode(torch.zeros(3, 3)),
        lambda: bins.encode(torch.zeros(0, 2)),
        lambda: bins.encode(torch.tensor([[0.0, torch.nan]])),
        lambda: bins.decode([1, 2, 3]),
        lambda: bins.decode([]),
        lambda: bins.decode([0, 256]),
        lambda: bins.decode([0, -1]),
        lambda: BinnedActions(0),
        lambda: BinnedActions(2, 1),
    ):
        with pytest.raises(BadOption):
            call()


# --- FAST


@pytest.fixture(scope="module")
def fast():
    return FastActions.fit(waves(150))


@pytest.mark.parametrize("length", [1, 2, 7, 50])
def test_the_transform_is_scipys(length):
    from scipy.fft import dct

    x = torch.randn(length, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = dct_matrix(length)
    np.testing.assert_allclose((ours @ x).numpy(), dct(x.numpy(), axis=0, norm="ortho"), atol=1e-12)
    torch.testing.assert_close(ours.T @ ours, torch.eye(length, dtype=torch.float64))


def test_fast_is_short_and_close(fast):
    """The card's run on such waves: 38.5 tokens instead of 350, RMSE 0.016; the waves' drawing is not given."""
    new = waves(50, seed=1)
    codes = [fast.encode(chunk) for chunk in new]
    assert sum(map(len, codes)) / 50 < 60
    back = torch.stack([fast.decode(row) for row in codes])
    assert (back - new).square().mean().sqrt() < 0.02
    assert fast.num_codes <= 1024 and all(0 <= code < fast.num_codes for row in codes for code in row)


def test_fast_loses_nothing_but_the_rounding(fast):
    chunk = waves(1, seed=2)[0]
    rounded = (dct_matrix(50) @ chunk.double() * 10).round() / 10
    torch.testing.assert_close(fast.decode(fast.encode(chunk)), (dct_matrix(50).T @ rounded).float())


def test_fast_writes_low_frequencies_of_all_numbers_first():
    """A chunk that is constant in time has one coefficient per number, at the very beginning."""
    chunks = torch.tensor([[[0.5, -0.5]] * 4, [[-0.5, 0.5]] * 4])
    fast = FastActions.fit(chunks, vocab_size=21)  # as many as there are integers: no merges
    integers = [code_to_integer(fast, code) for code in fast.encode(chunks[0])]
    assert integers == [10, -10, 0, 0, 0, 0, 0, 0] and fast.num_codes == 21


def code_to_integer(fast, code):
    return ord(fast._bpe.id_to_token(code)) - 0x100 + fast.lowest


def test_a_larger_scale_is_finer():
    chunks = waves(60)
    errors = []
    for scale in (5.0, 10.0, 40.0):
        fast = FastActions.fit(chunks, scale=scale)
        errors.append((fast.decode(fast.encode(chunks[0])) - chunks[0]).abs().max().item())
    assert errors[0] > errors[1] > errors[2]


def test_what_fitting_never_saw_becomes_the_nearest(fast):
    loud = 100 * waves(1, seed=3)[0]
    coefficients = (dct_matrix(50) @ loud.double() * 10).round().clamp(fast.lowest, fast.highest) / 10
    torch.testing.assert_close(fast.decode(fast.encode(loud)), (dct_matrix(50).T @ coefficients).float())
    assert coefficients.max() == fast.highest / 10 and coefficients.min() == fast.lowest / 10


def test_fast_refuses(fast):
    codes = fast.encode(waves(1)[0])
    for call in (
        lambda: fast.decode(codes[:-1]),
        lambda: fast.decode([]),
        lambda: fast.decode([*codes, codes[0]]),
        lambda: fast.decode([fast.num_codes]),
        lambda: fast.decode([-1]),
        lambda: fast.encode(waves(1)[0, :49]),
        lambda: fast.encode(waves(1)[0] * torch.inf),
        lambda: FastActions.fit(waves(2)[0]),
        lambda: FastActions.fit(waves(2)[:0]),
        lambda: FastActions.fit(waves(2) * torch.nan),
        lambda: FastActions.fit(waves(2), scale=0.0),
        lambda: FastActions.fit(1000 * waves(2)),
    ):
        with pytest.raises(BadOption):
            call()


def test_fast_on_disk(fast, tmp_path):
    fast.save_pretrained(tmp_path / "fast")
    again = FastActions.from_pretrained(tmp_path / "fast")
    assert (again.shape, again.scale, again.num_codes) == (fast.shape, fast.scale, fast.num_codes)
    for chunk in (*waves(20, seed=4), 3 * waves(1)[0]):
        codes = fast.encode(chunk)
        assert again.encode(chunk) == codes
        assert torch.equal(again.decode(codes), fast.decode(codes))
    assert [path.name for path in (tmp_path / "fast").iterdir()] == ["fast_actions.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [50]},
        {"shape": [50, 0]},
        {"shape": [50, 10**9]},
        {"shape": [50.0, 7]},
        {"scale": 0.0},
        {"scale": math.inf},
        {"lowest": 10**9},
        {"highest": 10**9},
        {"merges": [["a", "b"]]},
        {"merges": [["\u0100"]]},
        {"merges": [["\u0100", "\u0100"], ["\u0100", "\u0100"]]},
        {"merges": 3},
        {"more": 3},
    ],
)
def test_fast_refuses_files_that_are_none(fast, tmp_path, change):
    fast.save_pretrained(tmp_path)
    path = tmp_path / "fast_actions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedModel, match="holds no tokeniser"):
        FastActions.from_pretrained(tmp_path)


def test_fast_refuses_what_cannot_be_read(fast, tmp_path):
    with pytest.raises(BadOption, match="has no fast_actions"):
        FastActions.from_pretrained(tmp_path)
    for text in ("", "[" * 100_000, "3", "{}"):
        (tmp_path / "fast_actions.json").write_text(text)
        with pytest.raises(UnsupportedModel):
            FastActions.from_pretrained(tmp_path)
    with pytest.raises(BadOption, match="no folder"):
        fast.save_pretrained(tmp_path / "fast_actions.json")


# --- residual VQ


def test_residual_vq_on_disk(tmp_path):
    pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    vq = ResidualVQActions((4, 7), num_codebooks=2, num_codes=8, latent_width=6, hidden_width=5)
    vq.loss(waves(16, num_steps=4))  # moves the codebooks
    vq.save_pretrained(tmp_path)
    again = ResidualVQActions.from_pretrained(tmp_path)
    for chunk in waves(8, num_steps=4):
        assert again.encode(chunk) == vq.encode(chunk)
        assert torch.equal(again.decode(vq.encode(chunk)), vq.eval().decode(vq.encode(chunk)))
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name, value in weights.items() if value.dtype == torch.bool)
    save_file(weights | {name: torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="one dtype"):
        ResidualVQActions.from_pretrained(tmp_path)


def test_residual_vq_learns_and_comes_back():
    pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    chunks = waves(64, num_steps=8)
    sizes = {"num_codebooks": 3, "num_codes": 16, "latent_width": 16, "hidden_width": 32}
    vq = ResidualVQActions((8, 7), **sizes)
    optimizer, losses = torch.optim.Adam(vq.parameters(), 1e-2), []
    for _ in range(60):
        losses.append(vq.loss(chunks))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    state = {name: value.clone() for name, value in vq.state_dict().items()}
    codes = vq.encode(chunks[0])
    assert len(codes) == 3 and all(0 <= code < 16 for code in codes) and vq.encode(chunks[0]) == codes
    assert vq.training and all(torch.equal(value, state[name]) for name, value in vq.state_dict().items())
    vq.eval()
    with torch.no_grad():
        latent, index, _ = vq.quantiser(vq.encoder(chunks.flatten(1))[:, None])
    assert index[0, 0].tolist() == codes
    torch.testing.assert_close(vq.decode(codes), vq.decoder(latent[0, 0]).view(8, 7).detach())
    assert len({tuple(vq.encode(chunk)) for chunk in chunks}) > 8
    for call in (
        lambda: vq.decode(codes[:2]),
        lambda: vq.decode([0, 0, 16]),
        lambda: vq.encode(chunks[0, :7]),
        lambda: vq.loss(chunks[:, :7]),
        lambda: ResidualVQActions((8, 0)),
        lambda: ResidualVQActions((8, 7), num_codes=0),
    ):
        with pytest.raises(BadOption):
            call()


def test_residual_vq_names_the_package_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(BadOption, match="pip install vector-quantize-pytorch"):
        ResidualVQActions((8, 7))


def test_all_have_the_same_interface(fast):
    """A Protocol cannot be checked at run time in full; this says what a caller relies on."""
    for made, chunk in ((fast, waves(1)[0]), (BinnedActions(7), waves(1)[0])):
        codes = made.encode(chunk)
        assert all(isinstance(code, int) and 0 <= code < made.num_codes for code in codes)
        back = made.decode(codes)
        assert back.shape == chunk.shape and back.dtype == torch.float32
