"""Arguments: what was given in the place of what is asked for, said in one sentence where it comes in."""

from collections.abc import Iterable


def listed(name, values, kind, words):
    """The values as a list, once it is certain that they are one, of `kind`s.

    Args:
        name: of the argument.
        words: what to give, for the error's sentence.

    Raises:
        TypeError: a single value, which a text is, too; or one of another kind among them.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r:.60}: give {words}.")
    values = list(values)
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{name} has {value!r:.60} in it: give {words}.")
    return values


def check_preset(preset):
    """Raises a TypeError for a preset's name."""
    if isinstance(preset, str):
        raise TypeError(f"preset is the name {preset!r}: give the preset itself, PRESETS[{preset!r}].")


def first_three(names):
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
