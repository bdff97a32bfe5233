from __future__ import annotations

import pytest

from tokensieve.datasets.trajectories import open_lerobot, refuse_minestudio, vpt_clips
from tokensieve.datasets.trajectories.minestudio import is_minestudio
from tokensieve.errors import BadOption


@pytest.mark.parametrize("place", ["action/part-0", "video/part-1336", "part-3", "image", "."])
def test_lmdb_folders_are_refused_with_the_reason(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "data.mdb").write_bytes(b"\0" * 16)
    (tmp_path / place / "lock.mdb").write_bytes(b"")
    assert is_minestudio(tmp_path)
    for reader in (refuse_minestudio, open_lerobot, vpt_clips):
        with pytest.raises(BadOption, match="runs code that its author chose.*read_vpt"):
            reader(tmp_path)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "data" / "chunk-000").mkdir(parents=True)
    (tmp_path / "data" / "chunk-000" / "data.parquet").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "none"):
        assert not is_minestudio(folder)
        refuse_minestudio(folder)
