"""`tokensieve answer CLIP [CLIP ...] QUESTION`"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokensieve.commands.output import error_object, load_answering, print_json, read_options
from tokensieve.errors import BadOption, MediaError

_DRAWS = ("samples", "temperature", "top_p")
# The decodings by name, each with the options that it takes.
DECODINGS = {
    "greedy": (),
    "cautious": _DRAWS,
    "best-of": _DRAWS,
    "self-consistency": _DRAWS,
    "token-recycling": ("matrix",),
}


def run(options) -> int:
    """Answers clip by clip; one that cannot be read is reported and the others go on."""
    check_decoding(options)
    schema = schema_of(options)
    vlm, budget = load_answering(options)
    decode, finish = decoding_of(options, vlm)
    decode |= grammar_of(schema, vlm)
    code = 0
    for clip in options.clip:
        try:
            answer = vlm.answer(
                clip,
                options.question,
                max_new_tokens=options.max_new_tokens,
                read_options=read_options(options),
                **budget,
                **decode,
            )
        except MediaError as error:
            code = error.exit_code
            if options.json:
                print_json(error_object(error, clip=clip))
            else:
                print(f"tokensieve: {clip}: {error}", file=sys.stderr)
            continue
        if options.json:
            print_json({"clip": clip, "question": options.question, **answer.to_dict()})
        else:
            _print(clip if len(options.clip) > 1 else None, answer)
    finish()
    return code


def check_decoding(options) -> None:
    """Raises BadOption for a decoding that is unknown or does not take the options given, before weights are read."""
    if options.decode not in DECODINGS:
        near = difflib.get_close_matches(options.decode, DECODINGS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(DECODINGS)}."
        raise BadOption(f"Unknown decoding {options.decode!r}.", hint=hint)
    for name in ("samples", "temperature", "top_p", "matrix"):
        if options[name] is not None and name not in DECODINGS[options.decode]:
            users = [decoding for decoding, names in DECODINGS.items() if name in names]
            raise BadOption(f"--{name} does nothing with --decode {options.decode}; it is for {', '.join(users)}.")


def decoding_of(options, vlm) -> tuple[dict[str, object], Callable[[], None]]:
    """What `--decode` adds to the arguments of `VLM.answer`, and what to call after the last clip."""
    if options.decode == "greedy":
        return {}, lambda: None
    if not hasattr(vlm, "processor"):
        raise BadOption("An exported model decodes greedily.", hint="Leave --decode out, or give the model itself.")
    from tokensieve import decoding

    if options.decode == "token-recycling":
        path = options.matrix and Path(options.matrix)
        known = path and path.exists()
        vocab_size = vlm.model.get_output_embeddings().weight.shape[0]
        matrix = decoding.RecyclingMatrix.load(path) if known else decoding.RecyclingMatrix(vocab_size)
        finish = partial(matrix.save, path) if path else lambda: None
        return {"custom_generate": decoding.token_recycling(matrix)}, finish

    def text_of(ids: list[int]) -> str | None:
        return vlm.processor.batch_decode([ids], skip_special_tokens=True)[0].strip().casefold() or None

    samples = {} if options.samples is None else {"num_samples": options.samples}
    if options.decode == "cautious":
        trials = {} if options.samples is None else {"max_trials": options.samples}
        made = decoding.cautious(decoding.punctuation_ids(vlm.processor), seed=options.seed, **trials)
    elif options.decode == "best-of":
        made = decoding.best_of(answer_of=text_of, seed=options.seed, **samples)
    else:
        made = decoding.self_consistency(answer_of=text_of, seed=options.seed, **samples)
    temperature = 0.8 if options.decode == "cautious" else 0.6
    return {
        "custom_generate": made,
        "do_sample": True,
        "temperature": temperature if options.temperature is None else options.temperature,
        "top_p": 0.9 if options.top_p is None else options.top_p,
    }, lambda: None


def schema_of(options) -> dict | bool | None:
    """The JSON schema that `--json_schema` names, read before weights are."""
    if options.json_schema is None:
        return None
    from tokensieve.decoding.grammar_schema import read_schema

    return read_schema(options.json_schema)


def grammar_of(schema: dict | bool | None, vlm) -> dict[str, object]:
    """What a schema adds to the arguments of `VLM.answer`."""
    if schema is None:
        return {}
    if not hasattr(vlm, "processor"):
        raise BadOption(
            "An exported model keeps to no schema.", hint="Leave --json_schema out, or give the model itself."
        )
    from tokensieve.decoding import json_schema

    return {"logits_processor": [json_schema(vlm.processor, schema)]}


def _print(clip: str | None, answer) -> None:
    print(f"{clip}: {answer}" if clip else str(answer))
    tokens, seconds = answer.visual_tokens, answer.seconds
    print(
        f"  {tokens['kept']} of {tokens['full']} visual tokens"
        + (f" ({answer.method})" if answer.method else "")
        + f", {answer.prompt_tokens} prompt tokens; "
        + ", ".join(f"{name} {seconds[name]:.2f} s" for name in ("read", "encode", "select", "generate")),
        file=sys.stderr,
    )
    if answer.drafted_tokens:
        print(
            f"  {answer.generated_tokens} tokens in {answer.forward_passes} forward passes; "
            f"{answer.accepted_tokens} of {answer.drafted_tokens} drafted tokens stayed",
            file=sys.stderr,
        )
    for note in answer.notes:
        print(f"  note: {note}", file=sys.stderr)
