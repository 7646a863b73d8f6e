"""A pretend GPU for tests on machines without one.

Under `pretend_gpu("cuda")` tensors can be moved to "cuda" and made there. They say that they are on `cuda:0`, are computed on the CPU,
and refuse what CUDA refuses: tensors of another device, CPU generators, numpy. With "mps" it is Apple's, which has no float64, either.
That finds what code forgets to move. It says nothing about a GPU's own kernels, number formats, speed or memory.

A pretended tensor is a wrapper subclass: to PyTorch's C++ side a meta tensor, whose operations arrive in `__torch_dispatch__` and are
done on the CPU tensor in it. C++ makes scalars and lists into meta tensors before that, and their values are lost, so `Calls`, which
sees calls before C++ does, turns them into tensors first; a call that it does not know of fails with "a value was lost".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map


aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class PretendTensor(torch.Tensor):
    """A tensor that says it is on the pretended `gpu` and computes with `on_cpu`."""

    gpu = torch.device("cuda", 0)

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        like = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset(), "dtype": on_cpu.dtype}
        like |= {"requires_grad": on_cpu.requires_grad, "device": "meta"}
        return torch.Tensor._make_wrapper_subclass(cls, on_cpu.shape, **like)

    def __init__(self, on_cpu: torch.Tensor):
        if self.gpu.type == "mps" and on_cpu.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        self.on_cpu = on_cpu

    device = property(lambda self: self.gpu)
    is_cuda = property(lambda self: self.gpu.type == "cuda")
    is_mps = property(lambda self: self.gpu.type == "mps")
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def tolist(self):
        return self.on_cpu.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(
            f"can't convert {self.gpu} device type tensor to numpy. Use Tensor.cpu() to copy it to host memory."
        )

    __array__ = numpy

    def __reduce_ex__(self, protocol):
        return self.detach().on_cpu.__reduce_ex__(protocol)

    def __repr__(self, **kwargs):
        return f"PretendTensor({self.on_cpu!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._current_graph_task_id() != -1:  # in a backward pass C++ makes zeros: gradients that nobody gave
            args, kwargs = tree_map(zeros_if_lost, (args, kwargs))
        check_devices(func, args, kwargs)
        to_cpu = func is aten.copy_.default and not isinstance(args[0], cls)
        if kwargs.get("device") is not None:
            to_cpu = torch.device(kwargs["device"]).type == "cpu"
            kwargs = {**kwargs, "device": torch.device("cpu")}
        found = func(*bare(args), **bare(kwargs))
        if to_cpu:
            return found
        return return_and_correct_aliasing(func, args, kwargs, tree_map(wrapped, found))


class Move(torch.autograd.Function):
    """From the CPU to the pretended GPU; gradients come back."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> PretendTensor:
        return PretendTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.cpu()


class Calls(TorchFunctionMode):
    """The calls that name the pretended device, or whose values C++ would lose."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], "cuda")
        if func is torch.Tensor.to:
            args, kwargs, moved = without_gpu(args, kwargs)
            if moved and not isinstance(args[0], PretendTensor):
                args[0] = Move.apply(args[0])
            return func(*args, **kwargs) if len(args) + len(kwargs) > 1 else args[0]
        if func is torch.Tensor.backward:  # its own code names devices, too
            with self:
                return torch.autograd.backward(args[0], kwargs.get("gradient"), kwargs.get("retain_graph"))
        if is_gpu(kwargs.get("device")):
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"Expected a '{PretendTensor.gpu.type}' device type for generator but found 'cpu'")
            return tree_map(wrapped, func(*bare(args), **{**bare(kwargs), "device": "cpu"}))
        if func in REPLACED and any(isinstance(leaf, PretendTensor) for leaf in tree_leaves((args, kwargs))):
            return REPLACED[func](*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def pretend_gpu(kind: str) -> Iterator[torch.device]:
    """Pretend that there is a GPU, "cuda" or "mps"; gives its device."""
    calls, apply, gpu = Calls(), BackwardCFunction.apply, torch.device(kind, 0)

    def under_the_mode(node, *gradients):  # the autograd engine runs the backward passes of functions without it
        with calls:
            return apply(node, *gradients)

    with (
        calls,
        mock.patch.object(BackwardCFunction, "apply", under_the_mode),
        mock.patch.object(PretendTensor, "gpu", gpu),
    ):
        yield gpu


def bare(tree):
    """With the CPU tensors in place of the pretended ones."""
    return tree_map(lambda leaf: leaf.on_cpu if isinstance(leaf, PretendTensor) else leaf, tree)


def wrapped(leaf):
    plain = isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendTensor)
    return PretendTensor(leaf) if plain else leaf


def zeros_if_lost(leaf):
    lost = isinstance(leaf, torch.Tensor) and leaf.is_meta
    return PretendTensor(torch.zeros(leaf.shape, dtype=leaf.dtype)) if lost else leaf


def is_gpu(device) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == PretendTensor.gpu.type


def check_devices(func, args, kwargs) -> None:
    """Raise what a GPU would: only copies, indices and tensors without dimensions may come from elsewhere."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert not any(tensor.is_meta for tensor in tensors), f"{func}: a value was lost"
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"Expected a '{PretendTensor.gpu.type}' device type for generator but found 'cpu'")
    if func in COPIES:
        return
    if func in INDEXED and isinstance(args[0], PretendTensor):
        tensors = [leaf for leaf in args[2:3] if isinstance(leaf, torch.Tensor)]
    if any(tensor.ndim > 0 and not isinstance(tensor, PretendTensor) for tensor in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found two devices, {PretendTensor.gpu} and cpu! ({func})"
        )


def without_gpu(args, kwargs) -> tuple[list, dict, bool]:
    """Arguments of `Tensor.to` with the format alone, and whether they ask for the pretended device."""
    targets = [leaf for leaf in (*args[1:], kwargs.get("device"), kwargs.get("other")) if leaf is not None]
    like = next((leaf for leaf in targets if isinstance(leaf, torch.Tensor)), None)
    if not (isinstance(like, PretendTensor) or any(is_gpu(leaf) for leaf in targets)):
        return list(args), kwargs, False
    formats = [leaf for leaf in args[1:] if isinstance(leaf, torch.dtype)] + ([like.dtype] if like is not None else [])
    kept = {key: value for key, value in kwargs.items() if key in ("dtype", "copy", "memory_format")}
    return [args[0], *formats], kept, True


def with_tensors(index):
    """An index whose lists are tensors."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)


def set_item(tensor: PretendTensor, index, value) -> None:
    value = value if isinstance(value, torch.Tensor) else PretendTensor(torch.tensor(value, dtype=tensor.dtype))
    torch.Tensor.__setitem__(tensor, with_tensors(index), value)


def where(condition: PretendTensor, *choices):
    like = next((choice for choice in choices if isinstance(choice, torch.Tensor)), torch.tensor(0.0))
    choices = [
        choice if isinstance(choice, torch.Tensor) else torch.tensor(choice, dtype=like.dtype) for choice in choices
    ]
    return torch.where(condition, *choices)


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """`scaled_dot_product_attention` in plain products: C++ would choose a kernel for a device that is not there."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = PretendTensor(torch.ones(scores.shape[-2:], dtype=torch.bool).tril())
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


REPLACED = {
    torch.Tensor.__getitem__: lambda tensor, index: torch.Tensor.__getitem__(tensor, with_tensors(index)),
    torch.Tensor.__setitem__: set_item,
    torch.Tensor.new_tensor: lambda tensor, data, **kwargs: PretendTensor(
        torch.tensor(data, **{"dtype": tensor.dtype, **kwargs, "device": "cpu"})
    ),
    torch.Tensor.untyped_storage: lambda tensor: tensor.on_cpu.untyped_storage(),
    torch.where: where,
    torch.Tensor.where: lambda tensor, condition, other: where(condition, tensor, other),
    torch.nn.functional.scaled_dot_product_attention: attention,
}
