"""Tell what compression cost and gained: parameters, bytes, MACs, latency, accuracy, plots, model cards."""
