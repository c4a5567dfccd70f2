"""Run directories and evaluations -> one HTML page that needs nothing else: no network, no script.

folders       what a run directory or an evaluation holds, unfinished and damaged ones included
meanings      what every metric means, its unit, and what to look for
charts        numbers -> SVG
page          everything -> page.html, the template
dashboard     the same curves on Weights & Biases
"""

from raykd.report.page import write_report

__all__ = ["write_report"]
