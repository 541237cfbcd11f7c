"""README's tables are those of figures/."""

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
