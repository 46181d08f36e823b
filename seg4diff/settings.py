"""Types of checked settings: pydantic refuses a value that does not fit, with the name of its field."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

# Strict: "5", 5.0 and true are not integers, and true is not a number.
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Weight = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)
