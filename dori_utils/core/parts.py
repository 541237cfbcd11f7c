"""Parts: what of a pipeline an edit may change, and what weights and settings are called in an edit.

A U-Net's parameter has its own name, `conv_in.weight`. One of another part has the part in front:
`text_encoder.final_layer_norm.weight`, `vae.decoder.conv_in.weight`. A text encoder's prefix text_model., which
transformers dropped in 5.6, is no part of a name.

Settings are those that change what is computed and no weight's shape: a scheduler as a whole, and the scale of a VAE's
latents. All others, such as a text encoder's activation function, make another architecture.
"""

from contextlib import contextmanager

from dori_utils.core.hashes import WEIGHTS
from dori_utils.core.hub import quiet

WORDS = {"unet": "U-Net", "text_encoder": "text encoder", "vae": "VAE", "scheduler": "scheduler"}
VAE_SETTINGS = ("scaling_factor", "shift_factor")
TEXT_SETTINGS = (  # of CLIP's text model, those that what it computes depends on
    "hidden_act hidden_size intermediate_size layer_norm_eps max_position_embeddings num_attention_heads "
    "num_hidden_layers vocab_size"
).split()


def name_in_edit(part, name):
    """What the parameter `name` of a part is called in an edit."""
    if part == "unet":
        return name
    return f"{part}.{name.removeprefix('text_model.') if part == 'text_encoder' else name}"


def part_of(name):
    """The part whose parameter an edit calls so."""
    first = name.partition(".")[0]
    return first if first in WEIGHTS else "unet"


def named_parameters(pipe, parts=WEIGHTS):
    """Name in an edit → parameter, of these parts."""
    return {
        name_in_edit(part, name): parameter
        for part in parts
        for name, parameter in getattr(pipe, part).named_parameters()
    }


def check_settings(method, settings):
    """A ValueError if an edit has settings of another kind than those of the module's docstring."""
    of_vae = set(settings.get("vae", {})) - set(VAE_SETTINGS)
    if unknown := sorted((settings.keys() - {"scheduler", "vae"}) | of_vae):
        raise ValueError(f"This edit by {method} changes the settings {', '.join(unknown)}, which no edit can.")
    if "scheduler" in settings:
        made_scheduler(settings["scheduler"])


def made_scheduler(settings):
    """The scheduler with these settings, among them the name of its class in diffusers."""
    import diffusers

    name = settings.get("_class_name")
    scheduler = getattr(diffusers, str(name), None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise ValueError(f"There is no scheduler called {name} in diffusers {diffusers.__version__}.")
    with quiet():
        return scheduler.from_config({key: value for key, value in settings.items() if key != "_class_name"})


def scheduler_settings(scheduler):
    """What `made_scheduler` makes the same scheduler of."""
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"_class_name": type(scheduler).__name__} | settings


@contextmanager
def with_settings(pipe, settings):
    """Within it a pipeline has an edit's settings, behind it its own again."""
    scheduler, of_vae = pipe.scheduler, settings.get("vae", {})
    before = {name: pipe.vae.config.get(name) for name in of_vae}
    try:
        if "scheduler" in settings:
            pipe.scheduler = made_scheduler(settings["scheduler"])
        if of_vae:
            pipe.vae.register_to_config(**of_vae)
        yield
    finally:
        if "scheduler" in settings:
            pipe.scheduler = scheduler
        if of_vae:
            pipe.vae.register_to_config(**before)
