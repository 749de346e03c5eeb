"""The verbs of the library, and the stages that they go through. Read `lowrank.pipeline.verbs` first."""
