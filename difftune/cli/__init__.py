"""The command line: parse, call, print. Nothing heavy is imported before a command needs it.

Exit codes: 0 done; 2 the user's mistake, said in one line each, without a traceback; 1 a run that had to stop (in one
line) or a fault of ours (with a traceback); 130 interrupted, with the line that resumes.
"""

from __future__ import annotations

from difftune.cli.app import app, main

__all__ = ["app", "main"]
