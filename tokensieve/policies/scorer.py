"""The scorer network of CaCoVID: one decoder layer over the whole prompt, a token head and a frame head.

Ma, Zhou, Wang, Chen, Yang, Song, Zheng, "CaCoVID". https://arxiv.org/abs/2602.01649 (AAAI 2026)

    H        one decoder layer, with RoPE, over X: the language model's input embeddings of prefix text, video tokens,
             question; first weights are a copy of the language model's layer 0
    Z_tok    MLP_t(RMSNorm(H_i)) for every video token i
    Z_frm    MLP_f(RMSNorm(mean of H over the tokens of a frame)), the same RMSNorm
    MLP      D -> D/2 -> D/4 -> D/8 -> D/16 -> 2 (drop, keep), SiLU between

What differs from the official code (LivingFutureLab/CaCoVID; written from the description):
- `attention` says what the layer sees. The official call asks for bidirectional attention, but under the transformers
  releases it pins (4.49, 4.50) its FlashAttention-2 path is causal: then no video token sees a question that follows
  the video. "bidirectional" is the default here; "causal" is how the released weights were run (INFERRED).
- Any decoder layer of transformers with RoPE will do (there: Qwen2). Positions are 0, 1, 2 ..., also for M-RoPE models,
  whose three axes then agree (INFERRED: their training code is not released).
- Padded batches are masked properly (there: a mask that only FlashAttention understands).
- The third head (mode selection), which neither loss nor inference uses, is left out and skipped on loading.
"""

# Shape legend: B prompts, S tokens of a prompt, N video tokens of it, T frames, n tokens a frame, D width

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokensieve.compression import VisualTokens
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.policies.checkpoint import SavedPolicy, register_policy, seeded_init
from tokensieve.policies.inputs import check_tokens, count_frames, pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION = ("bidirectional", "causal")
# Of a language model's config: what names files or code, or a precision, is no business of a policy.
_LEFT_OUT = ("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype")
_HEADS = ("layers.0.", "layernorm.", "token_compress.", "frame_compress.")
_MARK = "token_compress.0.weight"


@register_policy("cacovid-scorer")
class PolicyScorer(SavedPolicy):
    """CaCoVID's scorer: `(tokens) -> (token_logits [N, 2], frame_logits [T, 2])`, float32, drop first.

    Make one with `init_from(model)`, `from_pretrained(folder)` or `from_released(state, model.config)`.

    The prompt is put together from `tokens.question`: its first `num_before` text embeddings, the video tokens, the
    other embeddings. What the adapter leaves out of either is not seen: special tokens (`eos`, `pad`), structural
    tokens (the newline that closes a LLaVA-OneVision video), other images or videos of the prompt.

    Args:
        decoder: the model's config, of which the text part is used, or a dict of that part.
        attention: "bidirectional", or "causal": each token sees those before it, so the question matters only where
            it comes first.
        seed: of the first weights.

    Raises:
        BadOption: `attention` is none of the two.
        UnsupportedModel: transformers has no decoder layer with RoPE for this config.
    """

    needs = ("question",)

    def __init__(
        self, decoder: PreTrainedConfig | Mapping[str, object], attention: str = "bidirectional", *, seed: int = 0
    ):
        super().__init__()
        if attention not in ATTENTION:
            raise BadOption(f"attention must be one of {ATTENTION}, got {attention!r}.")
        self.config = _one_layer(decoder)
        self.attention = attention
        width = self.config.hidden_size
        layer_class, self._rotary_class = _classes(self.config)
        with seeded_init(seed):
            layer = layer_class(self.config, 0)
            layer.self_attn.is_causal = attention == "causal"
            self.layers = nn.ModuleList([layer])
            self.layernorm = nn.RMSNorm(width, eps=getattr(self.config, "rms_norm_eps", 1e-6))
            self.token_compress = _head(width)
            self.frame_compress = _head(width)
        self._rotary: list[nn.Module] = []  # no submodule: a change of dtype would spoil its frequencies

    @classmethod
    def init_from(cls, model: nn.Module, attention: str = "bidirectional", *, seed: int = 0) -> PolicyScorer:
        """A new scorer in float32 for a transformers model, its layer a copy of the language model's layer 0.

        Raises:
            BadOption: `attention` is not known.
            UnsupportedModel: the model has no decoder layer that can be copied (it is quantised, say).
        """
        if not hasattr(model, "get_decoder") or not hasattr(model.get_decoder(), "layers"):
            raise UnsupportedModel(f"{type(model).__name__} has no language model with layers.")
        scorer = cls(model.config.get_text_config(), attention, seed=seed)
        try:
            scorer.layers[0].load_state_dict(model.get_decoder().layers[0].state_dict())
        except RuntimeError as error:
            raise UnsupportedModel(
                f"Layer 0 of {type(model).__name__} cannot be copied.",
                hint="Load the model without quantisation or adapters.",
            ) from error
        return scorer.to(next(model.parameters()).device)

    @classmethod
    def from_released(
        cls, state: Mapping[str, Tensor], decoder: PreTrainedConfig | Mapping[str, object], attention: str = "causal"
    ) -> PolicyScorer:
        """The authors' own weights, under the parameter names of their policy module.

        Args:
            state: a state dict; the policy may stand under a common prefix, among other weights. Read it with
                `safetensors.torch.load_file`.
            decoder: config of the language model that the weights were trained for.
            attention: as they were run, unless told otherwise.

        Raises:
            UnsupportedModel: the state holds no such policy, or one of another shape.
        """
        found = [name for name in state if name == _MARK or name.endswith("." + _MARK)]
        if len(found) != 1:
            raise UnsupportedModel(f"The state dict must hold one CaCoVID policy, found {len(found)}.")
        prefix = found[0].removesuffix(_MARK)
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(tuple(prefix + h for h in _HEADS))}
        with torch.device("meta"):
            scorer = cls(decoder, attention)
        try:
            scorer.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise UnsupportedModel(
                "The policy does not fit the language model's config: weights are missing or of another shape."
            ) from error
        return scorer.eval()

    def options(self) -> dict[str, object]:
        return {"decoder": self.config.to_dict(), "attention": self.attention}

    def forward(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """`([N, 2], [T, 2])` logits of one video or image; gradients are recorded if they are on.

        Raises:
            BadOption: features or question are missing or have another width.
        """
        return self.forward_batch([tokens])[0]

    def forward_batch(self, batch: Sequence[VisualTokens]) -> list[tuple[Tensor, Tensor]]:
        """What `forward` gives for each, in one pass; lengths may differ."""
        prompts, places = [], []
        for tokens in batch:
            check_tokens(tokens, self.config.hidden_size, with_question=True)
            question, before = tokens.question.embeds, tokens.question.num_before
            prompts.append(torch.cat([question[:before], tokens.features, question[before:]]))
            place_S = torch.arange(len(prompts[-1]), device=prompts[-1].device)[:, None]
            places.append((place_S >= before) & (place_S < before + len(tokens)))
        embeds_BSD, real_BS = pad_rows(prompts)
        video_BS = pad_rows(places)[0][..., 0]
        return self.logits(
            embeds_BSD, video_BS, [count_frames(tokens) for tokens in batch], None if real_BS.all() else real_BS
        )

    def logits(
        self, embeds_BSD: Tensor, video_BS: Tensor, num_frames: Sequence[int], attention_mask: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """`([N, 2], [T, 2])` logits of each prompt; N and T may differ.

        Args:
            embeds_BSD: the language model's input embeddings, visual features in their places.
            video_BS: bool, True at video tokens, frame by frame.
            num_frames: T of each prompt.
            attention_mask: `[B, S]`, 0 at padding, on either side; None where there is none.

        Raises:
            BadOption: a video's tokens are no frames of one size.
        """
        counts = video_BS.sum(1).tolist()
        for count, frames in zip(counts, num_frames, strict=True):
            if not count or count % frames:
                raise BadOption(f"{count} video tokens cannot be {frames} frames of one size.")
        embeds_BSD = embeds_BSD.to(self.layernorm.weight)  # its device and dtype
        hidden = self._hidden(embeds_BSD, attention_mask)[video_BS.to(embeds_BSD.device)].split(counts)
        means = [h_ND.unflatten(0, (frames, -1)).mean(1) for h_ND, frames in zip(hidden, num_frames, strict=True)]
        token_logits = self.token_compress(self.layernorm(torch.cat(hidden))).float().split(counts)
        frame_logits = self.frame_compress(self.layernorm(torch.cat(means))).float().split(list(num_frames))
        return list(zip(token_logits, frame_logits, strict=True))

    def _hidden(self, embeds_BSD: Tensor, attention_mask: Tensor | None) -> Tensor:
        length = embeds_BSD.shape[1]
        allowed = None
        place_BS = torch.arange(length, device=embeds_BSD.device)[None]
        if attention_mask is not None:
            real_BS = attention_mask.to(embeds_BSD.device).bool()
            place_BS = (real_BS.cumsum(1) - 1).clamp(min=0)
            allowed = real_BS[:, None, None, :]
            if self.attention == "causal":
                allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=embeds_BSD.device).tril()
                # Padding in front sees itself: a row of nothing would give NaN.
                allowed = allowed | torch.eye(length, dtype=torch.bool, device=embeds_BSD.device)
        out = self.layers[0](
            embeds_BSD, attention_mask=allowed, position_embeddings=self._cos_sin(embeds_BSD, place_BS)
        )
        return out[0] if isinstance(out, tuple) else out

    def _cos_sin(self, embeds_BSD: Tensor, place_BS: Tensor) -> tuple[Tensor, Tensor]:
        if not self._rotary:
            with torch.device("cpu"):
                self._rotary.append(self._rotary_class(self.config))
        rotary = self._rotary[0].to(embeds_BSD.device)
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters  # frequencies of their own (Gemma 3)
        return rotary(embeds_BSD, place_BS, *([self.config.layer_types[0]] if by_type else []))


def _head(width: int) -> nn.Sequential:
    widths = [width, *(max(width // 2**i, 1) for i in range(1, 5)), 2]
    layers: list[nn.Module] = []
    for width_in, width_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(width_in, width_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _one_layer(decoder: PreTrainedConfig | Mapping[str, object]) -> PreTrainedConfig:
    """The config of a language model of one layer, on attention that understands masks."""
    from transformers import AutoConfig

    known = dict(decoder) if isinstance(decoder, Mapping) else decoder.get_text_config().to_dict()
    settings = {k: v for k, v in known.items() if k not in _LEFT_OUT and not k.endswith("attn_implementation")}
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:1]
    model_type = str(settings.pop("model_type", ""))
    try:
        config = AutoConfig.for_model(model_type, **settings | {"num_hidden_layers": 1})
    except ValueError as error:
        raise UnsupportedModel("transformers does not know this kind of language model.") from error
    config._attn_implementation = "sdpa"
    return config


def _classes(config: PreTrainedConfig) -> tuple[type[nn.Module], type[nn.Module]]:
    """Classes of the decoder layer and of its rotary positions."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except ValueError as error:
        raise UnsupportedModel(f"transformers makes no language model from {type(config).__name__}.") from error
    layer = getattr(model, "layers", [None])[0]
    if not hasattr(layer, "self_attn") or not hasattr(model, "rotary_emb"):
        raise UnsupportedModel(f"{type(model).__name__} has no decoder layers with rotary positions.")
    return type(layer), type(model.rotary_emb)
