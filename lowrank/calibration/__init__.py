"""Run the model over data, and keep statistics of what layers read and of how much their outputs matter."""
