"""Small tokenizers of the published families, each in its published file format."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CAPTIONS = ["a photo of a red circle", "a photo of a blue square on grass", "The old lighthouse of Zorvath"] * 4
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def special(content: str) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **plain}


def byte_pairs(words: Any, alphabet: Iterable[str], **options: Any) -> tuple[list[str], list[list[str]]]:
    """The tokens by id, and the merges, of a BPE trained on `CAPTIONS`, split by the pre-tokenizer `words`."""
    tokenizer = Tokenizer(models.BPE(**{k: v for k, v in options.items() if k == "end_of_word_suffix"}))
    tokenizer.pre_tokenizer = words
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=list(alphabet), show_progress=False, **options)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def write_pairs(folder: Path, tokens: list[str], merges: list[list[str]]) -> None:
    """Write the two files that preceded tokenizer.json."""
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def _bytes() -> tuple[list[str], list[list[str]]]:
    return byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet())


def write_gpt2(folder: Path) -> None:
    """As openai-community/gpt2: config.json determines the class; the only special token has the last id."""
    tokens, merges = _bytes()
    write_pairs(folder, [*tokens, "<|endoftext|>"], merges)
    write_json(folder / "config.json", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})


def write_opt(folder: Path) -> None:
    """As facebook/opt-*: GPT-2's merges after fairseq's special tokens; `</s>` begins and ends a text."""
    tokens, merges = _bytes()
    write_pairs(folder, ["<s>", "<pad>", "</s>", "<unk>", *tokens, "madeupword0000"], merges)
    write_json(folder / "config.json", {"model_type": "opt", "architectures": ["OPTForCausalLM"]})
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    tokens_of = {name: special(token) for name, token in names.items() if name != "pad_token"}
    config = {"errors": "replace", "add_prefix_space": False, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    write_json(folder / "tokenizer_config.json", {**config, **tokens_of, "pad_token": "<pad>"})
    write_json(folder / "special_tokens_map.json", names)


def write_clip(folder: Path) -> None:
    """As openai/clip-vit-*: every byte inside and at the end of a word, then the merges, then begin and end of text."""
    words = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    _, merges = byte_pairs(words, letters, end_of_word_suffix="</w>")
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    write_pairs(folder, [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"], merges)
    write_json(folder / "config.json", {"model_type": "clip"})
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config: dict[str, Any] = {name: special(token) for name, token in names.items()}
    config |= {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", config | {"pad_token": "<|endoftext|>"})


def write_llama2(folder: Path, tokenizer_class: str = "LlamaTokenizer") -> None:
    """As meta-llama/Llama-2-*: words begin with U+2581; other characters are bytes, `<0x0A>`."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokens, merges = byte_pairs(words, "\u2581abcdefghijklmnopqrstuvwxyzTZ<>/|", special_tokens=pieces)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocabulary, [tuple(m) for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True, dropout=None
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens(pieces[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    names = {name: special(token) for name, token in zip(("unk_token", "bos_token", "eos_token"), pieces, strict=False)}
    config = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**config, **names, "tokenizer_class": tokenizer_class})


def write_llama3(folder: Path) -> None:
    """As meta-llama/Meta-Llama-3-*: its own word pattern over bytes, and 256 special tokens above the vocabulary."""
    tokens, merges = _bytes()
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m) for m in merges], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    tokenizer.add_special_tokens(names)
    bos = tokenizer.token_to_id(names[0])
    template = processors.TemplateProcessing(f"{names[0]} $A", f"{names[0]} $A $B", [(names[0], bos)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    config = {"bos_token": names[0], "eos_token": names[1], "clean_up_tokenization_spaces": True}
    write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def with_tokenizer_json(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same tokenizer as `transformers` saves it today, without the two older files."""

    def written(folder: Path) -> None:
        import transformers

        write(folder)
        transformers.AutoTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()

    return written


def write_unigram(folder: Path) -> None:
    """As T5's: the special tokens are ordinary pieces of the model, the likeliest ones."""
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "\u2581": -2.0}
    scores |= {letter: -3.0 for letter in "abcdefghijklmnopqrstuvwxyz</>"}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {**config, "unk_token": "<unk>"})


def write_byt5(folder: Path) -> None:
    """As google/byt5-*: no vocabulary, and the only family here that is written in Python, not Rust."""
    config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": "t5", "tokenizer_class": "ByT5Tokenizer"})
