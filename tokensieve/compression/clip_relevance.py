"""How far each visual token is from the question in CLIP's joint space: the relevance of CDPruner.

    v_i  visual_projection(post_layernorm(h_i)), h_i the hidden state of patch i after the last block of the tower
    t_m  CLIP's text embedding of segment m of the question; a segment holds what fits between the end tokens
    r_i  -mean_m cos(v_i, t_m)

The minus sign is the official one: single patches of CLIP are less similar to a text the more they show what it
names. That is a property of CLIP's towers; do not expect it of others.
"""

# Shape legend: N visual tokens, P patches of the item, S tokens of a group, V width of the tower, M text segments,
#               d width of the joint space

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokensieve.compression.maxmin import unit_rows
from tokensieve.compression.tokens import VisualTokens, in_dtype_of_input
from tokensieve.errors import BadOption, UnsupportedModel


def clip_relevance(patch_Nd: Tensor, text_Md: Tensor) -> Tensor:
    """`[N]` float32: minus the mean cosine of every token with all text segments."""
    return -(unit_rows(patch_Nd) @ unit_rows(text_Md).T).mean(1)


class ClipText:
    """The CLIP model whose vision tower the language model looks through, for the relevance of CDPruner.

    Args:
        model: a transformers `CLIPModel` with both towers; its vision tower is not run, only its last norm and the
            projections.
        tokenizer: its tokenizer.

    Example:
        >>> clip = ClipText(CLIPModel.from_pretrained(name), CLIPTokenizer.from_pretrained(name))
        >>> vlm.compress("cdpruner", keep=0.1, clip=clip)
    """

    needs = ("tower", "question")  # what has to be recorded for `relevance`

    def __init__(self, model: nn.Module, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self._project = in_dtype_of_input(nn.Sequential(model.vision_model.post_layernorm, model.visual_projection))

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """`[N]` float32: the relevance of every visual token, on the device of its features.

        Raises:
            BadOption: the tower's hidden states or the text of the question are not there.
            UnsupportedModel: the vision tower is not of this CLIP's width.
        """
        if tokens.tower is None:
            raise BadOption(
                "clip= needs hidden states of the vision tower, and these tokens come without.",
                hint="They are recorded where the method is set before VLM.prepare, or with its needs=('tower',).",
            )
        if tokens.question is None or tokens.question.text is None:
            raise BadOption(
                "clip= needs the question as text, and these tokens come without.",
                hint="Use VLM.prepare or VLM.answer, or give compress_inputs its questions=.",
            )
        relevance_N = clip_relevance(self.patch_embeds(tokens), self.text_embeds(tokens.question.text))
        return relevance_N.to(tokens.features.device)

    @torch.no_grad()
    def patch_embeds(self, tokens: VisualTokens) -> Tensor:
        """`[N, d]` float32: patches in the joint space, averaged where several become one visual token."""
        layer = tokens.tower.layers[-1]
        hidden_PV = torch.cat([hidden_SV[layer.num_prefix :] for hidden_SV in tokens.tower.hidden])
        width = self.model.visual_projection.in_features
        if hidden_PV.shape[1] != width:
            raise UnsupportedModel(
                f"The vision tower has width {hidden_PV.shape[1]}, the CLIP model given as clip= has {width}.",
                hint="Give the CLIP model that the vision tower was taken from, or leave clip= out.",
            )
        return layer.to_tokens(self._project(hidden_PV.float().to(self.model.device)).to(hidden_PV.device))

    @torch.no_grad()
    def text_embeds(self, text: str) -> Tensor:
        """`[M, d]` float32: one embedding for each segment of the text."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.model.config.text_config.max_position_embeddings - 2
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        embeds = []
        for first in range(0, max(1, len(ids)), room):
            segment = torch.tensor([[start, *ids[first : first + room], end]], device=self.model.device)
            pooled = self.model.text_model(input_ids=segment).pooler_output
            embeds.append(self.model.text_projection(pooled)[0].float())
        return torch.stack(embeds)
