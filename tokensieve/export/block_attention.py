"""Causal attention over blocks of queries in an ONNX graph: memory grows with the prompt, not with its square.

    for every block of queries:  softmax(block @ keys up to its end + mask) @ values

What a block may not see is not computed, which is half of a long prompt, and its scores stay in the processor's cache.
PyTorch's exporter has no loop over slices of a length that it does not know, and writing the blocks out one by one
makes export slow; so a layer calls a function by name, and `add_block_attention` adds what that name means.

How many queries a block has at most is an input with a default, which suits a CPU. A GPU wants few large blocks.
"""

# Shape legend: B batch, L new places, P cached places, S = P + L, A heads of queries, H heads of keys, d width of a
#               head, R = A / H * queries of a block, E keys up to the end of a block

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.export.generation import QUERIES_PER_BLOCK

if TYPE_CHECKING:
    import onnx_ir

DOMAIN, NAME = "tokensieve", "BlockAttention"
HIDDEN = -1.7e38  # added to a negative score it stays finite, so a row of padding makes no NaN
QUERIES = 64  # of 16 to 512 the fastest on a CPU, or next to it, from 440 to 1,620 places

# All blocks have one size, so that a loop can stack them; the last is padded at the end. Slices end where their tensor
# ends, so padding sees no more than the last query does.
_FUNCTION = """
<domain: "tokensieve", opset_import: ["": 18]>
BlockAttention (query, key, value, bias, most_queries) => (mixed)
{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    rest = Constant <value_ints = [-1]> ()
    start_of_range = Constant <value_int = 0> ()
    step_of_range = Constant <value_int = 1> ()
    hidden = Constant <value_float = -1.7e38> ()
    always = Cast <to = 9> (step_of_range)

    batch = Shape <start = 0, end = 1> (query)
    heads = Shape <start = 1, end = 2> (query)
    length = Shape <start = 2, end = 3> (query)
    width = Shape <start = 3, end = 4> (query)
    key_heads = Shape <start = 1, end = 2> (key)
    total = Shape <start = 2, end = 3> (key)
    past = Sub (total, length)

    length_and_most = Add (length, most_queries)
    length_rounded_up = Sub (length_and_most, one)
    num_blocks = Div (length_rounded_up, most_queries)
    length_and_blocks = Add (length, num_blocks)
    length_rounded_up_again = Sub (length_and_blocks, one)
    size = Div (length_rounded_up_again, num_blocks)
    padded_length = Mul (size, num_blocks)
    num_padding = Sub (padded_length, length)
    pads = Concat <axis = 0> (zero, num_padding)
    padded = Pad (query, pads, , two)

    shared = Div (heads, key_heads)
    num_rows = Mul (shared, size)
    shape_BHRd = Concat <axis = 0> (batch, key_heads, num_rows, width)
    shape_BAQE = Concat <axis = 0> (batch, heads, size, rest)
    shape_BHRE = Concat <axis = 0> (batch, key_heads, num_rows, rest)
    shape_BAQd = Concat <axis = 0> (batch, heads, size, width)
    total_0d = Squeeze (total)
    size_0d = Squeeze (size)
    num_blocks_0d = Squeeze (num_blocks)
    place_S = Range (start_of_range, total_0d, step_of_range)
    offset_Q = Range (start_of_range, size_0d, step_of_range)
    offset_Q1 = Unsqueeze (offset_Q, one)

    blocks = Loop (num_blocks_0d, always) <body = body (int64 turn, bool go) => (bool go_on, block) {
        go_on = Identity (go)
        start = Mul (turn, size)
        stop = Add (start, size)
        first_place = Add (past, start)
        end = Add (past, stop)
        query_BAQd = Slice (padded, start, stop, two)
        key_BHEd = Slice (key, zero, end, two)
        value_BHEd = Slice (value, zero, end, two)
        bias_B11E = Slice (bias, zero, end, three)
        place_E = Slice (place_S, zero, end)
        place_Q1 = Add (offset_Q1, first_place)
        seen_QE = LessOrEqual (place_E, place_Q1)
        bias_B1QE = Where (seen_QE, bias_B11E, hidden)
        query_BHRd = Reshape (query_BAQd, shape_BHRd)
        key_BHdE = Transpose <perm = [0, 1, 3, 2]> (key_BHEd)
        product_BHRE = MatMul (query_BHRd, key_BHdE)
        product_BAQE = Reshape (product_BHRE, shape_BAQE)
        score_BAQE = ToFloat (product_BAQE)
        masked_BAQE = Add (score_BAQE, bias_B1QE)
        weight_BAQE = Softmax <axis = -1> (masked_BAQE)
        weight_BHRE = Reshape (weight_BAQE, shape_BHRE)
        mixing_BHRE = FromFloat (weight_BHRE)
        mixed_BHRd = MatMul (mixing_BHRE, value_BHEd)
        block = Reshape (mixed_BHRd, shape_BAQd)
    }>
    side_by_side = Transpose <perm = [1, 0, 3, 2, 4]> (blocks)
    shape_BLW = Concat <axis = 0> (batch, padded_length, rest)
    wide = Reshape (side_by_side, shape_BLW)
    mixed = Slice (wide, zero, length, one)
}
"""


def block_attention(query_BALd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor, seen_BS: Tensor) -> Tensor:
    """Attention of the last L of S places: `[B, L, A * d]`. A / H queries in a row share a key.

    While a graph is exported this is a call of the function that `add_block_attention` adds; else PyTorch's own.

    Args:
        query_BALd: already scaled.
        key_BHSd: of all places.
        value_BHSd: of all places.
        seen_BS: bool, False at padding. A query of padding alone gets some finite mixture.
    """
    batch, heads, length, width = query_BALd.shape
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (query_BALd, key_BHSd, value_BHSd, torch.where(seen_BS[:, None, None], 0.0, HIDDEN)),
            dtype=value_BHSd.dtype,
            shape=(batch, length, heads * width),
            version=1,
        )
    total = key_BHSd.shape[2]
    causal_LS = torch.ones(length, total, dtype=torch.bool, device=query_BALd.device).tril(total - length)
    mixed_BALd = F.scaled_dot_product_attention(
        query_BALd, key_BHSd, value_BHSd, attn_mask=causal_LS & seen_BS[:, None, None], scale=1.0, enable_gqa=True
    )
    return mixed_BALd.transpose(1, 2).flatten(2)


def add_block_attention(model: onnx_ir.Model) -> None:
    """Writes the function out wherever an exported graph calls it; a graph that does not is left as it is.

    The graph gets an input `QUERIES_PER_BLOCK`, int64 `[1]`, that may be left out.
    """
    import onnx.parser
    import onnx_ir
    from onnx_ir.passes.common import InlinePass

    calls = [node for node in model.graph if node.domain == DOMAIN]
    if not calls:
        return
    half = calls[0].inputs[0].dtype == onnx_ir.DataType.FLOAT16
    # A cast from float32 to float32 would be carried out in every turn of the loop.
    text = _FUNCTION.replace("ToFloat", "Cast <to = 1>" if half else "Identity")
    text = text.replace("FromFloat", "Cast <to = 10>" if half else "Identity")
    most_queries = onnx_ir.val(QUERIES_PER_BLOCK, const_value=onnx_ir.tensor([QUERIES], name=QUERIES_PER_BLOCK))
    model.graph.initializers.add(most_queries)
    model.graph.inputs.append(most_queries)  # an initialiser that is an input too: a default
    for node in calls:
        node.resize_inputs(5)
        node.replace_input_with(4, most_queries)
    function = onnx_ir.from_proto(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
