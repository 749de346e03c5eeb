"""Read a model: its layers, which may change and why others may not; run it and leave it as it was."""
