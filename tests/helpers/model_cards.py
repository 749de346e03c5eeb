"""Save a model, and read the card that is written beside it."""

import lowrank


def card_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def save(model, folder):
    lowrank.save(model, folder, overwrite=True)
