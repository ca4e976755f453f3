"""Makes every measure whose weights are there, and says of the others why they are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ...miniature import MINIATURE
from ..assess_config import AssessSettings, ProgrammaticJudge
from .clip import Q16, Clip, ClipScore
from .fid import Fid
from .likeness import Lpips, Ssim
from .measure import LeftOut, Measure, Missing
from .nudity import NudeNet
from .sighting import detector_measures

_Made = tuple[list[Measure], list[LeftOut]]


def make_measures(settings: AssessSettings, device: torch.device) -> _Made:
    """Return the measures of single pictures, and those that are left out."""
    measures: list[Measure] = []
    left_out: list[LeftOut] = []
    for name, make in _recipes(settings, device):
        try:
            measures += make()
        except Missing as missing:
            left_out.append(LeftOut(name, str(missing)))
    return measures, left_out


def make_fid(settings: AssessSettings, device: torch.device) -> Fid | LeftOut:
    """Return FID, or why there is none."""
    try:
        return Fid(settings.fid, _detector(settings), device, settings.batch_size, settings.seed)
    except Missing as missing:
        return LeftOut("FID", str(missing))


def _recipes(settings: AssessSettings, device: torch.device) -> Iterator[tuple[str, Callable[[], list[Measure]]]]:
    clips: dict[Path, Clip] = {}

    def clip(folder: Path | None, setting: str) -> Clip:
        if folder is None:
            raise Missing(f"no CLIP is stated: set assess.{setting}.model to a CLIP folder of transformers")
        if folder not in clips:
            clips[folder] = Clip(folder, device)
        return clips[folder]

    def q16() -> list[Measure]:
        if settings.q16.prompts is None:
            raise Missing("no learnt embeddings are stated: set assess.q16.model and assess.q16.prompts")
        return [Q16(clip(settings.q16.model, "q16"), settings.q16.prompts, settings.batch_size)]

    def lpips() -> list[Measure]:
        if settings.likeness.lpips is None:
            raise Missing("no AlexNet weights are stated: set assess.likeness.lpips to torchvision's file (.pth)")
        return [Lpips(settings.likeness.lpips, settings.batch_size, device)]

    if any(isinstance(judge, ProgrammaticJudge) for judge in settings.judges):
        yield "the detector's counts", lambda: list(detector_measures(_detector(settings)))
    yield Q16.name, q16
    if settings.nudenet.enabled:
        yield NudeNet.name, lambda: [NudeNet(settings.nudenet.threshold)]
    else:
        yield NudeNet.name, _switched_off("assess.nudenet.enabled")
    yield ClipScore.name, lambda: [ClipScore(clip(settings.clip.model, "clip"))]
    if settings.likeness.ssim:
        yield Ssim.name, lambda: [Ssim(settings.batch_size)]
    else:
        yield Ssim.name, _switched_off("assess.likeness.ssim")
    yield Lpips.name, lpips


def _switched_off(setting: str) -> Callable[[], list[Measure]]:
    def refuse() -> list[Measure]:
        raise Missing(f"it is switched off ({setting} = false)")

    return refuse


def _detector(settings: AssessSettings) -> Path:
    stated = (judge.detector for judge in settings.judges if isinstance(judge, ProgrammaticJudge))
    return next(stated, MINIATURE / "detector.safetensors")
