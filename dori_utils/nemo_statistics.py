"""NeMo's statistics: what neurons do for ordinary prompts, and how alike ordinary prompts' first steps are.

tau is the mean plus one standard deviation of first-step similarity over ordinary prompts. It belongs to one
similarity: the authors' 0.428 to their MS-SSIM, "ms_ssim".
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from dori_utils.core.bars import tqdm
from dori_utils.core.diffusion import encode_prompts
from dori_utils.core.hashes import base_hash, todays_hash
from dori_utils.detection import first_step_similarity
from dori_utils.nemo import Config, activations, value_layers

PUBLISHED_TAU = 0.428  # Hintersdorf et al. (2024), for SD 1.4 and `similarity="ms_ssim"`


@dataclass(frozen=True)
class Statistics:
    """Activations over ordinary prompts, by layer, and the threshold tau that follows from ordinary prompts too.

    model: `model_hash` of the pipeline; None if unknown.
    similarity: `Config.similarity` that tau was measured with; None if unknown.
    """

    mean: dict[str, torch.Tensor]
    std: dict[str, torch.Tensor]
    tau: float
    model: str | None = None
    similarity: str | None = None

    def tensors(self):
        """Named tensors that hold its activations, for `from_tensors`."""
        kinds = {"mean": self.mean, "std": self.std}
        return {f"{kind} {name}": value for kind, values in kinds.items() for name, value in values.items()}

    def fingerprint(self):
        """16 hex characters that change with any number in it. What else a search depends on is in its `Config`."""
        digest = hashlib.sha256(repr(self.tau).encode())
        for name, value in self.tensors().items():
            digest.update(name.encode() + value.float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path):
        from safetensors.torch import save_file

        about = {"tau": repr(self.tau), "model": self.model or "", "similarity": self.similarity or ""}
        save_file(self.tensors(), path, metadata=about)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise OSError(f"Corrupt statistics file {path} ({error}). Make it again: collect_statistics.") from error
        similarity = about.get("similarity") or None  # files of older versions do not say
        return cls.from_tensors(tensors, float(about["tau"]), about["model"] or None, similarity)

    @classmethod
    def from_tensors(cls, tensors, tau, model, similarity=None):
        """The statistics that `tensors` was called on."""
        kinds = [{k.split(" ")[1]: v for k, v in tensors.items() if k.startswith(kind)} for kind in ("mean ", "std ")]
        return cls(*kinds, tau=tau, model=model, similarity=similarity)

    def check(self, base: str, layers: dict, similarity: str) -> None:
        """A ValueError if they are of another model, of another similarity, or without these layers."""
        if self.model is not None and todays_hash(self.model) != base:
            raise ValueError(
                f"These statistics are of a model with the hash {self.model}, this one's is {base}. "
                "Collect them for this one: collect_statistics(pipe, ordinary_prompts)."
            )
        if self.similarity not in (None, similarity):
            raise ValueError(
                f"The tau of these statistics is of the similarity {self.similarity!r}, and config.similarity is "
                f"{similarity!r}: a tau belongs to one. Collect them with this config, collect_statistics, or "
                "give published_statistics a tau of its own."
            )
        for name, layer in layers.items():
            if name not in self.mean or len(self.mean[name]) != layer.out_features:
                raise ValueError(f"These statistics have no layer {name} of {layer.out_features} neurons.")


def published_statistics(path, unet, *, similarity=Config.similarity, tau=None):
    """The authors' statistics of SD 1.4 over 50,000 LAION prompts, a `.pt` file; tau is theirs as well: 0.428.

    Their script for tau saves the MS-SSIM of all 45 pairs of 10 seeds of every prompt, and their README says "the mean
    plus one standard deviation" of that file. It evaluates the second timestep under a guidance of 7, where their
    search for neurons has none.

    Only tensors are read from the file (`weights_only`), so it cannot run code.

    Args:
        path: of the file.
        unet: a U-Net of SD 1.4's sizes.
        similarity: as in `Config`, for which tau is; the published one is for "ms_ssim" alone.
        tau: one's own, such as `collect_statistics` measures; needed with any other similarity.

    Raises:
        ValueError: layers of other sizes, or another similarity without a tau.
    """
    if tau is None and similarity != "ms_ssim":
        raise ValueError(
            f"The published tau of {PUBLISHED_TAU} is of the similarity 'ms_ssim', not of {similarity!r}: give a tau "
            "of its own, collect_statistics(pipe, ordinary_prompts, config).tau."
        )
    mean, std = torch.load(Path(path), weights_only=True)
    layers = value_layers(unet)
    sizes, theirs = [layer.out_features for layer in layers.values()], [len(m) for m in mean]
    if sizes != theirs:
        raise ValueError(f"These statistics are of value layers with {theirs} neurons; this model's have {sizes}.")
    values = [dict(zip(layers, of_layers, strict=True)) for of_layers in (mean, std)]
    return Statistics(*values, tau=PUBLISHED_TAU if tau is None else tau, similarity=similarity)


def collect_statistics(pipe, prompts, config=None, *, tau_prompts=500, batch_size=64, progress=True):
    """Statistics over ordinary prompts; tau over the first `tau_prompts` of them, as it needs the U-Net.

    Every value layer of the U-Net is in it, so that `Config.layers` can choose among them.

    tau is of the most similar pair of seeds of each prompt, the number that it cuts later. The authors' is of all pairs
    (see `published_statistics`), so it is lower: on the testbed it would be 0.53 instead of 0.68.
    """
    config = config or Config()
    parts = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    bar = tqdm(parts, desc="activations of ordinary prompts", disable=not progress)
    collected = [activations(pipe, encode_prompts(pipe, part), r"attn2\.to_v$") for part in bar]
    values = {name: torch.cat([part[name] for part in collected]) for name in collected[0]}  # (prompts, neurons)
    similarity = first_step_similarity(
        pipe,
        prompts[:tau_prompts],
        seeds=config.seeds,
        pairwise=config.similarity,
        num_inference_steps=config.num_inference_steps,
        second_timestep=config.second_timestep,
        batch_size=batch_size,
        progress=progress,
    )
    return Statistics(
        mean={name: value.mean(dim=0).cpu() for name, value in values.items()},
        std={name: value.std(dim=0).cpu() for name, value in values.items()},
        tau=float(similarity.mean() + similarity.std(ddof=1)),
        model=base_hash(pipe),
        similarity=config.similarity,
    )
