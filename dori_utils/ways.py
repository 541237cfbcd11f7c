"""Ways in: the attacks that an audit knows, each with what its pictures are generated from and judged by.

A defence against one is no defence against another: DoRI needs an embedding, `tokens` text alone, `latent` the noise,
`completion` half of the image. What they find is judged by the same line, and each is held against the same attack on
images that the model has never seen.
"""

from dataclasses import asdict, dataclass, replace

from dori_utils import completion, latent, tokens
from dori_utils.attack import AttackConfig
from dori_utils.cached import cached_attack, cached_inversion, cached_prompts
from dori_utils.presets import Preset

NAMES = {AttackConfig: "DoRI", completion.Config: "completion", latent.Config: "latent", tokens.Config: "tokens"}
USUAL = {"dori": "attack", "completion": "completion", "latent": "latent", "tokens": "tokens"}  # option → in a preset


@dataclass(frozen=True, eq=False)
class Answer:
    """What an attack has found for N targets.

    Args:
        preset: with the sampling of its pictures.
        given: what `cached_generate` takes beside the prompts: prompt_embeds, latents, or given.
        part: the box of a picture that is judged, see `pictures.part_of`; None: all of it.
        texts: N prompts that were found, if it was prompts.
    """

    preset: Preset
    given: dict
    part: tuple | None = None
    texts: list[str] | None = None


def name_of(config) -> str:
    """What tables call the attack of these settings."""
    return NAMES[type(config)]


def settings_of(config) -> str:
    """The settings in a line."""
    return " ".join(f"{key}={value}" for key, value in asdict(config).items())


def answers(pipe, targets, config, preset, store, edits=None, starts=None, progress=True) -> dict[int, Answer]:
    """Attack targets, or read it from the store.

    Args:
        config: settings of one of the attacks.
        preset: of everything else; its seeds are those of `latent`'s mixtures.
        edits: None, or one `Edit` or None for each target.
        starts: embeddings (N, T, D) that DoRI starts from; for no other attack.

    Returns:
        What was found by step, in their order, the attack's result last: steps of DoRI and of `tokens`, percent of
        inverted noise in `latent`, sampling steps of `completion`.
    """
    if isinstance(config, AttackConfig):
        found = cached_attack(pipe, targets, config, store, edits, starts, progress=progress)
        return {step: Answer(preset, {"prompt_embeds": embeds}) for step, embeds in found.by_step().items()}
    if starts is not None:
        raise ValueError(f"starts are embeddings for DoRI to start from; {name_of(config)} takes none.")
    return OTHERS[type(config)](pipe, targets, config, preset, store, edits, progress)


def _completed(pipe, targets, config, preset, store, edits, progress):
    given = completion.known_halves(pipe, targets, config)
    return {preset.num_inference_steps: Answer(preset, {"given": given}, config.unknown)}


def _from_inverted_noise(pipe, targets, config, preset, store, edits, progress):
    unguided = replace(preset, guidance_scale=1.0)
    inverted = cached_inversion(pipe, targets, config, preset.num_inference_steps, store, edits, progress=progress)
    inverted = inverted.to(pipe.unet.device)
    mixtures = {share: latent.mixed(pipe, inverted, preset.seeds, share) for share in {*config.record, config.share}}
    shares = [*sorted(mixtures.keys() - {config.share}), config.share]
    return {round(100 * share): Answer(unguided, {"latents": mixtures[share].cpu()}) for share in shares}


def _from_prompts(pipe, targets, config, preset, store, edits, progress):
    found = cached_prompts(pipe, targets, config, store, edits, progress=progress)
    texts = {step: [case["found after"][str(step)] for case in found.cases] for step in config.record}
    texts |= {config.steps: [case["found"] for case in found.cases]}
    return {s: Answer(preset, {"prompt_embeds": e}, texts=texts[s]) for s, e in found.by_step().items()}


OTHERS = {completion.Config: _completed, latent.Config: _from_inverted_noise, tokens.Config: _from_prompts}
