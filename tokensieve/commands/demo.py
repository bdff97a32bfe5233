"""`tokensieve demo`: one clip, its questions, all tokens against a few, and a picture of what was kept."""

from __future__ import annotations

from pathlib import Path

from tokensieve.commands.output import print_json, stages_of
from tokensieve.commands.show import draw

CLIP = 3  # of the test split: a crowd of four digits


def run(options) -> int:
    from tokensieve.datasets import make_clip, write_clips
    from tokensieve.pipeline.loader import load

    stages = stages_of(options)
    out = Path(options.out)
    write_clips("test", CLIP + 1, out)
    clip = make_clip("test", CLIP)
    video = str(out / f"{clip.id}.mp4")
    vlm = load("tiny")
    vlm.answer(video, clip.questions[0].text)  # the first call pays for starting the decoder
    rows = []
    for question in clip.questions:
        full = vlm.compress(None).answer(video, question.text)
        kept = vlm.compress(stages).answer(video, question.text)
        rows.append((question, full, kept))
        if options.json:
            print_json(
                {"question": question.text, "truth": question.answer, "full": full.to_dict(), "kept": kept.to_dict()}
            )
    picture = str(out / "kept.png")
    draw(vlm, vlm.prepare(video, clip.questions[0].text), [picture, str(out / "kept.mp4")])
    if not options.json:
        _print(rows, video, picture)
    return 0


def _print(rows, video: str, picture: str) -> None:
    from rich.console import Console
    from rich.table import Table

    _, full, kept = rows[0]
    columns = [f"{a.visual_tokens['kept']} of {a.visual_tokens['full']} tokens" for a in (full, kept)]
    table = Table("question", "truth", *columns, title=f"tokensieve on {video}", header_style="bold")
    for question, full, kept in rows:
        table.add_row(question.text, question.answer, _cell(full), _cell(kept))
    console = Console()
    console.print(table)
    console.print(f"What the model still looked at: {picture}")


def _cell(answer) -> str:
    spent = answer.seconds["select"] + answer.seconds["generate"]
    return f"{answer}  ({1000 * spent:.0f} ms)"
