"""The parts of encoder and decoder against the same sums written plainly."""

import pytest
import torch
import torch.nn.functional as F

from tokensieve.errors import BadOption
from tokensieve.vla.layers import ActionEmbedding, FrameEncoder, Layer, LinearOfPlaces, check_actions


def frames(count=3, height=24, width=16):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), generator=draw, dtype=torch.uint8)


def test_patches_are_a_strided_convolution_of_scaled_pixels():
    encoder = FrameEncoder((24, 16), 8, 5, 12)
    weight = encoder.patch.weight.view(5, 8, 8, 3).permute(0, 3, 1, 2)
    pixels = frames().permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = F.conv2d(pixels, weight, encoder.patch.bias, stride=8).permute(0, 2, 3, 1)
    torch.testing.assert_close(encoder._patches(frames()), expected, rtol=1e-4, atol=1e-5)


def test_film_scales_and_shifts_and_zero_is_none():
    encoder = FrameEncoder((24, 16), 8, 5, 12)
    plain = encoder(frames())
    assert torch.equal(encoder(frames(), torch.zeros(3, 10)), plain)
    film = torch.zeros(3, 10)
    film[1] = 1.0
    differs = (encoder(frames(), film) - plain).abs().amax(1)
    assert differs[1] > 0 and differs[0] == differs[2] == 0


@pytest.mark.parametrize("wrong", [frames(height=16), frames().float(), frames()[..., :2]])
def test_other_frames_are_refused(wrong):
    with pytest.raises(BadOption, match="24 x 16"):
        FrameEncoder((24, 16), 8, 5, 12)(wrong)


def test_attention_is_torchs():
    layer, x = Layer(12, 3), torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    bias[0, :, :, 3] = -torch.inf
    query, key, value = layer.query_key_value(layer.norm(x)).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
    expected = x + layer.out(mixed)
    expected = expected + layer.mlp(layer.mlp_norm(expected))
    made, (keys, values) = layer(x, bias)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(keys, key), torch.testing.assert_close(values, value)


def test_every_place_has_a_linear_map_of_its_own():
    torch.manual_seed(0)
    places, x_BPC = LinearOfPlaces(3, 4, 5), torch.randn(2, 3, 4)
    wanted = [torch.nn.functional.linear(x_BPC[:, p], places.weight[p].T, places.bias[p]) for p in range(3)]
    assert torch.allclose(places(x_BPC), torch.stack(wanted, 1), atol=1e-6)
    assert places(x_BPC.bfloat16()).shape == (2, 3, 5)


def test_an_action_is_the_sum_of_its_parts():
    embedding = ActionEmbedding((3, 2), 4)
    first, second = (part.weight for part in embedding.parts)
    made = embedding(torch.tensor([[2, 1], [-1, -1]]))
    torch.testing.assert_close(made, torch.stack([first[3] + second[2], first[0] + second[0]]))


def test_actions_that_are_none():
    check_actions(torch.tensor([[2, 1]]), (3, 2))
    check_actions(torch.tensor([[-1, -1]]), (3, 2), lowest=-1)
    for wrong in ([[3, 1]], [[2, 2]], [[-1, 0]], [[1]], [[1, 1, 1]]):
        with pytest.raises(BadOption):
            check_actions(torch.tensor(wrong), (3, 2))
