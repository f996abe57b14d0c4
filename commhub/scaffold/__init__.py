"""New plugin packages, written from the templates beside this module. Imports no torch."""

from ._names import Names
from ._write import write

__all__ = ["Names", "write"]
