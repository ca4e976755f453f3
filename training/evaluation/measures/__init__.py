"""What can be measured in a picture, one class for each measure."""

from .clip import Q16
from .measure import NO_MEMORY, LeftOut, Measure, Missing, no_memory
from .nudity import NudeNet
from .setup import make_fid, make_measures

__all__ = [
    "NO_MEMORY",
    "Q16",
    "LeftOut",
    "Measure",
    "Missing",
    "NudeNet",
    "make_fid",
    "make_measures",
    "no_memory",
]
