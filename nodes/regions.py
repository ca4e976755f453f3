"""Where in a picture a patch acts: masks, cut to what a call of the model sees, in the sizes of its layers.

What layers add is multiplied with the mask. Text has no positions: a prompt becomes two conditionings, the users'
version inside of the mask and the one that it was outside, and ComfyUI blends what the model makes of them.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter import AdapterError
from .roles import Options, Roles, roles_of
from .text_side import Changed

_LEVELS = 4  # a UNet halves a latent up to three times, rounding up
_MOST_KEPT = 256  # nodes that make new conditionings or tiles in every step would fill the memory
_OUTSIDE_KEY = "psa_outside"


class Place(NamedTuple):
    """A part of a latent."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Step:
    """What a guider hands over at once: the latent, whose conditionings, where each lies, for which patches (by key) it
    is the version of a prompt outside of their masks, and what patches have changed.

    No tuple or dictionary: a compiled model looks at how many entries those have.
    """

    x: Tensor
    roles: Roles
    places: dict[uuid.UUID, Place]
    outside: dict[uuid.UUID, frozenset[str]]
    changed: tuple[Changed, ...] = ()

    def __deepcopy__(self, memo: dict[int, object]) -> Step:
        """Return itself: some nodes copy the options in which it travels."""
        return self

    @classmethod
    def of(cls, conds: Sequence[Sequence[Options] | None], x: Tensor, changed: tuple[Changed, ...] = ()) -> Step:
        """Read it from the conditionings."""
        every = [cond for entries in conds for cond in entries or () if "uuid" in cond]
        places = {cond["uuid"]: _place_of(cond, *x.shape[-2:]) for cond in every}
        outside = {cond["uuid"]: cond.get(_OUTSIDE_KEY, frozenset()) for cond in every}
        return cls(x, roles_of(conds), places, outside, changed)

    def is_outside(self, options: Options, key: str) -> Roles:
        """Return for each chunk of a call whether it is the version outside of the mask of the patch with this key."""
        chunks = options.get("cond_or_uncond") or [0]
        ids = options.get("uuids") or ()
        if len(ids) != len(chunks):
            return (False,) * len(chunks)
        return tuple(key in self.outside.get(number, ()) for number in ids)


class Region:
    """Where a patch acts, from 0 (nowhere) to 1; immutable.

    ``masks`` is ``[masks, height, width]``: image ``i`` has mask ``i mod masks``.
    """

    def __init__(self, mask: Tensor) -> None:
        """Take a MASK, ``[height, width]`` or ``[masks, height, width]``; values beyond 0 and 1 count as these.

        Raises:
            AdapterError: it is no mask, or one with nothing in it.
        """
        masks = mask[None] if mask.ndim == 2 else mask.squeeze(1) if mask.ndim == 4 else mask
        if masks.ndim != 3 or not masks.numel():
            raise AdapterError(
                f"Apply PSA got a mask of shape {list(mask.shape)}: expected one mask or several, [masks, height, "
                "width]. Connect a MASK."
            )
        if not masks.float().isfinite().all():
            raise AdapterError("The mask for Apply PSA holds values that are no numbers. Draw it again.")
        self.masks = masks.detach().cpu().float().clamp(0, 1)
        if not self.masks.any():  # Load Image gives such a mask for every picture without transparency
            raise AdapterError(
                "The mask for Apply PSA is black all over, so PSA would act nowhere. Draw white where it has to act, "
                "disconnect the mask, or set strength 0 if the base model is what you want."
            )
        self.everywhere = bool((self.masks == 1).all())

    def check(self, images: int, height: int, width: int) -> None:
        """Raise AdapterError unless the masks are for as many pictures of this latent size.

        Sides agree if the mask is the picture, in whatever scale, of which less than a latent pixel has been cut.
        """
        count, high, wide = self.masks.shape
        if not (high * width < wide * (height + 1) and wide * height < high * (width + 1)):
            raise AdapterError(
                f"The mask for Apply PSA is {wide}x{high}, and the picture {width * 8}x{height * 8} (a latent of "
                f"{width}x{height}): they have to be of one shape. Draw the mask on a picture of that size, or scale "
                "or crop it. Where another node samples tiles, each tile needs the part of the mask that lies there."
            )
        if images % count:
            raise AdapterError(
                f"Apply PSA got {count} masks for {images} images. Use one mask for all images, or set the batch size "
                "of the latent to the number of masks, or to a multiple of it."
            )

    def at(self, height: int, width: int) -> Tensor:
        """Return the masks in a latent's size, ``[masks, height, width]``.

        Like a VAE, they take the middle of a picture whose sides are no multiples.
        """
        high, wide = self.masks.shape[1:]
        scale = min(high // height, wide // width)
        over, beside = high - scale * height, wide - scale * width
        masks = self.masks
        if over < scale and beside < scale:
            masks = _part(masks, Place(over // 2, beside // 2, scale * height, scale * width))
        return _resized(masks, height, width)


class Weights:
    """How much of what layers add counts in one call, for all of its positions."""

    def __init__(self, masks: Tensor) -> None:
        """Take what the call sees of the masks, ``[batch or 1, height, width]``, in the precision of its layers."""
        self._masks = masks
        height, width = masks.shape[1:]
        self._sizes: dict[tuple[int, int], Tensor] = {}
        for _ in range(_LEVELS):
            self._sizes[height, width] = self._at(height, width)
            height, width = math.ceil(height / 2), math.ceil(width / 2)

    def at(self, positions: int, extra_options: Options) -> Tensor:
        """Return those for a layer that works at so many positions, ``[batch or 1, positions, 1]``.

        Raises:
            AdapterError: a node works on other positions than those of the picture.
        """
        found: Tensor | None = None
        if "activations_shape" in extra_options:
            height, width = extra_options["activations_shape"][-2:]
            found = self._sizes.get((height, width))
            if found is None:  # a node that makes layers work on a smaller picture
                found = self._at(height, width)
        else:  # older releases of ComfyUI do not say
            found = next((known for known in self._sizes.values() if known.shape[1] == positions), None)
        if found is None or found.shape[1] != positions:
            raise AdapterError(
                f"Another node lets a layer work on {positions} positions, and PSA cannot tell which of them lie "
                "inside of the mask. Remove that node, or the mask on Apply PSA."
            )
        return found

    def _at(self, height: int, width: int) -> Tensor:
        return _resized(self._masks, height, width).flatten(1)[:, :, None]


class RegionRun:
    """A region in one sampling run."""

    def __init__(self, region: Region, height: int, width: int) -> None:
        """Take the size of the run's latent."""
        self._size = (height, width)
        self._masks = region.at(height, width)
        self._lock = threading.Lock()
        self._weights: dict[tuple[Any, ...], Weights] = {}
        self._parts: dict[tuple[Any, ...], tuple[Any, Tensor | None, Tensor | None]] = {}

    def weights(self, x: Tensor, dtype: torch.dtype, chunks: int, options: Options, step: Step | None) -> Weights:
        """Return the weights for a call of the model on equal chunks ``x``.

        Raises:
            AdapterError: nobody knows where in the picture it lies.
        """
        ids = options.get("uuids") or ()
        ids = ids if len(ids) == chunks else (None,) * chunks
        places = tuple(self._place(part, number, step) for part, number in zip(x.chunk(chunks), ids, strict=True))
        images = x.shape[0] // chunks
        key = (places, images, x.device, dtype)
        with self._lock:
            if key not in self._weights:
                if len(self._weights) >= _MOST_KEPT:
                    self._weights.clear()
                self._weights[key] = Weights(self._cut(places, images).to(x.device, dtype))
            return self._weights[key]

    def split(self, cond: Options, own: Options, x: Tensor, key: str) -> list[Options]:
        """Return a conditioning in its versions: the users' inside of the mask, and what it was outside.

        Args:
            cond: the conditioning, as ComfyUI resolves it for a run: its own mask has the latent's size.
            own: the same with the users' text.
            x: the latent.
            key: of the patch.

        Raises:
            AdapterError: it stands for whatever others leave, so it has no mask; or the latent is not the run's.
        """
        if tuple(x.shape[-2:]) != self._size:
            raise _unknown_part(*x.shape[-2:])
        if "default" in cond:
            raise AdapterError(
                "A conditioning is the default for what others leave uncovered (Cond Set Default Combine), so a mask "
                "on Apply PSA cannot divide its text. Give it a mask of its own instead, or remove the mask on Apply "
                "PSA."
            )
        inside, outside = self._parts_of(cond, x)
        if outside is None:
            return [own]
        elsewhere = {
            **cond,
            "mask": outside,
            # A number of its own, the same in every step: nodes that cache results go by it.
            "uuid": uuid.uuid5(cond["uuid"], key),
            _OUTSIDE_KEY: cond.get(_OUTSIDE_KEY, frozenset()) | {key},
        }
        return [elsewhere] if inside is None else [{**own, "mask": inside}, elsewhere]

    def _place(self, part: Tensor, number: uuid.UUID | None, step: Step | None) -> Place:
        height, width = part.shape[-2:]
        if (height, width) == self._size:
            return Place(0, 0, height, width)
        if step is not None and tuple(step.x.shape[-2:]) == self._size:
            known = None if number is None else step.places.get(number)
            if known is not None and known[2:] == (height, width):
                return known
            found = _find(part, step.x)
            if len(found) == 1:
                return found[0]
        raise _unknown_part(height, width)

    def _cut(self, places: Sequence[Place], images: int) -> Tensor:
        """Return what a batch sees of the masks; one for all rows if there is no more."""
        rows = len(self._masks)
        if rows == len(set(places)) == 1:
            places, numbers = places[:1], [0]
        else:
            numbers = [image % rows for image in range(images)]
        return torch.cat([_part(self._masks, place)[numbers] for place in places])

    def _parts_of(self, cond: Options, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the masks for the users' version of a conditioning and for the other; None where it is all zero."""
        given = cond.get("mask")
        area = tuple(cond["area"]) if "area" in cond else None
        key = (id(given), area, x.shape, x.device)
        with self._lock:
            if key not in self._parts:
                if len(self._parts) >= _MOST_KEPT:
                    self._parts.clear()
                # The mask is kept beside, so that its id stays its own.
                self._parts[key] = given, *self._divided(cond, x)
            return self._parts[key][1:]

    def _divided(self, cond: Options, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        masks, images = self._masks.to(x.device), x.shape[0]
        own = _own_mask(cond, x)
        if len(masks) > 1 and len(own) > 1:
            masks, own = (part[torch.arange(images, device=x.device) % len(part)] for part in (masks, own))
        place = _place_of(cond, *x.shape[-2:])
        inside, outside = own * masks, own * (1 - masks)
        if not _part(outside, place).any():
            return inside, None
        return (inside if _part(inside, place).any() else None), outside


def _unknown_part(height: int, width: int) -> AdapterError:
    return AdapterError(
        f"Another node lets the model work on a part of {width * 8}x{height * 8} of the picture, and PSA cannot tell "
        "where it lies in the mask. Remove that node, or the mask on Apply PSA."
    )


def _own_mask(cond: Options, x: Tensor) -> Tensor:
    """Return the mask of a conditioning, ``[masks, height, width]`` of the latent's size.

    ComfyUI fades out the edges of an area unless the conditioning has a mask; so if it gets one, that has to fade out.
    """
    if "mask" in cond:
        mask: Tensor = cond["mask"]
        return mask[: x.shape[0]].to(x.device)
    whole = torch.ones_like(x[:1, 0])
    if "area" not in cond:
        return whole
    faded = comfy.samplers.get_area_and_mult({"area": cond["area"], "model_conds": {}, "uuid": None}, x, None).mult
    _part(whole, _place_of(cond, *x.shape[-2:])).copy_(faded[:1, 0])
    return whole


def _place_of(cond: Options, height: int, width: int) -> Place:
    """Return where a conditioning acts in a latent of this size, as ComfyUI cuts it."""
    area = cond.get("area")
    if area is None:
        return Place(0, 0, height, width)
    half = len(area) // 2
    top, left = area[half : half + 2]
    return Place(top, left, min(height - top, area[0]), min(width - left, area[1]))


def _part(images: Tensor, place: Place) -> Tensor:
    return images[..., place.top : place.top + place.height, place.left : place.left + place.width]


def _find(part: Tensor, whole: Tensor) -> list[Place]:
    """Return where ``part`` was cut from ``whole``, by its values; up to two places. Noise is nowhere the same."""
    height, width = part.shape[-2:]
    if part.shape[:2] != whole.shape[:2] or height > whole.shape[-2] or width > whole.shape[-1]:
        return []
    corners = whole[0, 0, : whole.shape[-2] - height + 1, : whole.shape[-1] - width + 1] == part[0, 0, 0, 0]
    found: list[Place] = []
    for top, left in corners.nonzero().tolist():
        place = Place(top, left, height, width)
        if len(found) < 2 and torch.equal(_part(whole, place), part):
            found.append(place)
    return found


def _resized(masks: Tensor, height: int, width: int) -> Tensor:
    """Average over what each pixel of the new size covers; 0 and 1 stay exactly that."""
    if masks.shape[1:] == (height, width):
        return masks
    return F.interpolate(masks[:, None], (height, width), mode="area")[:, 0]
