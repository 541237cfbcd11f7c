"""Words: what the attacks of an audit are called in its sentences, tables and figures."""

from collections.abc import Callable
from dataclasses import dataclass


def counted(steps):
    return f"{steps:.0f} step{'' if steps == 1 else 's'}"


@dataclass(frozen=True)
class Way:
    """How an attack is put into words.

    Args:
        source: what an image comes back from.
        found: steps → what all images come back from.
        axis: what its steps are, in a figure.
        about: what it is, in a sentence or two.
        longer: what to do where it finds nothing.
        less: what to do where it finds images that the model has never seen.
        caption: steps → the same below a picture.
        amount: steps → the same in a sentence, after `preposition`; "" where there is nothing to count.
    """

    source: str
    found: Callable[[float], str]
    axis: str
    about: str
    longer: str
    less: str
    caption: Callable[[float], str] = counted
    amount: Callable[[float], str] = counted
    preposition: str = "after"

    def after(self, steps):
        """“after 50 steps”, or nothing where there is nothing to count."""
        return f"{self.preposition} {self.amount(steps)}" if self.amount(steps) else ""


WAYS = {
    "DoRI": Way(
        source="a trigger",
        found=lambda steps: f"triggers found in {counted(steps)}",
        axis="steps of DoRI",
        about="a text embedding that the attack DoRI optimises for the known image, while the weights stay as they "
        "are. “10 steps”: what it gives after so many steps of the attack.",
        longer="Attack with more steps (--steps 500), from noise (--start noise), several times (--restarts 4), with "
        "another learning rate (--lr 0.05)",
        less="Attack with fewer steps (--steps), which put in less",
    ),
    "completion": Way(
        source="one half",
        found=lambda steps: "one half of them (the other is judged)",
        axis="sampling steps with one half given",
        about="half of the image is given, and the model completes it under the image’s own caption. SSCD is that of "
        "the other half alone.",
        longer="Give the other half (in a sweep: completion known=right), and more seeds (--seeds)",
        less="Give the other half (in a sweep: completion known=right)",
        caption=lambda steps: "half given",
        amount=lambda steps: "",
    ),
    "latent": Way(
        source="inverted noise",
        found=lambda steps: f"noise of which {steps:.0f}% is inverted from them",
        axis="% of the noise inverted",
        about="noise from which the sampler leads to the known image, under the image’s own caption, mixed with a "
        "seed’s own. “50% inverted”: half of the noise’s variance is that. Sampled without guidance.",
        longer="Invert more exactly (in a sweep: latent refinements=5)",
        less="Invert less of the noise (in a sweep: latent share=0.5)",
        caption=lambda steps: f"{steps:.0f}% inverted",
        amount=lambda steps: f"a share of {steps:.0f}%",
        preposition="at",
    ),
    "tokens": Way(
        source="a typed prompt",
        found=lambda steps: f"typed prompts found in {counted(steps)}",
        axis="steps of the search for words",
        about="a prompt in plain words, found for the known image by exchanging one word of its caption at each step.",
        longer="Search longer for prompts (in a sweep: tokens steps=200 exchanges=64)",
        less="Search for prompts with fewer steps (in a sweep: tokens steps=5)",
        caption=lambda steps: f"typed, {counted(steps)}",
    ),
}


def way_of(attack):
    """The `Way` of an attack by its name, to which a sweep adds its options."""
    return WAYS[attack.split()[0]]
