"""Stills, animations and folders of frames."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.datasets.conftest import decode_all, encode, pictures
from tokensieve.datasets import Limits, read_folder, read_image, read_media, read_video
from tokensieve.datasets.images import natural_key
from tokensieve.errors import BadMedia, BadOption, MediaNotAllowed, MediaNotFound, MediaTooLarge

RGB = pictures(1, 40, 60)[0]


def save(path, array=RGB, mode=None, **options):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats_are_exact(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"x.{suffix}", **options)
    np.testing.assert_array_equal(read_image(path), RGB)
    result = read_video(path)  # 8 frames by default, but a still is one frame
    assert result.num_frames == 1 and result.times_s.tolist() == [0.0] and not result.partial
    np.testing.assert_array_equal(result.data[0], RGB)


def test_the_name_plays_no_part(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "x.mp4", format="PNG")), RGB)


@pytest.mark.parametrize("mode, suffix, tolerance", [("CMYK", "tif", 2), ("CMYK", "jpg", 40), ("YCbCr", "jpg", 40)])
def test_other_colour_models(tmp_path, mode, suffix, tolerance):
    smooth = np.full((40, 60, 3), (200, 100, 30), np.uint8)
    pixels = read_image(save(tmp_path / f"x.{suffix}", smooth, mode))
    assert pixels.shape == (40, 60, 3) and np.abs(pixels.astype(int) - smooth).max() <= tolerance


def test_grey_in_1_8_and_16_bits(tmp_path):
    ramp = np.linspace(0, 65535, 60).astype(np.uint16)[None].repeat(40, 0)
    pixels = read_image(save(tmp_path / "x16.png", ramp))
    np.testing.assert_array_equal(pixels[0, :, 0], ramp[0] >> 8)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    np.testing.assert_array_equal(read_image(save(tmp_path / "x8.png", RGB[..., 0]))[..., 1], RGB[..., 0])
    assert set(np.unique(read_image(save(tmp_path / "x1.png", RGB, "1")))) <= {0, 255}


def test_float_pixels_are_refused(tmp_path):
    for number, value in enumerate((0.5, np.nan, np.inf)):
        path = save(tmp_path / f"{number}.tif", np.full((4, 4), value, np.float32))
        with pytest.raises(BadMedia, match="32-bit"):
            read_image(path)


def test_transparency_lies_over_white(tmp_path):
    rgba = np.zeros((10, 10, 4), np.uint8)
    rgba[:5] = (10, 20, 30, 255)
    pixels = read_image(save(tmp_path / "x.png", rgba))
    assert pixels[0, 0].tolist() == [10, 20, 30] and pixels[9, 9].tolist() == [255, 255, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=1)
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("orientation, turn", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(RGB, turn))
    assert max(read_image(path, max_side=30).shape) == 30


def test_broken_exif_is_ignored(tmp_path):
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "x.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")), RGB
    )


@pytest.mark.parametrize("height, width", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes(tmp_path, height, width):
    path = save(tmp_path / "x.png", np.full((height, width, 3), 7, np.uint8))
    assert read_image(path).shape == (height, width, 3)
    assert min(read_image(path, max_side=100).shape) == 1


def test_max_side(tmp_path):
    big = np.full((900, 600, 3), (200, 100, 30), np.uint8)
    for suffix in ("png", "jpg"):
        assert read_image(save(tmp_path / f"x.{suffix}", big), max_side=90).shape == (90, 60, 3)
    with pytest.raises(BadOption, match="max_side"):
        read_image(tmp_path / "x.png", max_side=0)


def png_bomb(path, width, height):
    """A PNG of few bytes and many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    body = b"".join(rows.compress(line) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    end = chunk(b"IDAT", body) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end)
    return path


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_decompression_bombs(tmp_path, side):
    path = png_bomb(tmp_path / "x.png", side, side)
    for read in (read_image, read_video):
        for isolate in (True, False):
            with pytest.raises(MediaTooLarge):
                read(path, isolate=isolate)


def test_damaged_images(tmp_path):
    for suffix in ("png", "jpg", "webp", "tif", "bmp"):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        data = save(tmp_path / f"x.{suffix}", noise).read_bytes()
        (tmp_path / "cut").write_bytes(data[: len(data) // 2])
        with pytest.raises(BadMedia):
            read_image(tmp_path / "cut")
        (tmp_path / "cut").write_bytes(data[:20])
        with pytest.raises(BadMedia):
            read_image(tmp_path / "cut")


def test_image_asked_for_but_video_given(clip, tmp_path):
    with pytest.raises(BadMedia, match="read_video"):
        read_image(clip)
    with pytest.raises(MediaNotAllowed):
        read_image(tmp_path)
    with pytest.raises(MediaNotFound):
        read_image(tmp_path / "none.png")


def animation(path, frames, **options):
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, **options)
    return path


FLAT = np.stack([np.full((16, 24, 3), value, np.uint8) for value in (0, 60, 120, 180, 240)])


@pytest.mark.parametrize("suffix, options", [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_animations_go_by_their_durations(tmp_path, suffix, options):
    path = animation(tmp_path / f"x.{suffix}", FLAT, duration=[100, 100, 100, 700, 500], **options)
    result = read_video(path, num_frames=5, short="fewer")  # targets 0, 0.25, 0.5, 0.75, 1.0
    np.testing.assert_allclose(result.times_s, [0, 0.2, 0.3, 1.0])
    np.testing.assert_array_equal(result.data[:, 0, 0, 0], [0, 120, 180, 240])
    assert result.duration_s == pytest.approx(1.5) and not result.partial
    np.testing.assert_array_equal(read_video(path, fps=1).data[:, 0, 0, 0], [0, 240])


def test_one_frame_gif_is_a_still(tmp_path):
    assert read_video(save(tmp_path / "x.gif")).num_frames == 1


def test_gif_with_ten_thousand_frames_is_bounded(tmp_path):
    frames = np.zeros((10_000, 8, 8, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(10_000) % 256
    frames[:, 0, 0, 1] = np.arange(10_000) // 256
    path = encode(tmp_path / "x.gif", frames, codec="gif", pix_fmt="rgb8", rate=50)
    result = read_video(path, num_frames=8)
    assert result.num_frames == 8 and result.times_s[-1] > 100
    with pytest.raises(MediaTooLarge, match="max_packets"):
        read_video(path, limits=Limits(max_packets=5000))


def test_gif_frames_build_on_each_other(tmp_path):
    frames = np.zeros((60, 16, 16, 3), np.uint8)
    for number in range(60):
        frames[number:, number % 16, number // 16] = 255  # each frame stores one new dot only
    path = encode(tmp_path / "x.gif", frames, codec="gif", pix_fmt="rgb8", rate=50)
    pixels, times_s = decode_all(path)
    result = read_video(path, num_frames=7)
    np.testing.assert_array_equal(result.data, pixels[np.searchsorted(times_s, result.times_s)])


def numbered(folder, count=12):
    folder.mkdir()
    for number in range(count):
        save(folder / f"frame{number}.png", np.full((8, 10, 3), number, np.uint8))
    return folder


def test_folder_in_natural_order(tmp_path):
    folder = numbered(tmp_path / "f")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    result = read_folder(folder, num_frames=12, folder_fps=4)
    np.testing.assert_array_equal(result.data[:, 0, 0, 0], np.arange(12))
    np.testing.assert_allclose(result.times_s, np.arange(12) / 4)
    assert result.duration_s == 3.0
    assert read_folder(folder).data[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 6, 7, 9, 11]
    assert read_media(folder, fps=1, folder_fps=2, start_s=1).data[:, 0, 0, 0].tolist() == [2, 4, 6, 8, 10]
    assert read_folder(folder, num_frames=20, short="fewer", isolate=False).num_frames == 12


def test_natural_key():
    names = ["b1", "a10.png", "a2.png", "a02.png", "10", "9", "²"]
    assert sorted(names, key=natural_key)[:2] == ["9", "10"]
    assert [n for n in sorted(names, key=natural_key) if n.startswith("a")] == ["a02.png", "a2.png", "a10.png"]


def test_folders_that_do_not_work(tmp_path, clip):
    folder = numbered(tmp_path / "f")
    save(folder / "frame3.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(BadMedia, match="differ in size.*10x8.*9x9"):
        read_folder(folder, num_frames=12)
    (folder / "frame3.png").write_bytes(b"broken")
    with pytest.raises(BadMedia, match="Frame 3 of the folder"):
        read_folder(folder, num_frames=12)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadMedia, match="holds no image"):
        read_folder(tmp_path / "empty")
    with pytest.raises(MediaNotAllowed, match="not a folder"):
        read_folder(clip)
    with pytest.raises(MediaNotFound):
        read_folder(tmp_path / "none")
    with pytest.raises(MediaTooLarge, match="max_packets"):
        read_folder(folder, limits=Limits(max_packets=5))
    for fps in (0, -1, float("nan"), None, "2"):
        with pytest.raises(BadOption, match="folder_fps"):
            read_folder(folder, folder_fps=fps)


def test_links_inside_a_folder(tmp_path):
    folder = numbered(tmp_path / "f", count=2)
    (folder / "frame2.png").symlink_to(save(tmp_path / "outside.png", np.zeros((8, 10, 3), np.uint8)))
    assert read_folder(folder, num_frames=3).num_frames == 3
    with pytest.raises(MediaNotAllowed, match="outside"):
        read_folder(folder, num_frames=3, root=folder)
