"""Text tables are aligned one way."""

from fisherflow_jax._ground.tables import aligned

ROWS = [("", "trace", "±"), ("first", 12, "0.5"), ("b", 3, "")]


def test_numbers_stand_to_the_right():
    assert aligned(ROWS) == "       trace    ±\nfirst     12  0.5\nb          3"


def test_text_stands_to_the_left_and_a_rule_below_the_heads():
    assert aligned(ROWS, text=True, rule=True) == (
        "       trace  ±\n-----------------\nfirst  12     0.5\nb      3"
    )
