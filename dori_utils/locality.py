"""Locality: where does a memorized image live? Three places to look, each with the control that it needs.

"Finding DoRI" (ICML 2026) starts the attack from many random embeddings for one image, and asks whether the triggers
that it finds have anything in common: a place in embedding space, the activations that they cause, the weights that a
mitigation would prune for them. Each is compared with what would be there anyway: the random starts themselves, the
prompts of other images, and triggers of images that the model has never seen.

* Embeddings: two-dimensional maps, distances, and whether a linear classifier tells triggers apart (`probe`).
* Activations: L2 distance of one layer's outputs under different embeddings and the same initial noise.
* Weights: intersection over union (IoU) of what NeMo or Wanda selects, against that of random sets of the same size.

Statistics are over images, as triggers of one image are not independent: pairs of triggers are averaged into blocks,
one for each two images (`block_means`), and images are resampled.

Shapes: N embeddings (N, T, D) of G images; K denoising steps; matrices (N, N) over pairs of embeddings.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist

from dori_utils.attack import AttackConfig
from dori_utils.core import hooks
from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import ddim, initial_latents
from dori_utils.core.edits import Edit, check_comparable
from dori_utils.nemo import neurons

MAPS = {"umap": 4, "tsne": 2, "pca": 2}  # methods of `embedding_map`, and how many embeddings each needs


@dataclass(frozen=True)
class Config:
    """How many triggers are looked at, and how they are made; the attack is on the model without any mitigation.

    Defaults are the paper's where it says something: 100 random starts of an image, 50 steps.
    """

    images: int = 8  # memorized images; the paper shows one
    starts: int = 100  # of each
    controls: int = 8  # images that the model has never seen
    control_starts: int = 100
    attack: AttackConfig = field(default_factory=lambda: AttackConfig(start="noise", record=(0,)))
    num_inference_steps: int = 50  # of the generations that show a trigger's image, and of the view by timestep
    guidance_scale: float = 7.5  # of those generations
    compared: int = 100  # triggers of each image whose activations are compared
    edited: int = 100  # triggers of each image that Wanda is run on
    edited_nemo: int = 100  # and NeMo
    nemo_seeds: int = 10  # initial noises that NeMo watches for them; NeMo's own are ten
    timesteps: int = (
        3  # denoising steps in the view by timestep. Ours: SD 1.4 has 46 MB of outputs a step and embedding
    )


# --- Triggers from random starts -----------------------------------------------------------------------------------


# --- Embeddings ----------------------------------------------------------------------------------------------------


def embedding_map(prompt_embeds, method="umap", seed=0):
    """Two-dimensional map (N, 2) of embeddings (N, T, D).

    Args:
        method: "umap", "tsne" or "pca". The first two keep neighbours and not distances: how far apart two groups lie
            on them means nothing, and they find clusters in noise too. PCA is a projection.
        seed: of the first two.

    Raises:
        ValueError: an unknown method, or fewer embeddings than it takes: 4 for UMAP, 2 for the others.
    """
    if method not in MAPS:
        raise ValueError(f"No map {method!r}; there is {', '.join(MAPS)}.")
    if len(prompt_embeds) < MAPS[method]:
        raise ValueError(f"{len(prompt_embeds)} embeddings are too few for a map by {method}: it takes {MAPS[method]}.")
    rows = _flat(prompt_embeds)
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(2, random_state=seed).fit_transform(rows)
    if method == "tsne":
        from sklearn.manifold import TSNE

        return TSNE(2, perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed).fit_transform(rows)
    from umap import UMAP

    return UMAP(n_neighbors=min(15, len(rows) - 1), n_jobs=1, random_state=seed).fit_transform(rows)


def distances(prompt_embeds, others=None):
    """L2 distances (N, M) of embeddings (N, T, D) to others (M, T, D), or (N, N) among themselves."""
    rows = _flat(prompt_embeds)
    return cdist(rows, rows if others is None else _flat(others))


def probe(features, labels, groups=None, folds=5):
    """Which rows a linear classifier (logistic regression) gets right, when it has not seen them: (N,) bool.

    Args:
        features: (N, F), for example embeddings, flattened.
        labels: N classes.
        groups: N names; rows of one group are never both learned from and tested, so that a classifier of memorized
            against control images cannot win by knowing the image. Default: every row is its own group.
        folds: parts of the rows, of which each is tested in turn; fewer if a class has fewer groups.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = np.asarray(features), np.asarray(labels)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    folds = min(folds, *(len(set(groups[labels == label])) for label in set(labels)))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=200))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    return cross_val_predict(classifier, features, labels, groups=groups, cv=split) == labels


def _flat(prompt_embeds):
    return torch.as_tensor(prompt_embeds).float().flatten(1).numpy()


# --- Activations ---------------------------------------------------------------------------------------------------


class Discrepancy(NamedTuple):
    """Pairwise distances of activations under N embeddings, at each of K steps: layer name → (K, N, N) float32.

    l2: of the layer's output for all its tokens. relative: l2 over the root mean square of the two outputs' norms, so
    that layers of any size and strength compare; 0 for the same output, sqrt(2) for unrelated ones of one norm.
    """

    l2: dict[str, np.ndarray]
    relative: dict[str, np.ndarray]


@torch.no_grad()
def activation_discrepancy(
    pipe, prompt_embeds, layers, *, seed=0, steps=1, num_inference_steps=50, batch_size=32, progress=True
):
    """How differently layers answer to N embeddings that start from the same initial noise.

    Which output the paper takes is not published; here it is the layer's own. At the first step all rows have the same
    latent. Later ones are on each embedding's own way, without guidance, with DDIM whatever sampler the pipeline has:
    the first evaluations of Stable Diffusion's PNDM are of one and the same timestep.

    Args:
        prompt_embeds: (N, T, D).
        layers: names of the layers, a regular expression, as in `nemo.Config` and `wanda.Config`.
        seed: of the initial noise.
        steps: K, of the first denoising steps.
        num_inference_steps: of the whole schedule.

    Raises:
        ValueError: no layer has a name that fits the pattern.
    """
    chosen = hooks.layers(pipe.unet, layers)
    noise, scheduler = initial_latents(pipe, [seed]), ddim(pipe, num_inference_steps)
    outputs = {name: [] for name in chosen}
    with tqdm(total=len(prompt_embeds), desc="activations", disable=not progress) as bar:
        for part in prompt_embeds.to(pipe.unet.device, pipe.unet.dtype).split(batch_size):
            with hooks.outputs(chosen) as of_part:
                latents = noise.expand(len(part), -1, -1, -1)
                for t in scheduler.timesteps[:steps]:
                    output = pipe.unet(latents, t, encoder_hidden_states=part).sample
                    latents = scheduler.step(output, t, latents).prev_sample
            for name, by_step in of_part.items():
                outputs[name].append(torch.stack([out.flatten(1).float().cpu() for out in by_step]))  # (K, B, F)
            bar.update(len(part))
    l2, relative = {}, {}
    for name in chosen:
        rows = torch.cat(outputs.pop(name), dim=1)  # (K, N, F)
        l2[name] = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        squares = rows.square().sum(dim=2).numpy()  # (K, N)
        relative[name] = l2[name] / np.sqrt((squares[:, :, None] + squares[:, None, :]) / 2)
    return Discrepancy(l2, relative)


# --- Weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Agreement:
    """What N sets of weights or neurons have in common, layer by layer; "all" is all layers together.

    Args:
        overlap: layer → (N, N) sizes of the intersections; the sets' own sizes are the diagonal.
        total: layer → how many there are to choose from.
    """

    overlap: dict[str, np.ndarray]
    total: dict[str, int]

    def iou(self, empty=1.0):
        """Layer → (N, N) intersection over union; of two empty sets `empty`, 1 in the paper, NaN to leave them out."""
        values = {}
        for layer, overlap in self.overlap.items():
            union = np.add.outer(np.diag(overlap), np.diag(overlap)) - overlap
            values[layer] = np.where(union > 0, overlap / np.maximum(union, 1), empty)
        return values

    def chance(self, empty=np.nan):
        """Layer → (N, N) IoU of random sets of these sizes: their expected intersection over the union that it leaves.

        Random within each layer, also for "all". Wanda prunes every row alike; random within rows comes to the same.
        """
        sizes = {layer: np.diag(overlap).astype(float) for layer, overlap in self.overlap.items()}
        expected = {layer: np.outer(size, size) / self.total[layer] for layer, size in sizes.items()}
        expected["all"] = sum(overlap for layer, overlap in expected.items() if layer != "all")
        values = {}
        for layer, overlap in expected.items():
            union = np.add.outer(sizes[layer], sizes[layer]) - overlap
            values[layer] = np.where(union > 0, overlap / np.maximum(union, 1e-12), empty)
        return values


def weight_agreement(edits):
    """`Agreement` of what N edits zero.

    Neurons count as one each where a mask switches whole rows off, single weights otherwise.

    Raises:
        ValueError: no edits, edits of different models or layers, or such as add to weights.
    """
    check_comparable(edits)
    names = list(edits[0].masks)
    if any(list(edit.masks) != names for edit in edits):
        raise ValueError("These edits are of different layers: what they have in common is not defined.")
    overlap, total = {}, {}
    for name in names:
        shapes = {tuple(edit.masks[name].shape) for edit in edits}
        if len(shapes) > 1:
            raise ValueError(f"Some of these edits mask whole neurons of {name} and some single weights: {shapes}.")
        masks = torch.stack([edit.masks[name].flatten() for edit in edits]).float()  # (N, weights)
        overlap[name] = (masks @ masks.T).round().long().numpy()
        total[name] = masks.shape[1]
    overlap["all"], total["all"] = sum(overlap.values()), sum(total.values())
    return Agreement(overlap, total)


@torch.no_grad()
def wanda_neurons(pipe, edits, prompt_embeds):
    """Wanda's choice of neurons in NeMo's layers, as many in each as NeMo took there: one edit for each of N.

    The two methods work in different layers, on different things, so their own sets cannot overlap. This is the
    comparison that we define: in a value layer, Wanda's score |W_ij| ||X_j||_2 is summed over a neuron's inputs j (X
    the text embedding, each token scaled to unit length), and the highest neurons are taken.

    Args:
        edits: N edits by NeMo.
        prompt_embeds: the embeddings (N, T, D) that they were made for.
    """
    unit = torch.nn.functional.normalize(prompt_embeds.float(), dim=2)  # (N, T, D)
    norms = unit.square().sum(dim=1).sqrt()  # (N, D)
    chosen = []
    for edit, norm in zip(edits, norms, strict=True):
        masks = {}
        for name, of_layer in neurons(edit).items():
            weight = pipe.unet.get_submodule(name).weight.detach().float().cpu()
            scores = weight.abs() @ norm.cpu()  # (neurons,)
            mask = torch.zeros(len(weight), 1, dtype=torch.bool)
            mask[scores.topk(len(of_layer)).indices] = True
            masks[f"{name}.weight"] = mask
        chosen.append(Edit("Wanda, by neuron", edit.model, targets=edit.targets, masks=masks))
    return chosen


# --- Statistics over images ----------------------------------------------------------------------------------------
