"""Plans as plain data: what happens to each layer, its JSON, its table, and how a planned layer is stored."""
