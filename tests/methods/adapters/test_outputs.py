"""What an adapter's first factor writes, against PEFT's own modules."""

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import adapted
from hooked_alm import HookedALM
from hooked_alm.methods.adapters.outputs import OutputSpectra, components_needed, used_directions
from tiny import TinyModels, hf_inputs

BATCHES = (hf_inputs([[63], [23]], [9, 14]), hf_inputs([[40]], [11]))


def test_components_of_the_card() -> None:
    """9 of 10, and 25 of 26; of equals nearly all; of nothing none."""
    assert components_needed(np.array([3.0, 1.0])) == 1
    assert components_needed(np.array([1.0, 3.0]), 0.91) == 2
    assert components_needed(np.ones(10)) == 9
    assert components_needed(np.zeros(4)) == 0


@torch.no_grad()
def test_singular_values_are_those_of_what_pefts_modules_write(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every update, over two batches, of which pads are no rows."""
    theirs = adapted(tiny_models.folder(), torch.float32)
    theirs.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    ours = HookedALM.from_pretrained(tiny_models.folder(), lora=folder, merge_lora=False)
    written: dict[str, list[Tensor]] = {}
    for name, module in theirs.named_modules():
        if name.endswith("lora_A.default"):
            block, own = name.split("layers.")[1].split(".", 1)
            key = f"{block}.{own.split('.')[1]}"
            module.register_forward_hook(
                lambda module, args, out, key=key: written.setdefault(key, []).append(out)
            )
    spectra = OutputSpectra(ours)
    for inputs in BATCHES:
        x = ours.encode(**inputs)
        spectra.add(x)
        theirs(**inputs)
    real = [inputs["attention_mask"].bool() for inputs in BATCHES]
    found = spectra.found()
    assert {f"{one.block}.{one.module.split('.')[1]}" for one in found} == {*written}
    for one in found:
        outputs = written[f"{one.block}.{one.module.split('.')[1]}"]
        rows = torch.cat([out[mask] for out, mask in zip(outputs, real, strict=True)]).double()
        assert one.n_positions == len(rows)
        values = torch.linalg.svdvals(rows).numpy()
        np.testing.assert_allclose(one.singular_values, values, rtol=1e-4)
        assert components_needed(one.singular_values) == components_needed(values)
        used = used_directions(one)
        assert used.components == components_needed(values)
        assert used.largest == pytest.approx(values[0] ** 2 / np.square(values).sum(), rel=1e-6)
    assert len({components_needed(one.singular_values) for one in found}) > 1
