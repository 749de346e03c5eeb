"""Read a model without changing it: which layers it has, which of them may change, and why others may not."""
