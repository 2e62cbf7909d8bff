"""Whether a device can still be used after something failed on it."""

import torch


def is_lost(device: torch.device) -> bool:
    """Whether every further call to the device fails in this process.

    Some CUDA errors (an illegal memory access, a device-side assert) are sticky: from then on every call in the process
    raises the same error. Running out of memory is not one of them.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # torch.AcceleratorError is one
        return True
    return False
