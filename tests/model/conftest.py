"""transformers' OPT, which our model is compared with: packed in training, and cached in decoding."""

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from plain_transformer import random_params

from rac3.model.transformer import TransformerConfig


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for cuDNN's attention can be traced, as on a GPU of that generation; not run."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda least: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda other: False)


@pytest.fixture(scope="session")
def opt():
    """Our model of the OPT shape, and transformers' OPT in float64 with the same random weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = TransformerConfig(
        num_layers=2, embed=32, num_heads=4, mlp=48, offset_embedding=False, dtype="float32", remat="none"
    ).build(128, 40, 1)
    params = random_params(model)
    peer = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=128, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
            ffn_dim=48, max_position_embeddings=40, dropout=0.0, attn_implementation="eager",
        )
    ).double().eval()  # fmt: skip
    ours = params["params"]
    state = {
        "embed_tokens.weight": ours["token_embedding"],
        "embed_positions.weight": np.pad(ours["position_embedding"], ((2, 0), (0, 0))),  # OPT's begin at row 2
        "final_layer_norm.weight": ours["final_norm"]["scale"],
        "final_layer_norm.bias": ours["final_norm"]["bias"],
    }
    for layer in range(2):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], ours["blocks"])
        attention, prefix = block["attention"], f"layers.{layer}."
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            state[f"{prefix}self_attn.{name}.weight"] = attention["qkv_kernel"][:, part].reshape(32, 32).T
            state[f"{prefix}self_attn.{name}.bias"] = attention["qkv_bias"][part].reshape(32)
        state[f"{prefix}self_attn.out_proj.weight"] = attention["out_kernel"].reshape(32, 32).T
        state[f"{prefix}self_attn.out_proj.bias"] = attention["out_bias"]
        for theirs, name in (("self_attn_layer_norm", "attention_norm"), ("final_layer_norm", "mlp_norm")):
            state[f"{prefix}{theirs}.weight"] = block[name]["scale"]
            state[f"{prefix}{theirs}.bias"] = block[name]["bias"]
        for theirs, name in (("fc1", "mlp_in"), ("fc2", "mlp_out")):
            state[f"{prefix}{theirs}.weight"] = block[name]["kernel"].T
            state[f"{prefix}{theirs}.bias"] = block[name]["bias"]
    peer.model.decoder.load_state_dict({name: torch.tensor(np.float64(value)) for name, value in state.items()})

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return peer(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()

    return model, params, logits
