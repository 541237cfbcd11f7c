"""Tables of README.md and of the model card, filled from figures/: `python -m tools.readme`, after `make figures`.

The CSV of `estimate` is written by `python -m tools.estimate`, scorecard.json by `make scorecard`.

What stands between `<!-- NAME -->` and `<!-- /NAME -->` is made by the function of that name below.
"""

import json
import re
from pathlib import Path

import pandas as pd

from dori_utils.core.metrics import THRESHOLD as COPY
from tools.estimate import as_markdown

ROOT = Path(__file__).resolve().parents[1]
README, CARD = ROOT / "README.md", ROOT / "testbed" / "README.md"
PRUNED = ("NeMo", "Wanda")


def idea() -> str:
    """The first picture, and its scores as text: whether the image is back is for the numbers to say."""
    table = _read("03_idea")
    first = table[table["seed"] == table["seed"].min()].set_index(["mitigation", "attack"])["sscd"]
    said = {key: f"{score:.2f} (a copy)" if score > COPY else f"{score:.2f}" for key, score in first.items()}
    scores = [f"its prompt {said['original', 'none']}"]
    scores += [f"pruned with {n}, its prompt {said[n, 'none']} and a trigger {said[n, 'DoRI']}" for n in PRUNED]
    alt = "A training image, and what its prompt and a trigger give before and after pruning"
    return f"![{alt}](figures/03_idea.png)\n\nSSCD to the training image, above {COPY} a copy: {'; '.join(scores)}."


def kinds() -> str:
    table = _read("00_by_kind").query("model == 'testbed'")
    return _markdown(
        {"kind": table["kind"], "targets": table["targets"], "SSCD_Orig (95%)": _mean(table), "MR (95%)": _rate(table)}
    )


def ladder() -> str:
    by_model = _read("00_duplication_ladder").sort_values("times", ascending=False).groupby("model")
    a, b = (by_model.get_group(name) for name in ("testbed", "testbed-b"))
    measures = ("SSCD_Orig, mean", "memorization rate")
    names = ["targets, each", *(f"{twin}: {what}" for twin in "AB" for what in measures)]
    values = zip(a["targets"], _two(a["sscd"]), _two(a["rate"]), _two(b["sscd"]), _two(b["rate"]), strict=True)
    return _markdown({"times in training": names} | dict(zip(a["times"], values, strict=True)))


def pruning() -> str:
    table = _read("02_methods").replace("original", "none")
    columns = {"mitigation": table["mitigation"]}
    for name in ("SSCD_Orig", "MR", "any seed", "D_SSCD", "A_CLIP"):
        columns[name] = _interval(table[name], table[f"{name} low"], table[f"{name} high"])
    return _markdown(columns)


def dori() -> str:
    table = _read("03_main_table")
    spread = [f"{sscd:.2f} ± {std:.2f}" for sscd, std in zip(table["sscd"], table["std"], strict=True)]
    columns = {"setting": table["setting"], "SSCD_Orig": spread, "MR": _rate(table)}
    columns["any seed"] = _two(table["any_seed"])
    columns["p against control"] = ["" if pd.isna(p) else f"{p:.1g}" for p in table["holm_p"]]
    return _markdown(columns | {"paper, SD v1.4: SSCD_Orig, MR": _both(table["paper_sscd"], table["paper_mr"])})


def mitigations() -> str:
    table = _read("09_table")
    columns = {"mitigation": table["mitigation"]}
    for title in ("prompts", "DoRI", "control + DoRI"):
        columns[f"{title}: SSCD_Orig, MR"] = _both(table[f"SSCD, {title}"], table[f"MR, {title}"])
    columns["paper, DoRI"] = _both(table["paper: SSCD, DoRI"], table["paper: MR, DoRI"])
    for title, name in {"A_CLIP": "A_CLIP, ordinary", "Fréchet distance": "Fréchet, ordinary"}.items():
        columns[title] = _change(table[name])
    return _markdown(columns)


def estimate() -> str:
    return as_markdown(_read("estimate"))


def twins() -> str:
    table = _read("00_by_kind")
    columns = {"model": table["model"].map({"testbed": "A", "testbed-b": "B"}), "kind": table["kind"]}
    return _markdown(columns | {"targets": table["targets"], "SSCD_Orig (95%)": _mean(table), "MR (95%)": _rate(table)})


def measured() -> str:
    """The scorecard's bars of the model itself: they come before those of pruning."""
    bars = json.loads((ROOT / "figures" / "scorecard.json").read_text())
    end = next(number for number, bar in enumerate(bars) if bar["name"].startswith("NeMo"))
    names, values, bounds, remarks = zip(
        *((bar["name"], f"{bar['value']:g}", bar["bound"], bar["remark"]) for bar in bars[:end]), strict=True
    )
    held = ["holds" if bar["holds"] else "**does not hold**" for bar in bars[:end]]
    return _markdown({"measured": names, "value": values, "bar": bounds, "": held, "how": remarks})


SECTIONS = {
    README: (idea, kinds, ladder, pruning, dori, mitigations, estimate),
    CARD: (measured, twins, ladder),
}


def filled(text: str, sections=SECTIONS[README]) -> str:
    """A document with the tables as figures/ has them now.

    Raises:
        ValueError: a section's marks are not in the text, or more than once.
    """
    for section in sections:
        name = section.__name__
        between = rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- /{name} -->)"
        text, count = re.subn(between, section().replace("\\", r"\\"), text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"<!-- {name} --> … <!-- /{name} -->: {count} times in the text, not once.")
    return text


def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "figures" / f"{name}.csv", comment="#")


def _two(values) -> list[str]:
    return [f"{value:.2f}" for value in values]


def _both(scores, rates) -> list[str]:
    return ["" if pd.isna(s) else f"{s:.2f}, {r:.2f}" for s, r in zip(scores, rates, strict=True)]


def _change(ratios) -> list[str]:
    return [f"{ratio - 1:+.0%}" for ratio in ratios]


def _interval(values, lows, highs) -> list[str]:
    return [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in zip(values, lows, highs, strict=True)]


def _mean(table) -> list[str]:
    return _interval(table["sscd"], table["sscd_low"], table["sscd_high"])


def _rate(table) -> list[str]:
    return _interval(table["rate"], table["low"], table["high"])


def _markdown(columns: dict) -> str:
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(str(value) for value in row)} |" for row in rows)


if __name__ == "__main__":
    for document, sections in SECTIONS.items():
        document.write_text(filled(document.read_text(), sections))
