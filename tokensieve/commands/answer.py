"""`tokensieve answer CLIP [CLIP ...] QUESTION`"""

from __future__ import annotations

import sys

from tokensieve.commands.output import error_object, load_answering, print_json, read_options
from tokensieve.errors import MediaError


def run(options) -> int:
    """Answers clip by clip; one that cannot be read is reported and the others go on."""
    vlm, budget = load_answering(options)
    code = 0
    for clip in options.clip:
        try:
            answer = vlm.answer(
                clip,
                options.question,
                max_new_tokens=options.max_new_tokens,
                read_options=read_options(options),
                **budget,
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
    return code


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
    for note in answer.notes:
        print(f"  note: {note}", file=sys.stderr)
