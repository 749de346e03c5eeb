"""The command line: ``lowrank calibrate | plan | compress | eval | inspect | bench | demo | setup``.

Exit codes: 0 done, 2 wrong use, 1 failed. A failure is one line on stderr; ``--debug`` adds the
traceback. Progress bars appear on terminals only, and never with ``-q``.
"""

from lowrank.cli.main import main

__all__ = ["main"]
