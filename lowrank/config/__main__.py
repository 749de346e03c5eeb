"""Print the tables of options as Markdown, for the guide: ``python -m lowrank.config``."""

from lowrank.config.compression import CompressionConfig
from lowrank.config.options import markdown_table
from lowrank.config.recovery import RecoveryConfig

if __name__ == "__main__":
    for config in (CompressionConfig, RecoveryConfig):
        print(markdown_table(config), end="\n\n")
