"""Verdicts: what an audit's rows say, image by image and in sentences."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dori_utils.cli.words import way_of
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
    """Does an image come back? One row for each target (and control) under each mitigation and attack.

    Returns:
        DataFrame (mitigation, target, kind, attack, verdict, prompt, trigger, step, lost, regions). attack: its name,
        "none" without any. verdict: "back from its prompt", "back from a trigger alone" (or whatever else the attack
        finds) or "not back". prompt, trigger: mean SSCD_Orig over seeds under the prompt, and under what the attack's
        last step found (NaN without an attack). step: of an image that is back after the last step, the recorded one
        from which on it always is; lost: of one that is not, the last recorded step after which it was; else NaN.
        regions: the higher of the similarities by region under the two, if the rows have them.
    """
    by, scores = ["mitigation", "target", "kind", "attack", "steps"], ["sscd", "regions"]
    means = rows.groupby(by, sort=False)[[name for name in scores if name in rows]].mean().reset_index()
    found = []
    for (mitigation, target, kind), group in means.groupby(by[:3], sort=False):
        none = group["attack"] == "none"
        prompt = group.loc[none, "sscd"].item()
        about = {"mitigation": mitigation, "target": target, "kind": kind}
        for attack, own in group[~none].groupby("attack", sort=False) if not none.all() else [("none", group[~none])]:
            trigger, step, lost = _after_steps(own.set_index("steps")["sscd"].sort_index())
            label = f"back from {way_of(attack).source} alone" if trigger > THRESHOLD else "not back"
            label = "back from its prompt" if prompt > THRESHOLD else label
            row = {"attack": attack, "verdict": label, "prompt": prompt, "trigger": trigger, "step": step, "lost": lost}
            regions = {"regions": pd.concat([group[none], own])["regions"].max()} if "regions" in group else {}
            found.append(about | row | regions)
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
    table, last = verdicts(rows[rows["mitigation"] == mitigation]), rows.groupby("attack")["steps"].max()
    sides = {attack: _sides(own) for attack, own in table.groupby("attack", sort=False)}
    (of, prompt, *_), (never, never_prompt, *_) = next(iter(sides.values()))
    sides.pop("none", None)
    facts, of_never = [f"From their own prompts {_share(prompt, of)} come back"], []
    said, clear = [_of_prompts(prompt, of, never_prompt, never)], {}
    for name, ((_, _, found, hidden, both), (_, _, never_found, never_hidden, _)) in sides.items():
        way, counts = way_of(name), (hidden, of - prompt, never_hidden, never - never_prompt)
        facts.append(f"from {way.found(last[name])} {_share(found, of)}")
        of_never.append(f"from {way.source} {_share(never_found, never)}")
        clear[name] = _clearly_more(*counts)
        if of - prompt:
            said.append(_of_attack(way, counts, bool(prompt)))
        if 2 * both < prompt:
            said.append(_missed(name, both, prompt))
    said += [(_past(clear), ""), (_in_part(table), "")]
    of_never = ", ".join([f"from their prompts {_share(never_prompt, never)}", *of_never])
    facts = f"{', '.join(facts)}. Of the images that the model has never seen: {of_never}."
    advice = dict.fromkeys(advice for _, advice in said if advice)
    return Conclusion(" ".join(text for text, _ in said if text), facts, " ".join(advice))


def _sides(table):
    """`_counts` of the targets and of the controls."""
    return [_counts(side) for _, side in table.groupby(table["kind"] == "control")]  # False, the targets, comes first


def _counts(table):
    """How many images; back from their prompts; from the attack; from the attack alone; from both."""
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


def _of_attack(way, counts, some):
    """What an attack shows of the `of` images whose prompts do not give them, and what to do about it."""
    count, of, never, never_of = counts
    if some and of == 1:
        come = f"The other one {'comes' if count else 'does not come'} back from {way.source}"
    else:
        come = f"{count or 'None'} of {'the other ' if some else ''}{of}{'' if some else ' images'}"
        come += f" come{'' if count > 1 else 's'} back from {way.source}"
    if not count:
        advice = (
            f"{way.longer}; does the same attack find them without the edit? And see what the edit cost "
            "(evaluation.ordinary_cost): a model that can no longer draw gives no copies either."
        )
        return f"{come}: not found with this attack, which is no proof that they are gone.", advice
    if _clearly_more(*counts):
        advice = (
            "A mitigation must hold against this attack, too, as fine-tuning against triggers tries (notebook 08). "
            "Audit it again, and see what it cost (evaluation.ordinary_cost)."
        )
        than = f"clearly more than of images that the model has never seen ({never} of {never_of})"
        each = ", if not each of them" if never else ""
        return f"{come}, {than}: hidden from their prompts, not removed{each}.", advice
    if never:
        advice = f"{way.less}, and with more targets and controls."
        than = f"but so do {never} of {never_of} that the model has never seen, not clearly fewer"
        return f"{come}, {than}: the attack may have put them in, and does not show that they are held.", advice
    advice = "Give more targets and controls (--limit): from four of each on, all against none is a clear difference."
    return f"{come}, of those never seen none of {never_of}: too few images to show that these are held.", advice


def _missed(name, both, prompt):
    """An attack that misses what the prompts give."""
    which = "The attack" if name == "DoRI" else f"The attack {name}"
    missed = f"{which} finds {both} of {prompt} images that their prompts give"
    if name != "DoRI":
        return f"{missed}, and says little about any image.", ""
    advice = "Attack longer (--steps) or with another learning rate (--lr) until it finds what the prompts give."
    return f"{missed}: it was too short or badly set, and says little about any image.", advice


def _past(clear):
    """What gets past a defence that stops DoRI; clear: attack → whether it clearly finds what prompts do not give."""
    past = [way_of(name).source for name, found in clear.items() if found]
    if clear.get("DoRI", True) or not past:
        return ""
    return f"What stops triggers does not stop {' and '.join(past)}: this defence holds against an embedding alone."


def _in_part(table):
    """Copies of a part among the images that nothing brings back whole."""
    if "regions" not in table:
        return ""
    whole = (table["prompt"] > THRESHOLD) | (table["trigger"] > THRESHOLD)
    control = table["kind"] == "control"
    by_image = table.assign(whole=whole, control=control).groupby(["control", "target"])[["whole", "regions"]].max()
    others = by_image[~by_image["whole"].astype(bool)]
    counts = [int((side["regions"] > THRESHOLD).sum()) for side in _split(others)]
    of, never_of = (len(side) for side in _split(others))
    if not counts[0]:
        return ""
    clearly = "clearly more" if _clearly_more(counts[0], of, counts[1], never_of) else "not clearly more"
    said = f"Of {of} that do not come back whole, {counts[0]} do in part, the better half of their regions in its place"
    return f"{said}, {clearly} than of those never seen ({counts[1]} of {never_of})."


def _split(by_image):
    """Rows of the targets and of the controls, from an index (control, target)."""
    control = by_image.index.get_level_values("control")
    return by_image[~control], by_image[control]
