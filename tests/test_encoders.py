"""Vision encoders whose masks are intervals here, against the unmodified ones with their dense masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.families.mllama_encoder import install_encoder
from ds_lvxattn.runtime.registration import encoder_attention, register_with_transformers
from tests.support.tiny_model import SIZE, tiny_config, tiny_model


def mllama_encoder(tiles: int, dtype: torch.dtype) -> nn.Module:
    """Three layers, of which two are kept, one counted from the last, and two global ones."""
    config = tiny_config(tiles)
    vision = config.vision_config
    vision.num_hidden_layers, vision.num_global_layers = 3, 2
    vision.intermediate_layers_indices, vision.vision_output_dim = [1, 0, -1], 4 * vision.hidden_size
    register_with_transformers()
    return tiny_model(config, dtype).get_submodule("model.vision_model")


def frames_of(real: Sequence[int], tiles: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Frames with that many real tiles, of all aspect ratios in turn: pixels, ids and mask."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(real), tiles, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    mask = (torch.arange(tiles) < torch.tensor(real)[:, None]).long()
    ids = 1 + torch.arange(len(real)) % len(tiny_config(tiles).vision_config.supported_aspect_ratios)
    return pixels * mask[:, :, None, None, None], ids, mask


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("real", [(1,), (1, 1), (2, 1), (1, 4, 2, 3)])
def test_mllama_encoder(real: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    tiles = max(real)
    theirs, ours = mllama_encoder(tiles, dtype), mllama_encoder(tiles, dtype)
    install_encoder(ours)
    pixels, ids, mask = frames_of(real, tiles, dtype)
    want = theirs(pixels[None], ids[None], mask[None]).last_hidden_state[0]
    got = ours(pixels, ids, mask, tiles=tiles)
    shown = mask[:, :, None, None]  # what stands in blank tiles nobody reads
    torch.testing.assert_close(got * shown, want * shown, rtol=bound, atol=bound)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels, ids, mask, tiles=tiles), got, rtol=bound, atol=bound)
    for features in (want, got):
        (features * shown * torch.linspace(-1, 1, features.shape[-1], dtype=dtype)).sum().backward()
    for (name, parameter), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None, name
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        assert (parameter.grad - other.grad).abs().max().item() < bound * 100 * scale, name


def test_tiles_that_nobody_reads_are_left_out() -> None:
    encoder = mllama_encoder(4, torch.float64)
    install_encoder(encoder)
    pixels, ids, mask = frames_of((1, 1, 1), 4, torch.float64)
    want = encoder(pixels, ids, mask, tiles=4)[:, :1]
    # Blank tiles need not be there, and one that is no longer needed is not kept.
    got = encoder(pixels[:, :1], ids, mask[:, :1], tiles=1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got.is_contiguous() and got.untyped_storage().nbytes() == got.nbytes


def test_states_are_overwritten_where_nobody_sees_them() -> None:
    encoder = mllama_encoder(1, torch.float32).requires_grad_(False)
    install_encoder(encoder)
    inputs = frames_of((1, 1), 1, torch.float32)
    layers, seen, operators = encoder.transformer.layers, [], []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Operators():
        want = encoder(*inputs, tiles=1)
    # Of the three layers the second and the third follow one whose state is kept.
    assert operators.count(torch.ops.aten.addmm_) == 1
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    with torch.no_grad():
        torch.testing.assert_close(encoder(*inputs, tiles=1), want, rtol=1e-4, atol=1e-4)
    assert len(seen) == len(layers)
    for now, then in seen:
        assert torch.equal(now, then)


def test_an_encoder_called_as_ever_is_the_model_s_own() -> None:
    theirs, ours = mllama_encoder(2, torch.float64), mllama_encoder(2, torch.float64)
    install_encoder(ours)
    inputs = [x[None] for x in frames_of((1, 2), 2, torch.float64)]
    got, want = ours(*inputs).last_hidden_state, theirs(*inputs).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_dense_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, **others: object) -> object:
        seen.append(mask)
        return encoder_attention(module, q, k, v, mask, **others)  # type: ignore[arg-type]

    monkeypatch.setattr("ds_lvxattn.runtime.registration.encoder_attention", attention)
    encoder = mllama_encoder(4, torch.float64)
    register_with_transformers()
    install_encoder(encoder)
    encoder(*frames_of((1, 3), 4, torch.float64), tiles=3)
    assert len(seen) == 5
    assert all(isinstance(mask, KVInterval) for mask in seen)
    # Of the last layer only the rows of the three tiles that are read.
    assert [mask.start.shape for mask in seen] == [(2, 4 * 8)] * 4 + [(2, 3 * encoder.num_patches)]
    monkeypatch.undo()
    register_with_transformers()
