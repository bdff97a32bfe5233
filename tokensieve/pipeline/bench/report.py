"""Tables of a benchmark: for a terminal and as Markdown, and the ideal ones that need no run."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokensieve.pipeline.bench.flops import cache_bytes, encoder_flops, prefill_flops
from tokensieve.pipeline.bench.presets import encoder_sizes, language_sizes
from tokensieve.pipeline.bench.summary import PHASES
from tokensieve.pipeline.bench.workload import TEXT_TOKENS, num_pictures, num_visual, side_of
from tokensieve.pipeline.machine import processor_name

NOTES = """
- read: the clip (H.264, one keyframe in at most 250 frames) is decoded and made pixel tensors. encode: vision tower
  and projector. select: the method at the projector, and putting the shorter prompt together. prefill: up to the first
  new token, with the work of a method inside the language model. decode: up to the last new token.
- Seconds are medians on the wall, fastest to slowest behind them; those of read and encode are shared by settings that
  have the same encoding. cpu of all: processor seconds of the process (decoding runs in another), all phases of the
  longest answer together.
- speed-up: over all tokens. ideal: FLOPs with all tokens over FLOPs left in the model. eta: fraction of the ideal
  saving achieved; 1 if every FLOP left out became time. Choosing counts as prefill. Of decode the ideal is a ratio of
  bytes (weights, keys and values).
- peak MiB: the highest peak of memory in select, prefill and decode above what was in use with the weights loaded; it
  holds the encoded clip and what was recorded of the tower as well.
- Weights are random unless the folder had some, so methods whose choice depends on content may meet other content
  than they would in use; lengths of those that do not meet their budget exactly are their own.
""".strip()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, the names of the columns, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", _row(self.columns), _row(["---"] * len(self.columns))]
        return "\n".join([*lines, *map(_row, self.rows)])

    def print(self, console) -> None:
        """On a rich console."""
        from rich.table import Table as RichTable

        table = RichTable(*self.columns, title=self.title, header_style="bold", title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables_of(points: Sequence[dict], growth: Sequence[dict], *, spread: bool = True) -> list[Table]:
    """Gains and times at every number of frames and batch size, and the growth of memory for several lengths.

    Args:
        points, growth: what `summary` makes.
        spread: fastest and slowest beside every median.
    """
    groups: dict[tuple, dict[tuple, list[dict]]] = {}
    for point in points:  # of one setting, one point for each length of the answer
        group = groups.setdefault((point["frames"], point["batch"]), {})
        group.setdefault((point["method"], point["keep"]), []).append(point)
    tables = []
    for (frames, batch), settings in groups.items():
        where = f"{_count(frames, 'frame')}, batch {batch}"
        tables += [_gain_table(settings.values(), where), _time_table(settings.values(), where, spread)]
    return tables + ([_growth_table(growth)] if growth else [])


def _gain_table(settings: Iterable[list[dict]], where: str) -> Table:
    rows = []
    for points in settings:
        point = points[0]
        tokens, gain = point["tokens"], point["gain"]
        shown = f"{tokens['visual']:g}"
        if tokens["visual_last_layer"] != tokens["visual"]:
            shown += f" → {tokens['visual_last_layer']:g}"
        rows.append(
            (
                *_name(point),
                f"{shown} of {tokens['visual_full']}",
                f"{tokens['prompt']:g} of {tokens['prompt_full']}",
                _triple(gain["encode"]),
                _triple(gain["prefill"]),
                _number(point["gain_cpu"]["prefill"]["eta"]),
                f"{100 * gain['select_share_of_full_prefill']:.1f}",
                *(f"{p['gain']['decode']['speedup']:.2f} / {p['gain']['decode']['ideal']:.2f}" for p in _long(points)),
                *(_triple(p["gain"]["total"]) for p in points),
            )
        )
    return Table(
        title=f"Gain, {where}: speed-up / ideal / eta",
        columns=("method", "keep", "visual tokens", "prompt tokens", "tower", "prefill", "its eta by cpu")
        + ("select, % of full prefill",)
        + tuple(f"decode to {p['new_tokens']}" for p in _long(points))
        + tuple(f"end to end, {_count(p['new_tokens'], 'new token')}" for p in points),
        rows=rows,
    )


def _time_table(settings: Iterable[list[dict]], where: str, spread: bool) -> Table:
    def cell(seconds: dict[str, float]) -> str:
        edges = f" ({seconds['min']:.3f}-{seconds['max']:.3f})" if spread else ""
        return f"{seconds['median']:.3f}{edges}"

    rows = []
    for points in settings:
        last = points[-1]
        peaks = [last["peak_bytes_above_weights"][phase] for phase in ("select", "prefill", "decode")]
        rows.append(
            (
                *_name(last),
                *(cell(last["seconds"][phase]) for phase in ("read", "encode", "select", "prefill")),
                *(cell(p["seconds"]["decode"]) for p in _long(points)),
                *(f"{p['seconds']['total']:.3f}" for p in points),
                f"{sum(last['seconds'][phase]['cpu'] for phase in PHASES):.3f}",
                "-" if None in peaks else f"{max(peaks) / 2**20:,.0f}",
            )
        )
    return Table(
        title=f"Seconds and memory, {where}",
        columns=("method", "keep", "read", "encode", "select", "prefill")
        + tuple(f"decode to {p['new_tokens']}" for p in _long(points))
        + tuple(f"total, {_count(p['new_tokens'], 'new token')}" for p in points)
        + ("cpu of all", "peak MiB"),
        rows=rows,
    )


def _long(points: Sequence[dict]) -> list[dict]:
    """Those with more than the token that ends the prefill."""
    return [point for point in points if point["new_tokens"] > 1]


def _growth_table(growth: Sequence[dict]) -> Table:
    lengths = sorted({length for row in growth for length in row["visual_tokens"]})
    rows = []
    for row in growth:
        peaks = dict(zip(row["visual_tokens"], row["peak_bytes_above_weights"], strict=True))
        mib = [f"{peaks[length] / 2**20:,.0f}" if length in peaks else "-" for length in lengths]
        rows.append((*_name(row), str(row["batch"]), *mib, f"{row['exponent']:.2f}"))
    return Table(
        title="Growth of memory: peak MiB of select and prefill above the weights (exponent 1: as the tokens; 2: as "
        "their square)",
        columns=("method", "keep", "batch", *(f"{length} visual tokens" for length in lengths), "exponent"),
        rows=rows,
    )


def ideal_table(config, name: str, frames: Sequence[int], keeps: Sequence[float], number_bytes: int) -> Table:
    """What tokens dropped before the language model can save at best, from the sizes of a config alone."""
    from tokensieve.compression import num_to_keep

    language, encoder = language_sizes(config), encoder_sizes(config, side_of(config))
    rows = []
    for count in frames:
        visual, encode = num_visual(config, count), encoder_flops(encoder, num_pictures(config, count))
        full = prefill_flops(language, visual + TEXT_TOKENS)
        for keep in sorted({1.0, *keeps}, reverse=True):
            kept = visual if keep == 1 else num_to_keep(keep, visual)
            left = prefill_flops(language, kept + TEXT_TOKENS)
            cache = cache_bytes(language, kept + TEXT_TOKENS, number_bytes)
            rows.append(
                (
                    str(count),
                    f"{keep:g}",
                    str(kept),
                    str(kept + TEXT_TOKENS),
                    _tera(encode),
                    _tera(left),
                    f"{full / left:.2f}",
                    f"{(encode + full) / (encode + left):.2f}",
                    f"{cache / 2**20:,.0f}",
                )
            )
    return Table(
        title=f"Ideal of {name}: nothing was run",
        columns=("frames", "keep", "visual tokens", "prompt tokens", "encoder TFLOP", "prefill TFLOP")
        + ("ideal prefill", "ideal end to end", "cache MiB"),
        rows=rows,
    )


def machine(device) -> dict[str, object]:
    """What the numbers were measured on."""
    import torch
    import transformers

    from tokensieve import __version__

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokensieve": __version__,
    }


def head(run: dict, refused: dict[str, str]) -> str:
    """The paragraph above the tables."""
    about = run["machine"]
    text = (
        f"{run['model']}, {run['weights']} weights, {run['dtype']}, on {about['device']}, {about['threads']} "
        f"thread(s); Python {about['python']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"tokensieve {about['tokensieve']}. Medians of {_count(run['repeats'], 'repeat')} in turns after a warm-up on "
        "few frames."
    )
    if refused:
        text += "\n\nCannot run here:\n\n" + "\n".join(f"- `{name}`: {why}" for name, why in refused.items())
    return text


def _name(point: dict) -> tuple[str, str]:
    return point["method"] or "all tokens", f"{point['keep']:g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}" if flops < 1e12 else f"{flops / 1e12:.2f}"


def _triple(gain: dict) -> str:
    return f"{gain['speedup']:.2f} / {gain['ideal']:.2f} / {_number(gain['eta'])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
