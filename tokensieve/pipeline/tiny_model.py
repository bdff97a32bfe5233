"""The architecture of the shipped model: a genuine LLaVA-OneVision, small in every dimension."""

from __future__ import annotations

from tokensieve.datasets.clips import COLOURS, COUNTS, DIRECTIONS, FRAME_SIZE, KINDS

PATCH_SIZE = 8  # pixels: 12 x 12 patches a frame, pooled to 6 x 6 tokens by LLaVA-OneVision's video path
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>", "<video>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message['role'] }}|>"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}<{{ part['type'] }}>{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}<|end|>{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def question_corpus() -> list[str]:
    """Every question and answer the generator can produce: the tokenizer's training text."""
    colours, digits = list(COLOURS), [str(d) for d in range(10)]
    questions = [
        phrasing.format(colour=colour, digit=digit)
        for _, phrasings in KINDS.values()
        for phrasing in phrasings
        for colour in colours
        for digit in digits
    ]
    return questions + (digits + colours + list(DIRECTIONS) + list(COUNTS)) * 20


def build_tokenizer():
    """A byte-level BPE tokenizer of at most 512 entries: any text is encodable, each answer is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(question_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        model_max_length=4096,
    )


def build_processor():
    """The matching LlavaOnevisionProcessor: frames are squashed to 96 x 96, images tiled at most 2 x 2."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    pixels = {
        "size": {"height": FRAME_SIZE, "width": FRAME_SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=_pinpoints(), **pixels),
        video_processor=LlavaOnevisionVideoProcessor(do_sample_frames=False, **pixels),
        tokenizer=build_tokenizer(),
        num_image_tokens=(FRAME_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer):
    """A randomly initialised LlavaOnevisionForConditionalGeneration of 2.7 million parameters."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_pinpoints(),
        tie_word_embeddings=True,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    # Explicit softmax attention: at this size its bf16 backward is faster on a CPU than the fused kernel's.
    config._attn_implementation = "eager"
    return LlavaOnevisionForConditionalGeneration(config)


def _pinpoints() -> list[list[int]]:
    sides = (FRAME_SIZE, 2 * FRAME_SIZE)
    return [[height, width] for height in sides for width in sides]
