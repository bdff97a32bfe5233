"""Episodes in arrays and the file of them; made up here, so that no environment is needed."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest

from tokensieve.datasets.trajectories import Episodes, read_episodes, write_episodes
from tokensieve.datasets.trajectories.tiles import NUM_COLOURS, NUM_STATES, NUM_TYPES, tile_ids
from tokensieve.errors import BadOption

LENGTHS = (3, 1, 4)


def made(seed: int = 0, **changes) -> Episodes:
    rng = np.random.default_rng(seed)
    num_steps = sum(LENGTHS)
    parts = {
        "grids": rng.integers(0, (NUM_TYPES, NUM_COLOURS, NUM_STATES), (num_steps, 7, 7, 3), dtype=np.uint8),
        "actions": rng.integers(0, 7, num_steps, dtype=np.uint8),
        "taken": rng.integers(0, 7, num_steps, dtype=np.uint8),
        "starts": np.array([0, 3, 4, 8]),
        "seeds": np.arange(3) + 100 * seed,
        "levels": np.array(["BabyAI-GoTo-v0", "BabyAI-Open-v0", "BabyAI-GoTo-v0"]),
        "missions": np.array(["go to the red ball", "öffne", ""]),
    }
    return Episodes(**{**parts, **changes})


def check_equal(one: Episodes, two: Episodes) -> None:
    for name in ("grids", "actions", "taken", "starts", "seeds", "levels", "missions"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_episodes_are_trajectories():
    episodes = made()
    assert len(episodes) == 3 and [len(t) for t in episodes] == list(LENGTHS)
    one = episodes[2]
    assert one.name == "BabyAI-GoTo-v0-2" and episodes[1].instruction == "öffne"
    np.testing.assert_array_equal(one.actions["action"], episodes.actions[4:])
    np.testing.assert_array_equal(one.actions["taken"], episodes.taken[4:])
    np.testing.assert_array_equal(one.info["grid"], episodes.grids[4:])
    np.testing.assert_array_equal(one.timestamps_s, np.arange(4.0))
    assert list(one.cameras) == ["view"] and episodes[-1].name == one.name
    with pytest.raises(IndexError):
        episodes[3]


def test_joining():
    joined = Episodes.join([made(0), made(1)])
    assert len(joined) == 6 and joined.starts.tolist() == [0, 3, 4, 8, 11, 12, 16]
    for k in range(3):
        np.testing.assert_array_equal(joined[3 + k].info["grid"], made(1)[k].info["grid"])
    with pytest.raises(BadOption):
        Episodes.join([])


def test_written_and_read(tmp_path):
    path = tmp_path / "some episodes.npz"
    write_episodes(path, made())
    write_episodes(path, made(1))  # over what is there
    check_equal(read_episodes(path), made(1))
    assert os.listdir(tmp_path) == [path.name]
    with np.load(path) as arrays:  # other tools can open it
        np.testing.assert_array_equal(arrays["grids"], made(1).grids)
    with pytest.raises(BadOption, match="no file"):
        read_episodes(tmp_path / "none.npz")


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def fail(*args, **arrays):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        write_episodes(tmp_path / "a.npz", made())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": np.zeros((8, 7, 7, 3), dtype=np.int64)}, "grids must be of kind 'u'"),
        ({"grids": np.zeros((8, 7, 6, 3), dtype=np.uint8)}, "grids must be"),
        ({"grids": np.full((8, 7, 7, 3), 11, dtype=np.uint8)}, "below 11, 6 and 4"),
        ({"grids": np.full((8, 7, 7, 3), 4, dtype=np.uint8)}, "below 11, 6 and 4"),
        ({"actions": np.full(8, 7, dtype=np.uint8)}, "actions must be below 7"),
        ({"taken": np.zeros(7, dtype=np.uint8)}, "taken must have 8 entries"),
        ({"starts": np.array([0, 3, 3, 8])}, "starts must rise"),
        ({"starts": np.array([1, 3, 4, 8])}, "starts must rise"),
        ({"starts": np.array([0, 3, 4, 9])}, "starts must rise"),
        ({"starts": np.array([0, 3, 8])}, "starts must have 4 entries"),
        ({"seeds": np.arange(3.0)}, "seeds must be of kind 'i'"),
        ({"missions": np.array([None, "a", "b"])}, "missions must be of kind 'U'"),
        ({"missions": ["a", "b", "c"]}, "must be an array, got list"),
        ({"missions": np.array(["a" * 1001] * 3)}, "at most 4000 bytes"),
    ],
)
def test_arrays_that_do_not_fit(changes, words):
    with pytest.raises(BadOption, match=words):
        made(**changes)


def rewritten(path, change) -> None:
    """The file with the bytes of some entries changed: change(name, bytes) -> bytes, or None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            content = change(name, content)
            if content is not None:
                archive.writestr(name, content)


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


@pytest.mark.parametrize(
    ("entry", "content", "words"),
    [
        ("grids.npy", None, "must consist of"),
        ("missions.npy", npy(np.array([_Evil()], dtype=object)), "missions must be of kind 'U'"),
        ("seeds.npy", npy(np.array([_Evil()], dtype=object)), "seeds must be of kind 'i'"),
        ("seeds.npy", npy(np.arange(3).astype(">i8")), "seeds must be of kind 'i'"),
        ("seeds.npy", npy(np.arange(4)), "starts must have 5 entries"),
        ("seeds.npy", npy(np.arange(3))[:-8], "does not fit its size"),
        ("seeds.npy", npy(np.arange(3)).replace(b"(3,)", b"(9,)"), "does not fit its size"),
        ("seeds.npy", npy(np.arange(3)).replace(b"(3,)", b"(-3,)"), "seeds"),
        ("grids.npy", npy(np.asfortranarray(np.zeros((8, 7, 7, 3), np.uint8))), "does not fit its size"),
        ("seeds.npy", b"\x93NUMPY\x02\x00" + npy(np.arange(3))[8:], "version"),
        ("seeds.npy", b"", "damaged"),
        ("seeds.npy", b"PK" * 40, "damaged"),
        ("missions.npy", npy(np.array(["abc"] * 3)).replace("c".encode("utf-32-le"), b"\xff\xff\xff\x7f"), "no text"),
    ],
)
def test_files_that_are_refused(tmp_path, monkeypatch, entry, content, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"
    write_episodes(path, made())
    rewritten(path, lambda name, old: content if name == entry else old)
    with pytest.raises(BadOption, match=words):
        read_episodes(path)
    assert not (tmp_path / "evil-was-here").exists()


def test_a_file_that_unpacks_to_more_than_it_may(tmp_path):
    path = tmp_path / "a.npz"
    write_episodes(path, made())
    with pytest.raises(BadOption, match="1000 are allowed"):
        read_episodes(path, max_bytes=1000)


@pytest.mark.parametrize("cut", [0, 10, 200, -30, -5])
def test_a_file_that_is_cut_off_or_no_archive(tmp_path, cut):
    path = tmp_path / "a.npz"
    write_episodes(path, made())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadOption, match="no episodes"):
        read_episodes(path)


def test_flipped_bytes_never_pass_unnoticed(tmp_path):
    path = tmp_path / "a.npz"
    write_episodes(path, made())
    good, num_refused = path.read_bytes(), 0
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        try:
            check_equal(read_episodes(path), made())  # bytes that mean nothing, such as dates
        except BadOption:
            num_refused += 1
    assert num_refused > 100


def test_tile_ids_tell_every_cell_apart():
    cells = np.stack(np.meshgrid(np.arange(11), np.arange(6), np.arange(4), indexing="ij"), -1).reshape(-1, 3)
    grids = np.zeros((len(cells), 7, 7, 3), dtype=np.uint8)
    grids[:, 2, 5], grids[:, 3, 6] = cells, cells
    ids = tile_ids(grids)
    assert ids.shape == (264, 7, 7) and ids.dtype == np.int64
    assert len({*ids[:, 5, 2].tolist(), *ids[:, 6, 3].tolist()}) == 528 and ids.max() == 527  # [row, column] now
    with pytest.raises(BadOption):
        tile_ids(grids.astype(np.int64))
