"""What the layers of a model do: attention mass, value norms, projections, and which of them segment."""

from seg4diff.analysis.analyze import analyze
from seg4diff.analysis.rank_layers import Ranking, expert_layers
from seg4diff.analysis.report import AnalysisReport, Measures

__all__ = ["AnalysisReport", "Measures", "Ranking", "analyze", "expert_layers"]
