"""From raw measurements to points: what a setting cost, what it gained over all tokens, and what it could have gained.

A point is one setting at one number of frames, batch size and answer length. For the tower ("encode"), the prefill
and the whole it has the speed-up that was achieved, the ideal one (FLOPs of all tokens over FLOPs that are left in the
model) and `eta`, the fraction of the ideal saving that was achieved (`flops.saved`). The method's own cost is in the
times: choosing counts as prefill. For decode the ideal is a ratio of bytes: weights, and keys and values before the
first new token. "gain" is by the wall clock, "gain_cpu" by processor time, which other processes disturb less.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tokensieve.pipeline.bench.flops import saved
from tokensieve.pipeline.bench.run import Facts, Result

PHASES = ("read", "encode", "select", "prefill", "decode")


def points(result: Result) -> list[dict[str, object]]:
    """Every point, the full prompt of each group first; methods that were refused are left out."""
    times, weights = _times(result), result.weight_bytes
    found = []
    for (frames, batch, number), facts in result.facts.items():
        setting = result.settings[number]
        if setting.method in result.refused:
            continue
        for new_tokens in sorted({key[3] for key in times if key[:3] == (frames, batch, number) and key[3]}):
            rows = {phase: times[frames, batch, number, new_tokens * (phase == "decode"), phase] for phase in PHASES}
            full = {phase: times[frames, batch, 0, new_tokens * (phase == "decode"), phase] for phase in PHASES}
            found.append(
                {
                    "frames": frames,
                    "batch": batch,
                    "new_tokens": new_tokens,
                    "method": setting.method or None,
                    "keep": setting.keep,
                    "stages": [repr(stage) for stage in setting.compression.stages] if setting.compression else [],
                    "tokens": {
                        "visual_full": facts.visual_full,
                        "visual": facts.visual,
                        "visual_last_layer": facts.visual_last_layer,
                        "prompt_full": facts.prompt_full,
                        "prompt": facts.prompt,
                    },
                    "seconds": {phase: _spread(rows[phase]) for phase in PHASES}
                    | {"total": sum(_median(rows[phase]) for phase in PHASES)},
                    "peak_bytes_above_weights": {phase: _peak(rows[phase], result.in_use_bytes) for phase in PHASES},
                    "flops": facts.flops | {"decode": sum(facts.step_flops[: new_tokens - 1])},
                    **{
                        name: _gains(rows, full, clock, facts, result.facts[frames, batch, 0], new_tokens, weights)
                        for name, clock in (("gain", "wall_s"), ("gain_cpu", "cpu_s"))
                    },
                }
            )
    return found


def growth(found: Sequence[dict]) -> list[dict[str, object]]:
    """How the peak of memory above the weights grows with the prompt, by setting; empty for a single prompt length.

    `exponent` is that of the tokens between the shortest and the longest prompt: 1 for memory in proportion, 2 for
    memory with their square.
    """
    by_setting: dict[tuple, dict[int, int]] = {}
    for point in found:
        peaks = point["peak_bytes_above_weights"]
        phases = ("select", "prefill")
        if any(peaks[phase] is None for phase in phases):
            continue
        key = (point["method"], point["keep"], point["batch"])
        of_length = by_setting.setdefault(key, {})
        length = point["tokens"]["visual_full"]
        of_length[length] = max(of_length.get(length, 0), *(peaks[phase] for phase in phases))
    table = []
    for (method, keep, batch), peaks in by_setting.items():
        short, long = min(peaks), max(peaks)
        if short == long or not peaks[short]:
            continue
        table.append(
            {
                "method": method,
                "keep": keep,
                "batch": batch,
                "visual_tokens": sorted(peaks),
                "peak_bytes_above_weights": [peaks[length] for length in sorted(peaks)],
                "exponent": math.log(peaks[long] / peaks[short]) / math.log(long / short),
            }
        )
    return table


def _times(result: Result) -> dict[tuple, list[dict]]:
    times: dict[tuple, list[dict]] = {}
    for row in result.rows:
        for number in row["settings"]:
            key = (row["frames"], row["batch"], number, row.get("new_tokens", 0), row["phase"])
            times.setdefault(key, []).append(row)
    return times


def _median(rows: Sequence[dict], name: str = "wall_s") -> float:
    return statistics.median(row[name] for row in rows)


def _spread(rows: Sequence[dict]) -> dict[str, float]:
    wall = [row["wall_s"] for row in rows]
    return {"median": _median(rows), "min": min(wall), "max": max(wall), "cpu": _median(rows, "cpu_s")}


def _peak(rows: Sequence[dict], in_use: int | None) -> int | None:
    if in_use is None or any(row["peak_bytes"] is None for row in rows):
        return None
    return max(0, max(row["peak_bytes"] for row in rows) - in_use)


def _gains(
    rows: dict[str, list],
    full: dict[str, list],
    clock: str,
    facts: Facts,
    full_facts: Facts,
    new_tokens: int,
    weight_bytes: int,
) -> dict[str, object]:
    steps = new_tokens - 1

    def flops(of: Facts) -> dict[str, int]:
        decode = sum(of.step_flops[:steps])
        return {
            "encode": of.flops["encode"],
            "prefill": of.flops["prefill"],
            "total": of.flops["encode"] + of.flops["prefill"] + decode,
        }

    def seconds(of: dict[str, list]) -> dict[str, float]:
        of = {phase: _median(of[phase], clock) for phase in PHASES}
        return {"encode": of["encode"], "prefill": of["select"] + of["prefill"], "total": sum(of.values())}

    before_s, after_s, before, after = seconds(full), seconds(rows), flops(full_facts), flops(facts)
    gains = {
        part: {
            "speedup": before_s[part] / after_s[part],
            "ideal": before[part] / after[part],
            "eta": saved(before_s[part], after_s[part], before[part], after[part]),
        }
        for part in before_s
    }
    gains["total"]["ideal_with_method"] = before["total"] / (after["total"] + facts.flops["method"])
    gains["select_share_of_full_prefill"] = _median(rows["select"], clock) / before_s["prefill"]
    if steps:
        gains["decode"] = {
            "speedup": _median(full["decode"], clock) / _median(rows["decode"], clock),
            "ideal": (weight_bytes + full_facts.cache_bytes) / (weight_bytes + facts.cache_bytes),
        }
    return gains
