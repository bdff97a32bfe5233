"""From a question to token ids without torch: chat template, placeholders, tokenizer, and what is left of a prompt.

The ids are those that the family's processor makes: the same template, the same text in place of each placeholder,
the same tokenizer.
"""

# Shape legend: B batch, L prompt length, K compressed prompt length, n placeholders of an item, N candidates

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np

from tokensieve.datasets.frames import Frames
from tokensieve.errors import BadOption, UnsupportedModel
from tokensieve.export.folder import AGAIN, own_file, read_json, read_text
from tokensieve.export.packing import NEWLINE
from tokensieve.pipeline.prompt import TICKS_PER_S

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# SmolVLM's processor renders conversations with videos through this one, whatever the checkpoint's own template is.
SMOLVLM_VIDEO_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'] is string %}"
    "{{': ' + message['content']}}{% else %}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}"
    "{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Tokenizer:
    """The tokenizer and the chat template of an exported folder.

    Args:
        folder: it.

    Raises:
        UnsupportedModel: `tokenizer.json`, `tokenizer_config.json` or `chat_template.jinja` is missing or damaged.
    """

    def __init__(self, folder: Path):
        import tokenizers

        path = own_file(folder, "tokenizer.json")
        read_json(folder, "tokenizer.json")  # bounds its size, and JSON that Python reads does not upset the library
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise UnsupportedModel(f"{path} is no tokenizer ({type(error).__name__}).", hint=AGAIN) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = read_json(folder, "tokenizer_config.json")
        self._template = read_text(folder, "chat_template.jinja")

    def encode(self, text: str) -> np.ndarray:
        """`[L]` int64: ids of a rendered prompt, with the special tokens that the tokenizer adds."""
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The text of one token; UnsupportedModel if there is no such id."""
        text = self._tokenizer.id_to_token(token_id)
        if not text:
            raise UnsupportedModel(f"The tokenizer has no token {token_id}.", hint=AGAIN)
        return text

    def id(self, token: str) -> int:
        """The id of one token; UnsupportedModel if it is none."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UnsupportedModel(f"{token!r} is no token of the tokenizer.", hint=AGAIN)
        return found

    def named(self, name: str, default: str) -> str:
        """A special token by its name in `tokenizer_config.json`."""
        found = self._config.get(name, default)
        found = found.get("content") if isinstance(found, dict) else found
        return found if isinstance(found, str) and found else default

    def render(self, conversation: list[dict], template: str | None = None) -> str:
        """A conversation as the template writes it, ready for the model's turn.

        Raises:
            BadOption: the template refuses the conversation.
            UnsupportedModel: it is no template.
        """
        import jinja2

        names = {name: self.named(name, "") for name in _NAMED_TOKENS}
        try:
            compiled = self._environment.from_string(self._template if template is None else template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UnsupportedModel(f"The chat template is damaged ({type(error).__name__}).", hint=AGAIN) from None
        try:
            return compiled.render(
                messages=conversation,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **{name: text for name, text in names.items() if text},
            )
        except MemoryError:
            raise
        except Exception as error:  # whatever a template raises; the cause stays attached
            raise BadOption(f"The chat template refused the conversation ({type(error).__name__}).") from error

    @cached_property
    def _environment(self):
        """A sandbox with what chat templates may use."""
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(jinja2.ext.Extension):
            """`{% generation %}` marks what a model is trained on; here it changes nothing."""

            tags = {"generation"}

            def parse(self, parser):
                next(parser.stream)
                return parser.parse_statements(["name:endgeneration"], drop_needle=True)

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def tojson(value, indent=None, **_):
            return json.dumps(value, ensure_ascii=False, indent=indent)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        return environment


@dataclass(frozen=True, kw_only=True)
class Words:
    """Texts that stand for pictures in a prompt; `video` is "" in families that show videos as images."""

    image: str
    video: str
    around: str = "<fake_token_around_image>"
    whole: str = "<global-img>"

    def check(self, text: str) -> None:
        """Raises BadOption if a user's text holds a placeholder: it would ask for one picture more than there is."""
        for word in (self.image, self.video):
            if word and word in text:
                raise BadOption(f"The text must not contain {word!r}: this model puts a picture there.")


def expand(text: str, word: str, replacements: Sequence[str]) -> str:
    """The text with its placeholders replaced, one by one.

    Raises:
        BadOption: there are more or fewer of them.
    """
    parts = text.split(word)
    if len(parts) != len(replacements) + 1:
        raise BadOption(f"The chat template shows {len(parts) - 1} pictures, and there are {len(replacements)}.")
    return parts[0] + "".join(new + after for new, after in zip(replacements, parts[1:], strict=True))


def tiles_text(words: Words, rows: int, columns: int, per_tile: int) -> str:
    """What stands for one image of SmolVLM: every tile with its place, then the whole image."""
    tile = words.image * per_tile
    lines = [
        "".join(f"{words.around}<row_{y + 1}_col_{x + 1}>{tile}" for x in range(columns)) + "\n" for y in range(rows)
    ]
    gap = "\n" if lines else ""
    return "".join(lines) + gap + words.around + words.whole + tile + words.around


def clip_text(words: Words, clip: Frames, per_frame: int) -> str:
    """What stands for one video of SmolVLM: how long it is, then every frame with its time.

    Raises:
        UnsupportedModel: num2words is not installed.
    """
    try:
        from num2words import num2words
    except ImportError:
        raise UnsupportedModel(
            "Prompts with videos of SmolVLM spell numbers out.", hint="Run: pip install num2words"
        ) from None

    frame = tiles_text(words, 0, 0, per_frame)
    seconds = [round(t * TICKS_PER_S) / TICKS_PER_S for t in clip.times_s]
    intro = f"You are provided the following series of {num2words(clip.num_frames)} frames from a "
    intro += f"{timedelta(seconds=int(clip.duration_s))} [H:MM:SS] video.\n"
    frames = [f"\nFrame from {int(s // 60):02d}:{int(s % 60):02d}:{frame}" for s in seconds]
    return intro + "".join(frames) + "\n\n"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One prompt with all its placeholders.

    Attributes:
        ids: `[L]` int64.
        positions: `[L]` or `[3, L]` int64.
        places: `[n]` int64, where the placeholders of its image or video stand.
    """

    ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray

    def without_dropped(self, slots_n: np.ndarray, kept_K: np.ndarray) -> tuple[Prompt, np.ndarray]:
        """The prompt with dropped tokens taken out; all others keep their positions.

        Args:
            slots_n: candidate at each placeholder, or `NEWLINE`.
            kept_K: `[k]` int64, rising candidates that stay.

        Returns:
            The shorter prompt, and for each of its placeholders the row of `kept_K`, or `NEWLINE`.
        """
        stays_n = (slots_n == NEWLINE) | np.isin(slots_n, kept_K)
        stays_L = np.ones(len(self.ids), dtype=bool)
        stays_L[self.places[~stays_n]] = False
        left_n = slots_n[stays_n]
        source = np.where(left_n == NEWLINE, NEWLINE, np.searchsorted(kept_K, left_n))
        places = (stays_L.cumsum() - 1)[self.places[stays_n]]
        shorter = Prompt(ids=self.ids[stays_L], positions=self.positions[..., stays_L], places=places)
        return shorter, source


def padded_left(rows: Sequence[np.ndarray], fill: int | float = 0, axis: int = -1) -> np.ndarray:
    """Arrays of unequal length along `axis`, made equal on their left side and stacked in front of it.

    `[L]` arrays become `[B, L]`, `[3, L]` arrays `[3, B, L]`, and with `axis=0` `[L, D]` arrays `[B, L, D]`.
    """
    longest = max(row.shape[axis] for row in rows)
    equal = []
    for row in rows:
        widths = [(0, 0)] * row.ndim
        widths[axis] = (longest - row.shape[axis], 0)
        equal.append(np.pad(row, widths, constant_values=fill))
    return np.stack(equal, axis=axis - 1 if axis < 0 else axis)
