"""The verbs of the library, a file each or for two; the stages that they go through stand in `stages`."""
