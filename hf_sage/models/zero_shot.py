"""An image classifier that starts as CLIP's or SigLIP's own zero-shot prediction.

This file is saved beside the weights of such a model, so that it loads where hf_sage is not installed (by
``trust_remote_code=True``): it imports torch and transformers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple


class ZeroShotImageClassifierConfig(PreTrainedConfig):
    """The configuration of a `ZeroShotImageClassifier`.

    Attributes:
        vision_config: Configuration of the vision tower, with its ``model_type`` where it is a dictionary; by default
            that of CLIP ViT-B/32.
        projection_dim: Width of the space that images and texts share, where the tower has a projection into it (CLIP);
            ``None`` where it has none (SigLIP).
        logit_bias: What is added to every logit: SigLIP's, 0 for CLIP. The same for all classes, it moves no softmax
            and has no gradient; it is kept so that the logits are SigLIP's.
    """

    model_type = "hf_sage_zero_shot"
    sub_configs = {"vision_config": AutoConfig}  # noqa: RUF012  # as every composite configuration of transformers

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    projection_dim: int | None = None
    logit_bias: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Builds the vision tower's configuration from a dictionary."""
        if not isinstance(self.vision_config, PreTrainedConfig):
            values = {"model_type": "clip_vision_model"} | (self.vision_config or {})
            self.vision_config = AutoConfig.for_model(**values)
        super().__post_init__(**kwargs)


class ZeroShotImageClassifier(PreTrainedModel):
    """CLIP's or SigLIP's vision tower with its projection, and a linear classifier on the normalised features.

    The logits are W f/‖f‖ + b with f the projected feature of the image. With W = exp(logit_scale) · t/‖t‖ for the
    text features t of the class prompts (`hf_sage.models.zero_shot_classifier`), they are the ``logits_per_image`` of
    the model with both towers. W is trained like everything else; to keep the texts fixed, freeze it:
    ``model.classifier.requires_grad_(False)``.
    """

    config_class = ZeroShotImageClassifierConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch, so Trainer need not
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ZeroShotImageClassifierConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        self.vision_model = AutoModel.from_config(vision)
        width = vision.hidden_size if config.projection_dim is None else config.projection_dim
        self.visual_projection = (
            nn.Identity() if config.projection_dim is None else nn.Linear(vision.hidden_size, width, bias=False)
        )
        self.classifier = nn.Linear(width, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: Images of shape (rows, channels, height, width), as the processor gives them.
            labels: Classes of shape (rows,), int64; −100 is left out of the loss.
            num_items_in_batch: By how many labels the summed loss is divided: those of the whole accumulated batch,
                which Trainer knows. By default the loss is the mean over these rows.
            interpolate_pos_encoding: Whether to take images of another size than the tower was trained on.
            **kwargs: What the vision tower takes, e.g. ``output_hidden_states``.

        Returns:
            ``logits`` of shape (rows, classes), and the cross entropy as ``loss`` where there are labels.
        """
        outputs = self.vision_model(
            pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        features = normalize(self.visual_projection(outputs.pooler_output), dim=-1)
        logits = self.classifier(features) + self.config.logit_bias
        loss = None
        if labels is not None:
            at_least_fp32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = fixed_cross_entropy(at_least_fp32, labels, num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
