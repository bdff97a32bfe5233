from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.pipeline.tiny_processors import make_vlm, noise
from tokensieve.errors import BadMedia
from tokensieve.pipeline.evaluation.chart import Point, Series, _log_ticks, _ticks, line_chart
from tokensieve.pipeline.evaluation.extremes import draw_extremes, extreme_clips
from tokensieve.pipeline.evaluation.findings import key_finding, loss_finding
from tokensieve.pipeline.evaluation.report import write_report
from tokensieve.pipeline.evaluation.summary import summarise, summarise_timings
from tokensieve.pipeline.evaluation.wording import count, duration, percent, points, shortened

HOSTILE = '<script>alert("1")</script><img src="https://evil.example/x.png" onerror=alert(1)>\'"&</style>'
VOID = {"meta", "img", "input"}


def answers(scores: dict[tuple[str, float], list], text: str = "", full: int = 64, kept=None) -> pa.Table:
    """Rows of answers.parquet: `scores` holds a list of exact scores, one a question, two questions a clip."""
    rows = []
    for setting, ((method, keep), values) in enumerate(scores.items()):
        for i, value in enumerate(values):
            failed = value is None
            rows.append(
                {
                    "setting": setting,
                    "method": method,
                    "keep": keep,
                    "clip": f"clip{i // 2}{text}",
                    "id": f"q{i:02d}{text}",
                    "question": f"What is it? {text}",
                    "kind": f"kind {i % 2}{text}",
                    "answers": ["four", f"4{text}"],
                    "choices": [],
                    "said": None if failed else f"said {value:g}{text}",
                    "exact": value,
                    "visual_tokens": None if failed else round(full * keep),
                    "visual_tokens_full": None if failed else full,
                    "prompt_tokens": None if failed else round(full * keep) + 9,
                    "kept": None if failed or kept is None else kept,
                    "error": "BadMedia: no" if failed else None,
                }
            )
    columns = {"choices": pa.list_(pa.string()), "kept": pa.list_(pa.int32()), "exact": pa.float64()}
    table = pa.Table.from_pylist(rows)
    return table.cast(pa.schema([f.with_type(columns.get(f.name, f.type)) for f in table.schema]))


def make_folder(out, scores, text: str = "", **options):
    """An evaluation's files, by the code that makes them in a run."""
    table = answers(scores, text, **options)
    seconds = {f"{part}_s": [0.01 * (1 + i) for i in range(len(table))] for part in ("read", "encode", "select")}
    timings = pa.table({"setting": table["setting"], **seconds, "generate_s": [0.5] * len(table)})
    summary = summarise(table, ["exact"], tokensieve="0", model=f"tiny{text}", data=f"clips{text}")
    timed = {**summarise_timings(timings, table), "machine": f"a machine{text}"}
    run = {"seed": 0, f"note{text}": text, "versions": {"torch": f"2{text}"}}
    for name, value in (("summary", summary), ("timings", timed), ("run", run)):
        (out / f"{name}.json").write_text(json.dumps(value))
    pq.write_table(table, out / "answers.parquet")
    return out


SCORES = {
    ("", 1.0): [1, 1, 1, 1, 0, 1, 1, 0],
    ("far", 0.5): [1, 1, 1, 1, 0, 1, 1, 0],
    ("far", 0.25): [1, 1, 1, 1, 1, 0, 1, 0],
    ("near", 0.5): [1, 0, 1, None, 0, 1, 1, 0],
    ("near", 0.25): [0, 0, 1, 0, 1, 0, 0, 1],
}


@dataclass
class Page(HTMLParser):
    """Elements, their attributes and the table of results."""

    elements: list[tuple[str, dict]] = field(default_factory=list)
    rows: dict[int, dict] = field(default_factory=dict)
    text: str = ""
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self.open, self.row, self.cell = [], None, None

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if "data-setting" in attributes:
            self.row = self.rows.setdefault(int(attributes["data-setting"]), {})
        if self.row is not None and tag in ("td", "th"):
            self.cell = self.row.setdefault(attributes.get("data-key", "method"), [attributes["data-value"], ""])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = None
        if tag == "tr":
            self.row = None

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data
        if self.cell is not None:
            self.cell[1] += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page.open
    return page


def drawn(out, vlm=None):
    class Record:
        def load(self):
            return noise(4)

    extremes = extreme_clips(out)
    ids = {picture.id for of in extremes.values() for picture in (*of.best, *of.worst)}
    return draw_extremes(vlm or make_vlm("llava_onevision"), dict.fromkeys(ids, Record()), extremes)


def test_the_numbers_of_the_page_are_those_of_the_summary(tmp_path):
    page = read(write_report(make_folder(tmp_path, SCORES)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    seconds = {s["setting"]: s["seconds"] for s in json.loads((tmp_path / "timings.json").read_text())["settings"]}
    assert sorted(page.rows) == [s["setting"] for s in summary["settings"]]
    for setting in summary["settings"]:
        row, score = page.rows[setting["setting"]], setting["scores"]["exact"]
        assert row["method"] == [setting["method"] or "", setting["method"] or "all tokens"]
        for name in ("keep", "visual_tokens", "prompt_tokens", "failed"):
            assert float(row[name][0]) == setting[name]
        assert row["visual_tokens"][1].split() == [count(setting["visual_tokens"]), "of", "64"]
        assert row["prompt_tokens"][1] == count(setting["prompt_tokens"])
        assert float(row["score"][0]) == score["mean"]
        shown = " ".join(row["score"][1].replace("\u202f", "").split())
        assert shown == f"{100 * score['mean']:.1f}% {100 * score['low']:.1f} to {100 * score['high']:.1f}"
        assert float(row["seconds"][0]) == seconds[setting["setting"]]["total"]
        if setting["method"] is None:
            assert row["difference"] == ["", "–"]
        else:
            difference = score["difference"]
            assert float(row["difference"][0]) == difference["mean"]
            told = [points(difference[end]) for end in ("mean", "low", "high")]
            assert row["difference"][1].split() == [told[0], told[1], "to", told[2]]
    kinds = [cell for s in summary["settings"] for cell in s["kinds"].values()]
    assert all(percent(cell["mean"]) in page.text for cell in kinds)
    assert page.rows[3]["failed"][1] == "1"
    machine = json.loads((tmp_path / "timings.json").read_text())["machine"]
    assert f"Times are medians on {machine}." in page.text and "versions.torch" in page.text


def test_the_page_reaches_for_nothing_outside(tmp_path):
    path = write_report(make_folder(tmp_path, SCORES, kept=[0, 5]), drawn(tmp_path))
    page = read(path)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    assert len(page.of("img")) > 8
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action", "background"):
            assert attributes.get(name, "data:").startswith("data:")
    plain = re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|//|@import|url\(", plain)


def test_only_the_pages_own_script_may_run(tmp_path):
    page = read(write_report(make_folder(tmp_path, SCORES)))
    (policy,) = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none'; img-src data:;")


def test_hostile_text_stays_text(tmp_path):
    scores = {(f"{method}{HOSTILE}" if method else "", keep): values for (method, keep), values in SCORES.items()}
    extremes = drawn(make_folder(tmp_path, scores, HOSTILE, kept=[0, 5]))
    page = read(write_report(tmp_path, extremes, command=f"tokensieve eval {HOSTILE}"))
    assert len(page.of("script")) == len(page.of("style")) == 1
    assert all(set(image) == {"src", "alt"} and image["src"].startswith("data:") for image in page.of("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for start in ("What is it? ", "said 1", "tiny", "clips", "kind 1", "far", "q04", "a machine", "eval ", "note", "2"):
        assert start + HOSTILE in page.text


def test_long_text_and_line_ends_are_tamed():
    assert shortened("a \n\t b\u202e\u2066c") == "a bc"
    assert len(shortened("x" * 10_000)) == 300


def test_equal_input_gives_equal_bytes(tmp_path):
    make_folder(tmp_path, SCORES, kept=[0, 5])
    first = write_report(tmp_path, drawn(tmp_path)).read_bytes()
    assert write_report(tmp_path, drawn(tmp_path)).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def summary_of(scores) -> dict:
    return summarise(answers(scores), ["exact"], tokensieve="0", model="m", data="d")


def test_key_finding_names_the_best_and_says_whether_it_is_settled():
    found = key_finding(summary_of(SCORES))
    assert found.startswith("With 16 of 64 visual tokens (keep 0.25), far keeps most: 75.0")
    assert "The next best, near, reaches 37.5" in found
    apart = {("", 1.0): [1] * 8, ("good", 0.1): [1] * 8, ("bad", 0.1): [0] * 8}
    assert "intervals do not overlap" in key_finding(summary_of(apart))
    close = {**apart, ("bad", 0.1): [1, 1, 1, 1, 1, 1, 0, 0]}
    assert "intervals overlap, so this run does not settle" in key_finding(summary_of(close))
    assert "keeps most" in key_finding(summary_of({k: v for k, v in apart.items() if k[0] != "bad"}))
    assert "nothing to compare" in key_finding(summary_of({("", 1.0): [1, 0]}))


def test_loss_finding_names_the_fewest_tokens_that_do():
    scores = {("", 1.0): [1] * 8, ("a", 0.5): [1] * 8, ("a", 0.25): [1, 1, 1, 0] * 2, ("a", 0.1): [0] * 8}
    assert "loss: 32, by a at keep 0.5. It scores 0.0 points" in loss_finding(
        summary_of({**scores, ("a", 0.25): [0] * 8})
    )
    assert "a at keep 0.25" in loss_finding(summary_of({**scores, ("a", 0.25): [1, 1, 1, 1, 1, 1, 1, 0]}))
    lost = {("", 1.0): [1] * 8, ("a", 0.1): [0] * 8}
    assert loss_finding(summary_of(lost)) == "Every method lost measurably at every budget that was tried."


@pytest.mark.parametrize(
    "scores",
    [
        {("", 1.0): [1, 0]},
        {("", 1.0): [1, 0], ("a", 0.5): [1, 1]},  # one clip: no interval
        {("", 1.0): [1, 0, 1], ("a", 0.5): [None, None, None]},
        {("", 1.0): [None, None], ("a", 0.5): [None, None]},
        {("", 1.0): [0, 0, 0], ("a", 0.5): [0, 0, 0]},
        {("", 1.0): [1, 1, 1], ("a", 64): [1, 1, 1]},  # a number of tokens; all of them the same score
    ],
)
def test_little_or_nothing_to_show_is_a_page_all_the_same(tmp_path, scores):
    make_folder(tmp_path, scores)
    page = read(write_report(tmp_path, extreme_clips(tmp_path)))
    assert len(page.rows) == len(scores)
    assert "nan" not in page.text.lower() and "None" not in page.text


def test_of_many_methods_the_best_are_in_colour_and_each_can_be_seen(tmp_path):
    values = {f"m{i}": [1] * (10 - i) + [0] * i for i in range(9)}
    page = read(write_report(make_folder(tmp_path, {("", 1.0): [1] * 10} | {(m, 0.1): v for m, v in values.items()})))
    boxes = [box for box in page.of("input") if box["type"] == "checkbox"]
    assert [box["id"] for box in boxes if "checked" in box] == ["m0", "m1", "m2", "m3", "m4"]
    assert [label["for"] for label in page.of("label")] == [box["id"] for box in boxes] and len(boxes) == 9
    drawn_series = [g["class"].split()[1] for g in page.of("g") if g.get("class", "").startswith("series")]
    assert sorted(drawn_series) == sorted([box["id"] for box in boxes] * 2)  # both charts
    assert drawn_series[8] == "m0"  # the best is drawn last, on top


def test_tables_and_pictures_can_be_read_without_seeing(tmp_path):
    page = read(write_report(make_folder(tmp_path, SCORES, kept=[0, 5]), drawn(tmp_path)))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.of("svg"))
    frames = [div for div in page.of("div") if div.get("class") == "frames"]
    assert frames and all(div["role"] == "img" and "frames of clip" in div["aria-label"] for div in frames)


def test_extremes_are_the_largest_changes_one_a_clip(tmp_path):
    scores = {
        ("", 1.0): [0.5, 0.0, 0.5, 0.5, 1.0, None, 1.0, 1.0],
        ("a", 0.5): [0.0] * 8,
        ("a", 0.1): [1.0, 1.0, 1.0, 0.9, 0.0, 1.0, None, 0.8],
    }
    (found,) = extreme_clips(make_folder(tmp_path, scores, kept=[3])).values()
    assert (found.keep, found.better, found.worse, found.equal) == (0.1, 4, 2, 0)
    assert [(p.id, p.gain) for p in found.best] == [("q01", 1.0), ("q02", 0.5)]
    assert [(p.id, p.clip) for p in found.worst] == [("q04", "clip2"), ("q07", "clip3")]
    best = found.best[0]
    assert (best.said_all, best.said, best.answers, best.kept) == ("said 0", "said 1", ("four", "4"), (3,))
    assert (best.visual_tokens, best.visual_tokens_full) == (6, 64)
    text = " ".join(read(write_report(tmp_path, {"a": found})).text.split())
    assert "four / 4 All 64 tokenssaid 0 ✗ 6 tokenssaid 1 ✓" in text
    assert "All 64 tokenssaid 0.5 50.0 % 6 tokenssaid 1 ✓" in text
    assert "of 6 questions 4 went better, 2 worse" in text


def test_ties_go_by_id(tmp_path):
    scores = {("", 1.0): [0] * 6, ("a", 0.5): [1] * 6}
    (found,) = extreme_clips(make_folder(tmp_path, scores)).values()
    assert [p.id for p in found.best] == ["q00", "q02"] and not found.worst


def test_kept_places_are_drawn_on_the_frames(tmp_path):
    from tokensieve.datasets.frames import Frames

    bright = Frames(
        data=np.full((4, 16, 16, 3), 200, np.uint8), times_s=np.arange(4) / 2, duration_s=2.0, source="bright"
    )

    class Record:
        def load(self, num_frames):
            assert num_frames == 4
            return bright

    vlm = make_vlm("llava_onevision")
    (item,) = vlm.prepare(bright, "x").items
    (frames, height, width) = item.tokens.grids[0]
    assert frames == 4
    second = height * width  # the first place of the second frame
    make_folder(tmp_path, {("", 1.0): [0, 0], ("a", 0.1): [1, 0]}, kept=[0, second])
    (found,) = draw_extremes(vlm, {"q00": Record()}, extreme_clips(tmp_path), num_frames=4).values()
    drawn_frames = found.best[0].frames
    assert [f.label for f in drawn_frames] == ["0.00 s", "0.50 s", "1.00 s", "1.50 s"]
    assert [(f.kept, f.full) for f in drawn_frames] == [(i < 2, height * width) for i in range(4)]
    pixels = [np.asarray(Image.open(io.BytesIO(f.jpeg))).astype(int) for f in drawn_frames]
    assert all(picture[2, 2].min() > 180 and picture[14, 14].max() < 90 for picture in pixels[:2])
    assert all(picture.max() < 90 for picture in pixels[2:])


def test_methods_without_a_map_show_whole_frames_and_lost_clips_none(tmp_path):
    class Lost:
        def load(self):
            raise BadMedia("gone")

    class Large:
        def load(self):
            return noise(20, height=300, width=400)

    make_folder(tmp_path, {("", 1.0): [0, 0, 0], ("a", 0.1): [1, 0, 1]})
    records = {"q00": Large(), "q02": Lost()}
    (found,) = draw_extremes(make_vlm("llava_onevision"), records, extreme_clips(tmp_path)).values()
    whole, lost = found.best
    assert len(whole.frames) == 8 and whole.frames[0].kept is None and lost.frames == () and found.unmapped
    assert max(Image.open(io.BytesIO(whole.frames[0].jpeg)).size) == 160
    text = read(write_report(tmp_path, {"a": found})).text
    assert "The clip could not be drawn." in text and "there is no map of kept tokens" in text


def chart(log_x: bool = True) -> str:
    points = tuple(Point(x=x, y=y, low=y - 0.1, high=y + 0.1, title="") for x, y in ((10, 0.2), (100, 0.4)))
    reference = Point(x=1000, y=0.8, low=0.7, high=0.9, title="")
    return line_chart(
        [Series(key="m0", style=0, points=(*points, reference))],
        reference=reference,
        reference_label="all",
        description="d",
        x_title="x",
        y_title="y",
        x_text=count,
        y_text=percent,
        log_x=log_x,
    )


def test_chart_places_points_by_their_values():
    (line,) = re.findall(r'class="line" points="([^"]+)"', chart())
    (x1, y1), (x2, y2), (x3, y3) = [map(float, pair.split(",")) for pair in line.split()]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # equal ratios, equal steps
    assert y1 - y2 == pytest.approx((y2 - y3) / 2, abs=0.2)  # and heights are linear, upwards
    (band,) = re.findall(r'class="band" points="([^"]+)"', chart())
    heights = [float(pair.split(",")[1]) for pair in band.split()]
    assert len(heights) == 6 and all(h < y for h, y in zip(heights[:3], (y1, y2, y3), strict=True))
    (linear,) = re.findall(r'class="line" points="([^"]+)"', chart(log_x=False))
    (x1, _), (x2, _), (x3, _) = [map(float, pair.split(",")) for pair in linear.split()]
    assert (x3 - x2) / (x2 - x1) == pytest.approx(10, rel=0.05)


def test_ticks_are_round_numbers():
    assert _ticks(0.42, 0.97, outside=True) == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert _ticks(11, 49) == [20, 30, 40]
    assert _log_ticks(9.8, 196) == [10, 20, 50, 100, 196]


def test_wording():
    assert (percent(0.6121), percent(None)) == ("61.2\u202f%", "–")
    assert (points(0.005), points(-0.012), points(-0.0001), points(None)) == ("+0.5", "−1.2", "0.0", "–")
    assert (count(9.84), count(10.0), count(196.4), count(1234)) == ("9.8", "10", "196", "1,234")
    assert (duration(0.00123), duration(0.123), duration(1.5)) == ("1.2\u202fms", "123\u202fms", "1.50\u202fs")
