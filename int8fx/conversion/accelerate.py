"""What accelerate must not do with packed layers. It has no hook for that, so packed modules look at who is calling."""

from __future__ import annotations

from torch import Tensor

from .callers import caller

OFFLOADED = "_old_forward"
"""An attribute that accelerate sets on each module that it is about to offload."""


def refuse_partial_offload(label: str, codes: Tensor) -> None:
    """Raises TypeError if accelerate has offloaded ``codes`` to disk while it loaded them, without their scales.

    ``load_checkpoint_in_model`` leaves out the buffers of modules on disk. So scales would be those from before.

    Args:
        label: the name of the packed weight in messages.
    """
    frame = caller("accelerate.big_modeling", "dispatch_model")
    if frame is None or not codes.is_meta or frame.f_locals["offload_buffers"]:
        return
    if frame.f_locals["offload_index"] is None:  # transformers gives one, and has loaded the scales
        raise TypeError(
            f"int8fx: accelerate loads the codes of the packed weight {label} from disk, but not its scales, as they "
            "are buffers; legal: offload_buffers=True"
        )
