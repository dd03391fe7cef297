"""Saves a model that holds arrays as a checkpoint of jaxfp8."""

import os

import numpy as np

from jaxfp8.checkpoint.layout import unmerge_layer
from jaxfp8.checkpoint.manifest import Manifest
from jaxfp8.checkpoint.static_scales import required_keys, stored_static_scales
from jaxfp8.checkpoint.stored_arrays import EMBEDDING, FINAL_NORM, HEAD
from jaxfp8.checkpoint.tokenizer_files import TokenizerFiles
from jaxfp8.checkpoint.writer import CheckpointWriter
from jaxfp8.errors import InputError
from jaxfp8.model.llama import Llama


def save(model: Llama, folder: str | os.PathLike, tokenizer: TokenizerFiles | None = None) -> None:
  """Writes the new checkpoint `folder`, one layer in host memory at a time.

  Raises InputError for a model cut or padded for several devices, a folder that exists, or a full disk.
  """
  if model.shape.tensor != 1:
    raise InputError(f"save: the model must be loaded with tensor=1; got tensor={model.shape.tensor}. Load it again.")
  scale_names = tuple(key.partition("[")[0] for key in required_keys(model))
  provenance = {"source": "jaxfp8.save"}
  manifest = Manifest(model.config, model.recipe, tuple(model.formats), tokenizer, provenance, static_scales=scale_names)
  with CheckpointWriter(folder, manifest) as writer:
    weights = {EMBEDDING: model.embedding, FINAL_NORM: model.final_norm.weight}
    if not model.config.tied_embeddings:
      weights[HEAD] = model.head.weight
    writer.write({key: np.asarray(weight.get_value()) for key, weight in weights.items()})
    for layer in range(model.config.num_layers):
      writer.write(unmerge_layer(model, layer) | stored_static_scales(model, layer))
