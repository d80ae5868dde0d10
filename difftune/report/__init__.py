"""What a person looks at: sample grids, and a report of the run in one HTML file.

The report needs nothing but itself: no script, no font, no request leaves it (a content policy forbids all three).
Curves are drawn as SVG under labels that are HTML, so that text keeps its size on a phone. Everything that came from
users (prompts, names, configuration) is escaped.
"""

from __future__ import annotations

from difftune.report.grids import sample_grid
from difftune.report.page import write_report

__all__ = ["sample_grid", "write_report"]
