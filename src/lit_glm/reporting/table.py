"""A table before any format."""

from dataclasses import dataclass, field
from typing import List


@dataclass
class ReportTable:
    """Head and lines; all text."""

    columns: List[str]
    rows: List[List[str]]
    notes: List[str] = field(default_factory=list)
    heading: str = ""
