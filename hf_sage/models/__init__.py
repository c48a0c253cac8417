"""Image classifiers: any vision checkpoint of transformers, CLIP's zero-shot head, tiny ones without download."""

from transformers import AutoConfig, AutoModelForImageClassification

from hf_sage.models.classifier import Head, image_classifier
from hf_sage.models.text_tower import with_text_tower, zero_shot_classifier
from hf_sage.models.tiny import TINY, TINY_CLIP, TINY_CONVNEXT, tiny_clip, tiny_convnext
from hf_sage.models.unused import freeze_unused, unused_parameters
from hf_sage.models.zero_shot import ZeroShotImageClassifier, ZeroShotImageClassifierConfig

__all__ = [
    "TINY",
    "TINY_CLIP",
    "TINY_CONVNEXT",
    "Head",
    "ZeroShotImageClassifier",
    "ZeroShotImageClassifierConfig",
    "freeze_unused",
    "image_classifier",
    "tiny_clip",
    "tiny_convnext",
    "unused_parameters",
    "with_text_tower",
    "zero_shot_classifier",
]

# With hf_sage.models imported, Auto classes and pipelines load a saved ZeroShotImageClassifier like any other model.
AutoConfig.register(ZeroShotImageClassifierConfig.model_type, ZeroShotImageClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(ZeroShotImageClassifierConfig, ZeroShotImageClassifier, exist_ok=True)
# Without hf_sage they need its code: it is saved beside the weights and runs if the user says `trust_remote_code=True`.
ZeroShotImageClassifierConfig.register_for_auto_class()
ZeroShotImageClassifier.register_for_auto_class("AutoModelForImageClassification")
