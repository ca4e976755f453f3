"""Makes the judges that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..assess_config import LocalJudge, ProgrammaticJudge, RemoteJudge
from ..measures.measure import LeftOut, Missing
from .judge import Judge
from .local import LocalModel
from .programmatic import DetectorJudge
from .remote import RemoteModel


def make_judges(
    configs: Sequence[ProgrammaticJudge | LocalJudge | RemoteJudge], device: torch.device
) -> tuple[list[Judge], list[LeftOut]]:
    """Return the judges that can be had, and those that cannot, with the reason."""
    judges: list[Judge] = []
    left_out: list[LeftOut] = []
    for config in configs:
        try:
            judges.append(_judge(config, device))
        except Missing as missing:
            left_out.append(LeftOut(config.name, str(missing)))
    return judges, left_out


def _judge(config: ProgrammaticJudge | LocalJudge | RemoteJudge, device: torch.device) -> Judge:
    if isinstance(config, ProgrammaticJudge):
        return DetectorJudge(config)
    return LocalModel(config, device) if isinstance(config, LocalJudge) else RemoteModel(config)
