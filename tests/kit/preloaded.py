"""What the children of `forks` find loaded."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

import sparsmith.app.tuning
import sparsmith.cli
import sparsmith.crafting.apply
import sparsmith.crafting.base_model
import sparsmith.crafting.checkpoint
import sparsmith.crafting.plan
import sparsmith.data
import sparsmith.evaluating
import sparsmith.exporting.prove
import sparsmith.reporting.plots
import sparsmith.training
import sparsmith.training.arguments
from tests.kit import strangers

LOADED = (torch, transformers, sparsmith)

# drawing takes most of the time of so small a run, and changes nothing that a trial looks at: the page is written with empty pictures
sparsmith.reporting.plots.svg = lambda figure, label="": "<svg></svg>"
# exports are proved by forks of a clean process that the trial started, where it did
sparsmith.exporting.prove._stranger = strangers.ask

# children need not walk what was loaded here, whenever they collect
gc.collect()
gc.freeze()
