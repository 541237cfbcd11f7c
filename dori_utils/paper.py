"""The numbers of "Finding DoRI" (ICML 2026) that our figures have beside ours: Stable Diffusion v1.4, VM prompts."""

RESULTS = {  # setting → mean SSCD_Orig, MR
    "original": (0.90, 0.98),
    "NeMo": (0.33, 0.20),
    "Wanda": (0.20, 0.00),
    "control": (0.17, 0.00),
    "control + DoRI": (0.48, 0.00),
    "NeMo + DoRI": (0.91, 0.99),
    "Wanda + DoRI": (0.76, 0.72),
    "Wanda 10% + DoRI": (0.40, 0.01),
    "ESD + DoRI": (0.90, 0.98),
    "Concept Ablation + DoRI": (0.91, 0.97),
    "SISS + DoRI": (0.60, 0.39),
    "fine-tuning + DoRI": (0.36, 0.02),
}

# MR after so many steps of DoRI, read off a figure.
STEPS = (0, 1, 10, 25, 50)
RATE_BY_STEP = {"NeMo": (0.20, 0.73, 0.79, 0.94, 0.99), "Wanda": (0.00, 0.02, 0.18, 0.49, 0.73)}

# Layers 1 to 7: value layers and feed-forward layers of the down and middle blocks. Y_adv: 100 triggers of one image;
# Y_mem: 100 memorized prompts. Activations: mean pairwise L2. Weights: IoU.
LOCALITY = {
    ("activations", "NeMo", "Y_mem"): (106, 72, 164, 129, 299, 303, 405),
    ("activations", "NeMo", "Y_adv"): (153, 110, 224, 184, 396, 409, 517),
    ("activations", "Wanda", "Y_mem"): (184, 259, 252, 202, 262, 263, 454),
    ("activations", "Wanda", "Y_adv"): (217, 199, 217, 151, 176, 154, 259),
    ("weights", "NeMo", "Y_mem"): (0.579, 1.0, 0.814, 0.920, 0.944, 0.977, 0.986),
    ("weights", "NeMo", "Y_adv"): (0.571, 1.0, 0.778, 0.905, 0.977, 0.998, 0.999),
    ("weights", "Wanda", "Y_mem"): (0.435, 0.655, 0.420, 0.687, 0.384, 0.149, 0.070),
    ("weights", "Wanda", "Y_adv"): (0.569, 0.804, 0.581, 0.742, 0.541, 0.341, 0.256),
}


def with_dori(*mitigations: str) -> dict[str, tuple[float, float]]:
    """Mitigation → mean SSCD_Orig and MR of the memorized images with DoRI."""
    return {name: RESULTS[f"{name} + DoRI"] for name in mitigations}
