"""The frozen models: loaded, or fitted on the documents of `Data.fit_on`, then only read.

Fitted models may see what the memory holds, as a public CLIP has seen the web; they never see held-out documents.
"""

import shutil
from functools import lru_cache, partial
from pathlib import Path

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.clip.checkpoints import load_clip
from rac3.clip.encoder import Encoder
from rac3.documents.reader import read_documents
from rac3.experiment import Experiment
from rac3.stages.fit.clip import fit_clip
from rac3.stages.fit.vqgan import fit_vqgan
from rac3.tokens.text import Tokenizer
from rac3.training.checkpoint import CHECKPOINTS
from rac3.vqgan.checkpoints import load_vqgan
from rac3.vqgan.codec import ImageTokenizer
from rac3.vqgan.frozen import save_vqgan


def fit_encoders(experiment: Experiment, workdir: Workdir) -> None:
    """Makes what is missing of the text tokenizer, the VQGAN and CLIP; checkpoints first, since they fail quickly."""
    missing = [
        recipe
        for recipe in (recipes.text(experiment), recipes.vqgan(experiment), recipes.clip(experiment))
        if workdir.find(recipe) is None
    ]
    if not missing:
        return
    checkpoints = {stage: getattr(experiment, stage).checkpoint for stage in ("text", "vqgan", "clip")}
    missing.sort(key=lambda recipe: checkpoints[recipe.stage] is None)
    limits = {
        "text": recipes.text_documents(experiment),
        "vqgan": experiment.vqgan.fit.max_documents,
        "clip": experiment.clip.fit.max_documents,
    }
    sources = {**experiment.data.memory, **experiment.data.sources()}
    fit_on = {split: sources[split] for split in experiment.data.fit_on}
    # The limits are equal more often than not.
    read = lru_cache(maxsize=1)(partial(read_documents, fit_on, Path(experiment.data_dir), experiment.filter))
    for recipe in missing:
        documents = read(limits[recipe.stage]) if checkpoints[recipe.stage] is None else []
        with workdir.write(recipe) as draft:
            if recipe.stage == "text":
                if experiment.text.checkpoint is None:
                    experiment.text.fit((document.text for document in documents if document.text), draft.folder)
                tokenizer = experiment.text.load(draft.folder)
                draft.counts["ids"] = tokenizer.size
                if experiment.text.checkpoint is not None:
                    print(f"text tokenizer {experiment.text.checkpoint}: {tokenizer.summary()}")
            elif recipe.stage == "vqgan" and experiment.vqgan.checkpoint is not None:
                _convert_vqgan(Path(experiment.vqgan.checkpoint), experiment.vqgan.resolution, draft.folder)
            elif recipe.stage == "vqgan":
                mesh = experiment.mesh.build()
                params = fit_vqgan(experiment.vqgan, experiment.seed, mesh, documents, draft.folder)
                save_vqgan(draft.folder, experiment.vqgan.model, params)
            elif experiment.clip.checkpoint is not None:
                load_clip(experiment.clip.checkpoint).save(draft.folder)
            else:
                mesh = experiment.mesh.build()
                fit_clip(experiment.clip, experiment.seed, mesh, documents, draft.folder).save(draft.folder)
            shutil.rmtree(draft.folder / CHECKPOINTS, ignore_errors=True)  # of the fitting: no more needed


def open_text(experiment: Experiment, workdir: Workdir) -> Tokenizer:
    return experiment.text.load(workdir.require(recipes.text(experiment), "rac3 encoders").folder)


def open_vqgan(experiment: Experiment, workdir: Workdir) -> ImageTokenizer:
    artifact = workdir.require(recipes.vqgan(experiment), "rac3 encoders")
    return experiment.vqgan.open(artifact.folder)


def open_clip(experiment: Experiment, workdir: Workdir) -> Encoder:
    artifact = workdir.require(recipes.clip(experiment), "rac3 encoders")
    return experiment.clip.open(artifact.folder)


def _convert_vqgan(checkpoint: Path, resolution: int | None, folder: Path) -> None:
    loaded = load_vqgan(checkpoint, resolution)
    save_vqgan(folder, loaded.config, loaded.params)
    print(f"VQGAN {checkpoint}: {loaded.summary()}")
