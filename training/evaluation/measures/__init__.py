"""What can be measured in a picture, one class for each measure."""

from .clip import Q16
from .measure import MEMORY_ERRORS, LeftOut, Measure, Missing, is_out_of_memory, no_memory
from .nudity import NudeNet
from .setup import make_fid, make_measures

__all__ = [
    "MEMORY_ERRORS",
    "Q16",
    "LeftOut",
    "Measure",
    "Missing",
    "NudeNet",
    "is_out_of_memory",
    "make_fid",
    "make_measures",
    "no_memory",
]
