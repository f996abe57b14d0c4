"""New plugin packages, written from the templates beside this module. Imports no torch."""

from commhub.scaffold._names import Names
from commhub.scaffold._write import write

__all__ = ["Names", "write"]
