"""Verdicts: what an audit's rows say, image by image and in sentences."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dori_utils.core.metrics import THRESHOLD, share_interval, summarize

# For fewer targets a mean has no interval. On the targets' means of notebook 02 a 95% t interval of 8 covers 93 to 94%
# (the percentile bootstrap 88 to 90%), of 2 to 4 only 81 to 91%, and of 2 it is wider than SSCD itself.
INTERVAL_TARGETS = 8


@dataclass(frozen=True)
class Conclusion:
    """What the numbers of one mitigation say: the verdict, the counts that it rests on, and what to do next."""

    verdict: str
    facts: str
    advice: str


def settings_table(rows):
    """SSCD_Orig and MR with 95% intervals by mitigation, memorized or not ("targets", "control"), attack and steps.

    The interval of SSCD_Orig is Student's, over targets; NaN for fewer than `INTERVAL_TARGETS`.
    """
    by = ["mitigation", "images_of", "attack", "steps"]
    rows = rows.assign(images_of=np.where(rows["kind"] == "control", "control", "targets"))
    return summarize(rows, by, _mean_interval)


def _mean_interval(values):
    from scipy.stats import t

    count = len(values)
    if count < INTERVAL_TARGETS:
        return np.nan, np.nan
    margin = t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
    return values.mean() - margin, values.mean() + margin


def verdicts(rows):
    """Does an image come back? One row for each target (and control) under each mitigation.

    Returns:
        DataFrame (mitigation, target, kind, verdict, prompt, trigger, step, lost). verdict: "back from its prompt",
        "back from a trigger alone" or "not back". prompt, trigger: mean SSCD_Orig over seeds under the prompt, and
        under the trigger of the attack's last step (NaN without an attack). step: of an image that is back after the
        last step, the recorded one from which on it always is; lost: of one that is not, the last recorded step after
        which it was; else NaN.
    """
    means = rows.groupby(["mitigation", "target", "kind", "attack", "steps"], sort=False)["sscd"].mean().reset_index()
    found = []
    for (mitigation, target, kind), group in means.groupby(["mitigation", "target", "kind"], sort=False):
        prompt = group.loc[group["attack"] == "none", "sscd"].item()
        attacked = group[group["attack"] == "DoRI"].set_index("steps")["sscd"].sort_index()
        trigger, step, lost = _after_steps(attacked)
        label = "back from a trigger alone" if trigger > THRESHOLD else "not back"
        label = "back from its prompt" if prompt > THRESHOLD else label
        about = {"mitigation": mitigation, "target": target, "kind": kind, "verdict": label}
        found.append(about | {"prompt": prompt, "trigger": trigger, "step": step, "lost": lost})
    return pd.DataFrame(found)


def _after_steps(scores):
    """trigger, step and lost of `verdicts`, from steps → mean SSCD_Orig."""
    if scores.empty:
        return np.nan, np.nan, np.nan
    last, back = scores.iloc[-1], scores > THRESHOLD
    if last > THRESHOLD:
        return last, scores.index[back[::-1].cumprod()[::-1].astype(bool)].min(), np.nan
    return last, np.nan, scores.index[back].max()


def conclusion(rows, mitigation):
    """What the numbers of one mitigation say, no more than they carry: a `Conclusion`, by the rule on top."""
    table = verdicts(rows)
    table = table[table["mitigation"] == mitigation]
    counts = [_counts(side) for _, side in table.groupby(table["kind"] == "control")]  # False, the targets, comes first
    (of, prompt, trigger, hidden, both), (never, never_prompt, never_trigger, never_hidden, _) = counts
    steps = _counted(rows["steps"].max())
    facts = (
        f"From their own prompts {_share(prompt, of)} come back, from triggers found in {steps} {_share(trigger, of)}. "
        f"Of the images that the model has never seen: from their prompts {_share(never_prompt, never)}, from triggers "
        f"{_share(never_trigger, never)}."
    )
    said = [_of_prompts(prompt, of, never_prompt, never)]
    if others := of - prompt:
        said.append(_of_triggers(hidden, others, bool(prompt), never_hidden, never - never_prompt))
    if 2 * both < prompt:
        missed = f"The attack finds {both} of {prompt} images that their prompts give: it was too short or badly set"
        advice = "Attack longer (--steps) or with another learning rate (--lr) until it finds what the prompts give."
        said.append((f"{missed}, and says little about any image.", advice))
    return Conclusion(" ".join(text for text, _ in said), facts, " ".join(advice for _, advice in said if advice))


def _counts(table):
    """How many images; back from their prompts; from triggers; from triggers alone; from both."""
    prompt, trigger = table["prompt"] > THRESHOLD, table["trigger"] > THRESHOLD
    return len(table), prompt.sum(), trigger.sum(), (trigger & ~prompt).sum(), (trigger & prompt).sum()


def _share(count, of):
    low, high = share_interval(count, of)
    return f"{count} of {of} (95% interval {low:.0%} to {high:.0%})"


def _clearly_more(count, of, never, never_of):
    return min(of, never_of) > 0 and share_interval(count, of)[0] > share_interval(never, never_of)[1]


def _of_prompts(count, of, never, never_of):
    """What the prompts show, and what to do about it."""
    if not count:
        return "No image comes back from its own prompt.", ""
    come = f"{count} of {of} images come back from their own prompts"
    if not never:
        advice = "A stronger mitigation is what they need, not a stronger attack: audit its weights with --edit."
        return f"{come}, so the model holds them: neither hidden nor removed.", advice
    advice = "Look at those controls: were they in the training, or does the judge take likeness for a copy?"
    so_do = f"so do {never} of {never_of} that it should never have seen"
    if _clearly_more(count, of, never, never_of):
        return f"{come}. And {so_do}, clearly fewer: so it holds images among these, if not each of them.", advice
    return f"{come}, but {so_do}, not clearly fewer: that does not show that the images are held.", advice


def _of_triggers(count, of, some, never, never_of):
    """What the triggers show of the `of` images whose prompts do not give them, and what to do about it."""
    if some and of == 1:
        come = f"The other one {'comes' if count else 'does not come'} back from a trigger"
    else:
        come = f"{count or 'None'} of {'the other ' if some else ''}{of}{'' if some else ' images'}"
        come += f" come{'' if count > 1 else 's'} back from a trigger"
    if not count:
        advice = (
            "Attack with more steps (--steps 500), from noise (--start noise), several times (--restarts 4), with "
            "another learning rate (--lr 0.05); does the same attack find them without the edit? And see what the edit "
            "cost (evaluation.ordinary_cost): a model that can no longer draw gives no copies either."
        )
        return f"{come}: not found with this attack, which is no proof that they are gone.", advice
    if _clearly_more(count, of, never, never_of):
        advice = (
            "A mitigation must hold against this attack, too, as fine-tuning against triggers tries (notebook 08). "
            "Audit it again, and see what it cost (evaluation.ordinary_cost)."
        )
        than = f"clearly more than of images that the model has never seen ({never} of {never_of})"
        each = ", if not each of them" if never else ""
        return f"{come}, {than}: hidden from their prompts, not removed{each}.", advice
    if never:
        advice = "Attack with fewer steps (--steps), which put in less, and with more targets and controls."
        than = f"but so do {never} of {never_of} that the model has never seen, not clearly fewer"
        return f"{come}, {than}: the attack may have put them in, and does not show that they are held.", advice
    advice = "Give more targets and controls (--limit): from four of each on, all against none is a clear difference."
    return f"{come}, of those never seen none of {never_of}: too few images to show that these are held.", advice


def _counted(steps):
    return f"{steps:.0f} step{'' if steps == 1 else 's'}"
