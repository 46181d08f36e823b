# Exports by lazy loading that type checkers cannot follow, and annotations that its own calls contradict.
from typing import Any

def __getattr__(name: str) -> Any: ...
