"""Triggers: what attacks found, on disk and back."""

import json
from dataclasses import dataclass, field

import torch

from dori_utils.core.files import as_array, read_safetensors, write_safetensors

REPLAY = """import torch; from diffusers import StableDiffusionPipeline; from safetensors.torch import load_file
pipe = StableDiffusionPipeline.from_pretrained(MODEL)
trigger = load_file(THIS_FILE)["prompt_embeds"][:1]
pipe(prompt_embeds=trigger, generator=torch.Generator().manual_seed(0)).images[0]"""


@dataclass(frozen=True, eq=False)
class Triggers:
    """What attacks found. A case that stopped early has NaN as loss from then on.

    Args:
        prompt_embeds: (N, T, D) float32.
        losses: (N, steps) float32, mean over the draws of a step, before that step's update.
        cases: for each case a dict: target, prompt, seed, start, edit (its fingerprint or None), model, config, stopped
            (None, "early" or "diverged") and the number of steps made.
        recorded: step → (N, T, D), for `AttackConfig.record`; of a case that had stopped by then, its last.
    """

    prompt_embeds: torch.Tensor
    losses: torch.Tensor
    cases: list[dict]
    recorded: dict[int, torch.Tensor] = field(default_factory=dict)

    def __len__(self):
        return len(self.prompt_embeds)

    def __getitem__(self, rows):
        """Some of them: an index list, mask or slice of cases."""
        index = torch.arange(len(self))[rows]
        return Triggers(
            self.prompt_embeds[index],
            self.losses[index],
            [self.cases[i] for i in index.tolist()],
            {step: embeds[index] for step, embeds in self.recorded.items()},
        )

    def by_step(self):
        """Step → (N, T, D): what was recorded, and after the last step what was found; in the order of the steps."""
        return dict(sorted((self.recorded | {self.losses.shape[1]: self.prompt_embeds}).items()))

    def save(self, path):
        """Write a safetensors file, whole or not at all; its metadata say what each trigger is and how to replay it."""
        tensors = {"prompt_embeds": self.prompt_embeds, "losses": self.losses}
        tensors |= {f"recorded {step}": embeds for step, embeds in self.recorded.items()}
        arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
        write_safetensors(path, arrays, {"cases": json.dumps(self.cases), "replay": REPLAY})

    @classmethod
    def load(cls, path):
        """Read what `save` wrote.

        Raises:
            OSError: the file is missing or damaged, or holds no triggers.
        """
        arrays, about = read_safetensors(path, "trigger", "attack again")
        if "cases" not in about:
            raise OSError(f"{path} holds no triggers.")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        recorded = {int(k.split()[1]): v for k, v in tensors.items() if k.startswith("recorded ")}
        return cls(tensors["prompt_embeds"], tensors["losses"], json.loads(about["cases"]), recorded)
