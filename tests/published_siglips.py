"""Published SigLIPs, small and with random weights, written as transformers writes them."""

import json
import string
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from published_clips import module

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.siglip import SigLIP

TEXTS = ["a", "A photo of a  RED cat!", "two\nblue squares, 3.5 km", "", "naïve café 世界", "a red cat " * 20]
CORPUS = ["a red cat", "a photo of a red cat", "two blue squares 35 km", "the quick brown fox jumps over a lazy dog"]
LENGTH = 16  # of the text tower
# A vector of L2 norm 1 after two layers, the pooling head, and some 40 float32 roundings in a row (6e-8 each) of sums
# of up to 100 terms in another order: 6e-8 * sqrt(40 * 100) = 4e-6.
TOLERANCE = 4e-6
# Of the distance to the float32 vector in bfloat16, which rounds by up to 2e-3 some 60 times in a row, the weights
# included: 2e-3 * sqrt(60) = 0.016, and a little more for the worst of several items.
BFLOAT16 = 0.02
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": LENGTH, "projection_size": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 12,
}  # fmt: skip


def write_gemma(folder: Path) -> None:
    """A small tokenizer of the kind that SigLIP 2 has: bytes for what it lacks, one end-of-text, padding of its own."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*string.ascii_letters, "re", "red", "ca", "cat"]
    tokenizer = module("transformers").GemmaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[("r", "e"), ("re", "d"), ("c", "a"), ("ca", "t")],
        add_bos_token=False, add_eos_token=True, padding_side="right", model_input_names=["input_ids"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def siglip_tokenizer_config(folder: Path) -> None:
    settings = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "model_input_names": ["input_ids"]}
    settings |= {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_unigram(folder: Path) -> None:
    """A small tokenizer as SigLIP's own is in `tokenizer.json`: it pads with the end of text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    punctuation = Regex(f"[{''.join(chr(92) + sign for sign in string.punctuation)}]")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(punctuation, ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    siglip_tokenizer_config(folder)


def write_sentencepiece(folder: Path) -> None:
    """A small tokenizer as SigLIP's own is."""
    trainer = module("sentencepiece").SentencePieceTrainer
    module("google.protobuf")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20))
    trainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    siglip_tokenizer_config(folder)


TOKENIZERS = {"gemma": write_gemma, "unigram": write_unigram, "sentencepiece": write_sentencepiece}


def reference_ids(folder: Path, texts: list[str]) -> np.ndarray:
    """As the models' documentation says, but in lower case for Gemma's tokenizer, as SigLIP 2 was trained."""
    transformers = module("transformers")
    kind = transformers.AutoTokenizer
    if (folder / "tokenizer.json").is_file() and "Siglip" in (folder / "tokenizer_config.json").read_text():
        kind = transformers.PreTrainedTokenizerFast  # what SigLIP's own becomes without the sentencepiece file
    tokenizer = kind.from_pretrained(folder)
    if type(tokenizer).__name__ == "GemmaTokenizer":
        texts = [text.lower() for text in texts]
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")["input_ids"]


def random_model(kind: str, text: dict, vision: dict):
    """A `SiglipModel` or `Siglip2Model` with weights far from their initial values."""
    torch, transformers = module("torch"), module("transformers")
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def write_siglip(folder: Path, tokenizer: str = "gemma", **text):
    """A folder as `google/siglip2-base-patch16-224` or `google/siglip-base-patch16-224` is, but small."""
    folder.mkdir()
    TOKENIZERS[tokenizer](folder)
    vision = VISION | {"image_size": 40, "hidden_act": text.get("hidden_act", "gelu_pytorch_tanh")}
    model = random_model("Siglip", TEXT | {"vocab_size": 330} | text, vision)
    model.save_pretrained(folder)
    settings = {"do_normalize": True, "do_rescale": True, "do_resize": True, "size": {"height": 40, "width": 40}}
    settings |= {"image_processor_type": "SiglipImageProcessor", "resample": 2, "rescale_factor": 1 / 255}
    settings |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": "SiglipProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def apply(loaded: ClipCheckpoint, dtype=jnp.float32, method: str = "__call__"):
    return jax.jit(partial(SigLIP(loaded.config, dtype).apply, {"params": loaded.params}, method=method))


def normalized(vectors) -> np.ndarray:
    vectors = np.asarray(vectors.detach())
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_vectors(found: np.ndarray, reference, tolerance: float = TOLERANCE) -> None:
    expected = normalized(reference)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert np.triu(expected @ expected.T, 1).max() < 0.999  # the items are told apart
