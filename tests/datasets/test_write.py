import numpy as np
import pytest

from tests.datasets.conftest import pictures
from tokensieve.datasets import read_video, write_video
from tokensieve.errors import BadOption


@pytest.mark.parametrize("height, width", [(48, 64), (47, 63), (1, 1), (33, 32)])
@pytest.mark.parametrize("fps", [25, 12.5, 30000 / 1001])
def test_round_trip(tmp_path, height, width, fps):
    frames = np.repeat(pictures(6, height, width)[:, :, :, :1], 3, axis=3)  # grey: chroma is not kept in full
    path = tmp_path / "x.mp4"
    write_video(path, frames, fps, crf=1)
    result = read_video(path, num_frames=6)
    assert result.data.shape[1:3] == (height + height % 2, width + width % 2)
    np.testing.assert_allclose(result.times_s, np.arange(6) / fps, atol=1e-4)
    assert np.abs(result.data[:, :height, :width].astype(int) - frames).mean() < 3
    assert b"moov" in path.read_bytes()[:200]  # index first


def test_any_memory_layout(tmp_path):
    frames = pictures(4).transpose(0, 2, 1, 3)[:, ::-1]
    write_video(tmp_path / "a.mp4", frames, 5)
    write_video(tmp_path / "b.mp4", np.ascontiguousarray(frames), 5)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"
    write_video(path, pictures(3), 5)
    before = path.read_bytes()
    monkeypatch.setattr("tokensieve.datasets.write._encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_video(path, pictures(9), 5)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


@pytest.mark.parametrize(
    "frames, fps",
    [
        (np.zeros((0, 4, 4, 3), np.uint8), 5),
        (np.zeros((2, 4, 4), np.uint8), 5),
        (np.zeros((2, 4, 4, 4), np.uint8), 5),
        (np.zeros((2, 4, 4, 3), np.float32), 5),
        (pictures(2), 0),
        (pictures(2), float("nan")),
        (pictures(2), -1),
    ],
)
def test_nonsense(tmp_path, frames, fps):
    with pytest.raises(BadOption):
        write_video(tmp_path / "x.mp4", frames, fps)
    assert not list(tmp_path.iterdir())
