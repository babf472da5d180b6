from lightning_align._errors import argument_error


def test_message_gives_place_value_rule_and_way_out() -> None:
    error = argument_error("LISA", "activated_layers", 40, "the model has 32 blocks", "Lower it")
    assert isinstance(error, ValueError)
    assert str(error) == "LISA(activated_layers=40): the model has 32 blocks. Lower it."


def test_way_out_may_be_left_out() -> None:
    assert str(argument_error("A", "b", "c", "must be d")) == "A(b='c'): must be d."
