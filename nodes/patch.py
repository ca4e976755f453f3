"""The patch on a ComfyUI model: what an adapter does for users, wherever it acts.

At cross-attention layers, vectors (``constant``) and gates (``gated``) stand in front of ``to_out``. They are projected
with the model's own layers when sampling begins, in whatever state those are then (LoRA, fp8, offloaded), and live for
that run only:

    to_out(a + v) = to_out(a) + (to_out(v) - to_out(0))

An ``attn2_output_patch`` adds what has been prepared; an ``attn2_patch`` takes down the layer's input for the gates.
The text side changes prompts before they enter the model (``text_side.py``).

Wrappers around a sampling run, around a guider's conditionings and around each call of the model work out what every
image gets. The patch itself never changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ..adapter import Site, UserEffect, users_of
from .curve import FLAT, Curve
from .regions import Region, Step
from .replaced import only_given_text, replaces
from .roles import Options, name_roles
from .run import Call, Run, left_out

_WRAPPERS = (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL)
_INPUTS, _OUTPUTS = "attn2_patch", "attn2_output_patch"
_STEP_KEY = "psa_step"  # what a guider hands over, for all patches
_Inputs = tuple[Tensor, Tensor, Tensor]


class UserPatch:
    """What users change on one model, with strength and range; immutable, so clones may share it.

    Batches: one user serves every image; N users need a multiple of N images per chunk, and take turns.
    """

    def __init__(
        self,
        effect: UserEffect,
        sites: Sequence[Site],
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        curve: Curve = FLAT,
        region: Region | None = None,
        key: str = "psa_0",
    ) -> None:
        """Take what users do at ``sites`` (same order); act from ``start_percent`` to before ``end_percent``.

        ``curve`` says how much of the strength counts on the way, ``region`` where. ``key`` is the patch's name on its
        model, see ``free_key``.
        """
        self.users = users_of(effect)
        self.strength = strength
        self.start_percent = start_percent
        self.end_percent = end_percent
        self.curve = curve
        self.sites = tuple(sites)
        self.index = {site.key: i for i, site in enumerate(sites)}
        # Per site [users + 1, hidden]: the users, then what the unconditional half adds.
        self.rows = () if effect.constant is None else effect.constant.rows()
        self.gates = effect.gated or ()
        self.text = effect.text
        self.region = region
        self.key = key
        self._run_key = f"{self.key}_run"
        self._input_key = f"{self.key}_input"
        self._context_key = f"{self.key}_context"

    def __deepcopy__(self, memo: dict[int, object]) -> UserPatch:
        """Return itself: ComfyUI copies patches with every clone of a model."""
        return self

    @property
    def acts_on_layers(self) -> bool:
        """Whether cross-attention layers are changed."""
        return bool(self.rows or self.gates)

    def attach(self, model: ModelPatcher) -> ModelPatcher:
        """Return a clone of ``model`` with this patch; with strength 0, one without it."""
        clone = model.clone()
        if self.strength != 0:
            for wrapper, method in zip(_WRAPPERS, (self.wrap_run, self.wrap_conds, self.wrap_call), strict=True):
                clone.add_wrapper_with_key(wrapper, self.key, method)
            clone.set_model_attn2_output_patch(self)
        return clone

    def wrap_run(
        self,
        executor: WrapperExecutor,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """``OUTER_SAMPLE`` wrapper: one run, from projecting the vectors to checking that they were used."""
        guider = executor.class_obj
        name_roles(guider.conds)
        run = Run(self, noise.shape)
        options: Options = guider.model_options["transformer_options"]
        options[self._run_key] = run
        options["wrappers"] = _innermost(options["wrappers"], self.key, _WRAPPERS[1:])
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if len(sigmas) > 1:  # else there was no step to take
            run.check()
        return samples

    def wrap_conds(
        self, executor: WrapperExecutor, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Options
    ) -> Any:
        """``CALC_COND_BATCH`` wrapper: note which of ``conds`` are the user's, and give those the user's text."""
        options = dict(model_options.get("transformer_options", {}))
        before: Step | None = options.get(_STEP_KEY)
        step = Step.of(conds, x, before.changed if before else ())
        run: Run | None = options.get(self._run_key)
        factor = 0.0 if run is None or run.text is None else run.factor(model, timestep)
        if run is not None and run.text is not None and factor:
            conds, changed = run.conditionings(conds, step, factor)
            step = Step.of(conds, x, changed)
        options[_STEP_KEY] = step
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": options})

    def wrap_call(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Options | None = None,
        **kwargs: Any,
    ) -> Any:
        """``APPLY_MODEL`` wrapper: decide once per call whether and what each layer adds."""
        options = transformer_options or {}
        patches = options.get("patches", {})
        outputs = patches.get(_OUTPUTS, ())
        if self not in outputs:
            raise left_out()
        run: Run = options.get(self._run_key) or Run(self, x.shape)
        call = run.prepare(executor.class_obj, x, t, options, options.get(_STEP_KEY))
        options = {**options, self.key: call}
        # Ours is the first to see what a layer is given and the last to see what it returns: whatever another node
        # (Attention Couple) does to the batch in between, it is the call's own there.
        others = [patch for patch in outputs if patch is not self]
        options["patches"] = {**patches, _OUTPUTS: [*others, self]}
        inputs = patches.get(_INPUTS, ())
        others_read = any(not isinstance(getattr(patch, "__self__", None), UserPatch) for patch in inputs)
        looks = call.active and self.text is not None and (others_read or replaces(options))
        if looks or (self.gates and call.layers is not None):
            options["patches"][_INPUTS] = [self.receive, *inputs, *([self.look] if looks else ())]
        if not call.active or self.text is None:
            output = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        elif any(options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {}).values()):
            output = executor(x, t, c_concat, c_crossattn, control, self._with_last_wrapper(options), **kwargs)
        else:
            # Nobody comes between this and the UNet. A compiled UNet has what runs inside of it compiled as well.
            c_crossattn, y = self._read(call, options, c_crossattn, kwargs.pop("y", None))
            kwargs = kwargs if y is None else {**kwargs, "y": y}
            with only_given_text(executor.class_obj.diffusion_model, self.sites, options, lambda: call.handed):
                output = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if call.active and self.text is not None and not call.text_read:
            raise left_out()
        run.note(call)
        return output

    def _with_last_wrapper(self, options: Options) -> Options:
        wrappers = options["wrappers"]
        ours = {**wrappers[WrappersMP.DIFFUSION_MODEL], self.key: [self.wrap_unet]}
        return {**options, "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: ours}}

    def _read(
        self, call: Call, options: Options, text: Tensor | None, y: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text and ``y`` of a call, with the user's text in what is the user's."""
        assert call.run.text is not None
        call.text_read = True
        step: Step | None = options.get(_STEP_KEY)
        return call.run.text.batch(text, y, call.text_of_user, step.changed if step else (), call.factor)

    def wrap_unet(
        self,
        executor: WrapperExecutor,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Options | None = None,
        **kwargs: Any,
    ) -> Any:
        """``DIFFUSION_MODEL`` wrapper, the last before the UNet if there are others: as ``wrap_call`` does else."""
        options = transformer_options or {}
        call: Call = options[self.key]
        context, y = self._read(call, options, context, y)
        with only_given_text(executor.class_obj, self.sites, options, lambda: call.handed):
            return executor(x, timesteps, context, y, control, options, **kwargs)

    def receive(self, n: Tensor, context: Tensor, value: Tensor, extra_options: Options) -> _Inputs:
        """First ``attn2_patch``: take down input and text as they come to the layer.

        ``n`` is ``[batch, positions, hidden]``, ``context`` ``[batch, tokens, dim]``.
        """
        extra_options[self._input_key] = n
        extra_options[self._context_key] = context
        return n, context, value

    def look(self, n: Tensor, context: Tensor, value: Tensor, extra_options: Options) -> _Inputs:
        """Last ``attn2_patch``: prompts that another node has put in beside ours become the user's as well."""
        call: Call = extra_options[self.key]
        received = extra_options[self._context_key]
        if call.run.text is not None and not (context is received and value is received):
            new = call.put_in(context, extra_options)
            same = value is context
            context = call.run.text.put_in(context, new, call.factor)
            value = context if same else call.run.text.put_in(value, new, call.factor)
        call.handed = context
        return n, context, value

    def __call__(self, n: Tensor, extra_options: Options) -> Tensor:
        """``attn2_output_patch``: add what users add to ``n``, ``[batch, positions, hidden]``."""
        call: Call | None = extra_options.get(self.key)
        if call is None:
            raise left_out()
        layers = call.layers
        if layers is None:
            return n
        site = call.site(n, extra_options)
        weights = None if call.weights is None else call.weights.at(n.shape[1], extra_options)
        if layers.constant:
            n = n + layers.constant[site] if weights is None else torch.addcmul(n, layers.constant[site], weights)
        if layers.gates:
            inputs, places = extra_options.get(self._input_key), layers.places
            if inputs is None:
                raise left_out()
            added = layers.gates[site](inputs if places is None else inputs[places])
            if weights is not None:
                added = added * (weights if places is None or len(weights) == 1 else weights[places])
            return n + added if places is None else n.index_add(0, places, added.to(n.dtype))
        return n


def _innermost(wrappers: Options, key: str, kinds: Sequence[str]) -> Options:
    """Return wrappers in which those with ``key`` come last, so that they see what all others have done."""
    ordered = {}
    for kind in kinds:
        others = {name: found for name, found in wrappers[kind].items() if name != key}
        ordered[kind] = {**others, key: wrappers[kind][key]}
    return {**wrappers, **ordered}


def free_key(model: ModelPatcher) -> str:
    """Return a name for one more patch on a model.

    It does not tell one user or setting from another: a compiled model looks names up, and would be compiled again.
    """
    taken = {patch.key for patch in patches_of(model)}
    return next(key for key in map("psa_{}".format, itertools.count()) if key not in taken)


def patches_of(model: ModelPatcher) -> list[UserPatch]:
    """Return the patches on a model, in the order in which they were applied."""
    options: Options = model.model_options["transformer_options"]
    return [patch for patch in options.get("patches", {}).get(_OUTPUTS, ()) if isinstance(patch, UserPatch)]


def without(model: ModelPatcher, patches: Sequence[UserPatch]) -> ModelPatcher:
    """Return a clone of ``model`` without these patches."""
    clone = model.clone()
    for patch in patches:
        for wrapper in _WRAPPERS:
            clone.remove_wrappers_with_key(wrapper, patch.key)
    options: Options = clone.model_options["transformer_options"]
    others = [patch for patch in options["patches"][_OUTPUTS] if patch not in patches]
    options["patches"] = {**options["patches"], _OUTPUTS: others}
    return clone
