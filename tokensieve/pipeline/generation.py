"""What `VLM.answer` and `Chat.ask` share about `model.generate`: its options, and reading what it returns."""

# Shape legend: S returned sequences, N new tokens

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tokensieve.errors import BadOption


def generate_options(model: nn.Module, max_new_tokens: int, given: Mapping[str, object]) -> dict[str, object]:
    """Greedy unless `given` says otherwise, and never a placeholder among the new tokens.

    A generated placeholder would make any later pass over prompt and answer fail, because it has no features.

    Raises:
        BadOption: `max_new_tokens` is not a whole number above 0, or an argument that `generate` would drop without a
            word beside `custom_generate`.
    """
    if given.get("custom_generate") is not None:
        from tokensieve.decoding.loop import check_arguments

        check_arguments(given)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise BadOption(f"max_new_tokens must be a whole number above 0, got {max_new_tokens!r}.")
    suppressed = set(_option(model, given, "suppress_tokens") or ())
    suppressed |= {getattr(model.config, f"{m}_token_id", None) for m in ("image", "video")} - {None}
    greedy = {} if given.get("generation_config") is not None else {"do_sample": False}
    return {**greedy, "max_new_tokens": max_new_tokens, **given, "suppress_tokens": sorted(suppressed)}


def num_sequences(model: nn.Module, given: Mapping[str, object]) -> tuple[int, int]:
    """Beams searched, and sequences returned for each prompt."""
    return _option(model, given, "num_beams") or 1, _option(model, given, "num_return_sequences") or 1


def num_generated(new_N: Tensor, model: nn.Module, given: Mapping[str, object]) -> int:
    """Tokens up to and including the end token; without one (a stop string, the length limit) up to the padding."""
    ids = new_N.tolist()
    ends = _option(model, given, "eos_token_id")
    ends = set(ends if isinstance(ends, list | tuple) else [ends])
    for place, token in enumerate(ids):
        if token in ends:
            return place + 1
    pad = _option(model, given, "pad_token_id")
    while ids and ids[-1] == pad:
        ids.pop()
    return len(ids)


def _option(model: nn.Module, given: Mapping[str, object], name: str):
    """The value `generate` will use: as given, else from the given or the model's own generation config."""
    if given.get(name) is not None:
        return given[name]
    value = getattr(given.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if value is None else value
