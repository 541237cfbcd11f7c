"""Files: named arrays and texts about them as safetensors, whole or not at all."""

import uuid
from pathlib import Path

import torch


def as_array(tensor):
    """NumPy's array of a tensor; it has no bfloat16, whose numbers float32 holds as they are."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write_safetensors(path, arrays, metadata):
    """Write named arrays and texts about them to a file, whole or not at all."""
    from safetensors.numpy import save_file

    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        save_file(arrays, part, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_safetensors(path, what, remedy):
    """Named arrays and the texts about them; an `OSError` with the remedy if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: as_array(file.get_tensor(key)) for key in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise OSError(f"Corrupt {what} file {path} ({error}). Delete it and {remedy}.") from error
