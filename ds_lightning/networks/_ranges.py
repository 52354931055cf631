"""Checks of the arguments that the encoders share."""


def check_ranges(sizes: dict[str, int], dropout: float = 0.0) -> None:
    """Raise ValueError when a size is below 1 or `dropout` is no probability below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; expected a probability in [0, 1)")
