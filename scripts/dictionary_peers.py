"""Make the files that say what SAELens and dictionary_learning compute of the same dictionaries.

    PEER_PYTHON scripts/dictionary_peers.py saelens tests/methods/dictionary/peers
    PEER_PYTHON scripts/dictionary_peers.py dictionary_learning tests/methods/dictionary/peers

Run it in an environment of the peer's own (sae-lens 6.54.12 with transformer-lens 3.9, or
dictionary-learning 0.1.0 without torchvision). Of each architecture one safetensors file has the
weights, rows, dead latents, reconstruction, loss and the loss's gradients; SAELens also leaves a
folder that it saved, and dictionary_learning an ``ae.pt``.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, N_ROWS, K, PREFIXES, BANDWIDTH = 12, 40, 21, 4, (8, 20, 40), 0.3


def numbers() -> dict[str, Tensor]:
    """Weights, rows and dead latents, all at random."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    directions = torch.nn.functional.normalize(draw(D_SAE, D_IN), dim=-1)
    return {
        "W_enc": directions.T + 0.2 * draw(D_IN, D_SAE),
        "b_enc": 0.1 * draw(D_SAE),
        "W_dec": directions,
        "b_dec": 0.3 * draw(D_IN),
        "threshold": 1 + 0.5 * torch.rand(D_SAE, generator=generator),
        "rows": 2 * draw(N_ROWS, D_IN),
        "dead": torch.rand(D_SAE, generator=generator) < 0.4,
    }


def saelens(out: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Architecture -> what SAELens' training SAEs make of the rows."""
    from sae_lens import saes
    from sae_lens.saes.sae import TrainStepInput

    given, base = numbers(), {"d_in": D_IN, "d_sae": D_SAE, "device": "cpu", "dtype": "float32"}
    base |= {"apply_b_dec_to_input": True}
    top = {**base, "k": K, "rescale_acts_by_decoder_norm": True}
    made: dict[str, Any] = {
        "topk": saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**top)),
        "batchtopk": saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**top)),
        "matryoshka": saes.MatryoshkaBatchTopKTrainingSAE(
            saes.MatryoshkaBatchTopKTrainingSAEConfig(**top, matryoshka_widths=[*PREFIXES])
        ),
        "jumprelu": saes.JumpReLUTrainingSAE(
            saes.JumpReLUTrainingSAEConfig(
                **base, jumprelu_bandwidth=BANDWIDTH, jumprelu_sparsity_loss_mode="step"
            )
        ),
    }
    for name, sae in made.items():
        for key, parameter in sae.named_parameters():
            parameter.data = given[key].clone().contiguous()
        step = TrainStepInput(given["rows"], {"l0": 1.0}, None, 5, False)
        output = sae.training_forward_pass(step)
        output.loss.backward()
        found = {
            "reconstruction": output.sae_out,
            "squared_error": output.losses["mse_loss"],
            "loss": output.loss,
            **{f"grad_{key}": parameter.grad for key, parameter in sae.named_parameters()},
        }
        if name in ("topk", "jumprelu"):
            sae.save_inference_model(out / f"saelens_{name}")
        yield name, {**given, **found}


def dictionary_learning(out: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Architecture -> what dictionary_learning's trainers make of the rows."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    given = numbers()
    shape = {"steps": 2000, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 0}
    shape |= {"lm_name": "none", "device": "cpu", "auxk_alpha": 1 / 32}
    # Without weights it takes the mean of errors that are already divided by their number.
    groups = {"group_fractions": [8 / 40, 12 / 40, 20 / 40], "group_weights": [1.0] * 3}
    made: dict[str, Any] = {
        "topk": TopKTrainer(**shape),
        "batchtopk": BatchTopKTrainer(**shape),
        "matryoshka": MatryoshkaBatchTopKTrainer(**shape, **groups),
    }
    for name, trainer in made.items():
        ae = trainer.ae
        renamed = {
            "encoder.weight": given["W_enc"].T, "encoder.bias": given["b_enc"],
            "decoder.weight": given["W_dec"].T, "W_enc": given["W_enc"], "b_enc": given["b_enc"],
            "W_dec": given["W_dec"], "b_dec": given["b_dec"],
        }  # fmt: skip
        for key, parameter in ae.named_parameters():
            parameter.data = renamed[key].clone().contiguous()
        trainer.num_tokens_since_fired[given["dead"]] = 10**9
        log = trainer.loss(given["rows"], step=0, logging=True)
        trainer.num_tokens_since_fired[given["dead"]] = 10**9
        trainer.loss(given["rows"], step=0).backward()
        own = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
        grads = {}
        for key, parameter in ae.named_parameters():
            grad = parameter.grad.T if key.endswith(".weight") else parameter.grad
            grads[f"grad_{own.get(key, key)}"] = grad
        found = {
            "reconstruction": log.x_hat,
            "squared_error": torch.tensor(log.losses["l2_loss"]),
            "aux": torch.tensor(log.losses["auxk_loss"]),
            "loss": torch.tensor(log.losses["loss"]),
            **grads,
        }
        if name == "batchtopk":
            torch.save(ae.state_dict(), out / "untrained_ae.pt")
            ae.threshold = torch.tensor(1.25)
            torch.save(ae.state_dict(), out / "ae.pt")
            found["in_use"] = ae(given["rows"])
        yield name, {**given, **found}


if __name__ == "__main__":
    peer, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    package = {"saelens": "sae-lens", "dictionary_learning": "dictionary-learning"}[peer]
    makes = {"saelens": saelens, "dictionary_learning": dictionary_learning}[peer]
    for architecture, tensors in makes(folder):
        plain = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        about = {"made_by": f"{package} {version(package)}"}
        save_file(plain, folder / f"{peer}_{architecture}.safetensors", about)
