"""Save compressed models as safetensors and JSON, and load them again bit for bit."""
