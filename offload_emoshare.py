"""Weights that `device_map` has offloaded to the memory of the CPU or to disk."""

from contextlib import contextmanager


@contextmanager
def weights_in_place(module):
    """
    Within this context, all weights of a module and its parts are in place.

    accelerate's hooks put offloaded weights in place while the module that holds them is called, and leave a meta
    tensor otherwise. Code that reads the weights of a part without calling the part needs this.

    Args:
        module: `nn.Module`, whether offloaded or not.
    """
    offloaded = [
        part
        for part in module.modules()
        if "_hf_hook" in vars(part) and any(weight.is_meta for weight in part.parameters(recurse=False))
    ]
    for part in offloaded:
        part._hf_hook.pre_forward(part)
    try:
        yield
    finally:
        for part in offloaded:
            part._hf_hook.post_forward(part, None)
