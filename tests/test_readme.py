"""README's tables are those of figures/."""

import pandas as pd
import pytest

from dori_utils import readme


def test_the_tables_in_the_readme_are_those_of_the_figures():
    text = readme.README.read_text()
    assert readme.filled(text) == text, "run `python -m dori_utils.readme`"


def test_numbers_come_from_the_files_and_lost_marks_are_an_error():
    text = readme.README.read_text()
    assert readme.filled(text.replace("0.83 ± 0.09", "0.93 ± 0.09")) == text
    with pytest.raises(ValueError, match="<!-- dori -->"):
        readme.filled(text.replace("<!-- dori -->", ""))


def test_under_the_first_picture_a_copy_is_what_scores_above_the_line(monkeypatch):
    scores = {("original", "none"): 0.9, ("NeMo", "none"): 0.2, ("NeMo", "DoRI"): 0.702, ("Wanda", "none"): 0.1}
    scores[("Wanda", "DoRI")] = 0.698
    rows = [{"mitigation": m, "attack": a, "seed": 0, "sscd": score} for (m, a), score in scores.items()]
    rows += [row | {"seed": 1, "sscd": 1 - row["sscd"]} for row in rows]  # the picture is of the first seed
    monkeypatch.setattr(readme, "_read", lambda name: pd.DataFrame(rows))
    assert readme.idea().endswith(
        "its prompt 0.90 (a copy); pruned with NeMo, its prompt 0.20 and a trigger 0.70 (a copy); "
        "pruned with Wanda, its prompt 0.10 and a trigger 0.70."
    )
