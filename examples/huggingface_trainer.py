"""Hugging Face Trainer: the loss inside compute_loss."""

import sys
import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from stablekd_fast.data import open_dataset
from stablekd_fast.losses import KDLoss


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.criterion = teacher.eval().to(self.args.device), KDLoss(temperature=4.0)

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        with torch.no_grad():
            targets = self.teacher(**inputs).logits
        outputs = model(**inputs)
        loss = self.criterion(outputs.logits, targets, labels)
        return (loss, outputs) if return_outputs else loss


def vit(layers: int) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=layers, num_labels=10))


digits = open_dataset("digits").train
data = [
    {"pixel_values": image.permute(2, 0, 1) / 255, "labels": label}
    for image, label in zip(digits.images, digits.labels)
]
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
teacher = vit(4)  # load its weights here
with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=64, report_to="none", use_cpu=True
    )
    print(DistillationTrainer(vit(2), settings, train_dataset=data, teacher=teacher).train())
