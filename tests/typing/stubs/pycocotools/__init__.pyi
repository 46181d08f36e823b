# Run-length counts are bytes, whatever the stubs of type checkers say.
from typing import Any

def __getattr__(name: str) -> Any: ...
