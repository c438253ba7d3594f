"""Lightning: the module inside a LightningModule, whose checkpoints then hold it."""

import sys

import lightning
import torch
from torch.utils.data import DataLoader

from stablekd_fast import Blockwise, models
from stablekd_fast.integrations.views import SampleViews


class Distillation(lightning.LightningModule):
    def __init__(self, skd):
        super().__init__()
        self.skd = skd

    def on_train_epoch_start(self):
        self.skd.begin(self.current_epoch)

    def training_step(self, batch, _):
        out = self.skd(*batch)
        self.log_dict({"loss": out.loss.detach(), **out.terms})
        return out.loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.skd.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.skd.rate_at)]


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
teacher = models.build("resnet32", 10, 8)  # load the teacher's weights here
student = models.build("resnet20", 10, 8)
data = SampleViews("digits", views=4, batch_size=64)
skd = Blockwise(teacher, student, data, epochs, rows="teacher_rows")
trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False)
trainer.fit(Distillation(skd), DataLoader(data, batch_size=64, shuffle=True))
skd.close()
print(f"{trainer.global_step} steps, last loss {trainer.callback_metrics['loss']:.4f}")
torch.save(student.state_dict(), "student.pt")
