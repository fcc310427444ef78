"""Small tokenizers of the published families, in their own file formats: what they preserve of a text."""

import json
import random
import re
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizer_families as families
import transformers

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.cli import run
from rac3.config import InputError, load_config_module
from rac3.documents.document import Text
from rac3.documents.store import DocumentStore
from rac3.tokens.text import PROBES, TextTokenizer, Tokenizer, tokenizer_identity

WRITERS: dict[str, Callable[[Path], None]] = {
    "GPT-2": families.write_gpt2,
    "GPT-2, tokenizer.json": families.with_tokenizer_json(families.write_gpt2),
    "OPT": families.write_opt,
    "OPT, tokenizer.json": families.with_tokenizer_json(families.write_opt),
    "Llama 3": families.write_llama3,
    "ByT5": families.write_byt5,
    "CLIP": families.write_clip,
    "CLIP, tokenizer.json": families.with_tokenizer_json(families.write_clip),
    "Llama 2": families.write_llama2,
    "Llama 2, its tokenizer.json as it stands": lambda f: families.write_llama2(f, "PreTrainedTokenizerFast"),
    "Unigram": families.write_unigram,
}
EXACT = [name for name in WRITERS if name.startswith(("GPT-2", "OPT", "Llama 3", "ByT5"))]
BOS = {"GPT-2": "<|endoftext|>", "OPT": "</s>", "Llama 3": "<|begin_of_text|>", "CLIP": "<|startoftext|>"} | {
    "Llama 2": "<s>"
}

SPACE = "\u2581"  # a space, to Llama 2
STRINGS = [
    "",
    " ",
    "   ",
    " leading, trailing ",
    "tabs\tand\r\nlines\n\n\r end\n",
    "many" + " " * 40 + "spaces" + "\n" * 9,
    "e\u0301\u0327\u0323 \u0301alone",
    "👩‍👩‍👧‍👦 🏴\U000e0067\U000e0062\U000e007f 🇫🇷 👍🏽",
    "שָׁלוֹם \u202eעולם\u202c العَرَبِيَّة",
    "\x00\x01\x1c\x1f\x7f\x85\u00a0\u2028\ufeff\ufffd\ufffe",
    "Straße İstanbul ΣΊΣΥΦΟΣ ﬁ ŉ Ⅷ",
    f"{SPACE}a{SPACE}{SPACE}b </w> Ġ <0x41> ##ing",
    *PROBES.values(),
]


def random_text(rng: random.Random) -> str:
    """Characters of many planes, without surrogates; marks, joiners and spaces are frequent."""
    pools = [
        (0x20, 0x7E), (0x61, 0x7A), (0x00, 0x1F), (0x7F, 0x2FF), (0x300, 0x36F), (0x370, 0x58F), (0x590, 0x8FF),
        (0x900, 0x1FFF), (0x2000, 0x206F), (0x200D, 0x200D), (0xFE00, 0xFE0F), (0x3000, 0xD7FF), (0xE000, 0xFFFF),
        (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF), (0x20, 0x20), (0x0A, 0x0D),
    ]  # fmt: skip
    return "".join(chr(rng.randint(*rng.choice(pools))) * rng.choice([1, 1, 1, 3]) for _ in range(rng.randint(0, 25)))


TEXTS = STRINGS + [random_text(random.Random(seed)) for seed in range(600)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {}
    for name, write in WRITERS.items():
        out[name] = tmp_path_factory.mktemp("family")
        write(out[name])
    return out


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: TextTokenizer(checkpoint=str(folder)).load() for name, folder in folders.items()}


def published(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def special_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> set[int]:
    """All special ids, but not an unknown id that is only that."""
    ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids - ({tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id})


@pytest.mark.parametrize("name", EXACT)
def test_byte_level_families_give_any_text_back(tokenizers: dict[str, Tokenizer], name: str):
    for text in TEXTS:
        assert tokenizers[name].decode(tokenizers[name].encode(text)) == text


@pytest.mark.parametrize("name", ["CLIP", "CLIP, tokenizer.json"])
def test_clip_gives_its_normal_form_back(tokenizers: dict[str, Tokenizer], name: str):
    """Lower-case NFC, one space between words, numerals and marks, none around; idempotent."""
    tokenizer = tokenizers[name]
    assert tokenizer.decode(tokenizer.encode("  A Red-ish  FOX's\r\n2 cafe\u0301 ")) == "a red - ish fox 's 2 café"
    for text in TEXTS:
        once = tokenizer.decode(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(once)) == once
        assert without_space(once) == without_space(unicodedata.normalize("NFC", text).lower())


def without_space(text: str) -> str:
    """`text` without white space, including U+001C to U+001F as in Python, and with one kind of lower-case sigma."""
    return "".join(text.split()).replace("ς", "σ")


@pytest.mark.parametrize("name", [name for name in WRITERS if name.startswith("Llama 2")])
def test_llama_2_keeps_all_but_its_own_space(tokenizers: dict[str, Tokenizer], name: str):
    """It reads U+2581 as a space. `LlamaTokenizer` of transformers 5 also loses a leading space."""
    back = [tokenizers[name].decode(tokenizers[name].encode(text)) for text in TEXTS]
    kept = [text.replace(SPACE, " ") for text in TEXTS]
    assert back == kept or (name == "Llama 2" and back == [text.removeprefix(" ") for text in kept])


def test_llama_2_writes_the_unknown_as_bytes(folders: dict[str, Path], tokenizers: dict[str, Tokenizer]):
    vocabulary = published(folders["Llama 2"]).get_vocab()
    ids = [vocabulary[f"<0x{byte:02X}>"] for byte in "狐".encode()]
    assert tokenizers["Llama 2"].encode("狐")[1:] == ids
    assert tokenizers["Llama 2"].decode(ids[:2]) == "\ufffd\ufffd"  # a truncated character
    assert vocabulary["<0x41>"] not in tokenizers["Llama 2"].encode("<0x41>")


@pytest.mark.parametrize("name", WRITERS)
def test_text_never_becomes_a_control_id(folders: dict[str, Path], tokenizers: dict[str, Tokenizer], name: str):
    """A caption may contain `</s>`, which `transformers` by default reads as the end of the text."""
    tokenizer, original = tokenizers[name], published(folders[name])
    control = special_ids(original)
    assert control
    assert control <= set(range(tokenizer.size))
    for token in sorted(original.convert_ids_to_tokens(sorted(control)))[:20]:
        for text in (token, f"a photo {token} of", f"a{token}b{token}"):
            assert control & set(original.encode(text, add_special_tokens=False))  # so that the test can fail
            assert not control & set(tokenizer.encode(text))
            if name in EXACT or name.startswith("Llama 2"):
                assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.size for i in ids)
        assert not control & set(ids)


@pytest.mark.parametrize("name", BOS)
def test_no_begin_or_end_is_added(folders: dict[str, Path], tokenizers: dict[str, Tokenizer], name: str):
    tokenizer, original = tokenizers[name], published(folders[name])
    assert tokenizer.bos == original.convert_tokens_to_ids(BOS[name])
    with_them = original.encode("a photo of a red circle")
    assert (with_them[0] == tokenizer.bos) == (name != "GPT-2")
    begin, end = int(name != "GPT-2"), len(with_them) - int(name == "CLIP")
    assert tokenizer.encode("a photo of a red circle") == with_them[begin:end]


@pytest.mark.parametrize("name", BOS)
def test_added_specials_survive_truncation(folders: dict[str, Path], tokenizers: dict[str, Tokenizer], name: str):
    for length in (3, 5, 64):
        expected = published(folders[name])("a photo of a red circle", truncation=True, max_length=length)["input_ids"]
        assert tokenizers[name].encode_with_specials("a photo of a red circle", length) == expected


def test_both_forms_of_files_are_the_same_tokenizer(tokenizers: dict[str, Tokenizer]):
    for name in ("GPT-2", "OPT", "CLIP"):
        one, other = tokenizers[name], tokenizers[f"{name}, tokenizer.json"]
        assert (one.size, one.bos, one.eos) == (other.size, other.bos, other.eos)
        assert all(one.encode(text) == other.encode(text) for text in TEXTS)


def test_long_texts_are_whole_and_unpadded(folders: dict[str, Path], tmp_path: Path):
    """Some tokenizer.json files store a length to truncate and pad to, left over from training."""
    data = json.loads((folders["Llama 3"] / "tokenizer.json").read_text(encoding="utf-8"))
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    data["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    families.write_json(tmp_path / "tokenizer.json", data)
    settings = (folders["Llama 3"] / "tokenizer_config.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = TextTokenizer(checkpoint=str(tmp_path)).load()
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in ("a", "a photo of a red circle" * 9))


def test_what_is_lost_is_told_in_one_line(tokenizers: dict[str, Tokenizer]):
    lines = {name: tokenizer.summary() for name, tokenizer in tokenizers.items()}
    assert not any("\n" in line for line in lines.values())
    number = len(PROBES) + 1
    assert re.fullmatch(
        f"GPT2Tokenizer(Fast)?, 313 ids, bos 2, eos 2; preserves all {number} kinds of text tried", lines["OPT"]
    )
    assert all(f"preserves all {number}" in lines[name] for name in EXACT)
    start = r"CLIPTokenizer(Fast)?, 557 ids, bos 555, eos 556; changes capitals \('A Red FOX' -> 'a red fox'\)"
    assert re.match(start, lines["CLIP"])
    assert "Greek" not in lines["CLIP"]  # only what differs
    assert "its own special tokens ('</s> <unk> <pad>' -> ' <unk> ')" in lines["Unigram"]


def test_a_changed_folder_is_another_tokenizer(folders: dict[str, Path], tmp_path: Path):
    families.write_gpt2(tmp_path)
    before = tokenizer_identity(str(tmp_path))
    assert set(before["files"]) == {"config.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    (tmp_path / "README.md").write_text("of no matter")
    assert tokenizer_identity(str(tmp_path)) == before
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert tokenizer_identity(str(tmp_path)) != before
    assert tokenizer_identity("facebook/opt-125m") == {"name": "facebook/opt-125m"}


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200]) and None


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def with_code(folder: Path) -> None:
    """As in repositories with their own tokenizer class; running the code would create a file."""
    (folder / "own.py").write_text(f"open({str(folder / 'EXECUTED')!r}, 'w').close()\nclass Own: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    families.write_json(folder / "tokenizer_config.json", config)


def with_code_next_to_a_known_class(folder: Path) -> None:
    with_code(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    families.write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "GPT2Tokenizer"})


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated tokenizer.json": ("Llama 3", truncate("tokenizer.json"), "tokenizer.json' is not JSON"),
    "truncated tokenizer.json, Llama": ("Llama 2", truncate("tokenizer.json"), "tokenizer.json' is not JSON"),
    "web page": ("Llama 3", write("tokenizer.json", "<!doctype html><html></html>"), "tokenizer.json' is not JSON"),
    "other JSON": ("Llama 3", write("tokenizer.json", "{}"), "cannot be loaded: .*needs tokenizer.json"),
    "list": ("Llama 3", write("tokenizer.json", "[1]"), "tokenizer.json' is not a JSON object"),
    "truncated settings": ("OPT", truncate("tokenizer_config.json"), "tokenizer_config.json' is not JSON"),
    "truncated vocab.json": ("GPT-2", truncate("vocab.json"), "vocab.json' is not JSON"),
    "web page for merges": ("GPT-2", write("merges.txt", "<html>\n<body>\n"), "cannot be loaded: .*[Mm]erges"),
    "merges of another": ("GPT-2", write("merges.txt", "#version: 0.2\nqq zz\n"), "cannot be loaded: .*merges.txt"),
    "no merges": ("GPT-2", remove("merges.txt"), "cannot be loaded: .*vocab.json and merges.txt"),
    "no vocabulary": ("GPT-2", remove("merges.txt", "vocab.json"), "has no vocabulary, only|cannot be loaded: "),
    "no files": ("ByT5", remove("config.json", "tokenizer_config.json"), "has no tokenizer files .*a folder"),
    "code": ("GPT-2", with_code, "needs its own code .*never run"),
    "code next to a known class": ("GPT-2", with_code_next_to_a_known_class, "needs its own code .*never run"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path, case: str):
    name, damage, message = DAMAGE[case]
    WRITERS[name](tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        TextTokenizer(checkpoint=str(tmp_path)).load()
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "EXECUTED").exists()


def test_the_command_tells_what_it_found_and_stores_ids_as_narrow_as_they_are(
    finished_workdir: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, workdir = finished_workdir[0], shutil.copytree(finished_workdir[1], tmp_path / "runs")
    for highest, width in ((65_535, "uint16"), (65_536, "uint32")):
        folder = tmp_path / width
        folder.mkdir()
        families.write_llama3(folder)
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        data["model"]["vocab"]["zzzz"] = highest
        families.write_json(folder / "tokenizer.json", data)
        arguments = [str(config), "--workdir", str(workdir), "--text.checkpoint", str(folder)]
        run(["encoders", *arguments])
        line = f"text tokenizer {folder}: TokenizersBackend, {highest + 1} ids, bos "
        assert [out for out in capsys.readouterr().out.splitlines() if out.startswith(line)]
        run(["ingest", *arguments])
        experiment = replace(load_config_module(str(config)).get_config(), text=TextTokenizer(str(folder)))
        artifact = Workdir(workdir, "tiny").require(recipes.documents(experiment, "test"))
        assert artifact.manifest["counts"]["ids"] == width
        tokenizer = experiment.text.load()
        documents = DocumentStore(artifact.folder)
        for item in documents.many(range(len(documents))):
            pairs = zip(item.document.segments, item.ids, strict=True)
            texts = [tokenizer.decode(ids.tolist()) for segment, ids in pairs if isinstance(segment, Text)]
            assert " ".join(texts) == item.document.text
        (folder / "tokenizer_config.json").write_text("{ }")
        with pytest.raises(InputError, match=r"text is stale .*run `rac3 prepare"):
            run(["ingest", *arguments])


@pytest.mark.parametrize("name", WRITERS)
def test_ids_that_begin_words_are_known_by_their_marks(tokenizers: dict[str, Tokenizer], name: str):
    """A text of eight words has eight such ids, whichever ids spell them; CLIP and ByT5 mark no beginnings."""
    tokenizer = tokenizers[name]
    starts = tokenizer.word_starts
    if name.startswith(("CLIP", "ByT5")):
        assert starts is None
        return
    assert starts is not None
    assert len(starts) == tokenizer.size
    ids = tokenizer.encode("a photo of the old bluesquare on grass")
    spelled = "".join(("|" if starts[id] else "") + tokenizer.decode([id]).strip() for id in ids)
    words = "a|photo|of|the|old|bluesquare|on|grass"
    assert spelled.removeprefix("|") == words  # byte-level families mark no first word
