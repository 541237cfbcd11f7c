"""Is the image really gone? Find, mitigate and recover memorized training images in text-to-image diffusion models.

Every module is one noun: `from dori_utils.attack import attack`, `from dori_utils.core.models import load_pipeline`.
Importing the package itself loads nothing, so that a command answers at once.
"""

__version__ = "0.1.0"
