"""Ordinary and odd but valid files: pixels and times against plain sequential decoding."""

import importlib.util
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.datasets.conftest import decode_all, encode, pictures, remux
from tokensieve.datasets import Frames, Limits, read_media, read_video, write_video
from tokensieve.datasets import decode_pyav as decode_module
from tokensieve.errors import BadMedia, BadOption, MissingBackend

BACKENDS = ("pyav", "decord")


def check_against_all(result: Frames, path) -> None:
    """Every returned frame is, bit for bit, the frame that plain decoding has at that time."""
    pixels, times_s = decode_all(path)
    numbers = [int(np.abs(times_s - t).argmin()) for t in result.times_s]
    np.testing.assert_allclose(times_s[numbers], result.times_s, atol=1e-9)
    for frame, number in zip(result.data, numbers, strict=True):
        np.testing.assert_array_equal(frame, pixels[number])


@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone_pristine"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_clips_bit_exact(real_clips, name, backend):
    path = real_clips / f"{name}.mp4"
    result = read_video(path, num_frames=7, backend=backend)
    check_against_all(result, path)
    assert result.times_s[0] == 0 and not result.partial and result.notes == ()
    assert result.times_s[-1] == pytest.approx(decode_all(path)[1][-1])  # the last frame, exactly
    assert result.data.shape[0] == 7 and result.data.dtype == np.uint8


def test_isolated_and_not_are_the_same(bikes):
    for options in ({"num_frames": 5}, {"fps": 2.5}, {"start_s": 1.1, "end_s": 3.3, "num_frames": 4}):
        one, two = read_video(bikes, **options), read_video(bikes, isolate=False, **options)
        np.testing.assert_array_equal(one.data, two.data)
        np.testing.assert_array_equal(one.times_s, two.times_s)
        assert (one.duration_s, one.notes, one.source) == (two.duration_s, two.notes, two.source)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_frame_of_a_clip_with_b_frames(clip, backend):
    result = read_video(clip, num_frames=40, backend=backend)
    check_against_all(result, clip)
    np.testing.assert_allclose(result.times_s, np.arange(40) / 25)


@pytest.mark.parametrize("start_s, end_s", [(0.0, 0.4), (0.41, 1.2), (1.5, None), (0.36, 0.44)])
def test_both_ends_of_a_range(clip, start_s, end_s):
    result = read_video(clip, num_frames=3, start_s=start_s, end_s=end_s)
    check_against_all(result, clip)
    every = np.arange(40) / 25
    assert result.times_s[0] == pytest.approx(every[every <= start_s + 1e-9][-1])
    assert result.times_s[-1] == pytest.approx(every[every <= (end_s or 9) + 1e-9][-1])


def test_defaults_and_unpacking(clip):
    frames, times_s = result = read_video(clip)
    assert frames.shape == (8, 48, 64, 3) and times_s.shape == (8,) and frames is result.data
    assert read_video(str(clip).encode(), num_frames=1).times_s.tolist() == [pytest.approx(0.76)]
    assert result.duration_s == pytest.approx(1.6) and "[8, 48, 64, 3]" in repr(result) and len(repr(result)) < 300


def test_frames_refuse_sizes_that_disagree():
    good = {"data": np.zeros((2, 4, 4, 3), np.uint8), "times_s": np.zeros(2), "duration_s": 1.0, "source": "x"}
    assert Frames(**good).num_frames == 2
    for bad in ({"times_s": np.zeros(3)}, {"data": np.zeros((2, 4, 4), np.uint8)}, {"data": np.zeros((2, 4, 4, 3))}):
        with pytest.raises(ValueError):
            Frames(**{**good, **bad})


@pytest.mark.parametrize("suffix", ["mkv", "mov", "ts", "flv", "m4v"])
def test_containers(clip, folder, suffix):
    path = remux(clip, folder / f"container.{suffix}")
    check_against_all(read_video(path, num_frames=9), path)
    assert read_video(path, num_frames=2).times_s[-1] == pytest.approx(1.56, abs=2e-3)


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("v8.webm", "libvpx", "yuv420p"),
        ("v9.webm", "libvpx-vp9", "yuv420p"),
        ("alpha.webm", "libvpx-vp9", "yuva420p"),
        ("av1.mp4", "libsvtav1", "yuv420p"),
        ("hevc.mp4", "libx265", "yuv420p"),
        ("ten_bit.mp4", "libx264", "yuv420p10le"),
        ("full_chroma.mp4", "libx264", "yuv444p"),
        ("grey.mp4", "libx264", "gray"),
        ("mpeg4.avi", "mpeg4", "yuv420p"),
        ("mpeg2.mpg", "mpeg2video", "yuv420p"),
        ("still.mov", "mjpeg", "yuvj420p"),
        ("alpha.mov", "qtrle", "argb"),
    ],
)
def test_codecs_and_pixel_formats(folder, name, codec, pix_fmt):
    path = encode(folder / name, pictures(20, 64, 96), codec=codec, pix_fmt=pix_fmt)
    result = read_video(path, num_frames=5)
    check_against_all(result, path)
    assert result.data.shape == (5, 64, 96, 3) and not result.partial


def test_b_frames_in_avi_whose_times_are_made_up(folder):
    path = encode(folder / "b.avi", pictures(30), options={"bf": "2"})
    with av.open(str(path)) as container:
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    result = read_video(path, num_frames=30)
    np.testing.assert_array_equal(result.data, pixels)
    np.testing.assert_allclose(result.times_s, np.arange(30) / 25)


@pytest.mark.parametrize("height, width", [(47, 63), (1, 1), (2, 300)])
def test_odd_sizes(folder, height, width):
    path = encode(folder / f"odd{height}x{width}.mkv", pictures(6, height, width), codec="ffv1", pix_fmt="yuv444p")
    result = read_video(path, num_frames=3)
    check_against_all(result, path)
    assert result.data.shape == (3, height, width, 3)


def test_variable_frame_rate(folder):
    pts = [0, 10, 20, 500, 510, 3000]
    path = encode(folder / "vfr.mkv", pictures(6), pts=pts, time_base=Fraction(1, 1000))
    result = read_video(path, num_frames=4)  # targets 0, 1, 2, 3 s
    check_against_all(result, path)
    np.testing.assert_allclose(result.times_s, [0, 0.51, 0.51, 3.0])
    assert not result.partial and "repeated" in result.notes[0]
    assert read_video(path, num_frames=4, short="fewer").times_s.tolist() == [0, 0.51, 3.0]
    with pytest.raises(BadMedia, match="only 3 different"):
        read_video(path, num_frames=4, short="error")


def test_a_day_long_file_is_sampled_and_bounded(folder):
    day_ms = 24 * 3600 * 1000
    path = encode(folder / "day.mkv", pictures(3), pts=[0, day_ms // 2, day_ms], time_base=Fraction(1, 1000))
    assert read_video(path, num_frames=3).times_s.tolist() == [0, 43200, 86400]


def test_very_high_frame_rate(folder):
    path = encode(folder / "fast.mp4", pictures(10), pts=list(range(10)), time_base=Fraction(1, 90000), rate=90000)
    result = read_video(path, num_frames=10)
    check_against_all(result, path)
    assert result.times_s[-1] == pytest.approx(9 / 90000)


@pytest.mark.parametrize("first", [-7, 1000])
def test_timestamps_that_do_not_start_at_zero(folder, first):
    path = encode(folder / f"from{first}.mkv", pictures(10), pts=list(range(first, first + 10)))
    result = read_video(path, num_frames=10)
    assert result.times_s[0] == 0 and len(set(result.times_s)) == 10
    check_against_all(result, path)


def test_edit_list_hides_frames(folder):
    path = encode(folder / "edit.mp4", pictures(20), pts=list(range(-5, 15)), options={"bf": "0", "g": "5"})
    result = read_video(path, num_frames=30, short="fewer")
    check_against_all(result, path)
    assert result.num_frames == len(decode_all(path)[0]) and not result.partial


def test_repeating_timestamps(folder):
    path = folder / "repeat.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        stream.codec_context.time_base = Fraction(1, 25)
        packets = []
        for number, frame in enumerate(pictures(6)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 25)
            packets += stream.encode(picture)
        for packet, pts in zip(packets + stream.encode(), [0, 1, 2, 2, 2, 3], strict=True):
            packet.pts = packet.dts = pts
            out.mux(packet)
    result = read_video(path, num_frames=4)
    pixels, _ = decode_all(path)
    np.testing.assert_array_equal(result.data, pixels[[0, 1, 4, 5]])  # the last of equals is the one that stays


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_tag(folder, degrees):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:, :16, :16] = 255  # a white corner, top left as stored
    path = encode(folder / f"turned{degrees}.mp4", frames, rotation=degrees)
    picture = read_video(path, num_frames=1).data[0]
    expected = np.rot90(frames[0], degrees // 90 % 4)  # the tag says: turn counter-clockwise by this much
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).mean() < 8  # lossy coding
    assert read_video(path, num_frames=1, max_side=32).data.shape[1:3] == tuple(n // 2 for n in expected.shape[:2])
    if degrees == 180:
        np.testing.assert_array_equal(read_video(path, num_frames=1, backend="decord").data[0], picture)
    else:  # decord 0.6 returns four channels of garbage
        with pytest.raises(BadMedia, match="rotation"):
            read_video(path, num_frames=1, backend="decord")


def test_one_frame_and_eight_asked(folder):
    path = encode(folder / "one.mp4", pictures(1))
    assert read_video(path).data.shape[0] == 8 and set(read_video(path).times_s) == {0.0}
    assert read_video(path, short="fewer").num_frames == 1
    with pytest.raises(BadMedia):
        read_video(path, short="error")


def test_end_beyond_the_file_is_partial(clip):
    result = read_video(clip, num_frames=4, end_s=10)
    assert result.partial and "asked up to 10 s, but the video ends at 1.600 s" in result.notes[0]
    assert result.times_s[-1] == pytest.approx(1.56)


def test_start_beyond_the_file(clip):
    with pytest.raises(BadOption, match="after the end"):
        read_video(clip, start_s=5)


def test_max_side_scales_while_decoding(clip):
    small = read_video(clip, num_frames=2, max_side=32)
    assert small.data.shape == (2, 24, 32, 3)
    full = read_video(clip, num_frames=2).data
    blocks = full.reshape(2, 24, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(small.data - blocks).mean() < 12
    assert read_video(clip, num_frames=2, max_side=5000).data.shape == (2, 48, 64, 3)


def test_big_frames_fit_when_scaled(clip):
    limits = Limits(max_total_bytes=2 * 24 * 32 * 3)
    assert read_video(clip, num_frames=2, max_side=32, limits=limits).num_frames == 2


def test_sound_does_not_matter(folder):
    path = encode(folder / "sound.mp4", pictures(10), audio=True)
    result = read_video(path, num_frames=10)
    assert not result.partial and result.duration_s == pytest.approx(0.4)
    check_against_all(result, path)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("lands", ["right", "early", "late", "nowhere"])
def test_long_gaps_are_sought_and_verified(folder, monkeypatch, suffix, lands):
    """Wherever the container's seek lands, pixels stay the same."""
    source = folder / "gops.mp4"
    if not source.exists():
        encode(source, pictures(120), options={"g": "12", "bf": "3", "sc_threshold": "0"})
    path = source if suffix == "mp4" else remux(source, folder / f"gops_{lands}.{suffix}")
    num_seeks = 0

    class Container:
        def __init__(self, real):
            self.demux, self._seek = real.demux, real.seek

        def seek(self, offset, **options):
            nonlocal num_seeks
            num_seeks += 1
            if lands == "nowhere":
                raise OSError
            self._seek({"right": offset, "early": 0, "late": 2 * offset}[lands], **options)

    def open_wrapped(reader):
        really_open(reader)
        reader._container = Container(reader._container)

    really_open = decode_module._PacketReader._open
    monkeypatch.setattr(decode_module._PacketReader, "_open", open_wrapped)
    monkeypatch.setattr(decode_module, "SEEK_GAP", 13)
    result = read_video(path, num_frames=4, isolate=False)
    check_against_all(result, path)
    assert num_seeks and not result.partial
    np.testing.assert_allclose(result.times_s, np.array([0, 39, 79, 119]) / 25, atol=2e-3)


@pytest.mark.parametrize(
    "name, bf, params",
    [("open", "3", "open-gop=1:keyint=10:b-adapt=0:scenecut=0"), ("refresh", "0", "intra-refresh=1:keyint=10")],
)
def test_open_gop_and_gradual_refresh(folder, name, bf, params):
    """Each frame on its own: those shown before a key frame but stored after it, and those that need a run-up."""
    path = encode(folder / f"{name}.mkv", pictures(60), options={"bf": bf, "g": "10", "x264-params": params})
    pixels, times_s = decode_all(path)
    for number in range(15, 45):
        result = read_video(path, num_frames=1, start_s=times_s[number], end_s=times_s[number] + 0.01, isolate=False)
        np.testing.assert_array_equal(result.data[0], pixels[number])
        assert result.times_s[0] == pytest.approx(times_s[number]) and not result.partial


def test_torchcodec_is_optional(clip):
    if importlib.util.find_spec("torchcodec") is None:
        with pytest.raises(MissingBackend, match="pip install"):
            read_video(clip, backend="torchcodec")
    else:
        np.testing.assert_array_equal(read_video(clip, backend="torchcodec").data, read_video(clip).data)


def test_unknown_backend(clip):
    with pytest.raises(BadOption, match="pyav, decord, torchcodec"):
        read_video(clip, backend="opencv")


@pytest.mark.parametrize(
    "name", ["-x.mp4", "with space.mp4", "line\nbreak.mp4", "žluťoučký 🎬.mp4", "concat.txt", "a|b,c.mp4"]
)
def test_names(clip, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert read_video(name, num_frames=2).num_frames == 2
    assert read_media(tmp_path / name, num_frames=2, backend="decord").num_frames == 2


def test_written_video_comes_back(tmp_path):
    frames = pictures(12, 48, 64)
    write_video(tmp_path / "out.mp4", frames, fps=12.5)
    result = read_video(tmp_path / "out.mp4", num_frames=12)
    np.testing.assert_allclose(result.times_s, np.arange(12) / 12.5)
    assert np.abs(result.data.astype(int) - frames).mean() < 12  # chroma is halved
