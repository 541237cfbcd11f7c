#!/usr/bin/env bash
# MS-SSIM of one pair of images depends on what else is in the batch, also with reduction="none".
#
# Versions:  torchmetrics 1.9.0, torch 2.13.0.
# Behaviour: without data_range, torchmetrics takes the range from the data: the largest of the ranges of `preds` and
#            `target`, over the whole batch, and anew at each of the scales. So the score of the first pair changes when
#            a pair of more contrast stands beside it. With data_range=1.0 it does not.
# Output:    alone 0.929299, beside another pair 0.945463; with data_range=1.0: 0.929303 and 0.929303
# Why it matters here: scores of "how alike are two generations" that were published without a range (a threshold, say)
#            can be reproduced only with the same images in the same batches, and not with data_range=1.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchmetrics==1.9.0
"$folder/venv/bin/python" - <<'PY'
import torch, torchmetrics
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

generator = torch.Generator().manual_seed(0)
image = torch.nn.functional.interpolate(torch.rand(1, 4, 16, 16, generator=generator), size=64, mode="bicubic")
image = image.clamp(0, 1)
other = (image + 0.1 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
companion = 4 * torch.rand(1, 4, 64, 64, generator=generator)  # compared with itself
settings = dict(kernel_size=11, betas=(1 / 3, 1 / 3, 1 / 3), reduction="none")


def scores(**range):
    alone = ms_ssim(image, other, **settings, **range)[0].item()
    beside = ms_ssim(torch.cat([image, companion]), torch.cat([other, companion]), **settings, **range)[0].item()
    return alone, beside


free, fixed = scores(), scores(data_range=1.0)
print(f"torchmetrics {torchmetrics.__version__}, torch {torch.__version__}")
print(f"alone {free[0]:.6f}, beside another pair {free[1]:.6f}; with data_range=1.0: {fixed[0]:.6f} and {fixed[1]:.6f}")
assert torchmetrics.__version__ == "1.9.0"
assert free[1] - free[0] > 0.01, "the score of a pair no longer depends on its batch"
assert abs(fixed[1] - fixed[0]) < 1e-4, "with a range it does"
PY
