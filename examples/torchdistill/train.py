"""What torchdistill's examples/torchvision/image_classification.py does with a config, less evaluation and devices."""

import sys

import torch
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies, load_ckpt
from torchdistill.core.distillation import get_distillation_box

from stablekd_fast import models

config = yaml_util.load_yaml_file(sys.argv[1])
import_dependencies(config["dependencies"])
teacher, student = (models.build(config["models"][f"{role}_model"]["key"], 10, 8) for role in ("teacher", "student"))
load_ckpt(config["models"]["teacher_model"]["src_ckpt"], model=teacher)
if config["models"]["teacher_model"]["src_ckpt"] is None:
    # The teacher is untrained: its batch norms shall have met the data at least.
    with torch.no_grad():
        for views in config["datasets"].values():
            for batch in views.source.batches(0, 28):
                teacher.train()(batch.images)
teacher.eval()
box = get_distillation_box(teacher, student, config["datasets"], config["train"], torch.device("cpu"), None, False, 1)
for epoch in range(box.num_epochs):
    box.pre_epoch_process(epoch=epoch)
    for images, targets, keys in box.train_data_loader:
        loss = box.forward_process(images, targets, keys)
        box.post_forward_process(loss=loss)
    print(f"epoch {epoch}: loss {loss.item():.4f}")
    box.post_epoch_process()
torch.save(student.state_dict(), config["models"]["student_model"]["dst_ckpt"])
