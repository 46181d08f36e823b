"""What the layers of a model do: attention mass, value norms, projections, and which of them segment."""

from seg4diff.analysis.analyze import analyze
from seg4diff.analysis.rank_layers import Ranking, rank_layers
from seg4diff.analysis.report import AnalysisReport, Measures

__all__ = ["AnalysisReport", "Measures", "Ranking", "analyze", "rank_layers"]
