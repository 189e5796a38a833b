"""A second device for machines that have none, on which a GPU's mistakes show.

Its tensors lie on the CPU, but say that they do not, and refuse to meet those that do, as a GPU's
would. All in Python, by torch's own hooks for such devices.
"""

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "second"
LIBRARY = torch.library.Library("aten", "IMPL")
MOVES = ("aten._to_copy.default", "aten.copy_.default")  # from one device to another
# Places may be named from the CPU.
INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten._index_put_impl_.default")


class Remote(torch.Tensor):
    """A tensor on the second device; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self):
        return self.held.tolist()

    def __reduce_ex__(self, protocol):  # torch.save
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Intercept(TorchDispatchMode):
    """Sees what is made on the second device, where no tensor of its own takes part yet."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """Compute on the CPU; put the result where a GPU would, refuse what a GPU would refuse."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    remote = [isinstance(x, Remote) for x in tensors]
    name, place = str(function), kwargs.get("device")
    if name not in MOVES and any(remote):
        numbers_only = [x.dim() == 0 for x in tensors]
        free = [r or n for r, n in zip(remote, numbers_only, strict=True)]
        if not (all(free) or (name in INDEXING and remote[0])):
            raise RuntimeError(f"{name}: tensors on two devices")
    there = any(remote) if place is None else torch.device(place).type == NAME
    if name == "aten.copy_.default":
        there = remote[0]
    if place is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held = tree_map(lambda x: x.held if isinstance(x, Remote) else x, (args, kwargs))
    found = function(*held[0], **held[1])
    if function._schema.is_mutable and name.split(".")[1].endswith("_"):
        return args[0]
    return tree_map(lambda x: Remote(x) if there and isinstance(x, torch.Tensor) else x, found)


# What torch calls by itself to bring a list of places to the device.


def make_empty(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Remote(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, target, non_blocking=False):
    target.held.copy_(source)
    return target


class Module(backend_registration._DummyBackendModule):
    """What torch.autocast asks such a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def second_device():
    """Make the device known to torch, for the rest of this process, and return it.

    Nothing may have been differentiated in the process before: torch counts its devices then.
    """
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    LIBRARY.impl("empty_strided", make_empty, "PrivateUse1")
    LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that parameters can move
    Intercept().__enter__()
    return torch.device(NAME)
