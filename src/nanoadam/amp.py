"""Loss scaling: `torch.amp.GradScaler` with gradients that it cannot see because they are held, not in `p.grad`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

if TYPE_CHECKING:
    from nanoadam.optimizer import NanoAdam


def unscale(optimizer: NanoAdam, scaler: Any) -> bool:
    """Divide all gradients by the loss scale, once; whether they are finite, so that the step may be taken.

    Args:
        scaler: the GradScaler that called `step()`, or None. A scaler that passes itself learns here of what is
            wrong with held gradients, and lowers its scale. One that sets `optimizer.grad_scale` and
            `optimizer.found_inf` instead (the way torch announces) only learns of `p.grad`.

    Raises:
        RuntimeError: if `p.grad` was unscaled before by a scaler that does not pass itself: the scale is unknown.
    """
    if scaler is None and not hasattr(optimizer, "found_inf"):
        return True
    dense = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scaler is not None:
        record = scaler._per_optimizer_states[id(optimizer)]
        found = record["found_inf_per_device"]
        # Not scaler.unscale_(): it refuses float16 gradients, which are fine where the update is in float32.
        gradients = optimizer.held() + (dense if record["stage"] is OptState.READY else [])
        for device, flag in _divide(gradients, scaler._get_scale_async()).items():
            found[device] = torch.maximum(found[device], flag) if device in found else flag
        return not any(bool(flag.item()) for flag in found.values())
    held, scale = optimizer.held(), getattr(optimizer, "grad_scale", None)
    if scale is None and held:
        raise RuntimeError(
            "scaler.unscale_(optimizer) cannot reach the gradients that NanoAdam holds: leave it out and clip with "
            "NanoAdam(max_grad_norm=...), or use gradient_release=False"
        )
    infinite = bool(getattr(optimizer, "found_inf"))  # noqa: B009 - set by the scaler
    if scale is not None:
        infinite |= any(bool(flag.item()) for flag in _divide(held + dense, scale).values())
    return not infinite


def _divide(gradients: list[Tensor], scale: Tensor) -> dict[torch.device, Tensor]:
    """Divide in place by the scale; for each device a float32 [1] flag that is 1 if one was not finite."""
    infinite: dict[torch.device, Tensor] = {}
    for device in {gradient.device for gradient in gradients}:
        members = [gradient for gradient in gradients if gradient.device == device]
        infinite[device] = torch.zeros(1, device=device)
        inverse = scale.double().reciprocal().float().to(device)
        for dtype in {gradient.dtype for gradient in members}:
            same = [gradient for gradient in members if gradient.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(same, infinite[device], inverse)
    return infinite
