"""Write weights for other programs: one folder per export, with a model card."""

from pipeline.weights.exports.card import Origin as Origin
from pipeline.weights.exports.card import Result as Result
from pipeline.weights.exports.folders import export_autoencoder as export_autoencoder
from pipeline.weights.exports.folders import export_classifier as export_classifier
from pipeline.weights.exports.folders import export_encoder as export_encoder
from pipeline.weights.exports.onnx_format import OnnxExport as OnnxExport
from pipeline.weights.exports.onnx_format import export_onnx as export_onnx
from pipeline.weights.exports.timm_format import timm_model as timm_model
