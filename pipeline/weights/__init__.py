"""Read and write weight files: this project's own, and those of the official MAE, timm and Hugging Face."""

from pipeline.weights.exports import export_autoencoder as export_autoencoder
from pipeline.weights.exports import export_encoder as export_encoder
from pipeline.weights.foreign import ForeignWeights as ForeignWeights
from pipeline.weights.foreign import read_foreign_weights as read_foreign_weights
from pipeline.weights.imports import ImportedAutoencoder as ImportedAutoencoder
from pipeline.weights.imports import ImportedEncoder as ImportedEncoder
from pipeline.weights.imports import ImportReport as ImportReport
from pipeline.weights.imports import import_autoencoder as import_autoencoder
from pipeline.weights.imports import import_encoder as import_encoder
from pipeline.weights.own import CONFIG as CONFIG
from pipeline.weights.own import ENCODER as ENCODER
from pipeline.weights.own import MODEL as MODEL
from pipeline.weights.own import read_encoder as read_encoder
from pipeline.weights.own import read_encoder_as as read_encoder_as
from pipeline.weights.own import read_encoder_config as read_encoder_config
from pipeline.weights.own import read_weights as read_weights
from pipeline.weights.own import weights_digest as weights_digest
from pipeline.weights.own import write_weights as write_weights
from pipeline.weights.starting import StartSummary as StartSummary
from pipeline.weights.starting import start_summary as start_summary
from pipeline.weights.starting import starting_weights as starting_weights
