#!/usr/bin/env bash
# PNDM with Stable Diffusion's settings evaluates the U-Net 51 times in 50 steps, and the second and third time at the
# same timestep.
#
# Versions:  diffusers 0.42.1, torch 2.13.0.
# Behaviour: PNDMScheduler with skip_prk_steps=True (what Stable Diffusion 1.x comes with) has 51 entries in
#            `timesteps` after set_timesteps(50): 981, 961, 961, 941, ... The second evaluation is a corrector that goes
#            back to the first latents. DDIM with the same schedule has 50: 981, 961, 941, ...
# Output:    PNDM 51: 981 961 961 941; DDIM 50: 981 961 941 921
# Why it matters here: "the first ten steps" or "the first three timesteps" of a pipeline are not ten steps and not three
#            timesteps there; costs counted in steps are one short; and what a hook records second belongs to no step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> /dev/null <<'PY'
import diffusers
from diffusers import DDIMScheduler, PNDMScheduler

assert diffusers.__version__ == "0.42.1"
schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
pndm, ddim = PNDMScheduler(skip_prk_steps=True, **schedule), DDIMScheduler(**schedule)
found = []
for scheduler in (pndm, ddim):
    scheduler.set_timesteps(50)
    found.append(scheduler.timesteps.tolist())
print(f"diffusers {diffusers.__version__}")
print("; ".join(f"{name} {len(t)}: {' '.join(map(str, t[:4]))}" for name, t in zip(("PNDM", "DDIM"), found)))
assert len(found[0]) == 51 and found[0][:4] == [981, 961, 961, 941]
assert len(found[1]) == 50 and found[1][:4] == [981, 961, 941, 921]
PY
