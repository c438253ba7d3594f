"""Hugging Face Trainer: it trains the module as it is; a callback begins the epochs."""

import sys

import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from stablekd_fast import Blockwise
from stablekd_fast.integrations.views import SampleViews


class Begin(TrainerCallback):
    def on_epoch_begin(self, args, state, control, model, **_):
        model.begin(round(state.epoch))


def vit(layers: int) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=layers, num_labels=10))


def collate(items: list) -> dict:
    return dict(zip(("images", "labels", "keys"), default_collate(items)))


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
teacher, student = vit(4), vit(2)  # load the teacher's weights here
data = SampleViews("digits", views=4, batch_size=64)
skd = Blockwise(teacher, student, data, epochs, rows="teacher_rows")
settings = TrainingArguments(
    "checkpoints", num_train_epochs=epochs, per_device_train_batch_size=64, report_to="none", use_cpu=True
)
trainer = Trainer(skd, settings, train_dataset=data, data_collator=collate, callbacks=[Begin()])
print(trainer.train())
skd.close()
torch.save(student.state_dict(), "student.pt")
