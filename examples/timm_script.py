"""timm's own training script with the fused divergence. Put this in front of its name:

python timm_script.py train.py DATA --model resnet18 --kd-model-name resnet50 --kd-temperature 4
"""

import runpy
import sys

import timm.task
import torch

from stablekd_fast.losses import KLDivWithLogitsLoss


class FastLogitDistillationTask(timm.task.LogitDistillationTask):
    def forward(self, input, target):
        output = self.trainable_module(input)
        with torch.no_grad():
            images = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            targets = self.teacher(images, return_features=False)
        task_loss = self.criterion(output, target)
        kd_loss = KLDivWithLogitsLoss(temperature=self.temperature)(output, targets)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


if __name__ == "__main__":
    timm.task.LogitDistillationTask = FastLogitDistillationTask
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
