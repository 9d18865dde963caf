"""Runs in fp32, whole or the head alone, from weights that stay in bf16 or fp16."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .model import HookedALM
from .turns import restored


@contextmanager
def in_float32(model: HookedALM) -> Iterator[None]:
    """Compute the embedding, the blocks and the head in fp32 within the context.

    Every module that holds weights converts them when it runs and forgets the copies behind it, so
    that memory grows by the activations and the largest module, not by the model. The front-end
    stays as it is: what it hears enters the blocks rounded. A model in fp32 is left alone.

    Raises:
        InputError: an attention implementation that knows no fp32.
    """
    if model.cfg.dtype == torch.float32:
        yield
        return
    if "flash" in model.cfg.attn_implementation:
        raise InputError(
            f"computing in float32: {model.cfg.attn_implementation} knows half precision alone. "
            "Load the model with attn_implementation='sdpa'."
        )
    heard = set() if model.audio is None else {id(one) for one in model.audio.modules()}
    with model.turn.running(), ExitStack() as stack:
        before = model.cfg.dtype
        stack.enter_context(restored(partial(setattr, model.cfg, "dtype", before)))
        model.cfg.dtype = torch.float32
        for module in model.modules():
            if id(module) not in heard and any(True for _ in module.parameters(recurse=False)):
                stack.enter_context(_upcast(module))
        yield


@contextmanager
def head_in_float32(model: HookedALM) -> Iterator[None]:
    """Read the stream out in fp32 within the context: the norm and the unembedding of the head."""
    dtype = torch.promote_types(model.cfg.dtype, torch.float32)

    def widen(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].to(dtype),)

    with model.turn.running(), ExitStack() as stack:
        if model.cfg.dtype != dtype:
            for module in (model.head_norm, model.head_unembed):
                stack.enter_context(_upcast(module))
            hook = model.head_norm.register_forward_pre_hook(widen)
            stack.enter_context(restored(hook.remove))
        yield


@contextmanager
def _upcast(module: nn.Module) -> Iterator[None]:
    """Give a module fp32 copies of its own weights whenever it runs."""
    stored: list[tuple[nn.Parameter, Tensor]] = []

    def put_back(*_: Any) -> None:
        while stored:
            parameter, data = stored.pop()
            parameter.data = data

    def convert(*_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            stored.append((parameter, parameter.data))
            parameter.data = parameter.data.float()

    before = module.register_forward_pre_hook(convert)
    after = module.register_forward_hook(put_back, always_call=True)
    with restored(put_back), restored(before.remove), restored(after.remove):
        yield
