"""Damaged and hostile files: each row says what must come out. All files are made here."""

import os
import re
import socket
import struct
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.datasets.conftest import decode_all, encode, encode_audio, pictures, remux
from tokensieve.datasets import Limits, read_folder, read_image, read_media, read_video
from tokensieve.errors import (
    BadMedia,
    BadOption,
    MediaError,
    MediaNotAllowed,
    MediaNotFound,
    MediaTooLarge,
    NoVideoStream,
)

BACKENDS = ("pyav", "decord")


def refused(path, kind, **options) -> MediaError:
    """The error that reading `path` raises: one line, of exactly this class, not worth a second try."""
    with pytest.raises(kind) as caught:
        read_video(path, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value) and not re.search(r"0x[0-9a-f]{5}", str(caught.value))
    assert not caught.value.retryable
    return caught.value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", ["empty", "text", "random", "head", "zeros", "boxes", "magic"])
def test_no_media(bikes, tmp_path, content, backend):
    data = {
        "empty": b"",
        "text": b"just some text, nothing to see\n" * 50,
        "random": np.random.default_rng(1).bytes(20_000),
        "head": bikes.read_bytes()[:406],
        "zeros": bytes(5000),
        "boxes": b"\x00\x00\x00\x08ftyp" * 5000,
        "magic": b"\x1a\x45\xdf\xa3" + bytes(5000),
    }[content]
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    refused(path, BadMedia, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", [0.5, 0.95])
def test_cut_with_the_index_at_the_end(bikes, tmp_path, part, backend):
    data = bikes.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * part)])
    assert "index missing, file truncated" in str(refused(tmp_path / "cut.mp4", BadMedia, backend=backend))


def test_cut_with_the_index_first(index_first, tmp_path):
    data = index_first.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) // 2])
    result = read_video(path, num_frames=250, short="fewer")
    assert result.partial and 110 <= result.num_frames <= 117
    assert any("announces 250 frames" in note for note in result.notes)
    assert any("truncated" in note for note in result.notes)
    whole = decode_all(index_first)[0]
    np.testing.assert_array_equal(result.data[:110], whole[:110])
    few = read_video(path, num_frames=8)  # uniform over what exists
    assert few.partial and few.num_frames == 8 and 4.4 < few.times_s[-1] < 4.7
    refused(path, BadMedia, backend="decord", num_frames=250)


@pytest.mark.parametrize("index", ["first", "last"])
def test_zeros_in_the_middle(bikes, index_first, tmp_path, index):
    data = bytearray((index_first if index == "first" else bikes).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40_000] = bytes(40_000)
    path = tmp_path / "hole.mp4"
    path.write_bytes(data)
    result = read_video(path, num_frames=250, short="fewer")
    assert result.partial and 222 <= result.num_frames <= 224
    assert any("could not be decoded" in note for note in result.notes)
    whole = decode_all(bikes)[0]
    number_of = {round(t * 25): at for at, t in enumerate(result.times_s)}
    for number in (*range(115), *range(187, 250)):  # before the hole and from the next key frame on
        np.testing.assert_array_equal(result.data[number_of[number]], whole[number])
    filled = read_video(path, num_frames=250)
    assert filled.num_frames == 250 and (np.diff(filled.times_s) >= 0).all() and len(set(filled.times_s)) < 250
    with pytest.raises(BadMedia):
        read_video(path, num_frames=250, short="error")


def test_flipped_bytes_are_reported_and_can_be_dropped(bikes, tmp_path):
    data = bytearray(bikes.read_bytes())
    for position in np.random.default_rng(0).integers(60_000, len(data) - 20_000, 200):
        data[position] ^= 0xFF
    path = tmp_path / "flipped.mp4"
    path.write_bytes(data)
    result = read_video(path, num_frames=250, short="fewer")
    assert result.partial and result.num_frames > 200
    assert any("marked as damaged" in note for note in result.notes)
    clean = read_video(path, num_frames=250, short="fewer", drop_corrupt=True)
    assert clean.partial and 0 < clean.num_frames < result.num_frames


def test_matroska_without_a_count_and_cut(bikes, tmp_path):
    path = remux(bikes, tmp_path / "whole.mkv")
    assert not read_video(path).partial
    data = path.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 2 // 3])
    for backend in BACKENDS:
        result = read_video(tmp_path / "cut.mkv", num_frames=250, short="fewer", backend=backend)
        assert result.partial and 150 < result.num_frames < 170 and "truncated" in result.notes[0]


def test_cut_avi_and_a_count_that_is_too_high(tmp_path):
    path = encode(tmp_path / "a.avi", pictures(30), codec="mpeg4")
    assert not read_video(path).partial
    data = bytearray(path.read_bytes())
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    assert read_video(tmp_path / "cut.avi").partial
    header = data.index(b"strh") + 8
    data[header + 32 : header + 36] = struct.pack("<I", 3000)  # dwLength: decord #373 hangs on such files
    (tmp_path / "lie.avi").write_bytes(data)
    result = read_video(tmp_path / "lie.avi", num_frames=40, short="fewer")
    assert result.num_frames == 30 and result.partial and "announces 3000" in result.notes[0]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mp3.ts"])
def test_sound_only(tmp_path, name):
    refused(encode_audio(tmp_path / name), NoVideoStream)


def test_sound_files_by_their_first_bytes(tmp_path):
    for head in (b"RIFF\x00\x00\x00\x00WAVEfmt ", b"ID3\x04", b"fLaC"):
        (tmp_path / "x").write_bytes(head + bytes(500))
        refused(tmp_path / "x", NoVideoStream)


def test_unknown_decoder(tmp_path):
    path = encode(tmp_path / "x.avi", pictures(3), codec="cinepak", pix_fmt="rgb24")
    assert "no decoder" in str(refused(path, BadMedia))


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_frames_are_refused_before_decoding(tmp_path_factory, folder, backend):
    path = folder / "huge.mp4"
    if not path.exists():
        grey = np.zeros((1, 8192, 8192, 3), dtype=np.uint8)
        encode(path, grey, options={"preset": "ultrafast"})
    error = refused(path, MediaTooLarge, backend=backend)
    assert "8192x8192" in str(error) and str(2**25) in str(error)
    small = read_video(path, num_frames=1, max_side=256, limits=Limits(max_pixels=2**26))
    assert small.data.shape == (1, 256, 256, 3)


def test_results_that_are_too_big(clip):
    assert "max_total_bytes" in str(refused(clip, MediaTooLarge, limits=Limits(max_total_bytes=50_000)))
    assert "max_frames" in str(refused(clip, MediaTooLarge, num_frames=10**9))
    assert "max_frames" in str(refused(clip, MediaTooLarge, fps=1e6))
    assert "max_packets" in str(refused(clip, MediaTooLarge, limits=Limits(max_packets=20)))
    assert "max_file_bytes" in str(refused(clip, MediaTooLarge, limits=Limits(max_file_bytes=100)))


def test_a_size_that_changes_beyond_the_limit(tmp_path):
    """An MPEG-TS whose second half is bigger than its header: the limit holds for real frames, too."""
    small = encode(tmp_path / "small.ts", pictures(10, 48, 64))
    big = encode(tmp_path / "big.ts", pictures(10, 480, 640), pts=list(range(20, 30)))
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + big.read_bytes())
    result = read_video(path, num_frames=20, short="fewer")
    assert result.data.shape[1:3] == (48, 64) and any("size changes" in note for note in result.notes)
    bounded = read_video(path, num_frames=20, short="fewer", limits=Limits(max_pixels=100 * 100))
    assert bounded.partial and bounded.num_frames < result.num_frames


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile '{target}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:{port}/x.ts\n",
        "ffconcat version 1.0\nfile 'http://127.0.0.1:{port}/x.mp4'\n",
        "<?xml version='1.0'?><MPD><BaseURL>http://127.0.0.1:{port}/</BaseURL></MPD>",
        "[playlist]\nFile1={target}\n",
    ],
)
@pytest.mark.parametrize("name", ["x.mp4", "x.m3u8"])
def test_playlists_open_nothing(bikes, tmp_path, script, name, backend):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        path = tmp_path / name
        path.write_text(script.format(target=bikes, port=server.getsockname()[1]))
        refused(path, MediaNotAllowed, backend=backend)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/x", "https:\\\\x/y.mp4", "file:///etc/passwd", "concat:a.ts|b.ts", "rtsp://x/y", "data:,x"],
)
def test_urls(url):
    for read in (read_video, read_image, read_folder, read_media):
        with pytest.raises(MediaNotAllowed, match="only local files"):
            read(url)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", MediaNotAllowed)
    refused("/dev/zero", MediaNotAllowed)
    refused(tmp_path, MediaNotAllowed)
    (tmp_path / "folder.mp4").mkdir()
    refused(tmp_path / "folder.mp4", MediaNotAllowed)
    refused(tmp_path / "nothing.mp4", MediaNotFound)
    refused(tmp_path / ("long" * 100), MediaNotFound)
    refused(tmp_path / "pipe.mp4" / "below", MediaNotFound)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", MediaNotFound)
    for nonsense in ("", "a\0b", None, 3.5):
        with pytest.raises(BadOption):
            read_video(nonsense)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(clip, tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(clip.read_bytes())
    path.chmod(0)
    refused(path, MediaNotFound)


def test_links_and_root(clip, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "good.mp4").write_bytes(clip.read_bytes())
    (inside / "link.mp4").symlink_to(clip)
    (inside / "near.mp4").symlink_to(inside / "good.mp4")
    (tmp_path / "inside-not.mp4").write_bytes(clip.read_bytes())
    assert read_video(inside / "link.mp4", num_frames=1).num_frames == 1
    assert read_video(inside / "near.mp4", num_frames=1, root=inside).num_frames == 1
    for path in ("link.mp4", "../inside-not.mp4", "x/../../inside-not.mp4"):
        (inside / "x").mkdir(exist_ok=True)
        refused(inside / path, MediaNotAllowed, root=inside)


def test_a_file_swapped_for_a_pipe_meanwhile(clip, tmp_path):
    """The descriptor that was checked is the one that is read, so the race cannot be won."""
    path, pipe = tmp_path / "x.mp4", tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(clip)
    stop = threading.Event()

    def swap():
        for target in [clip, pipe] * 10_000:
            (tmp_path / "next").symlink_to(target)
            os.replace(tmp_path / "next", path)
            if stop.is_set():
                return

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        while not path.exists():
            time.sleep(0.01)
        for _ in range(20):
            try:
                assert read_video(path, num_frames=2, limits=Limits(timeout_s=30)).num_frames == 2
            except MediaNotAllowed:
                pass
    finally:
        stop.set()
        thread.join()


def test_random_damage_never_escapes(clip, tmp_path):
    """Any damage ends in frames or in a MediaError."""
    rng = np.random.default_rng(3)
    data = clip.read_bytes()
    path = tmp_path / "x.mp4"
    outcomes = set()
    for _ in range(40):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 60)):
            broken[position] = rng.integers(0, 256)
        path.write_bytes(broken[: rng.integers(len(data) // 2, len(data) + 1)] if rng.random() < 0.3 else broken)
        try:
            outcomes.add(read_video(path, num_frames=8, limits=Limits(timeout_s=30)).num_frames)
        except MediaError as error:
            outcomes.add(type(error).__name__)
        except BadOption as error:
            pytest.fail(f"damage blamed on the caller: {error}")
    assert 8 in outcomes and "BadMedia" in outcomes


def test_same_class_without_isolation(bikes, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(bikes.read_bytes()[:200_000])
    refused(path, BadMedia, isolate=False)
    refused("/dev/null", MediaNotAllowed, isolate=False)
    refused(bikes, MediaTooLarge, isolate=False, limits=Limits(max_pixels=1000))


def test_times_far_apart_do_not_overflow(tmp_path):
    path = encode(tmp_path / "far.mkv", pictures(3), pts=[0, 1, 2**40], time_base=Fraction(1, 1000))
    assert read_video(path, num_frames=2).times_s[-1] == pytest.approx(2**40 / 1000)
    refused(path, MediaTooLarge, fps=1000)


def test_metadata_that_is_no_text(tmp_path):
    """A title in a broken encoding says nothing about the pictures."""
    path = tmp_path / "title.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLETITLE"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert b"TITLETITLE" in data
    path.write_bytes(data.replace(b"TITLETITLE", b"\xff\xfe\xfd\xfc\xff\xfe\xfd\xfc\xff\xfe"))
    assert read_video(path).num_frames == 8
