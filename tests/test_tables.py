"""Tables as text."""

from castling_jax.tables import aligned, markdown


def test_names_are_left_and_numbers_right():
    rows = [("", "MACs", "share"), ("mlp", "1,234", "97.0 %"), ("heads", "5", "3.0 %")]
    assert aligned(rows) == [
        "          MACs   share",
        "  mlp    1,234  97.0 %",
        "  heads      5   3.0 %",
    ]


def test_the_last_letter_stands_for_all_columns_after_it():
    rows = [("a", "b", "c", "d"), ("aa", "bb", "cc", "dd")]
    assert aligned(rows, "r", indent="") == [" a   b   c   d", "aa  bb  cc  dd"]
    assert aligned(rows, "lrl", indent="") == ["a    b  c   d", "aa  bb  cc  dd"]


def test_rows_that_are_printed_one_by_one_stand_in_line():
    one_by_one = [aligned([row], widths=(5, 3)) for row in (("a", "1"), ("b", "200"))]
    assert one_by_one == [["  a        1"], ["  b      200"]]
    assert aligned([("longer", "1")], widths=(5, 3)) == ["  longer    1"]


def test_a_table_of_nothing_has_no_lines():
    assert aligned([]) == []


def test_markdown_aligns_by_its_rule():
    assert markdown(("", "killed", "status"), [("1", "one | two", "0")], "llr") == [
        "| | killed | status |",
        "|---|---|---:|",
        r"| 1 | one \| two | 0 |",
    ]
    assert markdown(("a", "b"), [], "l") == ["| a | b |", "|---|---|"]
