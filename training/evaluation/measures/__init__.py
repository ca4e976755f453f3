"""What can be measured in a picture, one class for each measure."""

from .clip import Q16
from .measure import LeftOut, Measure, Missing, while_there_is_memory
from .nudity import NudeNet
from .setup import make_fid, make_measures

__all__ = [
    "Q16",
    "LeftOut",
    "Measure",
    "Missing",
    "NudeNet",
    "make_fid",
    "make_measures",
    "while_there_is_memory",
]
