"""Weights that someone else has made: `read_edit` reads them as the `Edit` that they are of a pipeline.

* a file that `Edit.save` wrote;
* a pipeline's folder, or that of its U-Net, text encoder, VAE or scheduler, in diffusers' layout;
* a file with weights by their names: of some layers, of parts, or a whole checkpoint, in diffusers' or CompVis' names;
* a LoRA, DoRA, LoCon, LoHa, LoKr, full differences, norms: a file or a folder of diffusers, peft, kohya or LyCORIS;
* a table of neurons that NeMo's authors' code wrote.

Which it is, is told by what it holds, not by its name. All of it is used, or it is refused by what was not. Files are
safetensors, or pickled (.pt, .pth, .ckpt, .bin): tensors only; no code of the file is run.
"""

from pathlib import Path

from dori_utils.cli.published import folders, neurons
from dori_utils.cli.published.adapters import is_adapter, read_adapters
from dori_utils.cli.published.state_dicts import read_state_dict
from dori_utils.core.edits import Edit, check_fits
from dori_utils.core.hub import PICKLED
from dori_utils.core.tensor_files import read_tensors

KINDS = (
    "a file of Edit.save, a U-Net or a pipeline (its folder or a checkpoint), weights of some layers, a LoRA or the "
    "like, or NeMo's table of neurons"
)


def read_edit(pipe, path, *, name=None) -> Edit:
    """The edit of a pipeline that a file or a folder stands for.

    Args:
        pipe: the base that it was made from, without an edit applied to it; left as it is.
        path: see the module's docstring. Of a table of neurons, all prompts' together; see `read_edits`.
        name: its `method`, for tables; default: the name of the file, or of the folder. A file of `Edit.save` has one.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another architecture, no change at all, a change that no edit can hold, an `Edit` of another base,
            tensors that are not used, or none of the kinds.
        OSError: a damaged file, or a pickled one that holds more than tensors.
    """
    path = Path(path).expanduser()
    name = name or edit_name(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}. Give {KINDS}.")
    if path.is_dir() and folders.is_pipeline(path):
        # A pipeline's folder may hold a checkpoint of the same model, too, as those on the Hub do.
        return folders.read_pipeline(pipe, path, name)
    if path.is_dir() and any((path / f"{kind}config.json").is_file() for kind in ("", "scheduler_")):
        return folders.read_part(pipe, path, name)
    path = _only_file(path) if path.is_dir() else path
    if neurons.is_table(path):
        return neurons.read_union(pipe, path, name)
    try:
        tensors, about = read_tensors(path)
    except OSError as error:
        raise OSError(str(error) if path.suffix in PICKLED else f"{error} Give {KINDS}.") from error
    if "edit" in about:
        edit = Edit.load(path)
        check_fits(pipe, [edit])
        return edit
    read = read_adapters if is_adapter(tensors) else read_state_dict
    return read(pipe, path, tensors, about, name)


def read_edits(pipe, path, targets, *, name=None) -> Edit | list[Edit]:
    """`read_edit`; of a table of neurons a list with the edit of each target's prompt, as `audit` takes it.

    Raises:
        ValueError: as `read_edit`; or targets whose prompts a table does not have.
    """
    path = Path(path).expanduser()
    if path.is_file() and neurons.is_table(path):
        return neurons.edits_of_targets(neurons.read_table(pipe, path, name or edit_name(path)), targets, path)
    return read_edit(pipe, path, name=name)


def edit_name(path):
    """What the edit in a file or folder is called; of a folder named unet, what the one around it is called."""
    path = Path(path).resolve()
    return path.parent.name if path.name == "unet" else path.stem if path.is_file() else path.name


def edit_names(paths):
    """`edit_name` of each path, where two are the same with the folders around them in front: "esd/unet_ema".

    Raises:
        ValueError: the same path twice, or names that no folder tells apart.
    """
    places = [Path(path).resolve() for path in paths]
    places = [(place.parent if place.name == "unet" else place).parent / edit_name(place) for place in places]
    names = []
    for i, own in enumerate(places):
        rivals = [place.parts for j, place in enumerate(places) if j != i]
        lengths = range(1, len(own.parts))
        length = next((n for n in lengths if all(own.parts[-n:] != rival[-n:] for rival in rivals)), None)
        if length is None:
            raise ValueError(f"Two mitigations are called {own.name!r}. Rename one of the files or folders.")
        names.append("/".join(own.parts[-length:]))
    return names


def _only_file(folder):
    """The only file of weights in a folder; one that is pickled only where there is no other."""
    for suffixes, what in ((["*.safetensors"], "safetensors files"), ([f"*{s}" for s in PICKLED], "pickled files")):
        files = sorted(file for suffix in suffixes for file in folder.glob(suffix))
        if len(files) > 1:
            raise ValueError(f"{folder} holds {len(files)} {what}: give the one that is meant.")
        if files:
            return files[0]
    raise FileNotFoundError(f"{folder} holds no U-Net with its config.json, and no file of weights. Give {KINDS}.")
