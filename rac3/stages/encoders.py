"""Encoders: the frozen models, loaded, or fitted on the documents of `Data.fit_on`, then only read.

Fitted models may see what the memory holds, as a public CLIP has seen the web; they never see held-out documents.
"""

import shutil
from functools import lru_cache, partial
from pathlib import Path

from rac3 import recipes
from rac3.artifacts.workdir import Draft
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.published import load_clip
from rac3.documents.document import Document
from rac3.documents.reader import read_documents
from rac3.run import Run
from rac3.stages.fit.clip import fit_clip
from rac3.stages.fit.vqgan import fit_vqgan
from rac3.tokens.text import TextTokenizer
from rac3.training.checkpoint import CHECKPOINTS
from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.published import load_vqgan


def fit_encoders(run: Run) -> None:
    """Makes what is missing of the text tokenizer, the VQGAN and CLIP; checkpoints first, since they fail quickly.

    An encoder defined in the user's config needs nothing made.
    """
    experiment = run.experiment
    models = (recipes.text, experiment.text), (recipes.vqgan, experiment.vqgan), (recipes.clip, experiment.clip)
    missing = [
        (run.recipe(of), config)
        for of, config in models
        if isinstance(config, TextTokenizer | FrozenVQGAN | FrozenCLIP) and not run.workdir.find(run.recipe(of))
    ]
    missing.sort(key=lambda pair: pair[1].checkpoint is None)
    sources = {**experiment.data.memory, **experiment.data.sources()}
    fit_on = {split: sources[split] for split in experiment.data.fit_on}
    # Most limits are equal.
    where = Path(experiment.data_dir), experiment.filter
    read = lru_cache(maxsize=1)(partial(read_documents, fit_on, *where, framing=experiment.framing))
    for recipe, config in missing:
        limit = recipes.text_documents(experiment) if isinstance(config, TextTokenizer) else config.fit.max_documents
        documents = read(limit) if config.checkpoint is None else []
        with run.workdir.write(recipe) as draft:
            _make(run, config, documents, draft)
            shutil.rmtree(draft.folder / CHECKPOINTS, ignore_errors=True)  # of the fitting: no longer needed


def _make(run: Run, config: TextTokenizer | FrozenVQGAN | FrozenCLIP, documents: list[Document], draft: Draft) -> None:
    """Loads or fits one of the models, and saves it."""
    experiment = run.experiment
    if isinstance(config, TextTokenizer):
        if config.checkpoint is None:
            config.fit((document.text for document in documents if document.text), draft.folder)
        tokenizer = config.load(draft.folder)
        draft.counts["ids"] = tokenizer.size
        if config.checkpoint is not None:
            print(f"text tokenizer {config.checkpoint}: {tokenizer.summary()}")
    elif isinstance(config, FrozenVQGAN):
        if config.checkpoint is not None:
            loaded = load_vqgan(Path(config.checkpoint), config.resolution)
            loaded.save(draft.folder)
            print(f"VQGAN {config.checkpoint}: {loaded.summary()}")
        else:
            params = fit_vqgan(config, experiment.seed, experiment.mesh.build(), documents, draft.folder)
            VQGANCheckpoint(config.model, params).save(draft.folder)
    elif config.checkpoint is not None:
        load_clip(config.checkpoint).save(draft.folder)
    else:
        mesh = experiment.mesh.build()
        fit_clip(config, experiment.seed, mesh, documents, draft.folder).save(draft.folder)
