from emoshare.evaluation.markdown import markdown_table


def test_a_cell_may_hold_what_would_end_it():
    table = markdown_table(["", "value"], [["a|b", "1"], ["c\nd", ""]])
    assert table == "|  | value |\n| --- | --- |\n| a\\|b | 1 |\n| c d |  |"
