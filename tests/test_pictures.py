"""The same picture is the same RGB, however it is stored and whichever way it comes in."""

import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, features

from dori_utils.core import inception, prompt_lists
from dori_utils.core.cache import key_of
from dori_utils.core.diffusion import preprocess
from dori_utils.core.pictures import open_picture, to_rgb
from dori_utils.core.prompt_lists import PromptList, download_targets
from dori_utils.core.sscd import SSCDTransform
from dori_utils.core.tables import read_pairs
from dori_utils.core.targets import Target, load_targets, read_targets
from dori_utils.materials import Pair

BLOCKS = np.random.default_rng(0).integers(0, 240, (3, 5, 3), dtype=np.uint8)
BLOCKS[:, 3] = 255  # what is transparent below, over white; no other block is white
SEEN = BLOCKS.repeat(16, axis=0).repeat(16, axis=1)  # (48, 80, 3): wider than high, so that a turn shows
CLEAR = (SEEN == 255).all(axis=-1)
HIDDEN = np.where(CLEAR[..., None], np.uint8([1, 2, 3]), SEEN)  # what is stored where it is transparent
GREY_HIDDEN = np.where(CLEAR, 1, np.maximum(np.asarray(Image.fromarray(SEEN).convert("L")), 2)).astype(np.uint8)
GREY_SEEN = np.repeat(np.where(CLEAR, 255, GREY_HIDDEN)[..., None], 3, axis=2).astype(np.uint8)
ALPHA = np.where(CLEAR, 0, 255).astype(np.uint8)
TURNED_BY = {  # EXIF orientation → how a camera stores what is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(image, orientation, format, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image.transpose(TURNED_BY[orientation]), format, exif=exif, **options)


def palette(image, transparency):
    """Colors as a palette whose entry 0 is transparent: where CLEAR is."""
    colors = sorted(set(map(tuple, SEEN[~CLEAR].tolist())))
    flat = np.uint8([[0, 0, 0], *colors])
    index = (image[:, :, None] == flat[None, None]).all(axis=-1).argmax(axis=-1)
    indexed = Image.fromarray(np.where(CLEAR, 0, index).astype(np.uint8), "L")
    indexed.putpalette(flat.tobytes())
    indexed.info["transparency"] = transparency
    return indexed


def png(color_type, depth, samples, key):
    """A PNG of any depth, which Pillow does not write: samples (H, W, C), and the color that is transparent."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bits = (samples.reshape(len(samples), -1, 1) >> np.arange(depth - 1, -1, -1)) & 1  # (H, W * C, depth)
    rows = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", samples.shape[1], len(samples), depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    if key is not None:
        parts.insert(1, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(values, *, bits=16, order="<", white_is_zero=False):
    """An uncompressed grey TIFF: values (H, W) of `bits` bits."""
    height, width = values.shape
    if bits == 12:
        data = np.packbits((values.reshape(-1, 1) >> np.arange(11, -1, -1) & 1).astype(np.uint8)).tobytes()
    else:
        data = values.astype(f"{order}u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 277: 1, 278: height}
    tags = sorted((tags | {273: 8, 279: len(data)}).items())
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + b"\0" * 4


COLOR, OVER = Image.fromarray(SEEN), Image.fromarray(np.dstack([HIDDEN, ALPHA]))
WIDE = GREY_SEEN[..., 0].astype(np.uint16) * 257  # of 16 bits
DEEP = GREY_HIDDEN.astype(np.uint16) * 256 + 77  # 16 bits with something in the lower 8
FILES = {  # name → (bytes, ending, what one sees, the mean difference of a format that loses something)
    "png": (saved(COLOR), "png", SEEN, 0),
    "bmp": (saved(COLOR, "BMP"), "bmp", SEEN, 0),
    "jpeg": (saved(COLOR, "JPEG", quality=95), "jpg", SEEN, 3),
    "jpeg in jfif": (saved(COLOR, "JPEG", quality=95), "jfif", SEEN, 3),
    "jpeg of CMYK": (saved(COLOR.convert("CMYK"), "JPEG", quality=95), "jpg", SEEN, 6),
    "png of 16 bits a color": (png(2, 16, SEEN.astype(np.uint16) * 257, None), "png", SEEN, 0),
    **{f"png turned {n}": (turned(COLOR, n, "PNG"), "png", SEEN, 0) for n in TURNED_BY},
    "jpeg turned": (turned(COLOR, 6, "JPEG", quality=95), "jpg", SEEN, 3),
    "webp turned": (turned(COLOR, 8, "WEBP", lossless=True), "webp", SEEN, 0),
    "tiff turned": (turned(COLOR, 5, "TIFF"), "tif", SEEN, 0),
    "png transparent": (saved(OVER), "png", SEEN, 0),
    "png transparent and turned": (turned(OVER, 6, "PNG"), "png", SEEN, 0),
    "png transparent, of 16 bits": (
        png(6, 16, np.dstack([HIDDEN, ALPHA]).astype(np.uint16) * 257, None), "png", SEEN, 0
    ),
    "webp transparent": (saved(OVER, "WEBP", lossless=True), "webp", SEEN, 0),
    "tiff transparent": (saved(OVER, "TIFF"), "tiff", SEEN, 0),
    "gif transparent": (saved(palette(HIDDEN, 0), "GIF", transparency=0), "gif", SEEN, 0),
    "png of a palette, one entry transparent": (saved(palette(HIDDEN, 0)), "png", SEEN, 0),
    "png of a palette with alphas": (saved(palette(HIDDEN, b"\0" + b"\xff" * 12)), "png", SEEN, 0),
    "png with a transparent color": (saved(Image.fromarray(HIDDEN), transparency=(1, 2, 3)), "png", SEEN, 0),
    "png with a transparent color of 16 bits": (
        png(2, 16, HIDDEN.astype(np.uint16) * 256 + 77, (256 + 77, 512 + 77, 768 + 77)), "png", SEEN, 0
    ),
    "png grey": (saved(Image.fromarray(GREY_SEEN[..., 0])), "png", GREY_SEEN, 0),
    "png grey of 16 bits": (saved(Image.fromarray(WIDE)), "png", GREY_SEEN, 0),
    "png grey of 16 bits, turned": (
        turned(Image.fromarray(WIDE), 6, "PNG"), "png", GREY_SEEN, 0
    ),
    "tiff grey of 16 bits": (saved(Image.fromarray(WIDE), "TIFF"), "tif", GREY_SEEN, 0),
    "tiff grey of 16 bits, big end first": (tiff(WIDE, order=">"), "tif", GREY_SEEN, 0),
    "tiff grey of 16 bits, white is zero": (
        tiff(65535 - WIDE, white_is_zero=True), "tif", GREY_SEEN, 0
    ),
    "tiff grey of 12 bits": (tiff(WIDE >> 4, bits=12), "tif", GREY_SEEN, 0),
    "pgm of 16 bits": (saved(Image.fromarray(WIDE), "PPM"), "pgm", GREY_SEEN, 0),
    "png grey transparent": (saved(Image.fromarray(np.dstack([GREY_HIDDEN, ALPHA]), "LA")), "png", GREY_SEEN, 0),
    "png grey transparent, of 16 bits": (
        png(4, 16, np.dstack([GREY_HIDDEN, ALPHA]).astype(np.uint16) * 257, None), "png", GREY_SEEN, 0
    ),
    "png with a transparent grey": (saved(Image.fromarray(GREY_HIDDEN), transparency=1), "png", GREY_SEEN, 0),
    "png with a transparent grey of 16 bits": (png(0, 16, DEEP[..., None], (256 + 77,)), "png", GREY_SEEN, 0),
}  # fmt: skip
if features.check("avif"):
    FILES["avif turned"] = (turned(COLOR, 6, "AVIF", quality=95), "avif", SEEN, 3)
    FILES["avif transparent"] = (saved(OVER, "AVIF", quality=95), "avif", SEEN, 3)
if features.check_codec("jpg_2000"):
    FILES["jpeg 2000 transparent"] = (saved(OVER, "JPEG2000"), "jp2", SEEN, 0)
    FILES["jpeg 2000 grey of 16 bits"] = (
        saved(Image.fromarray(WIDE), "JPEG2000"), "jp2", GREY_SEEN, 0
    )  # fmt: skip
MODES = {  # an image that is handed over in Python: (image, what one sees, mean difference)
    "RGB": (COLOR, SEEN, 0),
    "RGBA": (OVER, SEEN, 0),
    "RGBa": (OVER.convert("RGBa"), SEEN, 0),
    "RGBX": (COLOR.convert("RGBX"), SEEN, 0),
    "CMYK": (COLOR.convert("CMYK"), SEEN, 0),
    "YCbCr": (COLOR.convert("YCbCr"), SEEN, 2),
    "HSV": (COLOR.convert("HSV"), SEEN, 3),
    "P": (palette(HIDDEN, 0), SEEN, 0),
    "PA": (palette(HIDDEN, 0).convert("PA"), SEEN, 0),
    "L": (Image.fromarray(GREY_SEEN[..., 0]), GREY_SEEN, 0),
    "LA": (Image.fromarray(np.dstack([GREY_HIDDEN, ALPHA]), "LA"), GREY_SEEN, 0),
    "La": (Image.fromarray(np.dstack([GREY_HIDDEN, ALPHA]), "LA").convert("La"), GREY_SEEN, 0),
    "I;16": (Image.fromarray(WIDE.astype("<u2")), GREY_SEEN, 0),
    "I;16B": (Image.fromarray(WIDE.astype(">u2")), GREY_SEEN, 0),
    "I": (Image.fromarray(WIDE.astype(np.int32)), GREY_SEEN, 0),
    "1": (Image.fromarray(CLEAR), np.repeat(CLEAR[..., None], 3, axis=2) * 255, 0),
}


def close(image, expected, loss):
    """Whether an RGB image has these pixels, to a mean difference."""
    right_size = image.mode == "RGB" and image.size == (expected.shape[1], expected.shape[0])
    return right_size and np.abs(np.asarray(image, dtype=int) - expected).mean() <= loss


# The ways in: (bytes, ending, folder) → the picture


def by_table(data, ending, folder):
    (folder / f"a.{ending}").write_bytes(data)
    (folder / "own.csv").write_text(f"prompt,image\na cat,a.{ending}\n")
    return read_targets(folder / "own.csv")[0].image


def by_captions(data, ending, folder):
    (folder / f"a.{ending}").write_bytes(data)
    (folder / "a.txt").write_text("a cat")
    return read_targets(folder)[0].image


def by_metadata(data, ending, folder):
    (folder / f"a.{ending}").write_bytes(data)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": f"a.{ending}", "text": "a cat"}))
    return read_targets(folder)[0].image


def by_parquet(data, ending, folder):
    table = {"id": ["a"], "prompt": ["a cat"], "kind": ["VM"], "duplicates": [9], "image": [data]}
    pd.DataFrame(table).to_parquet(folder / "targets.parquet")
    return load_targets("testbed", folder=folder)[0].image


def by_download(data, ending, folder):
    table = b";Caption;URL;Index\n0;a cat;http://host/a;7\n"
    prompts = PromptList("tiny.csv", hashlib.sha256(table).hexdigest(), kind="VM")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prompt_lists.PROMPT_LISTS, "tiny", (prompts,))
        patch.setattr(prompt_lists, "_get", lambda url, **_: table if url.endswith("tiny.csv") else data)
        assert download_targets("tiny", folder, progress=False).empty
        return load_targets("tiny", folder=folder)[0].image


def by_pairs(data, ending, folder):
    (folder / f"a.{ending}").write_bytes(data)
    (folder / "pairs.csv").write_text(f"image,caption\na.{ending},a cat\n")
    ((path, caption),) = read_pairs(folder / "pairs.csv")
    return Pair(caption, path).image


def by_coco(data, ending, folder):
    (folder / "val2014").mkdir()
    (folder / "val2014" / f"a.{ending}").write_bytes(data)
    images, captions = [{"id": 1, "file_name": f"a.{ending}"}], [{"image_id": 1, "caption": "a cat"}]
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    ((path, caption),) = read_pairs(folder / "captions_val2014.json")
    return Pair(caption, path).image


def by_hand(data, ending, folder):
    return Target("a", "a cat", Image.open(io.BytesIO(data)), "VM").image


def by_fid(data, ending, folder):
    (folder / f"a.{ending}").write_bytes(data)
    return inception._open(folder / f"a.{ending}")


WAYS = [by_table, by_captions, by_metadata, by_parquet, by_download, by_pairs, by_coco, by_hand, by_fid]


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_the_picture_that_one_sees_whichever_way_it_comes_in(way, tmp_path):
    for name, (data, ending, expected, loss) in FILES.items():
        (tmp_path / name).mkdir()
        assert close(way(data, ending, tmp_path / name), expected, loss), name


@pytest.mark.parametrize("mode", MODES)
def test_the_model_the_attack_and_the_judge_see_the_same_of_an_image_of_any_mode(mode, sd1):
    image, expected, loss = MODES[mode]
    assert image.mode == mode and close(to_rgb(image), expected, loss)
    plain = to_rgb(image)
    assert close(Target("a", "a cat", image, "VM").image, np.asarray(plain), 0)
    assert np.array_equal(preprocess(sd1, image), preprocess(sd1, plain))
    assert np.array_equal(SSCDTransform(32)(image), SSCDTransform(32)(plain))
    assert key_of(image) == key_of(plain)


def test_a_turned_or_transparent_image_is_the_same_case_and_the_same_pixels_for_everyone(sd1):
    for name in ("png turned 6", "png transparent and turned", "png of a palette, one entry transparent"):
        image = Image.open(io.BytesIO(FILES[name][0]))
        assert key_of(image) == key_of(COLOR)
        assert np.array_equal(preprocess(sd1, image), preprocess(sd1, COLOR))
        assert np.array_equal(SSCDTransform(32)(image), SSCDTransform(32)(COLOR))


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (2, 2), (100, 0, 200, 128))
    assert np.abs(np.int32(to_rgb(image).getpixel((0, 0))) - [177, 127, 227]).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_a_png_of_every_depth_is_white_and_the_others_stay(depth):
    most = 2**depth - 1
    for key in {0, most // 3, most}:
        samples = np.array([[[0], [most // 3], [most]]])
        expected = [255 if sample == key else round(255 * sample / most) for sample in samples.ravel()]
        for transparent in ((key,), None):
            seen = np.asarray(to_rgb(Image.open(io.BytesIO(png(0, depth, samples, transparent)))))[0, :, 0]
            assert seen.tolist() == (expected if transparent else [round(255 * s / most) for s in samples.ravel()])


def test_an_rgb_image_keeps_every_pixel_and_is_a_case_by_them():
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    image = Image.fromarray(pixels)
    assert np.array_equal(to_rgb(image), pixels) and np.array_equal(to_rgb(to_rgb(image)), pixels)
    assert key_of(image) == key_of(pixels)


def test_what_is_upright_stays_so_when_it_is_seen_again():
    upright = to_rgb(Image.open(io.BytesIO(turned(OVER, 6, "PNG"))))
    assert np.array_equal(to_rgb(upright), SEEN) and np.array_equal(to_rgb(to_rgb(upright)), SEEN)


def test_the_image_that_is_handed_over_is_left_as_it_is():
    image = Image.open(io.BytesIO(turned(palette(HIDDEN, 0), 6, "PNG")))
    to_rgb(image)
    assert (image.mode, image.size, image.info["transparency"], image.getexif()[0x0112]) == ("P", (48, 80), 0, 6)


def test_damaged_exif_says_nothing_and_odd_exif_does_not_hide_the_orientation():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0100] = 6, 72.0, 7  # orientation, a rational, an integer
    whole = exif.tobytes()
    odd = whole.replace(struct.pack(">HHI", 0x011A, 5, 1), struct.pack(">HHI", 0x0100, 5, 1))
    for data, stored in ((b"Exif\0\0garbage", COLOR), (odd, COLOR.transpose(TURNED_BY[6]))):
        assert close(open_picture(io.BytesIO(saved(stored, exif=data))), SEEN, 0)


UNREADABLE = {
    "float.tif": (saved(Image.new("F", (20, 20), 0.5), "TIFF"), "Mode 'F'.*make 8 bits a channel"),
    "integers.tif": (saved(Image.new("I", (20, 20), 40_000), "TIFF"), "Mode 'I'.*40000.*make 8 bits a channel"),
    "photo.heic": (b"\0\0\0\x18ftypheic" + b"\0" * 40, "of a kind that this Pillow does not read"),
    "photo.jxl": (b"\xff\x0a" + b"\0" * 40, "of a kind that this Pillow does not read"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "of a kind that this Pillow does not read"),
    "half.png": (FILES["png"][0][:200], ".*truncated"),
    "half.jpg": (FILES["jpeg"][0][:600], ".*truncated"),
    "turned.jpg": (FILES["jpeg turned"][0][:700], ".*truncated"),
    "empty.png": (b"", "damaged"),
    "page.png": (b"<html>This image was removed</html>", "damaged"),
}


@pytest.mark.parametrize("way", [by_table, by_captions, by_metadata, by_pairs, by_coco, by_fid])
def test_a_picture_that_cannot_be_read_is_named_with_what_to_do(way, tmp_path):
    for name, (data, reason) in UNREADABLE.items():
        (tmp_path / name).mkdir()
        ending = name.rpartition(".")[2]
        with pytest.raises(OSError, match=f"(?i)Cannot read the picture .*a.{ending} .*{reason}.*convert it to PNG"):
            way(data, ending, tmp_path / name)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_download_lists_what_cannot_be_read_as_dead(name, tmp_path):
    with pytest.raises(AssertionError):  # `by_download` expects no dead images
        by_download(UNREADABLE[name][0], "", tmp_path)
    assert pd.read_csv(tmp_path / "dead_images.csv")["reason"].str.startswith("not an image").tolist() == [True]


@pytest.mark.parametrize("numbers", [(-5, 4000), (0, 200), (0, 70_000)])
def test_integers_of_no_known_range_are_refused(numbers):
    image = Image.fromarray(np.int32([numbers]))
    with pytest.raises(ValueError, match=f"Mode 'I' .integers, here from {numbers[0]} to {numbers[1]}.*8 bits"):
        Target("a", "a cat", image, "VM")


def test_a_picture_that_is_not_there_is_named(tmp_path):
    (tmp_path / "own.csv").write_text("prompt,image\na cat,a.png\n")
    with pytest.raises(FileNotFoundError, match="There is no picture of target a in .*a.png"):
        read_targets(tmp_path / "own.csv")


# Folders: no picture is passed over


def captioned(folder, *names, data=None):
    for name in names:
        draw = Image.new("RGB", (40, 30), "navy")
        ImageDraw.Draw(draw).rectangle((5, 5, 20, 20), "red")
        (folder / name).write_bytes(data or saved(draw))
        (folder / name).with_suffix(".txt").write_text(f"a caption of {name}")


@pytest.mark.parametrize("ending", "PNG Jpg jfif jpe apng tif webp bmp ppm pgm pnm tga qoi jp2 j2k ico avif".split())
def test_every_ending_that_pillow_knows_is_a_picture_in_a_folder(ending, tmp_path):
    captioned(tmp_path, "a.png", f"b.{ending}")  # the format is in the file, not in its name
    assert [target.prompt for target in read_targets(tmp_path)] == ["a caption of a.png", f"a caption of b.{ending}"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(OSError, match=f"no caption of b.{ending}"):
        read_targets(tmp_path)


@pytest.mark.parametrize("ending", ["heic", "HEIC", "heif", "jxl", "svg"])
def test_a_picture_that_needs_a_plugin_is_never_passed_over(ending, tmp_path):
    captioned(tmp_path, "a.png")
    (tmp_path / f"b.{ending}").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    with pytest.raises(OSError, match=f"no caption of b.{ending}"):
        read_targets(tmp_path)
    (tmp_path / "b.txt").write_text("a dog")
    with pytest.raises(OSError, match=f"b.{ending} .*does not read.*convert it to PNG"):
        read_targets(tmp_path)


def test_a_kind_that_a_plugin_registers_is_a_picture(tmp_path, monkeypatch):
    captioned(tmp_path, "a.png", "b.new")
    with pytest.raises(OSError, match="b.new has a caption and is no kind of picture that is known: convert it to PNG"):
        read_targets(tmp_path)
    monkeypatch.setitem(Image.EXTENSION, ".new", "PNG")
    assert [target.id for target in read_targets(tmp_path)] == ["a", "b"]


def test_what_lies_beside_pictures_is_no_picture(tmp_path):
    captioned(tmp_path, "a.png", "b.jpg")
    for name in "README README.md notes.txt a.json b.npz Thumbs.db desktop.ini .DS_Store paper.pdf ._a.png".split():
        (tmp_path / name).write_bytes(b"something else")
    (tmp_path / "masks.png").mkdir()
    assert [target.id for target in read_targets(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_picture_that_the_metadata_do_not_name_is_an_error(name, tmp_path):
    captioned(tmp_path, "a.png", "b.png")
    rows = pd.DataFrame({"file_name": ["a.png"], "text": ["a cat"]})
    rows.to_csv(tmp_path / name, index=False) if name.endswith("csv") else rows.to_json(
        tmp_path / name, orient="records", lines=True
    )
    with pytest.raises(OSError, match=f"no caption of b.png: {name} does not name it"):
        read_targets(tmp_path)
    (tmp_path / "b.png").unlink()
    assert [target.prompt for target in read_targets(tmp_path)] == ["a cat"]
