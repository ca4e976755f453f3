"""The meeting of adapter, embedding and model: checks that they belong together, then patches a clone."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher

from ..adapter import AdapterError, CompiledProfile, NullMode, PSAAdapter, find_sites
from .curve import FLAT, Curve
from .patch import UserPatch, free_key
from .people import People, effect, everyone
from .regions import Region
from .together import check_together


def apply_psa(
    model: ModelPatcher,
    adapter: PSAAdapter | None,
    embedding: People,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    null: NullMode | None = None,
    curve: Curve = FLAT,
    region: Region | None = None,
) -> ModelPatcher:
    """Return a clone of ``model`` that follows the people in ``embedding``.

    Args:
        model: any UNet with cross-attention of the adapter's family.
        adapter: the adapter; compiled profiles need none.
        embedding: one person, or several: image ``i`` is the ``i``-th one's, and further images begin with the first
            again.
        strength: 0 gives exactly the base model, 1 the adapter as trained.
        start_percent: where in the sampling run the adapter begins, 0 to 1.
        end_percent: where it ends; the step that begins there is no longer changed.
        null: what the unconditional half gets; by default as trained.
        curve: how much of the strength counts, from start to end.
        region: where in the picture it acts; everywhere without one.

    Raises:
        AdapterError: adapter or compiled profile do not fit the model or each other, the range is empty, or all of the
            curve is 0.
        EncoderError: the embedding is from another encoder than the adapter's.
    """
    if start_percent >= end_percent:
        raise AdapterError(
            f"Apply PSA would never act: start_percent {start_percent:g} is not before end_percent {end_percent:g}. "
            "Set a range, or strength 0 if the base model is what you want."
        )
    if strength and not curve.peak:
        raise AdapterError(
            "Apply PSA would never act: all of its strengths are 0. Set one above 0, or strength 0 if the base model "
            "is what you want."
        )
    sites = find_sites(model.model.diffusion_model)
    if adapter is not None:
        adapter.check_sites(sites)
    for person in everyone(embedding):
        if isinstance(person, CompiledProfile):
            person.check_sites(sites)
    check_together(embedding, adapter)
    with torch.no_grad():
        changes = effect(embedding, adapter, null)
    patch = UserPatch(changes, sites, strength, start_percent, end_percent, curve, region, free_key(model))
    return patch.attach(model)
