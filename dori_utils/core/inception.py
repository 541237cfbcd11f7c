"""FID and KID, with Inception's weights as torch-fidelity has them."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dori_utils.core.bars import tqdm
from dori_utils.core.pictures import open_picture, to_rgb
from dori_utils.core.store import data_folder

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # ends in the first digits of its SHA-256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


@dataclass(frozen=True)
class InceptionDistances:
    """How far images are from real ones.

    Args:
        fid: Fréchet distance of Inception's features; biased upwards for few images, so compare only equal numbers.
        kid: their squared maximum mean discrepancy, of a cubic kernel, without bias: its mean over 100 subsets of 1000
            images, or of all if there are fewer.
        kid_std: standard deviation over the subsets.
        images, reference: how many there were.
    """

    fid: float
    kid: float
    kid_std: float
    images: int
    reference: int


def inception_distances(images, reference, weights=None, *, batch_size=32, device=None, progress=True):
    """FID and KID of images against real ones, by torchmetrics with torch-fidelity's Inception.

    Real pictures are cropped in the middle and resized to the size of the first image, and all of them by the network
    to 299 pixels, with torchmetrics' default filter.

    Args:
        images: N PIL images or paths, such as generations for the captions of the real pictures.
        reference: M of the same, such as the pictures of `tables.read_pairs`.
        weights: torch-fidelity's file; default: `INCEPTION` in data/.
        batch_size: images that go through the network together.
        device: default: the best there is.

    Raises:
        ValueError: fewer than two images on one side.
        FileNotFoundError: no weights; says where to get them.
        OSError: a damaged file of weights, or one that holds anything but tensors.
        ImportError: torch-fidelity is not installed; says how to.

    Source: Heusel et al. (2017) for FID, Bińkowski et al. (2018) for KID.
    """
    if min(len(images), len(reference)) < 2:
        raise ValueError(f"{len(images)} images and {len(reference)} real ones: FID and KID need two of each or more.")
    network = _inception(weights, device)
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    size = _open(images[0]).size
    real, ours = (_inception_features(network, part, size, batch_size, progress) for part in (reference, images))
    features = torch.nn.Identity()  # both metrics take the features as they are
    features.num_features = ours.shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")  # they are here anyway
        torch.manual_seed(0)  # of the subsets
        subset_size = min(1000, len(real), len(ours))
        fid, kid = FrechetInceptionDistance(features), KernelInceptionDistance(features, subset_size=subset_size)
        for metric in (fid, kid):
            metric.update(real, real=True)
            metric.update(ours, real=False)
        mean, std = kid.compute()
    return InceptionDistances(fid.compute().item(), mean.item(), std.item(), len(ours), len(real))


@torch.inference_mode()
def _inception_features(network, images, size, batch_size, progress):
    """(N, D) float32 of N PIL images or paths, brought to one size."""
    features = []
    for start in tqdm(range(0, len(images), batch_size), desc="Inception", disable=not progress):
        batch = [_open(image) for image in images[start : start + batch_size]]
        pixels = np.stack([np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC)) for image in batch])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (B, H, W, 3) → (B, 3, H, W)
        features.append(network(pixels.to(next(network.parameters()).device)).cpu())
    return torch.cat(features)


def _open(image):
    return to_rgb(image) if isinstance(image, Image.Image) else open_picture(image)


def _inception(path, device):
    """torch-fidelity's Inception, which gives (B, 2048) for uint8 (B, 3, H, W)."""
    from dori_utils.core.models import default_device

    state = _inception_weights(Path(path or data_folder() / INCEPTION))
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises a RuntimeError
        raise ImportError(
            f"FID and KID need torch-fidelity and a torchvision that fits torch {torch.__version__}, and cannot import "
            f"them ({error}): pip install -e '.[fid]'"
        ) from error
    # torch-fidelity unpickles whatever it is given. So it is given what was just written here: tensors alone.
    tensors = io.BytesIO()
    torch.save(state, tensors)
    tensors.seek(0)
    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], tensors)
    except RuntimeError as error:
        raise OSError(f"{path or INCEPTION} holds other weights than Inception's ({error}).") from error
    return network.to(device or default_device())


def _inception_weights(path):
    """Name → tensor; nothing but tensors is read."""
    advice = f"Download {INCEPTION_URL} to {path.parent}/."
    if not path.is_file():
        raise FileNotFoundError(f"FID and KID need Inception's weights, and there is no {path}. {advice}")
    if path.name == INCEPTION:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(path.stem.rpartition("-")[2]):
            raise OSError(f"{path} is damaged: its SHA-256 begins with {digest[:8]}. {advice}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle raises what it likes
        raise OSError(f"{path} is no file of tensors alone. {advice}") from error
