"""Choose a rank and a storage format for every layer, so that a budget is met at the least predicted loss."""
