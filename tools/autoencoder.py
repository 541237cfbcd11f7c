"""The testbed's autoencoder: diffusers' `AutoencoderTiny` with weights in closed form.

Latents are the 32 principal components of 8x8 patches; the decoder undoes the encoder by its pseudo-inverse. Learned in
minutes on two cores, autoencoders of this class stayed at 17 to 21 dB; this one has 25, at once.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from dori_utils.testbed.data import FIRST_SEED, ordinary_scene
from dori_utils.testbed.scenes import to_model_range

LATENT_CHANNELS = 32
WIDTH = 64  # of the decoder's layers
# Numbers that a place of the decoder stands for, level by level: of a patch of 8x8 pixels, 4x4, 2x2 and one pixel.
LEVELS = {8: LATENT_CHANNELS, 4: 15, 2: 12, 1: 3}


def new_vae() -> AutoencoderTiny:
    """64x64 pixels ↔ 8x8 latents of 32 channels. Few layers at full resolution, where they cost most."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48, 48),
        decoder_block_out_channels=(WIDTH, WIDTH, WIDTH, WIDTH),
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(3, 1, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )


def make_vae() -> AutoencoderTiny:
    """With its weights, the same on every call."""
    vae = new_vae()
    mean, components, variances = principal_components()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        write_encoder(vae, mean, components)
        write_decoder(vae, mean, components, variances)
    vae.register_to_config(scaling_factor=1 / latent_std(vae))
    return vae.requires_grad_(False)


def some_pixels(first_seed: int, count: int) -> torch.Tensor:
    """(count, 3, 64, 64) of ordinary scenes, -1..1."""
    scenes = [torch.from_numpy(ordinary_scene(index, first_seed).draw()) for index in range(count)]
    return to_model_range(torch.stack(scenes).permute(0, 3, 1, 2))


def latent_std(vae: AutoencoderTiny, num_scenes: int = 512) -> float:
    """Over validation scenes; latents times its inverse have unit variance, as the noise schedule expects."""
    with torch.no_grad():
        return vae.encode(some_pixels(FIRST_SEED["validation"], num_scenes)).latents.std().item()


def principal_components(num_scenes: int = 3000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of 8x8 patches with values in -1..1: mean (192,), what makes latents of them (32, 192), latents' variances (32,).

    Each component is scaled by the fourth root of its variance: latents then differ less in size than components do,
    but the coarse ones are still the larger, so that they are settled first when noise is taken away. All in float64.
    """
    patches = F.unfold(some_pixels(FIRST_SEED["vae"], num_scenes), 8, stride=8).transpose(1, 2).reshape(-1, 192)
    patches = patches.double()
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    variances, vectors = variances.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # eigh leaves the sign open
    size = variances.sqrt().mean().sqrt() * 16  # variance 1 / 16²: for latents so small the decoder's tanh is linear
    return mean, (vectors / variances**0.25 / size).T, variances**0.5 / size**2


def write_encoder(vae: AutoencoderTiny, mean: torch.Tensor, components: torch.Tensor) -> None:
    """Make the encoder's convolutions, all of them linear here, take patches apart into these components."""
    first, *halving, last = vae.encoder.layers  # the halving ones gather 2x2 neighbours: 3, 12, 48 numbers, components
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 2.0  # AutoencoderTiny takes -1..1 to 0..1 before; back again
        first.bias[channel] = -1.0
    # unfold's order of a patch: colour, row, column. Here: row and column within 2x2 of pixels, then of those.
    weights = components.reshape(-1, 3, 2, 2, 2, 2, 2, 2)  # component, colour, 3 bits of the row, 3 of the column
    for row, column in itertools.product(range(2), repeat=2):
        place = 2 * row + column
        for channel in range(3):
            halving[0].weight[3 * place + channel, channel, 1 + row, 1 + column] = 1.0
        for channel in range(12):
            halving[1].weight[12 * place + channel, channel, 1 + row, 1 + column] = 1.0
        for r2, c2, r1, c1, channel in itertools.product(range(2), range(2), range(2), range(2), range(3)):
            source = 12 * (2 * r2 + c2) + 3 * (2 * r1 + c1) + channel
            taken = weights[:, channel, row, r2, r1, column, c2, c1].float()
            halving[2].weight[: len(weights), source, 1 + row, 1 + column] = taken
    pass_on(last, len(components))
    last.bias.copy_(-components @ mean)


def write_decoder(vae: AutoencoderTiny, mean: torch.Tensor, components: torch.Tensor, variances: torch.Tensor) -> None:
    """Make the decoder's layers put patches together again.

    Each level quarters the patches that its places stand for. Upsampling repeats a number four times, and a convolution
    sees all places alike, so how does a place know which quarter it is? By parity: where a column has an even number,
    its left neighbour came from another column of the level above, one of other parity. On the first level parity
    grows from the border, where convolutions are padded with zeros.

    ReLU cuts off what is below 0, so each number travels with an offset, and the first convolution that is no longer
    followed by a ReLU takes it off. A place's numbers come first, then the parities of its row and its column.
    """
    first, _, *layers = vae.decoder.layers
    blocks = [layer.conv[::2] for layer in layers if hasattr(layer, "conv")]
    *after_upsampling, last = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    patch = torch.linalg.pinv(components)  # (pixels of the patch, numbers)
    offset = torch.ones(LATENT_CHANNELS).double()  # more than latents ever are
    pass_on(first, LATENT_CHANNELS)
    first.bias[:LATENT_CHANNELS] = offset.float()
    for block in blocks[:3]:
        grow_parity(block, LATENT_CHANNELS)
    kept, covariance = 0, torch.diag(variances)
    for conv, block, (side, now), below in zip(
        after_upsampling, blocks[3:], LEVELS.items(), list(LEVELS.values())[1:], strict=False
    ):
        pass_on(conv, now + 2, source=kept)
        quarters, means = quartered(patch, side), quartered(mean[:, None], side)[..., 0]
        mean = means.mean(dim=(0, 1))
        patch, covariance = main_directions(quarters, means - mean, covariance, below)
        to_quarter = torch.einsum("pk,rcpn->rckn", patch, quarters)
        shift = torch.einsum("pk,rcp->rck", patch, means - mean) - to_quarter @ offset
        offset = 2 * patch.abs().sum(0)  # more than a number can be while pixels are within 2 of their mean
        write_quartering(block, to_quarter, shift + offset, offset)
        kept = now + 2
    last.weight[:, kept : kept + 3, 1, 1] = (0.5 * patch).float()  # AutoencoderTiny takes 0..1 to -1..1 at last
    last.bias.copy_(0.5 * (mean - patch @ offset + 1))


def quartered(patches: torch.Tensor, side: int) -> torch.Tensor:
    """(3·side², N) → (2, 2, 3·(side / 2)², N): the quarters of each column's patch, by row and column."""
    half = side // 2
    return patches.reshape(3, 2, half, 2, half, -1).permute(1, 3, 0, 2, 4, 5).flatten(2, 4)


def main_directions(quarters, shifts, covariance, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels of a quarter, count): principal components of quarters, and the covariance of the numbers along them."""
    spread = torch.einsum("rcpn,nm,rcqm->pq", quarters, covariance, quarters) / 4
    spread = spread + torch.einsum("rcp,rcq->pq", shifts, shifts) / 4
    directions = torch.linalg.eigh(spread).eigenvectors.flip(1)[:, :count]
    return directions, directions.T @ spread @ directions


def pass_on(conv, count: int, source: int = 0) -> None:
    """Channels source, source + 1, ... become the first ones."""
    channels = torch.arange(count)
    conv.weight[channels, source + channels, 1, 1] = 1.0


def grow_parity(block, number: int) -> None:
    """In each of a block's convolutions: parity = 1 - parity of the neighbour above or to the left, 0 outside."""
    for axis in range(2):
        place, (up, left) = number + axis, ((1, 0), (0, 1))[axis]
        for conv, source, target in zip(block, (place, axis, axis), (axis, axis, place), strict=True):
            conv.weight[target, source, 1 - up, 1 - left] = -1.0
            conv.bias[target] = 1.0
        block[0].weight[2 + axis, place, 1, 1] = block[1].weight[2 + axis, 2 + axis, 1, 1] = 1.0
        block[2].weight[place, 2 + axis, 1, 1] = -1.0  # takes off what the block adds: its input


def write_quartering(block, to_quarter: torch.Tensor, shift: torch.Tensor, offset: torch.Tensor) -> None:
    """In places that know only their patch: which quarter they are, and the numbers of that quarter.

    Args:
        to_quarter: (2, 2, K, N), by row and column: what makes a quarter's numbers of those of its patch, with offset.
        shift: (2, 2, K) is added to them.
        offset: (K,) they stay above its negative.
    """
    compare, choose, add = block
    _, _, below, number = to_quarter.shape
    pass_on(compare, number)  # ReLU leaves them as they are
    for axis in range(2):
        up, left = ((1, 0), (0, 1))[axis]
        even, places = 4 * below + axis, (number + 2 * axis, number + 2 * axis + 1)
        for place, sign in zip(places, (1.0, -1.0), strict=True):  # differs from the neighbour: this one is even
            compare.weight[place, number + axis, 1, 1] = sign
            compare.weight[place, number + axis, 1 - up, 1 - left] = -sign
            choose.weight[even, place, 1, 1] = 1.0
        add.weight[number + 2 + below + axis, even, 1, 1] = 1.0
    for row, column in itertools.product(range(2), repeat=2):
        quarter = slice((2 * row + column) * below, (2 * row + column + 1) * below)
        choose.weight[quarter, :number, 1, 1] = to_quarter[row, column].float()
        bias = shift[row, column].clone()
        for axis, odd in enumerate((row, column)):  # far below 0 in the other quarters
            sign = -1.0 if odd else 1.0
            bias -= 0.0 if odd else 2 * offset
            for place in (number + 2 * axis, number + 2 * axis + 1):
                choose.weight[quarter, place, 1, 1] = sign * 2 * offset.float()
        choose.bias[quarter] = bias.float()
        add.weight[number + 2 : number + 2 + below, quarter, 1, 1] = torch.eye(below)


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in -1..1."""
    return -10 * math.log10(F.mse_loss(decoded, pixels).item() / 4)
