"""Pictures: what one sees in an image file is what the model, the attack and the judge see.

Training sets of diffusion models are made the same way: img2dataset, LAION's downloader, lays what is transparent over
white, and Hugging Face's imagefolder turns a photo upright as its EXIF says. (img2dataset itself leaves it lying.)
Color profiles are not applied, by them nor here.
"""

import numpy as np
from PIL import ExifTags, Image, TiffTags, UnidentifiedImageError

# What Pillow reads only with a plugin, or only where it was built with the library for it.
FOREIGN = {".avif", ".heic", ".heif", ".hif", ".jp2", ".jxl", ".svg", ".webp"}
UPRIGHT = {  # EXIF orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_TAGS = {tag.name: number for number, tag in TiffTags.TAGS_V2.items()}


def suffixes():
    """Endings of files that are pictures, whether or not this Pillow can read them: {".png", ".heic", ...}."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return readable | FOREIGN


def open_picture(source, name=None):
    """A picture in RGB, see `to_rgb`.

    Args:
        source: a path, or a binary file.
        name: what a message calls it; default: the path.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is damaged, or of a kind that Pillow does not read or that has no plain meaning in RGB.
    """
    name = source if name is None else name
    try:
        with Image.open(source) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no picture {name}.") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, EOFError, ... by format
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "damaged, or of a kind that this Pillow does not read"
        raise OSError(
            f"Cannot read the picture {name} ({reason}). Delete it and get it anew, or convert it to PNG."
        ) from error


def to_rgb(image):
    """A PIL image as one sees it: RGB of 8 bits a channel, upright, what is transparent over white.

    Of 16 bits the upper 8 are taken, in greys as Pillow does it in colors. An image that is such an RGB already keeps
    every pixel. EXIF and the like are left behind: they are answered.

    Raises:
        ValueError: a mode whose brightness has no fixed meaning in 8 bits: float, or 32-bit integers of another range.
    """
    color = _transparent_color(image)  # before the pixels are read: it is known by how they are stored
    image.load()
    orientation = _orientation(image)
    if image.mode == "F":
        raise ValueError("Mode 'F' (floats) has no plain meaning in RGB: make 8 bits a channel of it first")
    if image.mode.startswith("I"):
        image = _grey(image, color)
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow knows no other way on
    elif color is not None:
        image = image.copy()
        image.info["transparency"] = color
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def part_of(image, box):
    """The part of a PIL image in a box (left, top, right, bottom), shares of its width and height."""
    return image.crop(corners(box, *image.size))


def corners(box, width, height):
    """Left, top, right and bottom in pixels, of a box in shares."""
    left, top, right, bottom = box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def _transparent_color(image):
    """The color that stands for "transparent", as the pixels have it.

    Pillow gives it as it is in the file, but scales the pixels of a PNG of 2, 4 or 16 bits to 8.
    """
    color = image.info.get("transparency")
    stored = image.tile[0][3] if color is not None and image.format == "PNG" and image.tile else None
    if stored in ("L;2", "L;4"):
        return color * {"L;2": 85, "L;4": 17}[stored]
    return tuple(channel >> 8 for channel in color) if stored == "RGB;16B" else color


def _orientation(image):
    """EXIF's, 1 to 8."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, of which the web is full, says nothing; the pixels are intact
        return 1


def _grey(image, transparent):
    """A grey image of 16 bits in 8, L or LA."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # tags: of a TIFF
    if image.mode == "I" and (tags or values.min() < 0 or not 255 < values.max() < 2**16):
        raise ValueError(
            f"Mode 'I' (integers, here from {values.min()} to {values.max()}) has no plain meaning in RGB: make 8 bits "
            "a channel of it first"
        )
    (bits,) = tags.get(TIFF_TAGS["BitsPerSample"], (16,))
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(TIFF_TAGS["PhotometricInterpretation"]) == 0:  # white is zero, which Pillow minds up to 8 bits only
        grey = 255 - grey
    if transparent is None:
        return Image.fromarray(grey)
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.uint8(255 * (values != transparent)))])
