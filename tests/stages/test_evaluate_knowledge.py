"""Knowledge, over shards written here: a picture is of one gray, and its vector points at that angle in degrees.

So the nearest true picture is that of the nearest gray, which a reader can find by eye in the tables below.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Page
from replaced import with_members

from rac3 import held_out, recipes
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError
from rac3.documents.document import encode_png, pixels_of
from rac3.documents.webdataset import WebDataset
from rac3.evaluation.features import Embedded
from rac3.experiment import Experiment
from rac3.report.knowledge import knowledge_report, knowledge_rows, knowledge_summary
from rac3.retrieval.baselines import Random
from rac3.run import Run
from rac3.stages import evaluate_knowledge as stage
from rac3.stages.evaluate import comparisons
from rac3.stages.evaluate_knowledge import evaluate_knowledge, told
from rac3.stages.ingest import ingest

# Key: entity, gray. What is held out, and a part of the memory.
TEST = {
    "t0": ("ant", 10),
    "t1": ("ant", 20),
    "t2": ("bee", 60),
    "t3": ("bee", 75),
    "t4": ("cow", 100),
    "t5": ("yak", 130),  # the only one
    "t6": (None, 40),
}
NEWS = {
    "n0": ("ant", 14),
    "n1": ("ant", 40),
    "n2": ("bee", 66),
    "n3": ("cow", 95),
    "n4": ("cow", 88),
    "n5": ("bee", 108),
    "n6": ("ant", 70),
    "n7": ("cow", 84),
}
OWN = {"t0": ["n0"], "t1": ["n6", "n1"], "t2": ["n2"], "t3": ["n4"], "t4": [], "t5": ["n0"], "t6": ["n0"]}
RANDOM = {"t0": ["n5"], "t1": ["n2"], "t2": ["n1", "n5"], "t3": ["n2"], "t4": ["n3"], "t5": [], "t6": []}
ASKED = ["t0", "t1", "t2", "t3", "t4"]


def gray(value: int) -> np.ndarray:
    return np.full((40, 40, 3), value, np.uint8)


def write_shard(folder: Path, samples: dict[str, tuple[str | None, int]]) -> None:
    """As img2dataset does: a picture, its caption, and a row of metadata for each key."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key, (entity, value) in samples.items():
            metadata = {"key": key} if entity is None else {"key": key, "concept": entity}
            for name, data in (
                (f"{key}.png", encode_png(gray(value))),
                (f"{key}.txt", f"{entity or 'thing'} number {key}".encode()),
                (f"{key}.json", json.dumps(metadata).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def vectors(pictures: Sequence[Any]) -> np.ndarray:
    angles = np.radians([float(pixels_of(each)[0, 0, 0]) for each in pictures])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class Angles:
    """An encoder that sees how gray a picture is."""

    width = 2

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        return vectors(images)


class Mirror:
    """A network to which a gray of 108 looks like one of 72, and 90 + x like 90 - x; vectors of all lengths."""

    name = "FD (EfficientNet-Lite0)"

    def __init__(self, weights: str, resolution: int) -> None:
        assert (Path(weights).name, resolution) == ("net.pth", 40)

    def embed(self, pictures: Sequence[Any]) -> Embedded:
        grays = np.array([pixels_of(each)[0, 0, 0] for each in pictures], np.float32)
        return Embedded(np.abs(vectors(pictures)) * (1 + grays[:, None]))


@dataclass
class Drawn:
    """What a part was drawn for."""

    model: str
    keys: list[str]
    neighbors: list[list[int]]
    k: int


DRAWN: list[Drawn] = []


def short(item: Any) -> str:
    return str(item.document.key).split("/")[-1]


@pytest.fixture(scope="module")
def prepared(finished_workdir: tuple[Path, Path], experiment: Experiment, tmp_path_factory: Any) -> Run:
    """The tiny model over these shards: the source of its training documents can't judge their entities."""
    folder = tmp_path_factory.mktemp("knowledge")
    skipped = shutil.ignore_patterns("compiled", "evaluation", "report")
    workdir = shutil.copytree(finished_workdir[1], folder / "tiny", ignore=skipped)
    write_shard(folder / "test", TEST)
    write_shard(folder / "news", NEWS)
    (folder / "net.pth").write_text("weights")
    memory = {**experiment.data.memory, "news": WebDataset(str(folder / "news"))}
    data = replace(
        experiment.data,
        test=WebDataset(str(folder / "test")),
        validation=None,
        tuning=None,
        memory=memory,
        entity_field="concept",
    )
    settings = replace(experiment.evaluation, documents=20, image_samples=2, num_retrieved=2)
    opened = Run(replace(experiment, data=data, evaluation=settings), Workdir(workdir, "tiny"))
    ingest(opened)
    return opened


@pytest.fixture(scope="module")
def run(prepared: Run) -> Iterator[Run]:
    """It with hand-made vectors, neighbors and drawings, which `DRAWN` notes; three pictures stand for an entity."""
    keys = [short(item) for item in prepared.documents("test").many(range(len(TEST)))]
    news = prepared.documents("news").many(range(len(NEWS)))
    places = {short(item): 1000 + place for place, item in enumerate(news)}

    def neighbors(self: Run, split: str) -> np.ndarray:
        table = RANDOM if isinstance(self.experiment.retriever, Random) else OWN
        ids = np.full((len(keys), 2, 4), -1)
        for row, key in enumerate(keys):
            ids[row, 0, : len(table[key])] = [places[each] for each in table[key]]
        return ids

    class Memory:
        def document(self, number: int) -> Any:
            return news[number - 1000]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "STANDING", 3)
        patch.setattr("rac3.run.Network", Mirror)
        patch.setattr(stage, "drawn_images", images)
        patch.setattr(stage, "baseline_pictures", baselines)
        yield with_members(prepared, encoder=Angles(), neighbors=neighbors, memory=lambda self, split="test": Memory())


@pytest.fixture
def drawn(run: Run) -> Iterator[list[Drawn]]:
    """What is drawn, where nothing was before; other tests draw again."""
    clear(run)
    yield DRAWN
    clear(run)


def clear(run: Run) -> None:
    for made in ("drawings", "knowledge"):
        shutil.rmtree(run.workdir.path / made, ignore_errors=True)
    DRAWN.clear()


def images(run: Run, split: str, items: Sequence[Any], neighbors: np.ndarray, k: int) -> tuple[Any, Any, Any]:
    """Two samples of each document, the grays of `PICTURES`, of which CLIP likes the second."""
    DRAWN.append(Drawn(run.model_name, [short(item) for item in items], neighbors.tolist(), k))
    samples = [PICTURES[run.model_name][short(item)] for item in items]
    pixels = np.stack([np.stack([gray(value) for value in each]) for each in samples])
    return pixels, np.ones(len(items), int), np.zeros(len(items))


def baselines(run: Run, items: Sequence[Any], neighbors: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """The true pictures, and the first that each text retrieved; black is the nearest to no one but ants."""
    assert k == (2 if run.experiment.retrieves else 0)
    own = [OWN[short(item)] for item in items]
    assert [(row >= 0).sum() for row in neighbors] == [len(each) * bool(k) for each in own]
    copied = np.stack([gray(NEWS[each[0]][1] if each else 0) for each in own])
    original = np.stack([pixels_of(item.document.images[0]) for item in items])
    return {"copied": copied, "original": original} if k else {"original": original}


# By model and key: the gray of the first sample, and of the one that is kept.
PICTURES = {
    "ra_cm3": {"t0": (62, 12), "t1": (15, 22), "t2": (10, 62), "t3": (10, 70), "t4": (92, 91), "t5": (0, 0)},
    "cm3": {"t0": (14, 20), "t1": (70, 48), "t2": (60, 90), "t3": (70, 72), "t4": (80, 70), "t5": (0, 0)},
}

# What each shows by the rules. Three pictures stand for an entity at a question: the first ones, in the order of the
# split and then of the memory, but neither its own, nor those that RA-CM3 was given, nor those at random:
#   t0 (given 14; 108)      ant 20 40 70     bee 60 75 66     cow 100 95 88
#   t1 (given 70 40; 66)    ant 10 14        bee 60 75 108    cow 100 95 88
#   t2 (given 66; 40 108)   ant 10 20 14     bee 75           cow 100 95 88
#   t3 (given 88; 66)       ant 10 20 14     bee 60 108       cow 100 95 84
#   t4 (given none; 95)     ant 10 20 14     bee 60 75 66     cow 88 84
SHOWS = {
    "ra_cm3": ["ant", "ant", "bee", "bee", "cow"],  # 12, 22, 62, 70, 91
    "cm3": ["ant", "bee", "cow", "", "bee"],  # 20, 48, 90, 72, 70; 48 is nearest to 40, which RA-CM3 was given
    "ra_cm3_random": ["ant", "ant", "bee", "bee", "cow"],
    "copied": ["ant", "bee", "bee", "cow", "ant"],  # 14, 70, 66, 88, 0; 70 is an ant that looks like a bee
    "original": ["ant", "ant", "bee", "cow", "cow"],  # 10, 20, 60, 75, 100
}
RIGHT = {"ra_cm3": 1.0, "cm3": 0.2, "ra_cm3_random": 1.0, "copied": 0.4, "original": 0.8}


def test_an_entity_is_that_of_the_nearest_true_picture_that_no_model_was_given(run: Run) -> None:
    models = comparisons(run)
    found = evaluate_knowledge(models)["test"]
    answers = told(models, "test")
    assert [answer["key"].split("/")[-1] for answer in answers] == ASKED
    assert [answer["entity"] for answer in answers] == [TEST[key][0] for key in ASKED]
    assert {name: [answer["shows"][name] for answer in answers] for name in SHOWS} == SHOWS
    assert {name: shares["encoder"]["kept"]["value"] for name, shares in found["shares"].items()} == RIGHT
    assert [answer["row"] for answer in answers] == [0, 1, 2, 3, 4]


def test_the_first_sample_is_judged_too(run: Run) -> None:
    """RA-CM3's show bee, ant, ant, ant and cow; CM3's ant, bee, bee, bee and cow. Of other pictures there is one."""
    shares = evaluate_knowledge(comparisons(run))["test"]["shares"]
    assert shares["ra_cm3"]["encoder"]["first"]["value"] == 0.4
    assert shares["cm3"]["encoder"]["first"]["value"] == 0.8
    assert set(shares["copied"]["encoder"]) == {"kept"}


def test_a_network_that_is_no_part_of_the_run_judges_first(run: Run, drawn: list[Drawn]) -> None:
    """To it, CM3's bee of 72 is nearest to that of 108, where the encoder can't decide."""
    evaluate_knowledge(comparisons(run))
    count, weights = len(drawn), str(run.workdir.path.parent / "net.pth")
    settings = replace(run.experiment.evaluation, features=weights)
    models = comparisons(run.variant(replace(run.experiment, evaluation=settings), run.trained))
    found = evaluate_knowledge(models)["test"]
    assert (found["judges"], found["network"]) == (["network", "encoder"], Mirror.name)
    assert found["shares"]["cm3"]["network"]["kept"]["value"] == 0.4
    assert found["shares"]["cm3"]["encoder"]["kept"]["value"] == 0.2
    assert [answer["shows"]["cm3"] for answer in told(models, "test")] == ["ant", "bee", "cow", "bee", "bee"]
    assert len(drawn) == count  # who judges decides nothing about the drawings


def test_what_is_left_out_is_counted(run: Run) -> None:
    """t6 names no entity; of the yak there is one picture, which asks."""
    found = evaluate_knowledge(comparisons(run))["test"]
    assert found["left_out"] == {"documents": 1, "entities": 1, "questions": 1}
    assert (found["questions"], found["entities"], found["guessing"]) == (5, 3, pytest.approx(1 / 3))


def test_intervals_are_over_entities(run: Run, drawn: list[Drawn], monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []
    monkeypatch.setattr(stage, "share_of", lambda right, names: groups.append(names))
    evaluate_knowledge(comparisons(run))
    assert {tuple(each) for each in groups} == {("ant", "ant", "bee", "bee", "cow")}


def test_each_model_draws_for_its_own_neighbors_once(
    run: Run, drawn: list[Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of two documents, of which those that were done before a kill are not done again."""
    monkeypatch.setattr(stage, "PART_PICTURES", 5)  # of two samples each
    models, images = comparisons(run), stage.drawn_images
    assert list(models) == ["ra_cm3", "cm3", "ra_cm3_random"]

    def killed(*arguments: Any) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return images(*arguments)

    monkeypatch.setattr(stage, "drawn_images", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_knowledge(models)
    monkeypatch.setattr(stage, "drawn_images", images)
    metrics = evaluate_knowledge(models)
    parts = [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
    assert [(each.model, each.keys) for each in drawn] == [
        (model, keys) for model in ("ra_cm3", "cm3", "ra_cm3") for keys in parts
    ]
    assert [each.k for each in drawn] == [2, 2, 2, 0, 0, 0, 2, 2, 2]
    for each, model in zip(drawn, ["ra_cm3"] * 3 + ["cm3"] * 3 + ["ra_cm3_random"] * 3, strict=True):
        rows = [[*TEST].index(key) for key in each.keys]
        wanted = models[model].neighbors("test")[rows, 0] if model != "cm3" else np.full((2, 4), -1)
        assert [[n for n in row if n >= 0] for row in each.neighbors] == [[n for n in row if n >= 0] for row in wanted]
    assert {name: shares["encoder"]["kept"]["value"] for name, shares in metrics["test"]["shares"].items()} == RIGHT
    assert evaluate_knowledge(models) == metrics
    assert len(drawn) == 9


def test_one_sample_is_kept_and_first(run: Run, drawn: list[Drawn]) -> None:
    settings = replace(run.experiment.evaluation, image_samples=1)
    found = evaluate_knowledge({"cm3": run.variant(replace(run.experiment, evaluation=settings), run.trained)})
    assert set(found["test"]["shares"]["cm3"]["encoder"]) == {"kept"}


def test_what_cannot_be_told_apart_is_refused_before_anything_is_drawn(run: Run, drawn: list[Drawn]) -> None:
    def refused(match: str, **fields: Any) -> None:
        data = replace(run.experiment.data, **fields)
        with pytest.raises(InputError, match=match) as error:
            evaluate_knowledge(comparisons(run.variant(*[replace(run.experiment, data=data)] * 2)))
        assert "\n" not in str(error.value)

    refused(r"^data\.entity_field is empty; name the field", entity_field="")
    refused(
        r"^data\.entity_field='color' names fewer than two entities to tell apart \(0 in test\); hold out",
        entity_field="color",
    )
    refused(r"\(no split is held out\)", test=None)
    few = replace(run.experiment.evaluation, documents=2)
    with pytest.raises(InputError, match=r"\(1 in test\)"):
        evaluate_knowledge({"cm3": run.variant(replace(run.experiment, evaluation=few), run.trained)})
    assert drawn == []


def test_entities_of_which_all_pictures_are_hidden_are_named_in_the_refusal(
    run: Run, drawn: list[Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cow's others are in the memory alone, and that has none."""
    monkeypatch.setattr(stage, "shown_in_memory", lambda *_: {})
    last = [[*TEST].index(key) for key in ("t4", "t5")]
    whole = held_out.held_out
    monkeypatch.setattr(
        stage, "held_out", lambda *given: ([whole(*given)[0][row] for row in last], whole(*given)[1][last])
    )
    with pytest.raises(InputError, match=r"\(0 in test and 2 that have a single picture\)"):
        evaluate_knowledge(comparisons(run))


def test_a_source_that_can_judge_does(experiment: Experiment, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The procedural world: of four documents each, the first of whose pictures is drawn for the third."""

    def images(run: Run, split: str, items: Sequence[Any], neighbors: np.ndarray, k: int) -> tuple[Any, Any, Any]:
        pixels = np.stack([pixels_of(item.document.images[0]) for item in items])
        pixels[2] = pixels[0]
        return np.stack([pixels, pixels], axis=1), np.zeros(len(items), int), np.zeros(len(items))

    monkeypatch.setattr(stage, "drawn_images", images)
    monkeypatch.setattr(stage, "baseline_pictures", held_out.baseline_pictures)
    run = Run(experiment, Workdir(workdir, "tiny"))
    found = evaluate_knowledge({"ra_cm3": run})
    for values in found.values():
        assert (values["judges"], values["network"]) == (["source"], "")
        assert (values["questions"], values["entities"], values["guessing"]) == (4, 4, 0.25)
        assert values["left_out"] == {"documents": 0, "entities": 0, "questions": 0}
        assert values["shares"]["ra_cm3"]["source"]["kept"]["value"] == 0.75
        assert values["shares"]["original"]["source"]["kept"]["value"] == 1
    assert "The source of the training documents judges" in knowledge_summary(found)


def test_the_page_has_the_table_and_the_first_questions(run: Run) -> None:
    models = comparisons(run)
    metrics = evaluate_knowledge(models)
    page = Page(knowledge_report(models, metrics).read_text(encoding="utf-8"))
    table = page.tables[0]
    assert table == knowledge_rows(metrics["test"])
    assert [row[0] for row in table] == [
        "pictures of the right entity",
        *(
            f"{name}, {which}"
            for name in ("RA-CM3", "CM3", "RA-CM3, random documents")
            for which in ("best of 2", "first sample")
        ),
        "a copy of the first retrieved document",
        "nobody: the original picture",
        "guessing",
    ]
    share = metrics["test"]["shares"]["cm3"]["encoder"]["kept"]
    assert table[0][1] == "by the encoder"
    assert table[3][1] == f"20.0% ± {(share['high'] - share['low']) / 2:.1%}"
    assert table[-1][1] == "33.3%"
    summary = knowledge_summary(metrics)
    assert f"  CM3, best of 2: {table[3][1]} by the encoder" in summary
    for words in (
        "Left out: 1 of the documents,",
        "Left out: 1 of the entities (1 of the questions),",
        "The encoder also",
    ):
        assert words in summary
        assert words in page.text
    assert len(page.cards) == 5
    for card, key, answer in zip(page.cards, ASKED, told(models, "test"), strict=True):
        assert card.heading == f"{TEST[key][0]} number {key}"
        labels = ["real", *["document"] * len(OWN[key]), "RA-CM3", "CM3"]
        assert [figure.label for figure in card.figures] == labels
        shown = [TEST[key][1], *(NEWS[each][1] for each in OWN[key])]
        shown += [PICTURES[name][key][1] for name in ("ra_cm3", "cm3")]
        assert [int(figure.pixels[0, 0, 0]) for figure in card.figures] == shown
        for figure, name in zip(card.figures[-2:], ("ra_cm3", "cm3"), strict=True):
            said = answer["shows"][name]
            assert figure.caption.strip() == f"{'✓' if said == TEST[key][0] else '✗'} {said or 'undecided'}"


def test_the_recipes_know_what_was_drawn_and_who_judges(run: Run) -> None:
    """Another network judges the same drawings; another seed draws others, which are judged again."""
    own = run.experiment
    recipe = recipes.drawings(own, own)
    assert set(recipe.inputs) == {"train", "clip", "documents test", "neighbors test"}
    judged = recipes.knowledge(own, {"ra_cm3": recipe})
    assert set(judged.inputs) == {"drawings ra_cm3", *(f"documents {part}" for part in ("train", "memory", "news"))}
    settings = replace(own.evaluation, features=str(run.workdir.path.parent / "net.pth"))
    other = replace(own, evaluation=settings)
    assert recipes.drawings(other, own) == recipe
    assert recipes.knowledge(other, {"ra_cm3": recipe}) != judged
    assert recipes.knowledge(own, {"ra_cm3": recipes.drawings(own, own, 3)}) != judged
