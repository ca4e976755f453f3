"""What can be measured in a picture, one class for each measure."""

from .measure import LeftOut, Measure, Missing
from .setup import make_fid, make_measures

__all__ = ["LeftOut", "Measure", "Missing", "make_fid", "make_measures"]
