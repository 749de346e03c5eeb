"""Texts, pairs and labels of files, refused by their line."""

import pytest

from lowrank import DataError
from lowrank.calibration.text_files import read_labelled, read_pairs


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_pairs, "a,b,1\nc,d,nan\n", "line 2: the score nan is not finite"),
        (read_pairs, "a,b,1\nc,d,-inf\n", "line 2: the score -inf is not finite"),
        (read_pairs, '"a\n",b,1\nc,d,1e999\n', "line 3: the score 1e999 is not finite"),
        (read_pairs, "a,b,1\nc,d\n", "line 2: not sentence1,sentence2,score"),
        (read_pairs, "a,b," + "1" * 200_000, "line 1: not sentence1,sentence2,score"),
        (read_labelled, "a\t1\n\nb\t²\n", "line 3: not sentence<TAB>label"),
        (read_labelled, "a\t-1\n", "line 1: not sentence<TAB>label"),
        (read_labelled, "a\t--5\n", "line 1: not sentence<TAB>label"),
        (read_labelled, "a\t" + "9" * 5000, "line 1: not sentence<TAB>label"),
    ],
    ids=["nan", "inf", "after-two-lines", "short", "long", "superscript", "negative", "two-signs", "digits"],
)
def test_a_file_with_an_odd_number_is_refused_by_its_line(tmp_path, read, text, message):
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "file")
