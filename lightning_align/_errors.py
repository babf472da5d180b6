"""The one shape of every error: where(argument=value), the rule, the way out."""


def argument_error(
    where: str, argument: str, value: object, rule: str, way_out: str = ""
) -> ValueError:
    """Build the error for a value the user gave us, so that every message reads alike.

    Args:
        where: Class or function the user called.
        argument: Name of the argument, as the user wrote it.
        value: What was received.
        rule: What must hold, without a full stop.
        way_out: What to do instead, without a full stop.
    """
    message = f"{where}({argument}={value!r}): {rule}."
    return ValueError(f"{message} {way_out}." if way_out else message)
