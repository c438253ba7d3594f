"""Lightning: the loss inside training_step."""

import sys

import lightning
import torch
from torch.utils.data import DataLoader

from stablekd_fast import models
from stablekd_fast.integrations.views import SampleViews
from stablekd_fast.losses import KDLoss


class Distillation(lightning.LightningModule):
    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher.eval().requires_grad_(False), student
        self.criterion = KDLoss(temperature=4.0)

    def on_train_epoch_start(self):
        self.teacher.eval()  # Lightning sets all modules to training mode
        self.trainer.train_dataloader.dataset.set_epoch(self.current_epoch)

    def training_step(self, batch, _):
        images, labels, _ = batch
        self.loss = self.criterion(self.student(images), self.teacher(images), labels)
        return self.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)


data = SampleViews("digits", views=4, batch_size=64)
data.set_epoch(0)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
teacher = models.build("resnet32", 10, 8)  # load its weights here
distillation = Distillation(teacher, models.build("resnet20", 10, 8))
trainer.fit(distillation, DataLoader(data, batch_size=64, shuffle=True))
print(f"{trainer.global_step} steps, last loss {distillation.loss:.4f}")
