"""What the layers of a model do: attention mass, value norms, projections, and which of them segment."""

from seg4diff.analysis.measuring import analyze
from seg4diff.analysis.ranking import Ranking, expert_layers
from seg4diff.analysis.report import Measures, Report

__all__ = ["Measures", "Ranking", "Report", "analyze", "expert_layers"]
