"""LeRobot datasets made on the spot, in both layouts, by what the format's description says."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.datasets.conftest import encode, pictures

FPS = 10
LENGTHS = (12, 7, 20)
TASKS = ("pick up the cup", "put it back")
CAMERAS = ("observation.images.front", "observation.images.wrist")
FEATURES = {
    **{key: {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channels"]} for key in CAMERAS},
    "observation.state": {"dtype": "float32", "shape": [6], "names": None},
    "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
    **{
        key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
        for key in ("timestamp", "frame_index", "episode_index", "index", "task_index")
    },
}


def episode_rows(episode: int) -> dict[str, pa.Array]:
    """Columns of one episode; every number tells where it belongs."""
    length, before = LENGTHS[episode], sum(LENGTHS[:episode])
    at = np.arange(length)
    actions = np.stack([100 * episode + at, -at], -1).astype(np.float32)
    states = (1000 * episode + at[:, None] * 6 + np.arange(6)).astype(np.float32)
    return {
        "action": pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 2),
        "observation.state": pa.array(states.tolist(), type=pa.list_(pa.float32())),
        "next.reward": pa.array((at == length - 1).astype(np.float32)),
        "next.done": pa.array(at == length - 1),
        "timestamp": pa.array((at / FPS).astype(np.float32)),
        "frame_index": pa.array(at),
        "episode_index": pa.array(np.full(length, episode)),
        "index": pa.array(at + before),
        "task_index": pa.array(np.full(length, episode % 2) if episode < 2 else np.where(at < 15, 0, 1)),
    }


def episode_pictures(episode: int, camera: int) -> np.ndarray:
    return pictures(LENGTHS[episode], seed=10 * camera + episode)


def _encode(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(path, frames, rate=FPS, time_base=Fraction(1, FPS), options={"g": "2", "crf": "10"})


def _write_info(folder: Path, version: str, changes: dict) -> None:
    info = {
        "codebase_version": version,
        "fps": FPS,
        "features": FEATURES,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "chunks_size": 2,
        **changes,
    }
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def write_21(folder: Path, **info) -> Path:
    """One file an episode, two episodes a chunk."""
    templates = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    _write_info(folder, "v2.1", {**templates, **info})
    tasks = [json.dumps({"task_index": k, "task": task}) for k, task in enumerate(TASKS)]
    (folder / "meta" / "tasks.jsonl").write_text("\n".join(tasks))
    lines = [json.dumps({"episode_index": k, "tasks": [TASKS[k % 2]], "length": n}) for k, n in enumerate(LENGTHS)]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    for episode in range(len(LENGTHS)):
        path = folder / f"data/chunk-{episode // 2:03d}/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(episode_rows(episode)), path, row_group_size=5)
        for camera, key in enumerate(CAMERAS):
            name = f"videos/chunk-{episode // 2:03d}/{key}/episode_{episode:06d}.mp4"
            _encode(folder / name, episode_pictures(episode, camera))
    return folder


def write_30(folder: Path, *, named_index: bool = True, **info) -> Path:
    """Episodes 0 and 1 share a file of rows, 1 and 2 a file of videos."""
    templates = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    _write_info(folder, "v3.0", {**templates, **info})
    name = "task" if named_index else "__index_level_0__"
    pq.write_table(pa.table({"task_index": [0, 1], name: list(TASKS)}), folder / "meta" / "tasks.parquet")
    for file, episodes in enumerate([(0, 1), (2,)]):
        path = folder / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables([pa.table(episode_rows(k)) for k in episodes]), path, row_group_size=5)
    for file, episodes in enumerate([(0,), (1, 2)]):
        for camera, key in enumerate(CAMERAS):
            frames = np.concatenate([episode_pictures(k, camera) for k in episodes])
            _encode(folder / f"videos/{key}/chunk-000/file-{file:03d}.mp4", frames)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    table = {
        "episode_index": [0, 1, 2],
        "tasks": [[TASKS[0]], [TASKS[1]], list(TASKS)],
        "length": list(LENGTHS),
        "dataset_from_index": starts[:-1],
        "dataset_to_index": starts[1:],
        "data/chunk_index": [0, 0, 0],
        "data/file_index": [0, 0, 1],
        "stats/action/min": [[0.0, 0.0]] * 3,
    }
    for key in CAMERAS:
        table |= {
            f"videos/{key}/chunk_index": [0, 0, 0],
            f"videos/{key}/file_index": [0, 1, 1],
            f"videos/{key}/from_timestamp": [0.0, 0.0, LENGTHS[1] / FPS],
            f"videos/{key}/to_timestamp": [LENGTHS[0] / FPS, LENGTHS[1] / FPS, (LENGTHS[1] + LENGTHS[2]) / FPS],
        }
    # two files of episodes, the way a long dataset has them
    for file, rows in enumerate([slice(0, 2), slice(2, 3)]):
        path = folder / f"meta/episodes/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({key: list(values)[rows] for key, values in table.items()}), path)
    return folder
