"""Metrics: scores and features become the numbers of a table, each with the interval that it deserves.

* Memorization rate (MR): a target counts as memorized when its mean SSCD over seeds is above 0.7. Decided here, once.
* Diversity (D_SSCD): mean pairwise SSCD among one prompt's generations. High means always the same picture.
* Alignment (A_CLIP): cosine of CLIP's image and text embedding; retrieval: does it pick the right caption among many?
* Fréchet distance between two sets of features (FID, when they are Inception's); FID and KID themselves, by
  torchmetrics, where Inception's weights are present.
* Intervals: the bootstrap for means over targets, Wilson's for shares. The bootstrap of 0 out of 64 is [0, 0], which
  claims to know what 64 targets cannot tell; Wilson's is [0, 0.057].

Nothing is downloaded unless it is asked for: weights are looked for in data/ (`store.data_folder`), and what is missing
is named together with where to get it.

Shapes: N targets or prompts, S seeds, D features.
"""

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dori_utils.core.bars import tqdm
from dori_utils.core.pictures import open_picture, to_rgb
from dori_utils.core.store import data_folder

THRESHOLD = 0.7  # SSCD above which a generation is a copy: Wen et al. (2024), NeMo, DoRI
CLIP_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # ends in the first digits of its SHA-256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


@dataclass(frozen=True)
class MemorizationRate:
    """How much is memorized; `rate` is MR, the others stand beside it.

    Args:
        rate: share of targets whose mean over seeds is above the threshold.
        low, high: Wilson's 95% interval of `rate`.
        images: share of all images above the threshold.
        any_seed: share of targets with at least one seed above the threshold.
        targets: N.
    """

    rate: float
    low: float
    high: float
    images: float
    any_seed: float
    targets: int


def memorization_rate(scores, threshold=THRESHOLD):
    """MR of SSCD scores (N, S) as `sscd_scores` returns them.

    Raises:
        ValueError: not a table of at least one target and seed, or with NaN.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.size or np.isnan(scores).any():
        raise ValueError(f"Scores must be (targets, seeds), at least one of each, without NaN; got {scores.shape}.")
    copies = scores > threshold
    memorized = scores.mean(axis=1) > threshold
    low, high = share_interval(memorized.sum(), len(memorized))
    return MemorizationRate(
        memorized.mean().item(), low, high, copies.mean().item(), copies.any(axis=1).mean().item(), len(scores)
    )


def diversity(embeddings):
    """D_SSCD: mean pairwise cosine among the S >= 2 generations of each prompt; higher is less diverse.

    Args:
        embeddings: (N, S, D), rows of length 1.

    Returns:
        (N,) float32.
    """
    seeds = embeddings.shape[1]
    if seeds < 2:
        raise ValueError("Diversity needs at least two generations for each prompt.")
    pairs = np.einsum("nsd,ntd->nst", embeddings, embeddings)  # (N, S, S)
    first, second = np.triu_indices(seeds, k=1)
    return pairs[:, first, second].mean(axis=1)


@dataclass(frozen=True)
class CLIP:
    """A `CLIPModel` with its tokenizer and image processor, whatever its image size: embeddings of length 1."""

    name: str
    model: torch.nn.Module
    tokenizer: object
    image_processor: object

    @torch.inference_mode()
    def embed_images(self, images, batch_size=64):
        """N PIL images to (N, D) float32."""
        images = [to_rgb(image) for image in images]
        batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        pixels = (self.image_processor(batch, return_tensors="pt").pixel_values for batch in batches)
        return self._unit_rows(
            self.model.get_image_features(batch.to(self.model.device, self.model.dtype)) for batch in pixels
        )

    def embed_rows(self, images):
        """N lists of S PIL images, as `generate` returns them, to (N, S, D) float32."""
        rows = self.embed_images([image for row in images for image in row])
        return rows.reshape(len(images), len(images[0]), -1)  # (N * S, D) → (N, S, D)

    @torch.inference_mode()
    def embed_texts(self, captions, batch_size=256):
        """N captions to (N, D) float32.

        Raises:
            ValueError: a caption has more tokens than the model takes.
        """
        tokens = self.tokenizer(list(captions), padding=True, return_tensors="pt").to(self.model.device)
        length, limit = tokens.input_ids.shape[1], self.model.config.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(f"The longest caption has {length} tokens; {self.name} takes {limit}. Shorten it.")
        batches = zip(*(part.split(batch_size) for part in (tokens.input_ids, tokens.attention_mask)), strict=True)
        return self._unit_rows(
            self.model.get_text_features(input_ids=ids, attention_mask=mask) for ids, mask in batches
        )

    @cached_property
    def fingerprint(self):
        """16 hex characters that change with any weight, and with how images are prepared."""
        digest = hashlib.sha256(self.image_processor.to_json_string().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _unit_rows(self, outputs):
        rows = torch.cat([output.pooler_output for output in outputs]).float()
        return torch.nn.functional.normalize(rows, dim=1).cpu().numpy()


def load_clip(name_or_path, *, device=None, revision=None, local_files_only=True):
    """Load a CLIP from a folder or, by its id, from the Hugging Face Hub.

    Args:
        name_or_path: a folder with model.safetensors, the tokenizer's files and preprocessor_config.json, such as the
            testbed's own; or a Hub id, such as "openai/clip-vit-base-patch32". Pickled weights are never read.
        device: default: the best there is.
        revision: branch, tag or commit of a Hub model. OpenAI's has safetensors in "refs/pr/15" alone.
        local_files_only: take a Hub model from the local cache; False: download what is not there.

    Raises:
        FileNotFoundError: a file is missing; says which, and how to get it.
    """
    # The variant that resizes with Pillow: the other one needs torchvision, which nothing else here does.
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from dori_utils.core.models import default_device

    folder = _clip_folder(name_or_path, revision, local_files_only)
    model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return CLIP(
        name=Path(name_or_path).name,
        model=model.to(device or default_device()).eval().requires_grad_(False),
        tokenizer=CLIPTokenizer.from_pretrained(folder, local_files_only=True),
        image_processor=CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True),
    )


def clip_alignment(images, captions, clip):
    """A_CLIP: cosine between each of N images and its own caption.

    Returns:
        (N,) float32.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images need as many captions, got {len(captions)}.")
    return np.einsum("nd,nd->n", clip.embed_images(images), clip.embed_texts(captions))


def retrieval_accuracy(images, captions, clip):
    """Share of each caption's images for which CLIP ranks that caption first among all N.

    Args:
        images: N lists of PIL images, as `generate` returns them.
        captions: N different captions; chance is 1 / N.

    Returns:
        (N,) float64, one share for each caption; its mean is the accuracy, `bootstrap_interval` its interval.
    """
    if len(images) != len(captions) or len(set(captions)) != len(captions):
        raise ValueError(f"{len(images)} lists of images need as many different captions, got {len(set(captions))}.")
    texts = clip.embed_texts(captions)  # (N, D)
    best = [(clip.embed_images(row) @ texts.T).argmax(axis=1) for row in images]
    return np.array([(picked == caption).mean() for caption, picked in enumerate(best)])


def frechet_distance(features_a, features_b):
    """Fréchet distance of two Gaussians fitted to features (N, D) and (M, D): FID's formula for any features.

    |mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with sample covariances C, in float64. Name the features (SSCD,
    CLIP, Inception) wherever the number stands. It is biased upwards for small N: compare only at equal N and M.

    Raises:
        ValueError: fewer than two rows, other widths, or NaN.

    Source: Heusel et al. (2017), Eq. 6.
    """
    a, b = (torch.as_tensor(np.asarray(features), dtype=torch.float64) for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"Features must be (N, D) and (M, D) with N, M >= 2; got {tuple(a.shape)}, {tuple(b.shape)}.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("The features hold NaN or infinity.")
    # Centred rows A, scaled so that C = A^T A. R of A = QR keeps C = R^T R in at most D rows, and the trace of
    # (C_a C_b)^(1/2) is the nuclear norm of R_a R_b^T: no square root of a singular matrix, exact also for N < D.
    mean_a, mean_b = a.mean(0), b.mean(0)
    r_a, r_b = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b))
    cross = torch.linalg.matrix_norm(r_a @ r_b.T, ord="nuc")
    return ((mean_a - mean_b).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * cross).item()


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
        reference: M of the same, such as the pictures of `targets.read_pairs`.
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


def bootstrap_interval(values, statistic=np.mean, level=0.95, resamples=2000, seed=0):
    """Percentile bootstrap interval of a statistic over targets; the same numbers give the same interval.

    For shares use `share_interval`: where all targets agree, the bootstrap's interval has no width. For few targets it
    is too narrow: of means of normal numbers a 95% interval held 88% at N = 8 and 92% at N = 16 (4,000 draws each).

    Args:
        values: (N,), one number a target (average over seeds first: seeds of one target are not independent).
        statistic: a function of (..., N) and `axis`, as NumPy's are.

    Returns:
        (low, high).

    Raises:
        ValueError: fewer than two targets, or NaN.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or np.isnan(values).any():
        raise ValueError(f"An interval over targets needs (N >= 2,) numbers without NaN; got shape {values.shape}.")
    interval = bootstrap(
        (values,),
        statistic,
        vectorized=True,
        method="percentile",
        confidence_level=level,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def share_interval(count, n, level=0.95):
    """Wilson's interval (low, high) of a share of count out of n; it keeps its width at 0 and at n.

    Source: Wilson (1927); as good as any for small n in Brown, Cai and DasGupta (2001).
    """
    from scipy.stats import binomtest

    interval = binomtest(int(count), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def _clip_folder(name_or_path, revision, local_files_only):
    """The folder with all the files of a CLIP."""
    folder, wanted = Path(name_or_path).expanduser(), Path(name_or_path)
    if not folder.is_dir() and isinstance(name_or_path, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name_or_path):
        from transformers.utils import cached_file

        wanted, options = data_folder() / "clip", {"revision": revision, "local_files_only": local_files_only}
        try:
            files = [cached_file(name_or_path, name, **options) for name in CLIP_FILES]
        except OSError as error:
            reason = f"there is no such folder, and of the Hub: {str(error).splitlines()[0]}"
            raise FileNotFoundError(_no_clip(name_or_path, reason, wanted)) from error
        folder = Path(files[0]).parent
    for name in CLIP_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(_no_clip(name_or_path, f"{name} is missing", wanted))
    return folder


def _no_clip(name_or_path, reason, wanted):
    return (
        f"No CLIP in {name_or_path}: {reason.rstrip('.')}. To get CLIP ViT-B/32:\n    "
        f"hf download openai/clip-vit-base-patch32 {' '.join(CLIP_FILES)} --revision refs/pr/15 --local-dir {wanted}\n"
        "Its main revision has no model.safetensors, only pickled weights, which are never read. By its id it is taken "
        "from the Hub's local cache, or downloaded with local_files_only=False, revision='refs/pr/15'."
    )


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
