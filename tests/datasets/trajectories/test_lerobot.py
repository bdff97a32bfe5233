"""LeRobot datasets in both layouts, as they should be and as an enemy or an accident would leave them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.datasets.conftest import decode_all
from tests.datasets.trajectories.lerobot_files import (
    CAMERAS,
    FEATURES,
    LENGTHS,
    TASKS,
    episode_pictures,
    episode_rows,
    write_21,
    write_30,
)
from tokensieve.datasets import Limits
from tokensieve.datasets.trajectories import open_lerobot
from tokensieve.datasets.trajectories.lerobot_meta import fill_template
from tokensieve.errors import BadMedia, BadOption, MediaNotAllowed, MediaNotFound, MediaTooLarge


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lerobot")
    return {"v2.1": write_21(folder / "old"), "v3.0": write_30(folder / "new")}


@pytest.fixture(params=["v2.1", "v3.0"])
def folder(made, request, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made[request.param], tmp_path / "copy"))


def change_info(folder: Path, **changes) -> None:
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_rows(path: Path, **columns) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, path, row_group_size=5)


def first_rows(folder: Path) -> Path:
    return sorted((folder / "data").glob("*/*.parquet"))[0]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_every_number_of_every_episode(made, version):
    dataset = open_lerobot(made[version])
    assert len(dataset) == 3 and dataset.meta.version == version and dataset.meta.fps == 10
    assert dataset.meta.tasks == {0: TASKS[0], 1: TASKS[1]}
    for k, trajectory in enumerate(dataset):
        at = np.arange(LENGTHS[k])
        assert len(trajectory) == LENGTHS[k] and set(trajectory.cameras) == set(CAMERAS)
        np.testing.assert_allclose(trajectory.timestamps_s, at / 10, atol=1e-6)
        np.testing.assert_array_equal(trajectory.actions["action"], np.stack([100 * k + at, -at], -1))
        np.testing.assert_array_equal(trajectory.info["observation.state"], 1000 * k + at[:, None] * 6 + np.arange(6))
        assert trajectory.info["next.reward"].shape == (LENGTHS[k], 1)
        assert trajectory.info["next.done"].dtype == bool and trajectory.info["next.done"][:, 0].sum() == 1
        np.testing.assert_array_equal(trajectory.info["frame_index"], at)
        np.testing.assert_array_equal(trajectory.info["index"], at + sum(LENGTHS[:k]))
        assert trajectory.instruction == TASKS[k % 2]
    assert trajectory.notes == ("it has 2 tasks; the instruction is the first one",)
    assert trajectory.info["task_index"].tolist() == [0] * 15 + [1] * 5
    assert dataset[-1].name == dataset[2].name and dataset[0].notes == ()
    with pytest.raises(IndexError):
        dataset[3]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_pictures_are_those_of_their_steps(made, version):
    dataset = open_lerobot(made[version])
    for k, camera in ((0, 0), (1, 1), (2, 0)):
        trajectory = dataset[k]
        piece = dataset.meta.episodes[k].videos[CAMERAS[camera]]
        stored, times_s = decode_all(piece.path)
        stored = stored[np.searchsorted(times_s, piece.start - 1e-6) :][: LENGTHS[k]]
        for window in ((0, None), (3, 6), (LENGTHS[k] - 1, None)):
            np.testing.assert_array_equal(trajectory.frames(*window, camera=CAMERAS[camera]), stored[slice(*window)])
        # the right ones, too, and not only what the file has there
        error = np.abs(stored.astype(int) - episode_pictures(k, camera)).mean()
        assert error < 12 < np.abs(stored.astype(int) - episode_pictures(k, 1 - camera)).mean() + 12
    assert dataset[1].window(2, 5).frames(camera=CAMERAS[0]).shape == (3, 48, 64, 3)


def test_rows_that_come_in_many_batches(made, monkeypatch):
    from tokensieve.datasets.trajectories import columns

    whole = open_lerobot(made["v3.0"])
    for size in (1, 4, 7):
        expected = [trajectory.actions["action"] for trajectory in whole]
        monkeypatch.setattr(columns, "_BATCH_ROWS", size)
        for trajectory, values in zip(whole, expected, strict=True):
            np.testing.assert_array_equal(trajectory.actions["action"], values)
        monkeypatch.undo()


def test_task_texts_in_an_index_without_a_name(tmp_path):
    assert open_lerobot(write_30(tmp_path / "a", named_index=False))[1].instruction == TASKS[1]


def test_a_task_without_a_text(made, tmp_path):
    folder = Path(shutil.copytree(made["v2.1"], tmp_path / "a"))
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": ""}\n{"task_index": 1, "task": "b"}')
    dataset = open_lerobot(folder)
    assert dataset.meta.tasks == {0: "", 1: "b"} and [t.instruction for t in dataset] == [None, "b", None]
    for broken in (
        '{"task_index": 0}',
        '{"task": "a"}',
        '{"task_index": 0, "task": 3}',
        '{"task_index": 1, "task": ""}',
    ):
        (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 1, "task": "b"}\n' + broken)
        with pytest.raises(BadOption, match="Line 2"):
            open_lerobot(folder)


def test_scaled_while_decoding_and_within_a_budget(made):
    small = open_lerobot(made["v3.0"], max_side=16)[2].frames(camera=CAMERAS[0])
    assert small.shape == (20, 12, 16, 3)
    with pytest.raises(MediaTooLarge):
        open_lerobot(made["v3.0"], limits=Limits(max_frames=19))[2].frames(camera=CAMERAS[0])


def test_pictures_in_the_rows_themselves(tmp_path, monkeypatch):
    """Datasets that were recorded without videos keep encoded images in the Parquet files."""
    from tokensieve.datasets.trajectories import lerobot

    folder = write_21(tmp_path / "a")
    features = {key: about for key, about in FEATURES.items() if key not in CAMERAS}
    features["observation.image"] = {"dtype": "image", "shape": [48, 64, 3], "names": None}
    change_info(folder, features=features, video_path=None)
    frames = episode_pictures(0, 0)
    cells = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({**episode_rows(0), "observation.image": cells}), first_rows(folder), row_group_size=5)
    trajectory = open_lerobot(folder)[0]
    assert list(trajectory.cameras) == ["observation.image"]
    np.testing.assert_array_equal(trajectory.frames(), frames)
    np.testing.assert_array_equal(trajectory.frames(4, 5), frames[4:5])
    with monkeypatch.context() as patched, pytest.raises(MediaTooLarge):
        patched.setattr(lerobot, "read_pictures", None)  # refused before anything is copied
        open_lerobot(folder, limits=Limits(max_frames=3))[0].frames()

    cells[6] = {"bytes": b"#EXTM3U\nfile:///etc/passwd", "path": None}
    pq.write_table(pa.table({**episode_rows(0), "observation.image": cells}), first_rows(folder))
    with pytest.raises(MediaNotAllowed, match="observation.image.*playlist"):
        open_lerobot(folder)[0].frames()
    cells[6] = {"bytes": None, "path": "/etc/hostname"}
    pq.write_table(pa.table({**episode_rows(0), "observation.image": cells}), first_rows(folder))
    with pytest.raises(BadOption, match="pictures themselves"):
        open_lerobot(folder)[0].frames()


def test_what_is_not_read_is_said(folder):
    features = {key: dict(about) for key, about in FEATURES.items()}
    features[CAMERAS[1]]["info"] = {"video.is_depth_map": True}
    features["events"] = {"dtype": "language", "shape": [1], "names": None}
    change_info(folder, features=features)
    path = first_rows(folder)
    table = pq.read_table(path)
    pq.write_table(table.append_column("events", pa.array([[{"role": "user"}]] * len(table))), path)
    trajectory = open_lerobot(folder)[0]
    assert list(trajectory.cameras) == [CAMERAS[0]]
    assert trajectory.notes == (
        f"{CAMERAS[1]!r} holds distances and is not read",
        "column 'events' is of a kind that is not read",
    )


def test_rows_of_two_axes_and_of_text(folder):
    change_info(
        folder,
        features={
            **FEATURES,
            "grid": {"dtype": "int32", "shape": [2, 3], "names": None},
            "phase": {"dtype": "string", "shape": [1], "names": None},
        },
    )
    path = first_rows(folder)
    table = pq.read_table(path)
    grid = np.arange(len(table) * 6).reshape(-1, 2, 3)
    table = table.append_column("grid", pa.array(grid.tolist(), type=pa.list_(pa.list_(pa.int32(), 3))))
    pq.write_table(table.append_column("phase", pa.array([f"p{k}" for k in range(len(table))])), path)
    trajectory = open_lerobot(folder)[0]
    np.testing.assert_array_equal(trajectory.info["grid"], grid[: LENGTHS[0]])
    assert trajectory.info["phase"].tolist() == [f"p{k}" for k in range(LENGTHS[0])]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebase_version": "v2.0"}, "'v2.0'; v2.1 and v3.0 are read"),
        ({"codebase_version": None}, "version 'None'"),
        ({"fps": 0}, "fps must be"),
        ({"fps": True}, "fps must be"),
        ({"fps": "30"}, "fps must be"),
        ({"features": {}}, "at least one feature"),
        ({"features": {"action": {"dtype": "float32"}}}, "a list as its shape"),
        ({"features": {"action": {"dtype": "float32", "shape": [-1]}}}, "has the shape"),
        ({"features": {"action": {"dtype": "float32", "shape": [1 << 30, 1 << 30]}}}, "has the shape"),
        ({"total_episodes": 4}, "promises 4 episodes, and meta/ describes 3"),
        ({"data_path": 7}, "must be a text"),
        ({"data_path": "{secret}.parquet"}, "names 'secret'"),
        ({"data_path": "data/{video_key.__class__}.parquet"}, "has more in it"),
        ({"data_path": "data/{0}.parquet"}, "names '0'"),
        ({"data_path": "/etc/passwd"}, "leads outside"),
        ({"data_path": "../other/data.parquet"}, "leads outside"),
        ({"data_path": "data/../../x.parquet"}, "leads outside"),
        ({"video_path": "../{video_key}.mp4"}, "leads outside"),
        ({"video_path": "x\0.mp4"}, "leads outside"),
    ],
)
def test_an_info_that_is_refused(folder, changes, words):
    change_info(folder, **changes)
    with pytest.raises(BadOption, match=words):
        open_lerobot(folder)


def test_a_camera_with_a_name_that_leads_outside(made, tmp_path):
    folder = Path(shutil.copytree(made["v2.1"], tmp_path / "a"))
    change_info(folder, features={"../../x": {"dtype": "video", "shape": [1, 1, 3]}}, video_path="{video_key}")
    with pytest.raises(BadOption, match="leads outside"):
        open_lerobot(folder)


def test_templates_are_filled_by_hand():
    assert fill_template("a/{k:03d}/{key}-{k:06d}{k}", {"k": 12, "key": "x.y"}) == "a/012/x.y-00001212"
    for template in ("{k:099d}", "{k!r}", "{k:>5}", "{{k}}", "{", "{k:1000000000d}"):
        with pytest.raises(BadOption):
            fill_template(template, {"k": 1})


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"\ud800'])
def test_an_info_that_is_no_object(folder, text):
    (folder / "meta" / "info.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadOption, match=r"info\.json"):
        open_lerobot(folder)


def test_an_info_that_is_too_long(folder, monkeypatch):
    from tokensieve.datasets.trajectories import lerobot_meta

    monkeypatch.setattr(lerobot_meta, "_MAX_INFO_BYTES", 100)
    with pytest.raises(BadOption, match="more than 100 bytes"):
        open_lerobot(folder)


def test_links_out_of_the_dataset_are_refused(folder, tmp_path):
    secret = tmp_path / "secret.parquet"
    first_rows(folder).rename(secret)
    dataset = open_lerobot(folder)
    dataset.meta.episodes[0].rows.path.symlink_to(secret)
    with pytest.raises(MediaNotAllowed, match="outside"):
        dataset[0]
    # a video, and what is under meta/
    piece = dataset.meta.episodes[2].videos[CAMERAS[0]]
    moved = tmp_path / "secret.mp4"
    piece.path.rename(moved)
    piece.path.symlink_to(moved)
    with pytest.raises(MediaNotAllowed, match="outside"):
        dataset[2].frames(camera=CAMERAS[0])
    for name in ("tasks.jsonl", "tasks.parquet", "info.json"):
        path = folder / "meta" / name
        if path.exists():
            path.rename(tmp_path / name)
            path.symlink_to(tmp_path / name)
            with pytest.raises(MediaNotAllowed, match=f"{name}.* outside"):
                open_lerobot(folder)
            path.unlink()
            (tmp_path / name).rename(path)
    assert len(open_lerobot(folder)) == 3


def test_links_within_the_cache_of_a_hub_are_followed(made, tmp_path):
    """Snapshots there link to blobs of the same repository."""
    snapshot = Path(shutil.copytree(made["v3.0"], tmp_path / "repo" / "snapshots" / "abc"))
    blobs = tmp_path / "repo" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    trajectory = open_lerobot(snapshot)[2]
    assert trajectory.frames(camera=CAMERAS[1]).shape == (20, 48, 64, 3)


def test_files_that_are_missing(folder):
    dataset = open_lerobot(folder)
    piece = dataset.meta.episodes[0].videos[CAMERAS[0]]
    piece.path.unlink()
    with pytest.raises(MediaNotFound):
        dataset[0].frames(camera=CAMERAS[0])
    first_rows(folder).unlink()
    with pytest.raises(BadOption, match="no file"):
        dataset[0]
    for path in (folder / "meta").iterdir():
        if path.name.startswith("tasks"):
            path.unlink()
    with pytest.raises(BadOption, match="lacks .*tasks"):
        open_lerobot(folder)
    with pytest.raises(BadOption, match=r"no meta/info\.json"):
        open_lerobot(folder / "data")


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("episode_index", lambda n: pa.array([1] * n), "row 0 belongs to episode 1"),
        ("timestamp", lambda n: pa.array([0.0] * n), "rise"),
        ("timestamp", lambda n: pa.array([None] * n, type=pa.float32()), "empty cells"),
        ("timestamp", lambda n: pa.array(["0"] * n), "no numbers in 'timestamp'"),
        ("action", lambda n: pa.array([[1.0]] * n), "each should be"),
        ("action", lambda n: pa.array([[1.0], [1.0, 2.0, 3.0]] * n)[:n], "lists of one length"),
        ("action", lambda n: pa.array([[1.0, 2.0], None] * n)[:n], "lists of one length"),
        ("action", lambda n: pa.array([[1.0, None]] * n), "empty cells"),
        ("task_index", lambda n: pa.array([9] * n), "has task 9"),
        ("next.reward", lambda n: pa.array(["x" * 20_000] * n), "texts of more"),
    ],
)
def test_rows_that_are_refused(folder, column, values, words):
    path = first_rows(folder)
    change_rows(path, **{column: values(pq.read_metadata(path).num_rows)})
    with pytest.raises(BadOption, match=words):
        open_lerobot(folder)[0]


def test_fewer_rows_than_meta_says(folder):
    path = first_rows(folder)
    pq.write_table(pq.read_table(path).slice(0, 9), path)
    with pytest.raises(BadOption, match="has 9 rows; rows 0 to 12"):
        open_lerobot(folder)[0]
    change_rows(path)
    pq.write_table(pq.read_table(path).drop_columns(["action"]), path)
    with pytest.raises(BadOption, match="no column 'action'"):
        open_lerobot(folder)[0]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadOption, match="damaged or not Parquet"):
        open_lerobot(folder)[0]


def test_a_small_file_that_stands_for_many_values(folder, monkeypatch):
    from tokensieve.datasets.trajectories import columns

    monkeypatch.setattr(columns, "MAX_VALUES", 2000)
    path = first_rows(folder)
    num_rows = pq.read_metadata(path).num_rows
    assert open_lerobot(folder)[0].actions["action"].shape == (12, 2)
    change_rows(path, action=pa.array([[0.0] * 1000] * num_rows))
    with pytest.raises(BadOption, match="2000 are read at most"):
        open_lerobot(folder)[0]


def test_a_video_that_does_not_fit_its_rows(folder):
    dataset = open_lerobot(folder)
    change_info(folder, fps=12)  # rows every 0.1 s, pictures asked for every 0.083 s
    with pytest.raises(BadMedia, match=r"12 from 0\.0000 to 1\.1000 s are needed, 12 from"):
        open_lerobot(folder)[0].frames(camera=CAMERAS[0])
    one, other = (dataset.meta.episodes[k].videos[CAMERAS[0]].path for k in (0, 2))
    shutil.copy(one, other)  # too short
    with pytest.raises(BadMedia, match="none were found"):
        dataset[2].frames(12, 20, camera=CAMERAS[0])


@pytest.mark.parametrize("options", [{"tolerance_s": 0}, {"tolerance_s": None}, {"max_side": 0}])
def test_options_that_are_refused(made, options):
    with pytest.raises(BadOption):
        open_lerobot(made["v2.1"], **options)


def test_lines_of_episodes_that_are_refused(made, tmp_path):
    folder = Path(shutil.copytree(made["v2.1"], tmp_path / "a"))
    path = folder / "meta" / "episodes.jsonl"
    lines = path.read_text().splitlines()
    for broken, words in (
        ([lines[1], lines[0], lines[2]], "episode 0 comes after episode 1"),
        ([lines[0], lines[0], lines[2]], "episode 0 comes after episode 0"),
        ([lines[0], lines[1], '{"episode_index": 2, "length": 0}'], "1 to 1000000 steps, got 0"),
        ([lines[0], lines[1], '{"episode_index": 2, "length": 1e9}'], "length must be a whole number"),
        ([lines[0], lines[1], '{"episode_index": -2, "length": 3}'], "episode_index must be a whole number"),
        ([lines[0], lines[1], '{"episode_index": 2, "length": 3, "tasks": "x"}'], "list of texts"),
    ):
        path.write_text("\n".join(broken))
        with pytest.raises(BadOption, match=words):
            open_lerobot(folder)


def test_it_says_what_it_is(made):
    assert repr(open_lerobot(made["v2.1"])).startswith("LeRobotDataset('old', v2.1, 3 episodes at 10 steps/s")
