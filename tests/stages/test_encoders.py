"""Which documents each encoder is fitted on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_config

from rac3.artifacts import Workdir
from rac3.documents.world import World
from rac3.experiment import FitConfig
from rac3.stages import encoders
from rac3.tokens.text import TextTokenizer


class SeenError(Exception):
    """Ends a fitting, with what it is given."""


@pytest.mark.parametrize(("stage", "each"), [("vqgan", 1), ("clip", 2), ("text", 2)])
def test_each_encoder_reads_its_own_number_of_documents_evenly(
    stage: str, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Six for the VQGAN and twelve for CLIP, of six shards; the text tokenizer reads as many as the one with more."""
    world = World(seen=4, unseen=4, documents_per_entity=4, questions_per_entity=1, documents_per_shard=4)
    memory = replace(world, split="memory", documents_per_shard=8)
    tiny = tiny_config.get_config()
    experiment = replace(
        tiny,
        data=replace(tiny.data, train=world, memory={"memory": memory}),
        vqgan=replace(tiny.vqgan, fit=FitConfig(steps=1, max_documents=6)),
        clip=replace(tiny.clip, fit=FitConfig(steps=1, max_documents=12)),
    )
    found: dict[str, list[str]] = {}

    def fit(name: str) -> Any:
        def see(*arguments: Any) -> None:
            found[name] = [document.key for document in arguments[1]]
            raise SeenError

        return see

    def fit_text(self: TextTokenizer, texts: Any, folder: Path) -> None:
        found["text"] = list(texts)
        raise SeenError

    monkeypatch.setattr(encoders, "fit_vqgan", fit("vqgan"))
    monkeypatch.setattr(encoders, "fit_clip", fit("clip"))
    monkeypatch.setattr(TextTokenizer, "fit", fit_text)
    for name in {"text", "vqgan", "clip"} - {stage}:
        with Workdir(tmp_path, "tiny").write(getattr(encoders.recipes, name)(experiment)):
            pass
    with pytest.raises(SeenError):
        encoders.fit_encoders(experiment, Workdir(tmp_path, "tiny"))
    shards = [(source, shard) for source in (world, memory) for shard in source.shards(tmp_path)]
    assert len(shards) == 6
    expected = [document for source, shard in shards for document in list(source.read(tmp_path, shard))[:each]]
    assert found[stage] == [document.text if stage == "text" else document.key for document in expected]
