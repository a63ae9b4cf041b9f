"""`fedloop demo`."""


def demo() -> None:
    """Run everything on this machine."""
